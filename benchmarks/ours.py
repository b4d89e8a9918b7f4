"""Worker: our network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.recipe import (
    EMA_DECAY,
    FixedBatch,
    Pace,
    RandomBatches,
    gflop,
    matrix_gflops,
    read_tensors,
    synthetic,
    time_each,
    write_tensors,
)
from benchmarks.turns import Answer, serve
from medsegdiff.config import DiffusionConfig, ModelConfig, SamplingConfig, TrainingConfig
from medsegdiff.diffusion import Diffusion
from medsegdiff.ema import WeightAverage
from medsegdiff.ensemble import segment_images
from medsegdiff.network import MedSegDiff, channels_last, parameter_count
from medsegdiff.training import Trainer


def build(settings: dict[str, Any]) -> MedSegDiff:
    """A network, channels-last as the trainer makes it."""
    torch.manual_seed(0)
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return channels_last(MedSegDiff(ModelConfig(**settings)))


class Speed:
    """One network and a batch for it; `train`, `sample` and `forward` are one step each."""

    def __init__(self, model: dict[str, Any], batch: int, bf16: bool) -> None:
        self.network = build(model)
        self.diffusion = Diffusion(DiffusionConfig())
        self.bf16 = bf16
        images, masks = synthetic(batch)
        training = TrainingConfig(batch_size=batch)
        self.trainer = Trainer(self.network, self.diffusion, FixedBatch(images, masks), training, 10**6, seed=0)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.x_t = torch.randn(masks.shape)
        self.t_B = torch.full((batch,), 500)
        with torch.inference_mode(), self._precision():
            self.features = self.network.image_features(self.images)

    def _precision(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16)

    def train(self) -> None:
        """Noise, forward, backward, gradient clipping, AdamW."""
        self.network.train()
        with self._precision():
            self.trainer.step(0)

    def sample(self) -> Tensor:
        """A sampling step as samplers take it: the image's features are there already."""
        self.network.eval()
        with torch.inference_mode(), self._precision():
            answer = self.network.denoise(self.x_t, self.t_B, self.features)
            return self.diffusion.clean_from(answer, self.x_t, self.t_B).clamp(-1, 1)

    def forward(self) -> Tensor:
        """The whole network, image features included."""
        self.network.eval()
        with torch.inference_mode(), self._precision():
            return self.network(self.x_t, self.t_B, self.images)  # type: ignore[no-any-return]


class Quality:
    """A training for a span of time, and its masks."""

    def __init__(self, model: dict[str, Any], data: str, batch: int, rate: float, seconds: float) -> None:
        self.network = build(model)
        self.diffusion = Diffusion(DiffusionConfig())
        self.data = read_tensors(data)
        training = TrainingConfig(batch_size=batch, learning_rate=rate)
        self.pace = Pace(training, seconds)
        self.average = WeightAverage(self.network, EMA_DECAY)
        batches = RandomBatches(self.data["train_images"], self.data["train_masks"], batch)
        self.trainer = Trainer(self.network, self.diffusion, batches, training, 1, seed=0, average=self.average)

    def step(self, step: int) -> None:
        """One optimizer step at the rate of its place in the span."""
        self.trainer.total_steps = self.pace.total_steps
        self.trainer.step(step)

    def segment(self, out: str, sampling: SamplingConfig, batch: int) -> Answer:
        """Sample the test slices with the averaged weights."""
        self.network.load_state_dict(self.average.shadow)
        images = self.data["test_images"].contiguous(memory_format=torch.channels_last)
        begun = time.perf_counter()
        ensemble = segment_images(self.network, self.diffusion, images, sampling, range(len(images)), batch)
        seconds = time.perf_counter() - begun
        write_tensors(Path(out), masks=ensemble.mean)
        return {"seconds": seconds}


SPEED: dict[str, Speed] = {}
QUALITY: dict[str, Quality] = {}


def prepare_speed(name: str, model: dict[str, Any], batch: int, bf16: bool) -> Answer:
    """Build a network to time; says how large it is and how much one step computes."""
    side = SPEED[name] = Speed(model, batch, bf16)
    work = {what: gflop(getattr(side, what)) for what in ("train", "sample", "forward")}
    return {"parameters": parameter_count(side.network), "gflop": work}


def time_steps(name: str, step: str, count: int) -> Answer:
    """Milliseconds of `count` steps, after one that is not counted: another process had the caches."""
    action = getattr(SPEED[name], step)
    action()
    return {"ms": time_each(count, action)}


def prepare_quality(name: str, **settings: Any) -> Answer:
    """Build a network to train."""
    QUALITY[name] = Quality(**settings)
    return {"parameters": parameter_count(QUALITY[name].network)}


def train(name: str, seconds: float) -> Answer:
    """Train for `seconds` more."""
    side = QUALITY[name]
    side.network.train()
    return side.pace.block(seconds, side.step)


def segment(name: str, out: str, steps: int, batch: int) -> Answer:
    """Write the test slices' masks, in [-1, 1]."""
    return QUALITY[name].segment(out, SamplingConfig(sampler="dpmpp_2m", steps=steps), batch)


def matrix_product() -> Answer:
    """The machine's own speed, in this process and with these threads."""
    return {"gflops": matrix_gflops()}


if __name__ == "__main__":
    serve(
        {
            "prepare_speed": prepare_speed,
            "time_steps": time_steps,
            "prepare_quality": prepare_quality,
            "train": train,
            "segment": segment,
            "matrix_product": matrix_product,
        }
    )
