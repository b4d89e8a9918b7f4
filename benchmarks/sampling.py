"""Sampling whole cases: 20 steps beside a loop of 1000, five members each, on one trained network.

python -m benchmarks.sampling

The long way is what the first public code does: DDPM's loop over all timesteps, the whole network at each, one member
after the other. The short way is ours: DPM-Solver++(2M), image features kept, members and slices in one batch. Time is
taken on one whole case; Dice is compared patient by patient, on the slices that both ways sampled.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.quality import hippocampus
from benchmarks.turns import Answer, hardware, publish, spread
from medsegdiff.config import DiffusionConfig, SamplingConfig, TrainingConfig, preset
from medsegdiff.data.batches import SliceBatches
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.diffusion import Diffusion
from medsegdiff.ema import WeightAverage
from medsegdiff.ensemble import derive_seed, segment_images
from medsegdiff.labels import LabelScheme
from medsegdiff.metrics import dice
from medsegdiff.network import MedSegDiff
from medsegdiff.training import Trainer

Way = Callable[[Tensor, Sequence[int]], Tensor]  # (images, seeds) -> mean of the members, (N, 1, S, S)


def trained(scheme: LabelScheme, cases: Sequence[PreparedCase], size: int, steps: int) -> tuple[MedSegDiff, Diffusion]:
    """A tiny network after `steps` steps on the training cases, its weights averaged."""
    torch.manual_seed(0)
    network = MedSegDiff(preset("tiny", image_size=size))
    diffusion = Diffusion(DiffusionConfig())
    settings = TrainingConfig(learning_rate=2e-3)
    average = WeightAverage(network, 0.99)
    trainer = Trainer(
        network, diffusion, SliceBatches(cases, scheme, settings, 0), settings, steps, seed=0, average=average
    )
    trainer.run(0, steps, lambda done, _: print(f"trained {done}", file=sys.stderr) if done % 100 == 0 else None)
    network.load_state_dict(average.shadow)
    return network.eval(), diffusion


def ddpm_loop(network: MedSegDiff, diffusion: Diffusion, members: int, batch: int) -> Way:
    """Ho et al. 2020, algorithm 2, as plainly as it stands there: every timestep, every member, the whole network."""
    alpha_bar = diffusion.alpha_bar
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    alpha = alpha_bar / before
    variance = (1 - before) / (1 - alpha_bar) * (1 - alpha)

    def draw(images: Tensor, seeds: Sequence[int]) -> Tensor:
        total = torch.zeros(len(images), 1, *images.shape[-2:])
        for member in range(members):
            for start in range(0, len(images), batch):
                part = slice(start, start + batch)
                total[part] += one(images[part], derive_seed(seeds[start], member))
        return total / members

    @torch.inference_mode()
    def one(images: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (len(images), 1, *images.shape[-2:])
        x = torch.randn(shape, generator=generator)
        for t in reversed(range(len(alpha_bar))):
            t_B = torch.full((len(x),), t)
            clean = diffusion.clean_from(network(x, t_B, images), x, t_B).clamp(-1, 1)
            a, b = before[t].sqrt() * (1 - alpha[t]), alpha[t].sqrt() * (1 - before[t])
            x = float(a / (1 - alpha_bar[t])) * clean + float(b / (1 - alpha_bar[t])) * x
            if t:
                x = x + float(variance[t].sqrt()) * torch.randn(shape, generator=generator)
        return x

    return draw


def ours(network: MedSegDiff, diffusion: Diffusion, sampling: SamplingConfig) -> Way:
    """The package's own way."""
    return lambda images, seeds: segment_images(network, diffusion, images, sampling, seeds).mean


def measure(given: argparse.Namespace) -> Answer:
    """Train, time both ways on the first held-out case, score both on all of them."""
    torch.set_num_threads(given.threads)
    scheme, train, test = hippocampus(given.patients, given.size)
    network, diffusion = trained(scheme, train, given.size, given.training_steps)
    short = SamplingConfig(steps=given.steps, members=given.members)
    ways = {
        "short": ours(network, diffusion, short),
        "long": ddpm_loop(network, diffusion, given.members, given.batch),
        "one_step": ours(network, diffusion, replace(short, steps=1)),
        "five_steps": ours(network, diffusion, replace(short, steps=5)),
    }
    seconds = _time(ways, test[0])
    rows = []
    for number, case in enumerate(test):
        images, truth = _slices(case, scheme, given.stride)
        seeds = [derive_seed("slice", case.case.case_id, index) for index in range(len(images))]
        row = {name: round(_dice(way(images, seeds), truth), 4) for name, way in ways.items()}
        rows.append({"slices": len(images), **row})
        print(f"patient {number + 1} of {len(test)}: {row}", file=sys.stderr)
    means = {name: round(statistics.fmean(row[name] for row in rows), 4) for name in ways}
    return {
        "what": f"short: DPM-Solver++(2M), {given.steps} steps; long: DDPM, {len(diffusion.alpha_bar)} steps; "
        f"{given.members} members each; the same network (tiny, {given.size} px)",
        "hardware": hardware(given.threads),
        "training_steps": given.training_steps,
        "case_slices": test[0].slices,
        "seconds_a_case": seconds,
        "long_over_short": round(seconds["long"]["median"] / seconds["short"]["median"], 1),
        "dice": means,
        "dice_short_minus_long": round(means["short"] - means["long"], 4),
        "patients": rows,
    }


def _time(ways: dict[str, Way], case: PreparedCase) -> Answer:
    """Seconds for the whole first case: the short way before and after the long one, so that a drift shows."""
    images = case.images().contiguous(memory_format=torch.channels_last)
    seeds = list(range(len(images)))
    found: dict[str, list[float]] = {name: [] for name in ways}
    quick = [name for name in ways if name != "long"]
    for name in [*quick, *quick, "long", *quick, *quick]:
        begun = time.perf_counter()
        ways[name](images, seeds)
        found[name].append(time.perf_counter() - begun)
        print(f"{name}: {found[name][-1]:.2f} s", file=sys.stderr)
    return {name: spread(values) for name, values in found.items()}


def _slices(case: PreparedCase, scheme: LabelScheme, stride: int) -> tuple[Tensor, Tensor]:
    images = case.images()[::stride].contiguous(memory_format=torch.channels_last)
    return images, scheme.encode(case.tensor("labels")[0])[::stride] > 0


def _dice(mean: Tensor, truth: Tensor) -> float:
    predicted = mean > 0
    return dice(int((predicted & truth).sum()), int(predicted.sum()), int(truth.sum()))


def describe(result: Answer) -> str:
    """The findings for the terminal."""
    seconds = {name: found["median"] for name, found in result["seconds_a_case"].items()}
    return (
        f"{result['what']}\nseconds for a case of {result['case_slices']} slices: {seconds}\n"
        f"long / short: {result['long_over_short']}\nDice: {result['dice']} "
        f"(short - long {result['dice_short_minus_long']:+})"
    )


def main() -> None:
    """Measure, write benchmarks/results/sampling.json, print the findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--training-steps", type=int, default=800)
    parser.add_argument("--patients", type=int, default=6)
    parser.add_argument("--stride", type=int, default=3, help="every n-th slice counts for Dice; the long way is long")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64, help="slices at once in the long loop")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a smoke test, written to sampling_quick")
    given = parser.parse_args()
    if given.quick:
        given.size, given.training_steps, given.patients, given.stride, given.members = 16, 20, 1, 20, 1
    result = measure(given)
    publish("sampling_quick" if given.quick else "sampling", result)
    print(describe(result))


if __name__ == "__main__":
    main()
