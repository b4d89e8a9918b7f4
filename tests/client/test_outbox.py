"""The outbox: the same question, the same bytes, until the server has shown that it committed the round."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict

from client.contract import Assignment, Update, array_bytes, check_signature
from client.encoding import Compression
from client.feedback import pack
from client.gate import release_update
from client.outbox import MOST_RUNS, Outbox
from medsegdiff.errors import UserError
from medsegdiff.weights import hash_weights, weight_shapes

KEY = Ed25519PrivateKey.generate()
BASE = {"w": torch.ones(2, 3), "b": torch.ones(3)}


def answer(round_: int, run: str = "run-1") -> tuple[Update, dict[str, torch.Tensor], RecordDict]:
    delta = {name: torch.full_like(value, 0.1 * round_) for name, value in BASE.items()}
    update = Update("alder", run, round_, "a" * 64, 3, 2, 0.5, 1.25, hash_weights(delta))
    return update, delta, release_update(update, delta, BASE, KEY.sign)


def wire(content: RecordDict) -> bytes:
    """All that crosses the network of a reply."""
    arrays = content.array_records["delta"]
    return b"|".join(
        [str(content.config_records["update"]["json"]).encode(), bytes(content.config_records["signature"]["ed25519"])]
        + [name.encode() + arrays[name].data for name in sorted(arrays)]
    )


def test_a_kept_update_is_the_one_that_was_sent(tmp_path: Path) -> None:
    """Text, signature and arrays byte for byte, in a new process as well."""
    sent = answer(2)
    Outbox(tmp_path).keep(*sent)
    update, content = Outbox(tmp_path).find(Assignment("run-1", 2, "a" * 64))
    assert update == sent[0]
    assert wire(content) == wire(sent[2])
    check_signature(content, "update", KEY.public_key().public_bytes_raw().hex())


def test_rounds_are_forgotten_when_they_were_committed(tmp_path: Path) -> None:
    """Round 3 asked for: 1 and 2 go, 3 stays; another run's stay."""
    outbox = Outbox(tmp_path)
    for round_ in (1, 2, 3):
        outbox.keep(*answer(round_))
    outbox.keep(*answer(1, "run-2"))
    outbox.forget("run-1", 2)
    kept = [outbox.find(Assignment(run, r, "a" * 64)) is not None for run, r in (
        ("run-1", 1), ("run-1", 2), ("run-1", 3), ("run-2", 1))]  # fmt: skip
    assert kept == [False, False, True, True]
    assert (outbox.trainings("run-1"), outbox.trainings("run-2"), outbox.trainings("run-3")) == (3, 1, 0)
    assert [outbox.base_of("run-1", round_) for round_ in (1, 3, 4)] == ["a" * 64, "a" * 64, None]


def test_of_old_runs_the_lists_alone_are_kept(tmp_path: Path) -> None:
    """The run that was worked on longest ago loses its updates once there are too many; its trainings still count."""
    outbox = Outbox(tmp_path)
    for number in range(MOST_RUNS):
        outbox.keep(*answer(1, f"run-{number}"))
        os.utime(tmp_path / f"run-{number}", (number, number))
    outbox.keep(*answer(2, "run-0"))  # an old run that is still at work
    outbox.keep(*answer(1, "new"))
    assert outbox.find(Assignment("run-1", 1, "a" * 64)) is None
    assert (outbox.trainings("run-1"), outbox.base_of("run-1", 1)) == (1, "a" * 64)
    for run in ("run-0", "run-2", "new"):
        assert outbox.find(Assignment(run, 1, "a" * 64)) is not None


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_update_is_no_answer(tmp_path: Path, damage: str) -> None:
    """It is trained anew instead of being sent with a hash that does not fit."""
    outbox = Outbox(tmp_path)
    outbox.keep(*answer(1))
    path = tmp_path / "run-1" / "round-000001.safetensors"
    raw = path.read_bytes()
    path.write_bytes({"cut": raw[:-5], "flipped": raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:], "empty": b""}[damage])
    assert outbox.find(Assignment("run-1", 1, "a" * 64)) is None


def test_a_training_that_a_kill_kept_from_the_list_is_entered(tmp_path: Path, monkeypatch) -> None:
    """Killed between the two writes: the next process knows the round's base model, counts the training, once, and
    answers with the bytes that were kept."""
    sent = answer(1)
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "_enter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Outbox(tmp_path).keep(*sent)
    outbox = Outbox(tmp_path)
    assert outbox.trainings("run-1") == 0
    assert [outbox.base_of("run-1", 1) for _ in range(2)] == ["a" * 64] * 2
    assert outbox.trainings("run-1") == 1
    found = outbox.find(Assignment("run-1", 1, "a" * 64))
    assert found is not None
    assert wire(found[1]) == wire(sent[2])
    assert outbox.base_of("run-1", 2) is None


def test_a_damaged_update_is_not_entered(tmp_path: Path) -> None:
    """Nothing is known of it: the round is trained anew, from whatever model."""
    outbox = Outbox(tmp_path)
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1" / "round-000001.safetensors").write_bytes(b"torn")
    assert outbox.base_of("run-1", 1) is None
    assert outbox.trainings("run-1") == 0


@pytest.mark.parametrize("text", ["many", "1 abc\n", "2", "1 " + "a" * 64 + " x\n"])
def test_an_unreadable_list_stops_the_training(tmp_path: Path, text: str) -> None:
    """It bounds how often a server may have the site train: fail closed, and say what to do."""
    outbox = Outbox(tmp_path)
    outbox.keep(*answer(1))
    (tmp_path / "run-1" / "trainings").write_text(text)
    with pytest.raises(UserError, match="nothing is trained"):
        outbox.trainings("run-1")


@pytest.mark.parametrize("compression", [Compression("bf16"), Compression("int8"), Compression("top_k", 0.1)], ids=str)
def test_a_compressed_update_is_kept_as_it_was_sent(tmp_path: Path, tiny_task, compression) -> None:
    """The same bytes again; a bit that turned is noticed, and so is a task that asks for another compression."""
    task = replace(tiny_task, compression=compression)
    generator = torch.Generator().manual_seed(0)
    shapes = weight_shapes(task.model)
    delta = {name: 1e-2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    packed = pack(Update("alder", "run-1", 2, "a" * 64, 3, 2, 0.5, 1.25, "0" * 64), delta, compression)
    content = release_update(packed.update, packed.sent, delta, KEY.sign, compression, packed.arrays)
    outbox, asked = Outbox(tmp_path), Assignment("run-1", 2, "a" * 64)
    outbox.keep(packed.update, packed.sent, content)
    found = outbox.find(asked, task)
    assert found is not None
    assert (found[0], wire(found[1])) == (packed.update, wire(content))
    (path,) = tmp_path.glob("run-1/round-*.safetensors")
    assert path.stat().st_size < array_bytes(packed.arrays) + 1000
    assert outbox.find(asked, tiny_task) is None
    spoiled = bytearray(path.read_bytes())
    spoiled[-100] ^= 1
    path.write_bytes(spoiled)
    assert outbox.find(asked, task) is None
