"""The wire: what is written is read back bit for bit, and nothing else is read at all."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from client.contract import (
    CONTRACT_VERSION,
    PACKED,
    RAW,
    SIGNATURE,
    Assignment,
    ContractError,
    IncompatibleVersion,
    Invitation,
    Presence,
    Scores,
    TrainTask,
    Update,
    array_bytes,
    arrays_from_wire,
    arrays_to_wire,
    check_signature,
    from_wire,
    sign,
    to_wire,
)
from medsegdiff.strict import plain

UPDATE = Update("alder", "run-1", 1, "a" * 64, 3, 2, 0.5, 1.25, "d" * 64)
SCORES = Scores("alder", "run-1", 1, "a" * 64, 2, 0.5, {"lesion": 0.5}, 3.25, 0, 0.1)
PRESENCE = Presence("alder", "run-1", "n" * 32, 3, 1, 0, {"torch": "2.13"})
MESSAGES = [Invitation("run-1", "n" * 32), Assignment("run-1", 1, "a" * 64), PRESENCE, UPDATE, SCORES]


def over_the_wire(message: object, text: str | None = None) -> Any:
    record = to_wire(message) if text is None else ConfigRecord({"json": text})
    return from_wire(RecordDict({"m": record}), "m", type(message))


def changed(message: object, **changes: Any) -> str:
    return json.dumps(plain(message) | changes)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_survives_the_wire(message) -> None:
    """Every contract type is read back equal."""
    assert over_the_wire(message) == message


def test_a_task_survives_the_wire(tiny_task) -> None:
    """The nested task too, tuples and all."""
    assert over_the_wire(tiny_task) == tiny_task


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_an_extra_or_missing_key_is_refused(message) -> None:
    """No field may be added on the way, none of the required ones left out."""
    with pytest.raises(ContractError, match="patient_names"):
        over_the_wire(message, changed(message, patient_names=["x"]))
    whole = plain(message)
    del whole[fields(message)[0].name]  # type: ignore[arg-type]
    with pytest.raises(ContractError, match=fields(message)[0].name):  # type: ignore[arg-type]
        over_the_wire(message, json.dumps(whole))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (UPDATE, {"round": "1"}),
        (UPDATE, {"round": 1.5}),
        (UPDATE, {"round": True}),
        (UPDATE, {"site": 7}),
        (UPDATE, {"loss": None}),
        (UPDATE, {"loss": math.nan}),
        (UPDATE, {"loss": math.inf}),
        (UPDATE, {"loss": 1e308}),
        (UPDATE, {"loss": -1.0}),
        (UPDATE, {"seconds": -1.0}),
        (UPDATE, {"seconds": 1e308}),
        (UPDATE, {"patients": 10**5000}),
        (SCORES, {"dice": math.nan}),
        (SCORES, {"dice": 1.01}),
        (SCORES, {"dice": -0.1}),
        (SCORES, {"dice_by_target": {"lesion": 2.0}}),
        (SCORES, {"dice_by_target": [0.5]}),
        (SCORES, {"hd95_mm": math.inf}),
        (SCORES, {"hd95_mm": 1e300}),
        (SCORES, {"patients": -1}),
        (SCORES, {"hd95_undefined": -1}),
    ],
)
def test_wrong_types_and_values_are_refused(message, changes) -> None:
    """A number in quotes, a truth value, NaN, or a figure no site can measure is no message."""
    text = json.dumps(plain(message) | changes) if 10**5000 not in changes.values() else None
    if text is None:  # json refuses to write such a number; a hostile site would not
        text = json.dumps(plain(message)).replace('"patients": 3', '"patients": 1' + "0" * 5000)
    with pytest.raises(ContractError):
        over_the_wire(message, text)


@pytest.mark.parametrize("text", ["", "null", "[]", "7", "{", '{"a":1}{', "[" * 5000, '{"round": NaN}'])
def test_text_that_is_no_message_is_refused(text) -> None:
    """Neither an empty text nor deep nesting gets further than an error."""
    with pytest.raises(ContractError):
        over_the_wire(UPDATE, text)


def test_a_record_that_is_not_one_json_text_is_refused() -> None:
    """Absent, of another type, or with a second key."""
    for content in (
        RecordDict(),
        RecordDict({"m": ConfigRecord({"json": 7})}),
        RecordDict({"m": ConfigRecord({"json": "{}", "more": "x"})}),
        RecordDict({"m": ConfigRecord({})}),
    ):
        with pytest.raises(ContractError, match="the record 'm' is missing or is not one JSON text"):
            from_wire(content, "m", Update)


@pytest.mark.parametrize("version", [0, CONTRACT_VERSION + 1])
def test_another_contract_version_is_named(tiny_task, version) -> None:
    """Both versions, the consequence and the remedy."""
    with pytest.raises(
        ContractError, match=rf"contract version {version} meets {CONTRACT_VERSION} here.*Update the older"
    ):
        over_the_wire(tiny_task, changed(tiny_task, contract_version=version))


@pytest.mark.parametrize(
    ("key", "value"), [("rounds", 0), ("local_steps", 0), ("threads", 0), ("seed", -1), ("proximal_mu", -0.1)]
)
def test_a_task_out_of_range_is_refused(tiny_task, key, value) -> None:
    """A site is never asked for work that cannot be done."""
    with pytest.raises(ValueError, match=key):
        replace(tiny_task, **{key: value})


def test_a_task_asks_for_nothing_but_its_fields(tiny_task) -> None:
    """A new field of the task, or of what leaves a site, is a decision: this list has to be changed with it."""
    assert [f.name for f in fields(TrainTask)] == [
        "dataset", "model", "rounds", "local_steps", "seed", "diffusion", "training", "sampling", "proximal_mu",
        "control_variates", "threads", "privacy", "compression", "personalisation", "contract_version",
    ]  # fmt: skip
    assert [f.name for f in fields(Update)] == [
        "site", "run", "round", "base_hash", "patients", "steps", "loss", "seconds", "delta_hash",
        "epsilon", "privacy_delta", "ledger_anchor",
    ]  # fmt: skip
    assert [f.name for f in fields(Scores)] == [
        "site", "run", "round", "model_hash", "patients", "dice", "dice_by_target", "hd95_mm", "hd95_undefined",
        "seconds", "personal_dice", "personal_hd95_mm",
    ]  # fmt: skip
    assert [f.name for f in fields(Presence)] == [
        "site", "run", "nonce", "train_patients", "test_patients", "faults", "software", "application", "audit_head",
        "private", "ledger_anchor", "contract_version",
    ]  # fmt: skip


SHAPES = st.lists(st.integers(1, 4), max_size=4).map(tuple)


@settings(max_examples=40, deadline=None)
@given(shapes=st.dictionaries(st.sampled_from("abcd"), SHAPES, min_size=1), seed=st.integers(0, 99))
def test_arrays_survive_bit_for_bit(shapes, seed) -> None:
    """Scalars, negative zero, denormals and any memory layout come back as the same bits."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    first = next(iter(tensors.values())).view(-1)
    first[0] = -0.0 if seed % 2 else 1e-42
    tensors = {name: value.transpose(0, -1).clone().transpose(0, -1) if value.dim() > 1 else value
               for name, value in tensors.items()}  # fmt: skip
    wire = arrays_to_wire(tensors)
    back = arrays_from_wire(wire, shapes)
    assert array_bytes(wire) == sum(4 * value.numel() for value in tensors.values())
    for name, value in tensors.items():
        assert back[name].dtype == torch.float32
        assert torch.equal(back[name].contiguous().view(torch.int32), value.contiguous().view(torch.int32))
        back[name].add_(1)  # a tensor of its own, writable


