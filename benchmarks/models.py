"""The three networks that are compared, at about equal parameters.

The same shape for all: four levels at 64, 32, 16 and 8 pixels, widths 24 times (1, 2, 4, 8), two residual blocks a
level (and encoder), attention at the last level in full. So no side buys parameters where they cost no time. What
differs is each package's own: med-seg-diff-pytorch puts linear attention at every level and a filter at every level,
ours one fusion; MONAI's DiffusionModelUNet has one encoder that sees image and mask as channels, and is a little
narrower at the last level to come to the same number of parameters.
"""

from __future__ import annotations

from typing import Any

OURS: dict[str, Any] = {
    "image_size": 64,
    "base_channels": 24,
    "channel_multipliers": [1, 2, 4, 8],
    "blocks_per_level": 2,
    "fusion_levels": [1],
    "attention_levels": [3],
}

PEER: dict[str, Any] = {"dim": 24, "dim_mults": [1, 2, 4, 8]}  # all else its defaults

MONAI: dict[str, Any] = {
    "channels": [24, 48, 96, 176],
    "attention_levels": [False, False, False, True],
    "num_res_blocks": 2,
    "num_head_channels": [24, 24, 24, 22],
    "norm_num_groups": 8,
}
