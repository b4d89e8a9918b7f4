"""A private step over a plain one, for each gradient engine: python -m benchmarks.private_step

The plain step takes all rows at once and steps AdamW; a private one makes a gradient a patient, clips, sums, adds the
system's noise and steps the same optimizer. Patients x m x K rows on both sides. Sides take turns, step by step. Peak
memory is the allocator's, from one step (benchmarks/memory.py). On a GPU as on a CPU; `--device` chooses.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.memory import MIB, peak_bytes
from benchmarks.models import OURS
from benchmarks.turns import RESULTS, Answer, hardware, publish, spread, table
from client.privacy.engines import Engine, HooksEngine, PatientLoop, Rows, VmapEngine, trained_parameters
from client.privacy.entropy import SystemEntropy
from client.privacy.gate import random_patients
from client.privacy.noise import standard_normal
from client.privacy.patients import DiffusionRowLoss
from client.privacy.policy import PrivacyPolicy
from client.privacy.step import PrivateStep
from client.privacy.trainable import attach, trained_count
from medsegdiff.config import DiffusionConfig, ModelConfig, Precision, preset
from medsegdiff.devices import choose_device
from medsegdiff.diffusion import Diffusion
from medsegdiff.network import MedSegDiff, channels_last

PATIENTS = 8
OURS_CONFIG = ModelConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in OURS.items()})
MODELS: dict[str, tuple[ModelConfig, bool]] = {  # name -> network, whether the fine-tuning set alone is trained
    "tiny": (preset("tiny"), False),
    "tiny, fine-tuned": (preset("tiny"), True),
    "four levels": (OURS_CONFIG, False),  # the network of benchmarks/models.py, 7.84 M parameters
}
ENGINES: dict[str, Callable[[], Engine]] = {
    "patient loop": PatientLoop,
    "vmap": lambda: VmapEngine(PATIENTS),
    "Opacus hooks": lambda: HooksEngine(PATIENTS),
}
PLAIN = "plain"


def plain_step(network: MedSegDiff, loss: DiffusionRowLoss, optimizer: torch.optim.Optimizer, rows: Rows) -> None:
    """One step without privacy."""
    optimizer.zero_grad(set_to_none=True)
    loss(network, rows).backward()
    optimizer.step()


def make_side(
    name: str, network: MedSegDiff, patients: Sequence[Rows], precision: Precision
) -> tuple[Callable[[], None], int]:
    """A step of the side, and the bytes that it holds before."""
    network = channels_last(copy.deepcopy(network)).train()
    trained = trained_parameters(network)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, fused=True)
    loss = DiffusionRowLoss(Diffusion(DiffusionConfig()), precision=precision)
    held = 4 * sum(p.numel() for p in network.parameters()) + 8 * sum(p.numel() for p in trained.values())
    if name == PLAIN:
        rows = {key: torch.cat([patient[key] for patient in patients]) for key in patients[0]}
        return lambda: plain_step(network, loss, optimizer, rows), held
    policy = PrivacyPolicy(epsilon=8, delta=1e-5, sigma=2.0, q=0.1, clip=1.0, batch=len(patients), steps=1, rounds=1)
    step = PrivateStep(network, loss, policy, optimizer, ENGINES[name]())
    return lambda: step.take(patients), held


def measure(
    model: str, slices: int, draws: int, rounds: int, device: torch.device, precision: Precision, patients: int
) -> Answer:
    """Times and peaks of all sides on one network, with m slices and K draws a patient."""
    config, fine_tuned = MODELS[model]
    torch.manual_seed(0)
    network = MedSegDiff(config).to(device)
    if fine_tuned:
        attach(network, 0)
    people = [
        {name: value.to(device) for name, value in rows.items()}
        for rows in random_patients(config, 1000, [slices * draws] * patients)
    ]
    sides, peaks, failed = {}, {}, {}
    for name in (PLAIN, *ENGINES):
        try:
            work, held = make_side(name, network, people, precision)
            work()  # makes the optimizer's moments and warms up
            gc.collect()
            peaks[name] = round(peak_bytes(work, device, held) / MIB)
            sides[name] = work
        except Exception as error:  # an engine that cannot take this network or device is a row of the table
            failed[name] = f"{type(error).__name__}: {error}"[:200]
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 else list(reversed(sides)):
            times[name].append(_timed(sides[name], device))
    plain = spread(times[PLAIN], 4)["median"]
    return {
        "model": model,
        "parameters": sum(p.numel() for p in network.parameters()),
        "trained": trained_count(network),
        "patients": patients, "slices": slices, "draws": draws,
        "noise_seconds": round(_timed(lambda: _draw_noise(network, device), device), 4),
        "sides": {
            name: {
                "seconds": spread(values, 4),
                "over_plain": round(spread(values, 4)["median"] / plain, 3),
                "peak_mib": peaks[name],
            }
            for name, values in times.items()
        },
        "failed": failed,
    }  # fmt: skip


def _draw_noise(network: MedSegDiff, device: torch.device) -> None:
    for parameter in trained_parameters(network).values():
        standard_normal(parameter.numel(), SystemEntropy(), device)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds: the clock's on a GPU; of processor time on a CPU, where others may be at work beside us."""
    if device.type != "cuda":
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


