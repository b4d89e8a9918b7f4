"""`medsegfed run --canary`: queued as a run of its own, repeatable, told as a table, as JSON and by an exit code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from deploy import canary as command
from deploy.canary import queue_canary, run_canary
from deploy.federation import open_federation
from deploy.runs import queue_run, resolve_run, wanted
from medsegdiff.errors import UserError
from medsegdiff.strict import read_config
from server.canary import canary_of
from server.config import RunPlan
from server.journal import Journal
from tests.deploy.watched_federation import make_federation

RUN = """\
name: first
dataset: msd_hippocampus
sites: [alder, birch]
run: {rounds: 30, local_steps: 20, model: {preset: tiny, image_size: 32}}
"""


@pytest.fixture
def scene(tmp_path):
    """A federation, a run file and the run's plan."""
    federation = make_federation(tmp_path / "fed")
    path = tmp_path / "RUN.yaml"
    path.write_text(RUN)
    members = {site: m.patients for site, m in federation.members().items() if m.active}
    return federation, path, resolve_run(path, members)


def answer(folder: Path, *ready: str, end: str = "finished") -> None:
    """What a server would tell of a canary in which these sites made their step."""
    journal = Journal(folder / "journal.jsonl")
    plan = read_config(folder / "run.yaml", RunPlan)
    assert (plan.task.rounds, plan.task.local_steps, plan.canary) == (1, 1, True)
    journal.append("session")
    journal.append("canary", sites=list(plan.roster), step=True)
    for site in ready:
        journal.append("site", site=site, train_patients=3, test_patients=1, faults=0, software={})
        journal.append("tried", site=site, seconds=1.5, answer_seconds=4.0, bytes={"down": 2_000_000, "up": 1_000_000})
    journal.append("refused", site="birch", code="not-approved") if "birch" not in ready else None
    journal.append(end, model_hash="a" * 64)


def test_every_site_is_ready(scene, medsegfed, monkeypatch) -> None:
    """Exit code 0, the sites' figures, the forecast and the next command; the run itself is not queued."""
    federation, path, plan = scene
    monkeypatch.setattr(command, "LOOK_SECONDS", 0)
    folder = federation.runs / "first-canary"
    monkeypatch.setattr(command, "_wait", lambda *_: answer(folder, "alder", "birch"))
    code, out, _ = medsegfed("run", path, "--canary", "--folder", federation.folder)
    assert code == 0
    for words in (canary_of(plan).run_id, "1.5 s", "2 MB", "1 MB", "a round", "All 2 sites are ready", "max_rounds"):
        assert words in out
    assert not (federation.runs / "first").exists()
    assert not wanted(folder)


def test_one_is_not_and_the_json_says_why(scene, medsegfed, monkeypatch) -> None:
    """Exit code 1; on standard output JSON alone."""
    federation, path, plan = scene
    monkeypatch.setattr(command, "_wait", lambda *_: answer(federation.runs / "first-canary", "alder"))
    code, out, _ = medsegfed("run", path, "--canary", "--json", "--wait", "30", "--folder", federation.folder)
    found = json.loads(out)
    assert (code, found["ready"], found["run"]) == (1, False, plan.run_id)
    assert found["sites"]["birch"]["problem"].startswith("refuses (not-approved)")
    assert read_config(federation.runs / "first-canary" / "run.yaml", RunPlan).deadline_seconds == 30


def test_it_waits_until_the_canary_has_ended(scene) -> None:
    """Looks again and again; the server's answer comes at the third look."""
    federation, _, plan = scene
    looks = []

    def sleep(_: float) -> None:
        looks.append(1)
        if len(looks) == 3:
            answer(federation.runs / "first-canary", "alder", "birch")

    report = run_canary(federation, plan, "day", 60.0, lambda _: None, sleep=sleep)
    assert (report["ready"], len(looks)) == (True, 3)


def test_a_server_that_does_not_take_it_up_is_not_waited_for_for_ever(scene) -> None:
    """After the wait and two minutes it says what to look at, and reports both sites absent."""
    federation, _, plan = scene
    now, told = [0.0], []

    def sleep(_: float) -> None:
        now[0] += 10

    report = run_canary(federation, plan, "day", 60.0, told.append, clock=lambda: now[0], sleep=sleep)
    assert 180 < now[0] < 200
    assert "is the server running" in told[-1]
    assert {row["problem"] for row in report["sites"].values()} == {"absent: it did not introduce itself within 60 s"}


def test_without_a_server_it_says_so_and_waits_no_longer_for_another_run(scene) -> None:
    """A run is ahead of it, and nobody works on that one."""
    federation, _, plan = scene
    queue_run(federation.runs, plan, "day")
    now, told = [0.0], []

    def sleep(_: float) -> None:
        now[0] += 10

    run_canary(federation, plan, "day", 60.0, told.append, clock=lambda: now[0], sleep=sleep)
    assert any("The server is not running" in line for line in told)
    assert not any("works on" in line for line in told)
    assert now[0] < 200


def test_ctrl_c_ends_the_canary_and_tells_what_stands(scene) -> None:
    """The server is asked to stop it; nobody has to wait for an hour."""
    federation, _, plan = scene

    def sleep(_: float) -> None:
        raise KeyboardInterrupt

    report = run_canary(federation, plan, "day", 60.0, lambda _: None, sleep=sleep)
    assert not report["ready"]
    assert (federation.runs / "first-canary" / "stop.json").exists()


def test_a_canary_is_repeated_and_replaces_nothing_but_a_canary(scene) -> None:
    """An ended one goes; one under way goes on, or is told of where the plan changed; a run of its name stays."""
    federation, _, plan = scene
    canary = canary_of(plan)
    folder = queue_canary(federation.runs, canary, "day")
    assert queue_canary(federation.runs, canary, "day") == folder
    other = canary_of(changed(plan, seed=9))
    with pytest.raises(UserError, match="a canary of another plan is under way"):
        queue_canary(federation.runs, other, "day")
    answer(folder, "alder")
    assert not wanted(folder)
    queue_canary(federation.runs, other, "day")
    assert wanted(folder)
    assert Journal(folder / "journal.jsonl").events == []
    named = changed(plan, name="b-canary")
    queue_run(federation.runs, named, "day")
    with pytest.raises(UserError, match="holds a run of its own, no canary"):
        queue_canary(federation.runs, canary_of(changed(plan, name="b")), "day")
    assert read_config(federation.runs / "b-canary" / "run.yaml", RunPlan) == named


def changed(plan: RunPlan, name: str | None = None, seed: int | None = None) -> RunPlan:
    return replace(
        plan,
        name=name or plan.name,
        task=replace(plan.task, seed=plan.task.seed if seed is None else seed),
    )


def test_its_options_belong_to_it(scene, medsegfed) -> None:
    """Without --canary they are refused, and no run is started."""
    federation, path, _ = scene
    code, _, err = medsegfed("run", path, "--json", "--folder", federation.folder)
    assert code == 2
    assert "--wait and --json belong to --canary" in err
    assert not list(open_federation(federation.folder).runs.glob("*"))
