"""Federated averaging as a Flower Strategy with a streaming loop of its own.

Flower's loop keeps every reply of a round in memory and cannot resume. This one pulls one reply at a time, screens it,
folds it into the fixed-point sum and frees it; a round is committed by its checkpoint before anything else happens.
robust.py has the rules, optimizers.py the steps; FedProx differs at the sites alone (`TrainTask.proximal_mu`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from client.contract import Assignment, Scores, Update, arrays_from_wire, arrays_to_wire, to_wire
from medsegdiff.errors import UserError
from medsegdiff.labels import LabelScheme
from medsegdiff.progress import Progress, report
from medsegdiff.weights import hash_weights, weight_shapes
from server.aggregation import AggregationOverflow
from server.checkpoints import AVERAGE, Checkpoint, CheckpointStore, Committed
from server.config import RunPlan
from server.exchange import Exchange, Records
from server.grid import BoundedGrid
from server.journal import Journal
from server.membership import Membership
from server.optimizers import State, server_step
from server.records import missing_reasons, told_scores, told_update
from server.robust import CENTRE, SPILL, Aggregate, open_aggregate
from server.screening import Expected, Rejection, largest_norm, screen_scores, screen_update
from server.selection import ends_with, select
from server.strikes import strikes_record, suspend_sites, suspended_in

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
        # The round that the next one starts from. Its model stays on the disk: it is in memory while it is sent and
        # while the next one is made of it, not beside the sum of the updates.
        self.committed = Committed(plan.run_id, 0, {"model_hash": ""})
        self.chosen: Checkpoint | None = None  # the round whose model is handed out, once the run has ended
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
        del initial_arrays
        bounded = BoundedGrid.over(grid, 4 * sum(math.prod(shape) for shape in self.shapes.values()))
        self.exchange = Exchange(bounded, self.plan, self.journal, self.membership, self.stopped)
        self._suspend()
        result = Result()
        for round_ in range(first, num_rounds + 1):
            if round_ > first:
                self._round, self._usable, self._rejected = round_, 0, set()
                self.aggregate_train(round_, self._train(round_))
            if (
                self._due(round_)
                and self.journal.last("scores", round=round_, model_hash=self.committed.released_hash) is None
            ):
                metrics = self.aggregate_evaluate(round_, self._evaluate(round_))
                if metrics is not None:
                    result.evaluate_metrics_clientapp[round_] = metrics
            if self._due(round_) and ends_with(round_, self.plan, self.store, self.journal):
                break
        self.chosen = select(self.committed, self.plan, self.store, self.journal)
        result.arrays = arrays_to_wire(self.chosen.released)
        return result

    def begin(self, weights: dict[str, Tensor]) -> Checkpoint:
        """Commit round 0: the model that training starts from."""
        checkpoint = Checkpoint(self.plan.run_id, 0, weights, {"round": 0, "model_hash": hash_weights(weights)})
        self.store.save(checkpoint)
        return checkpoint

    def _restore(self, initial_arrays: ArrayRecord) -> int:
        """Load the last committed round (or commit round 0); returns its number."""
        checkpoint = self.store.latest(self.plan.run_id)
        if checkpoint is None:
            checkpoint = self.begin(arrays_from_wire(initial_arrays, self.shapes))
        if self.journal.last("round", round=checkpoint.round) is None:  # killed between the commit and its telling
            self.journal.append("round", **checkpoint.record)
        if checkpoint.round and self.membership is not None:
            done = {"run": self.plan.run_id, "round": checkpoint.round}
            if not self.membership.has("committed", **done):
                self._note_commit(checkpoint.record)
        self.committed = checkpoint.told
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
        kind = MessageType.TRAIN
        records = partial(self._records, kind, round_)
        return self.exchange.ask(kind, round_, records, self._enough, self.plan.absence_seconds)

    def _evaluate(self, round_: int) -> Iterator[tuple[str, Message]]:
        """Scores of whoever is there: nobody is waited for."""
        assert self.exchange is not None
        kind = MessageType.EVALUATE
        return self.exchange.ask(kind, round_, partial(self._records, kind, round_), lambda: True, 0.0)

    def _enough(self) -> bool:
        return self._usable >= self._required(self._round)

    def _required(self, round_: int) -> int:
        """Updates without which a round does not count: the quorum; by default, all.

        In a real federation "all" means who is a member at this moment and whose answer was not rejected: one site that
        answers nonsense must not end the run of the others.
        """
        if before := self._sites_before(round_):
            return len(before)
        least = self.plan.strategy.least_updates(self._found_out(round_))
        if self.plan.quorum is not None or self.membership is None or self.exchange is None:
            return max(least, self.plan.quorum or len(self.plan.roster))
        counting = (site for site in self.plan.roster if site not in self._rejected)
        return max(least, sum(self.exchange.is_member(site) for site in counting))

    def _found_out(self, round_: int) -> int:
        """Sites left out for what they sent, now or (in a simulation) before: they are of the rule's f."""
        before = self.journal.last("round", round=round_)
        rejected = self._rejected if before is None else before["rejected"]
        return len(rejected) + len(suspended_in(self.committed.record))

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
        aggregate = open_aggregate(self.plan.strategy, self.shapes, self.store.folder.parent / SPILL)
        try:
            return self._aggregate(server_round, replies, aggregate)
        finally:
            aggregate.close()

    def _aggregate(
        self, round_: int, replies: Iterable[Any], aggregate: Aggregate
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        accepted: dict[str, dict[str, Any]] = {}
        rejected: dict[str, str] = {}
        received = 0
        before = self._sites_before(round_)
        for site, reply in replies:
            if before and site not in before:
                continue
            outcome = self._take(round_, site, reply, aggregate)
            if isinstance(outcome, Rejection):
                rejected[site] = outcome.reason
                self._rejected.add(site)
                self._reject(round_, outcome)
                continue
            self._usable += 1
            update, norm, size = outcome
            said = {"patients": update.patients, "delta": update.delta_hash, "decision": "accepted"}
            self._note("update", round_, site, **said)
            accepted[site] = told_update(update, norm)
            received += size
        out = suspended_in(self.committed.record)
        absent = [site for site in self.plan.roster if site not in {*accepted, *rejected, *out}]
        if len(accepted) < self._required(round_):
            raise self._below_quorum(round_, accepted, rejected, absent)
        sent = 4 * sum(math.prod(shape) for shape in self.shapes.values()) * (len(accepted) + len(rejected))
        self._commit(round_, aggregate, accepted, rejected, absent, {"up": received, "down": sent})
        patients = sum(row["patients"] for row in accepted.values())
        mean_loss = math.fsum(row["patients"] * row["loss"] for row in accepted.values()) / patients
        report(Progress("round", round_, self.plan.task.rounds, round=round_, loss=mean_loss))
        return None, MetricRecord({"loss": mean_loss})

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Any]) -> MetricRecord | None:
        """Collect every site's averages; returns the mean Dice over sites."""
        scores: dict[str, Scores] = {}
        for site, reply in replies:
            outcome = screen_scores(reply, self._expected(site, server_round, self.committed.released_hash))
            if isinstance(outcome, Rejection):
                self._reject(server_round, outcome)
            else:
                scores[site] = outcome
        told = {site: told_scores(scores[site]) for site in self.plan.roster if site in scores}
        self.journal.append("scores", round=server_round, model_hash=self.committed.released_hash, sites=told)
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

    def _records(self, kind: str, round_: int) -> Records:
        """What a round's question holds: one set for all sites, so that many sites do not multiply the model."""
        scoring = kind == MessageType.EVALUATE
        identity = self.committed.released_hash if scoring else self._model_hash
        model = self.store.at(self.committed)
        weights = model.released if scoring else model.weights
        return {
            "assignment": to_wire(Assignment(self.plan.run_id, round_, identity)),
            "weights": arrays_to_wire(weights),
        }

    @property
    def _model_hash(self) -> str:
        return str(self.committed.record["model_hash"])

    def _messages(self, kind: str, round_: int) -> list[Message]:
        records = {"task": to_wire(self.plan.task), **self._records(kind, round_)}
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

    def _expected(self, site: str, round_: int, model_hash: str) -> Expected:
        plan = self.plan
        weights = sum(math.prod(shape) for shape in self.shapes.values())
        return Expected(
            site=site,
            run=plan.run_id,
            round=round_,
            model_hash=model_hash,
            steps=plan.task.local_steps,
            enrolled=plan.roster[site],
            shapes=self.shapes,
            targets=LabelScheme.of(plan.task.dataset).targets,
            largest_norm=largest_norm(plan.screening, self.committed.record, plan.task, weights),
            key=self._key_of(site),
        )

    def _take(
        self, round_: int, site: str, reply: Message, aggregate: Aggregate
    ) -> tuple[Update, float, int] | Rejection:
        """Screen one answer and fold it. Its arrays go with the return: several loops still hold the message itself.

        Returns:
            The update's fields, its norm and its size in bytes, or why it does not count.
        """
        try:
            outcome = screen_update(reply, self._expected(site, round_, self._model_hash))
            if isinstance(outcome, Rejection):
                return outcome
            aggregate.add(site, outcome.delta, outcome.update.patients)
            return outcome.update, outcome.norm, outcome.bytes
        except AggregationOverflow as error:
            return Rejection(site, str(error))
        finally:
            if reply.has_content():
                reply.content.pop("delta", None)

    def _commit(
        self,
        round_: int,
        aggregate: Aggregate,
        accepted: dict[str, dict[str, Any]],
        rejected: dict[str, str],
        absent: list[str],
        moved: dict[str, int],
    ) -> None:
        weights, state = self._step(aggregate, round_)
        record: dict[str, Any] = {
            "round": round_,
            "model_hash": hash_weights(weights),
            "accepted": dict(sorted(accepted.items())),
            "rejected": dict(sorted(rejected.items())),
            "absent": absent,
            "bytes": moved,
        }
        if self.plan.strategy.ema > 0:
            record["released"] = hash_weights(state[AVERAGE])
        before = self.journal.last("round", round=round_)
        if before is not None and before["model_hash"] != record["model_hash"]:
            raise UserError(
                f"round {round_}: was committed with model {before['model_hash'][:12]}; repeated after its checkpoint "
                f"was damaged, it comes out as {record['model_hash'][:12]}, and later rounds stand on the first. "
                "Restore the run's checkpoints from a backup, or start a new run."
            )
        most, simulated = self.plan.screening.strikes, self.membership is None
        record |= strikes_record(self.committed.record, accepted, rejected, most, simulated, before)
        checkpoint = Checkpoint(self.plan.run_id, round_, weights, record, state)
        self.store.save(checkpoint)
        self.committed = checkpoint.told
        self.journal.append("round", **record)
        if self.membership is not None:
            self._note_commit(record)
        self._suspend()

    def _step(self, aggregate: Aggregate, round_: int) -> tuple[dict[str, Tensor], State]:
        """The next model and the optimizer's memory; what they were made of is gone with the return."""
        last = self.store.at(self.committed)
        change = aggregate.result(last.state.get(CENTRE, {}), self._found_out(round_))
        weights, state = server_step(self.plan.strategy, last.weights, change, last.state, round_)
        if self.plan.strategy.rule == "centred_clip":
            state[CENTRE] = change
        return weights, state

    def _suspend(self) -> None:
        record = self.committed.record
        suspend_sites(record, self.plan.run_id, self.plan.screening.strikes, self.journal, self.membership)
        if self.exchange is not None:
            self.exchange.suspended = set(suspended_in(record))

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
        asked = set(self.exchange.sites.values()) if self.exchange is not None else set()
        reasons = missing_reasons(
            rejected, absent, suspended_in(self.committed.record), asked, self.plan.deadline_seconds
        )
        self.journal.append("below_quorum", round=round_, accepted=sorted(accepted), rejected=rejected, absent=absent)
        return UserError(
            f"round {round_}: {len(accepted)} of {len(self.plan.roster)} sites gave a usable update, the quorum is "
            f"{self._required(round_)}: {'; '.join(reasons)}. Rounds up to {round_ - 1} are kept. Mend the sites and"
            f" go on with {self._again}, or lower run.quorum."
        )
