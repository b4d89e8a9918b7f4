"""How a change of weights becomes few bytes, and these the change again: bf16, int8, top-k, each in lossless frames.

Both ends know the run's `Compression` and the model's shapes, so the bytes say nothing of themselves: no header names a
type, a count or a position that could differ from what is there. What is decoded depends on the bytes alone (integers
and single float32 products), so site and server get the same bits, and it is the decoded numbers that a site signs.

    bf16    sign, 8 bits of exponent, 7 of mantissa a value, rounded to nearest even
    int8    a weight's output channels (dimension 0) each with a float32 scale, max |x| / 127; what has few values a
            channel (biases, norms: 0.8% of the tiny model, 0.1% of B) goes as bf16, which is closer
    top_k   the k largest of all values by size, as bf16; the distances between their positions, a byte each

Frames: runs of values, their bytes by significance (exponents together, mantissas together), each deflated by Huffman
codes alone and kept as it is where that is no shorter. Exponents take 2.6 bits so; full deflate finds nothing more and
is several times slower (docs/log.md, 2026-11-26).
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medsegdiff.strict import Strict

RUN = 2**18  # values framed at once: what decoding needs beside the bytes and the result is a few MiB
LEAST_VALUES = 16  # of a channel that gets a scale of its own: below, the scale costs what it saves
ESCAPE = 255  # a distance's byte: so many values further, and go on counting
LARGEST_FRACTION = 0.5  # of values that top_k sends: beyond it bf16 costs less
_SIZE = 4  # bytes of a frame's or a run's length, little endian
_SMALLEST = float(np.finfo(np.float32).tiny)
_LARGEST_SCALE = np.float32(np.finfo(np.float32).max / 127)  # 127 times it is still a number

Kind = Literal["none", "bf16", "int8", "top_k"]
U = TypeVar("U", np.uint16, np.uint32)
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Compression(Strict):
    """What becomes of a change of weights before it leaves a site."""

    kind: Kind = "none"
    fraction: float | None = None  # top_k: share of the values that is sent, in (0, 0.5]

    def __post_init__(self) -> None:
        if (self.kind == "top_k") != (self.fraction is not None):
            raise ValueError(
                f"fraction is {self.fraction} with kind {self.kind}: top_k needs one in (0, {LARGEST_FRACTION}], e.g. "
                "0.1, the others none"
            )
        if self.fraction is not None and not 0 < self.fraction <= LARGEST_FRACTION:
            raise ValueError(f"fraction must lie in (0, {LARGEST_FRACTION}], found {self.fraction}")

    @property
    def feeds_back(self) -> bool:
        """Whether a site keeps what was not sent and adds it to its next change (Seide et al. 2014)."""
        return self.kind in ("int8", "top_k")

    def sent(self, values: int) -> int:
        """How many of so many values top_k sends: the fraction, rounded up."""
        assert self.fraction is not None
        return min(values, math.ceil(self.fraction * values))


class Pieces:
    """Bytes as they came, in pieces: what was decoded of them is freed while the rest is decoded. To be read once."""

    def __init__(self, pieces: Iterable[memoryview]) -> None:
        self.left = deque(piece for piece in pieces if len(piece))
        self.size = sum(map(len, self.left))
        self._size = self.size

    def __len__(self) -> int:
        """How many there were."""
        return self._size


Data = bytes | memoryview | Pieces


def encode(tensors: Mapping[str, Tensor], compression: Compression) -> bytes:
    """Float32 tensors as bytes, in the order of their names.

    Raises:
        ValueError: a value is not finite, or there is no compression to be done.
    """
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"'{name}' holds values that are not finite")
    values = {name: tensors[name].detach().cpu().contiguous().numpy() for name in sorted(tensors)}
    match compression.kind:
        case "bf16":
            parts = _encode_bf16(_flat(list(values.values())))
        case "int8":
            parts = _encode_int8(values)
        case "top_k":
            parts = _encode_top_k(_flat(list(values.values())), compression)
        case _:
            raise ValueError("no compression was chosen")
    return b"".join(parts)


def decode(data: Data, compression: Compression, expected: Shapes) -> dict[str, Tensor]:
    """What `encode` was given, as near as the compression keeps it.

    Memory: the result, and a few MiB; of `Pieces`, less what was read of them. A frame is inflated up to the length
    that is due and no further.

    Args:
        expected: the exact names and shapes.

    Raises:
        ValueError: anything but the bytes of one change of these shapes: too few or too many, a frame of another
            length, a scale or a value that is not finite, positions beyond the model, an encoding that `encode` would
            not have chosen.
    """
    least, most = _bounds(compression, expected)
    if not least <= len(data) <= most:
        raise ValueError(f"it has {len(data)} bytes, {least} to {most} are possible")
    reader = _Reader(data)
    match compression.kind:
        case "bf16":
            flat, tensors = _empty(expected, sorted(expected))
            _decode_bf16(reader, flat)
        case "int8":
            tensors = _decode_int8(reader, expected)
        case _:
            flat, tensors = _empty(expected, sorted(expected))
            _decode_top_k(reader, flat, compression)
    reader.end()
    return {name: tensors[name] for name in expected}


def largest_size(compression: Compression, shapes: Shapes) -> int:
    """Most bytes that a change of these shapes can take: to bound what is fetched before it is looked at."""
    return _bounds(compression, shapes)[1]


def likely_size(compression: Compression, shapes: Shapes) -> int:
    """About how many bytes a change of these shapes takes, by what was measured (docs/log.md, 2026-11-26)."""
    values = _count(shapes.values())
    match compression.kind:
        case "none":
            return 4 * values
        case "bf16":
            return math.ceil(1.34 * values)
        case "int8":
            wide = [shape for shape in shapes.values() if _is_wide(shape)]
            return math.ceil(0.95 * _count(wide) + 1.4 * (values - _count(wide)) + 4 * sum(s[0] for s in wide))
        case "top_k":
            sent = compression.sent(values)
            share = sent / max(1, values)
            entropy = -math.log2(share) - (1 - share) / share * math.log2(1 - share) if 0 < share < 1 else 0.0
            return math.ceil(sent * (1.1 + entropy / 8))


def _bounds(compression: Compression, shapes: Shapes) -> tuple[int, int]:
    """Least and most bytes of a change of these shapes."""
    values = _count(shapes.values())
    match compression.kind:
        case "none":
            return 4 * values, 4 * values
        case "bf16":
            return _frame_bounds(values, 2)
        case "int8":
            wide = [shape for shape in shapes.values() if _is_wide(shape)]
            parts = [
                _frame_bounds(sum(shape[0] for shape in wide), 4),
                _frame_bounds(_count(wide), 1),
                _frame_bounds(values - _count(wide), 2),
            ]
            return sum(least for least, _ in parts), sum(most for _, most in parts)
        case "top_k":
            sent = compression.sent(values)
            least, most = _frame_bounds(sent, 3)
            runs = math.ceil(sent / RUN)
            return least + _SIZE * runs, most + _SIZE * runs + values // ESCAPE


def _frame_bounds(values: int, width: int) -> tuple[int, int]:
    """Of the frames of so many values of so many bytes."""
    frames = width * math.ceil(values / RUN)
    return (_SIZE + 1) * frames, _SIZE * frames + width * values


# --- bf16 -------------------------------------------------------------------------------------------------------------


def _encode_bf16(flat: NDArray[np.float32]) -> Iterator[bytes]:
    for begin in range(0, len(flat), RUN):
        yield from _planes(_rotated(flat[begin : begin + RUN]))


def _decode_bf16(reader: _Reader, out: NDArray[np.float32]) -> None:
    for begin in range(0, len(out), RUN):
        run = out[begin : begin + RUN]
        run[:] = _unrotated(_read_planes(reader, len(run), np.uint16))


def _rotated(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bf16 nearest to each value, ties to even, its sign moved behind the mantissa: so the exponent is a byte."""
    bits = values.view(np.uint32)
    half = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)
    return (half << np.uint16(1)) | (half >> np.uint16(15))


