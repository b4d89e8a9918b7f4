"""The aggregation benchmark measures what it says, at a size that takes a moment."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.aggregation import flower_reply, grow, layers, speed, update
from server.aggregation import FixedPointSum


def test_both_sides_make_the_same_mean() -> None:
    """Flower's FedAvg and ours of the same updates: what is timed is the same work."""
    from flwr.serverapp.strategy import FedAvg

    shapes, total = layers(1000), FixedPointSum(layers(1000))
    updates = [update(shapes, seed) for seed in range(3)]
    for delta in updates:
        total.add(delta, 3)
    theirs, _ = FedAvg().aggregate_train(1, [flower_reply(delta) for delta in updates])
    for name, value in total.mean().items():
        np.testing.assert_allclose(value.numpy(), theirs[name].numpy(), rtol=1e-4, atol=1e-8)


def test_every_part_has_a_rate() -> None:
    """Positive figures for all that takes part."""
    found = speed(10_000, 2)
    assert set(found["gb_per_second"]) == {"copy", "fold", "check", "norm", "hash", "Flower's FedAvg"}
    assert all(rate > 0 for rate in found["gb_per_second"].values())
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize("kind", ["mean", "median", "flower"])
def test_growth_is_counted_in_bytes(kind) -> None:
    """Never negative; nothing is left behind."""
    assert grow(kind, 1000, 3) >= 0
