"""The Flower ClientApp of a site: three questions it answers, each through policy, contract and update gate."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from client import control, personal
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
from client.feedback import pack
from client.gate import release_presence, release_scores, release_update
from client.guard import Guard, guard_of
from client.personalisation import CONTROL, sent_shapes
from client.private_training import Terms, terms_of, train_privately, wait_for_release, withheld_scores
from client.received import Received
from client.refusal import Refusal
from client.site import Site, open_site
from client.state import SiteState
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
        terms = _terms(site, task, guard, invitation.run)
        presence = site.presence(task, invitation, terms.privacy if terms is not None else None)
        if guard is None:
            return release_presence(presence)
        presence = guard.introduce(presence, task, terms, invitation.ledger_anchor)
        return release_presence(presence, guard.sign)

    return _answer(message, context, work)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model for a round and return the change of its weights."""

    def work(site: Site, task: TrainTask, guard: Guard | None) -> RecordDict:
        asked = time.monotonic()
        assignment = from_wire(message.content, "assignment", Assignment)
        terms = _terms(site, task, guard, assignment.run, assignment.round)
        if guard is not None:
            if (kept := guard.kept(assignment, task)) is not None:
                return kept
            patients = site.data(task).train_patients
            guard.admit(task, assignment.run, assignment.round, patients, trains=True)
        weights = _model(site, message, task, assignment)
        begun = personal.begin_with(site, task, assignment, weights)
        # Before the ledger's reservation: a training that fails must not spend of the budget, again and again.
        own, spent = personal.train_second(site, task, assignment, weights, quietly=terms is not None)
        correction = control.begin(site, task, message, assignment)
        if terms is None:
            update, delta = train_round(site, task, assignment, begun, correction)
        else:
            anchor = guard.keys.anchor if guard is not None else None
            update, delta = train_privately(site, task, assignment, begun, terms, anchor)
        if update.seconds is not None:
            update = replace(update, seconds=update.seconds + spent)
        update, delta, local = personal.set_apart(task, update, delta, begun)
        if correction is not None:
            delta = control.join(delta, correction)
            update = replace(update, delta_hash=hash_weights(delta))
        residuals = SiteState.of(site, "residuals")
        fed_back = residuals.find(assignment) if task.compression.feeds_back else None
        packed = pack(update, delta, task.compression, fed_back)
        signer = guard.sign if guard is not None else None
        base = {name: weights[name.removeprefix(CONTROL)] for name in sent_shapes(task)}
        content = release_update(packed.update, packed.sent, base, signer, task.compression, packed.arrays)
        personal.keep(site, task, assignment, packed.update.delta_hash, own or local)
        if correction is not None:
            control.keep(site, assignment, packed.update.delta_hash, correction, packed.sent)
        if task.compression.feeds_back:
            residuals.keep(assignment, packed.update.delta_hash, packed.residual)
        if guard is not None:
            guard.keep(packed.update, packed.sent, content, task)
        if terms is not None:
            wait_for_release(asked, terms.privacy.answer_every)
        return content

    return _answer(message, context, work)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the received model on the held-out patients."""

    def work(site: Site, task: TrainTask, guard: Guard | None) -> RecordDict:
        asked = time.monotonic()
        assignment = from_wire(message.content, "assignment", Assignment)
        terms = _terms(site, task, guard, assignment.run, assignment.round)
        weights = _model(site, message, task, assignment)
        withheld = terms is not None and terms.privacy.held_out == "withheld"
        if guard is not None:
            guard.admit_scoring(task, assignment, None if withheld else site.data(task).train_patients)
            guard.committed(assignment.run, assignment.round)
        received = Received.of(site)
        if assignment.round < task.rounds:
            received.keep(assignment.run, assignment.model_hash, weights)  # the next round trains it
        else:
            received.forget(assignment.run)
            SiteState.of(site, "residuals").forget(assignment.run)
            SiteState.of(site, "controls").forget(assignment.run)
        scored = personal.scored_model(site, task, assignment, weights)
        scores = withheld_scores(site, assignment) if withheld else evaluate_site(site, task, assignment, scored)
        own = personal.own_model(site, task, assignment, weights, quietly=terms is not None)
        if own is not None and terms is None:  # a score of a model trained without noise would tell of its patients
            scores = personal.with_own_scores(site, task, scores, own)
        if guard is not None:
            guard.note_scores(scores, task)
        content = release_scores(scores, guard.sign if guard is not None else None)
        if terms is not None and task.personalisation.trains_a_second:
            wait_for_release(asked, terms.privacy.answer_every)
        return content

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


def _terms(site: Site, task: TrainTask, guard: Guard | None, run: str, round_: int | None = None) -> Terms | None:
    """Let a request pass and say how it is trained: with privacy, or None. Raises Refusal."""
    return terms_of(site.config.privacy, task) if guard is None else guard.admit(task, run, round_)


def _model(site: Site, message: Message, task: TrainTask, assignment: Assignment) -> dict[str, Tensor]:
    """The model a question is about: sent along, or scored here before."""
    if "weights" not in message.content.array_records:
        found = Received.of(site).find(assignment.run, assignment.model_hash)
        if found is None:
            raise Refusal("model-missing", f"run {assignment.run}: model {assignment.model_hash[:12]} is not here.")
        return found
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
