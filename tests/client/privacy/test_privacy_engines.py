"""Every engine against the obvious loop, on the real network and on what is known to go wrong."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.privacy import engines as module
from client.privacy.engines import Engine, HooksEngine, PatientLoop, VmapEngine, clip_scale, row_count, total_norm
from tests.client.privacy import faulty
from tests.client.privacy.faulty import some_patients, squared_error
from tests.client.privacy.rows import (
    BASE,
    OPTIONS,
    distance,
    network,
    norm,
    obvious_gradient,
    obvious_sum,
    patient,
    row_loss,
    worst,
)

ENGINES: dict[str, Engine] = {
    "loop": PatientLoop(),
    "loop, two rows at once": PatientLoop(rows_at_once=2),
    "vmap": VmapEngine(at_once=2),
    "hooks": HooksEngine(at_once=2),
}
engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
QUICK = ("default", "all")

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Full backward hook is firing")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS])
def test_all_engines_equal_the_obvious_loop(name: str) -> None:
    """Patients with 1, 3, 2 and 3 rows, two of them clipped: each parameter's sum agrees to 2e-5 (measured: 4e-6)."""
    config, loss = OPTIONS[name], row_loss()
    net = network(config)
    patients = [patient(config, rows, seed) for seed, rows in enumerate((1, 3, 2, 3))]
    norms = sorted(norm(obvious_gradient(net, loss, rows)) for rows in patients)
    clip = (norms[1] + norms[2]) / 2
    expected = obvious_sum(net, loss, patients, clip)
    for engine in ENGINES.values():
        found = engine.clipped_sum(net, loss, patients, clip)
        assert list(found) == [key for key, _ in net.named_parameters()]
        assert worst(found, expected) < 2e-5, engine


@engines
def test_the_network_is_left_as_it_was(engine: Engine) -> None:
    """Weights, gradients, attributes and hooks: a step begins where the last one ended."""
    net = faulty.Plain()
    net.first.weight.grad = torch.full_like(net.first.weight, 7.0)
    before = copy.deepcopy(net.state_dict())
    attributes = {name: set(part.__dict__) for name, part in net.named_modules()}
    marks = {name: set(p.__dict__) for name, p in net.named_parameters()}
    first = engine.clipped_sum(net, squared_error, some_patients(), 1.0)
    second = engine.clipped_sum(net, squared_error, some_patients(), 1.0)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert {name: set(part.__dict__) for name, part in net.named_modules()} == attributes
    assert {name: set(p.__dict__) for name, p in net.named_parameters()} == marks
    assert torch.equal(net.first.weight.grad, torch.full_like(net.first.weight, 7.0))
    assert net.last.weight.grad is None
    assert not any(part._forward_hooks or part._backward_hooks or part._forward_pre_hooks for part in net.modules())


@engines
def test_nobody_gives_zeros(engine: Engine) -> None:
    """An empty batch never reaches the network (an FFT of no rows raises)."""
    net = network(BASE)
    sums = engine.clipped_sum(net, row_loss(), [], 1.0)
    assert {name: (value.shape, value.dtype) for name, value in sums.items()} == {
        name: (p.shape, torch.float64) for name, p in net.named_parameters()
    }
    assert not any(value.any() for value in sums.values())


@engines
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_patient_that_is_not_finite_counts_as_zero(engine: Engine, poison: float) -> None:
    """The others' sum is what it is without that patient, whatever pass they share."""
    net, patients = faulty.Plain(), some_patients((2, 2, 2, 1))
    expected = engine.clipped_sum(net, squared_error, patients[1:], 0.5)
    patients[0]["x"][1, 0, 0, 0] = poison
    found = engine.clipped_sum(net, squared_error, patients, 0.5)
    assert distance(found, expected) < 1e-6
    assert all(bool(value.isfinite().all()) for value in found.values())


@pytest.mark.parametrize("engine", [PatientLoop(), VmapEngine(3)], ids=["loop", "vmap"])
def test_complex_parameters(engine: Engine) -> None:
    """Both parts count for the norm, and the sum stays complex."""
    net, patients = faulty.Complex(), some_patients()
    expected = obvious_sum(net, squared_error, patients, 0.05)
    found = engine.clipped_sum(net, squared_error, patients, 0.05)
    assert found["filter"].dtype == torch.complex128
    assert worst(found, expected) < 1e-5


