"""Sites that answer at once, with deltas drawn from their name: federations to test the server with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, RecordDict
from torch import Tensor

from client.contract import (
    RAW,
    Assignment,
    Invitation,
    Presence,
    Scores,
    TrainTask,
    Update,
    arrays_to_wire,
    from_wire,
    to_wire,
)
from medsegdiff.config import ModelConfig
from medsegdiff.strict import read_config
from medsegdiff.weights import hash_weights, weight_shapes
from server.app import app as server_app
from server.config import RunPlan
from simulations.inline import run_inline

SMALLEST = ModelConfig(16, 1, 1, 8, (1, 2), 1, (1,), (1,))  # the smallest network there is
Spoil = Callable[[Message, Message], Message]  # (question, good reply) -> what is sent instead


def delta_of(site: str, round_: int, task: TrainTask) -> dict[str, Tensor]:
    """What a fake site answers in a round."""
    seed = int.from_bytes(hashlib.sha256(f"{site}|{round_}".encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(seed)
    return {name: 1e-3 * torch.randn(shape, generator=generator) for name, shape in weight_shapes(task.model).items()}


class FakeSites:
    """Callable like a ClientApp; `spoil` maps a site to what becomes of its training replies."""

    def __init__(self, plan: RunPlan, spoil: dict[str, Spoil] | None = None) -> None:
        self.plan = plan
        self.names = list(plan.roster)
        self.spoil = spoil or {}
        self.asked: list[tuple[str, str]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        site = self.names[int(context.node_config["partition-id"])]
        kind = message.metadata.message_type
        self.asked.append((site, kind))
        good = Message(self.content(site, kind, message), reply_to=message)
        spoil = self.spoil.get(site)
        return spoil(message, good) if spoil is not None else good

    def content(self, site: str, kind: str, message: Message) -> RecordDict:
        task = from_wire(message.content, "task", TrainTask)
        if kind == MessageType.QUERY:
            asked_by = from_wire(message.content, "invitation", Invitation)
            presence = Presence(site, asked_by.run, asked_by.nonce, self.plan.roster[site], 1, 0)
            return RecordDict({"presence": to_wire(presence)})
        asked = from_wire(message.content, "assignment", Assignment)
        if kind == MessageType.EVALUATE:
            scores = Scores(site, asked.run, asked.round, asked.model_hash, 1, 0.5, {"lesion": 0.5}, 2.0)
            return RecordDict({"scores": to_wire(scores)})
        n = self.plan.roster[site]
        delta = delta_of(site, asked.round, task)
        update = Update(
            site, asked.run, asked.round, asked.model_hash, n, task.local_steps, 0.5, 0.0, hash_weights(delta)
        )
        return RecordDict({"update": to_wire(update), "delta": arrays_to_wire(delta)})


def run(folder: Path, spoil: dict[str, Spoil] | None = None, names: list[str] | None = None) -> FakeSites:
    """Carry the plan of a run folder out over fake sites, on the real engine with the real ServerApp."""
    plan = read_config(folder / "run.yaml", RunPlan)
    sites = FakeSites(plan, spoil)
    sites.names = names or sites.names
    run_inline(server_app, sites, len(sites.names), folder)
    return sites


def on(kind: str, change: Callable[[RecordDict], RecordDict | Error | None]) -> Spoil:
    """Spoil replies to one kind of question: `change` gets the good content."""

    def spoil(question: Message, good: Message) -> Message:
        if question.metadata.message_type != kind:
            return good
        changed = change(good.content)
        return Message(good.content if changed is None else changed, reply_to=question)

    return spoil


def say(**changes: Any) -> Callable[[RecordDict], RecordDict]:
    """Other fields in the update."""

    def change(content: RecordDict) -> RecordDict:
        said = json.loads(str(content.config_records["update"]["json"])) | changes
        return RecordDict(dict(content) | {"update": ConfigRecord({"json": json.dumps(said)})})

    return change


def put(value: float, name: str | None = None) -> Callable[[RecordDict], RecordDict]:
    """One value everywhere, or an array more; the update names the hash of what is sent."""

    def change(content: RecordDict) -> RecordDict:
        arrays = content.array_records["delta"]
        if name is not None:
            more = ArrayRecord({**arrays, name: Array("float32", (1,), RAW, bytes(4))})
            return RecordDict(dict(content) | {"delta": more})
        delta = {key: torch.full(shape, value) for key, shape in weight_shapes(SMALLEST).items()}
        changed = RecordDict(dict(content) | {"delta": arrays_to_wire(delta)})
        return say(delta_hash=hash_weights(delta))(changed)

    return change
