"""GlaS (Warwick-QU): glands of the colon on H&E-stained sections."""

from __future__ import annotations

import csv
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
    expect_file,
    expect_files,
    find_folder,
)

_FOLDER = "Warwick QU Dataset (Released 2016_07_08)"
_SPLITS = {"train": "train", "testA": "test", "testB": "test"}  # by the beginning of the file's name


def read_glas(root: Path) -> Found:
    """Rows of the official parts, test A and B both as test.

    The official parts share patients: a patient's images on either side of the split count as two patients here, for
    the program refuses a patient who is trained on and tested on. A note says how many that concerns.

    Raises:
        LayoutError: images without masks, or an image that Grade.csv does not list.
        UserError: Grade.csv cannot be read.
    """
    folder = root if (root / "Grade.csv").is_file() else find_folder(root, _FOLDER)
    patients = _patients(expect_file(folder / "Grade.csv"))
    rows, sides = [], dict[str, set[str]]()
    for image in expect_files(folder, "*.bmp"):
        if image.stem.lower().endswith("_anno"):
            continue
        split = _SPLITS.get(image.stem.partition("_")[0])
        if split is None or image.stem not in patients:
            raise LayoutError(f"the image {image} is not one of train, testA, testB that Grade.csv lists")
        mask = expect_file(image.with_name(f"{image.stem}_anno.bmp"))
        patient = patients[image.stem]
        sides.setdefault(patient, set()).add(split)
        rows.append(
            Row(
                image.stem,
                f"patient_{patient}_{split}",
                (image,),
                (Converted(f"{image.stem}.png", _glands(mask)),),
                split=split,
            )
        )
    torn = sorted((name for name, splits in sides.items() if len(splits) > 1), key=lambda name: (len(name), name))
    notes = (
        f"{len(torn)} of {len(sides)} patients stand in the official training and test parts ({', '.join(torn)}): "
        "their images count as two patients, and test scores are not those of unseen patients.",
    )
    return Found(rows, notes if torn else ())


def _patients(path: Path) -> dict[str, str]:
    """Image name -> patient number. The file ends its lines as old Macs did, which universal newlines read."""
    try:
        with open(path, encoding="utf-8-sig") as handle:
            lines = [[field.strip() for field in line] for line in csv.reader(handle.read().splitlines())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LayoutError(f"{path} cannot be read as a CSV file ({error})") from error
    if not lines or lines[0][:2] != ["name", "patient ID"]:
        raise LayoutError(f"{path} does not begin with the columns name, patient ID")
    return {line[0]: line[1] for line in lines[1:] if len(line) > 1 and line[1]}


def _glands(source: Path) -> Callable[[Path], None]:
    """Numbered glands made one label: this program segments regions, not objects."""

    def write(path: Path) -> None:
        write_picture_mask(path, (read_picture_values(source, colours=False)[..., 0] > 0).astype(np.uint8))

    return write


GLAS = Published(
    name="glas",
    title="GlaS (Warwick-QU, colon glands)",
    source=(
        "warwick.ac.uk/fac/cross_fac/tia/data/glascontest. Sirinukunwattana et al. 2017, "
        "doi:10.1016/j.media.2016.08.008. Research only, no commercial use."
    ),
    layout=(
        f"{_FOLDER}/Grade.csv",
        f"{_FOLDER}/train_1.bmp and train_1_anno.bmp ... train_85",
        f"{_FOLDER}/testA_1.bmp and testA_1_anno.bmp ... testA_60; the same for testB_1 ... testB_20",
    ),
    read=read_glas,
)
