"""The report of a real federation: what run.yaml, journal.jsonl and model.safetensors say, and nothing else.

It holds contract fields alone: no comparison arm, no matrix, no picture. Of a run that goes on it tells what stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from client.contract import REFUSALS
from medsegdiff.errors import UserError
from medsegdiff.labels import LabelScheme
from medsegdiff.network import MedSegDiff, parameter_count
from medsegdiff.strict import plain, read_config
from medsegdiff.weights import hash_weights, read_tensors
from server.config import RunPlan
from server.journal import Event, read_events
from server.report import write_report
from server.report_text import plural
from server.rounds import (
    ENDED,
    absences,
    committed_rounds,
    history,
    released_hash,
    run_incidents,
    run_state,
    scored_rounds,
    site_seconds,
    spent_privacy,
    traffic,
    working_seconds,
)

PROGRAMS = ("medsegfed", "torch", "flwr", "python")  # in this order; a site that names others has them after these


def write_federation_report(folder: Path, incidents: Sequence[Mapping[str, Any]] = ()) -> tuple[dict[str, Any], Path]:
    """Write report.json, metrics.csv and report.html into a run folder; equal files give equal bytes.

    The folder is read only, apart from the three files: the run may go on while its report is made.

    Args:
        incidents: of the server's processes (time, what, done, seconds); those during the run stand in the report,
            beside what the journal itself tells.

    Returns:
        The report, and the path of report.html.

    Raises:
        UserError: no run.yaml, a damaged journal, or a model.safetensors that is not the journal's.
    """
    plan = read_config(folder / "run.yaml", RunPlan)
    if plan.canary:
        raise UserError(f"{folder.name}: is a canary, which has no report.json. See: medsegfed run RUN.yaml --canary")
    events = read_events(folder / "journal.jsonl")
    try:
        report = federation_report(plan, events)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / 'journal.jsonl'}: an event has not the fields this version knows ({type(error).__name__}: "
            f"{error}); no report was written. Use the version of medsegfed that the run was made with."
        ) from error
    report["incidents"] = _incidents(events, incidents)
    report["notes"] += _model_notes(folder / "model.safetensors", report)
    return report, write_report(folder, report)


def _incidents(events: Sequence[Event], others: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not events:
        return []
    first, last = float(events[0]["time"]), float(events[-1]["time"])
    if run_state(events) not in ENDED:
        last = math.inf
    during = [dict(incident) for incident in others if first <= incident["time"] <= last]
    return sorted(run_incidents(events) + during, key=lambda incident: float(incident["time"]))


def federation_report(plan: RunPlan, events: Sequence[Event]) -> dict[str, Any]:
    """report.json of a federation, from its plan and its journal."""
    committed, scored = committed_rounds(events), scored_rounds(events)
    # Only a committed round's scores count: a kill may have left those of a round that was then repeated.
    numbers = [number for number in scored if number <= len(committed)]
    selected = next((event["round"] for event in reversed(events) if event["event"] == "selected"), None)
    last = selected if selected in numbers else max(numbers, default=None)
    scores = scored[last] if last is not None else {}
    own = own_scores(scores)
    described = describe_run(plan)
    described["model"]["hash"] = released_hash(events)
    introduced = {event["site"]: event for event in events if event["event"] == "site"}
    train, evaluate = site_seconds(events, _longest)
    # Sites that came back work before a pause is told to be over.
    total = max(working_seconds(events), (train or 0.0) + evaluate)
    return {
        **described,
        "progress": {"state": run_state(events), "committed": len(committed), "scored": last},
        "arms": {
            "federated": arm_score([scores.get(site, {}).get("dice") for site in plan.roster]),
            **({"personalised": arm_score([row.get("dice") for row in own.values()])} if own else {}),
        },
        "sites": {site: _site_row(site, scores.get(site), introduced.get(site), events) for site in plan.roster},
        "history": history(events),
        "cross_site": None,
        "notes": _notes(plan, events, introduced, scores),
        "software": _software(introduced),
        "hardware": None,
        "seconds": seconds_row(total, train, evaluate),
        "bytes": traffic(events),
    }


def describe_run(plan: RunPlan) -> dict[str, Any]:
    """The head of a report: what was to be run, from the plan alone."""
    task = plan.task
    with torch.device("meta"):  # counted without allocating a weight
        parameters = parameter_count(MedSegDiff(task.model))
    return {
        "run": plan.name,
        "seed": task.seed,
        "rounds": task.rounds,
        "local_steps": task.local_steps,
        "engine": plan.engine,
        "strategy": plan.stated(),
        "training": _training(plan),
        "participation": {
            "sites": len(plan.roster),
            "asked": plan.sample_size,
            "spare": plan.over_select,
            "required": plan.required,
        },
        "sampling": plain(task.sampling),
        "model": {"preset": plan.preset, "parameters": parameters, **plain(task.model)},
        "dataset": {
            "name": task.dataset.name,
            "modality": task.dataset.modality,
            "channels": list(task.dataset.channels),
            "targets": list(LabelScheme.of(task.dataset).targets),
        },
    }


def _training(plan: RunPlan) -> dict[str, Any]:
    """The settings of local steps, with what the run asks of private sites; the augmentation's stay in run.yaml."""
    training: dict[str, Any] = plain(plan.task.training)
    del training["augment"]
    if plan.task.privacy is None:
        return training
    asked: dict[str, Any] = plain(plan.task.privacy)
    asked |= {key: value for key, value in asked.pop("asks").items() if value is not None}
    return training | {f"privacy_{key}": value for key, value in asked.items()}


