"""A log to which entries are added and from which none can be taken without its showing.

**Format.** One JSON object a line, ASCII, in this order: `n` (1, 2, ...), `time` (UTC), `event`, the event's own
fields, `prev` (hash of the line before; 64 zeros in the first), `hash`: the SHA-256 of the line's own bytes up to, and
without, `,"hash":`. So each line fixes all lines before it, and an auditor needs no more than `sha256sum` to check one.
Beside the log lies `NAME.head`: how many lines and bytes are committed, and the last hash. `verify_log` sees any change
of a byte: inside a line by its hash, of whole lines by `n` and `prev`, at the end by the head file.

**Order of writing**, under an exclusive lock of the log file: the line, fsync, then the head file (written beside,
fsync, renamed). An entry counts once the head file knows it, and `append` returns only then. The head file therefore
never knows more than the log holds, and a log that is shorter than its head file says was cut. A killed append leaves
bytes behind the committed ones. The next append mends that:

- one whole line that continues the chain: the kill came before the head file was renamed; the line is kept;
- anything else, up to a line's length and with no whole line in it: the kill came within the write; the bytes are cut
  off, and an event `log_mended` with their number tells so;
- another whole line, or more than one: no kill leaves that (an append begins only when the head file knows all lines),
  an older head file was put back; nothing is mended or appended.

Until then `verify_log` reports the tail as a fault, for it cannot tell a kill from an addition by hand.

**What it cannot prove.** Who can write both files can write another history, or put older copies of both back. Against
that a head has to be known elsewhere: the other side of a federation, a mail, a sheet of paper. `verify_log` takes
such a head as `anchor` and demands that it occurs in the chain.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic

AUDIT_LOG = "audit.jsonl"  # how either end of a federation calls its own
GENESIS = "0" * 64  # the hash before the first line
MAX_LINE = 65_536  # bytes of a line: what a killed append may leave, and what a reader has to hold at once
_TAIL = len(',"hash":""}') + 64
_RESERVED = frozenset({"n", "time", "event", "prev", "hash"})
_HEX = re.compile(r"[0-9a-f]{64}")


class LogDamaged(UserError):
    """A log that is not as it was written, or whose head file is not."""


@dataclass(frozen=True)
class Verified:
    """A log whose every line is as it was written."""

    lines: int
    head: str  # hex SHA-256 of the last line; 64 zeros of an empty log
    first: str | None = None  # time of the first line, UTC
    last: str | None = None


@dataclass(frozen=True)
class _Head:
    """The head file: what of the log is committed."""

    count: int = 0
    head: str = GENESIS
    bytes: int = 0


class ChainedLog:
    """The log at `path`, begun by the first append. Any number of processes and threads may append to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def head(self) -> str:
        """Hash of the last committed line, as the head file says; 64 zeros before the first. Nothing is verified."""
        return (_read_head(self.path) or _Head()).head

    @property
    def length(self) -> int:
        """Number of committed lines, as the head file says. Nothing is verified."""
        return (_read_head(self.path) or _Head()).count

    def append(self, event: str, **fields: Any) -> str:
        """Add one entry and flush it to the disk; returns the new head. Reads no more than the last line.

        Raises:
            UserError: the disk refuses (log and head stay as they were), the entry is longer than 64 KiB, or the end of
                the log is not what the head file says.
            ValueError: a field has a reserved name or holds what JSON has not.
        """
        _check_names(fields)
        with _open(self.path) as descriptor:
            head = _ready(self.path, descriptor)
            return _add(self.path, descriptor, head, event, fields).head

    def check(self) -> None:
        """Whether an entry could be added; what a killed append left is mended. Raises UserError as `append`."""
        with _open(self.path) as descriptor:
            _ready(self.path, descriptor)

    @contextmanager
    def held(self) -> Iterator[HeldLog]:
        """The log for this process and thread alone until the block ends: read, decide, append, nobody in between.

        What a killed append left is mended first.

        Raises:
            UserError: as `append`.
        """
        with _open(self.path) as descriptor:
            yield HeldLog(self.path, descriptor, _ready(self.path, descriptor))


