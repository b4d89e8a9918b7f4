"""What a dataset says of itself: its configuration, its cases, and what holds between the cases of one patient."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from medsegdiff.errors import UserError
from medsegdiff.strict import Strict

LabelValue = int | str  # a voxel value, or a colour as "#rrggbb"

BACKGROUND = "background"
SPLITS = ("train", "val", "test")
MAX_LABELS = 255  # label indices are stored as uint8, and 255 marks a value that no label declares
MAX_VALUE = 65_535  # masks are 8- or 16-bit images; larger values are refused

_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
_CODE = re.compile(r"[1-9][0-9]{5,15} *\|[^|\\\n]{1,64}\|")  # at most 16 and 64 characters fit into DICOM (SH, LO)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class SegmentCodes(Strict):
    """What a target is in SNOMED CT, for DICOM SEG: each as `108369006 |Neoplasm|`, a concept and its meaning."""

    category: str  # one of PS3.16 CID 7150, such as 49755003 |Morphologically Altered Structure|
    type: str  # what it is in that category, such as 108369006 |Neoplasm|

    def __post_init__(self) -> None:
        for text in (self.category, self.type):
            _require(bool(_CODE.fullmatch(text)), f"{text!r} is no SNOMED CT code of the form 108369006 |Neoplasm|")

    @staticmethod
    def parts(text: str) -> tuple[str, str]:
        """Concept and meaning."""
        concept, meaning, _ = text.split("|")
        return concept.strip(), meaning.strip()


@dataclass(frozen=True)
class DatasetConfig(Strict):
    """dataset.yaml: how the files of a dataset are to be read.

    Label *indices* (0 for the background, then the others in the order of `labels`) are what the rest of the program
    sees; the values that stand in the mask files appear here only.
    """

    name: str
    modality: str  # "MR", "US", "CT", ... as a person would write it; nothing depends on it
    channels: tuple[str, ...]  # of the image, in the order of the files or of the colours in one file
    labels: dict[
        str, LabelValue | tuple[LabelValue, ...]
    ]  # name -> value(s) in the mask files; "background" among them
    # What is segmented -> labels joined; default: each label but background.
    targets: dict[str, tuple[str, ...]] | None = None
    slice_axis: int = 2  # of a volume turned to right-anterior-superior axes: 0 sagittal, 1 coronal, 2 axial slices
    codes: dict[str, SegmentCodes] | None = None  # target -> SNOMED CT, for DICOM SEG; targets left out are "Tissue"

    def __post_init__(self) -> None:
        _require(bool(self.name.strip()), "name must not be empty")
        _require(len(self.channels) >= 1, "channels must name at least one channel")
        _require(len(set(self.channels)) == len(self.channels), f"channels {list(self.channels)} repeat a name")
        _require(self.slice_axis in (0, 1, 2), f"slice_axis must be 0, 1 or 2, found {self.slice_axis}")
        self._check_labels()
        self._check_targets()
        targets = self.label_names[1:] if self.targets is None else tuple(self.targets)
        unknown = [target for target in self.codes or {} if target not in targets]
        _require(not unknown, f"codes name {unknown}, but targets are {list(targets)}")

    def _check_labels(self) -> None:
        _require(
            BACKGROUND in self.labels, f'labels must hold "{BACKGROUND}", found {", ".join(self.labels) or "none"}'
        )
        _require(
            2 <= len(self.labels) <= MAX_LABELS, f"labels must hold 2 to {MAX_LABELS} names, found {len(self.labels)}"
        )
        seen: dict[LabelValue, str] = {}
        for label in self.labels:
            _require(len(self.values(label)) >= 1, f"label {label} has no value")
            for value in self.values(label):
                _check_value(label, value)
                _require(value not in seen, f"value {value!r} belongs to both {seen.get(value)} and {label}")
                seen[value] = label
        kinds = {type(value) for value in seen}
        _require(len(kinds) == 1, 'label values must be all integers or all colours "#rrggbb", found both')

    def _check_targets(self) -> None:
        if self.targets is None:
            return
        _require(len(self.targets) >= 1, "targets must name at least one target, or be left out")
        for target, labels in self.targets.items():
            _require(len(labels) >= 1, f"target {target} joins no label")
            unknown = [label for label in labels if label not in self.labels]
            _require(not unknown, f"target {target} joins {unknown}, but labels are {list(self.labels)}")
            _require(BACKGROUND not in labels, f"target {target} must not hold the background")

    def values(self, label: str) -> tuple[LabelValue, ...]:
        """The values that stand for `label` in the mask files, colours in lower case."""
        found = self.labels[label]
        many = found if isinstance(found, (tuple, list)) else (found,)
        return tuple(value.lower() if isinstance(value, str) else value for value in many)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names by label index: the background is 0 wherever it stands in `labels`."""
        return (BACKGROUND, *(label for label in self.labels if label != BACKGROUND))

    @property
    def label_values(self) -> tuple[tuple[LabelValue, ...], ...]:
        """Values in the mask files by label index."""
        return tuple(self.values(label) for label in self.label_names)

    @property
    def in_colours(self) -> bool:
        """Whether masks are told apart by colour rather than by value."""
        return isinstance(self.values(BACKGROUND)[0], str)


