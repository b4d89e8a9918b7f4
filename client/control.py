"""SCAFFOLD at a site: gradients corrected for its drift (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1).

With c the control variate of all sites (it comes with the question) and c_i the site's own, of every local step k:

    g_k             the batch's gradient
    step along      g_k - c_i + c

    c_i <- mean over k of min(1, clip / ||g_k||) g_k;   c_i's change leaves with the change of the weights

For plain gradient steps of one rate this is option II of the algorithm, c_i - c + (x - y_i) / (K eta): there the last
term is the mean of the corrected gradients. Here AdamW takes the steps, from which no gradient can be read back, so the
gradients are averaged themselves. The clip is the training's own (`gradient_clip`): no honest c_i is longer, nor is c,
their mean. The server sees changes of c_i alone, so it holds c to that length, whatever the sites send; a site shortens
a longer one once more and trains, since to refuse it would hold every round up.

c_i advances with the updates that the server has counted (client/state.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from flwr.app import Message
from torch import Tensor, nn

from client.contract import Assignment, TrainTask, arrays_from_wire
from client.personalisation import CONTROL, common_shapes
from client.site import Site
from client.state import SiteState
from medsegdiff.errors import UserError
from medsegdiff.weights import hash_weights, held_to

log = logging.getLogger("medsegfed.site")

Weights = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


class DriftCorrection:
    """Corrects the gradients of a round's steps, and averages them as they were.

    Args:
        common: c, float32, by weight; empty before the first round: zero.
        own: c_i, likewise.
        shapes: the weights that are common to all sites; others are left alone.
        clip: longest gradient that is averaged, 2-norm over all trained weights.
    """

    def __init__(
        self,
        common: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        clip: float,
    ) -> None:
        self.own = {name: own.get(name, torch.zeros(shape)) for name, shape in shapes.items()}
        self.shift = {name: common.get(name, torch.zeros(())) - value for name, value in self.own.items()}
        self.clip = clip
        self._sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        self._steps = 0

    def __call__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take in a step's gradients and correct them, where they lie (`Trainer.on_gradient`)."""
        gradients = [value.grad for value in parameters.values() if value.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(value) for value in gradients])))
        scale = min(1.0, self.clip / norm) if norm > 0 else 1.0
        self._steps += 1
        for name in self.shift:
            gradient = parameters[name].grad
            if gradient is None:
                continue  # a weight that the loss does not reach has no drift either
            if self.shift[name].device != gradient.device:
                self.shift[name] = self.shift[name].to(gradient.device)
                self._sums[name] = self._sums[name].to(gradient.device)
            self._sums[name].add_(gradient, alpha=scale)
            gradient.add_(self.shift[name])

    def control(self) -> Weights:
        """c_i after the round, float32 on the CPU. Raises ValueError before the first step."""
        if self._steps == 0:
            raise ValueError("no step was taken, so there is no mean gradient")
        return {name: (total / self._steps).float().cpu() for name, total in self._sums.items()}


def begin(site: Site, task: TrainTask, message: Message, assignment: Assignment) -> DriftCorrection | None:
    """The correction of a round; None where the run has none.

    Raises:
        UserError: the control variate that was named did not come, or is another one; nothing was trained.
    """
    if not task.control_variates:
        return None
    shapes, common = common_shapes(task), Weights()
    if assignment.control_hash:
        record = message.content.array_records.get("control")
        common = arrays_from_wire(record, shapes) if record is not None else {}
        if hash_weights(common) != assignment.control_hash:
            raise UserError(
                "the control variate is not the one the server named (its hash differs); nothing was trained."
            )
        held = held_to(common, task.training.gradient_clip)
        if any(held[name] is not value for name, value in common.items()):
            log.warning(
                "round %d: the control variate is longer than any honest one; it is shortened", assignment.round
            )
        common = held
    return DriftCorrection(common, _state(site).find(assignment), shapes, task.training.gradient_clip)


def join(delta: Mapping[str, Tensor], correction: DriftCorrection) -> Weights:
    """What leaves: c_i's change beside that of the weights."""
    control = correction.control()
    return dict(delta) | {f"{CONTROL}{name}": value - correction.own[name] for name, value in control.items()}


def keep(
    site: Site, assignment: Assignment, delta_hash: str, correction: DriftCorrection, sent: Mapping[str, Tensor]
) -> None:
    """Write c_i down before its change leaves. Raises UserError where the disk refuses.

    Args:
        sent: the change as the server reads it: what compression rounds off is no part of c, and none of c_i either.
    """
    control = {name: value + sent[f"{CONTROL}{name}"] for name, value in correction.own.items()}
    SiteState.of(site, "controls").keep(assignment, delta_hash, control)


def _state(site: Site) -> SiteState:
    return SiteState.of(site, "controls")
