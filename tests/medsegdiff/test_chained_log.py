"""The chained log: what was written stays, or its going shows; kills, full disks and rivals leave one chain."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medsegdiff import chained_log, files
from medsegdiff.chained_log import (
    GENESIS,
    MAX_LINE,
    ChainedLog,
    audit_lines,
    audit_report,
    legible_entries,
    verified_entries,
    verify_log,
)
from medsegdiff.errors import UserError

ROOT = Path(__file__).parents[2]


def filled(path: Path, lines: int = 5) -> ChainedLog:
    log = ChainedLog(path)
    for number in range(lines):
        log.append("round", round=number, run="ä\u2028\n")
    return log


def head_of(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def faulty(path: Path, match: str, anchor: str | None = None) -> None:
    with pytest.raises(UserError, match=match):
        verify_log(path, anchor)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Log and head file of five entries."""
    path = tmp_path_factory.mktemp("sound") / "a.jsonl"
    filled(path)
    return path.read_bytes(), head_of(path).read_bytes()


@pytest.fixture
def put(tmp_path: Path) -> Callable[[bytes, bytes], Path]:
    """Call to lay a log and its head file down."""
    path = tmp_path / "a.jsonl"

    def write(log: bytes, head: bytes) -> Path:
        path.write_bytes(log)
        head_of(path).write_bytes(head)
        return path

    return write


# --- the plain way ----------------------------------------------------------------------------------------------------


def test_entries_are_read_back_and_verified(tmp_path: Path) -> None:
    """Numbers, times, fields; head and length agree with the file; a folder is made; nobody else may read it."""
    path = tmp_path / "new" / "audit.jsonl"
    log = ChainedLog(path)
    assert (log.head, log.length) == (GENESIS, 0)
    heads = [log.append("round", round=k, run="ä\u2028\n") for k in range(3)]
    entries = list(audit_lines(path))
    assert [(e["n"], e["event"], e["round"], e["run"]) for e in entries] == [
        (k + 1, "round", k, "ä\u2028\n") for k in range(3)
    ]
    assert [e["hash"] for e in entries] == heads
    assert [e["prev"] for e in entries] == [GENESIS, *heads[:-1]]
    assert (log.head, log.length) == (heads[-1], 3)
    found = verify_log(path)
    assert (found.lines, found.head, found.first, found.last) == (3, heads[-1], entries[0]["time"], entries[2]["time"])
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes().isascii()


def test_a_hash_is_that_of_the_line_before_it(sound: tuple[bytes, bytes]) -> None:
    """The documented rule, with hashlib alone: bytes up to `,"hash":`, the line before as `prev`."""
    prev = GENESIS
    for line in sound[0].splitlines():
        body, _, tail = line.partition(b',"hash":')
        digest = hashlib.sha256(body).hexdigest()
        assert tail == f'"{digest}"}}'.encode()
        assert json.loads(line)["prev"] == prev
        prev = digest


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    """Nothing to read; verification says so."""
    assert list(audit_lines(tmp_path / "none")) == []
    faulty(tmp_path / "none", "there is no such log")


def test_a_reader_may_append_while_it_reads(tmp_path: Path) -> None:
    """Reading takes no lock: what is added meanwhile is not waited for."""
    log = filled(tmp_path / "a", 2)
    for _ in audit_lines(tmp_path / "a"):
        log.append("seen")
    assert verify_log(tmp_path / "a").lines == 4


@pytest.mark.parametrize(
    ("fields", "match"), [({"n": 1}, "belong"), ({"x": float("nan")}, "JSON"), ({"x": {1}}, "set")]
)
def test_fields_that_cannot_be_written(tmp_path: Path, fields: dict[str, object], match: str) -> None:
    """Our own mistakes: a reserved name, NaN, a set; the log stays as it is."""
    log = filled(tmp_path / "a", 1)
    with pytest.raises((ValueError, TypeError), match=match):
        log.append("x", **fields)
    assert verify_log(tmp_path / "a").lines == 1


