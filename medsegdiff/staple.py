"""STAPLE: the hidden truth behind several raters' masks, and how far to trust each of them.

Warfield, Zou, Wells: Simultaneous truth and performance level estimation, IEEE TMI 23 (2004) 903-921. EM turns between
the truth's probability at every voxel, given each rater's error rates, and those rates, given that probability.

The model takes raters' errors as independent of each other, given the truth. Human raters who drew by themselves come
near that. Samples of one network do not: they share its weights, hence its mistakes, so where they agree on a mistake
STAPLE counts as many witnesses as there are samples. Its probabilities lie too near 0 and 1 then; as a mask they are
fit for use, as a measure of doubt the entropy of the votes is the better one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-7  # largest change of an error rate between iterations that counts as none (that of ITK's filter)
ITERATIONS = 1000  # at most; an iteration handles each pattern of votes once, not each voxel, and is cheap


@dataclass(frozen=True)
class Staple:
    """The truth among K labels as R raters tell it.

    probability: of each label at each voxel, (K, ...), float64; sums to 1 over labels.
    confusion: [j, said, true]: probability that rater j says one label where another is true, (R, K, K), float64; sums
        to 1 over `said`. Of a label that nobody named the raters are taken to be perfect judges.
    iterations: of EM; ITERATIONS where the rates had not settled.
    """

    probability: Tensor
    confusion: Tensor
    iterations: int


@dataclass(frozen=True)
class BinaryStaple:
    """The truth of one structure as R raters tell it.

    probability: of the structure at each voxel, (...), float64.
    sensitivity, specificity: of each rater, (R,), float64; 1 where there is no structure, or nothing else, to judge by.
    iterations: of EM; ITERATIONS where the rates had not settled.
    """

    probability: Tensor
    sensitivity: Tensor
    specificity: Tensor
    iterations: int


def staple(masks: Tensor, prior: float | None = None, iterations: int = ITERATIONS) -> BinaryStaple:
    """STAPLE of one structure (Warfield et al. 2004, eq. 14-16 and 18-19): `staple_labels` with two labels.

    Args:
        masks: one a rater, (R, ...), bool or 0 and 1.
        prior: probability of the structure at any voxel, in (0, 1); by default the mean of all masks, as in ITK.

    Guarantees:
        Raters who agree everywhere (one alone, all empty, all full) get their mask back, with probabilities 0 and 1.
    """
    if masks.is_floating_point():
        raise ValueError(f"masks must be bool or whole numbers, found {masks.dtype}: threshold them first")
    found = staple_labels(masks.to(torch.uint8), 2, None if prior is None else (1 - prior, prior), iterations)
    return BinaryStaple(found.probability[1], found.confusion[:, 1, 1], found.confusion[:, 0, 0], found.iterations)


def staple_labels(
    labels: Tensor, classes: int, prior: Sequence[float] | None = None, iterations: int = ITERATIONS
) -> Staple:
    """STAPLE of disjoint labels (Warfield et al. 2004, section III: a confusion matrix a rater).

    One estimate over all labels, not one against the rest: probabilities then sum to 1, and what a rater mistakes for
    what is part of the model. EM starts from the raters' votes (share of them at each voxel), as in ITK.

    Args:
        labels: one map a rater, (R, ...), integers in 0..K - 1.
        classes: K.
        prior: probability of each label at any voxel, each in (0, 1); by default its share of all votes.
        iterations: EM ends here at the latest.

    Raises:
        ValueError: no rater, no voxel, labels that are no whole numbers or lie outside 0..K - 1, a prior that does not
            give each label a share, or no iteration.
    """
    raters = len(labels)
    if labels.numel() == 0:
        raise ValueError(f"STAPLE needs at least one rater and one voxel, found labels of shape {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, found {int(labels.min())}..{int(labels.max())}")
    if labels.is_floating_point():
        raise ValueError(f"labels must be whole numbers, found {labels.dtype}")
    shares = [1 / classes] * classes if prior is None else list(prior)
    if len(shares) != classes or not all(0 < share < 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"prior must give each of {classes} labels a share in (0, 1), 1 in sum, found {shares}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, found {iterations}")
    # Shapes: P patterns of votes, K labels. Voxels with equal votes have equal probabilities.
    pattern, votes_RP, count_P = _patterns(labels.reshape(raters, -1), classes)
    truth_PK = torch.zeros(len(count_P), classes, dtype=torch.float64)
    for votes_P in votes_RP:
        truth_PK[torch.arange(len(count_P)), votes_P] += 1
    truth_PK /= raters
    prior_K = _weighted(truth_PK, count_P).sum(dim=0) / count_P.sum() if prior is None else _as_prior(prior)
    confusion, change, done = torch.zeros(raters, classes, classes, dtype=torch.float64), 1.0, 0
    while change > TOLERANCE and done < iterations:
        before, confusion = confusion, _confusion(truth_PK, votes_RP, count_P)
        truth_PK = _truth(prior_K, confusion, votes_RP)
        change, done = float((confusion - before).abs().max()), done + 1
    return Staple(truth_PK.T[:, pattern].reshape(classes, *labels.shape[1:]), confusion, done)


def _as_prior(prior: Sequence[float]) -> Tensor:
    return torch.tensor(prior, dtype=torch.float64)


def _weighted(truth_PK: Tensor, count_P: Tensor) -> Tensor:
    return truth_PK * count_P[:, None]


def _truth(prior_K: Tensor, confusion: Tensor, votes_RP: Tensor) -> Tensor:
    """E-step: each label's probability from the prior and what the raters said (eq. 14; (P, K))."""
    log = prior_K.log().expand(votes_RP.shape[1], -1)
    for rates_KK, votes_P in zip(confusion.log(), votes_RP, strict=True):
        log = log + rates_KK[votes_P]
    return log.softmax(dim=1)


def _confusion(truth_PK: Tensor, votes_RP: Tensor, count_P: Tensor) -> Tensor:
    """M-step: what each rater said where a label is true, (R, K, K) (eq. 18-19)."""
    mass_PK = _weighted(truth_PK, count_P)
    mass_K = mass_PK.sum(dim=0)
    classes = len(mass_K)
    said = torch.stack([torch.zeros(classes, classes).double().index_add(0, votes_P, mass_PK) for votes_P in votes_RP])
    return torch.where(mass_K > 0, said / mass_K, torch.eye(classes, dtype=torch.float64))


def _patterns(labels_RV: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Voxels with equal votes joined: the pattern of each voxel (V,), the patterns' votes (R, P), their counts (P,)."""
    code_V = torch.zeros(labels_RV.shape[1], dtype=torch.int64)
    codes = 1  # code_V lies in 0..codes - 1
    for votes_V in labels_RV:
        if codes * classes > 2**62:
            code_V = torch.unique(code_V, return_inverse=True)[1]
            codes = int(code_V.max()) + 1
        code_V = code_V * classes + votes_V
        codes *= classes
    _, pattern_V, count_P = torch.unique(code_V, return_inverse=True, return_counts=True)
    example_P = torch.empty_like(count_P)
    example_P[pattern_V] = torch.arange(len(pattern_V))
    return pattern_V, labels_RV[:, example_P].long(), count_P.double()
