"""FF-Parser and dynamic conditional encoding (Wu et al., MedSegDiff, arXiv 2211.00611, section 3).

Shape suffixes: B cases, C channels, H and W pixels, F = W // 2 + 1 frequencies of a real FFT.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FFParser(nn.Module):
    """A learnable filter in the Fourier domain: m' = irfft2(A * rfft2(m)), a complex factor per channel and frequency.

    The map A is a *real* float32 parameter of shape (C, H, F, 2), last axis (re, im): complex parameters break
    optimizers, aggregators and privacy noise. It starts as the identity (1, 0).

    Guarantees:
        The identity map returns its input up to float32 rounding, at any input size.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.zeros(channels, size, size // 2 + 1, 2))
        nn.init.ones_(self.map[..., 0])

    def forward(self, m_BCHW: Tensor) -> Tensor:
        """Filter feature maps (B, C, H, W); H and W may differ from the size the map was made for."""
        height, width = m_BCHW.shape[-2:]
        # Half precision has no FFT for sizes that are not powers of two, and loses the small coefficients.
        with _full_precision(m_BCHW.device.type):
            wide = m_BCHW if m_BCHW.dtype in (torch.float32, torch.float64) else m_BCHW.float()
            spectrum_BCHF = torch.fft.rfft2(wide)
            map_CHF = torch.view_as_complex(self.map_at(height, width).to(wide.dtype).contiguous())
            filtered = torch.fft.irfft2(spectrum_BCHF * _hermitian(map_CHF, width), s=(height, width))
        narrowed: Tensor = filtered.to(m_BCHW.dtype)
        return narrowed

    def map_at(self, height: int, width: int) -> Tensor:
        """The map for another size, (C, height, width // 2 + 1, 2): A read at its frequencies, bilinearly."""
        rows, columns = self.map.shape[1:3]
        if (height, width // 2 + 1) == (rows, columns):
            return self.map
        # Rows are in FFT order (0, 1, ..., -2, -1); interpolation needs neighbours beside each other.
        shifted = torch.fft.fftshift(self.map, dim=1).permute(0, 3, 1, 2)
        frequency_y = torch.fft.fftshift(torch.fft.fftfreq(height, device=self.map.device, dtype=self.map.dtype))
        frequency_x = torch.fft.rfftfreq(width, device=self.map.device, dtype=self.map.dtype)
        position_y = frequency_y * rows + rows // 2
        position_x = frequency_x * rows  # maps are made square; 2 * (columns - 1) is one short of an odd width
        grid_y = 2 * position_y / max(rows - 1, 1) - 1
        grid_x = 2 * position_x / max(columns - 1, 1) - 1
        grid = torch.stack(torch.broadcast_tensors(grid_x[None, :], grid_y[:, None]), dim=-1)
        read = F.grid_sample(
            shifted, grid.expand(len(shifted), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=True
        )
        back: Tensor = torch.fft.ifftshift(read.permute(0, 2, 3, 1), dim=1)
        return back


def _hermitian(map_CHF: Tensor, width: int) -> Tensor:
    """The part of a map that keeps real features real; what else it holds at f_x = 0 and at Nyquist has no effect.

    Those columns hold each frequency and its mirror. A CPU's inverse transform drops the other part by itself; what a
    GPU's library makes of it is not specified.
    """
    mirrored = map_CHF.flip(1).roll(1, dims=1).conj()
    own_mirror = torch.zeros(map_CHF.shape[2], dtype=torch.bool, device=map_CHF.device)
    own_mirror[0] = True
    if width % 2 == 0:
        own_mirror[-1] = True
    return torch.where(own_mirror, (map_CHF + mirrored) / 2, map_CHF)


def _full_precision(device: str) -> AbstractContextManager[object]:
    """Switches autocast off; shapes-only tensors ("meta") know no autocast."""
    return torch.autocast(device, enabled=False) if device in ("cpu", "cuda") else nullcontext()


class DynamicFusion(nn.Module):
    """Dynamic conditional encoding: A(m_I, m_x) = (LN(m_I) * LN(FF-Parser(m_x))) * m_I, elementwise.

    The noisy mask's features, freed of high-frequency noise by the FF-Parser, tell the image encoder where to look, so
    that image features depend on the diffusion step. The attention is added to m_I rather than put in its place: a
    residual keeps the image readable where the mask is still pure noise.

    Args:
        channels: C of both feature maps.
        size: pixels a side the filter is made for.
        ff_parser: false leaves the filter out, and its parameter with it (the paper's ablation).
    """

    def __init__(self, channels: int, size: int, ff_parser: bool = True) -> None:
        super().__init__()
        self.parser = FFParser(channels, size) if ff_parser else nn.Identity()
        # One group is LayerNorm over (C, H, W): no statistics cross cases, which per-patient privacy relies on.
        self.norm_image = nn.GroupNorm(1, channels)
        self.norm_mask = nn.GroupNorm(1, channels)

    def forward(self, image_BCHW: Tensor, mask_BCHW: Tensor) -> Tensor:
        """Image features made aware of the noisy mask, both (B, C, H, W)."""
        attention = self.norm_image(image_BCHW) * self.norm_mask(self.parser(mask_BCHW))
        fused: Tensor = image_BCHW + attention * image_BCHW
        return fused
