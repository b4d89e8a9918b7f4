"""Poisson sampling of patients: what the accountant assumes, to the letter.

Each step takes each patient with probability q, independent of all others and of all other steps. A shuffled epoch,
batches of a fixed size or a step left out because nobody was drawn would each have another, larger epsilon.
"""

from __future__ import annotations

from collections.abc import Iterator

from client.privacy.entropy import Entropy, SeededEntropy, SystemEntropy, below, chosen


class PoissonSampler:
    """Draws the patients of each step. In production it has no seed: `for_testing` alone takes a source.

    Args:
        patients: how many the site trains on.
        q: probability with which a step takes each, in (0, 1].

    Raises:
        ValueError: there is no patient, or q is no such probability.
    """

    def __init__(self, patients: int, q: float) -> None:
        if patients < 1:
            raise ValueError(f"there must be a patient to draw, found {patients}")
        if not 0 < q <= 1:
            raise ValueError(f"q must lie in (0, 1], found {q}")
        self.patients = patients
        self.q = q
        self._entropy: Entropy = SystemEntropy()

    @classmethod
    def for_testing(cls, patients: int, q: float, entropy: SeededEntropy) -> PoissonSampler:
        """A sampler that repeats itself; a private step of production refuses to work with it."""
        sampler = cls(patients, q)
        sampler._entropy = entropy
        return sampler

    @property
    def testing(self) -> bool:
        """Whether its draws can be foretold."""
        return type(self._entropy) is not SystemEntropy

    def draw(self) -> list[int]:
        """The patients of one step, by number, rising; often none where q times the patients is small."""
        return chosen(self.patients, self.q, self._entropy)

    def steps(self, count: int) -> Iterator[list[int]]:
        """Exactly `count` draws. An empty one is given like any other: it is noised and accounted."""
        for _ in range(count):
            yield self.draw()


def draw_slices(slices: int, m: int, entropy: Entropy) -> list[int]:
    """m of a patient's slices, with replacement: a patient with a thousand slices weighs no more than one with ten.

    Raises:
        ValueError: the patient has no slice.
    """
    if slices < 1:
        raise ValueError("a patient without slices cannot be drawn from")
    return [below(slices, entropy) for _ in range(m)]
