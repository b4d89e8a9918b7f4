"""BraTS 2020 and 2021: glioma on four MR sequences."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from simulations.published.layout import Found, LayoutError, Published, Row

SEQUENCES = ("flair", "t1", "t1ce", "t2")  # the order of the channels in dataset.yaml
MISNAMED = "W39_1998.09.19_Segm"  # the mask of BraTS20_Training_355, released under a name of its own

# "BraTS19_TCIA08_205_1": who contributed the scan stands in its name of the year before.
_CONTRIBUTOR = re.compile(r"BraTS19_(CBICA|TCIA|TMC|2013)\d*_.*", re.ASCII)
_ADDED = "added2020"  # scans without an earlier name; the release does not tell who contributed them


def _read_2020(source: Path) -> Found:
    folders = _case_folders(source, r"BraTS20_Training_\d{3}")
    sites = _contributors(source / "name_mapping.csv")
    notes = () if sites else ("name_mapping.csv is not there, so the cases have no site.",)
    return Found([_row(folder, sites.get(folder.name, _ADDED) if sites else None) for folder in folders], notes)


def _read_2021(source: Path) -> Found:
    return Found([_row(folder, None) for folder in _case_folders(source, r"BraTS2021_\d{5}")])


def _case_folders(source: Path, pattern: str) -> list[Path]:
    folders = [path for path in sorted(source.iterdir()) if path.is_dir() and re.fullmatch(pattern, path.name)]
    if not folders:
        raise LayoutError(f"no folder {pattern} lies in {source}")
    return folders


def _row(folder: Path, site: str | None) -> Row:
    case = folder.name
    images = tuple(_volume(folder, f"{case}_{sequence}") for sequence in SEQUENCES)
    mask = _find(folder, f"{case}_seg") or _find(folder, MISNAMED) or _volume(folder, f"{case}_seg")
    return Row(case, case, images, (mask,), site)


def _volume(folder: Path, stem: str) -> Path:
    found = _find(folder, stem)
    if found is None:
        raise LayoutError(f"neither {folder / stem}.nii.gz nor .nii is there")
    return found


def _find(folder: Path, stem: str) -> Path | None:
    """The challenge distributes .nii.gz; the widespread copy of 2020 was unpacked to .nii."""
    return next((path for ending in (".nii.gz", ".nii") if (path := folder / (stem + ending)).is_file()), None)


def _contributors(path: Path) -> dict[str, str]:
    """Case -> who contributed it, by the names that BraTS 2019 gave the same scans; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            rows = list(csv.DictReader(handle))
            names = {row["BraTS_2020_subject_ID"].strip(): row["BraTS_2019_subject_ID"] or "" for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, AttributeError) as error:
        raise LayoutError(
            f"{path} is no table with the columns BraTS_2019_subject_ID and BraTS_2020_subject_ID"
        ) from error
    matches = {case: _CONTRIBUTOR.fullmatch(name.strip()) for case, name in names.items()}
    return {case: match[1] if match else _ADDED for case, match in matches.items()}


BRATS2020 = Published(
    name="brats2020",
    title="BraTS 2020 (training data)",
    source=(
        "Center for Biomedical Image Computing & Analytics, University of Pennsylvania, on registration; Menze et al., "
        "IEEE TMI 34 (2015) 1993-2024, doi 10.1109/TMI.2014.2377694; Bakas et al., Scientific Data 4 (2017) 170117, "
        "doi 10.1038/sdata.2017.117; under the challenge's data terms"
    ),
    layout=(
        "BraTS20_Training_001/BraTS20_Training_001_{flair,t1,t1ce,t2,seg}.nii.gz (or .nii)",
        "... BraTS20_Training_369",
        "name_mapping.csv",
    ),
    read=_read_2020,
)
BRATS2021 = Published(
    name="brats2021",
    title="BraTS 2021 (training data, task 1)",
    source=(
        "Synapse, project syn25829067, on registration; Baid et al., arXiv 2107.02314; Menze et al., IEEE TMI 34 "
        "(2015) 1993-2024, doi 10.1109/TMI.2014.2377694; under the challenge's data terms"
    ),
    layout=("BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2,seg}.nii.gz", "... BraTS2021_01666 (1,251 cases)"),
    read=_read_2021,
)
