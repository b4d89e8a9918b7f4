"""Weighted averaging whose result does not depend on the order of arrival.

Floating-point addition is not associative: the same updates summed in another order give another model. Here n x delta
is rounded once to a 64-bit integer in units of 2**-SCALE_BITS; integer addition is associative, so the sum - and the
model - is the same bit for bit in any order, and no update has to be kept until its turn comes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE_BITS = 36  # resolution 1.5e-11 of a weight; room for a sum of n * |delta| up to 2**26 per weight
_LIMIT = 2.0**62  # half the range of int64: a sum of two values below it cannot wrap


class AggregationOverflow(ValueError):
    """An update too large for the fixed-point sum; it was not added."""


class FixedPointSum:
    """Running sum of n x delta over sites, in int64 fixed point.

    Guarantees:
        The result is the same for any order of `add`.
        |result - exact| <= sites * 2**-(SCALE_BITS + 1) / total n, plus one float32 rounding.
        `add` either takes the whole update or raises and leaves the sum as it was.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._sums = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
        self.total = 0

    def add(self, delta: Mapping[str, Tensor], n: int) -> None:
        """Fold one update, weight n >= 1.

        Raises:
            AggregationOverflow: n x delta, or the sum with it, leaves the representable range.
        """
        if n < 1:
            raise AggregationOverflow(f"weight {n} is below 1")
        fixed = {}
        for name, total in self._sums.items():
            scaled = delta[name].to(torch.float64) * (n * 2.0**SCALE_BITS)
            # Checked in float64, whose error at 2**62 (2**10) the margin to 2**63 covers.
            if not bool(((scaled.abs() + total.to(torch.float64).abs()) < _LIMIT).all()):
                raise AggregationOverflow(f"weight {n} times the change of '{name}' exceeds the fixed-point range")
            fixed[name] = scaled.round().to(torch.int64)
        for name, value in fixed.items():
            self._sums[name] += value
        self.total += n

    def mean(self) -> dict[str, Tensor]:
        """The weighted mean update, float32. Raises ValueError when nothing was added."""
        if self.total == 0:
            raise ValueError("no update was added, so there is no mean")
        return {
            name: (total.to(torch.float64) / (self.total * 2.0**SCALE_BITS)).to(torch.float32)
            for name, total in self._sums.items()
        }


def apply_update(weights: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The next model: weights plus the mean update, float32."""
    return {name: value + mean[name] for name, value in weights.items()}
