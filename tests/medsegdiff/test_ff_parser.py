"""The Fourier filter against numpy's, and the fusion that rests on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from medsegdiff.ff_parser import DynamicFusion, FFParser, _hermitian


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def low_pass(height: int, width: int) -> NDArray[np.float64]:
    """A Gaussian over the frequencies of a real FFT, (height, width // 2 + 1), written from numpy's own tables."""
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    return np.exp(-(x**2 + y**2) / (2 * 0.2**2))


def set_map(parser: FFParser, real: NDArray[np.float64], imaginary: NDArray[np.float64] | float = 0.0) -> None:
    with torch.no_grad():
        parser.map[..., 0] = torch.from_numpy(np.array(real))
        parser.map[..., 1] = torch.from_numpy(np.broadcast_to(imaginary, np.shape(real)).copy())


@settings(max_examples=30, deadline=None)
@given(made=st.integers(1, 17), height=st.integers(1, 21), width=st.integers(1, 21))
def test_a_fresh_parser_is_the_identity_at_any_size(made: int, height: int, width: int) -> None:
    """The identity map returns its input to 1e-6, at the size it was made for and at any other, odd ones included."""
    m = features(2, 3, height, width)
    torch.testing.assert_close(FFParser(3, made)(m), m, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [8, 9])
def test_a_map_equals_numpys_filter(size: int) -> None:
    """A complex map, one per channel, gives what numpy's FFT gives."""
    rng = np.random.default_rng(0)
    real, imaginary = rng.normal(size=(2, 3, size, size // 2 + 1))
    parser = FFParser(3, size)
    set_map(parser, real, imaginary)
    m = features(2, 3, size, size)
    spectrum = np.fft.rfft2(m.numpy().astype(np.float64))
    filtered = parser(m).detach().numpy()
    np.testing.assert_allclose(filtered, np.fft.irfft2(spectrum * (real + 1j * imaginary), s=(size, size)), atol=1e-5)
    assert np.abs(filtered - np.fft.irfft2(spectrum * real, s=(size, size))).max() > 0.1, "the phase counts"


@pytest.mark.parametrize("shape", [(12, 12), (9, 9)])
def test_a_low_pass_map_equals_numpys_filter(shape: tuple[int, int]) -> None:
    """A Gaussian low-pass gives what numpy's FFT gives; its rows out of FFT order, or rounded to bfloat16, do not."""
    parser, m = FFParser(2, shape[0]), features(2, 2, *shape)
    expected = np.fft.irfft2(np.fft.rfft2(m.numpy().astype(np.float64)) * low_pass(*shape), s=shape)
    set_map(parser, low_pass(*shape))
    np.testing.assert_allclose(parser(m).detach().numpy(), expected, atol=1e-6)
    set_map(parser, low_pass(*shape).astype(np.float32))
    with torch.no_grad():
        parser.map.copy_(parser.map.bfloat16())
    assert np.abs(parser(m).detach().numpy() - expected).max() > 1e-4
    set_map(parser, np.fft.fftshift(low_pass(*shape), axes=0))
    assert np.abs(parser(m).detach().numpy() - expected).max() > 0.1


def test_a_low_pass_map_takes_the_high_frequency_and_leaves_the_low_one() -> None:
    """Under a box filter a checkerboard vanishes and a slow wave stays."""
    size = 16
    parser = FFParser(1, size)
    y, x = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    set_map(parser, ((np.abs(y) < 0.2) & (np.abs(x) < 0.2)).astype(np.float64))
    column = torch.arange(size, dtype=torch.float32)
    slow = torch.cos(2 * torch.pi * 2 * column / size).expand(1, 1, size, size)
    checkerboard = ((-1.0) ** (column[:, None] + column[None, :])).expand(1, 1, size, size)
    torch.testing.assert_close(parser(slow + checkerboard), slow, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(6, 6), (5, 7)])
def test_gradients_are_those_of_finite_differences(shape: tuple[int, int]) -> None:
    """The gradients by input and by map pass gradcheck in float64, also where the map is interpolated."""
    parser = FFParser(2, 6).double()
    map_ = (parser.map + 0.3 * features(*parser.map.shape, dtype=torch.float64)).detach().requires_grad_()
    m = features(1, 2, *shape, dtype=torch.float64, seed=1).requires_grad_()

    def filtered(m: Tensor, map_: Tensor) -> Tensor:
        return torch.func.functional_call(parser, {"map": map_}, (m,))

    assert torch.autograd.gradcheck(filtered, (m, map_))


@pytest.mark.parametrize("made", [32, 33])
@pytest.mark.parametrize("size", [(48, 48), (31, 45), (24, 20)])
def test_a_smooth_map_keeps_its_meaning_at_another_size(made: int, size: tuple[int, int]) -> None:
    """A Gaussian low-pass made for one size is, read at another, the Gaussian of that size's frequencies."""
    parser = FFParser(1, made)
    set_map(parser, low_pass(made, made))
    read = parser.map_at(*size)[0, ..., 0].detach().numpy()
    expected = low_pass(*size)
    assert np.abs(read - expected).max() < 0.02
    assert np.abs(read - np.fft.fftshift(expected, axes=0)).max() > 0.5, "an unshifted map must not pass"


def test_an_odd_map_reads_the_columns_at_their_own_frequencies() -> None:
    """The last column of a map for 9 pixels is the frequency 4/9, not 1/2."""
    parser = FFParser(1, 9)
    set_map(parser, np.broadcast_to(np.fft.rfftfreq(9)[None, :], (9, 5)))
    read = parser.map_at(18, 18)[0, 0, :, 0].detach().numpy()
    np.testing.assert_allclose(read[:-1], np.fft.rfftfreq(18)[:-1], atol=1e-6)


def test_half_precision_is_filtered_in_full_precision() -> None:
    """Under autocast and for bfloat16 input the FFT works in float32; the type of the input comes back."""
    parser = FFParser(2, 12)
    m = features(1, 2, 12, 12).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = parser(m)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, m)


def test_autocast_does_not_touch_the_filter() -> None:
    """float32 features leave a random filter under autocast as they do without; a bfloat16 spectrum would show."""
    parser, m = FFParser(2, 12), features(2, 2, 12, 12)
    set_map(parser, *np.random.default_rng(0).normal(size=(2, 2, 12, 7)))
    expected = parser(m)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(parser(m), expected, atol=1e-6, rtol=1e-6)
    spectrum = torch.view_as_real(torch.fft.rfft2(m)).bfloat16().float()
    rounded = torch.fft.irfft2(torch.view_as_complex(spectrum) * torch.view_as_complex(parser.map), s=(12, 12))
    assert float((rounded - expected).abs().max()) > 1e-3


def test_the_map_is_one_real_parameter() -> None:
    """Complex parameters break optimizers, aggregation and privacy noise."""
    parser = FFParser(3, 10)
    assert [(name, tuple(p.shape), p.dtype) for name, p in parser.named_parameters()] == [
        ("map", (3, 10, 6, 2), torch.float32)
    ]


def test_fusion_is_the_papers_formula_beside_the_image() -> None:
    """m_I + LN(m_I) LN(FF(m_x)) m_I, with LayerNorm over channels and pixels, written out in numpy."""
    fusion = DynamicFusion(4, 8)
    image, mask = features(2, 4, 8, 8), features(2, 4, 8, 8, seed=1)

    def norm(x: Tensor) -> NDArray[np.float64]:
        a = x.numpy().astype(np.float64)
        return (a - a.mean((1, 2, 3), keepdims=True)) / np.sqrt(a.var((1, 2, 3), keepdims=True) + 1e-5)

    expected = image.numpy() * (1 + norm(image) * norm(mask))
    np.testing.assert_allclose(fusion(image, mask).detach().numpy(), expected, atol=1e-4)


def test_fusion_without_its_parser_sees_the_mask_unfiltered() -> None:
    """The ablation has no map and equals the fusion whose map is the identity; with another map it does not."""
    with_parser, without = DynamicFusion(4, 8), DynamicFusion(4, 8, ff_parser=False)
    assert set(dict(with_parser.named_parameters())) - set(dict(without.named_parameters())) == {"parser.map"}
    image, mask = features(2, 4, 8, 8), features(2, 4, 8, 8, seed=1)
    torch.testing.assert_close(without(image, mask), with_parser(image, mask), atol=1e-5, rtol=1e-5)
    assert isinstance(with_parser.parser, FFParser)
    set_map(with_parser.parser, low_pass(8, 8))
    assert float((without(image, mask) - with_parser(image, mask)).abs().max()) > 0.1


def test_fusion_depends_on_both_inputs_and_mixes_no_cases() -> None:
    """Either input changes the result; another case in the batch does not."""
    fusion = DynamicFusion(4, 8)
    image, mask = features(2, 4, 8, 8), features(2, 4, 8, 8, seed=1)
    out = fusion(image, mask)
    assert not torch.allclose(out, fusion(image, mask.flip(0)), atol=1e-2)
    assert not torch.allclose(out, fusion(image.flip(0), mask), atol=1e-2)
    torch.testing.assert_close(out[:1], fusion(image[:1], mask[:1]))


@pytest.mark.parametrize("size", [8, 9])
def test_any_map_is_a_filter_that_keeps_features_real(size: int) -> None:
    """A random map equals numpy's full complex FFT with its Hermitian extension, whatever its edge columns hold."""
    generator = np.random.default_rng(0)
    parser = FFParser(1, size)
    columns = size // 2 + 1
    half = generator.normal(size=(size, columns)) + 1j * generator.normal(size=(size, columns))
    with torch.no_grad():
        parser.map.copy_(torch.view_as_real(torch.from_numpy(half).to(torch.complex64))[None])
    mirror = (-np.arange(size)) % size
    full = np.zeros((size, size), dtype=complex)
    full[:, :columns] = half
    for column in range(columns, size):
        full[:, column] = half[mirror, size - column].conj()
    for column in {0, size // 2} if size % 2 == 0 else {0}:
        full[:, column] = (half[:, column] + half[mirror, column].conj()) / 2
    m = generator.normal(size=(size, size))
    expected = np.fft.ifft2(np.fft.fft2(m) * full)
    assert np.abs(expected.imag).max() < 1e-12, "a real filter"
    found = parser(torch.from_numpy(m).float()[None, None])[0, 0].detach().numpy()
    np.testing.assert_allclose(found, expected.real, atol=1e-5)
    assert not torch.allclose(torch.view_as_complex(parser.map), _hermitian(torch.view_as_complex(parser.map), size))


@pytest.mark.gpu
def test_a_gpu_filters_as_a_cpu_does() -> None:
    """A random map, whose edge columns no library need understand, gives the same features on both."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    parser = FFParser(3, 16)
    with torch.no_grad():
        parser.map.copy_(torch.randn(parser.map.shape, generator=torch.Generator().manual_seed(0)))
    m = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(parser.cuda()(m.cuda()).cpu(), parser.cpu()(m), rtol=1e-4, atol=1e-4)
