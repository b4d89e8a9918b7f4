"""Training batches as a pure function of seed and step: training resumes anywhere and needs no sampler's state."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from medsegdiff.config import TrainingConfig
from medsegdiff.data.augment import augment
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.errors import UserError
from medsegdiff.labels import LabelScheme

RAM_BYTES = 256_000_000  # datasets up to this size are held in memory; larger ones are mapped from disk


class SliceTable:
    """Every slice of some cases, read by its number."""

    def __init__(self, cases: Sequence[PreparedCase], ram_bytes: int = RAM_BYTES) -> None:
        if not cases:
            raise UserError("there is no case to train on: every patient is held out or faulty. Add training patients.")
        if len({(case.channels, case.image_size) for case in cases}) > 1:
            raise ValueError("cases were prepared for different networks")
        self.cases = tuple(cases)
        self.where = [(number, index) for number, case in enumerate(cases) for index in range(case.slices)]
        bytes_each = cases[0].image_size ** 2
        size = sum(case.slices * bytes_each * (2 * case.channels + case.raters) for case in cases)
        self._in_ram = size <= ram_bytes
        if self._in_ram:
            self._images = torch.cat([case.tensor("image") for case in cases])
            stored = [case.tensor("labels").flatten(0, 1) for case in cases]
            self._labels = torch.cat(stored)
            self._starts = [0]
            for part in stored:
                self._starts.append(self._starts[-1] + len(part))

    def __len__(self) -> int:
        return len(self.where)

    def foreground(self, scheme: LabelScheme) -> list[int]:
        """Numbers of the slices that hold any of the scheme's targets."""
        marked = [set(case.foreground(scheme)) for case in self.cases]
        return [number for number, (case, index) in enumerate(self.where) if index in marked[case]]

    def read(self, numbers: Sequence[int], raters: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Slices by number, each with the labels of one rater.

        Args:
            raters: in [0, 1) a slice: which of its raters.

        Returns:
            (B, C, S, S) float32 and (B, S, S) uint8.
        """
        chosen = [int(part * self.cases[self.where[n][0]].raters) for n, part in zip(numbers, raters, strict=True)]
        if self._in_ram:
            rows = [self._row(number, rater) for number, rater in zip(numbers, chosen, strict=True)]
            return self._images[torch.tensor(numbers)].float(), self._labels[torch.tensor(rows)]
        pairs = [self.cases[self.where[n][0]].pair(self.where[n][1], r) for n, r in zip(numbers, chosen, strict=True)]
        return torch.stack([image for image, _ in pairs]).float(), torch.stack([labels for _, labels in pairs])

    def _row(self, number: int, rater: int) -> int:
        case, index = self.where[number]
        return self._starts[case] + rater * self.cases[case].slices + index


class SliceBatches:
    """Batches of slices, uniform over all slices of all cases: each epoch is a new permutation of them.

    `training.foreground_fraction` of every batch is drawn likewise from permutations of the slices that hold any
    target; where no slice does, the whole batch is drawn from all.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        scheme: LabelScheme,
        training: TrainingConfig,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.table = SliceTable(cases)
        self.scheme = scheme
        self.training = training
        self.seed = seed
        self.device = torch.device(device)  # where batches are augmented and handed over
        everything = list(range(len(self.table)))
        marked = self.table.foreground(scheme)
        from_marked = round(training.batch_size * training.foreground_fraction) if marked else 0
        self._streams = (
            _Stream("all", everything, training.batch_size - from_marked, seed),
            _Stream("foreground", marked, from_marked, seed),
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Step `step`'s batch (from 0): images (B, C, S, S) float32, masks (B, K, S, S) float32 in {-1, +1}.

        Guarantees:
            The same cases, seed, step and kind of device give the same tensors, whatever was drawn before.
        """
        numbers = [number for stream in self._streams for number in stream.take(step)]
        generator = _generator(self.seed, "step", step)
        raters = torch.rand(len(numbers), generator=generator).tolist()
        images, labels = self.table.read(numbers, raters)
        images, labels = images.to(self.device), labels.to(self.device)
        images, labels = augment(images, labels, self.training.augment, generator)
        return images, self.scheme.encode(labels)


class _Stream:
    """An endless row of permutations of `numbers`, cut into `each` a step."""

    def __init__(self, name: str, numbers: list[int], each: int, seed: int) -> None:
        self._name, self._numbers, self._each, self._seed = name, numbers, each, seed
        self._epoch, self._order = -1, numbers  # the last permutation made: most steps stay inside one epoch

    def take(self, step: int) -> list[int]:
        start = step * self._each
        return [self._at(position) for position in range(start, start + self._each)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, len(self._numbers))
        if epoch != self._epoch:
            generator = _generator(self._seed, self._name, epoch)
            order = torch.randperm(len(self._numbers), generator=generator).tolist()
            self._epoch, self._order = epoch, [self._numbers[i] for i in order]
        return self._order[place]


def _generator(seed: int, name: str, number: int) -> Generator:
    """An independent stream of random numbers for each (seed, name, number)."""
    digest = hashlib.sha256(f"{seed}\0{name}\0{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
