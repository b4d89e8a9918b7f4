"""What a private fine-tuning trains: few parameters, for the noise grows with the root of their number.

From public weights: low-rank corrections of the attention's kernels (Hu et al. 2021, LoRA), norms and biases; all else,
the FF-Parser's maps among it, stays as received. Of each correction B A the factor A is drawn from a public seed and
stays fixed, and only B is trained (Sun et al. 2024, FFA-LoRA): noise on both would multiply, and the average of the
sites' B times A is exactly the average of their corrections.

`merge` folds the corrections into the kernels: what leaves a site is a delta over the network's own names and shapes,
exactly zero where nothing is trained. Screening, aggregation, checkpoints and `medsegfed segment` need know nothing of
low rank, and the next round begins again from B = 0 on the merged kernel, along the same A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medsegdiff.config import ModelConfig
from medsegdiff.ensemble import derive_seed
from medsegdiff.errors import UserError
from medsegdiff.network import Attention, MedSegDiff

BUDGET = 30_000  # trained scalars beyond which a few hundred patients' signal drowns in the noise
MOST_RANK = 8
_KERNELS = ("query_key_value", "out")  # of an Attention


@dataclass(frozen=True)
class TrainableSet:
    """Which parts are trained."""

    rank: int  # of each attention kernel's correction
    norms: bool  # scale and shift of every norm
    biases: bool  # of every convolution and linear layer


class LowRankConv(nn.Module):
    """A 1x1 convolution with a correction: (W + B A) x + b. A, (rank, in), is fixed; B, (out, rank), starts at zero.

    Made of plain convolutions, whose per-row gradients every engine knows.
    """

    def __init__(self, base: nn.Conv2d, rank: int, seed: int) -> None:
        super().__init__()
        self.base = base
        # Without the layers' own initialisation, which would draw from torch's global generator.
        self.down = nn.utils.skip_init(nn.Conv2d, base.in_channels, rank, 1, bias=False)
        self.up = nn.utils.skip_init(nn.Conv2d, rank, base.out_channels, 1, bias=False)
        generator = torch.Generator().manual_seed(seed)
        fixed = torch.randn(self.down.weight.shape, generator=generator) / base.in_channels**0.5
        with torch.no_grad():
            self.down.weight.copy_(fixed)
            self.up.weight.zero_()
        self.to(base.weight.device)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        out: Tensor = self.base(x_BCHW) + self.up(self.down(x_BCHW))
        return out


def choose(config: ModelConfig, budget: int = BUDGET) -> TrainableSet:
    """The largest set within the budget: rank 2, then norms, then biases where they fit whole; the rest goes into rank.

    Raises:
        UserError: the network has no attention, or its attention alone is beyond the budget.
    """
    with torch.device("meta"):
        network = MedSegDiff(config)
    a_rank = sum(_rank_cost(attention) for _, attention in _attentions(network))
    if a_rank == 0:
        raise UserError(
            "privacy: the model has no attention, so there is nothing for low-rank training to hold on to. Choose "
            "attention_levels, or a preset that has them."
        )
    if a_rank > budget:
        raise UserError(
            f"privacy: one rank of the model's attention has {a_rank:,} parameters; the budget is {budget:,}. Choose a "
            "smaller preset."
        )
    least = min(2, budget // a_rank)
    left = budget - least * a_rank
    norms = _count(network, norms=True)
    with_norms = norms <= left
    left -= norms if with_norms else 0
    biases = _count(network, norms=False)
    with_biases = biases <= left
    left -= biases if with_biases else 0
    return TrainableSet(min(MOST_RANK, least + left // a_rank), with_norms, with_biases)


def attach(network: MedSegDiff, seed: int, chosen: TrainableSet | None = None) -> tuple[str, ...]:
    """Freeze the network but for the chosen set, in place; returns the trained names, sorted.

    Args:
        seed: public, the run's: every site and every round draws the same A from it.
        chosen: default: `choose(network.config)`.

    Guarantees:
        The network's answers are what they were, to the bit where adding zero is exact.

    Raises:
        ValueError: corrections are attached already.
    """
    chosen = choose(network.config) if chosen is None else chosen
    if any(isinstance(module, LowRankConv) for module in network.modules()):
        raise ValueError("the network has its corrections already; merge it and build it anew")
    network.requires_grad_(False)
    for name, attention in list(_attentions(network)):
        for kernel in _KERNELS:
            base = getattr(attention, kernel)
            setattr(
                attention, kernel, LowRankConv(base, chosen.rank, derive_seed(seed, "low-rank", f"{name}.{kernel}"))
            )
    for module in network.modules():
        if isinstance(module, LowRankConv):
            module.down.weight.requires_grad_(False)
            module.up.weight.requires_grad_(True)
        elif isinstance(module, nn.GroupNorm):
            module.requires_grad_(chosen.norms)
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            module.bias.requires_grad_(chosen.biases)
    return tuple(sorted(name for name, p in network.named_parameters() if p.requires_grad))


@torch.no_grad()
def merge(network: MedSegDiff, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Weights of the network without corrections: the names and shapes of a MedSegDiff of its config.

    Args:
        state: of the attached network, where another than its present one is meant (an average of weights).
    """
    state = network.state_dict() if state is None else state
    merged = {name: value.detach().clone() for name, value in state.items()}
    for name, module in network.named_modules():
        if not isinstance(module, LowRankConv):
            continue
        up, down = merged.pop(f"{name}.up.weight"), merged.pop(f"{name}.down.weight")
        correction = up.flatten(1).double() @ down.flatten(1).double()
        kernel = merged.pop(f"{name}.base.weight")
        merged[f"{name}.weight"] = (kernel.double() + correction.view(kernel.shape)).to(kernel.dtype)
        if module.base.bias is not None:
            merged[f"{name}.bias"] = merged.pop(f"{name}.base.bias")
    return merged


def trained_count(network: nn.Module) -> int:
    """Number of trained scalars."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def _attentions(network: MedSegDiff) -> list[tuple[str, Attention]]:
    return [(name, module) for name, module in network.named_modules() if isinstance(module, Attention)]


def _rank_cost(attention: Attention) -> int:
    """Trained scalars a rank: the rows of both kernels."""
    return sum(int(getattr(attention, kernel).weight.shape[0]) for kernel in _KERNELS)


def _count(network: MedSegDiff, norms: bool) -> int:
    if norms:
        return sum(p.numel() for m in network.modules() if isinstance(m, nn.GroupNorm) for p in m.parameters())
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return sum(m.bias.numel() for m in layers if m.bias is not None)
