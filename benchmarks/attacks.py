"""One malicious site of five against every rule: python -m benchmarks.attacks

Real federations on the in-process engine, on phantoms: `alike` deals the patients of one scanner out at random,
`skewed` by the size of their lesions, `scanners` gives each site a scanner of its own. The figure is the mean Dice over
the honest sites' held-out patients at the end. Finished runs are kept in the folder and not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.turns import Answer, hardware, publish, table
from client.app import app as client_app
from client.site import open_site
from medsegdiff.config import SamplingConfig, TrainingConfig
from medsegdiff.data.dataset import open_dataset
from medsegdiff.devices import choose_device
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from medsegdiff.strict import dump_yaml
from server.app import app as server_app
from server.config import ModelChoice, RunPlan, RunRequest, ScreeningConfig, StrategyConfig, make_plan
from server.journal import Journal
from simulations.attacks import ATTACKS, Attack, Malicious, flip_masks
from simulations.display import make_console
from simulations.inline import run_inline
from simulations.partition import PartitionConfig
from simulations.phantoms import PhantomConfig
from simulations.recipe import Recipe, WorldConfig
from simulations.simulate import build_world

SITES = 5
OPEN, LOOSE, TIGHT = ScreeningConfig(norm_factor=None), ScreeningConfig(), ScreeningConfig(norm_factor=2.0)
RULES: dict[str, tuple[StrategyConfig, ScreeningConfig]] = {
    "mean": (StrategyConfig(), LOOSE),
    "mean, factor 2": (StrategyConfig(), TIGHT),
    "norm clip": (StrategyConfig(rule="norm_clip"), OPEN),
    "median": (StrategyConfig(rule="median"), OPEN),
    "trimmed mean": (StrategyConfig(rule="trimmed_mean"), OPEN),
    "multi-Krum": (StrategyConfig(rule="multi_krum"), OPEN),
    "centred clip": (StrategyConfig(rule="centred_clip"), OPEN),
}
PER_SITE = 8  # patients
ALIKE = PhantomConfig(sites=("alder",), patients=PER_SITE * SITES, slices=6)
WORLDS = {  # patients, and how they are dealt out
    "alike": (ALIKE, PartitionConfig("iid", SITES)),
    "skewed": (ALIKE, PartitionConfig("dirichlet", SITES, alpha=0.5)),  # in the size of lesions, and so in number
    "scanners": (PhantomConfig(sites=SITES, patients=PER_SITE, slices=6), PartitionConfig("site")),
}


def request(rounds: int, steps: int) -> RunRequest:
    """The run that every cell carries out, but for its strategy and screening."""
    return RunRequest(
        rounds=rounds,
        local_steps=steps,
        model=ModelChoice("tiny", image_size=24, base_channels=8, channel_multipliers=(1, 2), attention_levels=(1,)),
        training=TrainingConfig(batch_size=8, learning_rate=4e-3, foreground_fraction=0.5),
        sampling=SamplingConfig(steps=2, members=2),
        threads=1,
        evaluate_every=rounds,
        quorum=SITES - 1,
    )


def prepare_world(kind: str, folder: Path, run: RunRequest, seed: int = 0) -> tuple[RunPlan, str]:
    """Two copies of a world, one with the malicious site's masks turned inside out; the plan, and who is malicious."""
    phantoms, partition = WORLDS[kind]
    world = WorldConfig(phantoms=replace(phantoms, seed=seed), partition=partition, test_fraction=0.25)
    recipe = Recipe("attacks", world, run, (), seed)
    worlds = [folder / kind / name for name in ("honest", "flipped")]
    for world in worlds:
        if not world.exists():
            with TemporaryDirectory() as scratch:
                build_world(recipe, None, Path(scratch), world, copy=True, console=make_console())
    sites = {path.parent.name: open_site(path.resolve()) for path in sorted(worlds[0].glob("*/site.yaml"))}
    dataset = open_dataset(next(iter(sites.values())).path.parent / "data").config
    task = run.task(dataset, seed)
    roster = {name: site.data(task).train_patients for name, site in sites.items()}
    malicious = max(roster, key=lambda site: (roster[site], site))
    if not (folder / kind / "flipped.done").exists():
        flip_masks(worlds[1] / malicious)
        (folder / kind / "flipped.done").touch()
    return make_plan(run, "attacks", seed, dataset, roster, "inline", "benchmarks.attacks"), malicious


