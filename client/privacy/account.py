"""A site's privacy ledger as it is read: what its lines mean, what counts, and what that comes to.

`client.privacy.ledger` writes it and says what it promises.

A history may begin with a **write-off**: what was spent before is not known any more, and is taken to be all that the
site's ceiling allowed then, (E, D). What follows is composed with it by the plain sum (Dwork and Roth 2014, theorem
3.16, which holds for mechanisms chosen by what came out before): epsilon is E and that of the history since, at what
the ceiling's delta leaves beside D.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from client.privacy.accounting import Epsilon, Mechanism, check_delta, epsilon, merged
from client.privacy.renyi import RenyiFilter
from medsegdiff.chained_log import GENESIS, LogDamaged, audit_lines, verified_entries
from medsegdiff.errors import UserError

LEDGER = "privacy-ledger.jsonl"
ANCHOR = "ledger"  # field of an audit entry: head of the ledger at that time
VERSION = 2
FILTER_SHARE = 0.05  # of delta, for schedules that change
_HEAD = re.compile(r"[0-9a-f]{64}")
PROMISE = {"unit": "patient", "neighbours": "add or remove one"}  # an entry under another promise cannot be added to


def ledger_path(folder: Path) -> Path:
    """Where a site's ledger lies: beside its audit log, in the folder of its site.yaml."""
    return folder / LEDGER


def frozen_delta(delta: float) -> float:
    """The share of delta at which a frozen schedule is accounted: plan with it, and the ledger will agree."""
    return delta * (1 - FILTER_SHARE)


@dataclass(frozen=True)
class Ceiling:
    """The most that a site lets be spent, ever. Raises UserError for values that are no budget."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        value = self.epsilon
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UserError(f"a privacy ceiling of epsilon {value!r} is none: a number above 0 is needed.")
        check_delta(self.delta)


@dataclass(frozen=True)
class Entry:
    """One reservation and what became of it."""

    id: str  # hash of its line
    run: str
    round: int
    sigma: float
    q: float
    steps: int  # reserved
    epsilon: float  # with it and all before it, when it was reserved
    time: str  # UTC
    number: int = 0  # among all lines that count, which the audit log notes with it
    taken: int | None = None  # steps; None: open, and counts in full
    recovered: bool = False  # from the audit log, after its own line was lost

    @property
    def charged(self) -> Mechanism:
        """What it counts for."""
        return Mechanism(self.sigma, self.q, self.steps if self.taken is None else self.taken)

    @property
    def state(self) -> str:
        """open, committed, recovered, or overrun: more steps than were reserved."""
        if self.taken is None:
            return "recovered" if self.recovered else "open"
        return "committed" if self.taken <= self.steps else "overrun"


@dataclass(frozen=True)
class Account:
    """A ledger as read and verified."""

    entries: tuple[Entry, ...] = ()
    order: float | None = None  # of the Renyi filter; fixed by the first reservation
    ceiling: Ceiling | None = None  # last written down
    highest: Ceiling | None = None  # of all, epsilon and delta each: no more than that was ever spent
    head: str = GENESIS
    heads: frozenset[str] = frozenset()  # every head it ever had, those of lost lines among them
    number: int = 0  # the highest of any line
    written_off: Ceiling | None = None  # taken to be spent by all that was before the last write-off
    since: int = 0  # number of that write-off
    anchors: frozenset[str] = frozenset()  # keyed heads that the server remembered, and that a write-off covers

    @property
    def counted(self) -> tuple[Entry, ...]:
        """Those that no write-off covers: by number, for a line that was recovered may stand behind it."""
        return tuple(entry for entry in self.entries if entry.number >= self.since)

    @cached_property
    def history(self) -> tuple[Mechanism, ...]:
        """All of them that counts, open reservations in full."""
        return merged(entry.charged for entry in self.counted)

    @cached_property
    def changed(self) -> bool:
        """Whether the schedule was ever another than the frozen one."""
        return len({(entry.sigma, entry.q) for entry in self.counted}) > 1

    def leaves(self, sigma: float, q: float) -> bool:
        """Whether a reservation of this schedule is another one than those before it."""
        return self.changed or any((entry.sigma, entry.q) != (sigma, q) for entry in self.counted[:1])

    def delta_left(self, delta: float) -> float:
        """What a write-off leaves of the ceiling's delta; 0 and less: nothing."""
        return delta - (self.written_off.delta if self.written_off else 0.0)


