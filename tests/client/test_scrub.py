"""A site's log in a federation: what happened and where, and nothing of a patient."""

from __future__ import annotations

import ast
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import client
import medsegdiff
from client import scrub
from client.contract import ContractError
from client.keys import SiteKeys
from client.policy import Refusal
from client.scrub import CaseName, FederationLog, Public, federation_logging, reduced
from medsegdiff.errors import UserError

SECRET = "mueller_1957"  # a name that must turn up nowhere
SITE = logging.getLogger("medsegfed.site")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> SiteKeys:
    return SiteKeys.create(tmp_path_factory.mktemp("site") / "keys")


@pytest.fixture
def federation(tmp_path: Path, keys: SiteKeys) -> Iterator[FederationLog]:
    """This process logs as a site's runner does; given back afterwards."""
    log = federation_logging(tmp_path, keys, keep_streams=True)
    yield log
    log.close()


def written(log: FederationLog) -> str:
    text = log.path.read_text(encoding="utf-8")
    assert SECRET not in text
    return text


def fail(text: str = SECRET) -> None:
    raise ValueError(text)


# --- our own loggers --------------------------------------------------------------------------------------------------


def test_of_our_own_messages_the_code_stands(federation, keys) -> None:
    """Text of the code, numbers, public texts; the case as its keyed hash; everything else withheld."""
    name, at = CaseName(SECRET), Path("/data") / SECRET
    SITE.info("%s: case %s is left out: %s (%s), %d of %.1f", Public("alder"), name, SECRET, at, 3, 2.5)
    SITE.info("%(who)s %(what)s", {"who": Public("x"), "what": SECRET})
    line, second = written(federation).splitlines()
    assert line.endswith(
        f"INFO    medsegfed.site: alder: case #{keys.case_hash(SECRET)} is left out: [withheld] ([withheld]), 3 of 2.5"
    )
    assert second.endswith("medsegfed.site: x [withheld]")


def test_on_a_terminal_the_same_message_is_whole(caplog: pytest.LogCaptureFixture) -> None:
    """A simulation, which has no federation's log, shows name, reason and file."""
    SITE.warning("%s: case %s is left out: %s", Public("alder"), CaseName(SECRET), "torn")
    assert caplog.messages == [f"alder: case {SECRET} is left out: torn"]


def log_from(file: str, name: str, text: str, *args: object) -> None:
    """As if a line of `file` logged."""
    logger = logging.getLogger(name)
    logger.handle(logger.makeRecord(name, logging.INFO, str(scrub._ROOT / file), 1, text, args, None))


def test_files_that_speak_of_runs_may_log_short_texts(federation) -> None:
    """A run's name passes in the runner; a path, a long text, an object do not; elsewhere no text passes."""
    log_from("client/runner.py", "medsegfed.site", "run %s, %s, %s", "trial-1", "x" * 201, [1])
    log_from("client/runner.py", "medsegfed.site", "%s %s %s", f"data/{SECRET}", f"C:\\{SECRET}", Path(SECRET))
    log_from("client/site.py", "medsegfed.site", "run %s", "trial-1")
    log_from("medsegdiff/data/prepare.py", "medsegfed.site", "run %s", "trial-1")
    texts = [line.partition("medsegfed.site: ")[2] for line in written(federation).splitlines()]
    assert texts == [
        "run trial-1, [withheld], [withheld]",
        "[withheld] [withheld] [withheld]",
        "run [withheld]",
        "run [withheld]",
    ]


def test_a_message_that_is_no_template(federation) -> None:
    """An exception or an object in its place is reduced; one that cannot be filled in shows its line, not its parts."""
    SITE.error(UserError(SECRET))
    SITE.error([SECRET])
    SITE.error("%d cases", SECRET)
    SITE.error("%s", SECRET, SECRET)
    lines = written(federation).splitlines()
    assert "medsegdiff.errors.UserError at an unknown line; for names, run medsegfed doctor" in lines[0]
    assert lines[1].endswith("[withheld]")
    assert all("could not be put together] (client/test_scrub.py:" in line or "scrub.py:" in line for line in lines[2:])