class HeldLog:
    """A log under its exclusive lock; made by `ChainedLog.held`."""

    def __init__(self, path: Path, descriptor: int, head: _Head) -> None:
        self.path, self._descriptor, self._head = path, descriptor, head

    @property
    def head(self) -> str:
        return self._head.head

    @property
    def length(self) -> int:
        """Number of lines."""
        return self._head.count

    def entries(self) -> list[dict[str, Any]]:
        """All entries, each line verified. Raises UserError as `verify_log`."""
        walk = _Walk(keep=True)
        walk.run(self.path, lock=False)  # this process holds it
        return walk.entries

    def append(self, event: str, **fields: Any) -> str:
        """As `ChainedLog.append`."""
        _check_names(fields)
        self._head = _add(self.path, self._descriptor, self._head, event, fields)
        return self._head.head


def verified_entries(path: Path) -> list[dict[str, Any]]:
    """All entries, each line verified, while nobody appends; none where there is no log yet. Writes nothing.

    A killed append is read as the next one will mend it: a whole line that continues the chain counts, others do not.

    Raises:
        UserError: as `verify_log`.
    """
    if _read_head(path) is None and (not path.exists() or path.stat().st_size == 0):
        return []
    walk = _Walk(keep=True)
    walk.run(path)
    return walk.entries


def legible_entries(path: Path) -> list[dict[str, Any]]:
    """Of a log that is not sound: the entries whose own bytes are as they were written, wherever they stand now.

    Raises:
        UserError: the file cannot be read; a missing one has no entries.
    """
    if not path.exists():
        return []
    with _reading(path, lock=False) as handle:
        return [entry for line in handle.read().splitlines(keepends=True) if (entry := _own(line)) is not None]


def verify_log(path: Path, anchor: str | None = None) -> Verified:
    """Check every line of a log against its successor and the head file. Streams; holds one line at a time.

    Args:
        anchor: a head that was noted elsewhere; it has to occur in the chain.

    Raises:
        UserError: names the first line that is not as it was written, or what else is wrong.
    """
    walk = _Walk()
    walk.run(path, anchor)
    return walk.seen


def audit_report(path: Path, anchor: str | None = None) -> tuple[bool, list[str]]:
    """Whether the log is sound, and lines for a person: counts, times, head, and OK or the fault.

    Raises:
        UserError: `anchor` is no head, or the file cannot be read: that says nothing of the log.
    """
    walk = _Walk()
    try:
        walk.run(path, anchor)
        verdict = "OK: no line was changed, removed, added or moved" + (
            "; the head noted elsewhere is among them." if anchor else "."
        )
    except LogDamaged as error:
        verdict = f"FAULT: {error}"
    seen, sound = walk.seen, "" if verdict.startswith("OK") else " sound ones before the fault"
    lines = [f"log         {path}", f"lines       {seen.lines:,}{sound}"]
    if seen.lines:
        lines += [f"first       {seen.first}", f"last        {seen.last}", f"head        {seen.head}"]
    return not sound, [*lines, verdict]