def test_an_entry_has_a_largest_size(tmp_path: Path) -> None:
    """One entry of 64 KiB passes and is the last line of a sound log, a longer one is refused and nothing changes."""
    log = filled(tmp_path / "a", 1)
    room = MAX_LINE - len((tmp_path / "a").read_bytes()) - 10
    log.append("x", y="z" * room)
    log.append("after")
    with pytest.raises(UserError, match=r"of 7\d,\d\d\d bytes is too long; the limit is 65,536"):
        log.append("x", y="z" * 70_000)
    assert verify_log(tmp_path / "a").lines == 3


# --- changes ----------------------------------------------------------------------------------------------------------


def change(data: bytes, kind: str, at: int, length: int, new: bytes) -> bytes:
    """One change of a file's bytes."""
    at %= len(data) + 1
    match kind:
        case "edit":
            return data[:at] + new + data[at + len(new) :]
        case "insert":
            return data[:at] + new + data[at:]
        case "delete":
            return data[:at] + data[at + length :]
        case "truncate":
            return data[:at]
    lines = data.splitlines(keepends=True)  # whole lines
    first, second = at % len(lines), length % len(lines)
    match kind:
        case "swap":
            lines[first], lines[second] = lines[second], lines[first]
        case "drop":
            del lines[first]
        case "repeat":
            lines.insert(second, lines[first])
    return b"".join(lines)


KINDS = ["edit", "insert", "delete", "truncate", "swap", "drop", "repeat"]
ODD = st.binary(min_size=1, max_size=6) | st.sampled_from([b" ", b"\n", b"}\n", b"0", b'"', b"\x00"])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(KINDS), at=st.integers(0, 2000), length=st.integers(1, 400), new=ODD, which=st.booleans())
def test_any_change_of_either_file_is_detected(sound, put, kind, at, length, new, which) -> None:
    """Edits, insertions, deletions, truncations, swapped, dropped and doubled lines, in the log or in the head file."""
    log, head = sound
    changed = (change(log, kind, at, length, new), head) if which else (log, change(head, kind, at, length, new))
    path = put(*changed)
    if changed == (log, head):
        assert verify_log(path).lines == 5
    else:
        faulty(path, ".")
        assert not audit_report(path)[0]


@pytest.mark.parametrize("number", range(1, 6))
def test_the_first_bad_line_is_named(sound, put, number: int) -> None:
    """One letter of one line: that line, and no other, is named."""
    lines = sound[0].splitlines(keepends=True)
    lines[number - 1] = lines[number - 1].replace(b"round", b"r0und", 1)
    faulty(put(b"".join(lines), sound[1]), f"line {number} is not as it was written: its bytes")


def test_a_rehashed_line_breaks_the_next(sound, put) -> None:
    """Who edits a line and gives it the right hash is found at the line behind it; at the last, by the head file."""
    lines = sound[0].splitlines(keepends=True)
    for number, match in ((2, "line 3 is not .* does not follow"), (5, "head file names another end")):
        body = lines[number - 1].partition(b',"hash":')[0].replace(b'"round":', b'"round":7')
        forged = list(lines)
        forged[number - 1] = body + f',"hash":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode()
        assert forged != lines
        faulty(put(b"".join(forged), sound[1]), match)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda lines: lines[1:], "line 1 .* it is entry 2"),
        (lambda lines: lines[:2] + lines[3:], "line 3 .* it is entry 4"),
        (lambda lines: lines[:-2], "knows 5 lines, the log holds 3: the last 2 were removed"),
        (lambda lines: [], "knows 5 lines, the log holds 0: the last 5"),
        (lambda lines: [*lines[:-1], lines[-1][:-1]], "line 5 .* breaks off"),
        (lambda lines: [*lines, b"x"], r"line 6 and what follows \(1 bytes\)"),
        (lambda lines: [*lines, b"x" * 100_000], r"line 6 and what follows \(more than 65,536 bytes\)"),
        (lambda lines: [lines[0], b"y" * 100_000, *lines[1:]], "line 2 .* longer than 65,536"),
        (lambda lines: [lines[0], b"\n", *lines[1:]], "line 2"),
    ],
)
def test_what_is_missing_or_added_is_told(sound, put, spoil, match: str) -> None:
    """Each kind of change has its words."""
    faulty(put(b"".join(spoil(sound[0].splitlines(keepends=True))), sound[1]), match)


