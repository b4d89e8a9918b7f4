"""Federations of fake sites behind a fake network and clock, with members who can be suspended and lifted: runs of the
real strategy and exchange, as fast as they compute."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.contract import TrainTask, arrays_to_wire
from medsegdiff.weights import initial_weights
from server import exchange
from server.checkpoints import CheckpointStore
from server.config import RunPlan, StrategyConfig
from server.journal import Journal
from server.strategy import FederatedAveraging
from tests.fake_sites import FakeSites

Content = RecordDict | Error | None  # None: nothing has come yet
Answer = Callable[[Message], Content]


class Clock:
    """Time that passes when somebody sleeps."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Network:
    """Grid with `get_nodes`, as Flower's over HTTP: one node a site."""

    def __init__(self, names: Iterable[str]) -> None:
        self.nodes = dict(enumerate(names, 11))
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, str, str]] = []  # site, kind, round
        self._sent: dict[str, Message] = {}
        self._numbers = itertools.count(1)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(node_id=n, name=name, last_activated_at="t") for n, name in self.nodes.items()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(f"m{next(self._numbers)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self._sent[ids[-1]] = message
            site = self.nodes[message.metadata.dst_node_id]
            self.asked.append((site, message.metadata.message_type, message.metadata.group_id))
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        replies = []
        for message_id in ids:
            message = self._sent[message_id]
            answer = self.answers[self.nodes[message.metadata.dst_node_id]](message)
            if answer is not None:
                replies.append(Message(answer, reply_to=message))
        return replies


class Members:
    """A membership without files: virtual keys, so that nothing need be signed here."""

    def __init__(self, names: Iterable[str]) -> None:
        self.status = dict.fromkeys(names, "admitted")
        self.notes: list[dict[str, Any]] = []

    def active(self) -> dict[str, Any]:
        return {site: SimpleNamespace(signing_key=None) for site, word in self.status.items() if word == "admitted"}

    def suspended(self) -> set[str]:
        return {site for site, word in self.status.items() if word == "suspended"}

    def suspend(self, site: str, **fields: Any) -> None:
        if not self.has("site_suspended", site=site, **fields):
            self.status[site] = "suspended"
            self.note("site_suspended", site=site, **fields)

    def lift(self, site: str) -> None:
        self.status[site] = "admitted"

    def has(self, event: str, **fields: Any) -> bool:
        return any({"event": event, **fields}.items() <= note.items() for note in self.notes)

    def note(self, event: str, **fields: Any) -> None:
        self.notes.append({"event": event, **fields})


class Federation:
    """One run of so many sites, which may be taken up again.

    Args:
        changes: of the plan.
    """

    def __init__(
        self, folder: Path, patch: pytest.MonkeyPatch, task: TrainTask, names: Iterable[str], **changes: Any
    ) -> None:
        roster = dict.fromkeys(names, 3)
        patience = {"deadline_seconds": 600.0, "absence_seconds": 60.0}
        strategy = changes.pop("strategy", StrategyConfig())
        self.plan = RunPlan("tiny", "tiny", strategy, roster, task, **{"engine": "network", **patience, **changes})
        self.folder, self.clock = folder, Clock()
        self.network, self.members = Network(roster), Members(roster)
        patch.setattr(exchange, "time", self.clock)
        sites = FakeSites(self.plan)
        for name in roster:
            self.network.answers[name] = lambda m, name=name: sites.content(name, m.metadata.message_type, m)

    def spoil(
        self, site: str, how: Callable[[RecordDict], Content], when: Callable[[int], bool] = lambda _: True
    ) -> None:
        """What becomes of a site's updates, in the rounds in which `when` is true."""

        def change(good: Answer, message: Message) -> Content:
            content = good(message)
            return how(content) if isinstance(content, RecordDict) else content

        self._change(site, change, when)

    def silence(self, site: str, when: Callable[[int], bool]) -> None:
        """A site that does not answer the training of some rounds."""
        self._change(site, lambda good, message: None, when)

    def _change(self, site: str, how: Callable[[Answer, Message], Content], when: Callable[[int], bool]) -> None:
        good = self.network.answers[site]

        def answer(message: Message) -> Content:
            trains = message.metadata.message_type == MessageType.TRAIN
            return how(good, message) if trains and when(int(message.metadata.group_id)) else good(message)

        self.network.answers[site] = answer

    def start(self, through: int | None = None) -> None:
        """Carry the run out, with a server that was started anew, through a round."""
        store = CheckpointStore(self.folder / "checkpoints")
        strategy = FederatedAveraging(self.plan, store, self.journal, self.members)  # type: ignore[arg-type]
        begin = arrays_to_wire(initial_weights(self.plan.task.model, 0))
        strategy.start(self.network, begin, through or self.plan.task.rounds)  # type: ignore[arg-type]

    @property
    def journal(self) -> Journal:
        return Journal(self.folder / "journal.jsonl")

    def told(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.journal.events if line["event"] == event]

    def rounds(self) -> list[dict[str, Any]]:
        """The committed ones, the first model aside."""
        return [line for line in self.told("round") if line["round"]]
