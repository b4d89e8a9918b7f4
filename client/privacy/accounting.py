"""Epsilon of a history of private steps, by two independent accountants; the larger counts.

A step takes each patient independently with probability q, clips each patient's gradient to norm C, and adds Gaussian
noise of standard deviation sigma C to their sum. Two data sets are neighbours when one patient is in the one and not in
the other (add or remove one patient; replacing a patient costs about twice as much).

The history has to be fixed beforehand: no sigma, q or number of steps chosen from what earlier steps gave. For others
there is `client.privacy.renyi`.

Accountants: Opacus' PRV (Gopi, Lee and Wutschitz 2021) and dp-accounting's PLD (Doroshenko et al. 2022, "connect the
dots"), both upper bounds. What is kept from them, since they fail on it: an empty history, sigma below 0.5 (overflow,
memory), equal entries one by one (minutes). Where PRV would overflow (losses beyond 600) or need too much memory, or
rounding of the Fourier transforms may reach delta (both then fall below the truth: by 0.02 at 100,000 steps and delta
1e-10), the Renyi bound, which is never below the truth and at a large epsilon some 5 % above it, stands in its
place.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from client.privacy.renyi import renyi_epsilon
from medsegdiff.errors import UserError

LEAST_SIGMA = 0.5  # below, accountants overflow; epsilon of one full step is beyond 10 at delta 1e-5
LARGEST_SIGMA = 1e6
LEAST_DELTA, LARGEST_DELTA = 1e-10, 0.1  # below, the accountants' floating point stands in for the probability
MOST_STEPS = 10_000_000
LARGEST_EPSILON = 2000.0  # beyond, nothing is computed: memory, and no meaning
PRV_ERROR = 0.01  # of epsilon; included in the bound
_PRV_LOSS = 600.0  # exp(709) is the end of float64
_PRV_POINTS = 1 << 22  # of the domain; twice as many took 1.7 GiB
_PRV_ALL_POINTS = 1 << 25  # of all different entries: 256 MiB
_ROUNDING = 1e-12  # of delta, a step: measured against the exact Gaussian curve it is below 1e-16; four digits are kept
_PLD_INTERVAL = 1e-4
_PLD_POINTS = 2_000_000


@dataclass(frozen=True)
class Mechanism:
    """`steps` equal steps: noise multiplier `sigma`, each patient taken with probability `q`.

    Raises:
        UserError: sigma is not in [0.5, 1e6], q not in (0, 1], steps not in 0..10,000,000.
    """

    sigma: float
    q: float
    steps: int

    def __post_init__(self) -> None:
        if not (_is_number(self.sigma) and LEAST_SIGMA <= self.sigma <= LARGEST_SIGMA):
            raise UserError(
                f"a noise multiplier (sigma) of {self.sigma!r} is outside {LEAST_SIGMA} to {LARGEST_SIGMA:,.0f}: its "
                "epsilon cannot be computed soundly, so nothing may be trained with it. Choose one within."
            )
        if not (_is_number(self.q) and 0 < self.q <= 1):
            raise UserError(
                f"a sampling probability (q) of {self.q!r} is not above 0 and at most 1. It is the share of patients "
                "that a step expects, for example 0.1."
            )
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 0 <= self.steps <= MOST_STEPS:
            raise UserError(f"{self.steps!r} steps: a whole number from 0 to {MOST_STEPS:,} is needed.")


@dataclass(frozen=True)
class Epsilon:
    """What a history has spent at a delta."""

    value: float  # the larger: this one is reported
    prv: float | None  # Opacus; None where it cannot compute it and the Renyi bound stood in
    pld: float  # dp-accounting


def merged(history: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
    """Equal entries as one, without empty ones, sorted: the order of fixed mechanisms does not matter."""
    steps: dict[tuple[float, float], int] = {}
    for entry in history:
        key = (float(entry.sigma), float(entry.q))
        steps[key] = steps.get(key, 0) + entry.steps
    return tuple(Mechanism(sigma, q, count) for (sigma, q), count in sorted(steps.items()) if count)


def epsilon(history: Iterable[Mechanism], delta: float) -> Epsilon:
    """Epsilon at `delta` of a history that was fixed beforehand; 0 of an empty one.

    Raises:
        UserError: delta is not in [1e-10, 0.1], or epsilon is beyond 2000 or what the accountants can compute.
    """
    check_delta(delta)
    entries = merged(history)
    return _epsilon(entries, float(delta)) if entries else Epsilon(0.0, 0.0, 0.0)


def check_delta(delta: float) -> None:
    """Raises UserError for a delta that no accountant here answers for."""
    if not (_is_number(delta) and LEAST_DELTA <= delta <= LARGEST_DELTA):
        raise UserError(
            f"delta {delta!r} is outside {LEAST_DELTA:g} to {LARGEST_DELTA:g}. Choose one well below 1 / (number of "
            "patients), for example 1e-5."
        )


def noise_multiplier(
    q: float, steps: int, delta: float, epsilon: float, spent: Iterable[Mechanism] = (), tolerance: float = 5e-4
) -> float:
    """The smallest sigma with which `steps` more steps keep the reported epsilon at or below `epsilon`.

    Bisection; the epsilon of the answer itself was computed and is within.

    Args:
        q: sampling probability, in (0, 1].
        steps: of the plan, >= 1.
        spent: what is already in the budget.
        tolerance: relative, of sigma.

    Raises:
        UserError: no sigma does, because `spent` leaves nothing or `epsilon` is too small.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"a plan of {steps!r} steps: at least 1 is needed.")
    if not (_is_number(epsilon) and epsilon > 0):
        raise UserError(f"an epsilon of {epsilon!r} is no budget: it must be above 0.")
    history = merged(spent)
    before = _spent(history, delta)
    if before > epsilon:
        raise UserError(
            f"epsilon {before:.3f} is spent already at delta {delta:g}, and {epsilon:g} is the limit: no noise makes "
            f"room for {steps:,} more steps. Raise the limit, or stop."
        )

    def fits(sigma: float) -> bool:
        return _within((*history, Mechanism(sigma, q, steps)), delta, epsilon)

    guess = rough_noise_multiplier(q, steps, delta, epsilon, history)
    low = high = guess
    if not fits(high) and not fits(LARGEST_SIGMA):
        raise UserError(
            f"no noise keeps {steps:,} steps at q {q:g} within epsilon {epsilon:g} at delta {delta:g}: {before:.3f} is "
            f"spent, and what is left is below the accountants' own error ({PRV_ERROR}). Raise the limit."
        )
    while not fits(high):
        low, high = high, min(1.25 * high, LARGEST_SIGMA)
    while low == high and high > LEAST_SIGMA:
        low = max(LEAST_SIGMA, 0.85 * high)
        if fits(low):
            high = low
    while high - low > tolerance * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def rough_noise_multiplier(
    q: float, steps: int, delta: float, epsilon: float, spent: Iterable[Mechanism] = ()
) -> float:
    """Sigma by the Renyi bound alone: in milliseconds, within some 10 % of `noise_multiplier`. For comparing plans."""
    history = tuple(spent)
    low, high = LEAST_SIGMA, LARGEST_SIGMA
    if renyi_epsilon((*history, Mechanism(low, q, steps)), delta) <= epsilon:
        return low
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        fits = renyi_epsilon((*history, Mechanism(middle, q, steps)), delta) <= epsilon
        low, high = (low, middle) if fits else (middle, high)
    return high if high < LARGEST_SIGMA else 1000.0


