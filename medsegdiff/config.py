"""What defines a MedSegDiff and its training: frozen, documented per field, checked on construction.

Stdlib only, so that the training path imports nothing beyond torch, numpy and safetensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from medsegdiff.errors import UserError
from medsegdiff.strict import Strict

Prediction = Literal["eps", "x0", "v"]
Schedule = Literal["linear", "cosine"]
Weighting = Literal["uniform", "min_snr"]
Sampler = Literal["ddpm", "ddim", "dpmpp_2m"]
Fuse = Literal["mean", "majority", "staple"]
Precision = Literal["auto", "fp32", "bf16"]

# Far above every network that anybody trains: a task from elsewhere must not have one built that fills the memory.
LARGEST = {
    "image_size": 4096, "image_channels": 1024, "mask_channels": 1024, "base_channels": 2048, "blocks_per_level": 64,
}  # fmt: skip
MOST_LEVELS = 10


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class ModelConfig(Strict):
    """The network. Level l works at image_size / 2**l pixels with base_channels * channel_multipliers[l] channels."""

    image_size: int = 64  # pixels a side of the square the network sees; divisible by `downsampling`
    image_channels: int = 1  # channels of the image I
    mask_channels: int = 1  # K: channels of the diffused mask
    base_channels: int = 16
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    blocks_per_level: int = 1
    fusion_levels: tuple[int, ...] = (1,)  # where dynamic conditional encoding joins x_t to the image
    attention_levels: tuple[int, ...] = (2,)  # where self-attention follows the blocks
    dropout: float = 0.0  # probability, inside residual blocks
    ff_parser: bool = True  # false: the fusions see m_x unfiltered (ablation); no fusion at all: fusion_levels []
    auxiliary_head: bool = False  # a second segmentation read off the image encoder alone, trained beside the first
    self_conditioning: bool = False  # the network also sees its last estimate of x_0 (arXiv 2208.04202)

    def __post_init__(self) -> None:
        levels = len(self.channel_multipliers)
        _require(levels >= 1 and min(self.channel_multipliers) >= 1, "channel_multipliers must hold numbers >= 1")
        for name in ("image_size", "image_channels", "mask_channels", "base_channels", "blocks_per_level"):
            value, most = getattr(self, name), LARGEST[name]
            _require(1 <= value <= most, f"{name} must lie between 1 and {most}, found {value}")
        _require(levels <= MOST_LEVELS, f"channel_multipliers holds {levels} levels, {MOST_LEVELS} are the most")
        _require(max(self.channel_multipliers) <= 64, "channel_multipliers must hold numbers up to 64")
        _require(self.base_channels % 8 == 0, f"base_channels must be a multiple of 8, found {self.base_channels}")
        for name in ("fusion_levels", "attention_levels"):
            outside = [level for level in getattr(self, name) if not 0 <= level < levels]
            _require(not outside, f"{name} holds {outside}, but levels run from 0 to {levels - 1}")
        _require(
            self.image_size % self.downsampling == 0,
            f"image_size {self.image_size} is not divisible by {self.downsampling}, the scale of {levels} levels",
        )
        _require(0.0 <= self.dropout < 1.0, f"dropout must lie in [0, 1), found {self.dropout}")

    @property
    def downsampling(self) -> int:
        """Factor between the first and the last level."""
        return int(2 ** (len(self.channel_multipliers) - 1))


@dataclass(frozen=True)
class DiffusionConfig(Strict):
    """The forward process and what the network is asked to predict."""

    timesteps: int = 1000  # T
    schedule: Schedule = "linear"  # the paper's; more steps at high noise, where the image decides, than cosine
    prediction: Prediction = "x0"
    mask_scale: float = 1.0  # b: masks are diffused as -b / +b (the input scale of arXiv 2301.10972)
    zero_terminal_snr: bool = False  # abar_{T-1} = 0: the walk starts from pure noise indeed (arXiv 2305.08891)
    # Of timesteps in the loss. min_snr (arXiv 2303.09556) spends little on high noise, where the image alone decides.
    weighting: Weighting = "uniform"
    min_snr_gamma: float = 5.0  # where min_snr cuts the signal-to-noise ratio

    def __post_init__(self) -> None:
        _require(self.timesteps >= 2, f"timesteps must be at least 2, found {self.timesteps}")
        _require(0 < self.min_snr_gamma < math.inf, f"min_snr_gamma must be positive, found {self.min_snr_gamma}")
        _require(
            not (self.zero_terminal_snr and self.prediction == "eps"),
            "zero_terminal_snr needs prediction x0 or v: pure noise holds no x_0 that eps could give back",
        )
        _require(0 < self.mask_scale < math.inf, f"mask_scale must be positive and finite, found {self.mask_scale}")


@dataclass(frozen=True)
class SamplingConfig(Strict):
    """How a mask is drawn from the model."""

    sampler: Sampler = "dpmpp_2m"
    steps: int = 20  # network evaluations a sample
    members: int = 1  # samples an image; fused into the mask, their spread is the uncertainty
    fuse: Fuse = "mean"  # how members make one mask: of their values, their votes, or STAPLE (Warfield et al. 2004)
    eta: float = 0.0  # DDIM only: 0 deterministic, 1 as noisy as DDPM

    def __post_init__(self) -> None:
        _require(1 <= self.steps <= 10_000, f"steps must lie in 1..10000, found {self.steps}")
        _require(1 <= self.members <= 1000, f"members must lie in 1..1000, found {self.members}")
        _require(0.0 <= self.eta <= 1.0, f"eta must lie in [0, 1], found {self.eta}")


@dataclass(frozen=True)
class AugmentConfig(Strict):
    """Random changes to a training slice; each is drawn anew per slice. Zero or false switches one off."""

    flip: bool = False  # mirror along either in-plane axis, each with probability 1/2; off: anatomy has sides
    rotate_degrees: float = 10.0  # uniform in +- this
    scale: float = 0.1  # zoom uniform in 1 +- this
    shift: float = 0.0  # translation uniform in +- this fraction of the side
    intensity: float = 0.1  # gain in 1 +- this, offset in +- this (in standard deviations), per channel
    gamma: float = 0.1  # exponent exp(uniform +- this) on intensities rescaled to [0, 1]
    noise: float = 0.02  # standard deviation of added Gaussian noise, at most

    def __post_init__(self) -> None:
        _require(0 <= self.rotate_degrees <= 180, f"rotate_degrees must lie in [0, 180], found {self.rotate_degrees}")
        for name in ("scale", "shift", "intensity", "gamma", "noise"):
            _require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), found {getattr(self, name)}")


@dataclass(frozen=True)
class TrainingConfig(Strict):
    """One optimizer's settings; the number of steps belongs to whoever trains."""

    batch_size: int = 16  # slices a step
    learning_rate: float = 1e-3  # AdamW, peak
    weight_decay: float = 1e-4
    warmup_fraction: float = 0.05  # of all steps: the rate rises linearly, then falls as a cosine
    final_rate: float = 0.05  # the rate at the last step as a fraction of the peak
    gradient_clip: float = 1.0  # largest 2-norm of a step's gradient
    foreground_fraction: float = 0.0  # of a batch's slices, drawn among those that hold foreground
    auxiliary_weight: float = 0.5  # of the auxiliary head's loss, where the network has one
    precision: Precision = "auto"  # of matrix work; auto: bf16 (autocast) on a GPU that has it, fp32 on a CPU
    augment: AugmentConfig = AugmentConfig()

    def __post_init__(self) -> None:
        _require(1 <= self.batch_size <= 4096, f"batch_size must lie in 1..4096, found {self.batch_size}")
        _require(0 < self.learning_rate < 1, f"learning_rate must lie in (0, 1), found {self.learning_rate}")
        _require(0 <= self.weight_decay < 1, f"weight_decay must lie in [0, 1), found {self.weight_decay}")
        _require(self.gradient_clip > 0, f"gradient_clip must be positive, found {self.gradient_clip}")
        _require(
            0 < self.auxiliary_weight < math.inf, f"auxiliary_weight must be positive, found {self.auxiliary_weight}"
        )
        for name in ("warmup_fraction", "final_rate", "foreground_fraction"):
            _require(0 <= getattr(self, name) <= 1, f"{name} must lie in [0, 1], found {getattr(self, name)}")


