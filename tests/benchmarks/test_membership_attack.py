"""The membership attacks find who was planted, and nobody else; their figures equal the obvious counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, norm
from torch import Tensor, nn

from benchmarks.leaks.membership import (
    auc,
    bound_of,
    bounded_tpr,
    calibrated_scores,
    loss_scores,
    patient_losses,
    success,
    tpr_at,
)
from benchmarks.leaks.people import People, draw_people
from medsegdiff.config import DiffusionConfig, ModelConfig
from medsegdiff.diffusion import Diffusion
from medsegdiff.network import MedSegDiff

values = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30).map(np.array)


def slow_auc(members: np.ndarray, others: np.ndarray) -> float:
    """Every pair looked at."""
    return float(np.mean([[1.0 * (m > o) + 0.5 * (m == o) for o in others] for m in members]))


def slow_tpr(members: np.ndarray, others: np.ndarray, rate: float) -> float:
    """The best share over every threshold that keeps the others' share within the rate."""
    shares = [0.0]
    for threshold in [*members, *others, -math.inf]:
        if np.mean(others > threshold) <= rate + 1e-12:
            shares.append(float(np.mean(members > threshold)))
    return max(shares)


@given(values, values)
def test_auc_is_the_share_of_pairs(members: np.ndarray, others: np.ndarray) -> None:
    """Ties count half."""
    assert auc(members, others) == pytest.approx(slow_auc(members, others))


@given(values, values, st.sampled_from([0.05, 0.1, 0.25, 0.5]))
def test_tpr_is_the_best_over_all_thresholds(members: np.ndarray, others: np.ndarray, rate: float) -> None:
    """Ties among the others never let more of them through than the rate allows."""
    if len(others) * rate < 1:
        with pytest.raises(ValueError, match="needs at least"):
            tpr_at(members, others, rate)
        return
    assert tpr_at(members, others, rate) == pytest.approx(slow_tpr(members, others, rate))


def test_random_scores_tell_nothing() -> None:
    """AUC near a half, TPR near the FPR, and both inside their intervals; a shift of one deviation is seen."""
    generator = np.random.default_rng(0)
    members, others = generator.standard_normal(400), generator.standard_normal(1000)
    found = success(members, others)
    assert found.auc_low < 0.5 < found.auc_high
    assert found.tpr_low <= 0.01 <= found.tpr_high
    shifted = success(members + 1, others)
    assert shifted.auc_low > 0.5
    assert shifted.auc == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=0.04)


@pytest.mark.parametrize(("hits", "high"), [(0, 0.0377), (1, 0.0567), (96, 1.0)])
def test_no_hit_is_no_proof_that_there_is_none(hits: int, high: float) -> None:
    """Of 96 members: the exact interval's upper ends (scipy's own quantiles of the beta distribution)."""
    others = np.linspace(0, 1, 800)
    found = success(np.r_[np.full(hits, 2.0), np.full(96 - hits, -1.0)], others)
    assert found.tpr == hits / 96
    assert found.tpr_high == pytest.approx(high if hits == 96 else beta.ppf(0.975, hits + 1, 96 - hits))
    assert found.tpr_high == pytest.approx(high, abs=1e-3)


class Memory(MedSegDiff):
    """A network that knows the masks of its own patients by heart, and guesses nothing for others."""

    def __init__(self, people: People, sureness: float) -> None:
        nn.Module.__init__(self)
        self.known, self.sureness = people, sureness
        self.config = ModelConfig(image_size=8)

    def image_features(self, image_BCHW: Tensor) -> list[Tensor]:
        """The image itself."""
        return [image_BCHW]

    def denoise(
        self, mask_BKHW: Tensor, t_B: Tensor, features: list[Tensor], previous_BKHW: Tensor | None = None
    ) -> Tensor:
        """The known mask of a known image, dampened; zeros for any other."""
        out = torch.zeros_like(mask_BKHW)
        images, masks = self.known.images.flatten(0, 1), self.known.masks.flatten(0, 1)
        for row, image in enumerate(features[0]):
            hit = (images == image).flatten(1).all(dim=1).nonzero()
            if len(hit):
                out[row] = self.sureness * masks[int(hit[0])]
        return out


