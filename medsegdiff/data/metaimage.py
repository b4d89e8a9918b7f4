"""MetaImage files: .mha with the voxels inside, .mhd with the voxels in a file beside it.

Read here rather than by a library, so that the header that was checked is the header that is obeyed: two parsers can
be told different sizes by one file. Keys and their meaning: https://itk.org/Wiki/ITK/MetaIO/Documentation
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsegdiff.data.guard import MAX_HEADER, DataFileError, decoding
from medsegdiff.data.images import Placement, Volume
from medsegdiff.data.orientation import LPS_TO_RAS, place, to_ras, volume
from medsegdiff.data.stored import Stored, beside

_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip


def read_metaimage(path: Path, channels: int) -> Volume:
    """Read a volume turned to RAS axes. Raises DataFileError: see `read_image`."""
    stored, placement = metaimage_stored(path)
    stored.check()
    count = stored.sizes[0]
    if count != channels:
        raise DataFileError(path, f"the file holds {count} channel(s), {channels} are declared for it")
    return volume(np.moveaxis(stored.read(), 0, 3), placement)


def read_metaimage_values(path: Path, limit: int) -> tuple[NDArray[Any], Placement]:
    """Read a mask's values, (X, Y, Z) turned to RAS axes, in the file's own type; `limit` in voxels."""
    stored, placement = metaimage_stored(path)
    if stored.sizes[0] != 1:
        raise DataFileError(path, f"a mask has one channel, this file has {stored.sizes[0]}")
    stored.check(limit)
    return to_ras(stored.read()[0], placement), placement


def check_metaimage(path: Path) -> None:
    """`check_image_file` for MetaImage."""
    stored, _ = metaimage_stored(path)
    stored.check()
    stored.check_finite()


def metaimage_stored(path: Path) -> tuple[Stored, Placement]:
    """What the header says: the voxels, axes (channels, I, J, K), and their place."""
    with decoding(path):
        keys, end = _keys(path)
        axes = int(keys["NDims"])
        if axes not in (2, 3):
            raise DataFileError(path, f"the file has {axes} axes; 2 or 3 are read, channels as ElementNumberOfChannels")
        shape = tuple(int(size) for size in _numbers(path, keys, ("DimSize",), axes))
        swapped = _true(keys, "BinaryDataByteOrderMSB") or _true(keys, "ElementByteOrderMSB")
        packed = _true(keys, "CompressedData")
        if keys.get("BinaryData", "True").lower() != "true" or keys["ElementType"] not in _TYPES:
            raise DataFileError(path, f"voxels of type {keys['ElementType']} (or written as text) are not read")
        dtype = np.dtype((">" if swapped else "<") + _TYPES[keys["ElementType"]])
        data, offset = _data(path, keys, end)
        sizes = (int(keys.get("ElementNumberOfChannels", "1")), *shape, *[1] * (3 - axes))
        stored = Stored(path, data, offset, 0, "zlib" if packed else "raw", dtype, sizes)
        return stored, place(path, LPS_TO_RAS @ _affine(path, keys, axes), sizes[1:])


def _keys(path: Path) -> tuple[dict[str, str], int]:
    """The header's entries, and where it ends."""
    keys: dict[str, str] = {}
    with open(path, "rb") as handle:
        while "ElementDataFile" not in keys:
            line = handle.readline(MAX_HEADER)
            key, equals, value = line.decode("ascii").partition("=")
            if not equals or handle.tell() > MAX_HEADER:
                raise DataFileError(path, "the header is not that of a MetaImage: ElementDataFile is missing")
            keys[key.strip()] = value.strip()
        return keys, handle.tell()


def _data(path: Path, keys: dict[str, str], end: int) -> tuple[Path, int]:
    """The file that holds the voxels, and where they begin in it."""
    name = keys["ElementDataFile"]
    skipped = int(keys.get("HeaderSize", "0"))
    if name.upper() == "LOCAL":
        return path, end
    if name.upper().startswith("LIST") or "%" in name:
        raise DataFileError(path, "its voxels are spread over several files, which is not read; write one file")
    return beside(path, name), skipped


def _affine(path: Path, keys: dict[str, str], axes: int) -> NDArray[np.float64]:
    """Indices -> mm, to the left and to the back as MetaImage counts."""
    matrix, affine = np.eye(3), np.eye(4)
    for key in ("TransformMatrix", "Rotation", "Orientation"):
        if key in keys:  # each triple is the direction of one axis
            matrix[:axes, :axes] = np.reshape(_numbers(path, keys, (key,), axes * axes), (axes, axes)).T
            break
    spacing = np.ones(3)
    spacing[:axes] = _numbers(path, keys, ("ElementSpacing", "ElementSize"), axes, 1.0)
    affine[:3, :3] = matrix * spacing
    affine[:axes, 3] = _numbers(path, keys, ("Offset", "Position", "Origin"), axes, 0.0)
    return affine


def _numbers(
    path: Path, keys: dict[str, str], names: tuple[str, ...], count: int, default: float | None = None
) -> list[float]:
    """The numbers under the first of `names` that is there."""
    found = next((name for name in names if name in keys), None)
    if found is None and default is not None:
        return [default] * count
    numbers = [float(part) for part in keys[found or names[0]].split()]
    if len(numbers) != count:
        raise DataFileError(path, f"{found} holds {len(numbers)} numbers; {count} are due")
    return numbers


def _true(keys: dict[str, str], name: str) -> bool:
    return keys.get(name, "False").lower() == "true"