@dataclass(frozen=True)
class Spent:
    """What is spent at the ceiling's delta."""

    epsilon: float
    order: float | None  # of the Renyi filter; None: frozen schedule, by PRV and PLD
    accountants: Epsilon | None  # both figures, with a frozen schedule
    written_off: Ceiling | None = None  # counted into epsilon

    @property
    def method(self) -> str:
        """For a person."""
        if self.order is None:
            found = "frozen schedule: the larger of the PRV and PLD accountants"
        else:
            found = f"schedule was changed: Renyi filter of order {self.order:g} over the whole history"
        if self.written_off is None:
            return found
        gone = f"epsilon {self.written_off.epsilon:g} at delta {self.written_off.delta:g}"
        if self.epsilon == self.written_off.epsilon:
            return f"all before is written off as {gone}; nothing was reserved since"
        return f"{found}; added to {gone}, as which all before is written off"


def spent(account: Account, delta: float, more: Iterable[Mechanism] = (), changed: bool | None = None) -> Spent:
    """Epsilon at `delta` of an account.

    Args:
        more: what is to be reserved.
        changed: whether the schedule is then another than the frozen one; default: as it stands.

    Raises:
        UserError: it cannot be computed, or a write-off leaves nothing of delta for what came after.
    """
    history = (*account.history, *more)
    gone = account.written_off
    if gone is not None and not history:
        return Spent(gone.epsilon, None, Epsilon(0.0, 0.0, 0.0), gone)
    left = account.delta_left(delta)
    if left <= 0 and gone is not None:
        raise UserError(
            f"delta {delta:g} leaves nothing beside the {gone.delta:g} of what was written off; nothing may be "
            "trained. Put a larger delta into site.yaml's privacy section."
        )
    base = gone.epsilon if gone is not None else 0.0
    if not (account.changed if changed is None else changed):
        found = epsilon(history, frozen_delta(left))
        return Spent(base + found.value, None, found, gone)
    if account.order is None:
        raise UserError("a changed schedule without a filter's order cannot be accounted; nothing may be trained.")
    filtered = RenyiFilter(account.order, left * FILTER_SHARE).epsilon(history)
    return Spent(base + filtered, account.order, None, gone)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_account(path: Path) -> Account:
    """A ledger, every line verified; an empty account where there is none yet. Writes nothing.

    Raises:
        UserError: it cannot be read, is not as it was written, or is of another version.
    """
    with with_remedy():
        lines = verified_entries(path)
    return account_of(path, lines)


@contextmanager
def with_remedy() -> Iterator[None]:
    """Say of a damaged ledger what to do, other than with any other log: a new one must not just begin."""
    try:
        yield
    except LogDamaged as error:
        raise LogDamaged(
            f"{error} Nothing may be trained. It is a privacy ledger: do not move it out of the way; `medsegfed ledger "
            "recover` sets it aside and writes it anew from the audit log."
        ) from error


def noted_heads(audit: Path) -> set[str]:
    """Heads of the ledger that an audit log has noted; none where there is no audit log."""
    return {entry[ANCHOR] for entry in audit_lines(audit) if isinstance(entry.get(ANCHOR), str)}


def check_noted(path: Path, audit: Path, anchor: str | None = None) -> Account:
    """Verify a ledger, and that it holds every head that the audit log, or whoever gives `anchor`, has noted.

    Raises:
        UserError: says what is wrong.
    """
    noted = noted_heads(audit)  # first: what is written in between is in both, or in the ledger alone
    if anchor is not None:
        noted.add(as_head(anchor))
    account = read_account(path)
    check_anchors(path, account, noted)
    return account


def check_anchors(path: Path, account: Account, anchors: Iterable[str]) -> None:
    """Raises UserError where a head that was noted elsewhere was never this ledger's."""
    noted = set(anchors)
    missing = noted - account.heads - {GENESIS}
    if missing:
        raise UserError(
            f"{path}: {len(missing):,} of {len(noted):,} heads that were noted elsewhere, such as "
            f"{min(missing)[:80]}, are none of its {len(account.heads):,} lines: the ledger was put back to an older "
            "copy, removed or replaced, and what was spent since is missing. Nothing may be trained. Restore the "
            "newest copy; keep this one as evidence. If there is none, `medsegfed ledger recover` reads from the audit "
            "log what is missing."
        )


def highest(*ceilings: Ceiling | None) -> Ceiling:
    """The largest epsilon and the largest delta; there must be a ceiling."""
    known = [ceiling for ceiling in ceilings if ceiling is not None]
    return Ceiling(max(ceiling.epsilon for ceiling in known), max(ceiling.delta for ceiling in known))


