"""Whatever a site replies, the server answers with an update it may fold or with a reason, never with an exception."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fake_sites import SMALLEST
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from client.contract import (
    PACKED,
    RAW,
    REFUSED,
    ContractError,
    Presence,
    Scores,
    Update,
    arrays_to_wire,
    sign,
    to_wire,
)
from medsegdiff.config import DiffusionConfig, TrainingConfig
from medsegdiff.diffusion import Diffusion
from medsegdiff.network import MedSegDiff
from medsegdiff.strict import plain
from medsegdiff.training import Trainer
from medsegdiff.weights import hash_weights
from server.config import ScreeningConfig
from server.screening import (
    STEP_BOUND,
    Accepted,
    Expected,
    Rejection,
    largest_norm,
    refusal_of,
    screen_presence,
    screen_scores,
    screen_update,
    update_norm,
)

HASH = "a" * 64
EXPECTED = Expected("alder", "run-1", 2, HASH, 5, 10, {"w": (2, 3), "b": (3,)}, ("lesion",))
SCORES = Scores("alder", "run-1", 2, HASH, 2, 0.5, {"lesion": 0.5}, None, 2, 0.1)
DELTA = {"w": torch.ones(2, 3), "b": torch.zeros(3)}
UPDATE = Update("alder", "run-1", 2, HASH, 8, 5, 0.5, 1.0, hash_weights(DELTA))


def reply(content: RecordDict | Error) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    question = Message(RecordDict(), 1000, "train")
    question.metadata.__dict__["_message_id"] = "m-1"
    return Message(content, reply_to=question)


def update_reply(delta: object = None, records: dict[str, Any] | None = None, **changes: Any) -> Message:
    text = json.dumps(plain(UPDATE) | changes)
    arrays = arrays_to_wire(DELTA) if delta is None else delta
    return reply(RecordDict({"update": ConfigRecord({"json": text}), "delta": arrays} | (records or {})))


def other_array(values: int = 9, data: bytes | None = None, dtype: str = "float32", **more: Array) -> ArrayRecord:
    """Nine float32 values are due."""
    return ArrayRecord({PACKED: Array(dtype, (values,), RAW, bytes(36) if data is None else data), **more})


def test_a_good_update_is_accepted() -> None:
    """Its fields, its delta and its size in bytes."""
    outcome = screen_update(update_reply(), EXPECTED)
    assert isinstance(outcome, Accepted)
    assert (outcome.update, outcome.bytes) == (UPDATE, 36)
    assert torch.equal(outcome.delta["w"], DELTA["w"])


def test_the_whole_enrolment_may_be_claimed() -> None:
    """The bound itself is inside: 1 and all enrolled patients."""
    assert all(isinstance(screen_update(update_reply(patients=n), EXPECTED), Accepted) for n in (1, 10))


def test_the_norm_is_over_all_weights_and_the_limit_itself_is_inside() -> None:
    """sqrt(6) for six ones; at the limit accepted, below it named with both numbers."""
    found = screen_update(update_reply(), replace(EXPECTED, largest_norm=math.sqrt(6)))
    assert isinstance(found, Accepted)
    assert found.norm == pytest.approx(math.sqrt(6), rel=1e-12)
    outcome = screen_update(update_reply(), replace(EXPECTED, largest_norm=2.4))
    assert isinstance(outcome, Rejection)
    assert outcome.reason == "its norm is 2.45, at most 2.4 is taken in this round"


def test_the_norm_of_huge_and_tiny_values_is_right() -> None:
    """Values whose float32 squares would overflow or vanish."""
    for value in (3e38, 1e-30):
        assert update_norm({"w": torch.full((4,), value)}) == pytest.approx(2 * value, rel=1e-6)


@pytest.mark.parametrize("kind", ["constant", "growing", "first large"])
def test_no_training_exceeds_the_first_rounds_limit(tiny_task, kind) -> None:
    """Real AdamW with the sites' betas on gradients made to move it far; the derived limit holds, and is no more than
    three times what the worst of them reaches."""
    steps, size, rate = 400, 50, tiny_task.training.learning_rate
    weights = torch.nn.Parameter(torch.zeros(size))
    optimizer = torch.optim.AdamW([weights], lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    for step in range(steps):
        size_now = {"constant": 1.0, "growing": 1.1**step, "first large": 1e3 if step == 0 else 1.0}[kind]
        weights.grad = torch.full((size,), float(size_now))
        optimizer.step()
    moved = update_norm({"w": weights.detach()})
    limit = largest_norm(ScreeningConfig(), {}, replace(tiny_task, local_steps=steps), size, 3)
    assert moved <= limit
    assert moved > limit / 3 or kind == "first large"


def test_the_sites_train_with_the_betas_that_the_limit_is_derived_for() -> None:
    """A Trainer's own optimizer; another one needs another bound."""
    network = MedSegDiff(SMALLEST)
    trainer = Trainer(network, Diffusion(DiffusionConfig()), None, TrainingConfig(), 10, 0)  # type: ignore[arg-type]
    b1, b2 = trainer.optimizer.param_groups[0]["betas"]
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert 2.3 < (1 - b1) / math.sqrt((1 - b2) * (1 - b1**2 / b2)) < STEP_BOUND


