"""Samplers on toys whose exact posterior mean is known, so that only the sampler can be wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, ndtri
from torch import Tensor

from medsegdiff.config import Sampler, SamplingConfig, Schedule
from medsegdiff.diffusion import alpha_bars
from medsegdiff.samplers import _ddim, _dpm_solver_pp_2m, sample, timestep_walk

MU, S = 0.6, 0.5  # the Gaussian toy: x_0 ~ N(MU, S^2)


def no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler must not draw noise")


def gaussian_mean(x: Tensor, power: float) -> Tensor:
    """E[x_0 | x_t] of the Gaussian toy at signal power abar."""
    gain = math.sqrt(power) * S**2 / (power * S**2 + 1 - power)
    return MU + gain * (x - math.sqrt(power) * MU)


def gaussian_clean(table: Tensor) -> Callable[[Tensor, int], Tensor]:
    return lambda x, t: gaussian_mean(x, float(table[t]))


@given(timesteps=st.integers(2, 3000), steps=st.integers(1, 3000))
@settings(max_examples=200, deadline=None)
def test_a_walk_falls_from_the_last_timestep(timesteps: int, steps: int) -> None:
    """A walk starts at T - 1, falls strictly, stays in range, has as many steps as asked for and even strides."""
    walk = timestep_walk(timesteps, steps)
    assert len(walk) == min(steps, timesteps)
    assert walk[0] == timesteps - 1
    assert walk[-1] >= 0
    strides = [a - b for a, b in zip(walk, [*walk[1:], -1], strict=True)]
    assert min(strides) >= 1
    assert max(strides) - min(strides) <= 2  # rounding at either end


def test_a_full_walk_takes_every_timestep() -> None:
    """As many steps as timesteps, or more, is every timestep once."""
    assert timestep_walk(7, 7) == timestep_walk(7, 100) == [6, 5, 4, 3, 2, 1, 0]
    assert timestep_walk(1000, 5) == [999, 799, 599, 399, 199]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_ddpm_and_full_ddim_equal_the_papers_ancestral_loop(schedule: str, zero_terminal_snr: bool) -> None:
    """With the same noise, ddpm and ddim (eta = 1, all steps) are Ho et al. 2020, eq. 6-7, written with betas."""
    table = alpha_bars(schedule, 60, zero_terminal_snr)  # type: ignore[arg-type]
    start = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def drawer() -> Callable[[], Tensor]:
        generator = torch.Generator().manual_seed(1)
        return lambda: torch.randn(500, generator=generator, dtype=torch.float64)

    draw, x = drawer(), start
    for t in reversed(range(60)):
        bar, bar_before = float(table[t]), float(table[t - 1]) if t else 1.0
        alpha = bar / bar_before
        clean = gaussian_mean(x, bar)
        mean = (math.sqrt(bar_before) * (1 - alpha) * clean + math.sqrt(alpha) * (1 - bar_before) * x) / (1 - bar)
        x = mean + (math.sqrt((1 - bar_before) / (1 - bar) * (1 - alpha)) * draw() if t else 0)

    for name, eta in (("ddpm", 0.0), ("ddim", 1.0)):
        config = SamplingConfig(name, steps=60, eta=eta)  # type: ignore[arg-type]
        torch.testing.assert_close(sample(gaussian_clean(table), start, table, config, drawer()), x)
    halfway = SamplingConfig("ddim", steps=60, eta=0.5)
    assert float((sample(gaussian_clean(table), start, table, halfway, drawer()) - x).abs().max()) > 0.1


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_one_ddim_step_is_the_papers_formula(eta: float) -> None:
    """Song et al. 2021, eq. 12 and 16, from abar 0.3 to 0.8 with a clean answer of 0.4 and noise of 1."""
    sigma = eta * math.sqrt((1 - 0.8) / (1 - 0.3)) * math.sqrt(1 - 0.3 / 0.8)
    noise = (1.7 - math.sqrt(0.3) * 0.4) / math.sqrt(1 - 0.3)
    expected = math.sqrt(0.8) * 0.4 + math.sqrt(1 - 0.8 - sigma**2) * noise + sigma
    start = torch.tensor(1.7, dtype=torch.float64)
    end = _ddim(lambda x, t: torch.full_like(x, 0.4), start, [0], [0.3, 0.8], eta, lambda: torch.ones_like(start))
    assert float(end) == pytest.approx(expected, abs=1e-12)


def test_ddpm_samples_have_the_moments_of_the_data() -> None:
    """300 steps on the Gaussian toy give its mean and deviation within five standard errors (and half a percent of
    discretisation); a toy 10 % wider is told apart."""
    table, count = alpha_bars("linear", 300), 60_000
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(count, generator=generator)

    samples = sample(gaussian_clean(table), draw(), table, SamplingConfig("ddpm", steps=300), draw)
    assert float(samples.mean()) == pytest.approx(MU, abs=5 * S / math.sqrt(count) + 0.003)
    # beta-tilde, the posterior's variance given x_0, leaves out that of x_0 itself: a little narrow at finite T.
    tolerance = 5 / math.sqrt(2 * count) + 0.02
    deviation = float(samples.std())
    assert deviation / S == pytest.approx(1, abs=tolerance)
    assert deviation / (1.1 * S) != pytest.approx(1, abs=tolerance)


def powers_on(log_snr: Sequence[float]) -> list[float]:
    """abar on a grid of lambda = log(signal / sigma), and 1 behind its last point."""
    return [float(expit(2 * value)) for value in log_snr] + [1.0]


def uneven_grid(pairs: int) -> list[float]:
    """From lambda = -2.5 to 2.5 in steps of lengths 1 : 2 : 1 : 2 ..., so that a ratio of steps is never 1."""
    steps = np.tile([1.0, 2.0], pairs)
    return list(-2.5 + 5 * np.concatenate([[0], np.cumsum(steps) / steps.sum()]))


def two_m(grid: Sequence[float], x: float, weight: Callable[[float], float]) -> float:
    """DPM-Solver++(2M) for one number, in plain Python; `weight(r)` of the difference is 1 / (2 r) in the paper."""
    before: float | None = None
    last = math.nan
    for here, there in pairwise(grid):
        step = there - here
        clean = float(gaussian_mean(torch.tensor(x, dtype=torch.float64), float(expit(2 * here))))
        direction = clean
        if before is not None:
            direction += weight((here - last) / step) * (clean - before)
        sigma = [math.sqrt(1 - float(expit(2 * value))) for value in (here, there)]
        x = sigma[1] / sigma[0] * x - math.sqrt(float(expit(2 * there))) * math.expm1(-step) * direction
        before, last = clean, here
    return float(gaussian_mean(torch.tensor(x, dtype=torch.float64), float(expit(2 * grid[-1]))))


def exact_end(grid: Sequence[float], x: float) -> float:
    """Where the probability flow of the Gaussian toy ends: x keeps its quantile."""
    first, last = (float(expit(2 * value)) for value in (grid[0], grid[-1]))

    def spread(power: float) -> float:
        return math.sqrt(power * S**2 + 1 - power)

    quantile = (x - math.sqrt(first) * MU) / spread(first)
    end = math.sqrt(last) * MU + spread(last) * quantile
    return float(gaussian_mean(torch.tensor(end, dtype=torch.float64), last))


def order(solve: Callable[[Sequence[float]], float]) -> float:
    """Measured order of convergence: log2 of the error's fall when all steps are halved."""
    errors = [abs(solve(uneven_grid(pairs)) - exact_end(uneven_grid(pairs), X_START)) for pairs in (32, 64)]
    return math.log2(errors[0] / errors[1])


