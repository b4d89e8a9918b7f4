"""Who tells what happens to processes goes on, whatever becomes of those who should hear it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy import processes
from deploy.processes import teller


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_terminal_that_is_gone_ends_nobody(tmp_path: Path) -> None:
    """A full disk behind standard output, a pipe without a reader: the journal has it all the same."""

    def full(event: str, facts: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    tell = teller(tmp_path / "supervisor.jsonl", full)
    tell("ready", {"child": "gateway"})
    tell("trouble", {"reason": "x"})
    assert [line["event"] for line in lines(tmp_path / "supervisor.jsonl")] == ["ready", "trouble"]


def test_a_damaged_journal_is_kept_aside(tmp_path: Path) -> None:
    """Nothing depends on it: server and site start with a new one, and say so."""
    path = tmp_path / "supervisor.jsonl"
    path.write_text('{"event": "ready", "time": 1.0}\nbroken\n{"event": "ready", "time": 2.0}\n')
    before, heard = path.read_text(), []
    tell = teller(path, lambda event, facts: heard.append((event, facts)))
    tell("ready", {})
    assert [line["event"] for line in lines(path)] == ["journal_damaged", "ready"]
    kept = tmp_path / lines(path)[0]["kept"]
    assert kept.read_text() == before
    assert heard[0][0] == "journal_damaged"
    assert "line 2" in heard[0][1]["reason"]


def test_a_long_journal_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part before is kept, the one before that is not; a disk that refuses the change loses no event."""
    monkeypatch.setattr(processes, "MOST_EVENTS", 3)
    path = tmp_path / "supervisor.jsonl"
    tell = teller(path, lambda *_: None)
    for number in range(7):
        tell("ready", {"number": number})
    assert [line["number"] for line in lines(path)] == [6]
    assert [line["number"] for line in lines(tmp_path / "supervisor.jsonl.1")] == [3, 4, 5]
    (tmp_path / "supervisor.jsonl.1").unlink()
    (tmp_path / "supervisor.jsonl.1").mkdir()
    for number in range(7, 11):
        tell("ready", {"number": number})
    assert [line["number"] for line in lines(path)] == [6, 7, 8, 9, 10]
