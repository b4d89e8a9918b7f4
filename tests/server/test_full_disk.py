"""A disk that refuses in the middle of a run: what is committed stays, and the run goes on once there is space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_sites import run
from full_disk import file_limit

from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from server import app as server_app
from server.checkpoints import Checkpoint, CheckpointStore
from server.journal import Journal, read_events
from server.rounds import ENDED, run_state, working_seconds

SMALL = 20_000  # bytes: a journal fits, a checkpoint does not


def test_a_run_goes_on_from_the_last_committed_round(make_run) -> None:
    """The disk fills while round 2 is asked: round 1 stands, bytes and all; with space the same model comes out."""
    whole, folder = make_run("whole"), make_run("full")
    run(whole)
    run_until_full(folder)
    kept = {path.name: path.read_bytes() for path in sorted((folder / "checkpoints").iterdir())}
    assert sorted(kept) == ["round-000000.safetensors", "round-000001.safetensors"]
    assert [event["round"] for event in rounds(folder)] == [0, 1]
    run(folder)
    assert (folder / "checkpoints" / "round-000001.safetensors").read_bytes() == kept["round-000001.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [event["round"] for event in rounds(folder)] == [0, 1, 2]


def run_until_full(folder: Path) -> None:
    """Run, and let no file grow once round 2 is to be committed."""
    save = CheckpointStore.save

    def refused(store: CheckpointStore, checkpoint: Checkpoint) -> None:
        with file_limit(SMALL if checkpoint.round == 2 else 10_000_000):
            save(store, checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStore, "save", refused)
        with pytest.raises(UserError, match="Free space"):
            run(folder)


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(folder / "journal.jsonl") if event["event"] == "round"]


class Members:
    """A membership that notes nothing."""

    def note(self, event: str, **fields: Any) -> None: ...


@pytest.mark.parametrize("full", [True, False])
def test_a_full_disk_interrupts_a_run_and_does_not_end_it(make_run, monkeypatch, full) -> None:
    """The keeper starts it anew until there is space; any other fault is the run's end."""
    folder = make_run()

    def carry_out(*_: object) -> str:
        if full:
            with file_limit(10):
                write_atomic(folder / "checkpoints" / "c", bytes(100))
        raise UserError("fewer usable updates than the quorum.")

    monkeypatch.setattr(server_app, "_carry_out", carry_out)
    monkeypatch.setattr(server_app.Membership, "here", Members)
    with pytest.raises(UserError):
        server_app.run_federation(None, folder)  # type: ignore[arg-type]  # the grid is not reached
    events = read_events(folder / "journal.jsonl")
    assert events[-1]["event"] == ("interrupted" if full else "failed")
    assert (run_state(events) in ENDED) is not full
    assert working_seconds(events, now=events[-1]["time"] + 1000) < (500 if full else 2000)


def test_a_journal_that_is_full_keeps_the_run_wanted(make_run, monkeypatch) -> None:
    """Not even the word `interrupted` fits: the error is the disk's, and the journal is whole."""
    folder = make_run()
    journal = Journal(folder / "journal.jsonl")
    journal.append("session")
    before = (folder / "journal.jsonl").read_bytes()
    monkeypatch.setattr(server_app.Membership, "here", Members)
    with file_limit(len(before) + 5), pytest.raises(UserError, match="Free space"):
        server_app.run_federation(None, folder)  # type: ignore[arg-type]
    assert (folder / "journal.jsonl").read_bytes() == before
