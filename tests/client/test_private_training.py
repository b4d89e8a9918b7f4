"""A private site behind its guard: what it lets pass, what it spends, and what leaves it."""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Message, MessageType
from torch import Tensor

from client import personal, private_training
from client.approvals import pending_runs
from client.contract import (
    REFUSALS,
    Assignment,
    Invitation,
    Presence,
    PrivacyRequest,
    PrivacyTask,
    Scores,
    TrainTask,
    Update,
    arrays_from_wire,
    arrays_to_wire,
    from_wire,
    to_wire,
)
from client.personalisation import Personalisation
from client.policy import SPARE_TRAININGS, SitePolicy
from client.privacy import ledger as ledgers
from client.privacy.account import Ceiling, ledger_path, read_account
from client.privacy.engines import PatientLoop
from client.privacy.ledger import Ledger
from client.privacy.policy import PrivacyPolicy, SitePrivacy
from client.private_training import terms_of, wait_for_release
from client.refusal import Refusal
from deploy.ledger_repair import recover_ledger, write_off_ledger
from medsegdiff.errors import UserError
from medsegdiff.strict import compact_json
from medsegdiff.weights import hash_weights, initial_weights, weight_shapes
from tests.hospital import Hospital

MECHANISM = PrivacyPolicy(
    epsilon=8.0, delta=1e-4, sigma=2.0, q=0.5, clip=1.0, batch=2, steps=2, rounds=2, slices=1, draws=2
)
SECTION = SitePrivacy(MECHANISM, weight=20, answer_every=0.0)


def section(privacy: SitePrivacy = SECTION) -> str:
    return f"privacy: {compact_json(privacy)}\n"


@pytest.fixture
def private_task(tiny_task: TrainTask) -> TrainTask:
    """The tiny task for private sites; its network has no attention, so all weights are trained."""
    return replace(tiny_task, privacy=PrivacyTask(train="all"))


@pytest.fixture
def private_site(hospital: Callable[..., Hospital], private_task: TrainTask) -> Callable[..., Hospital]:
    """Call to get an approved private site."""

    def make(privacy: SitePrivacy = SECTION, task: TrainTask = private_task) -> Hospital:
        site = hospital("{min_patients: 5}", section(privacy), task)
        site.approve()
        return site

    return make


def said(reply: Message, name: str, kind: type) -> Any:
    assert not reply.has_error(), reply.error.reason
    return from_wire(reply.content, name, kind)


def word(reply: Message) -> str:
    assert reply.has_error()
    code = str(reply.error.reason).partition(":")[0]
    assert reply.error.reason == f"{code}: {REFUSALS[code]}"
    return code


def introduce(site: Hospital, anchor: str = "") -> Message:
    return site.ask(MessageType.QUERY, invitation=to_wire(Invitation("run-1", "n", anchor)))


# --- who meets whom ---------------------------------------------------------------------------------------------------


def test_site_and_run_must_both_want_privacy(private_task, tiny_task) -> None:
    """A run without it is refused by a private site, a site without it by a run that requires it; else both agree."""
    assert terms_of(None, tiny_task) is None
    assert terms_of(None, replace(private_task, privacy=PrivacyTask(required=False))) is None
    found = terms_of(SECTION, private_task)
    assert found is not None
    assert (found.policy, found.privacy) == (MECHANISM, SECTION)
    with pytest.raises(Refusal, match="trains without privacy") as refused:
        terms_of(SECTION, tiny_task)
    assert refused.value.code == "privacy-floor"
    with pytest.raises(Refusal, match="has no `privacy` section") as refused:
        terms_of(None, private_task)
    assert refused.value.code == "privacy-missing"


@pytest.mark.parametrize("change", [{"local_steps": 3}, {"rounds": 3}])
def test_a_run_may_not_take_more_steps_or_rounds(private_task, change) -> None:
    """Sigma was chosen for a length; a longer run is named with both numbers."""
    with pytest.raises(Refusal, match=rf"{next(iter(change))} 3; the site's policy allows at most 2"):
        terms_of(SECTION, replace(private_task, **change))


def test_a_run_tightens_and_never_loosens(private_task) -> None:
    """More noise is taken over; less is refused."""
    tighter = replace(private_task, privacy=PrivacyTask(asks=PrivacyRequest(sigma=3.0)))
    found = terms_of(SECTION, tighter)
    assert found is not None
    assert found.policy == replace(MECHANISM, sigma=3.0)
    with pytest.raises(Refusal, match="at least 2"):
        terms_of(SECTION, replace(private_task, privacy=PrivacyTask(asks=PrivacyRequest(sigma=1.0))))


