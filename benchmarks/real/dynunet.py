"""MONAI's DynUNet, the network of nnU-Net, on the same batches with equal compute. Needs MONAI; nothing else does.

Trained as usual for it: widths and depth by nnU-Net's rule for 2D, deep supervision with halving weights, Dice plus
cross-entropy, SGD with Nesterov momentum 0.99 from a rate of 0.01 that falls as a polynomial of power 0.9 (Isensee et
al., Nature Methods 18 (2021) 203-211). No rate was tuned, on neither side. Scored with its last weights, as usual.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
from monai.networks.nets.dynunet import DynUNet
from safetensors.torch import save
from torch import Tensor, nn

from benchmarks.real.learner import Predict, count_flop
from benchmarks.real.ours import binary_entropy
from benchmarks.real.plan import Plan, Task, row_names
from medsegdiff.data.batches import SliceBatches
from medsegdiff.devices import autocast
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from medsegdiff.labels import LabelScheme
from medsegdiff.loader import Loader
from medsegdiff.objective import segmentation_loss

RATE, POWER, MOMENTUM, WEIGHT_DECAY, CLIP = 0.01, 0.9, 0.99, 3e-5, 12.0
SMALLEST = 4  # pixels a side at the bottom: nnU-Net stops before 4 would be halved


def make_network(plan: Plan, task: Task, channels: int, scheme: LabelScheme, seed: int) -> DynUNet:
    """A DynUNet with fresh weights from `seed`; levels until `SMALLEST` pixels a side."""
    size, levels = task.image_size, 1
    while size % 2 == 0 and size // 2 >= SMALLEST:
        size, levels = size // 2, levels + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DynUNet(
            spatial_dims=2,
            in_channels=channels,
            out_channels=scheme.channels,
            kernel_size=[3] * levels,
            strides=[1] + [2] * (levels - 1),
            upsample_kernel_size=[2] * (levels - 1),
            filters=[min(plan.peer_width * 2**level, plan.peer_widest) for level in range(levels)],
            norm_name=("INSTANCE", {"affine": True}),
            deep_supervision=True,
            deep_supr_num=max(1, levels - 3),
        )


def supervised_loss(answers: Tensor, masks: Tensor) -> Tensor:
    """Mean loss over the heads, each weighing half as much as the finer one before it.

    Args:
        answers: logits of all heads at full size, the finest first, (B, heads, K, H, W).
        masks: (B, K, H, W) in {-1, +1}.
    """
    shares = [0.5**head for head in range(answers.shape[1])]
    losses = [segmentation_loss(answers[:, head], masks) for head in range(answers.shape[1])]
    weighted = [share * loss for share, loss in zip(shares, losses, strict=True)]
    return torch.stack(weighted).sum() / math.fsum(shares)


def step_flop(network: DynUNet, task: Task, channels: int, scheme: LabelScheme) -> float:
    """FLOP of one training step, forward and backward: of one slice, times the batch. Leaves gradients behind."""
    image = torch.zeros(1, channels, task.image_size, task.image_size)
    mask = torch.zeros(1, scheme.channels, task.image_size, task.image_size)
    network.train()
    return count_flop(lambda: supervised_loss(network(image), mask).backward()) * task.training.batch_size


class Peer:
    """See `Learner`."""

    def __init__(
        self, plan: Plan, task: Task, network: DynUNet, batches: SliceBatches, total_steps: int, device: torch.device
    ) -> None:
        self._plan, self._batches, self._total_steps, self._device = plan, batches, total_steps, device
        self._precision = task.training.precision
        self._loader = Loader(self._draw, device)
        self._network: nn.Module = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._named = dict(self._network.named_parameters())
        self._optimizer = torch.optim.SGD(
            self._named.values(), lr=RATE, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
        )

    @property
    def parameters(self) -> int:
        """Trainable scalars."""
        return sum(parameter.numel() for parameter in self._named.values())

    def run(self, first: int, last: int) -> float:
        """Steps first .. last - 1; their mean loss."""
        self._network.train()
        with closing(self._loader.load(range(first, last))) as inputs:  # type: ignore[type-var]
            losses = [self._step(step, **tensors) for step, tensors in inputs]
        loss = torch.stack(losses).mean().item()  # read once: waiting for each would leave a GPU idle
        if not math.isfinite(loss):
            raise UserError(f"DynUNet diverged: the loss of steps {first} to {last - 1} is {loss}. Lower its rate.")
        return loss

    def _draw(self, step: int) -> dict[str, Tensor]:
        images, masks = self._batches.batch(step)
        return {"images": images, "masks": masks}

    def _step(self, step: int, images: Tensor, masks: Tensor) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = RATE * (1 - step / self._total_steps) ** POWER
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(self._device, self._precision):
            loss = supervised_loss(self._network(images.contiguous(memory_format=torch.channels_last)), masks)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._named.values(), CLIP)
        self._optimizer.step()
        return loss.detach()

    def save(self, path: Path, done: int, **notes: str) -> None:
        """Weights and momentum."""
        tensors = {f"weights/{name}": value for name, value in self.weights().items()}
        for name, parameter in self._named.items():
            momentum = self._optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum/{name}"] = momentum
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_atomic(path, save(plain, metadata={**notes, "done": str(done)}))

    def restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
        """Go on from `save`."""
        for name, parameter in self._named.items():
            parameter.detach().copy_(tensors[f"weights/{name}"])
            if f"momentum/{name}" in tensors:
                # In the parameter's own order of memory, as the optimizer made it.
                momentum = torch.empty_like(parameter).copy_(tensors[f"momentum/{name}"]).detach()
                self._optimizer.state[parameter]["momentum_buffer"] = momentum
        return int(metadata["done"])

    def weights(self) -> Mapping[str, Tensor]:
        """The last weights. Not state_dict(): DynUNet lists a module under each place that uses it."""
        return {name: parameter.detach() for name, parameter in self._named.items()}

    def rows(self) -> dict[str, Predict]:
        """One: a plain forward pass."""
        network = self._network.eval()

        def predict(images: Tensor, _seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
            with torch.inference_mode(), autocast(self._device, self._precision):
                probability = network(images).float().sigmoid().cpu()
            return 2 * probability - 1, binary_entropy(probability)

        return dict.fromkeys(row_names(self._plan, "dynunet"), predict)
