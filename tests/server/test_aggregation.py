"""Fixed-point averaging against exact fractions; the same bits in any order; an overflow refused whole."""

from __future__ import annotations

import itertools
import tracemalloc
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from server import aggregation
from server.aggregation import SCALE_BITS, AggregationOverflow, FixedPointSum, apply_update

WEIGHTS = st.floats(-1e4, 1e4, width=32)
UPDATES = st.lists(st.tuples(st.lists(WEIGHTS, min_size=3, max_size=3), st.integers(1, 500)), min_size=1, max_size=6)


def fold(updates: list[tuple[list[float], int]]) -> FixedPointSum:
    total = FixedPointSum({"w": (3,)})
    for values, n in updates:
        total.add({"w": torch.tensor(values)}, n)
    return total


def bits(tensor: Tensor) -> list[int]:
    return tensor.view(torch.int32).tolist()


@settings(max_examples=200, deadline=None)
@given(updates=UPDATES)
@example(updates=[([1e4, -1e4, 1e-12], 500)] * 6)
def test_the_mean_is_exact_within_the_stated_bound(updates) -> None:
    """|mean - exact| <= sites * 2**-(SCALE_BITS + 1) / n, plus one rounding to float32, against exact fractions."""
    mean = fold(updates).mean()["w"].tolist()
    n = sum(weight for _, weight in updates)
    bound = Fraction(len(updates), n * 2 ** (SCALE_BITS + 1))
    for index, found in enumerate(mean):
        exact = sum((Fraction(values[index]) * weight for values, weight in updates), Fraction(0)) / n
        # 2**-24 relative: rounding to float32; 2**-52: the division in float64; 2**-149: the least denormal
        slack = abs(exact) * (Fraction(1, 2**24) + Fraction(1, 2**51)) + Fraction(1, 2**149)
        assert abs(Fraction(found) - exact) <= bound * 2 + slack


@settings(max_examples=100, deadline=None)
@given(updates=UPDATES, data=st.data())
def test_the_order_of_arrival_changes_no_bit(updates, data) -> None:
    """Any permutation of the same updates gives the same float32 bits."""
    shuffled = data.draw(st.permutations(updates))
    assert bits(fold(updates).mean()["w"]) == bits(fold(shuffled).mean()["w"])


