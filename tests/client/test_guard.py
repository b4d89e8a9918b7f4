"""A real site's ClientApp: keys, approval, signatures, outbox and audit log between it and the server."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from flwr.app import Message, MessageType
from full_disk import file_limit

from client import guard as guard_module
from client.approvals import pending_run
from client.contract import (
    REFUSALS,
    REFUSED,
    Assignment,
    Invitation,
    Presence,
    Update,
    arrays_to_wire,
    check_signature,
    from_wire,
    to_wire,
)
from client.policy import SPARE_TRAININGS
from medsegdiff.chained_log import ChainedLog, verify_log
from medsegdiff.errors import UserError
from medsegdiff.weights import hash_weights, initial_weights


def code(reply: Message) -> str:
    assert reply.has_error()
    assert reply.error.code == REFUSED
    word = str(reply.error.reason).partition(":")[0]
    assert reply.error.reason == f"{word}: {REFUSALS[word]}"
    return word


def test_an_unapproved_run_is_refused_kept_and_told_once(hospital) -> None:
    """No training; the officer finds it in pending/; the audit log has one line however often the server asks."""
    site = hospital()
    assert [code(site.train()) for _ in range(3)] == ["not-approved"] * 3
    assert pending_run(site.folder, "run-1").task == site.task
    assert [line["decision"] for line in site.audited("refused")] == ["not-approved"]
    assert not (site.folder / "outbox").exists()


def test_an_approved_site_introduces_itself_signed(hospital) -> None:
    """With the hash of its program and the head of its audit log, under the enrolled key."""
    site = hospital()
    site.approve()
    reply = site.ask(MessageType.QUERY, invitation=to_wire(Invitation("run-1", "nonce-7")))
    check_signature(reply.content, "presence", site.guard.keys.signing_public)
    presence = from_wire(reply.content, "presence", Presence)
    assert (presence.site, presence.nonce, presence.train_patients) == ("alder", "nonce-7", 3)
    assert presence.application == site.guard.application
    verify_log(site.folder / "audit.jsonl", presence.audit_head)


def test_a_repeated_question_gets_the_same_bytes_without_training(hospital, monkeypatch) -> None:
    """Also after the process was started anew; the audit log tells one update and two repetitions."""
    site = hospital()
    site.approve()
    first = site.train()
    update = from_wire(first.content, "update", Update)
    check_signature(first.content, "update", site.guard.keys.signing_public)
    monkeypatch.setattr("client.app.train_round", lambda *_: pytest.fail("a second training"))
    site.guard = site.open()
    for again in (site.train(), site.train()):
        assert again.content["signature"] == first.content["signature"]
        assert again.content["update"] == first.content["update"]
        for name, array in first.content.array_records["delta"].items():
            assert again.content.array_records["delta"][name].data == array.data
    assert [line["delta"] for line in site.audited("update")] == [update.delta_hash]
    assert len(site.audited("repeated")) == 2


def test_a_round_is_not_trained_from_a_second_model(hospital) -> None:
    """Refused by its code and told in the audit log, also after the server claimed that the round was committed."""
    site = hospital()
    site.approve()
    assert not site.train(seed=0).has_error()
    assert code(site.train(seed=1)) == "base-changed"
    site.guard.outbox.forget("run-1", 2)
    assert code(site.train(seed=1)) == "base-changed"
    assert [line["decision"] for line in site.audited("refused")][-1] == "base-changed"


def test_nor_if_it_was_killed_before_the_training_was_entered(hospital, monkeypatch) -> None:
    """The update is on the disk and its line in the list is not: another model is refused, the same one answered."""
    site = hospital()
    site.approve()
    with monkeypatch.context() as patch:
        patch.setattr("client.outbox.Outbox._enter", lambda *_: (_ for _ in ()).throw(UserError("killed")))
        assert code(site.train(seed=0)) == "fault"
    monkeypatch.setattr("client.app.train_round", lambda *_: pytest.fail("a second training"))
    site.guard = site.open()
    assert code(site.train(seed=1)) == "base-changed"
    assert not site.train(seed=0).has_error()
    assert site.guard.outbox.trainings("run-1") == 1


def test_a_policy_that_was_changed_holds_from_the_next_question_on(hospital) -> None:
    """No restart; a file that cannot be read lets nothing pass."""
    site = hospital()
    site.approve()
    path = site.folder / "site.yaml"
    text = path.read_text()
    path.write_text(text.replace("min_patients: 1", "min_patients: 4"))
    assert code(site.train()) == "too-few-patients"
    path.write_text(text + "policy: [")
    assert code(site.train()) == "fault"
    path.write_text(text)
    assert not site.train().has_error()


def test_no_more_trainings_than_the_run_has_rounds_and_a_few(hospital) -> None:
    """A server that goes through the rounds again and again, each time with another model, is refused."""
    site = hospital()
    site.approve()
    allowed = site.task.rounds + SPARE_TRAININGS
    (site.folder / "outbox" / "run-1").mkdir(parents=True)
    (site.folder / "outbox" / "run-1" / "trainings").write_text(f"2 {'b' * 64}\n" * (allowed - 1))
    assert not site.train(1).has_error()
    shutil.rmtree(site.folder / "outbox" / "run-1", ignore_errors=False)
    (site.folder / "outbox" / "run-1").mkdir()
    (site.folder / "outbox" / "run-1" / "trainings").write_text(f"2 {'b' * 64}\n" * allowed)
    assert code(site.train(1, seed=7)) == "too-many-rounds"
    assert code(site.train(3)) == "round-out-of-range"


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("{min_patients: 4}", "too-few-patients"),
        ("{min_patients: 1, max_rounds: 1}", "too-many-rounds"),
        ("{min_patients: 1, application: '" + "0" * 64 + "'}", "application-changed"),
    ],
)
def test_the_policy_is_the_stricter_side(hospital, policy, reason) -> None:
    """An approval does not lift it."""
    site = hospital(policy)
    site.approve()
    reply = site.ask(MessageType.QUERY, invitation=to_wire(Invitation("run-1", "n")))
    assert code(reply) == reason
    assert site.audited("refused")[-1]["decision"] == reason


def test_a_program_that_changed_while_it_runs_trains_nothing(hospital, monkeypatch) -> None:
    """One byte changed in an installed file: the hash on the disk is no longer the one that was loaded."""
    site = hospital()
    site.approve()
    monkeypatch.setattr(guard_module, "application_hash", lambda: "f" * 64)
    assert code(site.train()) == "application-changed"


def test_another_task_under_an_approved_name_is_refused(hospital) -> None:
    """The approval is of the task, not of its name."""
    site = hospital()
    site.approve()
    site.task = replace(site.task, local_steps=500)
    assert code(site.train()) == "not-approved"


def test_scoring_keeps_what_the_server_may_have_to_ask_for_again(hospital) -> None:
    """The averages leave signed and audited; updates stay while the server may fall back behind their round."""
    site = hospital()
    site.approve()
    site.train()
    weights = initial_weights(site.task.model, 3)
    asked = Assignment("run-1", 1, hash_weights(weights))
    reply = site.ask(MessageType.EVALUATE, assignment=to_wire(asked), weights=arrays_to_wire(weights))
    check_signature(reply.content, "scores", site.guard.keys.signing_public)
    kept = site.folder / "outbox" / "run-1" / "round-000001.safetensors"
    assert kept.exists()
    site.guard.committed("run-1", 2)  # the server keeps three checkpoints: 0, 1 and 2
    assert kept.exists()
    site.guard.committed("run-1", 3)
    assert not kept.exists()
    assert site.audited("scores")[0]["patients"] == 1


def test_no_more_models_are_scored_than_a_run_needs(hospital) -> None:
    """A server that has ever other models scored would learn of the held-out patients; a repeated one is answered."""
    site = hospital()
    site.approve()
    known = ["0" * 64] * (site.task.rounds + SPARE_TRAININGS - 1)
    (site.folder / "outbox" / "run-1").mkdir(parents=True)
    (site.folder / "outbox" / "run-1" / "scored").write_text("\n".join(known))

    def score(seed: int) -> Message:
        weights = initial_weights(site.task.model, seed)
        asked = Assignment("run-1", 1, hash_weights(weights))
        return site.ask(MessageType.EVALUATE, assignment=to_wire(asked), weights=arrays_to_wire(weights))

    assert not score(1).has_error()
    assert code(score(2)) == "too-many-rounds"
    assert not score(1).has_error()


def test_too_few_patients_are_found_at_every_question(hospital) -> None:
    """A server that asks for training straight away, without an introduction, is refused all the same."""
    site = hospital("{min_patients: 4}")
    site.approve()
    assert code(site.train()) == "too-few-patients"


def test_invented_names_do_not_fill_the_audit_log(hospital) -> None:
    """A hundred are told, however many there are; a fault is told once, not at every repetition."""
    site = hospital()
    for number in range(130):
        site.ask(MessageType.QUERY, invitation=to_wire(Invitation(f"made-up-{number}", "n")))
    assert len(site.audited("refused")) == 100
    assert len(site.audited("refusals_left_out")) == 1
    for _ in range(3):
        assert code(site.ask(MessageType.QUERY)) == "fault"  # no invitation at all
    assert len(site.audited("not_answered")) == 1


def test_what_may_be_asked_without_end_does_not_fill_the_audit_log(hospital, monkeypatch) -> None:
    """Introductions, updates that were sent before, scores of a model that was scored: some an hour, then no more.

    New work goes on, and after the hour they are answered again.
    """
    now = [1000.0]
    monkeypatch.setattr(guard_module, "MOST_REPEATED", 9)
    monkeypatch.setattr(guard_module.time, "monotonic", lambda: now[0])
    site = hospital()
    site.approve()
    weights = initial_weights(site.task.model, 3)
    asked = Assignment("run-1", 1, hash_weights(weights))

    def each() -> set[str]:
        replies = [
            site.ask(MessageType.QUERY, invitation=to_wire(Invitation("run-1", "n"))),
            site.train(),
            site.ask(MessageType.EVALUATE, assignment=to_wire(asked), weights=arrays_to_wire(weights)),
        ]
        return {code(reply) if reply.has_error() else "answered" for reply in replies}

    assert [each() for _ in range(3)] == [{"answered"}] * 3  # 1 + 3 + 3 repetitions
    assert each() == {"answered", "too-often"}
    assert each() == {"too-often"}
    told = [len(site.audited(event)) for event in ("introduced", "repeated", "scores")]
    assert told == [4, 3, 3]
    assert not site.train(2).has_error()
    now[0] += 3601
    assert each() == {"answered"}


def test_a_full_disk_sends_nothing(hospital, monkeypatch) -> None:
    """What cannot be written down before it leaves does not leave."""
    site = hospital()
    site.approve()

    def full(*_: object) -> None:
        raise UserError("no space")

    monkeypatch.setattr("client.outbox.write_atomic", full)
    assert code(site.train()) == "fault"
    assert site.audited("update") == []


def test_keys_of_another_name_are_told_at_the_start(hospital) -> None:
    """site.yaml was renamed after enrolment."""
    site = hospital()
    text = (site.folder / "site.yaml").read_text()
    (site.folder / "site.yaml").write_text(text.replace("name: alder", "name: oak"))
    with pytest.raises(UserError, match="its keys belong to 'alder'"):
        site.open()


def test_a_full_disk_sends_nothing_and_costs_no_second_training(hospital) -> None:
    """No space for the update: it does not leave, nothing is counted. No space for the log alone: the update waits."""
    site = hospital()
    site.approve()
    site.train(1)  # cases are prepared now
    whole = (site.folder / "audit.jsonl").stat().st_size
    with file_limit(20_000):
        assert code(site.train(2)) == "fault"
    assert site.guard.outbox.trainings("run-1") == 1
    update = site.folder / "outbox" / "run-1" / "round-000002.safetensors"
    assert not update.exists()
    with pytest.MonkeyPatch.context() as patch:

        def refused(*_: object, **__: object) -> str:
            with file_limit(whole):
                return ChainedLog(site.folder / "audit.jsonl").append("update", round=2, padding="x" * 2000)

        patch.setattr(site.guard.audit, "append", refused)
        assert code(site.train(2)) == "fault"
    kept = update.read_bytes()
    reply = site.train(2)
    assert from_wire(reply.content, "update", Update).round == 2
    assert update.read_bytes() == kept
    assert site.guard.outbox.trainings("run-1") == 2
    assert [line["round"] for line in site.audited("repeated")] == [2]
    verify_log(site.folder / "audit.jsonl")