NAN = np.array([0, math.nan, *[0] * 7], "<f4").tobytes()

BAD_UPDATES = {
    "another site's name": (update_reply(site="birch"), "for site 'birch', not 'alder'"),
    "another run": (update_reply(run="run-2"), "for run 'run-2', not 'run-1'"),
    "an old round": (update_reply(round=1), "for round '1', not '2'"),
    "another base model": (update_reply(base_hash="b" * 64), "for base model 'bbbb"),
    "more patients than enrolled": (update_reply(patients=11), "claims 11 training patients, 10 are enrolled"),
    "no patients": (update_reply(patients=0), "claims 0 training patients"),
    "negative patients": (update_reply(patients=-3), "claims -3 training patients"),
    "fewer steps": (update_reply(steps=4), "took 4 steps, 5 were asked for"),
    "a loss that is no number": (update_reply(loss=math.nan), "loss"),
    "a loss that would overflow a sum": (update_reply(loss=1e308), "loss must lie in 0..1e9"),
    "an extra field": (update_reply(names="x"), "update.names"),
    "an extra record": (update_reply(records={"more": ConfigRecord({"a": 1})}), "holds the records ['delta', 'more'"),
    "a delta that is no array record": (update_reply(MetricRecord({"w": 1.0})), "'delta' is not a set of arrays"),
    "no array": (update_reply(ArrayRecord()), "it holds 0 arrays"),
    "an array by another name": (update_reply(ArrayRecord({"w": Array("float32", (9,), RAW, bytes(36))})), "(['w'])"),
    "an extra array": (update_reply(other_array(x=Array("float32", (1,), RAW, bytes(4)))), "it holds 2 arrays"),
    "fewer values": (update_reply(other_array(8, bytes(32))), "has shape (8,), not (9,)"),
    "too few bytes": (update_reply(other_array(data=bytes(32))), "32 bytes, 36 are due"),
    "another type": (update_reply(other_array(data=bytes(72), dtype="float64")), "float64/"),
    "a value that is not finite": (update_reply(other_array(data=NAN)), "array 'b' holds 1 values that are not finite"),
    "arrays that were not signed": (update_reply(delta_hash="b" * 64), "not the ones that were signed"),
    "an error": (reply(Error(2, "it broke")), "a fault (code 2): it broke"),
    "a refusal": (
        reply(Error(REFUSED, "outside-hours: <b>")),
        "a fault (code 100): the site takes part at other hours",
    ),
    "a refusal in own words": (reply(Error(REFUSED, "patient Smith")), "its own log says why"),
    "scores instead": (reply(RecordDict({"scores": to_wire(SCORES)})), "holds the records ['scores']"),
    "nothing": (reply(RecordDict()), "holds the records []"),
}


@pytest.mark.parametrize("kind", BAD_UPDATES)
def test_a_bad_update_is_rejected_by_name_with_its_reason(kind) -> None:
    """Each kind of fault, on an otherwise good reply."""
    message, reason = BAD_UPDATES[kind]
    outcome = screen_update(message, EXPECTED)
    assert isinstance(outcome, Rejection)
    assert outcome.site == "alder"
    assert reason in outcome.reason


def score_reply(**changes: Any) -> Message:
    return reply(RecordDict({"scores": ConfigRecord({"json": json.dumps(plain(SCORES) | changes)})}))


def test_good_scores_are_accepted() -> None:
    """With held-out patients, and without any."""
    assert screen_scores(score_reply(), EXPECTED) == SCORES
    assert isinstance(screen_scores(score_reply(patients=0, dice=None, dice_by_target={}), EXPECTED), Scores)


