"""From noise to a mask: DDPM, DDIM and DPM-Solver++(2M), one signature for all.

Each sampler walks a falling list of timesteps and asks `predict_clean(x_t, t)` for E[x_0 | x_t] once a step; it knows
neither the network nor the image. abar at "t = -1", behind the last step, is 1: the walk ends on a clean mask. At the
other end abar may be 0 (zero terminal SNR): pure noise, whose first step every sampler takes exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from medsegdiff.config import SamplingConfig

PredictClean = Callable[[Tensor, int], Tensor]
DrawNoise = Callable[[], Tensor]


def timestep_walk(timesteps: int, steps: int) -> list[int]:
    """`steps` timesteps from T - 1 down, evenly spaced so that one more stride would pass 0.

    Starting at T - 1 matters: elsewhere pure noise is not what the network was trained to see.
    """
    steps = min(steps, timesteps)
    return [round((index + 1) * timesteps / steps) - 1 for index in reversed(range(steps))]


def sample(
    predict_clean: PredictClean, x_T: Tensor, alpha_bar: Tensor, config: SamplingConfig, draw_noise: DrawNoise
) -> Tensor:
    """Draw masks.

    Args:
        predict_clean: (x_t, t) -> x_0, same shape.
        x_T: standard normal start, (B, K, H, W).
        alpha_bar: the schedule's table, (T,), float64.
        config: sampler, steps, eta.
        draw_noise: fresh standard normal of x_T's shape; called only by samplers that are random between the ends.
    """
    walk = timestep_walk(len(alpha_bar), config.steps)
    powers = [float(alpha_bar[t]) for t in walk] + [1.0]
    if config.sampler == "dpmpp_2m":
        return _dpm_solver_pp_2m(predict_clean, x_T, walk, powers)
    eta = 1.0 if config.sampler == "ddpm" else config.eta
    return _ddim(predict_clean, x_T, walk, powers, eta, draw_noise)


def _ddim(
    predict_clean: PredictClean, x: Tensor, walk: Sequence[int], powers: Sequence[float], eta: float, draw: DrawNoise
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16); eta = 1 is DDPM's posterior q(x_s | x_t, x_0) (Ho et al., eq. 6-7)."""
    for index, t in enumerate(walk):
        here, there = powers[index], powers[index + 1]
        clean = predict_clean(x, t)
        noise = (x - here**0.5 * clean) / (1 - here) ** 0.5
        variance = eta**2 * (1 - there) / (1 - here) * (1 - here / there)
        x = there**0.5 * clean + max(1 - there - variance, 0.0) ** 0.5 * noise
        if variance > 0:
            x = x + variance**0.5 * draw()
    return x


def _dpm_solver_pp_2m(predict_clean: PredictClean, x: Tensor, walk: Sequence[int], powers: Sequence[float]) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), data prediction, multistep of second order.

    lambda = log(sqrt(abar) / sqrt(1 - abar)); the last step, to lambda = infinity, is of first order and returns x_0.
    From abar = 0, lambda = -infinity, IEEE arithmetic takes the limit: the first step is infinite, exp(-step) is 0 and
    x_s = sigma_s x_T + sqrt(abar_s) x_0; in the second the ratio of steps is infinite and x_0 alone the direction.
    """
    log_snr = [0.5 * (torch.tensor(p, dtype=torch.float64).logit().item()) for p in powers[:-1]]
    previous: Tensor | None = None
    for index, t in enumerate(walk):
        clean = predict_clean(x, t)
        if index == len(walk) - 1:
            return clean
        here, there = powers[index], powers[index + 1]
        step = log_snr[index + 1] - log_snr[index]
        direction = clean
        if previous is not None:
            ratio = (log_snr[index] - log_snr[index - 1]) / step
            direction = (1 + 0.5 / ratio) * clean - 0.5 / ratio * previous
        sigma_ratio = ((1 - there) / (1 - here)) ** 0.5
        x = sigma_ratio * x - there**0.5 * float(torch.expm1(torch.tensor(-step, dtype=torch.float64))) * direction
        previous = clean
    return x
