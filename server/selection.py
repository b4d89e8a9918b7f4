"""Which round's model is handed out, and when a run ends early: told by the journal, so a restart decides alike."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from server.checkpoints import Checkpoint, CheckpointStore, Committed
from server.config import RunPlan
from server.journal import Event, Journal
from server.rounds import scored_rounds

log = logging.getLogger("medsegfed.server")


def best_round(events: Sequence[Event], by: str, through: int) -> int | None:
    """The round whose model is best on the sites' held-out patients, the earliest of equals; None: none was scored.

    Each scored round is compared with the best before it over the sites that gave a Dice for both: leaving out a hard
    site is no progress, and a site that has left, or missed one scoring, decides nothing.

    Args:
        by: "mean" over those sites, or the "worst" of them.
        through: the last round that counts.
    """
    best, known = None, dict[str, float]()
    for number, sites in sorted(scored_rounds(events).items()):
        dice = {site: float(row["dice"]) for site, row in sites.items() if row["dice"] is not None}
        if number > through or not dice:
            continue
        if best is None or _is_better(dice, known, by):
            best, known = number, dice
    return best


def _is_better(new: Mapping[str, float], old: Mapping[str, float], by: str) -> bool:
    """Over the sites of both; without any, no."""
    common = new.keys() & old.keys()
    if by == "worst":
        return bool(common) and min(new[site] for site in common) > min(old[site] for site in common)
    # fsum: the same figures are equal in any order of the sites
    return math.fsum(new[site] for site in common) > math.fsum(old[site] for site in common)


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