def test_a_line_stays_one_line(federation) -> None:
    """Line breaks and control signs in a public text forge no second entry; endless text is cut."""
    SITE.info("run %s", Public("a\n2026-01-01T00:00:00Z INFO medsegfed.site: all is well\x1b[2J"))
    SITE.info("x" * 10_000)
    lines = written(federation).splitlines()
    assert len(lines) == 2
    assert "\x1b" not in lines[0]
    assert len(lines[1]) < 2100


def test_our_log_calls_have_their_text_in_the_code() -> None:
    """Every call of a logger in client/ and medsegdiff/ begins with a literal: nothing is mixed into it beforehand."""
    calls = 0
    for package in (client, medsegdiff):
        for path in Path(package.__path__[0]).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and isinstance(node.func.value, ast.Name)
                    and node.func.value.id in ("log", "logger", "logging")
                    and node.func.attr in ("debug", "info", "warning", "error", "critical", "exception")
                ):
                    calls += 1
                    assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}"
    assert calls > 5


# --- exceptions -------------------------------------------------------------------------------------------------------


def test_an_exception_is_reduced_to_class_and_line(federation) -> None:
    """As an argument and as what `exception` adds; causes by their classes; what speaks of runs passes."""
    try:
        try:
            fail()
        except ValueError as error:
            raise UserError(f"{SECRET}: is torn.") from error
    except UserError as error:
        SITE.error("%s", error)
        SITE.exception("unexpected")
        SITE.error("unexpected", exc_info=error, stack_info=True)
    SITE.warning("%s", Refusal("outside-hours", "run trial-1: it is 12:00."))
    SITE.error("%s", ContractError("the record 'task' is missing"))
    first, second, third, fourth, fifth = written(federation).splitlines()
    for line in (first, second, third):
        assert "medsegdiff.errors.UserError (from ValueError) at" in line
        assert "client/test_scrub.py:" in line
        assert line.endswith("for names, run medsegfed doctor at the site's terminal")
    assert fourth.endswith("run trial-1: it is 12:00.")
    assert fifth.endswith("the record 'task' is missing")


def test_the_line_named_is_ours() -> None:
    """A fault deep in a library is placed where our code called it; one that never met our code, where it arose."""
    import json

    from medsegdiff.strict import read_config

    with pytest.raises(UserError) as caught:
        read_config(Path(SECRET), client.__class__)
    assert "medsegdiff/strict.py:" in reduced(caught.value)
    with pytest.raises(ValueError, match="Expecting") as foreign:
        json.loads("{")
    assert "json/decoder.py:" in reduced(foreign.value)
    assert SECRET not in reduced(caught.value)


def test_a_circle_of_causes_ends() -> None:
    """An exception that is, after some steps, its own cause."""
    first, second = ValueError(SECRET), KeyError(SECRET)
    first.__cause__, second.__cause__ = second, first
    assert reduced(first) == "ValueError (from KeyError) at an unknown line"


# --- everybody else ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["flwr", "torch", "nibabel", "pydicom", "PIL.Image", "httpx", "py.warnings", "medsegfedx"]
)
def test_what_libraries_say_is_withheld(federation, name) -> None:
    """Logger, level and line stay; the message, its arguments and the exception's text go."""
    logger = logging.getLogger(name)
    try:
        fail()
    except ValueError:
        logger.error(f"bad tag in {SECRET}: %s", SECRET, exc_info=True)
    text = written(federation)
    if logger.propagate and logging.getLogger(name.partition(".")[0]).propagate:  # Flower's loggers keep to themselves
        assert f"ERROR   {name}: message withheld (" in text
        assert "test_scrub.py:" in text
        assert ": ValueError at " in text


