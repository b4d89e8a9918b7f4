"""How well patients are segmented.

A patient is scored once, over everything there is of them: voxels of all their images are pooled for the Dice
coefficient, and slices kept as single files are stacked into volumes for the surface distance. Each figure, its range
and what it is of an empty mask: docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medsegdiff.labels import LabelScheme
from medsegdiff.raters import majority
from medsegdiff.surface import SurfaceScore, hd95_mm, score_surface

if TYPE_CHECKING:
    from medsegdiff.data.prepared import PreparedCase


__all__ = [
    "Coverage", "PatientScore", "PatientScorer", "VolumeError", "VolumeRange", "coverage", "dice", "hd95_mm", "iou",
    "majority", "score_patients", "voxel_ml", "wilson_95",
]  # fmt: skip


@dataclass(frozen=True)
class VolumeError:
    """How large a patient's structure is in truth and in the mask, rounded to a nanolitre."""

    unit: str  # "ml"; "voxels" where the spacing of any of the patient's images is unknown
    true: float
    predicted: float

    @property
    def error(self) -> float:
        """Predicted less true: negative where the mask is too small."""
        return round(self.predicted - self.true, 6)

    @property
    def relative(self) -> float | None:
        """The error over the true volume, at least -1; 0 where both are empty, None where the truth alone is."""
        if not self.true:
            return None if self.predicted else 0.0
        return (self.predicted - self.true) / self.true


@dataclass(frozen=True)
class VolumeRange:
    """How large a patient's structure is: in truth, in the mask, and in the members' own masks.

    Figures are rounded to a nanolitre, and compared as they stand here.
    """

    unit: str  # "ml"; "voxels" where the spacing of any of the patient's images is unknown
    true: float
    predicted: float
    low: float  # the smallest member
    high: float  # the largest

    @property
    def covered(self) -> bool:
        """Whether the truth lies within the members' range, its ends included."""
        return self.low <= self.true <= self.high


@dataclass(frozen=True)
class Coverage:
    """How many patients' true volume lay within their members' range."""

    covered: int
    patients: int
    share: float
    wilson_95: tuple[float, float]  # what the share may be on all patients, at 95 % confidence
    expected: float  # the share if the truth were one more member: (M - 1) / (M + 1)


@dataclass(frozen=True)
class PatientScore:
    """One patient's agreement with the truth."""

    patient_id: str
    site: str | None
    dice: dict[str, float]  # target -> [0, 1]
    mean_dice: float  # over targets
    hd95_mm: dict[str, float | None]  # target -> mean over volumes; None: undefined in each, or spacing unknown
    hd95_undefined: dict[str, int]  # target -> volumes where exactly one of prediction and truth is empty
    volumes: int  # scored for this patient: volumes, stacks of slices, pictures
    sizes: dict[str, VolumeRange] = field(default_factory=dict)  # per target; empty where there is but one member
    iou: dict[str, float] = field(default_factory=dict)  # target -> [0, 1]
    volume: dict[str, VolumeError] = field(default_factory=dict)
    # Both are empty where no tolerance was given; else target -> mean over the volumes where it is defined.
    assd_mm: dict[str, float | None] = field(default_factory=dict)
    surface_dice: dict[str, float | None] = field(default_factory=dict)


def dice(overlap: int, predicted: int, true: int) -> float:
    """2 TP / (2 TP + FP + FN) from voxel counts; 1 where both masks are empty, 0 where one is."""
    return 2 * overlap / (predicted + true) if predicted + true else 1.0


def iou(overlap: int, predicted: int, true: int) -> float:
    """TP / (TP + FP + FN) from voxel counts, the Jaccard index; 1 where both masks are empty, 0 where one is."""
    return overlap / (predicted + true - overlap) if predicted + true else 1.0


