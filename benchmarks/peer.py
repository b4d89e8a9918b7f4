"""Worker: med-seg-diff-pytorch, as its package ships it. Runs in `.venv-peers`.

It gets the same optimizer, learning rate schedule, gradient clipping and weight average as ours; the network, the
diffusion loss and the samplers are its own. Our DPM-Solver++ on its prediction is the one addition.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from med_seg_diff_pytorch import (  # type: ignore[import-not-found, unused-ignore]
    MedSegDiff,
    Unet,
)
from torch import Tensor

from benchmarks.recipe import (
    EMA_DECAY,
    SIZE,
    FixedBatch,
    Pace,
    RandomBatches,
    gflop,
    read_tensors,
    synthetic,
    time_each,
    write_tensors,
)
from benchmarks.turns import Answer, serve
from medsegdiff.config import SamplingConfig, TrainingConfig
from medsegdiff.ema import WeightAverage
from medsegdiff.samplers import sample

DIFFUSION: dict[str, Any] = {}  # its defaults: 1000 timesteps, cosine schedule


def build(model: dict[str, Any], objective: str) -> Any:
    """Its diffusion around its network, one image channel and one mask channel."""
    torch.manual_seed(0)
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in model.items()}
    network = Unet(image_size=SIZE, mask_channels=1, input_img_channels=1, **settings)
    return MedSegDiff(network, objective=objective, **DIFFUSION)


class Training:
    """Its diffusion with the optimizer settings of ours."""

    def __init__(self, model: dict[str, Any], objective: str, training: TrainingConfig, batches: Any) -> None:
        self.diffusion = build(model, objective)
        self.training, self.batches = training, batches
        self.optimizer = torch.optim.AdamW(
            self.diffusion.parameters(),
            lr=training.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=training.weight_decay,
            fused=True,
        )

    def step(self, step: int, rate: float) -> None:
        """One optimizer step; its forward draws timesteps and noise and returns the loss, masks given in [0, 1]."""
        images, masks = self.batches.batch(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.diffusion((masks + 1) / 2, images)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.diffusion.parameters(), self.training.gradient_clip)
        self.optimizer.step()
        loss.item()  # ours reports its loss at every step too


class Speed:
    """`train`, `sample` and `forward` are one step each."""

    def __init__(self, model: dict[str, Any], batch: int) -> None:
        self.images, masks = synthetic(batch)
        training = TrainingConfig(batch_size=batch)
        self.training = Training(model, "pred_noise", training, FixedBatch(self.images, masks))
        self.diffusion = self.training.diffusion
        self.x_t = torch.randn(masks.shape)
        self.t_B = torch.full((batch,), 500)

    def train(self) -> None:
        """Noise, forward, backward, gradient clipping, AdamW."""
        self.diffusion.train()
        self.training.step(0, 1e-3)

    def sample(self) -> Any:
        """A sampling step of its own DDIM: the network, and the clean mask its answer implies."""
        self.diffusion.eval()
        with torch.inference_mode():
            return self.diffusion.model_predictions(self.x_t, self.t_B, self.images, clip_x_start=True)

    def forward(self) -> Any:
        """The network alone."""
        self.diffusion.eval()
        with torch.inference_mode():
            return self.diffusion.model(self.x_t, self.t_B, self.images)


class Quality:
    """A training for a span of time, and its masks."""

    def __init__(
        self, model: dict[str, Any], objective: str, data: str, batch: int, rate: float, seconds: float
    ) -> None:
        self.data = read_tensors(data)
        training = TrainingConfig(batch_size=batch, learning_rate=rate)
        self.pace = Pace(training, seconds)
        batches = RandomBatches(self.data["train_images"], self.data["train_masks"], batch)
        self.training = Training(model, objective, training, batches)
        self.diffusion = self.training.diffusion
        self.average = WeightAverage(self.diffusion.model, EMA_DECAY)

    def step(self, step: int) -> None:
        """One optimizer step at the rate of its place in the span, then the weight average."""
        self.training.step(step, self.pace.rate)
        self.average.update(self.diffusion.model)

    def masks(self, images: Tensor, sampler: str, steps: int) -> Tensor:
        """Sampled masks in [-1, 1]: by its own DDIM (eta 1, its default) or by our DPM-Solver++."""
        if sampler == "own":
            self.diffusion.sampling_timesteps = steps
            self.diffusion.is_ddim_sampling = True
            sampled: Tensor = self.diffusion.ddim_sample((len(images), 1, SIZE, SIZE), images)
            return sampled * 2 - 1

        def predict_clean(x_t: Tensor, t: int) -> Tensor:
            t_B = torch.full((len(x_t),), t)
            clean: Tensor = self.diffusion.model_predictions(x_t, t_B, images, clip_x_start=True).pred_x_start
            return clean

        noise = torch.randn(len(images), 1, SIZE, SIZE)
        alpha_bar = self.diffusion.alphas_cumprod.double()
        config = SamplingConfig(sampler="dpmpp_2m", steps=steps)
        return sample(predict_clean, noise, alpha_bar, config, lambda: torch.randn_like(noise))


SPEED: dict[str, Speed] = {}
QUALITY: dict[str, Quality] = {}


def _parameters(module: Any) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def prepare_speed(name: str, model: dict[str, Any], batch: int) -> Answer:
    """Build a network to time; says how large it is and how much one step computes."""
    side = SPEED[name] = Speed(model, batch)
    work = {what: gflop(getattr(side, what)) for what in ("train", "sample", "forward")}
    return {"parameters": _parameters(side.diffusion), "gflop": work, "version": version("med-seg-diff-pytorch")}


def time_steps(name: str, step: str, count: int) -> Answer:
    """Milliseconds of `count` steps, after one that is not counted: another process had the caches."""
    action = getattr(SPEED[name], step)
    action()
    return {"ms": time_each(count, action)}


def prepare_quality(name: str, **settings: Any) -> Answer:
    """Build a network to train."""
    QUALITY[name] = Quality(**settings)
    return {"parameters": _parameters(QUALITY[name].diffusion), "version": version("med-seg-diff-pytorch")}


def train(name: str, seconds: float) -> Answer:
    """Train for `seconds` more."""
    side = QUALITY[name]
    side.diffusion.train()
    return side.pace.block(seconds, side.step)


def segment(name: str, out: str, sampler: str, steps: int, batch: int) -> Answer:
    """Write the test slices' masks, in [-1, 1], sampled with the averaged weights."""
    side = QUALITY[name]
    side.diffusion.model.load_state_dict(side.average.shadow)
    side.diffusion.eval()
    torch.manual_seed(0)
    images = side.data["test_images"]
    begun = time.perf_counter()
    with torch.inference_mode():
        masks = torch.cat([side.masks(part, sampler, steps) for part in images.split(batch)])
    seconds = time.perf_counter() - begun
    write_tensors(Path(out), masks=masks)
    return {"seconds": seconds}


if __name__ == "__main__":
    serve(
        {
            "prepare_speed": prepare_speed,
            "time_steps": time_steps,
            "prepare_quality": prepare_quality,
            "train": train,
            "segment": segment,
        }
    )
