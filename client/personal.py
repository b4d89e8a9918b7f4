"""A site's own weights and models: begun, trained, scored and kept here, and never part of what leaves.

Of round r, with w the common model that came and v the site's own:

    local_norms, shared_encoder   train (w's common weights, v's local ones); the change of the common ones leaves, v
                                  is what the local ones have become
    ditto                         train w as ever; and v, from where the last counted round left it, with the gradient
                                  of F(v) + pull / 2 ||v - w||^2 (Li et al. 2021, algorithm 1)
    fine_tune                     whenever w is scored: train a copy of it, from the start each time

v advances with the updates that the server has counted (client/state.py). Whenever a model is scored the site's own one
is written to `models/RUN.safetensors` beside site.yaml, a model file as any other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from client.contract import Assignment, Scores, TrainTask, Update
from client.evaluation import score_held_out, summarise
from client.personalisation import common_shapes
from client.site import Site
from client.state import SiteState
from client.training import make_trainer
from medsegdiff.devices import choose_device
from medsegdiff.files import write_atomic
from medsegdiff.weights import build, hash_weights, serialise

log = logging.getLogger("medsegfed.site")

FOLDER = "models"  # beside site.yaml


def begin_with(site: Site, task: TrainTask, assignment: Assignment, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model that a round's training begins with: the received one, its local weights replaced by the site's own."""
    own = _state(site).find(assignment) if task.personalisation.splits else {}
    return dict(weights) | own


def set_apart(
    task: TrainTask, update: Update, delta: Mapping[str, Tensor], begun: Mapping[str, Tensor]
) -> tuple[Update, dict[str, Tensor], dict[str, Tensor]]:
    """What of a training leaves, and what stays.

    Args:
        delta: trained minus `begun`, all weights.

    Returns:
        The update with the hash of what leaves, the change that leaves, and the trained weights that stay.
    """
    if not task.personalisation.splits:
        return update, dict(delta), {}
    sent = {name: delta[name] for name in common_shapes(task)}
    stays = {name: begun[name] + value for name, value in delta.items() if name not in sent}
    return replace(update, delta_hash=hash_weights(sent)), sent, stays


def train_second(
    site: Site, task: TrainTask, assignment: Assignment, weights: Mapping[str, Tensor], quietly: bool
) -> tuple[dict[str, Tensor], float]:
    """Ditto's second training of a round: from the site's own model, pulled towards the received one.

    Args:
        quietly: whether a training that fails is a matter of the site alone: v then stays as it was. With differential
            privacy, for even that it failed would tell of the patients.

    Returns:
        The model to be kept, empty where there is none, and the seconds that it took.
    """
    if task.personalisation.kind != "ditto":
        return {}, 0.0
    started = time.perf_counter()
    own = _state(site).find(assignment) or dict(weights)  # algorithm 1, line 1: v begins as w
    steps = _steps(task)
    try:
        own = _train(site, task, own, (assignment.round - 1) * steps, task.rounds * steps, weights)
    except Exception:
        if not quietly:
            raise
        log.exception("round %d: this site's own model could not be trained, and stays as it was", assignment.round)
    return own, time.perf_counter() - started


def keep(site: Site, task: TrainTask, assignment: Assignment, delta_hash: str, own: Mapping[str, Tensor]) -> None:
    """Write down a round's own weights before its update leaves. Raises UserError where the disk refuses."""
    if task.personalisation.keeps_state:
        _state(site).keep(assignment, delta_hash, own)


def scored_model(
    site: Site, task: TrainTask, assignment: Assignment, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What is scored for the received model: with the site's own weights in it, where it has some."""
    own = _state(site).find(assignment, scoring=True) if task.personalisation.splits else {}
    return dict(weights) | own


def own_model(
    site: Site, task: TrainTask, assignment: Assignment, weights: Mapping[str, Tensor], quietly: bool
) -> dict[str, Tensor] | None:
    """The site's own model for the scored one, once it was written to where its people find it; None: there is none.

    Args:
        quietly: as for `train_second`; there is none then.

    Raises:
        UserError: the disk refuses.
    """
    if task.personalisation.kind == "none":
        return None
    try:
        own = _own_model(site, task, assignment, weights)
        _hand_over(site, task, assignment, own)
        return own
    except Exception:
        if not quietly:
            raise
        log.exception("round %d: this site's own model could not be made", assignment.round)
        return None


def _own_model(site: Site, task: TrainTask, assignment: Assignment, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    match task.personalisation.kind:
        case "ditto":
            return _state(site).find(assignment, scoring=True) or dict(weights)
        case "fine_tune":
            return _train(site, task, weights, 0, _steps(task), None)
        case _:
            return scored_model(site, task, assignment, weights)


def with_own_scores(site: Site, task: TrainTask, scores: Scores, own: Mapping[str, Tensor]) -> Scores:
    """The scores with those of the site's second model beside them."""
    if not task.personalisation.trains_a_second:
        return scores
    started = time.perf_counter()
    found = summarise(score_held_out(site, task, own, scores.round))
    return replace(
        scores,
        personal_dice=found["dice"],
        personal_hd95_mm=found["hd95_mm"],
        seconds=scores.seconds + time.perf_counter() - started,
    )


def _hand_over(site: Site, task: TrainTask, assignment: Assignment, own: Mapping[str, Tensor]) -> None:
    path = site.path.parent / FOLDER / f"{assignment.run}.safetensors"
    write_atomic(path, serialise(task.card, own), mode=0o600)
    if assignment.round == task.rounds:
        _state(site).settle(assignment)
        log.info("run %s: this site's own model is %s; it was trained on patients and stays here", assignment.run, path)


def _train(
    site: Site,
    task: TrainTask,
    begin: Mapping[str, Tensor],
    first: int,
    total: int,
    towards: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Train a second model; its batches and noise are not those of the common one."""
    segmenter = build(task.card, begin)
    segmenter.network.to(choose_device(site.config.device))
    data = site.data(task)
    trainer = make_trainer(
        segmenter,
        task,
        data.train,
        f"{site.name}/own",
        total,
        task.personalisation.pull or 0.0,
        site.config.compile,
        towards,
    )
    trainer.run(first, first + _steps(task))  # untold: progress is counted in the common model's steps
    return {name: value.detach().cpu().contiguous() for name, value in segmenter.network.state_dict().items()}


def _steps(task: TrainTask) -> int:
    return task.personalisation.steps or task.local_steps


def _state(site: Site) -> SiteState:
    return SiteState.of(site, "personal")
