"""How native slices come to the network's square and back.

Native arrays are (X, Y, Z); slices are taken along one axis, scaled so that the longer side in millimetres fills the
square, and centred in it. `restore` and `restack` undo this for the network's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Size and spacing of a native volume, and the axis its slices are taken along."""

    shape: tuple[int, int, int]  # X, Y, Z in voxels; a picture is rows, columns, 1
    slice_axis: int
    spacing_mm: tuple[float, ...] | None  # per axis; two numbers: a picture whose distance to the next slice is unknown

    @property
    def slices(self) -> int:
        """N, the number of slices."""
        return self.shape[self.slice_axis]

    @property
    def plane(self) -> tuple[int, int]:
        """(h, w), voxels of a native slice."""
        height, width = (size for axis, size in enumerate(self.shape) if axis != self.slice_axis)
        return height, width

    @property
    def plane_spacing_mm(self) -> tuple[float, float]:
        """Spacing along h and w; (1, 1) where unknown, for only the ratio matters here."""
        if self.spacing_mm is None:
            return 1.0, 1.0
        height, width = (size for axis, size in enumerate(self.spacing_mm) if axis != self.slice_axis)
        return height, width


@dataclass(frozen=True)
class Letterbox:
    """Where a slice lies inside the square, in network pixels."""

    top: int
    left: int
    height: int
    width: int

    @classmethod
    def of(cls, geometry: Geometry, image_size: int) -> Letterbox:
        """The slice's extent in mm, scaled so that the longer side is `image_size`, centred."""
        extent = [n * mm for n, mm in zip(geometry.plane, geometry.plane_spacing_mm, strict=True)]
        height, width = (max(1, round(image_size * side / max(extent))) for side in extent)
        return cls((image_size - height) // 2, (image_size - width) // 2, height, width)

    def crop(self, maps: Tensor) -> Tensor:
        """The part of (..., S, S) that the slice covers: (..., height, width)."""
        return maps[..., self.top : self.top + self.height, self.left : self.left + self.width]


def to_slices(volume: Tensor, geometry: Geometry) -> Tensor:
    """(C, X, Y, Z) -> (N, C, h, w), a view."""
    return volume.movedim(geometry.slice_axis + 1, 0)


def restack(slices: Tensor, geometry: Geometry) -> Tensor:
    """(N, C, h, w) -> (C, X, Y, Z): undoes `to_slices`. A copy in the native order of memory."""
    return slices.movedim(0, geometry.slice_axis + 1).contiguous()


def restore(maps: Tensor, geometry: Geometry) -> Tensor:
    """Network-sized maps back to the native slice size, undoing the letterbox.

    Args:
        maps: (N, K, S, S), floating point.

    Returns:
        (N, K, h, w): bilinear, antialiased where the native slice is smaller than its part of the square.
    """
    inner = Letterbox.of(geometry, maps.shape[-1]).crop(maps)
    if inner.shape[-2:] == torch.Size(geometry.plane):
        return inner.contiguous()
    return F.interpolate(inner, size=geometry.plane, mode="bilinear", align_corners=False, antialias=True)
