"""What the tests of private training share: random patients, and the obvious loop that engines are held against."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from client.privacy.patients import DiffusionRowLoss
from client.privacy.policy import PrivacyPolicy
from medsegdiff.config import DiffusionConfig, ModelConfig
from medsegdiff.diffusion import Diffusion
from medsegdiff.network import MedSegDiff

Rows = dict[str, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]

POLICY = PrivacyPolicy(epsilon=8.0, delta=1e-5, sigma=2.0, q=0.5, clip=1.0, batch=4, steps=3, rounds=5)

BASE = ModelConfig(
    image_size=16, image_channels=2, mask_channels=3, base_channels=8, channel_multipliers=(1, 2, 3),
    fusion_levels=(1,), attention_levels=(2,),
)  # fmt: skip
# Every option that the network has. Of dropout see `network`.
OPTIONS = {
    "default": BASE,
    "no fusion": replace(BASE, fusion_levels=()),
    "two fusions": replace(BASE, fusion_levels=(0, 2)),
    "no ff_parser": replace(BASE, ff_parser=False),
    "no attention": replace(BASE, attention_levels=()),
    "attention everywhere": replace(BASE, attention_levels=(0, 1, 2)),
    "two blocks": replace(BASE, blocks_per_level=2),
    "dropout": replace(BASE, dropout=0.2),
    "auxiliary head": replace(BASE, auxiliary_head=True),
    "self-conditioning": replace(BASE, self_conditioning=True),
    "all": replace(
        BASE, fusion_levels=(1, 2), ff_parser=False, dropout=0.1, auxiliary_head=True, self_conditioning=True
    ),
}


def network(config: ModelConfig, seed: int = 0) -> MedSegDiff:
    """A network in training mode, with norms away from 1 and maps away from the identity.

    Its dropout is switched off: each engine would draw masks of its own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MedSegDiff(config).train()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return net


def row_loss(auxiliary_weight: float = 0.5) -> DiffusionRowLoss:
    return DiffusionRowLoss(Diffusion(DiffusionConfig(weighting="min_snr")), auxiliary_weight)


def patient(config: ModelConfig, rows: int, seed: int, size: float = 1.0) -> Rows:
    """Random rows of one patient, of `size` times the usual intensity."""
    generator, side = torch.Generator().manual_seed(seed), config.image_size
    shape = (rows, config.mask_channels, side, side)
    found = {
        "images": size * torch.randn(rows, config.image_channels, side, side, generator=generator),
        "masks": torch.randn(shape, generator=generator).sign(),
        "noise": torch.randn(shape, generator=generator),
        "t_B": torch.randint(0, 1000, (rows,), generator=generator),
    }
    if config.self_conditioning:
        found["condition_B"] = torch.arange(rows) % 2 == 0
    return found


def obvious_gradient(net: nn.Module, loss: Loss, rows: Rows) -> dict[str, Tensor]:
    """A patient's gradient, one row at a time: the mean over its rows of each row's own, float64."""
    count = len(next(iter(rows.values())))
    total: dict[str, Tensor] = {}
    for row in range(count):
        own = copy.deepcopy(net)
        loss(own, {name: value[row : row + 1] for name, value in rows.items()}).backward()
        for name, p in own.named_parameters():
            if p.requires_grad:
                wide = torch.complex128 if p.is_complex() else torch.float64
                gradient = torch.zeros_like(p, dtype=wide) if p.grad is None else p.grad.to(wide)
                total[name] = total.get(name, torch.zeros_like(gradient)) + gradient / count
    return total


def norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((value.abs() ** 2).sum()) for value in gradients.values()))


def obvious_sum(net: nn.Module, loss: Loss, patients: Sequence[Rows], clip: float) -> dict[str, Tensor]:
    """Each patient's gradient, brought to a norm of at most C, added up."""
    total: dict[str, Tensor] = {}
    for rows in patients:
        gradients = obvious_gradient(net, loss, rows)
        factor = min(1.0, clip / norm(gradients))
        for name, value in gradients.items():
            total[name] = total.get(name, torch.zeros_like(value)) + factor * value
    return total


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative 2-norm of the difference over all parameters."""
    return norm({name: found[name] - expected[name] for name in expected}) / norm(expected)


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of any one parameter; a tiny one is measured by a thousandth of the whole."""
    floor = 1e-3 * norm(expected)
    return max(
        float((found[name] - expected[name]).abs().norm()) / max(float(expected[name].abs().norm()), floor)
        for name in expected
    )