class _Reader:
    """Lines to an account, one after the other."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.lost: set[str] = set()
        self.account = Account()

    def take(self, line: dict[str, Any]) -> None:
        """Raises KeyError, TypeError, ValueError or UserError for a line that has no place there."""
        event = line["event"]
        if event == "log_mended":
            return
        if (event == "opened") == (self.account.ceiling is not None):
            raise ValueError(f"an event '{str(event)[:40]}' that has no place there")
        match event:
            case "opened":
                _check_version(line)
                self._allow(Ceiling(line["epsilon"], line["delta"]))
            case "ceiling":
                self._allow(Ceiling(line["epsilon"], line["delta"]))
            case "reserved" | "recovered":
                self._set(order=self.account.order or _order(line["order"]))
                self.entries[line["hash"]] = _entry(line)
            case "committed" if self.entries[line["reservation"]].taken is None:
                opened = self.entries[line["reservation"]]
                self.entries[opened.id] = replace(opened, taken=whole(line["steps"]))
            case "written_off":
                self._write_off(line)
            case "head_lost":
                pass
            case _:
                raise ValueError(f"an event '{str(event)[:40]}' that has no place there")
        self.lost.update(map(_head, line.get("lost", ())))
        if event != "head_lost" or "number" in line:
            self._set(number=max(self.account.number, whole(line["number"])))

    def _allow(self, ceiling: Ceiling) -> None:
        self._set(ceiling=ceiling, highest=highest(ceiling, self.account.highest))

    def _write_off(self, line: dict[str, Any]) -> None:
        """Replaces an earlier one, which it must not be smaller than."""
        gone = highest(Ceiling(line["epsilon"], line["delta"]), self.account.written_off)
        anchors = self.account.anchors | {_head(anchor) for anchor in line["anchors"]}
        self._set(written_off=gone, since=whole(line["number"]), anchors=anchors, order=None)

    def _set(self, **fields: Any) -> None:
        self.account = replace(self.account, **fields)


def account_of(path: Path, lines: list[dict[str, Any]]) -> Account:
    """The account of verified lines; `path` is for messages. Raises UserError for a line of another version."""
    reader = _Reader()
    for line in lines:
        try:
            reader.take(line)
        except (KeyError, TypeError, ValueError, UserError) as error:
            raise UserError(
                f"{path}: line {line['n']} is none that this version reads ({type(error).__name__}: {error}). "
                "Nothing may be trained before what was spent is known. Install the version that wrote it."
            ) from error
    heads = frozenset(line["hash"] for line in lines) | reader.lost
    head = lines[-1]["hash"] if lines else GENESIS
    return replace(reader.account, entries=tuple(reader.entries.values()), heads=heads, head=head)


def _check_version(line: dict[str, Any]) -> None:
    found, known = {key: line.get(key) for key in ("version", *PROMISE)}, {"version": VERSION, **PROMISE}
    if found != known:
        raise ValueError(f"the ledger is {found}, this program keeps {known}")


def _entry(line: dict[str, Any]) -> Entry:
    entry = Entry(
        id=line["hash"],
        run=str(line["run"]),
        round=whole(line["round"]),
        sigma=float(line["sigma"]),
        q=float(line["q"]),
        steps=whole(line["steps"]),
        epsilon=float(line["epsilon"]),
        time=line["time"],
        number=whole(line["number"]),
        recovered=line["event"] == "recovered",
    )
    if entry.charged.steps < 1:  # `charged` refuses a sigma or q out of range
        raise ValueError("a reservation of no steps")
    return entry


def _order(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 < value <= 1024:
        raise ValueError(f"{value!r} is no order of a Renyi divergence")
    return value


def is_head(value: Any) -> bool:
    """Whether it is the hash of a line: 64 hexadecimal digits."""
    return isinstance(value, str) and _HEAD.fullmatch(value) is not None


def as_head(typed: str) -> str:
    """A head that a person copied. Raises UserError where it is none."""
    head = typed.strip().lower()
    if not is_head(head):
        raise UserError(f"{head[:80]!r} is no head of a ledger: 64 hexadecimal digits are. Copy it anew.")
    return head


def _head(value: Any) -> str:
    if not is_head(value):
        raise ValueError(f"{str(value)[:80]!r} is no head of a log")
    return str(value)


def whole(value: Any) -> int:
    """A whole number from 0 on. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no whole number")
    return value
