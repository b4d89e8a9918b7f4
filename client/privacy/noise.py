"""Gaussian noise from the operating system's entropy.

Floating point (Mironov 2012, "On significance of the least significant bits for differential privacy"): a sampler
reaches only some float64 numbers, and which sums x + noise can be reached depends on x, so that low-order bits may tell
x. What is done about it: sums, noise and their addition are float64, made from 53 uniform bits each, and what leaves is
rounded to float32. A float32 near the sum stands for about 2**29 float64 numbers, so the pattern of reachable numbers,
which the attack needs, is gone. That is a hardening, not a proof: the epsilon stated is that of real-valued noise.
Box-Muller from 53 bits ends at 8.57 standard deviations; the mass beyond is 2**-53 a pair, far below any delta.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from client.privacy.entropy import Entropy

_BITS = 53  # of a float64's significand
_BLOCK = 2**16  # draws at once on a CPU, whose temporaries then stay in its cache: a third of the time
_AT_ONCE = 2**24  # and on a GPU, where few large transfers are faster than many


def standard_normal(count: int, entropy: Entropy, device: torch.device | str = "cpu") -> Tensor:
    """Independent draws of N(0, 1), (count,), float64, on `device` (Box and Muller 1958).

    The bytes come from `entropy`; the device turns them into numbers and draws none itself.
    """
    block = _at_once(torch.device(device))
    if count > block:
        return torch.cat([standard_normal(min(block, count - at), entropy, device) for at in range(0, count, block)])
    pairs = (count + 1) // 2
    if pairs == 0:
        return torch.empty(0, dtype=torch.float64, device=device)
    raw = torch.frombuffer(bytearray(entropy.take(16 * pairs)), dtype=torch.int64).to(device)
    uniform = ((raw >> (64 - _BITS)) & (2**_BITS - 1)).to(torch.float64).mul_(2.0**-_BITS)  # [0, 1)
    radius = uniform[:pairs].neg_().add_(1.0).log_().mul_(-2.0).sqrt_()  # of 1 - u in (0, 1]: no log of 0
    angle = uniform[pairs:].mul_(2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def _at_once(device: torch.device) -> int:
    return _BLOCK if device.type == "cpu" else _AT_ONCE


def add_noise(sums: Iterable[Tensor], std: float, entropy: Entropy) -> None:
    """Add N(0, std**2) to every real coordinate, in place.

    A complex tensor is a pair of real ones: real and imaginary parts get independent noise of the full std each, as
    the 2-norm that clipping bounds counts both.

    Args:
        sums: float64 or complex128, any shape.
        std: standard deviation; finite, not negative.

    Raises:
        ValueError: a tensor of lower precision (noise is never added in float32 or bf16), or no such std.
    """
    if not 0 <= std < math.inf:
        raise ValueError(f"the noise's standard deviation must be finite and not negative, found {std}")
    totals = list(sums)
    for total in totals:
        if total.dtype not in (torch.float64, torch.complex128):
            raise ValueError(f"noise is added in float64, found {total.dtype}")
    reals = [torch.view_as_real(total) if total.is_complex() else total for total in totals]
    for group in _groups(reals):
        drawn = standard_normal(sum(real.numel() for real in group), entropy, group[0].device).mul_(std)
        for real, part in zip(group, drawn.split([real.numel() for real in group]), strict=True):
            real.add_(part.view(real.shape))


def _groups(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one device that are drawn for together: a network has many small ones, and a draw costs a while."""
    group: list[Tensor] = []
    for tensor in tensors:
        size = sum(other.numel() for other in group) + tensor.numel()
        if group and (tensor.device != group[0].device or size > _at_once(tensor.device)):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group
