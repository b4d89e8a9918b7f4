"""From label indices to what the network diffuses, and back to masks.

A dataset has labels (disjoint, one a voxel) and targets (what is segmented: each a union of labels). One target is
diffused as one channel; disjoint targets as one-hot channels with the background first; overlapping targets (a tumour
and its core) as one channel each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from medsegdiff.strict import Strict

if TYPE_CHECKING:
    from medsegdiff.data.cases import DatasetConfig

Kind = Literal["binary", "multiclass", "regions"]


@dataclass(frozen=True)
class LabelScheme(Strict):
    """Which labels make up which target."""

    labels: tuple[str, ...]  # by label index; 0 is the background
    targets: tuple[str, ...]  # T names
    members: tuple[tuple[int, ...], ...]  # label indices joined in each target

    def __post_init__(self) -> None:
        if not self.targets or len(self.targets) != len(self.members):
            raise ValueError(f"{len(self.targets)} targets need as many members, found {len(self.members)}")
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets {list(self.targets)} repeat a name")
        for target, indices in zip(self.targets, self.members, strict=True):
            if not indices or not all(1 <= index < len(self.labels) for index in indices):
                raise ValueError(f"target {target} joins {list(indices)}; indices run from 1 to {len(self.labels) - 1}")

    @classmethod
    def of(cls, config: DatasetConfig) -> LabelScheme:
        """The scheme of a dataset: its targets, by default each label but the background."""
        names = config.label_names
        targets = config.targets or {name: (name,) for name in names[1:]}
        members = tuple(tuple(names.index(label) for label in joined) for joined in targets.values())
        return cls(names, tuple(targets), members)

    @property
    def kind(self) -> Kind:
        """ "binary": one target; "multiclass": disjoint targets; "regions": targets that overlap."""
        if len(self.targets) == 1:
            return "binary"
        indices = [index for joined in self.members for index in set(joined)]
        return "multiclass" if len(indices) == len(set(indices)) else "regions"

    @property
    def channels(self) -> int:
        """K, the channels of the diffused mask: 1, T + 1 (background first) or T."""
        return len(self.targets) + (self.kind == "multiclass")

    def truth(self, labels: Tensor) -> Tensor:
        """Masks of the targets. Label indices (N, ...) of any integer type -> (N, T, ...) bool."""
        return _look_up(self._table(), labels)

    def encode(self, labels: Tensor) -> Tensor:
        """What is diffused. Label indices (N, H, W) -> (N, K, H, W) float32, -1 outside and +1 inside."""
        table = self._table()
        if self.kind == "multiclass":
            table = torch.cat([~table.any(dim=1, keepdim=True), table], dim=1)
        return _look_up(table.float() * 2 - 1, labels)

    def decode(self, mean: Tensor) -> Tensor:
        """Masks from a (mean of) sampled channels. (N, K, ...) in about [-1, 1] -> (N, T, ...) bool.

        Disjoint targets stay disjoint: the largest channel wins, the background among them; a tie goes to the earlier.
        Otherwise a voxel belongs to a target where its channel is positive.
        """
        if self.kind != "multiclass":
            return mean > 0
        winner = mean.argmax(dim=1, keepdim=True)
        channel = torch.arange(1, self.channels, device=mean.device)
        return winner == channel.view(1, -1, *[1] * (mean.ndim - 2))

    def _table(self) -> Tensor:
        """(labels, T) bool: whether label l is part of target t."""
        table = torch.zeros(len(self.labels), len(self.targets), dtype=torch.bool)
        for target, indices in enumerate(self.members):
            table[list(indices), target] = True
        return table


def _look_up(table: Tensor, labels: Tensor) -> Tensor:
    """Rows of (L, F) `table` by (N, ...) `labels`, features moved behind the batch: (N, F, ...)."""
    # .long(): torch takes a uint8 index for a mask.
    return table.to(labels.device)[labels.long()].movedim(-1, 1).contiguous()
