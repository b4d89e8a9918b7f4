"""A ledger that was lost, damaged or put back to an older copy: what can be known again, and what cannot.

    recover     what the audit log and the legible lines of a damaged ledger know (`client.privacy.mirror`) is written
                into the ledger anew, each reservation in full; refused where they know that they do not know all
    write_off   where it is refused: all that was ever spent is taken to be what the ceiling allowed

Both only ever count more. They are for a person, who says that it was a disk: a program that found a ledger missing and
went on by itself would be a way to empty it. Neither removes anything: a ledger that is not as it was written stays
where it is until the new one is whole, and is kept beside it as evidence.
"""

from __future__ import annotations

import fcntl
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.privacy.account import (
    ANCHOR,
    FILTER_SHARE,
    PROMISE,
    VERSION,
    Ceiling,
    account_of,
    highest,
    is_head,
    noted_heads,
)
from client.privacy.mirror import Fact, Facts, note, note_missing
from client.privacy.renyi import choose_order
from medsegdiff.chained_log import (
    GENESIS,
    ChainedLog,
    HeldLog,
    LogDamaged,
    legible_entries,
    verified_entries,
)
from medsegdiff.errors import UserError

MOST_EPSILON, MOST_DELTA = 1e6, 0.01  # of site.yaml: what is written off must leave room above it
_MOST_ANCHORS = 100  # of a write-off, whose line has a limit
_WAY_OUT = "take everything for spent with `medsegfed ledger write-off`"
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Recovery:
    """What was done."""

    reservations: int  # written anew
    heads: int  # lines that are accounted for again, those of the reservations among them
    moved: tuple[Path, ...]  # files that were set aside


def recover(path: Path, ceiling: Ceiling, audit: Path) -> Recovery:
    """Write into a ledger what is known and it lacks. Killed half-way, it is to be called again.

    Args:
        path: the ledger, which may be missing, damaged or an older copy.
        ceiling: of the site, for a ledger that has to be begun anew.

    Raises:
        UserError: there is no sound audit log; what is known of the ledger has gaps, or not its end; a file cannot be
            read or written, or the ledger is of another version. Nothing was changed then.
    """
    noted = _audited(audit)
    if not noted:
        raise UserError(
            f"{audit}: there is no audit log, so it is not known what was spent. Put its newest copy there; without "
            f"one, {_WAY_OUT}."
        )
    lines, damaged = _read(path)
    facts = _facts(path, lines, noted)
    _check_known(path, facts, lines, damaged)
    held = frozenset() if damaged else account_of(path, lines).heads
    missing = [fact for fact in facts if fact.heads.isdisjoint(held)]
    # A line that is there may have had, in a ledger that was recovered and lost again, another hash.
    spare = facts.heads.difference(held, {GENESIS}, *(fact.heads for fact in missing))
    if not damaged and not missing and not spare:
        return Recovery(0, 0, ())

    def write(log: HeldLog) -> None:
        _write(log, missing, spare, ceiling)

    moved = _replace(path, write) if damaged else _extend(path, lines, write)
    done = Recovery(sum(fact.kind == "reserved" for fact in missing), len(missing) + len(spare), moved)
    _tell(path, audit, "ledger_recovered", reservations=done.reservations)
    return done


