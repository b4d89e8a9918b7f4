"""Who tells what happens to processes goes on, whatever becomes of those who should hear it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
