"""Dice after equal wall time on hippocampus MRI, beside two other networks: python -m benchmarks.quality

Each side trains for the same seconds of its own, in turns, on the same slices; then both segment the same patients, who
were not trained on. Scores are made here, at the scans' own size, Dice pooled over all voxels of a patient.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.models import MONAI, OURS, PEER
from benchmarks.recipe import SIZE, read_tensors, write_tensors
from benchmarks.turns import PEER_PYTHON, ROOT, Answer, Worker, hardware, publish, table
from medsegdiff.data.cases import DatasetConfig
from medsegdiff.data.dataset import open_dataset
from medsegdiff.data.geometry import restack, restore
from medsegdiff.data.prepare import prepare
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.data.splits import split_patients
from medsegdiff.labels import LabelScheme
from medsegdiff.metrics import PatientScorer
from medsegdiff.strict import read_config

SIDES: dict[str, tuple[str, Answer]] = {  # name -> whose network, and how it trains
    "ours": ("ours", {"network": OURS, "precision": "fp32"}),
    "ours_bf16": ("ours", {"network": OURS, "precision": "bf16"}),
    "peer_pred_noise": ("peer", {"network": PEER, "objective": "pred_noise"}),  # its default
    "peer_pred_x0": ("peer", {"network": PEER, "objective": "pred_x0"}),  # its option nearest to what ours predicts
    "monai": ("monai", {"network": MONAI}),
}


def hippocampus(patients: int, size: int = SIZE) -> tuple[LabelScheme, list[PreparedCase], list[PreparedCase]]:
    """The whole hippocampus: scheme, training cases (four fifths of all patients), `patients` held-out cases."""
    config = read_config(ROOT / "simulations" / "datasets" / "msd_hippocampus.yaml", DatasetConfig)
    config = replace(config, targets={"hippocampus": ("anterior", "posterior")})
    data = Path(os.environ.get("MEDSEGFED_DATA", ROOT / ".." / "shared" / "data"))
    dataset = open_dataset(data / "msd_hippocampus", config)
    prepared = prepare(dataset, size, ROOT / ".cache" / "prepared").cases
    splits = split_patients([p.case for p in prepared], 0.2, 0.0, seed=0)
    train = [p for p in prepared if splits[p.case.patient_id] == "train"]
    test = [p for p in prepared if splits[p.case.patient_id] == "test"]
    return LabelScheme.of(dataset.config), train, test[:patients]


def hand_over(path: Path, scheme: LabelScheme, train: Sequence[PreparedCase], test: Sequence[PreparedCase]) -> int:
    """Write what both sides read: slices as the package prepares them, no augmentation. Returns the test slices."""
    test_images = torch.cat([p.images() for p in test])
    write_tensors(
        path,
        train_images=torch.cat([p.images() for p in train]),
        train_masks=torch.cat([scheme.encode(p.tensor("labels")[0]) for p in train]),
        test_images=test_images,
    )
    return len(test_images)


def score(scheme: LabelScheme, test: Sequence[PreparedCase], masks: Tensor) -> Answer:
    """Dice of each patient's masks (all slices of all patients, (N, 1, S, S) in [-1, 1])."""
    scorer = PatientScorer(scheme, distances=False)
    for prepared, part in zip(test, masks.split([p.slices for p in test]), strict=True):
        native = scheme.decode(restore(part, prepared.geometry))
        scorer.add(prepared, restack(native, prepared.geometry))
    dice = [patient.mean_dice for patient in scorer.scores()]
    return {
        "dice_mean": round(statistics.fmean(dice), 4),
        "dice_median": round(statistics.median(dice), 4),
        "dice": [round(value, 4) for value in dice],
    }


