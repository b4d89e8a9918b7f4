"""Several masks per image: their mean is the segmentation, their spread the uncertainty.

The result for an image depends on the image and its seed alone, not on which images share its batch: every (image,
member) pair draws its noise from a generator of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medsegdiff.config import SamplingConfig
from medsegdiff.diffusion import Diffusion
from medsegdiff.network import MedSegDiff
from medsegdiff.sampling import sample_masks


@dataclass(frozen=True)
class Ensemble:
    """What a set of samples says of N images.

    mean: average sample, (N, K, H, W), in [-1, 1].
    entropy: binary entropy per channel, (N, K, H, W), in [0, 1] bits, of the members' votes (0 where all agree); of a
        single member, of its own value read as a probability, (mean + 1) / 2.
    """

    mean: Tensor
    entropy: Tensor


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts: equal parts give equal seeds, on every machine."""
    digest = hashlib.sha256("|".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@torch.inference_mode()
def segment_images(
    network: MedSegDiff,
    diffusion: Diffusion,
    images: Tensor,
    config: SamplingConfig,
    seeds: Sequence[int],
    batch: int = 64,
) -> Ensemble:
    """Sample `config.members` masks for each image and fuse them by their mean.

    Args:
        images: (N, C, H, W), normalised, on the network's device.
        seeds: one per image; fixes the noise of its members.
        batch: at most this many (image, member) pairs at once; bounds memory, not the result.
    """
    pairs = [(index, member) for index in range(len(images)) for member in range(config.members)]
    shape = (network.config.mask_channels, *images.shape[-2:])
    total = torch.zeros(len(images), *shape)
    votes = torch.zeros(len(images), *shape)
    for start in range(0, len(pairs), batch):
        chunk = pairs[start : start + batch]
        noise_seeds = [derive_seed(seeds[index], member) for index, member in chunk]
        masks = sample_masks(network, diffusion, images, [index for index, _ in chunk], config, noise_seeds).cpu()
        for (index, _), mask in zip(chunk, masks, strict=True):
            total[index] += mask
            votes[index] += mask > 0
    mean = total / config.members
    return Ensemble(mean, _binary_entropy(votes / config.members if config.members > 1 else (mean + 1) / 2))


def _binary_entropy(probability: Tensor) -> Tensor:
    """Entropy in bits of a Bernoulli variable; 0 at probability 0 and 1."""
    p = probability.clamp(0, 1)
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / torch.log(torch.tensor(2.0))