# --- a round ----------------------------------------------------------------------------------------------------------


def test_a_round_is_reserved_trained_committed_and_told(private_site) -> None:
    """One committed entry in the ledger; the update states what was spent, and no figure beside it."""
    site = private_site()
    update = said(site.train(), "update", Update)
    account = read_account(ledger_path(site.folder))
    assert [(e.run, e.round, e.sigma, e.q, e.steps, e.state) for e in account.entries] == [
        ("run-1", 1, 2.0, 0.5, 2, "committed")
    ]
    ledger = Ledger(ledger_path(site.folder), Ceiling(8.0, 1e-4))
    assert (update.patients, update.loss, update.seconds) == (20, None, None)
    assert (update.epsilon, update.privacy_delta) == (ledger.spent().epsilon, 1e-4)
    assert update.ledger_anchor == site.guard.keys.anchor(account.head)
    assert [line["event"] for line in site.audited("privacy_reserved") + site.audited("privacy_committed")] == [
        "privacy_reserved", "privacy_committed",
    ]  # fmt: skip


def test_a_repeated_question_spends_nothing(private_site, monkeypatch) -> None:
    """The kept bytes are sent again, also after the process was started anew; the ledger stays as it is."""
    site = private_site()
    first = site.train()
    before = ledger_path(site.folder).read_bytes()
    monkeypatch.setattr("client.app.train_privately", lambda *_: pytest.fail("a second training"))
    site.guard = site.open()
    again = site.train()
    assert again.content.array_records == first.content.array_records
    assert ledger_path(site.folder).read_bytes() == before


