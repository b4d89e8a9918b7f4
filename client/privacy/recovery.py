"""A ledger that was lost, damaged or put back to an older copy: what can be known again, and what cannot.

    recover     the audit log notes every reservation with its figures; those that the ledger lacks are written into it
                anew, each in full
    write_off   where the audit log lacks them too: all that was ever spent is taken to be what the ceiling allowed

Both only ever count more. They are for a person, who says that it was a disk: a program that found a ledger missing and
went on by itself would be a way to empty it. Neither removes anything; a ledger that is not as it was written is moved
aside, as evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.privacy.account import (
    ANCHOR,
    FILTER_SHARE,
    PROMISE,
    VERSION,
    Account,
    Ceiling,
    account_of,
    highest,
    is_head,
    noted_heads,
    read_account,
)
from client.privacy.accounting import Mechanism
from client.privacy.renyi import choose_order
from medsegdiff.chained_log import GENESIS, ChainedLog, HeldLog, legible_entries, verified_entries
from medsegdiff.errors import UserError

_FIGURES = ("run", "round", "sigma", "q", "steps")
_NOTED_AS = {
    "reserved": "privacy_reserved",
    "recovered": "privacy_reserved",
    "committed": "privacy_committed",
    "written_off": "privacy_written_off",
}
_MOST_ANCHORS = 100  # of a write-off, whose line has a limit


@dataclass(frozen=True)
class Recovery:
    """What was done."""

    reservations: int  # written anew
    heads: int  # noted ones that the ledger lacked, those of the reservations among them
    moved: tuple[Path, ...]  # files that were set aside


def recover(path: Path, ceiling: Ceiling, audit: Path) -> Recovery:
    """Write into a ledger what the audit log knows and it lacks. Killed half-way, it is to be called again.

    Args:
        path: the ledger, which may be missing, damaged or an older copy.
        ceiling: of the site, for a ledger that has to be begun anew.

    Raises:
        UserError: there is no sound audit log, or it is older than the ledger that was damaged; a file cannot be read
            or written, or the ledger is of another version.
    """
    noted = verified_entries(audit)
    if not noted:
        raise UserError(
            f"{audit}: there is no audit log, so it is not known what was spent. Put its newest copy there; without "
            "one, `medsegfed ledger write-off` takes everything for spent."
        )
    damaged = _damaged(path)
    if damaged is None:
        _check_begin(audit, noted, read_account(path).heads)
    else:
        legible = [_as_noted(line) for line in damaged if line["event"] in _NOTED_AS]
        _check_begin(audit, noted, {line[ANCHOR] for line in legible})
        _check_end(path, noted_heads(audit) | {line["hash"] for line in damaged})
        noted += legible  # last: where the audit log knows them too, they are in by then
    moved = () if damaged is None else _set_aside(path)
    with _opened(path, ceiling) as (log, account):
        reservations, heads = _replay(path, log, account, noted, ceiling)
        if heads:
            ChainedLog(audit).append("privacy_recovered", reservations=reservations, **{ANCHOR: log.head})
    return Recovery(reservations, heads, moved)


def write_off(path: Path, ceiling: Ceiling, audit: Path, spent: Ceiling, anchors: Iterable[str] = ()) -> Recovery:
    """Take it that all before has spent `spent`, whatever the ledger knows of it.

    Args:
        spent: (epsilon, delta) that was never exceeded: the highest ceiling that this site ever had.
        anchors: what the server remembers of the lost ledger, in 64 hexadecimal digits (`ledger-rolled-back` names it).

    Raises:
        UserError: `spent` is below a ceiling that site.yaml has or the ledger ever had, or an anchor is none; nothing
            was changed then. A file cannot be read or written, or the ledger is of another version.
    """
    given = sorted({anchor.strip().lower() for anchor in anchors})
    if len(given) > _MOST_ANCHORS or not all(map(is_head, given)):
        raise UserError(f"--anchor takes 64 hexadecimal digits, at most {_MOST_ANCHORS} times. Copy it anew.")
    damaged = _damaged(path)
    known = [read_account(path).highest] if damaged is None else list(_ceilings(damaged))
    allowed = highest(ceiling, *known)
    if spent.epsilon < allowed.epsilon or spent.delta < allowed.delta:
        raise UserError(
            f"epsilon {spent.epsilon:g} at delta {spent.delta:g} is less than was allowed here (epsilon "
            f"{allowed.epsilon:g} at delta {allowed.delta:g}), so more may have been spent. Write off at least that; "
            "nothing was changed."
        )
    missing = noted_heads(audit)
    moved = () if damaged is None else _set_aside(path)
    with _opened(path, ceiling) as (log, account):
        missing -= account.heads
        for head in sorted(missing):
            log.append("head_lost", lost=head)
        fields = {"epsilon": spent.epsilon, "delta": spent.delta, "anchors": given}
        log.append("written_off", **fields)
        ChainedLog(audit).append("privacy_written_off", **fields, **{ANCHOR: log.head})
    return Recovery(0, len(missing), moved)


def _replay(
    path: Path, log: HeldLog, account: Account, noted: Iterable[dict[str, Any]], ceiling: Ceiling
) -> tuple[int, int]:
    """Add what is missing, in the order in which it was noted. Returns how many reservations, and how many heads."""
    reservations = heads = 0
    ordered, known = account.order is not None, set(account.heads)
    # The last reservation of each run and round.
    reserved: dict[tuple[str, int], dict[str, Any]] = {(e.run, e.round): asdict(e) for e in account.entries}
    for line in noted:
        head = line.get(ANCHOR)
        if not isinstance(head, str):
            continue
        try:
            if line["event"] == "privacy_reserved":
                reserved[line["run"], line["round"]] = line
            if head in known:
                continue
            heads, known = heads + 1, known | {head}
            lost = line if line["event"] == "privacy_reserved" else _surplus(line, reserved)
            if lost is not None:
                Mechanism(lost["sigma"], lost["q"], lost["steps"])  # refuses what the reader would refuse afterwards
                fields = {name: lost[name] for name in _FIGURES}
                if not ordered:
                    fields["order"] = lost.get("order") or choose_order(
                        lost["sigma"], lost["q"], ceiling.epsilon, ceiling.delta * FILTER_SHARE
                    )
                log.append("recovered", **fields, epsilon=lost["epsilon"], lost=head)
                reservations, ordered = reservations + 1, True
            elif line["event"] == "privacy_written_off":
                gone = {"epsilon": line["epsilon"], "delta": line["delta"], "anchors": line["anchors"]}
                log.append("written_off", **gone, lost=head)
                ordered = False
            else:  # the end of a training, which counts in full as it is; or an earlier recovery
                log.append("head_lost", lost=head)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: entry {line.get('n')} of the audit log is none that this version reads "
                f"({type(error).__name__}: {error}). Install the version that wrote it, then repeat."
            ) from error
    return reservations, heads


def _surplus(line: dict[str, Any], reserved: Mapping[tuple[str, int], dict[str, Any]]) -> dict[str, Any] | None:
    """What a training took beyond its reservation, as a reservation of its own; None, as good as always."""
    if line["event"] != "privacy_committed":
        return None
    before = reserved[line["run"], line["round"]]
    surplus = line["steps"] - before["steps"]
    return {**before, "steps": surplus} if surplus > 0 else None


@contextmanager
def _opened(path: Path, ceiling: Ceiling) -> Iterator[tuple[HeldLog, Account]]:
    """The ledger for this process alone, begun where there is none."""
    with ChainedLog(path).held() as log:
        account = account_of(path, log.entries())
        if account.ceiling is None:
            log.append("opened", version=VERSION, **PROMISE, epsilon=ceiling.epsilon, delta=ceiling.delta)
            account = account_of(path, log.entries())
        yield log, account


def _damaged(path: Path) -> list[dict[str, Any]] | None:
    """None: the ledger is as it was written, or there is none. Else those of its lines that are legible.

    Raises:
        UserError: it may be sound, and is only not to be read by this user.
    """
    for file in _files(path):
        try:
            file.open("rb").close()
        except OSError as error:
            raise UserError(
                f"{file}: cannot be read ({error.strerror}). Mend that first; nothing was changed."
            ) from error
    try:
        verified_entries(path)
        return None
    except UserError:
        return legible_entries(path)


def _as_noted(line: dict[str, Any]) -> dict[str, Any]:
    """A ledger's line as the audit log would have noted it."""
    return {**line, "event": _NOTED_AS[line["event"]], ANCHOR: line.get("lost", line["hash"])}


