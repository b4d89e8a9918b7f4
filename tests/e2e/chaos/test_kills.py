"""kill -9 all over a federation: the run ends with the weights of one that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from medsegdiff.chained_log import ChainedLog
from server.journal import Journal
from tests.e2e.chaos.driver import SERVER_KINDS, SITE_KINDS, Federation, chaos, plan_kills

SEED = 6


def test_kills_are_drawn_from_the_seed() -> None:
    """The same seed, the same kills; all kinds come up before one comes again; some die in pairs."""
    kills = plan_kills(100, SEED)
    assert kills == plan_kills(100, SEED)
    assert kills != plan_kills(100, SEED + 1)
    assert kills[:6] == plan_kills(6, SEED)
    targets = [target for kill in kills for target in kill.targets]
    every = len(SERVER_KINDS) + len(SITE_KINDS)
    for start in range(0, len(targets) - every, every):
        assert len({(one.place == "server", one.kind) for one in targets[start : start + every]}) == every
    assert 20 < sum(len(kill.targets) == 2 for kill in kills) < 50


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_six_kills_lose_nothing(tmp_path: Path) -> None:
    """No committed round is lost, every update counts once, no site trains twice for a round, nobody is left behind."""
    kills = plan_kills(6, SEED)
    assert chaos(tmp_path / "chaos", kills, SEED) == []
    federation = Federation(tmp_path / "chaos")
    assert federation.faults() == []

    # The judge itself: a second training, a second acceptance, a round that was repeated.
    elm = ChainedLog(federation.stage.sites["elm"] / "audit.jsonl")
    elm.append("update", round=1, delta="0" * 64)
    assert any("elm trained 2 times" in fault for fault in federation.faults())
    audit = ChainedLog(federation.stage.server / "audit.jsonl")
    audit.append("update", round=2, site="birch", delta="0" * 64, decision="accepted")
    assert any("2 different updates of birch" in fault for fault in federation.faults())
    journal = Journal(federation.stage.server / "runs" / "chaos" / "journal.jsonl")
    last = journal.last("round")
    assert last is not None
    journal.append(**{name: value for name, value in last.items() if name != "time"} | {"model_hash": "0" * 64})
    assert any("is not what was committed" in fault for fault in federation.faults())
