"""Where the randomness that privacy rests on comes from: the operating system, and nothing else.

Whoever knows the seed of the noise subtracts it and holds the clipped sum. So production draws from `SystemEntropy`,
which has nothing to set, and never from torch's, numpy's or Python's generators, which a seed from outside may reach.
"""

from __future__ import annotations

import hashlib
import os
from fractions import Fraction
from typing import Protocol

import numpy as np


class Entropy(Protocol):
    """A source of random bytes."""

    @property
    def testing(self) -> bool:
        """Whether the bytes can be foretold: such a source never serves real patients."""
        ...

    def take(self, count: int) -> bytes:
        """`count` uniform, independent bytes, never given out before."""
        ...


class SystemEntropy:
    """The operating system's generator (getrandom on Linux). It has no seed and no state of ours."""

    __slots__ = ()

    @property
    def testing(self) -> bool:
        """False."""
        return False

    def take(self, count: int) -> bytes:
        """`count` bytes from `os.urandom`."""
        return os.urandom(count)


class SeededEntropy:
    """Repeatable bytes for tests: SHAKE-256 of the seed and a counter. Production refuses it by its type."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._calls = 0

    @property
    def testing(self) -> bool:
        """True."""
        return True

    def take(self, count: int) -> bytes:
        """The next `count` bytes of the seed's stream."""
        self._calls += 1
        return hashlib.shake_256(f"{self._seed}/{self._calls}".encode()).digest(count)


def chosen(count: int, probability: float, entropy: Entropy) -> list[int]:
    """Which of 0 .. count - 1 were drawn, each on its own with the probability, rising.

    The probability is rounded down by less than 2**-64: nobody is drawn more often than accounted.
    """
    exact = Fraction(probability)
    threshold = exact.numerator * 2**64 // exact.denominator
    values = np.frombuffer(entropy.take(8 * count), dtype="<u8")
    if threshold == 0:
        return []
    drawn: list[int] = np.flatnonzero(values <= np.uint64(threshold - 1)).tolist()
    return drawn


def below(count: int, entropy: Entropy) -> int:
    """A whole number in 0 .. count - 1, uniform but for less than count / 2**64."""
    return int.from_bytes(entropy.take(8), "little") * count >> 64
