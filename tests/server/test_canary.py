"""A canary: one step at every site, each told apart from what would fail, and nothing of the run itself touched."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from fake_sites import FakeSites, on, put, run, say
from flwr.app import Error, MessageType

from client.app import app as client_app
from client.approvals import is_run_name
from client.contract import REFUSED, Assignment, PrivacyTask, TrainTask, from_wire
from client.encoding import Compression, largest_size
from client.personalisation import Personalisation
from medsegdiff.errors import UserError
from medsegdiff.strict import dump_yaml, read_config
from medsegdiff.weights import hash_weights, initial_weights, weight_shapes
from server.app import app as server_app
from server.canary import canary_of, canary_report
from server.config import RunPlan, SelectionConfig, StrategyConfig
from server.journal import Journal
from server.outcome import write_federation_report
from simulations.inline import run_inline


@pytest.fixture
def plans(make_run, tmp_path):
    """Call with changes of a run's plan: the plan, its canary, and the canary's folder."""

    def make(**changes):
        plan = read_config(make_run("real", **changes) / "run.yaml", RunPlan)
        canary = canary_of(plan, 600.0)
        folder = tmp_path / canary.name
        folder.mkdir()
        (folder / "run.yaml").write_text(dump_yaml(canary))
        return plan, canary, folder

    return make


def report_of(plan: RunPlan, canary: RunPlan, folder: Path) -> dict:
    return canary_report(plan, canary, Journal(folder / "journal.jsonl").events)


class Noting(FakeSites):
    """Keeps what sites are asked."""

    def __init__(self, plan: RunPlan) -> None:
        super().__init__(plan)
        self.tasks: list[TrainTask] = []
        self.assignments: list[Assignment] = []

    def content(self, site, kind, message):
        self.tasks.append(from_wire(message.content, "task", TrainTask))
        if kind == MessageType.TRAIN:
            self.assignments.append(from_wire(message.content, "assignment", Assignment))
        return super().content(site, kind, message)


def test_one_step_at_every_site_and_nothing_is_made_of_it(plans) -> None:
    """Each is introduced and asked once, for one step from the run's first model; no checkpoint, no model, no score."""
    plan, canary, folder = plans(task={"rounds": 50, "local_steps": 20}, sample=2)
    sites = Noting(canary)
    run_inline(server_app, sites, 3, folder)
    assert sorted(sites.asked) == sorted((s, kind) for s in plan.roster for kind in (MessageType.QUERY, "train"))
    assert {(task.rounds, task.local_steps) for task in sites.tasks} == {(1, 1)}
    first = hash_weights(initial_weights(plan.task.model, plan.task.seed))
    assert {(a.run, a.round, a.model_hash) for a in sites.assignments} == {(canary.run_id, 1, first)}
    assert {path.name for path in folder.iterdir()} == {"run.yaml", "journal.jsonl"}
    report = report_of(plan, canary, folder)
    assert report["ready"]
    size = largest_size(Compression(), weight_shapes(plan.task.model))
    values = sum(math.prod(shape) for shape in weight_shapes(plan.task.model).values())
    for row in report["sites"].values():
        assert row["ready"]
        assert row["problem"] is None
        assert row["bytes"] == {"down": size, "up": 4 * values}
        assert row["introduced_seconds"] >= 0
    json.dumps(report, allow_nan=False)


def test_real_sites_make_the_step(plans) -> None:
    """The very ClientApp over the tiny world: every site trains one step, and says how long it took."""
    plan, canary, folder = plans()
    run_inline(server_app, client_app, 3, folder)
    report = report_of(plan, canary, folder)
    assert report["ready"], report
    assert all(row["step_seconds"] > 0 for row in report["sites"].values())
    assert all(row["answer_seconds"] >= row["step_seconds"] - 0.01 for row in report["sites"].values())


def test_what_would_fail_is_told_by_site_with_the_reason(plans) -> None:
    """One is fine, one sends what a round would reject, one does not come."""
    plan, canary, folder = plans()
    spoil = {
        "birch": on(MessageType.TRAIN, put(math.nan)),
        "elm": on(MessageType.QUERY, lambda content: Error(REFUSED, "not-approved: ...")),
    }
    run(folder, spoil)
    report = report_of(plan, canary, folder)
    assert not report["ready"]
    assert [row["ready"] for row in report["sites"].values()] == [True, False, False]
    assert "would be rejected" in report["sites"]["birch"]["problem"]
    assert "not finite" in report["sites"]["birch"]["problem"]
    assert "absent" in report["sites"]["elm"]["problem"]
    assert report["sites"]["birch"]["step_seconds"] is None


