"""REFUGE: optic disc and cup on fundus photographs of two cameras."""

from __future__ import annotations

from pathlib import Path

from simulations.published.layout import Found, LayoutError, Published, Row, find_folder

# split -> the names its folders of images and of annotations have in the archives
_PARTS = {
    "train": (("Training400", "REFUGE-Training400"), ("Annotation-Training400",)),
    "val": (("REFUGE-Validation400", "Validation400"), ("REFUGE-Validation400-GT",)),
    "test": (("Test400", "REFUGE-Test400"), ("REFUGE-Test-GT", "REFUGE-Test400-GT")),
}


def read_refuge(root: Path) -> Found:
    """Rows of all three parts, image = patient: no patients are named.

    The training images lie in Glaucoma/ and Non-Glaucoma/, the masks of the test part in G/ and N/ in some copies; file
    names are unique within a part, so an image finds its mask by name, wherever it lies.
    """
    return Found([row for split, names in _PARTS.items() for row in _rows(root, split, *names)])


def _rows(root: Path, split: str, images: tuple[str, ...], annotations: tuple[str, ...]) -> list[Row]:
    masks = _by_stem(find_folder(find_folder(root, *annotations), "Disc_Cup_Masks"), ".bmp")
    rows = []
    for stem, image in sorted(_by_stem(find_folder(root, *images), ".jpg").items()):
        if stem not in masks:
            raise LayoutError(f"no mask {stem}.bmp of the image {image} lies under {annotations[0]}/Disc_Cup_Masks")
        rows.append(Row(f"{split}_{stem}", f"{split}_{stem}", (image,), (masks[stem],), split=split))
    return rows


def _by_stem(folder: Path, ending: str) -> dict[str, Path]:
    """Files below a folder by name without ending; at least one."""
    files = {
        path.stem: path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() == ending and not path.name.startswith(".") and path.is_file()
    }
    if not files:
        raise LayoutError(f"no file *{ending} lies in {folder}")
    return files


REFUGE = Published(
    name="refuge",
    title="REFUGE (optic disc and cup)",
    source=(
        "Grand Challenge, refuge.grand-challenge.org (registration): six archives. Orlando et al. 2020, "
        "doi:10.1016/j.media.2019.101570. No licence text was found; research use under the challenge's rules."
    ),
    layout=(
        "Training400/Glaucoma/g0001.jpg and Training400/Non-Glaucoma/n0001.jpg",
        "Annotation-Training400/Disc_Cup_Masks/Glaucoma/g0001.bmp and .../Non-Glaucoma/n0001.bmp",
        "REFUGE-Validation400/V0001.jpg",
        "REFUGE-Validation400-GT/Disc_Cup_Masks/V0001.bmp",
        "Test400/T0001.jpg",
        "REFUGE-Test-GT/Disc_Cup_Masks/T0001.bmp (in G/ and N/ in some copies)",
    ),
    read=read_refuge,
)
