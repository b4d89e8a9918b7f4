"""A private step over a plain one, for each gradient engine: python -m benchmarks.private_step

The plain step takes all rows at once and steps AdamW; a private one makes a gradient a patient, clips, sums, adds the
system's noise and steps the same optimizer. Patients x m x K rows on both sides. Sides take turns, step by step. Peak
memory is the allocator's, from one step (benchmarks/memory.py).

On a GPU one command measures all networks, in bf16 and then in float32, most wanted cases first, until the budget is
spent; `client.privacy.engines.choose_engine` takes its choice from there:

    python -m benchmarks.private_step --device cuda --out private_step_gpu.json
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import MIB, peak_bytes
from benchmarks.models import OURS
from benchmarks.turns import RESULTS, Answer, hardware, spread, table
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
from medsegdiff.files import write_atomic
from medsegdiff.network import MedSegDiff, channels_last

PATIENTS = 8
_OURS: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in OURS.items()}
OURS_CONFIG = ModelConfig(**_OURS)
MODELS: dict[str, tuple[ModelConfig, bool]] = {  # name -> network, whether the fine-tuning set alone is trained
    "tiny": (preset("tiny"), False),
    "tiny, fine-tuned": (preset("tiny"), True),
    "three levels": (preset("tiny", base_channels=32), False),  # 2.35 M parameters
    "four levels": (OURS_CONFIG, False),  # the network of benchmarks/models.py, 7.84 M parameters
    "four levels, fine-tuned": (OURS_CONFIG, True),
}
Engines = Mapping[str, Callable[[], Engine]]
ENGINES: Engines = {
    "patient loop": PatientLoop,
    "vmap": lambda: VmapEngine(PATIENTS),
    "Opacus hooks": lambda: HooksEngine(PATIENTS),
}
GPU_PATIENTS = 32
GPU_ENGINES: Engines = {
    "patient loop": PatientLoop,
    "vmap 8": lambda: VmapEngine(8),
    "vmap 32": lambda: VmapEngine(GPU_PATIENTS),
    "Opacus hooks 32": lambda: HooksEngine(GPU_PATIENTS),
}
GPU_ORDER = ("tiny, fine-tuned", "four levels, fine-tuned", "three levels", "four levels", "tiny")
GPU_ROWS = ((2, 4), (1, 1))  # (m, K): 8 rows a patient, as a private site takes them, and a single one
PLAIN = "plain"


def plain_step(network: MedSegDiff, loss: DiffusionRowLoss, optimizer: torch.optim.Optimizer, rows: Rows) -> None:
    """One step without privacy."""
    optimizer.zero_grad(set_to_none=True)
    loss(network, rows).backward()
    optimizer.step()


def make_side(
    network: MedSegDiff, patients: Sequence[Rows], precision: Precision, engine: Engine | None
) -> tuple[Callable[[], None], int]:
    """A step of a side, and the bytes that it holds before; without an engine, the plain step."""
    network = channels_last(copy.deepcopy(network)).train()
    trained = trained_parameters(network)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, fused=True)
    loss = DiffusionRowLoss(Diffusion(DiffusionConfig()), precision=precision)
    held = 4 * sum(p.numel() for p in network.parameters()) + 8 * sum(p.numel() for p in trained.values())
    if engine is None:
        rows = {key: torch.cat([patient[key] for patient in patients]) for key in patients[0]}
        return lambda: plain_step(network, loss, optimizer, rows), held
    policy = PrivacyPolicy(epsilon=8, delta=1e-5, sigma=2.0, q=0.1, clip=1.0, batch=len(patients), steps=1, rounds=1)
    step = PrivateStep(network, loss, policy, optimizer, engine)
    return lambda: step.take(patients), held


def measure(
    model: str,
    slices: int,
    draws: int,
    rounds: int,
    device: torch.device,
    precision: Precision,
    patients: int,
    engines: Engines = ENGINES,
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
    for name in (PLAIN, *engines):
        try:
            work, held = make_side(network, people, precision, None if name == PLAIN else engines[name]())
            work()  # makes the optimizer's moments and warms up
            gc.collect()
            others = torch.cuda.memory_allocated(device) - held if device.type == "cuda" else 0
            peaks[name] = round((peak_bytes(work, device, held) - others) / MIB)
            sides[name] = work
        except Exception as error:  # an engine that cannot take this network or device is a row of the table
            failed[name] = f"{type(error).__name__}: {error}"[:200]
            if device.type == "cuda":
                torch.cuda.empty_cache()
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
                case["model"], f"{case['trained'] / 1e6:.3f} M", case["slices"], case["draws"],
                case.get("precision", ""), name,
                f"{1000 * side['seconds']['median']:.0f}", f"{side['over_plain']:.2f}", side["peak_mib"],
            ])  # fmt: skip
        about = [case["model"], "", case["slices"], case["draws"], case.get("precision", "")]
        lines += [[*about, name, "failed", "", ""] for name in case["failed"]]
    return lines


def _with_earlier(result: Answer, path: Path) -> Answer:
    """The result with the cases of an earlier call on the same machine that this one has not measured (again)."""
    earlier: Answer = json.loads(path.read_text()) if path.is_file() else {}
    if any(earlier.get(key) != result[key] for key in ("what", "hardware", "clock")):
        return result
    measured = {_key(case) for case in result["cases"]}
    return result | {"cases": [c for c in earlier["cases"] if _key(c) not in measured] + result["cases"]}


def _key(case: Answer) -> tuple[object, ...]:
    return tuple(case.get(name) for name in ("model", "slices", "draws", "patients", "precision"))


def main() -> None:
    """Measure, write benchmarks/results/private_step.json (or _gpu, _quick), print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32 on a CPU, both on a GPU")
    parser.add_argument("--slices", type=int, default=1, help="m on a CPU; K is 1 and 4")
    parser.add_argument("--network", choices=list(MODELS), action="append", help="this one alone; may be repeated")
    parser.add_argument("--budget-seconds", type=float, default=140, help="on a GPU: no case is begun after")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/private_step.json (or _gpu, _quick)")
    parser.add_argument("--quick", action="store_true", help="a smoke test; its figures mean nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="There is a performance drop|Full backward hook is firing")
    device = choose_device(arguments.device)
    gpu = device.type == "cuda"
    path = arguments.out or RESULTS / f"private_step{'_quick' if arguments.quick else '_gpu' if gpu else ''}.json"
    result: Answer = {
        "what": "a private step over a plain one, by gradient engine; 64 px; sides in turns",
        "hardware": hardware(arguments.threads) | ({"gpu": torch.cuda.get_device_name(device)} if gpu else {}),
        "clock": "wall" if gpu else "processor time of the process",
        "cases": [],
    }
    rounds, patients, engines = arguments.rounds, GPU_PATIENTS if gpu else PATIENTS, GPU_ENGINES if gpu else ENGINES
    if arguments.quick:
        rounds, patients = 1, 2
    begun = time.monotonic()
    for name, slices, draws, precision in _cases(arguments, gpu):
        if gpu and time.monotonic() - begun > arguments.budget_seconds:
            print(f"{name}, m {slices}, K {draws}, {precision}: not measured, the time is up", file=sys.stderr)
            continue
        case = measure(name, slices, draws, rounds, device, precision, patients, engines)
        result["cases"].append({**case, "precision": precision})
        print(f"{name}, m {slices}, K {draws}, {precision}: done, {time.monotonic() - begun:.0f} s", file=sys.stderr)
        write_atomic(path, (json.dumps(_with_earlier(result, path), indent=2) + "\n").encode())
    header = ["network", "trained", "m", "K", "", "engine", "ms", "over plain", "peak MiB"]
    print(table(header, rows_of(result)))


def _cases(arguments: argparse.Namespace, gpu: bool) -> Iterator[tuple[str, int, int, Precision]]:
    """Network, m, K and precision of each case, most wanted first."""
    if arguments.quick:
        yield "tiny, fine-tuned", arguments.slices, 1, arguments.precision or "fp32"
        return
    default: tuple[Precision, ...] = ("bf16", "fp32") if gpu else ("fp32",)
    names = arguments.network or (GPU_ORDER if gpu else MODELS)
    shapes = GPU_ROWS if gpu else ((arguments.slices, 1), (arguments.slices, 4))
    for precision in (arguments.precision,) if arguments.precision else default:
        for slices, draws in shapes:
            for name in names:
                yield name, slices, draws, precision


if __name__ == "__main__":
    main()
