"""CVC-ClinicDB: polyps on frames of colonoscopy videos."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import numpy as np

from medsegdiff.data.pictures import read_picture_values, write_picture_mask
from simulations.published.layout import (
    Converted,
    Found,
    LayoutError,
    Published,
    Row,
    expect_files,
    expect_folder,
    find_folder,
)

# Last frame of each of the 29 sequences: the table of the dataset's page (Bernal et al. 2015). The frames of a sequence
# show one polyp from a camera that hardly moves, so a split by frame would test on near-copies of what was trained on.
SEQUENCE_ENDS = (
    25, 50, 67, 78, 103, 126, 151, 177, 199, 205, 227, 252, 277, 297, 317, 342, 363, 383, 408, 428, 447, 466, 478, 503,
    528, 546, 571, 591, 612,
)  # fmt: skip


def read_cvc_clinicdb(root: Path) -> Found:
    """Rows in the order of frames; the sequence stands for the patient, who is not named. No official split."""
    masks = {_frame(path): path for path in expect_files(_folder(root, "Ground Truth"), "*.tif")}
    images = {_frame(path): path for path in expect_files(_folder(root, "Original"), "*.tif")}
    for frame, image in images.items():
        if frame not in masks:
            raise LayoutError(f"the image {image} has no mask Ground Truth/{image.name}")
    return Found([_row(frame, images[frame], masks[frame]) for frame in sorted(images)])


def _row(frame: int, image: Path, mask: Path) -> Row:
    name = f"frame_{frame:03d}"
    return Row(name, f"sequence_{_sequence(frame):02d}", (image,), (Converted(f"{name}.png", _polyp(mask)),))


def _polyp(source: Path) -> Callable[[Path], None]:
    """The lighter half of the mask's own range as 255: a soft edge, where a copy has one, is cut in its middle."""

    def write(path: Path) -> None:
        values = read_picture_values(source, colours=False)[..., 0]
        write_picture_mask(path, np.where(2 * values > values.max(), 255, 0).astype(np.uint8))

    return write


def _folder(root: Path, name: str) -> Path:
    """Where the TIFF files lie: some copies carry TIF/ and PNG/ side by side."""
    tiff = root / "TIF" / name
    return expect_folder(tiff) if tiff.is_dir() else find_folder(root, name)


def _frame(path: Path) -> int:
    if not (path.stem.isdecimal() and 1 <= int(path.stem) <= SEQUENCE_ENDS[-1]):
        raise LayoutError(f"the file {path} is not named by a frame number from 1 to {SEQUENCE_ENDS[-1]}")
    return int(path.stem)


def _sequence(frame: int) -> int:
    """Number of the sequence, from 1, that a frame belongs to."""
    return bisect_left(SEQUENCE_ENDS, frame) + 1


CVC_CLINICDB = Published(
    name="cvc_clinicdb",
    title="CVC-ClinicDB",
    source=(
        "polyp.grand-challenge.org/CVCClinicDB (registration). Bernal et al. 2015, "
        "doi:10.1016/j.compmedimag.2015.02.007. Research and education only, with citation."
    ),
    layout=("Original/1.tif ... 612.tif", "Ground Truth/1.tif ... 612.tif"),
    read=read_cvc_clinicdb,
)
