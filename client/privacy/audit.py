"""An audit of the private step that can fail: one run, many canaries (Steinke, Nasr and Jagielski 2023).

Each of m canaries - a patient whose gradient points along an axis of its own - takes part or not by a fair coin, in
*one* training of T steps through the real sampler, engine, clipping, noise and optimizer. Who sees what was released
then guesses each coin, and may abstain. An (epsilon, delta)-private training allows only so many right guesses: more
of them refute the claimed epsilon at the stated confidence. What is audited is the program as installed, on this
machine.

It catches noise that is missing, far too small or known beforehand, and gradients that are not clipped. It cannot
prove privacy, and does not see noise too small by a factor of 1.4: that is what the exact tests are for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from client.privacy.engines import Rows
from client.privacy.entropy import Entropy, SystemEntropy, chosen
from client.privacy.policy import PrivacyPolicy
from client.privacy.sampling import PoissonSampler
from client.privacy.step import PrivateStep, take_steps

CONFIDENCE = 0.95
_LOUD = 10.0  # times C: a canary's gradient before clipping. Without clipping it would stand out
_SAMPLER_ALPHA = 1e-6  # an honest sampler fails once in a million audits

MakeStep = Callable[[nn.Module, Callable[[nn.Module, Rows], Tensor], PrivacyPolicy, torch.optim.Optimizer], PrivateStep]
MakeSampler = Callable[[int, float], PoissonSampler]


@dataclass(frozen=True)
class Claim:
    """What is put to the test: T steps of the subsampled Gaussian mechanism are (epsilon, delta)-private."""

    epsilon: float
    delta: float
    sigma: float
    q: float
    steps: int


# The least sigma for epsilon 2, rounded up to two decimals (PLD, add-remove).
CLAIM = Claim(epsilon=2.0, delta=1e-5, sigma=4.67, q=0.5, steps=20)


@dataclass(frozen=True)
class Verdict:
    """What an audit found."""

    claim: Claim
    canaries: int
    guesses: int  # of each attack
    right: int  # of the better attack
    attack: str  # the better one: "noise" takes what was released, "replay" subtracts noise foretold from known seeds
    epsilon_at_least: float  # lower bound on epsilon
    confidence: float  # with which it holds
    inclusion: float  # share of (canary, step) pairs drawn
    inclusion_p: float  # of the share and of the spread of batch sizes, were the sampler Poisson's with q
    spread_p: float

    @property
    def passed(self) -> bool:
        """Whether nothing refutes the claim."""
        sampled = min(self.inclusion_p, self.spread_p) >= _SAMPLER_ALPHA
        return self.epsilon_at_least <= self.claim.epsilon and sampled


def audit(
    policy: PrivacyPolicy,
    claim: Claim = CLAIM,
    canaries: int = 1000,
    make_step: MakeStep = PrivateStep,
    make_sampler: MakeSampler = PoissonSampler,
    coins: Entropy | None = None,
    device: torch.device | str = "cpu",
) -> Verdict:
    """Train once on canaries and try to tell who was in.

    Args:
        policy: its C and B are used; sigma, q and steps are the claim's.
        canaries: m, 1000 can show an epsilon of 3.9 at most, 4000 one of 5.2.
        make_step, make_sampler: what is audited.
        coins: what decides who takes part.

    Raises:
        ValueError: fewer than 100 canaries, from which nothing could be told.
    """
    if canaries < 100:
        raise ValueError(f"an audit needs at least 100 canaries, found {canaries}")
    policy = replace(policy, sigma=claim.sigma, q=claim.q, steps=claim.steps, rounds=1)
    present = chosen(canaries, 0.5, SystemEntropy() if coins is None else coins)
    sizes: list[int] = []
    released = _train(policy, claim, canaries, present, make_step, _watching(make_sampler, sizes), device)
    # What a server that knows every seed would do: run the same training on patients without a gradient, and subtract.
    foretold = _train(policy, claim, canaries, [-1] * len(present), make_step, make_sampler, device)
    inside = np.zeros(canaries, dtype=bool)
    inside[present] = True
    guesses = 2 * (canaries // 10)
    attacks = {"noise": released, "replay": released - foretold}
    right = {name: right_guesses(scores, inside, guesses) for name, scores in attacks.items()}
    best = max(right, key=lambda name: right[name])
    return Verdict(
        claim=claim,
        canaries=canaries,
        guesses=guesses,
        right=right[best],
        attack=best,
        # Two attacks, so each is given half of the error that is allowed.
        epsilon_at_least=epsilon_lower_bound(canaries, guesses, right[best], claim.delta, (1 - CONFIDENCE) / 2),
        confidence=CONFIDENCE,
        inclusion=float(np.sum(sizes)) / max(1, len(present) * claim.steps),
        inclusion_p=inclusion_p_value(sizes, len(present), claim.q),
        spread_p=spread_p_value(sizes, len(present), claim.q),
    )


def right_guesses(scores: np.ndarray, inside: np.ndarray, guesses: int) -> int:
    """How many guesses are right: the highest scores are said to be in, as many of the lowest out.

    The number of guesses is fixed beforehand: chosen by what came out, it would spoil the confidence.
    """
    order = np.argsort(scores, kind="stable")
    return int((~inside[order[: guesses // 2]]).sum() + inside[order[len(order) - guesses // 2 :]].sum())


def refutation_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Largest probability with which an (epsilon, delta)-private training allows so many right guesses.

    Steinke et al. 2023, theorem 5.2: with V ~ Binomial(r, e^eps / (1 + e^eps)),
    P[at least v right] <= P[V >= v] + 2 m delta max_{i=1..v} P[v - i <= V < v] / i.
    """
    from scipy.stats import binom

    each = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, each))
    if delta == 0 or right == 0:
        return min(1.0, tail)
    masses = binom.pmf(np.arange(right - 1, -1, -1), guesses, each)  # of v - 1, v - 2, ..., 0
    steepest = float((np.cumsum(masses) / np.arange(1, right + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * steepest)


def epsilon_lower_bound(canaries: int, guesses: int, right: int, delta: float, error: float) -> float:
    """The largest epsilon that so many right guesses refute with an error of at most `error`; 0 where none."""
    if refutation_p_value(canaries, guesses, right, 0.0, delta) > error:
        return 0.0
    low, high = 0.0, 50.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        if refutation_p_value(canaries, guesses, right, middle, delta) <= error:
            low = middle
        else:
            high = middle
    return low


def inclusion_p_value(sizes: Sequence[int], patients: int, q: float) -> float:
    """Exact two-sided binomial test of how often patients were drawn, all steps together."""
    from scipy.stats import binomtest

    trials = patients * len(sizes)
    return float(binomtest(int(sum(sizes)), trials, q).pvalue) if trials else 1.0


def spread_p_value(sizes: Sequence[int], patients: int, q: float) -> float:
    """Two-sided test of the batch sizes' spread: batches of a fixed size, as of a shuffled epoch, have none.

    Sum of squared deviations over n q (1 - q), chi-squared with as many degrees of freedom as steps.
    """
    from scipy.stats import chi2

    variance = patients * q * (1 - q)
    if variance == 0 or not sizes:
        return 1.0
    deviation = sum((size - patients * q) ** 2 for size in sizes) / variance
    return float(min(1.0, 2 * min(chi2.cdf(deviation, len(sizes)), chi2.sf(deviation, len(sizes)))))


class _Axes(nn.Module):
    """One weight a canary."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count))


def _watching(make: MakeSampler, sizes: list[int]) -> MakeSampler:
    """The same samplers, with the sizes of their batches written down, as nobody outside could."""

    def watched(patients: int, q: float) -> PoissonSampler:
        sampler = make(patients, q)
        steps = sampler.steps

        def counted(count: int) -> Iterator[list[int]]:
            for drawn in steps(count):
                sizes.append(len(drawn))
                yield drawn

        sampler.steps = counted  # type: ignore[method-assign]
        return sampler

    return watched


@contextmanager
def _known_seeds() -> Iterator[None]:
    """Every generator that a seed can reach starts from the same one; afterwards they are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _train(
    policy: PrivacyPolicy,
    claim: Claim,
    canaries: int,
    present: Sequence[int],
    make_step: MakeStep,
    make_sampler: MakeSampler,
    device: torch.device | str,
) -> np.ndarray:
    """The sum of what T steps release, in units of C, by canary; a canary of number -1 has no gradient."""
    network = _Axes(canaries).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    rows = [
        {
            "axis": torch.tensor([max(0, axis)], device=device),
            "size": torch.tensor([_LOUD * (axis >= 0)], device=device),
        }
        for axis in present
    ]

    def loss(network: nn.Module, rows: Rows) -> Tensor:
        assert isinstance(network, _Axes)
        return (policy.clip * rows["size"] * network.weight[rows["axis"]]).mean()

    with _known_seeds():
        step = make_step(network, loss, policy, optimizer)
        take_steps(step, make_sampler(len(present), claim.q), lambda patient: rows[patient], claim.steps)
    return -network.weight.detach().cpu().double().numpy() * policy.batch / policy.clip
