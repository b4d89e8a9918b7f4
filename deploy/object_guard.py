"""Whose objects are whose: what Flower's SuperLink leaves open between the nodes of one run.

A message travels as a tree of objects, each named by the hash of its content. Flower asks who a node is, then lets it
read, confirm and write any object whose name it knows, and believes whatever tree it is told. Here

- a node reads the objects of messages that were sent to it, and no others; it confirms those messages alone, and each
  only once all of it is there: the ServerApp would die of finding the objects gone that it is still writing;
- a node writes into its own uploads;
- what an object is made of the ServerApp's tree says, or else its content. A node could otherwise claim, before the
  server sends an object to all, that a part of it is missing, which never comes: everybody would wait for it;
- a reply is given to the ServerApp once all of it is there. It would otherwise wait for the rest of one site's reply,
  for hours, and hear nobody, whatever the round's deadline is.

And what a line that breaks between a question and its answer would cost a node. Flower takes a message for delivered
when it is given out, whether or not the node has heard it; the node asks again and is told that there is nothing, and
the round waits for it until its deadline. Here a message that the node has not confirmed is given again, and a
confirmation that is repeated is as good as the first: a node takes a refusal of it for the end of the run, and drops
the message that it has.

Stands on flwr 1.41's fleet handlers, object store and link state; the version is pinned exactly, and the end-to-end
tests try each of these on the assembled server.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, ObjectTree
from flwr.supercore.date import now
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_object_children_ids_from_object_content,
    iterate_object_tree,
)

log = logging.getLogger("medsegfed.server")

KEPT = 64  # messages and uploads of a node that are remembered; it has one of each at a time
MOST_FAILED = 8  # times that a node began to fetch a message and did not confirm it: it may be one that it cannot take

Handler = Callable[..., Any]


def guard_objects() -> None:
    """Put all of it in place of what Flower has, in this process."""
    from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
    from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
    from flwr.superlink.servicer.fleet import fleet_handlers

    guard = ObjectGuard()
    handlers = "activate_node pull_messages pull_object confirm_message_received push_messages push_object"
    for name in handlers.split():
        setattr(fleet_handlers, name, getattr(guard, name)(getattr(fleet_handlers, name)))
    InMemoryObjectStore.put = truthful(InMemoryObjectStore.put)  # type: ignore[method-assign]
    tree = "store_message_and_object_tree"
    setattr(InMemoryLinkState, tree, trusted_trees(getattr(InMemoryLinkState, tree)))
    InMemoryLinkState.get_message_res = whole_replies(InMemoryLinkState.get_message_res)  # type: ignore[method-assign]


@dataclass
class _Given:
    """A message that a node was given and has not confirmed."""

    objects: frozenset[str]  # ids of all of it
    failed: int = 0  # times that it was given before, heard of, and not confirmed
    heard: bool = False  # the node has begun to fetch it


class ObjectGuard:
    """Flower's handlers, each for the objects of the node that asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given: dict[int, OrderedDict[str, _Given]] = defaultdict(OrderedDict)  # node -> message
        self._confirmed: dict[int, OrderedDict[str, None]] = defaultdict(OrderedDict)  # node -> messages
        self._uploads: dict[int, OrderedDict[str, None]] = defaultdict(OrderedDict)  # node -> sessions

    def activate_node(self, activate: Handler) -> Handler:
        def activate_node(request: Any, state: Any) -> Any:
            response = activate(request=request, state=state)
            with self._lock:  # a new process: whoever asked its predecessor sees that, and asks again
                self._given.pop(response.node_id, None)
            return response

        return activate_node

    def pull_messages(self, pull: Handler) -> Handler:
        def pull_messages(request: Any, state: Any, store: Any) -> Any:
            node = request.node.node_id
            with self._lock:
                before = {name: given.failed + int(given.heard) for name, given in self._given[node].items()}
                dropped = [name for name, failed in before.items() if failed >= MOST_FAILED]
                for name in dropped:
                    del self._given[node][name]
            for name in dropped:
                log.warning(
                    "node %d began to fetch message %s %d times and has not confirmed it: it is not given again",
                    node,
                    name[:12],
                    MOST_FAILED,
                )
            if again := [name for name in before if name not in dropped]:
                _take_back(state, again)
            response = pull(request=request, state=state, store=store)
            for message, tree in zip(response.messages_list, response.message_object_trees, strict=True):
                name = message.metadata.message_id
                self._remember(self._given, node, name, _Given(_ids(tree), before.get(name, 0)))
            return response

        return pull_messages

    def pull_object(self, pull: Handler) -> Handler:
        def pull_object(request: Any, state: Any) -> Any:
            with self._lock:
                own = [
                    found for found in self._given[request.node.node_id].values() if request.object_id in found.objects
                ]
                for given in own:
                    given.heard = True
            if not own:
                raise _not_yours(request.node.node_id, "read", request.object_id)
            return pull(request=request, state=state)

        return pull_object

    def confirm_message_received(self, confirm: Handler) -> Handler:
        def confirm_message_received(request: Any, state: Any, store: Any) -> Any:
            node, name = request.node.node_id, request.message_object_id
            with self._lock:
                given, repeated = self._given[node].get(name), name in self._confirmed[node]
            if repeated:
                return ConfirmMessageReceivedResponse()
            # b"": announced, not there yet
            if given is None or any(store.get(object_id) == b"" for object_id in given.objects):
                raise _not_yours(node, "confirm", name)
            response = confirm(request=request, state=state, store=store)
            self._remember(self._confirmed, node, name, None)
            with self._lock:
                self._given[node].pop(name, None)
            return response

        return confirm_message_received

    def push_messages(self, push: Handler) -> Handler:
        def push_messages(request: Any, state: Any) -> Any:
            response = push(request=request, state=state)
            self._remember(self._uploads, request.node.node_id, response.session_id, None)
            return response

        return push_messages

    def push_object(self, push: Handler) -> Handler:
        def push_object(request: Any, state: Any) -> Any:
            with self._lock:
                known = request.session_id in self._uploads[request.node.node_id]
            if not known:  # nor without a session: Flower would look for any that waits for such an object
                raise _not_yours(request.node.node_id, "write", request.object_id)
            return push(request=request, state=state)

        return push_object

    def _remember(self, of: dict[int, OrderedDict[str, Any]], node: int, name: str, value: Any) -> None:
        with self._lock:
            kept = of[node]
            kept[name] = value
            while len(kept) > KEPT:
                kept.popitem(last=False)


