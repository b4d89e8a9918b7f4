"""Federated averaging as a Flower Strategy with a streaming loop of its own.

Flower's loop keeps every reply of a round in memory and cannot resume. This one pulls one reply at a time, screens it,
folds it into the fixed-point sum and frees it; a round is committed by its checkpoint before anything else happens.
FedAvg: McMahan et al. 2017, algorithm 1. FedProx (Li et al. 2020) differs at the sites alone (`TrainTask.proximal_mu`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from client.contract import Assignment, Scores, arrays_from_wire, arrays_to_wire, to_wire
from medsegdiff.errors import UserError
from medsegdiff.labels import LabelScheme
from medsegdiff.progress import Progress, report
from medsegdiff.weights import hash_weights, weight_shapes
from server.aggregation import AggregationOverflow, FixedPointSum, apply_update
from server.checkpoints import Checkpoint, CheckpointStore
from server.config import RunPlan
from server.exchange import Exchange, Records
from server.grid import BoundedGrid
from server.journal import Journal
from server.membership import Membership
from server.screening import Accepted, Expected, Rejection, screen_scores, screen_update

log = logging.getLogger("medsegfed.server")


class FederatedAveraging(Strategy):
    """Rounds of one run plan, resumable at any round.

    Args:
        plan: what to run and who may take part.
        store: where rounds are committed.
        journal: where events are told.
        membership: a real federation's members and audit log; None in a simulation.
        stopped: whether the coordinator wants the run to end.
    """

    def __init__(
        self,
        plan: RunPlan,
        store: CheckpointStore,
        journal: Journal,
        membership: Membership | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.plan = plan
        self.store = store
        self.journal = journal
        self.membership = membership
        self.stopped = stopped
        self.shapes = weight_shapes(plan.task.model)
        self.weights: dict[str, Tensor] = {}
        self.model_hash = ""
        self.exchange: Exchange | None = None  # conversations over the grid of `start`
        self._round = 0  # the round at hand
        self._usable = 0  # updates folded in it
        self._rejected: set[str] = set()  # sites whose updates were left out of it

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
        """Run, or go on with, all rounds up to `num_rounds`.

        `initial_arrays` count only when no round was committed yet. `timeout`, the optional configurations and
        `evaluate_fn` are Flower's and not used: what a site is asked, and for how long, stands in the plan.

        Raises:
            UserError: fewer usable updates than the quorum.
        """
        first = self._restore(initial_arrays)
        bounded = BoundedGrid.over(grid, 4 * sum(math.prod(shape) for shape in self.shapes.values()))
        self.exchange = Exchange(bounded, self.plan, self.journal, self.membership, self.stopped)
        result = Result()
        for round_ in range(first, num_rounds + 1):
            if round_ > first:
                self._round, self._usable, self._rejected = round_, 0, set()
                self.aggregate_train(round_, self._train(round_))
            if self._due(round_) and self.journal.last("scores", round=round_, model_hash=self.model_hash) is None:
                metrics = self.aggregate_evaluate(round_, self._evaluate(round_))
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
        if checkpoint.round and self.membership is not None:
            done = {"run": self.plan.run_id, "round": checkpoint.round}
            if not self.membership.has("committed", **done):
                self._note_commit(checkpoint.record)
        self.weights, self.model_hash = checkpoint.weights, hash_weights(checkpoint.weights)
        return checkpoint.round

    def _sites_before(self, round_: int) -> set[str]:
        """Whose updates made this round when it was committed before, and its checkpoint was damaged since.

        Later rounds stand on that commit at the sites: it has to come out the same, from the same sites.
        """
        before = self.journal.last("round", round=round_)
        return set(before["accepted"]) if before is not None else set()

    def _due(self, round_: int) -> bool:
        return round_ > 0 and (round_ % self.plan.evaluate_every == 0 or round_ == self.plan.task.rounds)

    def _train(self, round_: int) -> Iterator[tuple[str, Message]]:
        assert self.exchange is not None
        return self.exchange.ask(
            MessageType.TRAIN, round_, lambda: self._records(round_), self._enough, self.plan.absence_seconds
        )

    def _evaluate(self, round_: int) -> Iterator[tuple[str, Message]]:
        """Scores of whoever is there: nobody is waited for."""
        assert self.exchange is not None
        return self.exchange.ask(MessageType.EVALUATE, round_, lambda: self._records(round_), lambda: True, 0.0)

    def _enough(self) -> bool:
        return self._usable >= self._required(self._round)

    def _required(self, round_: int) -> int:
        """Updates without which a round does not count: the quorum; by default, all.

        In a real federation "all" means who is a member at this moment and whose answer was not rejected: one site that
        answers nonsense must not end the run of the others.
        """
        if before := self._sites_before(round_):
            return len(before)
        if self.plan.quorum is not None or self.membership is None or self.exchange is None:
            return self.plan.required
        counting = (site for site in self.plan.roster if site not in self._rejected)
        return max(1, sum(self.exchange.is_member(site) for site in counting))

    # --- Flower's interface -------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One training message per site that has introduced itself."""
        return self._messages(MessageType.TRAIN, server_round)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One evaluation message per site that has introduced itself."""
        return self._messages(MessageType.EVALUATE, server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Any]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies, pairs of site and message, one by one and commit the round.

        Raises:
            UserError: fewer usable updates than the quorum; the last committed round stays.
        """
        total = FixedPointSum(self.shapes)
        accepted: dict[str, dict[str, Any]] = {}
        rejected: dict[str, str] = {}
        received = 0
        before = self._sites_before(server_round)
        for site, reply in replies:
            if before and site not in before:
                continue
            outcome = screen_update(reply, self._expected(site, server_round))
            if isinstance(outcome, Accepted):
                outcome = self._fold(total, outcome)
            if isinstance(outcome, Rejection):
                rejected[site] = outcome.reason
                self._rejected.add(site)
                self._reject(server_round, outcome)
                continue
            update = outcome.update
            self._usable += 1
            said = {"patients": update.patients, "delta": update.delta_hash, "decision": "accepted"}
            self._note("update", server_round, site, **said)
            accepted[site] = {"patients": update.patients, "loss": update.loss, "seconds": update.seconds}
            received += outcome.bytes
        absent = [site for site in self.plan.roster if site not in accepted and site not in rejected]
        if len(accepted) < self._required(server_round):
            raise self._below_quorum(server_round, accepted, rejected, absent)
        sent = 4 * sum(math.prod(shape) for shape in self.shapes.values()) * (len(accepted) + len(rejected))
        self._commit(server_round, total, accepted, rejected, absent, {"up": received, "down": sent})
        mean_loss = math.fsum(a["patients"] * a["loss"] for a in accepted.values()) / total.total
        report(Progress("round", server_round, self.plan.task.rounds, round=server_round, loss=mean_loss))
        return arrays_to_wire(self.weights), MetricRecord({"loss": mean_loss})

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Any]) -> MetricRecord | None:
        """Collect every site's averages; returns the mean Dice over sites."""
        scores: dict[str, Scores] = {}
        for site, reply in replies:
            outcome = screen_scores(reply, self._expected(site, server_round))
            if isinstance(outcome, Rejection):
                self._reject(server_round, outcome)
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

    def _records(self, round_: int) -> Records:
        """What a round's question holds: one set for all sites, so that many sites do not multiply the model."""
        return {
            "assignment": to_wire(Assignment(self.plan.run_id, round_, self.model_hash)),
            "weights": arrays_to_wire(self.weights),
        }

    def _messages(self, kind: str, round_: int) -> list[Message]:
        records = {"task": to_wire(self.plan.task), **self._records(round_)}
        sites = self.exchange.sites if self.exchange is not None else {}
        return [
            Message(RecordDict({**records}), node, kind, group_id=str(round_))
            for node in sorted(sites, key=sites.get)  # type: ignore[arg-type]
        ]

    def _reject(self, round_: int, rejection: Rejection) -> None:
        log.warning("round %d: %s is left out: %s", round_, rejection.site, rejection.reason)
        self.journal.append("rejected", round=round_, site=rejection.site, reason=rejection.reason)
        self._note("update", round_, rejection.site, decision=f"rejected: {rejection.reason}")

    def _note(self, event: str, round_: int, site: str, **fields: Any) -> None:
        """One line in a real federation's audit log: who, under which key, for which run and round, decided how."""
        if self.membership is not None:
            key = self._key_of(site)
            self.membership.note(event, run=self.plan.run_id, round=round_, site=site, key=key, **fields)

    def _key_of(self, site: str) -> str | None:
        return self.exchange.key_of(site) if self.exchange is not None else None

    def _expected(self, site: str, round_: int) -> Expected:
        plan, targets = self.plan, LabelScheme.of(self.plan.task.dataset).targets
        steps, enrolled = plan.task.local_steps, plan.roster[site]
        key = self._key_of(site)
        return Expected(site, plan.run_id, round_, self.model_hash, steps, enrolled, self.shapes, targets, key)

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
        before = self.journal.last("round", round=round_)
        if before is not None and before["model_hash"] != record["model_hash"]:
            raise UserError(
                f"round {round_}: was committed with model {before['model_hash'][:12]}; repeated after its checkpoint "
                f"was damaged, it comes out as {record['model_hash'][:12]}, and later rounds stand on the first. "
                "Restore the run's checkpoints from a backup, or start a new run."
            )
        self.store.save(Checkpoint(self.plan.run_id, round_, weights, record))
        self.weights, self.model_hash = weights, record["model_hash"]
        self.journal.append("round", **record)
        if self.membership is not None:
            self._note_commit(record)

    def _note_commit(self, record: dict[str, Any]) -> None:
        assert self.membership is not None
        self.membership.note(
            "committed",
            run=self.plan.run_id,
            round=record["round"],
            model=record["model_hash"],
            accepted=sorted(record["accepted"]),
            rejected=sorted(record["rejected"]),
            absent=record["absent"],
        )

    @property
    def _again(self) -> str:
        return "--resume" if self.membership is None else "medsegfed run RUN.yaml"

    def _below_quorum(
        self, round_: int, accepted: dict[str, Any], rejected: dict[str, str], absent: list[str]
    ) -> UserError:
        reasons = [f"{site} was rejected ({reason})" for site, reason in sorted(rejected.items())]
        asked = set(self.exchange.sites.values()) if self.exchange is not None else set()
        reasons += [
            f"{site} did not answer within {self.plan.deadline_seconds:g} s"
            if site in asked
            else f"{site} did not introduce itself, its own log says why"
            for site in absent
        ]
        self.journal.append("below_quorum", round=round_, accepted=sorted(accepted), rejected=rejected, absent=absent)
        return UserError(
            f"round {round_}: {len(accepted)} of {len(self.plan.roster)} sites gave a usable update, the quorum is "
            f"{self._required(round_)}: {'; '.join(reasons)}. Rounds up to {round_ - 1} are kept. Mend the sites and"
            f" go on with {self._again}, or lower run.quorum."
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
