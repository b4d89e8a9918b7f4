"""What a site's patients have spent of their privacy: a ledger on the site's disk, across runs, restarts, reinstalls.

    reserve   before the first step of a round; refused where the ceiling would be exceeded; counts in full from then on
    commit    after it: the steps that were taken, which may be fewer; without it the reservation stays open, in full

The file is a `medsegdiff.chained_log`: every line flushed to the disk, edits and cuts show, and a ledger that is not
as it was written lets nothing be trained. A round that is repeated after a crash is a new reservation with fresh noise.

**Guarantee**: (epsilon, delta)-DP of all that was ever released, add or remove one patient, for the site's ceiling.
Sigma and q are frozen by the first reservation, and as long as all entries have them, the history is composed by PRV
and PLD (`client.privacy.accounting`). How many steps are taken may depend on what came out: whatever stops early is a
part of the longest history within the ceiling, and that one is fixed by sigma and q. The first entry with another sigma
or q turns accounting, for good and for the whole history, to a Renyi filter (`client.privacy.renyi`), whose order was
written down by the first reservation.

That a later schedule may be chosen from what came out before has to be paid for: the outcomes after which a site
changes and those after which it does not are two sets, and what can go wrong on each adds up. So delta is shared
beforehand: 19/20 belong to the frozen schedule, 1/20 to the filter. On outcomes without a change the joint density is
that of the frozen composition, on the others that of the filtered one; the integrals of (P - e^epsilon Q)+ over the two
sets are at most the two shares, together delta. Keeping to the frozen schedule so costs about 0.3 % of epsilon.

A ceiling that is raised after results were seen holds as if it had been the higher one from the start.

**What the file cannot prove**: that it is the newest copy. So its head is noted in the site's audit log with every
entry and should be at the server; `check_anchor` and every reservation refuse a ledger that lacks a noted head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from client.privacy.accounting import Epsilon, Mechanism, check_delta, epsilon, merged
from client.privacy.renyi import RenyiFilter, choose_order
from medsegdiff.chained_log import GENESIS, ChainedLog, HeldLog, audit_lines, verified_entries
from medsegdiff.errors import UserError

LEDGER = "privacy-ledger.jsonl"
ANCHOR = "ledger"  # field of an audit entry: head of the ledger at that time
VERSION = 1
FILTER_SHARE = 0.05  # of delta, for schedules that change
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
    taken: int | None = None  # steps; None: open, and counts in full

    @property
    def charged(self) -> Mechanism:
        """What it counts for."""
        return Mechanism(self.sigma, self.q, self.steps if self.taken is None else self.taken)

    @property
    def state(self) -> str:
        """open, committed, or overrun: more steps than were reserved."""
        if self.taken is None:
            return "open"
        return "committed" if self.taken <= self.steps else "overrun"


@dataclass(frozen=True)
class Account:
    """A ledger as read and verified."""

    entries: tuple[Entry, ...]
    order: float | None  # of the Renyi filter; fixed by the first reservation
    ceiling: Ceiling | None  # last written down
    head: str
    heads: frozenset[str]  # every head it ever had

    @cached_property
    def history(self) -> tuple[Mechanism, ...]:
        """All that counts, open reservations in full."""
        return merged(entry.charged for entry in self.entries)

    @cached_property
    def changed(self) -> bool:
        """Whether the schedule was ever another than the frozen one."""
        return len({(entry.sigma, entry.q) for entry in self.entries}) > 1


@dataclass(frozen=True)
class Spent:
    """What is spent at the ceiling's delta."""

    epsilon: float
    order: float | None  # of the Renyi filter; None: frozen schedule, by PRV and PLD
    accountants: Epsilon | None  # both figures, with a frozen schedule

    @property
    def method(self) -> str:
        """For a person."""
        if self.order is None:
            return "frozen schedule: the larger of the PRV and PLD accountants"
        return f"schedule was changed: Renyi filter of order {self.order:g} over the whole history"


def spent(history: Iterable[Mechanism], order: float | None, changed: bool, delta: float) -> Spent:
    """Epsilon at `delta` of a ledger's history. Raises UserError where it cannot be computed."""
    if not changed:
        found = epsilon(history, frozen_delta(delta))
        return Spent(found.value, None, found)
    if order is None:
        raise UserError("a changed schedule without a filter's order cannot be accounted; nothing may be trained.")
    return Spent(RenyiFilter(order, delta * FILTER_SHARE).epsilon(history), order, None)


