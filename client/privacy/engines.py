"""Per-patient gradients, clipped and summed: three ways to the same number.

A patient's gradient is that of the mean loss over its rows (m slices, K draws each). It is clipped to C in the 2-norm
over all trained parameters at once, then summed. `PatientLoop` is the reference in use: exact for every network, and
the fastest and smallest on a CPU. `VmapEngine` and `HooksEngine` take many patients at once, which a GPU may repay.

Guarantees, of each engine:
    A patient's part of the sum has a norm of at most C: gradients are scaled and summed in float64, and the scale is a
    hair (2**-40) below C / norm, more than float64 rounds.
    A patient whose gradient is not finite counts as zero, whatever the others are.
    The network's weights, gradients and hooks are afterwards what they were before.
Of the patient loop alone: no patient's part depends on who else was drawn. Where patients share a pass, the kernels
chosen for its size may round the others' gradients differently (about 1e-6 of C each).

Patients come as any iterable and are let go once they are summed: a large batch is never in memory as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from medsegdiff.devices import is_out_of_memory

log = logging.getLogger(__name__)

Rows = Mapping[str, Tensor]  # of one patient, or of several: every tensor's first axis counts rows
RowLoss = Callable[[nn.Module, Rows], Tensor]  # mean over rows of what depends on one row alone, a scalar
Sums = dict[str, Tensor]  # one float64 (complex128) tensor a trained parameter, by name

_SHAVE = 1 - 2.0**-40
GPU_PATIENTS = 32  # that share a pass on a GPU


class Engine(Protocol):
    """Something that sums clipped per-patient gradients."""

    def clipped_sum(self, network: nn.Module, loss: RowLoss, patients: Iterable[Rows], clip: float) -> Sums:
        """The sum over patients; zeros where there is none.

        Args:
            network: its parameters that require a gradient are the ones counted.
            loss: of some rows, a mean.
            patients: the rows of each, drawn as they are asked for.
            clip: C.
        """
        ...


class PatientLoop:
    """One forward and backward pass a patient.

    Args:
        rows_at_once: rows that share a pass; None: all of a patient's. Their gradients average to the patient's.
    """

    def __init__(self, rows_at_once: int | None = None) -> None:
        self.rows_at_once = rows_at_once

    def clipped_sum(self, network: nn.Module, loss: RowLoss, patients: Iterable[Rows], clip: float) -> Sums:
        """The sum over patients (see `Engine`)."""
        trained = trained_parameters(network)
        sums = zero_sums(trained)
        for rows in patients:
            gradients = self._gradient(network, loss, rows, list(trained.values()))
            scale = clip_scale(total_norm(gradients), clip)
            if scale > 0:
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    total.add_(gradient, alpha=scale)
        return sums

    def _gradient(self, network: nn.Module, loss: RowLoss, rows: Rows, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        count = row_count(rows)
        size = min(self.rows_at_once or count, count)
        if size == count:
            return torch.autograd.grad(loss(network, rows), weights, materialize_grads=True)
        parts = [{name: value[i : i + size] for name, value in rows.items()} for i in range(0, count, size)]
        total = [torch.zeros_like(value) for value in weights]
        for part in parts:
            found = torch.autograd.grad(loss(network, part), weights, materialize_grads=True)
            torch._foreach_add_(total, found, alpha=row_count(part) / count)
        return tuple(total)


class VmapEngine:
    """torch.func: one vectorised pass for the patients that have equally many rows.

    Args:
        at_once: patients that share a pass at most; memory grows with it by one set of gradients and activations each.
            Where a device has too little, it is halved for good, down to one, and the pass is made again: nothing of a
            pass that failed is in the sum.
    """

    def __init__(self, at_once: int = 8) -> None:
        self.at_once = at_once

    def clipped_sum(self, network: nn.Module, loss: RowLoss, patients: Iterable[Rows], clip: float) -> Sums:
        """The sum over patients (see `Engine`)."""
        trained = trained_parameters(network)
        sums = zero_sums(trained)
        bound = _LossModule(network, loss)
        weights = {f"network.{name}": value.detach() for name, value in trained.items()}

        def one(weights: dict[str, Tensor], rows: dict[str, Tensor]) -> Tensor:
            answer: Tensor = torch.func.functional_call(bound, weights, (rows,))
            return answer

        # Dropout: masks of each patient's own, as the loop draws them.
        per_patient = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0), randomness="different")
        for part in _parts(patients, self.at_once, row_count):
            done = 0
            while done < len(part):
                some = part[done : done + self.at_once]
                found = self._try(per_patient, weights, some)
                if found is not None:
                    _add_clipped(sums, {name: found[f"network.{name}"] for name in trained}, clip)
                    done += len(some)
                del found  # the next pass needs the room
        return sums

    def _try(
        self, per_patient: Callable[..., dict[str, Tensor]], weights: dict[str, Tensor], some: Sequence[Rows]
    ) -> dict[str, Tensor] | None:
        """The patients' gradients, (P, ...) each; None where memory was too small and fewer are to be tried."""
        try:
            return per_patient(weights, {name: torch.stack([rows[name] for rows in some]) for name in some[0]})
        except RuntimeError as error:
            if not is_out_of_memory(error) or self.at_once == 1:
                raise
        # Here the exception is gone, and with it what its frames held of the failed pass.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.at_once //= 2
        log.warning("memory is too small for %d patients at once: %d from now on", 2 * self.at_once, self.at_once)
        return None


