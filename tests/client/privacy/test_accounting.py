"""Epsilon is never below the truth and close above it: closed forms, quadrature, libraries, published figures."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from client.privacy import accounting
from client.privacy.accounting import Mechanism, epsilon, merged, noise_multiplier
from client.privacy.renyi import ORDERS, RenyiFilter, choose_order, conversion, renyi_divergence, renyi_epsilon
from medsegdiff.errors import UserError

M = Mechanism

# sigma found by another program for q = 0.1, 2000 steps: (delta, epsilon, sigma by PRV, epsilon by PLD at that sigma)
PUBLISHED = [
    (1e-4, 1, 14.45, 0.987), (1e-4, 3, 5.56, 2.989), (1e-4, 8, 2.54, 7.989),
    (1e-5, 1, 16.95, 0.986), (1e-5, 3, 6.31, 2.989), (1e-5, 8, 2.80, 7.988),
]  # fmt: skip
PUBLISHED_RENYI = [
    (1e-4, 1, 15.78),
    (1e-4, 3, 6.02),
    (1e-4, 8, 2.72),
    (1e-5, 1, 18.20),
    (1e-5, 3, 6.76),
    (1e-5, 8, 2.97),
]


def where_it_is(delta_at: Callable[[float], float], delta: float, most: float = 1000.0) -> float:
    """The epsilon whose delta is `delta`, for a falling curve."""
    return 0.0 if delta_at(0.0) <= delta else float(brentq(lambda e: delta_at(e) - delta, 0.0, most, xtol=1e-12))


def gaussian_epsilon(sigma: float, steps: int, delta: float) -> float:
    """Balle and Wang 2018, Theorem 8; full steps compose to one Gaussian with mu = sqrt(steps) / sigma."""
    mu = math.sqrt(steps) / sigma

    def delta_at(e: float) -> float:
        return float(norm.cdf(mu / 2 - e / mu) - math.exp(e + norm.logcdf(-mu / 2 - e / mu)))

    return where_it_is(delta_at, delta)


def single_step_epsilon(sigma: float, q: float, delta: float) -> float:
    """Hockey-stick integrals of one subsampled step in both directions, on a fine grid."""
    x = np.linspace(-14 * sigma, 1 + 14 * sigma, 200_001)
    without = norm.pdf(x, 0, sigma)
    with_patient = (1 - q) * without + q * norm.pdf(x, 1, sigma)

    def removed(e: float) -> float:
        return float(np.trapezoid(np.maximum(with_patient - math.exp(e) * without, 0), x))

    def added(e: float) -> float:
        return float(np.trapezoid(np.maximum(without - math.exp(e) * with_patient, 0), x))

    return max(where_it_is(removed, delta, 40.0), where_it_is(added, delta, 40.0))


# --- epsilon ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [1e-5, 1e-8])
@pytest.mark.parametrize(("sigma", "steps"), [(2.0, 1), (20.0, 400), (5.0, 100)])
def test_full_batches_are_one_gaussian(sigma: float, steps: int, delta: float) -> None:
    """q = 1: both accountants lie above the exact curve, by at most 0.012, and the larger is given."""
    exact = gaussian_epsilon(sigma, steps, delta)
    found = epsilon([M(sigma, 1.0, steps)], delta)
    assert found.prv is not None
    assert found.value == max(found.prv, found.pld)
    for value in (found.prv, found.pld):
        assert exact - 1e-6 <= value <= exact + 0.012


@pytest.mark.parametrize(("sigma", "q", "delta"), [(1.0, 0.1, 1e-5), (3.0, 0.5, 1e-6), (0.8, 0.02, 1e-5)])
def test_a_single_step_is_the_hockey_stick_integral(sigma: float, q: float, delta: float) -> None:
    """One subsampled step, add and remove: the integral itself."""
    exact = single_step_epsilon(sigma, q, delta)
    found = epsilon([M(sigma, q, 1)], delta)
    for value in (found.prv, found.pld):
        assert value is not None
        assert exact - 1e-5 <= value <= exact + 0.012


@pytest.mark.parametrize(("delta", "target", "sigma", "pld"), PUBLISHED)
def test_the_published_table(delta: float, target: float, sigma: float, pld: float) -> None:
    """q = 0.1, 2000 steps, at the published sigma."""
    found = epsilon([M(sigma, 0.1, 2000)], delta)
    assert found.value == pytest.approx(target, abs=0.02)
    assert found.pld == pytest.approx(pld, abs=0.02)


def test_an_empty_history_has_spent_nothing() -> None:
    """Opacus raises there."""
    assert epsilon([], 1e-5).value == 0.0
    assert epsilon([M(1.0, 0.1, 0)], 1e-5).value == 0.0


@pytest.mark.parametrize(
    "history",
    [[(6.31, 0.1, 2000)], [(2.0, 0.02, 500)], [(3.0, 1.0, 7)], [(6.0, 0.3, 10), (4.5, 0.1, 5), (8.0, 0.5, 3)]],
)
def test_the_prv_figure_is_opacus_own(history: list[tuple[float, float, int]]) -> None:
    """Its accountant as a user would call it."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = history
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = accountant.get_epsilon(1e-5)
    assert epsilon([M(*entry) for entry in history], 1e-5).prv == pytest.approx(expected, abs=1e-3)


