"""Logs that are cut while others write and read them."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deploy import logfiles
from deploy.logfiles import BEGINNING, Access, LogPosition, read_access_log, rotate_log


def line(number: int, **changes: Any) -> bytes:
    """A line as the gateway writes it; its number is the bytes received."""
    fields = {
        "time": 1.5, "site": "st-mary", "route": "push-object", "status": 200, "received": number, "sent": 90,
        "seconds": 0.004, "remote": "192.0.2.7",
    }  # fmt: skip
    return json.dumps(fields | changes).encode() + b"\n"


def append(path: Path, *lines: bytes) -> None:
    with open(path, "ab") as log:
        log.write(b"".join(lines))


def numbers(entries: list[Access]) -> list[int]:
    return [entry.received for entry in entries]


def test_reads_what_is_new(tmp_path: Path) -> None:
    """Each call gives what came since; the position survives JSON; a log that is not there yet is empty."""
    log = tmp_path / "access.jsonl"
    assert read_access_log(log) == ([], BEGINNING)
    log.touch()
    assert read_access_log(log) == ([], BEGINNING)
    append(log, line(1), line(2, site="", route=""))
    entries, position = read_access_log(log)
    assert entries == [
        Access(1.5, "st-mary", "push-object", 200, 1, 90, 0.004, "192.0.2.7"),
        Access(1.5, None, None, 200, 2, 90, 0.004, "192.0.2.7"),
    ]
    position = LogPosition(*json.loads(json.dumps(position)))
    assert read_access_log(log, position) == ([], position)
    append(log, line(3))
    assert numbers(read_access_log(log, position)[0]) == [3]


def test_torn_and_damaged_lines(tmp_path: Path) -> None:
    """A line in the making waits for its end; what is no line of the gateway is left out."""
    log = tmp_path / "access.jsonl"
    append(log, line(1)[:20])
    entries, position = read_access_log(log)
    assert entries == []
    append(log, line(1)[20:], line(2)[:-1])
    entries, position = read_access_log(log, position)
    assert numbers(entries) == [1]
    append(log, b"\n")
    entries, position = read_access_log(log, position)
    assert numbers(entries) == [2]
    damaged = (
        b"\n", b"{}\n", b"[]\n", b"\xff\xfe\n", line(3)[9:], line(3, status="x"), line(3, received=None),
        b"[" * 100_000 + b"\n", line(3).replace(b"200", b"Infinity"),
    )  # fmt: skip
    append(log, *damaged, line(4))
    assert numbers(read_access_log(log, position)[0]) == [4]


@pytest.mark.parametrize("looks", [{0, 1, 2, 3, 4, 5}, {0, 5}, {0, 2, 5}, {0, 3, 5}])
def test_rotation_between_two_looks(tmp_path: Path, looks: set[int]) -> None:
    """However many rotations a reader misses, it reads each line once and in order, as far back as logs are kept."""
    log, position, seen = tmp_path / "access.jsonl", BEGINNING, []
    for step in range(6):
        append(log, *(line(10 * step + n) for n in range(3)))
        if step in looks:
            entries, position = read_access_log(log, position)
            seen += numbers(entries)
        append(log, line(10 * step + 9))
        if step in (1, 2, 4):
            assert rotate_log(log, max_bytes=100)
            assert log.stat().st_size == 0
    entries, _ = read_access_log(log, position)
    assert seen + numbers(entries) == [10 * step + n for step in range(6) for n in (0, 1, 2, 9)]


def test_more_rotations_than_are_kept(tmp_path: Path) -> None:
    """A reader that was away for too long goes on with the oldest line there is."""
    log = tmp_path / "access.jsonl"
    append(log, line(0))
    _, position = read_access_log(log)
    for step in range(1, 7):
        append(log, line(step))
        rotate_log(log, max_bytes=100)
    append(log, line(7))
    assert numbers(read_access_log(log, position)[0]) == [4, 5, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "access.jsonl",
        *(f"access.jsonl.{n}" for n in (1, 2, 3)),
    ]


def test_a_replaced_file_is_read_from_its_beginning(tmp_path: Path) -> None:
    """Somebody moved the log away, and the new one is longer than the position."""
    log = tmp_path / "access.jsonl"
    append(log, line(1), line(2))
    _, position = read_access_log(log)
    log.unlink()
    append(log, *(line(n) for n in range(3, 9)))
    assert numbers(read_access_log(log, position)[0]) == [3, 4, 5, 6, 7, 8]


def test_a_large_log_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded; nothing is lost between the parts, and an endless line cannot hold the reader up."""
    monkeypatch.setattr(logfiles, "READ_BYTES", 1000)
    log = tmp_path / "access.jsonl"
    append(log, *(line(n) for n in range(50)), b"x" * 5000 + b"\n", line(50))
    position, seen = BEGINNING, []
    for _ in range(100):
        entries, position = read_access_log(log, position)
        assert len(entries) < 10
        seen += numbers(entries)
    assert seen == list(range(51))


def test_a_small_log_is_left_alone(tmp_path: Path) -> None:
    """Nothing happens up to the bound, to a missing file, or in a missing folder."""
    log = tmp_path / "a.log"
    append(log, b"x" * 100)
    assert not rotate_log(log, max_bytes=100)
    assert rotate_log(log, max_bytes=99)
    assert not rotate_log(tmp_path / "no" / "b.log", max_bytes=0)
    assert (tmp_path / "a.log.1").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_costs_the_copy_not_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for a copy the log is cut all the same."""
    log = tmp_path / "a.log"
    append(log, b"x" * 100)
    really_open = open

    def no_space(name: Any, mode: str = "r", **keywords: Any) -> Any:
        if mode == "wb":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really_open(name, mode, **keywords)

    monkeypatch.setattr("builtins.open", no_space)
    assert rotate_log(log, max_bytes=10)
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("a.log", 0)]


@pytest.mark.e2e
def test_a_writer_goes_on_across_rotations(tmp_path: Path) -> None:
    """A process that holds the log open writes on; a reader that follows sees ever larger numbers, none twice."""
    log, limit = tmp_path / "access.jsonl", 200_000
    text = line(123456).decode().rstrip()
    before, after = text.split("123456")
    code = (
        "import itertools, os\n"
        f"log = os.open({str(log)!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)\n"
        f"for n in itertools.count(): os.write(log, ({before!r} + str(n) + {after!r} + chr(10)).encode())"
    )
    writer = subprocess.Popen([sys.executable, "-I", "-S", "-c", code])
    try:
        position, seen, rotations, deadline = BEGINNING, [], 0, time.monotonic() + 20
        while rotations < 3 and time.monotonic() < deadline:
            rotations += rotate_log(log, limit)
            entries, position = read_access_log(log, position)
            seen += numbers(entries)
    finally:
        writer.kill()
        writer.wait()
    assert rotations == 3
    assert len(seen) > 3000
    assert all(first < second for first, second in itertools.pairwise(seen))
    assert len(seen) > 0.9 * (seen[-1] - seen[0]), "a cut loses next to nothing"