def _spent(history: tuple[Mechanism, ...], delta: float) -> float:  # a budget is called epsilon as well
    return epsilon(history, delta).value


def _within(history: tuple[Mechanism, ...], delta: float, limit: float) -> bool:
    """Whether the reported epsilon is at most `limit`; asks no more accountants than it takes to say no."""
    entries = merged(history)
    if renyi_epsilon(entries, delta) > LARGEST_EPSILON:
        return False
    prv = _prv(entries, float(delta))
    return (prv is None or prv <= limit) and epsilon(entries, delta).value <= limit


@lru_cache(maxsize=1024)
def _epsilon(entries: tuple[Mechanism, ...], delta: float) -> Epsilon:
    bound = renyi_epsilon(entries, delta)
    if not bound <= LARGEST_EPSILON:
        raise UserError(
            f"epsilon of {sum(e.steps for e in entries):,} steps is about {bound:,.0f} at delta {delta:g}, beyond "
            f"{LARGEST_EPSILON:,.0f}: it is not computed, and it would promise nothing. Add noise or take fewer steps."
        )
    pld, prv = _pld(entries, delta, bound), _prv(entries, delta)
    if not (math.isfinite(pld) and pld >= 0):
        raise UserError(f"the PLD accountant gave {pld} for {len(entries)} entries; nothing may be trained on that.")
    return Epsilon(max(pld, bound if prv is None else prv), prv, pld)


@lru_cache(maxsize=1024)
def _prv(entries: tuple[Mechanism, ...], delta: float) -> float | None:
    """The upper bound of Opacus' PRVAccountant, by its parts; None where they cannot compute it.

    The accountant itself takes most of its time for the Renyi bound that sets the size of the domain, and does not ask
    whether that size fits into memory and floating point.
    """
    # Imported here: Opacus imports torch, and a wrong option must answer at once.
    from opacus.accountants.analysis import prv

    delta_error, counts = delta / 1000, [e.steps for e in entries]
    # Gopi et al. 2021, remark 5.6 as implemented there: no loss beyond it but with probability delta_error.
    single = max(renyi_epsilon([Mechanism(e.sigma, e.q, 1)], delta_error / (8 * sum(counts))) for e in entries)
    loss = max(renyi_epsilon(entries, delta_error / 4), single, PRV_ERROR) + 3
    mesh = PRV_ERROR / math.sqrt(sum(counts) * math.log(12 / delta_error) / 2)
    points = 2 * loss / mesh
    if loss > _PRV_LOSS or points > _PRV_POINTS or len(entries) * points > _PRV_ALL_POINTS:
        return None
    if sum(counts) * _ROUNDING > delta:
        return None
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # log(0) at q = 1 is expected; quadrature warns where it is exact enough
        try:
            domain = prv.Domain.create_aligned(-loss, loss, mesh)
            losses = [prv.PoissonSubsampledGaussianPRV(e.q, e.sigma) for e in entries]
            cut = [prv.TruncatedPrivacyRandomVariable(variable, domain.t_min, domain.t_max) for variable in losses]
            composed = prv.compose_heterogeneous([prv.discretize(variable, domain) for variable in cut], counts)
            value = float(composed.compute_epsilon(delta, delta_error, PRV_ERROR)[2])
        except (RuntimeError, ValueError, OverflowError, ZeroDivisionError, IndexError):
            return None
    return value if math.isfinite(value) and value >= 0 else None


def _pld(entries: tuple[Mechanism, ...], delta: float, bound: float) -> float:
    """dp-accounting's upper bound. The grid is coarser for a large epsilon, which keeps memory bounded."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=max(_PLD_INTERVAL, 3 * bound / _PLD_POINTS))
    for entry in entries:
        accountant.compose(PoissonSampledDpEvent(entry.q, GaussianDpEvent(entry.sigma)), entry.steps)
    return float(accountant.get_epsilon(delta))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
