"""One round of training at one site."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from client.contract import Assignment, TrainTask, Update
from client.privacy.trainable import attach, merge
from client.site import Site
from medsegdiff.data.batches import SliceBatches
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.devices import choose_device
from medsegdiff.ensemble import derive_seed
from medsegdiff.network import MedSegDiff
from medsegdiff.progress import Progress, report
from medsegdiff.training import OnGradient, Trainer
from medsegdiff.weights import Segmenter, build, hash_weights


def train_round(
    site: Site,
    task: TrainTask,
    assignment: Assignment,
    weights: Mapping[str, Tensor],
    on_gradient: OnGradient | None = None,
) -> tuple[Update, dict[str, Tensor]]:
    """Train the received weights for `task.local_steps` steps on the site's training patients.

    The optimizer starts afresh each round: its moments belong to weights that no longer exist once sites were averaged.

    Args:
        on_gradient: is shown every step's gradient, and may change it.

    Returns:
        What leaves the site: the update's fields and its delta (trained minus received weights, float32).
    """
    started = time.perf_counter()
    data = site.data(task)
    device = choose_device(site.config.device)
    segmenter = build_trained(task, weights)
    segmenter.network.to(device)
    first = (assignment.round - 1) * task.local_steps
    total = task.rounds * task.local_steps
    trainer = make_trainer(segmenter, task, data.train, site.name, total, task.proximal_mu, site.config.compile)

    trainer.on_gradient = on_gradient

    def tell(step: int, loss: float) -> None:
        report(Progress("train", step - first, task.local_steps, site.name, assignment.round, loss))

    loss = trainer.run(first, first + task.local_steps, tell)
    delta = change(segmenter.network, weights)
    update = Update(
        site=site.name,
        run=assignment.run,
        round=assignment.round,
        base_hash=assignment.model_hash,
        patients=data.train_patients,
        steps=task.local_steps,
        loss=loss,
        seconds=time.perf_counter() - started,
        delta_hash=hash_weights(delta),
    )
    return update, delta


def build_trained(task: TrainTask, weights: Mapping[str, Tensor]) -> Segmenter:
    """The received model, on the CPU; where the task trains a low-rank set alone, all else is frozen."""
    segmenter = build(task.card, weights)
    if task.privacy is not None and task.privacy.train == "low_rank":
        attach(segmenter.network, task.seed)
    return segmenter


def change(network: MedSegDiff, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained minus received weights, on the CPU; low-rank corrections are folded into their kernels."""
    trained = merge(network)  # without corrections: the weights themselves
    return {name: trained[name].cpu().contiguous() - value for name, value in weights.items()}


def make_trainer(
    segmenter: Segmenter,
    task: TrainTask,
    cases: tuple[PreparedCase, ...],
    name: str,
    total_steps: int,
    proximal_mu: float = 0.0,
    compile: bool = False,
    towards: Mapping[str, Tensor] | None = None,
) -> Trainer:
    """A trainer as the task describes it; `name` (a site's, or an arm's) sets its batches and noise apart.

    Args:
        towards: the weights that the proximal term pulls to; None: those that the training begins with.
    """
    torch.set_num_threads(task.threads)  # the thread count changes the order of sums, hence the bits
    seed = derive_seed(task.seed, "train", name)
    batches = SliceBatches(cases, segmenter.scheme, task.training, seed)
    return Trainer(
        segmenter.network,
        segmenter.diffusion,
        batches,
        task.training,
        total_steps,
        seed,
        proximal_mu,
        compile=compile,
        towards=towards,
    )
