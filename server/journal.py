"""journal.jsonl: what happened in a run, one event a line, in order.

A line is flushed to the disk before the run goes on. A kill in the middle of a line leaves a torn tail, which the next
start cuts off; damage anywhere else is an error.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

from medsegdiff.errors import UserError

Event = dict[str, Any]


class Journal:
    """Append-only event log of one run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[Event] = self._read()

    def append(self, event: str, **fields: Any) -> None:
        """Add one event. Raises UserError when the disk refuses it; the journal is then as it was."""
        line = {"event": event, "time": round(time.time(), 3), **fields}
        data = (json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n").encode()
        size: int | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as handle:
                size = os.fstat(handle.fileno()).st_size
                if handle.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle.fileno())
        except OSError as error:
            if size is not None:  # half a line would spoil the next one
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            raise UserError(
                f"{self.path}: an event could not be written ({error.strerror}); the run stops so that nothing happens "
                "unrecorded. Free space, then go on with --resume."
            ) from error
        self.events.append(line)

    def last(self, event: str, **match: Any) -> Event | None:
        """The latest event of a kind whose fields match, if any."""
        for line in reversed(self.events):
            if line["event"] == event and all(line.get(key) == value for key, value in match.items()):
                return line
        return None

    def _read(self) -> list[Event]:
        if not self.path.exists():
            return []
        raw = self.path.read_bytes()
        events, good = _parse(self.path, raw)
        if good < len(raw):
            with open(self.path, "r+b") as handle:
                handle.truncate(good)
        return events


def read_events(path: Path) -> list[Event]:
    """The events of a journal that another process may be writing: the file is never touched.

    A line that is not whole yet is left out; it will be there at the next look. No file, no events.

    Raises:
        UserError: the journal is damaged elsewhere than at its end, or cannot be read.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). Check its owner and mode.") from error
    return _parse(path, raw)[0]


def _parse(path: Path, raw: bytes) -> tuple[list[Event], int]:
    """The events, and the number of bytes that hold them; what follows is the torn tail of a killed append."""
    lines = raw.split(b"\n")
    whole, tail = lines[:-1], lines[-1]
    events = []
    for number, line in enumerate(whole, start=1):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or "event" not in event:
                raise ValueError("no event")
            events.append(event)
        except ValueError as error:
            if number == len(whole) and not tail:
                tail = line + b"\n"  # a torn block may end in a line break as well
                break
            raise UserError(
                f"{path}: line {number} of {len(whole)} is not a journal entry; the file was changed from "
                "outside. Restore it from a backup, or start the run in another folder."
            ) from error
    return events, len(raw) - len(tail)
