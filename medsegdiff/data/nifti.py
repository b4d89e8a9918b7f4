"""NIfTI files: volumes with a place in the patient."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from medsegdiff.data.images import NIFTI, DataFileError, Placement, Volume, check_voxels, decoding
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic

nib: Any = nibabel  # annotated in part only, which strict checking refuses
_MILLIMETRES = {"meter": 1000.0, "micron": 0.001}  # by the header's unit; "mm" and "unknown" are millimetres


def read_nifti(path: Path, channels: int) -> Volume:
    """Read a volume turned to RAS axes; the fourth axis of the file, if there is one, holds the channels.

    Raises:
        DataFileError: see `read_image`.
    """
    with decoding(path):
        image = _open(path)
        count = image.shape[3] if len(image.shape) == 4 else 1
        if count != channels:
            raise DataFileError(path, f"the file holds {count} channel(s), {channels} are declared for it")
        array = np.asarray(image.dataobj, dtype=np.float32)
    array = array.reshape(*image.shape, *[1] * (4 - array.ndim))
    placement = _placement(path, image)
    turned = nib.orientations.apply_orientation(array, placement.orientation)  # channels ride along as the last axis
    return Volume(np.ascontiguousarray(np.moveaxis(turned, 3, 0)), _spacing_mm(image, placement), placement)


def read_nifti_values(path: Path) -> tuple[NDArray[np.int32], Placement]:
    """Read a mask's values, (X, Y, Z) turned to RAS axes; floats are accepted where they are whole numbers.

    Raises:
        DataFileError: see `read_mask`.
    """
    with decoding(path):
        image = _open(path)
        array = np.asarray(image.dataobj)
    array = array.reshape(*image.shape, *[1] * (3 - array.ndim)) if array.ndim < 3 else array
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        raise DataFileError(path, f"a mask has three axes, this file has {array.ndim}")
    placement = _placement(path, image)
    turned = nib.orientations.apply_orientation(_whole(path, array), placement.orientation)
    return np.ascontiguousarray(turned), placement


def write_nifti_mask(path: Path, mask: NDArray[np.uint8], placement: Placement) -> None:
    """Write a mask (X, Y, Z) in RAS order back on the grid of the file it was made from.

    Equal masks give equal bytes: the compressed stream carries no time and no name.

    Raises:
        UserError: the ending is not that of NIfTI, or the disk refuses.
    """
    if not path.name.lower().endswith(NIFTI):
        raise UserError(f"{path}: a mask of a volume is written as {' or '.join(NIFTI)}. Choose such an ending.")
    ras = nib.orientations.axcodes2ornt("RAS")
    back = nib.orientations.apply_orientation(mask, nib.orientations.ornt_transform(ras, placement.orientation))
    data = nib.Nifti1Image(np.ascontiguousarray(back), placement.affine).to_bytes()
    write_atomic(path, gzip.compress(data, mtime=0) if path.name.lower().endswith(".gz") else data)


def _open(path: Path) -> Any:
    """The file's header; voxels stay on disk."""
    image = nib.load(path)
    if not isinstance(image, nib.Nifti1Pair):
        raise DataFileError(path, "the file is not NIfTI, whatever its name says")
    if image.get_data_dtype().kind not in "iufb":
        raise DataFileError(path, f"voxels of type {image.get_data_dtype()} are not read; numbers are")
    if not 2 <= len(image.shape) <= 4:
        raise DataFileError(path, f"the file has {len(image.shape)} axes; 2 to 4 are read")
    check_voxels(path, image.shape)
    return image


def _placement(path: Path, image: Any) -> Placement:
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DataFileError(path, "the header's affine is not invertible, so the axes have no direction")
    shape = tuple(int(size) for size in image.shape[:3])
    return Placement(affine, nib.orientations.io_orientation(affine), shape + (1,) * (3 - len(shape)))


def _spacing_mm(image: Any, placement: Placement) -> tuple[float, float, float]:
    """Voxel size along the RAS axes."""
    stored = np.linalg.norm(placement.affine[:3, :3], axis=0) * _MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
    x, y, z = (float(stored[list(placement.orientation[:, 0]).index(axis)]) for axis in range(3))
    return x, y, z


def _whole(path: Path, array: NDArray[Any]) -> NDArray[np.int32]:
    """Integers as they are; floats where they are whole numbers."""
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.rint(array)).all()):
        raise DataFileError(path, "the mask holds values that are not whole numbers")
    limit = np.iinfo(np.int32)
    if array.size and not (limit.min <= array.min() and array.max() <= limit.max):
        raise DataFileError(
            path, f"the mask holds values from {array.min()} to {array.max()}; no label has such a value"
        )
    return array.astype(np.int32)
