"""Worker: our network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.recipe import Batches, FixedBatch, Pace, synthetic
from benchmarks.sides import Settings, autocast, serve_side
from medsegdiff.config import DiffusionConfig, ModelConfig, SamplingConfig, TrainingConfig
from medsegdiff.diffusion import Diffusion
from medsegdiff.ensemble import segment_images
from medsegdiff.network import MedSegDiff, channels_last, parameter_count
from medsegdiff.training import Trainer


def build(settings: dict[str, Any]) -> MedSegDiff:
    """A network, channels-last as the trainer makes it."""
    torch.manual_seed(0)
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return channels_last(MedSegDiff(ModelConfig(**settings)))


class OurSpeed:
    """One network and a batch for it; `train`, `sample` and `forward` are one step each."""

    def __init__(self, model: Settings, batch: int, precision: str, compile: bool = False) -> None:
        self.network = build(model)
        self.diffusion = Diffusion(DiffusionConfig())
        self.precision = precision
        images, masks = synthetic(batch)
        training = TrainingConfig(batch_size=batch, precision=precision)  # type: ignore[arg-type]
        self.trainer = Trainer(
            self.network, self.diffusion, FixedBatch(images, masks), training, 10**6, seed=0, compile=compile
        )
        self._denoise = torch.compile(self.network.denoise) if compile else self.network.denoise
        self._whole = torch.compile(self.network.forward) if compile else self.network.forward
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.x_t = torch.randn(masks.shape)
        self.t_B = torch.full((batch,), 500)
        with torch.inference_mode(), autocast(precision):
            self.features = self.network.image_features(self.images)

    def train(self) -> None:
        """Noise, forward, backward, gradient clipping, AdamW."""
        self.network.train()
        self.trainer.step(0)

    def sample(self) -> Tensor:
        """A sampling step as samplers take it: the image's features are there already."""
        self.network.eval()
        with torch.inference_mode(), autocast(self.precision):
            answer = self._denoise(self.x_t, self.t_B, self.features)
            return self.diffusion.clean_from(answer, self.x_t, self.t_B).clamp(-1, 1)

    def forward(self) -> Tensor:
        """The whole network, image features included."""
        self.network.eval()
        with torch.inference_mode(), autocast(self.precision):
            answer: Tensor = self._whole(self.x_t, self.t_B, self.images)
            return answer

    def parameters(self) -> int:
        """Number of trainable scalars."""
        return parameter_count(self.network)


class OurTraining:
    """Our trainer and our ensemble."""

    def __init__(
        self, batches: Batches, training: TrainingConfig, network: Settings, precision: str, compile: bool = False
    ) -> None:
        self.network = build(network)
        self.diffusion = Diffusion(DiffusionConfig())
        training = replace(training, precision=precision)  # type: ignore[arg-type]
        self.trainer = Trainer(self.network, self.diffusion, batches, training, 1, seed=0, compile=compile)
        self.precision = precision

    def step(self, step: int, pace: Pace) -> None:
        """One optimizer step at the rate of its place in the span."""
        self.network.train()
        self.trainer.total_steps = pace.total_steps
        self.trainer.step(step)

    def masks(self, images: Tensor, how: Settings) -> Tensor:
        """The mean of an ensemble by DPM-Solver++."""
        sampling = SamplingConfig(**how)
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast(self.precision):
            return segment_images(self.network, self.diffusion, images, sampling, range(len(images)), len(images)).mean


if __name__ == "__main__":
    serve_side(OurSpeed, OurTraining, "this repository")
