"""Whose updates were rejected round after round, and who is suspended for it.

The counts are part of a round's record, and so committed with its model: neither a restart nor a repeated round counts
a rejection twice or forgets one.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from server.journal import Event, Journal
from server.membership import Membership

log = logging.getLogger("medsegfed.server")

Record = Mapping[str, Any]  # of a committed round, as the journal tells it
KEYS = ("strikes", "suspends", "suspended", "excused")


def strikes_after(before: Record, accepted: Collection[str], rejected: Collection[str]) -> dict[str, int]:
    """Rejections in a row of each site that has any; a site that was absent keeps its count.

    Args:
        before: record of the round before.
    """
    known: Mapping[str, int] = before.get("strikes", {})
    counts = {site: count for site, count in known.items() if site not in accepted and site not in rejected}
    return dict(sorted((counts | {site: known.get(site, 0) + 1 for site in rejected}).items()))


def suspended_in(record: Record) -> list[str]:
    """Whom a run has suspended; in a federation, where the register says who is a member, some may be lifted since."""
    return sorted({*record.get("suspended", []), *record.get("suspends", [])})


def strikes_record(
    before: Record,
    accepted: Collection[str],
    rejected: Collection[str],
    most: int,
    out: Collection[str],
    earlier: Event | None = None,
) -> dict[str, Any]:
    """What a round's record says of rejections: those in a row (`strikes`), whom the round suspends (`suspends`), and
    whom the run has out from now on (`suspended`). Keys without anything to say are left out.

    Args:
        before: record of the round before.
        most: rejections in a row that suspend a site; its count begins anew then.
        out: whom the run suspended earlier and nobody has lifted.
        earlier: the round as it was committed before, if it is repeated: it was without the sites it had rejected, so
            it strikes as it did, and excuses whom it did.
    """
    if earlier is not None:
        return {key: earlier[key] for key in KEYS if key in earlier}
    strikes = strikes_after(before, accepted, rejected)
    new = sorted(site for site in rejected if strikes[site] >= most)
    found = {
        "strikes": {site: count for site, count in strikes.items() if site not in new},
        "suspends": new,
        "suspended": sorted({*out, *new}),
    }
    return {key: value for key, value in found.items() if value}


def suspend_sites(record: Record, run: str, most: int, journal: Journal, membership: Membership | None) -> None:
    """Shut out whom a committed round suspends. Done again after a crash, nothing is told or done twice."""
    for site in record.get("suspends", []):
        told = {"round": record["round"], "site": site, "strikes": most}
        if journal.last("suspended", **told) is None:
            log.warning("%s is suspended: %d updates in a row were rejected", site, most)
            journal.append("suspended", **told)
        if membership is not None:
            membership.suspend(site, run=run, round=record["round"], strikes=most)
