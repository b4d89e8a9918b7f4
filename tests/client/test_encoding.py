"""Compressed changes: what is decoded is what a slow, obvious version says, and nothing else is decoded at all."""

from __future__ import annotations

import math
import time
import tracemalloc
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client import encoding
from client.contract import PACKED, ContractError, arrays_from_wire, arrays_to_wire
from client.encoding import Compression, decode, encode, largest_size, likely_size

BF16, INT8, TENTH = Compression("bf16"), Compression("int8"), Compression("top_k", 0.1)
KINDS = [BF16, INT8, TENTH, Compression("top_k", 0.5), Compression("top_k", 0.001)]
Tensors = dict[str, torch.Tensor]


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def change(seed: int = 0, scale: float = 1e-2) -> Tensors:
    """Convolutions, a matrix, norms, a scalar and an empty weight."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "conv.w": (8, 3, 3, 3),
        "conv.b": (8,),
        "fc": (5, 40),
        "thin": (6, 2),
        "tau": (),
        "none": (0, 7),
        "n": (9,),
    }
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def slow_bf16(value: float) -> float:
    """The nearest number with 8 significant bits, ties to even, by exact fractions."""
    if value == 0:
        return value
    exact = Fraction(value)
    exponent = max(math.frexp(value)[1] - 1, -126)
    unit = Fraction(2) ** (exponent - 7)
    return math.copysign(float(round(exact / unit) * unit), value)  # Fraction rounds halves to even


def slow_int8(tensors: Tensors) -> Tensors:
    """A channel at a time, a value at a time."""
    found = {}
    for name, value in tensors.items():
        result = value.clone()
        if value.dim() < 2 or math.prod(value.shape[1:]) < 16:
            found[name] = torch.tensor([slow_bf16(float(x)) for x in value.reshape(-1)]).reshape(value.shape)
            continue
        for channel in range(value.shape[0]):
            row = result[channel].reshape(-1)
            scale = np.float32(max(abs(float(x)) for x in row)) / np.float32(127)
            for i in range(len(row)):
                row[i] = float(np.float32(round(float(np.float32(row[i]) / scale))) * scale) if scale else 0.0
            result[channel] = row.reshape(result[channel].shape)
        found[name] = result
    return found


def slow_top_k(tensors: Tensors, count: int) -> Tensors:
    """All values in the order of names, sorted by size, the first of equals first."""
    places = [(name, i) for name in sorted(tensors) for i in range(tensors[name].numel())]
    size = {place: abs(float(tensors[place[0]].reshape(-1)[place[1]])) for place in places}
    kept = sorted(places, key=lambda place: -size[place])[:count]  # stable
    found = {name: torch.zeros_like(value) for name, value in tensors.items()}
    for name, i in kept:
        found[name].reshape(-1)[i] = slow_bf16(float(tensors[name].reshape(-1)[i]))
    return found


def slow(tensors: Tensors, compression: Compression) -> Tensors:
    if compression.kind == "int8":
        return slow_int8(tensors)
    count = sum(value.numel() for value in tensors.values())
    if compression.kind == "top_k":
        count = min(count, math.ceil(compression.fraction * count))
    return slow_top_k(tensors, count)


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("compression", KINDS, ids=str)
def test_decoded_is_what_the_slow_version_says(compression) -> None:
    """Bit for bit, over scales from denormal to huge; every weight keeps its name, shape and type."""
    for seed, scale in enumerate((1e-44, 1e-39, 1e-3, 1.0, 1e30)):
        tensors = change(seed, scale)
        found = decode(encode(tensors, compression), compression, shapes_of(tensors))
        assert list(found) == list(tensors)
        assert all(value.dtype == torch.float32 for value in found.values())
        assert shapes_of(found) == shapes_of(tensors)
        if scale > 1e-30 or compression.kind != "int8":
            assert same(found, slow(tensors, compression)), scale
        else:  # a scale below float32's normal numbers is 0
            assert all(not found[name].any() for name in ("conv.w", "fc"))


@pytest.mark.parametrize("compression", KINDS, ids=str)
def test_what_is_lost_is_bounded(compression) -> None:
    """bf16 a 256th of each value; int8 half a step of its channel; top-k no more than what the kept values leave."""
    tensors = change(3)
    found = decode(encode(tensors, compression), compression, shapes_of(tensors))
    for name, value in tensors.items():
        error = (found[name] - value).abs()
        if compression.kind == "bf16" or (compression.kind == "int8" and name == "n"):
            assert bool((error <= value.abs() / 256).all())
        elif compression.kind == "int8" and name in ("conv.w", "fc"):
            step = value.reshape(value.shape[0], -1).abs().amax(1) / 127
            assert bool((error.reshape(value.shape[0], -1) <= 0.5001 * step[:, None]).all())
    if compression.kind == "top_k":
        kept = sum(int((value != 0).sum()) for value in found.values())
        assert kept == math.ceil(compression.fraction * sum(value.numel() for value in tensors.values()))


def test_halves_are_rounded_to_even() -> None:
    """Between two bf16 numbers the one whose last bit is 0; infinitely little beside the middle, the nearer one."""
    step = 2.0**-7
    halves = [1 + step / 2, 1 + 3 * step / 2, -(1 + step / 2), 1 + step / 2 + 2.0**-23, 2 - step / 2]
    found = decode(encode({"w": torch.tensor(halves)}, BF16), BF16, {"w": (5,)})
    assert found["w"].tolist() == [1.0, 1 + 2 * step, -1.0, 1 + step, 2.0]


def test_a_frame_that_deflates_to_its_own_length_stays_as_it_is() -> None:
    """The length alone says which it is."""
    rows = [bytes(i * i % kinds for i in range(length)) for length in range(2, 80) for kinds in range(2, 40)]
    even = [row for row in rows if len(huffman(row)) == len(row)]
    assert even
    assert all(encoding._frame(row) == frame(row) for row in even)


def huffman(raw: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return deflate.compress(raw) + deflate.flush()


def test_of_equal_values_the_first_are_sent() -> None:
    """A border that many values share is no matter of the sort's mood."""
    tensors = {"b": torch.ones(7), "a": -torch.ones(5)}
    found = decode(encode(tensors, Compression("top_k", 0.5)), Compression("top_k", 0.5), shapes_of(tensors))
    assert found["a"].tolist() == [-1.0] * 5
    assert found["b"].tolist() == [1.0] + [0.0] * 6


