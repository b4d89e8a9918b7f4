"""The in-process engine: Flower's ServerApp and ClientApps in one process, one site at a time.

A message is delivered when its reply is asked for, so one site's training is in memory at once; the applications are
the very ones a real federation runs.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE = 1
UNDELIVERABLE = 101  # Error.code when a ClientApp raised instead of answering


App = Callable[[Message, Context], Message]  # a ClientApp, or whatever is called like one


class InlineGrid(Grid):
    """Grid over virtual nodes 1000, 1001, ... that share this process."""

    def __init__(self, client_app: App, sites: int) -> None:
        self._client_app = client_app
        self._contexts = {
            1000 + index: Context(
                run_id=1,
                node_id=1000 + index,
                node_config={"partition-id": index, "num-partitions": sites},
                state=RecordDict(),
                run_config={},
            )
            for index in range(sites)
        }
        self._waiting: dict[str, Message] = {}
        self._numbers = itertools.count(1)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SERVER_NODE

    def set_run(self, run: Any) -> None:
        """Flower's run record means nothing here: our own run id travels in the contract."""

    @property
    def run(self) -> Any:
        """No Flower run record exists in one process."""
        raise NotImplementedError("the in-process grid has no Flower run record; use the plan's run_id")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message from the server to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All virtual nodes, always there."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until their replies are asked for."""
        ids = []
        for message in messages:
            message_id = f"inline-{next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = message_id
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Deliver the messages now and return their replies."""
        return [self._deliver(self._waiting.pop(message_id)) for message_id in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Deliver all messages, in order."""
        return list(self.pull_messages(self.push_messages(messages)))

    def _deliver(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        try:
            # A copy: a real network would not let a site write into the server's records.
            reply = self._client_app(copy.deepcopy(message), self._contexts[node])
        except Exception as error:
            reply = Message(Error(UNDELIVERABLE, type(error).__name__), reply_to=message)
        return copy.deepcopy(reply)


def run_inline(server_app: ServerApp, client_app: App, sites: int, run_folder: Path) -> None:
    """Run both applications to the end in this process."""
    context = Context(
        run_id=1, node_id=SERVER_NODE, node_config={}, state=RecordDict(), run_config={"run-folder": str(run_folder)}
    )
    server_app(InlineGrid(client_app, sites), context)
