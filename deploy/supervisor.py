"""Keeps processes alive at both ends of a federation. Knows nothing of Flower.

A child is started when those it comes after are ready, watched (does it live, does it answer, does it outgrow its
memory), and ended and started again when something is wrong: for ever, with growing pauses. Its session is ended as a
whole. It writes to a file, which is cut before it grows too large; there is no pipe that could fill and block it.
Children do not outlive the supervisor, not even one that is killed (guard.py).

    supervisor = Supervisor([...], state=folder / "state", events=report)
    supervisor.run()     # until SIGTERM or SIGINT; or start() ... stop() around other work

state/lock holds the folder for one supervisor; state/supervisor.json tells other processes what runs (`read_status`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploy import guard
from deploy.child import Backoff, Child, Life, guarded, wall_clock
from deploy.logfiles import rotate_log
from deploy.processes import Events
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic

log = logging.getLogger("medsegfed.supervisor")

TICK_SECONDS = 0.1
LOOK_SECONDS = 1.0  # between looks at memory and at the size of logs
SCAN_SECONDS = 5.0  # between looks at who belongs to which session: reads all of /proc
READY_SECONDS = 0.5  # between questions whether a starting child is ready
UNKILLABLE_SECONDS = 10.0  # after SIGKILL: whoever is still there waits for a broken device, and nobody can end it
HEALTHY_SECONDS = 60.0  # after that much health the pauses begin from the shortest again


class Supervisor:
    """Starts children in the order given, keeps them alive, ends them in reverse.

    Args:
        state: folder of lock and state file; made if missing.
        events: told what happens, as (event, facts): started, ready, exited, unhealthy, ending, restarting, stopped,
            predecessor_killed, stale_ended, trouble. Each but `trouble` carries "child". Called from the
            supervising thread.

    Raises:
        UserError: not on Linux.
        ValueError: two children of one name, or one that comes after, or restarts, what is not in the list.
    """

    def __init__(
        self, children: Sequence[Child], events: Events, *, state: Path, backoff: Callable[[], Backoff] = Backoff
    ) -> None:
        if sys.platform != "linux":
            raise UserError(
                f"Servers and sites run on Linux; this is {sys.platform}. Use a Linux machine or container."
            )
        names = [child.name for child in children]
        for index, child in enumerate(children):
            unknown = [name for name in child.after if name not in names[:index]]
            unknown += [name for name in child.restart_with if name not in names]
            if unknown or names.count(child.name) > 1:
                raise ValueError(f"child {child.name}: double name, or unknown ones: {unknown}")
        self.state = state.absolute()
        self._tell = events
        self._lives = {child.name: Life(child, backoff()) for child in children}
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._hurry = False
        self._asked: list[tuple[str, str]] = []  # restarts asked for from outside
        self._thread: threading.Thread | None = None
        self._watch: subprocess.Popen[bytes] | None = None
        self._me = guard.read_process(os.getpid())
        self._began = wall_clock()
        self._written: dict[str, Any] = {}
        self._unwritable = False
        self._next_look = self._next_scan = 0.0

    # From outside: any thread.

    def run(self) -> None:
        """Supervise in this thread until SIGTERM, SIGINT or SIGHUP; a second signal leaves out the grace.

        Raises:
            UserError: another supervisor holds the folder.
        """
        before = {}
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(name) is not signal.SIG_IGN:  # nohup
                before[name] = signal.signal(name, self._on_signal)
        try:
            with self._held():
                self._supervise()
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def start(self) -> None:
        """Supervise in a thread until `stop`. Raises UserError as `run` does."""
        held = contextlib.ExitStack()
        held.enter_context(self._held())

        # The thread that starts children must last as long as they: the kernel ends them with it.
        def supervise() -> None:
            with held:
                self._supervise()

        self._thread = threading.Thread(target=supervise, name="supervisor")
        self._thread.start()

    def stop(self) -> None:
        """End all children in reverse order; after `start`, return when they are gone."""
        self._stop.set()
        self._wake.set()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join()

    def restart(self, name: str, reason: str) -> None:
        """End a child and start it again, without a pause."""
        self._asked.append((self._lives[name].child.name, reason))
        self._wake.set()

    def status(self) -> dict[str, dict[str, Any]]:
        """By child: phase, pid, since (ISO), restarts, healthy, last_exit."""
        return {name: life.status() for name, life in self._lives.items()}

    # The supervising thread.

    def _on_signal(self, number: int, frame: object) -> None:
        self._hurry = self._stop.is_set()
        self._stop.set()
        self._wake.set()

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """The folder's lock; children left by a supervisor that is gone are ended first."""
        with hold(self.state / "lock"):
            path = self.state / "supervisor.json"
            record = _read_record(path)
            if _was_at_work(record):
                with contextlib.suppress(OSError):
                    last = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
                    self._emit("predecessor_killed", child=None, last_seen=last)
            for process in guard.end(record):
                self._emit("stale_ended", child=None, pid=process.pid)
            self._write_state()
            yield

    def _supervise(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    self._tick(time.monotonic())
                except Exception as error:  # a defect of ours must not leave the children without supervision
                    log.exception("supervision goes on")
                    self._emit("trouble", what=repr(error))
                    self._wake.wait(1.0)
                self._wake.wait(TICK_SECONDS)
                self._wake.clear()
        finally:
            self._end_all()

    def _tick(self, now: float) -> None:
        while self._asked:
            name, reason = self._asked.pop(0)
            self._lives[name].due = now
            if self._lives[name].phase in ("starting", "running"):
                self._end(self._lives[name], reason, now, backs_off=False)
        self._look_around(now)
        for life in self._lives.values():
            if life.phase == "waiting":
                if now >= life.due and all(self._lives[name].phase == "running" for name in life.child.after):
                    self._launch(life, now)
            elif life.phase == "ending":
                self._await_end(life, now)
            elif how := life.how_ended():
                self._fell(life, how, now)
            elif life.phase == "starting":
                self._await_ready(life, now)
            else:
                self._await_health(life, now)
        self._write_state()

    def _launch(self, life: Life, now: float) -> None:
        try:
            life.launch(now)
        except OSError as error:
            self._tell_exit(life, f"could not be started: {error}")
            self._pause(life, now, backs_off=True)
            return
        self._emit("started", child=life.child.name, pid=life.status()["pid"], restarts=life.starts - 1)
        if life.child.ready is None:
            self._ready(life, now)

    def _ready(self, life: Life, now: float) -> None:
        self._emit("ready", child=life.child.name, seconds=round(now - life.since, 1))
        life.check, life.next_check = None, now + life.child.health_seconds
        life.move("running", now)

    def _await_ready(self, life: Life, now: float) -> None:
        assert life.child.ready
        answer = life.ask(life.child.ready, READY_SECONDS, now)
        if answer:
            self._ready(life, now)
        elif now - life.since > life.child.start_seconds:
            self._end(life, f"not ready after {life.child.start_seconds:g} s", now)

    def _await_health(self, life: Life, now: float) -> None:
        child = life.child
        if child.health:
            answer = life.ask(child.health, child.health_seconds, now)
            if answer is True:
                life.failures = 0
            elif answer is False:
                life.failures += 1
                self._emit("unhealthy", child=child.name, failures=life.failures)
                if life.failures >= child.health_failures:
                    self._end(life, f"no answer {life.failures} times", now)
                    return
        if life.backoff.tries and not life.failures and now - life.since > HEALTHY_SECONDS:
            life.backoff.reset()

    def _look_around(self, now: float) -> None:
        """What need not be seen ten times a second."""
        if now >= self._next_scan:
            self._next_scan = now + SCAN_SECONDS
            with contextlib.suppress(OSError):  # for the next start, should this one be killed: until when it lived
                os.utime(self.state / "supervisor.json")
            if self._watch is None or self._watch.poll() is not None:
                self._start_watch()
            found = guard.processes()
            for life in self._lives.values():
                if life.process:
                    life.members = [one for one in found if one.session == life.process.pid and one.state != "Z"]
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            for life in self._lives.values():
                self._look(life, now)

    def _look(self, life: Life, now: float) -> None:
        """Its memory, and the size of its logs."""
        child = life.child
        for path in (child.log, *child.more_logs):
            rotate_log(path, int(child.log_mib * 2**20))
        if child.memory_mib and life.phase in ("starting", "running"):
            mebibytes = guard.memory_of(life.members) / 2**20
            if mebibytes > child.memory_mib:
                self._end(life, f"{mebibytes:.0f} MiB of memory, limit {child.memory_mib}", now)

    def _fell(self, life: Life, how: str, now: float) -> None:
        """It ended by itself: what is left of its session is ended, too."""
        life.deadline = now + min(life.child.grace_seconds, guard.GRACE_SECONDS)
        life.backs_off = True
        life.move("ending", now)
        life.send(signal.SIGTERM)
        self._tell_exit(life, how)
        self._end_companions(life, now)

    def _end(self, life: Life, reason: str, now: float, backs_off: bool = True) -> None:
        self._emit("ending", child=life.child.name, reason=reason)
        life.deadline = now + (0 if self._hurry else life.child.grace_seconds)
        life.backs_off = backs_off
        life.move("ending", now)
        life.send(life.child.stop_signal)
        self._end_companions(life, now)

    def _end_companions(self, life: Life, now: float) -> None:
        for name in () if self._stop.is_set() else life.child.restart_with:
            if self._lives[name].phase in ("starting", "running"):
                self._end(self._lives[name], f"{life.child.name} ended", now, backs_off=False)

    def _await_end(self, life: Life, now: float) -> None:
        if not life.told and (how := life.how_ended()):
            self._tell_exit(life, how)
        if life.gone():
            self._pause(life, now, life.backs_off)
        elif now >= life.deadline or self._hurry:
            life.send(signal.SIGKILL)

    def _pause(self, life: Life, now: float, backs_off: bool) -> None:
        pause = life.backoff.next() if backs_off else 0.0
        life.due = now + pause
        life.move("waiting", now)
        if not self._stop.is_set():
            self._emit("restarting", child=life.child.name, seconds=round(pause, 1), restarts=life.starts)

    def _tell_exit(self, life: Life, how: str) -> None:
        life.told, life.last_exit = True, how
        self._emit("exited", child=life.child.name, how=how, seconds=round(time.monotonic() - life.launched, 1))

    def _end_all(self) -> None:
        """In reverse order, one after the other: whoever needs another one goes before it."""
        for life in reversed(self._lives.values()):
            if life.phase in ("starting", "running"):
                self._end(life, "stopping", time.monotonic(), backs_off=False)
            while life.phase == "ending":
                self._await_end(life, time.monotonic())
                if time.monotonic() > life.deadline + UNKILLABLE_SECONDS:
                    self._emit("trouble", what=f"{life.child.name}: cannot be killed, left behind")
                    break
                time.sleep(0.02)
            if life.phase != "stopped":
                life.move("stopped", time.monotonic())
                self._emit("stopped", child=life.child.name)
            self._write_state()
        if self._watch:
            self._watch.kill()
            self._watch.wait()

    def _start_watch(self) -> None:
        assert self._me
        try:
            self._watch = subprocess.Popen(
                guarded("watch", str(self.state / "supervisor.json"), str(self._me.pid), str(self._me.start)),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True, cwd="/",
            )  # fmt: skip
        except OSError as error:
            self._emit("trouble", what=f"no watch over the children: {error}")

    def _write_state(self) -> None:
        """For other processes; for the watch; and for the next start, should this one be killed."""
        assert self._me
        content = {
            "boot": guard.boot(), "pid": self._me.pid, "start": self._me.start, "since": self._began,
            "children": {
                name: status | {
                    "start": self._lives[name].start,
                    "members": [[member.pid, member.start] for member in self._lives[name].members],
                }
                for name, status in self.status().items()
            },
        }  # fmt: skip
        if content == self._written:
            return
        try:
            write_atomic(self.state / "supervisor.json", json.dumps(content, indent=1).encode() + b"\n", 0o600)
            self._written, self._unwritable = content, False
        except UserError as error:  # a full disk is no reason to leave the children alone: tried again at each tick
            if not self._unwritable:
                self._emit("trouble", what=str(error))
            self._unwritable = True

    def _emit(self, event: str, **facts: Any) -> None:
        try:
            self._tell(event, facts)
        except Exception:  # whoever listens must not end the supervision
            log.exception("event %s", event)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold a lock file for this process; the kernel lets go of it when the process ends, however it ends.

    Raises:
        UserError: another process holds it (named), or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}), so nothing was started.") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise UserError(
                f"{path.parent}: process {owner} runs here already; nothing was started. See medsegfed status, or end "
                f"it first: kill {owner}"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def read_status(state: Path) -> dict[str, Any] | None:
    """What this folder's supervisor wrote: pid, since, children as `Supervisor.status` has them; None if none lives."""
    record = _read_record(state / "supervisor.json")
    process = guard.read_process(record["pid"]) if isinstance(record.get("pid"), int) else None
    alive = process and process.start == record.get("start") and record.get("boot") == guard.boot()
    return record if alive else None


def _was_at_work(record: dict[str, Any]) -> bool:
    """Whether the supervisor that left this record did not live to end its children."""
    return any(child.get("phase") != "stopped" for child in record.get("children", {}).values())


def _read_record(path: Path) -> dict[str, Any]:
    """The state file, {} if there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    children = found.get("children", {}) if isinstance(found, dict) else None
    sound = isinstance(children, dict) and all(isinstance(child, dict) for child in children.values())
    return found if sound else {}
