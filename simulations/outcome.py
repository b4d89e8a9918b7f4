"""What came out of a simulation: scores of every model at every site, example cases, the report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from client.contract import TrainTask
from client.evaluation import score_held_out, summarise
from client.personal import FOLDER
from client.personalisation import common_shapes
from client.site import Site
from medsegdiff.data.geometry import restore, to_slices
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.evaluation import segment_prepared
from medsegdiff.files import write_atomic
from medsegdiff.metrics import dice, majority
from medsegdiff.weights import Segmenter, build, hash_weights, load_model
from server.config import RunPlan
from server.journal import Event, Journal
from server.outcome import (
    arm_score,
    describe_run,
    own_scores,
    personal_notes,
    privacy_notes,
    sampling_notes,
    seconds_row,
    selection_notes,
)
from server.report import Example, write_report
from server.rounds import (
    absences,
    committed_rounds,
    history,
    released_round,
    site_seconds,
    spent_privacy,
    traffic,
    working_seconds,
)
from server.summary import hardware, software
from simulations.recipe import Recipe

SiteScores = dict[str, dict[str, Any]]  # site -> what `summarise` returns, and seconds
ARMS = ("federated", "personalised", "local", "pooled")
EXAMPLE_MEMBERS = 5  # samples behind an example's uncertainty


@dataclass(frozen=True)
class Outcome:
    """Where the results are."""

    folder: Path
    report: dict[str, Any]
    html: Path


def score_models(
    sites: Mapping[str, Site],
    task: TrainTask,
    models: Mapping[str, Mapping[str, Tensor]],
    path: Path,
    run: str = "",
) -> dict[str, SiteScores]:
    """Every model on every site's held-out patients; what an earlier session scored is read from `path`.

    Args:
        run: the run of the federated model, of which a part may be the sites' own.
    """
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, weights in models.items():
        identity = hash_weights(weights)
        if known.get(name, {}).get("model_hash") != identity:
            of_run = run if name == "federated" else ""
            results = {
                site_name: _score(site, task, site_weights(site, task, weights, of_run))
                for site_name, site in sites.items()
            }
            known[name] = {"model_hash": identity, "sites": results}
            write_atomic(path, json.dumps(known, indent=1, allow_nan=False).encode())
    return {name: known[name]["sites"] for name in models}


def site_weights(site: Site, task: TrainTask, weights: Mapping[str, Tensor], run: str) -> Mapping[str, Tensor]:
    """A run's model as a site uses it: with its own weights where the run leaves some to the sites."""
    path = site.path.parent / FOLDER / f"{run}.safetensors"
    if not task.personalisation.splits or not run or not path.exists():
        return weights
    own, common = load_model(path).network.state_dict(), common_shapes(task)
    return {name: value if name in common else own[name] for name, value in weights.items()}


