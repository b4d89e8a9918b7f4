"""One file a round: weights, and the record of the round that made them. Writing it is what commits the round."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from medsegdiff.errors import UserError
from medsegdiff.files import clear_partials, write_atomic
from medsegdiff.strict import canonical_json
from medsegdiff.weights import hash_packed, hash_weights, read_tensors

log = logging.getLogger("medsegfed.server")

KEPT = 3
BEST = "best.safetensors"
AVERAGE = "average"  # part of the memory: the model averaged over rounds
_PIECE = 2**22  # bytes read at a time
_LARGEST_HEAD = 10**8  # bytes of a file's own description
_PART = "/"  # between a part of the optimizer's memory and a weight's name, which has none


@dataclass(frozen=True)
class Committed:
    """A round that was committed, without its model, which lies on the disk."""

    run: str
    round: int
    record: dict[str, Any]  # what happened in the round, as the journal tells it

    @property
    def released_hash(self) -> str:
        """Identity of the model that is scored and handed out."""
        return str(self.record.get("released", self.record["model_hash"]))


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a round (0: before the first)."""

    run: str
    round: int
    weights: dict[str, Tensor]
    record: dict[str, Any]  # what happened in the round, as the journal tells it
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # memory of the server's optimizer, by its parts

    @property
    def released(self) -> dict[str, Tensor]:
        """The model that is scored and handed out: the average over rounds where one is kept, else the weights."""
        return self.state.get(AVERAGE, self.weights)

    @property
    def told(self) -> Committed:
        """All but the model."""
        return Committed(self.run, self.round, self.record)


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
        tensors = dict(checkpoint.weights)
        if checkpoint.state:
            memory = {
                f"{part}{_PART}{name}": v for part, found in checkpoint.state.items() for name, v in found.items()
            }
            metadata["state"] = hash_weights(memory)
            tensors |= memory
        metadata["seal"] = _seal(metadata)
        data = save({name: value.contiguous() for name, value in tensors.items()}, metadata=metadata)
        clear_partials(self.folder)  # of a model each: many kills while writing would fill the disk
        write_atomic(self._path(checkpoint.round), data)
        for path in self._paths()[KEPT:]:
            path.unlink(missing_ok=True)

    def keep(self, round_: int) -> None:
        """Put a round that is among the last aside as the best one, in place of the earlier best."""
        write_atomic(self.folder / BEST, self._path(round_).read_bytes())

    def best(self, run: str) -> Checkpoint | None:
        """The round that was put aside. None: none was, or its file is damaged."""
        path = self.folder / BEST
        try:
            return self._load(path, run) if path.exists() else None
        except UserError as error:
            log.warning("%s", error)
            return None

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

    def at(self, committed: Committed) -> Checkpoint:
        """A round that was committed by this process, with its model.

        Raises:
            UserError: its file is gone, or not as it was written; caused by an OSError, as other faults of a disk are.
        """
        try:
            return self._load(self._path(committed.round), committed.run)
        except UserError as error:
            raise UserError(str(error)) from OSError(error)

    def packed(self, committed: Committed, identity: str, part: str = "") -> bytes:
        """A committed round's weights, or a part of its memory, as they travel: float32, name after name.

        Read piece by piece: nothing else of the model is in memory beside them, for they are also sent while the sum of
        a round's updates is there.

        Args:
            identity: the hash they must have.

        Raises:
            UserError: the file is gone, or not as it was written; caused by an OSError.
        """
        path = self._path(committed.round)
        try:
            with path.open("rb") as file:
                head = int.from_bytes(file.read(8), "little")  # safetensors: length, JSON, data
                entries = json.loads(file.read(min(head, _LARGEST_HEAD)))
                wanted = {
                    name.removeprefix(f"{part}{_PART}"): entry
                    for name, entry in entries.items()
                    if name != "__metadata__" and name.rpartition(_PART)[0] == part
                }
                shapes = {name: tuple(entry["shape"]) for name, entry in wanted.items()}
                due = 4 * sum(math.prod(shape) for shape in shapes.values())
                data = BytesIO()
                for name in sorted(wanted):
                    begin, end = wanted[name]["data_offsets"]
                    file.seek(8 + head + begin)
                    while begin < end:
                        piece = file.read(min(_PIECE, end - begin))
                        if not piece:
                            raise ValueError("its end is missing")
                        data.write(piece)
                        begin += len(piece)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(path, str(error)) from OSError(error)
        found = data.getvalue()  # the buffer itself, not a copy
        if len(found) != due or hash_packed(found, shapes) != identity:
            fault = "its weights do not have the hash they were written with"
            raise _unreadable(path, fault) from OSError(fault)
        return found

    def _load(self, path: Path, run: str) -> Checkpoint:
        tensors, metadata = read_tensors(path)
        weights = {name: value for name, value in tensors.items() if _PART not in name}
        memory = {name: value for name, value in tensors.items() if _PART in name}
        if metadata.get("run") != run:
            raise UserError(f"{path}: belongs to run {metadata.get('run')!r}, not {run!r}.")
        if metadata.get("hash") != hash_weights(weights):
            raise UserError(f"{path}: its weights do not have the hash they were written with; the file is damaged.")
        if metadata.get("state") != (hash_weights(memory) if memory else None):
            raise UserError(f"{path}: the optimizer's memory is not the one that was written; the file is damaged.")
        sealed = metadata.pop("seal", None) == _seal(metadata)
        if not sealed or path not in (self._path(int(metadata["round"])), self.folder / BEST):
            raise UserError(f"{path}: its record is not the one that was written; the file is damaged.")
        state: dict[str, dict[str, Tensor]] = {}
        for name, value in memory.items():
            part, _, weight = name.partition(_PART)
            state.setdefault(part, {})[weight] = value
        return Checkpoint(run, int(metadata["round"]), weights, json.loads(metadata["record"]), state)

    def _path(self, round_: int) -> Path:
        return self.folder / f"round-{round_:06d}.safetensors"

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("round-*.safetensors"), reverse=True)


def _unreadable(path: Path, fault: str) -> UserError:
    return UserError(f"{path}: cannot be read ({fault}). It was written by this run; look at the disk, and go on.")


def _seal(metadata: dict[str, str]) -> str:
    """Hex SHA-256 over run, round, record and the weights' hash: no part of a checkpoint can change unnoticed."""
    return hashlib.sha256(canonical_json(metadata).encode()).hexdigest()
