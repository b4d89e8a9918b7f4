"""Exponential moving average of weights: what a diffusion model is sampled from after noisy steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAverage:
    """shadow <- d shadow + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) after n updates.

    The warm-up keeps the average from remembering the initial weights in short trainings.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), found {decay}")
        self.decay = decay
        self.updates = 0
        self.shadow: dict[str, Tensor] = {name: value.detach().clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take one step towards the network's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        names = list(self.shadow)
        weights = network.state_dict()
        torch._foreach_lerp_([self.shadow[n] for n in names], [weights[n] for n in names], 1 - decay)
        self.updates += 1
