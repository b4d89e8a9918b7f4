"""Training and sampling on a GPU: python -m benchmarks.gpu

Samples a second, TFLOP/s and their share of the device's own matrix product in the same precision, peak memory beside
its forecast, and how long the device waited for the loader. Each case is a whole `Trainer`: batches are read, augmented
and copied as in training. `--device cpu --quick` proves the program where there is no GPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.recipe import gflop
from benchmarks.turns import Answer, hardware, publish, table
from medsegdiff.config import AugmentConfig, DiffusionConfig, ModelConfig, SamplingConfig, TrainingConfig, preset
from medsegdiff.data.augment import augment
from medsegdiff.devices import choose_device
from medsegdiff.diffusion import Diffusion
from medsegdiff.ema import WeightAverage
from medsegdiff.ensemble import segment_images
from medsegdiff.errors import UserError
from medsegdiff.network import MedSegDiff
from medsegdiff.training import Trainer

CHANNELS = 3
CASES: list[tuple[str, int, int, str, bool]] = [  # preset, pixels, batch, precision, compiled
    ("B", 256, 8, "bf16", True),
    ("B", 256, 16, "bf16", True),
    ("B", 256, 32, "bf16", True),
    ("B", 256, 16, "bf16", False),
    ("S", 128, 32, "bf16", True),
    ("S", 256, 16, "bf16", True),
    ("B", 256, 8, "fp32", False),
]
QUICK: list[tuple[str, int, int, str, bool]] = [("tiny", 32, 2, "bf16", False), ("tiny", 32, 2, "fp32", False)]


class Slices:
    """Random slices in memory, half precision as they are cached; every batch is read and augmented like real ones."""

    def __init__(self, side: int, batch: int, count: int = 256) -> None:
        generator = torch.Generator().manual_seed(0)
        self._images = torch.randn(count, CHANNELS, side, side, generator=generator).half()
        self._labels = (torch.rand(count, side, side, generator=generator) > 0.9).byte()
        self._batch = batch

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) and masks (B, 1, S, S) in {-1, +1} of one step."""
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(self._images), (self._batch,), generator=generator)
        images, labels = augment(self._images[rows].float(), self._labels[rows], AugmentConfig(), generator)
        return images, (labels[:, None] > 0).float() * 2 - 1


def synchronised(device: torch.device) -> float:
    """The clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matrix_tflops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """TFLOP/s of a plain matrix product of random numbers: what the device gives."""
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(3):
        left @ right
    begun = synchronised(device)
    for _ in range(10):
        left @ right
    return 10 * 2.0 * size**3 / (synchronised(device) - begun) / 1e12


def train_case(config: ModelConfig, batch: int, precision: str, compiled: bool, device: torch.device, steps: int,
               peak: float) -> Answer:  # fmt: skip
    """Time `steps` optimizer steps of a whole trainer after enough to compile and settle."""
    torch.manual_seed(0)
    network = MedSegDiff(config).to(device)
    settings = TrainingConfig(batch_size=batch, precision=precision)  # type: ignore[arg-type]
    trainer = Trainer(
        network, Diffusion(DiffusionConfig()), Slices(config.image_size, batch), settings, 10**6, seed=0,
        average=WeightAverage(network, 0.999), compile=compiled,
    )  # fmt: skip
    begun = synchronised(device)
    trainer.run(0, 5)
    compiling = synchronised(device) - begun
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    waited, begun = trainer.waited_seconds, synchronised(device)
    trainer.run(5, 5 + steps)
    seconds = (synchronised(device) - begun) / steps
    work = training_gflop(config) * batch
    return {
        "ms": round(seconds * 1e3, 2),
        "slices_a_second": round(batch / seconds, 1),
        "tflops": round(work / seconds / 1e3, 2),
        "share_of_product": round(work / seconds / 1e3 / peak, 3),
        "waited_share": round((trainer.waited_seconds - waited) / (seconds * steps), 4),
        "first_steps_seconds": round(compiling, 1),
        "microbatch": trainer.microbatch or batch,  # smaller than the batch where memory ran out
        "peak_mib": torch.cuda.max_memory_allocated(device) >> 20 if device.type == "cuda" else None,
        "forecast_mib": forecast_mib(config, batch, precision),
    }


def training_gflop(config: ModelConfig) -> float:
    """GFLOP of one slice's forward and backward pass, counted on shapes alone."""
    with torch.device("meta"):
        network = MedSegDiff(config)
        side = config.image_size
        mask, image = (
            torch.empty(1, config.mask_channels, side, side),
            torch.empty(1, config.image_channels, side, side),
        )

        def step() -> None:
            network(mask, torch.empty(1), image).sum().backward()

        return gflop(step)