# Name -> network settings. Sizes and depths follow the scales S / B / L of the paper's table (4 / 5 / 6 downsamplings).
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": 64, "base_channels": 16, "channel_multipliers": [1, 2, 4], "blocks_per_level": 1,
        "fusion_levels": [1], "attention_levels": [2],
    },
    "S": {
        "image_size": 256, "base_channels": 64, "channel_multipliers": [1, 2, 3, 4, 4], "blocks_per_level": 1,
        "fusion_levels": [1, 2], "attention_levels": [3, 4],
    },
    "B": {
        "image_size": 256, "base_channels": 128, "channel_multipliers": [1, 1, 2, 2, 4, 4], "blocks_per_level": 2,
        "fusion_levels": [2, 3], "attention_levels": [4, 5],
    },
    "L": {
        "image_size": 256, "base_channels": 128, "channel_multipliers": [1, 1, 2, 2, 4, 4, 4], "blocks_per_level": 2,
        "fusion_levels": [2, 3, 4], "attention_levels": [4, 5, 6],
    },
}  # fmt: skip


def preset(name: str, **changes: Any) -> ModelConfig:
    """A preset's network with `changes` applied. Raises UserError for a name that is none."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}.")
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in PRESETS[name].items()
    }
    try:
        return replace(ModelConfig(**settings), **changes)
    except ValueError as error:
        raise UserError(f"preset {name}: {error}.") from error
