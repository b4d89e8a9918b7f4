"""Make the packed cache of a plan: python -m benchmarks.real.pack --data DIR --out FILE [--plan full]

Runs where the datasets lie; needs the whole package. Slices come from the package's own preparation (normalisation,
letterbox), the split by patient from its `split_patients`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from benchmarks.real.cache import FORMAT, METADATA_KEY, pack_labels, quantise, restore_images
from benchmarks.real.plan import PLANS, Plan, Task, find_plan
from medsegdiff.data.dataset import open_dataset
from medsegdiff.data.prepare import prepare
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.data.splits import SPLIT_SEED, TEST_FRACTION, split_patients
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from medsegdiff.labels import LabelScheme
from medsegdiff.strict import compact_json

MOST_BYTES = 50_000_000  # so that the cache travels beside the code to a machine without a network
DESCRIPTIONS = Path(__file__).resolve().parents[2] / "simulations" / "datasets"


def pack(plan: Plan, data: Path, out: Path) -> dict[str, dict[str, float]]:
    """Write the cache of all datasets of a plan, found in folders of their names under `data`.

    Returns:
        Per dataset: cases, patients, slices, megabytes, and the largest error that storing images as uint8 made (in
        standard deviations of the normalised image).

    Raises:
        UserError: a dataset is not there or faulty, or the cache would be larger than 50 MB; nothing is written.
    """
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    facts: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for task in plan.tasks:
            parts, about[task.dataset], facts[task.dataset] = _pack_dataset(task, data, Path(scratch))
            tensors |= {f"{task.dataset}/{name}": value for name, value in parts.items()}
    packed = save(tensors, {METADATA_KEY: compact_json({"format": FORMAT, "plan": plan.name, "datasets": about})})
    if len(packed) > MOST_BYTES:
        raise UserError(
            f"{out}: the cache would take {len(packed) / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}; nothing was "
            "written. Take smaller images or fewer datasets into the plan."
        )
    write_atomic(out, packed)
    return facts


def _pack_dataset(task: Task, data: Path, scratch: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, float]]:
    description = DESCRIPTIONS / f"{task.dataset}.yaml"
    dataset = open_dataset(data / task.dataset, description if description.is_file() else None)
    prepared = prepare(dataset, task.image_size, scratch)
    scheme = LabelScheme.of(dataset.config)
    for case in prepared.cases:
        if case.raters > 1:
            raise UserError(
                f"{task.dataset}: case {case.case.case_id} has {case.raters} raters; a cache holds one mask an image. "
                "Leave the dataset out of the plan."
            )
    images = torch.cat([case.tensor("image") for case in prepared.cases])
    labels = torch.cat([case.tensor("labels")[0] for case in prepared.cases])
    codes, low, step = quantise(images)
    parts = {"image": codes, "low": low, "step": step, "labels": pack_labels(labels, len(scheme.labels))}
    split = split_patients([case.case for case in prepared.cases], TEST_FRACTION, 0.0, SPLIT_SEED)
    about = {
        "image_size": task.image_size,
        "labels": scheme.labels,
        "targets": scheme.targets,
        "members": scheme.members,
        "cases": [_describe(case) for case in prepared.cases],
        "split": split,
    }
    facts = {
        "cases": len(prepared.cases),
        "patients": len(split),
        "slices": len(images),
        "megabytes": sum(part.numel() * part.element_size() for part in parts.values()) / 1e6,
        "largest_error": (restore_images(codes, low, step).float() - images.float()).abs().max().item(),
    }
    return parts, about, facts


def _describe(prepared: PreparedCase) -> dict[str, Any]:
    case = prepared.case
    return {
        "case": case.case_id,
        "patient": case.patient_id,
        "site": case.site,
        "slices": prepared.slices,
        "spacing_mm": prepared.spacing_mm,
        "native_shape": prepared.geometry.shape,
    }


def main() -> int:
    """Pack and tell what was packed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("MEDSEGFED_DATA")
    parser.add_argument("--data", type=Path, default=data, required=data is None, help="default: $MEDSEGFED_DATA")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plan", default="full", help=f"one of {', '.join(PLANS)}")
    given = parser.parse_args()
    try:
        facts = pack(find_plan(given.plan), given.data, given.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, found in facts.items():
        print(
            f"{name}: {found['cases']} cases, {found['patients']} patients, {found['slices']} slices, "
            f"{found['megabytes']:.1f} MB, largest error {found['largest_error']:.4f}"
        )
    print(f"{given.out}: {given.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
