"""Logs of a federation: what happened and where in our code, and nothing of a patient.

Error texts and warnings name files, and files are named after patients. So, in a site's running process, a log line is
scrubbed where it is born, before any handler (ours, Flower's, one that a library adds later) sees it:

- Our own loggers (`medsegfed.*`): the text in our code stands; of what is filled in, numbers and `Public` texts pass, a
  `CaseName` becomes the site's keyed hash of it, everything else is withheld. In the files of `SAFE`, which speak of
  runs, rounds and connections, short plain texts pass too, paths never.
- An exception, filled in or raised, is reduced to its class, the lines of our code and the classes of its causes; its
  text is withheld. A `Refusal` and a `ContractError` pass: they speak of runs, policy and what the server sent.
- All others (Flower, torch, nibabel, pydicom, Pillow, ...): logger, level and line of code; the message is withheld.
- Warnings, uncaught exceptions of the process and its threads, and exceptions that Python cannot raise: as above.
- What code below Python prints (libraries in C write names of files to stderr) is discarded; crashes of the interpreter
  leave the lines of code where they happened (`faulthandler`), and no core file, which would hold images.

Names are found by who is at the site: `medsegfed doctor` tells at its terminal what is wrong with which file. A
simulation does none of this: its terminal shows all.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import resource
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from logging.handlers import RotatingFileHandler
from numbers import Number
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import client
from client.approvals import shown
from client.contract import ContractError
from client.refusal import Refusal
from medsegdiff.errors import UserError

LOG = Path("state") / "logs" / "site.log"  # below the site's folder
CRASH = LOG.with_name("crash.log")
MAX_CRASH = 500_000  # bytes, beyond which it is begun anew
MAX_BYTES, BACKUPS = 2_000_000, 4  # 10 MB in all
MAX_LINE = 2000  # signs of a line
WITHHELD = "[withheld]"
DOCTOR = "for names, run medsegfed doctor at the site's terminal"

OURS = "medsegfed"
SAFE = frozenset({"client/runner.py", "client/guard.py", "client/outbox.py", "client/supernode.py"})
_ROOT = Path(client.__path__[0]).parent
_PACKAGES = ("client", "medsegdiff", "deploy", "server", "simulations")


class CaseName(str):
    """The name of a case or patient, given to a logger: shown as it is, or in a federation as its keyed hash."""


class Public(str):
    """A text that holds no name of a patient or file, given to a logger: shown in a federation, too."""


class CaseKeys(Protocol):
    """The site's key for names (`client.keys.SiteKeys`)."""

    def case_hash(self, name: str) -> str:
        """12 hex digits that only this site can tie to the name."""


def reduced(error: BaseException) -> str:
    """An exception without its text: class, where in our code, classes of its causes."""
    if isinstance(error, (Refusal, ContractError)):
        return str(error)
    names: list[str] = []
    seen, cause = {id(error)}, error.__cause__ or error.__context__
    while cause is not None and id(cause) not in seen and len(names) < 5:
        names.append(_class(cause))
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    text = _class(error) + (f" (from {', from '.join(names)})" if names else "")
    text += f" at {_where(error.__traceback__)}"
    return f"{text}; {DOCTOR}" if isinstance(error, UserError) else text


def case_label(keys: CaseKeys | None, name: str) -> str:
    """What logs call a case."""
    return f"#{keys.case_hash(name)}" if keys is not None else WITHHELD


