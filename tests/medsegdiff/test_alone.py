"""One site alone: what is asked of the device, and what of it may change the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from client.contract import TrainTask
from medsegdiff import alone
from medsegdiff.alone import TrainAlone, train_alone
from medsegdiff.config import TrainingConfig
from medsegdiff.data.dataset import open_dataset
from medsegdiff.errors import UserError
from medsegdiff.training import Trainer

Train = Callable[..., bytes]


@pytest.fixture
def train(tiny_source: Path, tiny_task: TrainTask, tmp_path: Path) -> Train:
    """Call to train two steps on the phantoms; returns the model's bytes. Keywords change the training's settings."""

    def run(name: str, device: str = "cpu", resume: bool = False, compile: bool = False, **changes: Any) -> bytes:
        training = replace(TrainingConfig(batch_size=3), **changes)
        wanted = TrainAlone(tiny_task.model, 2, training, threads=1)
        dataset = open_dataset(tiny_source)
        return train_alone(dataset, wanted, tmp_path / name, tmp_path / "cache", device, resume, compile).read_bytes()

    return run


@pytest.mark.slow
def test_precision_changes_the_model_and_compilation_does_not(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes with compilation (traced, without code generation); others in bf16."""
    plain = train("plain")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert train("compiled", compile=True) == plain
    monkeypatch.undo()
    assert train("fp32", precision="fp32") == plain, "on a CPU auto is fp32"
    assert train("bf16", precision="bf16") != plain


def test_a_device_that_is_not_there_is_refused_before_anything_is_prepared(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preparing a dataset takes hours; a misspelt device must not come up after them."""
    monkeypatch.setattr(alone, "prepare", lambda *_: pytest.fail("prepared"))
    with pytest.raises(UserError, match="device 'B9000'"):
        train("out", device="B9000")
    assert not (tmp_path / "out").exists()


def test_a_full_memory_ends_in_a_model(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices that fit only one at a time: the training ends, and as it would have with microbatches of one."""
    honest = Trainer.__init__

    def with_microbatch(self: Trainer, *arguments: Any, **options: Any) -> None:
        honest(self, *arguments, **options, microbatch=1)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__init__", with_microbatch)
        asked = train("asked")

    accumulate = Trainer._accumulate

    def limited(self: Trainer, inputs: Any) -> torch.Tensor:
        if self.microbatch != 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return accumulate(self, inputs)

    monkeypatch.setattr(Trainer, "_accumulate", limited)
    assert train("surprised") == asked
