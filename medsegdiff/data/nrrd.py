"""NRRD files: .nrrd with the voxels inside, .nhdr with the voxels in a file beside it.

Read here rather than by a library for the reason `medsegdiff.data.metaimage` gives. Fields and their meaning:
https://teem.sourceforge.net/nrrd/format.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsegdiff.data.guard import MAX_HEADER, DataFileError, decoding
from medsegdiff.data.images import Placement, Volume
from medsegdiff.data.orientation import place, to_ras, volume
from medsegdiff.data.stored import Encoding, Stored, beside

_TYPES = {
    name: code
    for code, names in {
        "i1": "signed char|int8|int8_t",
        "u1": "uchar|unsigned char|uint8|uint8_t",
        "i2": "short|short int|signed short|signed short int|int16|int16_t",
        "u2": "ushort|unsigned short|unsigned short int|uint16|uint16_t",
        "i4": "int|signed int|int32|int32_t",
        "u4": "uint|unsigned int|uint32|uint32_t",
        "i8": "longlong|long long|long long int|signed long long|signed long long int|int64|int64_t",
        "u8": "ulonglong|unsigned long long|unsigned long long int|uint64|uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split("|")
}
_ENCODINGS: dict[str, Encoding] = {"raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
_SPACES = {
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
}  # fmt: skip


def read_nrrd(path: Path, channels: int) -> Volume:
    """Read a volume turned to RAS axes. Raises DataFileError: see `read_image`."""
    stored, placement, channel_axis = nrrd_stored(path)
    stored.check()
    count = 1 if channel_axis is None else stored.sizes[channel_axis]
    if count != channels:
        raise DataFileError(path, f"the file holds {count} channel(s), {channels} are declared for it")
    return volume(_channels_last(stored.read(), channel_axis), placement)


def read_nrrd_values(path: Path, limit: int) -> tuple[NDArray[Any], Placement]:
    """Read a mask's values, (X, Y, Z) turned to RAS axes, in the file's own type; `limit` in voxels."""
    stored, placement, channel_axis = nrrd_stored(path)
    if channel_axis is not None and stored.sizes[channel_axis] != 1:
        raise DataFileError(path, f"a mask has one channel, this file has {stored.sizes[channel_axis]}")
    stored.check(limit)
    return to_ras(_channels_last(stored.read(), channel_axis)[..., 0], placement), placement


def check_nrrd(path: Path) -> None:
    """`check_image_file` for NRRD."""
    stored, *_ = nrrd_stored(path)
    stored.check()
    stored.check_finite()


def _channels_last(array: NDArray[Any], channel_axis: int | None) -> NDArray[Any]:
    return array[..., None] if channel_axis is None else np.moveaxis(array, channel_axis, -1)


def nrrd_stored(path: Path) -> tuple[Stored, Placement, int | None]:
    """What the header says: the voxels, their place, and which axis holds the channels."""
    with decoding(path):
        fields, end = _fields(path)
        sizes = tuple(int(size) for size in fields["sizes"].split())
        if len(sizes) != int(fields["dimension"]):
            raise DataFileError(path, f"{len(sizes)} sizes are given for {fields['dimension']} axes")
        kind, encoding = fields["type"].lower(), fields["encoding"].lower()
        if kind not in _TYPES or encoding not in _ENCODINGS:
            raise DataFileError(path, f"voxels of type {kind} in {encoding} are not read; numbers in raw or gzip are")
        if any(int(fields.get(field, "0")) for field in ("line skip", "lineskip", "byte skip", "byteskip")):
            raise DataFileError(path, "voxels after a line skip or byte skip are not read; write the file anew")
        swapped = fields.get("endian", "little").lower() == "big"
        dtype = np.dtype((">" if swapped else "<") + _TYPES[kind])
        name = fields.get("data file", fields.get("datafile"))
        if name is not None and (name.upper().startswith("LIST") or "%" in name):
            raise DataFileError(path, "its voxels are spread over several files, which is not read; write one file")
        data, offset = (path, end) if name is None else (beside(path, name), 0)
        columns, channel_axis = _columns(path, fields, len(sizes))
        stored = Stored(path, data, offset, 0, _ENCODINGS[encoding], dtype, sizes)
        shape = tuple(size for axis, size in enumerate(sizes) if axis != channel_axis)
        if len(shape) not in (2, 3):
            raise DataFileError(path, f"the file has {len(shape)} axes in space; 2 or 3 are read")
        return stored, place(path, _affine(path, fields, columns), shape), channel_axis


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """The header's fields, and where it ends: after an empty line, or where a header of its own ends."""
    fields: dict[str, str] = {}
    with open(path, "rb") as handle:
        if not handle.readline(MAX_HEADER).startswith(b"NRRD000"):
            raise DataFileError(path, "the file is not NRRD, whatever its name says")
        while line := handle.readline(MAX_HEADER).decode("utf-8").strip():
            if handle.tell() > MAX_HEADER:
                raise DataFileError(path, f"the header takes more than {MAX_HEADER:,} bytes")
            key, colon, value = line.partition(":")
            if colon and not line.startswith("#") and not value.startswith("="):  # ":=" begins a remark for programs
                fields[key.strip().lower()] = value.strip()
        return fields, handle.tell()


def _columns(path: Path, fields: dict[str, str], axes: int) -> tuple[list[NDArray[np.float64]], int | None]:
    """The step along each axis in space, in the file's own space, and the axis that is none: the channels'."""
    if "space directions" in fields:
        words = fields["space directions"].replace(")", ") ").split()
        steps = [None if word.lower() == "none" else _vector(word) for word in _joined(words)]
    else:
        spacing = fields.get("spacings", " ".join(["1"] * axes)).split()
        kinds = fields.get("kinds", "").lower().split()
        in_space = [kind in ("domain", "space", "???", "none") for kind in kinds] or [True] * axes
        unit = iter(np.eye(3))
        steps = [float(mm) * next(unit) if inside else None for mm, inside in zip(spacing, in_space, strict=True)]
    if len(steps) != axes or sum(step is None for step in steps) > 1:
        raise DataFileError(path, f"{axes} axes of which one at most may hold channels; found {steps}")
    found = [step for step in steps if step is not None]
    return found, next((axis for axis, step in enumerate(steps) if step is None), None)


def _joined(words: list[str]) -> list[str]:
    """Vectors written with blanks inside, as `(1, 0, 0)`, put together again."""
    text, out = "", []
    for word in words:
        text += word
        if text.endswith(")") or not text.startswith("("):
            out.append(text)
            text = ""
    return out


def _vector(text: str) -> NDArray[np.float64]:
    return np.array([float(part) for part in text.strip("() ").split(",")])


def _affine(path: Path, fields: dict[str, str], columns: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Indices -> mm to the right, to the front, upwards."""
    space = fields.get("space", "left-posterior-superior").lower()  # without one ITK takes this
    if space not in _SPACES:
        raise DataFileError(path, f"the space {space!r} is not read; {', '.join(s for s in _SPACES if '-' in s)} are")
    affine = np.eye(4)
    for axis, column in enumerate(columns):
        affine[: column.size, axis] = column
    if "space origin" in fields:
        origin = _vector(fields["space origin"].replace(" ", ""))
        affine[: origin.size, 3] = origin
    signs = np.array([*_SPACES[space], 1.0])
    return signs[:, None] * affine
