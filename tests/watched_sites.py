"""The real ClientApp of virtual sites; keeps what leaves, and may spoil an answer or die."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from flwr.app import Context, Message, MessageType
from torch import Tensor

from client.app import app as client_app
from client.contract import TrainTask, Update, array_bytes, arrays_from_wire, from_wire
from client.personalisation import sent_shapes
from medsegdiff.weights import hash_weights


class Sites:
    """Answers like the ClientApp.

    Args:
        spoil: (round, site) -> what becomes of its update, given question and answer.
    """

    def __init__(self, spoil: dict[tuple[int, str], Callable[[Message, Message], Message]] | None = None) -> None:
        self.spoil = spoil or {}
        self.sent: dict[str, list[tuple[int, dict[str, Tensor]]]] = defaultdict(list)  # site -> (round, change)
        self.bytes = 0
        self.dies_at: int | None = None  # the training before which everything ends
        self.trained = 0

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            if self.trained == self.dies_at:
                raise KeyboardInterrupt
            self.trained += 1
        reply = client_app(message, context)
        if reply.has_error() or message.metadata.message_type != MessageType.TRAIN:
            return reply
        update = from_wire(reply.content, "update", Update)
        task = from_wire(message.content, "task", TrainTask)
        record = reply.content.array_records["delta"]
        self.bytes += array_bytes(record)
        delta = arrays_from_wire(record, sent_shapes(task), task.compression)
        assert hash_weights(delta) == update.delta_hash
        self.sent[update.site].append((update.round, delta))
        spoil = self.spoil.get((update.round, update.site))
        return spoil(message, reply) if spoil is not None else reply
