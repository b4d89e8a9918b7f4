"""Voxels as a header says they are stored: checked, streamed, read. NIfTI, MetaImage and NRRD share it."""

from __future__ import annotations

import bz2
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from medsegdiff.data.guard import DataFileError, check_complete, check_unpacking, check_voxels, decoding

Encoding = Literal["raw", "gzip", "zlib", "bzip2"]
BLOCK = 2**22  # bytes unpacked at a time


@dataclass(frozen=True, eq=False)
class Stored:
    """Where voxels lie and how; nothing has been read of them yet."""

    header: Path  # the file a person knows
    data: Path  # the file that holds the voxels, often the same
    offset: int  # bytes of `data` before the (compressed) voxels; negative: the voxels are the end of the file
    skip: int  # unpacked bytes before the voxels
    encoding: Encoding
    dtype: np.dtype[np.generic]
    sizes: tuple[int, ...]  # the fastest axis first; the channels' axis among them

    @property
    def count(self) -> int:
        """Voxels times channels."""
        return int(np.prod(self.sizes, dtype=object))

    @property
    def nbytes(self) -> int:
        """Of the unpacked voxels."""
        return self.count * self.dtype.itemsize

    def check(self, limit: int | None = None) -> None:
        """Compare with the limits and the file's size.

        Args:
            limit: voxels, of a mask; None for an image.

        Raises:
            DataFileError: see `medsegdiff.data.images.read_image`.
        """
        check_voxels(self.header, self.sizes) if limit is None else check_voxels(self.header, self.sizes, limit)
        with decoding(self.data):
            held = self.data.stat().st_size - max(self.offset, 0)
        if self.encoding == "raw":
            check_complete(self.header, self.skip + self.nbytes, held)
        elif limit is None:
            check_unpacking(self.header, self.skip + self.nbytes, held)

    def check_finite(self) -> None:
        """Count voxels that are NaN or infinite, streaming: a few megabytes of memory whatever the size.

        Raises:
            DataFileError: there are some, or the file ends before its voxels do.
        """
        if self.dtype.kind != "f":
            return
        bad = sum(int(np.count_nonzero(~np.isfinite(part))) for part in self._parts())
        if bad:
            raise not_finite(self.header, bad)

    def read(self) -> NDArray[np.generic]:
        """The voxels, with the axes of `sizes`; no more is unpacked than the header declares."""
        voxels = np.empty(self.count, self.dtype)
        done = 0
        for part in self._parts():
            voxels[done : done + part.size] = part
            done += part.size
        return voxels.reshape(self.sizes, order="F")

    def _parts(self) -> Iterator[NDArray[np.generic]]:
        due, rest = self.nbytes, b""
        with decoding(self.header), open(self.data, "rb") as handle:
            handle.seek(self.offset if self.offset >= 0 else self.data.stat().st_size - self.nbytes)
            for more in _skipped(_unpacked(handle, self.encoding), self.skip):
                block = (rest + more)[:due]
                whole = len(block) - len(block) % self.dtype.itemsize
                yield np.frombuffer(block[:whole], self.dtype)
                due, rest = due - whole, block[whole:]
                if due == 0:
                    return
            raise DataFileError(self.header, f"the voxels are cut off: {due:,} of {self.nbytes:,} bytes are missing")


def not_finite(path: Path, count: int) -> DataFileError:
    """The fault of an image with NaN or infinite voxels."""
    return DataFileError(path, f"{count:,} voxels are NaN or infinite")


def _unpacked(handle: BinaryIO, encoding: Encoding) -> Iterator[bytes]:
    if encoding == "zlib":
        yield from _inflated(handle)
        return
    source: Any = handle
    if encoding != "raw":  # both take several members in a row, as bgzip writes them
        source = gzip.GzipFile(fileobj=handle) if encoding == "gzip" else bz2.BZ2File(handle)
    while block := source.read(BLOCK):
        yield block


def _inflated(handle: BinaryIO) -> Iterator[bytes]:
    inflater = zlib.decompressobj()
    while not inflater.eof:
        packed = inflater.unconsumed_tail or handle.read(2**16)
        if not packed:
            return
        yield inflater.decompress(packed, BLOCK)


def _skipped(blocks: Iterator[bytes], skip: int) -> Iterator[bytes]:
    for block in blocks:
        yield block[skip:]
        skip = max(0, skip - len(block))


def beside(header: Path, name: str) -> Path:
    """The file of voxels that a header names: beside it, never elsewhere on the machine.

    Raises:
        DataFileError: the name is a path, or there is no such file.
    """
    if name in ("", ".", "..") or any(mark in name for mark in "/\\:\0"):
        raise DataFileError(header, f"its voxels are said to lie in {name!r}; only a file beside the header is read")
    data = header.parent / name
    if not data.is_file():
        raise DataFileError(header, f"its voxels are said to lie in {name!r}, and there is no such file")
    return data
