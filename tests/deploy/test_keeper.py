"""What should be and what is: the keeper mends the difference, whatever died."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy import keeper as keeper_module
from deploy.control import FlowerRun
from deploy.keeper import RunKeeper
from deploy.runs import queue_run, stop_run
from medsegdiff.strict import read_config
from server.config import RunPlan
from server.journal import Journal


class SuperLink:
    """Flower's Control API, as far as the keeper uses it."""

    def __init__(self) -> None:
        self.nodes: dict[str, str] = {}
        self.runs: dict[int, FlowerRun] = {}
        self.stopped: list[int] = []

    def close(self) -> None: ...

    def register(self, wanted: dict[str, str]) -> tuple[list[str], list[str]]:
        added, removed = [s for s in wanted if s not in self.nodes], [s for s in self.nodes if s not in wanted]
        self.nodes = dict(wanted)
        return added, removed

    def start(self, folder: Path) -> int:
        self.runs[len(self.runs) + 1] = FlowerRun(len(self.runs) + 1, "running", "")
        return len(self.runs)

    def run(self, run_id: int) -> FlowerRun | None:
        return self.runs.get(run_id)

    def stop(self, run_id: int) -> None:
        self.stopped.append(run_id)

    def forget(self) -> None:
        """The process died: its memory is gone, and its numbers begin elsewhere."""
        self.nodes = {}
        self.runs = {number + 1000: run for number, run in self.runs.items()}


