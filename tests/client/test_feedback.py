"""Error feedback: over the rounds that count nothing is lost, and what does not count is not paid for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.contract import Update, arrays_from_wire
from client.encoding import Compression
from client.feedback import pack
from medsegdiff.errors import UserError
from medsegdiff.weights import hash_weights

SHAPES = {"w": (4, 30), "b": (5,)}
KINDS = [Compression("int8"), Compression("top_k", 0.1), Compression("top_k", 0.02)]


def change(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 1e-2 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def update(round_: int = 1) -> Update:
    return Update("alder", "run-1", round_, "a" * 64, 3, 2, 0.5, 1.25, "0" * 64)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 1000), st.lists(st.booleans(), min_size=1, max_size=12))
def test_what_was_sent_and_what_is_left_make_the_changes(compression, seed, counted) -> None:
    """Sum of what counted, and the residual: the sum of the deltas of the rounds that counted, to float32 rounding."""
    residual: dict[str, torch.Tensor] = {}
    sent = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    due = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for round_, counts in enumerate(counted):
        delta = change(1000 * seed + round_)
        packed = pack(update(round_), delta, compression, residual)
        if counts:
            residual = packed.residual
            for name in SHAPES:
                sent[name] += packed.sent[name]
                due[name] += delta[name]
    for name, shape in SHAPES.items():
        found = sent[name] + residual.get(name, torch.zeros(shape))
        assert torch.allclose(found, due[name], rtol=0, atol=1e-7)


def test_without_feedback_top_k_never_sends_small_values() -> None:
    """The test above can fail: the same change every round, its smallest values arrive with the residual alone."""
    delta, compression = change(7), Compression("top_k", 0.1)
    plain = fed = torch.zeros(SHAPES["w"])
    residual: dict[str, torch.Tensor] = {}
    for _ in range(60):
        plain = plain + pack(update(), delta, compression).sent["w"]
        packed = pack(update(), delta, compression, residual)
        fed, residual = fed + packed.sent["w"], packed.residual
    assert float((plain - 60 * delta["w"]).norm() / (60 * delta["w"]).norm()) > 0.5
    assert float((fed - 60 * delta["w"]).norm() / (60 * delta["w"]).norm()) < 0.1


@pytest.mark.parametrize("compression", [Compression(), Compression("bf16"), *KINDS], ids=str)
def test_the_update_names_what_the_server_reads(compression) -> None:
    """The hash is that of the decoded arrays; nothing is left over where nothing is fed back."""
    delta = change(1)
    packed = pack(update(), delta, compression, change(2))
    read = arrays_from_wire(packed.arrays, SHAPES, compression)
    assert hash_weights(read) == hash_weights(packed.sent)
    if compression.kind == "none":
        assert packed.update == update()  # as the training named it
    else:
        assert packed.update.delta_hash == hash_weights(read)
    assert bool(packed.residual) == compression.feeds_back
    if not compression.feeds_back:  # then another round's residual does not count either
        assert hash_weights(packed.sent) == hash_weights(pack(update(), delta, compression).sent)


def test_a_change_that_is_not_finite_ends_in_a_clear_error() -> None:
    """Site, round, consequence and remedy."""
    delta = change(1) | {"b": torch.tensor([0.0, 1, 2, 3, float("nan")])}
    with pytest.raises(
        UserError, match=r"alder: the changes of round 3 cannot be compressed: 'b'.*Nothing was sent; lo"
    ):
        pack(update(3), delta, Compression("int8"))
