"""Worker: med-seg-diff-pytorch, as its package ships it. Runs in `.venv-peers`.

It gets the same optimizer, learning rate schedule, gradient clipping and weight average as ours; the network, the
diffusion loss and the samplers are its own. Our DPM-Solver++ on its prediction is the one addition.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from med_seg_diff_pytorch import (  # type: ignore[import-not-found, unused-ignore]
    MedSegDiff,
    Unet,
)
from torch import Tensor

from benchmarks.recipe import SIZE, Batches, FixedBatch, Pace, synthetic
from benchmarks.sides import PlainTraining, Settings, autocast, serve_side
from medsegdiff.config import SamplingConfig, TrainingConfig
from medsegdiff.samplers import sample


def build(model: Settings, objective: str) -> Any:
    """Its diffusion around its network, one image channel and one mask channel; else its defaults (cosine, T 1000)."""
    torch.manual_seed(0)
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in model.items()}
    return MedSegDiff(Unet(image_size=SIZE, mask_channels=1, input_img_channels=1, **settings), objective=objective)


def training_of(diffusion: Any, batches: Batches, training: TrainingConfig, precision: str) -> PlainTraining:
    """Its forward draws timesteps and noise and returns the loss; it wants masks in [0, 1]."""
    return PlainTraining(
        diffusion, lambda images, masks: diffusion((masks + 1) / 2, images), batches, training, precision
    )


class PeerSpeed:
    """`train`, `sample` and `forward` are one step each."""

    def __init__(self, model: Settings, batch: int, precision: str) -> None:
        self.images, masks = synthetic(batch)
        self.precision = precision
        self.diffusion = build(model, "pred_noise")
        batches = FixedBatch(self.images, masks)
        self.training = training_of(self.diffusion, batches, TrainingConfig(batch_size=batch), precision)
        self.x_t = torch.randn(masks.shape)
        self.t_B = torch.full((batch,), 500)

    def train(self) -> None:
        """Noise, forward, backward, gradient clipping, AdamW."""
        self.training.step(0, 1e-3)

    def sample(self) -> Any:
        """A sampling step of its own DDIM: the network, and the clean mask its answer implies."""
        self.diffusion.eval()
        with torch.inference_mode(), autocast(self.precision):
            return self.diffusion.model_predictions(self.x_t, self.t_B, self.images, clip_x_start=True)

    def forward(self) -> Any:
        """The network alone."""
        self.diffusion.eval()
        with torch.inference_mode(), autocast(self.precision):
            return self.diffusion.model(self.x_t, self.t_B, self.images)

    def parameters(self) -> int:
        """Number of trainable scalars."""
        return sum(p.numel() for p in self.diffusion.parameters() if p.requires_grad)


class PeerTraining:
    """Its diffusion, trained and sampled."""

    def __init__(self, batches: Batches, training: TrainingConfig, network: Settings, objective: str) -> None:
        self.diffusion = build(network, objective)
        self.network = self.diffusion.model
        self.training = training_of(self.diffusion, batches, training, "fp32")

    def step(self, step: int, pace: Pace) -> None:
        """One optimizer step at the rate of its place in the span."""
        self.training.step(step, pace.rate)

    def masks(self, images: Tensor, how: Settings) -> Tensor:
        """Sampled masks in [-1, 1]: by its own DDIM (eta 1, its default) or by our DPM-Solver++."""
        self.diffusion.eval()
        if how["sampler"] == "own":
            self.diffusion.sampling_timesteps = how["steps"]
            self.diffusion.is_ddim_sampling = True
            sampled: Tensor = self.diffusion.ddim_sample((len(images), 1, SIZE, SIZE), images)
            return sampled * 2 - 1

        def predict_clean(x_t: Tensor, t: int) -> Tensor:
            t_B = torch.full((len(x_t),), t)
            clean: Tensor = self.diffusion.model_predictions(x_t, t_B, images, clip_x_start=True).pred_x_start
            return clean

        noise = torch.randn(len(images), 1, SIZE, SIZE)
        alpha_bar = self.diffusion.alphas_cumprod.double()
        return sample(predict_clean, noise, alpha_bar, SamplingConfig(**how), lambda: torch.randn_like(noise))


if __name__ == "__main__":
    serve_side(PeerSpeed, PeerTraining, version("med-seg-diff-pytorch"))