def array(shape=(6,), dtype="float32", stype=RAW, data: bytes | None = None) -> Array:
    return Array(dtype, shape, stype, bytes(24) if data is None else data)


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, r"it holds 0 arrays \(\[\]\), not one 'packed'"),
        ({"w": array()}, r"it holds 1 arrays \(\['w'\]\)"),
        ({PACKED: array(), "x": array()}, r"it holds 2 arrays \(\['packed', 'x'\]\)"),
        ({PACKED: array((2, 3))}, "has shape"),
        ({PACKED: array((6, 1))}, "has shape"),
        ({PACKED: array((5,))}, "has shape"),
        ({PACKED: array((10**15,))}, "has shape"),
        ({PACKED: array(data=bytes(20))}, "has 20 bytes, 24 are due"),
        ({PACKED: array(data=bytes(28))}, "has 28 bytes, 24 are due"),
        ({PACKED: array(data=b"")}, "has 0 bytes"),
        ({PACKED: array(dtype="float64", data=bytes(48))}, "float64/medsegfed.raw, not float32"),
        ({PACKED: array(dtype=">f4")}, "not float32"),
        ({PACKED: array(dtype="object")}, "object/medsegfed.raw, not float32"),
        ({PACKED: array(stype="numpy.ndarray")}, "float32/numpy.ndarray, not"),
        ({PACKED: array(data=floats(0, 1, 2, math.nan, math.inf, -math.inf))}, "array 'w' holds 3 values that are not"),
        ({PACKED: array(data=floats(math.nan, 1, 2, 3, 4, 5))}, "array 'b' holds 1 values that are not finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(record, message) -> None:
    """Name, shape, type, byte count and finite values are all checked."""
    with pytest.raises(ContractError, match=message):
        arrays_from_wire(ArrayRecord(record), {"w": (2, 2), "b": (2,)})


def test_arrays_lie_in_the_order_of_their_names() -> None:
    """Whatever order a side keeps them in, both mean the same bytes."""
    tensors = {"w": torch.arange(4.0).reshape(2, 2), "b": torch.tensor([7.0, 8.0]), "": torch.empty(0, 3)}
    wire = arrays_to_wire(tensors)
    assert wire[PACKED].data == floats(7, 8, 0, 1, 2, 3) == arrays_to_wire(dict(reversed(tensors.items())))[PACKED].data
    back = arrays_from_wire(wire, {name: tuple(value.shape) for name, value in tensors.items()})
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_nothing_is_allocated_by_a_declared_size() -> None:
    """Twenty-four bytes that claim to be four petabytes cost nothing, even where that is the shape that is due."""
    tracemalloc.start()
    with pytest.raises(ContractError, match="24 bytes"):
        arrays_from_wire(ArrayRecord({PACKED: array((10**15,))}), {"w": (10**6, 10**9)})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw().hex()


def signed(name: str = "update", message: object = UPDATE) -> RecordDict:
    return sign(RecordDict({name: to_wire(message)}), name, KEY.sign)


def test_a_signature_holds_for_its_message_alone() -> None:
    """Good as it is; one character of the text, another kind of message, another key, no signature: refused."""
    check_signature(signed(), "update", PUBLIC)
    stranger = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    with pytest.raises(ContractError, match="not the enrolled key's"):
        check_signature(signed(), "update", stranger)
    content = signed()
    content["update"] = ConfigRecord(
        {"json": str(content.config_records["update"]["json"]).replace('"round":1', '"round":2')}
    )
    with pytest.raises(ContractError, match="not the enrolled key's"):
        check_signature(content, "update", PUBLIC)
    moved = RecordDict({"scores": signed().config_records["update"], SIGNATURE: signed().config_records[SIGNATURE]})
    with pytest.raises(ContractError, match="not the enrolled key's"):
        check_signature(moved, "scores", PUBLIC)
    with pytest.raises(ContractError, match="not signed"):
        check_signature(RecordDict({"update": to_wire(UPDATE)}), "update", PUBLIC)


@pytest.mark.parametrize("value", [b"", b"x" * 64, "text", 7])
def test_a_signature_that_is_none_is_refused(value) -> None:
    """Wrong length, wrong type, random bytes."""
    content = RecordDict({"update": to_wire(UPDATE), SIGNATURE: ConfigRecord({"ed25519": value})})
    with pytest.raises(ContractError):
        check_signature(content, "update", PUBLIC)


def test_a_virtual_site_signs_nothing() -> None:
    """Without a key the records stay as they are."""
    assert set(sign(RecordDict({"update": to_wire(UPDATE)}), "update", None)) == {"update"}


def test_another_contract_version_is_told_before_the_keys_it_brings(tiny_task) -> None:
    """A newer side's unknown fields would otherwise be what is complained about."""
    for message in (tiny_task, PRESENCE):
        text = changed(message, contract_version=3, something_new=1)
        with pytest.raises(IncompatibleVersion, match="contract version 3 meets 2 here"):
            over_the_wire(message, text)
