"""KiTS: kidneys, their tumours and cysts on CT, as three challenges published them (2019, 2021, 2023)."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from simulations.published.layout import Found, LayoutError, Published, Row, expect_file

_CASE = re.compile(r"case_\d{5}")
_LICENCE = "CC BY-NC-SA"


def _read(source: Path, mask: str) -> Found:
    """The cases of `source` that have both their files; the challenges' test cases have no mask."""
    folders = sorted(path for path in source.iterdir() if path.is_dir() and _CASE.fullmatch(path.name))
    if not folders:
        raise LayoutError(f"no folder case_NNNNN lies in {source}")
    labelled = [folder for folder in folders if (folder / mask).is_file()]
    if not labelled:
        raise LayoutError(f"the file {folders[0] / mask} is not there, nor that of any other case")
    left_out = len(folders) - len(labelled)
    notes = (f"{left_out} of {len(folders)} cases have no {mask} and were left out.",) if left_out else ()
    return Found([_row(folder, mask) for folder in labelled], notes)


def _row(folder: Path, mask: str) -> Row:
    # The repositories hold the masks alone; the scans come with a script of theirs, which people forget or interrupt.
    image = expect_file(folder / "imaging.nii.gz")
    return Row(folder.name, folder.name, (image,), (folder / mask,))


KITS19 = Published(
    name="kits19",
    title="KiTS19",
    source=(
        "GitHub, neheller/kits19, folder data/ after its own script has fetched the scans; Heller et al., Medical "
        f"Image Analysis 67 (2021) 101821, doi 10.1016/j.media.2020.101821; {_LICENCE}"
    ),
    layout=("case_00000/imaging.nii.gz", "case_00000/segmentation.nii.gz", "... case_00209 (test cases: no mask)"),
    read=partial(_read, mask="segmentation.nii.gz"),
)
KITS21 = Published(
    name="kits21",
    title="KiTS21",
    source=(
        "GitHub, neheller/kits21, folder kits21/data/ after its own script has fetched the scans; Heller et al., arXiv "
        f"2307.01984; {_LICENCE}"
    ),
    layout=("case_00000/imaging.nii.gz", "case_00000/aggregated_MAJ_seg.nii.gz", "... case_00299"),
    read=partial(_read, mask="aggregated_MAJ_seg.nii.gz"),
)
KITS23 = Published(
    name="kits23",
    title="KiTS23",
    source=(
        "GitHub, neheller/kits23, folder dataset/ after kits23_download_data has fetched the scans; Heller et al., "
        f"arXiv 2307.01984; {_LICENCE}"
    ),
    layout=("case_00000/imaging.nii.gz", "case_00000/segmentation.nii.gz", "... case_00588 (489 cases)"),
    read=partial(_read, mask="segmentation.nii.gz"),
)
