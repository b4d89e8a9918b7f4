"""What each part of the model is worth at a small size: python -m benchmarks.ablations

One small network a variant, trained on the same slices with the same seeds, scored on the same held-out patients: by
the auxiliary head alone where there is one, after one sampling step, by full sampling, and by an ensemble. Each is
trained from two seeds: a difference below that between seeds says nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality import hippocampus
from benchmarks.turns import RESULTS, ROOT, Answer, hardware, publish
from medsegdiff.config import DiffusionConfig, ModelConfig, SamplingConfig, TrainingConfig, preset
from medsegdiff.data.batches import SliceBatches
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.diffusion import Diffusion
from medsegdiff.ema import WeightAverage
from medsegdiff.ensemble import Pairs, derive_seed, segment_images
from medsegdiff.ff_parser import DynamicFusion
from medsegdiff.labels import LabelScheme
from medsegdiff.metrics import dice
from medsegdiff.network import MedSegDiff, parameter_count
from medsegdiff.training import Trainer

PAGE = ROOT / "docs" / "model.md"
MARKS = ("<!-- ablations: made by benchmarks.ablations -->", "<!-- end of ablations -->")
SEEDS = (0, 1)
EMA_DECAY = 0.99
LEARNING_RATE = 2e-3
FEW, FULL, MEMBERS = 5, 20, 5
WAYS = ("auxiliary", "1 step", f"{FEW} steps", f"{FULL} steps", f"{MEMBERS} members, {FEW} steps")


class BareFusion(DynamicFusion):
    """The paper's fusion as it stands there: A m_I in the place of m_I."""

    def forward(self, image_BCHW: Tensor, mask_BCHW: Tensor) -> Tensor:
        """Attended image features alone, (B, C, H, W)."""
        attended: Tensor = super().forward(image_BCHW, mask_BCHW) - image_BCHW
        return attended


@dataclass(frozen=True)
class Variant:
    """What differs from the default."""

    model: dict[str, Any] = field(default_factory=dict)
    diffusion: DiffusionConfig = DiffusionConfig()
    residual: bool = True  # false: the fusion's attention takes the place of the image features


VARIANTS: dict[str, Variant] = {
    "default": Variant(),
    "no FF-Parser": Variant({"ff_parser": False}),
    "no fusion": Variant({"fusion_levels": ()}),
    "fusion without residual": Variant(residual=False),
    "auxiliary head": Variant({"auxiliary_head": True}),
    "self-conditioning": Variant({"self_conditioning": True}),
    "eps": Variant(diffusion=DiffusionConfig(prediction="eps")),
    "v": Variant(diffusion=DiffusionConfig(prediction="v")),
    "min-SNR, x0": Variant(diffusion=DiffusionConfig(weighting="min_snr")),
    "min-SNR, v": Variant(diffusion=DiffusionConfig(prediction="v", weighting="min_snr")),
    "zero terminal SNR, x0": Variant(diffusion=DiffusionConfig(zero_terminal_snr=True)),
    "zero terminal SNR, v": Variant(diffusion=DiffusionConfig(prediction="v", zero_terminal_snr=True)),
    "no attention": Variant({"attention_levels": ()}),
    "dropout 0.1": Variant({"dropout": 0.1}),
}


def trained(
    variant: Variant,
    model: ModelConfig,
    scheme: LabelScheme,
    cases: Sequence[PreparedCase],
    batch: int,
    steps: int,
    seed: int,
) -> MedSegDiff:
    """A network after `steps` steps, its weights averaged; `seed` fixes its first weights, batches and noise."""
    torch.manual_seed(seed)
    network = MedSegDiff(model)
    if not variant.residual:
        for fusion in network.fusions.values():
            fusion.__class__ = BareFusion  # the same weights
    diffusion = Diffusion(variant.diffusion)
    settings = TrainingConfig(batch_size=batch, learning_rate=LEARNING_RATE)
    average = WeightAverage(network, EMA_DECAY)
    batches = SliceBatches(cases, scheme, settings, seed)
    Trainer(network, diffusion, batches, settings, steps, seed=seed, average=average).run(0, steps)
    network.load_state_dict(average.shadow)
    return network.eval()


def segment_each_way(
    network: MedSegDiff, diffusion: Diffusion, images: Tensor, seeds: Sequence[int]
) -> dict[str, Tensor]:
    """Masks (N, K, S, S) of slices (N, C, S, S) by every one of WAYS that the network has."""
    few = SamplingConfig(steps=FEW, members=MEMBERS)
    first = torch.zeros(len(images), network.config.mask_channels, *images.shape[-2:])

    def keep_first(pairs: Pairs, masks: Tensor) -> None:
        for (index, member), mask in zip(pairs, masks, strict=True):
            if member == 0:  # drawn from the same seed as a sample without company
                first[index] = mask

    found = {}
    if network.config.auxiliary_head:
        with torch.inference_mode():
            found["auxiliary"] = network.auxiliary(images)
    for steps in (1, FULL):
        found[f"{steps} step{'s' * (steps > 1)}"] = segment_images(
            network, diffusion, images, replace(few, steps=steps, members=1), seeds
        ).mean
    found[f"{MEMBERS} members, {FEW} steps"] = segment_images(
        network, diffusion, images, few, seeds, watch=keep_first
    ).mean
    found[f"{FEW} steps"] = first
    return found


