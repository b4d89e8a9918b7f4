"""The audit passes the honest step and catches the ones that lie."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from torch import nn

from client.privacy.audit import (
    CLAIM,
    Verdict,
    audit,
    epsilon_lower_bound,
    refutation_p_value,
    right_guesses,
    spread_p_value,
)
from client.privacy.engines import PatientLoop, RowLoss, Rows, Sums
from client.privacy.entropy import SeededEntropy
from client.privacy.noise import add_noise
from client.privacy.policy import PrivacyPolicy
from client.privacy.sampling import PoissonSampler
from client.privacy.step import PrivateStep
from tests.client.privacy.rows import POLICY

COINS = 11  # decides who takes part: fixed, so that a test that passes keeps passing, but for the noise itself


def verdict(make_step: object = PrivateStep, make_sampler: object = PoissonSampler, canaries: int = 300) -> Verdict:
    return audit(
        POLICY, canaries=canaries, make_step=make_step, make_sampler=make_sampler, coins=SeededEntropy(COINS)  # type: ignore[arg-type]
    )  # fmt: skip


def test_the_claim_is_what_an_accountant_says() -> None:
    """PLD (dp-accounting): epsilon 2.00 at the claim's sigma, more at a hundredth less."""
    import dp_accounting as dp

    def epsilon(sigma: float) -> float:
        accountant = dp.pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
        accountant.compose(dp.PoissonSampledDpEvent(CLAIM.q, dp.GaussianDpEvent(sigma)), CLAIM.steps)
        return float(accountant.get_epsilon(CLAIM.delta))

    assert epsilon(CLAIM.sigma) <= CLAIM.epsilon < epsilon(CLAIM.sigma - 0.01)


def test_the_honest_step_passes() -> None:
    """Nothing refutes epsilon 2, and something is seen at all: the canaries are not invisible."""
    found = verdict()
    assert found.passed
    assert 0 <= found.epsilon_at_least < 1.9
    assert found.right > 0.5 * found.guesses
    assert found.inclusion == pytest.approx(0.5, abs=0.05)


class NoNoise(PrivateStep):
    def _noise(self, sums: Sums) -> None:
        pass


class LittleNoise(PrivateStep):
    """A fifth of what is accounted."""

    def _noise(self, sums: Sums) -> None:
        add_noise(sums.values(), self.policy.sigma * self.policy.clip / 5, self._entropy)


class TorchNoise(PrivateStep):
    """Of the right size, from torch's global generator, which whoever sends the seed knows."""

    def _noise(self, sums: Sums) -> None:
        for total in sums.values():
            total.add_(torch.randn(total.shape) * self.policy.sigma * self.policy.clip)


class NumpyNoise(PrivateStep):
    def _noise(self, sums: Sums) -> None:
        for total in sums.values():
            drawn = torch.from_numpy(np.random.standard_normal(total.shape))
            total.add_(drawn * self.policy.sigma * self.policy.clip)


class PythonNoise(PrivateStep):
    def _noise(self, sums: Sums) -> None:
        for total in sums.values():
            drawn = torch.tensor([random.gauss() for _ in range(total.numel())])
            total.add_(drawn * self.policy.sigma * self.policy.clip)


class OwnSeed(PrivateStep):
    """From a source that begins with the same seed in every training."""

    def _noise(self, sums: Sums) -> None:
        if not hasattr(self, "source"):
            self.source = SeededEntropy(1)
        add_noise(sums.values(), self.policy.sigma * self.policy.clip, self.source)


class Unclipped(PatientLoop):
    def clipped_sum(self, network: nn.Module, loss: RowLoss, patients: Iterable[Rows], clip: float) -> Sums:
        return super().clipped_sum(network, loss, patients, 1e12)


def no_clipping(
    network: nn.Module, loss: RowLoss, policy: PrivacyPolicy, optimizer: torch.optim.Optimizer
) -> PrivateStep:
    return PrivateStep(network, loss, policy, optimizer, Unclipped())


@pytest.mark.parametrize(
    ("sabotage", "attack"),
    [
        (NoNoise, "noise"),
        (LittleNoise, "noise"),
        (no_clipping, "noise"),
        (TorchNoise, "replay"),
        pytest.param(NumpyNoise, "replay", marks=pytest.mark.slow),
        pytest.param(PythonNoise, "replay", marks=pytest.mark.slow),
        pytest.param(OwnSeed, "replay", marks=pytest.mark.slow),
    ],
)
def test_sabotaged_steps_are_caught(sabotage: object, attack: str) -> None:
    """No noise, a fifth of it, no clipping, and noise that can be foretold: epsilon 2 is refuted."""
    found = verdict(sabotage, canaries=1000 if sabotage is LittleNoise else 300)
    assert found.epsilon_at_least > CLAIM.epsilon
    assert not found.passed
    assert found.attack == attack