@engines
def test_frozen_parameters_are_no_part_of_it(engine: Engine) -> None:
    """Neither of the sum nor of the norm that is clipped."""
    net, patients = faulty.Plain(), some_patients()
    net.first.requires_grad_(False)
    net.last.bias.requires_grad_(False)
    expected = obvious_sum(net, squared_error, patients, 0.2)
    found = engine.clipped_sum(net, squared_error, patients, 0.2)
    assert set(found) == {"norm.weight", "norm.bias", "last.weight"}
    assert worst(found, expected) < 1e-5


@pytest.mark.parametrize("kind", [VmapEngine, HooksEngine])
def test_passes_hold_each_patient_once(kind: type[VmapEngine] | type[HooksEngine]) -> None:
    """However many share a pass, nobody is left out and nobody counts twice (as after a broken-off memory manager)."""
    net, patients = faulty.Plain(), some_patients((1, 2, 2, 3, 2, 1, 2))
    expected = obvious_sum(net, squared_error, patients, 0.3)
    for at_once in range(1, 9):
        assert distance(kind(at_once).clipped_sum(net, squared_error, patients, 0.3), expected) < 1e-5


@pytest.mark.parametrize("fits", [1, 2, 3])
def test_vmap_takes_fewer_patients_where_memory_is_small(monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
    """A device that bears `fits` patients a pass: the sum is the same, nobody twice, and later passes know."""
    sizes: list[int] = []
    vmap = torch.func.vmap

    def small(function: Any, **options: Any) -> Any:
        def run(weights: Any, stacked: dict[str, Tensor]) -> Any:
            sizes.append(len(next(iter(stacked.values()))))
            if sizes[-1] > fits:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return vmap(function, **options)(weights, stacked)

        return run

    monkeypatch.setattr(torch.func, "vmap", small)
    net, patients, engine = faulty.Plain(), some_patients((2,) * 7), VmapEngine(8)
    expected = obvious_sum(net, squared_error, patients, 0.3)
    assert distance(engine.clipped_sum(net, squared_error, patients, 0.3), expected) < 1e-5
    assert engine.at_once == (1 if fits == 1 else 2)
    assert sum(size for size in sizes if size <= fits) == 7
    sizes.clear()
    engine.clipped_sum(net, squared_error, patients, 0.3)
    assert max(sizes) <= fits


def test_vmap_gives_up_where_not_even_one_patient_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the device's own; other errors are never tried again."""
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("another")):

        def fails(*_: Any, error: RuntimeError = error, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(torch.func, "vmap", lambda *_, fails=fails, **__: fails)
        with pytest.raises(type(error), match=str(error)):
            VmapEngine(4).clipped_sum(faulty.Plain(), squared_error, some_patients((1, 1)), 0.3)


def test_a_patient_twice_or_rows_for_patients_would_be_seen() -> None:
    """The comparison rejects both wrong variants by far more than it allows."""
    net, patients = faulty.Plain(), some_patients((1, 4, 2))
    expected = obvious_sum(net, squared_error, patients, 0.3)
    twice = obvious_sum(net, squared_error, [*patients, patients[0]], 0.3)
    rows = [{k: v[i : i + 1] for k, v in p.items()} for p in patients for i in range(row_count(p))]
    assert distance(twice, expected) > 0.1
    assert distance(obvious_sum(net, squared_error, rows, 0.3), expected) > 0.1


def test_slices_clipped_one_by_one_would_let_a_patient_count_many_times() -> None:
    """Eight equal slices: folded first, the patient moves the sum by C; clipped by row, by 8 C."""
    net = faulty.Plain()
    one = some_patients((1,), size=5.0)[0]
    eight = {name: value.repeat(8, 1, 1, 1) for name, value in one.items()}
    for engine in ENGINES.values():
        assert norm(engine.clipped_sum(net, squared_error, [eight], 0.01)) <= 0.01
    rows = [{name: value[i : i + 1] for name, value in eight.items()} for i in range(8)]
    assert norm(PatientLoop().clipped_sum(net, squared_error, rows, 0.01)) == pytest.approx(0.08)


# --- what Opacus's hooks get wrong in silence: the engine alone is wrong there, which is why there is a gate ---


@pytest.mark.parametrize("kind", [faulty.Reflecting, faulty.TwoInputs])
def test_hooks_are_silently_wrong_here(kind: type[nn.Module]) -> None:
    """No error is raised, and a parameter's gradient is off by 5 % and more; the loop and vmap have it right."""
    torch.manual_seed(3)
    net, patients = kind(), some_patients((1, 3, 2), seed=3)
    expected = obvious_sum(net, squared_error, patients, 0.3)
    assert worst(HooksEngine().clipped_sum(net, squared_error, patients, 0.3), expected) > 0.05
    for engine in (PatientLoop(), VmapEngine()):
        assert worst(engine.clipped_sum(net, squared_error, patients, 0.3), expected) < 1e-5


def test_a_layer_on_one_row_for_all_is_refused() -> None:
    """Opacus gives one gradient for three rows of two patients, and says nothing; the engine counts them."""
    net, patients = faulty.Broadcast(), some_patients((1, 2))
    with pytest.raises(ValueError, match=r"no gradient of each row for 'code.weight'"):
        HooksEngine().clipped_sum(net, squared_error, patients, 0.3)
    expected = obvious_sum(net, squared_error, patients, 0.3)
    for engine in (PatientLoop(), VmapEngine()):
        assert worst(engine.clipped_sum(net, squared_error, patients, 0.3), expected) < 1e-5


def test_channels_last_inputs_are_wrong_without_our_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opacus unfolds by strides: channels innermost give another gradient. The engine straightens inputs first."""
    net, patients = faulty.ChannelsLast(), some_patients()
    expected = obvious_sum(net, squared_error, patients, 0.3)
    assert distance(HooksEngine().clipped_sum(net, squared_error, patients, 0.3), expected) < 1e-5
    monkeypatch.setattr(module, "_contiguous", lambda _, inputs: inputs)
    assert distance(HooksEngine().clipped_sum(net, squared_error, patients, 0.3), expected) > 0.1


def test_hooks_say_what_they_cannot_do() -> None:
    """Evaluation mode, in which they record nothing, and parameters that take no part."""
    with pytest.raises(ValueError, match="evaluation mode"):
        HooksEngine().clipped_sum(faulty.Plain().eval(), squared_error, some_patients(), 1.0)
    with pytest.raises(ValueError, match=r"no gradient of each row for 'idle"):
        HooksEngine().clipped_sum(faulty.Unused(), squared_error, some_patients(), 1.0)


def test_a_failed_pass_leaves_no_hooks_behind() -> None:
    """After an error in the loss the same network trains on."""

    def broken(net: nn.Module, rows: dict[str, Tensor]) -> Tensor:
        raise RuntimeError(f"no loss of {squared_error(net, rows)}")

    net = faulty.Plain()
    with pytest.raises(RuntimeError, match="no loss of"):
        HooksEngine().clipped_sum(net, broken, some_patients(), 1.0)
    assert not any("activations" in part.__dict__ or part._forward_hooks for part in net.modules())
    expected = obvious_sum(net, squared_error, some_patients(), 0.3)
    assert distance(HooksEngine().clipped_sum(net, squared_error, some_patients(), 0.3), expected) < 1e-5


# --- the arithmetic of clipping ---


def test_norms_do_not_overflow() -> None:
    """1e30 squared is beyond float32, not beyond the norm."""
    assert total_norm([torch.full((4,), 1e30), torch.full((12,), 1e30)]) == pytest.approx(4e30)


@pytest.mark.parametrize("value", list(itertools.product([0.0, 1e-30, 0.9, 1.0, 1.1, 1e30], [1e-6, 1.0, 1e6])))
def test_clip_scale(value: tuple[float, float]) -> None:
    """Never above C, and 1 - 2**-40 below it or below the norm."""
    size, clip = value
    scaled = clip_scale(size, clip) * size
    assert scaled <= min(size, clip)
    assert scaled >= min(size, clip) * (1 - 1e-11)


@pytest.mark.parametrize("size", [math.nan, math.inf])
def test_clip_scale_of_what_is_not_finite(size: float) -> None:
    """Counted as zero."""
    assert clip_scale(size, 1.0) == 0.0


@pytest.mark.parametrize("rows", [{}, {"x": torch.zeros(0, 1)}, {"x": torch.zeros(2, 1), "y": torch.zeros(3, 1)}])
def test_rows_that_disagree_are_refused(rows: dict[str, Tensor]) -> None:
    """A patient has at least one row, and as many in every tensor."""
    with pytest.raises(ValueError, match="same number of rows"):
        row_count(rows)