def test_positions_far_apart_take_escapes(monkeypatch) -> None:
    """Distances of 254, 255, 256, thousands, and several runs of positions, arrive exactly."""
    monkeypatch.setattr(encoding, "RUN", 3)
    values = torch.zeros(20_000)
    positions = [254, 255 + 255, 511 + 256, 767 + 257, 9000, 9001, 19_999]
    values[positions] = torch.arange(1.0, 8.0)
    compression = Compression("top_k", len(positions) / 20_000)
    found = decode(encode({"w": values}, compression), compression, {"w": (20_000,)})
    assert torch.equal(found["w"], values)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text("abc.", min_size=1, max_size=4), st.lists(st.integers(0, 6), max_size=4).map(tuple), max_size=5
    ),
    seed=st.integers(0, 2**31),
    compression=st.sampled_from(KINDS),
    run=st.sampled_from([1, 2, 7, 2**18]),
    zeros=st.floats(0, 1),
)
def test_any_shapes_survive(shapes, seed, compression, run, zeros) -> None:
    """Through the wire record: equal to the slow version, within the stated sizes, the same bytes again."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) >= zeros)
        for name, shape in shapes.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "RUN", run)
        wire = arrays_to_wire(tensors, compression)
        found = arrays_from_wire(wire, shapes, compression)
        assert len(wire[PACKED].data) <= largest_size(compression, shapes)
        assert wire[PACKED].data == arrays_to_wire(dict(reversed(tensors.items())), compression)[PACKED].data
    assert same(found, slow(tensors, compression))


def test_the_likely_size_is_near(tiny_task) -> None:
    """What a data officer is told is within a fifth of what normal changes take; without compression it is exact."""
    from medsegdiff.config import preset
    from medsegdiff.weights import weight_shapes

    shapes = weight_shapes(preset("tiny"))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 1e-2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for compression in (BF16, INT8, TENTH, Compression("top_k", 0.01)):
        size = len(encode(tensors, compression))
        assert 0.8 < likely_size(compression, shapes) / size < 1.25, compression
    assert (
        likely_size(Compression(), shapes)
        == largest_size(Compression(), shapes)
        == 4 * sum(value.numel() for value in tensors.values())
    )


def test_values_that_are_not_finite_are_neither_written_nor_read() -> None:
    """NaN is told by name; a number that bf16 rounds up to infinity is refused by whoever reads it."""
    for compression in KINDS:
        with pytest.raises(ContractError, match="'w' holds values that are not finite"):
            arrays_to_wire({"w": torch.tensor([0.0, math.nan])}, compression)
    largest = {"w": torch.full((2, 20), torch.finfo(torch.float32).max)}
    for compression in (BF16, TENTH):
        with pytest.raises(ContractError, match="not finite"):
            arrays_from_wire(arrays_to_wire(largest, compression), {"w": (2, 20)}, compression)


@pytest.mark.parametrize(
    ("kind", "fraction", "message"),
    [
        ("top_k", None, "top_k needs one"),
        ("int8", 0.1, "the others none"),
        ("top_k", 0.0, "fraction must lie in"),
        ("top_k", 0.6, "fraction must lie in"),
        ("top_k", math.nan, "fraction must lie in"),
    ],
)
def test_a_compression_that_means_nothing_is_refused(kind, fraction, message) -> None:
    """A fraction belongs to top_k, and is a share."""
    with pytest.raises(ValueError, match=message):
        Compression(kind, fraction)


# --- hostile bytes ----------------------------------------------------------------------------------------------------


def frame(raw: bytes, packed: bytes | None = None) -> bytes:
    body = raw if packed is None else packed
    return len(body).to_bytes(4, "little") + body


def deflated(raw: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(raw) + deflate.flush()


ROW = {"w": (1, 20)}


def top_k(gaps: bytes, values: bytes = b"", length: int | None = None) -> bytes:
    """Two of twenty values: their distances, then exponents and mantissas."""
    return (
        (len(gaps) if length is None else length).to_bytes(4, "little")
        + frame(gaps)
        + (values or frame(b"\x7f\x7f") * 2)
    )


def int8(scale: float = 0.5, codes: bytes = bytes([127] + [1] * 19)) -> bytes:
    scales = b"".join(frame(np.array([scale], ">f4").tobytes()[i : i + 1]) for i in range(4))
    return scales + frame(codes)


def test_bytes_made_by_hand_are_read() -> None:
    """The wrong ones below differ from these in what is named."""
    found = decode(top_k(bytes([3, 0])), TENTH, ROW)["w"]
    assert found.nonzero().tolist() == [[0, 3], [0, 4]]
    assert decode(int8(), INT8, ROW)["w"].tolist() == [[63.5] + [0.5] * 19]
    assert decode(frame(b"\x7f" * 20) + frame(bytes(20)), BF16, ROW)["w"].tolist() == [[1.0] * 20]


@pytest.mark.parametrize(
    ("compression", "data", "message"),
    [
        (BF16, b"", "it has 0 bytes, 10 to 48 are possible"),
        (BF16, bytes(49), "it has 49 bytes"),
        (BF16, frame(b"\xff" * 20) + frame(bytes(20)), "not finite"),
        (BF16, frame(b"\x7f" * 20) + frame(bytes(19)), "cannot be inflated|does not hold"),
        (BF16, (21).to_bytes(4, "little") + bytes(40), "a frame of 20 bytes takes 21"),
        (BF16, (2**32 - 1).to_bytes(4, "little") + bytes(40), "a frame of 20 bytes takes 4294967295"),
        (BF16, frame(b"\x7f" * 20) + (20).to_bytes(4, "little") + bytes(10), "it ends 10 bytes too soon"),
        (BF16, frame(b"", deflated(b"\x7f" * 20)) + frame(b"", deflated(bytes(20))) + b"\0", "1 bytes follow its end"),
        (BF16, frame(b"", deflated(b"\x7f" * 20) + b"\0") + frame(bytes(20)), "does not hold the 20 bytes"),
        (BF16, frame(b"", deflated(b"\x7f" * 21)) + frame(bytes(20)), "does not hold the 20 bytes"),
        (BF16, frame(b"", deflated(b"\x7f" * 19)) + frame(bytes(20)), "does not hold the 20 bytes"),
        (BF16, frame(b"", deflated(bytes(10_000))) + frame(bytes(20)), "it has 55 bytes"),
        (BF16, frame(b"", b"\xff" * 12) + frame(bytes(20)), "cannot be inflated"),
        (INT8, int8(math.nan), "negative or not finite"),
        (INT8, int8(math.inf), "negative or not finite"),
        (INT8, int8(-0.5), "negative or not finite"),
        (INT8, int8(-0.0, bytes(20)), "negative or not finite"),
        (INT8, int8(1e-42), "no normal number"),
        (INT8, int8(0.0), "whose largest code is not 127"),
        (INT8, int8(0.5, bytes(20)), "whose largest code is not 127"),
        (INT8, int8(0.5, bytes([126] * 20)), "whose largest code is not 127"),
        (INT8, int8(0.5, bytes([127, 128] + [0] * 18)), "whose largest code is not 127"),
        (INT8, int8(3e38), "not finite"),
        (TENTH, top_k(bytes([3, 16])), "beyond the model's 20 values"),
        (TENTH, top_k(bytes([255, 3])), "2 positions are due, 1 are given|2 bytes"),
        (TENTH, top_k(bytes([3])), "2 positions are due, 1 bytes are given"),
        (TENTH, top_k(bytes([3, 0, 0])), "it has 23 bytes, 19 to 22 are possible"),
        (TENTH, top_k(bytes([3, 0]), length=2**32 - 1), "4294967295 bytes are given"),
        (TENTH, top_k(bytes([3, 0]), frame(b"\xff\xff") * 2), "not finite"),
    ],
)
def test_other_bytes_are_refused(compression, data, message) -> None:
    """Too short, too long, bombs, what follows, scales, codes and positions that no site would write."""
    with pytest.raises(ValueError, match=message):
        decode(data, compression, ROW)


def test_escapes_that_lead_nowhere_are_refused() -> None:
    """A row of positions ends with a value, so each row of positions has one spelling."""
    shapes = {"w": (1, 600)}
    compression = Compression("top_k", 1 / 600)
    good = (2).to_bytes(4, "little") + frame(bytes([255, 7])) + frame(b"\x7f") * 2
    assert decode(good, compression, shapes)["w"].nonzero().tolist() == [[0, 262]]
    for gaps in ([7, 255], [255, 255, 255], [255, 255, 200]):
        bad = len(gaps).to_bytes(4, "little") + frame(bytes(gaps)) + frame(b"\x7f") * 2
        with pytest.raises(ValueError, match=r"positions are due|beyond the model"):
            decode(bad, compression, shapes)


@pytest.mark.parametrize("compression", [BF16, INT8, TENTH], ids=str)
def test_a_bomb_is_stopped_at_what_is_due(compression) -> None:
    """A frame that inflates to 100 MB is given up after the bytes that are due, in little memory and time."""
    shapes = {"w": (4, 300_000)}
    bomb = deflated(bytes(100_000_000))
    data = frame(b"", bomb) * 3
    if compression.kind == "top_k":
        data = (120_000).to_bytes(4, "little") + data
    if compression.kind == "int8":
        data = frame(b"\0" * 4) * 4 + data
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"does not hold|takes|whose largest"):
        decode(data, compression, shapes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 1_200_000 + 8 * 2**20


def test_a_size_that_cannot_be_is_refused_before_anything_is_allocated() -> None:
    """Twenty-four bytes for four petabytes of weights."""
    tracemalloc.start()
    for compression in KINDS:
        with pytest.raises(ValueError, match="24 bytes"):
            decode(bytes(24), compression, {"w": (10**6, 10**9)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def mutated(good: bytes, rng: np.random.Generator) -> bytes:
    """One of the ways bytes go wrong: bits, lengths, cuts, growth, repetition, pieces that change places."""
    data = bytearray(good)
    at = int(rng.integers(len(data)))
    match rng.integers(7):
        case 0:
            data[at] ^= 1 << int(rng.integers(8))
        case 1:
            data[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
        case 2:
            del data[at:]
        case 3:
            data += rng.bytes(int(rng.integers(1, 50)))
        case 4:
            data[at:at] = data[at : at + 16]
        case 5:
            data[at : at + 4] = int(rng.choice([0, 1, 2**16, 2**31, 2**32 - 1])).to_bytes(4, "little")
        case _:
            other = int(rng.integers(len(data)))
            data[at : at + 8], data[other : other + 8] = data[other : other + 8], data[at : at + 8]
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("compression", [BF16, INT8, TENTH], ids=str)
def test_three_thousand_mutations_of_a_real_change(compression, tiny_task) -> None:
    """Each is refused by a ContractError or read as finite weights; none raises otherwise, hangs or takes memory."""
    from medsegdiff.weights import weight_shapes

    shapes = weight_shapes(tiny_task.model)
    generator = torch.Generator().manual_seed(1)
    tensors = {name: 1e-2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    wire = arrays_to_wire(tensors, compression)
    good = wire[PACKED].data
    values = sum(value.numel() for value in tensors.values())
    rng = np.random.default_rng(0)
    reasons: dict[str, int] = {}
    slowest = 0.0
    for number in range(3000):
        wire[PACKED].data = mutated(mutated(good, rng) if number % 3 == 0 else good, rng)
        wire[PACKED].shape = (len(wire[PACKED].data),)
        measured = number % 10 == 0
        if measured:
            tracemalloc.start()
        began = time.perf_counter()
        try:
            found = arrays_from_wire(wire, shapes, compression)
            assert all(bool(torch.isfinite(value).all()) for value in found.values())
            reason = "read"
        except ContractError as error:
            reason = "".join(sign for sign in str(error) if not sign.isdigit())[:30]
        slowest = max(slowest, time.perf_counter() - began)
        if measured:
            assert tracemalloc.get_traced_memory()[1] < 4 * values + len(good) + 4 * 2**20
            tracemalloc.stop()
        reasons[reason] = reasons.get(reason, 0) + 1
    assert len(reasons) >= 4, reasons  # many different faults were met
    assert slowest < 5.0  # nothing hangs: a good one takes a few milliseconds


def test_other_arrays_are_refused() -> None:
    """Raw where compressed is due, another kind, a shape that is not the length."""
    tensors = {"w": torch.ones(2, 20)}
    shapes = shapes_of(tensors)
    with pytest.raises(ContractError, match=r"float32/medsegfed.raw, not uint8/medsegfed.int8"):
        arrays_from_wire(arrays_to_wire(tensors), shapes, INT8)
    with pytest.raises(ContractError, match=r"uint8/medsegfed.int8, not float32/medsegfed.raw"):
        arrays_from_wire(arrays_to_wire(tensors, INT8), shapes)
    with pytest.raises(ContractError, match=r"medsegfed.bf16, not uint8/medsegfed.int8"):
        arrays_from_wire(arrays_to_wire(tensors, BF16), shapes, INT8)
    wire = arrays_to_wire(tensors, INT8)
    wire[PACKED].shape = (10**15,)
    with pytest.raises(ContractError, match="has shape"):
        arrays_from_wire(wire, shapes, INT8)
