"""What every worker serves, whatever network it holds: steps to time, a training to judge."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.recipe import (
    EMA_DECAY,
    Batches,
    Pace,
    RandomBatches,
    gflop,
    matrix_gflops,
    read_tensors,
    time_each,
    write_tensors,
)
from benchmarks.turns import Answer, serve
from medsegdiff.config import TrainingConfig
from medsegdiff.ema import WeightAverage

Settings = dict[str, Any]


class Speed(Protocol):
    """One network and one batch for it; each method is one step."""

    def train(self) -> None:
        """Noise, forward, backward, gradient clipping, AdamW."""

    def sample(self) -> object:
        """One sampling step."""

    def forward(self) -> object:
        """The whole network once."""

    def parameters(self) -> int:
        """Number of trainable scalars."""


class Trained(Protocol):
    """A network that can be trained and sampled."""

    @property
    def network(self) -> nn.Module:
        """Whose weights are averaged."""

    def step(self, step: int, pace: Pace) -> None:
        """One optimizer step at the rate of its place in the span."""

    def masks(self, images: Tensor, how: Settings) -> Tensor:
        """Sampled masks of images (N, 1, S, S), in [-1, 1]."""


class PlainTraining:
    """AdamW with the settings of our trainer around a network that is not ours."""

    def __init__(
        self, network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], batches: Batches, settings: TrainingConfig,
        precision: str,
    ) -> None:  # fmt: skip
        self.network, self.loss, self.batches, self.settings, self.precision = (
            network,
            loss,
            batches,
            settings,
            precision,
        )
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay,
            fused=True,
        )  # fmt: skip

    def step(self, step: int, rate: float) -> None:
        """One optimizer step on the loss of (images, masks in {-1, +1})."""
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.precision):
            loss = self.loss(*self.batches.batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.gradient_clip)
        self.optimizer.step()
        loss.item()  # ours reports its loss at every step too


def autocast(precision: str) -> torch.autocast:
    """bf16 matrix work where it is asked for."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


class _Quality:
    """A training for a span of time, and its masks."""

    def __init__(
        self, make: Callable[..., Trained], data: str, batch: int, rate: float, seconds: float, model: Settings
    ) -> None:
        self.data = read_tensors(data)
        training = TrainingConfig(batch_size=batch, learning_rate=rate)
        self.pace = Pace(training, seconds)
        batches = RandomBatches(self.data["train_images"], self.data["train_masks"], batch)
        self.side = make(batches=batches, training=training, **model)
        self.average = WeightAverage(self.side.network, EMA_DECAY)

    def step(self, step: int) -> None:
        """One optimizer step at the rate of its place in the span, then the weight average."""
        self.side.step(step, self.pace)
        self.average.update(self.side.network)

    def segment(self, out: str, batch: int, how: Settings) -> Answer:
        """Write the test slices' masks, sampled with the averaged weights."""
        self.side.network.load_state_dict(self.average.shadow)
        self.side.network.eval()
        torch.manual_seed(0)
        begun = time.perf_counter()
        with torch.inference_mode():
            masks = torch.cat([self.side.masks(part, how) for part in self.data["test_images"].split(batch)])
        seconds = time.perf_counter() - begun
        write_tensors(Path(out), masks=masks.float())
        return {"seconds": seconds}


def serve_side(make_speed: Callable[..., Speed], make_trained: Callable[..., Trained], version: str) -> None:
    """Answer `turns.Worker` for one package: networks to time and to train, each under a name."""
    speed: dict[str, Speed] = {}
    quality: dict[str, _Quality] = {}

    def prepare_speed(name: str, **settings: Any) -> Answer:
        """Build a network to time; says how large it is and how much one step computes."""
        side = speed[name] = make_speed(**settings)
        compiled = settings.pop("compile", False)  # the counter does not see into compiled code
        counted = make_speed(**settings) if compiled else side
        work = {what: gflop(getattr(counted, what)) for what in ("train", "sample", "forward")}
        return {"parameters": side.parameters(), "gflop": work, "version": version}

    def time_steps(name: str, step: str, count: int) -> Answer:
        """Milliseconds of `count` steps, after one that is not counted: another process had the caches."""
        action = getattr(speed[name], step)
        action()
        return {"ms": time_each(count, action)}

    def prepare_quality(name: str, **settings: Any) -> Answer:
        side = quality[name] = _Quality(make_trained, **settings)
        return {"parameters": sum(p.numel() for p in side.side.network.parameters()), "version": version}

    def train(name: str, seconds: float) -> Answer:
        return quality[name].pace.block(seconds, quality[name].step)

    def segment(name: str, out: str, batch: int, how: Settings) -> Answer:
        return quality[name].segment(out, batch, how)

    serve(
        {
            "prepare_speed": prepare_speed, "time_steps": time_steps, "prepare_quality": prepare_quality,
            "train": train, "segment": segment,
            "matrix_product": lambda: {"gflops": matrix_gflops()},
        }
    )  # fmt: skip