class HooksEngine:
    """Opacus's hooks: per-row gradients layer by layer, folded to patients before the clipping.

    Clipping the rows themselves would be privacy of a slice under the name of a patient's.

    Args:
        at_once: patients that share a pass; memory grows by one set of gradients a *row*.

    Raises (when used):
        ValueError: the network is not in training mode, in which alone the hooks record; or a trained parameter that
            they did not see.
    """

    def __init__(self, at_once: int = 8) -> None:
        self.at_once = at_once

    def clipped_sum(self, network: nn.Module, loss: RowLoss, patients: Iterable[Rows], clip: float) -> Sums:
        """The sum over patients (see `Engine`)."""
        trained = trained_parameters(network)
        sums = zero_sums(trained)
        for part in _parts(patients, self.at_once):
            rows = {name: torch.cat([patient[name] for patient in part]) for name in part[0]}
            per_row = _row_gradients(network, loss, rows, trained)
            _add_clipped(sums, _fold(per_row, [row_count(patient) for patient in part]), clip)
        return sums


def choose_engine(device: torch.device) -> Engine:
    """The fastest exact engine of a device, by measurement (benchmarks/private_step.py).

    A GPU has hardly anything to do with one patient at a time: 32 at once take 3.1 to 5.3 times a plain step on an
    H100, Opacus's hooks 3.9 to 5.5 times, the patient loop 17 to 30 times. On a CPU the loop is fastest and smallest.
    """
    return VmapEngine(GPU_PATIENTS) if device.type == "cuda" else PatientLoop()


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def zero_sums(trained: Mapping[str, Tensor]) -> Sums:
    """Sums of nobody."""
    return {
        name: torch.zeros_like(value, dtype=torch.complex128 if value.is_complex() else torch.float64)
        for name, value in trained.items()
    }


def row_count(rows: Rows) -> int:
    """How many rows there are.

    Raises:
        ValueError: none, or tensors that disagree.
    """
    counts = {len(value) for value in rows.values()}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"a patient's tensors must have the same number of rows, at least one; found {sorted(counts)}")
    return counts.pop()


def total_norm(gradients: Sequence[Tensor]) -> float:
    """2-norm over all tensors together, in float64: a square of float32 cannot overflow there."""
    squares = [torch.linalg.vector_norm(value, dtype=_wide(value)) for value in gradients]
    return float(torch.linalg.vector_norm(torch.stack(squares))) if squares else 0.0