def arm_score(dice: Sequence[float | None]) -> dict[str, float | None]:
    """An arm over all sites, from each site's Dice; sites without one are left out."""
    known = [value for value in dice if value is not None]
    if not known:
        return {"mean": None, "worst": None}
    return {"mean": math.fsum(known) / len(known), "worst": min(known)}


def seconds_row(total: float, train: float | None, evaluate: float) -> dict[str, float | None]:
    """The report's times; overhead is what neither training nor scoring explains, None where training is not told."""
    return {
        "total": round(total, 1),
        "train": round(train, 1) if train is not None else None,
        "evaluate": round(evaluate, 1),
        "overhead": round(max(0.0, total - train - evaluate), 1) if train is not None else None,
    }


def _longest(seconds: list[float]) -> float:
    """Hospitals work at the same time: the slowest one's seconds are the round's."""
    return max(seconds, default=0.0)


def _site_row(
    site: str, scores: Mapping[str, Any] | None, introduced: Event | None, events: Sequence[Event]
) -> dict[str, Any]:
    told = introduced or {}
    private = bool(told.get("private"))
    known = scores if scores and not (private and scores["dice"] is None) else None  # withheld: told in no way
    epsilon, delta = spent_privacy(events, site)
    counted = {"train": told["train_patients"], "test": told["test_patients"]} if introduced and not private else None
    own = own_scores({site: known}) if known else {}
    beside = {"personalised": own[site]} if own else {}
    return {
        "patients": counted,
        "dice": {"federated": known["dice"]} | _each(beside, "dice") if known else None,
        "dice_by_target": {"federated": known["dice_by_target"]} if known else None,
        "hd95_mm": {"federated": known["hd95_mm"]} | _each(beside, "hd95_mm") if known else None,
        "hd95_undefined": {"federated": known["hd95_undefined"]} if known else None,
        "epsilon": epsilon,
        "privacy_delta": delta,
        "faults": None if private else told.get("faults"),
        **absences(events, site),
        "refusals": _refusals(site, events),
        "software": told.get("software"),
        "application": told.get("application") or None,
    }


