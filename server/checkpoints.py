"""One file a round: weights, and the record of the round that made them. Writing it is what commits the round."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from medsegdiff.strict import canonical_json
from medsegdiff.weights import hash_weights, read_tensors

log = logging.getLogger("medsegfed.server")

KEPT = 3


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a round (0: before the first)."""

    run: str
    round: int
    weights: dict[str, Tensor]
    record: dict[str, Any]  # what happened in the round, as the journal tells it


class CheckpointStore:
    """The last `KEPT` rounds of one run in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, checkpoint: Checkpoint) -> None:
        """Commit a round. Raises UserError when the disk refuses; the earlier rounds stay."""
        metadata = {
            "run": checkpoint.run,
            "round": str(checkpoint.round),
            "hash": hash_weights(checkpoint.weights),
            "record": json.dumps(checkpoint.record, sort_keys=True, allow_nan=False),
        }
        metadata["seal"] = _seal(metadata)
        data = save({name: value.contiguous() for name, value in checkpoint.weights.items()}, metadata=metadata)
        write_atomic(self._path(checkpoint.round), data)
        for path in self._paths()[KEPT:]:
            path.unlink(missing_ok=True)

    def latest(self, run: str) -> Checkpoint | None:
        """The newest round whose file is whole; a torn or edited one is named in the log and passed over.

        Raises:
            UserError: there are files, and none of them is good.
        """
        paths = self._paths()
        for path in paths:
            try:
                return self._load(path, run)
            except UserError as error:
                log.warning("%s The round before it is used.", error)
        if paths:
            raise UserError(
                f"{self.folder}: none of its {len(paths)} checkpoints can be used. Start the run in another folder."
            )
        return None

    def _load(self, path: Path, run: str) -> Checkpoint:
        weights, metadata = read_tensors(path)
        if metadata.get("run") != run:
            raise UserError(f"{path}: belongs to run {metadata.get('run')!r}, not {run!r}.")
        if metadata.get("hash") != hash_weights(weights):
            raise UserError(f"{path}: its weights do not have the hash they were written with; the file is damaged.")
        if metadata.pop("seal", None) != _seal(metadata) or path != self._path(int(metadata["round"])):
            raise UserError(f"{path}: its record is not the one that was written; the file is damaged.")
        return Checkpoint(run, int(metadata["round"]), weights, json.loads(metadata["record"]))

    def _path(self, round_: int) -> Path:
        return self.folder / f"round-{round_:06d}.safetensors"

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("round-*.safetensors"), reverse=True)


def _seal(metadata: dict[str, str]) -> str:
    """Hex SHA-256 over run, round, record and the weights' hash: no part of a checkpoint can change unnoticed."""
    return hashlib.sha256(canonical_json(metadata).encode()).hexdigest()