def _unrotated(found: NDArray[np.uint16]) -> NDArray[np.float32]:
    if len(found) and int(found.max()) >= 0xFF00:
        raise ValueError("it holds values that are not finite")
    half = (found >> np.uint16(1)) | (found << np.uint16(15))
    bits: NDArray[np.uint32] = half.astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32)


# --- int8 -------------------------------------------------------------------------------------------------------------


def _is_wide(shape: tuple[int, ...]) -> bool:
    """Whether the channels of a weight get scales of their own."""
    return len(shape) >= 2 and shape[0] > 0 and math.prod(shape[1:]) >= LEAST_VALUES


def _encode_int8(values: Mapping[str, NDArray[np.float32]]) -> Iterator[bytes]:
    wide = [value.reshape(value.shape[0], -1) for value in values.values() if _is_wide(value.shape)]
    scales = [_scales(value) for value in wide]
    flat_scales = _flat(scales)
    for begin in range(0, len(flat_scales), RUN):
        yield from _planes(flat_scales[begin : begin + RUN].view(np.uint32))
    codes = [_codes(value, scale) for value, scale in zip(wide, scales, strict=True)]
    flat = np.concatenate(codes) if codes else np.empty(0, np.int8)
    for begin in range(0, len(flat), RUN):
        yield _frame(flat[begin : begin + RUN].tobytes())
    yield from _encode_bf16(_flat([value for value in values.values() if not _is_wide(value.shape)]))


