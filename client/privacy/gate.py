"""Whether a network's per-patient gradients come out right under an engine: asked before a private training begins.

Engines fail in silence: a wrong gradient trains, and a bound on a patient's influence that does not hold looks like any
other. So the gate looks for what is known to go wrong, names the module, and then compares the engine with the obvious
loop - one row at a time, each on a fresh copy - on a few random patients. A network passes when nothing known is found
*and* the numbers agree.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from client.privacy.engines import Engine, HooksEngine, RowLoss, Rows, Sums, row_count, trained_parameters
from medsegdiff.config import ModelConfig
from medsegdiff.errors import UserError

TOLERANCE = 1e-3  # float32 engines agree to 4e-6; the silent faults known are 0.08 and more
_JITTER = 0.05  # of the weights compared at: a gradient that is zero at initialisation would hide an error


@dataclass(frozen=True)
class Fault:
    """One reason why a network must not be trained privately with an engine."""

    module: str  # its name in the network; "" is the network itself
    why: str

    def __str__(self) -> str:
        return f"{self.module or 'the network'}: {self.why}"


def require_exact(network: nn.Module, loss: RowLoss, patients: Sequence[Rows], engine: Engine) -> None:
    """Let a network pass, or refuse it.

    Raises:
        UserError: names the modules and the reasons.
    """
    faults = find_faults(network, loss, patients, engine)
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(
            f"privacy: {type(engine).__name__} would not bound a patient's influence on this network; nothing was "
            f"trained. {'; '.join(str(fault) for fault in faults[:3])}{more}."
        )


def find_faults(network: nn.Module, loss: RowLoss, patients: Sequence[Rows], engine: Engine) -> list[Fault]:
    """All that is found wrong; the network itself stays as it is.

    Args:
        loss: in float32; its dropout is switched off here, as each way would draw masks of its own.
        patients: at least two, with different numbers of rows; random ones (`random_patients`) do.

    Raises:
        ValueError: fewer than two patients, or equally many rows in all: averages over rows would go unchecked.
    """
    if len({row_count(rows) for rows in patients}) < 2:
        raise ValueError("the gate compares patients with different numbers of rows; found fewer than two numbers")
    probe = _probe(network)
    rows = [{name: value.cpu() for name, value in patient.items()} for patient in patients]
    faults = list(_structure(probe, engine))
    if not faults:
        faults = list(_behaviour(probe, loss, rows[-1], engine))
    return faults or list(_difference(probe, loss, rows, engine))


def random_patients(config: ModelConfig, timesteps: int, counts: Sequence[int] = (1, 3, 2)) -> list[Rows]:
    """Random rows for a network of this config, as `denoising_loss` takes them; one patient a count."""
    generator = torch.Generator().manual_seed(0)
    side = config.image_size
    found: list[Rows] = []
    for count in counts:
        shape = (count, config.mask_channels, side, side)
        rows = {
            "images": torch.randn(count, config.image_channels, side, side, generator=generator),
            "masks": torch.randn(shape, generator=generator).sign(),
            "noise": torch.randn(shape, generator=generator),
            "t_B": torch.randint(0, timesteps, (count,), generator=generator),
        }
        if config.self_conditioning:
            rows["condition_B"] = torch.arange(count) % 2 == 0
        found.append(rows)
    return found


def _probe(network: nn.Module) -> nn.Module:
    """A copy on the CPU, in training mode without dropout, its weights moved a little."""
    probe = copy.deepcopy(network).cpu().train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.add_(_JITTER * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    for module in probe.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    return probe


def _structure(network: nn.Module, engine: Engine) -> Iterator[Fault]:
    """What the modules themselves tell."""
    hooks = isinstance(engine, HooksEngine)
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield Fault(name, "batch norm takes statistics over rows of several patients; use GroupNorm")
        own = [value for value in module.parameters(recurse=False) if value.requires_grad]
        if hooks and any(value.is_complex() for value in own):
            yield Fault(name, "complex parameters under Opacus's hooks; keep real and imaginary parts as real numbers")
        if hooks and getattr(module, "padding_mode", "zeros") != "zeros":
            yield Fault(
                name, f"{module.padding_mode} padding, which Opacus's hooks take for zeros; use the patient loop"
            )
        if hooks and getattr(module, "inplace", False):
            yield Fault(name, "an activation in place overwrites what Opacus's hooks have kept; write inplace=False")
        if hooks and list(module.buffers(recurse=False)):
            yield Fault(name, "buffers, which Opacus's hooks do not support; use the patient loop")


def _behaviour(network: nn.Module, loss: RowLoss, rows: Rows, engine: Engine) -> Iterator[Fault]:
    """What one forward and backward pass shows: inputs, unused parameters, state that changes."""
    network = copy.deepcopy(network)
    kept = {name: value.detach().clone() for name, value in _everything(network)}
    seen: dict[str, str] = {}
    handles = []
    if isinstance(engine, HooksEngine):
        for name, module in network.named_modules():
            if any(value.requires_grad for value in module.parameters(recurse=False)):
                watch = _watch(name, row_count(rows), seen)
                handles.append(module.register_forward_pre_hook(watch, with_kwargs=True))
    try:
        loss(network, rows).backward()
    except Exception as error:  # whatever a network raises is the answer
        yield Fault("", f"one pass failed: {error}")
        return
    finally:
        for handle in handles:
            handle.remove()
    for name, why in seen.items():
        yield Fault(name, why)
    for name, parameter in trained_parameters(network).items():
        if parameter.grad is None:
            yield Fault(
                _module_of(name), f"'{name}' takes no part in the loss and would be trained on noise; freeze it"
            )
    for name, value in _everything(network):
        if not torch.equal(kept[name], value):
            yield Fault(_module_of(name), f"a pass changes '{name}', which would leave the site without noise")


def _watch(name: str, count: int, seen: dict[str, str]) -> Callable[..., None]:
    def look(module: nn.Module, inputs: tuple[object, ...], named: dict[str, object]) -> None:
        tensors = [value for value in (*inputs, *named.values()) if isinstance(value, Tensor)]
        known = type(module).__module__.startswith("torch.nn")
        if not known and len(tensors) != 1:
            seen[name] = f"a module with parameters of its own and {len(tensors)} inputs; Opacus's hooks see the first"
        elif tensors and (tensors[0].dim() == 0 or len(tensors[0]) != count):
            seen[name] = (
                f"its input has {len(tensors[0]) if tensors[0].dim() else 'no'} rows for {count} of the batch (it is "
                "broadcast later); Opacus's hooks could not tell whose gradient is whose"
            )

    return look


def _difference(network: nn.Module, loss: RowLoss, patients: Sequence[Rows], engine: Engine) -> Iterator[Fault]:
    """The engine's sum beside the obvious loop's, parameter by parameter."""
    each = [_obvious_gradient(network, loss, rows) for rows in patients]
    norms = [_norm(gradients) for gradients in each]
    clip = sorted(norms)[len(norms) // 2] * 0.9  # some patients are clipped, some are not
    if not 0 < clip < float("inf"):
        yield Fault("", f"random patients give gradients of norms {norms}; nothing can be compared")
        return
    expected = {
        name: torch.stack([g[name] * min(1.0, clip / n) for g, n in zip(each, norms, strict=True) if n > 0]).sum(dim=0)
        for name in each[0]
    }
    try:
        found = engine.clipped_sum(copy.deepcopy(network), loss, patients, clip)
    except Exception as error:
        yield Fault("", f"the engine failed: {type(error).__name__}: {error}")
        return
    floor = 1e-2 * _norm(expected)
    for name, value in expected.items():
        off = _norm({name: found[name] - value}) / max(_norm({name: value}), floor)
        if not off < TOLERANCE:  # NaN too
            yield Fault(_module_of(name), f"the engine's gradient of '{name}' is off by {off:.1%}")


def _obvious_gradient(network: nn.Module, loss: RowLoss, rows: Rows) -> Sums:
    """Mean over rows of each row's own gradient, each from a fresh copy of the network."""
    count = row_count(rows)
    total: Sums = {}
    for row in range(count):
        own = copy.deepcopy(network)
        loss(own, {name: value[row : row + 1] for name, value in rows.items()}).backward()
        for name, value in trained_parameters(own).items():
            gradient = torch.zeros_like(value) if value.grad is None else value.grad
            wide = gradient.to(torch.complex128 if value.is_complex() else torch.float64) / count
            total[name] = total[name] + wide if name in total else wide
    return total


def _norm(gradients: Sums) -> float:
    return math.sqrt(sum(float(value.abs().square().sum()) for value in gradients.values()))


def _everything(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, those that are not saved among them."""
    yield from network.named_parameters()
    yield from network.named_buffers()


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]