def own_scores(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of a round's scores, those of the sites' own second models; empty where they have none."""
    return {
        site: {"dice": row["personal_dice"], "hd95_mm": row.get("personal_hd95_mm")}
        for site, row in scores.items()
        if row.get("personal_dice") is not None
    }


def _each(arms: Mapping[str, Mapping[str, Any]], what: str) -> dict[str, Any]:
    return {arm: row[what] for arm, row in arms.items()}


def _refusals(site: str, events: Sequence[Event]) -> list[dict[str, Any]]:
    """What a site declined to do and how often: it is asked again and again while a run waits for it."""
    times: dict[tuple[str, str], int] = {}
    for event in events:
        if event["event"] == "refused" and event.get("site") == site:
            code = str(event.get("code", ""))
            key = (code, str(event.get("reason") or REFUSALS.get(code, code)))
            times[key] = times.get(key, 0) + 1
    return [{"code": code, "reason": reason, "times": count} for (code, reason), count in times.items()]


def _software(introduced: Mapping[str, Event]) -> dict[str, str | None]:
    """Versions at the sites; several where they differ."""
    found: dict[str, set[str]] = {}
    for event in introduced.values():
        for program, version in (event.get("software") or {}).items():
            found.setdefault(program, set()).add(str(version))
    names = [name for name in PROGRAMS if name in found] + sorted(set(found) - set(PROGRAMS))
    return {name: " / ".join(sorted(found[name])) for name in names}


def _notes(
    plan: RunPlan, events: Sequence[Event], introduced: Mapping[str, Event], scores: Mapping[str, Any]
) -> list[str]:
    notes = [
        "Dice and HD95 are averages over a site's patients, as the sites sent them; the server sees no image and can "
        "check neither."
    ]
    unknown = [site for site in plan.roster if site not in introduced]
    if unknown and introduced:
        notes.append(f"On the roster, but never there: {', '.join(unknown)}.")
    notes += privacy_notes(plan, events)
    notes += personal_notes(plan)
    notes += sampling_notes(plan, events)
    notes += selection_notes(plan, events)
    unscored = [site for site in plan.roster if site in introduced and site not in scores]
    if scores and unscored:
        notes.append(f"Not among the last scores, and so in neither mean nor worst: {', '.join(unscored)}.")
    differing = [name for name, versions in _software(introduced).items() if versions and " / " in versions]
    if differing:
        each = "; ".join(f"{name} {_by_version(name, introduced)}" for name in differing)
        notes.append(f"The sites ran different versions: {each}.")
    programs = {event.get("application") for event in introduced.values()} - {None, ""}
    if len(programs) > 1:
        notes.append(f"The sites ran {len(programs)} different builds of the program; report.json names each.")
    strangers = sum(event["event"] == "stranger" for event in events)
    if strangers:
        notes.append(f"Left out, as of no site of this run or a second answer: {plural(strangers, 'message')}.")
    return notes


def sampling_notes(plan: RunPlan, events: Sequence[Event]) -> list[str]:
    """How many sites a round asked, and how often each was, where a run draws a part of them."""
    rounds = [event for event in committed_rounds(events) if "chosen" in event]
    if plan.sample is None or not rounds:
        return []
    often = [sum(site in event["chosen"] for event in rounds) for site in plan.roster]
    more = f", and up to {plan.over_select} more to spare" if plan.over_select else ""
    return [
        f"Each round asked {plan.sample_size} of {plural(len(plan.roster), 'site')}{more}, drawn by "
        f"the run's seed: in {plural(len(rounds), 'round')} a site was asked {min(often)} to {max(often)} times. "
        "Scores are of all sites."
    ]


def privacy_notes(plan: RunPlan, events: Sequence[Event]) -> list[str]:
    """What is known, and what is withheld, of sites that trained with differential privacy."""
    spent = {site: epsilon for site in plan.roster if (epsilon := spent_privacy(events, site)[0]) is not None}
    if not spent:
        return []
    each = ", ".join(f"{site} {epsilon:.2f}" for site, epsilon in spent.items())
    return [
        f"Trained with patient-level differential privacy: {each} (epsilon that the site's patients have spent in all, "
        "over all its runs, add or remove one patient). Their losses, times and numbers of patients are withheld, and "
        "so are their scores unless the site declared its held-out patients public; they count by planned weights."
    ]


def personal_notes(plan: RunPlan) -> list[str]:
    """What is a site's own, and what that means for the model that is handed out."""
    task = plan.task
    if task.personalisation.splits:
        kept = "normalisation layers" if task.personalisation.kind == "local_norms" else "decoder"
        return [
            f"Each site keeps the model's {kept} to itself (personalisation {task.personalisation.kind}): scores are "
            "of the common weights with each site's own. In model.safetensors these are as the run began with them, "
            "so for a site that took no part it has to be trained on; each site's whole model lies at the site "
            "(models/)."
        ]
    if task.personalisation.trains_a_second:
        return [
            "Personalised: each site's own second model, trained on its patients and kept there (personalisation "
            f"{task.personalisation.kind}); it is scored on the same held-out patients of that site alone, and says "
            "nothing about other hospitals."
        ]
    return []


def selection_notes(plan: RunPlan, events: Sequence[Event]) -> list[str]:
    """How the model that is handed out was chosen, where it is not simply the last round's; who was suspended."""
    notes = [
        f"{event['site']} was suspended after round {event['round']}: {plural(event['strikes'], 'update')} in a row "
        "had been rejected."
        for event in events
        if event["event"] == "suspended"
    ]
    chosen = next((event for event in reversed(events) if event["event"] == "selected"), None)
    if chosen is not None:
        over = "lowest Dice of a site" if chosen["by"] == "worst" else "mean Dice"
        early = (
            f" of {chosen['rounds']} rounds"
            if chosen["rounds"] == plan.task.rounds
            else (f"; the run ended early after round {chosen['rounds']} of {plan.task.rounds}")
        )
        notes.append(
            f"The model is that of round {chosen['round']}{early}: it has the best {over} on the held-out patients, so "
            "the figures for it are a little too good."
        )
    if plan.strategy.ema > 0:
        notes.append(
            f"The model is an average over rounds (decay {plan.strategy.ema:g}); its scores are the average's."
        )
    return notes


def _by_version(program: str, introduced: Mapping[str, Event]) -> str:
    """ "2.11.0 (alder, elm), 2.12.0 (birch)"."""
    sites: dict[str, list[str]] = {}
    for site, event in introduced.items():
        sites.setdefault(str((event.get("software") or {}).get(program, "not stated")), []).append(site)
    return ", ".join(f"{version} ({', '.join(names)})" for version, names in sorted(sites.items()))


def _model_notes(path: Path, report: Mapping[str, Any]) -> list[str]:
    """The model beside the report must be the one the report speaks of."""
    finished = report["progress"]["state"] == "finished"
    if not path.exists():
        return ["The model is not in the run folder (model.safetensors is missing)."] if finished else []
    found, due = hash_weights(read_tensors(path)[0]), report["model"]["hash"]
    if found != due:
        raise UserError(
            f"{path}: holds the model {found[:12]}, the journal's last round ended with {str(due)[:12]}; no report was "
            "written, for it would speak of another model. Put the run's own file back, or move this one away."
        )
    return []