def audit_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The entries as they stand, in order; none where there is no log yet. Nothing is verified.

    Raises:
        UserError: a line is no JSON object, or the file cannot be read.
    """
    head = _read_head(path)
    if head is None and not path.exists():
        return
    left = path.stat().st_size if head is None else head.bytes
    with _reading(path, lock=False) as handle:  # committed bytes do not change; a lock would stop a reader that appends
        number = 0
        while left > 0 and (line := handle.readline(MAX_LINE + 1)):
            number, left = number + 1, left - len(line)
            try:
                yield _entry(line)
            except ValueError as error:
                raise _fault(path, number, str(error)) from error


class _Walk:
    """One verification; `seen` holds what was found sound so far.

    Args:
        keep: keep the entries, and take what a killed append left as the next append would mend it.
    """

    def __init__(self, keep: bool = False) -> None:
        self.seen = Verified(0, GENESIS)
        self.keep = keep
        self.entries: list[dict[str, Any]] = []

    def run(self, path: Path, anchor: str | None = None, lock: bool = True) -> None:
        anchor = anchor and anchor.strip().lower()
        if anchor is not None and not _HEX.fullmatch(anchor):
            raise UserError(f"{anchor[:80]!r} is no head of a log: 64 hexadecimal digits are. Copy it anew.")
        with _reading(path, lock) as handle:
            committed = _read_head(path)
            if committed is None:
                raise _headless(path)
            size, anchored = 0, anchor in (None, GENESIS)
            while self.seen.lines < committed.count and (line := handle.readline(MAX_LINE + 1)):
                self._take(path, line, committed)
                size += len(line)
                anchored = anchored or self.seen.head == anchor
            self._check_end(path, committed, size, handle.read(MAX_LINE + 1))
        if not anchored:
            raise LogDamaged(
                f"{path}: the head {anchor} that was noted elsewhere occurs in none of the {self.seen.lines:,} lines: "
                "log and head file were replaced together, or older copies of both put back. Keep both files as "
                "evidence and ask who had access."
            )

    def _take(self, path: Path, line: bytes, committed: _Head) -> None:
        number = self.seen.lines + 1
        if not line.endswith(b"\n"):
            cut = f"it breaks off, and the head file knows {committed.count:,} whole lines"
            raise _fault(path, number, cut if len(line) <= MAX_LINE else f"it is longer than {MAX_LINE:,} bytes")
        try:
            entry = _parse(line, number, self.seen.head)
        except ValueError as error:
            raise _fault(path, number, str(error)) from error
        if self.keep:
            self.entries.append(entry)
        time = entry["time"]
        self.seen = Verified(number, _hash_in(line), self.seen.first or time, time)

    def _check_end(self, path: Path, committed: _Head, size: int, rest: bytes) -> None:
        if self.seen.lines < committed.count:
            missing = committed.count - self.seen.lines
            raise LogDamaged(
                f"{path}: the head file knows {committed.count:,} lines, the log holds {self.seen.lines:,}: the last "
                f"{missing:,} were removed. Keep both files as evidence; restore the log from a backup."
            )
        if self.seen.head != committed.head or size != committed.bytes:
            raise LogDamaged(
                f"{path}: its {self.seen.lines:,} lines hold together, but the head file names another end: one of the "
                "two was changed or put back. Keep both as evidence."
            )
        if rest and self.keep:
            if (line := _left_line(path, rest, committed)) is not None:
                self._take(path, line, committed)
        elif rest:
            raise LogDamaged(
                f"{path}: line {self.seen.lines + 1:,} and what follows ({_size(rest)} bytes) are not known to the "
                "head file: an append was killed, which the next one mends, or they were added by hand."
            )


def _check_names(fields: dict[str, Any]) -> None:
    if taken := sorted(_RESERVED & set(fields)):
        raise ValueError(f"the fields {taken} belong to the log itself")


# --- a line -----------------------------------------------------------------------------------------------------------


def _compose(n: int, event: str, fields: dict[str, Any], prev: str) -> bytes:
    """One line with its break. ASCII: whoever looks at the log on a terminal sees what stands there."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    entry = {"n": n, "time": time, "event": event, **fields, "prev": prev}
    body = json.dumps(entry, separators=(",", ":"), allow_nan=False)[:-1].encode("ascii")
    return body + f',"hash":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode("ascii")


def _hash_in(line: bytes) -> str:
    return line[-67:-3].decode("ascii", "replace")


def _parse(line: bytes, number: int, prev: str) -> dict[str, Any]:
    """A whole line as the entry it is. Raises ValueError saying why it does not stand at this place of the chain."""
    if not _is_whole(line):
        raise ValueError("its bytes are not those that were written")
    entry = _entry(line)
    if entry.get("n") != number or entry.get("prev") != prev:
        raise ValueError(
            f"it is entry {entry.get('n')} and does not follow the line before it: lines were removed, added or moved"
        )
    return entry


def _is_whole(line: bytes) -> bool:
    """Whether the line's hash is that of its own bytes."""
    body = line[: -_TAIL - 1]
    return line[-_TAIL - 1 :] == f',"hash":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode("ascii")


