"""Messages to and from the SuperLink, each in memory once, and none that can end the ServerApp.

flwr 1.41's HttpGrid turns all of a model into bytes before the first piece of it has left, and joins the pieces of an
answer beside the pieces, three models for one. It also takes an answer for what it says it is: a piece that is named a
million times becomes terabytes, and one that is no piece ends the process. Here pieces are sent and joined one by one,
a declared size is looked at before anything is allocated, and an answer that cannot be read is an error of its site.
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, pull_objects
from flwr.superlink.grid.http_grid import HttpGrid

from client.contract import RAW, ContractError
from client.encoding import Pieces

WORKERS = 2  # that push pieces at the same time
MOST_PARTS = 64  # of an answer beside the pieces of its arrays
SWEEP_BYTES = 16 * 2**20  # moved between two looks for what is left of requests
PIECE_BYTES = 5 * 2**20  # Flower's pieces of an array
DEEPEST = 5  # message, records, record, array, piece

_READ: dict[str, type[InflatableObject]] = {
    kind.__qualname__: kind for kind in (ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict)
}


class BoundedGrid:
    """What `Exchange` needs of a grid, over Flower's HttpGrid.

    Args:
        grid: connected, and bound to its run.
        largest: bytes that the arrays of an answer may have.
    """

    def __init__(self, grid: HttpGrid, largest: int) -> None:
        self._grid = grid
        self.largest = largest

    @classmethod
    def over(cls, grid: Grid, largest: int) -> Any:
        """`grid` itself where it is no HttpGrid: a simulation's messages stay in one process."""
        return cls(grid, largest) if isinstance(grid, HttpGrid) else grid

    def get_nodes(self) -> Iterable[Any]:
        """Who is online."""
        return self._grid.get_nodes()

    def get_node_ids(self) -> Iterable[int]:
        """Numbers of those who are online."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages, piece by piece; returns their ids, None for one that the SuperLink does not take."""
        protos, trees = [], []
        objects: dict[str, InflatableObject] = {}  # by content: what several messages share is sent once
        with no_object_id_recompute():
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
                protos.append(message_to_proto(remove_content_from_message(message)))
                objects.update(get_all_nested_objects(message))
                trees.append(get_object_tree(message))
            client = self._grid._runtime_client
            answer = client.PushMessages(PushAppMessagesRequest(messages_list=protos, message_object_trees=trees))
            push = make_push_object_fn_protobuf(client.PushObject, self._grid.node, self._run_id, answer.session_id)
            _push(objects, set(answer.objects_to_push), push)
        return list(answer.message_ids)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers to these messages that are there. What cannot be read is an answer with an error."""
        answer = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=list(message_ids)))
        return [
            self._receive(proto, tree)
            for proto, tree in zip(answer.messages_list, answer.message_object_trees, strict=True)
        ]

    @property
    def _run_id(self) -> int:
        return self._grid.run.run_id

    def _receive(self, proto: Any, tree: ObjectTree) -> Message:
        """One answer. Its metadata are the SuperLink's, which has checked who sends, not what its sender wrote."""
        metadata = metadata_from_proto(proto.metadata)
        try:
            contents = self._fetch(tree)
        except ObjectPullError as error:
            metadata.__dict__["_src_node_id"] = self._grid.node.node_id  # the SuperLink's word, not the site's
            return make_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, str(error)))
        self._grid._runtime_client.ConfirmMessageReceived(  # the SuperLink lets go of it
            ConfirmMessageReceivedRequest(
                node=self._grid.node, run_id=self._run_id, message_object_id=proto.metadata.message_id
            )
        )
        try:
            found = join(tree.object_id, contents, self.largest)
        except Exception as error:  # whatever a site sends is that site's fault
            reason = str(error) if isinstance(error, ContractError) else f"it cannot be read ({type(error).__name__})"
            return make_message(metadata, error=Error(ErrorCode.UNKNOWN, reason))
        if found.has_error():
            return make_message(metadata, error=found.error)
        return make_message(metadata, content=found.content)

    def _fetch(self, tree: ObjectTree) -> dict[str, bytes]:
        """The objects of an answer by their names; none of one that has more than its arrays can be cut into."""
        names = list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))
        if len(names) > MOST_PARTS + 2 * self.largest // PIECE_BYTES:
            return {}
        pull = make_pull_object_fn_protobuf(self._grid._runtime_client.PullObject, self._grid.node, self._run_id)
        sweep = _Sweep()

        def pull_and_sweep(name: str) -> bytes:
            content: bytes = pull(name)
            sweep.after(len(content))
            return content

        contents = pull_objects(names, pull_and_sweep)
        sweep.end()
        return contents


