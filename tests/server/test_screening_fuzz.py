"""Ten thousand mutations of a real, signed, serialised update, on the way that a real reply takes: Flower's objects,
the grid, screening. None raises, hangs, takes memory beyond a bound or gets in."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fake_sites import delta_of
from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import (
    UnexpectedObjectContentError,
    validate_object_content,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid
from hypothesis import given, settings
from hypothesis import strategies as st

from client.contract import AS_IT_IS, TrainTask, Update, sign, to_wire
from client.encoding import Compression, largest_size
from client.feedback import pack
from medsegdiff.strict import read_config
from medsegdiff.weights import hash_weights, weight_shapes
from server.config import RunPlan
from server.grid import BoundedGrid
from server.screening import Accepted, Expected, Rejection, screen_update
from tests.server.test_grid import SuperLink, deliver

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
Objects = dict[str, bytes]


class Scene:
    """One good reply as the objects it travels as, and the grid that takes it."""

    def __init__(self, folder: Path, compression: Compression = AS_IT_IS) -> None:
        plan = read_config(folder / "run.yaml", RunPlan)
        task: TrainTask = plan.task
        delta = delta_of("birch", 1, task)
        shapes = weight_shapes(task.model)
        update = Update("birch", plan.run_id, 1, "a" * 64, 2, task.local_steps, 0.5, 1.0, hash_weights(delta))
        packed = pack(update, delta, compression)
        self.update = packed.update
        content = RecordDict({"update": to_wire(self.update), "delta": packed.arrays})
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1000
        question = Message(RecordDict(), 1000, "train")
        question.metadata.__dict__["_message_id"] = "m-1"
        reply = Message(sign(content, "update", KEY.sign), reply_to=question)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.id = reply.object_id
        self.good: Objects = {name: found.deflate() for name, found in get_all_nested_objects(reply).items()}
        self.size = sum(map(len, self.good.values()))
        key = KEY.public_key().public_bytes_raw().hex()
        self.expected = Expected(
            "birch", plan.run_id, 1, "a" * 64, task.local_steps, 2, shapes, ("lesion",), largest_norm=1e3, key=key,
            compression=compression,
        )  # fmt: skip
        self.reply, self.link = reply, SuperLink()
        flower = HttpGrid(token="t")
        flower.set_run(Run.create_empty(run_id=7))
        flower._client = self.link  # type: ignore[assignment]
        self.grid = BoundedGrid(flower, largest_size(compression, shapes))

    def verdict(self, objects: Objects) -> Accepted | Rejection | None:
        """None: the SuperLink does not take such an object."""
        try:
            for content in objects.values():
                validate_object_content(content)
        except UnexpectedObjectContentError:
            return None
        self.link.objects.clear()
        (reply,) = self.grid.pull_messages([deliver(self.link, self.reply, objects)])
        return screen_update(reply, self.expected)


@pytest.fixture
def scene(make_run) -> Scene:
    return Scene(make_run())


def with_length(content: bytes) -> bytes:
    """The head's length mended, so that the SuperLink takes what was changed behind it."""
    head, _, body = content.partition(b"\x00")
    kind, children, _ = head.decode().split(" ")
    return f"{kind} {children} {len(body)}".encode() + b"\x00" + body


def mutate(objects: Objects, rng: np.random.Generator) -> tuple[str, Objects]:
    """One of the ways a message can be wrong."""
    changed = dict(objects)
    name = str(rng.choice(sorted(changed)))
    head, _, body = changed[name].partition(b"\x00")
    kind = str(rng.choice(["flip", "flip in a body", "cut", "swap", "grow", "repeat", "byte", "type", "children"]))
    if kind == "flip":
        spoiled = bytearray(changed[name])
        for _ in range(int(rng.integers(1, 4))):
            spoiled[rng.integers(len(spoiled))] ^= 1 << rng.integers(8)
        changed[name] = bytes(spoiled)
    elif kind == "flip in a body" and body:
        spoiled = bytearray(body)
        spoiled[rng.integers(min(len(spoiled), 400))] ^= 1 << rng.integers(8)
        changed[name] = head + b"\x00" + bytes(spoiled)
    elif kind == "cut":
        changed[name] = with_length(head + b"\x00" + body[: rng.integers(len(body) + 1)])
    elif kind == "swap":
        other = str(rng.choice(sorted(changed)))
        changed[name], changed[other] = changed[other], changed[name]
    elif kind == "grow":
        changed[name] = with_length(head + b"\x00" + body + rng.bytes(int(rng.integers(1, 2000))))
    elif kind == "repeat" and body:
        at = int(rng.integers(len(body)))
        changed[name] = with_length(head + b"\x00" + body[:at] + body[at : at + 64] + body[at:])
    elif kind == "byte" and body:  # lengths and counts inside protobuf and shape are single bytes
        spoiled = bytearray(body)
        spoiled[rng.integers(min(len(spoiled), 200))] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
        changed[name] = head + b"\x00" + bytes(spoiled)
    elif kind == "type":
        types = [b"Message", b"RecordDict", b"ArrayRecord", b"ConfigRecord", b"MetricRecord", b"Array", b"ArrayChunk"]
        changed[name] = types[rng.integers(len(types))] + b" " + head.partition(b" ")[2] + b"\x00" + body
    elif kind == "children":
        first, children, size = head.decode().split(" ")
        listed = [*children.split(","), str(rng.choice(sorted(changed)))]
        rng.shuffle(listed)
        listed = listed[: int(rng.integers(len(listed) + 1))]
        changed[name] = f"{first} {','.join(filter(None, listed))} {size}".encode() + b"\x00" + body
    return kind, changed


