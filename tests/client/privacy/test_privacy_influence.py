"""What one patient can move: the sum before the noise, by at most C, whatever the patient holds."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from client.privacy.engines import Engine, HooksEngine, PatientLoop, Rows, VmapEngine
from tests.client.privacy.faulty import plain_net, some_patients, squared_error
from tests.client.privacy.rows import BASE, network, norm, patient, row_loss

ENGINES: dict[str, Engine] = {"loop": PatientLoop(), "vmap": VmapEngine(2), "hooks": HooksEngine(2)}
engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Full backward hook is firing")


@engines
def test_a_hundred_huge_slices_move_the_sum_by_at_most_c(engine: Engine) -> None:
    """One patient, 100 rows of 1e4 times the usual size: the norm is C and no hair more."""
    net = plain_net()
    huge = some_patients((100,), size=1e4)[0]
    sums = engine.clipped_sum(net, squared_error, [huge], 0.25)
    assert 0.25 * (1 - 1e-9) < norm(sums) <= 0.25


def test_a_hundred_huge_slices_on_the_real_network() -> None:
    """The same through MedSegDiff, images a thousand times too bright: once summed, once beside two other patients."""
    net, loss = network(BASE), row_loss()
    others, huge = [patient(BASE, 2, 1), patient(BASE, 1, 2)], patient(BASE, 100, 3, size=1e3)
    without = PatientLoop().clipped_sum(net, loss, others, 1e-3)
    with_it = PatientLoop().clipped_sum(net, loss, [*others, huge], 1e-3)
    moved = norm({name: with_it[name] - without[name] for name in without})
    assert 0.999e-3 < moved <= 1e-3


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 2)


def line_loss(net: nn.Module, rows: Rows) -> Tensor:
    assert isinstance(net, Line)
    out: Tensor = net.out(rows["x"])
    return (out * rows["y"]).sum(dim=1).mean()


values = st.floats(-(2.0**60), 2.0**60, width=32) | st.sampled_from([0.0, math.nan, math.inf, 1e-30, 3e38])


@st.composite
def line_patients(draw: st.DrawFn, most: int = 4) -> list[dict[str, Tensor]]:
    found = []
    for _ in range(draw(st.integers(1, most))):
        rows = draw(st.integers(1, 3))
        found.append(
            {
                name: torch.tensor(
                    draw(st.lists(st.lists(values, min_size=n, max_size=n), min_size=rows, max_size=rows))
                )
                for name, n in (("x", 3), ("y", 2))
            }
        )
    return found


@pytest.mark.parametrize(
    "engine", [PatientLoop(), PatientLoop(1), VmapEngine(2), HooksEngine(2)], ids=["loop", "rows", "vmap", "hooks"]
)
@settings(max_examples=25, deadline=None)
@given(patients=line_patients(), place=st.integers(0, 3), clip=st.floats(1e-3, 1e3))
def test_one_patient_moves_the_sum_by_at_most_c(
    engine: Engine, patients: list[dict[str, Tensor]], place: int, clip: float
) -> None:
    """Any patient of any neighbours, values from 1e-30 to 3e38 and none at all; the sum stays finite."""
    torch.manual_seed(0)
    net = Line()
    gone = place % len(patients)
    with_it = engine.clipped_sum(net, line_loss, patients, clip)
    without = engine.clipped_sum(net, line_loss, [p for i, p in enumerate(patients) if i != gone], clip)
    moved = norm({name: with_it[name] - without[name] for name in without})
    assert moved <= clip * (1 + 1e-14) + 1e-15 * norm(with_it)
    assert all(bool(value.isfinite().all()) for value in with_it.values())


def test_a_sum_of_twice_c_would_be_seen() -> None:
    """Clipping each parameter by itself gives a patient sqrt(parameters) times C: the same check rejects it."""
    net, huge = plain_net(), some_patients((4,), size=1e3)[0]
    each = {}
    for name, _ in net.named_parameters():
        alone = copy.deepcopy(net)
        for other, p in alone.named_parameters():
            p.requires_grad_(other == name)
        each |= PatientLoop().clipped_sum(alone, squared_error, [huge], 0.25)
    assert norm(each) > 0.25 * 2