def _ceilings(damaged: Iterable[dict[str, Any]]) -> Iterator[Ceiling]:
    for line in damaged:
        if line["event"] in ("opened", "ceiling"):
            yield Ceiling(line["epsilon"], line["delta"])


def _check_begin(audit: Path, noted: Iterable[dict[str, Any]], heads: Set[str]) -> None:
    """Raises UserError for an audit log that was begun later than the ledger, and later than where `heads` end."""
    first = next((line for line in noted if isinstance(line.get(ANCHOR), str)), None)
    if first is None or first[ANCHOR] in heads or first["event"] == "privacy_written_off":
        return
    if first["event"] != "privacy_reserved" or first.get("number") != 1:
        raise UserError(
            f"{audit}: was begun when the ledger was in use already, so it does not know all that was spent. Put the "
            "whole audit log there, or the newest copy of the ledger; without them, `medsegfed ledger write-off` takes "
            "everything for spent. Nothing was changed."
        )


def _check_end(path: Path, known: set[str]) -> None:
    """An audit log that knows the end of a ledger knows all of it: each line is noted right after it is written.

    Raises:
        UserError: the end is neither noted nor legible: the audit log is an older copy itself. Without a head file to
            tell the end, nothing speaks against it.
    """
    try:
        end = ChainedLog(path).head
    except UserError:
        return
    if end not in known | {GENESIS}:
        raise UserError(
            f"{path}: it is damaged, and its last line, {end[:12]}..., is not legible and not in the audit log, which "
            "is an older copy: what was spent cannot be known. Put the newest copy of either there, or take everything "
            "for spent with `medsegfed ledger write-off`. Nothing was changed."
        )


def _set_aside(path: Path) -> tuple[Path, ...]:
    """Move a ledger and its head file to names of their own. Those names."""
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
    moved = {file: file.with_name(f"{file.name}.damaged-{stamp}") for file in _files(path)}
    for file, target in moved.items():
        try:
            file.rename(target)
        except OSError as error:
            raise UserError(f"{file}: cannot be moved to {target.name} ({error.strerror}). Repeat then.") from error
    return tuple(moved.values())


def _files(path: Path) -> list[Path]:
    """A ledger and its head file, those that are there."""
    return [file for file in (path, path.with_name(f"{path.name}.head")) if file.exists()]
