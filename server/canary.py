"""A canary: one optimizer step at every site before a long run, over the connections, approvals and policies of a run.

It is a run of its own (name, id, approvals), made of the real one by `canary_of`, of which it changes nothing. Nothing
is aggregated: each site is asked once, its answer is looked at as an update is, and what came of it goes into the
journal. Where a run asks for patient-level privacy, a step would spend of the patients' budget: then a site is only
asked who is there.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import MessageType
from flwr.serverapp import Grid

from client.contract import REFUSALS, Assignment, arrays_to_wire, to_wire
from client.encoding import Compression, largest_size
from client.personalisation import common_shapes, sent_shapes
from medsegdiff.labels import LabelScheme
from medsegdiff.weights import hash_weights, weight_shapes
from server.config import RunPlan, SelectionConfig
from server.exchange import Exchange, Records
from server.grid import BoundedGrid
from server.initial import first_weights
from server.journal import Event, Journal
from server.membership import Membership
from server.screening import Accepted, Expected, largest_norm, screen_update

log = logging.getLogger("medsegfed.server")

LONGEST_NAME = 44  # of the run's that stays: with "-canary" and the hash, 64 signs are a run id at most
SUFFIX = "-canary"


def canary_of(plan: RunPlan, wait_seconds: float | None = None) -> RunPlan:
    """The plan of a run's canary: the same for the same run, and another run to the sites, who approve it as any.

    Args:
        wait_seconds: how long sites may take to come, to approve and to answer; default: the run's deadline.
    """
    wait = plan.deadline_seconds if wait_seconds is None else wait_seconds
    one_step = plan.task.personalisation
    if one_step.trains_a_second:
        one_step = replace(one_step, steps=1)
    return replace(
        plan,
        name=plan.name[:LONGEST_NAME] + SUFFIX,
        task=replace(plan.task, rounds=1, local_steps=1, personalisation=one_step),
        sample=None,
        over_select=0,
        quorum=None,
        selection=SelectionConfig(),
        evaluate_every=1,
        deadline_seconds=wait,
        absence_seconds=min(plan.absence_seconds, wait),
        canary=True,
    )


def carry_out_canary(
    grid: Grid,
    folder: Path,
    plan: RunPlan,
    journal: Journal,
    membership: Membership | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> str:
    """Ask every site, until all have answered or the plan's deadline has passed; returns the hash of the model sent.

    Raises:
        RunStopped: the coordinator wants it to end.
    """
    task, shapes = plan.task, sent_shapes(plan.task)
    bounded = BoundedGrid.over(grid, largest_size(task.compression, shapes))
    exchange = Exchange(bounded, plan, journal, membership, stopped)
    weights = first_weights(plan, folder)
    model_hash = hash_weights(weights)
    journal.append("canary", sites=list(plan.roster), step=task.privacy is None)
    if task.privacy is not None:
        exchange.meet(plan.deadline_seconds)
        return model_hash

    def records(with_model: bool) -> Records:
        sent: Records = {"assignment": to_wire(Assignment(plan.run_id, 1, model_hash))}
        return sent | ({"weights": arrays_to_wire(weights)} if with_model else {})

    values = sum(math.prod(shape) for shape in common_shapes(task).values())
    limit = largest_norm(plan.screening, {}, task, values, len(plan.roster))
    replies = exchange.ask(MessageType.TRAIN, 1, records, model_hash, lambda: True, plan.deadline_seconds)
    for site, reply in replies:
        expected = Expected(
            site=site,
            run=plan.run_id,
            round=1,
            model_hash=model_hash,
            steps=task.local_steps,
            enrolled=plan.roster[site],
            shapes=shapes,
            targets=LabelScheme.of(task.dataset).targets,
            compression=task.compression,
            largest_norm=limit,
            largest_control=2 * task.training.gradient_clip if task.control_variates else None,
            key=exchange.key_of(site),
        )
        outcome = screen_update(reply, expected)
        if isinstance(outcome, Accepted):
            took = max(0.0, time.monotonic() - exchange.asked_at[site])
            moved = {"down": exchange.model_bytes, "up": outcome.bytes}
            journal.append(
                "tried", site=site, seconds=outcome.update.seconds, answer_seconds=round(took, 3), bytes=moved
            )
        else:
            log.warning("%s: %s", site, outcome.reason)
            journal.append("tried", site=site, reason=outcome.reason)
        if membership is not None:
            decision = "accepted" if isinstance(outcome, Accepted) else f"rejected: {outcome.reason}"
            membership.note("canary", run=plan.run_id, site=site, key=exchange.key_of(site), decision=decision)
    return model_hash


def canary_report(plan: RunPlan, canary: RunPlan, events: Sequence[Event]) -> dict[str, Any]:
    """What a canary found out, and what the whole run would take, as plain data.

    Args:
        plan: the run that is to follow.
        events: of the canary's journal; what came before its last beginning is left out.

    Returns:
        `ready`: whether every site of the roster is; `sites`: for each what it took, or the `problem`; `forecast`:
        seconds and bytes of the run's training, from its slowest site; None before a site has made its step.
    """
    begins = [index for index, event in enumerate(events) if event["event"] == "canary"]
    told = events[begins[-1] :] if begins else []
    step = plan.task.privacy is None
    sites = {site: _site_row(site, told, step, canary.deadline_seconds) for site in plan.roster}
    return {
        "run": plan.run_id,
        "canary": canary.run_id,
        "step": step,
        "ready": all(row["ready"] for row in sites.values()),
        "sites": sites,
        "forecast": _forecast(plan, [row for row in sites.values() if row["ready"]]) if step else None,
        "notes": _notes(plan, sites),
    }


def _site_row(site: str, events: Sequence[Event], step: bool, waited: float) -> dict[str, Any]:
    own = [event for event in events if event.get("site") == site]
    here = next((event for event in own if event["event"] == "site"), None)
    tried = next((event for event in reversed(own) if event["event"] == "tried"), None)
    good = tried is not None and "reason" not in tried
    problem = None if good or (here is not None and not step) else _problem(own, here, tried, waited)
    return {
        "ready": problem is None,
        "problem": problem,
        "introduced_seconds": round(max(0.0, here["time"] - events[0]["time"]), 1) if here is not None else None,
        "step_seconds": tried["seconds"] if tried is not None and good else None,
        "answer_seconds": tried["answer_seconds"] if tried is not None and good else None,
        "bytes": dict(tried["bytes"]) if tried is not None and good else None,
        "faults": here["faults"] if here is not None and not here.get("private") else None,
    }


def _problem(own: Sequence[Event], here: Event | None, tried: Event | None, waited: float) -> str:
    """The last word on a site that is not ready."""
    if tried is not None:
        return f"its answer would be rejected: {tried['reason']}"
    last = next((event for event in reversed(own) if event["event"] in ("refused", "left", "lost")), None)
    if last is not None and last["event"] == "refused":
        return f"refuses ({last['code']}): {REFUSALS.get(last['code'], last['code'])}"
    if last is not None and last["event"] == "left":
        return "is no member any more"
    if here is None:
        return f"absent: it did not introduce itself within {waited:g} s"
    lost = "lost its line, and " if last is not None else ""
    return f"{lost}introduced itself, and gave no answer within {waited:g} s"


def _forecast(plan: RunPlan, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Seconds and bytes of the whole run, as its slowest site would have them; scoring takes time beside that."""
    if not rows:
        return None
    task, sites, asked = plan.task, len(plan.roster), plan.sample_size + plan.over_select
    # Of an answer, what is no step - the way there and back, the first look at the data - comes once a round.
    paces = [row["answer_seconds"] + (task.local_steps - 1) * row["step_seconds"] for row in rows]
    waves = math.ceil(asked / plan.sites_at_once)
    scored = {n for n in range(1, task.rounds + 1) if n % plan.evaluate_every == 0 or n == task.rounds}
    # Who has scored a model is not sent it again to train it, unless what is scored is an average of several.
    held = {n for n in scored if n < task.rounds and plan.strategy.ema == 0}
    model = largest_size(Compression(), weight_shapes(task.model))
    values = sum(math.prod(shape) for shape in common_shapes(task).values())
    control = 4 * values * (task.rounds - 1) * asked if task.control_variates else 0  # zero need not be sent
    return {
        "round_seconds": round(waves * max(paces), 1),
        "seconds": round(task.rounds * waves * max(paces), 1),
        "bytes": {
            "down": model * ((task.rounds - len(held)) * asked + len(scored) * sites) + control,
            "up": math.ceil(sum(row["bytes"]["up"] for row in rows) / len(rows)) * asked * task.rounds,
        },
    }


def _notes(plan: RunPlan, sites: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = []
    if plan.task.privacy is not None:
        notes.append(
            "The run asks for patient-level privacy, so that a step would spend of the patients' budget: the sites "
            "were asked who is there, and no step was made. Whether the budget covers the run, each says as it begins."
        )
    else:
        notes.append("Forecast: training alone, at the pace of the slowest site; a first step is slower than others.")
    if plan.task.rounds > 1:
        notes.append(
            "Not seen by a canary: a site's policy.max_rounds, its allowed hours later on, and its approval of the run "
            f"itself ({plan.run_id})."
        )
    faults = {site: row["faults"] for site, row in sites.items() if row["faults"]}
    if faults:
        notes.append(
            "Cases that cannot be read and would be left out: " + ", ".join(f"{s} {n}" for s, n in faults.items()) + "."
        )
    return notes
