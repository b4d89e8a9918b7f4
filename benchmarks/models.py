"""The two networks that are compared, at about equal parameters.

The same shape on both sides: four levels at 64, 32, 16 and 8 pixels, width 24 times (1, 2, 4, 8), two residual blocks a
level and encoder, attention at the last level in full. So no side buys parameters where they cost no time. What differs
is each package's own: the peer puts linear attention at every level and a filter at every level, ours one fusion.
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