def test_a_second_model_is_scored_where_the_run_has_one() -> None:
    """One site could otherwise give every report an arm that nobody trained."""
    told = score_reply(personal_dice=0.5, personal_hd95_mm=3.0)
    outcome = screen_scores(told, EXPECTED)
    assert isinstance(outcome, Rejection)
    assert "the run has none" in outcome.reason
    assert isinstance(screen_scores(told, replace(EXPECTED, second_model=True)), Scores)
    empty = score_reply(patients=0, dice=None, dice_by_target={}, personal_dice=0.5)
    assert isinstance(screen_scores(empty, replace(EXPECTED, second_model=True)), Rejection)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"site": "birch"}, "for site 'birch'"),
        ({"run": "x"}, "for run 'x'"),
        ({"round": 3}, "for round '3'"),
        ({"model_hash": "b"}, "for base model 'b'"),
        ({"dice": 1.5}, "Dice is at most 1"),
        ({"dice": math.nan}, "scores must lie in"),
        ({"hd95_mm": 1e300}, "scores must lie in"),
        ({"dice_by_target": {"lesion": 0.5, "<b>": 0.5}}, "it scores ['<b>', 'lesion'], not ['lesion']"),
        ({"dice_by_target": {}}, "it scores []"),
        ({"dice": None}, "it reports the Dice None of 2 patients"),
        ({"patients": -2}, "counts must not be negative"),
    ],
)
def test_bad_scores_are_rejected(changes, reason) -> None:
    """A foreign target or a figure that no report could hold must not end a run at its very end."""
    outcome = screen_scores(score_reply(**changes), EXPECTED)
    assert isinstance(outcome, Rejection)
    assert reason in outcome.reason


def test_a_reason_is_one_short_printable_line() -> None:
    """A hostile reply writes neither a page into the log nor commands to the terminal that shows it."""
    outcome = screen_update(reply(Error(1, "x\n\x1b[2J\x9b31m" + "y" * 5000)), EXPECTED)
    assert isinstance(outcome, Rejection)
    assert outcome.reason.isprintable()
    assert len(outcome.reason) <= 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted(plain(UPDATE) | plain(SCORES))
TEXTS = (
    st.text(max_size=20)
    | JSON.map(json.dumps)
    | st.dictionaries(st.sampled_from(FIELDS), JSON).map(lambda d: json.dumps(plain(UPDATE) | d))
)
ARRAYS = st.builds(
    Array,
    dtype=st.sampled_from(["float32", "float64", "object", "", "<f4"]),
    shape=st.lists(st.integers(0, 2**62), max_size=4).map(tuple),
    stype=st.sampled_from([RAW, "numpy.ndarray", ""]),
    data=st.binary(max_size=30),
)
RECORDS = (
    st.dictionaries(st.sampled_from(["json", "more"]), TEXTS | st.integers(0, 9), max_size=2).map(ConfigRecord)
    | st.dictionaries(st.sampled_from([PACKED, "x"]), ARRAYS, max_size=3).map(ArrayRecord)
    | st.dictionaries(st.text(max_size=3), st.floats(), max_size=2).map(MetricRecord)
)
CONTENTS = st.dictionaries(st.sampled_from(["update", "delta", "scores", "x"]), RECORDS, max_size=3).map(RecordDict)


@settings(max_examples=200, deadline=None)
@given(content=CONTENTS | st.builds(Error, st.integers(0, 999), st.text(max_size=20)))
def test_no_garbage_raises(content) -> None:
    """Any combination of records, texts and arrays ends in a verdict; random bytes are never an update."""
    message = reply(content)
    assert isinstance(screen_update(message, EXPECTED), Rejection)
    assert isinstance(screen_scores(message, EXPECTED), (Rejection, Scores))


@pytest.mark.parametrize(
    "fault", [MemoryError, RecursionError, UnicodeDecodeError("utf-8", b"x", 0, 1, "y"), KeyError("w")]
)
def test_a_fault_nobody_thought_of_is_a_rejection_too(monkeypatch, fault) -> None:
    """Whatever reading a reply may raise: the site is left out, with the kind of fault as the reason."""

    def fail(*arguments: object) -> None:
        raise fault

    monkeypatch.setattr("server.screening.from_wire", fail)
    for outcome in (screen_update(update_reply(), EXPECTED), screen_scores(score_reply(), EXPECTED)):
        assert isinstance(outcome, Rejection)
        assert outcome.reason.split(":")[0] in ("MemoryError", "RecursionError", "UnicodeDecodeError", "KeyError")