def _push(objects: dict[str, InflatableObject], wanted: set[str], push: Callable[[str, bytes], None]) -> None:
    """Send what is wanted; no more than `WORKERS` pieces are bytes at a time."""
    waiting = iter([name for name in objects if name in wanted])
    sweep = _Sweep()

    def work() -> None:
        with no_object_id_recompute():
            for name in waiting:  # a list's iterator gives each name to one thread
                content = objects[name].deflate()
                push(name, content)
                sweep.after(len(content))

    with ThreadPoolExecutor(WORKERS) as workers:
        for future in [workers.submit(work) for _ in range(WORKERS)]:
            future.result()
    sweep.end()


class _Sweep:
    """Has httpx' requests and answers go, which refer to themselves: Python looks for such ones by their number, and a
    few of them hold a model."""

    def __init__(self) -> None:
        self.bytes = 0

    def after(self, size: int) -> None:
        self.bytes += size
        if self.bytes > SWEEP_BYTES:
            self.end()

    def end(self) -> None:
        if self.bytes > PIECE_BYTES:
            gc.collect()
        self.bytes = 0


@dataclass
class _Contents:
    """Objects as bytes, each given away once; what was joined from them."""

    left: dict[str, bytes]
    room: int  # bytes that arrays may still take
    joined: dict[str, Any] = field(default_factory=dict)
    data: dict[str, memoryview | Pieces] = field(default_factory=dict)  # of arrays


def join(object_id: str, contents: dict[str, bytes], largest: int) -> Message:
    """A message from its objects' bytes, which are taken out of `contents` one by one.

    Args:
        largest: bytes that its arrays may have in all.

    Raises:
        ContractError: they would have more.
        Exception: anything, where the objects are not those of a message.
    """
    if object_id not in contents:
        raise ContractError("it has too many parts, or none")
    found = _join(object_id, _Contents(contents, largest), DEEPEST)
    if not isinstance(found, Message):
        raise ContractError("it is no message")
    return found


def _join(object_id: str, contents: _Contents, depth: int) -> Any:
    if object_id in contents.joined:
        return contents.joined[object_id]
    if depth == 0:
        raise ContractError("its parts are nested too deeply")
    content = contents.left.pop(object_id)
    kind, children, _ = get_object_head_values_from_object_content(content)
    if kind == Array.__qualname__:
        found: Any
        found, contents.data[object_id] = _array(content, children, contents)
    else:
        parts = {child: _join(child, contents, depth - 1) for child in children}
        found = _READ[kind].inflate(content, children=parts)
        if isinstance(found, ArrayRecord):  # made of the arrays without their data: it would take bytes alone
            for name, array in json.loads(get_object_body(content, ArrayRecord)).items():
                found[name].data = contents.data[array]  # type: ignore[assignment]  # as good to all who read it
    contents.joined[object_id] = found
    return found


def _array(content: bytes, children: list[str], contents: _Contents) -> tuple[Array, memoryview | Pieces]:
    """An array without its data, and these: pieces moved into one buffer, each freed when it is not needed again.

    A compressed array's stay in pieces, for its decoder frees them as it goes: beside what they become.
    """
    said = json.loads(get_object_body(content, Array))
    pieces = [children[number] for number in said["arraychunk_ids"]]
    bodies = {child: _piece(contents.left[child]) for child in children}
    size = sum(len(bodies[piece]) for piece in pieces)
    if size > contents.room:
        raise ContractError(f"its arrays have more than {contents.room} bytes")
    contents.room -= size
    if said["stype"] != RAW:
        for child in children:
            contents.left.pop(child, None)
        return Array(said["dtype"], tuple(said["shape"]), said["stype"], b""), Pieces(bodies[piece] for piece in pieces)
    # Not a bytearray: it writes zeros first, and so takes its memory before a piece has given up any.
    uses, data, end = Counter(pieces), np.empty(size, np.uint8).data, 0
    for piece in pieces:
        body = bodies[piece]
        data[end : end + len(body)] = body
        end += len(body)
        uses[piece] -= 1
        if not uses[piece]:
            del bodies[piece], contents.left[piece], body
    return Array(said["dtype"], tuple(said["shape"]), said["stype"], b""), data


def _piece(content: bytes) -> memoryview:
    """The body of an ArrayChunk's bytes, without a copy."""
    kind, children, size = get_object_head_values_from_object_content(content)
    if kind != "ArrayChunk" or children:
        raise ContractError(f"a piece of an array is of the kind {kind[:20]!r}")
    if not 0 <= size <= len(content):
        raise ContractError("a piece of an array states a wrong size")
    return memoryview(content)[len(content) - size :]