def _check_value(label: str, value: LabelValue) -> None:
    if isinstance(value, str):
        _require(
            bool(_COLOUR.fullmatch(value)), f'label {label}: {value!r} is neither an integer nor a colour "#rrggbb"'
        )
    else:
        _require(0 <= value <= MAX_VALUE, f"label {label}: value {value} lies outside 0..{MAX_VALUE}")


@dataclass(frozen=True)
class Case:
    """One image with its mask(s): a volume, a picture, or one slice of a volume kept as a file."""

    case_id: str
    patient_id: str
    image_paths: tuple[Path, ...]  # one a channel, or one file with all channels
    mask_paths: tuple[Path, ...]  # one a rater; empty where the mask is missing
    site: str | None = None
    split: str | None = None  # "train", "val", "test" where the dataset prescribes it
    volume_id: str | None = None  # ties slices of one volume
    slice_index: int | None = None  # position inside that volume
    # Of a picture: rows, columns[, distance of slices]; a volume has its own.
    spacing_mm: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Dataset:
    """A folder with its configuration and cases, in the order of the folder."""

    root: Path
    config: DatasetConfig
    cases: tuple[Case, ...]


def check_cases(cases: Iterable[Case], source: Path) -> None:
    """Refuse cases that contradict one another.

    Raises:
        UserError: a case id stands twice; a patient belongs to two sites; a volume belongs to two patients or holds a
            slice twice; there is no case at all.
    """
    ids: set[str] = set()
    sites: dict[str, str | None] = {}
    owners: dict[str, str] = {}
    slices: set[tuple[str, int | None]] = set()
    for case in cases:
        if case.case_id in ids:
            raise UserError(
                f"{source}: case_id {case.case_id} stands twice; results could not be told apart. Rename one."
            )
        ids.add(case.case_id)
        if sites.setdefault(case.patient_id, case.site) != case.site:
            raise UserError(
                f"{source}: patient {case.patient_id} belongs to the sites {sites[case.patient_id] or '(none)'} and "
                f"{case.site or '(none)'}; a patient must not be counted twice. Give the patient one site."
            )
        if case.volume_id is None:
            continue
        if owners.setdefault(case.volume_id, case.patient_id) != case.patient_id:
            raise UserError(
                f"{source}: volume {case.volume_id} belongs to the patients {owners[case.volume_id]} and "
                f"{case.patient_id}. Mend volume_id or patient_id."
            )
        if (case.volume_id, case.slice_index) in slices:
            raise UserError(
                f"{source}: volume {case.volume_id} holds slice_index {case.slice_index} twice (second: case "
                f"{case.case_id}); the stack would be torn. Number the slices anew."
            )
        slices.add((case.volume_id, case.slice_index))
    if not ids:
        raise UserError(f"{source}: there is no case in it; nothing could be read. Add cases or choose another folder.")
