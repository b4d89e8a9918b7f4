"""CT scans of LIDC-IDRI: DICOM series found, and cut to the surroundings of a nodule."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsegdiff.data.guard import DataFileError, decoding
from medsegdiff.progress import Progress, report
from simulations.published.lidc_readings import Nodule, fill

SIDE = 128  # pixels of a patch, as in comparisons of models on several readers (PHiSeg, arXiv 1906.04045)
HOUNSFIELD = (-1024, 3071)  # what 12 bits hold; below lies the padding around the scanner's circle

_TAGS = [
    "SOPInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns",
    "SliceThickness",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Series:
    """A DICOM series: the files of one folder."""

    uid: str
    folder: Path
    patient_id: str
    maker: str  # of the scanner, the first word of the header's manufacturer in small letters; "" where there is none


@dataclass(frozen=True, eq=False)
class Slice:
    """One image's header."""

    path: Path
    uid: str
    position: NDArray[np.float64]  # (3,): the centre of the first pixel in mm, DICOM's axes (left, posterior, superior)
    along_row: NDArray[np.float64]  # (3,): from a pixel to the one right of it, mm
    along_column: NDArray[np.float64]  # (3,): from a pixel to the one below it, mm
    size: tuple[int, int]  # columns, rows


@dataclass(frozen=True, eq=False)
class Patch:
    """The surroundings of a nodule: the slices that any reader marked and those between, SIDE pixels a side."""

    slices: tuple[Slice, ...]
    corner: NDArray[np.int64]  # column, row
    size: tuple[int, int]  # columns, rows: SIDE, or the whole of a smaller image
    affine: NDArray[np.float64]  # (4, 4): column, row, slice -> mm, NIfTI's axes (right, anterior, superior)


def find_series(root: Path) -> dict[str, Series]:
    """Every DICOM series below a folder, radiographs too, by UID; one header of each folder is read."""
    from pydicom import dcmread

    found = {}
    folders = list(_folders(root))
    for done, (folder, first) in enumerate(folders):
        report(Progress("headers", done, len(folders)))
        with decoding(first):
            header = dcmread(first, stop_before_pixels=True)
            maker = str(header.get("Manufacturer", "")).split()
            uid = str(header.SeriesInstanceUID)
            found[uid] = Series(uid, folder, str(header.PatientID).strip(), maker[0].lower() if maker else "")
    return found


def _folders(root: Path) -> Iterator[tuple[Path, Path]]:
    """Folders with DICOM files, each with its first file."""
    for folder, folders, _ in os.walk(root):
        folders.sort()
        files = dicom_files(Path(folder))
        if files:
            yield Path(folder), files[0]


def dicom_files(folder: Path) -> list[Path]:
    """The files of a folder that end in .dcm, hidden ones left out."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".dcm" and path.name[0] != ".")


@lru_cache(maxsize=1)  # nodules come scan by scan; a later import has series objects of its own
def _slices(series: Series) -> tuple[Slice, ...]:
    """The headers of a series, from the feet up (along the normal of the first image)."""
    slices = [_slice(path) for path in dicom_files(series.folder)]
    normal = np.cross(slices[0].along_row, slices[0].along_column)
    return tuple(sorted(slices, key=lambda image: float(image.position @ normal)))


def _slice(path: Path) -> Slice:
    from pydicom import dcmread

    with decoding(path):
        header = dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
        below, right = (float(size) for size in header.PixelSpacing)  # distance of rows, then of columns
        axes = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
        return Slice(
            path,
            str(header.SOPInstanceUID),
            np.array(header.ImagePositionPatient, float),
            axes[0] * right,
            axes[1] * below,
            (int(header.Columns), int(header.Rows)),
        )


def patch_of(series: Series, nodule: Nodule) -> Patch:
    """Where a nodule lies in its scan.

    Raises:
        DataFileError: a header is faulty, or an outline names an image that the series does not hold.
    """
    slices = _slices(series)
    contours = [contour for outline in nodule for contour in outline]
    numbers = {image.uid: number for number, image in enumerate(slices)}
    missing = sorted({contour.slice_uid for contour in contours} - set(numbers))
    if missing:
        raise DataFileError(
            series.folder, f"{len(missing)} outlined images are not there (the first: {missing[0]}); download it anew"
        )
    marked = [numbers[contour.slice_uid] for contour in contours]
    chosen = slices[min(marked) : max(marked) + 1]
    points = np.concatenate([contour.points for contour in contours])
    whole = np.array(chosen[0].size)
    size = np.minimum(SIDE, whole)
    corner = np.clip((points.min(axis=0) + points.max(axis=0) + 1) // 2 - size // 2, 0, whole - size)
    return Patch(chosen, corner, (int(size[0]), int(size[1])), _affine(slices, chosen[0], corner))


def _affine(slices: tuple[Slice, ...], first: Slice, corner: NDArray[np.int64]) -> NDArray[np.float64]:
    normal = np.cross(first.along_row, first.along_column)
    normal /= np.linalg.norm(normal)
    steps = np.diff([image.position @ normal for image in slices])
    steps = steps[steps > 0]  # a few series hold an image twice
    if not len(steps):
        raise DataFileError(first.path, "all images of its series lie at one place, so slices have no distance")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = first.along_row, first.along_column, normal * np.median(steps)
    affine[:3, 3] = first.position + corner[0] * first.along_row + corner[1] * first.along_column
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def write_image(series: Series, nodule: Nodule, path: Path) -> None:
    """Write a nodule's patch in Hounsfield units, int16. Raises DataFileError for a file that cannot be read."""
    patch = patch_of(series, nodule)
    _write(path, np.stack([_hounsfield(image, patch) for image in patch.slices], axis=2), patch)


def _hounsfield(image: Slice, patch: Patch) -> NDArray[np.int16]:
    """(columns, rows) of the patch on one slice."""
    from pydicom import dcmread

    with decoding(image.path):
        data = dcmread(image.path)
        if (int(data.Columns), int(data.Rows)) != patch.slices[0].size:
            raise DataFileError(image.path, "its size is another than that of the series")
        (left, top), (width, height) = patch.corner, patch.size
        pixels = data.pixel_array[top : top + height, left : left + width].T.astype(np.float64)
        units = pixels * float(data.RescaleSlope) + float(data.RescaleIntercept)
    return np.clip(np.rint(units), *HOUNSFIELD).astype(np.int16)


def write_mask(series: Series, nodule: Nodule, reader: int, path: Path) -> None:
    """Write one reader's mask on the grid of the patch, 0 and 1; empty where the reader drew nothing."""
    patch = patch_of(series, nodule)
    masks = [fill(nodule[reader], image.uid, patch.corner, patch.size).T for image in patch.slices]
    _write(path, np.stack(masks, axis=2).astype(np.uint8), patch)


def _write(path: Path, array: NDArray[Any], patch: Patch) -> None:
    import nibabel

    nib: Any = nibabel  # annotated in part only, which strict checking refuses
    header = nib.Nifti1Header()
    header.set_xyzt_units("mm")
    header.set_data_dtype(array.dtype)  # a header of its own would make it float32
    data = nib.Nifti1Image(np.ascontiguousarray(array), patch.affine, header).to_bytes()
    path.write_bytes(gzip.compress(data, mtime=0))  # equal scans give equal bytes
