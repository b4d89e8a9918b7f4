"""Milliseconds of a training step and of a sampling step, beside med-seg-diff-pytorch: python -m benchmarks.speed"""

from __future__ import annotations

import argparse
import statistics
import sys

from benchmarks.models import OURS, PEER
from benchmarks.turns import PEER_PYTHON, Answer, Worker, hardware, publish, spread, table

STEPS = ("train", "sample", "forward")


def measure(rounds: int, block: int, batch: int, threads: int) -> Answer:
    """Blocks of steps in turn; who begins changes from round to round."""
    ours = Worker("benchmarks.ours", sys.executable, threads)
    peer = Worker("benchmarks.peer", PEER_PYTHON, threads)
    sides = {"ours": ours, "ours_bf16": ours, "peer": peer}
    facts = {
        "ours": ours.ask("prepare_speed", name="ours", model=OURS, batch=batch, bf16=False),
        "ours_bf16": ours.ask("prepare_speed", name="ours_bf16", model=OURS, batch=batch, bf16=True),
        "peer": peer.ask("prepare_speed", name="peer", model=PEER, batch=batch),
    }
    times: dict[str, dict[str, list[list[float]]]] = {side: {step: [] for step in STEPS} for side in sides}
    products = []
    for number in range(rounds):
        products.append(ours.ask("matrix_product")["gflops"])
        for step in STEPS:
            for side in sides if number % 2 else reversed(sides):
                times[side][step].append(sides[side].ask("time_steps", name=side, step=step, count=block)["ms"])
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    for worker in (ours, peer):
        worker.close()
    return {
        "what": "ms per step, fp32 (ours_bf16: bfloat16 autocast); 'sample' of ours: image features are cached, as "
        "they are in sampling; 'forward': the whole network",
        "hardware": hardware(threads),
        "batch": batch,
        "image_size": 64,
        "rounds": rounds,
        "steps_a_block": block,
        "matrix_product_gflops": spread(products, 1),
        "sides": {side: _side(facts[side], times[side]) for side in sides},
        "models": {"ours": OURS, "peer": {"package": "med-seg-diff-pytorch", **PEER}},
        "peer_over_ours": {step: _ratio(times["peer"][step], times["ours"][step]) for step in STEPS},
    }


def _side(facts: Answer, times: dict[str, list[list[float]]]) -> Answer:
    steps = {}
    for step in STEPS:
        found = spread([ms for block in times[step] for ms in block])
        work = facts["gflop"][step]
        steps[step] = {"ms": found, "gflop": work, "gflops": round(work / found["median"] * 1e3, 1)}
    return {key: value for key, value in facts.items() if key != "gflop"} | steps


def _ratio(slow: list[list[float]], fast: list[list[float]]) -> Answer:
    """Ratio of the medians of all steps, and the spread of each round's own."""
    every = [statistics.median([ms for block in side for ms in block]) for side in (slow, fast)]
    rounds = [statistics.median(s) / statistics.median(f) for s, f in zip(slow, fast, strict=True)]
    return {"of_medians": round(every[0] / every[1], 2), "per_round": spread(rounds)}


def describe(result: Answer) -> str:
    """The table for the terminal."""
    rows = []
    for side, facts in result["sides"].items():
        for step in STEPS:
            ms, work = facts[step]["ms"], facts[step]
            low, high = ms["quartiles"]
            million = f"{facts['parameters'] / 1e6:.2f}"
            rows.append([f"{side} {step}", million, ms["median"], f"{low}-{high}", work["gflop"], work["gflops"]])
    ratios = [
        f"peer / ours, {step}: {found['of_medians']} (per round {found['per_round']['quartiles']})"
        for step, found in result["peer_over_ours"].items()
    ]
    product = f"matrix product: {result['matrix_product_gflops']['median']} GFLOP/s"
    header = ["side and step", "M params", "ms", "quartiles", "GFLOP", "GFLOP/s"]
    return "\n".join([table(header, rows), *ratios, product])


def main() -> None:
    """Measure, write benchmarks/results/speed.json, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--block", type=int, default=5, help="steps a turn")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: 2 rounds of 2 steps, written to speed_quick"
    )
    given = parser.parse_args()
    rounds, block = (2, 2) if given.quick else (given.rounds, given.block)
    result = measure(rounds, block, given.batch, given.threads)
    publish("speed_quick" if given.quick else "speed", result)
    print(describe(result))


if __name__ == "__main__":
    main()
