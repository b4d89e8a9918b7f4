"""The weight average against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medsegdiff.ema import WeightAverage
from medsegdiff.network import channels_last


class Two(nn.Module):
    """A vector and a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(3))
        self.kernel = nn.Parameter(torch.zeros(2, 4, 3, 3))

    def set(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return {name: value.detach().clone() for name, value in self.state_dict().items()}


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_the_average_is_the_weighted_sum_of_all_weights(decay: float) -> None:
    """After n updates: sum of weights_k (1 - d_k) d_{k+1} ... d_n, d_n = min(decay, (1 + n) / (10 + n)), in float64."""
    network = Two()
    history = [network.set(0)]
    average = WeightAverage(network, decay)
    for seed in range(1, 31):
        history.append(network.set(seed))
        average.update(network)
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(30)]
    for name in ("vector", "kernel"):
        expected = torch.zeros_like(history[0][name], dtype=torch.float64)
        for k, weights in enumerate(history):
            share = 1.0 if k == 0 else 1 - decays[k - 1]
            for later in decays[k:]:
                share *= later
            expected += share * weights[name].double()
        torch.testing.assert_close(average.shadow[name].double(), expected, atol=1e-5, rtol=1e-5)
    assert average.updates == 30


def test_decay_zero_is_the_last_weights() -> None:
    """Without memory the average is the network."""
    network = Two()
    average = WeightAverage(network, 0.0)
    last = network.set(4)
    average.update(network)
    assert all(torch.equal(average.shadow[name], last[name]) for name in last)


def test_the_average_is_a_copy() -> None:
    """Training on does not reach into the average, and averaging does not reach into the network."""
    network = Two()
    first = network.set(0)
    average = WeightAverage(network, 0.9)
    second = network.set(1)
    assert torch.equal(average.shadow["vector"], first["vector"])
    average.update(network)
    assert torch.equal(network.vector, second["vector"])
    assert not average.shadow["vector"].requires_grad


def test_memory_layout_does_not_matter() -> None:
    """An average begun before the network went channels-last goes on as before."""
    plain, fast = Two(), Two()
    averages = [WeightAverage(plain, 0.9), WeightAverage(fast, 0.9)]
    channels_last(fast)  # type: ignore[arg-type]
    for network, average in zip((plain, fast), averages, strict=True):
        for seed in range(3):
            network.set(seed)
            average.update(network)
    torch.testing.assert_close(averages[0].shadow["kernel"], averages[1].shadow["kernel"])


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    """1 would never learn, below 0 would overshoot, NaN would poison every weight."""
    with pytest.raises(ValueError, match="decay"):
        WeightAverage(Two(), decay)