X_START = 1.3


def run_on(grid: Sequence[float], solver: Callable[..., Tensor], *more: object) -> float:
    powers = powers_on(grid)

    def clean(x: Tensor, t: int) -> Tensor:
        return gaussian_mean(x, powers[t])

    return float(solver(clean, torch.tensor(X_START, dtype=torch.float64), range(len(grid)), powers, *more))


def test_ddim_is_of_first_order() -> None:
    """Halving the steps in log-SNR halves DDIM's error."""
    assert order(lambda grid: run_on(grid, _ddim, 0.0, no_noise)) == pytest.approx(1, abs=0.15)


def test_dpm_solver_is_of_second_order() -> None:
    """Halving the steps in log-SNR quarters the error of DPM-Solver++(2M), and it is the paper's formula."""
    assert order(lambda grid: run_on(grid, _dpm_solver_pp_2m)) == pytest.approx(2, abs=0.25)
    grid = uneven_grid(8)
    assert run_on(grid, _dpm_solver_pp_2m) == pytest.approx(two_m(grid, X_START, lambda r: 0.5 / r), abs=1e-12)


@pytest.mark.parametrize("wrong", [lambda r: -0.5 / r, lambda r: 1 / r, lambda r: 0.0])
def test_a_wrong_coefficient_is_not_of_second_order(wrong: Callable[[float], float]) -> None:
    """Sign swapped, half forgotten, difference left out: each falls back to first order."""
    assert order(lambda grid: two_m(grid, X_START, wrong)) < 1.5


