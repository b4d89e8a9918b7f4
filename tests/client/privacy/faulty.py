"""Networks that one engine or another gets wrong, and rows for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.client.privacy.rows import Rows

SIDE, CHANNELS = 6, 4


def some_patients(counts: tuple[int, ...] = (1, 3, 2), size: float = 1.0, seed: int = 0) -> list[Rows]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: size * torch.randn(n, CHANNELS, SIDE, SIDE, generator=generator) for name in ("x", "y")} for n in counts
    ]


def squared_error(net: nn.Module, rows: Rows) -> Tensor:
    return (net(rows["x"]) - rows["y"]).square().mean()


class Plain(nn.Module):
    """Convolution, group norm, convolution: nothing wrong with it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm = nn.GroupNorm(2, CHANNELS)
        self.last = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def middle(self, h: Tensor) -> Tensor:
        return F.silu(self.norm(h))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.middle(self.first(x)))
        return out


def plain_net(seed: int = 0) -> Plain:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Plain()


class WithBatchNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)  # type: ignore[assignment]


class Reflecting(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="reflect")


class InPlace(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.ReLU(inplace=True)

    def middle(self, h: Tensor) -> Tensor:
        out: Tensor = self.activation(self.norm(h))
        return out


class Gate(nn.Module):
    """A parameter of its own, and a second input that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(CHANNELS, 1, 1))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return torch.tanh(self.scale * (x if other is None else x + 2 * other))


class TwoInputs(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        out: Tensor = self.last(self.gate(self.norm(h), h))
        return out


class Broadcast(Plain):
    """A code that is the same for all rows goes through a Linear once and is broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(3, CHANNELS)

    def middle(self, h: Tensor) -> Tensor:
        return super().middle(h) + self.code(torch.ones(1, 3))[:, :, None, None]


class Complex(Plain):
    """A complex filter between Fourier transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.ones(CHANNELS, SIDE, SIDE // 2 + 1, dtype=torch.complex64))

    def middle(self, h: Tensor) -> Tensor:
        return super().middle(torch.fft.irfft2(torch.fft.rfft2(h) * self.filter, s=(SIDE, SIDE)))


class Unused(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Conv2d(CHANNELS, CHANNELS, 1)


class Counting(Plain):
    """Keeps a running mean of what it saw in a buffer, as BatchNorm does, under another name."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(CHANNELS))

    def middle(self, h: Tensor) -> Tensor:
        self.seen.lerp_(h.detach().mean(dim=(0, 2, 3)), 0.1)
        return super().middle(h)


class Moving(Plain):
    """Changes a frozen parameter while it looks at patients."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(CHANNELS, 1, 1), requires_grad=False)

    def middle(self, h: Tensor) -> Tensor:
        self.centre.data.lerp_(h.detach().mean(dim=(0, 2, 3))[:, None, None], 0.1)
        return super().middle(h - self.centre)


class Remembering(Plain):
    """Adds what it saw last time: no module says so, only the numbers do."""

    def __init__(self) -> None:
        super().__init__()
        self._last: list[Tensor] = []

    def middle(self, h: Tensor) -> Tensor:
        before = self._last.pop() if self._last else torch.zeros(())
        self._last.append(h.detach().mean())
        return super().middle(h) + before * h


class Mixing(Plain):
    """Centres over rows by hand."""

    def middle(self, h: Tensor) -> Tensor:
        return super().middle(h - h.mean(dim=0, keepdim=True))


class ChannelsLast(Plain):
    """Hands a convolution its input with channels innermost."""

    def middle(self, h: Tensor) -> Tensor:
        return super().middle(h).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
