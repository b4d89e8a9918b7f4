"""What the server makes of private sites: whom it takes, what it remembers, what its report leaves out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.contract import PrivacyTask, Update, arrays_to_wire
from medsegdiff.chained_log import AUDIT_LOG, ChainedLog
from medsegdiff.errors import UserError
from medsegdiff.strict import parse_config, plain
from medsegdiff.weights import hash_weights, initial_weights, load_model, save_model
from server.config import RunPlan, RunRequest, StrategyConfig
from server.initial import INITIAL, check_initial, first_weights, keep_initial
from server.journal import Journal
from server.membership import Membership
from server.outcome import federation_report
from server.records import weighted_loss
from server.screening import Accepted, Expected, Rejection, screen_update

HASH = "a" * 64
DELTA = {"w": torch.ones(2, 3)}
OPEN = Update("alder", "run-1", 2, HASH, 8, 5, 0.5, 1.0, hash_weights(DELTA))
PRIVATE = replace(OPEN, loss=None, seconds=None, epsilon=1.5, privacy_delta=1e-5)


def reply(update: dict[str, Any]) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    question = Message(RecordDict(), 1000, "train")
    question.metadata.__dict__["_message_id"] = "m-1"
    text = ConfigRecord({"json": json.dumps(update)})
    content: RecordDict | Error = RecordDict({"update": text, "delta": arrays_to_wire(DELTA)})
    return Message(content, reply_to=question)


@pytest.mark.parametrize(
    ("update", "privacy", "reason"),
    [
        (OPEN, None, None),
        (PRIVATE, PrivacyTask(), None),
        (OPEN, PrivacyTask(required=False), None),
        (PRIVATE, PrivacyTask(required=False), None),
        (OPEN, PrivacyTask(), "states no epsilon"),
        (PRIVATE, None, "states an epsilon"),
    ],
)
def test_an_update_must_be_as_private_as_the_run_asks(update, privacy, reason) -> None:
    """All four combinations, and where privacy is a site's own choice both."""
    expected = Expected("alder", "run-1", 2, HASH, 5, 10, {"w": (2, 3)}, ("lesion",), privacy=privacy)
    outcome = screen_update(reply(plain(update)), expected)
    if reason is None:
        assert isinstance(outcome, Accepted)
    else:
        assert isinstance(outcome, Rejection)
        assert reason in outcome.reason


@pytest.mark.parametrize(
    "change",
    [
        {"loss": 0.5},
        {"seconds": 1.0},
        {"privacy_delta": None},
        {"epsilon": None},
        {"privacy_delta": 1.0},
        {"epsilon": -1.0},
    ],
)
def test_a_private_update_that_says_more_or_less_is_left_out(change) -> None:
    """Loss and time have no place beside an epsilon, and an epsilon none without its delta."""
    expected = Expected("alder", "run-1", 2, HASH, 5, 10, {"w": (2, 3)}, ("lesion",), privacy=PrivacyTask())
    outcome = screen_update(reply(plain(PRIVATE) | change), expected)
    assert isinstance(outcome, Rejection)


def test_the_mean_loss_is_of_those_who_tell_theirs() -> None:
    """Weighted by patients; None when all are private."""
    rows = [{"patients": 1, "loss": 1.0}, {"patients": 3, "loss": 2.0}, {"patients": 9, "loss": None}]
    assert weighted_loss(rows) == pytest.approx(7 / 4)
    assert weighted_loss(rows[2:]) is None


def test_the_server_remembers_what_a_site_said_last_of_its_ledger(tmp_path) -> None:
    """From introductions and updates alike, the last one; other sites' words do not count."""
    membership = Membership(tmp_path)
    assert membership.ledger_anchor("alder") == ""
    membership.note("site", run="r", site="alder", ledger_anchor="a1")
    membership.note("update", run="r", site="alder", ledger_anchor="a2", decision="accepted")
    membership.note("update", run="r", site="birch", ledger_anchor="b1", decision="accepted")
    membership.note("site", run="s", site="alder", audit_head="", ledger_anchor="")
    assert membership.ledger_anchor("alder") == "a2"
    assert ChainedLog(tmp_path / AUDIT_LOG).length == 4


