"""What a preset costs: parameters, GFLOP, memory. The work behind `model show`.

Everything is computed on shapes alone: the network and a training step run on tensors that know their size but hold no
numbers ("fake" tensors of torch), so that a machine without a GPU forecasts what one with a GPU needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from medsegdiff.config import DiffusionConfig, ModelConfig
from medsegdiff.config import preset as make_model
from medsegdiff.devices import autocast
from medsegdiff.diffusion import Diffusion
from medsegdiff.network import MedSegDiff, parameter_count
from medsegdiff.objective import denoising_loss
from medsegdiff.strict import plain

CPU = torch.device("cpu")


def describe_preset(name: str, size: int | None, batch: int, channels: int, classes: int) -> dict[str, Any]:
    """Figures of a preset; memory is that of a GPU, in float32 and under bf16 autocast.

    GFLOP counts a multiply-add as two operations, convolutions, matrix products and attention (not the FFT and
    elementwise work).

    Raises:
        UserError: no such preset, or a size that does not fit it.
    """
    changes = {"image_channels": channels, "mask_channels": classes}
    config = make_model(name, **changes, **({} if size is None else {"image_size": size}))
    forward, training = _gflop(config)
    with FakeTensorMode():
        parameters = parameter_count(MedSegDiff(config))
    return {
        "preset": name, "batch": batch, "parameters": parameters,
        "gflop_forward": forward,
        "gflop_training": training,
        "mib_weights": 4 * parameters / 2**20,
        "mib_training": {kind: training_bytes(config, batch, kind) / 2**20 for kind in ("fp32", "bf16")},
        "mib_sampling": {kind: sampling_bytes(config, batch, kind) / 2**20 for kind in ("fp32", "bf16")},
        "model": plain(config),
    }  # fmt: skip


def training_bytes(
    config: ModelConfig, batch: int, precision: Literal["fp32", "bf16"], average: bool = True, gpu: bool = True
) -> int:
    """Forecast of the most memory that tensors hold at once in a training step.

    That is weights, AdamW's two moments, the weight average, and the peak of a forward and a backward pass: what
    autograd keeps, the gradients as they come, and what each operation reads and writes.

    Args:
        average: whether an average of the weights is kept.
        gpu: count as on a GPU, where autocast does more in float32 than on a CPU; otherwise as on a CPU.

    Not in it: the workspaces that cuDNN and cuBLAS choose, what the allocator rounds up, the CUDA context.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, inputs = MedSegDiff(config).train(), _inputs(config, batch)
        weights = _nbytes(network.parameters())
        count = AllocationCount([*network.parameters(), *inputs.values()])
        with _Fused(gpu), count:
            with autocast(CPU, precision):
                loss = denoising_loss(network, Diffusion(DiffusionConfig()), **inputs, auxiliary_weight=1.0)
            loss.backward()
    return count.peak + weights * (3 if average else 2)


def sampling_bytes(config: ModelConfig, batch: int, precision: Literal["fp32", "bf16"], gpu: bool = True) -> int:
    """Forecast of the most memory that tensors hold at once when masks are drawn for `batch` slices at a time."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, inputs = MedSegDiff(config).eval(), _inputs(config, batch)
        count = AllocationCount([*network.parameters(), *inputs.values()])
        with torch.inference_mode(), _Fused(gpu), count, autocast(CPU, precision):
            network(inputs["noise"], inputs["t_B"], inputs["images"])
    return count.peak


class AllocationCount(TorchDispatchMode):
    """Adds up the storages that operations allocate and subtracts those that are let go; `peak` is the highest sum.

    Args:
        present: tensors that are there from the start.
    """

    def __init__(self, present: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()
        for tensor in present:
            self._see(tensor)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:  # a view, or an operation in place
            return
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._let_go, address, size)

    def _let_go(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


class _Fused(TorchFunctionMode):
    """Has fake CPU tensors take the ways that real ones take.

    Attention runs in one kernel that keeps no N x N matrix; fake tensors would take the textbook way. And on a GPU
    autocast runs normalisation and interpolation in float32 (AT_FORALL_FP32 in ATen/autocast_mode.h), on a CPU in bf16.
    """

    def __init__(self, gpu: bool) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        if self.gpu and func in (F.group_norm, F.interpolate) and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def _inputs(config: ModelConfig, batch: int) -> dict[str, Tensor]:
    """A training step's tensors by the loss's argument names."""
    side = config.image_size
    mask = (batch, config.mask_channels, side, side)
    images = torch.empty(batch, config.image_channels, side, side)
    inputs = {"images": images, "masks": torch.empty(mask), "noise": torch.empty(mask)}
    inputs["t_B"] = torch.zeros(batch, dtype=torch.long)
    if config.self_conditioning:
        inputs["condition_B"] = torch.zeros(batch, dtype=torch.bool)
    return inputs


def _gflop(config: ModelConfig) -> tuple[float, float]:
    """Of one image: a forward pass, and a training step (forward and backward)."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, inputs = MedSegDiff(config).train(), _inputs(config, 1)
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            network(inputs["noise"], inputs["t_B"], inputs["images"])
        with FlopCounterMode(display=False) as training:
            denoising_loss(network, Diffusion(DiffusionConfig()), **inputs, auxiliary_weight=1.0).backward()
    return forward.get_total_flops() / 1e9, training.get_total_flops() / 1e9


def _nbytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def description_lines(figures: Mapping[str, Any]) -> list[str]:
    """The figures for a person."""
    model, batch = figures["model"], figures["batch"]
    widths = [model["base_channels"] * factor for factor in model["channel_multipliers"]]
    training, sampling = figures["mib_training"], figures["mib_sampling"]
    return [
        f"{figures['preset']}: {figures['parameters']:,} parameters ({figures['mib_weights']:.1f} MiB as float32)",
        f"{model['image_size']} x {model['image_size']} px, channels {' '.join(map(str, widths))}, fusion at levels "
        f"{model['fusion_levels']}, attention at levels {model['attention_levels']}",
        f"work an image: {figures['gflop_forward']:.2f} GFLOP forward, {figures['gflop_training']:.2f} GFLOP training",
        f"memory forecast, training, batch {batch}: {training['fp32']:,.0f} MiB in fp32, {training['bf16']:,.0f} MiB "
        "in bf16 (weights, gradients, AdamW, weight average, activations)",
        f"memory forecast, sampling, {batch} at once: {sampling['fp32']:,.0f} MiB in fp32, {sampling['bf16']:,.0f} MiB "
        "in bf16",
    ]