def forecast_mib(config: ModelConfig, batch: int, precision: str) -> int:
    """What `medsegfed model show` forecasts for the same step."""
    from deploy.model_card import training_bytes

    return training_bytes(config, batch, precision) >> 20  # type: ignore[arg-type]


def sample_case(config: ModelConfig, device: torch.device, count: int, members: int) -> Answer:
    """Slices a second of a whole ensemble, 20 steps."""
    torch.manual_seed(0)
    network = MedSegDiff(config).to(device)
    images = torch.randn(count, config.image_channels, config.image_size, config.image_size, device=device)
    sampling = SamplingConfig(steps=20, members=members)

    def draw() -> None:
        segment_images(network, Diffusion(DiffusionConfig()), images, sampling, range(count), 256)

    draw()
    begun = synchronised(device)
    draw()
    seconds = synchronised(device) - begun
    return {
        "slices": count,
        "members": members,
        "seconds": round(seconds, 3),
        "slices_a_second": round(count / seconds, 2),
    }


def attempt(name: str, measure: Callable[[], Answer]) -> Answer:
    """A case that fails is a finding, and the others go on."""
    try:
        found = measure()
    except (RuntimeError, MemoryError, UserError) as error:
        found = {"error": str(error).splitlines()[0][:300]}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"{name}: {found}", file=sys.stderr, flush=True)
    return found


def measure(device: torch.device, quick: bool, steps: int, budget: float) -> Answer:
    """All cases that the time allows, most wanted first."""
    begun = time.monotonic()
    size = 256 if quick else 8192
    product = {
        name: round(matrix_tflops(device, dtype, size), 2)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    print(f"matrix product: {product} TFLOP/s", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for name, side, batch, precision, compiled in QUICK if quick else CASES:
        title = f"{name} {side} px, batch {batch}, {precision}{', compiled' if compiled else ''}"
        if time.monotonic() - begun > budget:
            rows.append({"case": title, "error": "not run: the time was up"})
            continue
        config = preset(name, image_size=side, image_channels=CHANNELS)
        found = attempt(
            title, partial(train_case, config, batch, precision, compiled, device, steps, product[precision])
        )
        rows.append({"case": title, **found})
    count, sampled = (2, [("tiny", 32)]) if quick else (64, [("S", 128), ("B", 256)])
    sampling = []
    for name, side in sampled:
        if time.monotonic() - begun > budget:
            break
        config = preset(name, image_size=side, image_channels=CHANNELS)
        title = f"{name} {side} px, 20 steps x 5 members"
        sampling.append({"case": title, **attempt(title, partial(sample_case, config, device, count, 5))})
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "what": "a whole training step: batch read, augmented, copied; forward, backward, clipping, AdamW, average",
        "gpu": gpu,
        "hardware": hardware(torch.get_num_threads()),
        "matrix_product_tflops": product,
        "training": rows,
        "sampling": sampling,
    }


def describe(result: Answer) -> str:
    """The table for the terminal."""
    keys = [
        "ms",
        "slices_a_second",
        "tflops",
        "share_of_product",
        "waited_share",
        "microbatch",
        "peak_mib",
        "forecast_mib",
    ]
    rows = [[row["case"], *(row.get(key, "-") for key in keys)] for row in result["training"]]
    lines = [f"{row['case']}: {row.get('slices_a_second', row.get('error'))} slices/s" for row in result["sampling"]]
    return "\n".join([table(["case", *keys], rows), *lines])


def main() -> None:
    """Measure, write benchmarks/results/gpu.json, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="as of `medsegfed train`")
    parser.add_argument("--steps", type=int, default=30, help="timed, of each case")
    parser.add_argument("--budget-seconds", type=float, default=480, help="no case is begun after")
    parser.add_argument("--quick", action="store_true", help="a smoke test of tiny cases, written to gpu_quick")
    given = parser.parse_args()
    steps = 3 if given.quick else given.steps
    # Without TF32 in convolutions, as in matrix products: else float32 steps would be set against a slower product.
    torch.backends.cudnn.allow_tf32 = False
    try:
        device = choose_device(given.device)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    result = measure(device, given.quick, steps, given.budget_seconds)
    publish("gpu_quick" if given.quick else "gpu", result)
    print(describe(result))


if __name__ == "__main__":
    main()
