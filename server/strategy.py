"""Federated averaging as a Flower Strategy with a streaming loop of its own.

Flower's loop keeps every reply of a round in memory and cannot resume. This one pulls one reply at a time, screens it,
folds it into the fixed-point sum and frees it; a round is committed by its checkpoint before anything else happens.
FedAvg: McMahan et al. 2017, algorithm 1. FedProx (Li et al. 2020) differs at the sites alone (`TrainTask.proximal_mu`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from client.contract import (
    Assignment,
    ContractError,
    Presence,
    Scores,
    arrays_from_wire,
    arrays_to_wire,
    from_wire,
    to_wire,
)
from medsegdiff.errors import UserError
from medsegdiff.labels import LabelScheme
from medsegdiff.progress import Progress, report
from medsegdiff.weights import hash_weights, weight_shapes
from server.aggregation import AggregationOverflow, FixedPointSum, apply_update
from server.checkpoints import Checkpoint, CheckpointStore
from server.config import RunPlan
from server.journal import Journal
from server.screening import Accepted, Expected, Rejection, screen_scores, screen_update, short_reason

log = logging.getLogger("medsegfed.server")

POLL_SECONDS = 0.2  # between looks for replies when none came; Flower's default of 3 s dominates short rounds


class FederatedAveraging(Strategy):
    """Rounds of one run plan, resumable at any round.

    Args:
        plan: what to run and who may take part.
        store: where rounds are committed.
        journal: where events are told.
    """

    def __init__(self, plan: RunPlan, store: CheckpointStore, journal: Journal) -> None:
        self.plan = plan
        self.store = store
        self.journal = journal
        self.shapes = weight_shapes(plan.task.model)
        self.weights: dict[str, Tensor] = {}
        self.model_hash = ""
        self._sites: dict[int, str] = {}  # Flower's node id -> site name, as the site said it
        self._record: dict[str, Any] = {}

    # --- the loop -----------------------------------------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run, or go on with, all rounds up to `num_rounds`; `timeout` is a round's deadline in seconds.

        `initial_arrays` count only when no round was committed yet. The optional configurations and `evaluate_fn` are
        Flower's and not used: what a site is asked stands in the plan's task.

        Raises:
            UserError: fewer usable updates than the quorum.
        """
        first = self._restore(initial_arrays)
        result = Result()
        for round_ in range(first, num_rounds + 1):
            if round_ > first:
                self._meet_sites(grid, timeout)
                replies = self._stream(grid, self._round_messages(MessageType.TRAIN, round_), timeout)
                self.aggregate_train(round_, replies)
            if self._due(round_) and self.journal.last("scores", round=round_, model_hash=self.model_hash) is None:
                self._meet_sites(grid, timeout)
                replies = self._stream(grid, self._round_messages(MessageType.EVALUATE, round_), timeout)
                metrics = self.aggregate_evaluate(round_, replies)
                if metrics is not None:
                    result.evaluate_metrics_clientapp[round_] = metrics
        result.arrays = arrays_to_wire(self.weights)
        return result

    def _restore(self, initial_arrays: ArrayRecord) -> int:
        """Load the last committed round (or commit round 0); returns its number."""
        checkpoint = self.store.latest(self.plan.run_id)
        if checkpoint is None:
            weights = arrays_from_wire(initial_arrays, self.shapes)
            checkpoint = Checkpoint(self.plan.run_id, 0, weights, {"round": 0, "model_hash": hash_weights(weights)})
            self.store.save(checkpoint)
        if self.journal.last("round", round=checkpoint.round) is None:  # killed between the commit and its telling
            self.journal.append("round", **checkpoint.record)
        self.weights, self.model_hash = checkpoint.weights, hash_weights(checkpoint.weights)
        return checkpoint.round

    def _due(self, round_: int) -> bool:
        return round_ > 0 and (round_ % self.plan.evaluate_every == 0 or round_ == self.plan.task.rounds)

    # --- who takes part -----------------------------------------------------------------------------------------------

    def _meet_sites(self, grid: Grid, timeout: float) -> None:
        """Ask nodes that have not introduced themselves; names that are not on the roster are left out."""
        deadline = time.monotonic() + timeout
        while not (nodes := set(grid.get_node_ids())) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self._sites = {node: site for node, site in self._sites.items() if node in nodes}
        strangers = sorted(nodes - set(self._sites))
        if not strangers:
            return
        task = to_wire(self.plan.task)
        questions = [Message(RecordDict({"task": task}), node, MessageType.QUERY) for node in strangers]
        for reply in self._stream(grid, questions, timeout):
            self._introduce(reply)

    def _introduce(self, reply: Message) -> None:
        node = reply.metadata.src_node_id
        try:
            if reply.has_error():
                raise ContractError(f"a site could not answer (code {reply.error.code}): {reply.error.reason}")
            site = from_wire(reply.content, "presence", Presence).site
            if site not in self.plan.roster:
                raise ContractError(f"'{site[:40]}' is not on the roster ({', '.join(self.plan.roster)})")
            if site in self._sites.values():
                raise ContractError(f"'{site}' is here twice; the first one counts")
        except Exception as error:  # one stranger must not end the run of the others
            reason = short_reason(error)
            log.warning("a node is left out: %s", reason)
            self.journal.append("stranger", reason=reason)
            return
        self._sites[node] = site

    # --- Flower's interface -------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One training message per site that introduced itself."""
        return self._round_messages(MessageType.TRAIN, server_round)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One evaluation message per site that introduced itself."""
        return self._round_messages(MessageType.EVALUATE, server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies one by one and commit the round.

        Raises:
            UserError: fewer usable updates than the quorum; the last committed round stays.
        """
        total = FixedPointSum(self.shapes)
        accepted: dict[str, dict[str, Any]] = {}
        rejected: dict[str, str] = {}
        received = 0
        for site, reply in self._once_each(server_round, replies):
            outcome = screen_update(reply, self._expected(site, server_round))
            if isinstance(outcome, Accepted):
                outcome = self._fold(total, outcome)
            if isinstance(outcome, Rejection):
                rejected[site] = outcome.reason
                log.warning("round %d: %s is left out: %s", server_round, site, outcome.reason)
                self.journal.append("rejected", round=server_round, site=site, reason=outcome.reason)
                continue
            update = outcome.update
            accepted[site] = {"patients": update.patients, "loss": update.loss, "seconds": update.seconds}
            received += outcome.bytes
        absent = [site for site in self.plan.roster if site not in accepted and site not in rejected]
        if len(accepted) < self.plan.required:
            raise self._below_quorum(server_round, accepted, rejected, absent)
        sent = 4 * sum(math.prod(shape) for shape in self.shapes.values()) * (len(accepted) + len(rejected))
        self._commit(server_round, total, accepted, rejected, absent, {"up": received, "down": sent})
        mean_loss = math.fsum(a["patients"] * a["loss"] for a in accepted.values()) / total.total
        report(Progress("round", server_round, self.plan.task.rounds, round=server_round, loss=mean_loss))
        return arrays_to_wire(self.weights), MetricRecord({"loss": mean_loss})

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect every site's averages; returns the mean Dice over sites."""
        scores: dict[str, Scores] = {}
        for site, reply in self._once_each(server_round, replies):
            outcome = screen_scores(reply, self._expected(site, server_round))
            if isinstance(outcome, Rejection):
                log.warning("round %d: the scores of %s are left out: %s", server_round, site, outcome.reason)
                self.journal.append("rejected", round=server_round, site=site, reason=outcome.reason)
            else:
                scores[site] = outcome
        told = {site: _told(scores[site]) for site in self.plan.roster if site in scores}
        self.journal.append("scores", round=server_round, model_hash=self.model_hash, sites=told)
        dice = [s.dice for s in scores.values() if s.dice is not None]
        if not dice:
            return None
        mean = math.fsum(dice) / len(dice)
        report(Progress("round", server_round, self.plan.task.rounds, round=server_round, dice=mean))
        return MetricRecord({"dice": mean})

    def summary(self) -> None:
        """Log what is about to run."""
        task = self.plan.task
        log.info(
            "%s: %s, %d rounds x %d steps", self.plan.run_id, self.plan.strategy.name, task.rounds, task.local_steps
        )

    # --- one round ----------------------------------------------------------------------------------------------------

    def _round_messages(self, kind: str, round_: int) -> Iterator[Message]:
        """Messages share one set of records: sending to many sites does not multiply the model in memory."""
        records: dict[str, ArrayRecord | ConfigRecord | MetricRecord] = {
            "task": to_wire(self.plan.task),
            "assignment": to_wire(Assignment(self.plan.run_id, round_, self.model_hash)),
            "weights": arrays_to_wire(self.weights),
        }
        for node in sorted(self._sites, key=self._sites.__getitem__):
            yield Message(RecordDict({**records}), node, kind, group_id=str(round_))

    def _stream(self, grid: Grid, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        """Send, then yield replies one at a time as they come, until all are here or the deadline has passed."""
        pending = list(grid.push_messages(messages))
        deadline = time.monotonic() + timeout
        while pending:
            came = False
            for message_id in list(pending):
                for reply in grid.pull_messages([message_id]):
                    pending.remove(message_id)
                    came = True
                    yield reply
            if time.monotonic() > deadline:
                return
            if pending and not came:
                time.sleep(POLL_SECONDS)

    def _once_each(self, round_: int, replies: Iterable[Message]) -> Iterator[tuple[str, Message]]:
        """Each site's first reply; one of an unknown node, or a second one, must not be folded."""
        seen: set[str] = set()
        for reply in replies:
            site = self._sites.get(reply.metadata.src_node_id)
            if site is None or site in seen:
                reason = "a reply of a node that was not asked" if site is None else f"a second reply of {site}"
                log.warning("round %d: %s is left out", round_, reason)
                self.journal.append("stranger", round=round_, reason=reason)
                continue
            seen.add(site)
            yield site, reply

    def _expected(self, site: str, round_: int) -> Expected:
        plan, targets = self.plan, LabelScheme.of(self.plan.task.dataset).targets
        steps, enrolled = plan.task.local_steps, plan.roster[site]
        return Expected(site, plan.run_id, round_, self.model_hash, steps, enrolled, self.shapes, targets)

    @staticmethod
    def _fold(total: FixedPointSum, outcome: Accepted) -> Accepted | Rejection:
        try:
            total.add(outcome.delta, outcome.update.patients)
        except AggregationOverflow as error:
            return Rejection(outcome.update.site, str(error))
        return outcome

    def _commit(
        self,
        round_: int,
        total: FixedPointSum,
        accepted: dict[str, dict[str, Any]],
        rejected: dict[str, str],
        absent: list[str],
        moved: dict[str, int],
    ) -> None:
        weights = apply_update(self.weights, total.mean())
        record: dict[str, Any] = {
            "round": round_,
            "model_hash": hash_weights(weights),
            "accepted": dict(sorted(accepted.items())),
            "rejected": dict(sorted(rejected.items())),
            "absent": absent,
            "bytes": moved,
        }
        self.store.save(Checkpoint(self.plan.run_id, round_, weights, record))
        self.weights, self.model_hash = weights, record["model_hash"]
        self.journal.append("round", **record)

    def _below_quorum(
        self, round_: int, accepted: dict[str, Any], rejected: dict[str, str], absent: list[str]
    ) -> UserError:
        reasons = [f"{site} was rejected ({reason})" for site, reason in sorted(rejected.items())]
        asked = set(self._sites.values())
        reasons += [
            f"{site} did not answer within {self.plan.deadline_seconds:g} s"
            if site in asked
            else f"{site} did not introduce itself, its own log says why"
            for site in absent
        ]
        self.journal.append("below_quorum", round=round_, accepted=sorted(accepted), rejected=rejected, absent=absent)
        return UserError(
            f"round {round_}: {len(accepted)} of {len(self.plan.roster)} sites gave a usable update, the quorum is "
            f"{self.plan.required}: {'; '.join(reasons)}. Rounds up to {round_ - 1} are kept. Mend the sites and go on "
            "with --resume, or lower run.quorum."
        )


def _told(scores: Scores) -> dict[str, Any]:
    return {
        "patients": scores.patients,
        "dice": scores.dice,
        "dice_by_target": scores.dice_by_target,
        "hd95_mm": scores.hd95_mm,
        "hd95_undefined": scores.hd95_undefined,
        "seconds": scores.seconds,
    }
