"""Federated averaging as a Flower Strategy with a streaming loop of its own.

Flower's loop keeps every reply of a round in memory and cannot resume. This one pulls one reply at a time, screens it,
folds it into the fixed-point sum and frees it; a round is committed by its checkpoint before anything else happens.
robust.py has the rules, optimizers.py the steps; FedProx differs at the sites alone (`TrainTask.proximal_mu`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from client.contract import Assignment, Scores, Update, arrays_from_wire, arrays_to_wire, packed_record, to_wire
from client.encoding import Compression, largest_size
from client.personalisation import CONTROL, common_shapes, sent_shapes
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
from server.optimizers import COMMON, State, next_control, server_step
from server.records import missing_reasons, told_scores, told_update, weighted_loss
from server.robust import CENTRE, SPILL, Aggregate, open_aggregate
from server.sampling import asked_sites
from server.screening import Expected, Rejection, carried_norms, largest_norm, screen_scores, screen_update
from server.selection import ends_with, select
from server.stragglers import FOLDER as LATE
from server.stragglers import LateUpdates
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
        self.sent = sent_shapes(plan.task)  # of what sites send
        self.common = common_shapes(plan.task)  # of the weights among it: all, or those that are common to the sites
        # The round that the next one starts from. Its model stays on the disk: it is in memory while it is sent and
        # while the next one is made of it, not beside the sum of the updates.
        self.committed = Committed(plan.run_id, 0, {"model_hash": ""})
        self.chosen: Checkpoint | None = None  # the round whose model is handed out, once the run has ended
        self.exchange: Exchange | None = None  # conversations over the grid of `start`
        self._round = 0  # the round at hand
        self._usable = 0  # updates folded in it
        self._rejected: set[str] = set()  # sites whose updates were left out of it
        self._too_large: set[str] = set()  # those of them whose updates were sound, and above the limit
        self._chosen: list[str] = []  # who was asked in it
        self._before: set[str] = set()  # whose updates made it, if it is repeated
        self.late = LateUpdates(plan.stragglers, store.folder.parent / LATE, journal)
        self._aggregate_at_hand: Aggregate | None = None

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
        bounded = BoundedGrid.over(grid, largest_size(self.plan.task.compression, self.sent))
        self.exchange = Exchange(bounded, self.plan, self.journal, self.membership, self.stopped)
        self._suspend()
        if (scored := self.journal.last("scores")) is not None:  # whoever scored a model has it
            self.exchange.holds = {site: str(scored["model_hash"]) for site in scored["sites"]}
        result = Result()
        for round_ in range(first, num_rounds + 1):
            if round_ > first:
                self._round, self._usable, self._chosen = round_, 0, []
                self._rejected, self._too_large = set(), set()
                self._before = self._sites_before(round_)
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
        patience = self.plan.absence_seconds
        late = self._take_late if self.exchange.carries else None
        self.exchange.beside_bytes = self._control_bytes
        need = partial(self._required, round_)
        return self.exchange.ask(
            kind, round_, records, self._model_hash, self._enough, patience, self._who, self._is_full, late, need
        )

    def _who(self, gone: Collection[str] = ()) -> Collection[str]:
        """Who is asked for an update in the round at hand: a sample of the members, where the plan asks for one."""
        assert self.exchange is not None
        if self.plan.sample is None:
            return self.plan.roster
        out = {site for site in self.plan.roster if not self.exchange.is_member(site)}
        failed = {*gone, *self._rejected} if self.membership is None else None
        asked = sorted(self._before) or asked_sites(self.plan, self._round, out, failed)
        if not self._before and not set(asked) <= set(self._chosen):
            self._chosen = sorted({*self._chosen, *asked})
            told = {"round": self._round, "sites": self._chosen}
            if self.journal.last("chosen", **told) is None:
                self.journal.append("chosen", **told)
        return asked

    def _drawn(self, silent: list[str]) -> dict[str, Any]:
        """What a sampled round's record says of its draw; a repeated round says what it said before.

        Where the round closed with all the updates that it is made of, nobody was absent: the others were to spare.
        """
        if self.plan.sample is None:
            return {}
        if self._before:
            before = self.journal.last("round", round=self._round) or {}
            return {key: before[key] for key in ("chosen", "spare", "absent") if key in before}
        absent, spare = ([], silent) if self._is_full() else (silent, [])
        return {"chosen": self._chosen, "spare": spare, "absent": absent}

    def _is_full(self) -> bool:
        """Whether a sampled round has all the updates that it is to be made of."""
        size = len(self._before) or self.plan.sample_size
        return self.plan.sample is not None and self._usable >= size

    def _evaluate(self, round_: int) -> Iterator[tuple[str, Message]]:
        """Scores of whoever is there: nobody is waited for."""
        assert self.exchange is not None
        kind = MessageType.EVALUATE
        records = partial(self._records, kind, round_)
        self.exchange.beside_bytes = 0
        return self.exchange.ask(kind, round_, records, self.committed.released_hash, lambda: True, 0.0)

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
            return max(least, self.plan.quorum or self.plan.sample_size)
        counting = sum(self.exchange.is_member(site) for site in self._who() if site not in self._rejected)
        return max(least, min(self.plan.sample_size, counting))

    def _found_out(self, round_: int) -> int:
        """How many sites are left out for what they sent, now or before: they are of the rule's f."""
        if (before := self.journal.last("round", round=round_)) is not None:
            return len({*before["rejected"], *suspended_in(before)} - {*before.get("excused", [])})
        return len({*self._rejected, *self._still_out()} - self._excused())

    def _excused(self) -> set[str]:
        """Sites whose updates were too large, where that is so of most that came: the limit is in doubt, not they."""
        return self._too_large if 2 * len(self._too_large) > self._usable + len(self._rejected) else set()

    def _has_left(self, site: str) -> bool:
        """Whether a site of the roster was revoked since the run began."""
        return self.membership is not None and self.exchange is not None and not self.exchange.is_member(site)

    def _still_out(self) -> set[str]:
        """Whom this run has suspended; in a federation, of them who has not been lifted since."""
        known = set(suspended_in(self.committed.record))
        if self.membership is None or self.exchange is None:
            return known
        return {site for site in known if not self.exchange.is_member(site)}

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
        aggregate = open_aggregate(self.plan.strategy, self.sent, self.store.folder.parent / SPILL)
        self._aggregate_at_hand = aggregate
        try:
            self.late.begin(server_round, aggregate)
            return self._aggregate(server_round, replies, aggregate)
        finally:
            self._aggregate_at_hand = None
            aggregate.close()

    def _aggregate(
        self, round_: int, replies: Iterable[Any], aggregate: Aggregate
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        accepted: dict[str, dict[str, Any]] = {}
        rejected: dict[str, str] = dict((self.journal.last("round", round=round_) or {}).get("rejected", {}))
        counted: dict[str, str] = dict(self.committed.record.get("counted", {}))  # site -> hash of its last such update
        received, sent_before = 0, self._bytes_down
        before = self._sites_before(round_)
        for site, reply in replies:
            if before and site not in before:
                continue
            outcome = self._take(round_, site, reply, aggregate)
            if isinstance(outcome, Rejection):
                rejected[site] = outcome.reason
                self._rejected.add(site)
                self._too_large |= {site} if outcome.too_large else set()
                self._reject(round_, outcome)
                continue
            self._usable += 1
            update, norm, size = outcome
            said = {"patients": update.patients, "delta": update.delta_hash, "decision": "accepted"}
            if update.ledger_anchor:
                said["ledger_anchor"] = update.ledger_anchor
            self._note("update", round_, site, **said)
            accepted[site] = told_update(update, norm)
            counted[site] = update.delta_hash
            received += size
        rejected |= {site: reason for site, reason in self.late.rejected.items() if site not in accepted}
        working = sorted(self.exchange.working(round_)) if self.exchange is not None else []
        out = {*self._still_out(), *working}
        asked = self.plan.roster if self.plan.sample is None else self._chosen
        absent = [site for site in asked if site not in {*accepted, *rejected, *out}]
        drawn = self._drawn(absent)
        if len(accepted) < self._required(round_):
            raise self._below_quorum(round_, accepted, rejected, absent)
        moved = {"up": received + self.late.bytes, "down": self._bytes_down - sent_before}
        fed_back = {"counted": dict(sorted(counted.items()))} if self.plan.task.keeps_state else {}
        late = {"late": self.late.rows, "working": working}
        excused = self._excused()
        if excused:
            log.warning("round %d: most updates were above the norm limit; they count as no strike", round_)
        norms = carried_norms(self.committed.record, round_, accepted) if self.plan.screening.norm_factor else {}
        told = {**late, "excused": sorted(excused)}
        others = {"bytes": moved, **fed_back, **drawn, **norms, **{key: value for key, value in told.items() if value}}
        self._commit(round_, aggregate, accepted, rejected, absent, others)
        self.late.forget()
        mean_loss = weighted_loss(accepted.values())
        report(Progress("round", round_, self.plan.task.rounds, round=round_, loss=mean_loss))
        return None, MetricRecord({"loss": mean_loss} if mean_loss is not None else {})

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Any]) -> MetricRecord | None:
        """Collect every site's averages; returns the mean Dice over sites."""
        scores: dict[str, Scores] = {}
        sent_before = self._bytes_down
        for site, reply in replies:
            outcome = screen_scores(reply, self._expected(site, server_round, self.committed.released_hash))
            if isinstance(outcome, Rejection):
                self._reject(server_round, outcome)
            else:
                scores[site] = outcome
                if self.exchange is not None:
                    self.exchange.holds[site] = outcome.model_hash
        told = {site: told_scores(scores[site]) for site in self.plan.roster if site in scores}
        self.journal.append(
            "scores",
            round=server_round,
            model_hash=self.committed.released_hash,
            sites=told,
            bytes={"down": self._bytes_down - sent_before},
        )
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

    def _records(self, kind: str, round_: int, with_model: bool = True) -> Records:
        """What a round's question holds: one set for all sites, so that many sites do not multiply the model.

        Args:
            with_model: False for sites that have shown to have it.
        """
        scoring = kind == MessageType.EVALUATE
        identity = self.committed.released_hash if scoring else self._model_hash
        counted = tuple(sorted(self.committed.record.get("counted", {}).values()))
        control = "" if scoring else str(self.committed.record.get("control", ""))
        asked = Assignment(self.plan.run_id, round_, identity, counted, control)
        records: Records = {"assignment": to_wire(asked)}
        if control:
            records["control"] = packed_record(self.store.packed(self.committed, control, COMMON))
        if with_model:
            part = AVERAGE if scoring and "released" in self.committed.record else ""
            records["weights"] = packed_record(self.store.packed(self.committed, identity, part))
        return records

    @property
    def _control_bytes(self) -> int:
        """Of SCAFFOLD's c, which comes with every question to train once it is not zero."""
        return largest_size(Compression(), self.common) if "control" in self.committed.record else 0

    @property
    def _bytes_down(self) -> int:
        return self.exchange.bytes_down if self.exchange is not None else 0

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

    def _expected(self, site: str, round_: int, model_hash: str, before: Mapping[str, Any] | None = None) -> Expected:
        """What a good reply says.

        Args:
            before: record of the round before the one that was asked about; default: the last committed one.
        """
        plan = self.plan
        weights = sum(math.prod(shape) for shape in self.common.values())
        return Expected(
            site=site,
            run=plan.run_id,
            round=round_,
            model_hash=model_hash,
            steps=plan.task.local_steps,
            enrolled=plan.roster[site],
            shapes=self.sent,
            targets=LabelScheme.of(plan.task.dataset).targets,
            second_model=plan.task.personalisation.trains_a_second,
            compression=plan.task.compression,
            largest_control=2 * plan.task.training.gradient_clip if plan.task.control_variates else None,
            largest_norm=largest_norm(
                plan.screening, before or self.committed.record, plan.task, weights, len(plan.roster)
            ),
            key=self._key_of(site),
            privacy=plan.task.privacy,
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

    def _take_late(self, site: str, round_: int, reply: Message) -> None:
        """Screen an answer to an earlier round's question by what that round asked, and fold it with less weight."""
        base = self.journal.last("round", round=round_ - 1)
        if self._aggregate_at_hand is None or base is None or not self.late.is_wanted(site, round_):
            return
        expected = self._expected(site, round_, str(base["model_hash"]), base)
        outcome = self.late.take(reply, expected, self._aggregate_at_hand)
        if isinstance(outcome, Rejection):
            self._reject(round_, outcome)
            return
        log.info("round %d counts the update of %s for round %d", self._round, site, round_)
        self._note("update", round_, site, decision=f"accepted late, in round {self._round}", **outcome)

    def _commit(
        self,
        round_: int,
        aggregate: Aggregate,
        accepted: dict[str, dict[str, Any]],
        rejected: dict[str, str],
        absent: list[str],
        others: dict[str, Any],
    ) -> None:
        weights, state = self._step(aggregate, round_, accepted)
        record: dict[str, Any] = {
            "round": round_,
            "model_hash": hash_weights(weights),
            "accepted": dict(sorted(accepted.items())),
            "rejected": dict(sorted(rejected.items())),
            "absent": absent,
            **others,
        }
        if COMMON in state:
            record["control"] = hash_weights(state[COMMON])
        if self.plan.strategy.ema > 0:
            record["released"] = hash_weights(state[AVERAGE])
        before = self.journal.last("round", round=round_)
        if before is not None and before["model_hash"] != record["model_hash"]:
            raise UserError(
                f"round {round_}: was committed with model {before['model_hash'][:12]}; repeated after its checkpoint "
                f"was damaged, it comes out as {record['model_hash'][:12]}, and later rounds stand on the first. "
                "Restore the run's checkpoints from a backup, or start a new run."
            )
        most, out = self.plan.screening.strikes, self._still_out()
        struck = {site for site in rejected if site not in others.get("excused", [])}
        record |= strikes_record(self.committed.record, accepted, struck, most, out, before)
        checkpoint = Checkpoint(self.plan.run_id, round_, weights, record, state)
        self.store.save(checkpoint)
        self.committed = checkpoint.told
        self.journal.append("round", **record)
        if self.membership is not None:
            self._note_commit(record)
        self._suspend()

    def _step(
        self, aggregate: Aggregate, round_: int, accepted: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Tensor], State]:
        """The next model and the optimizer's memory; what they were made of is gone with the return."""
        last = self.store.at(self.committed)
        change = aggregate.result(last.state.get(CENTRE, {}), self._found_out(round_))
        common = {name: last.weights[name] for name in self.common}
        moved, state = server_step(self.plan.strategy, common, change, last.state, round_)
        if self.plan.task.control_variates:
            controls = {name: change[f"{CONTROL}{name}"] for name in self.common}
            part, clip = len(accepted) / len(self.plan.roster), self.plan.task.training.gradient_clip
            state[COMMON] = next_control(common, controls, part, last.state, clip)
        weights = last.weights | moved  # what stays at the sites stays as it was
        if AVERAGE in state:
            state[AVERAGE] = last.weights | state[AVERAGE]
        if self.plan.strategy.rule == "centred_clip":
            state[CENTRE] = change
        return weights, state

    def _suspend(self) -> None:
        record = self.committed.record
        suspend_sites(record, self.plan.run_id, self.plan.screening.strikes, self.journal, self.membership)
        if self.exchange is not None and self.membership is None:
            self.exchange.suspended = set(suspended_in(record))
        elif self.exchange is not None and record.get("suspends"):
            self.exchange.look_at_members()

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
        lift = "" if self.membership is None else "medsegfed lift"
        out = self._still_out() | (self.membership.suspended() if self.membership is not None else set())
        suspended = [site for site in self.plan.roster if site in out and site not in rejected]
        left = [site for site in absent if site not in out and self._has_left(site)]
        away = [site for site in absent if site not in out and site not in left]
        reasons = missing_reasons(rejected, away, suspended, asked, self.plan.deadline_seconds, lift, left)
        self.journal.append("below_quorum", round=round_, accepted=sorted(accepted), rejected=rejected, absent=absent)
        need, least = self._required(round_), self.plan.strategy.least_updates(self._found_out(round_))
        by_rule = need == least and least > (self.plan.quorum or 1)
        what = f"the rule {self.plan.strategy.rule} needs" if by_rule else "the quorum is"
        mend = f"Admit {', '.join(left)} with new keys" if left else "Mend the sites"
        return UserError(
            f"round {round_}: {len(accepted)} of {len(self._chosen or self.plan.roster)} sites gave a usable update, "
            f"{what} {need}: {'; '.join(reasons)}. Rounds up to {round_ - 1} are kept. "
            f"{mend} and go on with {self._again}{'' if by_rule else ', or lower run.quorum'}."
        )