def wilson_95(hits: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share that was met `hits` times in `trials` (Wilson, JASA 22 (1927) 209-212)."""
    z = 1.959963984540054  # the normal distribution's 97.5 % point
    share, spread = hits / trials, z * z / trials
    middle, half = share + spread / 2, z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return min(share, max(0.0, low)), max(share, min(1.0, high))  # rounding must not put 0 or 1 outside


def coverage(patients: Sequence[PatientScore], members: int) -> dict[str, Coverage]:
    """Per target how often the members' range held the true volume; empty without patients or with one member."""
    found = {}
    for target in patients[0].sizes if patients else ():
        hits, count = sum(patient.sizes[target].covered for patient in patients), len(patients)
        expected = (members - 1) / (members + 1)
        found[target] = Coverage(hits, count, hits / count, wilson_95(hits, count), expected)
    return found


@dataclass
class _Tally:
    """What is known of a patient so far."""

    site: str | None
    counts: Tensor  # (T, 3) int64: voxels in both masks, predicted, true
    surfaces: list[list[SurfaceScore]] = field(default_factory=list)  # per volume, per target
    unmeasured: int = 0  # volumes without a known spacing
    # ml a voxel -> (2 + M, T): true, predicted, and each member where there are several
    voxels: dict[float | None, Tensor] = field(default_factory=dict)


class PatientScorer:
    """Scores patients while predictions arrive; only slices of an unfinished stack are kept.

    Args:
        scheme: what the predicted targets are.
        cases: those that will be added; a stack of slices is scored, and freed, once its last one came. Without it
            stacks are kept until `scores`.
        distances: whether HD95 is wanted; without it MONAI is not imported.
        tolerance_mm: of the surface Dice; with it ASSD and surface Dice are scored too, which triples the time.
    """

    def __init__(
        self,
        scheme: LabelScheme,
        cases: Iterable[PreparedCase] = (),
        distances: bool = True,
        tolerance_mm: float | None = None,
    ) -> None:
        self._scheme = scheme
        self._distances = distances
        self._tolerance_mm = tolerance_mm
        self._due: dict[str, int] = {}
        for prepared in cases:
            if prepared.case.volume_id is not None:
                self._due[prepared.case.volume_id] = self._due.get(prepared.case.volume_id, 0) + 1
        self._added: set[str] = set()
        self._tallies: dict[str, _Tally] = {}
        self._stacks: dict[str, list[tuple[PreparedCase, Tensor, Tensor]]] = {}

    def add(self, prepared: PreparedCase, predicted: Tensor, member_voxels: Tensor | None = None) -> None:
        """Take one case's prediction, (T, X, Y, Z) bool at native size, and its members' sizes, (M, T) voxels.

        Raises:
            ValueError: the shape is not the case's, or the case was added before.
        """
        case = prepared.case
        expected = (len(self._scheme.targets), *prepared.geometry.shape)
        if tuple(predicted.shape) != expected:
            raise ValueError(f"case {case.case_id}: prediction of shape {tuple(predicted.shape)}, expected {expected}")
        if case.case_id in self._added:
            raise ValueError(f"case {case.case_id} was scored before")
        self._added.add(case.case_id)
        predicted = predicted.bool().cpu()
        truth = majority(prepared.native_labels(), self._scheme)
        tally = self._tallies.setdefault(
            case.patient_id, _Tally(case.site, torch.zeros(len(predicted), 3, dtype=torch.int64))
        )
        counts = _counts(predicted, truth)
        tally.counts += counts
        rows = counts[:, [2, 1]].T
        if member_voxels is not None and len(member_voxels) > 1:
            rows = torch.cat([rows, member_voxels])
        millilitres = voxel_ml(prepared.spacing_mm)
        tally.voxels[millilitres] = tally.voxels.get(millilitres, torch.zeros_like(rows)) + rows
        if case.volume_id is None:
            self._measure(tally, predicted, truth, prepared.spacing_mm)
            return
        stack = self._stacks.setdefault(case.volume_id, [])
        stack.append((prepared, predicted, truth))
        if len(stack) == self._due.get(case.volume_id):
            self._close(case.volume_id)

    def scores(self) -> list[PatientScore]:
        """Every patient that was added, in the order of their first case."""
        for volume_id in list(self._stacks):
            self._close(volume_id)
        return [self._score(patient_id, tally) for patient_id, tally in self._tallies.items()]

    def _close(self, volume_id: str) -> None:
        """Score a stack of slices as one volume."""
        stack = sorted(self._stacks.pop(volume_id), key=lambda entry: entry[0].case.slice_index or 0)
        first = stack[0][0]
        tally = self._tallies[first.case.patient_id]
        spacing = _stack_spacing([prepared for prepared, _, _ in stack])
        if spacing is None:
            self._measure(tally, stack[0][1], stack[0][2], None)
            return
        axis = first.geometry.slice_axis + 1
        predicted = torch.cat([slice_ for _, slice_, _ in stack], dim=axis)
        truth = torch.cat([slice_ for _, _, slice_ in stack], dim=axis)
        self._measure(tally, predicted, truth, spacing)

    def _measure(self, tally: _Tally, predicted: Tensor, truth: Tensor, spacing: Sequence[float] | None) -> None:
        if spacing is None or not self._distances:
            tally.unmeasured += 1
            return
        pairs = zip(predicted, truth, strict=True)
        tally.surfaces.append([score_surface(p, t, spacing, self._tolerance_mm) for p, t in pairs])

    def mean_dice(self, patient_id: str) -> float:
        """Over targets, of what has been added of a patient."""
        return _mean_dice(self._tallies[patient_id])

    def _score(self, patient_id: str, tally: _Tally) -> PatientScore:
        targets, counts = self._scheme.targets, tally.counts.tolist()
        hd95 = [[volume[t].hd95_mm for volume in tally.surfaces] for t in range(len(targets))]
        asked = targets if self._tolerance_mm is not None else ()
        volumes = _volumes(tally)
        return PatientScore(
            patient_id=patient_id,
            site=tally.site,
            dice={target: dice(*row) for target, row in zip(targets, counts, strict=True)},
            mean_dice=_mean_dice(tally),
            hd95_mm={target: _mean(column) for target, column in zip(targets, hd95, strict=True)},
            hd95_undefined={target: column.count(None) for target, column in zip(targets, hd95, strict=True)},
            volumes=len(tally.surfaces) + tally.unmeasured,
            sizes={target: size for target, (_, size) in zip(targets, volumes, strict=True) if size is not None},
            iou={target: iou(*row) for target, row in zip(targets, counts, strict=True)},
            volume={target: error for target, (error, _) in zip(targets, volumes, strict=True)},
            assd_mm={name: _mean([volume[t].assd_mm for volume in tally.surfaces]) for t, name in enumerate(asked)},
            surface_dice={
                name: _mean([volume[t].surface_dice for volume in tally.surfaces]) for t, name in enumerate(asked)
            },
        )


def voxel_ml(spacing_mm: Sequence[float] | None) -> float | None:
    """Millilitres a voxel holds; None where a distance is unknown."""
    return math.prod(spacing_mm) / 1000 if spacing_mm is not None and len(spacing_mm) == 3 else None


def _volumes(tally: _Tally) -> list[tuple[VolumeError, VolumeRange | None]]:
    """Per target; no range where no members were counted. Voxels of one spacing are summed as integers."""
    known = all(millilitres is not None for millilitres in tally.voxels)
    parts = [
        rows.double() * (millilitres if known and millilitres else 1) for millilitres, rows in tally.voxels.items()
    ]
    unit = "ml" if known else "voxels"
    found = []
    for column in torch.stack(parts).sum(dim=0).T.tolist():
        true, predicted, *members = (round(value, 6) for value in column)
        size = VolumeRange(unit, true, predicted, min(members), max(members)) if members else None
        found.append((VolumeError(unit, true, predicted), size))
    return found


def _mean_dice(tally: _Tally) -> float:
    values = [dice(*row) for row in tally.counts.tolist()]
    return sum(values) / len(values)


def _counts(predicted: Tensor, truth: Tensor) -> Tensor:
    both, p, t = (mask.flatten(1).sum(dim=1) for mask in (predicted & truth, predicted, truth))
    return torch.stack([both, p, t], dim=1)


def _stack_spacing(stack: Sequence[PreparedCase]) -> tuple[float, ...] | None:
    """The spacing of a stack; None where slices are missing, differ in size or spacing, or lack a distance."""
    indices = [prepared.case.slice_index for prepared in stack]
    whole = all(b is not None and a is not None and b - a == 1 for a, b in pairwise(indices))
    alike = {(prepared.geometry.shape, prepared.spacing_mm) for prepared in stack}
    spacing = stack[0].spacing_mm
    return spacing if whole and len(alike) == 1 and spacing is not None and len(spacing) == 3 else None


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def score_patients(
    scheme: LabelScheme, predictions: Iterable[tuple[PreparedCase, Tensor]], distances: bool = True
) -> list[PatientScore]:
    """Score (case, prediction (T, X, Y, Z) bool) pairs; see `PatientScorer`."""
    scorer = PatientScorer(scheme, distances=distances)
    for prepared, predicted in predictions:
        scorer.add(prepared, predicted)
    return scorer.scores()
