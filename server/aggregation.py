"""Weighted averaging whose result does not depend on the order of arrival.

Floating-point addition is not associative: the same updates summed in another order give another model. Here n x delta
is rounded once to an integer in units of 2**-SCALE_BITS; integer addition is associative, so the sum - and the model -
is the same bit for bit in any order, and no update has to be kept until its turn comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SHARE_BITS = 20  # resolution of a weight that is a part of n
SCALE_BITS = 36  # resolution 1.5e-11 of a weight; room for a sum of n * |delta| up to 2**26 per weight
BLOCK = 2**18  # values folded at once: 2 MiB of float64, a core's cache; smaller ones lose more to calls of numpy
_LIMIT = 2.0**62  # half the range of int64: a sum of two values below it cannot wrap
_EXACT = 2.0**52  # float64 holds every integer below it, and its sums of two, exactly


class AggregationOverflow(ValueError):
    """An update too large for the fixed-point sum; it was not added."""


class FixedPointSum:
    """Running sum of n x delta over sites, in fixed point.

    The integers are kept in float64 as long as all of them are below 2**52, where its additions are exact and need no
    conversion, and in the same memory as int64 from then on. 8 bytes a weight, and one block.

    Guarantees:
        The result is the same for any order of `add`.
        |result - exact| <= sites * 2**-(SCALE_BITS + 1) / total n, plus one float32 rounding.
        `add` either takes the whole update or raises and leaves the sum as it was.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        self._sums = {name: np.zeros(math.prod(shape), np.float64) for name, shape in shapes.items()}
        self._integers: dict[str, NDArray[np.int64]] | None = None  # the same memory, once it holds int64
        self._bound = 0.0  # no sum is larger than it, in units of 2**-SCALE_BITS
        self._scaled = np.empty(BLOCK, np.float64)
        self._parts = 0  # sum of the weights, in units of 2**-SHARE_BITS: exact in any order

    @property
    def total(self) -> float:
        """Sum of the weights."""
        return self._parts / (1 << SHARE_BITS)

    def add(self, delta: Mapping[str, Tensor], n: int, share: float = 1.0) -> None:
        """Fold one update, weight n >= 1, or a part of it, rounded to a multiple of 2**-SHARE_BITS.

        Args:
            share: in (0, 1]: how much of n counts.

        Raises:
            AggregationOverflow: n x delta, or the sum with it, leaves the representable range.
        """
        if n < 1:
            raise AggregationOverflow(f"weight {n} is below 1")
        parts = n * (1 << SHARE_BITS) if share == 1 else max(1, round(n * share * (1 << SHARE_BITS)))
        weight = parts / (1 << SHARE_BITS)
        added: list[tuple[str, int, NDArray[np.float32]]] = []
        peak = 0.0
        for name, begin, values in self._blocks(delta):
            largest = max(float(values.max()), -float(values.min())) * (weight * 2.0**SCALE_BITS)
            scaled = self._scaled[: len(values)]
            np.copyto(scaled, values)  # a multiplication that converts on the way is slower
            np.multiply(scaled, weight * 2.0**SCALE_BITS, out=scaled)
            if not self._fits(name, begin, scaled, largest):
                for other, start, taken in added:  # integers: what was added is taken away without a trace
                    self._fold(other, start, -np.multiply(taken, weight * 2.0**SCALE_BITS, dtype=np.float64))
                raise AggregationOverflow(f"weight {n} times the change of '{name}' exceeds the fixed-point range")
            self._fold(name, begin, scaled)
            added.append((name, begin, values))
            peak = max(peak, largest)
        self._bound += peak
        self._parts += parts

    def mean(self) -> dict[str, Tensor]:
        """The weighted mean update, float32. Raises ValueError when nothing was added."""
        return {name: self._mean(name, values) for name, values in self._values().items()}

    def take_mean(self) -> dict[str, Tensor]:
        """As `mean`; the sum gives its memory back weight by weight, and is nothing afterwards."""
        values = dict(self._values())
        self._sums, self._integers = {}, None
        return {name: self._mean(name, values.pop(name)) for name in list(values)}

    def _values(self) -> Mapping[str, NDArray[Any]]:
        if self._parts == 0:
            raise ValueError("no update was added, so there is no mean")
        return self._sums if self._integers is None else self._integers

    def _mean(self, name: str, total: NDArray[Any]) -> Tensor:
        unit, mean = self.total * 2.0**SCALE_BITS, np.empty(len(total), np.float32)
        for begin in range(0, len(total), BLOCK):
            part = total[begin : begin + BLOCK]
            np.divide(part, unit, out=self._scaled[: len(part)], dtype=np.float64)
            mean[begin : begin + BLOCK] = self._scaled[: len(part)]
        return torch.from_numpy(mean).reshape(self.shapes[name])

    def _blocks(self, delta: Mapping[str, Tensor]) -> Iterator[tuple[str, int, NDArray[np.float32]]]:
        for name in self._sums:
            flat = delta[name].contiguous().reshape(-1).numpy()
            for begin in range(0, len(flat), BLOCK):
                yield name, begin, flat[begin : begin + BLOCK]

    def _fits(self, name: str, begin: int, scaled: NDArray[np.float64], largest: float) -> bool:
        """Whether a block may be added; turns the sums into int64 when float64 could no longer hold them."""
        if self._integers is None and self._bound + largest < _EXACT:
            return True
        if self._integers is None:
            self._integers = {key: value.view(np.int64) for key, value in self._sums.items()}
            for key, value in self._sums.items():
                for at in range(0, len(value), BLOCK):
                    self._integers[key][at : at + BLOCK] = value[at : at + BLOCK].astype(np.int64)
        if self._bound + largest < _LIMIT / 2:
            return True
        # Checked in float64, whose error at 2**62 (2**10) the margin to 2**63 covers. NaN is below nothing.
        before = np.abs(self._integers[name][begin : begin + len(scaled)].astype(np.float64))
        return bool(((np.abs(scaled) + before) < _LIMIT).all())

    def _fold(self, name: str, begin: int, scaled: NDArray[np.float64]) -> None:
        np.rint(scaled, out=scaled)
        part = slice(begin, begin + len(scaled))
        if self._integers is None:
            self._sums[name][part] += scaled
        else:
            self._integers[name][part] += scaled.astype(np.int64)


def apply_update(weights: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The next model: weights plus the mean update, float32."""
    return {name: value + mean[name] for name, value in weights.items()}
