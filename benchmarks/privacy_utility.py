"""What a privacy budget costs in Dice: python -m benchmarks.privacy_utility --data DIR --out runs/utility --jobs 12

Every recipe named (default: the three that are shipped with several budgets) is carried out as by `medsegfed simulate`,
one simulation for each budget and repetition, each in a process of its own; all recipes share one pool. Beside the
budgets stand the public model untrained, the same trainable set and all weights without privacy, and each site alone.
`--data` holds the datasets' folders by name; recipes on phantoms need none. Finished simulations are kept: the same
command goes on. Repetitions are begun one after the other, so that what a budget of time cuts off is whole ones.

    OUT/RECIPE/epsilon.md, .png, .json      and together: OUT/privacy_utility.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.turns import RESULTS, Answer, hardware
from medsegdiff.devices import choose_device
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from medsegdiff.strict import dump_yaml
from simulations.budgets import budget_cells, carry_out_cell, collect, draw, markdown
from simulations.phantoms import write_phantoms
from simulations.recipe import Recipe, read_recipe

RECIPES = ("dp-hippocampus", "dp-lgg", "dp-phantoms")
PATIENTS = "patients"  # folder of a recipe's phantoms


@dataclass(frozen=True)
class Cell:
    """One simulation: a budget of a recipe, once."""

    recipe: Path
    data: Path | None
    folder: Path  # of the comparison
    label: str
    first: bool  # of its repetition: it trains the public model that the others take

    @property
    def repetition(self) -> int:
        """0, 1, ..."""
        return int(self.label.rpartition("-")[2])

    @property
    def finished(self) -> bool:
        """Whether it is done, its start scored."""
        return (self.folder / self.label / "arms" / "start.json").exists()


def cells_of(recipe: Path, data: Path | None, out: Path) -> list[Cell]:
    """All simulations of a recipe, repetition by repetition.

    Phantoms are drawn once for all of them (`draw_patients`): the simulations get a recipe that reads them from disk.
    """
    read = read_recipe(recipe)
    folder = out / read.name
    labels = [label for label, _ in budget_cells(read)]
    first = labels[:: len(labels) // read.repeats]
    if read.world.phantoms is not None:
        where: Path | None = folder / PATIENTS
        recipe = folder / "recipe.yaml"
        world = replace(read.world, phantoms=None, dataset="phantoms")
        write_atomic(recipe, dump_yaml(replace(read, world=world)).encode())
    else:
        where = data / str(read.world.dataset) if data is not None else None
    return [Cell(recipe, where, folder, label, label in first) for label in labels]


def draw_patients(recipe: Path, out: Path) -> None:
    """Draw the phantoms of a recipe that has some, unless that was done before."""
    read = read_recipe(recipe)
    folder = out / read.name / PATIENTS
    if read.world.phantoms is not None and not folder.exists():
        write_phantoms(read.world.phantoms, folder)


def work(cell: Cell, device: str, threads: int) -> float:
    """Carry out one cell in this process; its seconds."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if device != "cpu" else ""
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    with (cell.folder / f"{cell.label}.log").open("w") as log:  # progress of a dozen at once is no reading
        os.dup2(log.fileno(), 2)
        carry_out_cell(cell.recipe, cell.data, cell.folder, "inline", cell.label)
    return time.perf_counter() - begun