def test_equal_entries_are_merged() -> None:
    """A hundred entries of two kinds cost, and count, as much as two."""
    kinds = [M(9.0, 0.1, 2), M(8.0, 0.2, 3)] * 50
    assert merged(kinds) == (M(8.0, 0.2, 150), M(9.0, 0.1, 100))
    assert epsilon(kinds, 1e-5) == epsilon([M(9.0, 0.1, 100), M(8.0, 0.2, 150)], 1e-5)


def test_different_full_steps_add_up_in_squares() -> None:
    """A heterogeneous history against the closed form: 1 / sigma^2 adds."""
    history = [M(4.0, 1.0, 3), M(7.0, 1.0, 5), M(9.5, 1.0, 11)]
    exact = gaussian_epsilon(1 / math.sqrt(sum(m.steps / m.sigma**2 for m in history)), 1, 1e-5)
    found = epsilon(history, 1e-5)
    assert exact - 1e-6 <= found.pld <= found.value <= exact + 0.02


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.floats(3.0, 10.0), st.floats(0.02, 0.6), st.integers(1, 80), st.integers(1, 40), st.floats(1.05, 2.0))
def test_more_steps_and_less_noise_cost_more(sigma: float, q: float, steps: int, more: int, factor: float) -> None:
    """Monotone in steps, sigma, q and delta, to the accountants' own error; never above the Renyi bound and that."""
    here = epsilon([M(sigma, q, steps)], 1e-5).value
    assert epsilon([M(sigma, q, steps + more)], 1e-5).value >= here - 1e-3
    assert epsilon([M(sigma * factor, q, steps)], 1e-5).value <= here + 1e-3
    assert epsilon([M(sigma, q / factor, steps)], 1e-5).value <= here + 1e-3
    assert epsilon([M(sigma, q, steps)], 1e-4).value <= here + 1e-3
    assert here <= renyi_epsilon([M(sigma, q, steps)], 1e-5) + accounting.PRV_ERROR + 1e-3


def test_where_the_prv_accountant_fails_the_renyi_bound_stands_in() -> None:
    """Losses beyond its exponentials (it gives inf), and so many steps at so small a delta that rounding shows."""
    for history, delta in (([M(0.6, 1.0, 500)], 1e-5), ([M(100.0, 1.0, 100_000)], 1e-10)):
        exact = gaussian_epsilon(history[0].sigma, history[0].steps, delta)
        found = epsilon(history, delta)
        assert found.prv is None
        assert found.value == renyi_epsilon(history, delta) >= exact


