"""The Flower ClientApp of a site: three questions it answers, each through policy, contract and update gate."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client.contract import (
    REFUSALS,
    REFUSED,
    Assignment,
    IncompatibleVersion,
    Invitation,
    TrainTask,
    arrays_from_wire,
    from_wire,
)
from client.evaluation import evaluate_site
from client.gate import release_presence, release_scores, release_update
from client.guard import Guard, guard_of
from client.refusal import Refusal
from client.site import Site, open_site
from client.training import train_round
from medsegdiff.errors import UserError
from medsegdiff.weights import hash_weights, weight_shapes

log = logging.getLogger("medsegfed.site")

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who is there, and with how many patients?"""

    def work(site: Site, task: TrainTask, guard: Guard | None) -> RecordDict:
        invitation = from_wire(message.content, "invitation", Invitation)
        if guard is None:
            return release_presence(site.presence(task, invitation))
        guard.admit(task, invitation.run)
        presence = guard.introduce(site.presence(task, invitation), task)
        return release_presence(presence, guard.sign)

    return _answer(message, context, work)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model for a round and return the change of its weights."""

    def work(site: Site, task: TrainTask, guard: Guard | None) -> RecordDict:
        assignment = from_wire(message.content, "assignment", Assignment)
        if guard is not None:
            guard.admit(task, assignment.run, assignment.round)
            if (kept := guard.kept(assignment, task)) is not None:
                return kept
            patients = site.data(task).train_patients
            guard.admit(task, assignment.run, assignment.round, patients, trains=True)
        weights = _model(message, task, assignment)
        update, delta = train_round(site, task, assignment, weights)
        content = release_update(update, delta, weights, guard.sign if guard is not None else None)
        if guard is not None:
            guard.keep(update, delta, content, task)
        return content

    return _answer(message, context, work)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the received model on the held-out patients."""

    def work(site: Site, task: TrainTask, guard: Guard | None) -> RecordDict:
        assignment = from_wire(message.content, "assignment", Assignment)
        if guard is not None:
            guard.admit(task, assignment.run, assignment.round)
        weights = _model(message, task, assignment)
        if guard is not None:
            guard.admit_scoring(task, assignment, site.data(task).train_patients)
            guard.committed(assignment.run, assignment.round)
        scores = evaluate_site(site, task, assignment, weights)
        if guard is None:
            return release_scores(scores)
        guard.note_scores(scores, task)
        return release_scores(scores, guard.sign)

    return _answer(message, context, work)


def _answer(message: Message, context: Context, work: Callable[[Site, TrainTask, Guard | None], RecordDict]) -> Message:
    code, guard = "fault", None
    try:
        site = open_site(site_file(context))
        guard = guard_of(site)
        return Message(work(site, from_wire(message.content, "task", TrainTask), guard), reply_to=message)
    except Refusal as refusal:
        code = refusal.code
        log.warning("%s", refusal)
    except IncompatibleVersion as error:
        code = "incompatible"
        log.error("%s", error)
    except UserError as error:
        log.error("%s", error)
    except Exception:
        log.exception("unexpected fault while answering the server")
    if guard is not None and code in ("fault", "incompatible"):
        guard.note_fault(code)
    # File names and case names stay at home: the server learns a fixed sentence, the site's own log says more.
    return Message(Error(REFUSED, f"{code}: {REFUSALS[code]}"), reply_to=message)


def _model(message: Message, task: TrainTask, assignment: Assignment) -> dict:  # type: ignore[type-arg]
    weights = arrays_from_wire(message.content.array_records["weights"], weight_shapes(task.model))
    if hash_weights(weights) != assignment.model_hash:
        raise UserError("the received model is not the one the server named (its hash differs); nothing was trained.")
    return weights


def site_file(context: Context) -> Path:
    """Which site.yaml this process answers for.

    A real site's runner sets MEDSEGFED_SITE. Virtual sites share one process or one machine: MEDSEGFED_WORLD names the
    folder with one sub-folder per site, and Flower's partition-id the site, in name order.
    """
    own = os.environ.get("MEDSEGFED_SITE")
    if own:
        return Path(own)
    world = os.environ.get("MEDSEGFED_WORLD")
    if not world:
        raise UserError("no site is configured: set MEDSEGFED_SITE to the path of site.yaml.")
    sites = sorted(Path(world).glob("*/site.yaml"))
    return sites[int(context.node_config["partition-id"])]
