"""One mask per image and seed: the network and the image behind a sampler's question "what is x_0?"."""

from __future__ import annotations

import torch
from torch import Tensor

from medsegdiff.config import SamplingConfig
from medsegdiff.diffusion import Diffusion
from medsegdiff.network import MedSegDiff
from medsegdiff.samplers import sample


def sample_masks(
    network: MedSegDiff,
    diffusion: Diffusion,
    images: Tensor,
    indices: list[int],
    config: SamplingConfig,
    seeds: list[int],
) -> Tensor:
    """One mask for each entry of `indices` into images, (len(indices), K, H, W), in [-1, 1].

    A network with self-conditioning sees the clean estimate of the step before; at the first step none.
    """
    network.eval()
    scale = diffusion.config.mask_scale
    device = images.device
    unique = sorted(set(indices))
    position = torch.tensor([unique.index(index) for index in indices], device=device)
    # The image stages before the first fusion see neither x_t nor t: once an image, not once a step and member.
    features = [level[position] for level in network.image_features(images[unique])]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (network.config.mask_channels, *images.shape[-2:])
    estimate: tuple[Tensor, ...] = ()

    def draw() -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)

    def predict_clean(x_t: Tensor, t: int) -> Tensor:
        nonlocal estimate
        t_B = torch.full((len(x_t),), t, device=device)
        answer = network.denoise(x_t, t_B, features, *estimate).to(x_t.dtype)  # autocast answers in bf16
        clean = diffusion.clean_from(answer, x_t, t_B)
        clean = clean.clamp(-scale, scale)  # masks have no values beyond; keeps a poor early step from running away
        if network.config.self_conditioning:
            estimate = (clean,)
        return clean

    return sample(predict_clean, draw(), diffusion.alpha_bar, config, draw) / scale
