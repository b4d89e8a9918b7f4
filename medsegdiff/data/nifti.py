"""NIfTI files: volumes with a place in the patient."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from medsegdiff.data.guard import DataFileError, decoding
from medsegdiff.data.images import Placement, Volume
from medsegdiff.data.orientation import as_stored, place, to_ras, volume
from medsegdiff.data.stored import Stored
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic

nib: Any = nibabel  # annotated in part only, which strict checking refuses
_MILLIMETRES = {"meter": 1000.0, "micron": 0.001}  # by the header's unit; "mm" and "unknown" are millimetres
_HEADER_BYTES = 540  # of NIfTI-2; NIfTI-1 has 348
MAX_OFFSET = 2**26  # bytes before the voxels: header and extensions; real ones take less than a megabyte


def read_nifti(path: Path, channels: int) -> Volume:
    """Read a volume turned to RAS axes; the fourth axis of the file, if there is one, holds the channels.

    Raises:
        DataFileError: see `read_image`.
    """
    with decoding(path):
        header, stored = _open(path)
        stored.check()
        count = stored.sizes[3] if len(stored.sizes) == 4 else 1
        if count != channels:
            raise DataFileError(path, f"the file holds {count} channel(s), {channels} are declared for it")
        placement = _placement(path, header, stored)
        array = np.asarray(_voxels(path, header), dtype=np.float32)
    unit_mm = _MILLIMETRES.get(header.get_xyzt_units()[0], 1.0)
    return volume(array.reshape(*array.shape, *[1] * (4 - array.ndim)), placement, unit_mm)


def read_nifti_values(path: Path, limit: int) -> tuple[NDArray[Any], Placement]:
    """Read a mask's values, (X, Y, Z) turned to RAS axes, in the file's own type.

    Args:
        limit: voxels that the header may declare.

    Raises:
        DataFileError: see `read_mask`.
    """
    with decoding(path):
        header, stored = _open(path)
        if stored.sizes[3:] not in ((), (1,)):
            raise DataFileError(path, f"a mask has three axes, this file has {len(stored.sizes)}")
        stored.check(limit)
        placement = _placement(path, header, stored)
        array = np.asarray(_voxels(path, header)).reshape(placement.shape)
    return to_ras(array, placement), placement


def check_nifti(path: Path) -> None:
    """`check_image_file` for NIfTI."""
    with decoding(path):
        header, stored = _open(path)
        stored.check()
        _placement(path, header, stored)
        stored.check_finite()


def write_nifti_mask(path: Path, mask: NDArray[np.uint8], placement: Placement) -> None:
    """Write a mask (X, Y, Z) in RAS order back on the grid of the file it was made from.

    Equal masks give equal bytes: the compressed stream carries no time and no name.

    Raises:
        UserError: the ending is not that of NIfTI, or the disk refuses.
    """
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise UserError(f"{path}: a mask of a volume is written as .nii or .nii.gz. Choose such an ending.")
    data = nib.Nifti1Image(as_stored(mask, placement), placement.affine).to_bytes()
    write_atomic(path, gzip.compress(data, mtime=0) if path.name.lower().endswith(".gz") else data)


def _open(path: Path) -> tuple[Any, Stored]:
    """The header, and what it says of the voxels.

    Header extensions are passed over: nibabel would read as many bytes of them as they declare, gigabytes from a
    compressed file.
    """
    packed = path.name.lower().endswith(".gz")
    with gzip.open(path, "rb") if packed else open(path, "rb") as handle:
        raw = handle.read(_HEADER_BYTES)
    header = _header(path, raw)
    dtype = header.get_data_dtype()
    if dtype.kind not in "iufb":
        raise DataFileError(path, f"voxels of type {dtype} are not read; numbers are")
    sizes = tuple(int(size) for size in header.get_data_shape())
    if not 2 <= len(sizes) <= 4:
        raise DataFileError(path, f"the file has {len(sizes)} axes; 2 to 4 are read")
    offset = int(header.get_data_offset())
    if not 0 <= offset <= MAX_OFFSET:
        raise DataFileError(path, f"its voxels are said to begin at byte {offset:,}; the limit is {MAX_OFFSET:,}")
    return header, Stored(path, path, 0, offset, "gzip" if packed else "raw", dtype, sizes)


def _header(path: Path, raw: bytes) -> Any:
    for kind in (nib.Nifti2Header, nib.Nifti1Header):
        size = kind.template_dtype.itemsize
        if len(raw) >= size and kind.may_contain_header(raw[:size]):
            header = kind(raw[:size])
            if header["magic"].item()[:3] != b"n+" + (b"2" if kind is nib.Nifti2Header else b"1"):
                raise DataFileError(path, "the header is that of a pair of files (.hdr, .img), which is not read")
            return header
    raise DataFileError(path, "the file is not NIfTI, whatever its name says")


def _voxels(path: Path, header: Any) -> Any:
    """The voxels, scaled, still on disk."""
    return nib.arrayproxy.ArrayProxy(str(path), header)


def _placement(path: Path, header: Any, stored: Stored) -> Placement:
    return place(path, np.asarray(header.get_best_affine(), dtype=np.float64), stored.sizes)
