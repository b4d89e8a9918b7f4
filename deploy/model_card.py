"""What a preset costs: parameters, GFLOP, memory. The work behind `model show`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from medsegdiff.config import preset as make_model
from medsegdiff.network import MedSegDiff, parameter_count
from medsegdiff.strict import plain


def describe_preset(name: str, size: int | None, batch: int, channels: int, classes: int) -> dict[str, Any]:
    """Figures of a preset, computed on shapes alone: no weight is allocated.

    GFLOP counts a multiply-add as two operations, convolutions, matrix products and attention (not the FFT and
    elementwise work). Training memory is weights, gradients, two moments, and what autograd keeps of the forward pass.
    """
    changes = {"image_channels": channels, "mask_channels": classes}
    config = make_model(name, **changes, **({} if size is None else {"image_size": size}))
    side = config.image_size
    with torch.device("meta"):
        network = MedSegDiff(config)
        mask, image, t = (
            torch.empty(batch, classes, side, side),
            torch.empty(batch, channels, side, side),
            torch.empty(batch),
        )
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            network(mask, t, image)
        saved = _saved_bytes(network, mask, t, image)
    parameters = parameter_count(network)
    return {
        "preset": name, "batch": batch, "parameters": parameters,
        "gflop_forward": flops.get_total_flops() / 1e9 / batch,
        "mib_weights": 4 * parameters / 2**20,
        "mib_training": (4 * 4 * parameters + saved) / 2**20,
        "model": plain(config),
    }  # fmt: skip


def _saved_bytes(network: MedSegDiff, mask: Tensor, t: Tensor, image: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward; a storage kept twice counts once."""
    kept: dict[int, int] = {}
    weights = {id(parameter.untyped_storage()) for parameter in network.parameters()}
    held = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.append(storage)  # an address must not be given to a second storage while we count
        if id(storage) not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(mask, t, image)
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    return sum(size for address, size in kept.items() if address not in own)


def description_lines(figures: Mapping[str, Any]) -> list[str]:
    """The figures for a person."""
    model = figures["model"]
    widths = [model["base_channels"] * factor for factor in model["channel_multipliers"]]
    return [
        f"{figures['preset']}: {figures['parameters']:,} parameters ({figures['mib_weights']:.1f} MiB as float32)",
        f"{model['image_size']} x {model['image_size']} px, channels {' '.join(map(str, widths))}, fusion at levels "
        f"{model['fusion_levels']}, attention at levels {model['attention_levels']}",
        f"forward pass: {figures['gflop_forward']:.2f} GFLOP an image",
        f"training, batch {figures['batch']}: about {figures['mib_training']:.0f} MiB (float32, AdamW)",
    ]
