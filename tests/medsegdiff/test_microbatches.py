"""Microbatches and memory: a batch in parts gives the batch's gradient, and running out of memory changes no result."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import MODEL, fingerprint, trainer
from torch import Tensor

from medsegdiff.config import ModelConfig
from medsegdiff.devices import is_out_of_memory
from medsegdiff.errors import UserError
from medsegdiff.network import MedSegDiff
from medsegdiff.training import Trainer

DROPOUT = replace(MODEL, dropout=0.2)
MORE = replace(MODEL, auxiliary_head=True, self_conditioning=True)  # every term that a loss may have
NO_MEMORY = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
}


def gradient_of(one: Trainer, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The gradient that a step's optimizer would have seen, unclipped."""
    taken: list[Tensor] = []

    def clip(parameters: Any, limit: float) -> None:
        taken.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double())

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        one.step(0)
    return taken[0]


def apart(a: Tensor, b: Tensor) -> float:
    """Distance of two gradients over the length of the second."""
    return float((a - b).norm() / b.norm())


class Unweighted(Trainer):
    """Wrong: every microbatch counts alike, however few cases it holds."""

    def _accumulate(self, inputs: Any) -> Tensor:
        assert self.microbatch is not None
        parts = [
            {name: tensor[start : start + self.microbatch] for name, tensor in inputs.items()}
            for start in range(0, len(inputs["masks"]), self.microbatch)
        ]
        for part in parts:
            (self._loss(self.network, self.diffusion, **part) / len(parts)).backward()
        return torch.zeros(())


class LastOnly(Trainer):
    """Wrong: the gradient of the last microbatch alone, as in the first public code."""

    def _accumulate(self, inputs: Any) -> Tensor:
        assert self.microbatch is not None
        start = (len(inputs["masks"]) - 1) // self.microbatch * self.microbatch
        self._loss(self.network, self.diffusion, **{n: t[start:] for n, t in inputs.items()}).backward()
        return torch.zeros(())


