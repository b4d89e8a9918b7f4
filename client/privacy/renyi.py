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

# Integers: their moment is a finite sum.
ORDERS: tuple[int, ...] = (*range(2, 64), *range(64, 256, 4), *range(256, 1025, 16))

_ROUNDING = 1e-12  # of the logarithm of a moment: binomials of order 1024 are good to about that


@lru_cache(maxsize=1 << 14)
def renyi_divergence(sigma: float, q: float, order: int) -> float:
    """RDP of one step at an integer order, natural logarithm, add or remove one patient.

    Mironov, Talwar and Zhang 2019, section 3.3: the moment is the sum over k of
    C(order, k) (1-q)^(order-k) q^k exp(k(k-1) / (2 sigma^2)); removing a patient is the worse of the two directions.

    Args:
        sigma: noise multiplier, > 0.
        q: sampling probability of each patient, in (0, 1].
        order: >= 2.
    """
    if q == 1.0:
        return order / (2 * sigma**2)
    k = np.arange(order + 1)
    log_binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    terms = log_binomial + (order - k) * math.log1p(-q) + k * math.log(q) + k * (k - 1) / (2 * sigma**2)
    return (max(0.0, float(logsumexp(terms))) + _ROUNDING) / (order - 1)


def conversion(order: int, delta: float) -> float:
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

    order: int
    delta: float

    def epsilon(self, history: Iterable[Mechanism]) -> float:
        """Epsilon at `delta` that holds however the steps were chosen, if it was the bound on every path; >= 0."""
        rho = sum(m.steps * renyi_divergence(m.sigma, m.q, self.order) for m in history)
        return max(0.0, rho + conversion(self.order, self.delta)) if rho > 0 else 0.0


def choose_order(sigma: float, q: float, epsilon: float, delta: float) -> int:
    """The order that lets the first schedule go furthest within (epsilon, delta).

    A function of the ceiling and of the schedule frozen before the first step, so it may serve a `RenyiFilter`.
    """

    def steps(order: int) -> float:
        return (epsilon - conversion(order, delta)) / renyi_divergence(sigma, q, order)

    return max(ORDERS, key=steps)
