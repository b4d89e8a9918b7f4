"""What both sides have in common: the data, the optimizer's settings, the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.turns import Answer
from medsegdiff.config import TrainingConfig
from medsegdiff.training import learning_rate

SIZE = 64  # pixels a side
EMA_DECAY = 0.999


def synthetic(batch: int) -> tuple[Tensor, Tensor]:
    """The same images (B, 1, S, S) and masks in {-1, +1} on both sides."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 1, SIZE, SIZE, generator=generator)
    masks = (torch.randn(batch, 1, SIZE, SIZE, generator=generator) > 0).float() * 2 - 1
    return images, masks


class Batches(Protocol):
    """Where a training's slices come from."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and masks of one step."""


class FixedBatch:
    """One batch, again and again."""

    def __init__(self, images: Tensor, masks: Tensor) -> None:
        self._batch = images, masks

    def batch(self, _step: int) -> tuple[Tensor, Tensor]:
        """The batch of every step."""
        return self._batch


class RandomBatches:
    """Slices drawn uniformly with replacement; the same ones at the same step on both sides."""

    def __init__(self, images: Tensor, masks: Tensor, size: int) -> None:
        self._images, self._masks, self._size = images, masks, size

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Step `step`'s slices."""
        rows = torch.randint(len(self._images), (self._size,), generator=torch.Generator().manual_seed(step))
        return self._images[rows], self._masks[rows]


class Pace:
    """Training for a span of time: the schedule needs the number of steps, which the pace so far tells."""

    def __init__(self, training: TrainingConfig, seconds: float) -> None:
        self.training, self.budget = training, seconds
        self.steps, self.spent = 0, 0.0

    @property
    def total_steps(self) -> int:
        """How many steps the whole span will hold; a guess of 100 before the first few are timed."""
        return max(self.steps + 1, round(self.steps * self.budget / self.spent)) if self.steps >= 3 else 100

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return learning_rate(self.training, self.steps, self.total_steps)

    def block(self, seconds: float, step: Callable[[int], object]) -> Answer:
        """Take steps until `seconds` more have passed."""
        begun = time.perf_counter()
        end = min(seconds, self.budget - self.spent)
        before = self.spent
        while self.spent < before + end:
            step(self.steps)
            self.steps += 1
            self.spent = before + time.perf_counter() - begun
        return {"steps": self.steps, "seconds": self.spent}


def time_each(count: int, step: Callable[[], object]) -> list[float]:
    """Milliseconds of each of `count` calls."""
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        step()
        times.append((time.perf_counter() - begun) * 1e3)
    return times


def gflop(step: Callable[[], object]) -> float:
    """GFLOP of convolutions and matrix products in one call (a multiplication and an addition are two).

    FFTs, norms, activations and the optimizer are not in it.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return round(float(counter.get_total_flops()) / 1e9, 2)


def matrix_gflops(size: int = 2048, repeats: int = 4) -> float:
    """GFLOP/s of a plain fp32 matrix product: what the machine can give."""
    left = torch.randn(size, size)
    times = time_each(repeats, lambda: left @ left)
    operations = 2.0 * size * size * size
    return operations / 1e6 / min(times)


def write_tensors(path: Path, **tensors: Tensor) -> None:
    """Hand tensors to the other process."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def read_tensors(path: str) -> dict[str, Tensor]:
    """What `write_tensors` wrote."""
    return load_file(path)
