"""One command, one simulation: world, federation, comparison arms, scores, report.

Every stage leaves its result in the run folder before the next begins, so that a killed simulation goes on where it was
and ends with the same weights:

    recipe.yaml  world/  run.yaml  journal.jsonl  checkpoints/  model.safetensors  arms/  report.json  report.html
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from rich.console import Console

from client.contract import TrainTask
from client.privacy.policy import SitePrivacy
from client.site import Site, open_site
from medsegdiff.data.dataset import Dataset, open_dataset
from medsegdiff.data.prepare import prepare
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.data.splits import split_patients
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from medsegdiff.progress import listening
from medsegdiff.strict import dump_yaml, plain, read_config
from server.config import RunPlan, make_plan
from server.initial import check_initial, first_weights, keep_initial
from server.journal import Journal
from simulations.arms import Arm, make_arms, train_arm
from simulations.display import Display, make_console
from simulations.outcome import Outcome, score_models, write_outcome
from simulations.partition import partition_patients, patients_of
from simulations.phantoms import write_phantoms
from simulations.private_world import PUBLIC
from simulations.recipe import Recipe, open_source, read_recipe, with_targets
from simulations.shifts import Unreliable, attendance_by_number
from simulations.world import write_world

Engine = Literal["inline", "ray"]


@dataclass(frozen=True)
class Simulation:
    """A simulation whose world stands and whose plan is resolved."""

    recipe: Recipe
    plan: RunPlan
    sites: dict[str, Site]
    folder: Path


def simulate(recipe_path: Path, data: Path | None, out: Path | None, engine: Engine, resume: bool) -> Outcome:
    """Run a recipe to its report.

    Args:
        data: the dataset's folder, for recipes that need one.
        out: run folder; default `runs/NAME`.
        engine: "inline" runs in this process, "ray" on Flower's simulation engine; the weights are the same.
        resume: go on with the run that `out` holds.

    Raises:
        UserError: before any training for every fault of the recipe, the data or the folder.
    """
    recipe = read_recipe(recipe_path)
    return carry_out(recipe, data, out or Path("runs") / recipe.name, engine, resume, recipe_path)


def carry_out(
    recipe: Recipe,
    data: Path | None,
    folder: Path,
    engine: Engine,
    resume: bool,
    recipe_path: Path,
    public: Path | None = None,
) -> Outcome:
    """As `simulate`, for a recipe that was read from `recipe_path` already.

    Args:
        public: the model that pre-training would give, where that is known.
    """
    _check_folder(folder, recipe, resume)
    made = not folder.exists()
    console = make_console()
    journal = Journal(folder / "journal.jsonl")
    _start_session(folder, recipe, journal)
    try:
        simulation = prepare_simulation(recipe, data, folder, engine, str(recipe_path), console, public)
    except UserError:
        if not resume:  # what lies in it is ours, and the mended command must find it as it was
            _empty(folder, made)
        raise
    display = _display(simulation, console)
    with display.live():
        _federate(simulation, engine)
        weights, seconds = _train_arms(simulation, display)
        display.arm = "scoring"
        federated = weights["federated"]
        if not _withheld(simulation):
            del weights["federated"]  # its scores are the last round's
        scores = score_models(
            simulation.sites, simulation.plan.task, weights, folder / "arms" / "scores.json", simulation.plan.run_id
        )
    return write_outcome(folder, recipe, simulation.plan, simulation.sites, scores, federated, seconds)


def _empty(folder: Path, remove: bool) -> None:
    """Take back what a start that failed has written; a folder that was there before stays, empty."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if remove:
        with contextlib.suppress(OSError):
            folder.rmdir()


