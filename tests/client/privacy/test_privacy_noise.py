"""The noise is Gaussian, of the stated size in every real coordinate, and nobody's seed reaches it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest, pearsonr

from client.privacy.entropy import SeededEntropy, SystemEntropy
from client.privacy.noise import add_noise, standard_normal

N = 200_000
SURE = 1e-4


def test_it_is_normal() -> None:
    """Kolmogorov-Smirnov over 200,000 draws accepts N(0, 1), and rejects 3 % more or less."""
    values = standard_normal(N, SeededEntropy(1)).numpy()
    assert kstest(values, "norm").pvalue > SURE
    assert kstest(values * 1.03, "norm").pvalue < SURE
    assert kstest(values / 1.03, "norm").pvalue < SURE
    assert abs(values.std() - 1) < 0.01


def test_the_tails_are_there() -> None:
    """Beyond 4 standard deviations as many as there should be: a sum of uniforms would have none."""
    from scipy.stats import binomtest, norm

    values = np.abs(standard_normal(2_000_000, SeededEntropy(2)).numpy())
    assert binomtest(int((values > 4).sum()), len(values), 2 * norm.sf(4)).pvalue > SURE
    assert values.max() > 4.5


def test_draws_are_independent() -> None:
    """Of their neighbours, and of their partner in the transform; their squares too."""
    values = standard_normal(N, SeededEntropy(3)).numpy()
    for a, b in ((values[:-1], values[1:]), (values[: N // 2], values[N // 2 :])):
        assert pearsonr(a, b).pvalue > SURE
        assert pearsonr(a**2, b**2).pvalue > SURE


def test_the_extreme_bytes_are_finite() -> None:
    """All zeros and all ones: no logarithm of zero; the farthest draw is 8.57 standard deviations out."""

    class Same:
        testing = True

        def __init__(self, byte: int) -> None:
            self.byte = byte

        def take(self, count: int) -> bytes:
            return bytes([self.byte]) * count

    for byte, radius in ((0, 0.0), (255, 8.5716)):
        pair = standard_normal(2, Same(byte))
        assert bool(pair.isfinite().all())
        assert float(pair.norm()) == pytest.approx(radius, abs=1e-3)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_any_number_of_draws(count: int) -> None:
    """Odd and none too, always float64."""
    values = standard_normal(count, SystemEntropy())
    assert (values.shape, values.dtype) == ((count,), torch.float64)


def parts(value: torch.Tensor) -> list[np.ndarray]:
    """Its real coordinates, axis by axis."""
    return [value.real.numpy().ravel(), value.imag.numpy().ravel()] if value.is_complex() else [value.numpy().ravel()]


def has_size(values: np.ndarray, std: float) -> bool:
    """Whether the sample variance is that of N(0, std**2), at p = 1e-4."""
    statistic = float((values**2).sum()) / std**2
    return bool(chi2.ppf(SURE / 2, len(values)) < statistic < chi2.ppf(1 - SURE / 2, len(values)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_every_real_coordinate_gets_the_whole_size(dtype: torch.dtype) -> None:
    """Within 1 %, for real and for imaginary parts each; independent of each other."""
    total = torch.zeros(400, 500, dtype=dtype)
    add_noise([total], 3.5, SeededEntropy(4))
    for values in parts(total):
        assert abs(values.std() / 3.5 - 1) < 0.01
        assert has_size(values, 3.5)
    if dtype.is_complex:
        assert pearsonr(*parts(total)).pvalue > SURE


def test_torchs_own_complex_noise_would_be_too_small() -> None:
    """Its parts have 0.71 of the size (a library that draws so protects less than it says): the check rejects it."""
    wrong = 3.5 * torch.randn(400, 500, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    assert not any(has_size(values, 3.5) for values in parts(wrong))
    only_real = torch.zeros(400, 500, dtype=torch.complex128)
    only_real.real.normal_(0, 3.5, generator=torch.Generator().manual_seed(0))
    assert [has_size(values, 3.5) for values in parts(only_real)] == [True, False]


def test_it_is_added() -> None:
    """To what is there, in place, each tensor with noise of its own."""
    first, second = torch.full((50,), 100.0, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    add_noise([first, second], 1.0, SystemEntropy())
    assert float(first.min()) > 90
    assert not torch.allclose(first - 100, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_never_in_low_precision(dtype: torch.dtype) -> None:
    """bf16 would round the noise to the sum's own grid."""
    with pytest.raises(ValueError, match="added in float64"):
        add_noise([torch.zeros(3, dtype=dtype)], 1.0, SystemEntropy())


@pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf")])
def test_no_such_size(std: float) -> None:
    """Not negative, not infinite, a number."""
    with pytest.raises(ValueError, match="standard deviation"):
        add_noise([torch.zeros(3, dtype=torch.float64)], std, SystemEntropy())


def test_no_seed_reaches_it() -> None:
    """torch's, numpy's and Python's generators set alike give other noise, and are not drawn from."""
    drawn, states = [], []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        drawn.append(standard_normal(100, SystemEntropy()))
        states.append((float(torch.rand(())), np.random.random(), random.random()))
    assert not torch.equal(*drawn)
    assert states[0] == states[1]


def test_a_seeded_source_repeats_itself() -> None:
    """The same seed gives the same bits, and other ones at the next call."""
    source = SeededEntropy(5)
    first = standard_normal(100, source)
    assert torch.equal(first, standard_normal(100, SeededEntropy(5)))
    assert not torch.equal(first, standard_normal(100, source))
    assert not torch.equal(first, standard_normal(100, SeededEntropy(6)))
