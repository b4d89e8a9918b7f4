"""Dice against epsilon: one recipe, carried out once for each of its privacy budgets, with what they are measured by.

    NAME/epsilon-8-0/ ...    a whole simulation for each budget and repetition; `none` trains the same set unprotected,
                             `all-weights` every weight unprotected, with the local-only arm beside it
    NAME/epsilon.json        the figures
    NAME/epsilon.md, .png    table and plot

Repetitions differ in seed: in the sites' patients, the pre-training and the noise. Finished simulations are kept.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from client.privacy.trainable import trained_count
from client.training import build_trained
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from medsegdiff.strict import read_config
from server.config import RunPlan
from server.initial import first_weights
from server.plots import FAINT, INK, SETTINGS, SITE_COLOURS
from simulations.outcome import score_models
from simulations.private_world import PUBLIC
from simulations.recipe import Recipe, read_recipe
from simulations.simulate import Engine, carry_out, open_sites

NONE, ALL = "none", "all-weights"
MARGIN = 0.1  # of Dice, around what is drawn


@dataclass(frozen=True)
class Comparison:
    """What was found, and where it lies."""

    figures: dict[str, Any]
    table: str  # Markdown
    page: Path
    plot: Path


def wants_budgets(recipe_path: Path) -> bool:
    """Whether a recipe is one of several budgets."""
    return read_recipe(recipe_path).epsilons is not None


def compare_budgets(
    recipe_path: Path, data: Path | None, out: Path | None, engine: Engine, resume: bool, jobs: int = 1
) -> Comparison:
    """Carry out every budget of a recipe, every repetition, and compare them.

    Args:
        jobs: simulations at a time, each in a process of its own; for a GPU that one of them leaves idle.

    Raises:
        UserError: as `simulate`; what was finished by then is kept, and `resume` goes on from it.
    """
    recipe = read_recipe(recipe_path)
    folder = out or Path("runs") / recipe.name
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise UserError(f"{folder}: is not empty; nothing was changed. Go on with it by --resume, or choose --out.")
    cells = budget_cells(recipe)
    first = [label for label, _ in cells[:: len(cells) // recipe.repeats]]  # these train each repetition's public model
    for stage in (first, [label for label, _ in cells if label not in first]):
        asked = [(recipe_path, data, folder, engine, label) for label in stage]
        if jobs == 1:
            for arguments in asked:
                carry_out_cell(*arguments)
        else:
            with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
                for future in [pool.submit(carry_out_cell, *arguments) for arguments in asked]:
                    future.result()
    figures = collect(folder, recipe)
    table = markdown(figures)
    page, plot = folder / "epsilon.md", folder / "epsilon.png"
    write_atomic(folder / "epsilon.json", json.dumps(figures, indent=1, allow_nan=False).encode())
    write_atomic(page, table.encode())
    write_atomic(plot, draw(figures))
    return Comparison(figures, table, page, plot)


def carry_out_cell(recipe_path: Path, data: Path | None, folder: Path, engine: Engine, label: str) -> None:
    """Carry out, or go on with, one of a comparison's simulations, and score the model that it started from."""
    cells = budget_cells(read_recipe(recipe_path))
    there = folder / label
    carry_out(dict(cells)[label], data, there, engine, there.exists(), recipe_path, _public_of(folder, cells, label))
    _score_start(there)