@pytest.fixture
def scene(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A queued run, two members, a SuperLink, a keeper; `tick` moves the clock."""
    folder = make_run()
    plan = read_config(folder / "run.yaml", RunPlan)
    runs = folder.parent / "runs"
    run = queue_run(runs, plan, "day")
    members = {s: SimpleNamespace(node_key=f"key-{s}", active=True) for s in ("alder", "birch")}
    federation: Any = SimpleNamespace(members=lambda: members, runs=runs)
    told: list[tuple[str, dict[str, Any]]] = []
    changes: list[int] = []
    link = SuperLink()
    clock = SimpleNamespace(now=100.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now, time=time.time)
    monkeypatch.setattr(keeper_module, "time", fake)
    keeper = RunKeeper(federation, lambda: link, lambda: changes.append(1), lambda e, f: told.append((e, f)))  # type: ignore[arg-type,return-value]

    def tick(seconds: float = 2.0) -> None:
        clock.now += seconds
        keeper.look()

    def events(kind: str) -> list[dict[str, Any]]:
        return [facts for event, facts in told if event == kind]

    return SimpleNamespace(
        keeper=keeper, link=link, run=run, members=members, tick=tick, events=events, changes=changes,
        journal=lambda event, **f: Journal(run / "journal.jsonl").append(event, **f),
    )  # fmt: skip


def test_members_are_registered_and_the_run_is_started_once(scene) -> None:
    """Two looks, one start; the gateway is told once, since somebody may have come in while it started."""
    scene.tick()
    scene.tick()
    assert scene.link.nodes == {"alder": "key-alder", "birch": "key-birch"}
    assert len(scene.link.runs) == 1
    assert scene.changes == [1]


def test_a_revoked_member_is_removed_and_the_gateway_told(scene) -> None:
    """At the next look."""
    scene.tick()
    scene.members["birch"].active = False
    scene.tick()
    assert set(scene.link.nodes) == {"alder"}
    assert scene.changes == [1, 1]
    assert scene.events("nodes")[-1] == {"added": [], "removed": ["birch"]}


def test_a_superlink_without_its_memory_is_told_everything_anew(scene) -> None:
    """Nodes and run within one look, without a pause."""
    scene.tick()
    scene.link.forget()
    scene.tick()
    assert set(scene.link.nodes) == {"alder", "birch"}
    assert len(scene.link.runs) == 2
    assert "started anew" in scene.events("run_lost")[0]["reason"]


def test_a_dead_serverapp_is_started_again_with_growing_pauses(scene) -> None:
    """3 seconds, then 6, then 12; the run was asked for and has not ended."""
    scene.tick()
    starts = []
    for _ in range(3):
        number = max(scene.link.runs)
        scene.link.runs[number] = FlowerRun(number, "finished", "failed: no heartbeat")
        waited = 0.0
        while len(scene.link.runs) == number:
            scene.tick(0.5)
            waited += 0.5
        starts.append(waited)
    assert starts == [3.5, 6.5, 12.5]
    assert "no heartbeat" in scene.events("run_lost")[0]["reason"]


@pytest.mark.parametrize("end", ["finished", "stopped", "failed"])
def test_a_run_that_ended_is_left_alone(scene, end) -> None:
    """The journal's word counts, not Flower's."""
    scene.tick()
    scene.journal(end)
    scene.link.runs[1] = FlowerRun(1, "finished", "completed")
    scene.tick()
    scene.tick(100)
    assert len(scene.link.runs) == 1
    assert scene.events("run_ended") == [{"run": scene.run.name}]


def test_a_serverapp_that_does_not_stop_is_ended(scene) -> None:
    """Asked to stop 40 seconds ago: Flower ends it; one asked just now gets its time."""
    scene.tick()
    stop_run(scene.run, "day")
    scene.tick()
    assert scene.link.stopped == []
    past = time.time() - 40
    os.utime(scene.run / "stop.json", (past, past))
    scene.tick()
    assert scene.link.stopped == [1]


@pytest.mark.parametrize("committed", [True, False])
def test_a_serverapp_whose_process_is_gone_is_noticed_at_once(scene, committed) -> None:
    """Flower takes 43 to 58 seconds; the keeper's next two looks. After a committed round there is no pause, either."""
    alive = [True]
    scene.keeper.serverapp_lives = lambda: alive[0]
    scene.tick()
    scene.tick()
    if committed:
        scene.journal("round", round=1, accepted={}, rejected={}, absent=[])
    alive[0] = False
    scene.tick()
    assert scene.link.stopped == []
    scene.tick()
    assert scene.link.stopped == [1]
    assert scene.events("run_lost")[0]["reason"] == "its ServerApp's process is gone"
    assert len(scene.link.runs) == (2 if committed else 1)
    scene.tick(4.0)
    assert len(scene.link.runs) == 2


def test_a_serverapp_that_is_only_starting_gets_its_time(scene) -> None:
    """A pending run waits for superexec as long as that takes; a starting one gets a minute."""
    scene.keeper.serverapp_lives = lambda: False
    scene.tick()
    scene.link.runs[1] = FlowerRun(1, "pending", "")
    for _ in range(100):
        scene.tick()
    scene.link.runs[1] = FlowerRun(1, "running", "")
    for _ in range(29):
        scene.tick()
    assert scene.link.stopped == []
    scene.tick()
    scene.tick()
    assert scene.link.stopped == [1]


def test_a_run_that_ended_well_is_not_taken_for_dead(scene) -> None:
    """Between the journal's last word and Flower's the process is gone, too."""
    alive = [True]
    scene.keeper.serverapp_lives = lambda: alive[0]
    scene.tick()
    scene.journal("finished")
    alive[0] = False
    for _ in range(5):
        scene.tick()
    assert scene.link.stopped == []


@pytest.mark.parametrize("gone", [False, True])
def test_a_run_that_was_stopped_and_asked_for_again_was_not_lost(scene, gone) -> None:
    """Between two looks: the coordinator's own doing is no fault of anything, and waits for nothing."""
    alive = [True]
    scene.keeper.serverapp_lives = lambda: alive[0]
    scene.tick()
    stop_run(scene.run, "day")
    scene.journal("stopped")
    queue_run(scene.run.parent, read_config(scene.run / "run.yaml", RunPlan), "day")
    alive[0] = not gone  # its process, before Flower has noticed
    for _ in range(3):
        scene.tick()
    assert (scene.link.stopped, len(scene.link.runs)) == ([], 1)
    alive[0] = True
    scene.link.runs[1] = FlowerRun(1, "finished", "completed")
    scene.tick()
    assert len(scene.link.runs) == 2
    assert (scene.events("run_lost"), len(scene.events("run_ended"))) == ([], 1)
    scene.link.runs[2] = FlowerRun(2, "finished", "failed")  # and what falls then is taken up again, as ever
    scene.tick()
    assert len(scene.events("run_lost")) == 1


def test_a_damaged_journal_holds_up_no_other_run(scene) -> None:
    """Once its ServerApp has ended the next one is taken up, and the reason is told; it can be ended, too."""
    scene.tick()
    plan = replace(read_config(scene.run / "run.yaml", RunPlan), name="second")
    queue_run(scene.run.parent, plan, "day")
    (scene.run / "journal.jsonl").write_text("not a journal\n{}\n")
    scene.tick()
    assert len(scene.link.runs) == 1
    stop_run(scene.run, "day")
    past = time.time() - 40
    os.utime(scene.run / "stop.json", (past, past))
    scene.tick()
    assert scene.link.stopped == [1]
    scene.link.runs[1] = FlowerRun(1, "finished", "failed")
    scene.tick()
    assert "is not a journal entry" in scene.events("run_ended")[0]["reason"]
    assert scene.events("run_started")[-1]["run"] == "second"
