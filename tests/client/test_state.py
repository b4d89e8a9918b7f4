"""What was left out is added to the next change exactly when the update it was left out of has counted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from client import state as module
from client.contract import Assignment
from client.state import SiteState
from medsegdiff.errors import UserError


def left(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2, 3), value), "b": torch.full((3,), -value)}


def asked(round_: int, *counted: str, run: str = "run-1") -> Assignment:
    return Assignment(run, round_, "a" * 64, counted)


def name(round_: int, kind: str = "0") -> str:
    """Hash of a round's update."""
    return f"{round_:x}".rjust(64, kind)


def value(found: dict[str, torch.Tensor]) -> float:
    return float(found["w"][0, 0]) if found else 0.0


def files(folder: Path) -> list[int]:
    return sorted(int(path.name[6:12]) for path in folder.glob("run-1/*"))


def test_the_residual_is_the_last_counted_updates(tmp_path: Path) -> None:
    """Round 2 was rejected, 3 counted, others' hashes between: each round begins with what its last one left."""
    other = "f" * 64
    assert SiteState(tmp_path).find(asked(1)) == {}
    SiteState(tmp_path).keep(asked(1), name(1), left(1.0))
    assert value(SiteState(tmp_path).find(asked(2, other))) == 0.0  # not counted yet
    assert value(SiteState(tmp_path).find(asked(2, other, name(1)))) == 1.0
    SiteState(tmp_path).keep(asked(2, other, name(1)), name(2), left(2.0))
    assert value(SiteState(tmp_path).find(asked(3, name(1), other))) == 1.0  # round 2 did not count
    SiteState(tmp_path).keep(asked(3, name(1), other), name(3), left(3.0))
    assert value(SiteState(tmp_path).find(asked(4, name(3)))) == 3.0
    assert value(SiteState(tmp_path).find(asked(3, name(3)))) == 0.0  # a round does not begin with its own
    assert SiteState(tmp_path).find(asked(4, name(3), run="run-2")) == {}


def test_a_round_that_is_asked_for_again_begins_as_it_began(tmp_path: Path) -> None:
    """A server that lost its two newest checkpoints names what counted before them."""
    kept = SiteState(tmp_path)
    for round_ in range(1, 6):
        kept.keep(asked(round_, name(round_ - 1)), name(round_), left(float(round_)))
    assert files(tmp_path) == [2, 3, 4, 5]
    for round_ in (6, 5, 4, 3):
        assert value(SiteState(tmp_path).find(asked(round_, name(round_ - 1)))) == round_ - 1


def test_updates_that_did_not_count_are_let_go(tmp_path: Path) -> None:
    """A site that is rejected every time keeps two models, not one a round."""
    kept = SiteState(tmp_path)
    kept.keep(asked(1), name(1), left(1.0))
    for round_ in range(2, 9):
        kept.keep(asked(round_, name(1)), name(round_, "e"), left(9.0))
    assert files(tmp_path) == [1, 8]
    assert value(kept.find(asked(9, name(1)))) == 1.0
    kept.forget("run-1")
    assert not (tmp_path / "run-1").exists()


def test_of_many_runs_the_last_are_kept(tmp_path: Path, monkeypatch) -> None:
    """Runs that ended early leave something behind, but not for ever."""
    monkeypatch.setattr(module, "MOST_RUNS", 2)
    for number in range(4):
        SiteState(tmp_path).keep(asked(1, run=f"run-{number}"), name(1), left(1.0))
        stamp = 1000.0 + number
        os.utime(tmp_path / f"run-{number}", (stamp, stamp))
    assert len(list(tmp_path.iterdir())) <= 3
    assert (tmp_path / "run-3").exists()


def test_a_damaged_residual_is_told_and_not_used(tmp_path: Path, caplog) -> None:
    """A bit that turned, half a file: the round is trained without it."""
    for spoil in (lambda raw: raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:], lambda raw: raw[:50]):
        SiteState(tmp_path).keep(asked(1), name(1), left(1.0))
        (path,) = tmp_path.glob("run-1/*")
        path.write_bytes(spoil(path.read_bytes()))
        caplog.clear()
        assert SiteState(tmp_path).find(asked(2, name(1))) == {}
        assert "damaged, and lost" in caplog.text


def test_what_cannot_be_written_is_not_sent(tmp_path: Path) -> None:
    """The disk refuses, or the run's name would leave the folder."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="could not be written"):
        SiteState(tmp_path / "file").keep(asked(1), name(1), left(1.0))
    for run in ("../out", "a/b", ""):
        with pytest.raises(UserError, match="no name of a run"):
            SiteState(tmp_path).keep(asked(1, run=run), name(1), left(1.0))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_the_site_can_read_it(tmp_path: Path) -> None:
    """It is of the patients, as an update is, and has not left."""
    SiteState(tmp_path).keep(asked(1), name(1), left(1.0))
    (path,) = tmp_path.glob("run-1/*")
    assert path.stat().st_mode & 0o077 == 0