def _score(site: Site, task: TrainTask, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    started = time.perf_counter()
    summary = summarise(score_held_out(site, task, weights))
    return {**summary, "seconds": time.perf_counter() - started}


def write_outcome(
    folder: Path,
    recipe: Recipe,
    plan: RunPlan,
    sites: Mapping[str, Site],
    models: Mapping[str, SiteScores],
    weights: Mapping[str, Tensor],
    arm_seconds: float,
) -> Outcome:
    """Assemble report.json and draw report.html.

    Args:
        models: scores of "local-SITE" and "pooled" models at every site; the federation's are in the journal.
        weights: the federated model, for the example cases.
        arm_seconds: spent training the comparison arms.
    """
    journal = Journal(folder / "journal.jsonl")
    events = journal.events
    last = journal.last("scores", round=released_round(events))
    scores = {"federated": last["sites"] if last else {}, **models}
    if own := own_scores(scores["federated"]):
        scores["personalised"] = own
    examples = example_cases(sites, plan, weights)
    report = {
        **describe_run(plan),
        "progress": {"state": "finished", "committed": len(committed_rounds(events)), "scored": released_round(events)},
        "arms": {arm: _over_sites(scores, sites, arm) for arm in ARMS if _present(arm, scores)},
        "sites": {name: _site_row(name, site, plan, scores, events) for name, site in sites.items()},
        "history": history(events),
        "cross_site": _cross_site(scores, sites),
        "notes": [
            *_notes(recipe),
            *_arm_notes(plan, scores, sites, events),
            *_step_notes(plan, scores, events),
            *privacy_notes(plan, events),
            *personal_notes(plan),
            *sampling_notes(plan, events),
            *selection_notes(plan, events),
        ],
        "software": software(),
        "hardware": hardware(plan.task.threads),
        "seconds": _seconds(events, models, arm_seconds),
        "bytes": traffic(events),
    }
    html = write_report(folder, report, examples)
    return Outcome(folder, report, html)


def _model_of(arm: str, site: str) -> str:
    """The model an arm gives to a site: its own in `local`, the common one otherwise."""
    return f"local-{site}" if arm == "local" else arm


def _present(arm: str, scores: Mapping[str, SiteScores]) -> bool:
    return any(name == arm or name.startswith(f"{arm}-") for name in scores)


def _over_sites(scores: Mapping[str, SiteScores], sites: Mapping[str, Site], arm: str) -> dict[str, float | None]:
    """Mean and worst of an arm, over the sites that every compared arm has scores of."""
    return arm_score([scores[_model_of(arm, name)].get(name, {}).get("dice") for name in _compared(scores, sites)])


def _compared(scores: Mapping[str, SiteScores], sites: Iterable[str]) -> list[str]:
    """The sites that are scored in all of federated, local and pooled training, as far as these were carried out."""
    arms = [arm for arm in ("federated", "local", "pooled") if _present(arm, scores)]

    def scored(arm: str, site: str) -> bool:
        return scores[_model_of(arm, site)].get(site, {}).get("dice") is not None

    return [site for site in sites if all(scored(arm, site) for arm in arms)] or list(sites)


def _arm_notes(
    plan: RunPlan, scores: Mapping[str, SiteScores], sites: Iterable[str], events: Iterable[Event]
) -> list[str]:
    """What a reader of the comparison would otherwise take for granted."""
    beside = _present("local", scores) or _present("pooled", scores)
    notes = []
    left_out = sorted(set(sites) - set(_compared(scores, sites)))
    if left_out:
        notes.append(
            f"Not scored in every arm, and left out of all means and worst sites: {', '.join(left_out)} (suspended, or "
            "its scoring failed)."
        )
    if beside and any(event["event"] == "selected" for event in events):
        notes.append(
            "Local-only and pooled training hand out their last model, the federation the one with the best scores on "
            "the patients that all are compared on: the comparison favours the federation by that choice."
        )
    if beside and plan.task.privacy is not None:
        notes.append(
            "Local-only and pooled training were without privacy: no noise, and all weights trained. The comparison "
            "shows what privacy costs, not what a site could do alone with the same promise to its patients."
        )
    return notes


def _step_notes(plan: RunPlan, scores: Mapping[str, SiteScores], events: Sequence[Event]) -> list[str]:
    """Where sites were sampled, away or left out, or the run ended early: the other arms had more training."""
    if not (_present("local", scores) or _present("pooled", scores)):
        return []
    task, rounds = plan.task, committed_rounds(events)
    counted = {site: sum(site in event["accepted"] for event in rounds) for site in plan.roster}
    fewer = [f"{site} {n * task.local_steps}" for site, n in sorted(counted.items()) if n < task.rounds]
    if not fewer:
        return []
    due = task.rounds * task.local_steps
    return [
        f"Local-only training took {due} steps a site, pooled training {due * len(plan.roster)}; in the federation "
        f"fewer counted: {', '.join(fewer)}. The arms did not do the same work."
    ]


def _site_row(
    name: str, site: Site, plan: RunPlan, scores: Mapping[str, SiteScores], events: Sequence[Event]
) -> dict[str, Any]:
    data = site.data(plan.task)
    epsilon, delta = spent_privacy(events, name)
    own = {arm: scores[_model_of(arm, name)].get(name, {}) for arm in ARMS if _present(arm, scores)}
    return {
        "patients": {"train": data.train_patients, "test": data.test_patients},
        "dice": {arm: row.get("dice") for arm, row in own.items()},
        "dice_by_target": {arm: row.get("dice_by_target", {}) for arm, row in own.items()},
        "hd95_mm": {arm: row.get("hd95_mm") for arm, row in own.items()},
        "hd95_undefined": {arm: row.get("hd95_undefined", 0) for arm, row in own.items()},
        "epsilon": epsilon,
        "privacy_delta": delta,
        "faults": data.faults,
        **absences(events, name),
    }


def _cross_site(scores: Mapping[str, SiteScores], sites: Mapping[str, Site]) -> dict[str, Any] | None:
    local = [f"local-{name}" for name in sites]
    if not all(name in scores for name in local):
        return None
    names = [*local, *(name for name in ("federated", "pooled") if name in scores)]
    return {
        "models": [name.removeprefix("local-") for name in names],
        "sites": list(sites),
        "dice": [[scores[model].get(site, {}).get("dice") for site in sites] for model in names],
    }


def _notes(recipe: Recipe) -> list[str]:
    notes = [recipe.world.note] if recipe.world.note else []
    if recipe.world.phantoms is not None:
        notes.append(
            "The patients are phantoms drawn by the program: the figures say how the method behaves, not how good it "
            "is on scans."
        )
    elif recipe.world.partition.by != "site":
        notes.append(
            "The dataset was split into hospitals artificially; real hospitals differ more than these sites do."
        )
    if recipe.run.selection.by == "last":
        notes.append("Nothing was selected on held-out patients: the model of the last round is scored as it is.")
    return notes


def _seconds(events: Sequence[Event], models: Mapping[str, SiteScores], arm_seconds: float) -> dict[str, float | None]:
    train, evaluate = site_seconds(events, sum)  # one machine plays the sites in turn
    train = train + arm_seconds if train is not None else None
    evaluate += sum(row["seconds"] for rows in models.values() for row in rows.values())
    return seconds_row(working_seconds(events, now=time.time()), train, evaluate)


def example_cases(sites: Mapping[str, Site], plan: RunPlan, weights: Mapping[str, Tensor]) -> list[Example]:
    """One held-out case per site: the slice with most foreground of the site's first held-out patient that has any.

    Args:
        weights: of the common model; where a part of it is the sites' own, each is asked with its own.
    """
    task = plan.task
    sampling = replace(task.sampling, members=max(EXAMPLE_MEMBERS, task.sampling.members))
    examples = []
    for name, site in sites.items():
        segmenter = build(task.card, site_weights(site, task, weights, plan.run_id))
        candidates = [case for case in site.data(task).test if case.foreground(segmenter.scheme)]
        if candidates:
            prepared = candidates[0]
            answer = next(segment_prepared(segmenter, [prepared], sampling, task.seed))
            examples.append(_example(name, prepared, segmenter, answer.masks, answer.uncertainty))
    return examples


def _example(site: str, prepared: PreparedCase, segmenter: Segmenter, masks: Tensor, uncertainty: Tensor) -> Example:
    truth = majority(prepared.native_labels(), segmenter.scheme)
    geometry = prepared.geometry
    truth_slices, mask_slices = to_slices(truth, geometry), to_slices(masks, geometry)
    index = int(truth_slices.flatten(1).sum(dim=1).argmax())
    both, predicted, true = (int(m.sum()) for m in (truth & masks, masks, truth))
    image = prepared.image(index)[0]
    return Example(
        site=site,
        title=f"held-out patient, slice {index + 1} of {prepared.slices}",
        image=_at_native_size(image, prepared),
        truth=truth_slices[index].numpy(),
        prediction=mask_slices[index].numpy(),
        uncertainty=to_slices(uncertainty[None], geometry)[index, 0].numpy(),
        targets=segmenter.scheme.targets,
        dice=dice(both, predicted, true),
    )


def _at_native_size(image: Tensor, prepared: PreparedCase) -> Any:
    return restore(image[None, None], prepared.geometry)[0, 0].numpy()
