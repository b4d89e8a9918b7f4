"""Several raters: the one truth they make together, and how near the samples' distribution comes to theirs.

Masks are kept as packed bits, eight voxels a byte: sixteen samples of a volume then take less memory than one map of
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medsegdiff.labels import LabelScheme

Packed = NDArray[np.uint8]


@dataclass(frozen=True)
class RaterScore:
    """One case and target, M samples against R raters."""

    ged_squared: float  # in [0, 2]
    hm_iou: float  # in [0, 1]
    sample_distance: float  # E d(s, s'), the samples' diversity
    rater_distance: float  # E d(y, y'), the raters'


@dataclass(frozen=True)
class RaterMean:
    """The average over some cases that several raters drew."""

    cases: int
    mean: RaterScore


def majority(labels: Tensor, scheme: LabelScheme) -> Tensor:
    """The truth that several raters make: what more than half of them drew.

    A tie is background: so targets that are disjoint for each rater stay disjoint in the truth.

    Args:
        labels: (R, ...) label indices.

    Returns:
        (T, ...) bool.
    """
    votes = sum(scheme.truth(rater[None])[0].int() for rater in labels)
    assert isinstance(votes, Tensor)
    return 2 * votes > len(labels)


def pack(masks: Tensor) -> Packed:
    """(..., h, w) bool -> (..., ceil(h w / 8)) bits."""
    return np.packbits(masks.flatten(-2).numpy(), axis=-1)


def pack_raters(labels: Tensor, scheme: LabelScheme, slice_axis: int) -> Packed:
    """(R, X, Y, Z) label indices as every rater's own masks: (R, N, T, bytes), slice by slice as samples are kept."""
    return np.stack([pack(scheme.truth(rater[None])[0].movedim(slice_axis + 1, 0)) for rater in labels])


def pairwise_iou(first: Packed, second: Packed) -> NDArray[np.float64]:
    """Intersection over union of every pair; 1 where both masks are empty.

    Args:
        first: (A, N, T, bytes). second: (B, N, T, bytes).

    Returns:
        (T, A, B) in [0, 1].
    """
    sizes = [np.stack([_count(mask) for mask in masks]) for masks in (first, second)]  # (A, T) and (B, T)
    both = np.stack([np.stack([_count(one & other) for other in second]) for one in first])  # (A, B, T)
    either = sizes[0][:, None] + sizes[1][None] - both
    iou = np.divide(both, either, out=np.ones(both.shape), where=either > 0)
    return np.moveaxis(iou, -1, 0)


def _count(mask: Packed) -> NDArray[np.int64]:
    """(N, T, bytes) -> (T,) bits that are set."""
    bits: NDArray[np.int64] = np.bitwise_count(mask).sum(axis=(0, 2), dtype=np.int64)
    return bits


def ged_squared(across: NDArray[np.float64], samples: NDArray[np.float64], raters: NDArray[np.float64]) -> float:
    """Generalised energy distance with d = 1 - IoU: 2 E d(s, y) - E d(s, s') - E d(y, y').

    Szekely and Rizzo (2013); Kohl et al., "A probabilistic U-Net" (NeurIPS 2018), eq. 4. As there the expectations
    run over all pairs, those of a mask with itself among them: 0 where both sets hold the same masks equally often,
    and never below (IoU is a positive definite kernel); 2 where all samples agree, all raters do, and they share no
    voxel.

    Args:
        across: (M, R) IoU of samples and raters. samples: (M, M). raters: (R, R).
    """
    return max(0.0, float(2 * (1 - across).mean() - (1 - samples).mean() - (1 - raters).mean()))  # rounding


def hm_iou(across: NDArray[np.float64]) -> float:
    """Mean IoU of the best one-to-one matching of samples and raters (Kohl et al., arXiv 1905.13077).

    Both sets are repeated to the least common multiple of their numbers, so that every sample and every rater counts
    alike (16 samples and 4 raters: each rater four times).

    Args:
        across: (M, R) IoU of samples and raters.
    """
    from scipy.optimize import linear_sum_assignment  # here: training must not need it

    samples, raters = across.shape
    number = math.lcm(samples, raters)
    repeated = across.repeat(number // samples, axis=0).repeat(number // raters, axis=1)
    return float(repeated[linear_sum_assignment(repeated, maximize=True)].mean())


def score_raters(members: Packed, raters: Packed) -> list[RaterScore]:
    """Per target: (M, N, T, bytes) samples against (R, N, T, bytes) raters of one case."""
    across, among, between = pairwise_iou(members, raters), pairwise_iou(members, members), pairwise_iou(raters, raters)
    return [
        RaterScore(ged_squared(a, s, y), hm_iou(a), float((1 - s).mean()), float((1 - y).mean()))
        for a, s, y in zip(across, among, between, strict=True)
    ]


class RaterScores:
    """Collects one score a case and target, for a patient's mean and the mean over all cases."""

    def __init__(self, targets: Sequence[str]) -> None:
        self._targets = tuple(targets)
        self._cases: dict[str, list[list[RaterScore]]] = {}  # patient -> case -> target

    def add(self, patient_id: str, scores: list[RaterScore]) -> None:
        """One case's scores, a target each."""
        self._cases.setdefault(patient_id, []).append(scores)

    def of(self, patient_id: str) -> dict[str, RaterMean] | None:
        """Target -> mean over the patient's cases; None without any."""
        return self._mean(self._cases.get(patient_id, []))

    def overall(self) -> dict[str, RaterMean] | None:
        """Target -> mean over the cases of all patients, each counting once as in the literature; None without any."""
        return self._mean([scores for cases in self._cases.values() for scores in cases])

    def _mean(self, cases: Sequence[list[RaterScore]]) -> dict[str, RaterMean] | None:
        if not cases:
            return None
        return {target: _mean([scores[t] for scores in cases]) for t, target in enumerate(self._targets)}


def _mean(scores: Sequence[RaterScore]) -> RaterMean:
    means = {f.name: math.fsum(getattr(score, f.name) for score in scores) / len(scores) for f in fields(RaterScore)}
    return RaterMean(len(scores), RaterScore(**means))