class Shuffled(PoissonSampler):
    """Half of the patients, always: right on average, and not what is accounted."""

    def draw(self) -> list[int]:
        return sorted(random.sample(range(self.patients), self.patients // 2))


class TooOften(PoissonSampler):
    def __init__(self, patients: int, q: float) -> None:
        super().__init__(patients, q)
        self.often = PoissonSampler(patients, min(1.0, 1.2 * q))

    def steps(self, count: int) -> Iterator[list[int]]:
        return self.often.steps(count)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [Shuffled, TooOften])
def test_samplers_that_are_not_poisson_are_caught(sampler: object) -> None:
    """Batches of one size, and a rate above q."""
    found = verdict(make_sampler=sampler)
    assert not found.passed
    assert min(found.inclusion_p, found.spread_p) < 1e-6
    assert found.epsilon_at_least < CLAIM.epsilon, "it is the sampler that was caught"


@pytest.mark.slow
def test_honest_steps_pass_again_and_again() -> None:
    """Twenty audits: the bound never reaches the claim, and lies above zero in nearly all of them."""
    found = [audit(POLICY, canaries=1000) for _ in range(20)]
    assert all(one.passed for one in found)
    assert max(one.epsilon_at_least for one in found) < 1.6
    assert sum(one.epsilon_at_least > 0 for one in found) >= 15


def test_seeds_are_given_back() -> None:
    """The audit sets torch's, numpy's and Python's generators, and puts them back."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    audit(POLICY, canaries=100)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


def test_too_few_canaries() -> None:
    """From 99 nothing can be told."""
    with pytest.raises(ValueError, match="at least 100 canaries"):
        audit(POLICY, canaries=99)


# --- the statistics ---


@pytest.mark.parametrize(
    ("guesses", "right", "epsilon"), [(100, 80, 1.0), (100, 50, 0.0), (10, 10, 2.0), (200, 190, 3.0)]
)
def test_without_delta_it_is_the_binomial_tail(guesses: int, right: int, epsilon: float) -> None:
    """Each guess is right with e^eps / (1 + e^eps) at most: the tail summed term by term."""
    each = math.exp(epsilon) / (1 + math.exp(epsilon))
    tail = sum(math.comb(guesses, k) * each**k * (1 - each) ** (guesses - k) for k in range(right, guesses + 1))
    assert refutation_p_value(1000, guesses, right, epsilon, 0.0) == pytest.approx(tail, rel=1e-9)


@pytest.mark.parametrize(("canaries", "guesses", "right", "epsilon", "delta"), [
    (1000, 200, 190, 2.0, 1e-5), (1000, 50, 50, 3.0, 1e-4), (500, 100, 60, 0.5, 1e-3),
])  # fmt: skip
def test_with_delta_it_is_the_theorem(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> None:
    """beta + 2 m delta alpha with alpha = max_i P[v - i <= V < v] / i, in the plainest loop."""
    each = 1 / (1 + math.exp(-epsilon))
    mass = [float(value) for value in binom.pmf(range(guesses + 1), guesses, each)]
    beta = sum(mass[right:])
    alpha = max(sum(mass[right - i : right]) / i for i in range(1, right + 1))
    expected = min(1.0, beta + 2 * canaries * delta * alpha)
    assert refutation_p_value(canaries, guesses, right, epsilon, delta) == pytest.approx(expected, rel=1e-6)


@given(st.integers(1, 150), st.data())
def test_the_bound_is_where_the_p_value_crosses(guesses: int, data: st.DataObject) -> None:
    """Just below the bound is refuted, just above is not; none where chance explains it."""
    right = data.draw(st.integers(0, guesses))
    bound = epsilon_lower_bound(1000, guesses, right, 1e-5, 0.025)
    assert refutation_p_value(1000, guesses, right, bound + 1e-3, 1e-5) > 0.025
    if bound > 0:
        assert refutation_p_value(1000, guesses, right, max(0.0, bound - 1e-3), 1e-5) <= 0.025


def test_the_bound_holds_for_randomised_response() -> None:
    """The mechanism for which epsilon is tight: over 400 runs at epsilon 1 the bound exceeds 1 in at most 5 % or so."""
    generator = np.random.default_rng(0)
    right = generator.binomial(200, math.e / (1 + math.e), size=400)
    bounds = np.array([epsilon_lower_bound(200, 200, int(v), 0.0, 0.05) for v in right])
    assert 0.005 < (bounds > 1.0).mean() < 0.08
    assert np.median(bounds) > 0.7, "the bound is worth having"


def test_right_guesses() -> None:
    """The highest are said to be in, the lowest out."""
    inside = np.array([True, False, True, False, True, False])
    scores = np.array([5.0, -5.0, 4.0, -4.0, 0.1, 0.2])
    assert right_guesses(scores, inside, 4) == 4
    assert right_guesses(-scores, inside, 4) == 0
    assert right_guesses(scores, inside, 6) == 4


def test_a_spread_without_variance() -> None:
    """With q = 1 every batch is everybody, and nothing can be said."""
    assert spread_p_value([5, 5, 5], 5, 1.0) == 1.0
