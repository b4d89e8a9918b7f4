"""Messages over a SuperLink that is a dictionary: what Flower reads we read, once in memory; what nobody can read ends
nothing."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid
from hypothesis import given, settings
from hypothesis import strategies as st

from client.contract import RAW, arrays_from_wire, arrays_to_wire
from client.encoding import Compression
from server import grid as grid_module
from server.grid import BoundedGrid, join

MIB = 2**20
LARGEST = 64 * MIB


class SuperLink:
    """The calls of Flower's Runtime API that a grid makes, over dictionaries."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.replies: dict[str, tuple[Any, ObjectTree]] = {}
        self.confirmed: list[str] = []
        self.held = 0  # bytes of what was pushed; the pushed ones themselves are let go of
        self.keep = True

    def PushMessages(self, request: Any) -> Any:  # noqa: N802 - Flower's names
        names = {name for tree in request.message_object_trees for name in _names(tree)}
        ids = [proto.metadata.message_id for proto in request.messages_list]
        return SimpleNamespace(session_id="s", objects_to_push=names, message_ids=ids)

    def PushObject(self, request: Any) -> Any:  # noqa: N802
        assert get_object_id(request.object_content) == request.object_id
        self.held += len(request.object_content)
        if self.keep:
            assert request.object_id not in self.objects, "sent twice"
            self.objects[request.object_id] = request.object_content
        return SimpleNamespace(stored=True)

    def PullMessages(self, request: Any) -> Any:  # noqa: N802
        found = [self.replies.pop(name) for name in request.message_ids if name in self.replies]
        return SimpleNamespace(messages_list=[p for p, _ in found], message_object_trees=[t for _, t in found])

    def PullObject(self, request: Any) -> Any:  # noqa: N802
        content = self.objects.get(request.object_id)
        return SimpleNamespace(object_found=content is not None, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        self.confirmed.append(request.message_object_id)


def _names(tree: ObjectTree) -> list[str]:
    return [tree.object_id, *(name for child in tree.children for name in _names(child))]


@pytest.fixture
def link() -> SuperLink:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return SuperLink()


@pytest.fixture
def grid(link: SuperLink) -> BoundedGrid:
    flower = HttpGrid(token="t")
    flower.set_run(Run.create_empty(run_id=7))
    flower._client = link  # type: ignore[assignment]
    return BoundedGrid(flower, LARGEST)


numbers = itertools.count(1)


def question() -> Message:
    found = Message(RecordDict(), 12, "train")
    found.metadata.__dict__["_message_id"] = f"q{next(numbers)}"
    return found


def array(data: bytes) -> Array:
    return Array("float32", (len(data) // 4,), RAW, data)


def answer(data: bytes, **more: Any) -> Message:
    return Message(RecordDict({"delta": ArrayRecord({"packed": array(data)}), **more}), reply_to=question())


def contents_of(message: Message) -> dict[str, bytes]:
    return {name: found.deflate() for name, found in get_all_nested_objects(message).items()}


def deliver(link: SuperLink, message: Message, contents: dict[str, bytes] | None = None) -> str:
    """Put an answer there as the SuperLink has it, with other contents than its own if asked; returns its name."""
    message.metadata.__dict__["_message_id"] = message.object_id
    proto = message_to_proto(Message(RecordDict(), reply_to=question()) if message.has_content() else message)
    proto.metadata.message_id = message.object_id
    proto.metadata.src_node_id = 12
    link.objects.update(contents_of(message) if contents is None else contents)
    link.replies["q"] = (proto, get_object_tree(message))
    return "q"


def same(found: Message, wanted: Message) -> None:
    assert set(found.content) == set(wanted.content)
    for name in wanted.content:
        mine, due = found.content[name], wanted.content[name]
        if isinstance(due, ArrayRecord):
            assert list(mine) == list(due)
            for key in due:
                assert bytes(mine[key].data) == bytes(due[key].data)
                assert (mine[key].shape, mine[key].dtype, mine[key].stype) == (
                    due[key].shape, due[key].dtype, due[key].stype
                )  # fmt: skip
        else:
            assert dict(mine) == dict(due)


DATA = {
    "nothing": b"",
    "one piece": bytes(range(256)) * 40,
    "pieces": bytes(range(256)) * (11 * MIB // 256) + b"abcd",
    "pieces that are equal": bytes(17 * MIB),
}


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_what_flower_reads_is_read(grid, link, data) -> None:
    """The oracle is Flower's own reading of the same objects."""
    message = answer(data, update=ConfigRecord({"json": "{}"}), m=MetricRecord({"x": 0.5}))
    wanted = inflate_object_from_contents(message.object_id, contents_of(message))
    (found,) = grid.pull_messages([deliver(link, message)])
    same(found, wanted)
    assert found.metadata.src_node_id == 12
    assert link.confirmed == [message.object_id]


def test_an_error_comes_as_one(grid, link) -> None:
    """Code and reason as they were given."""
    message = Message(Error(100, "not-approved"), reply_to=question())
    (found,) = grid.pull_messages([deliver(link, message)])
    assert (found.error.code, found.error.reason) == (100, "not-approved")


def test_what_several_messages_share_is_sent_once(grid, link) -> None:
    """Flower itself reads what was sent: to two nodes, the model once."""
    record = ArrayRecord({"packed": array(DATA["pieces"])})
    messages = [Message(RecordDict({"weights": record}), node, "train") for node in (1, 2)]
    ids = grid.push_messages(messages)
    assert ids == [message.object_id for message in messages]
    assert link.held < len(DATA["pieces"]) + 10_000
    for message in messages:
        same(inflate_object_from_contents(message.object_id, dict(link.objects)), message)


def forged(link: SuperLink, change: Any, data: bytes = DATA["pieces"]) -> str:
    """An answer whose array says something else; its hashes are those of what it says."""
    message = answer(data)
    contents = contents_of(message)
    ((name, content),) = [(k, v) for k, v in contents.items() if v.startswith(b"Array ")]
    head, _, body = content.partition(b"\0")
    contents[name] = change(head, json.loads(body))
    return deliver(link, message, contents)


def body(head: bytes, said: Any) -> bytes:
    text = json.dumps(said).encode()
    return head.rsplit(b" ", 1)[0] + f" {len(text)}".encode() + b"\0" + text


FORGED = {
    "a piece that is named a million times": lambda h, b: body(h, b | {"arraychunk_ids": [0] * 10**6}),
    "a piece that is not there": lambda h, b: body(h, b | {"arraychunk_ids": [0, 1, 9]}),
    "no list": lambda h, b: body(h, b | {"arraychunk_ids": None}),
    "a shape that is none": lambda h, b: body(h, b | {"shape": ["x"]}),
    "no JSON": lambda h, b: h + b"\0{",
    "no head": lambda h, b: b"Array",
    "another kind": lambda h, b: body(h.replace(b"Array", b"Wheel"), b),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_an_answer_that_nobody_can_read_is_an_error_of_its_site(grid, link, change) -> None:
    """It says so in a line, from the node that sent it, is let go of, and took no memory."""
    name = forged(link, change)
    tracemalloc.start()
    (found,) = grid.pull_messages([name])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.has_error()
    assert any(words in found.error.reason for words in ("cannot be read", "more than"))
    assert found.metadata.src_node_id == 12
    assert len(link.confirmed) == 1
    assert peak < 4 * len(DATA["pieces"])


def test_a_larger_answer_than_a_model_is_refused(grid, link) -> None:
    """The limit itself passes."""
    grid.largest = 11 * MIB
    (found,) = grid.pull_messages([deliver(link, answer(bytes(11 * MIB)))])
    assert found.has_content()
    (found,) = grid.pull_messages([deliver(link, answer(bytes(11 * MIB + 4)))])
    assert f"more than {11 * MIB} bytes" in found.error.reason


def test_an_answer_of_thousands_of_parts_is_not_fetched(grid, link) -> None:
    """They would be held beside each other before anything could be said about them."""
    many = RecordDict({str(k): ConfigRecord({"k": k}) for k in range(200)})
    (found,) = grid.pull_messages([deliver(link, Message(many, reply_to=question()))])
    assert "too many parts" in found.error.reason


def test_what_the_superlink_lost_is_told_as_lost(grid, link) -> None:
    """The code by which the site is asked again."""
    message = answer(DATA["one piece"])
    name = deliver(link, message)
    link.objects.popitem()
    (found,) = grid.pull_messages([name])
    assert found.error.code == grid_module.ErrorCode.MESSAGE_UNAVAILABLE
    assert found.metadata.src_node_id == SUPERLINK_NODE_ID, (
        "the exchange takes it for a refusal of the site's otherwise"
    )
    assert link.confirmed == []


@cache
def small() -> tuple[Message, dict[str, bytes]]:
    """One answer for all examples: messages hold the time, so their objects' names differ."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = answer(bytes(range(64)), update=ConfigRecord({"json": "{}"}))
    return message, contents_of(message)


@settings(max_examples=300, deadline=None)
@given(which=st.integers(0, 5), where=st.integers(0, 400), cut=st.integers(0, 20), put=st.binary(max_size=20))
def test_no_change_of_bytes_ends_the_process(which, where, cut, put) -> None:
    """One object cut, lengthened or changed anywhere: an error, or a message."""
    message, contents = small()
    name = list(contents)[which % len(contents)]
    raw = bytearray(contents[name])
    raw[where : where + cut] = put
    link = SuperLink()
    flower = HttpGrid(token="t")
    flower.set_run(Run.create_empty(run_id=7))
    flower._client = link  # type: ignore[assignment]
    deliver(link, message, contents | {name: bytes(raw)})
    (found,) = BoundedGrid(flower, LARGEST).pull_messages(["q"])
    assert found.has_error() or found.has_content()


def _peak(work: Any) -> int:
    tracemalloc.start()
    kept = work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return peak


def test_an_answer_is_in_memory_once(link) -> None:
    """Joined from its pieces in little more than nothing; Flower needs it twice more."""
    data = b"".join(bytes([k]) * (5 * MIB) for k in range(8))
    message = answer(data)

    def ours() -> Any:
        return join(message.object_id, contents_of(message), len(data))

    def flowers() -> Any:
        return inflate_object_from_contents(message.object_id, contents_of(message))

    assert _peak(flowers) > 2.9 * len(data)
    assert _peak(ours) < 2.2 * len(data)  # the pieces, and a buffer that counts in whole as soon as it is asked for


def test_a_compressed_answer_is_freed_as_it_is_decoded(link) -> None:
    """Beside the pieces that came and the change itself there are a few MiB; joined, the pieces would count twice."""
    values = 6 * MIB
    shapes = {"w": (6, MIB)}
    delta = {"w": torch.randn(shapes["w"], generator=torch.Generator().manual_seed(0))}
    compression = Compression("bf16")
    message = Message(RecordDict({"delta": arrays_to_wire(delta, compression)}), reply_to=question())
    contents = contents_of(message)
    size = sum(map(len, contents.values()))

    def read() -> Any:
        found = join(message.object_id, contents, 4 * values)
        assert not any(len(left) > MIB for left in contents.values())
        return arrays_from_wire(found.content.array_records["delta"], shapes, compression)

    assert _peak(read) < 4 * values + 4 * MIB  # the pieces were there before
    assert size > 1.3 * values


def test_a_model_that_is_sent_is_in_memory_once(grid, link) -> None:
    """No more than a few pieces become bytes at a time."""
    link.keep = False
    data = b"".join(bytes([k]) * (5 * MIB) for k in range(12))
    message = Message(RecordDict({"weights": ArrayRecord({"packed": array(data)})}), 1, "train")
    assert _peak(lambda: grid.push_messages([message])) < 0.6 * len(data)
    assert link.held > len(data)
