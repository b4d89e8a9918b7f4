"""The loader: what it yields is what a direct call gives, in order, whatever the threads do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medsegdiff.errors import UserError
from medsegdiff.loader import AHEAD, Loader

CPU = torch.device("cpu")


def drawn(step: int) -> dict[str, Tensor]:
    return {"x": torch.randn(3, generator=torch.Generator().manual_seed(step)), "step": torch.tensor(step)}


def assert_is_direct(loaded: list[tuple[int, dict[str, Tensor]]], steps: range) -> None:
    """The oracle: direct calls, one after the other."""
    assert [step for step, _ in loaded] == list(steps)
    for step, tensors in loaded:
        expected = drawn(step)
        assert list(tensors) == list(expected)
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


@settings(max_examples=25, deadline=None)
@given(ahead=st.integers(0, 5), first=st.integers(0, 9), count=st.integers(0, 9), seed=st.integers(0, 99))
def test_order_and_bits_are_those_of_direct_calls(ahead: int, first: int, count: int, seed: int) -> None:
    """Whoever is the slower one, thread or caller."""
    pauses = torch.rand(2, 20, generator=torch.Generator().manual_seed(seed)).mul(0.002).tolist()

    def make(step: int) -> dict[str, Tensor]:
        time.sleep(pauses[0][step])
        return drawn(step)

    loaded = []
    for step, tensors in Loader(make, CPU, ahead).load(range(first, first + count)):
        time.sleep(pauses[1][step])
        loaded.append((step, tensors))
    assert_is_direct(loaded, range(first, first + count))


def test_the_newest_first_is_no_order() -> None:
    """A wrong variant, which takes the last of its queue, does not pass for a loader."""

    class NewestFirst(Loader):
        def load(self, steps: object) -> Iterator[tuple[int, dict[str, Tensor]]]:
            loaded = list(super().load(steps))  # type: ignore[arg-type]
            for start in range(0, len(loaded), self.ahead):
                yield from reversed(loaded[start : start + self.ahead])

    with pytest.raises(AssertionError):
        assert_is_direct(list(NewestFirst(drawn, CPU, 3).load(range(6))), range(6))


def test_a_thread_works_for_a_gpu_alone() -> None:
    """On a CPU inputs are made where they are asked for, by the caller's own thread."""
    assert Loader(drawn, CPU).ahead == 0
    assert Loader(drawn, torch.device("cuda")).ahead == AHEAD
    makers = []

    def make(step: int) -> dict[str, Tensor]:
        makers.append(threading.current_thread())
        return drawn(step)

    assert len(list(Loader(make, CPU).load(range(2)))) == 2
    assert set(makers) == {threading.main_thread()}
    makers.clear()
    assert len(list(Loader(make, CPU, 2).load(range(2)))) == 2
    assert threading.main_thread() not in makers


@pytest.mark.parametrize("ahead", [0, 3])
def test_waiting_is_counted(ahead: int) -> None:
    """A loader slower than its caller is waited for nearly all the time."""

    def slow(step: int) -> dict[str, Tensor]:
        time.sleep(0.03)
        return drawn(step)

    loader = Loader(slow, CPU, ahead)
    assert len(list(loader.load(range(10)))) == 10
    assert loader.waited_seconds > 0.2
    before = loader.waited_seconds
    assert len(list(loader.load(range(10)))) == 10
    assert loader.waited_seconds > before + 0.2, "later runs add to it"


def test_a_loader_that_is_ahead_is_not_waited_for() -> None:
    """Making a batch takes a third of the caller's step: beyond the first batch, no waiting; the direct way waits."""

    def quick(step: int) -> dict[str, Tensor]:
        time.sleep(0.01)
        return drawn(step)

    waited = {}
    for ahead in (0, 3):
        loader = Loader(quick, CPU, ahead)
        for _ in loader.load(range(12)):
            time.sleep(0.03)
        waited[ahead] = loader.waited_seconds
    assert waited[3] < waited[0] / 2


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_an_error_is_raised_when_its_step_has_come(ahead: int) -> None:
    """Steps before it arrive; its own type and message come through; the thread is gone."""

    def make(step: int) -> dict[str, Tensor]:
        if step == 3:
            raise UserError("case 7: its slice is torn. Mend it.")
        return drawn(step)

    steps = Loader(make, CPU, ahead).load(range(6))
    assert_is_direct([next(steps) for _ in range(3)], range(3))
    with pytest.raises(UserError, match=r"case 7: its slice is torn\. Mend it\."):
        next(steps)
    assert not loader_threads()


def test_closing_stops_the_thread_early() -> None:
    """A caller that leaves at the second of a thousand steps leaves no thread and no queue of work behind."""
    made = []

    def make(step: int) -> dict[str, Tensor]:
        made.append(step)
        time.sleep(0.05)
        return drawn(step)

    with closing(Loader(make, CPU, 3).load(range(1000))) as steps:
        assert [next(steps)[0], next(steps)[0]] == [0, 1]
        assert loader_threads()
    assert not loader_threads()
    assert len(made) <= 3, "what waits in the queue is dropped"


def test_no_more_than_asked_for_is_made_ahead() -> None:
    """The queue is bounded: a slow caller does not fill memory."""
    made = []

    def make(step: int) -> dict[str, Tensor]:
        made.append(step)
        return drawn(step)

    most = 0
    for step, _ in Loader(make, CPU, 2).load(range(8)):
        time.sleep(0.01)
        most = max(most, len(made) - (step + 1))
    assert most == 1  # beyond the one handed out, the other of the two


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_the_same_inputs() -> None:
    """Through pinned memory and copies that are not waited for."""
    loaded = list(Loader(drawn, torch.device("cuda")).load(range(20)))
    assert all(tensors["x"].is_cuda for _, tensors in loaded)
    assert_is_direct([(step, {name: t.cpu() for name, t in tensors.items()}) for step, tensors in loaded], range(20))
