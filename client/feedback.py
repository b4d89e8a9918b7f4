"""Compression of an update with error feedback: what a compression leaves out goes with the next update.

Seide et al. 2014, section 3.1; Karimireddy et al. 2019, algorithm 2. With delta the change that a round's training made
and e the residual that the site keeps:

    sent = decode(encode(delta + e));  e <- delta + e - sent, once the server has counted `sent`

Over the rounds that count, the sum of what was sent and e is the sum of the deltas, to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flwr.app import ArrayRecord
from torch import Tensor

from client.contract import ContractError, Update, arrays_from_wire, arrays_to_wire
from client.encoding import Compression
from medsegdiff.errors import UserError
from medsegdiff.weights import hash_weights


@dataclass(frozen=True)
class Packed:
    """An update as it is to leave, and what is left of its change."""

    update: Update  # names the hash of `sent`
    sent: dict[str, Tensor]  # the change as the server will read it
    arrays: ArrayRecord  # the change as it travels
    residual: dict[str, Tensor]  # what was not sent; empty without error feedback


def pack(
    update: Update, delta: Mapping[str, Tensor], compression: Compression, residual: Mapping[str, Tensor] | None = None
) -> Packed:
    """Compress a round's change, with what earlier rounds left out.

    Args:
        delta: trained minus received weights, float32.
        residual: of the last round that counted; None or empty before the first. Not looked at without error feedback.

    Raises:
        UserError: a change, or what compression makes of it, is not finite.
    """
    if compression.kind == "none":
        return Packed(update, dict(delta), arrays_to_wire(delta), {})
    whole = dict(delta)
    if compression.feeds_back and residual:
        whole = {name: value + residual[name] for name, value in delta.items()}
    try:
        arrays = arrays_to_wire(whole, compression)
        sent = arrays_from_wire(arrays, {name: tuple(value.shape) for name, value in delta.items()}, compression)
    except ContractError as error:
        raise UserError(
            f"{update.site}: the changes of round {update.round} cannot be compressed: {error}. Nothing was sent; "
            "lower the run's learning rate."
        ) from None
    left = {name: value - sent[name] for name, value in whole.items()} if compression.feeds_back else {}
    return Packed(replace(update, delta_hash=hash_weights(sent)), sent, arrays, left)
