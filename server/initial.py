"""The model that a run starts from: another run's, or one that was trained on public data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from client.contract import TrainTask
from medsegdiff.config import ModelConfig
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from medsegdiff.strict import plain
from medsegdiff.weights import hash_weights, initial_weights, load_model, read_tensors
from server.config import RunPlan

INITIAL = "initial.safetensors"  # in the run folder: the model file as it was given


def check_initial(path: Path, task: TrainTask) -> str:
    """The hash of a model file's weights, once it was seen that the task can go on from it.

    Raises:
        UserError: no model file, or a network of another shape, or one that predicts in another way.
    """
    segmenter = load_model(path)
    for what, found, due in (
        ("network", _shape(segmenter.card.model), _shape(task.model)),
        ("diffusion", segmenter.card.diffusion, task.diffusion),
    ):
        if found != due:
            differing = sorted(name for name, value in plain(due).items() if plain(found)[name] != value)
            raise UserError(
                f"{path}: its {what} is another one than the run's (they differ in {', '.join(differing)}); nothing "
                "was started. Give run.model and run.diffusion the model's own values (medsegfed model show reads "
                "them from the file), or leave run.initial out."
            )
    return hash_weights(segmenter.network.state_dict())


def keep_initial(path: Path, folder: Path) -> None:
    """Copy a model file into a run folder, byte for byte. Raises UserError when the disk refuses."""
    write_atomic(folder / INITIAL, path.read_bytes())


def first_weights(plan: RunPlan, folder: Path) -> dict[str, Tensor]:
    """The weights that round one of a plan starts from.

    Raises:
        UserError: the run folder's copy is missing, or is another model than the plan names.
    """
    if plan.initial is None:
        return initial_weights(plan.task.model, plan.task.seed)
    weights = read_tensors(folder / INITIAL)[0]
    found = hash_weights(weights)
    if found != plan.initial:
        raise UserError(
            f"{folder / INITIAL}: holds the model {found[:12]}, the run is to start from {plan.initial[:12]}; nothing "
            "was trained. Put the run's own copy back, or start a run of another name."
        )
    return weights


def _shape(model: ModelConfig) -> ModelConfig:
    return replace(model, dropout=0.0)  # no weight depends on it
