"""Several masks per image: fused they are the segmentation, their spread is the uncertainty.

The result for an image depends on the image and its seed alone, not on which images share its batch: every (image,
member) pair draws its noise from a generator of its own.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medsegdiff.config import Fuse, SamplingConfig
from medsegdiff.devices import autocast
from medsegdiff.diffusion import Diffusion
from medsegdiff.memory import Bound
from medsegdiff.network import MedSegDiff
from medsegdiff.sampling import sample_masks
from medsegdiff.staple import staple, staple_labels

Pairs = Sequence[tuple[int, int]]  # (image, member)


@dataclass(frozen=True)
class Ensemble:
    """What a set of samples says of N images.

    mean: average sample, (N, K, H, W), in [-1, 1].
    entropy: binary entropy per channel, (N, K, H, W), in [0, 1] bits, of the members' signs (0 where all agree); of a
        single member, of its own value read as a probability, (mean + 1) / 2.
    variance: of the members' values, their number its denominator, (N, K, H, W), in [0, 1]; 0 for one member.
    share: of the members that chose the channel, (N, K, H, W), in [0, 1]. Where channels are labels that exclude each
        other a member chooses the largest (the first of equals), else every positive one.
    choices: what each member chose, one byte a member and voxel: (M, N, 1, H, W) numbers of channels that exclude each
        other, else (M, N, K, H, W), 0 or 1. Kept for STAPLE alone, which looks at all slices of a case at once; without
        it no member outlives its batch.
    exclusive: whether the channels exclude each other.
    """

    mean: Tensor
    entropy: Tensor
    variance: Tensor
    share: Tensor
    choices: Tensor | None
    exclusive: bool

    def fused(self, how: Fuse) -> Tensor:
        """One map from all members, (N, K, H, W), in [-1, 1]: positive, or largest, where the structure is.

        "mean": of the values. "majority": the share of votes p as 2p - 1, so that a tie is background. "staple": 2p - 1
        of STAPLE's probability; the N images are taken as one case, with one pair of error rates a member and structure
        (a confusion matrix a member where channels exclude each other).
        """
        if how == "mean":
            return self.mean
        return 2 * (self.share if how == "majority" else self._staple()) - 1

    def _staple(self) -> Tensor:
        assert self.choices is not None, "sampled with another fuse setting"
        if self.exclusive:
            return staple_labels(self.choices[:, :, 0], self.mean.shape[1]).probability.transpose(0, 1).float()
        channels = [staple(masks).probability.float() for masks in self.choices.unbind(dim=2)]
        return torch.stack(channels, dim=1)

    @classmethod
    def join(cls, parts: Sequence[Ensemble]) -> Ensemble:
        """The images of all parts, in order."""
        choices = [part.choices for part in parts if part.choices is not None]
        return cls(
            mean=torch.cat([part.mean for part in parts]),
            entropy=torch.cat([part.entropy for part in parts]),
            variance=torch.cat([part.variance for part in parts]),
            share=torch.cat([part.share for part in parts]),
            choices=torch.cat(choices, dim=1) if choices else None,
            exclusive=parts[0].exclusive,
        )

    def split(self, lengths: Sequence[int]) -> list[Ensemble]:
        """The first images, the next, ...: as many as `lengths` says."""
        ends = itertools.accumulate(lengths)
        return [self._part(slice(end - length, end)) for end, length in zip(ends, lengths, strict=True)]

    def _part(self, images: slice) -> Ensemble:
        choices = None if self.choices is None else self.choices[:, images]
        return Ensemble(
            self.mean[images], self.entropy[images], self.variance[images], self.share[images], choices, self.exclusive
        )


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
    batch: int | Bound = 64,
    exclusive: bool = False,
    watch: Callable[[Pairs, Tensor], None] | None = None,
) -> Ensemble:
    """Sample `config.members` masks for each image.

    Args:
        images: (N, C, H, W), normalised, on the network's device.
        seeds: one per image; fixes the noise of its members.
        batch: at most this many (image, member) pairs at once, fewer where they do not fit; bounds memory, not the
            result.
        exclusive: whether the mask's channels are labels that exclude each other.
        watch: sees every batch before it is added up: its pairs, ordered by image, and their masks (P, K, H, W) on
            the CPU.

    Raises:
        UserError: the GPU's memory does not hold a single pair.
    """
    pairs = [(index, member) for index in range(len(images)) for member in range(config.members)]
    shape = (len(images), network.config.mask_channels, *images.shape[-2:])
    total, positive, squares = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    chosen = torch.zeros(shape) if exclusive else positive
    kept = (config.members, shape[0], 1 if exclusive else shape[1], *shape[2:])
    choices = torch.zeros(kept, dtype=torch.uint8) if config.fuse == "staple" else None

    def draw(chunk: Pairs) -> Tensor:
        noise_seeds = [derive_seed(seeds[index], member) for index, member in chunk]
        with autocast(images.device, "auto"):
            masks = sample_masks(network, diffusion, images, [index for index, _ in chunk], config, noise_seeds)
        return masks.float().cpu()

    bound = batch if isinstance(batch, Bound) else Bound(batch)
    for chunk, masks in bound.batches(pairs, draw):
        if watch is not None:
            watch(chunk, masks)
        for (index, member), mask in zip(chunk, masks, strict=True):
            if member:  # Welford's sum of squares about the mean: no large numbers that cancel
                squares[index] += (mask - total[index] / member) ** 2 * (member / (member + 1))
            total[index] += mask
            positive[index] += mask > 0
            choice = mask.argmax(dim=0, keepdim=True) if exclusive else mask > 0
            if exclusive:
                chosen[index].scatter_add_(0, choice, torch.ones(choice.shape))
            if choices is not None:
                choices[member, index] = choice
    mean = total / config.members
    return Ensemble(
        mean=mean,
        entropy=_binary_entropy(positive / config.members if config.members > 1 else (mean + 1) / 2),
        variance=squares / config.members,
        share=chosen / config.members,
        choices=choices,
        exclusive=exclusive,
    )


def _binary_entropy(probability: Tensor) -> Tensor:
    """Entropy in bits of a Bernoulli variable; 0 at probability 0 and 1."""
    p = probability.clamp(0, 1)
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / torch.log(torch.tensor(2.0))
