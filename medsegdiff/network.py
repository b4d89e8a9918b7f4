"""The MedSegDiff denoiser: D(E_I(I | x_t) + E_x(x_t), t) (Wu et al., arXiv 2211.00611, eq. 4).

Two encoders - one for the image I, one for the noisy mask x_t - meet at the fusion levels (`ff_parser.py`), are summed
at the bottleneck and at every skip, and one U-Net decoder returns the prediction at the mask's size.

Shape suffixes: B cases, C channels, H and W pixels, E features of the time embedding.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsegdiff.config import ModelConfig
from medsegdiff.ff_parser import DynamicFusion

ImageFeatures = list[Tensor]  # image features of level 0, 1, ..., up to the first fusion, before it


class ResidualBlock(nn.Module):
    """GroupNorm - SiLU - conv 3x3, twice, beside a (projected) identity; the time embedding scales and shifts between.

    GroupNorm, not BatchNorm: batch statistics mix patients, so no per-patient gradient exists.
    """

    def __init__(self, channels_in: int, channels_out: int, time_features: int | None, dropout: float) -> None:
        super().__init__()
        self.norm_1 = _group_norm(channels_in)
        self.conv_1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time = nn.Linear(time_features, 2 * channels_out) if time_features else None
        self.norm_2 = _group_norm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x_BCHW: Tensor, time_BE: Tensor | None = None) -> Tensor:
        h_BCHW = self.norm_2(self.conv_1(F.silu(self.norm_1(x_BCHW))))
        if self.time is not None and time_BE is not None:
            scale_BC11, shift_BC11 = self.time(time_BE)[:, :, None, None].chunk(2, dim=1)
            h_BCHW = h_BCHW * (1 + scale_BC11) + shift_BC11
        out_BCHW: Tensor = self.skip(x_BCHW) + self.conv_2(self.dropout(F.silu(h_BCHW)))
        return out_BCHW


class Attention(nn.Module):
    """Self-attention over the pixels of one level, beside an identity (32 channels a head)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = math.gcd(channels, max(1, channels // 32))  # heads share the channels evenly
        self.norm = _group_norm(channels)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        batch, channels, height, width = x_BCHW.shape
        packed = self.query_key_value(self.norm(x_BCHW)).flatten(2).transpose(1, 2)
        query, key, value = packed.unflatten(2, (3, self.heads, channels // self.heads)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        back = mixed.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        attended: Tensor = self.out(back)
        return x_BCHW + attended


class Stage(nn.Module):
    """The residual blocks of one level, with attention after them where the level asks for it."""

    def __init__(
        self, channels_in: int, channels_out: int, blocks: int, time_features: int | None, dropout: float, attend: bool
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.blocks = nn.ModuleList(
            ResidualBlock(before, after, time_features, dropout) for before, after in itertools.pairwise(widths)
        )
        self.attention = Attention(channels_out) if attend else nn.Identity()

    def forward(self, x_BCHW: Tensor, time_BE: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x_BCHW = block(x_BCHW, time_BE)
        attended: Tensor = self.attention(x_BCHW)
        return attended


class AuxiliaryHead(nn.Module):
    """A mask read off image features of every level (a feature pyramid, Lin et al. 2017, arXiv 1612.03144).

    From the coarsest level up, each is projected to the finest one's width and added to the sum so far, doubled in
    size. No norm over the batch, unlike the "highway" of the first public code.
    """

    def __init__(self, widths: list[int], mask_channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, widths[0], 1) for width in widths)
        self.norm = _group_norm(widths[0])
        self.out = nn.Conv2d(widths[0], mask_channels, 3, padding=1)

    def forward(self, features: ImageFeatures) -> Tensor:
        """Logits, (B, K, H, W), from one feature map a level."""
        h_BCHW = self.lateral[-1](features[-1])
        for level in reversed(range(len(features) - 1)):
            h_BCHW = self.lateral[level](features[level]) + _double(h_BCHW)
        logits: Tensor = self.out(F.silu(self.norm(h_BCHW)))
        return logits


class MedSegDiff(nn.Module):
    """Predicts eps, x0 or v (the diffusion decides which) of a noisy mask, given the image.

    With `config.self_conditioning` it also sees its previous estimate of x_0 (Chen et al., Analog Bits,
    arXiv 2208.04202, section 3.2). With `config.auxiliary_head` it also segments from the image alone.

    Guarantees:
        `denoise(x, t, image_features(image))` equals `forward(x, t, image)`: the features are computed once per image
        and reused over sampling steps and ensemble members.
        Every entry of `state_dict()` is a real float tensor; there are no buffers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.base_channels * factor for factor in config.channel_multipliers]
        sizes = [config.image_size // 2**level for level in range(len(widths))]
        time_features = 4 * config.base_channels
        attend = [level in config.attention_levels for level in range(len(widths))]
        blocks, dropout = config.blocks_per_level, config.dropout

        self.time_embedding = nn.Sequential(
            nn.Linear(config.base_channels, time_features),
            nn.SiLU(),
            nn.Linear(time_features, time_features),
            nn.SiLU(),
        )
        self.image_stem = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        mask_inputs = config.mask_channels * (2 if config.self_conditioning else 1)
        self.mask_stem = nn.Conv2d(mask_inputs, widths[0], 3, padding=1)
        # No attention in the image encoder: the fusion lets it see the whole mask already, and it is the cheap side.
        self.image_stages = nn.ModuleList(Stage(w, w, blocks, None, dropout, attend=False) for w in widths)
        self.mask_stages = nn.ModuleList(
            Stage(w, w, blocks, time_features, dropout, attend=on) for w, on in zip(widths, attend, strict=True)
        )
        self.image_down = nn.ModuleList(_downsample(a, b) for a, b in itertools.pairwise(widths))
        self.mask_down = nn.ModuleList(_downsample(a, b) for a, b in itertools.pairwise(widths))
        self.fusions = nn.ModuleDict(
            {
                str(level): DynamicFusion(widths[level], sizes[level], config.ff_parser)
                for level in sorted(set(config.fusion_levels))
            }
        )
        self.middle = Stage(widths[-1], widths[-1], 1, time_features, dropout, attend=False)
        self.up = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.decoder_stages = nn.ModuleList(
            Stage(2 * w, w, blocks, time_features, dropout, attend=on) for w, on in zip(widths, attend, strict=True)
        )
        self.out_norm = _group_norm(widths[0])
        self.out = nn.Conv2d(widths[0], config.mask_channels, 3, padding=1)
        with torch.no_grad():  # start near "nothing": a small first prediction keeps the first steps' loss at its mean
            self.out.weight.mul_(0.1)
        # Last, so that one seed gives the other parts the same weights with the head and without it.
        self.auxiliary_head = AuxiliaryHead(widths, config.mask_channels) if config.auxiliary_head else None

    def forward(
        self, mask_BKHW: Tensor, t_B: Tensor, image_BCHW: Tensor, previous_BKHW: Tensor | None = None
    ) -> Tensor:
        """Predict from the noisy mask x_t.

        Args:
            mask_BKHW: x_t, (B, K, H, W), any H and W divisible by the downsampling.
            t_B: timestep of each case, (B,), in [0, T).
            image_BCHW: the image, (B, C, H, W), normalised.
            previous_BKHW: with self-conditioning, the last estimate of x_0, (B, K, H, W), in [-b, b]; none is zeros.

        Returns:
            The prediction, (B, K, H, W).
        """
        return self.denoise(mask_BKHW, t_B, self.image_features(image_BCHW), previous_BKHW)

    def image_features(self, image_BCHW: Tensor) -> ImageFeatures:
        """Image features up to the first fusion: they depend on neither x_t nor t."""
        h_BCHW = self.image_stages[0](self.image_stem(image_BCHW))
        features = [h_BCHW]
        for level in range(1, self._first_fusion + 1):
            h_BCHW = self.image_stages[level](self.image_down[level - 1](h_BCHW))
            features.append(h_BCHW)
        return features

    def auxiliary(self, image_BCHW: Tensor) -> Tensor:
        """The auxiliary head's mask, without diffusion: (B, K, H, W), in (-1, 1), positive inside.

        Raises:
            ValueError: the network has no auxiliary head.
        """
        return (self.auxiliary_logits(self.image_features(image_BCHW)) / 2).tanh()  # = 2 sigmoid(logit) - 1

    def auxiliary_logits(self, features: ImageFeatures) -> Tensor:
        """Log-odds of each pixel and channel, (B, K, H, W); `features` as `image_features` returns them.

        The image encoder goes on to its last level without fusion: the levels below the first fusion alone see too
        few pixels around each, and the deep ones cost little at their size.

        Raises:
            ValueError: the network has no auxiliary head.
        """
        if self.auxiliary_head is None:
            raise ValueError("this network has no auxiliary head (auxiliary_head is false)")
        pyramid = list(features)
        for level in range(len(features), len(self.image_stages)):
            pyramid.append(self.image_stages[level](self.image_down[level - 1](pyramid[-1])))
        logits: Tensor = self.auxiliary_head(pyramid)
        return logits

    def denoise(
        self, mask_BKHW: Tensor, t_B: Tensor, features: ImageFeatures, previous_BKHW: Tensor | None = None
    ) -> Tensor:
        """The part of `forward` that depends on x_t and t; `features` as `image_features` returns them.

        Raises:
            ValueError: `previous_BKHW` is given to a network without self-conditioning.
        """
        time_BE = self.time_embedding(timestep_embedding(t_B, self.config.base_channels).to(mask_BKHW.dtype))
        skips = []
        mask = self.mask_stem(self._with_previous(mask_BKHW, previous_BKHW))
        image = features[0]
        for level in range(len(self.mask_stages)):
            if level:
                mask = self.mask_down[level - 1](mask)
                static = level < len(features)
                image = features[level] if static else self.image_stages[level](self.image_down[level - 1](image))
            mask = self.mask_stages[level](mask, time_BE)
            if str(level) in self.fusions:
                image = self.fusions[str(level)](image, mask)
            skips.append(mask + image)

        h_BCHW = self.middle(skips[-1], time_BE)
        for level in reversed(range(len(skips))):
            h_BCHW = self.decoder_stages[level](torch.cat([h_BCHW, skips[level]], dim=1), time_BE)
            if level:
                h_BCHW = _double(self.up[level - 1](h_BCHW))
        prediction: Tensor = self.out(F.silu(self.out_norm(h_BCHW)))
        return prediction

    def _with_previous(self, mask_BKHW: Tensor, previous_BKHW: Tensor | None) -> Tensor:
        """What the mask encoder sees: x_t and, with self-conditioning, the estimate as further channels."""
        if not self.config.self_conditioning:
            if previous_BKHW is not None:
                raise ValueError("this network takes no previous estimate (self_conditioning is false)")
            return mask_BKHW
        known = torch.zeros_like(mask_BKHW) if previous_BKHW is None else previous_BKHW
        return torch.cat([mask_BKHW, known], dim=1)

    @property
    def _first_fusion(self) -> int:
        """The last level whose image features, before fusion, depend on the image alone."""
        return min(self.config.fusion_levels, default=len(self.image_stages) - 1)


def timestep_embedding(t_B: Tensor, features: int) -> Tensor:
    """Sinusoids of t at geometrically spaced periods, 2 pi up to just below 10000 * 2 pi (Vaswani et al. 2017, 3.5)."""
    half = features // 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t_B.device, dtype=torch.float32) / half)
    angles = t_B.to(torch.float32)[:, None] * frequencies[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _group_norm(channels: int) -> nn.GroupNorm:
    """Groups of at least 4 channels, at most 32 groups."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4)), channels)


def _double(x_BCHW: Tensor) -> Tensor:
    """Every pixel four times: nearest-neighbour upsampling by two.

    By expansion, not by F.interpolate, whose bf16 gradient torch's compiler makes zero on a CPU (seen with 2.13).
    """
    batch, channels, height, width = x_BCHW.shape
    rows = x_BCHW.permute(0, 2, 3, 1)[:, :, None, :, None, :]
    doubled = rows.expand(batch, height, 2, width, 2, channels).reshape(batch, 2 * height, 2 * width, channels)
    return doubled.permute(0, 3, 1, 2)


def _downsample(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)


def channels_last(network: MedSegDiff) -> MedSegDiff:
    """The network with its kernels stored channels-last, in place: 10-20 % faster convolutions on a CPU."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def parameter_count(network: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
