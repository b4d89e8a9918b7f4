"""The gate finds what engines get wrong, names it, and lets what is right pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from client.privacy.engines import Engine, HooksEngine, PatientLoop, RowLoss, Rows, Sums, VmapEngine
from client.privacy.gate import find_faults, random_patients, require_exact
from medsegdiff.errors import UserError
from medsegdiff.network import MedSegDiff
from tests.client.privacy import faulty
from tests.client.privacy.faulty import some_patients, squared_error
from tests.client.privacy.rows import OPTIONS, row_loss

ENGINES: list[Engine] = [PatientLoop(), VmapEngine(2), HooksEngine(2)]
engines = pytest.mark.parametrize("engine", ENGINES, ids=["loop", "vmap", "hooks"])

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Full backward hook is firing")


def found(kind: type[nn.Module], engine: Engine) -> str:
    torch.manual_seed(0)
    return "; ".join(str(fault) for fault in find_faults(kind(), squared_error, some_patients(), engine))


@engines
@pytest.mark.parametrize(
    "name", ["default", *(pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS if n != "default")]
)
def test_our_network_passes(name: str, engine: Engine) -> None:
    """Every option of MedSegDiff under every engine, the network untouched."""
    config = OPTIONS[name]
    net = MedSegDiff(config)
    before = copy.deepcopy(net.state_dict())
    require_exact(net, row_loss(), random_patients(config, 1000), engine)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@engines
@pytest.mark.parametrize("kind", [faulty.Plain, faulty.ChannelsLast])
def test_what_is_right_passes(kind: type[nn.Module], engine: Engine) -> None:
    """No false alarm."""
    assert found(kind, engine) == ""


@engines
@pytest.mark.parametrize(
    ("kind", "module", "why"),
    [
        (faulty.WithBatchNorm, "norm", "batch norm"),
        (faulty.Unused, "idle", "takes no part in the loss"),
        (faulty.Moving, "the network", "changes 'centre'"),
        (faulty.Mixing, "", "off by"),
    ],
)
def test_no_engine_may_have_these(kind: type[nn.Module], module: str, why: str, engine: Engine) -> None:
    """Statistics over patients, parameters that would be trained on noise, state that would leave without noise."""
    text = found(kind, engine)
    assert f"{module}: " in text
    assert why in text


def test_buffers_that_change_are_refused_under_the_loop() -> None:
    """The loop's gradients are right there; the buffer itself would leave the site without noise."""
    assert "changes 'seen'" in found(faulty.Counting, PatientLoop())


@pytest.mark.parametrize(
    ("kind", "module", "why"),
    [
        (faulty.Reflecting, "last", "reflect padding"),
        (faulty.InPlace, "activation", "in place"),
        (faulty.TwoInputs, "gate", "2 inputs"),
        (faulty.Broadcast, "code", "1 rows for 2"),
        (faulty.Complex, "the network", "complex parameters"),
        (faulty.Counting, "the network", "buffers"),
    ],
)
def test_hooks_may_not_have_these_and_the_loop_may(kind: type[nn.Module], module: str, why: str) -> None:
    """What Opacus's hooks get wrong is refused under them by name; the patient loop takes it."""
    text = found(kind, HooksEngine())
    assert f"{module}: " in text
    assert why in text
    if kind is not faulty.Counting:
        assert found(kind, PatientLoop()) == ""


@pytest.mark.parametrize("kind", [faulty.Remembering])
def test_numbers_alone_tell_what_no_module_does(kind: type[nn.Module]) -> None:
    """A network that remembers the patient before is caught by the comparison."""
    assert "off by" in found(kind, PatientLoop())


class HalfSlices:
    """An engine that looks at a patient's first row only."""

    def clipped_sum(self, network: nn.Module, loss: RowLoss, patients: list[Rows], clip: float) -> Sums:
        first = [{name: value[:1] for name, value in rows.items()} for rows in patients]
        return PatientLoop().clipped_sum(network, loss, first, clip)


class RowClip:
    """Slice-level clipping under the name of a patient's: each row is clipped on its own."""

    def clipped_sum(self, network: nn.Module, loss: RowLoss, patients: list[Rows], clip: float) -> Sums:
        rows = [{k: v[i : i + 1] for k, v in p.items()} for p in patients for i in range(len(next(iter(p.values()))))]
        return PatientLoop().clipped_sum(network, loss, rows, clip)


class Unclipped:
    """No clipping at all."""

    def clipped_sum(self, network: nn.Module, loss: RowLoss, patients: list[Rows], clip: float) -> Sums:
        return PatientLoop().clipped_sum(network, loss, patients, 1e12)


class Failing:
    def clipped_sum(self, network: nn.Module, loss: RowLoss, patients: list[Rows], clip: float) -> Sums:
        raise NotImplementedError("no such layer")


@pytest.mark.parametrize("engine", [HalfSlices(), RowClip(), Unclipped()])
def test_an_engine_that_is_wrong_is_caught(engine: Engine) -> None:
    """On a network with nothing wrong, the comparison finds the engine out."""
    assert "off by" in found(faulty.Plain, engine)


def test_the_refusal_is_one_line_with_the_reasons() -> None:
    """Engine, consequence and cause, for the site's own terminal."""
    with pytest.raises(UserError, match=r"Failing would not bound .* nothing was trained\..*no such layer"):
        require_exact(faulty.Plain(), squared_error, some_patients(), Failing())
    with pytest.raises(UserError, match=r"and [0-9]+ more"):
        require_exact(faulty.Plain(), squared_error, some_patients(), Unclipped())


def test_patients_must_differ_in_rows() -> None:
    """With equal counts an average over all rows would pass for an average over each patient's."""
    with pytest.raises(ValueError, match="different numbers of rows"):
        find_faults(faulty.Plain(), squared_error, some_patients((2, 2)), PatientLoop())