def work_through(
    cells: list[Cell], jobs: int, device: str, threads: int, budget: float, worlds: Sequence[tuple[Path, Path]] = ()
) -> dict[str, str]:
    """Carry out what is not finished yet; the failures, by label.

    Args:
        worlds: recipe and folder of whatever patients have to be drawn first (`draw_patients`), beside the cells.

    Of a repetition the first cell comes alone, for it trains what the others start from. No cell is begun once the
    budget's seconds are over.
    """
    begun, failed = time.monotonic(), {}
    waiting = deque(sorted((c for c in cells if not c.finished), key=lambda cell: (cell.repetition, not cell.first)))
    running: dict[Future[float], Cell] = {}
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        drawing = {pool.submit(draw_patients, *world) for world in worlds}
        while waiting or running or drawing:
            for cell in [c for c in waiting if _ready(c, cells)][: max(0, jobs - len(running) - len(drawing))]:
                if time.monotonic() - begun > budget:
                    break
                waiting.remove(cell)
                cell.folder.mkdir(parents=True, exist_ok=True)
                running[pool.submit(work, cell, device, threads)] = cell
            if not running and not drawing:
                break
            futures: list[Future[Any]] = [*running, *drawing]
            done = wait(futures, return_when=FIRST_COMPLETED).done
            for drawn in [future for future in drawing if future in done]:
                drawing.remove(drawn)
                drawn.result()
            for future in [future for future in done if future in running]:
                cell = running.pop(future)
                name = f"{cell.folder.name}/{cell.label}"
                try:
                    print(f"{name}: {future.result():.0f} s, {time.monotonic() - begun:.0f} s in all", file=sys.stderr)
                except Exception as error:  # a cell that fails is a gap in the table; the others go on
                    failed[name] = f"{type(error).__name__}: {error}"[:300]
                    print(f"{name}: failed: {failed[name]}", file=sys.stderr)
    return failed


def _ready(cell: Cell, cells: list[Cell]) -> bool:
    """Whether the public model of its repetition is there, or it is the one to make it."""
    if cell.data is not None and cell.data.name == PATIENTS and not cell.data.exists():
        return False
    return cell.first or any(
        other.first and other.folder == cell.folder and other.repetition == cell.repetition and other.finished
        for other in cells
    )


def summarise(recipe: Path, cells: list[Cell]) -> Answer | None:
    """Table, plot and figures of the whole repetitions that are finished; None where there is none."""
    read: Recipe = read_recipe(recipe)
    mine = [cell for cell in cells if cell.folder.name == read.name]
    whole = 0
    while whole < read.repeats and all(cell.finished for cell in mine if cell.repetition == whole):
        whole += 1
    if whole == 0:
        return None
    figures = collect(mine[0].folder, replace(read, repeats=whole))
    write_atomic(mine[0].folder / "epsilon.md", markdown(figures).encode())
    write_atomic(mine[0].folder / "epsilon.png", draw(figures))
    write_atomic(mine[0].folder / "epsilon.json", json.dumps(figures, indent=1).encode())
    return figures


def main() -> None:
    """Carry out the recipes; write and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="holds msd_hippocampus and lgg_tcga")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", action="append", help="a shipped name or a file; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="simulations at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--device", default="auto", help="cpu keeps the processes off a GPU")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="no simulation is begun after")
    given = parser.parse_args()
    os.environ.setdefault("MEDSEGFED_CACHE", str((given.out / "cache").resolve()))
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    begun = time.monotonic()
    recipes = [Path(name) for name in given.recipe or RECIPES]
    try:
        device = choose_device(given.device)
        cells = [cell for recipe in recipes for cell in cells_of(recipe, given.data, given.out)]
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    worlds = [(recipe, given.out) for recipe in recipes if read_recipe(recipe).world.phantoms is not None]
    failed = work_through(cells, given.jobs, given.device, given.threads, given.budget_seconds, worlds)
    found = [figures for recipe in recipes if (figures := summarise(recipe, cells)) is not None]
    result = {
        "what": "Dice on held-out patients against the privacy budget, federated",
        "hardware": hardware(given.threads)
        | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "seconds": round(time.monotonic() - begun, 1),
        "failed": failed,
        "comparisons": found,
    }
    target = given.out / "privacy_utility.json"
    write_atomic(target, (json.dumps(result, indent=1) + "\n").encode())
    print("\n".join(markdown(figures) for figures in found) or "no repetition is finished; the same command goes on")
    print(f"{target} (for the repository: {RESULTS / target.name})", file=sys.stderr)


if __name__ == "__main__":
    main()
