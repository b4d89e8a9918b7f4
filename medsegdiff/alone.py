"""One site alone: train a model on one folder, with no federation anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from medsegdiff.config import DiffusionConfig, ModelConfig, SamplingConfig, TrainingConfig
from medsegdiff.data.batches import SliceBatches
from medsegdiff.data.dataset import Dataset
from medsegdiff.data.prepare import CaseFault, prepare
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.data.splits import SPLIT_SEED, TEST_FRACTION, split_patients
from medsegdiff.devices import choose_device
from medsegdiff.ema import WeightAverage
from medsegdiff.ensemble import derive_seed
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from medsegdiff.labels import LabelScheme
from medsegdiff.network import channels_last
from medsegdiff.progress import Progress, report
from medsegdiff.strict import Strict, compact_json
from medsegdiff.training import Trainer
from medsegdiff.weights import ModelCard, build, initial_weights, read_tensors, save_model

SAVE_EVERY = 200  # steps between saved states


@dataclass(frozen=True)
class TrainAlone(Strict):
    """What `medsegfed train` is asked for."""

    model: ModelConfig
    steps: int
    training: TrainingConfig = TrainingConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sampling: SamplingConfig = SamplingConfig()
    ema_decay: float = 0.999  # of the weights that are kept; 0 keeps the last weights
    seed: int = 0
    threads: int = 2


Faults = Callable[[Sequence[CaseFault]], None]


def training_cases(
    dataset: Dataset, image_size: int, cache: Path, tell: Faults = lambda _: None
) -> tuple[list[PreparedCase], list[PreparedCase]]:
    """Prepared cases of the training and of the held-out patients; `tell` hears of those that are left out.

    Raises:
        UserError: nobody is left to train on.
    """
    prepared = prepare(dataset, image_size, cache)
    tell(prepared.faults)
    splits = split_patients([p.case for p in prepared.cases], TEST_FRACTION, 0.0, SPLIT_SEED)
    train = [p for p in prepared.cases if splits[p.case.patient_id] == "train"]
    test = [p for p in prepared.cases if splits[p.case.patient_id] == "test"]
    if not train:
        raise UserError(
            f"{dataset.root}: none of its {len(splits)} patients is in the training split. Check cases.csv."
        )
    return train, test


def train_alone(
    dataset: Dataset,
    wanted: TrainAlone,
    out: Path,
    cache: Path,
    device: str,
    resume: bool,
    compile: bool = False,
    tell: Faults = lambda _: None,
) -> Path:
    """Train a model on a dataset's training patients; returns the path of model.safetensors.

    A killed training goes on with `resume` and ends with the same bits.

    Args:
        device: as `choose_device` reads it. Like `compile`, it may change when a training goes on; the bits then do.
        compile: have torch compile the training step.
        tell: hears of the cases that cannot be read, before the training; it goes on without them.

    Raises:
        UserError: there is no such device; `out` holds a training already (or none, with resume), or another one.
    """
    place = choose_device(device)  # before hours of preparation
    state_path = out / "state.safetensors"
    _check_out(out, state_path, resume)
    train, _ = training_cases(dataset, wanted.model.image_size, cache, tell)
    write_atomic(out / "train.json", compact_json(wanted).encode())
    card = ModelCard(wanted.model, wanted.diffusion, wanted.sampling, dataset.config)
    torch.set_num_threads(wanted.threads)
    segmenter = build(card, initial_weights(wanted.model, wanted.seed))
    channels_last(segmenter.network).to(place)  # before the average is taken: equal layouts update in one sweep
    average = WeightAverage(segmenter.network, wanted.ema_decay) if wanted.ema_decay > 0 else None
    seed = derive_seed(wanted.seed, "train", "alone")
    batches = SliceBatches(train, LabelScheme.of(dataset.config), wanted.training, seed)
    trainer = Trainer(
        segmenter.network, segmenter.diffusion, batches, wanted.training, wanted.steps, seed,
        average=average, compile=compile,
    )  # fmt: skip
    done = _restore(trainer, state_path, compact_json(wanted)) if resume else 0
    while done < wanted.steps:
        last = min(done + SAVE_EVERY, wanted.steps)
        trainer.run(done, last, lambda step, loss: report(Progress("train", step, wanted.steps, loss=loss)))
        done = last
        trainer.save(state_path, done, wanted=compact_json(wanted))
    weights = average.shadow if average is not None else segmenter.network.state_dict()
    save_model(out / "model.safetensors", card, weights)
    return out / "model.safetensors"


def _check_out(out: Path, state: Path, resume: bool) -> None:
    if resume and not state.exists():
        raise UserError(f"{out}: holds no training that could be resumed. Leave --resume out.")
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out}: already holds files; nothing was changed. Go on by --resume, or choose another folder."
        )


def _restore(trainer: Trainer, path: Path, wanted: str) -> int:
    tensors, metadata = read_tensors(path)
    if metadata.get("wanted") != wanted:
        raise UserError(f"{path}: belongs to a training with other settings. Repeat the command with the first ones.")
    return trainer.restore(tensors, metadata)