def carry_out(plan: RunPlan, malicious: str, attack: Attack, rule: str, folder: Path, world: Path) -> dict[str, Any]:
    """One run; its Dice over the honest sites, in how many rounds the malicious one counted, and seconds."""
    strategy, screening = RULES[rule]
    plan = replace(plan, strategy=strategy, screening=screening)
    done, text = folder / "cell.json", dump_yaml(plan)
    if done.exists() and (folder / "run.yaml").read_text() == text:
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    if done.exists():  # of other rounds or steps, carried out into the same folder
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "run.yaml", text.encode())
    os.environ["MEDSEGFED_WORLD"] = str(world.resolve())
    app = Malicious(client_app, attack, list(plan.roster).index(malicious))
    began, failed = time.perf_counter(), None
    try:
        run_inline(server_app, app, SITES, folder)
    except UserError as error:
        failed = str(error)
    journal = Journal(folder / "journal.jsonl")
    scores = (journal.last("scores") or {"sites": {}})["sites"]
    dice = [row["dice"] for site, row in scores.items() if site != malicious and row["dice"] is not None]
    rounds = [event for event in journal.events if event["event"] == "round" and event["round"] > 0]
    cell = {
        "dice": sum(dice) / len(dice) if dice else None,
        "counted": sum(malicious in event["accepted"] for event in rounds),
        "rounds": len(rounds),
        "failed": failed,
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_atomic(done, json.dumps(cell).encode())
    return cell


def carry_out_cell(kind: str, seed: int, attack: Attack, rule: str, options: argparse.Namespace) -> dict[str, Any]:
    """A cell of the table, in a process that does nothing else; its world is there."""
    torch.set_num_threads(1)
    folder = options.out / f"seed-{seed}"
    plan, malicious = prepare_world(kind, folder, request(options.rounds, options.steps), seed)
    world = folder / kind / ("flipped" if attack == "label_flip" else "honest")
    runs = folder / kind / "runs" / f"{attack}-{rule.replace(' ', '_').replace(',', '')}"
    return carry_out(plan, malicious, attack, rule, runs, world)


def summed_up(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One figure of the seeds: the mean of their Dice, and by how much they differ."""
    dice = [cell["dice"] for cell in cells if cell["dice"] is not None]
    return {
        "dice": sum(dice) / len(dice) if dice else None,
        "spread": max(dice) - min(dice) if dice else None,
        "counted": sum(cell["counted"] for cell in cells),
        "rounds": sum(cell["rounds"] for cell in cells),
        "failed": next((cell["failed"] for cell in cells if cell["failed"]), None),
        "seconds": round(sum(cell["seconds"] for cell in cells), 1),
    }


def markdown(result: Answer) -> str:
    """The tables of docs/aggregation.md."""
    lines = []
    for world, rows in result["worlds"].items():
        rules = list(next(iter(rows["dice"].values())))
        lines += [f"| {world} | " + " | ".join(rules) + " |", "|---" * (len(rules) + 1) + "|"]
        for attack, cells in rows["dice"].items():
            lines.append(f"| {attack.replace('_', ' ')} | " + " | ".join(_cell(cells[rule]) for rule in rules) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(cell: dict[str, Any]) -> str:
    if cell["dice"] is None:
        return "-"
    return f"{cell['dice']:.2f}".removeprefix("0") if cell["dice"] < 1 else "1.00"


def main(arguments: Sequence[str] | None = None) -> None:
    """Carry out what is missing, write benchmarks/results/attacks.json, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/attacks"), help="folder of the runs")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10, help="local steps a round")
    parser.add_argument("--seeds", type=int, default=2, help="how many: of phantoms, their dealing out, the training")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--worlds", nargs="*", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=list(RULES))
    parser.add_argument("--no-results", action="store_true", help="do not write benchmarks/results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ.setdefault("MEDSEGFED_CACHE", str((options.out / "cache").resolve()))
    run = request(options.rounds, options.steps)
    device = choose_device("auto")
    result: Answer = {
        "what": "mean Dice over the four honest sites' held-out patients; one malicious site of five, the largest",
        "rounds": options.rounds,
        "local_steps": options.steps,
        "seeds": options.seeds,
        "hardware": hardware(1) | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "worlds": {},
    }
    asked = list(itertools.product(options.worlds, range(options.seeds), options.attacks, options.rules))
    plans = {(kind, seed): prepare_world(kind, options.out / f"seed-{seed}", run, seed) for kind, seed, _, _ in asked}
    cells: dict[tuple[str, int, Attack, str], dict[str, Any]] = {}
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        begun = {pool.submit(carry_out_cell, *cell, options): cell for cell in asked}
        for future in as_completed(begun):
            cells[begun[future]] = future.result()
            print(*begun[future], future.result(), flush=True)
    for kind in options.worlds:
        dice = {
            attack: {
                rule: summed_up([cells[kind, seed, attack, rule] for seed in range(options.seeds)])
                for rule in options.rules
            }
            for attack in options.attacks
        }
        told = [plans[kind, seed] for seed in range(options.seeds)]
        patients, malicious = [plan.roster for plan, _ in told], [site for _, site in told]
        result["worlds"][kind] = {"patients": patients, "malicious": malicious, "dice": dice}
    result["seconds"] = round(sum(cell["seconds"] for cell in cells.values()), 1)
    if not options.no_results:
        publish("attacks", result)
    for kind, found in result["worlds"].items():
        body = [[attack, *(_cell(cells[rule]) for rule in options.rules)] for attack, cells in found["dice"].items()]
        print(f"\n{kind}: patients {found['patients']}, malicious {found['malicious']}")
        print(table(["Dice", *options.rules], body))


if __name__ == "__main__":
    main()
