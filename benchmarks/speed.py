"""Milliseconds of a training step and of a sampling step, beside two other networks: python -m benchmarks.speed"""

from __future__ import annotations

import argparse
import statistics
import sys

from benchmarks.models import MONAI, OURS, PEER
from benchmarks.turns import PEER_PYTHON, Answer, Worker, hardware, publish, spread, table

STEPS = ("train", "sample", "forward")
MODELS = {"ours": OURS, "peer": PEER, "monai": MONAI}
SIDES: dict[str, tuple[str, dict[str, object]]] = {  # name -> whose network, and how it runs
    "ours": ("ours", {"precision": "fp32"}),
    "ours_bf16": ("ours", {"precision": "bf16"}),
    "ours_bf16_compiled": ("ours", {"precision": "bf16", "compile": True}),
    "peer": ("peer", {"precision": "fp32"}),
    "peer_bf16": ("peer", {"precision": "bf16"}),
    "monai": ("monai", {"precision": "fp32"}),
    "monai_bf16": ("monai", {"precision": "bf16"}),
}


def measure(rounds: int, block: int, batch: int, threads: int, compiled: bool) -> Answer:
    """Blocks of steps in turn; who begins changes from round to round."""
    workers = {
        "ours": Worker("benchmarks.ours", sys.executable, threads),
        "peer": Worker("benchmarks.peer", PEER_PYTHON, threads),
        "monai": Worker("benchmarks.monai_peer", PEER_PYTHON, threads),
    }
    facts, sides = {}, {}
    for name, (who, settings) in SIDES.items():
        if not compiled and settings.get("compile"):
            continue
        facts[name] = workers[who].ask("prepare_speed", name=name, model=MODELS[who], batch=batch, **settings)
        sides[name] = workers[who]
    times: dict[str, dict[str, list[list[float]]]] = {side: {step: [] for step in STEPS} for side in sides}
    products = []
    for number in range(rounds):
        products.append(workers["ours"].ask("matrix_product")["gflops"])
        for step in STEPS:
            for side in sides if number % 2 else reversed(sides):
                times[side][step].append(sides[side].ask("time_steps", name=side, step=step, count=block)["ms"])
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    for worker in workers.values():
        worker.close()
    return {
        "what": "ms per step, fp32 or bfloat16 autocast; 'sample' of ours: image features are cached, as they are in "
        "sampling; 'forward': the whole network; 'share': GFLOP/s over those of the plain fp32 matrix product",
        "hardware": hardware(threads),
        "batch": batch,
        "image_size": 64,
        "rounds": rounds,
        "steps_a_block": block,
        "matrix_product_gflops": spread(products, 1),
        "sides": {side: _side(facts[side], times[side], statistics.median(products)) for side in sides},
        "models": {"ours": OURS, "peer": {"package": "med-seg-diff-pytorch", **PEER}, "monai": MONAI},
        "slower_than_ours": {
            f"{other} / {side}": {step: _ratio(times[other][step], times[side][step]) for step in STEPS}
            for side in sides if side.startswith("ours") for other in sides if not other.startswith("ours")
        },
    }  # fmt: skip


def _side(facts: Answer, times: dict[str, list[list[float]]], product: float) -> Answer:
    steps = {}
    for step in STEPS:
        found = spread([ms for block in times[step] for ms in block])
        work = facts["gflop"][step]
        rate = work / found["median"] * 1e3
        steps[step] = {"ms": found, "gflop": work, "gflops": round(rate, 1), "share": round(rate / product, 3)}
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
            rows.append(
                [f"{side} {step}", million, ms["median"], f"{low}-{high}", work["gflop"], work["gflops"], work["share"]]
            )
    ratios = [
        f"{pair}: " + ", ".join(f"{step} {found[step]['of_medians']}" for step in STEPS)
        for pair, found in result["slower_than_ours"].items()
    ]
    product = f"matrix product: {result['matrix_product_gflops']['median']} GFLOP/s"
    header = ["side and step", "M params", "ms", "quartiles", "GFLOP", "GFLOP/s", "of product"]
    return "\n".join([table(header, rows), *ratios, product])


def main() -> None:
    """Measure, write benchmarks/results/speed.json, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--block", type=int, default=5, help="steps a turn")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="leave the compiled side out")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: 2 rounds of 2 steps, written to speed_quick"
    )
    given = parser.parse_args()
    rounds, block = (2, 2) if given.quick else (given.rounds, given.block)
    result = measure(rounds, block, given.batch, given.threads, given.compiled)
    publish("speed_quick" if given.quick else "speed", result)
    print(describe(result))


if __name__ == "__main__":
    main()
