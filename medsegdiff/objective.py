"""What a training step minimises: the denoising loss of a batch whose timesteps and noise are given."""

from __future__ import annotations

import torch
from torch import Tensor

from medsegdiff.diffusion import Diffusion
from medsegdiff.network import MedSegDiff


def denoising_loss(
    network: MedSegDiff, diffusion: Diffusion, images: Tensor, masks: Tensor, noise: Tensor, t_B: Tensor
) -> Tensor:
    """The loss of one batch, a mean over its cases, a scalar.

    Args:
        images: (B, C, H, W), normalised.
        masks: clean masks, (B, K, H, W), in {-1, +1}.
        noise: standard normal of the masks' shape.
        t_B: timestep of each case, (B,), in [0, T).
    """
    clean = masks * diffusion.config.mask_scale
    noisy = diffusion.add_noise(clean, noise, t_B)
    answer = network(
        noisy.contiguous(memory_format=torch.channels_last), t_B, images.contiguous(memory_format=torch.channels_last)
    )
    return diffusion.loss(answer, clean, noise, t_B)