KEY, OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32)), Ed25519PrivateKey.from_private_bytes(b"o" * 32)
SIGNED = replace(EXPECTED, key=KEY.public_key().public_bytes_raw().hex())


def signed_reply(key: Ed25519PrivateKey = KEY, **changes: Any) -> Message:
    text = json.dumps(plain(UPDATE) | changes)
    content = RecordDict({"update": ConfigRecord({"json": text}), "delta": arrays_to_wire(DELTA)})
    return reply(sign(content, "update", key.sign))


def test_a_real_site_must_sign() -> None:
    """The enrolled key's signature passes; none, another site's, or one over other words is rejected by its reason."""
    assert isinstance(screen_update(signed_reply(), SIGNED), Accepted)
    assert "holds the records ['delta', 'update'], not" in screen_update(update_reply(), SIGNED).reason
    assert "not the enrolled key's" in screen_update(signed_reply(OTHER), SIGNED).reason
    forged = signed_reply()
    forged.content["update"] = ConfigRecord({"json": json.dumps(plain(UPDATE) | {"patients": 10})})
    assert "not the enrolled key's" in screen_update(forged, SIGNED).reason


def test_nothing_replayed_spoofed_or_swapped_is_accepted() -> None:
    """A thousand answers of real signers that were given to another question, site, round or with other arrays: none
    gets in, each for the reason that fits."""
    rng = np.random.default_rng(0)
    changes = [
        ({"round": 1}, "for round"),
        ({"round": 3}, "for round"),
        ({"run": "run-0"}, "for run"),
        ({"site": "birch"}, "for site"),
        ({"base_hash": "b" * 64}, "for base model"),
        ({"delta_hash": "c" * 64}, "not the ones that were signed"),
    ]
    accepted = 0
    for _ in range(1000):
        change, reason = changes[rng.integers(len(changes))]
        key = OTHER if rng.random() < 0.3 else KEY
        outcome = screen_update(signed_reply(key, **change), SIGNED)
        accepted += isinstance(outcome, Accepted)
        assert (reason if key is KEY else "not the enrolled key's") in outcome.reason
    assert accepted == 0


PRESENCE = Presence("alder", "run-1", "n-1", 3, 1, 0)
KEYS = {"alder": SIGNED.key, "birch": OTHER.public_key().public_bytes_raw().hex()}


def presence_reply(key: Ed25519PrivateKey | None = KEY, **changes: Any) -> Message:
    text = json.dumps(plain(PRESENCE) | changes)
    content = RecordDict({"presence": ConfigRecord({"json": text})})
    return reply(sign(content, "presence", key.sign if key else None))


def test_an_introduction_counts_for_its_own_question_and_site() -> None:
    """Alder's key cannot say it is birch; yesterday's answer, another run's, and an unsigned one do not count."""
    assert screen_presence(presence_reply(), "run-1", "n-1", KEYS) == PRESENCE
    for message, reason in (
        (presence_reply(site="birch"), "not the enrolled key's"),
        (presence_reply(OTHER), "not the enrolled key's"),
        (presence_reply(None), "holds the records"),
        (presence_reply(nonce="n-0"), "answers another question"),
        (presence_reply(run="run-0"), "answers another question"),
        (presence_reply(site="mallory"), "'mallory' is not on the roster"),
        (presence_reply(contract_version=3), "contract version 3 meets 2 here"),
        (presence_reply(train_patients=-1), "counts must lie in"),
        (presence_reply(application="x" * 1000), "longer than 128"),
        (reply(Error(REFUSED, "not-approved: x")), "the run is not approved"),
    ):
        with pytest.raises(ContractError) as caught:
            screen_presence(message, "run-1", "n-1", KEYS)
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Error(REFUSED, "not-approved: what a site says"), "not-approved"),
        (Error(REFUSED, "made-up"), "fault"),
        (Error(REFUSED, None), "fault"),
        (Error(5, "not-approved"), None),
    ],
)
def test_a_refusal_is_one_of_a_closed_set(error, code) -> None:
    """What a site writes beside the code is not carried on."""
    assert refusal_of(reply(error)) == code
