"""Six sites, each with its own reason not to take part: each refuses before anything is trained, by its own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from server.journal import Event
from tests.e2e.federation.canaries import add_broken_cases
from tests.e2e.federation.conftest import QUICK, ROOT, Scene
from tests.e2e.federation.network import until

CODES = {
    "altered": "application-changed",  # one byte of its program was changed after its officer approved the run
    "newer": "incompatible",  # its program speaks the contract's next version
    "short": "too-many-rounds",  # lets no run of more than one round in
    "small": "too-few-patients",  # takes part with fifty patients or more
    "asleep": "outside-hours",
    "ruined": "fault",  # most of its data is broken
}
PACKAGES = ("client", "server", "medsegdiff", "simulations", "deploy")


def program(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the program with one text in it changed."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / file
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
    path.write_text(text.replace(old, new))
    return folder


@pytest.fixture(scope="module")
def journal(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Event]]:
    """The journal of a run that asks all six, once each has refused."""
    stage = scene.stage
    now = datetime.now()
    closed = f"{now + timedelta(hours=6):%H:%M}-{now + timedelta(hours=7):%H:%M}"
    policies = {
        "altered": "{min_patients: 1}",
        "newer": "{min_patients: 1, approval_required: false}",
        "short": "{min_patients: 1, approval_required: false, max_rounds: 1}",
        "small": "{min_patients: 50, approval_required: false}",
        "asleep": f'{{min_patients: 1, approval_required: false, allowed_hours: "{closed}"}}',
        "ruined": "{min_patients: 1, approval_required: false}",
    }
    for site, policy in policies.items():
        scene.enrol(site, "alder", policy)
    add_broken_cases(stage.sites["ruined"], 8)
    folder = tmp_path_factory.mktemp("programs")
    contract = "CONTRACT_VERSION = 2"
    scene.program["newer"] = program(folder / "newer", "client/contract.py", contract, "CONTRACT_VERSION = 3")
    first_word = '"""Scoring a model'
    scene.program["altered"] = program(folder / "altered", "client/evaluation.py", first_word, '"""Scoring A model')
    run_id = stage.begin(stage.run_file(scene.recipe, "refused", tuple(CODES), rounds=2, **QUICK))
    scene.approve_quietly(run_id, "altered")

    def all_refused(events: list[Event]) -> bool:
        return {event["site"] for event in events if event["event"] == "refused"} == set(CODES)

    try:
        for site in CODES:
            stage.start(site)
        yield scene.wait("refused", all_refused, "each of the six refuses")
    finally:
        with ThreadPoolExecutor(len(CODES)) as hands:
            list(hands.map(stage.stop, CODES))
        stage.command("server", "stop", "refused", "--folder", str(stage.server))
        scene.wait("refused", lambda events: events[-1]["event"] == "stopped", "the run stops")


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def test_each_is_named_with_its_code_at_the_server(scene: Scene, journal: list[Event]) -> None:
    """In the journal and in the coordinator's audit log; none of them was introduced, no round was committed."""
    assert {e["site"]: e["code"] for e in journal if e["event"] == "refused"} == CODES
    assert [event for event in journal if event["event"] == "site"] == []
    assert [event["round"] for event in journal if event["event"] == "round"] == [0]

    def noted() -> bool:  # after the journal's line
        lines = [event for event in told(scene.stage.server) if event["event"] == "refused" and event["site"] in CODES]
        return {event["site"]: event["code"] for event in lines} == CODES

    until(noted, 30.0, "the audit log has the six refusals")


@pytest.mark.parametrize("site", CODES)
def test_nothing_was_trained_there(scene: Scene, journal: list[Event], site: str) -> None:
    """No update in the site's outbox, and none in its audit log, which knows the refusal itself."""
    folder = scene.stage.sites[site]
    events = [event for event in told(folder) if event.get("run", "").startswith("refused-")]
    assert not {event["event"] for event in events} & {"introduced", "update", "scores"}
    assert not list((folder / "outbox").rglob("*.safetensors"))
    refused = [event["decision"] for event in events if event["event"] == "refused"]
    if site not in ("newer", "ruined"):  # these two do not get as far as a decision; their log says why
        assert refused == [CODES[site]]
    log = (folder / "state" / "logs" / "site.log").read_text()
    assert "ready: application" in log


def test_the_programs_differ_by_their_hash_alone(scene: Scene, journal: list[Event]) -> None:
    """The control: the altered program runs and would have answered, were it not for the approval's hash."""
    log = (scene.stage.sites["altered"] / "state" / "logs" / "site.log").read_text()
    assert "was approved for the program" in log
    assert "Traceback" not in log
