"""Which round's model is handed out, and when a run ends early: told by the journal, so a restart decides alike."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from server.checkpoints import Checkpoint, CheckpointStore, Committed
from server.config import RunPlan
from server.journal import Event, Journal
from server.rounds import scored_rounds

log = logging.getLogger("medsegfed.server")


def best_round(events: Sequence[Event], by: str, through: int) -> int | None:
    """The round whose model is best on the sites' held-out patients, the earliest of equals; None: none was scored.

    A round that fewer sites scored than another one is not compared with it: leaving out a hard site is no progress.

    Args:
        by: "mean" over the sites, or the "worst" site's Dice.
        through: the last round that counts.
    """
    values: dict[int, tuple[int, float]] = {}  # scored round -> how many sites gave a Dice, and the value
    for number, sites in scored_rounds(events).items():
        dice = sorted(row["dice"] for row in sites.values() if row["dice"] is not None)
        if dice and number <= through:
            values[number] = (len(dice), dice[0] if by == "worst" else sum(dice) / len(dice))
    return max(values, key=lambda number: (values[number], -number)) if values else None


def rounds_since_best(events: Sequence[Event], by: str, through: int) -> int:
    """How many rounds were scored after the best one."""
    best = best_round(events, by, through)
    return sum(best < number <= through for number in scored_rounds(events)) if best is not None else 0


def ends_with(round_: int, plan: RunPlan, store: CheckpointStore, journal: Journal) -> bool:
    """Put the model of a scored round aside if it is the best so far; returns whether the run has lost patience."""
    by, patience = plan.selection.by, plan.selection.patience
    if by == "last":
        return False
    if best_round(journal.events, by, round_) == round_:
        store.keep(round_)
    return patience is not None and rounds_since_best(journal.events, by, round_) >= patience


def select(last: Committed, plan: RunPlan, store: CheckpointStore, journal: Journal) -> Checkpoint:
    """The round whose model is handed out; told in the journal where the plan asks for a choice.

    Args:
        last: the last committed round, which it is unless the plan asks for the best.
    """
    by = plan.selection.by
    if by == "last":
        return store.at(last)
    best, kept = best_round(journal.events, by, last.round), store.best(plan.run_id)
    chosen = kept if kept is not None and kept.round == best else store.at(last)
    if best is not None and chosen.round != best:
        log.warning("round %d was best, and its file is not there any more: the last round is handed out", best)
    told = {"round": chosen.round, "model_hash": chosen.told.released_hash, "by": by, "rounds": last.round}
    if journal.last("selected", **told) is None:
        journal.append("selected", **told)
    return chosen