def prepare_simulation(
    recipe: Recipe,
    data: Path | None,
    folder: Path,
    engine: Engine,
    source: str,
    console: Console,
    public: Path | None = None,
) -> Simulation:
    """Build the world, or take the one that an earlier session left, and resolve the plan."""
    world = folder / "world"
    os.environ["MEDSEGFED_CACHE"] = str(cache_folder())
    if not world.exists():
        build_world(recipe, data, folder, world, copy=False, console=console)
    os.environ.pop("MEDSEGFED_SITE", None)  # a real site's variable would make every virtual site that one
    os.environ["MEDSEGFED_WORLD"] = str(world.resolve())
    plan_path = folder / "run.yaml"
    sites = open_sites(folder)
    if plan_path.exists():
        return Simulation(recipe, replace(read_config(plan_path, RunPlan), engine=engine), sites, folder)
    dataset = open_dataset(next(iter(sites.values())).path.parent / "data").config
    task = recipe.run.task(dataset, recipe.seed)
    with listening(_plain_progress(console)):
        roster = {name: _weight(site, task) for name, site in sites.items()}
    initial = _initial(recipe, task, folder, Path(source), console, public)
    plan = make_plan(recipe.run, recipe.name, recipe.seed, dataset, roster, engine, source, initial)
    write_atomic(plan_path, dump_yaml(plan).encode())
    return Simulation(recipe, plan, sites, folder)


def open_sites(folder: Path) -> dict[str, Site]:
    """The virtual sites of a run folder, by name."""
    return {path.parent.name: open_site(path.resolve()) for path in sorted((folder / "world").glob("*/site.yaml"))}


def _weight(site: Site, task: TrainTask) -> int:
    """What a site may count for: its training patients, or the number that it declares in their place."""
    return site.config.privacy.weight if site.config.privacy is not None else site.data(task).train_patients