def write_off(path: Path, ceiling: Ceiling, audit: Path, spent: Ceiling, anchors: Iterable[str] = ()) -> Recovery:
    """Take it that all before has spent `spent`, whatever the ledger knows of it.

    Args:
        spent: (epsilon, delta) that was never exceeded: the highest ceiling that this site ever had.
        anchors: what the server remembers of the lost ledger, in 64 hexadecimal digits (`ledger-rolled-back` names it).

    Raises:
        UserError: `spent` is below what is known to have been allowed or written off, or so high that no
            ceiling can lie above it; an anchor is none; the audit log is not sound. Nothing was changed then. A file
            cannot be read or written, or the ledger is of another version.
    """
    given = sorted({anchor.strip().lower() for anchor in anchors})
    if len(given) > _MOST_ANCHORS or not all(map(is_head, given)):
        raise UserError(f"--anchor takes 64 hexadecimal digits, at most {_MOST_ANCHORS} times. Copy it anew.")
    noted = _audited(audit)
    lines, damaged = _read(path)
    facts = _facts(path, lines, noted)
    allowed = highest(ceiling, *facts.allowed())
    if spent.epsilon < allowed.epsilon or spent.delta < allowed.delta:
        raise UserError(
            f"epsilon {spent.epsilon:g} at delta {spent.delta:g} is less than was allowed or written off here (epsilon "
            f"{allowed.epsilon:g} at delta {allowed.delta:g}), so more may have been spent. Write off at least that; "
            "nothing was changed."
        )
    if spent.epsilon >= MOST_EPSILON or spent.delta >= MOST_DELTA:
        raise UserError(
            f"epsilon {spent.epsilon:g} at delta {spent.delta:g}: site.yaml allows epsilon up to {MOST_EPSILON:g} and "
            f"delta up to {MOST_DELTA:g}, so that nothing could ever be trained beside it. Nothing was changed."
        )
    held = set() if damaged else account_of(path, lines).heads
    missing = facts.heads - held - {GENESIS}
    fields = {"epsilon": spent.epsilon, "delta": spent.delta, "anchors": given, "number": max(facts.last, 1) + 1}
    noted_as = secrets.token_hex(32)  # in place of a hash that is not there yet

    def write(log: HeldLog) -> None:
        if not log.length:
            _open(log, facts.last, ceiling)
        for head in sorted(missing):
            log.append("head_lost", lost=[head])
        log.append("written_off", **fields, lost=[noted_as])

    # Noted first: a ledger that is lost right afterwards must not be recovered as if it had been complete.
    note(ChainedLog(audit), "written_off", fields, noted_as)
    moved = _replace(path, write) if damaged else _extend(path, lines, write)
    _tell(path, audit, "ledger_written_off")
    return Recovery(0, len(missing), moved)


# --- what is known ----------------------------------------------------------------------------------------------------


def _audited(audit: Path) -> Lines:
    """The audit log's entries, every line verified. Raises UserError with a way on."""
    try:
        entries = verified_entries(audit)
        ChainedLog(audit).check()
    except LogDamaged as error:
        raise LogDamaged(
            f"{error} If there is no copy, move {audit.name} and {audit.name}.head to where they are kept as evidence, "
            f"and {_WAY_OUT}: without the audit log it is not known."
        ) from error
    return entries


def _read(path: Path) -> tuple[Lines, bool]:
    """A ledger's lines and False; of one that is damaged, those that are legible, and True.

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
        return verified_entries(path), False
    except LogDamaged:
        return legible_entries(path), True


def _facts(path: Path, lines: Lines, noted: Lines) -> Facts:
    """All that is known. Raises UserError for a line or a note of another version."""
    facts, where = Facts(), str(path)
    try:
        facts.read_ledger(lines)
        where = f"{path.parent}: the audit log"
        facts.read_notes(noted)
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(
            f"{where} holds a line on privacy that this version does not read ({type(error).__name__}: {error}). "
            "Install the version that wrote it, then repeat; nothing was changed."
        ) from error
    return facts


def _check_known(path: Path, facts: Facts, lines: Lines, damaged: bool) -> None:
    """Raises UserError where it shows that not all is known.

    An audit log that knows the last line knows all, for they are noted in order. Without a head file that tells which
    one is the last, nothing speaks against it but gaps, and the server.
    """
    if (gap := facts.gap()) is not None:
        raise UserError(
            f"{path}: of its numbers {gap[0]:,} to {gap[1]:,} nothing is known: they are not legible in the ledger, "
            "and the audit log was put back to an older copy or begun anew. Put the newest copy of either there, or "
            f"{_WAY_OUT}. Nothing was changed."
        )
    ends = not damaged or _is_end_known(ChainedLog(path), facts, lines)
    if not ends or (not facts.last and (damaged or facts.heads - {GENESIS})):
        raise UserError(
            f"{path}: its last line is not legible and not in the audit log, which is an older copy or was begun anew: "
            f"what was spent cannot be known. Put the newest copy of either there, or {_WAY_OUT}. Nothing was changed."
        )


def _is_end_known(log: ChainedLog, facts: Facts, lines: Lines) -> bool:
    """Whether the last line that a damaged ledger's head file knows is known; one that cannot be read knows none."""
    try:
        end, number = log.head, log.length
    except LogDamaged:
        return True
    return end in facts.heads | {GENESIS} or len({line["n"] for line in lines if line["n"] <= number}) == number