@pytest.mark.parametrize("code", ["not-approved", "too-few-patients", "incompatible", "outside-hours"])
def test_a_refusal_is_told_until_the_site_gives_way(plans, code) -> None:
    """The last word counts: a site that was refused, then approved and made its step, is ready."""
    plan, canary, _ = plans()
    here = {"event": "site", "site": "alder", "time": 104.0, "faults": 2}
    refused = {"event": "refused", "site": "alder", "code": code, "time": 102.0}
    tried = {"event": "tried", "site": "alder", "seconds": 2.0, "answer_seconds": 5.0, "time": 110.0}
    tried["bytes"] = {"down": 10, "up": 10}
    begin = {"event": "canary", "sites": list(plan.roster), "step": True, "time": 100.0}
    waiting = canary_report(plan, canary, [begin, refused])
    assert waiting["sites"]["alder"]["problem"].startswith(f"refuses ({code}): ")
    assert waiting["sites"]["birch"]["problem"] == "absent: it did not introduce itself within 600 s"
    done = canary_report(plan, canary, [begin, refused, here, tried])
    assert done["sites"]["alder"]["ready"]
    assert done["sites"]["alder"]["introduced_seconds"] == 4.0
    assert any("cannot be read" in note and "alder 2" in note for note in done["notes"])
    again = canary_report(plan, canary, [begin, refused, here, tried, begin])
    assert not again["sites"]["alder"]["ready"], "an earlier try's answers are not this one's"


def test_the_forecast_by_hand(plans) -> None:
    """The slowest site's answer and 19 further steps of its, in 50 rounds of which every tenth is scored."""
    plan, canary, _ = plans(task={"rounds": 50, "local_steps": 20}, evaluate_every=10, sample=2, quorum=1)
    events = [{"event": "canary", "sites": list(plan.roster), "step": True, "time": 0.0}]
    for site, step, answer in (("alder", 1.0, 9.0), ("birch", 2.0, 3.0), ("elm", 0.5, 1.0)):
        moved = {"down": 10, "up": 100}
        events += [
            {"event": "site", "site": site, "time": 1.0, "faults": 0},
            {"event": "tried", "site": site, "seconds": step, "answer_seconds": answer, "bytes": moved, "time": 9.0},
        ]
    forecast = canary_report(plan, canary, events)["forecast"]
    assert forecast["round_seconds"] == max(9 + 19 * 1, 3 + 19 * 2)
    assert forecast["seconds"] == 50 * 41
    model = largest_size(Compression(), weight_shapes(plan.task.model))
    # Two sites are sent the model in each round but the four after a scored one; three score five models.
    assert forecast["bytes"] == {"down": model * (2 * (50 - 4) + 3 * 5), "up": 100 * 2 * 50}
    waves = canary_report(replace(plan, wave=1), canary, events)["forecast"]
    assert waves["round_seconds"] == 2 * 41


def test_a_run_with_privacy_is_only_asked_who_is_there(plans) -> None:
    """No step, no epsilon: introductions alone, and the report says so; there is nothing to forecast from."""
    plan, canary, folder = plans(task={"privacy": PrivacyTask()})
    sites = run(folder, {"elm": on(MessageType.QUERY, lambda content: Error(REFUSED, "privacy-missing: ..."))})
    assert {kind for _, kind in sites.asked} == {MessageType.QUERY}
    report = report_of(plan, canary, folder)
    assert [row["ready"] for row in report["sites"].values()] == [True, True, False]
    assert (report["step"], report["forecast"]) == (False, None)
    assert any("no step was made" in note for note in report["notes"])


def test_the_canary_follows_from_the_run_and_is_another_run(plans) -> None:
    """The same plan, the same canary; another seed, another; its id is one that sites take, however long the name."""
    plan, canary, _ = plans(selection=SelectionConfig("mean", patience=2), strategy=StrategyConfig(ema=0.5))
    assert canary_of(plan, 600.0) == canary
    assert canary_of(replace(plan, deadline_seconds=5.0, absence_seconds=1.0)).run_id == canary.run_id
    assert canary_of(replace(plan, task=replace(plan.task, seed=9))).run_id != canary.run_id != plan.run_id
    long = replace(plan, name="a" * 48)
    assert is_run_name(canary_of(long).run_id)
    # The data officer reads of one round of one step, and approves no more.
    assert (canary.task.rounds, canary.task.local_steps, canary.name) == (1, 1, "tiny-canary")


def test_a_canary_has_no_report_of_a_run(plans) -> None:
    """`medsegfed report` says where to look."""
    _, _, folder = plans()
    run(folder, {"birch": on(MessageType.TRAIN, say(round=3))})
    with pytest.raises(UserError, match="is a canary"):
        write_federation_report(folder)


def test_a_second_model_makes_one_step_as_well(plans) -> None:
    """Ditto's hundred steps a round would be no canary, and its forecast would count them for each step."""
    plan, canary, _ = plans(task={"personalisation": Personalisation("ditto", pull=0.1, steps=100)})
    assert plan.task.personalisation.steps == 100
    assert (canary.task.local_steps, canary.task.personalisation.steps) == (1, 1)