def test_a_training_that_dies_counts_in_full_and_the_next_draws_fresh_noise(private_site, monkeypatch) -> None:
    """Killed after the reservation: it stays open; the repetition is a second reservation with other noise."""
    site = private_site()
    with monkeypatch.context() as patch:
        patch.setattr(private_training.PrivateTrainer, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            site.train()
    assert not (site.folder / "outbox").exists()
    first = said(site.train(), "update", Update)
    account = read_account(ledger_path(site.folder))
    assert [entry.state for entry in account.entries] == ["open", "committed"]
    alone = Ledger(site.folder / "other.jsonl", Ceiling(8.0, 1e-4))
    alone.commit(alone.reserve("run-1", 1, 2.0, 0.5, 2), 2)
    assert first.epsilon > alone.spent().epsilon


def test_nothing_is_trained_beyond_the_ceiling(private_site, private_task, monkeypatch) -> None:
    """The budget does not cover the run: refused as it introduces itself, with the rounds that would fit; no step."""
    small = SitePrivacy(replace(MECHANISM, epsilon=1.9), 20, answer_every=0.0)
    site = private_site(small)
    monkeypatch.setattr(private_training.PrivateTrainer, "run", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(Refusal, match=r"spent 0\.0000, ledger .*: 1 rounds would fit"):
        private_training.forecast(
            private_training.open_ledger(site.folder, small.mechanism, True), small.mechanism, private_task, "run-1"
        )
    assert word(introduce(site)) == "budget-spent"
    assert [line["decision"] for line in site.audited("refused")][-1] == "budget-spent"


def test_a_round_beyond_the_ceiling_is_refused_before_its_first_step(private_site, monkeypatch) -> None:
    """A server that asks to train without asking who is there meets the same limit; the ledger is as before."""
    site = private_site(SitePrivacy(replace(MECHANISM, epsilon=1.9), 20, answer_every=0.0))
    said(site.train(1), "update", Update)
    before = ledger_path(site.folder).read_bytes()
    monkeypatch.setattr(private_training.PrivateTrainer, "run", lambda *_: pytest.fail("a step was taken"))
    assert word(site.train(2)) == "budget-spent"
    assert ledger_path(site.folder).read_bytes() == before


def test_a_network_that_an_engine_would_treat_wrongly_is_not_trained(private_site, monkeypatch) -> None:
    """The gate stands before the ledger: nothing is reserved for a training that must not be."""

    class Doubling(PatientLoop):
        def clipped_sum(self, *args: Any) -> dict[str, Tensor]:
            return {name: 2 * value for name, value in super().clipped_sum(*args).items()}

    site = private_site()
    monkeypatch.setattr(private_training, "_exact", set())
    monkeypatch.setattr(private_training, "choose_engine", lambda _: Doubling())
    assert word(site.train()) == "fault"
    assert not ledger_path(site.folder).exists()


def test_what_cannot_be_trained_is_not_laid_before_the_data_officer(hospital, private_task, tiny_task) -> None:
    """A run without privacy, not approved: refused for that, and none waits for an approval; with it, one does."""
    site = hospital("{min_patients: 5}", section(), tiny_task)
    assert word(introduce(site)) == "privacy-floor"
    assert pending_runs(site.folder) == []
    site.task = private_task
    assert word(introduce(site)) == "not-approved"
    assert [waiting.run for waiting in pending_runs(site.folder)] == ["run-1"]


# --- the server's memory of the ledger --------------------------------------------------------------------------------


def test_a_ledger_that_was_put_back_is_noticed_by_what_the_server_remembers(private_site) -> None:
    """Ledger and audit log of last week together are whole; only the server's anchor shows that they are old."""
    site = private_site()
    files = [ledger_path(site.folder), site.folder / "audit.jsonl", site.folder / "audit.jsonl.head"]
    said(site.train(1), "update", Update)
    kept = {path: path.read_bytes() for path in site.folder.glob("*.jsonl*")}
    assert set(kept) >= set(files[:2])
    remembered = said(site.train(2), "update", Update).ledger_anchor
    assert not introduce(site, remembered).has_error()
    for path in site.folder.glob("*.jsonl*"):
        path.unlink()
    for path, data in kept.items():
        path.write_bytes(data)
    site.guard = site.open()
    assert not introduce(site).has_error()
    assert word(introduce(site, remembered)) == "ledger-rolled-back"


def test_a_lost_ledger_is_recovered_and_the_server_knows_it_again(private_site) -> None:
    """Refused while it is gone; after the recovery the server's memory fits, and both trainings count."""
    site = private_site()
    said(site.train(1), "update", Update)
    remembered = said(site.train(2), "update", Update).ledger_anchor
    before = read_account(ledger_path(site.folder))
    for path in site.folder.glob("privacy-ledger.jsonl*"):
        path.unlink()
    site.guard = site.open()
    assert introduce(site, remembered).has_error()
    recover_ledger(site.folder)
    site.guard = site.open()
    assert not introduce(site, remembered).has_error()
    assert read_account(ledger_path(site.folder)).history == before.history


def test_a_head_that_only_an_introduction_told_is_recovered_too(private_site, monkeypatch) -> None:
    """A kill left a reservation without its note; the next introduction told its hash; then the ledger was lost."""
    site = private_site()
    said(site.train(1), "update", Update)
    with monkeypatch.context() as patch:
        patch.setattr(ledgers, "note", lambda *_: (_ for _ in ()).throw(UserError("killed")))
        book = private_training.open_ledger(site.folder, MECHANISM, True)
        with pytest.raises(UserError, match="killed"):
            book.reserve("run-1", 2, MECHANISM.sigma, MECHANISM.q, 2)
    site.guard = site.open()
    remembered = said(introduce(site), "presence", Presence).ledger_anchor
    for path in site.folder.glob("privacy-ledger.jsonl*"):
        path.unlink()
    recover_ledger(site.folder)
    site.guard = site.open()
    assert not introduce(site, remembered).has_error()


def test_what_the_server_remembers_of_a_lost_disk_is_written_off(private_site, caplog) -> None:
    """The site's log names it; afterwards nothing is left to train with until the officer raises the ceiling."""
    site = private_site()
    remembered = said(site.train(1), "update", Update).ledger_anchor
    for path in site.folder.glob("*.jsonl*"):
        path.unlink()
    site.guard = site.open()
    assert word(introduce(site, remembered)) == "ledger-rolled-back"
    assert f"write-off --anchor {remembered}" in caplog.text
    caplog.clear()
    assert word(introduce(site, "$(reboot)")) == "ledger-rolled-back"  # no command of the server's is advised
    assert "reboot" not in caplog.text
    write_off_ledger(site.folder, 8.0, 1e-4, [remembered])
    site.guard = site.open()
    assert word(introduce(site, remembered)) == "budget-spent"
    wider = replace(SECTION, mechanism=replace(MECHANISM, epsilon=20.0, delta=2e-4))
    text = (site.folder / "site.yaml").read_text()
    (site.folder / "site.yaml").write_text(text.replace(section(), section(wider)))
    site.guard = site.open()
    assert not introduce(site, remembered).has_error()
    assert word(introduce(site, "f" * 64)) == "ledger-rolled-back"
    assert 8.0 < said(site.train(2), "update", Update).epsilon < 20.0


# --- what leaves ------------------------------------------------------------------------------------------------------


def everything_told(site: Hospital) -> dict[str, Any]:
    """All that one round of a private site says, but for noised arrays, their hash, the signature and anchors."""
    presence = compact_json(said(introduce(site), "presence", Presence))
    update = compact_json(said(site.train(), "update", Update))
    weights = initial_weights(site.task.model, 0)
    asked = to_wire(Assignment("run-1", 1, hash_weights(weights)))
    reply = site.ask(MessageType.EVALUATE, assignment=asked, weights=arrays_to_wire(weights))
    scores = compact_json(said(reply, "scores", Scores))
    told = {"presence": json.loads(presence), "update": json.loads(update), "scores": json.loads(scores)}
    for record, key in (("update", "delta_hash"), ("update", "ledger_anchor"), ("presence", "ledger_anchor")):
        assert told[record].pop(key)
    return told


def test_one_patient_more_changes_nothing_but_noised_arrays(private_site, monkeypatch) -> None:
    """The same site without one of its patients: presence, update and scores are equal to the letter.

    The oracle of the other side: without privacy the same patient shows in counts, loss and Dice.
    """
    site = private_site()
    before = everything_told(site)
    data = site.folder / "data"
    source, rows = data.resolve(), []
    with open(source / "cases.csv", newline="") as handle:
        reader = csv.DictReader(handle)
        rows, columns = list(reader), reader.fieldnames
    gone = next(row["patient_id"] for row in rows if row["split"] == "train")
    data.unlink()
    shutil.copytree(source, data)
    with open(data / "cases.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, columns or [])
        writer.writeheader()
        for row in rows:
            for column in ("image_path", "mask_path"):
                row[column] = str((source / row[column]).resolve())
            if row["patient_id"] != gone:
                writer.writerow(row)
    for path in site.folder.glob("privacy-ledger*"):
        path.unlink()
    shutil.rmtree(site.folder / "outbox")
    for path in site.folder.glob("audit.jsonl*"):
        path.unlink()
    site.guard = site.open()
    assert len({p.case.patient_id for p in site_data(site).train}) == 2
    assert everything_told(site) == before


def site_data(site: Hospital) -> Any:
    from client.site import Site

    return Site(site.folder / "site.yaml").data(site.task)


def test_scores_leave_only_where_held_out_patients_are_public(private_site) -> None:
    """Withheld: no Dice, no count, no time, and the data is not even read; public: as without privacy."""
    site = private_site(replace(SECTION, held_out="public"))
    weights = initial_weights(site.task.model, 0)
    asked = to_wire(Assignment("run-1", 1, hash_weights(weights)))
    scores = said(site.ask(MessageType.EVALUATE, assignment=asked, weights=arrays_to_wire(weights)), "scores", Scores)
    assert scores.patients == 1
    assert scores.dice is not None


def test_every_field_of_a_private_answer_is_on_the_allow_list(private_site) -> None:
    """Fields that hold something beyond identities: the noised arrays, the planned weight, epsilon. A new one fails."""
    told = everything_told(private_site())
    identities = {
        "site",
        "run",
        "round",
        "nonce",
        "base_hash",
        "model_hash",
        "software",
        "application",
        "contract_version",
    }
    empty: tuple[object, ...] = (None, "", 0, {}, False, 0.0)
    left = {
        (record, name): value
        for record, fields in told.items()
        for name, value in fields.items()
        if name not in identities and value not in empty
    }
    assert left == {
        ("presence", "train_patients"): 20,
        ("presence", "private"): True,
        ("update", "patients"): 20,
        ("update", "steps"): 2,
        ("update", "epsilon"): told["update"]["epsilon"],
        ("update", "privacy_delta"): 1e-4,
    }


def test_too_few_patients_is_asked_of_the_planned_weight(private_site) -> None:
    """Three patients train at a site whose policy asks for five: a refusal would tell how many there are."""
    site = private_site()
    assert SitePolicy().min_patients > len({p.case.patient_id for p in site_data(site).train})
    assert not site.train().has_error()


def test_an_answer_waits_for_the_next_multiple(monkeypatch) -> None:
    """3.2 s of work with multiples of 2 s leave after 4 s; with none at once."""
    slept: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: 103.2)
    monkeypatch.setattr(time, "sleep", slept.append)
    wait_for_release(100.0, 2.0)
    wait_for_release(100.0, 0.0)
    assert slept == [pytest.approx(0.8)]


def test_a_low_rank_round_moves_the_trained_set_alone(private_site, private_task) -> None:
    """With attention: norms, biases and attention kernels move, and every other weight's delta is exactly zero."""
    model = replace(private_task.model, attention_levels=(len(private_task.model.channel_multipliers) - 1,))
    task = replace(private_task, model=model, privacy=PrivacyTask(train="low_rank"))
    site = private_site(task=task)
    reply = site.train()
    delta = arrays_from_wire(reply.content.array_records["delta"], weight_shapes(task.model))
    moved = {name for name, value in delta.items() if bool(value.abs().max() > 0)}
    assert any("query_key_value" in name for name in moved)
    assert all(delta[name].ndim == 1 or "query_key_value" in name or ".out." in name for name in moved), moved
    assert moved != set(delta)


def test_noise_is_there_and_is_the_systems(private_site, monkeypatch) -> None:
    """With nothing but noise (no patient's gradient is taken), the same round twice gives other arrays."""
    site = private_site()
    deltas = []
    for seed in (0, 0):
        torch.manual_seed(seed)
        reply = site.train()
        deltas.append(arrays_from_wire(reply.content.array_records["delta"], weight_shapes(site.task.model)))
        shutil.rmtree(site.folder / "outbox")
    assert hash_weights(deltas[0]) != hash_weights(deltas[1])


def test_a_policy_changed_meanwhile_counts_at_once(private_site) -> None:
    """The officer takes the privacy section out: from the next question on the run that requires it is refused."""
    site = private_site()
    text = (site.folder / "site.yaml").read_text()
    (site.folder / "site.yaml").write_text(text.replace(section(), ""))
    assert word(introduce(site)) == "privacy-missing"


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"weight": 0}, "weight must lie in 1..1000000"),
        ({"answer_every": -1.0}, "answer_every must lie in 0..86400"),
    ],
)
def test_a_wrong_section_is_named(fields, fault) -> None:
    """Each with the range that it must keep to."""
    with pytest.raises(ValueError, match=fault):
        SitePrivacy(**({"mechanism": MECHANISM, "weight": 20} | fields))