def test_a_missing_or_foreign_head_file(sound, put) -> None:
    """Without it nothing is verified or added; one of another log is found out."""
    path = put(sound[0], sound[1])
    head_of(path).unlink()
    for act in (lambda: verify_log(path), lambda: ChainedLog(path).append("x")):
        with pytest.raises(UserError, match="the head file is missing"):
            act()
    head_of(path).write_bytes(b'{"count": 5}\n')
    for act in (lambda: verify_log(path), lambda: ChainedLog(path).append("x"), lambda: ChainedLog(path).head):
        with pytest.raises(UserError, match="not as it was written"):
            act()
    assert path.read_bytes() == sound[0]
    head_of(path).write_bytes(sound[1].replace(b",", b" ,", 1))  # the same to a JSON reader
    faulty(path, "not as it was written")


def test_a_chain_that_counts_wrongly(sound, put) -> None:
    """A line taken out and all behind it hashed anew, head file included: their numbers still tell."""
    prev, forged = GENESIS, b""
    for line in (line for k, line in enumerate(sound[0].splitlines()) if k != 2):
        body = line.partition(b',"prev":')[0] + f',"prev":"{prev}"'.encode()
        prev = hashlib.sha256(body).hexdigest()
        forged += body + f',"hash":"{prev}"}}\n'.encode()
    path = put(forged, f'{{"count":4,"head":"{prev}","bytes":{len(forged)}}}\n'.encode())
    faulty(path, "line 3 .* it is entry 4")


def test_an_anchor_finds_that_both_files_were_put_back(tmp_path: Path) -> None:
    """Old copies of both files hold together; a head seen later occurs nowhere in them. A head of the chain passes."""
    path = tmp_path / "a"
    log = filled(path, 3)
    old, early = (path.read_bytes(), head_of(path).read_bytes()), log.head
    late = log.append("misdeed")
    for anchor in (None, GENESIS, early, late, f" {late.upper()}\n"):
        assert verify_log(path, anchor).lines == 4
    path.write_bytes(old[0])
    head_of(path).write_bytes(old[1])
    assert verify_log(path).lines == 3
    assert verify_log(path, early).lines == 3
    faulty(path, f"the head {late} .* occurs in none of the 3 lines", late)
    faulty(path, "is no head of a log", "abc")


def test_a_report_for_a_person(tmp_path: Path) -> None:
    """Counts, times, head, verdict; with a fault: how many lines before it are sound."""
    path = tmp_path / "a"
    log = filled(path, 3)
    ok, lines = audit_report(path)
    assert ok
    assert "\n".join(lines).count(log.head) == 1
    assert lines[1] == "lines       3"
    assert lines[-1].startswith("OK: no line was changed")
    path.write_bytes(path.read_bytes().replace(b'"round":1', b'"round":9'))
    ok, lines = audit_report(path)
    assert not ok
    assert lines[1] == "lines       1 sound ones before the fault"
    assert lines[-1].startswith(f"FAULT: {path}: line 2 is not")
    ok, lines = audit_report(tmp_path / "none")
    assert (ok, lines[-1]) == (False, f"FAULT: {tmp_path / 'none'}: there is no such log. Check the folder.")


# --- appending to what was changed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda log: log[:-1], "its end was cut off"),
        (lambda log: b"", "its end was cut off"),
        (lambda log: log.replace(b'"round":4', b'"round":5'), "line 5 is not as it was written"),
        (lambda log: log[:-1] + b"x", "line 5 is not as it was written"),
        (lambda log: log + b"x" * (MAX_LINE + 1), "no kill leaves"),
    ],
)
def test_nothing_is_added_to_a_log_whose_end_was_changed(sound, put, spoil, match: str) -> None:
    """A cut or edited end is refused before anything is written, so the evidence stays."""
    changed = spoil(sound[0])
    path = put(changed, sound[1])
    with pytest.raises(UserError, match=match):
        ChainedLog(path).append("x")
    assert (path.read_bytes(), head_of(path).read_bytes()) == (changed, sound[1])


def test_a_log_that_is_gone_does_not_begin_anew(sound, put) -> None:
    """The head file remembers it; the log is not created either."""
    path = put(*sound)
    path.unlink()
    with pytest.raises(UserError, match="the log is gone, and its head file knows 5 lines"):
        ChainedLog(path).append("x")
    assert not path.exists()


