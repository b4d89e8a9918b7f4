"""PROMISE12: the prostate on T2-weighted MR of four centres."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medsegdiff.data.guard import DataFileError, check_voxels, decoding
from simulations.published.layout import (
    Converted,
    Found,
    LayoutError,
    Published,
    Row,
    Source,
    expect_file,
    expect_files,
    find_folder,
)

# Which centre a case comes from does not stand in the release: these ranges are those of the public code of multi-site
# studies (docs/datasets.md says how far they could be verified).
_CENTRES = {
    "BIDMC": (0, *range(2, 13)),
    "RUNMC": tuple(range(13, 26)),
    "UCL": (1, *range(26, 38)),
    "HK": tuple(range(38, 50)),
}
_SITES = {number: centre for centre, numbers in _CENTRES.items() for number in numbers}


def _read(source: Path) -> Found:
    images = expect_files(find_folder(source, "training_data"), "Case??.mhd")
    return Found([_row(image) for image in images])


def _row(image: Path) -> Row:
    number = image.stem[4:]
    if not number.isdigit() or int(number) not in _SITES:
        raise LayoutError(f"{image} is none of Case00 ... Case49")
    mask = expect_file(image.with_name(f"{image.stem}_segmentation.mhd"))
    return Row(image.stem, image.stem, (_as_nifti(image),), (_as_nifti(mask),), _SITES[int(number)])


def _as_nifti(header: Path) -> Source:
    """The volume as NIfTI of the same grid, place and voxel type."""
    _require_voxels(header)
    return Converted(f"{header.stem}.nii.gz", lambda path: _convert(header, path))


def _require_voxels(header: Path) -> None:
    """Refuse a header without its voxels beside it, and one that names a file elsewhere on this machine."""
    lines = header.read_bytes()[:10_000].decode("latin-1").splitlines()
    named = [value.strip() for key, _, value in (line.partition("=") for line in lines) if _is_voxel_key(key)]
    if len(named) != 1 or not named[0] or Path(named[0]).name != named[0]:
        found = ", ".join(named) or "none"
        raise LayoutError(f"{header} must name one file beside it as ElementDataFile; it names {found}")
    expect_file(header.with_name(named[0]))


def _is_voxel_key(key: str) -> bool:
    return key.strip() == "ElementDataFile"


def _convert(header: Path, target: Path) -> None:
    import SimpleITK

    sitk: Any = SimpleITK  # not annotated
    with decoding(header):
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(header))
        reader.ReadImageInformation()
        check_voxels(header, reader.GetSize())
        if reader.GetNumberOfComponents() != 1 or reader.GetDimension() != 3:
            raise DataFileError(header, "is no volume of single numbers")
        image = reader.Execute()
    sitk.WriteImage(image, str(target))


PROMISE12 = Published(
    name="promise12",
    title="PROMISE12 (training data)",
    source=(
        "Zenodo, record 8026660, file training_data.zip; Litjens et al., Medical Image Analysis 18 (2014) 359-373, doi "
        "10.1016/j.media.2013.12.002; licence in the record's LICENSE.TXT"
    ),
    layout=(
        "training_data/Case00.mhd with Case00.raw (or .zraw)",
        "training_data/Case00_segmentation.mhd with Case00_segmentation.raw (or .zraw)",
        "... Case49",
    ),
    read=_read,
)
