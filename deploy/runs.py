"""Runs of a federation: how a coordinator asks for one, and the queue that the server's supervisor works off.

runs/NAME/run.yaml       the plan, resolved
runs/NAME/queued.json    asked for: when, and after how many journal events; newer than the run's last end: carry it out
runs/NAME/stop.json      asked to end
runs/NAME/journal.jsonl  what happened, told by the ServerApp alone
"""

from __future__ import annotations

import json
import logging
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from medsegdiff.data.dataset import DatasetConfig
from medsegdiff.errors import UserError
from medsegdiff.files import new_folder, write_atomic
from medsegdiff.strict import Strict, dump_yaml, plain, read_config
from server.config import RunPlan, RunRequest, make_plan
from server.journal import read_events
from server.rounds import ENDED, STOP, run_state

log = logging.getLogger("medsegfed.supervisor")

QUEUED = "queued.json"
ENGINE = "network"


@dataclass(frozen=True)
class RunFile(Strict):
    """RUN.yaml: what a coordinator writes to have a model trained."""

    name: str  # of the run folder, runs/NAME
    dataset: (
        str | DatasetConfig
    )  # what the sites' data must be: a shipped name, a dataset.yaml beside this file, or inline
    run: RunRequest
    seed: int = 0
    targets: dict[str, tuple[str, ...]] | None = None  # what to segment, in place of the dataset's own targets
    sites: tuple[str, ...] | None = None  # who takes part; default: all admitted sites

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,47}", self.name):
            raise ValueError(f"name {self.name!r} must be 1 to 48 letters, digits, '-', '_' or '.': it names a folder")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0..2**63 - 1, found {self.seed}")
        if self.sites is not None and len(set(self.sites)) != len(self.sites):
            raise ValueError("sites: a site stands twice")


def resolve_run(path: Path, members: dict[str, int]) -> RunPlan:
    """The plan of a RUN.yaml for the sites that take part.

    Args:
        members: admitted site -> enrolled training patients.

    Raises:
        UserError: a fault of the file, an unknown dataset, a site that is not admitted, no site at all.
    """
    from server.initial import check_initial  # brings torch
    from simulations.recipe import shipped_dataset, with_targets

    asked = read_config(path, RunFile)
    dataset = asked.dataset
    if isinstance(dataset, str):
        beside = path.parent / dataset
        try:
            dataset = read_config(beside if beside.is_file() else shipped_dataset(dataset), DatasetConfig)
        except UserError as error:
            raise (
                error
                if beside.is_file()
                else UserError(f"{path}: dataset: no file {beside}, and none of that name is shipped ({error})")
            ) from error
    dataset = with_targets(dataset, asked.targets)
    chosen = asked.sites if asked.sites is not None else tuple(sorted(members))
    unknown = [site for site in chosen if site not in members]
    if unknown:
        raise UserError(
            f"{path}: sites: {', '.join(unknown)} not admitted; the admitted sites are "
            f"{', '.join(sorted(members)) or 'none'}. Admit them, or leave them out."
        )
    if not chosen:
        raise UserError(f"{path}: no site is admitted yet, so nobody could train. Admit sites with medsegfed admit.")
    roster = {site: members[site] for site in sorted(chosen)}
    first = initial_file(path)
    initial = check_initial(first, asked.run.task(dataset, asked.seed)) if first is not None else None
    return make_plan(asked.run, asked.name, asked.seed, dataset, roster, ENGINE, str(path), initial)


def initial_file(path: Path) -> Path | None:
    """The model that a RUN.yaml names as its start, beside the file; None where it starts from fresh weights."""
    name = read_config(path, RunFile).run.initial
    return path.parent / name if name is not None else None


def warning_of(plan: RunPlan) -> str | None:
    """What a coordinator should know of a run before hospitals spend on it."""
    privacy = plan.task.privacy
    if plan.initial is not None or privacy is None or privacy.train != "low_rank":
        return None
    return (
        "Careful: privacy.train is low_rank, which corrects a model trained on public data; run.initial names none: "
        "fresh weights will spend the patients' budget and learn next to nothing. To end it: medsegfed stop "
        f"{plan.name}"
    )


