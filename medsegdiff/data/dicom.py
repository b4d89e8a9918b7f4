"""DICOM: a folder with one series, or one file (a slice, an enhanced multi-frame image, a radiograph).

Slices are ordered by their position along their common normal (PS3.3 C.7.6.2), never by name or instance number, and
have to lie evenly: a missing or doubled slice would move everything behind it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.pixels.utils import pixel_array
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from medsegdiff.data.guard import DataFileError, check_complete, check_unpacking, check_voxels, decoding
from medsegdiff.data.images import Placement, Volume
from medsegdiff.data.orientation import LPS_TO_RAS, place, volume

MAX_FILES = 20_000  # of one folder, and frames of one file
TOLERANCE = 0.02  # of the distance of slices: scanners round positions to hundredths of a millimetre
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601
_NOT_IMAGES = ("SEG", "RTDOSE")  # they have rows and columns, yet are derived from the image that is wanted
_HEADER = [
    "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality", "SeriesDescription", "SeriesInstanceUID", "SeriesNumber",
    "SliceThickness", "SpacingBetweenSlices", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "ImagerPixelSpacing", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "PixelRepresentation", "RescaleIntercept", "RescaleSlope", "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice: where its pixels are, where it lies and how its values are scaled."""

    path: Path
    index: int  # of the frame in its file
    position: NDArray[np.float64] | None  # (3,) mm of the first pixel's centre, LPS; None where unknown
    directions: NDArray[np.float64] | None  # (2, 3): unit steps along a row, and along a column
    spacing_mm: tuple[float, float] | None  # between rows, between columns
    thickness_mm: float | None
    slope: float
    intercept: float


@dataclass(frozen=True, eq=False)
class Series:
    """One image as its headers describe it; no pixel has been read."""

    frames: tuple[Frame, ...]  # along the stored third axis
    rows: int
    columns: int
    samples: int  # 1, or 3 for colour
    placement: Placement | None  # of the stored axes (columns, rows, frames); None for a radiograph or a photograph


def read_dicom(path: Path, channels: int) -> Volume:
    """Read a series as a volume turned to RAS axes; a single image without a position as a picture.

    Values are rescaled to the modality's units, MONOCHROME1 is inverted so that large values are bright.

    Args:
        path: a folder with exactly one series of images, or one file.

    Raises:
        DataFileError: no series or several, slices that are doubled, missing, turned or sheared, a compression without
            a decoder here, and see `read_image`.
    """
    with decoding(path), quiet():
        series = open_series(path)
        if channels not in (1, series.samples):
            raise DataFileError(path, f"the images hold {series.samples} channel(s), {channels} are declared for them")
        array = np.empty((series.columns, series.rows, len(series.frames), channels), np.float32, order="F")
        numbered = sorted(enumerate(series.frames), key=lambda pair: (str(pair[1].path), pair[1].index))
        for file, group in groupby(numbered, key=lambda pair: pair[1].path):
            pixels = _pixels(file, series, channels)
            for number, frame in group:
                array[:, :, number] = pixels[frame.index].swapaxes(0, 1) * np.float32(frame.slope) + np.float32(
                    frame.intercept
                )
    if series.placement is None:
        return Volume(np.ascontiguousarray(array.transpose(3, 1, 0, 2)), series.frames[0].spacing_mm, None)
    return volume(array, series.placement)


def check_dicom(path: Path) -> None:
    """`check_image_file` for DICOM: headers alone."""
    with decoding(path), quiet():
        open_series(path)


def files_of(path: Path) -> list[Path]:
    """The DICOM files of a folder (other files are passed over), by name; of a file, itself.

    Raises:
        DataFileError: there is none, or there are more than 20,000.
    """
    if not path.is_dir():
        return [path]
    found = []
    for file in path.iterdir():
        if file.name.startswith(".") or file.name == "DICOMDIR" or not file.is_file():
            continue
        with open(file, "rb") as handle:
            if handle.read(132)[128:] == b"DICM":
                found.append(file)
        if len(found) > MAX_FILES:
            raise DataFileError(path, f"the folder holds more than {MAX_FILES:,} DICOM files")
    if not found:
        raise DataFileError(path, "there is no DICOM file in this folder")
    return sorted(found)


