"""Arms are compared over the same sites, and the report says what the comparison does not show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from simulations.outcome import _arm_notes, _over_sites, _step_notes

SITES: Any = dict.fromkeys(("alder", "birch", "cedar"))


def plan(privacy: object = None) -> Any:
    """As much of a run's plan as the notes read."""
    task = SimpleNamespace(privacy=privacy, rounds=3, local_steps=10)
    return SimpleNamespace(task=task, roster=dict.fromkeys(SITES))


def scores(**federated: float | None) -> Any:
    local = {"alder": 0.5, "birch": 0.6, "cedar": 0.1}
    models = {f"local-{site}": {site: {"dice": value}} for site, value in local.items()}
    return models | {"federated": {site: {"dice": value} for site, value in federated.items()}}


def test_a_site_without_a_score_is_left_out_of_every_arm() -> None:
    """A suspended outlier would flatter the federation, for local training keeps it."""
    found = scores(alder=0.7, birch=0.8)
    assert _over_sites(found, SITES, "federated") == {"mean": 0.75, "worst": 0.7}
    assert _over_sites(found, SITES, "local") == {"mean": 0.55, "worst": 0.5}
    (note,) = _arm_notes(plan(), found, SITES, [])
    assert "left out of all means and worst sites: cedar" in note


def test_all_sites_count_where_all_are_scored() -> None:
    """Nothing is left out, and nothing noted."""
    found = scores(alder=0.7, birch=0.8, cedar=0.3)
    assert _over_sites(found, SITES, "local") == {"mean": pytest.approx(0.4), "worst": 0.1}
    assert _arm_notes(plan(), found, SITES, []) == []


def test_a_private_run_says_that_the_other_arms_are_not() -> None:
    """Its gain or loss is what privacy costs, too."""
    found = scores(alder=0.7, birch=0.8, cedar=0.3)
    (note,) = _arm_notes(plan(privacy=object()), found, SITES, [])
    assert "without privacy" in note


def test_a_choice_of_round_that_the_other_arms_did_not_have_is_told() -> None:
    """It was made by scores on the very patients; nobody is told where there is nothing to compare with."""
    found, events = scores(alder=0.7, birch=0.8, cedar=0.3), [{"event": "round"}, {"event": "selected"}]
    (note,) = _arm_notes(plan(), found, SITES, events)
    assert "favours the federation" in note
    assert _arm_notes(plan(), {"federated": found["federated"]}, SITES, events) == []


def test_steps_that_did_not_count_are_told() -> None:
    """A site that was away for a round of three: its local model had more training than the federation got from it."""
    rounds: Any = [{"event": "round", "round": n, "accepted": dict.fromkeys(SITES)} for n in (1, 2, 3)]
    found = scores(alder=0.7, birch=0.8, cedar=0.3)
    assert _step_notes(plan(), found, rounds) == []
    del rounds[1]["accepted"]["birch"]
    (note,) = _step_notes(plan(), found, rounds)
    assert "30 steps a site, pooled training 90" in note
    assert "fewer counted: birch 20." in note
    assert _step_notes(plan(), {"federated": found["federated"]}, rounds) == []
