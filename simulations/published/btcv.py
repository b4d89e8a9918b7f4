"""BTCV: abdominal CT with 13 organs, and its 8-organ form known as Synapse."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from simulations.published.layout import (
    Found,
    LayoutError,
    Published,
    Row,
    expect_file,
    expect_files,
    expect_folder,
    find_folder,
)

# Scans held out by Chen et al., TransUNet (arXiv 2102.04306), in their published list of test volumes; the other 18
# train. The challenge itself publishes no labels but those of its 30 training scans.
TEST = frozenset({1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38})

SOURCE = (
    "Synapse, project syn3193805 (free account), file Abdomen/RawData.zip; Landman, Xu, Iglesias, Styner, Langerak, "
    "Klein, MICCAI Multi-Atlas Labeling Beyond the Cranial Vault - Workshop and Challenge (2015); under the data "
    "use terms shown at the download"
)
LAYOUT = (
    "RawData/Training/img/img0001.nii.gz ... img0040.nii.gz (30 scans)",
    "RawData/Training/label/label0001.nii.gz ... label0040.nii.gz",
)


def _read(source: Path, only_listed: bool) -> Found:
    """The labelled scans. `only_listed` is for the 18/12 protocol, which is that of exactly 30 scans."""
    training = find_folder(source, "RawData") / "Training"
    images = expect_files(training / "img", "img????.nii.gz")
    labels = expect_folder(training / "label")
    numbers = [path.name[3:7] for path in images]
    missing = sorted(TEST - {int(number) for number in numbers if number.isdigit()})
    if only_listed and missing:
        raise LayoutError(f"the scan img{missing[0]:04d}.nii.gz, one of the 12 test scans, is not there")
    return Found([_row(image, number, labels) for image, number in zip(images, numbers, strict=True)])


def _row(image: Path, number: str, labels: Path) -> Row:
    if not number.isdigit():
        raise LayoutError(f"{image} is no scan of this dataset: its number is {number!r}")
    return Row(
        case_id=f"case{number}",
        patient_id=f"case{number}",
        images=(image,),
        masks=(expect_file(labels / f"label{number}.nii.gz"),),
        split="test" if int(number) in TEST else "train",
    )


BTCV = Published(
    name="btcv",
    title="BTCV (Beyond the Cranial Vault, abdomen)",
    source=SOURCE,
    layout=LAYOUT,
    read=partial(_read, only_listed=False),
)
SYNAPSE8 = Published(
    name="synapse8",
    title="Synapse multi-organ (BTCV, 8 organs)",
    source=SOURCE,
    layout=LAYOUT,
    read=partial(_read, only_listed=True),
)
