"""Renyi differential privacy of the Poisson-subsampled Gaussian, and the filter for schedules chosen on the way.

PRV and PLD accountants compose mechanisms that were fixed beforehand. Once sigma or q of a later step may depend on
what earlier steps gave, their sums prove nothing. The filter here still does.

**Theorem** (Feldman and Zrnic 2021, "Individual privacy accounting via a Renyi filter", fully adaptive composition;
also Lecuyer 2021). Fix an order alpha > 1 and a budget B beforehand. Let step t be (alpha, rho_t)-RDP given all earlier
outputs, where sigma_t, q_t, and so rho_t, may be chosen from those outputs. If rho_1 + rho_2 + ... <= B on every path,
then the whole interaction is (alpha, B)-RDP. (Because E[(P/Q)^alpha exp(-(alpha-1) sum rho)] is a supermartingale.)

The order has to be one number fixed beforehand: "some order is still within its budget" may hold for another order on
each path, and each order's failure probability would then have to be added. `choose_order` looks at the ceiling and the
first schedule alone, before any step; no output of a mechanism reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import gammaln, logsumexp

if TYPE_CHECKING:
    from client.privacy.accounting import Mechanism

ORDERS: tuple[float, ...] = (
    1.05,
    1.1,
    1.2,
    1.35,
    1.5,
    1.75,
    2.5,
    3.5,
    *range(2, 64),
    *range(64, 256, 4),
    *range(256, 1025, 16),
)
_ROUNDING = 1e-12  # of the logarithm of a moment: binomials of order 1024 are good to about that


@lru_cache(maxsize=1 << 14)
def renyi_divergence(sigma: float, q: float, order: float) -> float:
    """RDP of one step, natural logarithm, add or remove one patient.

    The moment is E[((1-q) + q exp((2x-1) / (2 sigma^2)))^order] over x ~ N(0, sigma^2); removing a patient is the worse
    of the two directions (Mironov, Talwar and Zhang 2019). At an integer order it is the sum over k of
    C(order, k) (1-q)^(order-k) q^k exp(k(k-1) / (2 sigma^2)) (section 3.3 there). At others it is integrated by the
    trapezoidal rule, which is exact to rounding on this analytic integrand, whose mass lies about 0 to `order`.

    Args:
        sigma: noise multiplier, >= 0.5.
        q: sampling probability of each patient, in (0, 1].
        order: in (1, 1024].
    """
    if q == 1.0:
        return order / (2 * sigma**2)
    log_moment = _binomial(sigma, q, int(order)) if order == int(order) else _integral(sigma, q, order)
    return (max(0.0, log_moment) + _ROUNDING) / (order - 1)


def _binomial(sigma: float, q: float, order: int) -> float:
    k = np.arange(order + 1)
    log_binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    terms = log_binomial + (order - k) * math.log1p(-q) + k * math.log(q) + k * (k - 1) / (2 * sigma**2)
    return float(logsumexp(terms))


def _integral(sigma: float, q: float, order: float) -> float:
    x, step = np.linspace(-12 * sigma, order + 12 * sigma, 2001, retstep=True)
    log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
    log_density = -((x / sigma) ** 2) / 2 - math.log(sigma * math.sqrt(2 * math.pi))
    return float(logsumexp(order * log_ratio + log_density)) + math.log(float(step))


def conversion(order: float, delta: float) -> float:
    """What an RDP of `order` lacks to the epsilon at `delta` (Canonne, Kamath and Steinke 2020, Proposition 12)."""
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def renyi_epsilon(history: Iterable[Mechanism], delta: float) -> float:
    """Epsilon of mechanisms that were fixed beforehand, by the best order. An upper bound; 0 of an empty history."""
    mechanisms = tuple(history)
    if not mechanisms:
        return 0.0
    return max(0.0, min(RenyiFilter(order, delta).epsilon(mechanisms) for order in ORDERS))


@dataclass(frozen=True)
class RenyiFilter:
    """Charges steps whose sigma and q may depend on earlier outputs. `order` is fixed before the first step."""

    order: float
    delta: float

    def epsilon(self, history: Iterable[Mechanism]) -> float:
        """Epsilon at `delta` that holds however the steps were chosen, if it was the bound on every path; >= 0."""
        rho = sum(m.steps * renyi_divergence(m.sigma, m.q, self.order) for m in history)
        return max(0.0, rho + conversion(self.order, self.delta)) if rho > 0 else 0.0


def choose_order(sigma: float, q: float, epsilon: float, delta: float) -> float:
    """The order that lets the first schedule go furthest within (epsilon, delta).

    A function of the ceiling and of the schedule frozen before the first step, so it may serve a `RenyiFilter`.
    """

    def steps(order: float) -> float:
        return (epsilon - conversion(order, delta)) / renyi_divergence(sigma, q, order)

    return max(ORDERS, key=steps)
