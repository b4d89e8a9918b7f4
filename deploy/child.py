"""One child of the supervisor: what it is told to be, and what is known of its life."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from deploy import guard

log = logging.getLogger("medsegfed.supervisor")

CHECK_SECONDS = 15.0  # a check that has not returned by then has failed

Phase = Literal["waiting", "starting", "running", "ending", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Child:
    """A process to keep alive. `ready` and `health` want time limits of their own: each runs in a thread."""

    name: str
    command: tuple[str, ...]
    log: Path  # standard output and error are appended here
    env: Mapping[str, str] | None = None  # the whole environment; None: the supervisor's
    cwd: Path | None = None
    ready: Callable[[], bool] | None = None  # None: ready once started
    health: Callable[[], bool] | None = None  # asked every `health_seconds` once ready
    after: tuple[str, ...] = ()  # started when these are ready; they stand before it in the list
    restart_with: tuple[str, ...] = ()  # those that do not survive its end and are started anew with it
    stop_signal: signal.Signals = signal.SIGTERM
    grace_seconds: float = 10.0  # from that signal to SIGKILL
    start_seconds: float = 120.0  # not ready by then: ended and started again
    health_seconds: float = 5.0
    health_failures: int = 3  # in a row: ended and started again
    memory_mib: int | None = None  # resident memory of its session; beyond it is ended and started again
    log_mib: float = 10.0
    more_logs: tuple[Path, ...] = ()  # files it writes itself, by appending, that are to stay as small


@dataclass
class Backoff:
    """Pauses between starts: 1, 2, 4, ... 30 seconds, each shortened by up to half at random.

    Chance keeps the sites of a federation from calling a recovering server in step.
    """

    first: float = 1.0
    longest: float = 30.0
    chance: Callable[[], float] = random.random
    tries: int = 0

    def next(self) -> float:
        """Seconds until the next start."""
        pause = min(self.longest, self.first * 2.0 ** min(self.tries, 16))
        self.tries += 1
        return pause * (1 - self.chance() / 2)

    def reset(self) -> None:
        self.tries = 0


class Check:
    """One question to a child, asked in a thread of its own: an answer may never come."""

    def __init__(self, question: Callable[[], bool]) -> None:
        self.begun = time.monotonic()
        self._answer: bool | None = None
        threading.Thread(target=self._ask, args=(question,), name="check", daemon=True).start()

    def _ask(self, question: Callable[[], bool]) -> None:
        try:
            self._answer = bool(question())
        except Exception as error:  # whatever a check raises, its child did not answer
            log.debug("check failed: %r", error)
            self._answer = False

    @property
    def answer(self) -> bool | None:
        """None while it is awaited."""
        late = time.monotonic() - self.begun > CHECK_SECONDS
        return False if self._answer is None and late else self._answer


@dataclass
class Life:
    """What the supervisor knows of one child."""

    child: Child
    backoff: Backoff
    phase: Phase = "waiting"
    process: subprocess.Popen[bytes] | None = None
    start: int = 0  # of the process, clock ticks
    members: list[guard.Process] = field(default_factory=list)
    launched: float = 0.0  # monotonic
    since: float = 0.0  # monotonic, of the phase
    changed: str = ""  # the same as wall clock time
    due: float = 0.0  # waiting: no start before
    deadline: float = 0.0  # ending: SIGKILL from then on
    backs_off: bool = False  # ending: through its own fault
    starts: int = 0
    failures: int = 0
    check: Check | None = None
    next_check: float = 0.0
    last_exit: str | None = None
    told: bool = False  # the end of this process was reported

    def status(self) -> dict[str, Any]:
        process = self.process  # once: the supervising thread may forget it meanwhile
        return {
            "phase": self.phase,
            "pid": process.pid if process else None,
            "since": self.changed,
            "restarts": max(0, self.starts - 1),
            "healthy": self.phase == "running" and not self.failures,
            "last_exit": self.last_exit,
        }

    def launch(self, now: float) -> None:
        """Start the process, in a session of its own and tied to the life of this thread.

        Raises:
            OSError: no disk, no memory, no such folder.
        """
        child = self.child
        self.launched, self.told = now, False
        child.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(child.log, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as out:
            out.write(f"--- {wall_clock()} {child.name} starts\n".encode())
            out.flush()
            self.process = subprocess.Popen(
                guarded("exec", str(os.getpid()), *child.command),
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                env=None if child.env is None else dict(child.env),
                cwd=child.cwd, start_new_session=True,
            )  # fmt: skip
        leader = guard.read_process(self.process.pid)
        self.members = [leader] if leader else []
        self.start = leader.start if leader else 0
        self.starts += 1
        self.failures, self.check, self.next_check = 0, None, now
        self.move("starting", now)

    def move(self, phase: Phase, now: float) -> None:
        self.phase, self.since, self.changed = phase, now, wall_clock()

    def ask(self, question: Callable[[], bool], interval: float, now: float) -> bool | None:
        """An answer that has just come in, else None; `interval` seconds later the question is put again."""
        if self.check is None:
            if now >= self.next_check:
                self.check = Check(question)
            return None
        answer = self.check.answer
        if answer is not None:
            self.check, self.next_check = None, now + interval
        return answer

    def how_ended(self) -> str | None:
        """How the process ended, None while it lives. Not waited for yet: so no stranger can be given its number."""
        assert self.process
        try:
            found = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return "waited for elsewhere"
        if found is None:
            return None
        if found.si_code == os.CLD_EXITED:
            return f"exit code {found.si_status}"
        return f"signal {found.si_status}, {signal.strsignal(found.si_status)}"

    def gone(self) -> bool:
        """Whether the process and everyone of its session have ended; then it is forgotten."""
        if self.process and (self.how_ended() is None or guard.session_members(self.process.pid)):
            return False
        if self.process:
            self.process.wait()
        self.process, self.members = None, []
        return True

    def send(self, wanted: signal.Signals) -> None:
        """To everyone of the session: a grandchild may have left the process group."""
        if self.process:
            for member in guard.session_members(self.process.pid):
                guard.send(member, wanted)


def guarded(*arguments: str) -> list[str]:
    """The command that runs guard.py with these arguments."""
    return [sys.executable, "-I", "-S", guard.__file__, *arguments]


def wall_clock() -> str:
    """Now, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
