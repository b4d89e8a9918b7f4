"""Intensities of one image made comparable with those of another scanner."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

AIR_FRACTION = 0.05  # of the voxels holding exactly the minimum: then that value is padding or air, not tissue
PERCENTILES = (0.5, 99.5)  # beyond them intensities are clipped: a few hot voxels must not set the scale
LIMIT = 5.0  # standard deviations


def normalise(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Robust zero mean and unit variance per image and channel.

    Each channel is clipped to its 0.5 and 99.5 percentiles, shifted and scaled by the mean and standard deviation of
    what remains, and clipped to +-5. The statistics are those of tissue: where at least 5 % of the voxels hold exactly
    the channel's minimum (zero in a skull-stripped or masked scan, -1024 around a CT, some constant where a background
    was standardised along with the rest) they are left out. A constant channel becomes zero.

    Args:
        array: (C, X, Y, Z), finite.

    Returns:
        The same shape, float32, in [-5, 5].
    """
    out = np.zeros_like(array)
    for number, channel in enumerate(array):
        for voxels in (_tissue(channel), channel):  # all voxels where tissue is constant, as in a two-valued image
            low, high = np.percentile(voxels, PERCENTILES)
            clipped = np.clip(voxels, low, high)
            mean, deviation = np.float32(clipped.mean(dtype=np.float64)), np.float32(clipped.std(dtype=np.float64))
            if deviation > 0:
                out[number] = np.clip((np.clip(channel, low, high) - mean) / deviation, -LIMIT, LIMIT)
                break
    return out


def _tissue(channel: NDArray[np.float32]) -> NDArray[np.float32]:
    """The voxels above the minimum; all of them where the minimum is too rare to be air."""
    tissue = channel[channel > channel.min()]
    return tissue if 0 < tissue.size <= (1 - AIR_FRACTION) * channel.size else channel.reshape(-1)
