"""ProstateX: zones of the prostate on T2-weighted MR, as The Cancer Imaging Archive distributes them.

Images and zones are DICOM: the series of the PROSTATEx collection, and one DICOM segmentation (SEG) a patient that
names the series it was drawn on. What belongs together is read from the files, not from the names of their folders,
which depend on the program they were fetched with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medsegdiff.data.guard import DataFileError, check_voxels, decoding
from medsegdiff.progress import Progress, report
from simulations.published.layout import Converted, Found, LayoutError, Published, Row

if TYPE_CHECKING:
    from pydicom import Dataset

# What the label of a segment says of its zone -> value in the mask: 1 peripheral zone, 2 transition zone, 3 anterior
# fibromuscular stroma, 4 distal prostatic urethra.
ZONES = {"peripheral zone": 1, "transition zone": 2, "fibromuscular stroma": 3, "urethra": 4}

_TAGS = ["Modality", "PatientID", "SeriesInstanceUID", "ReferencedSeriesSequence", "SegmentSequence"]


@dataclass(frozen=True)
class _Series:
    """One series, a folder of files."""

    folder: Path
    uid: str


@dataclass(frozen=True, eq=False)
class _Frame:
    """One plane of a segmentation."""

    segment: int
    corners: NDArray[np.float64]  # (3, 3), mm, LPS: centres of the first pixel, of the first row's and column's last
    inside: NDArray[np.bool_]  # (rows, columns)


def _read(source: Path) -> Found:
    series: dict[str, _Series] = {}
    zones: list[tuple[Path, Dataset]] = []
    folders = sorted({path.parent for path in source.rglob("*.dcm") if not path.name.startswith(".")})
    for done, folder in enumerate(folders):
        report(Progress("headers", done, len(folders)))
        for file, header in _headers(folder):
            if str(header.Modality) == "SEG":
                zones += [(file, header)] if _numbers_of_zones(header) else []
            else:
                uid = str(header.SeriesInstanceUID)
                series[uid] = _Series(folder, uid)
    if not zones:
        raise LayoutError(f"no DICOM segmentation of the prostate's zones lies under {source}")
    return Found([_row(file, header, series) for file, header in zones])


def _headers(folder: Path) -> Iterator[tuple[Path, Dataset]]:
    """The first file's header, which stands for the series; of segmentations, of which a file is one, each."""
    from pydicom import dcmread

    for path in sorted(folder.glob("*.dcm")):
        if path.name.startswith("."):
            continue
        with decoding(path):
            header = dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
            missing = [tag for tag in _TAGS[:3] if tag not in header]
        if missing:
            raise DataFileError(path, f"the DICOM header lacks {', '.join(missing)}")
        yield path, header
        if header.Modality != "SEG":
            return


def _numbers_of_zones(header: Dataset) -> dict[int, int]:
    """Segment number -> value in the mask; empty for a segmentation of something else (the whole gland)."""
    found: dict[int, int] = {}
    for segment in header.get("SegmentSequence", ()):
        types = segment.get("SegmentedPropertyTypeCodeSequence", ())
        text = " ".join([str(segment.get("SegmentLabel", "")), *(str(item.get("CodeMeaning", "")) for item in types)])
        found |= {int(segment.SegmentNumber): value for name, value in ZONES.items() if name in text.lower()}
    return found


def _row(file: Path, header: Dataset, series: dict[str, _Series]) -> Row:
    patient = str(header.PatientID)
    named = [str(item.SeriesInstanceUID) for item in header.get("ReferencedSeriesSequence", ())]
    drawn_on = next((series[uid] for uid in named if uid in series), None)
    if drawn_on is None:
        raise LayoutError(
            f"the T2 series that the zones of {patient} were drawn on (SeriesInstanceUID {', '.join(named) or 'none'}) "
            "is not there"
        )
    return Row(
        case_id=patient,
        patient_id=patient,
        images=(Converted(f"{patient}.nii.gz", partial(_write_image, drawn_on)),),
        masks=(Converted(f"{patient}.nii.gz", partial(_write_mask, file, drawn_on)),),
    )


def _write_image(series: _Series, target: Path) -> None:
    import SimpleITK

    SimpleITK.WriteImage(_read_series(series), str(target))


def _read_series(series: _Series) -> Any:
    """The series as an image of SimpleITK, slices in the order of their place.

    Raises:
        DataFileError: the files cannot be read as one volume, or slices are missing between others.
    """
    import SimpleITK

    sitk: Any = SimpleITK  # annotated in part only
    with decoding(series.folder):
        reader = sitk.ImageSeriesReader()
        files = reader.GetGDCMSeriesFileNames(str(series.folder), series.uid)
        first = sitk.ImageFileReader()
        first.SetFileName(files[0])
        first.ReadImageInformation()
        check_voxels(series.folder, (*first.GetSize()[:2], len(files)))
        reader.SetFileNames(files)
        reader.MetaDataDictionaryArrayUpdateOn()
        image = reader.Execute()
        places = [reader.GetMetaData(number, "0020|0032").split("\\") for number in range(len(files))]
        steps = np.linalg.norm(np.diff(np.array(places, float), axis=0), axis=1)
    if len(steps) and np.ptp(steps) > 0.1 * image.GetSpacing()[2]:
        raise DataFileError(
            series.folder,
            f"its slices lie {steps.min():.2f} to {steps.max():.2f} mm apart: one is missing or there twice",
        )
    return image


