"""What Flower's SuperNode leaves behind of a message that it gave up, and what is left after us."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import Status
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate import NodeStateFactory

from client.abandoned import tidied

NODE, RUN = 7, 11
UNFINISHED = (Status.PENDING, Status.STARTING, Status.RUNNING)


class Site:
    """A SuperNode's state, and the server that it fetches one message from."""

    def __init__(self, pull_object: Callable[[str, dict[str, Any]], bytes]) -> None:
        factory = ObjectStoreFactory()
        self.state, self.store = NodeStateFactory(factory).state(), factory.store()
        self.state.set_node_id(NODE)
        metadata = Metadata(
            run_id=RUN, message_id="", src_node_id=1, dst_node_id=NODE, reply_to_message_id="", group_id="1",
            created_at=time.time(), ttl=60.0, message_type="train",
        )  # fmt: skip
        message = make_message(metadata, RecordDict({"task": ConfigRecord({"json": "{}"})}))
        metadata.__dict__["_message_id"] = message.object_id
        self.message, self.tree = remove_content_from_message(message), get_object_tree(message)
        self.objects = get_all_nested_objects(message)
        self.pull_object = pull_object
        run = Run.create_empty(RUN)
        self.state.store_run(run)

    def pull(self, function: Callable[..., int | None]) -> int | None:
        return function(
            state=self.state,
            object_store=self.store,
            node_config={},
            receive=lambda: (self.message, self.tree),
            get_run=lambda run: pytest.fail("the run is known"),
            get_fab=lambda *_: pytest.fail("the bundle is not asked for"),
            pull_object=lambda run, object_id: self.pull_object(object_id, self.objects),
            confirm_message_received=lambda *_: None,
            trusted_entities=None,
        )

    def left(self) -> tuple[int, int, int]:
        """Unfinished tasks, messages, objects."""
        tasks, messages = self.state.get_tasks(statuses=UNFINISHED), self.state.get_messages_legacy()
        return len(tasks), len(messages), len(self.store)


def ended(object_id: str, objects: dict[str, Any]) -> bytes:
    raise RunNotRunningException


def whole(object_id: str, objects: dict[str, Any]) -> bytes:
    return bytes(objects[object_id].deflate())


def test_nothing_is_left_of_a_message_whose_run_ended() -> None:
    """Flower leaves a task that no message will come for; after us there is none, and no object without an owner."""
    flowers, ours = Site(ended), Site(ended)
    assert flowers.pull(start_client_internal._pull_and_store_message) is None
    assert flowers.left()[0] == 1, "should Flower mend this, client/abandoned.py may go"
    assert ours.pull(tidied(start_client_internal._pull_and_store_message)) is None
    assert ours.left() == (0, 0, 0)


def test_a_message_that_came_is_left_alone() -> None:
    """Its task waits for the runner, its objects are there, and so they are after a look that found nothing new."""
    site = Site(whole)
    pull = tidied(start_client_internal._pull_and_store_message)
    assert site.pull(pull) == RUN
    assert site.left() == (1, 1, 3)
    site.message = site.tree = None
    assert (
        tidied(lambda receive, **_: receive())(state=site.state, object_store=site.store, receive=lambda: None) is None
    )
    assert site.left()[0] == 1


def test_tasks_of_other_messages_are_left_alone() -> None:
    """A task that was there before, whose result is being reported, is not ended."""
    site = Site(ended)
    before = site.state.create_task(task_type="flwr-clientapp", run_id=RUN, fab_hash="")
    site.pull(tidied(start_client_internal._pull_and_store_message))
    assert [task.task_id for task in site.state.get_tasks(statuses=UNFINISHED)] == [before]


def test_who_has_taken_the_task_finds_its_objects_gone() -> None:
    """A runner that claimed it meanwhile keeps its claim, which runs out: an ended one would interrupt its process."""
    site = Site(lambda object_id, objects: claim_and_end(site))

    once = threading.Lock()  # objects are fetched by several threads

    def claim_and_end(site: Site) -> bytes:
        if once.acquire(blocking=False):
            (task,) = site.state.get_tasks(statuses=UNFINISHED)
            assert site.state.claim_task(task.task_id)
        raise RunNotRunningException

    site.pull(tidied(start_client_internal._pull_and_store_message))
    assert site.left() == (1, 0, 0)
