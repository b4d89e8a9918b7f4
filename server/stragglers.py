"""Updates that come when their round is over: counted once, with less weight, in the round that is then open.

    weight of a late update = n (1 + s)^-a        s: rounds that it is late, 1 <= s <= max_staleness

The polynomial of Xie et al. (2019, arXiv 1903.03934); Nguyen et al. (2022, arXiv 2106.06639) use a = 1/2. The sum is
divided by all weights, late ones included, so that a late update takes the place of others and never adds to them. It
is the change of its own round's model, as in both papers: it is added to a model that has moved on since.

What a round counts late stands in its record, and its arrays on the disk for as long as damage may have the round
repeated: a site cannot be asked again for a round that it has left behind.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Message
from safetensors.torch import save
from torch import Tensor

from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from medsegdiff.weights import hash_weights, read_tensors
from server.aggregation import AggregationOverflow
from server.checkpoints import KEPT
from server.config import StragglerConfig
from server.journal import Journal
from server.records import told_update
from server.robust import Aggregate
from server.screening import Accepted, Expected, Rejection, screen_update

log = logging.getLogger("medsegfed.server")

FOLDER = "late"  # in the run folder


def staleness_weight(staleness: int, exponent: float) -> float:
    """(1 + s)^-a, in (0, 1]."""
    return float((1 + staleness) ** -exponent)


class LateUpdates:
    """The late updates of one run's round at hand.

    Args:
        folder: where their arrays lie: round-RRRRRR/NNNNNN-SITE.safetensors for the update of round N counted in R.

    Guarantees:
        An update of (site, round) counts in one committed round at most, across restarts.
        A round that is repeated counts the late updates that it counted, bit for bit, or is not committed.
    """

    def __init__(self, config: StragglerConfig, folder: Path, journal: Journal) -> None:
        self.config, self.folder, self.journal = config, folder, journal
        self._round = 0
        self._rows: list[dict[str, Any]] = []
        self._repeated = False
        self.rejected: dict[str, str] = {}  # site -> why its late update does not count
        self.bytes = 0  # received of what was counted

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What the round's record says of them, in an order that does not depend on their arrival."""
        return sorted(self._rows, key=lambda row: (row["site"], row["round"]))

    def begin(self, round_: int, aggregate: Aggregate) -> None:
        """Open a round; one that was committed before takes in what it counted then.

        Raises:
            UserError: an update that a repeated round counted is not on the disk any more.
        """
        before = self.journal.last("round", round=round_)
        self._round, self._rows, self._repeated = round_, [], before is not None
        self.rejected, self.bytes = {}, 0
        if before is None:
            shutil.rmtree(self._place(round_), ignore_errors=True)  # of a round that was not committed
            return
        for row in before.get("late", []):
            aggregate.add(_key(row), self._read(row), row["patients"], row["share"])
            self._rows.append(row)

    def is_wanted(self, site: str, round_: int) -> bool:
        """Whether an update may count in the round at hand: late, not too late, and never counted before."""
        if self._repeated or not 1 <= self._round - round_ <= self.config.max_staleness:
            return False
        own = self.journal.last("round", round=round_)
        if own is None or site in own["accepted"] or site in own["rejected"]:
            return False
        told = (row for event in self.journal.events if event["event"] == "round" for row in event.get("late", []))
        return all((row["site"], row["round"]) != (site, round_) for row in (*told, *self._rows))

    def take(self, reply: Message, expected: Expected, aggregate: Aggregate) -> dict[str, Any] | Rejection:
        """Screen an update by its own round's measure and fold it; returns what the audit log is told, or why not.

        Args:
            expected: of the round that it was made in: its base model, its norms.

        Raises:
            UserError: the disk refuses.
        """
        outcome = screen_update(reply, expected)
        if isinstance(outcome, Accepted):
            try:
                return self._count(outcome, aggregate)
            except AggregationOverflow as error:
                outcome = Rejection(expected.site, str(error))
        late = Rejection(expected.site, f"its late update of round {expected.round}: {outcome.reason}")
        self.rejected[expected.site] = late.reason
        return late

    def _count(self, outcome: Accepted, aggregate: Aggregate) -> dict[str, Any]:
        update, staleness = outcome.update, self._round - outcome.update.round
        row = {
            "site": update.site,
            "round": update.round,
            "staleness": staleness,
            "share": staleness_weight(staleness, self.config.exponent),
            "delta": update.delta_hash,
            **told_update(update, outcome.norm),
        }
        kept = {name: value.contiguous() for name, value in outcome.delta.items()}
        write_atomic(self._file(row), save(kept, metadata={"delta": update.delta_hash}))
        aggregate.add(_key(row), outcome.delta, update.patients, row["share"])
        self._rows.append(row)
        self.bytes += outcome.bytes
        told = {"patients": update.patients, "delta": update.delta_hash, "share": row["share"]}
        return told | ({"ledger_anchor": update.ledger_anchor} if update.ledger_anchor else {})

    def forget(self) -> None:
        """The round at hand is committed: what no repetition can need any more goes."""
        for path in self.folder.glob("round-*"):
            if path.name <= self._place(self._round - KEPT).name:
                shutil.rmtree(path, ignore_errors=True)

    def _read(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        path = self._file(row)
        try:
            delta = read_tensors(path)[0]
            fault = "" if hash_weights(delta) == row["delta"] else "its arrays are not the ones that were counted"
        except UserError as error:
            fault = str(error)
        if fault:
            raise UserError(
                f"{path}: round {self._round} counted this late update of {row['site']}, and is repeated because its "
                f"checkpoint was damaged; it cannot be: {fault}. Restore the run's folder from a backup, or start "
                "a new run."
            )
        return delta

    def _place(self, round_: int) -> Path:
        return self.folder / f"round-{max(round_, 0):06d}"

    def _file(self, row: Mapping[str, Any]) -> Path:
        return self._place(self._round) / f"{row['round']:06d}-{row['site']}.safetensors"


def _key(row: Mapping[str, Any]) -> str:
    """Names an update in an aggregate beside its site's own of the round; no site's name has a blank."""
    return f"{row['site']} {row['round']}"