def open_series(path: Path) -> Series:
    """Read the headers of a folder's only series of images, or of one file; sizes are checked, slices ordered.

    Raises:
        DataFileError: see `read_dicom`.
    """
    series: dict[str, list[tuple[Path, Any]]] = {}
    for file in files_of(path):
        header = _header(file)
        if "Rows" in header and header.get("Modality") not in _NOT_IMAGES:
            series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((file, header))
    if len(series) != 1:
        raise DataFileError(path, _which(series))
    (members,) = series.values()
    first_file, first = members[0]
    shape = (int(first.Columns), int(first.Rows), int(first.get("SamplesPerPixel", 1)))
    for file, header in members:
        found = (int(header.Columns), int(header.Rows), int(header.get("SamplesPerPixel", 1)))
        if found != shape:
            raise DataFileError(file, f"its size is {found[0]}x{found[1]}, that of {first_file.name} is {shape[:2]}")
        _check_declared(file, header)
    frames = tuple(frame for file, header in members for frame in _frames(file, header))
    check_voxels(path, (*shape, len(frames)))
    columns, rows, samples = shape
    if frames[0].position is None:
        if len(frames) > 1:
            raise DataFileError(path, f"its {len(frames)} frames have no position in the patient; one picture is read")
        return Series(frames, rows, columns, samples, None)
    frames, affine = _stacked(path, frames)
    return Series(frames, rows, columns, samples, place(path, LPS_TO_RAS @ affine, (columns, rows, len(frames))))


def _which(series: dict[str, list[tuple[Path, Any]]]) -> str:
    if not series:
        return "there is no DICOM image in it"
    named = [
        f"{header.get('SeriesNumber', '?')} {header.get('SeriesDescription', '(no description)')!r}: {len(members)}"
        for members in series.values()
        for header in (members[0][1],)
    ]
    return f"it holds {len(series)} series ({'; '.join(named[:5])} files); keep one in the folder"


def _header(file: Path) -> Any:
    """What is needed of a header. Other elements, however long they say they are, are passed over."""
    with decoding(file):
        meta = pydicom.filereader.read_file_meta_info(file)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:  # would be inflated whole, without a limit
            raise DataFileError(file, "deflated DICOM is not read; rewrite it uncompressed (dcmconv +te)")
        return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_HEADER))


