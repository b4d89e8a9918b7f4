"""Checkpoints: three are kept, and no damaged or foreign one is ever used."""

from __future__ import annotations

import subprocess
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from client.contract import arrays_to_wire
from medsegdiff.errors import UserError
from medsegdiff.weights import hash_weights
from server.checkpoints import KEPT, Checkpoint, CheckpointStore

RUN = "run-1"


def checkpoint(number: int) -> Checkpoint:
    weights = {"w": torch.full((2, 3), float(number)), "b": torch.arange(3.0)}
    record = {"round": number, "model_hash": hash_weights(weights), "accepted": {"alder": {"loss": 0.25}}}
    return Checkpoint(RUN, number, weights, record)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints")
    for number in range(5):
        store.save(checkpoint(number))
    return store


def newest(store: CheckpointStore) -> Path:
    return max(store.folder.glob("*.safetensors"))


def test_the_newest_is_read_back(store) -> None:
    """Weights bit for bit, round and record."""
    found = store.latest(RUN)
    assert (found.run, found.round, found.record) == (RUN, 4, checkpoint(4).record)
    assert hash_weights(found.weights) == hash_weights(checkpoint(4).weights)


def test_three_are_kept(store) -> None:
    """The last three rounds, nothing else in the folder."""
    assert KEPT == 3
    assert sorted(p.name for p in store.folder.iterdir()) == [f"round-{n:06d}.safetensors" for n in (2, 3, 4)]


def test_an_empty_folder_has_none(tmp_path) -> None:
    """A run that has not begun is no error."""
    assert CheckpointStore(tmp_path / "nowhere").latest(RUN) is None


def test_any_flipped_bit_sends_back_to_the_round_before(store, caplog) -> None:
    """A bit in each byte of the newest file, header and weights: the round before is used, or nothing has changed."""
    path = newest(store)
    whole = path.read_bytes()
    for position in range(0, len(whole)):
        spoiled = bytearray(whole)
        spoiled[position] ^= 1 << (position % 8)
        path.write_bytes(spoiled)
        found = store.latest(RUN)
        assert (found.round, found.record) in ((3, checkpoint(3).record), (4, checkpoint(4).record)), position
        assert hash_weights(found.weights) == hash_weights(checkpoint(found.round).weights)
        if position >= len(whole) - 36:  # the weights themselves
            assert found.round == 3, position
    assert "The round before it is used." in caplog.text


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_torn_file_sends_back_to_the_round_before(store, keep) -> None:
    """Cut at the start, inside the header, inside the weights."""
    path = newest(store)
    path.write_bytes(path.read_bytes()[:keep])
    assert store.latest(RUN).round == 3


def test_a_file_under_another_rounds_name_is_not_that_round(store) -> None:
    """Copying round 3 over round 4 does not make it round 4."""
    newest(store).write_bytes((store.folder / "round-000003.safetensors").read_bytes())
    assert store.latest(RUN).round == 3


def test_none_good_is_an_error(store) -> None:
    """All torn: the run says so instead of starting at round 0 again."""
    for path in store.folder.glob("*.safetensors"):
        path.write_bytes(b"torn")
    with pytest.raises(UserError, match="none of its 3 checkpoints can be used"):
        store.latest(RUN)


def test_another_runs_checkpoints_are_not_used(store) -> None:
    """A changed plan has another run id."""
    with pytest.raises(UserError, match="none of its 3 checkpoints can be used"):
        store.latest("run-2")


def test_a_full_disk_keeps_the_rounds_there_are(store, monkeypatch) -> None:
    """The commit fails in one line; the last round is still the newest."""

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", refuse)
        with pytest.raises(UserError, match=r"could not be written .No space left"):
            store.save(checkpoint(5))
    assert store.latest(RUN).round == 4
    assert len(list(store.folder.iterdir())) == 3


def with_memory(number: int) -> Checkpoint:
    memory = {part: {"w": torch.full((2, 3), value), "b": torch.zeros(3)} for part, value in (("m", 0.5), ("v", 2.0))}
    return replace(checkpoint(number), state=memory)