def _write_mask(file: Path, series: _Series, target: Path) -> None:
    """The zones on the grid of the series they were drawn on.

    Raises:
        DataFileError: the segmentation is not binary, lies on another grid, or gives a voxel two zones.
    """
    import SimpleITK
    from pydicom import dcmread

    sitk: Any = SimpleITK
    image = _read_series(series)
    with decoding(file):
        segmentation = dcmread(file)
        frames = _frames(file, segmentation)
    mask = np.zeros(image.GetSize()[::-1], np.uint8)  # slices, rows, columns
    zones = _numbers_of_zones(segmentation)
    for frame in frames:
        if frame.segment not in zones:
            continue
        plane = mask[_slice_of(file, image, frame)]
        twice = np.count_nonzero(plane[frame.inside])
        if twice:
            raise DataFileError(file, f"{twice:,} voxels of one slice belong to two zones")
        plane[frame.inside] = zones[frame.segment]
    drawn = sitk.GetImageFromArray(mask)
    drawn.CopyInformation(image)
    sitk.WriteImage(drawn, str(target))


def _frames(file: Path, segmentation: Dataset) -> list[_Frame]:
    check_voxels(file, (segmentation.Rows, segmentation.Columns, int(segmentation.NumberOfFrames)))
    if segmentation.SegmentationType != "BINARY":
        raise DataFileError(file, f"segmentations of type {segmentation.SegmentationType} are not read; BINARY is")
    pixels = segmentation.pixel_array.reshape(-1, segmentation.Rows, segmentation.Columns) != 0
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    return [
        _frame(groups, shared, inside)
        for groups, inside in zip(segmentation.PerFrameFunctionalGroupsSequence, pixels, strict=True)
    ]


def _frame(groups: Dataset, shared: Dataset, inside: NDArray[np.bool_]) -> _Frame:
    """A frame's groups say what they do not share (DICOM PS3.3, C.7.6.16)."""
    turned = groups if "PlaneOrientationSequence" in groups else shared
    measured = groups if "PixelMeasuresSequence" in groups else shared
    first = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
    along_row, along_column = np.array(turned.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    between_rows, between_columns = map(float, measured.PixelMeasuresSequence[0].PixelSpacing)
    rows, columns = inside.shape
    return _Frame(
        segment=int(groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber),
        corners=np.stack(
            [
                first,
                first + along_row * between_columns * (columns - 1),
                first + along_column * between_rows * (rows - 1),
            ]
        ),
        inside=inside,
    )


def _slice_of(file: Path, image: Any, frame: _Frame) -> int:
    """Which slice of the image a frame covers. Raises DataFileError where it covers none, to half a voxel."""
    columns, rows, slices = image.GetSize()
    corners = np.array([image.TransformPhysicalPointToContinuousIndex(corner.tolist()) for corner in frame.corners])
    number = round(float(corners[0, 2]))
    expected = np.array([(0, 0, number), (columns - 1, 0, number), (0, rows - 1, number)])
    off = np.abs(corners - expected).max()
    if frame.inside.shape != (rows, columns) or off > 0.5 or not 0 <= number < slices:
        raise DataFileError(
            file,
            f"a frame of {'x'.join(map(str, frame.inside.shape))} pixels lies {off:.1f} voxels off the grid of the "
            f"series it was drawn on ({rows}x{columns}, {slices} slices; nearest: slice {number})",
        )
    return number


PROSTATEX = Published(
    name="prostatex",
    title="ProstateX with PROSTATEx-Seg-Zones",
    source=(
        "The Cancer Imaging Archive: collection PROSTATEx (doi 10.7937/K9TCIA.2017.MURS5CL; Litjens et al., IEEE TMI "
        "33 (2014) 1083-1092) and analysis result PROSTATEx-Seg-Zones (doi 10.7937/TCIA.NBB4-4655; Meyer et al., ISBI "
        "2019); CC BY 3.0"
    ),
    layout=(
        "PROSTATEx/ProstateX-0004/STUDY/T2 SERIES/*.dcm (any folder names, one series a folder)",
        "PROSTATEx/ProstateX-0004/STUDY/SEGMENTATION/*.dcm (DICOM SEG of the zones)",
        "... 98 patients with zones; others may lie there too",
    ),
    read=_read,
)