def test_a_handler_that_comes_later_sees_no_more(federation) -> None:
    """A library that adds a handler of its own, as Flower does, gets the scrubbed record."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("flwr")
    logger.addHandler(handler)
    try:
        logger.warning("node %s", SECRET)
        SITE.addHandler(handler)
        SITE.warning("%s", SECRET)
        fail()
    except ValueError:
        SITE.exception("unexpected", stack_info=True)
    finally:
        logger.removeHandler(handler)
        SITE.removeHandler(handler)
    assert SECRET not in stream.getvalue()
    assert stream.getvalue().count("withheld") == 2
    assert len(stream.getvalue().splitlines()) == 3, "no traceback, no stack"


def test_a_record_that_no_scrubber_saw_says_nothing(federation) -> None:
    """One that was unpickled from another process, for instance."""
    handler = next(h for h in logging.getLogger().handlers if isinstance(h, scrub._PrivateFile))
    handler.handle(
        logging.makeLogRecord({"name": "medsegfed.site", "msg": SECRET, "levelname": "INFO", "scrubbed": False})
    )
    assert "medsegfed.site: message withheld" in written(federation)


def test_warnings_are_reduced(tmp_path: Path, keys) -> None:
    """Category and line of code; the text, and a path above the code's own, go."""
    log = federation_logging(tmp_path, keys, keep_streams=True)  # here: pytest takes the hook back after a fixture
    try:
        warnings.simplefilter("always")
        warnings.warn(f"invalid value in {SECRET}", UserWarning, stacklevel=1)
        warnings.warn_explicit(SECRET, DeprecationWarning, f"/{SECRET}/site-packages/pydicom/x.py", 7)
    finally:
        log.close()
    first, second = written(log).splitlines()
    assert "a UserWarning at " in first
    assert "test_scrub.py:" in first
    assert "a DeprecationWarning at pydicom/x.py:7" in second


def test_what_nobody_caught_is_reduced(federation) -> None:
    """The process's own hook, a thread's, and what Python cannot raise: class and line, at the right level."""
    try:
        fail()
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    thread = threading.Thread(target=fail, name=SECRET)
    thread.start()
    thread.join()

    class Falling:
        def __del__(self) -> None:
            fail()

    Falling()
    text = written(federation)
    assert "CRITICAL medsegfed.process: the process ends: ValueError at" in text
    assert "INFO    medsegfed.process: interrupted" in text
    assert "CRITICAL medsegfed.process: a thread ends: ValueError at" in text
    assert "ERROR   medsegfed.process: an exception that could not be raised: ValueError at" in text


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_log_is_bounded_and_private(tmp_path: Path, keys, monkeypatch) -> None:
    """However much is logged: the newest and four older files, each below its size, readable by their owner alone."""
    monkeypatch.setattr(scrub, "MAX_BYTES", 2000)
    log = federation_logging(tmp_path, keys, keep_streams=True)
    for number in range(500):
        SITE.info("line %d", number)
    log.close()
    files = sorted(log.path.parent.glob("site.log*"))
    assert [path.name for path in files] == ["site.log", *(f"site.log.{n}" for n in range(1, 5))]
    assert all(path.stat().st_size <= 2000 and path.stat().st_mode & 0o777 == 0o600 for path in files)
    assert log.path.read_text().rstrip().endswith("line 499")
    assert (tmp_path / scrub.CRASH).stat().st_mode & 0o777 == 0o600


def test_without_keys_cases_are_withheld(tmp_path: Path) -> None:
    """No hash that anybody could look up."""
    log = federation_logging(tmp_path, None, keep_streams=True)
    SITE.info("case %s", CaseName(SECRET))
    log.close()
    assert log.path.read_text().rstrip().endswith("case [withheld]")


def test_a_log_that_cannot_be_written_stops_the_start(tmp_path: Path, keys) -> None:
    """A file in place of the folder: one line, and the process is as it was."""
    (tmp_path / "state").write_text("x")
    factory = logging.getLogRecordFactory()
    with pytest.raises(UserError, match="the log cannot be written"):
        federation_logging(tmp_path, keys)
    assert logging.getLogRecordFactory() is factory


def test_a_disk_that_fills_later_stops_nothing(federation, capfd, monkeypatch) -> None:
    """A line is lost; nothing is raised, and nothing of it is printed elsewhere."""
    handler = next(h for h in logging.getLogger().handlers if isinstance(h, scrub._PrivateFile))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handler, "shouldRollover", full)  # the first to touch the disk
    SITE.info("case %s", SECRET)
    assert capfd.readouterr().err == ""


def state() -> tuple[object, ...]:
    """All that is changed of a process."""
    root = logging.getLogger()
    hooks = (sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning)
    streams = tuple(os.fstat(number).st_ino for number in (1, 2))
    return (logging.getLogRecordFactory(), logging.raiseExceptions, root.level, list(root.handlers), *hooks, *streams)


def test_closing_gives_the_process_back(tmp_path: Path, keys) -> None:
    """Hooks, factory, level, handlers and streams are those from before."""
    before = state()
    log = federation_logging(tmp_path, keys)
    assert state() != before
    os.write(2, b"into the void\n")
    log.close()
    assert state() == before