def rows_of(result: Answer) -> list[list[Any]]:
    """A line of the table for each side."""
    lines = []
    for case in result["cases"]:
        for name, side in case["sides"].items():
            lines.append([
                case["model"], f"{case['trained'] / 1e6:.3f} M", case["slices"], case["draws"], name,
                f"{1000 * side['seconds']['median']:.0f}", f"{side['over_plain']:.2f}", side["peak_mib"],
            ])  # fmt: skip
        lines += [[case["model"], "", case["slices"], case["draws"], name, "failed", "", ""] for name in case["failed"]]
    return lines


def _with_earlier(result: Answer, name: str) -> Answer:
    """The result with the cases of an earlier call on the same machine that this one has not measured (again)."""
    path = RESULTS / f"{name}.json"
    earlier: Answer = json.loads(path.read_text()) if path.is_file() else {}
    if any(earlier.get(key) != result[key] for key in ("what", "hardware", "precision", "clock")):
        return result
    measured = {_key(case) for case in result["cases"]}
    return result | {"cases": [c for c in earlier["cases"] if _key(c) not in measured] + result["cases"]}


def _key(case: Answer) -> tuple[object, ...]:
    return tuple(case[name] for name in ("model", "slices", "draws", "patients"))


def main() -> None:
    """Measure, write benchmarks/results/private_step.json (or _gpu, _quick), print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--slices", type=int, default=1, help="m; K is 1 and 4")
    parser.add_argument("--network", choices=list(MODELS), action="append", help="this one alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a smoke test; its figures mean nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="There is a performance drop|Full backward hook is firing")
    device = choose_device(arguments.device)
    suffix = "_quick" if arguments.quick else "_gpu" if device.type == "cuda" else ""
    machine = hardware(arguments.threads)
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    result: Answer = {
        "what": "a private step over a plain one, by gradient engine; 64 px; sides in turns",
        "hardware": machine,
        "precision": arguments.precision,
        "clock": "wall" if device.type == "cuda" else "processor time of the process",
        "cases": [],
    }
    rounds, patients = (1, 2) if arguments.quick else (arguments.rounds, PATIENTS)
    for name in ["tiny, fine-tuned"] if arguments.quick else arguments.network or list(MODELS):
        for draws in (1,) if arguments.quick else (1, 4):
            case = measure(name, arguments.slices, draws, rounds, device, arguments.precision, patients)
            result["cases"].append(case)
            print(f"{name}, m {arguments.slices}, K {draws}: done", file=sys.stderr)
            publish(f"private_step{suffix}", _with_earlier(result, f"private_step{suffix}"))
    header = ["network", "trained", "m", "K", "engine", "ms", "over plain", "peak MiB"]
    print(table(header, rows_of(result)))


if __name__ == "__main__":
    main()
