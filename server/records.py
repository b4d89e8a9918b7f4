"""What a round leaves behind in checkpoint and journal, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from client.contract import Scores, Update


def told_update(update: Update, norm: float) -> dict[str, Any]:
    """An accepted update. With privacy on, loss and seconds are None."""
    told = {"patients": update.patients, "loss": update.loss, "seconds": update.seconds, "norm": norm}
    return told | (
        {"epsilon": update.epsilon, "privacy_delta": update.privacy_delta} if update.epsilon is not None else {}
    )


def weighted_loss(accepted: Iterable[Mapping[str, Any]]) -> float | None:
    """Mean loss over the patients of the sites that told theirs; None where none did."""
    rows = [row for row in accepted if row["loss"] is not None]
    if not rows:
        return None
    patients = sum(row["patients"] for row in rows)
    return float(math.fsum(row["patients"] * row["loss"] for row in rows) / patients)


def told_scores(scores: Scores) -> dict[str, Any]:
    """A site's averages over its held-out patients."""
    return {
        "patients": scores.patients,
        "dice": scores.dice,
        "dice_by_target": scores.dice_by_target,
        "hd95_mm": scores.hd95_mm,
        "hd95_undefined": scores.hd95_undefined,
        "seconds": scores.seconds,
        **(
            {"personal_dice": scores.personal_dice, "personal_hd95_mm": scores.personal_hd95_mm}
            if scores.personal_dice is not None
            else {}
        ),
    }


def missing_reasons(
    rejected: Mapping[str, str],
    absent: Sequence[str],
    suspended: Sequence[str],
    asked: set[str],
    seconds: float,
    lift: str = "",
    left: Sequence[str] = (),
) -> list[str]:
    """Why sites are missing from a round, a line each.

    Args:
        left: sites that were revoked since the run began.
        lift: the command that lets a suspended site take part again, without its name; empty where there is none.
    """
    reasons = [f"{site} was rejected ({reason})" for site, reason in sorted(rejected.items())]
    reasons += [
        f"{site} did not answer within {seconds:g} s"
        if site in asked
        else f"{site} did not introduce itself, its own log says why"
        for site in absent
    ]
    reasons += [f"{site} is no member any more (revoked)" for site in left]
    return reasons + [f"{site} is suspended{f' ({lift} {site})' if lift else ''}" for site in suspended]