def test_an_older_head_file_does_not_cost_a_line(tmp_path: Path) -> None:
    """Put back by one entry: the line is kept, as after a kill. By more: nothing is mended, nothing added."""
    path = tmp_path / "a"
    log = filled(path, 3)
    third = head_of(path).read_bytes()
    log.append("misdeed")
    fourth = head_of(path).read_bytes()
    head_of(path).write_bytes(third)
    faulty(path, "line 4 and what follows")
    log.append("next")
    assert [e["event"] for e in audit_lines(path)] == ["round"] * 3 + ["misdeed", "next"]
    verify_log(path)
    log.append("more")
    whole = path.read_bytes()
    head_of(path).write_bytes(fourth)
    with pytest.raises(UserError, match="no kill leaves"):
        log.append("x")
    assert path.read_bytes() == whole


def test_an_older_head_file_and_a_damaged_line_do_not_cost_those_behind_it(tmp_path: Path) -> None:
    """No kill leaves whole lines behind torn ones."""
    path = tmp_path / "a"
    log = filled(path, 2)
    second = head_of(path).read_bytes()
    for _ in range(3):
        log.append("more")
    head_of(path).write_bytes(second)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"more"', b'"mOre"')
    path.write_bytes(b"".join(lines))
    for attempt in (lambda: log.append("x"), lambda: verified_entries(path)):
        with pytest.raises(UserError, match="no kill leaves"):
            attempt()
    assert path.read_bytes() == b"".join(lines)


# --- kills ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours runs on."""