def test_the_optimizers_memory_is_read_back_with_its_round(store) -> None:
    """Part by part, bit for bit; rounds without one, as older versions wrote them, have none."""
    assert store.latest(RUN).state == {}
    store.save(with_memory(5))
    found = store.latest(RUN)
    assert {part: sorted(tensors) for part, tensors in found.state.items()} == {"m": ["b", "w"], "v": ["b", "w"]}
    assert hash_weights(found.weights) == hash_weights(checkpoint(5).weights)
    for part, tensors in with_memory(5).state.items():
        assert hash_weights(found.state[part]) == hash_weights(tensors)


def test_no_flipped_bit_of_the_memory_goes_unnoticed(store) -> None:
    """A bit in each byte of a round with memory: the round before is used, or nothing has changed."""
    store.save(with_memory(5))
    path = newest(store)
    whole = path.read_bytes()
    for position in range(len(whole)):
        spoiled = bytearray(whole)
        spoiled[position] ^= 1 << (position % 8)
        path.write_bytes(spoiled)
        found = store.latest(RUN)
        if found.round == 5:
            assert hash_weights(found.weights) == hash_weights(checkpoint(5).weights), position
            assert {p: hash_weights(t) for p, t in found.state.items()} == {
                p: hash_weights(t) for p, t in with_memory(5).state.items()
            }, position
        else:
            assert found.round == 4


def test_the_best_round_is_put_aside(store, caplog) -> None:
    """It outlives the three that are kept; another takes its place; damaged, or of another run, there is none."""
    assert store.best(RUN) is None
    store.keep(3)
    for number in (5, 6, 7):
        store.save(checkpoint(number))
    assert (store.best(RUN).round, store.best(RUN).record) == (3, checkpoint(3).record)
    assert store.latest(RUN).round == 7
    store.keep(7)
    assert store.best(RUN).round == 7
    assert store.best("run-2") is None
    path = store.folder / "best.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert store.best(RUN) is None
    assert "best.safetensors" in caplog.text


@pytest.mark.parametrize("part", ["", "m", "v"])
def test_what_travels_is_read_as_it_travels(store, part) -> None:
    """Model or memory, packed as `arrays_to_wire` packs their tensors; never under another hash."""
    store.save(with_memory(5))
    tensors = with_memory(5).state[part] if part else checkpoint(5).weights
    told = store.latest(RUN).told
    assert store.packed(told, hash_weights(tensors), part) == arrays_to_wire(tensors)["packed"].data
    with pytest.raises(UserError, match="do not have the hash"):
        store.packed(told, hash_weights(checkpoint(4).weights), part)


def test_nothing_that_was_changed_on_the_disk_travels(store) -> None:
    """A bit in each byte, and a file cut anywhere: an error of the disk, or the very bytes."""
    told, identity = store.latest(RUN).told, hash_weights(checkpoint(4).weights)
    whole, due = newest(store).read_bytes(), store.packed(store.latest(RUN).told, hash_weights(checkpoint(4).weights))
    causes = set()
    spoiled = [whole[:n] for n in range(len(whole))]
    spoiled += [whole[:n] + bytes([whole[n] ^ 1 << n % 8]) + whole[n + 1 :] for n in range(len(whole))]
    for data in spoiled:
        newest(store).write_bytes(data)
        try:
            found = store.packed(told, identity)
        except UserError as error:
            causes.add(type(error.__cause__))
        else:
            assert found == due
    assert causes == {OSError}


def test_a_model_that_travels_is_in_memory_once(store) -> None:
    """8 MiB read at the cost of little more; as tensors beside their bytes it would be twice that."""
    weights = {f"w{n}": torch.randn(2**18) for n in range(8)}
    store.save(Checkpoint(RUN, 5, weights, {"round": 5}, {"m": {"w": torch.randn(2**20)}}))
    told, identity = store.latest(RUN).told, hash_weights(weights)
    tracemalloc.start()
    try:
        found = store.packed(told, identity)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == 2**23
    assert peak < 1.7 * 2**23


def test_what_a_kill_left_half_written_goes_with_the_next_commit(tmp_path: Path) -> None:
    """Each is as large as the model; a process that is writing keeps its own."""
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(checkpoint(1))
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = store.folder / f".round-000002.safetensors.{dead.pid}.partial"
    living = store.folder / ".round-000002.safetensors.1.partial"
    for path in (left, living):
        path.write_bytes(b"half")
    store.save(checkpoint(2))
    assert not left.exists()
    assert living.exists()