@settings(max_examples=100, deadline=None)
@given(
    updates=st.lists(
        st.tuples(st.lists(st.floats(-(2.0**15), 2.0**15, width=32), min_size=7, max_size=7), st.integers(1, 400)),
        min_size=1,
        max_size=5,
    ),
    block=st.sampled_from([1, 3, 2**16]),
)
@example(updates=[([2.0**-37, 3 * 2.0**-37, 2.0**15, 1e-12, 0.0, -(2.0**-37), 65535.0 / 2], 1)] * 2, block=3)
@example(updates=[([2.0**15] * 7, 400), ([3e-9] * 7, 1), ([-(2.0**15)] * 7, 400)], block=3)
def test_every_bit_is_that_of_exact_integers(updates, block) -> None:
    """Python's own integers and fractions, half to even: below 2**52, where float64 holds the sums, across it, above,
    and whatever the size of a block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregation, "BLOCK", block)
        total = FixedPointSum({"w": (7,)})
        for values, n in updates:
            total.add({"w": torch.tensor(values)}, n)
        found = total.mean()["w"]
    n = sum(weight for _, weight in updates)
    sums = [sum(round(Fraction(v[i]) * w * 2**SCALE_BITS) for v, w in updates) for i in range(7)]
    wanted = torch.tensor([float(value) / (n * 2.0**SCALE_BITS) for value in sums], dtype=torch.float64).float()
    assert bits(found) == bits(wanted)


def test_a_refused_update_leaves_no_trace_in_any_block(monkeypatch) -> None:
    """The blocks before the one that does not fit are taken back, also when the sums turned into int64 on the way."""
    monkeypatch.setattr(aggregation, "BLOCK", 2)
    total, alone = FixedPointSum({"w": (6,)}), FixedPointSum({"w": (6,)})
    good = torch.tensor([0.1, -0.2, 0.3, 1e-9, 5.0, -7.0])
    for one in (total, alone):
        one.add({"w": good}, 3)
    for bad in (float("nan"), float("inf"), 2.0**30, -(2.0**40)):
        update = torch.tensor([1e3, 2.0**14, 3e4, -1.0, 1.0, bad])
        with pytest.raises(AggregationOverflow):
            total.add({"w": update}, 7)
        assert bits(total.mean()["w"]) == bits(alone.mean()["w"])
    for one in (total, alone):
        one.add({"w": good * 0.7}, 5)
    assert bits(total.mean()["w"]) == bits(alone.mean()["w"])


def test_a_float32_sum_would_depend_on_the_order() -> None:
    """The wrong variant: adding n x delta in float32 gives different models for different orders; ours gives one."""
    generator = torch.Generator().manual_seed(0)
    updates = [(torch.randn(64, generator=generator) * 10**k, 3 + k) for k in range(-2, 3)]

    def in_float32(order: tuple[tuple[Tensor, int], ...]) -> Tensor:
        total = torch.zeros(64)
        for delta, n in order:
            total += n * delta
        return total / sum(n for _, n in order)

    def in_fixed_point(order: tuple[tuple[Tensor, int], ...]) -> Tensor:
        total = FixedPointSum({"w": (64,)})
        for delta, n in order:
            total.add({"w": delta}, n)
        return total.mean()["w"]

    orders = list(itertools.permutations(updates))
    assert len({tuple(bits(in_float32(order))) for order in orders}) > 1
    assert len({tuple(bits(in_fixed_point(order))) for order in orders}) == 1


@pytest.mark.parametrize("bad", [2.0**26, -(2.0**26), 1e30, float("inf"), float("nan")])
def test_an_overflow_is_refused_whole(bad) -> None:
    """The array before the one that does not fit is not added either: the sum is as it was."""
    total = FixedPointSum({"a": (2,), "b": (2,)})
    total.add({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}, 2)
    before = {name: bits(value) for name, value in total.mean().items()}
    with pytest.raises(AggregationOverflow, match="weight 5 times the change of 'b'"):
        total.add({"a": torch.ones(2), "b": torch.tensor([0.0, bad])}, 5)
    assert total.total == 2
    assert {name: bits(value) for name, value in total.mean().items()} == before


def test_a_sum_that_would_wrap_is_refused() -> None:
    """Two updates that fit alone, together beyond the range: the second is refused, nothing wraps to the other sign."""
    total = FixedPointSum({"w": (1,)})
    half = 2.0**25 * 0.75
    total.add({"w": torch.tensor([half])}, 1)
    with pytest.raises(AggregationOverflow):
        total.add({"w": torch.tensor([half * 2])}, 1)
    assert total.mean()["w"].item() == half
    total.add({"w": torch.tensor([-half])}, 1)
    assert total.mean()["w"].item() == 0.0


def test_a_mean_that_is_taken_is_the_mean_in_little_more_memory() -> None:
    """The same bits; at no time are all of the sum and all of the mean there."""
    shapes = {str(k): (1000, 100) for k in range(20)}
    total, generator = FixedPointSum(shapes), torch.Generator().manual_seed(0)
    for n in (1, 3):
        total.add({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, n)
    due = {name: bits(value) for name, value in total.mean().items()}
    tracemalloc.start()
    found = total.take_mean()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert {name: bits(value) for name, value in found.items()} == due
    weights = 4 * 20 * 100_000  # bytes; those of the sum were there before the trace began
    assert weights <= peak < 1.2 * weights
    assert not total._sums


@pytest.mark.parametrize("n", [0, -1])
def test_a_weight_below_one_is_refused(n) -> None:
    """A site without patients has no say, and none has a negative one."""
    total = FixedPointSum({"w": (1,)})
    with pytest.raises(AggregationOverflow, match=f"weight {n} is below 1"):
        total.add({"w": torch.ones(1)}, n)
    with pytest.raises(ValueError, match="no update was added"):
        total.mean()


def test_the_next_model_is_weights_plus_mean() -> None:
    """Float32 in, float32 out; the given weights stay as they were."""
    weights = {"w": torch.tensor([1.0, -2.0])}
    moved = apply_update(weights, {"w": torch.tensor([0.5, 0.25])})
    assert moved["w"].tolist() == [1.5, -1.75]
    assert moved["w"].dtype == torch.float32
    assert weights["w"].tolist() == [1.0, -2.0]
