"""A federation as its server leaves it on the disk: members, a run, an access log, a supervisor's record."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from told_run import BEGIN, ROSTER, Events, plan_of, write_run

from client.certificates import openssh_line
from deploy import guard
from deploy.federation import Federation, init_federation, open_federation
from medsegdiff.files import write_atomic
from server.members import Member, iso, write_members

DAY = 86_400.0
RUN_ID = "glioma-1-0123456789ab"


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def make_federation(folder: Path, sites: tuple[str, ...] = tuple(ROSTER)) -> Federation:
    """A federation with members whose certificates end 90, 89, ... days after the story's beginning."""
    shutil.copytree(_bare_federation(), folder)
    key = openssh_line(ec.generate_private_key(ec.SECP384R1()).public_key())  # one for all: nobody signs here
    members = {
        site: Member(
            site, key, f"{number:064x}", 100, f"{number + 1:x}", iso(at(BEGIN + (90 - number) * DAY)), "admitted",
            iso(at(BEGIN)),
        )
        for number, site in enumerate(sites)
    }  # fmt: skip
    federation = open_federation(folder)
    write_members(federation.members_file, members)
    return federation


@lru_cache(maxsize=1)
def _bare_federation() -> Path:
    """Made once: keys and certificates take their time."""
    scratch = tempfile.TemporaryDirectory(prefix="medsegfed-test-")
    atexit.register(scratch.cleanup)
    return init_federation(Path(scratch.name) / "federation", "brain-net", ["fed.example.org"]).folder


def tell_run(federation: Federation, events: Events, name: str = "glioma-1", queued: bool = True, **plan: Any) -> Path:
    """A run folder; the journal is as old as its last event."""
    folder = write_run(federation.runs / name, events, plan_of(name=name, **plan), model=False)
    if queued:
        (folder / "queued.json").write_text(json.dumps({"time": BEGIN - 5.0, "by": "x", "events": 0}))
    newest = events[-1]["time"] if events else BEGIN - 5.0
    for path in folder.iterdir():
        os.utime(path, (newest, newest))
    return folder


def requests(federation: Federation, *rows: tuple[float, str, int], received: int = 1000, sent: int = 500) -> None:
    """Append (time, site, status) to the gateway's access log."""
    federation.logs.mkdir(parents=True, exist_ok=True)
    with (federation.logs / "access.jsonl").open("a", encoding="utf-8") as log:
        for time, site, status in rows:
            row = {
                "time": time, "site": site, "route": "pull-messages", "status": status, "received": received,
                "sent": sent, "seconds": 0.1, "remote": "192.0.2.1",
            }  # fmt: skip
            log.write(json.dumps(row) + "\n")


def decide(federation: Federation, round_: int, site: str, time: float, decision: str = "accepted") -> None:
    """A line of the audit log about an update, as of `time`; the chain of hashes is made up."""
    told = at(time).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = {"n": 1, "time": told, "event": "update", "run": RUN_ID, "round": round_, "site": site, "key": "0f" * 32}
    with federation.audit_file.open("a") as log:
        log.write(json.dumps(line | {"decision": decision, "prev": "0" * 64, "hash": "f" * 64}) + "\n")


def supervise(federation: Federation, **children: dict[str, Any]) -> None:
    """The record of a supervisor that lives: this process."""
    me = guard.read_process(os.getpid())
    assert me is not None
    record = {
        "boot": guard.boot(), "pid": me.pid, "start": me.start, "since": iso(at(BEGIN)),
        "children": {
            name: {
                "phase": "running", "pid": 4000 + n, "since": iso(at(BEGIN)), "restarts": 0, "healthy": True,
                "last_exit": None,
            } | child
            for n, (name, child) in enumerate(children.items())
        },
    }  # fmt: skip
    write_atomic(federation.state / "supervisor.json", json.dumps(record).encode())
