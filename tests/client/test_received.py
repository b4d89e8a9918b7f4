"""The model that was scored last: one a run, read by its hash, and no matter of life and death."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from client.received import MOST_RUNS, Received
from medsegdiff.weights import hash_weights


def model(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3, 4), value), "b": torch.arange(4.0).reshape(2, 2).T}


def test_one_model_a_run_is_kept(tmp_path: Path) -> None:
    """Bit for bit, in a new process as well; the next one takes its place; another run's stays."""
    one, two = model(0.1), model(0.2)
    for run, weights in (("run-1", one), ("run-2", one), ("run-1", two)):
        Received(tmp_path).keep(run, hash_weights(weights), weights)
    found = Received(tmp_path).find("run-1", hash_weights(two))
    assert found is not None
    assert hash_weights(found) == hash_weights(two)
    assert Received(tmp_path).find("run-1", hash_weights(one)) is None
    assert Received(tmp_path).find("run-2", hash_weights(one)) is not None
    assert len(list(tmp_path.glob("run-1/*"))) == 1


def test_a_damaged_file_is_none(tmp_path: Path) -> None:
    """A bit that turned, half a file, another model under the name: gone, and to be sent again."""
    weights = model(0.1)
    name = hash_weights(weights)
    path = tmp_path / "run-1" / f"{name}.safetensors"
    for spoil in (
        lambda: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
        lambda: path.write_bytes(path.read_bytes()[:40]),
        lambda: path.write_bytes(b""),
    ):
        Received(tmp_path).keep("run-1", name, weights)
        assert Received(tmp_path).find("run-1", name) is not None
        spoil()
        assert Received(tmp_path).find("run-1", name) is None
        assert not path.exists()


def test_what_is_over_is_let_go(tmp_path: Path) -> None:
    """A run that ended, and of runs that never did all but the last few."""
    received, weights = Received(tmp_path), model(0.1)
    name = hash_weights(weights)
    for number in range(6):
        received.keep(f"run-{number}", name, weights)
        os.utime(tmp_path / f"run-{number}", (number, number))
    received.keep("run-6", name, weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-4", "run-5", "run-6"]
    assert MOST_RUNS == 3
    received.forget("run-5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-4", "run-6"]


def test_a_run_cannot_name_another_place(tmp_path: Path) -> None:
    """Names that leave the folder are neither written, read nor deleted."""
    received, weights = Received(tmp_path / "in"), model(0.1)
    (tmp_path / "out").mkdir()
    for run in ("../out", "..", "/etc", "a/b", ""):
        received.keep(run, hash_weights(weights), weights)
        received.forget(run)
        assert received.find(run, hash_weights(weights)) is None
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_a_disk_that_refuses_is_no_fault(tmp_path: Path, caplog) -> None:
    """The model is scored all the same; it comes again, and the log says why."""
    (tmp_path / "received").write_text("in the way")
    weights = model(0.1)
    Received(tmp_path / "received").keep("run-1", hash_weights(weights), weights)
    assert "has to be sent again" in caplog.text
    assert Received(tmp_path / "received").find("run-1", hash_weights(weights)) is None
