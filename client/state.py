"""What a site keeps from round to round, under the update that it belongs to, until the server has counted that update.

Three kinds of it, each in a folder beside site.yaml:

    residuals   what compression left out of an update (client/feedback.py)
    personal    weights that stay at the site (client/personal.py)
    controls    SCAFFOLD's control variate (client/control.py)

The state that a round ends with is written down under the update's hash, before the update leaves. Each assignment
names the last update of every site that the server has counted (`Assignment.counted`); a site begins its next round
with the state of that one. So an update that was rejected, lost or too late changes nothing, a round that is asked for
again is trained from what it was trained from, and it does not matter when either side was started anew.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

from safetensors.torch import save
from torch import Tensor

from client.contract import Assignment
from client.site import Site
from medsegdiff.errors import UserError
from medsegdiff.files import FOLDER_NAME, write_atomic
from medsegdiff.weights import hash_weights, read_tensors

log = logging.getLogger("medsegfed.site")

Kind = Literal["residuals", "personal", "controls"]
REPEATABLE = 2  # rounds before the last counted one that a server with damaged checkpoints may repeat, as the outbox's
MOST_RUNS = 8  # whose state is kept: one that ended early says no goodbye
_NAME = re.compile(r"round-([0-9]{6})-([0-9a-f]{64})\.safetensors")


class SiteState:
    """One file an update: `folder`/RUN/round-NNNNNN-HASH.safetensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, site: Site, kind: Kind) -> SiteState:
        """Of a site, real or virtual."""
        return cls(site.path.parent / kind)

    def find(self, assignment: Assignment, scoring: bool = False) -> dict[str, Tensor]:
        """The state that a round begins with, or that belongs to the scored model of the round; empty before an update
        of this site has counted."""
        path = self._counted(assignment, scoring)
        if path is None:
            if assignment.counted and assignment.round > 1:
                log.warning(
                    "round %d: no %s of a counted round are here: none has counted yet, or they were lost; it begins "
                    "as a first one does",
                    assignment.round,
                    self._kind,
                )
            return {}
        try:
            state, metadata = read_tensors(path)
            if metadata.get("hash") == hash_weights(state):
                return state
            fault = "its hash differs"
        except UserError as error:
            fault = str(error)
        log.error("round %d: %s of the round before are damaged, and lost (%s)", assignment.round, self._kind, fault)
        return {}

    def keep(self, assignment: Assignment, delta_hash: str, state: Mapping[str, Tensor]) -> None:
        """Write down the state that belongs to an update, before it leaves; what no round can need any more is let go.

        Raises:
            UserError: the disk refuses; then nothing may be sent.
        """
        kept = {name: value.contiguous() for name, value in state.items()}
        path = self.folder / _checked(assignment.run) / f"round-{assignment.round:06d}-{delta_hash}.safetensors"
        write_atomic(path, save(kept, metadata={"hash": hash_weights(kept)}), mode=0o600)
        counted = self._counted(assignment)
        oldest = _round_of(counted) - REPEATABLE if counted is not None else assignment.round - REPEATABLE
        for other in self._files(assignment.run):
            # Between the last counted round and this one lie updates that did not count; before it, those that did.
            between = counted is not None and _round_of(counted) < _round_of(other) < assignment.round
            if other not in (path, counted) and (between or _round_of(other) < oldest):
                other.unlink(missing_ok=True)
        runs = sorted((run for run in self.folder.glob("*") if run.is_dir()), key=lambda run: run.stat().st_mtime)
        for run in runs[:-MOST_RUNS]:
            shutil.rmtree(run, ignore_errors=True)

    def settle(self, assignment: Assignment) -> None:
        """The last round is scored: what belongs to it stays, should it be scored again; the rest is let go."""
        last = self._counted(assignment, scoring=True)
        for path in self._files(assignment.run):
            if path != last:
                path.unlink(missing_ok=True)

    def forget(self, run: str) -> None:
        """The run is over."""
        shutil.rmtree(self.folder / _checked(run), ignore_errors=True)

    @property
    def _kind(self) -> str:
        return self.folder.name

    def _counted(self, assignment: Assignment, scoring: bool = False) -> Path | None:
        """The file of this site's last counted update: before the round, or up to it where its model is scored."""
        named: Collection[str] = frozenset(assignment.counted)
        last = assignment.round if scoring else assignment.round - 1
        found = [path for path in self._files(assignment.run) if _round_of(path) <= last and path.stem[-64:] in named]
        return max(found, key=_round_of, default=None)

    def _files(self, run: str) -> list[Path]:
        return [path for path in (self.folder / _checked(run)).glob("round-*") if _NAME.fullmatch(path.name)]


def _round_of(path: Path) -> int:
    return int(path.name[6:12])


def _checked(run: str) -> str:
    if not FOLDER_NAME.fullmatch(run):
        raise UserError(f"run {run[:64]!r}: is no name of a run (letters, digits, '-', '_', '.'). Nothing was trained.")
    return run