def test_a_ratio_turned_over_is_not_the_papers_formula() -> None:
    """r and 1 / r mixed up differs from the solver on an uneven grid.

    Convergence cannot tell: the local errors (h_before^2 - h^2) / 2 telescope, whatever the grid.
    """
    grid = uneven_grid(8)
    assert abs(run_on(grid, _dpm_solver_pp_2m) - two_m(grid, X_START, lambda r: 0.5 * r)) > 1e-4


STAIRS = [0.1, 0.4, 0.8, 1.0]  # abar on the way from pure noise to a clean mask


def from_noise(solver: Callable[..., Tensor], first: float, *more: object) -> Tensor:
    """Five starts walked up STAIRS from abar = `first`."""
    powers = [first, *STAIRS]
    start = torch.linspace(-2, 2, 5, dtype=torch.float64)
    return solver(lambda x, t: gaussian_mean(x, powers[t]), start, range(4), powers, *more)


def test_dpm_solver_from_pure_noise_is_the_limit() -> None:
    """From abar = 0 the walk is the closed form written out; a stand-in such as 1e-4 for 0 is not."""
    x, answers = torch.linspace(-2, 2, 5, dtype=torch.float64), []
    powers = [0.0, *STAIRS]
    for index in range(3):
        here, there = powers[index], powers[index + 1]
        answers.append(gaussian_mean(x, here))
        ratio_of_sigmas = math.sqrt((1 - there) / (1 - here))
        # exp(-h) = (sigma_s / alpha_s) (alpha_t / sigma_t), 0 from pure noise
        shrink = ratio_of_sigmas * math.sqrt(here / there)
        direction = answers[-1]
        if index == 2:  # the step before had a finite length; the first was infinite and is no slope
            lambdas = [0.5 * math.log(p / (1 - p)) for p in powers[1:4]]
            ratio = (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])
            direction = direction + (answers[-1] - answers[-2]) / (2 * ratio)
        x = ratio_of_sigmas * x + math.sqrt(there) * (1 - shrink) * direction
    torch.testing.assert_close(from_noise(_dpm_solver_pp_2m, 0.0), gaussian_mean(x, powers[3]), rtol=0, atol=1e-13)
    assert float((from_noise(_dpm_solver_pp_2m, 1e-4) - gaussian_mean(x, powers[3])).abs().max()) > 1e-4


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samplers_are_continuous_at_pure_noise(eta: float) -> None:
    """As abar falls to 0, the walk of DDIM, of DDPM and of DPM-Solver++ tends to that from abar = 0."""
    drawn = torch.linspace(-1, 1, 5, dtype=torch.float64)
    for solver, more in ((_ddim, (eta, lambda: drawn)), (_dpm_solver_pp_2m, ())):
        limit = from_noise(solver, 0.0, *more)
        gaps = [float((from_noise(solver, first, *more) - limit).abs().max()) for first in (1e-6, 1e-10, 1e-18, 1e-30)]
        assert gaps == sorted(gaps, reverse=True)
        assert gaps[0] > gaps[2]
        # The slope of the second step of DPM-Solver++ fades with 1 / log(1 / abar) alone, DDIM with sqrt(abar).
        assert gaps[3] < (1e-14 if solver is _ddim else 0.02)


