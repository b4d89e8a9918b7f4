"""What a training step minimises: the loss of a batch whose timesteps and noise are given.

Every term is a mean over cases of something that depends on one case alone: losses of microbatches, weighted by their
sizes, average to the whole batch's, and a case's own gradient exists (vmap over grad).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medsegdiff.diffusion import Diffusion
from medsegdiff.network import ImageFeatures, MedSegDiff


def denoising_loss(
    network: MedSegDiff,
    diffusion: Diffusion,
    images: Tensor,
    masks: Tensor,
    noise: Tensor,
    t_B: Tensor,
    auxiliary_weight: float = 0.0,
    condition_B: Tensor | None = None,
) -> Tensor:
    """The loss of one batch, a mean over its cases, a scalar.

    Args:
        images: (B, C, H, W), normalised.
        masks: clean masks, (B, K, H, W), in {-1, +1}.
        noise: standard normal of the masks' shape.
        t_B: timestep of each case, (B,), in [0, T).
        auxiliary_weight: of the auxiliary head's loss, where the network has the head; 0 leaves the head untrained.
        condition_B: with self-conditioning, which cases see an estimate of x_0 made beforehand, (B,) bool; the others,
            and all without it, see zeros. Half of the cases at random in Chen et al. (arXiv 2208.04202, section 3.2).

    Raises:
        ValueError: `condition_B` is given for a network without self-conditioning.
    """
    clean = masks * diffusion.config.mask_scale
    noisy = _channels_last(diffusion.add_noise(clean, noise, t_B))
    features = network.image_features(_channels_last(images))
    previous = None
    if condition_B is not None:
        estimate = _estimate(network, diffusion, noisy, t_B, features)
        previous = torch.where(condition_B[:, None, None, None], estimate, torch.zeros_like(estimate))
    loss = diffusion.loss(network.denoise(noisy, t_B, features, previous), clean, noise, t_B)
    if network.config.auxiliary_head and auxiliary_weight > 0:
        loss = loss + auxiliary_weight * segmentation_loss(network.auxiliary_logits(features), masks)
    return loss


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Soft Dice plus cross-entropy, a mean over cases and channels, a scalar.

    Each channel is a yes-or-no question of its own (sigmoid, not softmax): that fits one target, one-hot channels and
    overlapping regions alike. Cross-entropy is calibrated but drowns small targets in background; Dice (Milletari et
    al. 2016) does not. Dice is taken per case and channel - over the batch it would mix patients - and smoothed by one
    pixel, so that an empty mask asks for an empty answer.

    Args:
        logits: log-odds, (B, K, H, W).
        masks: (B, K, H, W), in {-1, +1}.
    """
    logits, truth = logits.float(), (masks + 1) / 2
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth)
    answer = logits.sigmoid()
    overlap_BK = (answer * truth).sum(dim=(2, 3))
    dice_BK = (2 * overlap_BK + 1) / (answer.sum(dim=(2, 3)) + truth.sum(dim=(2, 3)) + 1)
    return cross_entropy + 1 - dice_BK.mean()


@torch.no_grad()
def _estimate(network: MedSegDiff, diffusion: Diffusion, noisy: Tensor, t_B: Tensor, features: ImageFeatures) -> Tensor:
    """What the network, shown no estimate, takes x_0 for; clamped as a sampler clamps it."""
    scale = diffusion.config.mask_scale
    return diffusion.clean_from(network.denoise(noisy, t_B, features), noisy, t_B).clamp(-scale, scale)


def _channels_last(x_BCHW: Tensor) -> Tensor:
    """The same values with channels innermost in memory, as the trainer's kernels lie.

    By permutation, not by memory_format, which vmap does not know.
    """
    return x_BCHW.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
