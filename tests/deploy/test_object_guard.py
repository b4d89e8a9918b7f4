"""Whose objects are whose, on Flower's own object store and with its own messages."""

from __future__ import annotations

import threading
from datetime import timedelta
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Message,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.date import now
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from deploy.object_guard import KEPT, ObjectGuard, settle, trusted_trees, truthful, whole_replies

ALDER, MALLORY = Node(node_id=11), Node(node_id=66)
RUN = 5
NEVER, MESSAGE = get_object_id(b"never sent"), get_object_id(b"a message")


def tree(name: str, *parts: str) -> ObjectTree:
    return ObjectTree(object_id=name, children=[ObjectTree(object_id=part) for part in parts])


@pytest.fixture
def guard() -> tuple[ObjectGuard, dict[str, Any]]:
    """The guard before handlers that answer everybody; alder was sent the message m, made of a and b."""
    found = ObjectGuard()
    given = PullMessagesResponse(
        messages_list=[Message(metadata=Metadata(message_id="m"))], message_object_trees=[tree("m", "a", "b")]
    )
    nothing = PullMessagesResponse()
    handlers = {
        "pull": found.pull_messages(lambda request, state, store: given if request.node == ALDER else nothing),
        "read": found.pull_object(lambda request, state: "content"),
        "confirm": found.confirm_message_received(lambda request, state, store: "confirmed"),
        "push": found.push_messages(lambda request, state: PushMessagesResponse(session_id=f"s{request.node.node_id}")),
        "write": found.push_object(lambda request, state: "stored"),
    }  # fmt: skip
    for node in (ALDER, MALLORY):
        handlers["pull"](request=PullMessagesRequest(node=node), state=None, store=None)
    return found, handlers


def read(handlers: dict[str, Any], node: Node, name: str) -> Any:
    return handlers["read"](request=PullObjectRequest(node=node, run_id=RUN, object_id=name), state=None)


def confirm(handlers: dict[str, Any], node: Node, name: str, store: Any = MappingProxyType({})) -> Any:
    request = ConfirmMessageReceivedRequest(node=node, run_id=RUN, message_object_id=name)
    return handlers["confirm"](request=request, state=None, store=store)


def test_a_node_reads_what_was_sent_to_it(guard) -> None:
    """Every object of its message until it has confirmed it; nobody else reads or confirms any."""
    _, handlers = guard
    for name in ("m", "a", "b"):
        assert read(handlers, ALDER, name) == "content"
        with pytest.raises(FlowerError, match="66 may not read"):
            read(handlers, MALLORY, name)
    for node, name in ((MALLORY, "m"), (ALDER, "a"), (ALDER, "x")):
        with pytest.raises(FlowerError, match="may not confirm"):
            confirm(handlers, node, name)
    assert confirm(handlers, ALDER, "m") == "confirmed"
    with pytest.raises(FlowerError, match="11 may not read"):
        read(handlers, ALDER, "a")


def test_a_message_is_confirmed_once_it_is_whole(guard) -> None:
    """Whoever confirms what the ServerApp is still writing would have it taken away under its hands."""
    _, handlers = guard
    store = {"m": b"message", "a": b"there", "b": b""}
    with pytest.raises(FlowerError, match="11 may not confirm"):
        confirm(handlers, ALDER, "m", store)
    store["b"] = b"there, too"
    assert confirm(handlers, ALDER, "m", store) == "confirmed"


def test_a_node_writes_into_its_own_upload(guard) -> None:
    """Neither into another's, nor without naming one."""
    _, handlers = guard
    sessions = {
        node.node_id: handlers["push"](request=PushMessagesRequest(node=node), state=None).session_id
        for node in (ALDER, MALLORY)
    }
    assert len(set(sessions.values())) == 2

    def write(node: Node, session: str) -> Any:
        return handlers["write"](request=PushObjectRequest(node=node, object_id="a", session_id=session), state=None)

    assert write(ALDER, sessions[11]) == "stored"
    for session in (sessions[66], "", "another"):
        with pytest.raises(FlowerError, match="11 may not write"):
            write(ALDER, session)


def test_what_is_remembered_is_bounded(guard) -> None:
    """A node that begins uploads without end makes the guard forget its own first ones, and no more."""
    found, handlers = guard
    for number in range(3 * KEPT):
        found._remember(found._uploads, 66, str(number), None)
    assert len(found._uploads[66]) == KEPT
    handlers["push"](request=PushMessagesRequest(node=ALDER), state=None)
    assert len(found._uploads[11]) == 1


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> InMemoryObjectStore:
    monkeypatch.setattr(InMemoryObjectStore, "put", truthful(InMemoryObjectStore.put))
    return InMemoryObjectStore()


def record() -> tuple[RecordDict, dict[str, bytes]]:
    """A record of two, and the contents of all its objects by id."""
    found = RecordDict({"task": ConfigRecord({"json": "{}"}), "other": ConfigRecord({"x": 1})})
    return found, {key: value.deflate() for key, value in get_all_nested_objects(found).items()}