@pytest.mark.parametrize(
    "bad",
    [(0.49, 0.1, 1), (0.0, 0.1, 1), (-1, 0.1, 1), (math.nan, 0.1, 1), (math.inf, 0.1, 1), ("1", 0.1, 1), (True, 0.1, 1),
     (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, math.nan, 1), (1.0, 0.1, -1), (1.0, 0.1, 1.5), (1.0, 0.1, True),
     (1.0, 0.1, 10**9)],
)  # fmt: skip
def test_mechanisms_that_are_refused(bad: tuple[float, float, int]) -> None:
    """Sigma below 0.5 overflows the accountants; NaN compares with nothing."""
    with pytest.raises(UserError):
        M(*bad)


@pytest.mark.parametrize("delta", [0.0, 1e-11, 0.2, 1.0, math.nan, -1e-5])
def test_deltas_that_are_refused(delta: float) -> None:
    """Also of an empty history."""
    with pytest.raises(UserError, match="delta"):
        epsilon([], delta)


def test_an_epsilon_beyond_measure_is_refused() -> None:
    """It would take gigabytes; the error says how large it is about."""
    with pytest.raises(UserError, match="beyond 2,000"):
        epsilon([M(0.5, 1.0, 100_000)], 1e-5)


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("delta", "target", "published", "_"), PUBLISHED)
def test_noise_for_the_published_table(delta: float, target: float, published: float, _: float) -> None:
    """Sigma within 0.5 % of the published one (found to 0.01 of epsilon there), and not above it."""
    sigma = noise_multiplier(0.1, 2000, delta, target)
    assert sigma == pytest.approx(published, rel=0.005)
    assert epsilon([M(sigma, 0.1, 2000)], delta).value <= target
    assert epsilon([M(sigma * 0.998, 0.1, 2000)], delta).value > target


@pytest.mark.slow
def test_noise_is_the_least_that_fits() -> None:
    """The answer fits, a little less does not; with something spent it has to be more."""
    fresh = noise_multiplier(0.3, 20, 1e-5, 2.0)
    assert epsilon([M(fresh, 0.3, 20)], 1e-5).value <= 2.0 < epsilon([M(fresh * 0.998, 0.3, 20)], 1e-5).value
    before = [M(6.0, 0.3, 10)]
    after = noise_multiplier(0.3, 20, 1e-5, 2.0, spent=before)
    assert after > fresh
    assert epsilon([*before, M(after, 0.3, 20)], 1e-5).value <= 2.0
    assert epsilon([*before, M(after * 0.998, 0.3, 20)], 1e-5).value > 2.0


def test_noise_never_falls_below_what_can_be_accounted() -> None:
    """A budget that would let sigma be smaller gives 0.5."""
    assert noise_multiplier(0.001, 1, 1e-3, 6.0) == accounting.LEAST_SIGMA


@pytest.mark.parametrize(
    ("arguments", "spent", "match"),
    [
        ((0.3, 20, 1e-5, 1.0), [M(1.0, 1.0, 1)], "is spent already"),
        ((0.3, 20, 1e-5, 0.005), [], "accountants' own error"),
        ((0.3, 0, 1e-5, 1.0), [], "at least 1"),
        ((0.3, 20, 1e-5, 0.0), [], "above 0"),
        ((0.0, 20, 1e-5, 1.0), [], "sampling probability"),
        ((0.3, 20, 0.0, 1.0), [], "delta"),
    ],
)
def test_plans_that_no_noise_makes_possible(arguments: tuple, spent: list[Mechanism], match: str) -> None:
    """An error, not a number."""
    with pytest.raises(UserError, match=match):
        noise_multiplier(*arguments, spent=spent)


