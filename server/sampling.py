"""Who is asked for an update in a round, where a run asks a part of its sites.

The draw is a keyed hash of seed, round and site, not a generator that is wound on: the same round asks the same sites
whatever went before it, in whatever order the roster stands, and a site that leaves moves none of the others but the
one that takes its place. Sites with the lowest hashes are asked; every set of `sample` sites is as likely as another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

from server.config import RunPlan


def draw_order(seed: int, round_: int, sites: Iterable[str]) -> list[str]:
    """The sites in the order in which a round draws them."""
    return sorted(sites, key=lambda site: (_lot(seed, round_, site), site))


def _lot(seed: int, round_: int, site: str) -> bytes:
    return hashlib.sha256(f"medsegfed/sample\n{seed}\n{round_}\n{site}".encode()).digest()


def asked_sites(
    plan: RunPlan, round_: int, out: Collection[str] = (), failed: Collection[str] | None = None
) -> list[str]:
    """Who is asked for an update in a round: all sites, or `sample` of them and `over_select` more.

    Args:
        out: who is no member, or suspended; the next of the draw take their places.
        failed: None in a real federation, which asks the spares at once, so that the round need not wait for its
            slowest sites. In a simulation nobody is slow: a spare is asked when one of the sample has failed, and so
            the order in which answers come changes nothing.

    Returns:
        In the order of the draw; of the roster where all are asked.
    """
    if plan.sample is None:
        return [site for site in plan.roster if site not in out]
    order = draw_order(plan.task.seed, round_, (site for site in plan.roster if site not in out))
    most = order[: plan.sample_size + plan.over_select]
    if failed is None:
        return most
    asked: list[str] = []
    for site in most:
        if sum(other not in failed for other in asked) == plan.sample_size:
            break
        asked.append(site)
    return asked