def clip_scale(norm: float, clip: float) -> float:
    """The factor that brings a gradient of this norm to at most C; 0 for one that is not finite."""
    if not norm < float("inf"):  # NaN too
        return 0.0
    return min(1.0, clip / norm) * _SHAVE if norm > 0 else 1.0


def _add_clipped(sums: Sums, per_patient: Mapping[str, Tensor], clip: float) -> None:
    """Clip gradients (P, ...) of P patients and add them to the sums."""
    norms_P = torch.stack(
        [torch.linalg.vector_norm(value.flatten(1), dim=1, dtype=_wide(value)) for value in per_patient.values()]
    ).norm(dim=0)
    for patient, norm in enumerate(norms_P.tolist()):
        scale = clip_scale(norm, clip)
        if scale > 0:
            for name, total in sums.items():
                total.add_(per_patient[name][patient], alpha=scale)


def _wide(value: Tensor) -> torch.dtype:
    return torch.complex128 if value.is_complex() else torch.float64


class _LossModule(nn.Module):
    """A loss as a module, so that its network's weights can be swapped."""

    def __init__(self, network: nn.Module, loss: RowLoss) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, rows: Rows) -> Tensor:
        return self.loss(self.network, rows)


def _parts(patients: Iterable[Rows], at_once: int, kind: Callable[[Rows], int] = lambda _: 0) -> Iterator[list[Rows]]:
    """Every patient once, in parts of at most `at_once` of the same kind."""
    waiting: dict[int, list[Rows]] = {}
    for rows in patients:
        part = waiting.setdefault(kind(rows), [])
        part.append(rows)
        if len(part) == at_once:
            yield waiting.pop(kind(rows))
    yield from waiting.values()


def _row_gradients(
    network: nn.Module, loss: RowLoss, rows: Rows, trained: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Each row's gradient, (rows, ...), by Opacus's hooks."""
    if not network.training:
        raise ValueError("the network is in evaluation mode, in which Opacus's hooks record nothing: call train()")
    with _hooked(network):
        loss(network, rows).backward()
        found: dict[str, Any] = {name: getattr(value, "grad_sample", None) for name, value in trained.items()}
    for name, value in found.items():
        if not isinstance(value, Tensor) or len(value) != row_count(rows):
            raise ValueError(
                f"Opacus's hooks gave no gradient of each row for '{name}': its module was not used once a row. Use "
                "the patient loop."
            )
    return found


@contextmanager
def _hooked(network: nn.Module) -> Iterator[None]:
    """Opacus's hooks for the time of the block; what they leave on modules and parameters goes with them."""
    # Imported here: Opacus takes a second to load, and the loop, which most sites use, needs none of it.
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    kept = {name: value.grad for name, value in network.named_parameters()}
    for value in network.parameters():
        value.grad = None
    layouts = [module.register_forward_pre_hook(_contiguous) for module in network.modules()]
    hooks = GradSampleHooks(network, loss_reduction="mean", strict=True)
    try:
        yield
    finally:
        hooks.cleanup()
        for layout in layouts:
            layout.remove()
        for module in network.modules():
            for left in ("activations", "max_batch_len"):  # stay where a pass was broken off
                module.__dict__.pop(left, None)
        for name, value in network.named_parameters():
            value.grad = kept[name]


def _contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Opacus 1.6 unfolds a convolution's input by its strides, wrongly and silently where channels lie innermost."""
    return tuple(value.contiguous() if isinstance(value, Tensor) else value for value in inputs)


def _fold(per_row: Mapping[str, Tensor], counts: Sequence[int]) -> dict[str, Tensor]:
    """Mean over each patient's rows: (rows, ...) -> (P, ...).

    By index, not by a matrix product: 0 times a row that is not finite would spoil the other patients.
    """
    return {
        name: torch.stack([part.mean(dim=0) for part in value.split(list(counts))]) for name, value in per_row.items()
    }
