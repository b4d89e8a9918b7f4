"""What federation is compared with: each site alone, and all data in one place.

Both take the steps that the federation takes (local: a site's own; pooled: the sum over sites), with the same batch
size, learning-rate schedule and network. Work is saved after every chunk of steps, so a killed run goes on from there
and ends with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from client.contract import TrainTask
from client.site import Site
from client.training import make_trainer
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.devices import choose_device
from medsegdiff.progress import Progress, report
from medsegdiff.weights import build, initial_weights, load_model, read_tensors, save_model


@dataclass(frozen=True)
class Arm:
    """One centralised training: whose patients, for how many steps."""

    name: str  # "local-CS", "pooled"
    cases: tuple[PreparedCase, ...]
    batches_of: str  # whose random stream: a local arm draws the very batches its site drew in the federation
    steps: int
    chunk: int  # steps between saves


def make_arms(task: TrainTask, sites: Mapping[str, Site], wanted: tuple[str, ...]) -> list[Arm]:
    """The arms of a simulation, in the order they are trained."""
    steps = task.rounds * task.local_steps
    arms = []
    if "local" in wanted:
        arms += [
            Arm(f"local-{name}", site.data(task).train, name, steps, task.local_steps) for name, site in sites.items()
        ]
    if "pooled" in wanted:
        everyone = tuple(case for site in sites.values() for case in site.data(task).train)
        arms.append(Arm("pooled", everyone, "pooled", steps * len(sites), task.local_steps * len(sites)))
    return arms


def train_arm(
    arm: Arm, task: TrainTask, folder: Path, device: str = "auto", start: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], float]:
    """Train, or go on with, one arm.

    Args:
        folder: where its state and, at the end, `NAME.safetensors` lie.
        start: the weights it begins with; None: fresh ones from the task's seed.

    Returns:
        Its weights, and the seconds spent training over all sessions.
    """
    finished = folder / f"{arm.name}.safetensors"
    state_path = folder / f"{arm.name}.state.safetensors"
    if finished.exists():
        _, metadata = read_tensors(state_path)
        return load_model(finished).network.state_dict(), float(metadata["seconds"])
    segmenter = build(task.card, start if start is not None else initial_weights(task.model, task.seed))
    segmenter.network.to(choose_device(device))
    trainer = make_trainer(segmenter, task, arm.cases, arm.batches_of, arm.steps)
    done, seconds = 0, 0.0
    if state_path.exists():
        tensors, metadata = read_tensors(state_path)
        done, seconds = trainer.restore(tensors, metadata), float(metadata["seconds"])
    while done < arm.steps:
        started = time.perf_counter()
        last = min(done + arm.chunk, arm.steps)
        trainer.run(done, last, lambda step, loss: report(Progress("train", step, arm.steps, arm.name, loss=loss)))
        done = last
        seconds += time.perf_counter() - started
        trainer.save(state_path, done, seconds=str(seconds))
    weights = {name: value.cpu().contiguous() for name, value in segmenter.network.state_dict().items()}
    save_model(finished, task.card, weights)
    return weights, seconds
