"""Poisson sampling is what the accountant assumes: rate, independence, empty batches, the right number of steps."""

from __future__ import annotations

import inspect
import math
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, chisquare

from client.privacy.audit import inclusion_p_value, spread_p_value
from client.privacy.entropy import SeededEntropy, SystemEntropy, below, chosen
from client.privacy.sampling import PoissonSampler, draw_slices

SURE = 1e-4  # p-values below it are failures; all draws are seeded, so a test that passes keeps passing


def sampler(patients: int, q: float, seed: int = 0) -> PoissonSampler:
    return PoissonSampler.for_testing(patients, q, SeededEntropy(seed))


@pytest.mark.parametrize("q", [0.1, 0.3, 0.5, 0.9])
def test_the_rate_is_q(q: float) -> None:
    """Not 1 / int(1 / q), which for 0.3 would be 1/3: the same test rejects that."""
    draws = list(sampler(200, q).steps(500))
    drawn = sum(map(len, draws))
    assert binomtest(drawn, 100_000, q).pvalue > SURE
    wrong = 1 / int(1 / q)
    if abs(wrong - q) > 0.01:
        assert binomtest(drawn, 100_000, wrong).pvalue < 1e-12


def test_batch_sizes_are_binomial() -> None:
    """Five patients at q = 0.1: 59 % of the batches are empty, the mean is 0.5."""
    sizes = np.bincount([len(drawn) for drawn in sampler(5, 0.1).steps(20_000)], minlength=6)
    expected = 20_000 * binom.pmf(np.arange(6), 5, 0.1)
    merged = [*sizes[:3], sizes[3:].sum()], [*expected[:3], expected[3:].sum()]
    assert chisquare(*merged).pvalue > SURE
    assert sizes[0] / 20_000 == pytest.approx(0.9**5, abs=0.015)


def test_patients_are_drawn_independently() -> None:
    """Over pairs of patients and over neighbouring steps, both drawn is as frequent as chance has it."""
    drawn = np.zeros((20_000, 4), bool)
    for step, patients in enumerate(sampler(4, 0.3).steps(20_000)):
        drawn[step, patients] = True
    for a in range(4):
        assert binomtest(int(drawn[:, a].sum()), 20_000, 0.3).pvalue > SURE
        for b in range(a):
            assert binomtest(int((drawn[:, a] & drawn[:, b]).sum()), 20_000, 0.09).pvalue > SURE
        assert binomtest(int((drawn[1:, a] & drawn[:-1, a]).sum()), 19_999, 0.09).pvalue > SURE


def shuffled(patients: int, q: float, steps: int) -> list[list[int]]:
    """An epoch's permutation cut into batches of a fixed size: often accounted as if it were Poisson."""
    generator = random.Random(0)
    size, order, batches = round(patients * q), list[int](), list[list[int]]()
    for _ in range(steps):
        if len(order) < size:
            order = generator.sample(range(patients), patients)
        batches.append([order.pop() for _ in range(size)])
    return batches


def test_shuffling_is_not_poisson_and_is_told_apart() -> None:
    """Right rate, no spread: the audit's second test rejects it, and accepts Poisson."""
    fixed = [len(batch) for batch in shuffled(100, 0.5, 20)]
    assert inclusion_p_value(fixed, 100, 0.5) > SURE
    assert spread_p_value(fixed, 100, 0.5) < 1e-6
    honest = [[len(batch) for batch in sampler(100, 0.5, seed).steps(20)] for seed in range(200)]
    spreads = np.array([spread_p_value(sizes, 100, 0.5) for sizes in honest])
    assert binomtest(int((spreads < 0.1).sum()), 200, 0.1).pvalue > SURE


@given(st.integers(1, 40), st.floats(0.001, 1.0), st.integers(0, 30))
def test_as_many_steps_as_asked(patients: int, q: float, count: int) -> None:
    """Empty ones among them; numbers rise, none twice, none outside."""
    steps = list(sampler(patients, q).steps(count))
    assert len(steps) == count
    for drawn in steps:
        assert drawn == sorted(set(drawn))
        assert all(0 <= patient < patients for patient in drawn)


def test_empty_batches_are_given() -> None:
    """One patient at q = 0.01: nearly all of the steps draw nobody, and are there."""
    steps = list(sampler(1, 0.01).steps(300))
    assert len(steps) == 300
    assert steps.count([]) > 280


def test_everybody_at_q_one() -> None:
    """q = 1 leaves nobody out, ever."""
    assert all(drawn == list(range(50)) for drawn in sampler(50, 1.0).steps(20))