def test_the_report_of_private_sites_has_null_for_what_is_withheld(tiny_task, tmp_path) -> None:
    """Patients, faults and Dice are null although the journal holds planned numbers; epsilon and delta stand there."""
    task = replace(tiny_task, privacy=PrivacyTask(), rounds=1)
    plan = RunPlan("tiny", "tiny", StrategyConfig(), {"alder": 20, "birch": 5}, task, engine="network")
    journal = Journal(tmp_path / "journal.jsonl")
    common = {"software": {}, "application": "", "faults": 0}
    journal.append("session")
    journal.append("site", node=1, site="alder", train_patients=20, test_patients=0, private=True, **common)
    journal.append("site", node=2, site="birch", train_patients=5, test_patients=2, **common)
    accepted = {
        "alder": {"patients": 20, "loss": None, "seconds": None, "norm": 1.0, "epsilon": 2.5, "privacy_delta": 1e-5},
        "birch": {"patients": 5, "loss": 0.4, "seconds": 3.0, "norm": 1.0},
    }
    journal.append(
        "round", round=1, model_hash=HASH, accepted=accepted, rejected={}, absent=[], bytes={"up": 1, "down": 1}
    )
    none = {"patients": 0, "dice": None, "dice_by_target": {}, "hd95_mm": None, "hd95_undefined": 0, "seconds": 0.0}
    some = none | {"patients": 2, "dice": 0.5, "dice_by_target": {"lesion": 0.5}}
    journal.append("scores", round=1, model_hash=HASH, sites={"alder": none, "birch": some})
    report = federation_report(plan, journal.events)
    alder, birch = report["sites"]["alder"], report["sites"]["birch"]
    assert [alder[key] for key in ("patients", "dice", "hd95_mm", "faults", "epsilon", "privacy_delta")] == [
        None, None, None, None, 2.5, 1e-5
    ]  # fmt: skip
    assert (birch["patients"], birch["dice"], birch["epsilon"]) == ({"train": 5, "test": 2}, {"federated": 0.5}, None)
    assert report["arms"]["federated"] == {"mean": 0.5, "worst": 0.5}
    assert (report["seconds"]["train"], report["seconds"]["overhead"]) == (None, None)
    assert any("alder 2.50" in note for note in report["notes"])


def test_example_weights_under_privacy_are_refused_before_anything(tiny_task) -> None:
    """The reason names what a number of patients is."""
    text = {"rounds": 1, "local_steps": 1, "privacy": {}, "strategy": {"weighting": "examples"}}
    with pytest.raises(UserError, match="weighting examples does not go with privacy patient_dp"):
        parse_config(text, RunRequest, "run.yaml")
    assert parse_config(text | {"strategy": {}}, RunRequest, "run.yaml").privacy == PrivacyTask()


# --- the model a run starts from --------------------------------------------------------------------------------------


def model_file(path: Path, task: Any, seed: int = 9) -> Path:
    save_model(path, task.card, initial_weights(task.model, seed))
    return path


def test_a_run_starts_from_the_model_it_names(tiny_task, tmp_path) -> None:
    """The copy in the run folder gives round one's weights; without one they are fresh from the seed."""
    path = model_file(tmp_path / "public.safetensors", tiny_task)
    identity = check_initial(path, tiny_task)
    plan = RunPlan("tiny", "tiny", StrategyConfig(), {"alder": 3}, tiny_task, initial=identity)
    keep_initial(path, tmp_path)
    assert hash_weights(first_weights(plan, tmp_path)) == identity
    assert hash_weights(load_model(tmp_path / INITIAL).network.state_dict()) == identity
    fresh = first_weights(replace(plan, initial=None), tmp_path)
    assert hash_weights(fresh) == hash_weights(initial_weights(tiny_task.model, tiny_task.seed))
    assert plan.run_id != replace(plan, initial=None).run_id


def test_a_model_that_does_not_fit_or_was_exchanged_is_refused(tiny_task, tmp_path) -> None:
    """Another network, another way to predict, another file than the plan names: each says what differs."""
    other = replace(tiny_task, model=replace(tiny_task.model, base_channels=tiny_task.model.base_channels * 2))
    path = model_file(tmp_path / "public.safetensors", other)
    with pytest.raises(UserError, match=r"network is another one than the run's .they differ in base_channels"):
        check_initial(path, tiny_task)
    turned = replace(tiny_task, diffusion=replace(tiny_task.diffusion, timesteps=10))
    with pytest.raises(UserError, match=r"diffusion is another one.*timesteps"):
        check_initial(model_file(path, tiny_task), turned)
    identity = check_initial(path, tiny_task)
    keep_initial(model_file(path, tiny_task, seed=1), tmp_path)
    plan = RunPlan("tiny", "tiny", StrategyConfig(), {"alder": 3}, tiny_task, initial=identity)
    with pytest.raises(UserError, match="nothing was trained"):
        first_weights(plan, tmp_path)
    (tmp_path / INITIAL).unlink()
    with pytest.raises(UserError):
        first_weights(plan, tmp_path)
