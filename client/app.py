"""The Flower ClientApp of a site: three questions it answers, each through the contract and the update gate."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client.contract import Assignment, TrainTask, arrays_from_wire, from_wire
from client.evaluation import evaluate_site
from client.gate import release_presence, release_scores, release_update
from client.site import Site, open_site
from client.training import train_round
from medsegdiff.errors import UserError
from medsegdiff.weights import hash_weights, weight_shapes

log = logging.getLogger("medsegfed.site")

REFUSED = 100  # Error.code of a site that will not or cannot answer; the reason stays in the site's own log

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who is there, and with how many patients?"""
    return _answer(message, context, lambda site, task: release_presence(site.presence(task)))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model for a round and return the change of its weights."""

    def work(site: Site, task: TrainTask) -> RecordDict:
        assignment, weights = _model(message, task)
        update, delta = train_round(site, task, assignment, weights)
        return release_update(update, delta, weights)

    return _answer(message, context, work)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the received model on the held-out patients."""

    def work(site: Site, task: TrainTask) -> RecordDict:
        return release_scores(evaluate_site(site, task, *_model(message, task)))

    return _answer(message, context, work)


def _answer(message: Message, context: Context, work: Callable[[Site, TrainTask], RecordDict]) -> Message:
    try:
        site = open_site(site_file(context))
        return Message(work(site, from_wire(message.content, "task", TrainTask)), reply_to=message)
    except UserError as error:
        log.error("%s", error)
    except Exception:
        log.exception("unexpected fault while answering the server")
    # File names and case names stay at home: the server learns that the site refused, its own log says why.
    return Message(Error(REFUSED, "the site could not answer; its own log says why"), reply_to=message)


def _model(message: Message, task: TrainTask) -> tuple[Assignment, dict]:  # type: ignore[type-arg]
    assignment = from_wire(message.content, "assignment", Assignment)
    weights = arrays_from_wire(message.content.array_records["weights"], weight_shapes(task.model))
    if hash_weights(weights) != assignment.model_hash:
        raise UserError("the received model is not the one the server named (its hash differs); nothing was trained.")
    return assignment, weights


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
