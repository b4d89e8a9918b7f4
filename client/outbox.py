"""Signed updates of a site that the server has not committed yet.

An update is written here before it leaves. Until the server has committed the round, a repeated request for it is
answered with the same bytes: no second training, and under privacy no second epsilon. That the round was committed
shows in the next request: training for round r proves r - 1, scoring round r proves r. The last two committed rounds
stay, too: a server whose newest checkpoints were damaged goes back to the one before, and asks for them again.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.torch import save
from torch import Tensor

from client.contract import (
    PACKED,
    SIGNATURE,
    Assignment,
    ContractError,
    TrainTask,
    Update,
    arrays_from_wire,
    arrays_to_wire,
    from_wire,
)
from client.personalisation import sent_shapes
from medsegdiff.errors import UserError
from medsegdiff.files import clear_partials, write_atomic
from medsegdiff.weights import hash_weights, read_tensors

log = logging.getLogger("medsegfed.site")

TRAININGS = "trainings"  # beside the updates of a run, and kept when they go: round and base model of every training

MOST_RUNS = 8  # whose updates are kept: a run says no goodbye, and two models' worth of it would lie here for ever
SCORED = "scored"  # beside them: hashes of the models whose scores have left


class Outbox:
    """One file a round: `folder`/RUN/round-NNNNNN.safetensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, update: Update, delta: dict[str, Tensor], content: RecordDict) -> None:
        """Write an update down before it is sent. Raises UserError when the disk refuses: then nothing may be sent."""
        metadata = {
            "update": str(content.config_records["update"]["json"]),
            "signature": bytes(content.config_records[SIGNATURE]["ed25519"]).hex(),  # type: ignore[arg-type]
        }
        sent = content.array_records["delta"][PACKED]
        if sent.dtype == "uint8":  # compressed: another version of zlib would make other bytes of the same change
            metadata["encoding"] = sent.stype
            kept = {PACKED: torch.from_numpy(np.frombuffer(sent.data, np.uint8).copy())}
        else:
            kept = {name: value.contiguous() for name, value in delta.items()}
        clear_partials(self.folder / update.run)  # of an update each, left by whoever was killed while writing
        write_atomic(self._path(update.run, update.round), save(kept, metadata=metadata))
        self._enter(update)  # after it: a disk that is full for an hour must not use the trainings up
        self._let_go()

    def find(self, assignment: Assignment, task: TrainTask | None = None) -> tuple[Update, RecordDict] | None:
        """The update of a round as it was, or would have been, sent; None where there is none, or it is damaged.

        Args:
            task: of the run; a compressed update cannot be read without it.
        """
        path = self._path(assignment.run, assignment.round)
        if not path.exists():
            return None
        try:
            kept, metadata = read_tensors(path)
            arrays, delta = _as_sent(kept, metadata, task)
            content = RecordDict(
                {
                    "update": ConfigRecord({"json": metadata["update"]}),
                    "delta": arrays,
                    SIGNATURE: ConfigRecord({"ed25519": bytes.fromhex(metadata["signature"])}),
                }
            )
            update = from_wire(content, "update", Update)
            if update.delta_hash != hash_weights(delta):
                raise UserError("its arrays do not have the hash that was signed")
        except (UserError, KeyError, ValueError) as error:
            log.error("round %d: the kept update is damaged (%s); the round is trained anew", assignment.round, error)
            return None
        return update, content

    def trainings(self, run: str) -> int:
        """How often the site has trained for a run; every update that was kept counts."""
        return len(self._trained(run))

    def base_of(self, run: str, round_: int) -> str | None:
        """Hash of the model that a round was trained from, also after its update was forgotten.

        A training whose update was kept and which was not entered, because the process was killed in between, is
        entered now: it counts, and the round is not trained from another model.
        """
        base = next((base for number, base in self._trained(run) if number == round_), None)
        if base is None and (update := self._kept(run, round_)) is not None:
            self._enter(update)
            return update.base_hash
        return base

    def _kept(self, run: str, round_: int) -> Update | None:
        """What a kept update says of itself; None where there is none, or it cannot be read."""
        path = self._path(run, round_)
        if not path.exists():
            return None
        try:
            said = read_tensors(path)[1]["update"]
            return from_wire(RecordDict({"update": ConfigRecord({"json": said})}), "update", Update)
        except (UserError, KeyError, ValueError):
            return None

    def _trained(self, run: str) -> list[tuple[int, str]]:
        """Round and base model of every training, in order.

        Raises:
            UserError: the list cannot be read; nothing may be trained then.
        """
        path = self.folder / run / TRAININGS
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise _unreadable(path, run, str(error)) from error
        found = [re.fullmatch(r"([0-9]{1,9}) ([0-9a-f]{64})", line) for line in lines]
        if not all(found):
            raise _unreadable(path, run, "a line is not one of ours")
        return [(int(line[1]), line[2]) for line in found if line]

    def _enter(self, update: Update) -> None:
        lines = [*self._trained(update.run), (update.round, update.base_hash)]
        text = "".join(f"{number} {base}\n" for number, base in lines)
        write_atomic(self.folder / update.run / TRAININGS, text.encode())

    def has_scored(self, run: str, model_hash: str) -> bool:
        """Whether a model was scored before. Raises UserError where the list cannot be read."""
        return model_hash in self._scored(run)

    def may_score(self, run: str, model_hash: str, most: int) -> bool:
        """Whether a model may be scored: one that was scored before, or one of at most `most` in a run."""
        known = self._scored(run)
        if model_hash not in known:
            if len(known) >= most:
                return False
            write_atomic(self.folder / run / SCORED, "\n".join([*known, model_hash]).encode())
        return True

    def _scored(self, run: str) -> list[str]:
        path = self.folder / run / SCORED
        try:
            return path.read_text().split()
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); nothing is scored. Restore it, or delete it."
            ) from error

    def forget(self, run: str, through: int) -> None:
        """Delete the updates of rounds up to `through`: the server has committed them."""
        for path in sorted((self.folder / run).glob("round-*.safetensors")):
            if int(path.stem.removeprefix("round-")) <= through:
                path.unlink(missing_ok=True)

    def _let_go(self) -> None:
        """Of the updates of all but the last runs; their lists of trainings and scored models stay."""
        runs = sorted((path for path in self.folder.glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
        for run in runs[:-MOST_RUNS]:
            for path in run.glob("round-*.safetensors"):
                path.unlink(missing_ok=True)

    def _path(self, run: str, round_: int) -> Path:
        return self.folder / run / f"round-{round_:06d}.safetensors"


def _as_sent(
    kept: dict[str, Tensor], metadata: dict[str, str], task: TrainTask | None
) -> tuple[ArrayRecord, dict[str, Tensor]]:
    """What was kept as it travels, and as the server reads it. Raises UserError where it cannot be read."""
    encoding = metadata.get("encoding")
    if encoding is None:
        return arrays_to_wire(kept), kept
    if task is None or set(kept) != {PACKED} or kept[PACKED].dtype != torch.uint8:
        raise ContractError("it is compressed, and not as the run asks")
    data = kept[PACKED].numpy().tobytes()
    arrays = ArrayRecord({PACKED: Array("uint8", (len(data),), encoding, data)})
    return arrays, arrays_from_wire(arrays, sent_shapes(task), task.compression)


def _unreadable(path: Path, run: str, fault: str) -> UserError:
    return UserError(
        f"{path}: the list of trainings cannot be read ({fault}); nothing is trained. Restore it, or write a line"
        f" 'ROUND BASE' for each 'update' that the audit log has for {run}."
    )
