"""`medsegfed run RUN.yaml --canary`: one step at every site before a long run, and what it tells of the run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.federation import Federation
from deploy.run_status import printable
from deploy.runs import next_run, queue_run, stop_run, wanted
from deploy.status import span
from deploy.supervisor import read_status
from medsegdiff.errors import UserError
from medsegdiff.strict import read_config
from server.canary import canary_of, canary_report
from server.config import RunPlan
from server.journal import read_events
from server.report_text import bytes_text
from server.rounds import ENDED, run_state

LOOK_SECONDS = 1.0
GRACE_SECONDS = 120.0  # beyond the wait, for the server to take the canary up and to end it
NONE = "–"

Tell = Callable[[str], None]


def run_canary(
    federation: Federation,
    plan: RunPlan,
    by: str,
    wait_seconds: float | None,
    tell: Tell,
    initial: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Ask for a run's canary, wait until it has ended, and report; Ctrl-C ends the waiting and the canary.

    Args:
        plan: of the run that is to follow; nothing of it is touched.
        wait_seconds: what sites get to come, to approve and to answer; default: the run's deadline.
        tell: is given lines for whoever waits.
        initial: the model file that the run starts from, where it names one.

    Returns:
        As `canary_report`.

    Raises:
        UserError: the canary's folder holds something else, or an earlier canary of another plan is under way.
    """
    canary = canary_of(plan, wait_seconds)
    folder = queue_canary(federation.runs, canary, by, initial)
    federation.audit().append("run_queued", run=canary.run_id, by=by, sites=sorted(canary.roster))
    tell(f"Canary {canary.run_id} of {plan.run_id}: sites {', '.join(plan.roster)}. Folder: {folder}")
    tell(f"Each site approves it as any run, unless its policy asks for no approval: medsegfed approve {canary.run_id}")
    ahead = next_run(federation.runs)
    if not _server_runs(federation):
        tell("The server is not running; the canary waits for it. Start it with: medsegfed server start")
    elif ahead is not None and ahead != folder:
        tell(f"The server works on {ahead.name}, and takes the canary up when that has ended.")
    try:
        _wait(federation, folder, canary, tell, clock, sleep)
    except KeyboardInterrupt:
        if wanted(folder):
            stop_run(folder, by)
    return canary_report(plan, canary, read_events(folder / "journal.jsonl"))


def queue_canary(runs: Path, canary: RunPlan, by: str, initial: Path | None = None) -> Path:
    """Queue a canary in place of an earlier one of its name; one that is under way with the same plan goes on.

    Raises:
        UserError: as `run_canary`.
    """
    folder = runs / canary.name
    if (folder / "run.yaml").exists():
        before = read_config(folder / "run.yaml", RunPlan)
        if not before.canary:
            raise UserError(
                f"{folder}: holds a run of its own, no canary; nothing was changed. Give your run another name."
            )
        if wanted(folder):
            if before.run_id == canary.run_id:
                return folder
            raise UserError(
                f"{folder}: a canary of another plan is under way; nothing was changed. End it first: medsegfed stop "
                f"{canary.name}"
            )
        (folder / "queued.json").unlink(missing_ok=True)  # first: what is half gone must not be taken up
        shutil.rmtree(folder)
    return queue_run(runs, canary, by, initial)


def _server_runs(federation: Federation) -> bool:
    return read_status(federation.state) is not None


def _wait(
    federation: Federation,
    folder: Path,
    canary: RunPlan,
    tell: Tell,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> None:
    """Until the canary has ended; or, while nothing else is under way, the server has not taken it up in time."""
    since = clock()
    while True:
        events = read_events(folder / "journal.jsonl")
        if run_state(events) in ENDED and not wanted(folder):
            return
        if not events and next_run(federation.runs) != folder and _server_runs(federation):
            since = clock()  # another run is under way
        if clock() - since > canary.deadline_seconds + GRACE_SECONDS:
            tell("The canary did not end in time; is the server running (medsegfed status)? What it told until now:")
            return
        sleep(LOOK_SECONDS)


def show_canary(report: dict[str, Any], console: Console) -> None:
    """The report as a table, the forecast and what to do next."""
    table = Table("Site", "Introduced after", "Step", "Down", "Up", "State", box=None, pad_edge=False)
    for site, row in report["sites"].items():
        moved = row["bytes"] or {}
        table.add_row(
            printable(site, 64),
            NONE if row["introduced_seconds"] is None else f"{row['introduced_seconds']:.1f} s",
            NONE if row["step_seconds"] is None else f"{row['step_seconds']:.1f} s",
            bytes_text(moved["down"]) if moved else NONE,
            bytes_text(moved["up"]) if moved else NONE,
            "ready" if row["ready"] else printable(row["problem"]),
        )
    console.print(table, markup=False, highlight=False)
    lines = [*report["notes"]]
    forecast = report["forecast"]
    if forecast is not None:
        lines.insert(
            0,
            f"The whole run: {span(forecast['round_seconds'])} a round, {span(forecast['seconds'])} in all, "
            f"{bytes_text(forecast['bytes']['down'])} down and {bytes_text(forecast['bytes']['up'])} up in all.",
        )
    ready = sum(row["ready"] for row in report["sites"].values())
    lines.append(
        f"All {ready} sites are ready. Next: medsegfed run RUN.yaml"
        if report["ready"]
        else f"{ready} of {len(report['sites'])} sites are ready. Mend the others, and run it with --canary again."
    )
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)


def canary_command(
    federation: Federation,
    plan: RunPlan,
    by: str,
    wait_seconds: float | None,
    as_json: bool,
    tell: Tell,
    initial: Path | None = None,
) -> int:
    """The whole command. Returns the exit code: 0 when every site is ready, else 1."""
    report = run_canary(federation, plan, by, wait_seconds, (lambda _: None) if as_json else tell, initial)
    if as_json:
        print(json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False))
    else:
        show_canary(report, Console())
    return 0 if report["ready"] else 1
