"""Arms are compared over the same sites, and the report says what the comparison does not show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from simulations.outcome import _arm_notes, _over_sites

SITES: Any = dict.fromkeys(("alder", "birch", "cedar"))


def scores(**federated: float | None) -> Any:
    local = {"alder": 0.5, "birch": 0.6, "cedar": 0.1}
    models = {f"local-{site}": {site: {"dice": value}} for site, value in local.items()}
    return models | {"federated": {site: {"dice": value} for site, value in federated.items()}}


def test_a_site_without_a_score_is_left_out_of_every_arm() -> None:
    """A suspended outlier would flatter the federation, for local training keeps it."""
    found = scores(alder=0.7, birch=0.8)
    assert _over_sites(found, SITES, "federated") == {"mean": 0.75, "worst": 0.7}
    assert _over_sites(found, SITES, "local") == {"mean": 0.55, "worst": 0.5}
    (note,) = _arm_notes(SimpleNamespace(task=SimpleNamespace(privacy=None)), found, SITES)  # type: ignore[arg-type]
    assert "left out of all means and worst sites: cedar" in note


def test_all_sites_count_where_all_are_scored() -> None:
    """Nothing is left out, and nothing noted."""
    found = scores(alder=0.7, birch=0.8, cedar=0.3)
    assert _over_sites(found, SITES, "local") == {"mean": pytest.approx(0.4), "worst": 0.1}
    assert _arm_notes(SimpleNamespace(task=SimpleNamespace(privacy=None)), found, SITES) == []  # type: ignore[arg-type]


def test_a_private_run_says_that_the_other_arms_are_not() -> None:
    """Its gain or loss is what privacy costs, too."""
    found = scores(alder=0.7, birch=0.8, cedar=0.3)
    (note,) = _arm_notes(SimpleNamespace(task=SimpleNamespace(privacy=object())), found, SITES)  # type: ignore[arg-type]
    assert "without privacy" in note
