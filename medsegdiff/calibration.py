"""Whether a probability means what it says: of the voxels that the ensemble gives 0.7, are 70 % foreground?

Counts alone are kept, as whole numbers: a folder of any size takes the same memory, and the order of the cases does not
matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15  # Guo et al., "On calibration of modern neural networks" (ICML 2017)
_UNIT = 2**24  # the smallest positive float16 is 2^-24: sums of probabilities in this unit are exact


@dataclass(frozen=True)
class Bin:
    """The voxels whose probability lies in [low, high); the last bin holds 1 too."""

    low: float
    high: float
    voxels: int
    probability: float | None  # their mean; None in an empty bin
    foreground: float | None  # share of them that is foreground in truth


@dataclass(frozen=True)
class Calibration:
    """Of one target, over all patients.

    ece: expected calibration error in [0, 1], sum over bins of (share of voxels) x |foreground - probability|; None
        where there are no voxels.
    """

    ece: float | None
    voxels: int
    bins: tuple[Bin, ...]


class CalibrationCounts:
    """Counts voxels by probability and truth, for T targets.

    Args:
        targets: T.
    """

    def __init__(self, targets: int) -> None:
        self._counts = torch.zeros(targets, BINS, 3, dtype=torch.int64)  # voxels, foreground, sum of probabilities

    def add(self, probability: Tensor, truth: Tensor) -> None:
        """Take voxels: (T, ...) float16 in [0, 1] and (T, ...) bool.

        Raises:
            ValueError: another type, or a number outside [0, 1].
        """
        if probability.dtype != torch.float16:
            raise ValueError(f"probabilities of type {probability.dtype}, expected float16")
        if not ((probability >= 0) & (probability <= 1)).all():  # NaN is refused as well
            raise ValueError("probabilities outside [0, 1]")
        for t in range(len(self._counts)):
            self._add(self._counts[t], probability[t].flatten(), truth[t].flatten())

    @staticmethod
    def _add(counts: Tensor, probability: Tensor, truth: Tensor) -> None:
        bins = (probability.float() * BINS).long().clamp_(max=BINS - 1)
        counts[:, 0] += torch.bincount(bins, minlength=BINS)
        counts[:, 1] += torch.bincount(bins[truth], minlength=BINS)
        counts[:, 2].index_add_(0, bins, (probability.double() * _UNIT).long())

    def result(self, target: int) -> Calibration:
        """What target number `target` came to."""
        rows = self._counts[target].tolist()
        total = sum(row[0] for row in rows)
        bins = tuple(_bin(number, *row) for number, row in enumerate(rows))
        gaps = [abs(row[1] - row[2] / _UNIT) for row in rows]
        return Calibration(sum(gaps) / total if total else None, total, bins)


def _bin(number: int, voxels: int, foreground: int, probabilities: int) -> Bin:
    low, high = number / BINS, (number + 1) / BINS
    if not voxels:
        return Bin(low, high, 0, None, None)
    return Bin(low, high, voxels, probabilities / _UNIT / voxels, foreground / voxels)


def near(truth: Tensor) -> tuple[slice, ...] | None:
    """The box around a structure, widened on each side by half its length, at least by one voxel.

    Most voxels of a scan are far from the structure and given 0 by every model: over all of them the error is small
    whatever the model does at the structure. The box follows the truth alone, so that all models are asked about the
    same voxels (as Mehrtash et al., IEEE TMI 39 (2020) 3868-3878, do with another margin).

    Args:
        truth: (X, Y, Z) bool.

    Returns:
        Cut off at the image; None where nothing is set.
    """
    if not truth.any():
        return None
    box = []
    for axis in range(truth.ndim):
        places = truth.any(dim=[other for other in range(truth.ndim) if other != axis]).nonzero()
        first, last = int(places[0]), int(places[-1]) + 1
        margin = max(1, (last - first) // 2)
        box.append(slice(max(0, first - margin), min(truth.shape[axis], last + margin)))
    return tuple(box)


class Calibrations:
    """Calibration over all voxels, and over those near each structure."""

    def __init__(self, targets: tuple[str, ...]) -> None:
        self._targets = targets
        self._all = CalibrationCounts(len(targets))
        self._near = [CalibrationCounts(1) for _ in targets]

    def add(self, probability: Tensor, truth: Tensor) -> None:
        """One case: (T, X, Y, Z) float16 in [0, 1] and (T, X, Y, Z) bool."""
        self._all.add(probability, truth)
        for t, counts in enumerate(self._near):
            box = near(truth[t])
            if box is not None:
                counts.add(probability[t][box][None], truth[t][box][None])

    def results(self) -> dict[str, dict[str, Calibration]]:
        """Target -> "near" and "all"."""
        return {
            target: {"near": self._near[t].result(0), "all": self._all.result(t)}
            for t, target in enumerate(self._targets)
        }