def test_the_message_itself_is_accepted(scene) -> None:
    """What is mutated below is good: else nothing would be shown by its rejection."""
    found = scene.verdict(scene.good)
    assert isinstance(found, Accepted)
    assert found.update == scene.update


def check(scene: Scene, objects: Objects) -> str:
    found = scene.verdict(objects)
    if isinstance(found, Accepted):  # a change that changes nothing: the very update that was signed
        assert found.update == scene.update
        assert hash_weights(found.delta) == scene.update.delta_hash
        return "unchanged"
    return "not taken" if found is None else found.reason.split(":")[0][:24]


@pytest.mark.slow
def test_ten_thousand_mutations(scene) -> None:
    """Memory: six times the message and 4 MiB at most; time: a second at most for each, of some 100 kB."""
    rng = np.random.default_rng(0)
    verdicts: Counter[str] = Counter()
    slowest, tracked = 0.0, 0
    for number in range(10_000):
        kind, objects = mutate(scene.good, rng)
        measured = number % 5 == 0  # measuring memory takes most of the time
        if measured:
            tracemalloc.start()
        began = time.perf_counter()
        verdict = check(scene, objects)
        slowest = max(slowest, time.perf_counter() - began)
        if measured:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            tracked += 1
            assert peak < 6 * scene.size + 2**22, kind
        verdicts[verdict] += 1
    assert slowest < 1.0
    assert tracked == 2000
    assert verdicts["unchanged"] < 1500  # metadata, and swaps of an object with itself
    assert len(verdicts) > 8, verdicts  # many different faults were met, not one and the same


@pytest.mark.slow
@pytest.mark.parametrize(
    "compression", [Compression("bf16"), Compression("int8"), Compression("top_k", 0.1)], ids=lambda c: c.kind
)
def test_seven_hundred_mutations_of_a_compressed_one(make_run, compression) -> None:
    """The same bounds, with the decoder behind the grid; pieces that go missing or come twice among them."""
    scene, rng = Scene(make_run(), compression), np.random.default_rng(1)
    whole = 4 * sum(math.prod(shape) for shape in scene.expected.shapes.values())
    assert check(scene, scene.good) == "unchanged"
    verdicts: Counter[str] = Counter()
    for number in range(700):
        kind, objects = mutate(scene.good, rng)
        measured = number % 5 == 0
        if measured:
            tracemalloc.start()
        verdicts[check(scene, objects)] += 1
        if measured:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 2 * whole + 6 * scene.size + 2**22, kind
    assert verdicts["unchanged"] < 110
    assert len(verdicts) > 8, verdicts


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), times=st.integers(1, 6))
def test_several_mutations_at_once(fuzz_scene, seed, times) -> None:
    """Any number of them after another."""
    rng, objects = np.random.default_rng(seed), fuzz_scene.good
    for _ in range(times):
        try:
            objects = mutate(objects, rng)[1]
        except (ValueError, UnicodeDecodeError):
            break  # the mutation itself found no head to work on any more
    check(fuzz_scene, objects)


@pytest.fixture(scope="module")
def fuzz_scene(tmp_path_factory, tiny_task) -> Scene:
    from medsegdiff.strict import dump_yaml
    from server.config import StrategyConfig

    folder = tmp_path_factory.mktemp("fuzz")
    plan = RunPlan("tiny", "tiny", StrategyConfig(), {"alder": 3, "birch": 2, "elm": 1}, tiny_task)
    (folder / "run.yaml").write_text(dump_yaml(plan))
    return Scene(folder)
