"""Log files that stay bounded, and a reader that follows them.

A log is rotated by copying it aside and cutting the file that its writer holds open. The writer need not take part (no
signal, no pipe that can fill and block it, no folder that an unprivileged nginx worker must be able to enter), so one
function serves every child of the supervisor. All writers append (O_APPEND), so they go on at the new end. What is
written in the microseconds between the last copy and the cut is lost: these are logs, not the audit trail.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

KEEP = 3
BLOCK = 1 << 20
READ_BYTES = 8 << 20  # at most in one call, so that a reader's memory does not grow with the log
MAX_LINE = 64 << 10


def rotated(path: Path, age: int) -> Path:
    """Where the log of `age` rotations ago lies: gateway.log.1 is the latest."""
    return path.with_name(f"{path.name}.{age}")


def rotate_log(path: Path, max_bytes: int, keep: int = KEEP) -> bool:
    """Start `path` anew if it is larger than `max_bytes`; `keep` earlier ones stay beside it.

    A full disk costs the copy, never the bound. Returns whether it was started anew.
    """
    try:
        if path.stat().st_size <= max_bytes:
            return False
        for age in range(keep, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                if age == keep:
                    rotated(path, age).unlink()
                else:
                    rotated(path, age).rename(rotated(path, age + 1))
        with open(path, "r+b") as log:
            partial = path.with_name(f".{path.name}.partial")
            try:
                with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as copy:
                    while block := log.read(BLOCK):
                        copy.write(block)
            except OSError:
                partial.unlink(missing_ok=True)
            else:
                partial.rename(rotated(path, 1))
            log.truncate(0)
    except OSError:
        return False  # a folder that went away or became read-only: the next look tries again
    return True


class LogPosition(NamedTuple):
    """How far a log was read; plain data, fit for JSON."""

    first_line: str = ""  # hash of the file's first line: tells it from the next one of its name
    offset: int = 0  # bytes


BEGINNING = LogPosition()


@dataclass(frozen=True)
class Access:
    """One request at the gateway."""

    time: float  # when it ended, seconds since 1970
    site: str | None  # by a certificate of the federation; None: nobody it knows
    route: str | None  # push-object, ..., renew; None: none that is offered
    status: int
    received: int  # bytes, headers included
    sent: int
    seconds: float
    remote: str  # address


def read_access_log(path: Path, position: LogPosition = BEGINNING) -> tuple[list[Access], LogPosition]:
    """What was logged after `position`, and the new position; some 8 MB a call at most: call again until it is empty.

    Survives rotation (the rest of the old file comes first), a missing file, a line that is still being written (left
    for the next call) and lines that are damaged (left out).
    """
    entries: list[Access] = []
    with contextlib.ExitStack() as stack:
        for file in _files_since(path, position, stack):
            first = _first_line(file)
            if not first:
                continue
            begin = position.offset if first == position.first_line else 0
            file.seek(begin)
            data = file.read(READ_BYTES)
            whole = data.rfind(b"\n") + 1
            if not whole and len(data) == READ_BYTES:
                whole = len(data)  # no line of ours is that long: step over it
            entries.extend(entry for line in data[:whole].splitlines() if (entry := _parse(line)))
            position = LogPosition(first, begin + whole)
            if len(data) == READ_BYTES:
                break
    return entries, position


def _files_since(path: Path, position: LogPosition, stack: contextlib.ExitStack) -> list[BinaryIO]:
    """The file that `position` belongs to and all later ones, oldest first.

    Without a position the current file alone; with one that was rotated out of reach all that there are.
    """
    files: list[BinaryIO] = []
    for name in (path, *(rotated(path, age) for age in range(1, KEEP + 1))):
        with contextlib.suppress(OSError):
            files.insert(0, stack.enter_context(open(name, "rb")))  # noqa: SIM115 - the stack closes it
            if not position.first_line or _first_line(files[0]) == position.first_line:
                break
    return files


def _first_line(file: BinaryIO) -> str:
    """Hash of a file's first line, "" while it has none."""
    file.seek(0)
    line = file.readline(MAX_LINE)
    return hashlib.sha256(line).hexdigest()[:16] if line.endswith(b"\n") or len(line) == MAX_LINE else ""


def _parse(line: bytes) -> Access | None:
    try:
        found = json.loads(line)
        return Access(
            float(found["time"]), found["site"] or None, found["route"] or None, int(found["status"]),
            int(found["received"]), int(found["sent"]), float(found["seconds"]), str(found["remote"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
