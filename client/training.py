"""One round of training at one site."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from client.contract import Assignment, TrainTask, Update
from client.site import Site
from medsegdiff.data.batches import SliceBatches
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.devices import choose_device
from medsegdiff.ensemble import derive_seed
from medsegdiff.progress import Progress, report
from medsegdiff.training import Trainer
from medsegdiff.weights import Segmenter, build, hash_weights


def train_round(
    site: Site, task: TrainTask, assignment: Assignment, weights: Mapping[str, Tensor]
) -> tuple[Update, dict[str, Tensor]]:
    """Train the received weights for `task.local_steps` steps on the site's training patients.

    The optimizer starts afresh each round: its moments belong to weights that no longer exist once sites were averaged.

    Returns:
        What leaves the site: the update's fields and its delta (trained minus received weights, float32).
    """
    started = time.perf_counter()
    data = site.data(task)
    device = choose_device(site.config.device)
    segmenter = build(task.card, weights)
    segmenter.network.to(device)
    first = (assignment.round - 1) * task.local_steps
    total = task.rounds * task.local_steps
    trainer = make_trainer(segmenter, task, data.train, site.name, total, task.proximal_mu, site.config.compile)

    def tell(step: int, loss: float) -> None:
        report(Progress("train", step - first, task.local_steps, site.name, assignment.round, loss))

    loss = trainer.run(first, first + task.local_steps, tell)
    trained = segmenter.network.state_dict()
    delta = {name: trained[name].cpu().contiguous() - value for name, value in weights.items()}
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


def make_trainer(
    segmenter: Segmenter,
    task: TrainTask,
    cases: tuple[PreparedCase, ...],
    name: str,
    total_steps: int,
    proximal_mu: float = 0.0,
    compile: bool = False,
) -> Trainer:
    """A trainer as the task describes it; `name` (a site's, or an arm's) sets its batches and noise apart."""
    torch.set_num_threads(task.threads)  # the thread count changes the order of sums, hence the bits
    seed = derive_seed(task.seed, "train", name)
    batches = SliceBatches(cases, segmenter.scheme, task.training, seed)
    return Trainer(
        segmenter.network, segmenter.diffusion, batches, task.training, total_steps, seed, proximal_mu, compile=compile
    )