def binary_probability(
    sampler: Sampler, steps: int, eta: float = 0.0, prior: float = 0.1, zero_terminal_snr: bool = False
) -> float:
    """P(sample > 0) of the toy pixel x_0 = +1 with probability `prior`, else -1; T = 1000, linear.

    Without noise the walk maps the start to the end, so quantiles of the start integrate it without Monte Carlo.
    """
    table = alpha_bars("linear", 1000, zero_terminal_snr)

    def clean(x: Tensor, t: int) -> Tensor:
        power = float(table[t])
        return torch.tanh(math.sqrt(power) / (1 - power) * x + 0.5 * math.log(prior / (1 - prior)))

    count = 20_000
    start = torch.from_numpy(ndtri((np.arange(count) + 0.5) / count))
    end = sample(clean, start, table, SamplingConfig(sampler, steps=steps, eta=eta), no_noise)
    return float((end > 0).double().mean())


@pytest.mark.parametrize(
    ("sampler", "steps", "measured"),
    [
        ("dpmpp_2m", 5, 0.0688),
        ("dpmpp_2m", 10, 0.0970),
        ("dpmpp_2m", 20, 0.1003),
        ("dpmpp_2m", 50, 0.1008),
        ("ddim", 5, 0.0593),
        ("ddim", 10, 0.0835),
        ("ddim", 20, 0.0929),
        ("ddim", 50, 0.0978),
    ],
)
def test_the_binary_toy_has_not_moved(sampler: Sampler, steps: int, measured: float) -> None:
    """Regression: how often a pixel of prior 0.1 is drawn, by sampler and number of steps (true value 0.1)."""
    assert binary_probability(sampler, steps) == pytest.approx(measured, abs=0.0005)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddim"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_the_binary_toy_converges_to_its_prior(sampler: Sampler, zero_terminal_snr: bool) -> None:
    """Many steps draw a pixel as often as the data hold it, for a rare and for a common pixel."""
    for prior in (0.1, 0.7):
        drawn = binary_probability(sampler, 250, prior=prior, zero_terminal_snr=zero_terminal_snr)
        assert drawn == pytest.approx(prior, abs=0.002)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_one_step_is_the_posterior_mean(sampler: Sampler) -> None:
    """A single step answers E[x_0 | x_T] and draws nothing."""
    table = alpha_bars("linear", 1000)
    start = torch.randn(5, generator=torch.Generator().manual_seed(0))
    end = sample(gaussian_clean(table), start, table, SamplingConfig(sampler, steps=1), no_noise)
    torch.testing.assert_close(end, gaussian_mean(start, float(table[-1])))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_zero_terminal_snr_keeps_the_moments_of_the_data(sampler: Sampler, schedule: Schedule) -> None:
    """300 steps from abar = 0 give the Gaussian toy's mean and deviation; a toy 10 % wider is told apart."""
    table, count = alpha_bars(schedule, 300, zero_terminal_snr=True), 20_000
    generator = torch.Generator().manual_seed(0)
    start = torch.from_numpy(ndtri((np.arange(count) + 0.5) / count))
    samples = sample(
        gaussian_clean(table), start, table, SamplingConfig(sampler, steps=300),
        lambda: torch.randn(count, generator=generator, dtype=torch.float64),
    )  # fmt: skip
    assert float(samples.mean()) == pytest.approx(MU, abs=5 * S / math.sqrt(count) + 0.003)
    assert float(samples.std()) / S == pytest.approx(1, abs=0.045)
    assert float(samples.std()) / (1.1 * S) != pytest.approx(1, abs=0.045)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_the_network_is_asked_once_a_step_along_the_walk(sampler: Sampler) -> None:
    """Each sampler evaluates the walk's timesteps in order, once each, and ends on the last clean answer's side."""
    table, asked = alpha_bars("cosine", 1000), []

    def clean(x: Tensor, t: int) -> Tensor:
        asked.append(t)
        return torch.full_like(x, 0.25)

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 1, 2, 2, generator=generator)
    end = sample(clean, start, table, SamplingConfig(sampler, steps=9), lambda: torch.randn(start.shape))
    assert asked == timestep_walk(1000, 9)
    torch.testing.assert_close(end, torch.full_like(start, 0.25))