@pytest.mark.parametrize(("patients", "q"), [(0, 0.5), (3, 0.0), (3, 1.5), (3, math.nan)])
def test_nonsense_is_refused(patients: int, q: float) -> None:
    """No patients, or no probability."""
    with pytest.raises(ValueError, match="found"):
        PoissonSampler(patients, q)


def test_production_has_no_seed() -> None:
    """Its constructor takes none, torch's, numpy's and Python's seeds do not reach it, and it says what it is."""
    assert set(inspect.signature(PoissonSampler).parameters) == {"patients", "q"}
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        seen.append(list(PoissonSampler(64, 0.5).steps(4)))
    assert seen[0] != seen[1]
    assert not PoissonSampler(3, 0.5).testing
    assert sampler(3, 0.5).testing
    assert list(sampler(64, 0.5).steps(4)) == list(sampler(64, 0.5).steps(4))


def test_slices_with_replacement() -> None:
    """m of them whatever the patient has, each as often as any other; a patient with one slice gives it m times."""
    entropy = SeededEntropy(1)
    counts = np.bincount([s for _ in range(3000) for s in draw_slices(7, 4, entropy)], minlength=7)
    assert counts.sum() == 12_000
    assert chisquare(counts).pvalue > SURE
    repeated = sum(len(set(draw_slices(7, 4, entropy))) < 4 for _ in range(2000))
    assert binomtest(repeated, 2000, 1 - 7 * 6 * 5 * 4 / 7**4).pvalue > SURE
    assert draw_slices(1, 3, entropy) == [0, 0, 0]
    with pytest.raises(ValueError, match="without slices"):
        draw_slices(0, 3, entropy)


class Bytes:
    """A source that gives the bytes it was made with."""

    testing = True

    def __init__(self, *values: int) -> None:
        self.data = b"".join(value.to_bytes(8, "little") for value in values)

    def take(self, count: int) -> bytes:
        assert count == len(self.data)
        return self.data


@given(st.floats(2.0**-64, 1.0), st.integers(0, 2**64 - 1))
def test_the_threshold_is_exact(q: float, value: int) -> None:
    """A patient is drawn exactly when its 64 bits, read as a fraction, lie below q rounded down to 64 bits."""
    from fractions import Fraction

    expected = Fraction(value + 1, 2**64) <= Fraction(q)
    assert chosen(1, q, Bytes(value)) == ([0] if expected else [])  # type: ignore[arg-type]


def test_probabilities_at_the_ends() -> None:
    """1 takes the largest draw, the least possible takes the smallest alone, and less than that takes none."""
    assert chosen(2, 1.0, Bytes(2**64 - 1, 0)) == [0, 1]  # type: ignore[arg-type]
    assert chosen(2, 2.0**-64, Bytes(1, 0)) == [1]  # type: ignore[arg-type]
    assert chosen(2, 2.0**-65, Bytes(1, 0)) == []  # type: ignore[arg-type]


@given(st.integers(1, 2**40), st.integers(0, 2**64 - 1))
def test_below(count: int, value: int) -> None:
    """Inside the range, rising with the bits."""
    assert below(count, Bytes(value)) == value * count // 2**64  # type: ignore[arg-type]
    assert 0 <= below(count, Bytes(value)) < count  # type: ignore[arg-type]


def test_the_systems_entropy_has_nothing_to_set() -> None:
    """No argument, no attribute, new bytes each time."""
    assert not inspect.signature(SystemEntropy).parameters
    with pytest.raises(AttributeError):
        SystemEntropy().seed = 3  # type: ignore[attr-defined]
    assert SystemEntropy().take(32) != SystemEntropy().take(32)
    assert len(SystemEntropy().take(7)) == 7


@pytest.mark.parametrize("count", [1, 4096, 4097, 100_000])
def test_many_bytes_are_as_good_as_few(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as asked, evenly spread, new ones each time; beyond 4 KiB under a new key of 256 bits for each call."""
    asked: list[int] = []
    system = os.urandom

    def noted(number: int) -> bytes:
        asked.append(number)
        return system(number)

    monkeypatch.setattr(os, "urandom", noted)
    first, second = SystemEntropy().take(count), SystemEntropy().take(count)
    assert len(first) == len(second) == count
    assert asked == 2 * ([count] if count <= 4096 else [32, 16])
    if count > 1:
        assert first != second
        assert np.mean(np.frombuffer(first, np.uint8) == np.frombuffer(second, np.uint8)) < 0.02
    if count > 50_000:
        assert chisquare(np.bincount(np.frombuffer(first, np.uint8), minlength=256)).pvalue > 1e-9
