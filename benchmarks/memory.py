"""Memory of a training and of a sampling step beside its forecast: python -m benchmarks.memory

On a GPU the measured figure is torch.cuda.max_memory_allocated. On a CPU it is the running sum of what torch's
allocator gives out and takes back, and the growth of the process stands beside it: each case has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.turns import ROOT, Answer, hardware, publish, table
from deploy.model_card import sampling_bytes, training_bytes
from medsegdiff.config import DiffusionConfig, ModelConfig, SamplingConfig, TrainingConfig, preset
from medsegdiff.devices import autocast, choose_device
from medsegdiff.diffusion import Diffusion
from medsegdiff.ema import WeightAverage
from medsegdiff.ensemble import segment_images
from medsegdiff.network import MedSegDiff
from medsegdiff.training import Trainer

MIB = 2**20
CPU_CASES = [("tiny", 64, 1), ("tiny", 64, 8), ("S", 128, 1), ("S", 128, 2), ("S", 256, 1), ("B", 128, 1)]
GPU_CASES = [("tiny", 64, 16), ("S", 128, 16), ("S", 256, 8), ("B", 256, 1), ("B", 256, 8), ("L", 256, 8)]


class Noise:
    """One batch of noise, again and again."""

    def __init__(self, config: ModelConfig, batch: int) -> None:
        side = config.image_size
        self.images = torch.randn(batch, config.image_channels, side, side)
        self.masks = torch.randn(batch, config.mask_channels, side, side).sign()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of every step."""
        return self.images, self.masks


def make_trainer(config: ModelConfig, batch: int, precision: str, device: torch.device) -> Trainer:
    """A training of noise, as `medsegfed train` sets one up: AdamW and a weight average."""
    torch.manual_seed(0)
    network = MedSegDiff(config).to(device)
    training = TrainingConfig(batch_size=batch, precision=precision)  # type: ignore[arg-type]
    return Trainer(
        network,
        Diffusion(DiffusionConfig()),
        Noise(config, batch),
        training,
        10,
        0,
        average=WeightAverage(network, 0.9),
    )


def peak_bytes(work: Callable[[], object], device: torch.device, held: int) -> int:
    """The most that torch's allocator has given out at once during `work`; `held` bytes were given out before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    live = highest = held
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        live += change
        highest = max(highest, live)
    return highest


def held_bytes(trainer: Trainer) -> int:
    """Weights, moments, weight average."""
    assert trainer.average is not None
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    tensors: list[Tensor] = [*trainer.parameters.values(), *moments, *trainer.average.shadow.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(name: str, size: int, batch: int, precision: str, device: torch.device) -> Answer:
    """Forecast and measured peaks of one case, MiB."""
    config = preset(name, image_size=size)
    gpu = device.type == "cuda"
    torch.set_num_threads(1)
    before = _most_resident()
    trainer = make_trainer(config, batch, precision, device)
    trainer.step(0)  # makes the moments, which every later step finds there
    trainer.step(1)
    grown = _most_resident() - before
    trainer.optimizer.zero_grad(set_to_none=True)
    training = peak_bytes(lambda: trainer.step(2), device, held_bytes(trainer))
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.optimizer.state.clear()
    trainer.average = None
    images = trainer.batches.batch(0)[0].to(device)

    def sample() -> None:
        with autocast(device, precision):  # type: ignore[arg-type]
            segment_images(trainer.network, trainer.diffusion, images, SamplingConfig(steps=2), list(range(batch)))

    sampling = peak_bytes(sample, device, sum(p.numel() * 4 for p in trainer.parameters.values()))
    return {
        "case": f"{name} {size} px, batch {batch}, {precision}",
        "training": _beside(training_bytes(config, batch, precision, gpu=gpu), training),  # type: ignore[arg-type]
        "sampling": _beside(sampling_bytes(config, batch, precision, gpu=gpu), sampling),  # type: ignore[arg-type]
        "process_growth_mib": None if gpu else round(grown / MIB, 1),
    }


def _beside(forecast: int, measured: int) -> Answer:
    return {
        "forecast_mib": round(forecast / MIB, 1),
        "measured_mib": round(measured / MIB, 1),
        "ratio": round(forecast / measured, 3),
    }


def _most_resident() -> int:
    """The most memory this process ever held, bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe(result: Answer) -> str:
    """The table for the terminal."""
    header = ["case", "training: forecast", "measured", "ratio", "process", "sampling: forecast", "measured", "ratio"]
    rows = [
        [
            case["case"],
            *case["training"].values(),
            case["process_growth_mib"] or "-",
            *case["sampling"].values(),
        ]
        for case in result["cases"]
    ]
    return "MiB\n" + table(header, rows)


def main() -> None:
    """Measure every case in a process of its own, write benchmarks/results/memory.json, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--case", nargs=4, metavar=("PRESET", "SIZE", "BATCH", "PRECISION"), help="measure one alone")
    given = parser.parse_args()
    device = choose_device(given.device)
    if given.case:
        name, size, batch, precision = given.case
        print(json.dumps(measure(name, int(size), int(batch), precision, device)))
        return
    cases = []
    for name, size, batch in GPU_CASES if device.type == "cuda" else CPU_CASES:
        for precision in ("fp32", "bf16"):
            command = [sys.executable, "-m", "benchmarks.memory", "--device", given.device, "--case"]
            done = subprocess.run(
                [*command, name, str(size), str(batch), precision],
                cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            cases.append(json.loads(done.stdout))
            print(cases[-1]["case"], file=sys.stderr)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result = {
        "what": "peak memory of a training step (AdamW, weight average) and of sampling; ratio: forecast / measured",
        "hardware": hardware(1),
        "device": device_name,
        "cases": cases,
    }
    publish("memory", result)
    print(describe(result))


if __name__ == "__main__":
    main()
