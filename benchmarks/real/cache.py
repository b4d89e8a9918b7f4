"""The packed cache: every slice of every dataset of a plan in one safetensors file, small enough to travel.

Images are stored as uint8 between each slice's own minimum and maximum, channel by channel; labels as bits, one plane a
binary digit of the label index. Reading needs torch, numpy and safetensors alone, and gives cases that the package's
own batches, augmentation and scoring take for prepared ones; what they call the native size is the network's grid here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from benchmarks.real.plan import Job, Plan, Task
from medsegdiff.data.cases import Case
from medsegdiff.data.geometry import Geometry
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.errors import UserError
from medsegdiff.labels import LabelScheme

METADATA_KEY = "cache"
FORMAT = 1


@dataclass(frozen=True)
class PackedCase(PreparedCase):
    """A case whose tensors lie in memory."""

    stored: Mapping[str, Tensor] = field(repr=False, compare=False, kw_only=True)

    def tensor(self, name: str) -> Tensor:
        """ "image" (N, C, S, S) float16, "labels" (1, N, S, S) uint8 or "native" (1, S, S, N) uint8."""
        return self.stored[name]


@dataclass(frozen=True)
class PackedDataset:
    """One dataset of the cache."""

    name: str
    scheme: LabelScheme
    cases: tuple[PackedCase, ...]
    split: Mapping[str, str]  # patient -> "train" or "test"
    image_size: int
    channels: int


def quantise(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, C, S, S) as 256 levels between the minimum and maximum of each slice and channel.

    Returns:
        uint8 (N, C, S, S), low and step, (N, C) float32 each: image = low + step * code.

    Guarantees:
        Every pixel comes back within half a step, (maximum - minimum) / 510.
    """
    images = images.float()
    low, high = images.amin(dim=(2, 3)), images.amax(dim=(2, 3))
    step = ((high - low) / 255).clamp_min(1e-8)
    codes = ((images - low[..., None, None]) / step[..., None, None]).round().clamp(0, 255)
    return codes.to(torch.uint8), low, step


def restore_images(codes: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """Undo `quantise`: (N, C, S, S) float16, the type of prepared cases."""
    return (codes.float() * step[..., None, None] + low[..., None, None]).half()


def pack_labels(labels: Tensor, count: int) -> Tensor:
    """Label indices (N, S, S) below `count` as bits: (digits, N, ceil(S * S / 8)) uint8."""
    flat = labels.flatten(1).numpy()
    digits = max(1, (count - 1).bit_length())
    return torch.from_numpy(np.stack([np.packbits((flat >> digit) & 1, axis=1) for digit in range(digits)]))


def unpack_labels(packed: Tensor, size: int) -> Tensor:
    """Undo `pack_labels`: (N, S, S) uint8."""
    planes = np.unpackbits(packed.numpy(), axis=2, count=size * size)
    labels = sum((plane << digit for digit, plane in enumerate(planes)), np.zeros_like(planes[0]))
    return torch.from_numpy(labels.reshape(-1, size, size))


def read_cache(path: Path) -> dict[str, PackedDataset]:
    """Every dataset of a cache, by name.

    Raises:
        UserError: no such file, or no cache of this version.
    """
    try:
        with safe_open(str(path), framework="pt") as handle:
            about = json.loads((handle.metadata() or {})[METADATA_KEY])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: is no packed cache ({error}). Make it: python -m benchmarks.real.pack --data DIR --out {path}"
        ) from error
    if about["format"] != FORMAT:
        raise UserError(f"{path}: cache format {about['format']}, this version reads {FORMAT}. Pack the data again.")
    return {name: _dataset(path, name, facts, tensors) for name, facts in about["datasets"].items()}


def _dataset(path: Path, name: str, about: dict[str, Any], tensors: Mapping[str, Tensor]) -> PackedDataset:
    size = about["image_size"]
    images = restore_images(*(tensors[f"{name}/{part}"] for part in ("image", "low", "step")))
    labels = unpack_labels(tensors[f"{name}/labels"], size)
    scheme = LabelScheme(tuple(about["labels"]), tuple(about["targets"]), tuple(map(tuple, about["members"])))
    cases, first = [], 0
    for facts in about["cases"]:
        part = slice(first, first + facts["slices"])
        cases.append(_case(path, facts, images[part], labels[part]))
        first += facts["slices"]
    return PackedDataset(name, scheme, tuple(cases), about["split"], size, images.shape[1])


def _case(path: Path, facts: dict[str, Any], images: Tensor, labels: Tensor) -> PackedCase:
    count, channels, size, _ = images.shape
    case = Case(facts["case"], facts["patient"], (), (), facts["site"])
    present = tuple(tuple(index for index in slice_.unique().tolist() if index) for slice_ in labels)
    stored = {"image": images, "labels": labels[None], "native": labels.movedim(0, -1)[None]}
    return PackedCase(case, path, Geometry((size, size, count), 2, None), size, channels, 1, present, stored=stored)


def dataset_of(cache: Mapping[str, PackedDataset], task: Task) -> PackedDataset:
    """A task's dataset. Raises UserError where the cache lacks it, or holds it at another size."""
    found = cache.get(task.dataset)
    if found is None or found.image_size != task.image_size:
        there = ", ".join(f"{dataset.name} at {dataset.image_size} px" for dataset in cache.values())
        raise UserError(
            f"the cache holds {there}; the plan asks for {task.dataset} at {task.image_size} px. "
            "Pack the data with this plan: python -m benchmarks.real.pack --plan NAME"
        )
    return found


def split_cases(
    dataset: PackedDataset, held_out: str | None, test_slices: int | None = None
) -> tuple[list[PackedCase], list[PackedCase]]:
    """Training and test cases: all patients of other sites and of the held-out one, or the split by patient.

    Args:
        test_slices: keep the test patients with the fewest slices, up to so many slices together (one at least).
    """
    if held_out is None:
        tested = {patient for patient, part in dataset.split.items() if part == "test"}
    else:
        tested = {case.case.patient_id for case in dataset.cases if case.case.site == held_out}
    train = [case for case in dataset.cases if case.case.patient_id not in tested]
    test = [case for case in dataset.cases if case.case.patient_id in tested]
    if not train or not test:
        raise UserError(
            f"{dataset.name}, held out {held_out or 'by patient'}: {len(train)} cases to train on and {len(test)} to "
            "test on; both are needed. Check the site's name and the data that was packed."
        )
    return train, test if test_slices is None else _fewest(test, test_slices)


def _fewest(cases: Sequence[PackedCase], most: int) -> list[PackedCase]:
    counts: dict[str, int] = {}
    for case in cases:
        counts[case.case.patient_id] = counts.get(case.case.patient_id, 0) + case.slices
    kept: list[str] = []
    for patient in sorted(counts, key=lambda name: (counts[name], name)):
        if not kept or sum(counts[name] for name in kept) + counts[patient] <= most:
            kept.append(patient)
    return [case for case in cases if case.case.patient_id in kept]


def job_cases(
    cache: Mapping[str, PackedDataset], plan: Plan, job: Job
) -> tuple[PackedDataset, list[PackedCase], list[PackedCase]]:
    """A job's dataset, training cases and test cases."""
    dataset = dataset_of(cache, job.task)
    return dataset, *split_cases(dataset, job.held_out, plan.test_slices)