class Ledger:
    """The ledger at `path` under the site's ceiling, begun by the first reservation.

    Any number of processes and threads may use it; a lock of the file puts them one after the other.

    Args:
        audit: the site's audit log. Its notes of this ledger's heads are checked, and every entry adds one.
    """

    def __init__(self, path: Path, ceiling: Ceiling, audit: Path | None = None) -> None:
        self.path, self.ceiling, self.audit = path, ceiling, audit
        self._noted: set[str] | None = None  # heads known to have been the ledger's

    @property
    def head(self) -> str:
        """Hash of the last line, for noting elsewhere; 64 zeros before the first. Nothing is verified."""
        return ChainedLog(self.path).head

    def account(self) -> Account:
        """Read and verify everything. Writes nothing.

        Raises:
            UserError: the ledger cannot be read, is not as it was written, is of another version, or was rolled back.
        """
        account = read_account(self.path)
        self._check_noted(account)
        return account

    def spent(self) -> Spent:
        """What is spent, open reservations in full. Raises as `account`."""
        account = self.account()
        return spent(account.history, account.order, account.changed, self.ceiling.delta)

    def check_anchor(self, head: str) -> None:
        """Raises UserError if `head`, noted elsewhere, was never this ledger's: it was rolled back or replaced."""
        _check_anchors(self.path, self.account(), {head.strip().lower()})

    def reserve(self, run: str, round: int, sigma: float, q: float, steps: int) -> str:
        """Before the first step of a round: set aside what it may spend. Returns the reservation's id.

        Raises:
            UserError: the ceiling would be exceeded, or the ledger is not sound, or the disk refuses. No step may be
                taken then. If the audit log refuses the note, the reservation stays open.
        """
        if not run or not isinstance(run, str) or len(run) > 200 or isinstance(round, bool) or round < 0:
            raise UserError(f"run {run!r}, round {round!r}: a reservation needs a run's name and a round from 0 on.")
        asked = Mechanism(float(sigma), float(q), steps)
        if steps < 1:
            raise UserError(f"{run}: round {round} reserves {steps} steps; at least 1 is needed.")
        with ChainedLog(self.path).held() as log:
            account = self._account_of(log)
            self._record_ceiling(log, account)
            order = account.order or choose_order(asked.sigma, asked.q, self.ceiling.epsilon, self._filter_delta)
            after = self._after(account, order, run, round, asked)
            fields = {"run": run, "round": round, "sigma": asked.sigma, "q": asked.q, "steps": steps}
            if account.order is None:
                fields["order"] = order
            reservation = log.append("reserved", **fields, epsilon=after)
            self._note(log.head, "privacy_reserved", **fields, epsilon=after)
        return reservation

    def commit(self, reservation: str, steps_taken: int) -> None:
        """After a round: only the steps that were taken count.

        Raises:
            UserError: there is no such open reservation; the ledger is not sound or the disk refuses (it stays open, in
                full); or more steps were taken than reserved: they are written down and count, but nothing of that
                round may be released.
        """
        if isinstance(steps_taken, bool) or not isinstance(steps_taken, int) or steps_taken < 0:
            raise UserError(f"{steps_taken!r} steps taken: a whole number from 0 on is needed; the reservation stays.")
        with ChainedLog(self.path).held() as log:
            account = self._account_of(log)
            entry = next((entry for entry in account.entries if entry.id == reservation), None)
            if entry is None or entry.taken is not None:
                state = "is unknown" if entry is None else "was committed before"
                raise UserError(f"{self.path}: the reservation {reservation[:12]!r} {state}; nothing was changed.")
            fields = {"run": entry.run, "round": entry.round, "steps": steps_taken}
            log.append("committed", **fields, reservation=reservation)
            self._note(log.head, "privacy_committed", **fields)
        if steps_taken > entry.steps:
            raise UserError(
                f"{entry.run}: round {entry.round} took {steps_taken:,} steps and had reserved {entry.steps:,}: all "
                "are written down and count, and nothing of the round may be sent. The program is at fault; report it."
            )

    # --- inside the lock ---------------------------------------------------------------------------------------------

    @property
    def _filter_delta(self) -> float:
        return self.ceiling.delta * FILTER_SHARE

    def _account_of(self, log: HeldLog) -> Account:
        account = _account(self.path, log.entries())
        self._check_noted(account)
        return account

    def _record_ceiling(self, log: HeldLog, account: Account) -> None:
        if account.ceiling == self.ceiling:
            return
        ceiling = {"epsilon": self.ceiling.epsilon, "delta": self.ceiling.delta}
        if account.ceiling is None:
            log.append("opened", version=VERSION, **PROMISE, **ceiling)
        else:
            log.append("ceiling", **ceiling)
        self._remember(log.head)

    def _after(self, account: Account, order: float, run: str, round_: int, asked: Mechanism) -> float:
        """Epsilon with the reservation. Raises UserError where it is above the ceiling."""
        history = (*account.history, asked)
        changed = account.changed or any((e.sigma, e.q) != (asked.sigma, asked.q) for e in account.entries[:1])
        after = spent(history, order, changed, self.ceiling.delta)
        if after.epsilon <= self.ceiling.epsilon:
            return after.epsilon
        before = spent(account.history, account.order, account.changed, self.ceiling.delta)
        frozen = account.entries[0] if changed and not account.changed else None
        raise UserError(
            f"{run}: round {round_}, {asked.steps:,} steps at sigma {asked.sigma:g} and q {asked.q:g}, would take "
            f"epsilon to {after.epsilon:.4f} at delta {self.ceiling.delta:g}; the limit is {self.ceiling.epsilon:.4f} "
            f"(spent {before.epsilon:.4f}, ledger {self.path}). Nothing was trained. "
            + (f"It leaves the frozen schedule (sigma {frozen.sigma:g}, q {frozen.q:g}), which costs more: keep to it, "
               "or take" if frozen else "To go on, take")
            + " fewer steps or more noise, or have the data officer raise the site's privacy ceiling in site.yaml."
        )  # fmt: skip

    def _note(self, head: str, event: str, **fields: Any) -> None:
        self._remember(head)
        if self.audit is not None:
            ChainedLog(self.audit).append(event, **fields, **{ANCHOR: head})

    def _remember(self, head: str) -> None:
        self._noted = (self._noted or set()) | {head}

    def _check_noted(self, account: Account) -> None:
        """Refuse a ledger that lacks a head which the audit log, or this process, knows."""
        if self._noted is None:
            self._noted = set() if self.audit is None else noted_heads(self.audit)
        _check_anchors(self.path, account, self._noted)
        self._remember(account.head)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_account(path: Path) -> Account:
    """A ledger, every line verified; an empty account where there is none yet. Writes nothing.

    Raises:
        UserError: it cannot be read, is not as it was written, or is of another version.
    """
    return _account(path, verified_entries(path))