def test_a_kill_at_any_step_is_mended_by_the_next_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop before each call to the disk of one append (a write also half-way): at most the unreturned entry is lost."""
    calls: list[str] = []
    stop_at = -1

    def watched(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: object, **kwargs: object) -> object:
            calls.append(name)
            if len(calls) - 1 == stop_at:
                if name == "pwrite":
                    real(args[0], args[1][: len(args[1]) // 2], args[2])  # type: ignore[index]
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((os, "open"), (os, "pwrite"), (os, "fsync"), (os, "ftruncate"), (Path, "replace")):
        watched(owner, name)
    for start in (0, 3):  # the first append of a log makes its head file, too
        filled(tmp_path / f"count{start}", start)
        calls.clear()
        ChainedLog(tmp_path / f"count{start}").append("victim")
        steps = len(calls)
        assert steps >= 6
        for step in range(steps):
            path = tmp_path / f"a{start}-{step}"
            stop_at = -1
            log = filled(path, start)
            calls.clear()
            stop_at = step
            with pytest.raises(Killed):
                log.append("victim")
            stop_at = -1
            log.append("next")
            events = [e["event"] for e in audit_lines(path) if e["event"] != "log_mended"]
            assert events in (["round"] * start + ["next"], ["round"] * start + ["victim", "next"])
            verify_log(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.integers(0, 240), junk=st.binary(max_size=20))
def test_a_torn_line_is_cut_off_and_its_cutting_told(sound, put, kept: int, junk: bytes) -> None:
    """Any beginning of an uncommitted line, and what a crash may leave instead of one."""
    path = put(*sound)
    log = ChainedLog(path)
    log.append("victim", note="x" * 30)
    line = path.read_bytes()[len(sound[0]) :]
    tail = (line[: min(kept, len(line) - 1)] + junk)[: len(line) + 20]
    path.write_bytes(sound[0] + tail)
    head_of(path).write_bytes(sound[1])
    log.append("next")
    entries = list(audit_lines(path))[5:]
    if tail == line:
        assert [e["event"] for e in entries] == ["victim", "next"]
    elif tail:
        assert [(e["event"], e.get("cut_bytes")) for e in entries] == [("log_mended", len(tail)), ("next", None)]
    else:
        assert [e["event"] for e in entries] == ["next"]
    verify_log(path)


def appender(path: Path, count: int, name: str) -> subprocess.Popen[bytes]:
    """A process that appends `count` entries."""
    code = (
        "import sys, pathlib\nfrom medsegdiff.chained_log import ChainedLog\n"
        f"log = ChainedLog(pathlib.Path({str(path)!r}))\n"
        f"for k in range({count}): print(log.append('p', by={name!r}, k=k), flush=True)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)


@pytest.mark.e2e
def test_processes_that_append_at_once_keep_one_chain(tmp_path: Path) -> None:
    """Three processes, 40 entries each: every entry once, in the order of its writer, and every head said is there."""
    path = tmp_path / "a"
    running = [appender(path, 40, name) for name in "abc"]
    said = [head for process in running for head in process.communicate(timeout=60)[0].decode().split()]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert verify_log(path).lines == 120
    entries = list(audit_lines(path))
    for name in "abc":
        assert [e["k"] for e in entries if e["by"] == name] == list(range(40))
    assert sorted(said) == sorted(e["hash"] for e in entries)


@pytest.mark.e2e
def test_a_killed_process_leaves_a_log_that_goes_on(tmp_path: Path) -> None:
    """SIGKILL at 25 moments while two processes append: no entry whose append returned is lost, the log verifies."""
    path = tmp_path / "a"
    ChainedLog(path).append("begin")
    said: list[str] = []
    for attempt in range(25):
        victims = (
            [appender(path, 100_000, name) for name in "ab"] if attempt % 5 == 0 else [appender(path, 100_000, "c")]
        )
        for victim in victims:
            assert victim.stdout is not None
            said.append(victim.stdout.readline().decode().strip())
        time.sleep(0.002 * attempt % 0.011)
        for victim in victims:
            os.kill(victim.pid, signal.SIGKILL)
            rest = victim.communicate()[0].decode()
            said += [head for head in rest.split("\n")[:-1] if head]
        said.append(ChainedLog(path).append("after", attempt=attempt))
        verify_log(path)
    assert set(said) <= {entry["hash"] for entry in audit_lines(path)}


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(6))
def test_a_disk_that_refuses_leaves_log_and_head_as_they_were(tmp_path, monkeypatch, step: int) -> None:
    """Writing and flushing the line, then the head file, and renaming that: one line says why, the bytes are equal."""
    path = tmp_path / "a"
    log = filled(path, 3)
    before = (path.read_bytes(), head_of(path).read_bytes())
    full = OSError(28, "No space left on device")
    real_pwrite, real_fsync, flushed = os.pwrite, os.fsync, []

    def pwrite(descriptor: int, data: bytes, at: int) -> int:
        if step == 0 or (step == 1 and len(data) < 50):
            raise full
        return real_pwrite(descriptor, data[:-20] if step == 1 else data, at)

    def fsync(descriptor: int) -> None:
        flushed.append(descriptor)
        if (step, len(flushed)) in ((2, 1), (3, 2)):
            raise full
        real_fsync(descriptor)

    def refuse(*args: object, **options: object) -> None:
        raise full

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fsync", fsync)
    if step == 4:
        monkeypatch.setattr(Path, "replace", refuse)
    if step == 5:
        monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(UserError, match="No space left on device"):
        log.append("x")
    monkeypatch.undo()
    assert (path.read_bytes(), head_of(path).read_bytes()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.head"]
    log.append("y")
    assert verify_log(path).lines == 4


def test_a_head_file_that_was_renamed_before_the_disk_refused_keeps_its_line(tmp_path, monkeypatch) -> None:
    """The folder's own flush fails last, when the new head file stands: log and head file still agree."""
    log = filled(tmp_path / "a", 3)

    def refuse(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "_flush_directory", refuse)
    with pytest.raises(UserError, match="Input/output error"):
        log.append("x")
    monkeypatch.undo()
    assert verify_log(tmp_path / "a").lines == 4


