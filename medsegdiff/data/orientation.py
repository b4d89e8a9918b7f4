"""Stored volumes turned to right-anterior-superior axes and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from medsegdiff.data.guard import DataFileError
from medsegdiff.data.images import Placement, Volume

nib: Any = nibabel  # annotated in part only, which strict checking refuses

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM, MetaImage and NRRD count to the left and to the back


def place(path: Path, affine: NDArray[np.float64], shape: tuple[int, ...]) -> Placement:
    """The placement of a stored grid.

    Args:
        affine: (4, 4), indices as stored -> mm to the right, to the front, upwards.
        shape: of the first three stored axes; missing ones are 1.

    Raises:
        DataFileError: the axes have no direction.
    """
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DataFileError(path, "the header's affine is not invertible, so the axes have no direction")
    shape = tuple(int(size) for size in shape[:3])
    return Placement(affine, nib.orientations.io_orientation(affine), shape + (1,) * (3 - len(shape)))


def to_ras(array: NDArray[Any], placement: Placement) -> NDArray[Any]:
    """A stored array (I, J, K, ...) with its axes turned: (X, Y, Z, ...), a view."""
    turned: NDArray[Any] = nib.orientations.apply_orientation(array, placement.orientation)
    return turned


def as_stored(array: NDArray[Any], placement: Placement) -> NDArray[Any]:
    """Undo `to_ras`: (X, Y, Z, ...) -> (I, J, K, ...)."""
    ras = nib.orientations.axcodes2ornt("RAS")
    back = nib.orientations.ornt_transform(ras, placement.orientation)
    return np.ascontiguousarray(nib.orientations.apply_orientation(array, back))


def volume(array: NDArray[Any], placement: Placement, unit_mm: float = 1.0) -> Volume:
    """A stored image (I, J, K, C) as a volume. `unit_mm`: millimetres of one unit of the affine."""
    turned = np.moveaxis(to_ras(array, placement), 3, 0)
    return Volume(np.ascontiguousarray(turned, dtype=np.float32), _spacing_mm(placement, unit_mm), placement)


def _spacing_mm(placement: Placement, unit_mm: float) -> tuple[float, float, float]:
    """Voxel size along the RAS axes."""
    stored = np.linalg.norm(placement.affine[:3, :3], axis=0) * unit_mm
    x, y, z = (float(stored[list(placement.orientation[:, 0]).index(axis)]) for axis in range(3))
    return x, y, z
