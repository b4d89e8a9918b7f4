"""Random changes to training slices: geometry for image and mask alike, intensity for the image alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from medsegdiff.config import AugmentConfig


def augment(images: Tensor, labels: Tensor, config: AugmentConfig, generator: Generator) -> tuple[Tensor, Tensor]:
    """Change each slice of a batch at random, as `AugmentConfig` documents.

    Args:
        images: (B, C, S, S) float32.
        labels: (B, S, S) uint8 label indices.
        generator: a CPU generator; its state alone decides what happens, whatever the device of the batch (only the
            added noise is other noise on a GPU).

    Returns:
        New tensors of the same shapes and types: images bilinear, labels nearest. What comes in from outside the
        square is its mirror image, in image and labels alike, so that the two never contradict one another.
    """
    if config.flip or config.rotate_degrees or config.scale or config.shift:
        grid = F.affine_grid(_affine(len(images), config, generator), list(images.shape), align_corners=False)
        grid = grid.to(images.device)
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        moved = F.grid_sample(
            labels[:, None].float(), grid, mode="nearest", padding_mode="reflection", align_corners=False
        )
        labels = moved[:, 0].to(labels.dtype)
    return _intensities(images, config, generator), labels


def _affine(batch: int, config: AugmentConfig, generator: Generator) -> Tensor:
    """(B, 2, 3): where each output pixel is read, in coordinates of -1..1 across the square."""
    angle = _uniform(config.rotate_degrees * math.pi / 180, (batch,), generator)
    zoom = 1 / (1 + _uniform(config.scale, (batch,), generator))
    flips = torch.ones(batch, 2)
    if config.flip:
        flips = torch.randint(0, 2, (batch, 2), generator=generator) * 2.0 - 1
    shift = _uniform(2 * config.shift, (batch, 2), generator)  # the square is 2 wide in these coordinates
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rotation = torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
    return torch.cat([rotation * flips[:, None, :], shift[:, :, None]], dim=2)


def _intensities(images: Tensor, config: AugmentConfig, generator: Generator) -> Tensor:
    batch, channels = images.shape[:2]
    device = images.device
    if config.gamma:
        exponent = _uniform(config.gamma, (batch, 1, 1, 1), generator).exp().to(device)
        low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
        span = (high - low).clamp_min(1e-6)
        images = ((images - low) / span).clamp(0, 1) ** exponent * span + low
    if config.intensity:
        gain = 1 + _uniform(config.intensity, (batch, channels, 1, 1), generator)
        offset = _uniform(config.intensity, (batch, channels, 1, 1), generator)
        images = images * gain.to(device) + offset.to(device)
    if config.noise:
        deviation = torch.rand(batch, 1, 1, 1, generator=generator) * config.noise
        images = images + _normal(images, generator) * deviation.to(device)
    return images


def _normal(images: Tensor, generator: Generator) -> Tensor:
    """Standard normal noise like `images`, drawn where they are: on a CPU that takes longer than all the rest."""
    if images.device.type != "cpu":
        seed = int(torch.randint(2**62, (), generator=generator))
        generator = Generator(images.device).manual_seed(seed)
    return torch.randn(images.shape, generator=generator, device=images.device)


def _uniform(limit: float, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform in +- limit."""
    return (torch.rand(shape, generator=generator) * 2 - 1) * limit
