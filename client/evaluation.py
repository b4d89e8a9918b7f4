"""Scoring a model on a site's held-out patients."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from client.contract import Assignment, Scores, TrainTask
from client.site import Site
from medsegdiff.devices import choose_device
from medsegdiff.evaluation import score_cases
from medsegdiff.metrics import PatientScore
from medsegdiff.network import channels_last
from medsegdiff.weights import build


def evaluate_site(site: Site, task: TrainTask, assignment: Assignment, weights: Mapping[str, Tensor]) -> Scores:
    """Score `weights` on the site's held-out patients; only averages over patients are returned."""
    started = time.perf_counter()
    patients = score_held_out(site, task, weights, assignment.round)
    return Scores(
        site=site.name,
        run=assignment.run,
        round=assignment.round,
        model_hash=assignment.model_hash,
        patients=len(patients),
        seconds=time.perf_counter() - started,
        **summarise(patients),
    )


def score_held_out(
    site: Site, task: TrainTask, weights: Mapping[str, Tensor], round_: int | None = None
) -> list[PatientScore]:
    """One score per held-out patient of the site; these stay inside it."""
    torch.set_num_threads(task.threads)
    segmenter = build(task.card, weights)
    channels_last(segmenter.network).to(choose_device(site.config.device))
    return score_cases(segmenter, site.data(task).test, task.sampling, task.seed, site=site.name, round_=round_)


def summarise(patients: Sequence[PatientScore]) -> dict[str, Any]:
    """Averages over patients and targets, as `Scores` and the report name them."""
    if not patients:
        return {"dice": None, "dice_by_target": {}, "hd95_mm": None, "hd95_undefined": 0}
    targets = list(patients[0].dice)
    distances = [d for p in patients for d in p.hd95_mm.values() if d is not None]
    return {
        "dice": _mean([p.mean_dice for p in patients]),
        "dice_by_target": {target: _mean([p.dice[target] for p in patients]) for target in targets},
        "hd95_mm": _mean(distances) if distances else None,
        "hd95_undefined": sum(sum(p.hd95_undefined.values()) for p in patients),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
