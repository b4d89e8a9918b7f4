"""MedSegDiff with its auxiliary head, trained and sampled by the package's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.real.learner import Predict, count_flop
from benchmarks.real.plan import AUXILIARY_ROW, Plan, Task, sampling_name
from medsegdiff.config import DiffusionConfig, ModelConfig, SamplingConfig, preset
from medsegdiff.data.batches import SliceBatches
from medsegdiff.devices import autocast
from medsegdiff.diffusion import Diffusion
from medsegdiff.ema import WeightAverage
from medsegdiff.ensemble import segment_images
from medsegdiff.labels import LabelScheme
from medsegdiff.network import MedSegDiff, channels_last, parameter_count
from medsegdiff.objective import denoising_loss
from medsegdiff.training import Trainer
from medsegdiff.weights import initial_weights


def model_config(plan: Plan, task: Task, channels: int, scheme: LabelScheme) -> ModelConfig:
    """The plan's preset at the task's size, with an auxiliary head."""
    return preset(
        plan.preset,
        image_size=task.image_size,
        image_channels=channels,
        mask_channels=scheme.channels,
        auxiliary_head=True,
    )


def step_flop(config: ModelConfig, task: Task) -> float:
    """FLOP of one training step, forward and backward: of one slice, times the batch."""
    network = MedSegDiff(config)
    size = config.image_size
    image, mask = torch.zeros(1, config.image_channels, size, size), torch.zeros(1, config.mask_channels, size, size)
    diffusion = Diffusion(DiffusionConfig())

    def step() -> None:
        t_B = torch.zeros(1, dtype=torch.long)
        loss = denoising_loss(network, diffusion, image, mask, mask, t_B, task.training.auxiliary_weight)
        torch.autograd.backward(loss)

    return count_flop(step) * task.training.batch_size


class Ours:
    """See `Learner`. Scored with the average of its weights."""

    def __init__(
        self, plan: Plan, task: Task, config: ModelConfig, batches: SliceBatches, seed: int, device: torch.device
    ) -> None:
        self._plan, self._config, self._device = plan, config, device
        self._precision = task.training.precision
        self._diffusion = Diffusion(DiffusionConfig())
        network = MedSegDiff(config)
        network.load_state_dict(initial_weights(config, seed))
        channels_last(network.to(device))  # before the average is made: both in one order of memory
        self._average = WeightAverage(network, plan.ema_decay)
        self._trainer = Trainer(
            network, self._diffusion, batches, task.training, task.steps, seed, average=self._average
        )

    @property
    def parameters(self) -> int:
        """Trainable scalars."""
        return parameter_count(self._trainer.network)

    def run(self, first: int, last: int) -> float:
        """Steps first .. last - 1; their mean loss."""
        return self._trainer.run(first, last)

    def save(self, path: Path, done: int, **notes: str) -> None:
        """Weights, moments and weight average."""
        self._trainer.save(path, done, **notes)

    def restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
        """Go on from `save`."""
        return self._trainer.restore(tensors, metadata)

    def weights(self) -> Mapping[str, Tensor]:
        """The average."""
        return self._average.shadow

    def rows(self) -> dict[str, Predict]:
        """The auxiliary head alone, then each sampling of the plan."""
        network = channels_last(MedSegDiff(self._config).to(self._device))
        network.load_state_dict(self._average.shadow)
        network.eval()

        def auxiliary(images: Tensor, _seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
            with torch.inference_mode(), autocast(self._device, self._precision):
                mean = network.auxiliary(images).float().cpu()
            return mean, binary_entropy((mean + 1) / 2)

        def sampled(steps: int, members: int) -> Predict:
            sampling = SamplingConfig(steps=steps, members=members)

            def predict(images: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
                found = segment_images(network, self._diffusion, images, sampling, seeds, batch=256)
                return found.mean, found.entropy

            return predict

        samplings = {sampling_name(steps, members): sampled(steps, members) for steps, members in self._plan.samplings}
        return {AUXILIARY_ROW: auxiliary, **samplings}


def binary_entropy(probability: Tensor) -> Tensor:
    """Entropy in bits of a yes-or-no variable; 0 at probability 0 and 1."""
    p = probability.clamp(0, 1)
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / torch.log(torch.tensor(2.0))
