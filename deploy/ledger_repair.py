"""`medsegfed ledger recover` and `write-off`: what they did, in lines."""

from __future__ import annotations

from pathlib import Path

from client.privacy.account import Ceiling, ledger_path
from client.privacy.recovery import Recovery, recover, write_off
from deploy.joining import SITE_CONFIG
from deploy.privacy_report import ceiling_of, check_site, open_account
from medsegdiff.chained_log import AUDIT_LOG
from medsegdiff.errors import UserError


def recover_ledger(site: Path) -> list[str]:
    """Bring a site's ledger up to what its audit log knows. Raises UserError (`client.privacy.recovery.recover`)."""
    ceiling = _ceiling(site)
    done = recover(ledger_path(site), ceiling, site / AUDIT_LOG)
    if not done.heads and not done.moved:
        return ["Nothing to recover: the ledger holds every line that the audit log noted."]
    return [
        *_moved(done),
        f"recovered  {done.reservations:,} reservations, each in full; {done.heads:,} lost lines are accounted for",
        *_standing(site, ceiling),
    ]


def write_off_ledger(site: Path, epsilon: float, delta: float, anchors: list[str]) -> list[str]:
    """Take a site's budget for spent. Raises UserError (`client.privacy.recovery.write_off`)."""
    ceiling = _ceiling(site)
    done = write_off(ledger_path(site), ceiling, site / AUDIT_LOG, Ceiling(epsilon, delta), anchors)
    return [*_moved(done), f"written off  epsilon {epsilon:g} at delta {delta:g}", *_standing(site, ceiling)]


def _ceiling(site: Path) -> Ceiling:
    check_site(site)
    ceiling = ceiling_of(site)
    if ceiling is None:
        raise UserError(f"{site / SITE_CONFIG}: has no privacy section, whose epsilon and delta are the site's limit.")
    return ceiling


def _moved(done: Recovery) -> list[str]:
    return [f"kept       {file.name}: a copy; it was not as it was written; keep it as evidence" for file in done.moved]


def _standing(site: Path, ceiling: Ceiling) -> list[str]:
    """What is spent now, and whether anything is left."""
    _, total = open_account(site)
    assert total is not None  # the ledger was begun
    lines = [f"spent        epsilon {total.epsilon:.4f} of {ceiling.epsilon:g} at delta {ceiling.delta:g}"]
    gone = total.written_off
    if gone is not None and (ceiling.epsilon <= gone.epsilon or ceiling.delta <= gone.delta):
        lines.append("Nothing is left: to train again, put a larger epsilon and a larger delta into site.yaml.")
    elif total.epsilon >= ceiling.epsilon:
        lines.append("Nothing is left: to train again, put a larger epsilon into site.yaml.")
    return lines
