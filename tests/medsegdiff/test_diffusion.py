"""Schedules and parametrisations against independent float64 arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from medsegdiff.config import DiffusionConfig, Prediction, Schedule, Weighting
from medsegdiff.diffusion import Diffusion, alpha_bars, to_clean

PREDICTIONS = get_args(Prediction)
SCHEDULES = get_args(Schedule)


def linear_by_loop(timesteps: int) -> NDArray[np.float64]:
    """Ho et al. 2020, section 4: product of 1 - beta, beta linear."""
    scale, product, table = 1000 / timesteps, 1.0, []
    first, last = scale * 1e-4, min(scale * 0.02, 0.999)
    for t in range(timesteps):
        product *= 1 - (first + (last - first) * t / (timesteps - 1))
        table.append(product)
    return np.array(table)


def cosine_by_loop(timesteps: int) -> NDArray[np.float64]:
    """Nichol and Dhariwal 2021, eq. 17, with their limit of 0.999 on beta."""

    def f(t: int) -> float:
        return math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    product, table = 1.0, []
    for t in range(1, timesteps + 1):
        product *= 1 - min(1 - f(t) / f(t - 1), 0.999)
        table.append(product)
    return np.array(table)


@pytest.mark.parametrize("timesteps", [10, 100, 1000])
@pytest.mark.parametrize(("schedule", "by_loop"), [("linear", linear_by_loop), ("cosine", cosine_by_loop)])
def test_schedules_equal_the_papers_loops(schedule: Schedule, by_loop: object, timesteps: int) -> None:
    """The table equals the obvious loop in float64, and the other schedule's loop does not."""
    table = alpha_bars(schedule, timesteps)
    assert table.dtype == torch.float64
    np.testing.assert_allclose(table.numpy(), by_loop(timesteps), rtol=1e-9)  # type: ignore[operator]
    other = cosine_by_loop if schedule == "linear" else linear_by_loop
    assert np.abs(table.numpy() - other(timesteps)).max() > 0.05