def _initial(
    recipe: Recipe, task: TrainTask, folder: Path, source: Path, console: Console, public: Path | None
) -> str | None:
    """Leave the model that the run starts from in its folder; returns its hash, None for fresh weights."""
    if recipe.run.initial is not None:
        path = source.parent / recipe.run.initial
    elif public is not None and recipe.pretrain is not None:
        path = public
    elif recipe.pretrain is not None:
        data = open_site((folder / PUBLIC / PUBLIC / "site.yaml").resolve()).data(task)
        arm = Arm(PUBLIC, data.train, PUBLIC, recipe.pretrain.steps, max(1, recipe.pretrain.steps // 10))
        console.print(f"{PUBLIC}: {arm.steps} steps on {data.train_patients} patients set apart as public")
        with listening(_plain_progress(console)):
            train_arm(arm, replace(task, privacy=None), folder / "arms")
        path = folder / "arms" / f"{PUBLIC}.safetensors"
    else:
        return None
    identity = check_initial(path, task)
    keep_initial(path, folder)
    return identity


def write_sites(recipe: Recipe, data: Path | None, out: Path, console: Console) -> tuple[Path, ...]:
    """Write a recipe's virtual hospitals to `out`, image files and all; returns their site.yaml files."""
    with TemporaryDirectory(prefix="medsegfed-") as scratch:
        return build_world(recipe, data, Path(scratch), out, copy=True, console=console)


def build_world(
    recipe: Recipe, data: Path | None, folder: Path, world: Path, copy: bool, console: Console
) -> tuple[Path, ...]:
    """Deal a recipe's patients out to virtual hospitals and write these to `world`.

    Args:
        folder: where phantoms are drawn; those of an earlier session are taken as they are.
        copy: whether the sites get image files of their own, or refer to where they lie.

    Raises:
        UserError: more than a fifth of the cases are faulty, fewer patients than sites, an empty site.
    """
    dataset = _source_dataset(recipe, data, folder)
    with listening(_plain_progress(console)):
        prepared = prepare(dataset, recipe.run.model.resolve(dataset.config).image_size, cache_folder())
        for fault in prepared.faults:
            console.print(
                f"left out: case {fault.case_id}: {fault.reason} ({fault.file})", markup=False, soft_wrap=True
            )
        if prepared.faults:
            console.print(f"{len(prepared.faults)} of {len(dataset.cases)} cases are left out")
        usable = Dataset(dataset.root, dataset.config, tuple(p.case for p in prepared.cases))
        _check_sites_left(dataset, usable, recipe)
        if recipe.pretrain is not None:
            usable = _set_apart(usable, recipe, folder / PUBLIC)
        patients = patients_of(usable, recipe.world.partition)
    assignment = partition_patients(patients, recipe.world.partition, recipe.seed)
    splits = _split_sites(usable, assignment, recipe)
    if "test" not in splits.values():
        raise UserError(
            f"none of the {len(splits)} patients would be held out, so nothing could be scored: every site has "
            "a single patient. Raise the patients of a site, or lower the number of sites."
        )
    privacy = _privacy(recipe, assignment, splits)
    return write_world(usable, assignment, splits, world, copy, privacy, recipe.world.shifts, recipe.seed)


def _privacy(recipe: Recipe, assignment: dict[str, list[str]], splits: dict[str, str]) -> dict[str, SitePrivacy] | None:
    """The privacy section of each site, if the recipe has one."""
    asked, run = recipe.world.privacy, recipe.run
    if asked is None:
        return None
    noise = replace(asked, sigma=asked.sigma or asked.noise(run.rounds, run.local_steps))
    return {
        site: noise.at_site(sum(splits[patient] == "train" for patient in patients), run.rounds, run.local_steps)
        for site, patients in assignment.items()
    }


def _set_apart(dataset: Dataset, recipe: Recipe, folder: Path) -> Dataset:
    """Give the public patients a folder of their own, all of them to train on; returns the dataset of the others."""
    assert recipe.pretrain is not None
    patients = {case.patient_id: case.site for case in dataset.cases}
    public = recipe.pretrain.choose(patients, recipe.seed)
    if len(public) == len(patients):
        raise UserError(f"pretrain: all {len(patients)} patients would be public. Leave some to the sites.")
    if not folder.exists():
        write_world(dataset, {PUBLIC: sorted(public)}, dict.fromkeys(public, "train"), folder, copy=False)
    left = tuple(case for case in dataset.cases if case.patient_id not in public)
    return Dataset(dataset.root, dataset.config, left)


def _withheld(simulation: Simulation) -> bool:
    """Whether a site keeps its scores to itself: the simulation, which has its patients, then works them out."""
    found = [site.config.privacy for site in simulation.sites.values()]
    return any(privacy is not None and privacy.held_out == "withheld" for privacy in found)


def cache_folder() -> Path:
    """Where prepared slices are kept between runs: MEDSEGFED_CACHE, else the user's cache folder."""
    chosen = os.environ.get("MEDSEGFED_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "medsegfed"


def _source_dataset(recipe: Recipe, data: Path | None, folder: Path) -> Dataset:
    if recipe.world.phantoms is None:
        return open_source(recipe, data)
    if data is not None:
        raise UserError(
            f"--data {data}: recipe '{recipe.name}' makes its own patients (world.phantoms). Leave --data out."
        )
    source = folder / "phantoms"
    if not source.exists():
        write_phantoms(recipe.world.phantoms, source)
    dataset = open_dataset(source)
    return replace(dataset, config=with_targets(dataset.config, recipe.world.targets))


def _check_sites_left(dataset: Dataset, usable: Dataset, recipe: Recipe) -> None:
    left = {case.site for case in usable.cases}
    gone = sorted({str(case.site) for case in dataset.cases if case.site not in left})
    if gone and recipe.world.partition.by == "site":
        raise UserError(
            f"{dataset.root}: all cases of the site(s) {', '.join(gone)} are faulty, so {len(gone)} site(s) would be "
            "empty; nothing was trained. Mend the cases (medsegfed data check names them) or remove their rows."
        )


def _split_sites(dataset: Dataset, assignment: dict[str, list[str]], recipe: Recipe) -> dict[str, str]:
    splits: dict[str, str] = {}
    for patients in assignment.values():
        chosen = set(patients)
        cases = [case for case in dataset.cases if case.patient_id in chosen]
        splits |= split_patients(cases, recipe.world.test_fraction, 0.0, recipe.seed)
    return splits


def _check_folder(folder: Path, recipe: Recipe, resume: bool) -> None:
    stored = folder / "recipe.yaml"
    if not resume:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file; nothing was changed. Choose a folder with --out.")
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"{folder}: already holds a run or other files; nothing was changed. Go on with it by --resume, or "
                "choose another folder with --out."
            )
        return
    if not stored.exists():
        raise UserError(f"{folder}: holds no run that could be resumed (recipe.yaml is missing). Leave --resume out.")
    if plain(read_config(stored, Recipe)) != plain(recipe):
        raise UserError(
            f"{folder}: was started with another recipe ({stored}). Resume with that one, or choose another "
            "folder with --out."
        )


def _start_session(folder: Path, recipe: Recipe, journal: Journal) -> None:
    stored = folder / "recipe.yaml"
    if not stored.exists():
        write_atomic(stored, dump_yaml(recipe).encode())
    journal.append("session")


def _federate(simulation: Simulation, engine: Engine) -> None:
    if (simulation.folder / "model.safetensors").exists():
        return
    from client.app import app as client_app
    from server.app import app as server_app

    count = len(simulation.sites)
    attendance = attendance_by_number(simulation.recipe.world.attendance or {}, list(simulation.sites))
    if engine == "ray":
        if attendance:
            raise UserError("world.attendance is kept by the inline engine alone; leave --engine out.")
        from simulations.ray_engine import run_ray

        run_ray(server_app, client_app, count, simulation.folder, simulation.plan.task.threads)
    else:
        from simulations.inline import run_inline

        run_inline(server_app, Unreliable(client_app, attendance), count, simulation.folder)


def _train_arms(simulation: Simulation, display: Display) -> tuple[dict[str, Any], float]:
    """Weights of every model, in the report's order, and the seconds spent training the arms."""
    from medsegdiff.weights import load_model

    task = simulation.plan.task
    arms = {}
    seconds = 0.0
    start = first_weights(simulation.plan, simulation.folder)
    for arm in make_arms(task, simulation.sites, simulation.recipe.arms):
        display.arm = arm.name
        arms[arm.name], spent = train_arm(arm, task, simulation.folder / "arms", start=start)
        seconds += spent
    federated = load_model(simulation.folder / "model.safetensors").network.state_dict()
    return {"federated": federated, **arms}, seconds


def _display(simulation: Simulation, console: Console) -> Display:
    """A display that knows how much work there is, in training steps."""
    task, sites = simulation.plan.task, simulation.sites
    tests = [case for site in sites.values() for case in site.data(task).test]
    per_case = _case_units(tests, simulation)
    arms = make_arms(task, sites, simulation.recipe.arms)
    rounds_scored = -(-task.rounds // simulation.plan.evaluate_every)
    steps = task.rounds * task.local_steps * len(sites) + sum(arm.steps for arm in arms)
    scorings = rounds_scored + 1 + len(arms)
    round_units = task.local_steps * len(sites)
    return Display(console, task.rounds, steps + scorings * len(tests) * per_case, per_case, round_units)


def _case_units(tests: list[PreparedCase], simulation: Simulation) -> float:
    """Cost of scoring a case in training steps: a sampling step is a forward pass, about a third of a training step."""
    task = simulation.plan.task
    slices = sum(case.slices for case in tests) / max(1, len(tests))
    return slices * task.sampling.steps * task.sampling.members / (3 * task.training.batch_size)


def _plain_progress(console: Console) -> Any:
    """A listener for the preparation: a line every few seconds."""
    told = time.monotonic()

    def listen(report: Any) -> None:
        nonlocal told
        if time.monotonic() - told > 2.0:
            told = time.monotonic()
            console.print(f"{report.stage}: {report.done} of {report.total}", highlight=False)

    return listen