def _own(line: bytes) -> dict[str, Any] | None:
    """A line as the entry that was written; None where it is not as it was."""
    with suppress(ValueError):
        return _entry(line) if _is_whole(line) else None
    return None


def _entry(line: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        entry = json.loads(line)
        if isinstance(entry, dict) and isinstance(entry.get("time"), str) and isinstance(entry.get("event"), str):
            return entry
    raise ValueError("it is no entry of such a log")


def _fault(path: Path, number: int, what: str) -> LogDamaged:
    return LogDamaged(
        f"{path}: line {number:,} is not as it was written: {what}. Keep log and head file as evidence; restore them "
        "from a backup."
    )


# --- the two files ----------------------------------------------------------------------------------------------------


def _head_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")


def _read_head(path: Path) -> _Head | None:
    """The head file, None where there is none.

    Raises:
        UserError: it is there and is none.
    """
    try:
        with open(_head_path(path), "rb") as handle:
            raw = handle.read(1024)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{_head_path(path)}: cannot be read ({error.strerror}). Check the path and its permissions."
        ) from error
    try:
        said = json.loads(raw)
        head = _Head(said["count"], said["head"], said["bytes"])
        if raw != _head_bytes(head) or not _HEX.fullmatch(head.head) or min(head.count, head.bytes) < 0:
            raise ValueError("not as it is written")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise LogDamaged(
            f"{_head_path(path)}: is not as it was written; it was changed from outside, so it cannot be told whether "
            "the log is whole. Keep both files as evidence; restore them from a backup."
        ) from error
    return head


def _head_bytes(head: _Head) -> bytes:
    return f'{{"count":{int(head.count)},"head":"{head.head}","bytes":{int(head.bytes)}}}\n'.encode("ascii")


def _write_head(path: Path, head: _Head) -> None:
    write_atomic(_head_path(path), _head_bytes(head), mode=0o600)


def _headless(path: Path) -> LogDamaged:
    return LogDamaged(
        f"{_head_path(path)}: the head file is missing, so it cannot be told whether lines were cut off the log's end. "
        "Restore it from a backup; to begin anew, move the log to where it is kept as evidence."
    )


@contextmanager
def _open(path: Path) -> Iterator[int]:
    """The log's descriptor, for this process and thread alone until the block ends."""
    while True:
        descriptor = _opened(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(path, descriptor):  # else another file was put in its place while this one waited
                yield descriptor
                return
        finally:
            os.close(descriptor)  # and with it the lock


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _opened(path: Path) -> int:
    head = _read_head(path)
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if head is None or head.count == 0 else 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o600)
    except FileNotFoundError as error:
        raise LogDamaged(
            f"{path}: the log is gone, and its head file knows {head.count if head else 0:,} lines. Restore it from a "
            "backup; to begin anew, move the head file to where it is kept as evidence."
        ) from error
    except OSError as error:
        raise _refused(path, error) from error


@contextmanager
def _reading(path: Path, lock: bool = True) -> Iterator[IO[bytes]]:
    """The log for reading; with `lock`, while nobody appends."""
    try:
        handle = open(path, "rb")  # noqa: SIM115  # closed below; only what opening raises is caught here
    except FileNotFoundError as error:
        raise LogDamaged(f"{path}: there is no such log. Check the folder.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error
    with handle:
        try:
            if lock:
                fcntl.flock(handle, fcntl.LOCK_SH)
            yield handle
        except OSError as error:  # a folder, or a disk that dies
            raise UserError(f"{path}: cannot be read ({error.strerror}). Check the disk.") from error


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: an entry could not be written ({error.strerror or error}); log and head file are as they were, and "
        "nothing may happen unrecorded. Free space or mend the permissions, then repeat."
    )


# --- appending --------------------------------------------------------------------------------------------------------


def _ready(path: Path, descriptor: int) -> _Head:
    """What is committed, once a killed append's remains are dealt with."""
    try:
        return _mend(path, descriptor, _committed(path, descriptor))
    except OSError as error:
        raise _refused(path, error) from error