def _class(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _where(trace: TracebackType | None) -> str:
    """The lines of our packages in a traceback, outermost first; of a foreign one, its innermost."""
    frames = [(_code(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(trace)]
    ours = [f"{name}:{line}" for name, line in frames if name.split("/", 1)[0] in _PACKAGES]
    if ours:
        return " > ".join(ours[-6:])
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else "an unknown line"


def _code(path: str) -> str:
    """A file of code: ours by its place in the project, others by their last two parts, whatever lies above."""
    with suppress(ValueError):
        return Path(path).relative_to(_ROOT).as_posix()
    return "/".join(Path(path).parts[-2:])


class Scrubber:
    """Turns log records into what may be written down."""

    def __init__(self, keys: CaseKeys | None) -> None:
        self.keys = keys

    def scrub(self, record: logging.LogRecord) -> logging.LogRecord:
        """Replace message, arguments and exception of a record in place; whatever fails here withholds the message."""
        try:
            text = self._text(record)
        except Exception:  # a message that cannot be put together is a defect, its parts must not be shown
            text = f"[a message that could not be put together] ({_code(record.pathname)}:{record.lineno})"
        record.msg = shown(" ".join(text.split()), MAX_LINE)
        record.args = record.exc_info = record.exc_text = record.stack_info = None
        record.scrubbed = True
        return record

    def _text(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        behind = f": {reduced(error)}" if error is not None else ""
        if record.name != OURS and not record.name.startswith(f"{OURS}."):
            return f"message withheld ({_code(record.pathname)}:{record.lineno}){behind}"
        template, safe = record.msg, _code(record.pathname) in SAFE
        if not isinstance(template, str):
            return str(self._shown(template, safe)) + behind
        if isinstance(record.args, Mapping):
            return template % {key: self._shown(value, safe) for key, value in record.args.items()} + behind
        if record.args:
            return template % tuple(self._shown(value, safe) for value in record.args) + behind
        return template + behind

    def _shown(self, value: object, safe: bool) -> Any:
        if value is None or isinstance(value, Number):
            return value
        if isinstance(value, CaseName):
            return case_label(self.keys, value)
        if isinstance(value, Public):
            return shown(value, 200)
        if isinstance(value, BaseException):
            return reduced(value)
        if safe and isinstance(value, str) and len(value) <= 200 and not set(value) & set("/\\"):
            return shown(value, 200)
        return WITHHELD


class _Formatter(logging.Formatter):
    """One line a record, UTC; a record that no scrubber saw says nothing."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        text = str(record.msg) if getattr(record, "scrubbed", False) else "message withheld"
        return f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%SZ')} {record.levelname:<7} {record.name}: {text}"


class _PrivateFile(RotatingFileHandler):
    """A log file of bounded size that its owner alone may read."""

    def _open(self) -> IO[str]:  # type: ignore[override]  # typeshed: TextIOWrapper, which this is
        return open(self.baseFilename, self.mode, encoding="utf-8", opener=_owner_only)


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class FederationLog:
    """The log of a site's process; `close` gives the process back as it was, for tests."""

    def __init__(self, folder: Path, keys: CaseKeys | None, keep_streams: bool = False) -> None:
        self.path = folder / LOG
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handler = _PrivateFile(self.path, maxBytes=MAX_BYTES, backupCount=BACKUPS, delay=False)
            crash = open(folder / CRASH, "a", encoding="utf-8", opener=_owner_only)  # noqa: SIM115
            if crash.tell() > MAX_CRASH:
                crash.truncate(0)
        except OSError as error:
            raise UserError(
                f"{self.path}: the log cannot be written ({error.strerror or error}); nothing was started. Free "
                "space or mend the permissions, then repeat."
            ) from error
        handler.setFormatter(_Formatter())
        self._undo: list[Callable[[], object]] = [handler.close, crash.close]
        self._records(Scrubber(keys), handler)
        self._hooks()
        self._crashes(crash)
        if not keep_streams:
            self._streams()

    def close(self) -> None:
        """Undo all of it, the last first."""
        while self._undo:
            self._undo.pop()()

    def _set(self, owner: Any, name: str, value: object) -> None:
        before = getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, before))

    def _records(self, scrubber: Scrubber, handler: logging.Handler) -> None:
        """Scrub every record at its birth; write those that reach the root logger."""
        factory = logging.getLogRecordFactory()
        logging.setLogRecordFactory(lambda *parts, **named: scrubber.scrub(factory(*parts, **named)))
        self._undo.append(lambda: logging.setLogRecordFactory(factory))
        self._set(logging, "raiseExceptions", False)  # logging would print the arguments of a record that fails
        root = logging.getLogger()
        level = root.level
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        self._undo += [lambda: root.setLevel(level), lambda: root.removeHandler(handler)]

    def _hooks(self) -> None:
        """What is reported past the loggers."""
        log = logging.getLogger(f"{OURS}.process")

        def warning(_message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
            log.warning(
                "a %s at %s; its text is withheld", Public(category.__name__), Public(f"{_code(filename)}:{lineno}")
            )

        def uncaught(kind: type[BaseException], error: BaseException | None, _: TracebackType | None) -> None:
            if isinstance(error, KeyboardInterrupt):
                log.info("interrupted")
            else:
                log.critical("the process ends: %s", error if error is not None else Public(kind.__name__))

        def in_thread(args: threading.ExceptHookArgs) -> None:
            log.critical("a thread ends: %s", args.exc_value or Public(args.exc_type.__name__))

        def unraisable(args: Any) -> None:
            log.error("an exception that could not be raised: %s", args.exc_value or Public(args.exc_type.__name__))

        self._set(warnings, "showwarning", warning)
        self._set(sys, "excepthook", uncaught)
        self._set(threading, "excepthook", in_thread)
        self._set(sys, "unraisablehook", unraisable)

    def _crashes(self, crash: IO[str]) -> None:
        was_on = faulthandler.is_enabled()
        faulthandler.enable(crash, all_threads=True)
        self._undo.append(lambda: faulthandler.enable() if was_on else faulthandler.disable())
        limits = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, limits[1]))
        self._undo.append(lambda: resource.setrlimit(resource.RLIMIT_CORE, limits))

    def _streams(self) -> None:
        """Discard stdout and stderr, of Python and of the libraries below it."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        null = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            kept = os.dup(number)
            os.dup2(null, number)
            self._undo += [partial(os.close, kept), partial(os.dup2, kept, number)]
        os.close(null)


def federation_logging(folder: Path, keys: CaseKeys | None, keep_streams: bool = False) -> FederationLog:
    """From now on this process writes its log to `folder`/state/logs/site.log, scrubbed, and nowhere else.

    Args:
        folder: the site's.
        keys: hashes names of cases; without them they are withheld.
        keep_streams: leave stdout and stderr as they are, for a process that is watched on a terminal.

    Raises:
        UserError: the log cannot be written.
    """
    return FederationLog(folder, keys, keep_streams)
