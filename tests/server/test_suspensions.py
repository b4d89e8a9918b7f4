"""A federation after it has suspended a site: the others go on, also under a rule that bears just one attacker."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from medsegdiff.errors import UserError
from server.config import StrategyConfig
from server.rounds import absences
from tests.fake_federation import Federation
from tests.fake_sites import put

Make = Callable[..., Federation]
SITES = ("alder", "birch", "elm", "fir", "oak")
SHORT = {"deadline_seconds": 30.0, "absence_seconds": 5.0}


@pytest.fixture
def federate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_task) -> Make:
    """Call with a number of sites, of rounds, and changes of the plan."""

    def make(count: int, rounds: int = 6, name: str = "run", **changes: object) -> Federation:
        folder = tmp_path / name
        folder.mkdir()
        return Federation(folder, monkeypatch, replace(tiny_task, rounds=rounds), SITES[:count], **changes)

    return make


@pytest.mark.parametrize(
    ("rule", "count"), [("mean", 3), ("median", 3), ("trimmed_mean", 3), ("centred_clip", 3), ("multi_krum", 5)]
)
@pytest.mark.parametrize("restart", [False, True])
def test_a_rule_at_its_least_number_of_sites_goes_on_without_the_one_it_suspended(
    federate, rule, count, restart
) -> None:
    """birch sends NaN: three rounds reject it, later ones are made by the others; so also after a restart."""
    f = federate(count, strategy=StrategyConfig(rule=rule))
    f.spoil("birch", put(math.nan))
    if restart:
        f.start(3)
    f.start()
    assert [(e["round"], e["site"]) for e in f.told("suspended")] == [(3, "birch")]
    assert [len(e["accepted"]) for e in f.rounds()] == [count - 1] * 6
    assert [list(e["rejected"]) for e in f.rounds()] == [["birch"]] * 3 + [[]] * 3
    assert [e.get("suspended", []) for e in f.rounds()] == [[], [], *[["birch"]] * 4]
    assert [e["absent"] for e in f.rounds()] == [[]] * 6


def test_who_is_lifted_is_needed_again(federate) -> None:
    """Lifted after round 4 and silent in round 5: the run waits for it, and says how many updates it needs."""
    f = federate(3, strategy=StrategyConfig(rule="median"), **SHORT)
    f.spoil("birch", put(math.nan), lambda round_: round_ <= 3)
    f.start(4)
    f.members.lift("birch")
    f.start(5)
    assert [sorted(e["accepted"]) for e in f.rounds()[3:]] == [["alder", "elm"], ["alder", "birch", "elm"]]
    assert "suspended" not in f.rounds()[4]
    began = f.clock.now
    f.silence("birch", lambda round_: f.clock.now < began + 70)
    f.start(6)
    assert [(e["round"], e["need"], list(e["absent"])) for e in f.told("paused")] == [(6, 3, ["birch"])]
    assert len(f.rounds()[5]["accepted"]) == 3


def test_a_repeated_round_knows_who_was_found_out_then(federate) -> None:
    """The rule's f is the committed round's, also where the coordinator has lifted the site since."""
    f = federate(3, strategy=StrategyConfig(rule="trimmed_mean"))
    f.spoil("birch", put(math.nan))
    f.start(4)
    before = f.rounds()[3]
    (f.folder / "checkpoints" / "round-000004.safetensors").write_bytes(b"torn")
    f.members.lift("birch")
    f.start(4)
    for key in ("round", "model_hash", "accepted", "suspended"):
        assert f.rounds()[4][key] == before[key]


def test_a_pause_tells_what_is_needed_now(federate) -> None:
    """Of three members, all of which count, one is revoked and one is silent: two are needed."""
    f = federate(3, rounds=1, **SHORT)
    f.members.status["elm"] = "revoked"
    f.silence("birch", lambda _: f.clock.now < 1070)
    f.start()
    assert [(e["need"], list(e["absent"])) for e in f.told("paused")] == [(2, ["birch"])]


@pytest.mark.parametrize("quorum", [None, 3])
def test_a_suspended_site_is_named_as_one_with_the_way_back(federate, quorum) -> None:
    """Suspended by this run where all are asked for, or by another one under a rule that needs all: what can be done
    is said, and that a smaller quorum helps only where it does."""
    f = federate(3, quorum=quorum, strategy=StrategyConfig(rule="mean" if quorum else "median"))
    f.members.status["birch"] = "suspended"
    with pytest.raises(UserError) as failed:
        f.start()
    words = str(failed.value)
    assert "birch is suspended (medsegfed lift birch)" in words
    assert ("or lower run.quorum" in words) == (quorum is not None)
    assert ("the quorum is 3" if quorum else "the rule median needs 3") in words
    f.members.lift("birch")
    f.start()
    assert len(f.rounds()) == 6


def test_a_stated_quorum_that_needs_a_bad_site_ends_every_attempt_until_it_is_lowered(federate) -> None:
    """Nothing is committed, so nothing counts as a strike; with a quorum that the others meet the run goes on under its
    name, and the site is suspended after three rounds. As docs/recovery.md says."""
    f = federate(3, quorum=3)
    f.spoil("birch", put(math.nan))
    for _ in range(4):
        with pytest.raises(UserError, match=r"round 1: 2 of 3 sites .* the quorum is 3: birch was rejected"):
            f.start()
    f.members.status["birch"] = "revoked"  # does not help: the quorum stays
    with pytest.raises(UserError, match="the quorum is 3"):
        f.start()
    f.members.lift("birch")
    assert (f.rounds(), f.told("suspended")) == ([], [])
    name = f.plan.run_id
    f.plan = replace(f.plan, quorum=2)
    assert f.plan.run_id == name
    f.start()
    assert [(e["round"], e["site"]) for e in f.told("suspended")] == [(3, "birch")]
    assert len(f.rounds()) == 6


def test_the_report_tells_the_rounds_without_a_suspended_site(federate) -> None:
    """In a federation as in a simulation."""
    f = federate(3)
    f.spoil("birch", put(math.nan))
    f.start()
    assert absences(f.journal.events, "birch")["suspended_rounds"] == [4, 5, 6]
