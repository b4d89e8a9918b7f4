"""A plan keeps to its budget, says what noise does to the signal, and warns with the figure that is so."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.privacy.account import Ceiling, frozen_delta, ledger_path
from client.privacy.accounting import Epsilon, Mechanism, epsilon
from client.privacy.ledger import Ledger
from client.privacy.planning import LEAST_STEPS, SAMPLING, STEPS, Plan, make_plan
from medsegdiff.errors import UserError


def plan_of(**changes: object) -> Plan:
    """A plan by hand; nothing is accounted."""
    plan = Plan(
        patients=200, limit=8.0, delta=1e-5, rounds=50, steps_per_round=40, q=0.1, sigma=2.8, parameters=2_900_000,
        clip=0.5, draws=8, reached=Epsilon(7.99, 7.99, 7.98),
    )  # fmt: skip
    return replace(plan, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def small() -> Plan:
    """30 patients, 4 rounds of 5 steps at q = 0.5."""
    return make_plan(30, 1.0, 1e-3, 4, steps_per_round=5, q=0.5, parameters=500)


def test_noise_and_signal_are_those_of_the_step_itself() -> None:
    """sigma C N(0, 1) / B drawn in full against the norm that is stated; aligned gradients of length C against C."""
    plan = plan_of(parameters=40_000, sigma=3.0, clip=0.7, q=0.3)
    source = np.random.default_rng(0)
    noise = 3.0 * 0.7 * source.standard_normal((20, 40_000)) / 60
    assert np.linalg.norm(noise, axis=1).mean() == pytest.approx(plan.noise_norm, rel=0.01)
    assert plan.step_ratio == pytest.approx(0.7 / plan.noise_norm)
    walk = np.linalg.norm(noise.sum(0))  # 20 steps: signals add up to 20 C
    assert replace(plan, rounds=20, steps_per_round=1).training_ratio == pytest.approx(20 * 0.7 / walk, rel=0.02)


def test_the_known_hopeless_case() -> None:
    """2.9 million parameters, 200 patients, epsilon 8: noise of 237 to 239 C a step; the clip plays no part."""
    plan = plan_of()
    assert plan.noise_norm / plan.clip == pytest.approx(238, abs=1.5)
    assert replace(plan, clip=9.0).training_ratio == pytest.approx(plan.training_ratio)
    assert plan.verdict() == "hopeless"
    (line,) = plan.warnings()
    assert line.startswith("HOPELESS")
    assert "238 times" in line
    assert f"{plan.most_parameters:,} parameters" in line


@pytest.mark.parametrize(("parameters", "verdict"), [(101_000, "possible"), (102_500, "hopeless")])
def test_the_most_parameters_are_where_hope_begins(parameters: int, verdict: str) -> None:
    """One more than they are is hopeless; so is one patient fewer than stated."""
    plan = plan_of(parameters=parameters)
    assert plan.most_parameters == pytest.approx(102_040, abs=1)
    assert (plan.verdict() == "hopeless") == (verdict == "hopeless")
    enough = replace(plan, parameters=2_900_000)
    needed = math.ceil(enough.patients / enough.training_ratio)
    assert replace(enough, patients=needed).verdict() != "hopeless"
    assert replace(enough, patients=needed - 1).verdict() == "hopeless"


def test_other_warnings_have_their_figures() -> None:
    """A delta near 1 / patients, an epsilon that rules nothing out, and the better verdicts."""
    assert plan_of(parameters=1000).warnings()[0].startswith("POSSIBLE")
    assert plan_of(parameters=40_000).warnings()[0].startswith("DOUBTFUL")
    lines = plan_of(delta=1e-3, limit=50.0).warnings()
    assert [line.split(":")[0] for line in lines] == ["HOPELESS", "DELTA", "EPSILON"]
    assert "5e-05" in lines[1]


def test_a_plan_reaches_its_budget_and_no_more(small: Plan) -> None:
    """At the share of delta that the ledger gives a frozen schedule."""
    assert small.steps == 20
    assert small.expected_batch == 15
    assert small.passes == 20 * 15 * 8
    assert small.reached == epsilon([Mechanism(small.sigma, 0.5, 20)], frozen_delta(1e-3))
    assert 0.99 < small.reached.value <= 1.0


def test_the_ledger_lets_a_plan_run_to_its_end(small: Plan, tmp_path: Path) -> None:
    """And not a step further than some."""
    book = Ledger(ledger_path(tmp_path), Ceiling(1.0, 1e-3))
    for number in range(4):
        book.commit(book.reserve("run", number, small.sigma, small.q, 5), 5)
    with pytest.raises(UserError, match="would take epsilon"):
        book.reserve("run", 4, small.sigma, small.q, 1)


def test_the_curve_rises_to_what_is_reached(small: Plan) -> None:
    """One point a round here; the last is the plan's epsilon."""
    curve = small.curve()
    assert [n for n, _ in curve] == [1, 2, 3, 4]
    assert [e for _, e in curve] == sorted(e for _, e in curve)
    assert curve[-1][1] == small.reached.value


@pytest.mark.slow
def test_q_and_steps_are_chosen_by_the_criterion() -> None:
    """Against every plan of the grid, each with its exact noise: near the best, and none as near costs less."""
    chosen = make_plan(200, 3.0, 1e-5, 50)
    assert chosen.steps >= LEAST_STEPS
    grid = [make_plan(200, 3.0, 1e-5, 50, n, p) for p in SAMPLING for n in STEPS if 50 * n >= LEAST_STEPS and n <= 10]
    best = max(plan.training_ratio for plan in grid)
    assert chosen.training_ratio >= 0.88 * best
    cheaper = [plan for plan in grid if plan.passes < chosen.passes - 1e-6]
    assert all(plan.training_ratio < 0.92 * best for plan in cheaper)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"patients": 0}, "patients 0"), ({"rounds": 0}, "rounds 0"), ({"parameters": 0}, "parameters 0"),
        ({"draws": 0}, "draws 0"), ({"clip": 0.0}, "clip"), ({"epsilon_limit": 0.0}, "epsilon"),
        ({"epsilon_limit": math.nan}, "epsilon"), ({"delta": 0.5}, "delta"), ({"q": 1.5}, "sampling"),
        ({"steps_per_round": 0}, "steps a round 0"), ({"epsilon_limit": 0.004}, "no noise keeps"),
    ],
)  # fmt: skip
def test_plans_that_cannot_be(changes: dict[str, float], match: str) -> None:
    """One line for the user."""
    wanted = {"patients": 200, "epsilon_limit": 3.0, "delta": 1e-5, "rounds": 5, "steps_per_round": 2, "q": 0.3}
    with pytest.raises(UserError, match=match):
        make_plan(**(wanted | changes))  # type: ignore[arg-type]
