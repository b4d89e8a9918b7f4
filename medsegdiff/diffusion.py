"""The forward process, its schedules, and the three parametrisations of what a network predicts.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                  (Ho et al. 2020, eq. 4)

Tables are float64; they are cast to the working type where they meet a tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medsegdiff.config import DiffusionConfig, Prediction, Schedule


def alpha_bars(schedule: Schedule, timesteps: int, zero_terminal_snr: bool = False) -> Tensor:
    """Remaining signal power abar_t for t = 0 .. T - 1, (T,), float64, strictly falling in (0, 1).

    linear: betas from 1e-4 to 0.02 at T = 1000, scaled by 1000 / T (Ho et al. 2020, section 4).
    cosine: abar(t) = f(t) / f(0), f(t) = cos^2((t / T + s) / (1 + s) pi / 2), s = 0.008, betas at most 0.999
            (Nichol and Dhariwal 2021, eq. 17).
    zero_terminal_snr: sqrt(abar) shifted and stretched so that the first entry stays and the last is exactly 0
            (Lin et al., arXiv 2305.08891, algorithm 1).
    """
    if schedule == "linear":
        scale = 1000 / timesteps
        betas = torch.linspace(scale * 1e-4, min(scale * 0.02, 0.999), timesteps, dtype=torch.float64)
    else:
        edges = (torch.arange(timesteps + 1, dtype=torch.float64) / timesteps + 0.008) / 1.008 * math.pi / 2
        squared = edges.cos() ** 2
        betas = (1 - squared[1:] / squared[:-1]).clamp(max=0.999)
    table = torch.cumprod(1 - betas, dim=0)
    if not zero_terminal_snr:
        return table
    signal = table.sqrt()
    return table[0] * ((signal - signal[-1]) / (signal[0] - signal[-1])) ** 2


class Diffusion:
    """A schedule and a parametrisation: everything between clean masks and what the network sees or says.

    Masks live in [-b, b] with b = `config.mask_scale`; callers give and receive masks in [-1, 1].
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.alpha_bar = alpha_bars(config.schedule, config.timesteps, config.zero_terminal_snr)

    def powers(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), each (B, 1, 1, 1), float32."""
        alpha_bar = self.alpha_bar.to(t_B.device)[t_B]  # the table travels: t_B.cpu() would halt a GPU at every step
        return _as_map(alpha_bar.sqrt()), _as_map((1 - alpha_bar).sqrt())

    def add_noise(self, mask_0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """Jump from clean masks x_0 (B, K, H, W) straight to x_t (Ho et al. 2020, eq. 4)."""
        signal, sigma = self.powers(t_B)
        return signal * mask_0 + sigma * noise

    def target(self, mask_0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """What the network should answer at (x_t, t): eps, x_0, or v = sqrt(abar) eps - sqrt(1 - abar) x_0.

        v: Salimans and Ho 2022, section 4.
        """
        if self.config.prediction == "eps":
            return noise
        if self.config.prediction == "x0":
            return mask_0
        signal, sigma = self.powers(t_B)
        return signal * noise - sigma * mask_0

    def clean_from(self, answer: Tensor, mask_t: Tensor, t_B: Tensor) -> Tensor:
        """x_0 implied by the network's answer at x_t; exact at abar = 0 too, where x0 and v alone are allowed."""
        signal, sigma = self.powers(t_B)
        return to_clean(self.config.prediction, answer, mask_t, signal, sigma)

    def loss(self, answer: Tensor, mask_0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """Mean squared error in the parametrisation's own space (paper eq. 3 for eps), a scalar, a mean over cases.

        With `config.weighting` min_snr each case's error is multiplied by `min_snr_weights`.
        """
        target = self.target(mask_0, noise, t_B)
        if self.config.weighting == "uniform":
            return torch.nn.functional.mse_loss(answer.float(), target)
        squared_B = (answer.float() - target).square().flatten(1).mean(dim=1)
        return (self.min_snr_weights(t_B) * squared_B).mean()

    def min_snr_weights(self, t_B: Tensor) -> Tensor:
        """Weight of each case's squared error, (B,), float32 (Hang et al., arXiv 2303.09556, section 3.4).

        The signal-to-noise ratio counts the masks' power b^2: snr = b^2 abar / (1 - abar). In every parametrisation the
        weighted error is min(snr, gamma) times the squared error of x_0 / b, the mask in [-1, 1]; at b = 1 that is the
        paper's min(snr, gamma) for x0, over snr for eps and over snr + 1 for v. With zero_terminal_snr the weight at
        T - 1 is 0: what the network says of pure noise is then learnt from the timesteps before alone.
        """
        power = self.config.mask_scale**2
        alpha_bar = self.alpha_bar.to(t_B.device)[t_B]
        snr = power * alpha_bar / (1 - alpha_bar)
        # Squared error of the answer over that of x_0 / b.
        ratio = {"x0": torch.full_like(snr, power), "eps": snr, "v": snr + power}[self.config.prediction]
        return (snr.clamp(max=self.config.min_snr_gamma) / ratio).to(t_B.device, torch.float32)


def to_clean(prediction: Prediction, answer: Tensor, mask_t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """x_0 from an answer; signal = sqrt(abar), sigma = sqrt(1 - abar), broadcastable to the masks."""
    if prediction == "x0":
        return answer
    if prediction == "eps":
        return (mask_t - sigma * answer) / signal
    return signal * mask_t - sigma * answer


def _as_map(values_B: Tensor) -> Tensor:
    return values_B.to(torch.float32)[:, None, None, None]