def noted_heads(audit: Path) -> set[str]:
    """Heads of the ledger that an audit log has noted; none where there is no audit log."""
    return {entry[ANCHOR] for entry in audit_lines(audit) if isinstance(entry.get(ANCHOR), str)}


def check_noted(path: Path, audit: Path, anchor: str | None = None) -> Account:
    """Verify a ledger, and that it holds every head that the audit log, or whoever gives `anchor`, has noted.

    Raises:
        UserError: says what is wrong.
    """
    account = read_account(path)
    _check_anchors(path, account, noted_heads(audit) | ({anchor.strip().lower()} if anchor else set()))
    return account


def _check_anchors(path: Path, account: Account, anchors: set[str]) -> None:
    missing = anchors - account.heads - {GENESIS}
    if missing:
        raise UserError(
            f"{path}: {len(missing):,} of {len(anchors):,} heads that were noted elsewhere, such as "
            f"{min(missing)[:80]}, are none of its {len(account.heads):,} lines: the ledger was put back to an older "
            "copy, removed or replaced, and what was spent since is missing. Nothing may be trained. Restore the "
            "newest copy; keep this one as evidence."
        )


def _account(path: Path, lines: list[dict[str, Any]]) -> Account:
    entries: dict[str, Entry] = {}
    order: float | None = None
    ceiling: Ceiling | None = None
    for line in lines:
        try:
            match line["event"]:
                case "log_mended":
                    pass
                case "opened" if ceiling is None:
                    _check_version(line)
                    ceiling = Ceiling(line["epsilon"], line["delta"])
                case "ceiling" if ceiling is not None:
                    ceiling = Ceiling(line["epsilon"], line["delta"])
                case "reserved" if ceiling is not None:
                    order = order or _order(line["order"])
                    entries[line["hash"]] = _entry(line)
                case "committed" if entries[line["reservation"]].taken is None:
                    opened = entries[line["reservation"]]
                    entries[opened.id] = replace(opened, taken=_whole(line["steps"]))
                case event:
                    raise ValueError(f"an event '{str(event)[:40]}' that has no place there")
        except (KeyError, TypeError, ValueError, UserError) as error:
            raise UserError(
                f"{path}: line {line['n']} is none that this version reads ({type(error).__name__}: {error}). "
                "Nothing may be trained before what was spent is known. Install the version that wrote it."
            ) from error
    heads = frozenset(line["hash"] for line in lines)
    return Account(tuple(entries.values()), order, ceiling, lines[-1]["hash"] if lines else GENESIS, heads)


def _check_version(line: dict[str, Any]) -> None:
    found, known = {key: line.get(key) for key in ("version", *PROMISE)}, {"version": VERSION, **PROMISE}
    if found != known:
        raise ValueError(f"the ledger is {found}, this program keeps {known}")


def _entry(line: dict[str, Any]) -> Entry:
    entry = Entry(
        id=line["hash"],
        run=str(line["run"]),
        round=_whole(line["round"]),
        sigma=float(line["sigma"]),
        q=float(line["q"]),
        steps=_whole(line["steps"]),
        epsilon=float(line["epsilon"]),
        time=line["time"],
    )
    if entry.charged.steps < 1:  # `charged` refuses a sigma or q out of range
        raise ValueError("a reservation of no steps")
    return entry


def _order(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 < value <= 1024:
        raise ValueError(f"{value!r} is no order of a Renyi divergence")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no whole number")
    return value