def some_people(count: int, seed: int) -> People:
    """Noise in place of scans."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 2, 1, 8, 8, generator=generator)
    return People(images, torch.randn(images.shape, generator=generator).sign())


def test_a_planted_memory_is_found() -> None:
    """All members, at one false positive in a hundred; with nothing learnt by heart, none."""
    inside, outside = some_people(20, 1), some_people(100, 2)
    diffusion = Diffusion(DiffusionConfig())

    def attacked(sureness: float) -> tuple[np.ndarray, np.ndarray]:
        network = Memory(inside, sureness)
        scores = [loss_scores(patient_losses(network, diffusion, group, looks=3)) for group in (inside, outside)]
        return scores[0], scores[1]

    assert tpr_at(*attacked(0.1)) == 1.0
    assert auc(*attacked(0.1)) == 1.0
    assert auc(*attacked(0.0)) == 0.5


def test_losses_are_of_the_patient_alone() -> None:
    """A patient's loss is the same whoever else is looked at, and at every call."""
    people = some_people(4, 3)
    network, diffusion = Memory(people.take(0, 2), 0.5), Diffusion(DiffusionConfig())
    every = patient_losses(network, diffusion, people, looks=3)
    again = patient_losses(network, diffusion, people.take(1, 2), looks=3)
    np.testing.assert_array_equal(every[1:3], again)
    assert np.unique(every.round(9)).size == 2  # known: (1 - 0.5)^2; unknown: 1


def test_calibration_takes_difficulty_away() -> None:
    """Hard members hide among easy strangers from the plain loss, not from the calibrated one."""
    generator = np.random.default_rng(0)
    difficulty = np.exp(generator.normal(0, 1, 300))
    inside = np.arange(300) < 100
    losses = difficulty * np.where(inside, 0.7, 1.0) * np.exp(generator.normal(0, 0.05, 300))
    others = difficulty * np.exp(generator.normal(0, 0.05, (4, 300)))
    plain, calibrated = loss_scores(losses), calibrated_scores(losses, others)
    assert auc(plain[inside], plain[~inside]) < 0.7
    assert tpr_at(calibrated[inside], calibrated[~inside]) > 0.95
    with pytest.raises(ValueError, match="other models"):
        calibrated_scores(losses, others[:, :200])


@pytest.mark.slow
def test_the_bound_is_the_gaussian_one() -> None:
    """One full step of sigma 1 is 1-GDP, TPR <= Phi(1 + Phi^-1(FPR)) (Dong et al. 2022): just above that."""
    exact = float(norm.cdf(1 + norm.ppf(0.01)))
    assert exact <= bound_of(1.0, 1.0, 1) <= 1.15 * exact


def test_the_bound_of_a_pure_epsilon() -> None:
    """min(e^eps FPR, 1 - e^-eps (1 - FPR)), and never below the false-positive rate."""
    assert bounded_tpr(lambda delta: 1.0) == pytest.approx(math.e * 0.01, rel=1e-6)
    assert bounded_tpr(lambda delta: 8.0) == pytest.approx(1 - 0.99 * math.exp(-8), rel=1e-6)
    assert bounded_tpr(lambda delta: 0.0) == pytest.approx(0.01, rel=1e-6)


def test_people_are_distinct_and_repeat() -> None:
    """The same seed gives the same patients; each is normalised; more patients change none."""
    few, more = draw_people(2, 16, 5), draw_people(3, 16, 5)
    assert torch.equal(few.images, more.images[:2])
    assert torch.equal(few.masks, more.masks[:2])
    assert not torch.equal(more.images[0], more.images[2])
    assert few.images.shape == (2, 2, 1, 16, 16)
    assert few.images.flatten(1).mean(dim=1).abs().max() < 1e-5
    assert set(few.masks.unique().tolist()) == {-1.0, 1.0}
    with pytest.raises(ValueError, match="are needed"):
        few.take(1, 2)
