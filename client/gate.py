"""The update gate: the one door through which anything leaves a site.

Scores and counts leave as the contract's types and nothing beside them. Of an update it looks at what is about to be
sent, not at what was meant to be sent: nothing but finite arrays of the model's own names and shapes passes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from client.contract import (
    AS_IT_IS,
    ContractError,
    Presence,
    Scores,
    Signer,
    Update,
    arrays_from_wire,
    arrays_to_wire,
    sign,
    to_wire,
)
from client.encoding import Compression
from medsegdiff.errors import UserError
from medsegdiff.weights import hash_weights


def release_update(
    update: Update,
    delta: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    signer: Signer | None = None,
    compression: Compression = AS_IT_IS,
    arrays: ArrayRecord | None = None,
) -> RecordDict:
    """An update as it leaves the site, signed where the site has a key.

    Args:
        delta: as the server will read it.
        arrays: `delta` as it travels, where it is compressed; it is read here as the server reads it.

    Raises:
        UserError: an array that the model does not have, of another shape or type, with values that are not finite, or
            arrays that are not the ones the update's hash names.
    """
    if set(delta) != set(base):
        odd = sorted(set(delta) ^ set(base))[0]
        raise UserError(
            f"{update.site}: the update gate stopped array '{odd}', which is not one of the model's. Nothing was sent."
        )
    for name, value in delta.items():
        if value.shape != base[name].shape or value.dtype != torch.float32:
            raise UserError(
                f"{update.site}: the update gate stopped array '{name}' ({tuple(value.shape)}, {value.dtype}); the "
                f"model has {tuple(base[name].shape)}, torch.float32. Nothing was sent."
            )
        if not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{update.site}: the update gate stopped array '{name}': it holds values that are not finite. Nothing "
                "was sent; lower the run's learning rate."
            )
    if hash_weights(delta) != update.delta_hash:
        raise UserError(f"{update.site}: the update gate stopped arrays that changed after training. Nothing was sent.")
    arrays = arrays_to_wire(delta) if arrays is None else _read_again(update, arrays, base, compression)
    return sign(RecordDict({"update": to_wire(update), "delta": arrays}), "update", signer)


def _read_again(
    update: Update, arrays: ArrayRecord, base: Mapping[str, Tensor], compression: Compression
) -> ArrayRecord:
    try:
        found = arrays_from_wire(arrays, {name: tuple(value.shape) for name, value in base.items()}, compression)
    except ContractError as error:
        raise UserError(f"{update.site}: the update gate stopped arrays that cannot be read: {error}.") from None
    if hash_weights(found) != update.delta_hash:
        raise UserError(f"{update.site}: the update gate stopped arrays that do not decode to the signed change.")
    return arrays


def release_scores(scores: Scores, signer: Signer | None = None) -> RecordDict:
    """Scores as they leave the site."""
    return sign(RecordDict({"scores": to_wire(scores)}), "scores", signer)


def release_presence(presence: Presence, signer: Signer | None = None) -> RecordDict:
    """A site's counts as they leave it."""
    return sign(RecordDict({"presence": to_wire(presence)}), "presence", signer)
