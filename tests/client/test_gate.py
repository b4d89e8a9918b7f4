"""The one door: what is not the model's own finite change does not leave."""

from __future__ import annotations

import math

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.contract import Presence, Scores, Update, arrays_from_wire, check_signature, from_wire
from client.encoding import Compression
from client.feedback import pack
from client.gate import release_presence, release_scores, release_update
from medsegdiff.errors import UserError
from medsegdiff.weights import hash_weights

BASE = {"w": torch.ones(2, 3), "b": torch.ones(3)}
DELTA_HASH = hash_weights({"w": torch.full((2, 3), 0.5), "b": torch.zeros(3)})
UPDATE = Update("alder", "run-1", 1, "a" * 64, 3, 2, 0.5, 1.25, DELTA_HASH)


def delta(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2, 3), 0.5), "b": torch.zeros(3), **changes}


def test_a_good_update_passes_with_its_fields_and_nothing_else() -> None:
    """Two records, the update and the delta, as they were."""
    content = release_update(UPDATE, delta(), BASE)
    assert set(content) == {"update", "delta"}
    assert from_wire(content, "update", Update) == UPDATE
    read = arrays_from_wire(content.array_records["delta"], {"w": (2, 3), "b": (3,)})
    assert all(torch.equal(read[name], value) for name, value in delta().items())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (delta(w=torch.tensor([[0.0, 1, math.nan]] * 2)), "'w': it holds values that are not finite. Nothing was sent"),
        (delta(b=torch.tensor([0.0, math.inf, 1])), "'b': it holds values that are not finite"),
        (delta(image=torch.zeros(9)), "'image', which is not one of the model's. Nothing was sent"),
        ({"w": torch.zeros(2, 3)}, "'b', which is not one"),
        (delta(w=torch.zeros(3, 2)), r"'w' \(\(3, 2\).*Nothing was sent"),
        (delta(w=torch.zeros(2, 3, dtype=torch.float64)), "torch.float64"),
        (delta(w=torch.zeros(2, 3)), "arrays that changed after training. Nothing was sent"),
    ],
)
def test_anything_else_is_stopped(bad, message) -> None:
    """An error instead of a message: nothing was built that could be sent."""
    with pytest.raises(UserError, match=message):
        release_update(UPDATE, bad, BASE)


def test_counts_and_averages_pass() -> None:
    """Presence and scores leave as one record each."""
    presence = Presence("alder", "run-1", "n", 3, 1, 0)
    scores = Scores("alder", "run-1", 1, "a" * 64, 0, None)
    assert from_wire(release_presence(presence), "presence", Presence) == presence
    assert from_wire(release_scores(scores), "scores", Scores) == scores


def test_a_real_site_signs_all_it_sends() -> None:
    """Each of the three kinds bears a signature that its key verifies."""
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw().hex()
    presence, scores = Presence("alder", "run-1", "n", 3, 1, 0), Scores("alder", "run-1", 1, "a" * 64, 0, None)
    check_signature(release_update(UPDATE, delta(), BASE, key.sign), "update", public)
    check_signature(release_presence(presence, key.sign), "presence", public)
    check_signature(release_scores(scores, key.sign), "scores", public)


def test_a_compressed_update_is_read_again_before_it_leaves() -> None:
    """What travels must decode to what is signed: bytes of another change, or of another compression, stay here."""
    base = {"w": torch.ones(4, 20), "b": torch.ones(3)}
    change = {name: torch.linspace(-1, 1, value.numel()).reshape(value.shape) for name, value in base.items()}
    int8 = Compression("int8")
    update = Update("alder", "run-1", 1, "a" * 64, 3, 2, 0.5, 1.25, hash_weights(change))
    good, other = pack(update, change, int8), pack(update, {name: -x for name, x in change.items()}, int8)
    content = release_update(good.update, good.sent, base, None, int8, good.arrays)
    read = arrays_from_wire(content.array_records["delta"], {"w": (4, 20), "b": (3,)}, int8)
    assert hash_weights(read) == from_wire(content, "update", Update).delta_hash != hash_weights(change)
    with pytest.raises(UserError, match="do not decode to the signed change"):
        release_update(good.update, good.sent, base, None, int8, other.arrays)
    with pytest.raises(UserError, match="cannot be read"):
        release_update(good.update, good.sent, base, None, Compression("bf16"), good.arrays)