def counts(store: InMemoryObjectStore) -> dict[str, int]:
    return {name: entry.ref_count for name, entry in store.store.items()}


def honest() -> dict[str, int]:
    """References to each object where nobody lies."""
    found, contents = record()
    plain = InMemoryObjectStore()
    plain.preregister(RUN, sent(found))
    for name, content in contents.items():
        plain.put(name, content)
    return counts(plain)


def sent(found: RecordDict) -> ObjectTree:
    """The tree of a message that holds the record."""
    return ObjectTree(object_id=MESSAGE, children=[get_object_tree(found)])


def test_contents_tell_what_an_object_is_made_of(store: InMemoryObjectStore) -> None:
    """Claims that a leaf has a part, that a record has one too many, or none: gone once the contents are there."""
    found, contents = record()
    leaf = found["task"].object_id
    lies = [
        ObjectTree(object_id="1" * 64, children=[tree(leaf, NEVER)]),
        ObjectTree(object_id="2" * 64, children=[tree(found.object_id, NEVER, leaf)]),
        ObjectTree(object_id="3" * 64, children=[tree(found.object_id)]),
    ]
    for lie in lies:
        store.clear()
        store.preregister(RUN, lie)
        store.preregister(RUN, sent(found))
        for name, content in contents.items():
            store.put(name, content)
        assert store.get_object_tree(found.object_id) == get_object_tree(found)
        store.delete(lie.object_id)
        assert counts(store) == honest()
        store.delete(MESSAGE)
        assert len(store) == 0


def test_flower_believes_any_tree() -> None:
    """The control: without us the lie stays, and whoever fetches the record waits for what never comes."""
    found, contents = record()
    plain = InMemoryObjectStore()
    plain.preregister(RUN, ObjectTree(object_id="1" * 64, children=[tree(found["task"].object_id, NEVER)]))
    plain.preregister(RUN, get_object_tree(found))
    for name, content in contents.items():
        plain.put(name, content)
    assert plain.get_object_tree(found.object_id) != get_object_tree(found)


def test_a_record_without_its_parts_is_not_taken(store: InMemoryObjectStore) -> None:
    """A tree that leaves out what the content names: refused, and not there."""
    found, contents = record()
    store.preregister(RUN, tree(found.object_id))
    with pytest.raises(ValueError, match="lacks 2 of its children"):
        store.put(found.object_id, contents[found.object_id])
    assert store.get(found.object_id) == b""


def test_the_serverapps_trees_are_believed_before_their_contents_come(store: InMemoryObjectStore) -> None:
    """A site may fetch a message's tree as soon as it is announced: it must be the true one by then."""
    found, _ = record()
    store.preregister(RUN, ObjectTree(object_id="1" * 64, children=[tree(found["task"].object_id, NEVER)]))

    def plain(state: Any, message: Any, object_tree: ObjectTree, session: str) -> tuple[bool, list[str]]:
        return True, store.preregister(RUN, object_tree)

    state = SimpleNamespace(lock=threading.RLock(), object_store=store)
    question = SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=""))
    assert trusted_trees(plain)(state, question, get_object_tree(found), "s")[0]
    assert store.get_object_tree(found.object_id) == get_object_tree(found)
    reply = SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id="m"))
    trusted_trees(plain)(state, reply, tree(found.object_id, NEVER), "s")
    assert store.get_object_tree(found.object_id) == get_object_tree(found), "a node's are not"


def test_settling_twice_changes_nothing(store: InMemoryObjectStore) -> None:
    """References are counted once."""
    found, _ = record()
    store.preregister(RUN, get_object_tree(found))
    before = counts(store)
    settle(store, found.object_id, [child.object_id for child in get_object_tree(found).children])
    assert counts(store) == before


def test_a_reply_is_given_once_it_is_whole() -> None:
    """Not while objects of it are awaited; once they came, or can come no more."""
    session = SimpleNamespace(pending_object_ids={"x"}, expires_at=now() + timedelta(seconds=60))
    state = SimpleNamespace(
        lock=threading.RLock(),
        message_ins_id_to_message_res_id={"q1": "r1", "q2": "r2"},
        _object_push_session_by_root={"r1": "s1"},
        _object_push_sessions={"s1": session},
    )
    asked: list[set[str]] = []
    get = whole_replies(lambda state, message_ids, run_id: asked.append(message_ids) or sorted(message_ids))
    assert get(state, {"q1"}, RUN) == []
    assert get(state, {"q1", "q2", "q3"}, RUN) == ["q2", "q3"]
    session.pending_object_ids.clear()
    assert get(state, {"q1"}, RUN) == ["q1"]
    session.pending_object_ids.add("x")
    session.expires_at = now() - timedelta(seconds=1)
    assert get(state, {"q1"}, RUN) == ["q1"]
    assert asked == [{"q2", "q3"}, {"q1"}, {"q1"}], "and Flower is not asked for nothing"
