"""The run folder of a real federation, as its server leaves it at any moment: written from a made-up journal."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from client.contract import TrainTask
from medsegdiff.config import ModelConfig, SamplingConfig, TrainingConfig
from medsegdiff.data.dataset import DatasetConfig
from medsegdiff.strict import dump_yaml
from medsegdiff.weights import hash_weights, initial_weights, serialise
from server.config import RunPlan, StrategyConfig

ROSTER = {"alder": 24, "birch": 17, "elm": 9}
BEGIN = 1_800_000_000.0  # when the story begins, in seconds of the epoch
ROUND = 60.0  # seconds of a round in the story
SOFTWARE = {"medsegfed": "0.2.0", "torch": "2.11.0", "flwr": "1.41.0", "python": "3.11.9"}
APPLICATION = "5e" * 32
FINAL_DICE = {"alder": 0.81, "birch": 0.77, "elm": 0.69}

Events = list[dict[str, Any]]


def plan_of(rounds: int = 3, **changes: Any) -> RunPlan:
    """A plan of three hospitals on the smallest network."""
    dataset = DatasetConfig("glioma", "MRI", ("flair",), {"background": 0, "tumour": 1})
    task = TrainTask(
        dataset=dataset,
        model=ModelConfig(16, 1, 1, 8, (1, 2), 1, (1,), (1,)),
        rounds=rounds,
        local_steps=20,
        seed=5,
        training=TrainingConfig(batch_size=2),
        sampling=SamplingConfig(steps=1),
    )
    plan = RunPlan("glioma-1", "tiny", StrategyConfig(), dict(ROSTER), task, quorum=2, engine="network")
    return replace(plan, **changes)


@lru_cache(maxsize=1)
def model_of_the_end() -> tuple[bytes, str]:
    """The bytes of the model file, and the model's hash."""
    task = plan_of().task
    weights = initial_weights(task.model, 3)
    return serialise(task.card, weights), hash_weights(weights)


def beginning() -> Events:
    """A session, round 0, three sites that introduce themselves within a quarter of a minute."""
    first = {"event": "round", "time": BEGIN + 1, "round": 0, "model_hash": "00" * 32}
    events: Events = [{"event": "session", "time": BEGIN}, first]
    for number, (site, train) in enumerate(ROSTER.items()):
        events.append(
            {
                "event": "site", "time": BEGIN + 5 * (number + 1), "site": site, "node": 1000 + number,
                "train_patients": train, "test_patients": 6 - number, "faults": number,
                "software": dict(SOFTWARE), "application": APPLICATION,
            }
        )  # fmt: skip
    return events


def one_round(number: int, time: float, **changes: Any) -> Events:
    """A committed round of all sites and its scores, five seconds later."""
    accepted = {site: {"patients": n, "loss": 0.9 / number, "seconds": 30.0 + n} for site, n in ROSTER.items()}
    scores = {site: _scores(dice - 0.1 * (3 - number)) for site, dice in FINAL_DICE.items()}
    record = _round(number, accepted, time=time, **changes)
    told = {"event": "scores", "time": time + 5, "round": number, "model_hash": record["model_hash"], "sites": scores}
    return [record, told]


def story(rounds: int = 3, finished: bool = True) -> Events:
    """All sites in every round, and the end; times are ROUND apart."""
    events = beginning()
    for number in range(1, rounds + 1):
        events += one_round(number, BEGIN + 15 + number * ROUND)
    if finished:
        events.append({"event": "finished", "time": events[-1]["time"] + 1, "model_hash": events[-1]["model_hash"]})
    return events


def _round(number: int, accepted: dict[str, Any], **changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "event": "round", "time": 0.0, "round": number, "model_hash": model_of_the_end()[1],
        "accepted": accepted, "rejected": {}, "absent": [], "bytes": {"up": 3000, "down": 3600},
    }  # fmt: skip
    return record | changes


def _scores(dice: float) -> dict[str, Any]:
    return {
        "patients": 5, "dice": dice, "dice_by_target": {"tumour": dice}, "hd95_mm": 12 * (1 - dice),
        "hd95_undefined": 0, "seconds": 4.0,
    }  # fmt: skip


def write_run(folder: Path, events: Events, plan: RunPlan | None = None, model: bool = True) -> Path:
    """A run folder with these events; with `model`, the model file that they end in."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(dump_yaml(plan or plan_of()))
    lines = [json.dumps(event, ensure_ascii=False) for event in events]
    (folder / "journal.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    if model:
        (folder / "model.safetensors").write_bytes(model_of_the_end()[0])
    return folder
