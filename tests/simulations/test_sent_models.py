"""A model goes to a site once: who has scored it trains it by its hash, and who has lost it gets it again."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from flwr.app import Context, Message, MessageType

from client.app import app as client_app
from medsegdiff.strict import read_config
from medsegdiff.weights import weight_shapes
from server.app import app as server_app
from server.config import RunPlan, StrategyConfig
from server.journal import Journal
from server.rounds import traffic
from simulations.inline import run_inline

TRAIN, EVALUATE = MessageType.TRAIN, MessageType.EVALUATE


class Watched:
    """The real ClientApp; counts what it is sent, and may be killed or robbed before a question."""

    def __init__(self, before: dict[int, object] | None = None) -> None:
        self.seen: Counter[tuple[str, bool]] = Counter()
        self.errors: list[str] = []
        self.before = before or {}
        self.number = 0

    def __call__(self, message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        if kind != MessageType.QUERY:
            self.number += 1
            if self.number in self.before:
                self.before[self.number]()  # type: ignore[operator]
            self.seen[kind, "weights" in message.content.array_records] += 1
        reply = client_app(message, context)
        if reply.has_error():
            self.errors.append(reply.error.reason)
        return reply


def federate(folder: Path, world: Path, before: dict[int, object] | None = None) -> Watched:
    watched = Watched(before)
    os.environ["MEDSEGFED_WORLD"] = str(world.resolve())  # the fixture puts it back
    run_inline(server_app, watched, 3, folder)
    return watched


def model(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def model_bytes(folder: Path) -> int:
    shapes = weight_shapes(read_config(folder / "run.yaml", RunPlan).task.model)
    from client.encoding import Compression, largest_size

    return largest_size(Compression(), shapes)


@pytest.fixture
def world(make_run, untouched_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A world of its own, for what is received lies in it."""
    shutil.copytree(untouched_world, tmp_path / "world", symlinks=True)
    monkeypatch.setenv("MEDSEGFED_WORLD", str((tmp_path / "world").resolve()))
    return tmp_path / "world"


def test_a_model_is_sent_once(world, make_run) -> None:
    """Three rounds: the first model to be trained, then each new one to be scored alone; and the report says so."""
    folder = make_run("one", task={"rounds": 3})
    watched = federate(folder, world)
    assert watched.seen == {(TRAIN, True): 3, (EVALUATE, True): 9, (TRAIN, False): 6}
    assert watched.errors == []
    assert traffic(Journal(folder / "journal.jsonl").events)["down"] == 12 * model_bytes(folder)
    assert not list((world / "received").glob("*/*"))  # the run is over


def test_a_round_that_is_not_scored_is_sent_for_training(world, make_run) -> None:
    """Scored every other round: the model of round one comes with round two's training."""
    folder = make_run("one", task={"rounds": 3}, evaluate_every=2)
    assert federate(folder, world).seen == {(TRAIN, True): 6, (EVALUATE, True): 6, (TRAIN, False): 3}


def test_an_average_that_is_scored_is_not_the_model_that_is_trained(world, make_run) -> None:
    """With an average over rounds, both models travel, but for round one, whose average is that round's model."""
    folder = make_run("one", task={"rounds": 3}, strategy=StrategyConfig(ema=0.5))
    watched = federate(folder, world)
    assert watched.seen == {(TRAIN, True): 6, (EVALUATE, True): 9, (TRAIN, False): 3}
    assert traffic(Journal(folder / "journal.jsonl").events)["down"] == 15 * model_bytes(folder)


@pytest.mark.slow
def test_a_site_that_lost_the_model_gets_it_again(world, make_run) -> None:
    """Gone, or damaged, before the second round: asked again with it, no rejection, no strike, the same model."""
    undisturbed = make_run("one", task={"rounds": 2})
    federate(undisturbed, world)

    def rob() -> None:
        shutil.rmtree(world / "received")

    def damage() -> None:
        (path,) = (world / "received").glob("*/*.safetensors")
        spoiled = bytearray(path.read_bytes())
        spoiled[len(spoiled) // 2] ^= 1
        path.write_bytes(spoiled)

    for name, spoil in (("robbed", rob), ("damaged", damage)):
        folder = make_run(name, task={"rounds": 2})
        watched = federate(folder, world, {7: spoil})  # three trained, three scored: the next one trains by hash
        assert (
            watched.errors == ["model-missing: the site does not have the model that is named, and none was sent"] * 3
        )
        assert watched.seen == {(TRAIN, True): 6, (EVALUATE, True): 6, (TRAIN, False): 3}
        assert model(folder) == model(undisturbed)
        events = Journal(folder / "journal.jsonl").events
        assert [event["rejected"] for event in events if event["event"] == "round" and event["round"]] == [{}, {}]
        assert not [event for event in events if event["event"] in ("refused", "rejected", "suspended")]


def test_a_run_that_goes_on_knows_who_has_the_model(world, make_run) -> None:
    """Killed after the first scoring: the next session sends hashes, and counts the same bytes."""
    undisturbed = make_run("one", task={"rounds": 2})
    federate(undisturbed, world)
    folder = make_run("killed", task={"rounds": 2})

    def die() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(folder, world, {7: die})
    watched = federate(folder, world)
    assert watched.seen == {(TRAIN, False): 3, (EVALUATE, True): 3}
    assert model(folder) == model(undisturbed)
    assert traffic(Journal(folder / "journal.jsonl").events) == traffic(Journal(undisturbed / "journal.jsonl").events)