def _take_back(state: Any, names: Collection[str]) -> None:
    """Have messages count as not delivered; Flower has forgotten those of a run that it has seen end."""
    with state.lock:
        for name in names:
            if (message := state.message_ins_store.get(name)) is not None:
                message.metadata.delivered_at = ""


def _ids(tree: ObjectTree) -> frozenset[str]:
    return frozenset(node.object_id for node in iterate_object_tree(tree))


def _not_yours(node: int, what: str, object_id: str) -> FlowerError:
    return FlowerError(
        ApiErrorCode.NO_PERMISSIONS,
        f"guard: node {node} may not {what} the object {object_id[:12]}: it is not its own, or not whole",
    )


def settle(store: Any, object_id: str, children: Sequence[str]) -> None:
    """Have an object consist of exactly these, whatever was claimed before.

    Raises:
        ValueError: the store does not know all of them.
    """
    entry = store.store[object_id]
    true, claimed = set(children), set(entry.child_object_ids)
    if unknown := [child for child in true if child not in store.store]:
        raise ValueError(f"the tree of object {object_id} lacks {len(unknown)} of its children")
    entry.child_object_ids = list(children)
    for child in true - claimed:
        store.store[child].ref_count += 1
    for child in claimed - true:
        if child in store.store:
            store.store[child].ref_count -= 1
            store.delete(child)


def truthful(put: Handler) -> Handler:
    """The object store's `put`, after which an object consists of what its content names."""

    def put_truthfully(self: Any, object_id: str, object_content: bytes) -> None:
        with self.lock_store:
            put(self, object_id, object_content)  # checks that the content has this hash
            try:
                settle(self, object_id, get_object_children_ids_from_object_content(object_content))
            except ValueError:
                self.store[object_id].content, self.store[object_id].is_available = b"", False
                raise

    return put_truthfully


def trusted_trees(store_message: Handler) -> Handler:
    """The link state's `store_message_and_object_tree`, which believes the ServerApp's trees."""

    def store_message_and_tree(self: Any, message: Any, object_tree: ObjectTree, session_id: str) -> Any:
        with self.lock:  # until then no node is given the message
            stored = store_message(self, message, object_tree, session_id)
            if stored[0] and not message.metadata.reply_to_message_id:  # no node can store one of these
                with self.object_store.lock_store:
                    for node in iterate_object_tree(object_tree):
                        settle(self.object_store, node.object_id, [child.object_id for child in node.children])
            return stored

    return store_message_and_tree


def whole_replies(get: Handler) -> Handler:
    """The link state's `get_message_res`, which leaves out replies whose upload is under way."""

    def get_whole_replies(self: Any, message_ids: set[str], run_id: int) -> Any:
        with self.lock:  # held while a reply is announced and while its upload is opened
            whole = {name for name in message_ids if not _is_uploading(self, name)}
            return get(self, message_ids=whole, run_id=run_id) if whole else []

    return get_whole_replies


def _is_uploading(state: Any, question: str) -> bool:
    """Whether the reply to a question has been announced and the rest of it can still come."""
    reply = state.message_ins_id_to_message_res_id.get(question)
    session = state._object_push_sessions.get(state._object_push_session_by_root.get(reply))
    return bool(session and session.pending_object_ids and session.expires_at > now())