@pytest.mark.parametrize("model", [MODEL, MORE], ids=["plain", "auxiliary head and self-conditioning"])
@pytest.mark.parametrize("microbatch", [1, 2, 3, 4, 5, 9])
def test_microbatches_give_the_batchs_gradient(
    microbatch: int, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five slices in parts of 1 .. 5, the last part smaller where they do not divide; the loss is the same too."""
    whole = gradient_of(trainer(count=5, model=model), monkeypatch)
    parts = gradient_of(trainer(count=5, model=model, microbatch=microbatch), monkeypatch)
    assert apart(parts, whole) < 1e-5
    losses = [trainer(count=5, model=model, microbatch=m).step(0) for m in (None, microbatch)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("kind", [Unweighted, LastOnly])
def test_wrong_sums_of_microbatches_are_told_apart(kind: type[Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above rejects them by three orders of magnitude."""
    right, wrong = trainer(count=5, microbatch=2), trainer(count=5, microbatch=2)
    wrong.__class__ = kind
    assert apart(gradient_of(wrong, monkeypatch), gradient_of(right, monkeypatch)) > 0.01


def small_memory(one: Trainer, room: int, error: RuntimeError, where: str) -> list[int]:
    """Let a trainer fail on more than `room` slices at once; the list that is returned fills with what it tried."""
    loss, tried = one._loss, []

    def limited(*arguments: Any, **inputs: Any) -> Tensor:
        tried.append(len(inputs["masks"]))
        if len(inputs["masks"]) <= room:
            return loss(*arguments, **inputs)
        if where == "forward":
            raise error
        result = loss(*arguments, **inputs)
        # Half-way through the backward pass, when some parameters have their gradient already.
        seen = one.parameters["middle.blocks.0.conv_1.weight"].register_hook(lambda gradient: fail())

        def fail() -> None:
            seen.remove()
            raise error

        return result

    one._loss = limited  # type: ignore[assignment]
    return tried


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", NO_MEMORY)
@pytest.mark.parametrize("model", [MODEL, DROPOUT, MORE], ids=["plain", "dropout", "more"])
def test_out_of_memory_halves_the_microbatch_and_changes_no_bit(
    model: ModelConfig, error: str, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Room for two of five slices: the step is taken again, and all ends as if two at once had been asked for."""
    asked = trainer(count=5, model=model, microbatch=2, mu=0.1)
    losses = [asked.run(0, 3)]
    surprised = trainer(count=5, model=model, mu=0.1)
    tried = small_memory(surprised, 2, NO_MEMORY[error], where)
    with caplog.at_level(logging.WARNING):
        losses.append(surprised.run(0, 3))
    assert fingerprint(surprised) == fingerprint(asked)
    assert losses[0] == losses[1]
    assert tried == [5, *[2, 2, 1] * 3]
    assert [record.getMessage() for record in caplog.records] == [
        "step 0 ran out of memory with 5 slices at once; it goes on with microbatches of 2. "
        "The effective batch stays 5."
    ]


def test_losses_and_weights_stay_near_the_whole_batchs() -> None:
    """Not the same bits - sums in another order - but the same training."""
    whole, halved = trainer(count=6), trainer(count=6)
    small_memory(halved, 3, NO_MEMORY["GPU"], "backward")
    curves: list[list[float]] = [[], []]
    for one, curve in zip((whole, halved), curves, strict=True):
        one.run(0, 6, lambda done, loss, curve=curve: curve.append(loss))  # type: ignore[misc]
    assert fingerprint(whole) != fingerprint(halved)
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-4, atol=0)
    weights = [torch.cat([p.detach().flatten() for p in one.parameters.values()]) for one in (whole, halved)]
    start = torch.cat([p.detach().flatten() for p in trainer(count=6).parameters.values()])
    assert apart(weights[0] - start, weights[1] - start) < 0.02


def test_memory_may_run_out_in_a_later_microbatch_and_again() -> None:
    """What an earlier microbatch of the failed attempt left is dropped; a later step may have to halve once more."""
    one = trainer(count=4, microbatch=2)
    loss, calls = one._loss, []

    def second_fails(*arguments: Any, **inputs: Any) -> Tensor:
        calls.append(len(inputs["masks"]))
        if len(calls) == 2:
            raise NO_MEMORY["GPU"]
        return loss(*arguments, **inputs)

    one._loss = second_fails  # type: ignore[assignment]
    one.step(0)
    other = trainer(count=4, microbatch=1)
    other.step(0)
    assert fingerprint(one) == fingerprint(other)
    assert calls == [2, 2, 1, 1, 1, 1]


def test_a_failed_attempt_leaves_no_tensor_behind() -> None:
    """When the step is taken again, what the failed attempt had made is gone: a kept traceback would hold it."""
    one = trainer(count=4)
    loss: Callable[..., Tensor] = one._loss
    left: list[weakref.ref[Tensor]] = []

    def limited(*arguments: Any, **inputs: Any) -> Tensor:
        assert all(reference() is None for reference in left)
        result = loss(*arguments, **inputs)
        if len(inputs["masks"]) > 1:
            left.append(weakref.ref(result))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    one._loss = limited  # type: ignore[assignment]
    one.step(0)
    assert len(left) == 2


def test_one_slice_that_does_not_fit_is_an_error_of_one_line() -> None:
    """Device, size and remedy; the weights are as before."""
    one = trainer()
    before = fingerprint(one)
    small_memory(one, 0, NO_MEMORY["CPU"], "backward")
    with pytest.raises(UserError, match=r"step 3 ran out of memory on cpu with a microbatch of 1 slice of 8 pixels"):
        one.run(3, 5)
    assert fingerprint(one) == before


def test_other_errors_are_not_taken_for_it() -> None:
    """A defect must not vanish in ever smaller microbatches."""
    one = trainer()
    tried = small_memory(one, 0, RuntimeError("expected scalar type Float but found Half"), "forward")
    with pytest.raises(RuntimeError, match="expected scalar type"):
        one.step(0)
    assert tried == [2]


def test_the_cpus_own_complaint_is_recognised() -> None:
    """What torch says when a CPU allocation fails, asked for here."""
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_is_full_halves_the_microbatch(tmp_path: Path) -> None:
    """Memory capped below what 64 slices need: the training goes on in parts, with the whole batch's loss."""
    model = replace(MODEL, image_size=128, base_channels=32)
    total = torch.cuda.get_device_properties(0).total_memory

    def on_gpu(microbatch: int | None) -> Trainer:
        one = trainer(model=model, count=64, microbatch=microbatch)
        network = MedSegDiff(model)
        network.load_state_dict(one.network.state_dict())
        return Trainer(network.cuda(), one.diffusion, one.batches, one.config, 6, 5, microbatch=microbatch)

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    whole = on_gpu(None).run(0, 3)
    needed = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(0.4 * needed / total)
        halved = on_gpu(None)
        loss = halved.run(0, 3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert halved.microbatch is not None
    assert halved.microbatch < 64
    assert loss == pytest.approx(whole, rel=2e-2)
