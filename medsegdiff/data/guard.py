"""Files from unknown hands: what is refused before memory is taken for it.

A file of a few bytes may declare gigabytes. Here stand the limits that every format checks by its header alone, and
`check_image_file`, which does so for whole scans before torch is imported: this module and the format modules stay
free of torch.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from medsegdiff.errors import UserError

MAX_VOXELS = 2**30  # of one image, all channels: 4 GiB as float32, twice a whole-body CT (512 x 512 x 2000)
UNPACKED = 2**27  # bytes (128 MiB) that may come out of compression whatever the ratio
MAX_RATIO = 100  # beyond them: images shrink 2- to 30-fold, skull-stripped ones included; deflate reaches 1032
MAX_HEADER = 2**20  # bytes of a text header (MetaImage, NRRD); real ones take a kilobyte

Format = Literal["nifti", "metaimage", "nrrd", "dicom", "picture"]

ENDINGS: dict[Format, tuple[str, ...]] = {
    "nifti": (".nii", ".nii.gz"),
    "metaimage": (".mha", ".mhd"),
    "nrrd": (".nrrd", ".nhdr"),
    "dicom": (".dcm",),
    "picture": (".png", ".tif", ".tiff", ".gif", ".jpg", ".jpeg", ".bmp"),
}


class DataFileError(UserError):
    """One file that cannot be used, and why."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"{file}: {reason}.")
        self.file = file
        self.reason = " ".join(reason.split())


def check_image_file(paths: Sequence[Path]) -> None:
    """Refuse the files of one scan if they are hostile, torn or not finite, without holding them in memory.

    Headers are read and compared with the limits and with the file's size; voxels stored as floats are streamed once
    to count those that are not finite. Torch is not imported.

    Args:
        paths: as `medsegdiff.data.images.read_image` takes them: files, or folders with a DICOM series.

    Raises:
        DataFileError: see `read_image`.
    """
    for path in paths:
        if not path.exists():
            raise DataFileError(path, "there is no such file")
        match format_of(path):  # each brings the library it needs, no other
            case "nifti":
                from medsegdiff.data.nifti import check_nifti as check
            case "metaimage":
                from medsegdiff.data.metaimage import check_metaimage as check
            case "nrrd":
                from medsegdiff.data.nrrd import check_nrrd as check
            case "dicom":
                from medsegdiff.data.dicom import check_dicom as check
            case "picture":
                from medsegdiff.data.pictures import check_picture as check
        check(path)


def format_of(path: Path) -> Format:
    """The format of a file by its name; a folder is taken for a DICOM series.

    Raises:
        DataFileError: the ending is that of no format that is read.
    """
    if path.is_dir():
        return "dicom"
    for name, endings in ENDINGS.items():
        if path.name.lower().endswith(endings):
            return name
    known = ", ".join(ending for endings in ENDINGS.values() for ending in endings)
    raise DataFileError(path, f"this format is not read; read are {known} and folders with a DICOM series")


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into a fault of the file it decodes."""
    try:
        yield
    except DataFileError:
        raise
    except FileNotFoundError as error:
        raise DataFileError(path, "there is no such file") from error
    except gzip.BadGzipFile as error:
        raise DataFileError(path, "cannot be decoded: its name ends in .gz, its bytes are not gzip's") from error
    # Decoders answer hostile and torn files with almost any exception (SyntaxError, KeyError, zlib.error, ...).
    except Exception as error:
        raise DataFileError(path, f"cannot be decoded ({type(error).__name__}: {error})") from error


def check_voxels(path: Path, shape: Sequence[int], limit: int = MAX_VOXELS) -> None:
    """Refuse a header's shape before memory is taken for it. `limit`: voxels, for a mask those of its image."""
    count = 1
    for size in shape:
        count *= int(size)
    if min(shape) <= 0:
        raise DataFileError(path, f"the image is empty: its size is {times(shape)}")
    if count > limit:
        whose = "the limit is" if limit == MAX_VOXELS else "its image has"
        raise DataFileError(path, f"the header declares {times(shape)} = {count:,} voxels; {whose} {limit:,}")


def check_unpacking(path: Path, declared: int, stored: int) -> None:
    """Refuse a compressed image that would grow as only a bomb does; both in bytes.

    Not for masks: mostly empty, they shrink a thousandfold and are bounded by their image instead.
    """
    if declared > max(UNPACKED, MAX_RATIO * stored):
        raise DataFileError(
            path,
            f"{stored:,} compressed bytes are to become {declared:,}, which no image does; beyond {UNPACKED:,} bytes "
            f"the limit is {MAX_RATIO}-fold",
        )


def check_complete(path: Path, declared: int, stored: int) -> None:
    """Refuse an uncompressed file that is shorter than its header says; both in bytes."""
    if declared > stored:
        raise DataFileError(path, f"the header declares {declared:,} bytes, the file holds {stored:,}")


def times(shape: Sequence[int]) -> str:
    """A size as text: 3x4x5."""
    return "x".join(str(size) for size in shape)