@contextmanager
def quiet() -> Iterator[None]:
    """pydicom remarks on every value a scanner writes in its own way; Pillow's warning of a bomb is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _check_declared(file: Path, header: Any) -> None:
    """Compare what a file's header declares with the file's size."""
    frames = int(header.get("NumberOfFrames") or 1)
    samples = int(header.get("SamplesPerPixel", 1))
    shape = (int(header.Columns), int(header.Rows), frames, samples)
    check_voxels(file, shape)
    if frames > MAX_FILES:
        raise DataFileError(file, f"the header declares {frames:,} frames; the limit is {MAX_FILES:,}")
    photometric = str(header.get("PhotometricInterpretation", "MONOCHROME2"))
    if photometric == "PALETTE COLOR" or samples not in (1, 3) or int(header.BitsAllocated) not in (8, 16, 32):
        raise DataFileError(
            file, f"pixels of {samples} x {header.BitsAllocated} bits ({photometric}) are not read; 8, 16, 32 bits are"
        )
    if header.get("ModalityLUTSequence"):
        raise DataFileError(file, "its values go through a modality table, which is not read; a slope and intercept is")
    declared = int(np.prod(shape, dtype=object)) * int(header.BitsAllocated) // 8
    held = file.stat().st_size
    if header.file_meta.TransferSyntaxUID.is_compressed:
        check_unpacking(file, declared, held)
    else:
        check_complete(file, declared, held)


def _frames(file: Path, header: Any) -> list[Frame]:
    """The frames of one file: one with attributes of its own, or several with functional groups (PS3.3 C.7.6.16)."""
    count = int(header.get("NumberOfFrames") or 1)
    if "PerFrameFunctionalGroupsSequence" not in header:
        return [_frame(file, index, [header]) for index in range(count)]
    own = header.PerFrameFunctionalGroupsSequence
    shared = header.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()]
    if len(own) != count:
        raise DataFileError(file, f"the header declares {count} frames and describes {len(own)}")
    groups = ("PlanePosition", "PlaneOrientation", "PixelMeasures", "PixelValueTransformation")
    return [
        _frame(file, index, [item[0] for of in (frame, shared[0]) for g in groups if (item := of.get(f"{g}Sequence"))])
        for index, frame in enumerate(own)
    ]


def _frame(file: Path, index: int, places: Sequence[Any]) -> Frame:
    """One frame from the datasets that may hold its attributes; the first that does is believed."""

    def numbers(name: str, count: int) -> NDArray[np.float64] | None:
        value = next((place.get(name) for place in places if place.get(name) is not None), None)
        if value is None:
            return None
        found = np.array([float(part) for part in (value if count > 1 else [value])])
        if found.size != count or not np.isfinite(found).all():
            raise DataFileError(file, f"{name} is {value}; {count} finite number(s) are due")
        return found

    directions = numbers("ImageOrientationPatient", 6)
    spacing = numbers("PixelSpacing", 2)
    if spacing is None:
        spacing = numbers("ImagerPixelSpacing", 2)  # a radiograph's, at the detector
    thickness = numbers("SpacingBetweenSlices", 1)
    if thickness is None:
        thickness = numbers("SliceThickness", 1)
    slope, intercept = numbers("RescaleSlope", 1), numbers("RescaleIntercept", 1)
    return Frame(
        file,
        index,
        numbers("ImagePositionPatient", 3),
        None if directions is None else directions.reshape(2, 3),
        None if spacing is None else (float(spacing[0]), float(spacing[1])),
        None if thickness is None else float(thickness[0]),
        1.0 if slope is None else float(slope[0]),
        0.0 if intercept is None else float(intercept[0]),
    )


def _stacked(path: Path, frames: Sequence[Frame]) -> tuple[tuple[Frame, ...], NDArray[np.float64]]:
    """The frames in the order in which they lie, and the affine (columns, rows, frames) -> mm, LPS.

    Raises:
        DataFileError: no place in the patient, frames turned otherwise than the first, doubled, missing or sheared.
    """
    first = frames[0]
    for frame in frames:
        if frame.position is None or frame.directions is None or frame.spacing_mm is None:
            raise DataFileError(frame.path, "it lacks a position, an orientation or a pixel spacing")
    positions = np.array([frame.position for frame in frames])
    directions = np.array([frame.directions for frame in frames])
    spacings = np.array([frame.spacing_mm for frame in frames])
    if np.abs(directions[0] @ directions[0].T - np.eye(2)).max() > 1e-3:
        raise DataFileError(first.path, "ImageOrientationPatient does not hold two unit vectors at a right angle")
    alike = np.isclose(directions, directions[0], atol=1e-3).all((1, 2)) & np.isclose(spacings, spacings[0]).all(1)
    for frame, same in zip(frames, alike, strict=True):
        if not same:
            raise DataFileError(
                frame.path, f"its orientation or pixel spacing is not that of {first.path.name}; is it a localizer?"
            )
    normal = np.cross(*directions[0])
    order = np.argsort(positions @ normal, kind="stable")
    frames, positions = [frames[i] for i in order], positions[order]
    step = _step(path, frames, positions, normal)
    affine = np.eye(4)
    affine[:3, 0] = directions[0, 0] * spacings[0, 1]  # along a row the column changes
    affine[:3, 1] = directions[0, 1] * spacings[0, 0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    return tuple(frames), affine


def _step(
    path: Path, frames: Sequence[Frame], positions: NDArray[np.float64], normal: NDArray[np.float64]
) -> NDArray[np.float64]:
    """From one slice to the next in mm, the same for all."""
    if len(frames) == 1:
        return np.asarray(normal * (frames[0].thickness_mm or 1.0))
    gaps = np.diff(positions @ normal)
    usual = float(np.median(gaps))
    allowed = max(0.01, TOLERANCE * usual)
    for number, gap in enumerate(gaps):
        pair = f"{_name(frames[number])} and {_name(frames[number + 1])}"
        if gap < 1e-3:
            raise DataFileError(
                path,
                f"{pair} lie at the same place, {np.count_nonzero(gaps < 1e-3)} such pairs in all; are there several "
                "times, echoes or b-values? Keep one volume in the folder",
            )
        if abs(gap - usual) > allowed:
            raise DataFileError(path, f"between {pair} lie {gap:.2f} mm, elsewhere {usual:.2f} mm; is a slice missing?")
    step = (positions[-1] - positions[0]) / (len(frames) - 1)
    if np.linalg.norm(step - (step @ normal) * normal) > allowed:
        raise DataFileError(path, "its slices are sheared (a tilted gantry), which is not read; resample them first")
    return np.asarray(step)


def _name(frame: Frame) -> str:
    return frame.path.name if frame.index == 0 else f"{frame.path.name} frame {frame.index + 1}"


def _pixels(file: Path, series: Series, channels: int) -> NDArray[np.float32]:
    """Stored values of one file: (frames, rows, columns, channels), bright is large."""
    with decoding(file):
        data = pydicom.dcmread(file)
        syntax = data.file_meta.TransferSyntaxUID
        if syntax.is_compressed and syntax != RLELossless:
            _check_codestreams(file, data, series)
        try:
            values = pixel_array(data)
        except (RuntimeError, NotImplementedError) as error:
            raise DataFileError(
                file,
                f"pixels compressed as {syntax.name} could not be unpacked ({error}). Install pylibjpeg[all], or "
                "rewrite the files uncompressed (gdcmconv --raw)",
            ) from error
        shape = (-1, series.rows, series.columns, series.samples)
        found: NDArray[np.float32] = values.reshape(shape).astype(np.float32)
        if data.PhotometricInterpretation == "MONOCHROME1":
            found = np.float32(-1 if data.PixelRepresentation else 2**data.BitsStored - 1) - found
    return found @ _LUMA[:, None] if channels < series.samples else found


def _check_codestreams(file: Path, data: Any, series: Series) -> None:
    """A compressed frame carries a size of its own, and decoders take memory for that one."""
    for frame in pydicom.encaps.generate_frames(data.PixelData, number_of_frames=int(data.get("NumberOfFrames") or 1)):
        size = _codestream_size(frame)
        if size != (series.rows, series.columns):
            raise DataFileError(file, f"a compressed frame is {size}, the header says {series.rows, series.columns}")


def _codestream_size(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns of a JPEG, JPEG-LS or JPEG 2000 codestream (ITU-T T.81 B.2.2, T.800 A.5.1)."""
    at = frame.find(b"\xff\x4f\xff\x51", 0, 256)
    if at >= 0:
        x1, y1, x0, y0 = (int.from_bytes(frame[at + 8 + 4 * i : at + 12 + 4 * i], "big") for i in range(4))
        return y1 - y0, x1 - x0
    at = 2
    while len(frame) > at + 9 and frame[at] == 0xFF:
        marker = frame[at + 1]
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:  # a frame header
            return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")
        at += 1 if marker == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None
