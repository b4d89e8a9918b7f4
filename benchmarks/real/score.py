"""Dice per patient of a way to segment, on the network's grid, and what it costs in time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from benchmarks.real.cache import PackedCase, quantise
from benchmarks.real.learner import Predict
from medsegdiff.data.geometry import restack
from medsegdiff.ensemble import derive_seed
from medsegdiff.files import write_atomic
from medsegdiff.labels import LabelScheme
from medsegdiff.metrics import PatientScorer

SLICES_AT_ONCE = 32
PICTURES = 3  # example slices a job


@dataclass(frozen=True)
class Answers:
    """What a model said of every test slice.

    masks: (N, T, S, S) bool. entropy: (N, S, S) in [0, 1] bits, the largest over channels.
    """

    masks: Tensor
    entropy: Tensor
    seconds: float


def answer(
    cases: Sequence[PackedCase], scheme: LabelScheme, predict: Predict, seed: int, device: torch.device
) -> Answers:
    """Segment all slices of `cases`, each with noise from (seed, its case, its index) alone.

    `seconds` holds segmenting alone; on a GPU a first batch warms up, unmeasured.
    """
    images = torch.cat([case.images() for case in cases])
    seeds = [derive_seed(seed, case.case.case_id, index) for case in cases for index in range(case.slices)]
    parts = [slice(start, start + SLICES_AT_ONCE) for start in range(0, len(images), SLICES_AT_ONCE)]

    def segment(part: slice) -> tuple[Tensor, Tensor]:
        chunk = images[part].to(device).contiguous(memory_format=torch.channels_last)
        mean, entropy = predict(chunk, seeds[part])
        return scheme.decode(mean), entropy.amax(dim=1)

    if device.type == "cuda":
        segment(parts[0])
    begun = time.perf_counter()
    found = [segment(part) for part in parts]  # the answers come back to the CPU: no kernel is left running
    seconds = time.perf_counter() - begun
    return Answers(torch.cat([masks for masks, _ in found]), torch.cat([entropy for _, entropy in found]), seconds)


def score(cases: Sequence[PackedCase], scheme: LabelScheme, answers: Answers) -> dict[str, Any]:
    """A row: Dice a target and over targets, means over patients with a patient's slices pooled; seconds an image."""
    scorer = PatientScorer(scheme, distances=False)
    for case, masks in zip(cases, answers.masks.split([case.slices for case in cases]), strict=True):
        scorer.add(case, restack(masks, case.geometry))
    patients = scorer.scores()
    return {
        "dice": {target: statistics.fmean(p.dice[target] for p in patients) for target in scheme.targets},
        "mean_dice": statistics.fmean(p.mean_dice for p in patients),
        "patients": [round(p.mean_dice, 4) for p in patients],
        "seconds_per_image": answers.seconds / len(answers.masks),
    }


def write_examples(path: Path, cases: Sequence[PackedCase], scheme: LabelScheme, answers: Answers) -> None:
    """Image, truth, mask and entropy of the fullest slice of each of the first patients: under 1 MB, for pictures."""
    truth = torch.cat([scheme.truth(case.tensor("labels")[0]) for case in cases])
    patients = [case.case.patient_id for case in cases for _ in range(case.slices)]
    area = truth.any(dim=1).flatten(1).sum(dim=1)
    chosen = []
    for patient in sorted(set(patients))[:PICTURES]:
        own = [number for number, name in enumerate(patients) if name == patient]
        chosen.append(max(own, key=lambda number: int(area[number])))
    images = torch.cat([case.tensor("image") for case in cases])[chosen]
    tensors = {
        "image": quantise(images)[0],
        "truth": truth[chosen].to(torch.uint8),
        "mask": answers.masks[chosen].to(torch.uint8),
        "entropy": (answers.entropy[chosen].clamp(0, 1) * 255).round().to(torch.uint8),
    }
    write_atomic(path, save({name: value.contiguous() for name, value in tensors.items()}))
