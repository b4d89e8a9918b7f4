"""ISIC 2018, task 1: outlines of skin lesions on dermoscopic pictures."""

from __future__ import annotations

from pathlib import Path

from simulations.published.layout import Found, Published, Row, expect_file, expect_files, find_folder

_PARTS = {"train": "Training", "val": "Validation", "test": "Test"}  # split -> as the folders call it


def read_isic2018(root: Path) -> Found:
    """Rows of all three parts, image = patient: the challenge names no patients."""
    return Found([row for split, part in _PARTS.items() for row in _rows(root, split, part)])


def _rows(root: Path, split: str, part: str) -> list[Row]:
    masks = find_folder(root, f"ISIC2018_Task1_{part}_GroundTruth")
    images = expect_files(find_folder(root, f"ISIC2018_Task1-2_{part}_Input"), "ISIC_*.jpg")
    return [
        Row(image.stem, image.stem, (image,), (expect_file(masks / f"{image.stem}_segmentation.png"),), split=split)
        for image in images
    ]


ISIC2018 = Published(
    name="isic2018",
    title="ISIC 2018 task 1 (lesion boundary segmentation)",
    source=(
        "ISIC Challenge, challenge.isic-archive.com/data, 2018, task 1: six archives. Codella et al. 2019, "
        "arXiv:1902.03368; Tschandl et al. 2018, doi:10.1038/sdata.2018.161. CC BY-NC 4.0."
    ),
    layout=(
        "ISIC2018_Task1-2_Training_Input/ISIC_0000000.jpg",
        "ISIC2018_Task1_Training_GroundTruth/ISIC_0000000_segmentation.png",
        "the same with Validation and with Test in place of Training",
    ),
    read=read_isic2018,
)
