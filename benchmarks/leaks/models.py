"""The models that are attacked: one that has learnt its patients by heart, one that has not, and private ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from benchmarks.leaks.people import People, draw_rows
from client.privacy.accounting import noise_multiplier
from client.privacy.engines import Rows, choose_engine
from client.privacy.patients import DiffusionRowLoss
from client.privacy.policy import PrivacyPolicy
from client.privacy.sampling import PoissonSampler
from client.privacy.step import PrivateStep, take_steps
from medsegdiff.config import AugmentConfig, DiffusionConfig, ModelConfig, preset
from medsegdiff.data.augment import augment
from medsegdiff.diffusion import Diffusion
from medsegdiff.network import MedSegDiff, channels_last
from medsegdiff.objective import denoising_loss

AUGMENT = AugmentConfig(flip=True, rotate_degrees=15, scale=0.1, shift=0.05)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    steps: int
    batch: int = 16  # slices
    learning_rate: float = 2e-3
    augmented: bool = False
    epsilon: float | None = None  # of the whole training, at DELTA; None: no privacy
    q: float = 0.25
    draws: int = 2  # a slice

    @property
    def sigma(self) -> float | None:
        """The least noise with which the training keeps to its epsilon."""
        return None if self.epsilon is None else _noise(self.q, self.steps, self.epsilon)


@lru_cache
def _noise(q: float, steps: int, epsilon: float) -> float:
    return noise_multiplier(q, steps, DELTA, epsilon)


DELTA = 1e-3
CLIP = 0.1


def network_config(side: int) -> ModelConfig:
    """A small network of every kind of part."""
    return preset("tiny", image_size=side, base_channels=8)


def train(people: People, recipe: Recipe, seed: int) -> MedSegDiff:
    """A model of these patients; its noise, where it has any, is the operating system's."""
    device, side = people.images.device, people.images.shape[-1]
    torch.manual_seed(seed)
    network = channels_last(MedSegDiff(network_config(side))).to(device).train()
    if recipe.epsilon is not None:
        _train_privately(network, people, recipe)
        return network
    diffusion = Diffusion(DiffusionConfig())
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=1e-4, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for step, rows in zip(range(recipe.steps), _batches(people, recipe, diffusion, generator), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        optimizer.zero_grad(set_to_none=True)
        denoising_loss(network, diffusion, **rows, auxiliary_weight=0.0).backward()
        optimizer.step()
    return network


def _batches(people: People, recipe: Recipe, diffusion: Diffusion, generator: torch.Generator) -> Iterator[Rows]:
    """Random slices of random patients, for ever."""
    images, masks = people.images.flatten(0, 1), people.masks.flatten(0, 1)
    while True:
        chosen = torch.randint(0, len(images), (recipe.batch,), generator=generator).to(images.device)
        drawn, truth = images[chosen], masks[chosen]
        if recipe.augmented:
            drawn, labels = augment(drawn, (truth[:, 0] > 0).byte(), AUGMENT, generator)
            truth = labels[:, None].float() * 2 - 1
        t_B = torch.randint(0, diffusion.config.timesteps, (recipe.batch,), generator=generator)
        noise = torch.randn(truth.shape, generator=generator)
        yield {"images": drawn, "masks": truth, "t_B": t_B.to(drawn.device), "noise": noise.to(drawn.device)}


def _train_privately(network: MedSegDiff, people: People, recipe: Recipe) -> None:
    """The step, sampler, noise and engine that a hospital uses."""
    sigma = recipe.sigma
    assert sigma is not None
    assert recipe.epsilon is not None
    policy = PrivacyPolicy(
        epsilon=recipe.epsilon, delta=DELTA, sigma=sigma, q=recipe.q, clip=CLIP,
        batch=max(1, round(recipe.q * len(people))), steps=recipe.steps, rounds=1, slices=people.images.shape[1],
        draws=recipe.draws,
    )  # fmt: skip
    diffusion = Diffusion(DiffusionConfig())
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=1e-4, fused=True)
    loss = DiffusionRowLoss(diffusion, precision="fp32")
    step = PrivateStep(network, loss, policy, optimizer, choose_engine(people.images.device))
    generator = torch.Generator()
    generator.seed()

    def set_rate(number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * number / recipe.steps))

    def rows(patient: int) -> Rows:
        return draw_rows(people, patient, recipe.draws, diffusion, generator)

    take_steps(step, PoissonSampler(len(people), recipe.q), rows, recipe.steps, set_rate)