def queue_run(runs: Path, plan: RunPlan, by: str, initial: Path | None = None) -> Path:
    """Ask for a run: write its folder, or ask for the one that is there to go on. Returns the folder.

    Args:
        initial: the model file that the plan names as its start.

    Raises:
        UserError: a folder of that name holds another plan, or the run has finished.
    """
    folder = runs / plan.name
    if (folder / "run.yaml").exists():
        before = read_config(folder / "run.yaml", RunPlan)
        if before.run_id != plan.run_id:
            raise UserError(
                f"{folder}: holds a run of that name with another plan, which the sites approved; nothing was changed. "
                "Choose another name in the run file."
            )
        if run_state(read_events(folder / "journal.jsonl")) == "finished":
            raise UserError(f"{folder}: the run has finished. See medsegfed report {plan.name}.")
        if plain(before) != plain(plan):  # quorum, deadline or patience
            if wanted(folder):
                raise UserError(f"{folder}: the run is under way; stop it before you change its quorum or deadlines.")
            write_atomic(folder / "run.yaml", dump_yaml(plan).encode())
    else:
        with new_folder(folder) as partial:
            if initial is not None:
                from server.initial import keep_initial  # brings torch

                keep_initial(initial, partial)
            write_atomic(partial / "run.yaml", dump_yaml(plan).encode())
    _ask(folder, by)
    return folder


def _ask(folder: Path, by: str) -> None:
    (folder / STOP).unlink(missing_ok=True)
    asked = {"time": time.time(), "by": by, "events": len(read_events(folder / "journal.jsonl"))}
    write_atomic(folder / QUEUED, json.dumps(asked).encode())


def stop_run(folder: Path, by: str) -> None:
    """Ask a run to end: after the reply at hand, within seconds; what is committed stays.

    Raises:
        UserError: no such run, or it has ended already.
    """
    if not (folder / "run.yaml").exists():
        raise UserError(f"{folder}: there is no such run. See medsegfed status.")
    try:
        under_way = wanted(folder)
    except UserError:  # a damaged journal: whether it is under way nobody knows, and it can be ended all the same
        under_way = True
    if not under_way:
        state = run_state(read_events(folder / "journal.jsonl"))
        raise UserError(f"{folder.name}: the run is not under way (it is {state}); nothing to stop.")
    write_atomic(folder / STOP, json.dumps({"time": time.time(), "by": by}).encode())


def wanted(folder: Path) -> bool:
    """Whether the run is to be carried out: asked for, and not ended since."""
    asked = read_queued(folder)
    return asked is not None and not has_ended(folder, asked["events"])


def has_ended(folder: Path, events: int) -> bool:
    """Whether the run's journal tells an end (finished, stopped or failed) as its last word after so many events."""
    try:
        found = (folder / "journal.jsonl").stat()
        stamp = (found.st_mtime_ns, found.st_size)
    except OSError:
        stamp = (0, 0)
    return _has_ended(folder, events, stamp)


@lru_cache(maxsize=1024)
def _has_ended(folder: Path, events: int, _stamp: tuple[int, int]) -> bool:
    """Whether a journal tells an end after so many events; looked at anew when it has changed (`_stamp`)."""
    return run_state(read_events(folder / "journal.jsonl")[events:]) in ENDED


def read_queued(folder: Path) -> dict[str, Any] | None:
    """queued.json; None where there is none, or it is damaged (then the run must be asked for again)."""
    try:
        asked = json.loads((folder / QUEUED).read_bytes())
        if isinstance(asked["events"], int) and isinstance(asked["time"], float):
            return dict(asked)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


def next_run(runs: Path) -> Path | None:
    """The run to carry out now: the one that was asked for first and has not ended."""
    queued = [(asked["time"], folder) for folder in runs.glob("*") if (asked := read_queued(folder)) is not None]
    return next((folder for _, folder in sorted(queued) if _is_next(folder)), None)


def _is_next(folder: Path) -> bool:
    """As `wanted`; a run whose journal is damaged holds up none of the others."""
    try:
        return wanted(folder)
    except UserError as error:
        log.warning("%s", error)
        return False


def run_of(runs: Path, name: str | None) -> Path:
    """The folder of a named run; without a name the run at hand, else the newest.

    Raises:
        UserError: no such run, or none at all.
    """
    if name is not None:
        folder = runs / name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name) or not (folder / "run.yaml").exists():
            known = ", ".join(sorted(path.parent.name for path in runs.glob("*/run.yaml"))) or "none"
            raise UserError(f"{name}: there is no such run; the runs are: {known}.")
        return folder
    folders = sorted(runs.glob("*/run.yaml"), key=lambda path: path.stat().st_mtime)
    if not folders:
        raise UserError(f"{runs}: there is no run yet. Start one with medsegfed run RUN.yaml.")
    return next_run(runs) or folders[-1].parent