def _committed(path: Path, descriptor: int) -> _Head:
    """What the head file says, checked against the end of the log; a new log gets its head file first.

    Raises:
        UserError: the log is shorter, or ends otherwise, than the head file says.
    """
    head, size = _read_head(path), os.fstat(descriptor).st_size
    if head is None:
        if size:
            raise _headless(path)
        head = _Head()
        write_atomic(
            _head_path(path), _head_bytes(head)
        )  # before the first line: from now on a log without a head file was tampered with
    if size < head.bytes:
        raise LogDamaged(
            f"{path}: the head file knows {head.count:,} lines in {head.bytes:,} bytes, the log holds {size:,}: its "
            "end was cut off, and nothing is added to it. Keep both files as evidence, moved elsewhere; a new log "
            "begins then."
        )
    if head.count:
        start = max(0, head.bytes - MAX_LINE - 1)
        last = os.pread(descriptor, head.bytes - start, start).rstrip(b"\n").rpartition(b"\n")[2] + b"\n"
        body = last[: -_TAIL - 1]
        if _hash_in(last) != head.head or hashlib.sha256(body).hexdigest() != head.head:
            raise _fault(path, head.count, "its bytes are not those that the head file names")
    return head


def _mend(path: Path, descriptor: int, head: _Head) -> _Head:
    """Deal with what a killed append left behind the committed bytes."""
    rest = os.pread(descriptor, MAX_LINE + 1, head.bytes)
    if not rest:
        return head
    line = _left_line(path, rest, head)
    if line is not None:
        kept = _Head(head.count + 1, _hash_in(line), head.bytes + len(line))
        _write_head(path, kept)
        return kept
    try:
        os.ftruncate(descriptor, head.bytes)
        os.fsync(descriptor)
    except OSError as error:
        raise _refused(path, error) from error
    return _add(path, descriptor, head, "log_mended", {"cut_bytes": len(rest)})


def _left_line(path: Path, rest: bytes, head: _Head) -> bytes | None:
    """The whole line that a killed append left, if it is one that continues the chain.

    Raises:
        UserError: no kill leaves what is there.
    """
    first, break_, more = rest.partition(b"\n")
    line = first + break_
    follows = bool(break_) and _continues(line, head)
    others = (more if follows else rest).splitlines(keepends=True)
    if (follows and more) or any(map(_is_whole, others)) or len(rest) > MAX_LINE:
        raise LogDamaged(
            f"{path}: holds lines that its head file ({head.count:,} lines) does not know, and no kill leaves: an "
            "older head file was put back, or lines were added by hand. Nothing is added. Keep both files as evidence, "
            "moved elsewhere; a new log begins then."
        )
    return line if follows else None


def _continues(line: bytes, head: _Head) -> bool:
    try:
        return bool(_parse(line, head.count + 1, head.head))
    except ValueError:
        return False


def _add(path: Path, descriptor: int, head: _Head, event: str, fields: dict[str, Any]) -> _Head:
    line = _compose(head.count + 1, event, fields, head.head)
    if len(line) > MAX_LINE:
        raise UserError(
            f"{path}: an entry '{event[:40]}' of {len(line):,} bytes is too long; the limit is {MAX_LINE:,}."
        )
    new = _Head(head.count + 1, _hash_in(line), head.bytes + len(line))
    try:
        written = 0
        while written < len(line):
            written += os.pwrite(descriptor, line[written:], head.bytes + written)
        os.fsync(descriptor)
        _write_head(path, new)
    except (OSError, UserError) as error:
        _take_back(path, descriptor, head)
        if isinstance(error, OSError):
            raise _refused(path, error) from error
        raise
    return new


def _take_back(path: Path, descriptor: int, head: _Head) -> None:
    """Cut off a line that could not be committed, unless the head file was renamed before the disk refused."""
    with suppress(OSError, UserError):  # what cannot be cut off now, the next append mends
        if _read_head(path) == head:
            os.ftruncate(descriptor, head.bytes)
            os.fsync(descriptor)


def _size(rest: bytes) -> str:
    return f"{len(rest):,}" if len(rest) <= MAX_LINE else f"more than {MAX_LINE:,}"