def _scales(channels: NDArray[np.float32]) -> NDArray[np.float32]:
    """max |x| / 127 of each row; 0 where that is no normal number, and the row is then sent as zeros."""
    scales: NDArray[np.float32] = (np.maximum(channels.max(1), -channels.min(1)) / np.float32(127)).astype(np.float32)
    scales[scales < _SMALLEST] = 0
    return scales


def _codes(channels: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.int8]:
    found = np.divide(channels, scales[:, None], out=np.zeros_like(channels), where=scales[:, None] > 0)
    return np.clip(np.rint(found, out=found), -127, 127).astype(np.int8).reshape(-1)


def _decode_int8(reader: _Reader, expected: Shapes) -> dict[str, Tensor]:
    wide = [name for name in sorted(expected) if _is_wide(expected[name])]
    narrow = [name for name in sorted(expected) if not _is_wide(expected[name])]
    scales = np.empty(sum(expected[name][0] for name in wide), np.float32)
    for begin in range(0, len(scales), RUN):
        run = scales[begin : begin + RUN]
        run[:] = _read_planes(reader, len(run), np.uint32).view(np.float32)
    if not (np.isfinite(scales).all() and (np.signbit(scales) == 0).all()):
        raise ValueError("it holds a scale that is negative or not finite")
    if (scales > _LARGEST_SCALE).any():
        raise ValueError("it holds values that are not finite")
    if ((scales > 0) & (scales < _SMALLEST)).any():
        raise ValueError("it holds a scale that is no normal number")
    flat, tensors = _empty(expected, wide)
    for begin in range(0, len(flat), RUN):
        run = flat[begin : begin + RUN]
        run[:] = np.frombuffer(reader.frame(len(run)), np.int8)
    at = channel = 0
    for name in wide:
        shape = expected[name]
        rows = flat[at : at + math.prod(shape)].reshape(shape[0], -1)
        own = scales[channel : channel + shape[0]]
        # The largest code of a channel is what its scale was made of: 127, or 0 where the scale is 0.
        if not (np.maximum(rows.max(1), -rows.min(1)) == np.where(own > 0, 127, 0)).all():
            raise ValueError(f"'{name}' holds a channel whose largest code is not 127, or whose scale is 0")
        np.multiply(rows, own[:, None], out=rows)
        at, channel = at + math.prod(shape), channel + shape[0]
    rest, others = _empty(expected, narrow)
    _decode_bf16(reader, rest)
    return tensors | others


# --- top-k ------------------------------------------------------------------------------------------------------------


def _encode_top_k(flat: NDArray[np.float32], compression: Compression) -> Iterator[bytes]:
    positions = _largest(flat, compression.sent(len(flat)))
    last = -1
    for begin in range(0, len(positions), RUN):
        run = positions[begin : begin + RUN]
        steps = np.diff(run, prepend=last) - 1  # values left out before each
        escapes = steps // ESCAPE
        coded = np.full(len(run) + int(escapes.sum()), ESCAPE, np.uint8)
        coded[np.cumsum(escapes + 1) - 1] = steps % ESCAPE
        yield len(coded).to_bytes(_SIZE, "little")
        yield _frame(coded.tobytes())
        yield from _planes(_rotated(flat[run]))
        last = int(run[-1])


