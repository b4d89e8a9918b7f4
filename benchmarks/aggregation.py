"""How fast updates are folded, and in how much memory: python -m benchmarks.aggregation

Folding is held against a plain copy of the same update in the same run, turn by turn; checking (sizes, finite values,
norm) and hashing stand beside it. Memory is the growth of a process of its own while it aggregates 2, 20 and 200
replies, ours as they come, Flower's FedAvg as its loop hands them over: all at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from benchmarks.turns import ROOT, Answer, hardware, publish, table
from client.contract import arrays_from_wire, arrays_to_wire
from medsegdiff.weights import hash_weights
from server.aggregation import FixedPointSum
from server.config import StrategyConfig
from server.robust import SpilledRule
from server.screening import update_norm

REPLIES = (2, 20, 200)
MIB = 2**20


def layers(weights: int) -> dict[str, tuple[int, ...]]:
    """Shapes of ten layers that hold so many weights."""
    return {f"layer-{i}": (weights // 10,) for i in range(10)}


def update(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """A change of the size that a round brings."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) * np.float32(1e-3))
        for name, shape in shapes.items()
    }


def flower_reply(delta: dict[str, Tensor]) -> Message:
    """The same update as a reply that Flower's FedAvg aggregates."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    question = Message(RecordDict(), 1, "train")
    question.metadata.__dict__["_message_id"] = "m"
    arrays = ArrayRecord({name: Array(value.numpy()) for name, value in delta.items()})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 3})})
    return Message(content, reply_to=question)


def speed(weights: int, turns: int) -> Answer:
    """GB of float32 updates a second, medians over turns in which everything has its go."""
    shapes = layers(weights)
    delta = update(shapes, 0)
    record, target = arrays_to_wire(delta), {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    total = FixedPointSum(shapes)
    replies = [flower_reply(delta), flower_reply(delta)]
    work: dict[str, Callable[[], object]] = {
        "copy": lambda: [np.copyto(target[name], value.numpy()) for name, value in delta.items()],
        "fold": lambda: total.add(delta, 37),
        "check": lambda: arrays_from_wire(record, shapes),
        "norm": lambda: update_norm(delta),
        "hash": lambda: hash_weights(delta),
        "Flower's FedAvg": lambda: FedAvg().aggregate_train(1, replies),
    }
    updates = {name: 2 if name.startswith("Flower") else 1 for name in work}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(turns + 1):  # the first turn touches the memory and does not count
        for name, call in work.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    size = 4 * weights / 1e9
    medians = {name: round(updates[name] * size / statistics.median(spent[1:]), 2) for name, spent in seconds.items()}
    return {"weights": weights, "turns": turns, "gb_per_second": medians}


def grown(kind: str, weights: int, replies: int) -> int:
    """Bytes that a process grows by at most while it aggregates so many replies."""
    call = [sys.executable, "-m", "benchmarks.aggregation", "--grow", kind, str(weights), str(replies)]
    done = subprocess.run(call, cwd=ROOT, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def grow(kind: str, weights: int, replies: int) -> int:
    """`grown`, in this process."""
    shapes = layers(weights)
    with TemporaryDirectory() as scratch:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of importing, is forgotten
        before = _resident("VmRSS")
        if kind == "mean":
            total = FixedPointSum(shapes)
            for seed in range(replies):
                total.add(update(shapes, seed), 3)
            total.mean()
        elif kind == "flower":
            FedAvg().aggregate_train(1, [flower_reply(update(shapes, seed)) for seed in range(replies)])
        else:
            rule = SpilledRule(StrategyConfig(rule="median", byzantine=0), shapes, Path(scratch) / "spilled")
            for seed in range(replies):
                rule.add(f"site-{seed}", update(shapes, seed), 1)
            rule.result({})
        return max(0, _resident("VmHWM") - before)


def _resident(what: str) -> int:
    """Resident bytes of this process: now (VmRSS) or at most (VmHWM). getrusage's peak is the parent's, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write benchmarks/results/aggregation.json, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=20_000_000, help="of the update that is folded")
    parser.add_argument("--memory-weights", type=int, default=1_000_000, help="of those that memory is measured with")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--grow", nargs=3, metavar=("KIND", "WEIGHTS", "REPLIES"), help=argparse.SUPPRESS)
    parser.add_argument("--no-results", action="store_true", help="do not write benchmarks/results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    if options.grow:
        kind, weights, replies = options.grow
        print(json.dumps(grow(kind, int(weights), int(replies))))
        return
    result = {"hardware": hardware(1), "speed": speed(options.weights, options.turns)}
    rates = result["speed"]["gb_per_second"]
    result["fold_to_copy"] = round(rates["fold"] / rates["copy"], 3)
    size = 4 * options.memory_weights
    memory = {
        str(count): {kind: grown(kind, options.memory_weights, count) for kind in ("mean", "median", "flower")}
        for count in REPLIES
    }
    result["memory"] = {"update_bytes": size, "replies": memory}
    if not options.no_results:
        publish("aggregation", result)
    rows = [[name, rate, f"{rate / rates['copy']:.2f}"] for name, rate in rates.items()]
    print(table([f"{options.weights / 1e6:g} M weights", "GB/s", "of a copy"], rows), "\n")
    rows = [
        [count, *(round(found[k] / MIB, 1) for k in ("mean", "median", "flower"))] for count, found in memory.items()
    ]
    print(table([f"peak MiB; replies of {size / MIB:.1f} MiB", "mean", "median (on disk)", "Flower's FedAvg"], rows))


if __name__ == "__main__":
    main()
