"""One malicious site of five against every rule: python -m benchmarks.attacks

Real federations on the in-process engine, on phantoms: `alike` deals the patients out at random, `skewed` unevenly (the
malicious site is the largest). The figure is the mean Dice over the honest sites' held-out patients after the last
round. Finished runs are kept in the folder and not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.turns import Answer, hardware, publish, table
from client.app import app as client_app
from client.site import open_site
from medsegdiff.config import SamplingConfig, TrainingConfig
from medsegdiff.data.dataset import open_dataset
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
WORLDS = {
    "alike": PartitionConfig("iid", SITES),
    "skewed": PartitionConfig("quantity", SITES, alpha=1.0),
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


def prepare_world(kind: str, folder: Path, run: RunRequest) -> tuple[RunPlan, str]:
    """Two copies of a world, one with the malicious site's masks turned inside out; the plan, and who is malicious."""
    phantoms = PhantomConfig(sites=("alder",), patients=8 * SITES, slices=6)
    recipe = Recipe("attacks", WorldConfig(phantoms=phantoms, partition=WORLDS[kind], test_fraction=0.25), run, ())
    worlds = [folder / kind / name for name in ("honest", "flipped")]
    for world in worlds:
        if not world.exists():
            with TemporaryDirectory() as scratch:
                build_world(recipe, None, Path(scratch), world, copy=True, console=make_console())
    sites = {path.parent.name: open_site(path.resolve()) for path in sorted(worlds[0].glob("*/site.yaml"))}
    dataset = open_dataset(next(iter(sites.values())).path.parent / "data").config
    task = run.task(dataset, 0)
    roster = {name: site.data(task).train_patients for name, site in sites.items()}
    malicious = max(roster, key=lambda site: (roster[site], site))
    if not (folder / kind / "flipped.done").exists():
        flip_masks(worlds[1] / malicious)
        (folder / kind / "flipped.done").touch()
    return make_plan(run, "attacks", 0, dataset, roster, "inline", "benchmarks.attacks"), malicious


def carry_out(plan: RunPlan, malicious: str, attack: Attack, rule: str, folder: Path, world: Path) -> dict[str, Any]:
    """One run; its Dice over the honest sites, in how many rounds the malicious one counted, and seconds."""
    strategy, screening = RULES[rule]
    done = folder / "cell.json"
    if done.exists():
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    folder.mkdir(parents=True, exist_ok=True)
    plan = replace(plan, strategy=strategy, screening=screening)
    write_atomic(folder / "run.yaml", dump_yaml(plan).encode())
    os.environ["MEDSEGFED_WORLD"] = str(world.resolve())
    app = Malicious(client_app, attack, list(plan.roster).index(malicious))
    began, failed = time.perf_counter(), None
    try:
        run_inline(server_app, app, SITES, folder)  # type: ignore[arg-type]  # called like a ClientApp
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
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8, help="local steps a round")
    parser.add_argument("--worlds", nargs="*", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=list(RULES))
    parser.add_argument("--no-results", action="store_true", help="do not write benchmarks/results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ.setdefault("MEDSEGFED_CACHE", str((options.out / "cache").resolve()))
    run = request(options.rounds, options.steps)
    result: Answer = {
        "what": "mean Dice over the four honest sites' held-out patients; one malicious site of five, the largest",
        "rounds": options.rounds,
        "local_steps": options.steps,
        "hardware": hardware(1),
        "worlds": {},
    }
    for kind in options.worlds:
        plan, malicious = prepare_world(kind, options.out, run)
        rows: dict[str, Any] = {}
        for attack in options.attacks:
            world = options.out / kind / ("flipped" if attack == "label_flip" else "honest")
            rows[attack] = {}
            for rule in options.rules:
                folder = options.out / kind / "runs" / f"{attack}-{rule.replace(' ', '_').replace(',', '')}"
                rows[attack][rule] = carry_out(plan, malicious, attack, rule, folder, world)
                print(kind, attack, rule, rows[attack][rule], flush=True)
        result["worlds"][kind] = {"patients": plan.roster, "malicious": malicious, "dice": rows}
    cells = [cell for world in result["worlds"].values() for row in world["dice"].values() for cell in row.values()]
    result["seconds"] = round(sum(cell["seconds"] for cell in cells), 1)
    if not options.no_results:
        publish("attacks", result)
    for kind, found in result["worlds"].items():
        body = [[attack, *(_cell(cells[rule]) for rule in options.rules)] for attack, cells in found["dice"].items()]
        print(f"\n{kind}: patients {found['patients']}, malicious {found['malicious']}")
        print(table(["Dice", *options.rules], body))


if __name__ == "__main__":
    main()