# --- Renyi ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1.05, 1.5, 2, 2.5, 7, 20])
@pytest.mark.parametrize(("sigma", "q"), [(0.7, 0.3), (2.0, 0.05), (6.0, 0.9)])
def test_a_renyi_divergence_is_its_integral_and_the_librarys(sigma: float, q: float, order: float) -> None:
    """The moment by quadrature, and Opacus' figure; the direction taken is the larger one."""
    from opacus.accountants.analysis.rdp import compute_rdp

    def moment(power: float) -> float:
        x = np.linspace(-15 * sigma, max(0, power) + 15 * sigma, 400_001)  # its mass lies about 0 to `power`
        ratio = np.log1p(-q + q * np.exp((2 * x - 1) / (2 * sigma**2)))
        return float(np.trapezoid(np.exp(power * ratio + norm.logpdf(x, 0, sigma)), x))

    found = renyi_divergence(sigma, q, order)
    assert found == pytest.approx(
        float(compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=float(order))), rel=1e-8, abs=1e-10
    )
    assert found == pytest.approx(math.log(moment(order)) / (order - 1), rel=1e-6, abs=1e-10)
    assert found >= math.log(moment(1 - order)) / (order - 1) - 1e-9


def test_no_step_is_free() -> None:
    """However small q / sigma: rounding does not make it 0, and an order can still be chosen."""
    assert renyi_divergence(1e6, 1e-6, 1024) > 0
    assert choose_order(1e6, 1e-6, 1.0, 1e-5) in ORDERS


def test_full_steps_have_the_gaussians_divergence() -> None:
    """order / (2 sigma^2), and the formula tends to it."""
    assert renyi_divergence(3.0, 1.0, 8) == pytest.approx(8 / 18)
    assert renyi_divergence(3.0, 1 - 1e-12, 8) == pytest.approx(8 / 18, rel=1e-6)


@pytest.mark.parametrize(("delta", "target", "sigma"), PUBLISHED_RENYI)
def test_the_published_renyi_figures(delta: float, target: float, sigma: float) -> None:
    """Sigma of another program's Renyi accountant for the same table."""
    found = renyi_epsilon([M(sigma, 0.1, 2000)], delta)
    assert found == pytest.approx(target, abs=0.02)


def test_the_order_is_fixed_by_the_ceiling_and_the_first_schedule() -> None:
    """And serves that schedule nearly as well as all orders together."""
    order = choose_order(6.0, 0.1, 3.0, 1e-5)
    assert order == choose_order(6.0, 0.1, 3.0, 1e-5)
    best = max(ORDERS, key=lambda a: (3.0 - conversion(a, 1e-5)) / renyi_divergence(6.0, 0.1, a))
    assert order == best
    steps = next(n for n in range(1000, 4000, 10) if RenyiFilter(order, 1e-5).epsilon([M(6.0, 0.1, n)]) > 3.0)
    assert renyi_epsilon([M(6.0, 0.1, steps)], 1e-5) == pytest.approx(3.0, abs=0.02)


def test_a_filter_holds_where_noise_is_chosen_from_what_came_out() -> None:
    """An adversary who picks sigma from the outputs stays within epsilon at delta.

    Full steps: the privacy loss L is simulated exactly; the mean of (1 - e^(epsilon - L))+ is delta.
    """
    order, delta, ceiling = 6, 0.02, 4.0
    charge = RenyiFilter(order, delta)
    source = random.Random(1)
    sigmas = (0.8, 1.5, 4.0)
    total, trials, most = 0.0, 20_000, 0.0
    for _ in range(trials):
        loss, rho = 0.0, 0.0
        while True:
            sigma = sigmas[0] if loss > 1.0 else sigmas[2] if loss < -0.5 else sigmas[1]  # greedy where it pays
            step = renyi_divergence(sigma, 1.0, order)
            if rho + step + conversion(order, delta) > ceiling:
                break
            rho += step
            loss += source.gauss(1 / (2 * sigma**2), 1 / sigma)
        most = max(most, rho)
        total += max(0.0, 1 - math.exp(ceiling - loss))
    assert most > 0.5  # the adversary did spend
    assert total / trials <= delta
    assert charge.epsilon([M(1.0, 1.0, 1)]) == pytest.approx(order / 2 + conversion(order, delta))
