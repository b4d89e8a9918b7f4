"""Malicious hospitals, for simulations alone: a wrapper around the site's app spoils what one virtual site answers.

nan          every number of its update is NaN
sign_flip    the opposite of what it trained
scaled       -10 times what it trained
fivefold     -5 times: large, and still within the usual limit of ten times the median norm
many         the opposite, claiming a billion patients
free_rider   no change at all, for the same say
label_flip   it trains in good faith on masks that are turned inside out (`flip_masks`)
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

import nibabel
import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from torch import Tensor

from client.contract import TrainTask, arrays_from_wire, arrays_to_wire, from_wire
from client.personalisation import sent_shapes
from medsegdiff.files import write_atomic
from medsegdiff.weights import hash_weights

Attack = Literal["none", "nan", "sign_flip", "scaled", "fivefold", "many", "free_rider", "label_flip"]
ATTACKS: tuple[Attack, ...] = get_args(Attack)
CLAIMED = 1_000_000_000  # patients, by `many`

App = Callable[[Message, Context], Message]


class Malicious:
    """A site's app of which one partition lies; called like a ClientApp, so `run_inline` takes it in its place.

    Args:
        app: the honest one.
        partition: number of the malicious site, in the order of names.
    """

    def __init__(self, app: App, attack: Attack, partition: int = 0) -> None:
        self.app, self.attack, self.partition = app, attack, partition

    def __call__(self, message: Message, context: Context) -> Message:
        """The answer to a question, spoiled if it is the malicious site's update."""
        reply = self.app(message, context)
        if (
            int(context.node_config["partition-id"]) != self.partition
            or message.metadata.message_type != MessageType.TRAIN
            or reply.has_error()
        ):
            return reply
        task = from_wire(message.content, "task", TrainTask)
        shapes = sent_shapes(task)
        honest = arrays_from_wire(reply.content.array_records["delta"], shapes, task.compression)
        delta = _spoil(self.attack, honest)
        said = json.loads(str(reply.content.config_records["update"]["json"]))
        if self.attack == "nan":  # which compression does not write
            arrays = arrays_to_wire(delta)
        else:
            arrays = arrays_to_wire(delta, task.compression)
            delta = arrays_from_wire(arrays, shapes, task.compression)
        said["delta_hash"] = hash_weights(delta)
        if self.attack == "many":
            said["patients"] = CLAIMED
        update = ConfigRecord({"json": json.dumps(said)})
        return Message(RecordDict({"update": update, "delta": arrays}), reply_to=message)


def _spoil(attack: Attack, delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    factor = {
        "sign_flip": -1.0,
        "many": -1.0,
        "scaled": -10.0,
        "fivefold": -5.0,
        "free_rider": 0.0,
        "nan": math.nan,
    }.get(attack, 1.0)
    return {name: (value * factor if factor else torch.zeros_like(value)) for name, value in delta.items()}


def flip_masks(site: Path) -> int:
    """Turn the masks of a site that has files of its own (NIfTI, labels 0 and 1) inside out; returns how many."""
    with open(site / "data" / "cases.csv", newline="") as handle:
        paths = sorted({site / "data" / row["mask_path"] for row in csv.DictReader(handle)})
    for path in paths:
        image = nibabel.load(path)
        labels = np.asarray(image.dataobj)  # type: ignore[attr-defined]
        flipped = nibabel.Nifti1Image((labels == 0).astype(labels.dtype), image.affine, image.header)  # type: ignore[attr-defined]
        write_atomic(path, gzip.compress(flipped.to_bytes(), mtime=0))
    return len(paths)
