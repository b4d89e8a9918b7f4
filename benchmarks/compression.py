"""What compressed updates cost in Dice and save in bytes: python -m benchmarks.compression --data DIR

Federations on the in-process engine, by the recipes `hippocampus` and `lgg-sites`, with every codec and seed. Equal
seeds have equal sites, first weights and batches, so a codec is compared with `none` seed by seed. Each (dataset,
codec, seed) is a process of its own, `--jobs` of them at a time; finished ones stay in the work folder and are not
repeated.
The codecs are timed on updates that a site of `hippocampus` trained.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch

from benchmarks.turns import ROOT, Answer, hardware
from client.contract import Assignment
from client.encoding import Compression, Kind, decode, encode
from client.training import train_round
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from medsegdiff.weights import hash_weights, initial_weights
from server.config import ModelChoice
from server.journal import Journal
from server.rounds import traffic
from simulations.display import make_console
from simulations.recipe import Recipe, read_recipe
from simulations.simulate import Simulation, build_world, prepare_simulation

RECIPES = {"msd_hippocampus": "hippocampus", "lgg_tcga": "lgg-sites"}
CODECS = ("none", "bf16", "int8", "top_k:0.1", "top_k:0.05", "top_k:0.01")
PAGE = ROOT / "docs" / "aggregation.md"
BEGIN, END = "<!-- compression: begin -->", "<!-- compression: end -->"
REPEATS = 5  # of each timing; the median counts
Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class Cell:
    """One run."""

    dataset: str
    codec: str
    seed: int
    rounds: int
    steps: int

    @property
    def folder(self) -> str:
        return f"{self.dataset}/{self.codec.replace(':', '-')}-seed{self.seed}-{self.rounds}x{self.steps}"


def compression_of(codec: str) -> Compression:
    """`none`, `bf16`, `int8` or `top_k:FRACTION`. Raises UserError for anything else."""
    kind, _, fraction = codec.partition(":")
    if kind not in get_args(Kind):
        raise UserError(f"--codecs {codec}: choose from {', '.join(get_args(Kind))}; top_k as top_k:0.1.")
    try:
        return Compression(kind, float(fraction) if fraction else None)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"--codecs {codec}: {error}.") from None


def recipe_of(cell: Cell) -> Recipe:
    """The shipped recipe with the cell's seed, length and codec, scored in its last rounds, without comparison arms."""
    recipe = read_recipe(Path(RECIPES[cell.dataset]))
    run = replace(
        recipe.run,
        rounds=cell.rounds,
        local_steps=cell.steps,
        compression=compression_of(cell.codec),
        threads=1,
        evaluate_every=max(1, cell.rounds // 3),
    )
    return replace(recipe, run=run, seed=cell.seed, arms=())


def carry_out(cell: Cell, data: Path, work: Path) -> Answer:
    """One run to its end (or what an earlier call found); its scores and bytes."""
    folder = work / cell.folder
    done = folder / "cell.json"
    if done.exists():
        found: Answer = json.loads(done.read_text())
        return found
    from client.app import app as client_app
    from server.app import app as server_app
    from simulations.inline import run_inline

    simulation = prepare_simulation(
        recipe_of(cell), data / cell.dataset, folder, "inline", "benchmarks.compression", make_console()
    )
    began = time.perf_counter()
    run_inline(server_app, client_app, len(simulation.sites), folder)
    events = Journal(folder / "journal.jsonl").events
    scores = next(event for event in reversed(events) if event["event"] == "scores")
    dice = {site: row["dice"] for site, row in scores["sites"].items() if row["dice"] is not None}
    moved = traffic(events)
    answer: Answer = {
        "dataset": cell.dataset,
        "codec": cell.codec,
        "seed": cell.seed,
        "rounds": cell.rounds,
        "steps": cell.steps,
        "sites": len(simulation.sites),
        "dice": dice,
        "mean": statistics.fmean(dice.values()),
        "worst": min(dice.values()),
        "up": moved["up"],
        "down": moved["down"],
        "seconds": round(time.perf_counter() - began, 1),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    write_atomic(done, json.dumps(answer).encode())
    return answer


# --- the codecs alone -------------------------------------------------------------------------------------------------


def time_codecs(codecs: Sequence[str], presets: Sequence[str], data: Path, work: Path, steps: int) -> list[Answer]:
    """Ratio, error and speed of every codec on the updates of rounds 1 and 3 of one site, for every preset."""
    rows = []
    for preset in presets:
        recipe = recipe_of(Cell("msd_hippocampus", "none", 0, 3, steps))
        size = recipe.run.model.image_size
        recipe = replace(recipe, run=replace(recipe.run, model=ModelChoice(preset, image_size=size)))
        folder = work / f"speed-{preset}-{steps}"
        simulation = prepare_simulation(
            recipe, data / "msd_hippocampus", folder, "inline", "benchmarks.compression", make_console()
        )
        for round_, delta in _updates(simulation):
            rows += [_timed(codec, delta) | {"preset": preset, "round": round_} for codec in codecs if codec != "none"]
    return rows


def _updates(simulation: Simulation) -> list[tuple[int, dict[str, torch.Tensor]]]:
    """Updates of the first site when it goes on alone."""
    task = simulation.plan.task
    site = next(iter(simulation.sites.values()))
    weights = initial_weights(task.model, task.seed)
    found = []
    for round_ in range(1, task.rounds + 1):
        _, delta = train_round(site, task, Assignment("speed", round_, hash_weights(weights)), weights)
        weights = {name: value + delta[name] for name, value in weights.items()}
        found.append((round_, delta))
    return [found[0], found[-1]]


def _timed(codec: str, delta: Mapping[str, torch.Tensor]) -> Answer:
    compression = compression_of(codec)
    shapes = {name: tuple(value.shape) for name, value in delta.items()}
    raw = 4 * sum(value.numel() for value in delta.values())
    encoding, decoding, data, found = [], [], b"", {}
    for _ in range(REPEATS):
        began = time.perf_counter()
        data = encode(delta, compression)
        encoded = time.perf_counter()
        found = decode(data, compression, shapes)
        encoding.append(encoded - began)
        decoding.append(time.perf_counter() - encoded)
    lost = math.fsum(float((delta[name] - found[name]).double().square().sum()) for name in delta)
    size = math.fsum(float(value.double().square().sum()) for value in delta.values())
    return {
        "codec": codec,
        "raw": raw,
        "bytes": len(data),
        "ratio": round(raw / len(data), 2),
        "lost": round(math.sqrt(lost / size), 4),
        "encode_mb_s": round(raw / 1e6 / statistics.median(encoding)),
        "decode_mb_s": round(raw / 1e6 / statistics.median(decoding)),
    }


# --- the tables -------------------------------------------------------------------------------------------------------


def summary(cells: Sequence[Answer]) -> list[Answer]:
    """A row for each dataset and codec: bytes, how many times fewer than `none`, Dice, and its difference by seed."""
    rows = []
    for dataset, codec in dict.fromkeys((cell["dataset"], cell["codec"]) for cell in cells):
        own = {cell["seed"]: cell for cell in cells if (cell["dataset"], cell["codec"]) == (dataset, codec)}
        plain = {cell["seed"]: cell for cell in cells if (cell["dataset"], cell["codec"]) == (dataset, "none")}
        pairs = [(own[seed], plain[seed]) for seed in own if seed in plain]
        differences = [one["mean"] - other["mean"] for one, other in pairs]
        first = next(iter(own.values()))
        rows.append(
            {
                "dataset": dataset,
                "codec": codec,
                "seeds": len(own),
                "up_per_answer": round(
                    statistics.fmean(cell["up"] / (cell["rounds"] * cell["sites"]) for cell in own.values())
                ),
                "down": round(statistics.fmean(cell["down"] for cell in own.values())),
                "times_fewer": round(
                    math.fsum(other["up"] for _, other in pairs) / math.fsum(one["up"] for one, _ in pairs), 2
                )
                if pairs
                else None,
                "mean": round(statistics.fmean(cell["mean"] for cell in own.values()), 4),
                "worst": round(statistics.fmean(cell["worst"] for cell in own.values()), 4),
                "difference": round(statistics.fmean(differences), 4) if differences else None,
                "error": round(statistics.stdev(differences) / math.sqrt(len(differences)), 4)
                if len(differences) > 1
                else None,
                "rounds": first["rounds"],
                "steps": first["steps"],
            }
        )
    return rows


def markdown(result: Answer) -> str:
    """The tables of docs/aggregation.md, from what `main` wrote."""
    parts = []
    if result["cells"]:
        parts.append(_lines(_dice_table(summary(result["cells"]))))
    if result["speed"]:
        parts.append(_lines(_speed_table(result["speed"])))
    return "\n".join(parts)


def render(found: Path, page: Path = PAGE) -> int:
    """Write the tables of a result into the page, between its two marks."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page}: lacks the marks '{BEGIN}' and '{END}'; nothing was written. Put them back.")
    tables = markdown(json.loads(found.read_text()))
    write_atomic(page, f"{before}{begin}\n{tables}{end}{after}".encode())
    return 0


def _dice_table(rows: Sequence[Answer]) -> Table:
    head = ["dataset", "codec", "kB an answer", "times fewer", "Dice, mean", "worst site", "against none", "seeds"]
    body = []
    for row in rows:
        error = "" if row["error"] is None else f" ± {row['error']:.4f}"
        body.append(
            [
                row["dataset"],
                row["codec"],
                f"{row['up_per_answer'] / 1000:,.1f}",
                "-" if row["times_fewer"] is None else f"{row['times_fewer']:.1f}",
                f"{row['mean']:.4f}",
                f"{row['worst']:.4f}",
                "-" if row["difference"] is None or row["codec"] == "none" else f"{row['difference']:+.4f}{error}",
                str(row["seeds"]),
            ]
        )
    return head, body


def _speed_table(rows: Sequence[Answer]) -> Table:
    head = ["preset", "round", "codec", "MB raw", "times fewer", "lost of the norm", "encode MB/s", "decode MB/s"]
    return head, [
        [
            row["preset"],
            str(row["round"]),
            row["codec"],
            f"{row['raw'] / 1e6:.1f}",
            f"{row['ratio']:.1f}",
            f"{row['lost']:.4f}",
            str(row["encode_mb_s"]),
            str(row["decode_mb_s"]),
        ]
        for row in rows
    ]


def _lines(content: Table) -> str:
    head, body = content
    rows = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


# --- many processes ---------------------------------------------------------------------------------------------------


def _spawn(cell: Cell, data: Path, work: Path) -> Answer | None:
    """The cell in a process of its own; None where it failed, which its log says."""
    done = work / cell.folder / "cell.json"
    if not done.exists():
        said = json.dumps(vars(cell))
        command = [
            sys.executable,
            "-m",
            "benchmarks.compression",
            "--cell",
            said,
            "--data",
            str(data),
            "--work",
            str(work),
        ]
        ran = subprocess.run(command, cwd=ROOT, env=os.environ | _ALONE, capture_output=True, text=True, check=False)
        if ran.returncode:
            print(f"{cell.folder}: failed\n{ran.stdout[-500:]}{ran.stderr[-2000:]}", file=sys.stderr, flush=True)
            return None
    answer: Answer = json.loads(done.read_text())
    told = {key: answer[key] for key in ("mean", "worst", "up", "down", "seconds")}
    print(cell.folder, json.dumps(told), flush=True)
    return answer


_ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _fill_cache(datasets: Sequence[str], data: Path) -> None:
    """Prepare every dataset's slices once, before many processes would."""
    for dataset in datasets:
        with TemporaryDirectory() as scratch:
            recipe = recipe_of(Cell(dataset, "none", 0, 1, 1))
            build_world(
                recipe, data / dataset, Path(scratch), Path(scratch) / "world", copy=False, console=make_console()
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out what is missing, write the JSON file, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(), help="folder with msd_hippocampus and lgg_tcga")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "compression.json")
    parser.add_argument("--work", type=Path, default=Path("runs/compression"), help="folder of the runs")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40, help="local steps a round")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--codecs", nargs="*", default=list(CODECS), help=", ".join(CODECS))
    parser.add_argument("--datasets", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--presets", nargs="*", default=["tiny"], help="models that the codecs are timed on")
    parser.add_argument("--render", action="store_true", help="only write the tables of --out into docs/aggregation.md")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    data, work = options.data.resolve(), options.work.resolve()
    os.environ.setdefault("MEDSEGFED_CACHE", str(work / "cache"))
    torch.set_num_threads(1)
    try:
        if options.render:
            return render(options.out)
        if options.cell:
            carry_out(Cell(**json.loads(options.cell)), data, work)
            return 0
        return _all(options, data, work)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _all(options: argparse.Namespace, data: Path, work: Path) -> int:
    for codec in options.codecs:
        compression_of(codec)
    _fill_cache(options.datasets, data)
    cells = [
        Cell(dataset, codec, seed, options.rounds, options.steps)
        for seed in range(options.seeds)  # the first seeds of all are there first
        for dataset in options.datasets
        for codec in options.codecs
    ]
    result: dict[str, Any] = {
        "what": "mean Dice over sites after the last round, and bytes of weights that sites sent and got in all",
        "rounds": options.rounds,
        "steps": options.steps,
        "hardware": hardware(1) | {"gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None},
        "cells": [],
        "speed": time_codecs(options.codecs, options.presets, data, work, options.steps) if options.presets else [],
    }
    order = {(cell.dataset, cell.codec): number for number, cell in enumerate(reversed(cells))}
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        for answer in pool.map(lambda cell: _spawn(cell, data, work), cells):
            if answer is None:
                continue
            result["cells"].append(answer)
            result["cells"].sort(key=lambda cell: (-order[cell["dataset"], cell["codec"]], cell["seed"]))
            write_atomic(options.out, (json.dumps(result, indent=2) + "\n").encode())  # what is there, if it ends early
    write_atomic(options.out, (json.dumps(result, indent=2) + "\n").encode())
    print()
    print(markdown(result))
    missing = len(cells) - len(result["cells"])
    if missing:
        print(f"{missing} of {len(cells)} runs failed; they are tried again by the same command", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
