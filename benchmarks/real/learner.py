"""What training in pieces asks of a model, ours or the peer, and the count of its arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

# Slices (N, C, S, S) on the device and a seed each -> mean (N, K, S, S) in [-1, 1] and entropy (N, K, S, S) in bits.
Predict = Callable[[Tensor, Sequence[int]], tuple[Tensor, Tensor]]


class Learner(Protocol):
    """A model in training whose steps are pure functions of (seed, step)."""

    @property
    def parameters(self) -> int:
        """Trainable scalars."""
        ...

    def run(self, first: int, last: int) -> float:
        """Take steps first .. last - 1; returns their mean loss. Raises UserError when the loss is not finite."""
        ...

    def save(self, path: Path, done: int, **notes: str) -> None:
        """Write all that the next step needs, atomically."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
        """Go on from what `save` wrote; returns the steps done."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """The weights that are scored."""
        ...

    def rows(self) -> dict[str, Predict]:
        """The ways the trained model segments, by row name."""
        ...


def count_flop(step: Callable[[], object]) -> float:
    """FLOP of convolutions and matrix products in one call (a multiplication and an addition are two).

    FFTs, norms, activations and the optimizer are not in it.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())
