"""Was this patient in the training? Attacks on a finished model, and how well they do.

The attacker holds the patient's scans and masks and the model's weights, and looks at the denoising loss at fixed
timesteps and noises, averaged over the patient's slices: of what a model was trained on the loss is lower.

    loss        minus the loss itself (Yeom et al. 2018)
    calibrated  how far the loss is below what models trained on others give for this very patient, in units of their
                spread (Watson et al. 2022; with a spread common to all patients, the offline attack LiRA of Carlini et
                al. 2022): a hard patient is not taken for a stranger, nor an easy one for a member
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest

from benchmarks.leaks.people import People
from client.privacy.accounting import LARGEST_DELTA, LEAST_DELTA, Mechanism, epsilon
from medsegdiff.diffusion import Diffusion
from medsegdiff.errors import UserError
from medsegdiff.network import MedSegDiff
from medsegdiff.objective import denoising_loss

Array = NDArray[np.float64]

LOOKS = 24  # (timestep, noise) pairs a slice, the same for every patient and model
FALSE_POSITIVES = 0.01  # the rate at which true positives are told: an accusation should be right


@dataclass(frozen=True)
class Success:
    """How well scores tell members from others."""

    auc: float  # 0.5: not at all
    auc_low: float  # 95 % interval, bootstrapped over patients
    auc_high: float
    tpr: float  # at FALSE_POSITIVES
    tpr_low: float
    tpr_high: float


@torch.no_grad()
def patient_losses(network: MedSegDiff, diffusion: Diffusion, people: People, looks: int = LOOKS) -> Array:
    """Mean denoising loss of each patient, (P,), over its slices at fixed timesteps and noises."""
    network.eval()
    generator = torch.Generator().manual_seed(20_180_618)
    slices, device = people.images.shape[1], people.images.device
    # From much noise on: with little of it the mask is all but given, and there is nothing to remember.
    last = diffusion.config.timesteps - 1
    t_B = torch.linspace(0.3 * last, last, looks).long().repeat(slices).to(device)
    noise = torch.randn((looks * slices, *people.masks.shape[2:]), generator=generator).to(device)
    losses = []
    for images, masks in zip(people.images, people.masks, strict=True):
        rows = (images.repeat_interleave(looks, dim=0), masks.repeat_interleave(looks, dim=0), noise, t_B)
        losses.append(denoising_loss(network, diffusion, *rows))
    return torch.stack(losses).double().cpu().numpy()


def loss_scores(losses: Array) -> Array:
    """Higher: a member rather."""
    return -losses


def calibrated_scores(losses: Array, others: Array) -> Array:
    """Higher: a member rather.

    Args:
        losses: under the attacked model, (P,).
        others: under models that none of the patients was in, (M, P).

    Raises:
        ValueError: no such model.
    """
    if others.ndim != 2 or len(others) < 1 or others.shape[1] != len(losses):
        raise ValueError(f"losses of other models must be (models, {len(losses)}), found {others.shape}")
    logs, found = np.log(others), np.log(losses)  # losses are positive, and spread over a decade
    spread = np.sqrt(logs.var(axis=0, ddof=1).mean()) if len(others) > 1 else 1.0
    return np.asarray((logs.mean(axis=0) - found) / max(spread, 1e-12))


def auc(members: Array, others: Array) -> float:
    """Probability that a member scores above another patient, ties counting half (Mann and Whitney)."""
    ordered = np.sort(others)
    below, upto = np.searchsorted(ordered, members, "left"), np.searchsorted(ordered, members, "right")
    return float((below + upto).sum() / (2 * len(members) * len(others)))


def tpr_at(members: Array, others: Array, rate: float = FALSE_POSITIVES) -> float:
    """Share of members above a threshold that at most `rate` of the others exceed.

    The threshold is the lowest for which that holds: the (k + 1)-th highest of the others, k = floor(rate x others).

    Raises:
        ValueError: fewer than 1 / rate others, of which no such share exists.
    """
    if len(others) * rate < 1:
        raise ValueError(f"a false-positive rate of {rate:g} needs at least {1 / rate:.0f} others, found {len(others)}")
    allowed = int(np.floor(rate * len(others) + 1e-9))
    threshold = np.sort(others)[len(others) - 1 - allowed]
    return float((members > threshold).mean())


def success(members: Array, others: Array, seed: int = 0, resamples: int = 1000) -> Success:
    """Both figures with 95 % intervals over resampled patients, members and others each among themselves.

    Resampling knows nothing of patients that were not hit: with no hit it would give 0 to 0. The interval of the hits
    is therefore never narrower than the exact one of their share (Clopper and Pearson 1934).
    """
    generator = np.random.default_rng(seed)
    drawn = [(generator.choice(members, len(members)), generator.choice(others, len(others))) for _ in range(resamples)]
    areas, rates = [auc(*pair) for pair in drawn], [tpr_at(*pair) for pair in drawn]
    ends = [*np.quantile(areas, (0.025, 0.975)), *np.quantile(rates, (0.025, 0.975))]
    low, high, tpr_low, tpr_high = (float(end) for end in ends)
    rate = tpr_at(members, others)
    exact = binomtest(round(rate * len(members)), len(members)).proportion_ci(0.95, "exact")
    tpr_low, tpr_high = min(tpr_low, float(exact.low)), max(tpr_high, float(exact.high))
    return Success(auc(members, others), low, high, rate, tpr_low, tpr_high)


def bounded_tpr(curve: Callable[[float], float], rate: float = FALSE_POSITIVES) -> float:
    """The most true positives that any attack can reach at a false-positive rate, by differential privacy.

    For every (epsilon, delta) that the training keeps, TPR <= e^eps FPR + delta and 1 - FPR <= e^eps (1 - TPR) + delta
    (Kairouz, Oh and Viswanath 2015, theorem 2.1); the least over a grid of delta counts.

    Args:
        curve: delta -> epsilon.
    """
    least = 1.0
    for delta in np.geomspace(LEAST_DELTA, LARGEST_DELTA, 19):
        try:
            eps = curve(float(delta))
        except UserError:  # beyond what is computed
            continue
        grown = np.exp(min(eps, 700.0))
        least = min(least, grown * rate + delta, 1 - (1 - rate - delta) / grown)
    return float(max(rate, least))


def bound_of(sigma: float, q: float, steps: int) -> float:
    """`bounded_tpr` of the subsampled Gaussian mechanism at 1 % false positives."""
    return bounded_tpr(lambda delta: epsilon([Mechanism(sigma, q, steps)], delta).value)
