"""What the configuration of a MONAI bundle builds: our loader behind the names that a bundle's `_target_` gives.

`medsegfed model export --to monai-bundle` writes such a configuration. MONAI calls this; it is not imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medsegdiff.config import SamplingConfig
from medsegdiff.devices import choose_device
from medsegdiff.ensemble import derive_seed, segment_images
from medsegdiff.network import channels_last
from medsegdiff.segment import segment_scan
from medsegdiff.weights import Segmenter, load_model


class BundleNetwork(nn.Module):
    """A MedSegDiff as MONAI sees a segmentation network: images in, masks out; the sampling happens inside.

    Attributes:
        segmenter: the model; its network is this module's one child, so `.to()` and `.eval()` reach it.
        sampling: steps, members and their fusion.
        seed: fixes the noise.
    """

    def __init__(self, segmenter: Segmenter, sampling: SamplingConfig, seed: int) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.sampling = sampling
        self.seed = seed
        self.denoiser = segmenter.network

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Fused masks (N, K, H, W) in [-1, 1], on the images' device, of images normalised as the model asks.

        The noise of an image depends on the seed and its place in the batch.
        """
        seeds = [derive_seed(self.seed, index) for index in range(len(images_NCHW))]
        exclusive = self.segmenter.scheme.kind == "multiclass"
        ensemble = segment_images(
            self.denoiser, self.segmenter.diffusion, images_NCHW, self.sampling, seeds, exclusive=exclusive
        )
        return ensemble.fused(self.sampling.fuse).to(images_NCHW.device)


def network(path: str, device: str | torch.device = "auto", members: int = 5, seed: int = 0) -> BundleNetwork:
    """The model of a model.safetensors, ready on a device; `members` samples make one mask.

    Raises:
        UserError: the file is no model, or the device is not there.
    """
    segmenter = load_model(Path(path))
    channels_last(segmenter.network).to(choose_device(str(device)))
    return BundleNetwork(segmenter, replace(segmenter.card.sampling, members=members), seed)


def segment(network: BundleNetwork, scans: Sequence[str], output_dir: str) -> list[dict[str, Any]]:
    """Segment whole scans as `medsegfed segment` does, and write what it writes into `output_dir`.

    Raises:
        UserError: a scan cannot be read, or has other channels than the model was trained on.
    """
    sampling = network.sampling
    return [
        vars(segment_scan(network.segmenter, scan, Path(output_dir), sampling, network.seed, sampling.members > 1))
        for scan in scans
    ]