def measure(given: argparse.Namespace) -> Answer:
    """Train in turns, then sample in all ways, then score."""
    scheme, train, test = hippocampus(given.patients)
    workers = {
        "ours": Worker("benchmarks.ours", sys.executable, given.threads),
        "peer": Worker("benchmarks.peer", PEER_PYTHON, given.threads),
        "monai": Worker("benchmarks.monai_peer", PEER_PYTHON, given.threads),
    }
    sides = {name: workers[who] for name, (who, _) in SIDES.items()}
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data.safetensors", Path(folder) / "masks.safetensors"
        slices = hand_over(data, scheme, train, test)
        common = {"data": str(data), "batch": given.batch, "rate": given.rate, "seconds": given.seconds}
        facts = {
            name: sides[name].ask("prepare_quality", name=name, model=model, **common)
            for name, (_, model) in SIDES.items()
        }
        _train(sides, facts, given)
        rows = []
        for side, sampler, how in _ways(given):
            took = sides[side].ask("segment", name=side, out=str(out), batch=given.sampling_batch, how=how)["seconds"]
            found = score(scheme, test, read_tensors(str(out))["masks"])
            row = {"side": side, "sampler": sampler, "steps": how["steps"], "sampling_seconds": round(took, 1)}
            rows.append(row | found)
            print(f"{side}, {sampler}, {how['steps']} steps: Dice {found['dice_mean']}", file=sys.stderr)
    for worker in workers.values():
        worker.close()
    best = {who: max(row["dice_mean"] for row in rows if SIDES[row["side"]][0] == who) for who in workers}
    return {
        "what": "Dice after equal wall time of training, in turns; same slices, batch draws, optimizer, learning rate "
        "schedule, gradient clipping and weight average; no augmentation; each its own network, loss and "
        "noise schedule",
        "hardware": hardware(given.threads),
        "data": {
            "name": "msd_hippocampus, whole hippocampus",
            "image_size": SIZE,
            "train_patients": len({p.case.patient_id for p in train}),
            "test_patients": len({p.case.patient_id for p in test}),
            "test_slices": slices,
        },
        "seconds_of_training": given.seconds,
        "batch": given.batch,
        "learning_rate": given.rate,
        "models": {"ours": OURS, "peer": {"package": "med-seg-diff-pytorch", **PEER}, "monai": MONAI},
        "training": facts,
        "rows": rows,
        "best_dice": best,
    }


def _train(sides: dict[str, Worker], facts: dict[str, Answer], given: argparse.Namespace) -> None:
    """Blocks of training in turn until every side has spent its seconds."""
    done = 0.0
    while done < given.seconds:
        for name, worker in sides.items():
            facts[name] |= worker.ask("train", name=name, seconds=given.block_seconds)
        done = min(facts[name]["seconds"] for name in sides)
        print(f"trained {done:.0f} of {given.seconds:g} s each", file=sys.stderr)
    for name in sides:
        facts[name]["seconds"] = round(facts[name]["seconds"], 1)


def _ways(given: argparse.Namespace) -> list[tuple[str, str, Answer]]:
    ways = []
    for name, (who, _) in SIDES.items():
        if who == "peer":
            ways.append((name, "own DDIM, eta 1", {"sampler": "own", "steps": given.peer_steps}))
        ways.append((name, "our DPM-Solver++(2M)", {"sampler": "dpmpp_2m", "steps": given.steps}))
    return ways


def describe(result: Answer) -> str:
    """The table for the terminal."""
    rows = [
        [
            f"{row['side']}, {row['sampler']}",
            row["steps"],
            result["training"][row["side"]]["steps"],
            row["dice_mean"],
            row["dice_median"],
            row["sampling_seconds"],
        ]
        for row in result["rows"]
    ]
    header = ["side, sampler", "evaluations", "training steps", "Dice mean", "median", "sampling s"]
    return table(header, rows) + f"\nbest of each: {result['best_dice']}"


def main() -> None:
    """Measure, write benchmarks/results/quality.json, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="training of each side")
    parser.add_argument("--block-seconds", type=float, default=15.0, help="of a turn")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate, both sides")
    parser.add_argument("--patients", type=int, default=6, help="held-out patients")
    parser.add_argument("--steps", type=int, default=5, help="of DPM-Solver++")
    parser.add_argument("--peer-steps", type=int, default=20, help="of the peer's own sampler (1000 by its default)")
    parser.add_argument("--sampling-batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a smoke test, written to quality_quick")
    given = parser.parse_args()
    if given.quick:
        given.seconds, given.block_seconds, given.patients, given.peer_steps, given.steps = 4.0, 2.0, 1, 2, 2
    result = measure(given)
    publish("quality_quick" if given.quick else "quality", result)
    print(describe(result))


if __name__ == "__main__":
    main()
