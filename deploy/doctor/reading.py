"""A dataset's table and its cases, each read once and reduced to what the checks need; voxels are let go.

The readers are those of training, so a case that training would leave out shows the same fault here. A fault is counted
by its kind, one of a fixed few: the reader's own text may hold the name of a file.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploy.doctor.checks import counted
from medsegdiff.data.cases import Case, DatasetConfig
from medsegdiff.data.folder import read_cases_csv
from medsegdiff.data.guard import DataFileError, format_of
from medsegdiff.data.images import Volume, read_image, read_mask
from medsegdiff.errors import UserError

UNDECLARED = "mask value that no label declares"


def why_not_open(folder: Path) -> str:
    """Why a folder is no dataset, in fixed words and counts."""
    if not folder.is_dir():
        return "the data folder of site.yaml is not there, or may not be read"
    table = folder / "cases.csv"
    if not table.is_file():
        here = "with" if (folder / "dataset.json").is_file() else "without"
        return f"the data folder holds no cases.csv and is no nnU-Net or Decathlon folder ({here} a dataset.json)"
    if not (folder / "dataset.yaml").is_file():
        return "cases.csv is there, dataset.yaml is not: labels and channels are unknown"
    try:
        cases = read_cases_csv(table)
    except UserError:
        return "cases.csv cannot be read: a column, a patient_id or another field is missing or wrong"
    if not cases:
        return "cases.csv names no case"
    twice = _repeated(Counter(case.case_id for case in cases))
    sites = _several((case.patient_id, case.site) for case in cases)
    owners = _several((case.volume_id, case.patient_id) for case in cases if case.volume_id)
    doubled = _repeated(Counter((case.volume_id, case.slice_index) for case in cases if case.volume_id))
    faults = [
        f"{counted(count, one)} {what}"
        for count, one, what in (
            (twice, "case_id", "more than once"),
            (sites, "patient", "at two sites"),
            (owners, "volume", "of two patients"),
            (doubled, "slice", "twice in its volume"),
        )
        if count
    ]
    return f"cases.csv contradicts itself: {', '.join(faults)}" if faults else "dataset.yaml cannot be read"


def _repeated(counts: Counter[Any]) -> int:
    return sum(count > 1 for count in counts.values())


def _several(pairs: Iterable[tuple[Any, Any]]) -> int:
    """How many keys come with more than one value."""
    found: defaultdict[Any, set[Any]] = defaultdict(set)
    for key, value in pairs:
        found[key].add(value)
    return sum(len(values) > 1 for values in found.values())


@dataclass
class Seen:
    """What is kept of one case after it was read."""

    case: Case
    fault: str | None = None  # the kind of fault, one of a fixed few
    told: str = ""  # the fault in full; holds names
    digest: str = ""  # SHA-256 of the decoded voxels
    blank: bool = False  # every voxel alike
    axes: str | None = None  # of the stored volume, as "LPS"; None for a picture
    directed: bool = True  # False: the header does not say where the axes point
    spacing_mm: tuple[float, ...] | None = None
    slices: int = 0  # along the dataset's axis
    voxels: int = 0  # of one channel
    raters: int = 0
    labels: frozenset[int] = field(default_factory=frozenset)  # indices of labels that any rater drew


def look_at(case: Case, config: DatasetConfig) -> Seen:
    """Read a case as preparation does, keep what the checks need, and let the voxels go."""
    seen = Seen(case)
    step = "image"
    try:
        if not case.image_paths or not case.mask_paths:
            seen.fault = "image without a mask" if case.image_paths else "mask without an image"
            seen.told = f"{case.case_id}: {seen.fault}"
            return seen
        for path in (*case.image_paths, *case.mask_paths):
            if not path.exists():
                raise DataFileError(path, "there is no such file")
        volume = read_image(case.image_paths, len(config.channels), case.spacing_mm)
        if case.volume_id is not None and min(volume.array.shape[1:]) > 1:
            raise DataFileError(case.image_paths[0], "volume_id ties single slices together, but this file is a volume")
        _note(seen, volume, config)
        step = "mask"
        mask = read_mask(case.mask_paths, config, volume)
        seen.raters = len(mask)
        seen.labels = frozenset(int(index) for index in np.unique(mask))
    except DataFileError as error:
        seen.fault, seen.told = kind_of_fault(error.reason, step), f"{case.case_id}: {error}"
    except (OSError, MemoryError) as error:
        seen.fault, seen.told = f"{step} cannot be read", f"{case.case_id}: {error}"
    return seen


def _note(seen: Seen, volume: Volume, config: DatasetConfig) -> None:
    array = np.ascontiguousarray(volume.array)
    seen.blank = bool(array.min() == array.max())
    seen.digest = hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()
    seen.spacing_mm = volume.spacing_mm
    sides = array.shape[1:]
    picture = volume.placement is None or min(sides) == 1
    seen.slices, seen.voxels = 1 if picture else sides[config.slice_axis], math.prod(sides)
    if volume.placement is not None:
        import nibabel

        seen.axes = "".join(nibabel.orientations.ornt2axcodes(volume.placement.orientation))
        seen.directed = _tells_direction(seen.case.image_paths[0])


def _tells_direction(path: Path) -> bool:
    """Whether a volume's header says where its axes point; readers assume something where it does not."""
    kind = format_of(path)
    if kind == "nifti":
        import nibabel

        header: Any = nibabel.loadsave.load(str(path)).header
        return bool(header["sform_code"] > 0 or header["qform_code"] > 0)
    if kind in ("metaimage", "nrrd"):
        with open(path, "rb") as handle:
            head = handle.read(4096)
        words = (b"TransformMatrix", b"Rotation", b"Orientation") if kind == "metaimage" else (b"space directions:",)
        return any(word in head for word in words)
    return True  # DICOM: a series without positions is refused


# Words of a reader's message -> the kind of fault that is counted; the first that fits. A message that fits none is
# counted as an image or a mask that cannot be read: its text, which may hold names, is never shown.
_KINDS = (
    ("there is no such file", "file missing"),
    ("NaN or infinite", "voxels that are not finite"),
    ("which no label declares", UNDECLARED),
    ("no label has such a value", UNDECLARED),
    ("not whole numbers", "mask with fractions"),
    ("labels are declared as", "mask in colour where numbers are declared, or the reverse"),
    ("channel", "another number of channels"),
    ("a colour picture", "another number of channels"),
    ("its header turns it", "files of one case lie apart"),
    ("cannot belong to one case", "files of one case lie apart"),
    ("its size is", "files of one case differ in size"),
    ("ties single slices together", "a volume among single slices"),
    ("no direction", "header without usable axes"),
    ("the limit is", "size beyond the limits: a wrong or hostile header"),
    ("which no image does", "size beyond the limits: a wrong or hostile header"),
    ("its image has", "files of one case differ in size"),
    ("cut off", "file torn"),
    ("the file holds", "file torn"),
    ("Truncated", "file torn"),
    ("truncated", "file torn"),
    ("end-of-stream", "file torn"),
    ("format is not read", "format that is not read"),
    ("may not be read", "file that may not be read"),
    ("Permission denied", "file that may not be read"),
)


def kind_of_fault(reason: str, step: str) -> str:
    """The kind of fault by a reader's message; `step`: "image" or "mask"."""
    return next((kind for words, kind in _KINDS if words in reason), f"{step} cannot be read")