# --- second models, which are trained without noise -------------------------------------------------------------------

PUBLIC = replace(SECTION, held_out="public")
SECOND = [Personalisation("ditto", pull=0.1, steps=1), Personalisation("fine_tune", steps=1)]


def score(site: Hospital, round_: int = 1) -> Message:
    weights = initial_weights(site.task.model, 0)
    asked = Assignment("run-1", round_, hash_weights(weights))
    return site.ask(MessageType.EVALUATE, assignment=to_wire(asked), weights=arrays_to_wire(weights))


def broken(*_: object) -> None:
    raise RuntimeError("the loss is not finite")


@pytest.mark.slow
@pytest.mark.parametrize("personalisation", SECOND, ids=lambda value: value.kind)
def test_a_second_model_is_trained_and_never_scored_to_the_outside(private_site, private_task, personalisation) -> None:
    """Even where held-out patients are public: its score would tell of the patients it was trained on, un-noised."""
    task = replace(private_task, personalisation=personalisation)
    site = private_site(PUBLIC, task)
    said(site.train(), "update", Update)
    scores = said(score(site), "scores", Scores)
    assert scores.dice is not None
    assert (scores.personal_dice, scores.personal_hd95_mm) == (None, None)
    assert len(list((site.folder / "models").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("personalisation", SECOND, ids=lambda value: value.kind)
def test_a_second_training_that_fails_is_the_sites_own_matter(
    private_site, private_task, monkeypatch, personalisation
) -> None:
    """It spends nothing of the budget, the answers are the usual ones, and the server learns nothing of it."""
    monkeypatch.setattr(personal, "_train", broken)
    site = private_site(PUBLIC, replace(private_task, personalisation=personalisation))
    said(site.train(), "update", Update)
    said(score(site), "scores", Scores)
    entries = read_account(ledger_path(site.folder)).entries
    assert [(entry.run, entry.round) for entry in entries] == [("run-1", 1)]


@pytest.mark.slow
def test_a_round_that_cannot_be_kept_is_not_trained_for_ever(private_site, private_task, monkeypatch) -> None:
    """A full disk behind the ledger: the server asks again and again, and the budget is not drained by it."""

    def full(*_: object) -> None:
        raise UserError("no space left on device")

    task = replace(private_task, personalisation=Personalisation("local_norms"))
    generous = replace(MECHANISM, epsilon=1000.0, rounds=100)
    site = private_site(replace(SECTION, mechanism=generous), task)
    monkeypatch.setattr(personal, "keep", full)
    words = [word(site.train()) for _ in range(task.rounds + SPARE_TRAININGS + 3)]
    assert words == ["fault"] * (task.rounds + SPARE_TRAININGS) + ["too-many-rounds"] * 3
    assert len(read_account(ledger_path(site.folder)).entries) == task.rounds + SPARE_TRAININGS