@pytest.mark.e2e
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A process whose files may not grow beyond 1,000 bytes: UserError, and the log it leaves verifies."""
    path = tmp_path / "a"
    code = (
        "import pathlib, resource, sys\nfrom medsegdiff.chained_log import ChainedLog\n"
        "from medsegdiff.errors import UserError\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"log = ChainedLog(pathlib.Path({str(path)!r}))\n"
        "try:\n    for k in range(100): log.append('x', k=k)\nexcept UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "could not be written (File too large); log and head file are as they were" in done.stdout
    lines = verify_log(path).lines
    assert 3 <= lines <= 6
    ChainedLog(path).append("y")
    assert verify_log(path).lines == lines + 1


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A file where the folder should be: one line."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="Not a directory"):
        ChainedLog(tmp_path / "file" / "a").append("x")


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hundred_thousand_lines(tmp_path: Path) -> None:
    """Verified line by line in little memory; an append reads a line's length of the end, not the file."""
    path, prev, size = tmp_path / "a", GENESIS, 0
    with open(path, "wb") as handle:
        for number in range(1, 100_001):
            line = chained_log._compose(number, "round", {"run": "r"}, prev)
            prev, size = line[-67:-3].decode(), size + len(line)
            handle.write(line)
    head_of(path).write_bytes(chained_log._head_bytes(chained_log._Head(100_000, prev, size)))
    read: list[int] = []
    real = os.pread
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", lambda fd, n, at: (read.append(n), real(fd, n, at))[1])
        ChainedLog(path).append("one more")
    assert sum(read) <= 3 * MAX_LINE
    started = time.perf_counter()
    assert verify_log(path).lines == 100_001
    assert time.perf_counter() - started < 20  # about 1 s
    tracemalloc.start()
    for _, entry in zip(range(5000), audit_lines(path), strict=False):
        assert entry["run"] == "r"
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


# --- read, decide, append ---------------------------------------------------------------------------------------------


def test_a_held_log_is_read_and_added_to_with_nobody_between(tmp_path: Path) -> None:
    """Two threads count up by reading the last number: none is lost."""
    path = tmp_path / "a"

    def count_up() -> None:
        for _ in range(20):
            with ChainedLog(path).held() as log:
                numbers = [entry["number"] for entry in log.entries()]
                log.append("count", number=max(numbers, default=0) + 1)

    threads = [threading.Thread(target=count_up) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry["number"] for entry in verified_entries(path)] == list(range(1, 61))
    assert verify_log(path).head == ChainedLog(path).head


def test_a_held_log_gives_only_what_is_verified(put, sound) -> None:
    """An edited line that the last one does not show: held and verified_entries refuse it."""
    lines = sound[0].splitlines(keepends=True)
    path = put(b"".join([lines[0].replace(b"round", b"Round"), *lines[1:]]), sound[1])
    with pytest.raises(UserError, match="line 1 is not as it was written"):
        verified_entries(path)
    with ChainedLog(path).held() as log, pytest.raises(UserError, match="line 1 is not as it was written"):
        log.entries()
    with ChainedLog(path).held() as log, pytest.raises(ValueError, match="belong"):
        log.append("x", hash=1)


def test_verified_entries_read_a_killed_append_as_the_next_one_mends_it(tmp_path: Path) -> None:
    """A whole line counts, a torn one does not, two are a fault; nothing is written. No log: no entries."""
    path = tmp_path / "a"
    assert verified_entries(path) == []
    log = filled(path, 2)
    before, head = path.read_bytes(), head_of(path).read_bytes()
    log.append("late")
    late = path.read_bytes()[len(before) :]
    log.append("later")
    both = path.read_bytes()[len(before) :]
    for left, count in ((late, 3), (late[:-1], 2), (b"", 2)):
        path.write_bytes(before + left)
        head_of(path).write_bytes(head)
        assert len(verified_entries(path)) == count
        assert path.read_bytes() == before + left
    path.write_bytes(before + both)
    with pytest.raises(UserError, match="no kill leaves"):
        verified_entries(path)


def test_of_a_damaged_log_the_lines_that_are_as_written_are_legible(tmp_path) -> None:
    """Every bit of every line flipped once: that line alone is missing, also where it is still good JSON."""
    path = tmp_path / "log.jsonl"
    for number in range(3):
        ChainedLog(path).append("took", steps=number)
    data = path.read_bytes()
    whole = legible_entries(path)
    assert [entry["steps"] for entry in whole] == [0, 1, 2]
    ends = [at for at, byte in enumerate(data) if byte == 10]
    for bit in range(0, 8 * len(data), 3):
        spoiled = bytearray(data)
        spoiled[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoiled)
        hit = sum(end < bit // 8 for end in ends)
        lost = {hit, hit + 1} if bit // 8 in ends else {hit}  # without its break a line runs into the next one
        assert legible_entries(path) == [entry for number, entry in enumerate(whole) if number not in lost]
    path.unlink()
    assert legible_entries(path) == []