def test_the_cosine_schedule_is_the_closed_form_away_from_its_end() -> None:
    """abar(t) = f(t) / f(0): the product of ratios telescopes until the limit on beta sets in."""
    steps = np.arange(1, 1001)
    f = np.cos((steps / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(alpha_bars("cosine", 1000).numpy()[:990], f[:990], rtol=1e-9)


@given(schedule=st.sampled_from(SCHEDULES), timesteps=st.integers(2, 2000))
@settings(max_examples=40, deadline=None)
def test_signal_falls_strictly_inside_0_and_1(schedule: Schedule, timesteps: int) -> None:
    """Any number of timesteps gives a table of falling numbers in (0, 1)."""
    table = alpha_bars(schedule, timesteps)
    assert len(table) == timesteps
    assert float(table[-1]) > 0
    assert float(table[0]) < 1
    assert bool((table[1:] < table[:-1]).all())


def test_the_linear_schedule_ends_in_noise_whatever_its_length() -> None:
    """Scaling beta by 1000 / T keeps the end below 1e-4 of the signal's power."""
    assert [float(alpha_bars("linear", t)[-1]) < 1e-4 for t in (100, 250, 1000, 4000)] == [True] * 4


@pytest.mark.parametrize("timesteps", [2, 10, 1000])
@pytest.mark.parametrize(("schedule", "by_loop"), [("linear", linear_by_loop), ("cosine", cosine_by_loop)])
def test_zero_terminal_snr_is_the_papers_algorithm(schedule: Schedule, by_loop: object, timesteps: int) -> None:
    """Lin et al., algorithm 1, in numpy: the last entry is 0, the first is what it was, between they fall."""
    table = alpha_bars(schedule, timesteps, zero_terminal_snr=True)
    root = np.sqrt(by_loop(timesteps))  # type: ignore[operator]
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    assert table.dtype == torch.float64
    np.testing.assert_allclose(table.numpy(), expected, rtol=1e-7, atol=1e-12)
    assert float(table[-1]) == 0
    assert float(table[0]) == float(alpha_bars(schedule, timesteps)[0])
    assert bool((table[1:] < table[:-1]).all())
    if schedule == "linear" and timesteps > 2:
        shifted_power = root**2 - root[-1] ** 2  # the power shifted in place of its root, and not stretched
        assert np.abs(table.numpy() - shifted_power * root[0] ** 2 / shifted_power[0]).max() > 1e-6
        assert float(alpha_bars(schedule, timesteps)[-1]) > 0


def test_zero_terminal_snr_reaches_the_diffusion() -> None:
    """At T - 1 the network sees the noise itself, and no bit of the mask."""
    diffusion = Diffusion(DiffusionConfig(zero_terminal_snr=True))
    clean, noise = drawn((1, 1, 4, 4), 0).sign(), drawn((1, 1, 4, 4), 1)
    assert torch.equal(diffusion.add_noise(clean, noise, torch.tensor([999])), noise)
    ordinary = Diffusion(DiffusionConfig()).add_noise(clean, noise, torch.tensor([999]))
    assert float((ordinary - noise).abs().max()) > 1e-3, "the usual schedule leaves a trace of the mask"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_conversions_are_exact_at_zero_terminal_snr(schedule: Schedule, prediction: Prediction, scale: float) -> None:
    """At abar = 0 x_0 comes back to the bit, and elsewhere on the table within rounding."""
    diffusion = Diffusion(
        DiffusionConfig(schedule=schedule, prediction=prediction, mask_scale=scale, zero_terminal_snr=True)
    )
    t_B = torch.tensor([999, 998, 500, 0])
    clean, noise = scale * drawn((4, 1, 4, 4), 0).sign(), drawn((4, 1, 4, 4), 1)
    noisy, answer = diffusion.add_noise(clean, noise, t_B), diffusion.target(clean, noise, t_B)
    read = diffusion.clean_from(answer, noisy, t_B)
    assert torch.equal(read[0], clean[0])
    torch.testing.assert_close(read, clean, atol=1e-6, rtol=1e-6)
    noise_again = to_clean("eps", noise, noisy, *diffusion.powers(t_B))
    assert not bool(noise_again[0].isfinite().all()), "what eps would give there, and why it is refused"


def weight_by_hand(prediction: str, alpha_bar: float, gamma: float) -> float:
    """Hang et al., section 3.4, for masks of power 1."""
    snr = alpha_bar / (1 - alpha_bar)
    return {"x0": min(snr, gamma), "eps": min(snr, gamma) / snr, "v": min(snr, gamma) / (snr + 1)}[prediction]


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_are_the_papers(prediction: Prediction, gamma: float) -> None:
    """Every timestep's weight equals the formula of its parametrisation; another's differs somewhere."""
    diffusion = Diffusion(DiffusionConfig(prediction=prediction, weighting="min_snr", min_snr_gamma=gamma))
    weights = diffusion.min_snr_weights(torch.arange(1000)).numpy()
    table = linear_by_loop(1000)
    for other in PREDICTIONS:
        expected = np.array([weight_by_hand(other, float(a), gamma) for a in table])
        if other == prediction:
            np.testing.assert_allclose(weights, expected, rtol=1e-6)
        else:
            assert np.abs(weights - expected).max() > 0.1


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_min_snr_makes_the_parametrisations_one(scale: float, zero_terminal_snr: bool) -> None:
    """The same guess at x_0, said as x0, eps or v, costs min(snr, gamma) |x_0 error / b|^2, snr with power b^2."""
    clean, noise, t_B = (
        scale * drawn((5, 2, 4, 4), 0).sign(),
        drawn((5, 2, 4, 4), 1),
        torch.tensor([0, 50, 400, 700, 900]),
    )
    guess = clean + 0.1 * drawn(clean.shape, 2)
    costs, plain = [], []
    for prediction in PREDICTIONS:
        if prediction == "eps" and zero_terminal_snr:
            continue
        config = DiffusionConfig(
            prediction=prediction, mask_scale=scale, weighting="min_snr", zero_terminal_snr=zero_terminal_snr
        )
        diffusion, uniform = Diffusion(config), Diffusion(replace(config, weighting="uniform"))
        signal, sigma = diffusion.powers(t_B)
        guessed_noise = noise + signal / sigma * (clean - guess)
        answer = diffusion.target(guess, guessed_noise, t_B)
        costs.append(float(diffusion.loss(answer, clean, noise, t_B)))
        plain.append(float(uniform.loss(answer, clean, noise, t_B)))
    a = diffusion.alpha_bar[t_B].numpy()
    error = (((guess - clean) / scale) ** 2).mean((1, 2, 3)).numpy()
    expected = (np.minimum(scale**2 * a / (1 - a), 5) * error).mean()
    np.testing.assert_allclose(costs, expected, rtol=1e-3)
    assert max(plain) / min(plain) > 1.2, "unweighted, the parametrisations do not agree"


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_min_snr_is_zero_at_zero_snr(prediction: Prediction) -> None:
    """No signal, no weight: finite, and only at the very last timestep."""
    config = DiffusionConfig(prediction=prediction, weighting="min_snr", zero_terminal_snr=True)
    weights = Diffusion(config).min_snr_weights(torch.arange(1000))
    assert float(weights[-1]) == 0
    assert bool((weights[:-1] > 0).all())
    assert bool(weights.isfinite().all())


@pytest.mark.parametrize("weighting", get_args(Weighting))
def test_the_loss_is_a_mean_over_cases(weighting: Weighting) -> None:
    """Cases alone average to the batch, each with its own weight."""
    diffusion, t_B = Diffusion(DiffusionConfig(weighting=weighting)), torch.tensor([0, 300, 900])
    clean, noise, answer = drawn((3, 2, 4, 4), 0).sign(), drawn((3, 2, 4, 4), 1), drawn((3, 2, 4, 4), 2)
    alone = [diffusion.loss(*(x[i : i + 1] for x in (answer, clean, noise, t_B))) for i in range(3)]
    torch.testing.assert_close(diffusion.loss(answer, clean, noise, t_B), torch.stack(alone).mean())
    swapped = diffusion.loss(answer, clean, noise, t_B.flip(0))
    assert (abs(float(swapped - torch.stack(alone).mean())) > 0.01) == (weighting == "min_snr")


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    prediction=st.sampled_from(PREDICTIONS),
    schedule=st.sampled_from(SCHEDULES),
    t=st.lists(st.integers(0, 900), min_size=1, max_size=4),
    scale=st.floats(0.1, 3),
    seed=st.integers(0, 1000),
)
def test_conversions_round_trip(
    prediction: Prediction, schedule: Schedule, t: list[int], scale: float, seed: int
) -> None:
    """The clean mask implied by the right answer at x_t is the clean mask, for every parametrisation."""
    diffusion = Diffusion(DiffusionConfig(schedule=schedule, prediction=prediction, mask_scale=scale))
    t_B = torch.tensor(t)
    clean, noise = scale * drawn((len(t), 2, 3, 3), seed).sign(), drawn((len(t), 2, 3, 3), seed + 1)
    noisy = diffusion.add_noise(clean, noise, t_B)
    answer = diffusion.target(clean, noise, t_B)
    # eps divides by the signal, so float32 errors grow by its inverse.
    smallest = float(diffusion.alpha_bar[t_B].sqrt().min())
    torch.testing.assert_close(diffusion.clean_from(answer, noisy, t_B), clean, atol=3e-6 / smallest, rtol=1e-5)


@pytest.mark.parametrize("answered", PREDICTIONS)
@pytest.mark.parametrize("assumed", PREDICTIONS)
def test_an_answer_read_in_another_parametrisation_is_wrong(answered: Prediction, assumed: Prediction) -> None:
    """Only the parametrisation that was answered gives the clean mask back."""
    clean, noise, t_B = drawn((1, 1, 4, 4), 0).sign(), drawn((1, 1, 4, 4), 1), torch.tensor([400])
    diffusion = Diffusion(DiffusionConfig(prediction=answered))
    answer = diffusion.target(clean, noise, t_B)
    read = to_clean(assumed, answer, diffusion.add_noise(clean, noise, t_B), *diffusion.powers(t_B))
    assert torch.allclose(read, clean, atol=1e-4) == (answered == assumed)


def test_v_is_the_derivative_of_x_along_the_angle() -> None:
    """v = d x / d phi with x = cos(phi) x_0 + sin(phi) eps (Salimans and Ho 2022), by central differences."""
    diffusion = Diffusion(DiffusionConfig(prediction="v"))
    clean, noise, t_B = drawn((1, 1, 4, 4), 0).double(), drawn((1, 1, 4, 4), 1).double(), torch.tensor([300])
    phi = math.acos(math.sqrt(float(diffusion.alpha_bar[300])))

    def at(angle: float) -> Tensor:
        return math.cos(angle) * clean + math.sin(angle) * noise

    slope = (at(phi + 1e-4) - at(phi - 1e-4)) / 2e-4
    torch.testing.assert_close(diffusion.target(clean, noise, t_B), slope, atol=1e-6, rtol=1e-6)


def test_noise_is_added_case_by_case_from_the_table() -> None:
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps with each case's own t; full signal gives x_0, none gives eps."""
    diffusion = Diffusion(DiffusionConfig())
    clean, noise, t_B = drawn((3, 2, 4, 4), 0), drawn((3, 2, 4, 4), 1), torch.tensor([0, 500, 999])
    expected = np.stack(
        [
            math.sqrt(a) * clean[i].numpy() + math.sqrt(1 - a) * noise[i].numpy()
            for i, a in enumerate(linear_by_loop(1000)[[0, 500, 999]])
        ]
    )
    np.testing.assert_allclose(diffusion.add_noise(clean, noise, t_B).numpy(), expected, atol=1e-6)
    diffusion.alpha_bar = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    ends = diffusion.add_noise(clean, noise, torch.tensor([0, 2, 0]))
    assert torch.equal(ends[0], clean[0])
    assert torch.equal(ends[1], noise[1])


@given(t=st.integers(0, 999), schedule=st.sampled_from(SCHEDULES))
@settings(max_examples=30, deadline=None)
def test_powers_lie_on_the_unit_circle(t: int, schedule: Schedule) -> None:
    """Signal and noise are float32 maps whose squares add up to 1."""
    signal, sigma = Diffusion(DiffusionConfig(schedule=schedule)).powers(torch.tensor([t]))
    assert signal.shape == sigma.shape == (1, 1, 1, 1)
    assert signal.dtype == torch.float32
    assert float(signal**2 + sigma**2) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_mean_square_in_the_answers_own_space(prediction: Prediction) -> None:
    """The loss equals numpy's mean of squares over cases, channels and pixels; the right answer costs nothing."""
    diffusion = Diffusion(DiffusionConfig(prediction=prediction))
    clean, noise, t_B = drawn((2, 1, 4, 4), 0).sign(), drawn((2, 1, 4, 4), 1), torch.tensor([100, 800])
    answer = drawn((2, 1, 4, 4), 2)
    a = linear_by_loop(1000)[[100, 800]].reshape(2, 1, 1, 1)
    x0, eps = clean.numpy(), noise.numpy()
    wanted = {"x0": x0, "eps": eps, "v": np.sqrt(a) * eps - np.sqrt(1 - a) * x0}[prediction]
    assert float(diffusion.loss(answer, clean, noise, t_B)) == pytest.approx(
        float(((answer.numpy() - wanted) ** 2).mean()), rel=1e-5
    )
    assert float(diffusion.loss(torch.from_numpy(wanted), clean, noise, t_B)) < 1e-10
