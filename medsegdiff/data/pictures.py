"""Pictures: PNG, TIFF, GIF, JPEG, BMP. Pixels as stored; an EXIF rotation is not applied, for masks do not carry it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medsegdiff.data.guard import DataFileError, check_unpacking, check_voxels, decoding
from medsegdiff.data.stored import not_finite
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic

_GREY = ("1", "L", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_GREY_ALPHA = ("LA", "La")
_FORMATS = ("PNG", "TIFF", "GIF", "JPEG", "BMP")  # Pillow knows dozens more, some of which start other programs
_SAMPLE_BYTES = {"I": 4, "F": 4, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}  # by mode; others take one
MAX_COLOUR = 24  # of 255, mean over pixels, between largest and smallest colour: X-rays scanned in colour stay below
_LOSSLESS = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP", ".gif": "GIF"}


def read_picture(path: Path, channels: int) -> NDArray[np.float32]:
    """Read a picture as (channels, rows, columns, 1).

    Raises:
        DataFileError: see `read_image`.
    """
    with _opened(path) as picture:
        grey = picture.mode in _GREY
        if channels == 1:
            pixels = np.asarray(picture, dtype=np.float32)[None] if grey else _grey_again(path, picture)
        elif channels == 3 and not grey and picture.mode not in _GREY_ALPHA:
            pixels = np.asarray(picture.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)
        else:
            raise DataFileError(
                path, f"a picture of mode {picture.mode} cannot give the {channels} channels declared for it"
            )
    return np.ascontiguousarray(pixels[..., None])


def _grey_again(path: Path, picture: Image.Image) -> NDArray[np.float32]:
    """A grey picture that was stored in colour; a tint or a few coloured marks are let through.

    Raises:
        DataFileError: it is a colour picture.
    """
    rgb = np.asarray(picture.convert("RGB"), dtype=np.float32)
    spread = float((rgb.max(axis=2) - rgb.min(axis=2)).mean())
    if spread > MAX_COLOUR:
        raise DataFileError(
            path,
            f"a colour picture (its colours differ by {spread:.0f} of 255 on average); one grey channel is read",
        )
    return np.asarray(picture.convert("L"), dtype=np.float32)[None]


def read_picture_values(path: Path, colours: bool) -> NDArray[np.int32]:
    """Read a mask's values, (rows, columns, 1).

    Args:
        colours: True gives 65536 r + 256 g + b; False gives grey levels or palette indices, also of a colour picture
            whose three channels are equal.

    Raises:
        DataFileError: see `read_mask`.
    """
    with _opened(path) as picture:
        if colours:
            values = _as_number(np.asarray(picture.convert("RGB"), dtype=np.int32))
        elif picture.mode in (*_GREY, "P"):
            values = _whole(path, np.asarray(picture))
        else:
            rgb = np.asarray(picture.convert("RGB"), dtype=np.int32)
            if (rgb != rgb[..., :1]).any():
                raise DataFileError(path, "the mask is in colour, but its labels are declared as numbers")
            values = rgb[..., 0]
    return np.ascontiguousarray(values[..., None])


def check_picture(path: Path) -> None:
    """`check_image_file` for pictures: no pixel is unpacked, but for TIFF's floats, which may be NaN."""
    with _declared(path) as picture:
        if picture.mode == "F":
            bad = int(np.count_nonzero(~np.isfinite(np.asarray(picture))))
            if bad:
                raise not_finite(path, bad)


def write_picture_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    """Write a mask (rows, columns) as a grey picture without loss.

    Raises:
        UserError: the ending names no such format, or the disk refuses.
    """
    if path.suffix.lower() not in _LOSSLESS:
        raise UserError(f"{path}: a mask of a picture is written as {', '.join(_LOSSLESS)}. Choose such an ending.")
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format=_LOSSLESS[path.suffix.lower()])
    write_atomic(path, buffer.getvalue())


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    with _declared(path) as picture:
        picture.load()
        yield picture


@contextmanager
def _declared(path: Path) -> Iterator[Image.Image]:
    """The picture with its header checked, its pixels not yet unpacked."""
    with decoding(path), warnings.catch_warnings():
        # Pillow warns from 89 million pixels on: a fault here, before memory is taken.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=_FORMATS) as picture:
            if getattr(picture, "is_animated", False):  # n_frames would walk through a GIF of any length
                raise DataFileError(path, "the file holds several frames; one picture a file is read")
            shape = (*picture.size, len(picture.getbands()))
            check_voxels(path, shape)
            stored = path.stat().st_size
            check_unpacking(path, shape[0] * shape[1] * shape[2] * _SAMPLE_BYTES.get(picture.mode, 1), stored)
            for tile in _tiff_tiles(picture):  # unpacked one by one, each as large as it says
                check_unpacking(path, tile, stored)
            yield picture


def _tiff_tiles(picture: Image.Image) -> list[int]:
    """Bytes of a tile of a TIFF file, which need not be smaller than its picture."""
    tags = getattr(picture, "tag_v2", {})
    width, height, bits = tags.get(322), tags.get(323), tags.get(258, (8,))
    return [width * height * max(1, sum(bits) // 8)] if isinstance(width, int) and isinstance(height, int) else []


def _as_number(rgb: NDArray[np.int32]) -> NDArray[np.int32]:
    number: NDArray[np.int32] = rgb[..., 0] * 65536 + rgb[..., 1] * 256 + rgb[..., 2]
    return number


def _whole(path: Path, values: NDArray[np.generic]) -> NDArray[np.int32]:
    numbers = values.astype(np.float64)
    if not (np.isfinite(numbers).all() and (numbers == np.rint(numbers)).all()):
        raise DataFileError(path, "the mask holds values that are not whole numbers")
    return numbers.clip(-1, 2**31 - 1).astype(np.int32)
