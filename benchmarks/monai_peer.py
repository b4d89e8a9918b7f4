"""Worker: MONAI's DiffusionModelUNet, image and noisy mask as its input channels. Runs in `.venv-peers`.

MONAI ships the network, not a way to segment with it: diffusion, loss and sampler are ours (x0 prediction,
DPM-Solver++), the optimizer's settings too.
"""

from __future__ import annotations

from importlib.metadata import version

import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import Tensor

from benchmarks.recipe import SIZE, Batches, FixedBatch, Pace, synthetic
from benchmarks.sides import PlainTraining, Settings, autocast, serve_side
from medsegdiff.config import DiffusionConfig, SamplingConfig, TrainingConfig
from medsegdiff.diffusion import Diffusion
from medsegdiff.samplers import sample


def build(model: Settings) -> DiffusionModelUNet:
    """Its network for one image channel and one mask channel."""
    torch.manual_seed(0)
    settings: Settings = {name: tuple(value) if isinstance(value, list) else value for name, value in model.items()}
    return DiffusionModelUNet(2, in_channels=2, out_channels=1, **settings)


class _Denoiser:
    """The network as a denoiser, and its training loss."""

    def __init__(self, model: Settings) -> None:
        self.network = build(model)
        self.diffusion = Diffusion(DiffusionConfig())

    def answer(self, x_t: Tensor, t_B: Tensor, images: Tensor) -> Tensor:
        answer: Tensor = self.network(torch.cat([x_t, images], dim=1), t_B)
        return answer

    def loss(self, images: Tensor, masks: Tensor) -> Tensor:
        t_B = torch.randint(0, self.diffusion.config.timesteps, (len(masks),))
        noise = torch.randn_like(masks)
        answer = self.answer(self.diffusion.add_noise(masks, noise, t_B), t_B, images)
        return self.diffusion.loss(answer, masks, noise, t_B)

    def clean(self, x_t: Tensor, t_B: Tensor, images: Tensor) -> Tensor:
        return self.diffusion.clean_from(self.answer(x_t, t_B, images).float(), x_t, t_B).clamp(-1, 1)


class MonaiSpeed:
    """`train`, `sample` and `forward` are one step each."""

    def __init__(self, model: Settings, batch: int, precision: str) -> None:
        self.images, masks = synthetic(batch)
        self.precision = precision
        self.denoiser = _Denoiser(model)
        self.training = PlainTraining(
            self.denoiser.network, self.denoiser.loss, FixedBatch(self.images, masks), TrainingConfig(batch_size=batch),
            precision,
        )  # fmt: skip
        self.x_t = torch.randn(masks.shape)
        self.t_B = torch.full((batch,), 500)

    def train(self) -> None:
        """Noise, forward, backward, gradient clipping, AdamW."""
        self.training.step(0, 1e-3)

    def sample(self) -> Tensor:
        """The network, and the clean mask its answer implies."""
        self.denoiser.network.eval()
        with torch.inference_mode(), autocast(self.precision):
            return self.denoiser.clean(self.x_t, self.t_B, self.images)

    def forward(self) -> Tensor:
        """The network alone."""
        self.denoiser.network.eval()
        with torch.inference_mode(), autocast(self.precision):
            return self.denoiser.answer(self.x_t, self.t_B, self.images)

    def parameters(self) -> int:
        """Number of trainable scalars."""
        return sum(p.numel() for p in self.denoiser.network.parameters() if p.requires_grad)


class MonaiTraining:
    """Its network, trained and sampled by our diffusion."""

    def __init__(self, batches: Batches, training: TrainingConfig, network: Settings) -> None:
        self.denoiser = _Denoiser(network)
        self.network = self.denoiser.network
        self.training = PlainTraining(self.network, self.denoiser.loss, batches, training, "fp32")

    def step(self, step: int, pace: Pace) -> None:
        """One optimizer step at the rate of its place in the span."""
        self.training.step(step, pace.rate)

    def masks(self, images: Tensor, how: Settings) -> Tensor:
        """Sampled masks in [-1, 1]."""
        noise = torch.randn(len(images), 1, SIZE, SIZE)

        def predict_clean(x_t: Tensor, t: int) -> Tensor:
            return self.denoiser.clean(x_t, torch.full((len(x_t),), t), images)

        alpha_bar = self.denoiser.diffusion.alpha_bar
        return sample(predict_clean, noise, alpha_bar, SamplingConfig(**how), lambda: torch.randn_like(noise))


if __name__ == "__main__":
    serve_side(MonaiSpeed, MonaiTraining, version("monai"))
