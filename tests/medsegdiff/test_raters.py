"""Samples against several raters: every figure equals its definition, written as loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medsegdiff.labels import LabelScheme
from medsegdiff.raters import (
    RaterScore,
    RaterScores,
    ged_squared,
    hm_iou,
    pack,
    pack_raters,
    pairwise_iou,
    score_raters,
)

REGIONS = LabelScheme(("background", "rim", "cup"), ("disc", "cup"), ((1, 2), (2,)))


def packed(masks: Tensor) -> np.ndarray:
    """(A, T, X, Y, Z) masks sliced along Z."""
    return pack(masks.movedim(4, 1))


def naive_iou(one: Tensor, two: Tensor) -> float:
    first = {tuple(voxel) for voxel in one.nonzero().tolist()}
    second = {tuple(voxel) for voxel in two.nonzero().tolist()}
    return len(first & second) / len(first | second) if first | second else 1.0


def naive_ged_squared(samples: Tensor, raters: Tensor) -> float:
    """All pairs, those of a mask with itself among them."""

    def distance(first: Tensor, second: Tensor) -> float:
        pairs = list(itertools.product(first, second))
        return sum(1 - naive_iou(one, two) for one, two in pairs) / len(pairs)

    return 2 * distance(samples, raters) - distance(samples, samples) - distance(raters, raters)


def naive_hm_iou(samples: Tensor, raters: Tensor) -> float:
    """The best of all one-to-one matchings of both sets, repeated to equal length."""
    number = math.lcm(len(samples), len(raters))
    first, second = [list(s) * (number // len(s)) for s in (samples, raters)]
    return max(
        sum(naive_iou(one, two) for one, two in zip(first, order, strict=True)) / number
        for order in itertools.permutations(second)
    )


def draw(seed: int, count: int, targets: int = 2, density: float = 0.4) -> Tensor:
    """Masks of (5, 3, 2) voxels; some are empty."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(count, targets, 5, 3, 2, generator=generator) < density
    return masks & (torch.rand(count, targets, 1, 1, 1, generator=generator) < 0.7)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4))
def test_scores_equal_their_definitions(seed: int, members: int, raters: int) -> None:
    """Counted on packed bits or voxel by voxel, matched by scipy or by trying every order; empty masks among them."""
    samples, truths = draw(seed, members), draw(seed + 1, raters)
    found = score_raters(packed(samples), packed(truths))
    assert len(found) == 2
    for t, score in enumerate(found):
        assert score.ged_squared == pytest.approx(naive_ged_squared(samples[:, t], truths[:, t]), abs=1e-12)
        if math.lcm(members, raters) <= 6:
            assert score.hm_iou == pytest.approx(naive_hm_iou(samples[:, t], truths[:, t]))
        assert 0 <= score.ged_squared <= 2
        assert 0 <= score.hm_iou <= 1


def test_without_pairs_of_itself_the_figure_is_another() -> None:
    """The unbiased variant, which leaves a mask's distance to itself out, is not what the literature's tables hold."""
    samples, raters = draw(3, 4, density=0.6), draw(4, 3, density=0.6)
    iou = pairwise_iou(packed(samples), packed(samples))[0]
    others = (1 - iou).sum() / (4 * 3)
    assert others > (1 - iou).mean()
    found = score_raters(packed(samples), packed(raters))[0]
    assert found.sample_distance == pytest.approx((1 - iou).mean())
    assert found.sample_distance != pytest.approx(others)


def test_known_distances() -> None:
    """Same masks equally often: 0 and 1. One against another: 2 and 0. All empty: 0 and 1."""
    left, right, empty = torch.zeros(3, 1, 4, 4, 1, dtype=torch.bool)
    left[:, :2], right[:, 2:] = True, True
    cases = [
        ([left, right], [right, left], 0.0, 1.0),
        ([left, right, left, right], [left, right], 0.0, 1.0),
        ([left], [right], 2.0, 0.0),
        ([empty] * 3, [empty] * 2, 0.0, 1.0),
        ([empty], [left], 2.0, 0.0),
        ([left], [left, empty], 0.5, 0.5),
    ]
    for samples, raters, distance, matched in cases:
        (score,) = score_raters(packed(torch.stack(samples)), packed(torch.stack(raters)))
        assert (score.ged_squared, score.hm_iou) == (pytest.approx(distance), pytest.approx(matched))


def test_a_mode_that_is_drawn_too_often_costs_a_match() -> None:
    """Three of four samples alike against two raters: without repeating the raters, the best two would match wholly."""
    across = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert hm_iou(across) == pytest.approx(0.75)
    assert hm_iou(across[[0, 3]]) == 1.0
    assert hm_iou(across.T) == pytest.approx(0.75)
    assert ged_squared(np.eye(2), np.eye(2), np.eye(2)) == 0.0


def test_raters_are_sliced_as_samples_are() -> None:
    """Overlapping targets of label maps, along every axis, planes that do not fill their last byte."""
    labels = torch.randint(0, 3, (3, 5, 3, 2), generator=torch.Generator().manual_seed(0))
    truth = torch.stack([REGIONS.truth(rater[None])[0] for rater in labels])  # (R, T, X, Y, Z)
    for axis in range(3):
        expected = pack(truth.movedim(axis + 2, 1))
        assert np.array_equal(pack_raters(labels, REGIONS, axis), expected)
    assert np.array_equal(pairwise_iou(packed(truth), packed(truth))[0].diagonal(), np.ones(3))


def test_means_are_over_cases() -> None:
    """A patient with two cases weighs twice in the overall mean, as images do in the literature."""
    scores = RaterScores(("lesion",))
    assert scores.overall() is None
    for patient, value in (("a", 0.0), ("a", 0.5), ("b", 1.0)):
        scores.add(patient, [RaterScore(value, value, value, value)])
    overall, of_a = scores.overall(), scores.of("a")
    assert overall is not None
    assert of_a is not None
    assert (overall["lesion"].cases, overall["lesion"].mean.hm_iou) == (3, 0.5)
    assert (of_a["lesion"].cases, of_a["lesion"].mean.ged_squared) == (2, 0.25)
    assert scores.of("c") is None