def budget_cells(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """Folder name and recipe of every simulation of a comparison, those of one repetition together."""
    assert recipe.epsilons is not None
    assert recipe.world.privacy is not None
    assert recipe.run.privacy is not None
    open_ = replace(recipe.run.privacy, required=False)
    cells = []
    for repetition in range(recipe.repeats):
        common = replace(recipe, epsilons=None, repeats=1, seed=recipe.seed + repetition, arms=())
        private = [(f"epsilon-{e:g}".replace("+", ""), e) for e in recipe.epsilons if e is not None]
        for name, epsilon in private:
            world = replace(recipe.world, privacy=replace(recipe.world.privacy, epsilon=epsilon))
            cells.append((name, replace(common, world=world)))
        bare = replace(recipe.world, privacy=None)
        if None in recipe.epsilons:
            cells.append((NONE, replace(common, world=bare, run=replace(recipe.run, privacy=open_))))
        arms = tuple(arm for arm in recipe.arms if arm == "local")
        cells.append((ALL, replace(common, world=bare, run=replace(recipe.run, privacy=None), arms=arms)))
    count = len(cells) // recipe.repeats
    return [
        (f"{label}-{number // count}", replace(cell, name=f"{recipe.name}-{label}-{number // count}"[:64]))
        for number, (label, cell) in enumerate(cells)
    ]


def _public_of(folder: Path, cells: Sequence[tuple[str, Recipe]], label: str) -> Path | None:
    """The public model that another simulation of the same repetition has trained; equal seeds would give it again."""
    repetition = label.rpartition("-")[2]
    same = [other for other, _ in cells if other.endswith(f"-{repetition}")]
    found = (folder / other / "arms" / f"{PUBLIC}.safetensors" for other in same)
    return next((path for path in found if path.exists()), None)


def _score_start(folder: Path) -> None:
    """Score the model that a simulation started from, at every site; kept in arms/start.json."""
    plan = read_config(folder / "run.yaml", RunPlan)
    sites = open_sites(folder)
    score_models(sites, plan.task, {"start": first_weights(plan, folder)}, folder / "arms" / "start.json")


def collect(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """The figures of all finished simulations.

    Returns:
        `rows`: for each budget label, asked (null: without privacy), spent and sigma (largest over sites), rows a step,
        and mean, worst and their standard deviations over repetitions; `start`, `local`: what they stand beside.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for label, cell in budget_cells(recipe):
        told = json.loads((folder / label / "report.json").read_text())
        spent = [row["epsilon"] for row in told["sites"].values() if row["epsilon"] is not None]
        start = json.loads((folder / label / "arms" / "start.json").read_text())["start"]["sites"]
        dice = [row["dice"] for row in start.values() if row["dice"] is not None]
        found.setdefault(label.rpartition("-")[0], []).append(
            {
                "asked": cell.world.privacy.epsilon if cell.world.privacy is not None else None,
                "spent": max(spent) if spent else None,
                "sigma": _largest_sigma(folder / label),
                **told["arms"]["federated"],
                "start": fmean(dice) if dice else None,
                "local": told["arms"].get("local", {}).get("mean"),
                "patients": sum(row["patients"]["train"] for row in told["sites"].values()),
                "sites": len(told["sites"]),
                "trained": _trained(folder / label),
                "rows_a_step": rows_a_step(cell, fmean(row["patients"]["train"] for row in told["sites"].values())),
            }
        )
    rows = [_row(name, each) for name, each in found.items()]
    every = [one for each in found.values() for one in each]
    return {
        "recipe": recipe.name,
        "repetitions": recipe.repeats,
        "rounds": recipe.run.rounds,
        "local_steps": recipe.run.local_steps,
        "patients": every[0]["patients"],
        "sites": every[0]["sites"],
        "delta": recipe.world.privacy.delta if recipe.world.privacy is not None else None,
        "start": _mean([one["start"] for one in every]),
        "local": _mean([one["local"] for one in every]),
        "rows": rows,
    }


def _row(name: str, each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    means = [one["mean"] for one in each if one["mean"] is not None]
    return {
        "name": name,
        "asked": each[0]["asked"],
        "spent": max((one["spent"] for one in each if one["spent"] is not None), default=None),
        "sigma": max((one["sigma"] for one in each if one["sigma"] is not None), default=None),
        "trained": each[0]["trained"],
        "rows_a_step": _mean([one["rows_a_step"] for one in each]),
        "mean": _mean(means),
        "spread": stdev(means) if len(means) > 1 else None,
        "worst": _mean([one["worst"] for one in each]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def rows_a_step(recipe: Recipe, patients: float) -> float:
    """Rows (a slice at one timestep and noise) that a step takes at a site of so many patients; privately: expected."""
    privacy, asked = recipe.world.privacy, recipe.run.privacy
    if privacy is None or asked is None:
        return recipe.run.training.batch_size
    q, slices, draws = (getattr(asked.asks, name) or getattr(privacy, name) for name in ("q", "slices", "draws"))
    return float(q * patients * slices * draws)


def _largest_sigma(folder: Path) -> float | None:
    found = [site.config.privacy for site in open_sites(folder).values()]
    return max((privacy.mechanism.sigma for privacy in found if privacy is not None), default=None)


def _trained(folder: Path) -> int:
    """Numbers that a site trains."""
    plan = read_config(folder / "run.yaml", RunPlan)
    return trained_count(build_trained(plan.task, first_weights(plan, folder)).network)


def verdict(figures: dict[str, Any]) -> list[str]:
    """What the figures say, in a sentence each; where privacy learned nothing, they say that."""
    start = figures["start"]
    lines = []
    for row in figures["rows"]:
        if row["asked"] is None or row["mean"] is None or start is None:
            continue
        gain, spread = row["mean"] - start, row["spread"] or 0.0
        if gain <= max(0.01, spread):
            lines.append(
                f"At epsilon {row['asked']:g} private training is useless with {figures['patients']} patients at "
                f"{figures['sites']} sites: Dice {row['mean']:.3f}, and {start:.3f} before any training here."
            )
        else:
            lines.append(f"At epsilon {row['asked']:g} private training gains {gain:+.3f} Dice over the public model.")
    return lines


def markdown(figures: dict[str, Any]) -> str:
    """Table and verdict."""
    head = [
        f"# {figures['recipe']}: Dice against epsilon",
        "",
        f"{figures['patients']} training patients at {figures['sites']} sites, {figures['rounds']} rounds of "
        f"{figures['local_steps']} steps, delta {figures['delta']:g}; mean over {figures['repetitions']} "
        "repetition(s), standard deviation over them behind the sign.",
        "",
        "| training | sigma | epsilon spent | trained numbers | rows a step | mean Dice | worst site |",
        "|---|---|---|---|---|---|---|",
        f"| the public model, untrained here | | 0 | 0 | 0 | {_dice(figures['start'])} | |",
    ]
    for row in figures["rows"]:
        name = {NONE: "no privacy, the same set", ALL: "no privacy, all weights"}.get(
            row["name"], f"epsilon {row['asked'] or 0:g}"
        )
        spread = f" ± {row['spread']:.3f}" if row["spread"] is not None else ""
        head.append(
            f"| {name} | {_number(row['sigma'])} | {_number(row['spent'])} | {row['trained']:,} | "
            f"{_number(row['rows_a_step'])} | {_dice(row['mean'])}{spread} | {_dice(row['worst'])} |"
        )
    plain = next((_number(row["rows_a_step"]) for row in figures["rows"] if row["name"] == ALL), "")
    head.append(f"| each site alone, no privacy, all weights | | | | {plain} | {_dice(figures['local'])} | |")
    note = (
        "Rows a step: slices at one timestep and noise each, at a site; of a private step, which draws patients, on "
        "average. Where they differ, so does more than privacy."
    )
    return "\n".join([*head, "", note, "", *(f"- {line}" for line in verdict(figures))]) + "\n"


def _tick(row: dict[str, Any]) -> str:
    """The budget; where the least noise that a site may use spends less, that."""
    least = row["spent"] is not None and row["spent"] < 0.5 * row["asked"]
    return f"{row['spent']:.3g}\n(least noise)" if least else f"{row['asked']:g}"


def _dice(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def draw(figures: dict[str, Any]) -> bytes:
    """Dice over epsilon, with what is reached without privacy, alone and before any training as lines; PNG."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        rows = [row for row in figures["rows"] if row["asked"] is not None and row["mean"] is not None]
        rows.sort(key=lambda row: float(row["asked"]))
        places = range(len(rows))  # evenly: 1e6 is there to show the least noise, not to be far from 50
        axes.errorbar(
            places,
            [row["mean"] for row in rows],
            [row["spread"] or 0.0 for row in rows] if any(row["spread"] for row in rows) else None,
            color=SITE_COLOURS[0], marker="o", capsize=3, label="patient-level privacy",
        )  # fmt: skip
        named = {row["name"]: row["mean"] for row in figures["rows"]}
        lines = (
            (named.get(ALL), "no privacy, all weights", "-"),
            (named.get(NONE), "no privacy, the same set", "--"),
            (figures["local"], "each site alone, no privacy", "-."),
            (figures["start"], "public model, untrained here", ":"),
        )
        for value, label, style in lines:
            if value is not None:
                axes.axhline(value, color=INK if style != ":" else FAINT, ls=style, lw=1.2, label=label)
        axes.set_xticks(places, [_tick(row) for row in rows])
        known = [row["mean"] for row in rows] + [value for value, _, _ in lines if value is not None]
        limits = (max(0.0, min(known, default=0.0) - MARGIN), min(1.0, max(known, default=1.0) + MARGIN))
        axes.set(xlabel="epsilon (add or remove one patient)", ylabel="mean Dice over sites", ylim=limits)
        axes.set_title(f"{figures['recipe']}: {figures['patients']} patients, {figures['sites']} sites", fontsize=10)
        axes.legend(fontsize=8, loc="best")
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=144, metadata={"Software": None})
        return data.getvalue()