# --- writing ----------------------------------------------------------------------------------------------------------


def _open(log: HeldLog, number: int, ceiling: Ceiling, lost: Iterable[str] = ()) -> None:
    fields = {"epsilon": ceiling.epsilon, "delta": ceiling.delta, "number": max(number, 1)}
    log.append("opened", version=VERSION, **PROMISE, **fields, lost=sorted(lost))


def _write(log: HeldLog, missing: Iterable[Fact], spare: Iterable[str], ceiling: Ceiling) -> None:
    """Add what is missing, in the order of its numbers."""
    ordered = bool(log.length) and account_of(log.path, log.entries()).order is not None
    for fact in missing:
        own = {"number": fact.number, "lost": sorted(fact.heads)}
        if not log.length:
            first = fact.kind == "allowed"
            _open(log, fact.number if first else fact.number - 1,
                  Ceiling(fact.fields["epsilon"], fact.fields["delta"]) if first else ceiling,
                  fact.heads if first else ())  # fmt: skip
            if first:
                continue
        match fact.kind:
            case "allowed":
                log.append("ceiling", **fact.fields, **own)
            case "written_off":
                log.append("written_off", **fact.fields, **own)
                ordered = False
            case "over":
                log.append("head_lost", **own)
            case "reserved":
                fields = dict(fact.fields)
                order = fields.pop("order", None)
                if not ordered:
                    share = ceiling.delta * FILTER_SHARE
                    fields["order"] = order or choose_order(fields["sigma"], fields["q"], ceiling.epsilon, share)
                log.append("recovered", **fields, **own)
                ordered = True
    for head in sorted(spare):
        log.append("head_lost", lost=[head])


def _extend(path: Path, lines: Lines, write: Callable[[HeldLog], None]) -> tuple[Path, ...]:
    """Add to a ledger that is sound, or begin it. A kill leaves it so, and what it lacks yet is still in the notes."""
    with ChainedLog(path).held() as log:
        if log.head != (lines[-1]["hash"] if lines else GENESIS):
            raise UserError(f"{path}: is being used. End the site, then repeat; nothing was changed.")
        write(log)
    return ()


def _replace(path: Path, write: Callable[[HeldLog], None]) -> tuple[Path, ...]:
    """Put another ledger in the place of a damaged one, of which copies are kept. Their names.

    The damaged one, which may be all that knows a line, stays until the new one is whole. A kill between the two
    renames leaves the new one beside the old head file: damaged, and every line legible.
    """
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
    aside = {file: file.with_name(f"{file.name}.damaged-{stamp}") for file in _files(path)}
    new = path.with_name(f"{path.name}.new")
    try:
        with _locked(path):
            for file in _files(new):
                file.unlink()  # of a recovery that was killed
            with ChainedLog(new).held() as log:
                write(log)
                account_of(new, log.entries())
            for file, kept in aside.items():
                shutil.copy2(file, kept)
            for file in _files(new):  # the log first
                file.replace(path.with_name(file.name.replace(new.name, path.name)))
    except OSError as error:
        raise UserError(
            f"{path}: could not be replaced ({error.strerror}: {error.filename}). The damaged one is still there; mend "
            "that, then repeat."
        ) from error
    return tuple(aside.values())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """No process appends to the file, if there is one."""
    if not path.exists():
        yield
        return
    with open(path, "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _tell(path: Path, audit: Path, event: str, **fields: Any) -> None:
    """Note what is new, and the ledger's head with what was done."""
    log = ChainedLog(audit)
    lines = verified_entries(path)
    note_missing(log, lines, noted_heads(audit))
    log.append(event, **fields, **{ANCHOR: lines[-1]["hash"]})


def _files(path: Path) -> list[Path]:
    """A ledger and its head file, those that are there."""
    return [file for file in (path, path.with_name(f"{path.name}.head")) if file.exists()]