def _largest(flat: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Positions of the `count` largest |x|, rising; of equals at the border the first ones."""
    if count == 0:
        return np.empty(0, np.int64)
    size = np.abs(flat)
    border = np.partition(size, len(size) - count)[len(size) - count]
    above = np.flatnonzero(size > border)
    equal = np.flatnonzero(size == border)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _decode_top_k(reader: _Reader, out: NDArray[np.float32], compression: Compression) -> None:
    left, last = compression.sent(len(out)), -1
    while left:
        count = min(left, RUN)
        length = int.from_bytes(reader.take(_SIZE), "little")
        if not count <= length <= count + len(out) // ESCAPE:
            raise ValueError(f"{count} positions are due, {length} bytes are given for them")
        coded = np.frombuffer(reader.frame(length), np.uint8)
        is_value = coded != ESCAPE
        if int(is_value.sum()) != count or not is_value[-1]:
            raise ValueError(f"{count} positions are due, {int(is_value.sum())} are given")
        # An escape moves by 255; a value by what was left out before it, and by itself: positions rise by construction.
        positions = last + np.cumsum(coded + is_value.astype(np.int64))[is_value]
        last = int(positions[-1])
        if last >= len(out):
            raise ValueError(f"a position is beyond the model's {len(out)} values")
        out[positions] = _unrotated(_read_planes(reader, count, np.uint16))
        left -= count


# --- frames -----------------------------------------------------------------------------------------------------------


def _planes(numbers: NDArray[Any]) -> Iterator[bytes]:
    """Unsigned integers as a frame a byte: the most significant bytes of all first."""
    width = numbers.dtype.itemsize
    for place in reversed(range(width)):
        yield _frame((numbers >> numbers.dtype.type(8 * place)).astype(np.uint8).tobytes())


def _read_planes(reader: _Reader, count: int, kind: type[U]) -> NDArray[U]:
    numbers = np.zeros(count, kind)
    for place in reversed(range(numbers.itemsize)):
        plane = np.frombuffer(reader.frame(count), np.uint8)
        numbers |= plane.astype(kind) << kind(8 * place)
    return numbers


def _frame(raw: bytes) -> bytes:
    """Length and bytes: deflated (RFC 1951) where that is shorter, else as they are."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    packed = deflate.compress(raw) + deflate.flush()
    body = packed if len(packed) < len(raw) else raw
    return len(body).to_bytes(_SIZE, "little") + body


class _Reader:
    """Bytes from the first to the last; pieces are let go of once they were read."""

    def __init__(self, data: Data) -> None:
        self._pieces = data if isinstance(data, Pieces) else Pieces([memoryview(data)])

    def take(self, size: int) -> memoryview | bytes:
        """The next `size` bytes; without a copy where they lie in one piece."""
        pieces, found = self._pieces.left, []
        if size > self._pieces.size:
            raise ValueError(f"it ends {size - self._pieces.size} bytes too soon")
        self._pieces.size -= size
        while size:
            piece = pieces.popleft()
            found.append(piece[:size])
            if size < len(piece):
                pieces.appendleft(piece[size:])
            size -= len(found[-1])
        return found[0] if len(found) == 1 else b"".join(found)

    def frame(self, raw: int) -> bytes | memoryview:
        """The next frame, which holds `raw` bytes; no more than these, and one, are ever made of it."""
        size = int.from_bytes(self.take(_SIZE), "little")
        if size > raw:
            raise ValueError(f"a frame of {raw} bytes takes {size}")
        body = self.take(size)
        if size == raw:
            return body
        inflate = zlib.decompressobj(-15)
        try:
            found = inflate.decompress(body, raw + 1)
        except zlib.error as error:
            raise ValueError(f"a frame cannot be inflated ({error})") from None
        if len(found) != raw or not inflate.eof or inflate.unused_data or inflate.unconsumed_tail:
            raise ValueError(f"a frame does not hold the {raw} bytes that are due and nothing else")
        return found

    def end(self) -> None:
        """Raises ValueError where something follows."""
        if self._pieces.size:
            raise ValueError(f"{self._pieces.size} bytes follow its end")


def _count(shapes: Any) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _flat(values: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    if not values:
        return np.empty(0, np.float32)
    return np.concatenate([value.reshape(-1) for value in values]).astype(np.float32, copy=False)


def _empty(expected: Shapes, names: list[str]) -> tuple[NDArray[np.float32], dict[str, Tensor]]:
    """Zeros for these weights, and the weights in them. The system gives zeros without writing them."""
    flat, tensors, at = np.zeros(_count(expected[name] for name in names), np.float32), {}, 0
    for name in names:
        size = math.prod(expected[name])
        tensors[name] = torch.from_numpy(flat[at : at + size].reshape(expected[name]))
        at += size
    return flat, tensors
