"""What the processes of both ends have in common: environment, shared secret, free ports, readiness."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from server.journal import Journal

log = logging.getLogger("medsegfed.supervisor")

LOOPBACK = "127.0.0.1"
MOST_EVENTS = 20_000  # in a supervisor's journal: some weeks of a run that dies every minute

Events = Callable[[str, dict[str, Any]], None]


# glibc learns from the first 5 MiB piece of a message that is freed to keep the next ones for itself: a process that
# moves models holds several of them for good. Above this size memory goes back when it is freed. Not for what trains:
# the tensors of every step would be asked for anew.
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": str(128 * 2**10),
    "MALLOC_TRIM_THRESHOLD_": str(128 * 2**10),
    "MALLOC_ARENA_MAX": "2",
}


def environment(flower_home: Path, **more: str) -> dict[str, str]:
    """The environment of Flower's processes: nothing is told to its vendor, loopback goes through no proxy."""
    flower_home.mkdir(mode=0o700, parents=True, exist_ok=True)
    bypass = [name for name in os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")).split(",") if name]
    bypass += [name for name in (LOOPBACK, "localhost") if name not in bypass]
    own = str(Path(sys.executable).parent)  # flwr-serverapp is looked for on PATH
    return {
        **os.environ,
        "PATH": os.pathsep.join([own, os.environ.get("PATH", os.defpath)]),
        "NO_PROXY": ",".join(bypass),
        "no_proxy": ",".join(bypass),
        "FLWR_HOME": str(flower_home.resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # take no module from the current folder: a federation has a server/ of its own
        **more,
    }


def shared_secret(path: Path) -> Path:
    """A file with a random secret that two processes of this machine share; made at the first call."""
    if not path.exists():
        write_atomic(path, secrets.token_bytes(32), 0o600)
    return path


def free_ports(count: int) -> list[int]:
    """Loopback ports that are free at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for held in sockets:
            held.bind((LOOPBACK, 0))
        return [held.getsockname()[1] for held in sockets]
    finally:
        for held in sockets:
            held.close()


def answers_https(port: int, ca_file: Path) -> bool:
    """Whether a server of the federation answers on this loopback port."""
    context = ssl.create_default_context(cafile=str(ca_file))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(f"https://{LOOPBACK}:{port}/health", timeout=3) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def teller(path: Path, events: Events) -> Events:
    """Who tells what happens to processes, to a journal and to `events`: from any thread, and without ever raising.

    Standard output may be a full disk or a pipe whose reader is gone; whoever keeps processes alive must go on. A
    journal that is damaged is kept aside, for nothing depends on it; of one that has grown long, the part before is
    (path.1), for all of it is read at every look at the status.

    Args:
        path: of the journal.
    """
    lock, damage = threading.Lock(), None
    try:
        journal = Journal(path)
    except UserError as error:
        aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
        path.replace(aside)
        journal, damage = Journal(path), {"reason": str(error).partition(";")[0], "kept": aside.name}

    def tell(event: str, facts: dict[str, Any]) -> None:
        nonlocal journal
        with lock:
            if len(journal.events) >= MOST_EVENTS:
                with contextlib.suppress(OSError):
                    path.replace(path.with_name(f"{path.name}.1"))
                    journal = Journal(path)
            note(journal, event, facts)
        try:
            events(event, facts)
        except Exception as error:
            log.warning("%s: could not be told: %s", event, error)

    if damage is not None:
        tell("journal_damaged", damage)
    return tell


def note(journal: Journal, event: str, facts: dict[str, Any]) -> None:
    """Write down what happened to a process. A full disk must not end whoever keeps the processes alive."""
    try:
        journal.append(event, **facts)
    except UserError as error:
        log.error("%s", error)
