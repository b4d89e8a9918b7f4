"""One real site in a folder of its own, as its runner would serve it, for tests that need no network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client import guard as guard_module
from client.app import app
from client.approvals import approve, pending_run
from client.contract import Assignment, Invitation, TrainTask, arrays_to_wire, to_wire
from client.guard import Guard, guard_of
from client.keys import SiteKeys
from client.site import Site, open_site
from medsegdiff.chained_log import audit_lines
from medsegdiff.weights import hash_weights, initial_weights


class Hospital:
    """One real site in a folder of its own, as its runner would serve it."""

    def __init__(self, folder: Path, task: TrainTask) -> None:
        self.folder, self.task = folder, task
        self.guard = self.open()

    def open(self) -> Guard:
        open_site.cache_clear()
        guard_module._guard.cache_clear()
        found = guard_of(Site(self.folder / "site.yaml"))
        assert found is not None
        return found

    def ask(self, kind: str, **records: object) -> Message:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        message = Message(RecordDict({"task": to_wire(self.task)} | records), 1000, kind)
        message.metadata.__dict__["_message_id"] = "m-1"
        return app(message, Context(1, 1000, {}, RecordDict(), {}))

    def train(self, round_: int = 1, seed: int = 0, run: str = "run-1") -> Message:
        weights = initial_weights(self.task.model, seed)
        asked = Assignment(run, round_, hash_weights(weights))
        return self.ask(MessageType.TRAIN, assignment=to_wire(asked), weights=arrays_to_wire(weights))

    def approve(self, run: str = "run-1") -> None:
        self.ask(MessageType.QUERY, invitation=to_wire(Invitation(run, "n")))
        approve(self.folder, pending_run(self.folder, run), self.guard.keys, self.guard.application, "Dr. Night")

    def audited(self, event: str) -> list[dict[str, Any]]:
        return [line for line in audit_lines(self.folder / "audit.jsonl") if line["event"] == event]


def make_hospital(folder: Path, world: Path, task: TrainTask, policy: str, more: str = "") -> Hospital:
    """A site with keys and an installed kit; its data are those of the virtual site of that name in `world`."""
    shutil.copytree(world / folder.name, folder)
    shutil.rmtree(folder / "data")
    (folder / "data").symlink_to((world / folder.name / "data").resolve())  # its paths are relative to that place
    with open(folder / "site.yaml", "a") as handle:
        handle.write(f"keys: keys\npolicy: {policy}\n{more}")
    keys = SiteKeys.create(folder / "keys")
    (folder / "keys" / "ca.crt").write_text("")
    said = {"federation": "net", "site": folder.name, "server": "fed.example.org:8443"}
    (folder / "keys" / "federation.json").write_text(json.dumps(said))
    for path in (keys.folder / "ca.crt", keys.folder / "federation.json"):
        path.chmod(0o600)
    return Hospital(folder, task)
