"""A site's ClientApp: what it answers, and what it keeps to itself when it cannot."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import app, site_file
from client.contract import (
    REFUSALS,
    REFUSED,
    Assignment,
    Invitation,
    Presence,
    Scores,
    TrainTask,
    Update,
    arrays_from_wire,
    arrays_to_wire,
    from_wire,
    to_wire,
)
from medsegdiff.errors import UserError
from medsegdiff.strict import canonical_json
from medsegdiff.weights import hash_weights, initial_weights, weight_shapes


def context(index: int = 0) -> Context:
    return Context(1, 1000, {"partition-id": index, "num-partitions": 3}, RecordDict(), {})


def ask(kind: str, asked: TrainTask, index: int = 0, **records: object) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(RecordDict({"task": to_wire(asked)} | records), 1000, kind)
    message.metadata.__dict__["_message_id"] = "m-1"
    return app(message, context(index))


def model(task: TrainTask, **changes: str) -> dict[str, object]:
    weights = initial_weights(task.model, task.seed)
    said = {"run": "run-1", "round": 1, "model_hash": hash_weights(weights)} | changes
    return {"assignment": to_wire(Assignment(**said)), "weights": arrays_to_wire(weights)}


@pytest.fixture
def world(tiny_world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDSEGFED_WORLD", str(tiny_world.resolve()))
    return tiny_world


def test_a_site_says_who_it_is(world, tiny_task) -> None:
    """Name, patients by split and faults of the site that the partition names."""
    question = {"invitation": to_wire(Invitation("run-1", "n"))}
    replies = [ask(MessageType.QUERY, tiny_task, i, **question) for i in range(3)]
    answers = [from_wire(reply.content, "presence", Presence) for reply in replies]
    counts = [("alder", 3, 1), ("birch", 2, 1), ("elm", 1, 1)]
    assert [(a.site, a.train_patients, a.test_patients) for a in answers] == counts
    assert all((a.run, a.nonce, a.faults, a.application) == ("run-1", "n", 0, "") for a in answers)
    assert set(answers[0].software) == {"medsegfed", "torch", "flwr", "python"}


def test_a_site_trains_and_answers_with_its_change(world, tiny_task) -> None:
    """The update names site, run, round, base and patients; the delta is not zero; the same question, the same bits."""
    records = model(tiny_task)
    replies = [ask(MessageType.TRAIN, tiny_task, 0, **records) for _ in range(2)]
    update = from_wire(replies[0].content, "update", Update)
    assert (update.site, update.run, update.round, update.patients, update.steps) == ("alder", "run-1", 1, 3, 2)
    shapes = weight_shapes(tiny_task.model)
    first, second = (arrays_from_wire(r.content.array_records["delta"], shapes) for r in replies)
    assert any(bool(value.abs().max() > 0) for value in first.values())
    assert hash_weights(first) == hash_weights(second)


def test_a_site_scores_with_averages_alone(world, tiny_task) -> None:
    """One held-out patient, one target; no key beyond the contract's."""
    reply = ask(MessageType.EVALUATE, tiny_task, 0, **model(tiny_task))
    assert set(reply.content) == {"scores"}
    scores = from_wire(reply.content, "scores", Scores)
    assert (scores.site, scores.patients, list(scores.dice_by_target)) == ("alder", 1, ["lesion"])


def refusal(reply: Message, secret: str, code: str = "fault") -> None:
    assert reply.has_error()
    assert not reply.has_content()
    assert (reply.error.code, reply.error.reason) == (REFUSED, f"{code}: {REFUSALS[code]}")
    assert secret not in reply.error.reason


def test_a_model_that_is_named_and_not_here_is_asked_for(world, tiny_task) -> None:
    """A word of its own for the server; once it was scored here, its hash is enough, and the answer the same."""
    whole = model(tiny_task, run="run-named")
    named = {"assignment": whole["assignment"]}
    for kind in (MessageType.TRAIN, MessageType.EVALUATE):
        refusal(ask(kind, tiny_task, 0, **named), "weights", "model-missing")
    ask(MessageType.EVALUATE, tiny_task, 0, **whole)
    sent, kept = (
        from_wire(ask(MessageType.TRAIN, tiny_task, 0, **r).content, "update", Update) for r in (whole, named)
    )
    assert sent.delta_hash == kept.delta_hash
    last = to_wire(Assignment("run-named", tiny_task.rounds, from_wire_hash(whole)))
    ask(MessageType.EVALUATE, tiny_task, 0, assignment=last)  # the run is over
    refusal(ask(MessageType.TRAIN, tiny_task, 0, **named), "weights", "model-missing")


def from_wire_hash(records: dict[str, object]) -> str:
    return from_wire(RecordDict(records), "assignment", Assignment).model_hash  # type: ignore[arg-type]


def test_a_fault_keeps_its_file_names_at_home(tmp_path, untouched_world, tiny_task, monkeypatch, caplog) -> None:
    """The data folder is gone: the server learns that the site refused, the site's own log says which folder."""
    shutil.copytree(untouched_world, tmp_path / "world")
    shutil.rmtree(tmp_path / "world" / "alder" / "data")
    monkeypatch.setenv("MEDSEGFED_WORLD", str(tmp_path / "world"))
    refusal(ask(MessageType.QUERY, tiny_task, invitation=to_wire(Invitation("run-1", "n"))), "alder")
    assert str(tmp_path / "world" / "alder" / "data") in caplog.text


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: {**r, "assignment": to_wire(Assignment("run-1", 1, "0" * 64))},  # not the model that was named
        lambda r: {"weights": r["weights"]},
        lambda r: {**r, "weights": arrays_to_wire({"w": torch.zeros(3)})},
    ],
)
def test_a_bad_question_is_refused(world, tiny_task, spoil) -> None:
    """Nothing is trained on a model that is not the one the server named."""
    refusal(ask(MessageType.TRAIN, tiny_task, 0, **spoil(model(tiny_task))), "weights")


def test_another_contract_is_refused(world, tiny_task, caplog) -> None:
    """A newer server's task is not answered; the site's log says who has to update."""
    task = to_wire(tiny_task)
    task["json"] = canonical_json(tiny_task).replace('"contract_version":2', '"contract_version":3')
    refusal(ask(MessageType.QUERY, tiny_task, 0, task=task), "version 2", "incompatible")
    assert "Update the older side" in caplog.text


def test_a_task_for_other_data_is_refused(world, tiny_task, caplog) -> None:
    """Channels and labels of the site's own dataset.yaml decide."""
    other = replace(tiny_task, dataset=replace(tiny_task.dataset, channels=("ultrasound",)))
    refusal(ask(MessageType.QUERY, other, invitation=to_wire(Invitation("run-1", "n"))), "ultrasound")
    assert "its data has the channels ['scan'], the run asks for ['ultrasound']" in caplog.text


def test_which_site_a_process_answers_for(tmp_path, monkeypatch) -> None:
    """MEDSEGFED_SITE wins; a world deals its sites out in name order; neither is an error that says what to set."""
    monkeypatch.delenv("MEDSEGFED_WORLD", raising=False)  # a simulation in this process leaves its own
    with pytest.raises(UserError, match="set MEDSEGFED_SITE"):
        site_file(context())
    for name in ("b", "a", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "site.yaml").touch()
    monkeypatch.setenv("MEDSEGFED_WORLD", str(tmp_path))
    assert [site_file(context(i)).parent.name for i in range(3)] == ["a", "b", "c"]
    monkeypatch.setenv("MEDSEGFED_SITE", "/etc/medsegfed/site.yaml")
    assert site_file(context(2)) == Path("/etc/medsegfed/site.yaml")
