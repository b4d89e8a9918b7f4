"""Distances between the surfaces of two masks, in millimetres, as MONAI computes them.

An axis of one voxel is left out, so pictures are measured in their plane. MONAI is imported inside the functions: it
takes seconds, and only scoring needs it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class SurfaceScore:
    """One volume and target; None where a figure is undefined or was not asked for."""

    hd95_mm: float | None
    assd_mm: float | None = None
    surface_dice: float | None = None


def score_surface(
    predicted: Tensor, truth: Tensor, spacing_mm: Sequence[float], tolerance_mm: float | None = None
) -> SurfaceScore:
    """HD95 of two (X, Y, Z) masks; with a tolerance ASSD and surface Dice too."""
    distance = hd95_mm(predicted, truth, spacing_mm)
    if tolerance_mm is None:
        return SurfaceScore(distance)
    return SurfaceScore(
        distance, assd_mm(predicted, truth, spacing_mm), surface_dice(predicted, truth, spacing_mm, tolerance_mm)
    )


def hd95_mm(predicted: Tensor, truth: Tensor, spacing_mm: Sequence[float]) -> float | None:
    """95th percentile of the surface distance, the larger of both directions (MONAI's definition).

    Args:
        predicted, truth: (X, Y, Z) bool.
        spacing_mm: of X, Y, Z (Z may be missing where it holds one voxel).

    Returns:
        Millimetres; 0 where both masks are empty, None where exactly one is.
    """
    if not (predicted.any() and truth.any()):
        return _of_empty(predicted, truth, 0.0, None)
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    with _quiet():
        return _finite(compute_hausdorff_distance(percentile=95, **_arguments(predicted, truth, spacing_mm)))


def assd_mm(predicted: Tensor, truth: Tensor, spacing_mm: Sequence[float]) -> float | None:
    """Average symmetric surface distance: the mean over the surface voxels of both masks together.

    A surface voxel has a face neighbour outside the mask. Arguments as for `hd95_mm`.

    Returns:
        Millimetres; 0 where both masks are empty, None where exactly one is.
    """
    if not (predicted.any() and truth.any()):
        return _of_empty(predicted, truth, 0.0, None)
    from monai.metrics.surface_distance import compute_average_surface_distance

    with _quiet():
        return _finite(compute_average_surface_distance(symmetric=True, **_arguments(predicted, truth, spacing_mm)))


def surface_dice(predicted: Tensor, truth: Tensor, spacing_mm: Sequence[float], tolerance_mm: float) -> float | None:
    """The share of both surfaces' area that lies within the tolerance of the other (Nikolov et al., JMIR 2021).

    Surface elements lie between 2 x 2 x 2 voxels and count by their area in mm^2, so that spacing does not weigh one
    direction more than another. Other arguments as for `hd95_mm`.

    Args:
        tolerance_mm: what two people may differ by, at least 0; distances equal to it are within.

    Returns:
        In [0, 1]; 1 where both masks are empty, 0 where exactly one is.
    """
    if not (predicted.any() and truth.any()):
        return _of_empty(predicted, truth, 1.0, 0.0)
    from monai.metrics.surface_dice import compute_surface_dice

    with _quiet():
        share = compute_surface_dice(
            class_thresholds=[tolerance_mm], use_subvoxels=True, **_arguments(predicted, truth, spacing_mm)
        )
    return _finite(share)


def _of_empty(predicted: Tensor, truth: Tensor, both: float, one: float | None) -> float | None:
    return one if predicted.any() or truth.any() else both


def _arguments(predicted: Tensor, truth: Tensor, spacing_mm: Sequence[float]) -> dict[str, Any]:
    """Both masks as (1, 1, ...) without the axes of one voxel, and the spacing of the others."""
    axes = [axis for axis, size in enumerate(truth.shape) if size > 1 and axis < len(spacing_mm)]
    if len(axes) < 2:  # a line of voxels: MONAI wants two axes at least
        axes = list(range(min(len(spacing_mm), truth.ndim)))
    shape = [truth.shape[axis] for axis in axes]
    return {
        "y_pred": predicted.reshape(1, 1, *shape).float(),
        "y": truth.reshape(1, 1, *shape).float(),
        "include_background": True,
        "spacing": [float(spacing_mm[axis]) for axis in axes],
    }


def _finite(value: Tensor) -> float | None:
    number = float(value.item())
    return number if number < float("inf") else None  # NaN compares false too


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI calls its own deprecated arguments
        yield