def score(
    network: MedSegDiff, diffusion: Diffusion, scheme: LabelScheme, cases: Sequence[PreparedCase], stride: int
) -> dict[str, list[float]]:
    """Dice of each case (every `stride`-th slice, pooled, at the network's size), by way."""
    found: dict[str, list[float]] = {}
    for case in cases:
        images = case.images()[::stride].contiguous(memory_format=torch.channels_last)
        truth = scheme.encode(case.tensor("labels")[0])[::stride] > 0
        seeds = [derive_seed("slice", case.case.case_id, index) for index in range(len(images))]
        for way, mask in segment_each_way(network, diffusion, images, seeds).items():
            both, predicted = int(((mask > 0) & truth).sum()), int((mask > 0).sum())
            found.setdefault(way, []).append(round(dice(both, predicted, int(truth.sum())), 4))
    return found


def measure(given: argparse.Namespace) -> Answer:
    """Train and score every variant; the results so far are written after each."""
    torch.set_num_threads(given.threads)
    scheme, train, test = hippocampus(given.patients, given.size)
    result: Answer = {
        "what": "Dice per held-out patient of small networks that differ in one thing from the default; same slices, "
        "batches, noise and steps; weights averaged",
        "hardware": hardware(given.threads),
        "data": {
            "name": "msd_hippocampus, whole hippocampus",
            "image_size": given.size,
            "train_patients": len(train),
            "test_patients": len(test),
            "slices_scored": sum(len(range(0, case.slices, given.stride)) for case in test),
        },
        "network": f"tiny, {given.size} px, base_channels {given.channels}",
        "training": {
            "steps": given.steps, "batch": given.batch, "learning_rate": LEARNING_RATE, "ema_decay": EMA_DECAY,
            "auxiliary_weight": TrainingConfig().auxiliary_weight,
        },
        "rows": [],
    }  # fmt: skip
    variants = {name: VARIANTS[name] for name in given.variants or VARIANTS}
    for name, variant in variants.items():
        for seed in SEEDS:
            model = preset("tiny", image_size=given.size, base_channels=given.channels, **variant.model)
            network = trained(variant, model, scheme, train, given.batch, given.steps, seed)
            found = score(network, Diffusion(variant.diffusion), scheme, test, given.stride)
            means = {way: round(statistics.fmean(found[way]), 4) for way in WAYS if way in found}
            row = {"variant": name, "seed": seed, "parameters": parameter_count(network), "dice": means}
            result["rows"].append(row | {"patients": found})
            publish(given.name, result)
            print(f"{name}, seed {seed}: {means}", file=sys.stderr, flush=True)
    return result


def describe(result: Answer) -> str:
    """A table: Dice by way, and the ensemble's difference from the default's of the same seed, patient by patient."""
    ensemble = WAYS[-1]
    reference = {row["seed"]: row["patients"][ensemble] for row in result["rows"] if row["variant"] == "default"}
    lines = [
        ["variant", "seed", "parameters", *WAYS, "ensemble - default (standard error)"],
        ["---"] * (4 + len(WAYS)),
    ]
    for row in result["rows"]:
        cells = [f"{row['dice'][way]:.3f}" if way in row["dice"] else "-" for way in WAYS]
        base = None if row["variant"] == "default" else reference.get(row["seed"])
        difference = "-" if base is None else _difference(row["patients"][ensemble], base)
        lines.append([row["variant"], str(row["seed"]), str(row["parameters"]), *cells, difference])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _difference(ours: Sequence[float], default: Sequence[float]) -> str:
    each = [one - other for one, other in zip(ours, default, strict=True)]
    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else 0.0
    return f"{statistics.fmean(each):+.3f} ({error:.3f})"


def with_table(page: str, result: Answer) -> str:
    """A page whose table between the two marks is that of the results."""
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    return f"{before}{MARKS[0]}\n{describe(result)}\n{MARKS[1]}{after}"


def main() -> None:
    """Measure, write benchmarks/results/ablations.json and the table in docs/model.md, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--channels", type=int, default=8, help="base_channels of the tiny preset")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--patients", type=int, default=12, help="held out, at most 24")
    parser.add_argument("--stride", type=int, default=4, help="every n-th slice counts for Dice")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), metavar="NAME", help="default: all")
    parser.add_argument("--quick", action="store_true", help="a smoke test, written to ablations_quick")
    parser.add_argument("--table", action="store_true", help="measure nothing: write the last results' table")
    given = parser.parse_args()
    if given.quick:
        given.size, given.steps, given.patients, given.stride = 16, 2, 2, 12
    given.name = "ablations_quick" if given.quick else "ablations"
    result = json.loads((RESULTS / f"{given.name}.json").read_text()) if given.table else measure(given)
    if not given.quick:
        PAGE.write_text(with_table(PAGE.read_text(), result))
    print(describe(result))


if __name__ == "__main__":
    main()
