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

**What the file cannot prove**: that it is the newest copy. So every line is noted in the site's audit log
(`client.privacy.mirror`) and its head should be at the server; `check_anchor` and every reservation refuse a ledger
that lacks a noted head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from client.privacy.account import (
    FILTER_SHARE,
    PROMISE,
    VERSION,
    Account,
    Ceiling,
    Spent,
    account_of,
    check_anchors,
    noted_heads,
    read_account,
    spent,
    with_remedy,
)
from client.privacy.accounting import Mechanism
from client.privacy.mirror import note, note_missing
from client.privacy.renyi import choose_order
from client.refusal import Refusal
from medsegdiff.chained_log import ChainedLog, HeldLog
from medsegdiff.errors import UserError


class Ledger:
    """The ledger at `path` under the site's ceiling, begun by the first reservation.

    Any number of processes and threads may use it; a lock of the file puts them one after the other.

    Args:
        audit: the site's audit log. Its notes of this ledger are checked and completed, and every entry adds one.
    """

    def __init__(self, path: Path, ceiling: Ceiling, audit: Path | None = None) -> None:
        self.path, self.ceiling = path, ceiling
        self.audit = None if audit is None else ChainedLog(audit)
        self._seen: set[str] = set()  # heads that this object knows to have been the ledger's

    @property
    def head(self) -> str:
        """Hash of the last line, for noting elsewhere; 64 zeros before the first. Nothing is verified."""
        return ChainedLog(self.path).head

    def account(self) -> Account:
        """Read and verify everything. Writes nothing.

        Raises:
            UserError: the ledger cannot be read, is not as it was written, is of another version, or was rolled back.
        """
        known = self._seen | self._noted()  # first: what is written in between is in both, or in the ledger alone
        account = read_account(self.path)
        check_anchors(self.path, account, known)
        self._seen.add(account.head)
        return account

    def spent(self) -> Spent:
        """What is spent, open reservations in full. Raises as `account`."""
        return spent(self.account(), self.ceiling.delta)

    def check_anchor(self, head: str) -> None:
        """Raises UserError if `head`, noted elsewhere, was never this ledger's: it was rolled back or replaced."""
        check_anchors(self.path, self.account(), {head.strip().lower()})

    def reserve(self, run: str, round: int, sigma: float, q: float, steps: int) -> str:
        """Before the first step of a round: set aside what it may spend. Returns the reservation's id.

        Raises:
            Refusal: "budget-spent": the ceiling would be exceeded. No step may be taken then.
            UserError: nor when ledger or audit log are not sound, or the disk refuses. If it refuses the note in the
                audit log alone, the reservation stays open.
        """
        if not run or not isinstance(run, str) or len(run) > 200 or isinstance(round, bool) or round < 0:
            raise UserError(f"run {run!r}, round {round!r}: a reservation needs a run's name and a round from 0 on.")
        asked = Mechanism(float(sigma), float(q), steps)
        if steps < 1:
            raise UserError(f"{run}: round {round} reserves {steps} steps; at least 1 is needed.")
        with self._held() as (log, account):
            number = self._record_ceiling(log, account)
            with_order = self._with_order(account, asked.sigma, asked.q)
            after = self._after(with_order, run, round, asked)
            fields = {"run": run, "round": round, "sigma": asked.sigma, "q": asked.q, "steps": steps}
            if account.order is None:
                fields["order"] = with_order.order
            return self._append(log, "reserved", **fields, epsilon=after, number=number)

    def forecast(self, run: str, sigma: float, q: float, steps: int, rounds: int) -> float:
        """Epsilon at the end of a run of `rounds` rounds of `steps` steps each, those that the ledger has included.

        Raises:
            Refusal: "budget-spent": it is above the ceiling; says how many rounds would fit.
            UserError: as `account`.
        """
        account = self.account()
        made = {entry.round for entry in account.entries if entry.run == run}
        left = rounds - len(made & set(range(1, rounds + 1)))
        account = self._with_order(account, sigma, q)

        def after(more: int) -> float:
            if more == 0:
                return spent(account, self.ceiling.delta).epsilon
            return spent(
                account, self.ceiling.delta, [Mechanism(sigma, q, steps * more)], account.leaves(sigma, q)
            ).epsilon

        total = after(left)
        if total <= self.ceiling.epsilon:
            return total
        fits, beyond = 0, left  # epsilon grows with every round
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            fits, beyond = (middle, beyond) if after(middle) <= self.ceiling.epsilon else (fits, middle)
        raise Refusal(
            "budget-spent",
            f"{run}: its {left:,} rounds to come, of {steps:,} steps at sigma {sigma:g} and q {q:g}, would take "
            f"epsilon to {total:.4f} at delta {self.ceiling.delta:g}; the limit is {self.ceiling.epsilon:.4f} (spent "
            f"{after(0):.4f}, ledger {self.path}): {fits:,} rounds would fit. Nothing was trained. To go on, take a "
            "shorter run or more noise, or have the data officer raise the site's privacy ceiling in site.yaml.",
        )

    def commit(self, reservation: str, steps_taken: int) -> None:
        """After a round: only the steps that were taken count.

        Raises:
            UserError: there is no such open reservation; the ledger is not sound or the disk refuses (it stays open, in
                full); or more steps were taken than reserved: they are written down and count, but nothing of that
                round may be released.
        """
        if isinstance(steps_taken, bool) or not isinstance(steps_taken, int) or steps_taken < 0:
            raise UserError(f"{steps_taken!r} steps taken: a whole number from 0 on is needed; the reservation stays.")
        with self._held() as (log, account):
            entry = next((entry for entry in account.entries if entry.id == reservation), None)
            if entry is None or entry.taken is not None:
                state = "is unknown" if entry is None else "was committed before"
                raise UserError(f"{self.path}: the reservation {reservation[:12]!r} {state}; nothing was changed.")
            fields = {"run": entry.run, "round": entry.round, "steps": steps_taken, "reservation": reservation}
            if steps_taken > entry.steps:
                beyond = {"beyond": steps_taken - entry.steps, "sigma": entry.sigma, "q": entry.q}
                fields |= beyond | {"epsilon": entry.epsilon}
            self._append(log, "committed", **fields, number=account.number + 1)
        if steps_taken > entry.steps:
            raise UserError(
                f"{entry.run}: round {entry.round} took {steps_taken:,} steps and had reserved {entry.steps:,}: all "
                "are written down and count, and nothing of the round may be sent. The program is at fault; report it."
            )

    # --- inside the lock ---------------------------------------------------------------------------------------------

    def _with_order(self, account: Account, sigma: float, q: float) -> Account:
        """The account with a filter's order, chosen by the schedule that a first reservation freezes.

        Raises:
            Refusal: "budget-spent": a write-off covers all of the ceiling.
        """
        gone = account.written_off
        if gone is not None and (self.ceiling.epsilon <= gone.epsilon or self.ceiling.delta <= gone.delta):
            raise Refusal(
                "budget-spent",
                f"what was spent before is not known any more and was written off as epsilon {gone.epsilon:g} at delta "
                f"{gone.delta:g} (ledger {self.path}); the ceiling, epsilon {self.ceiling.epsilon:g} at delta "
                f"{self.ceiling.delta:g}, leaves nothing beside it. Nothing was trained. To go on, have the data "
                "officer put a larger epsilon and a larger delta into site.yaml: they hold for both together.",
            )
        if account.order is not None:
            return account
        left = self.ceiling.epsilon - (gone.epsilon if gone else 0.0)
        delta = account.delta_left(self.ceiling.delta) * FILTER_SHARE
        return replace(account, order=choose_order(sigma, q, left, delta))

    @contextmanager
    def _held(self) -> Iterator[tuple[HeldLog, Account]]:
        """The ledger for this process and thread alone, as the audit log and this object know it, and noted there."""
        if self.audit is not None:
            self.audit.check()  # before the ledger: a reservation whose note is refused counts, for nothing
        with ExitStack() as stack:
            with with_remedy():
                log = stack.enter_context(ChainedLog(self.path).held())
                lines = log.entries()
            noted, account = self._noted(), account_of(self.path, lines)
            check_anchors(self.path, account, self._seen | noted)
            self._seen.add(account.head)
            if self.audit is not None:
                note_missing(self.audit, lines, noted)
            yield log, account

    def _record_ceiling(self, log: HeldLog, account: Account) -> int:
        """Write the ceiling down where it is another one; returns the number of the line to come."""
        if account.ceiling == self.ceiling:
            return account.number + 1
        fields = {"epsilon": self.ceiling.epsilon, "delta": self.ceiling.delta, "number": account.number + 1}
        if account.ceiling is None:
            self._append(log, "opened", version=VERSION, **PROMISE, **fields)
        else:
            self._append(log, "ceiling", **fields)
        return account.number + 2

    def _after(self, account: Account, run: str, round_: int, asked: Mechanism) -> float:
        """Epsilon with the reservation. Raises Refusal ("budget-spent") where it is above the ceiling."""
        changed = account.leaves(asked.sigma, asked.q)
        after = spent(account, self.ceiling.delta, [asked], changed)
        if after.epsilon <= self.ceiling.epsilon:
            return after.epsilon
        before = spent(account, self.ceiling.delta)
        frozen = account.counted[0] if changed and not account.changed else None
        raise Refusal(
            "budget-spent",
            f"{run}: round {round_}, {asked.steps:,} steps at sigma {asked.sigma:g} and q {asked.q:g}, would take "
            f"epsilon to {after.epsilon:.4f} at delta {self.ceiling.delta:g}; the limit is {self.ceiling.epsilon:.4f} "
            f"(spent {before.epsilon:.4f}, ledger {self.path}). Nothing was trained. "
            + (f"It leaves the frozen schedule (sigma {frozen.sigma:g}, q {frozen.q:g}), which costs more: keep to it, "
               "or take" if frozen else "To go on, take")
            + " fewer steps or more noise, or have the data officer raise the site's privacy ceiling in site.yaml."
        )  # fmt: skip

    def _append(self, log: HeldLog, event: str, **fields: Any) -> str:
        """One line, and its note. Returns its hash."""
        head = log.append(event, **fields)
        self._seen.add(head)
        if self.audit is not None:
            note(self.audit, event, fields, head)
        return head

    def _noted(self) -> set[str]:
        return set() if self.audit is None else noted_heads(self.audit.path)
