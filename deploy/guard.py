"""Children that cannot outlive their supervisor: what runs beside them, and who is ended by it.

Stdlib only and free of our own imports: a bare interpreter (`python -I -S guard.py ...`) runs this file, in 20 ms.

    guard.py exec SUPERVISOR COMMAND...       become COMMAND; the kernel kills it when the process SUPERVISOR dies
    guard.py watch RECORD SUPERVISOR START    wait for the end of the process SUPERVISOR, then end the sessions that
                                              RECORD names, grandchildren included

The kernel's signal reaches a child alone: nginx's workers, for one, go on serving when their master is killed. So every
child leads a session of its own, and the watch ends whole sessions. What both missed the next start ends, from the same
record. Nobody is ended by name: a process counts as ours by its number *and* its start time.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

PR_SET_PDEATHSIG = 1  # linux/prctl.h
GRACE_SECONDS = 3.0  # for orphans, from the polite signal to the certain one


class Process(NamedTuple):
    """One process: a number alone may be given to a stranger, number and start time never."""

    pid: int
    start: int  # clock ticks after boot
    parent: int
    session: int  # number of the process that leads its session
    state: str  # Z: ended, but not yet waited for


def read_process(pid: int) -> Process | None:
    """The process of this number, None where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as handle:
            text = handle.read()
    except OSError:
        return None
    # The name, in brackets, may hold blanks and brackets: fields are counted from the last one. proc(5)
    fields = text[text.rfind(b")") + 2 :].split()
    return Process(pid, int(fields[19]), int(fields[1]), int(fields[3]), fields[0].decode())


def processes() -> list[Process]:
    """All processes that can be seen."""
    found = (read_process(int(name)) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208 - hot
    return [process for process in found if process]


def boot() -> str:
    """Which boot of the machine this is: start times of another one mean nothing."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as handle:
        return handle.read().strip()


def session_members(leader: int) -> list[Process]:
    """Living processes of the session that `leader` leads or led."""
    return [process for process in processes() if process.session == leader and process.state != "Z"]


def memory_of(members: Iterable[Process]) -> int:
    """Resident bytes of some processes; pages that they share are counted in each."""
    pages = 0
    for member in members:
        with contextlib.suppress(OSError), open(f"/proc/{member.pid}/statm", encoding="ascii") as handle:
            pages += int(handle.read().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def send(process: Process, wanted: signal.Signals) -> None:
    """Signal exactly this process, or nobody if it is gone and its number has a new owner."""
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(process.pid)
        try:
            now = read_process(process.pid)
            if now and now.start == process.start:  # the descriptor holds on to this one, whatever follows
                signal.pidfd_send_signal(descriptor, wanted)
        finally:
            os.close(descriptor)


def recorded(record: dict[str, Any], just_now: bool) -> list[Process]:
    """Who still lives of the children and their sessions that a supervisor wrote down.

    Args:
        record: {"boot", "children": {name: {"pid", "start", "members": [[pid, start], ...]}}}.
        just_now: the supervisor died this instant. A session without its leader is then still the one recorded; later
            its number may belong to strangers, and only members that were written down are taken for ours.
    """
    if record.get("boot") != boot():
        return []
    found = processes()
    by_number = {process.pid: process for process in found}
    ours: dict[int, Process] = {}
    for child in record.get("children", {}).values():
        pid, start = child.get("pid"), child.get("start")
        if not pid or not start:
            continue
        leader = by_number.get(pid)
        if leader and leader.start != start:
            continue  # the number went to a stranger, which it can only when nobody of the session is left
        if leader or just_now:
            ours |= {process.pid: process for process in found if process.session == pid and process.start >= start}
        for number, begun in child.get("members", []):
            member = by_number.get(number)
            if member and member.start == begun:
                ours[number] = member
    return [process for process in ours.values() if process.state != "Z" and process.pid != os.getpid()]


def end(record: dict[str, Any], grace: float = GRACE_SECONDS, just_now: bool = False) -> list[Process]:
    """End everyone whom `record` names: asked politely, then, after `grace` seconds, killed. Returns whom it met."""
    met = {process.pid: process for process in recorded(record, just_now)}
    for process in met.values():
        send(process, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while left := recorded(record, just_now):
        met |= {process.pid: process for process in left}
        if time.monotonic() > deadline:
            for process in left:
                send(process, signal.SIGKILL)
        if time.monotonic() > deadline + 10:  # in an uninterruptible wait for a device: nobody can end it
            break
        time.sleep(0.05)
    return list(met.values())


def _become(supervisor: int, command: list[str]) -> int:
    """Tie this process to its supervisor's life and become `command`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:  # it died before the kernel was told
        return 1
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: cannot be started ({error.strerror})", file=sys.stderr)
        return 127


def _watch(record: str, supervisor: int, start: int) -> int:
    """Outlive the supervisor by as long as it takes to end its children."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # those are meant for the supervisor
        signal.signal(name, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # gone already
        descriptor = os.pidfd_open(supervisor)
        found = read_process(supervisor)
        if found and found.start == start:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll()
    try:
        with open(record, encoding="utf-8") as handle:
            content = json.load(handle)
    except (OSError, ValueError):
        return 1
    if (content.get("pid"), content.get("start")) == (supervisor, start):  # else a new one is in charge
        end(content, just_now=True)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "exec":
        sys.exit(_become(int(sys.argv[2]), sys.argv[3:]))
    sys.exit(_watch(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
