"""Counts of probabilities: exact, whatever the order, and equal to the definition."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medsegdiff.calibration import BINS, CalibrationCounts, Calibrations, near


def naive_ece(probability: Tensor, truth: Tensor) -> Fraction | None:
    """Guo et al. (2017), eq. 3, voxel by voxel with fractions."""
    bins: dict[int, list[tuple[Fraction, bool]]] = {}
    for p, t in zip(probability.flatten().tolist(), truth.flatten().tolist(), strict=True):
        bins.setdefault(min(BINS - 1, int(Fraction(p) * BINS)), []).append((Fraction(p), t))
    total = probability.numel()
    if not total:
        return None
    gaps = (abs(sum(p for p, _ in found) - sum(t for _, t in found)) for found in bins.values())
    return sum(gaps, Fraction(0)) / total


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 40), st.floats(0.1, 6))
def test_the_error_equals_its_definition(seed: int, voxels: int, power: float) -> None:
    """Exactly, edges of bins and tiny probabilities among them; nothing of nothing."""
    generator = torch.Generator().manual_seed(seed)
    probability = (torch.rand(1, voxels, generator=generator) ** power).half()
    probability[:, ::5] = torch.tensor([0.0, 1.0, 0.2, 2**-24, 1 / 15])[seed % 5].half()
    truth = torch.rand(1, voxels, generator=generator) < probability.float()
    counts = CalibrationCounts(1)
    counts.add(probability, truth)
    found = counts.result(0)
    expected = naive_ece(probability, truth)
    assert found.ece == (None if expected is None else pytest.approx(float(expected), abs=1e-15))
    assert sum(b.voxels for b in found.bins) == found.voxels == voxels
    assert all(b.low <= (b.probability or b.low) <= b.high for b in found.bins)


def test_cases_add_up_in_any_order() -> None:
    """Three cases one by one, in another order, or as one: the same numbers to the last bit."""
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(2, 3000, generator=generator).half()
    truth = torch.rand(2, 3000, generator=generator) < 0.3
    results = []
    for parts in ([(0, 3000)], [(0, 10), (10, 1500), (1500, 3000)], [(1500, 3000), (0, 10), (10, 1500)]):
        counts = CalibrationCounts(2)
        for start, end in parts:
            counts.add(probability[:, start:end], truth[:, start:end])
        results.append((counts.result(0), counts.result(1)))
    assert results[0] == results[1] == results[2]
    assert results[0][0] != results[0][1]


def test_true_probabilities_are_calibrated_and_certain_ones_are_not() -> None:
    """Outcomes drawn with the stated probability leave noise alone; the same read as 0 or 1 are far off."""
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(1, 60_000, generator=generator).half()
    truth = torch.rand(1, 60_000, generator=generator) < probability.float()
    honest, sure = CalibrationCounts(1), CalibrationCounts(1)
    honest.add(probability, truth)
    sure.add(probability.round(), truth)
    assert (honest.result(0).ece or 0) < 0.01
    assert sure.result(0).ece == pytest.approx(0.25, abs=0.01)
    assert [b.foreground for b in honest.result(0).bins] == pytest.approx((np.arange(15) + 0.5) / 15, abs=0.03)


@pytest.mark.parametrize(
    "wrong", [torch.tensor([[0.5]]), torch.tensor([[1.5]]).half(), torch.tensor([[np.nan]]).half()]
)
def test_what_is_no_probability_is_refused(wrong: Tensor) -> None:
    """Another type, beyond 1, not a number."""
    with pytest.raises(ValueError, match="probabilities"):
        CalibrationCounts(1).add(wrong, torch.tensor([[True]]))


def test_the_box_is_the_structure_and_half_of_it_on_each_side() -> None:
    """At least one voxel more, cut off at the image; no box of nothing."""
    truth = torch.zeros(20, 20, 5, dtype=torch.bool)
    assert near(truth) is None
    truth[6:10, 0:5, 2] = True
    truth[7, 3, 3] = True
    assert near(truth) == (slice(4, 12), slice(0, 7), slice(1, 5))


def test_near_leaves_the_empty_distance_out() -> None:
    """Far voxels that everybody gives 0 make the error small over all of them, and not near the structure."""
    truth = torch.zeros(2, 40, 40, 1, dtype=torch.bool)
    truth[0, 10:14, 10:14] = True
    probability = (truth * 0.5).half()
    calibrations = Calibrations(("lesion", "absent"))
    calibrations.add(probability, truth)
    found = calibrations.results()
    assert found["lesion"]["near"].ece == pytest.approx(0.5 * 16 / 64)
    assert found["lesion"]["all"].ece == pytest.approx(0.5 * 16 / 1600)
    assert (found["absent"]["near"].ece, found["absent"]["near"].voxels) == (None, 0)
    assert found["absent"]["all"].ece == 0.0
