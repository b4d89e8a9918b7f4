"""A model's masks on prepared cases, and their scores per patient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medsegdiff.calibration import Calibration, Calibrations
from medsegdiff.config import SamplingConfig
from medsegdiff.data.geometry import Geometry, restack, restore, to_slices
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.ensemble import Ensemble, Pairs, derive_seed, segment_images
from medsegdiff.memory import Bound, bytes_per_sample, find_bound
from medsegdiff.metrics import PatientScore, PatientScorer
from medsegdiff.progress import Progress, report
from medsegdiff.raters import Packed, RaterScores, majority, pack, pack_raters, score_raters
from medsegdiff.weights import Segmenter

SLICES_AT_ONCE = 32  # bounds the memory of maps at native size, not the result

Sliced = tuple[Tensor, Geometry, int]  # a case: its slices (N, C, S, S), where they lie, the seed of its noise


@dataclass(frozen=True)
class Segmentation:
    """A model's answer at the image's own size, in the array order of `Volume` (RAS for volumes).

    masks: (T, X, Y, Z) bool, one per target.
    uncertainty: (X, Y, Z) float32 in [0, 1] bits: the largest entropy over channels of the members' votes.
    variance: (X, Y, Z) float32 in [0, 1]: the largest variance over channels of the members' values; 0 for one member.
    member_voxels: (M, T) int64: the voxels of each member's own mask, every member decoded at native size by itself.
    probability: (T, X, Y, Z) float16 in [0, 1]: the mean of the members' values, brought from [-1, 1]; None unless
        wanted.
    members: (M, N, T, bytes): the members' own masks slice by slice, eight voxels a byte; None unless wanted.
    """

    masks: Tensor
    uncertainty: Tensor
    variance: Tensor
    member_voxels: Tensor
    probability: Tensor | None = None
    members: Packed | None = None


@dataclass(frozen=True)
class Wanted:
    """What a segmentation holds beyond masks and maps of uncertainty."""

    probability: bool = False
    members: bool = False


@dataclass(frozen=True)
class Evaluation:
    """How well patients are segmented, how the samples' distribution fits the raters', and what probabilities mean."""

    patients: list[PatientScore]
    raters: RaterScores
    calibration: dict[str, dict[str, Calibration]]  # target -> voxels "near" the structure, "all" voxels


def segment_slices(
    segmenter: Segmenter, images: Tensor, geometry: Geometry, sampling: SamplingConfig, seed: int
) -> Segmentation:
    """Segment the slices (N, C, S, S) of one case and put the masks back on its own grid."""
    return next(segment_many(segmenter, [(images, geometry, seed)], sampling))


def segment_many(
    segmenter: Segmenter, cases: Iterable[Sliced], sampling: SamplingConfig, wanted: Wanted = Wanted()
) -> Iterator[Segmentation]:
    """Segment cases in order.

    Slices of several small cases share a batch: single pictures one by one would leave the processor idle. The noise
    of a slice comes from its case's seed, so the company it is in does not matter. How many samples
    are drawn at once follows the memory.
    """
    device = next(segmenter.network.parameters()).device
    at_once = SLICES_AT_ONCE
    bound: Bound | None = None
    waiting: list[Sliced] = []
    for case in cases:
        if bound is None:
            bound = find_bound(device, bytes_per_sample(segmenter.network.config, *case[0].shape[-2:]))
            if device.type != "cpu":  # a GPU wants more slices than a CPU, on which their number touches the last bits
                at_once = max(SLICES_AT_ONCE, bound.items // sampling.members)
        waiting.append(case)
        if sum(len(images) for images, _, _ in waiting) >= at_once:
            yield from _segment_together(segmenter, waiting, sampling, bound, at_once, wanted)
            waiting = []
    if bound is not None and waiting:
        yield from _segment_together(segmenter, waiting, sampling, bound, at_once, wanted)


def _segment_together(
    segmenter: Segmenter, cases: Sequence[Sliced], sampling: SamplingConfig, bound: Bound, at_once: int, wanted: Wanted
) -> Iterator[Segmentation]:
    device = next(segmenter.network.parameters()).device
    images = torch.cat([images for images, _, _ in cases])
    # One noise for all slices of a case: a member is one reading of the whole case. With a noise a slice the members'
    # differences cancel over the slices, and the range of their volumes held the truth in a third of the patients.
    seeds = [seed for images_, _, seed in cases for _ in images_]
    exclusive = segmenter.scheme.kind == "multiclass"
    members = _Members(segmenter, cases, sampling.members, wanted.members)
    parts = []
    for start in range(0, len(images), at_once):
        chunk = images[start : start + at_once].to(device).contiguous(memory_format=torch.channels_last)
        parts.append(
            segment_images(
                segmenter.network, segmenter.diffusion, chunk, sampling, seeds[start : start + at_once], bound,
                exclusive, members.watch(start) if sampling.members > 1 else None,
            )
        )  # fmt: skip
    lengths = [len(images_) for images_, _, _ in cases]
    for number, (ensemble, (_, geometry, _)) in enumerate(zip(Ensemble.join(parts).split(lengths), cases, strict=True)):
        yield _at_native_size(segmenter, ensemble, sampling, geometry, members, number, wanted)


class _Members:
    """Counts the voxels of every member's own mask at native size while the members pass by; keeps bits if wanted."""

    def __init__(self, segmenter: Segmenter, cases: Sequence[Sliced], members: int, keep: bool) -> None:
        self.scheme = segmenter.scheme
        self.geometries = [geometry for _, geometry, _ in cases]
        self.owner = [number for number, (images, _, _) in enumerate(cases) for _ in range(len(images))]
        targets = len(self.scheme.targets)
        self.voxels = torch.zeros(len(cases), members, targets, dtype=torch.int64)
        self.index = [index for images, _, _ in cases for index in range(len(images))]  # within the case
        self.bits = [
            np.zeros((members, len(images), targets, -(-math.prod(geometry.plane) // 8)), np.uint8)
            for images, geometry, _ in (cases if keep else ())
        ]

    def watch(self, first: int) -> Callable[[Pairs, Tensor], None]:
        """What `segment_images` shall call for a chunk whose image 0 is the cases' image `first`."""

        def count(pairs: Pairs, masks: Tensor) -> None:
            owners = [self.owner[first + index] for index, _ in pairs]
            start = 0
            for number, group in itertools.groupby(owners):
                end = start + len(list(group))
                for begin in range(start, end, SLICES_AT_ONCE):
                    part = slice(begin, min(end, begin + SLICES_AT_ONCE))
                    decoded = self.scheme.decode(restore(masks[part], self.geometries[number]))
                    members = torch.tensor([member for _, member in pairs[part]])
                    self.voxels[number].index_add_(0, members, decoded.flatten(2).sum(dim=2))
                    if self.bits:
                        slices = [self.index[first + index] for index, _ in pairs[part]]
                        self.bits[number][members.numpy(), slices] = pack(decoded)
                start = end

        return count


def _at_native_size(
    segmenter: Segmenter, ensemble: Ensemble, sampling: SamplingConfig, geometry: Geometry, members: _Members,
    number: int, wanted: Wanted,
) -> Segmentation:  # fmt: skip
    fused, several = ensemble.fused(sampling.fuse), sampling.members > 1
    parts = [slice(start, start + SLICES_AT_ONCE) for start in range(0, len(fused), SLICES_AT_ONCE)]
    masks = restack(torch.cat([segmenter.scheme.decode(restore(fused[part], geometry)) for part in parts]), geometry)

    def largest(maps: Tensor) -> Tensor:
        found = [restore(maps[part], geometry).amax(dim=1, keepdim=True).clamp(0, 1) for part in parts]
        return restack(torch.cat(found), geometry)[0]

    def of_targets(maps: Tensor) -> Tensor:
        targets = maps[:, -len(masks) :]  # without the channel of the background, where there is one
        found = [((restore(targets[part], geometry) + 1) / 2).clamp(0, 1).half() for part in parts]
        return restack(torch.cat(found), geometry)

    uncertainty = largest(ensemble.entropy)
    bits = None
    if wanted.members:
        bits = members.bits[number] if several else pack(to_slices(masks, geometry))[None]
    return Segmentation(
        masks=masks,
        uncertainty=uncertainty,
        variance=largest(ensemble.variance) if several else torch.zeros_like(uncertainty),
        member_voxels=members.voxels[number] if several else masks.flatten(1).sum(dim=1)[None],
        probability=of_targets(ensemble.mean) if wanted.probability else None,
        members=bits,
    )


def segment_prepared(
    segmenter: Segmenter, cases: Sequence[PreparedCase], sampling: SamplingConfig, seed: int, wanted: Wanted = Wanted()
) -> Iterator[Segmentation]:
    """Segment prepared cases in order; the noise of each depends on the seed and its volume (or case) alone."""
    inputs = ((p.images(), p.geometry, derive_seed(seed, "sample", p.case.volume_id or p.case.case_id)) for p in cases)
    return segment_many(segmenter, inputs, sampling, wanted)


def score_cases(
    segmenter: Segmenter,
    cases: Sequence[PreparedCase],
    sampling: SamplingConfig,
    seed: int,
    site: str | None = None,
    round_: int | None = None,
    distances: bool = True,
) -> list[PatientScore]:
    """One score per patient, slices restacked; `distances=False` leaves HD95 out."""
    scorer = PatientScorer(segmenter.scheme, cases, distances)
    answers = segment_prepared(segmenter, cases, sampling, seed)
    for number, (prepared, answer) in enumerate(zip(cases, answers, strict=True), start=1):
        scorer.add(prepared, answer.masks, answer.member_voxels)
        report(Progress("evaluate", number, len(cases), site, round_))
    return scorer.scores()


def evaluate_cases(
    segmenter: Segmenter,
    cases: Sequence[PreparedCase],
    sampling: SamplingConfig,
    seed: int,
    tolerance_mm: float,
    watch: Callable[[PreparedCase, Segmentation, float | None], None] | None = None,
) -> Evaluation:
    """Every figure of docs/metrics.md. Memory is that of a batch, a patient's unfinished stacks, and the figures.

    Args:
        tolerance_mm: of the surface Dice.
        watch: sees each case with its segmentation and, with a patient's last case, the patient's mean Dice. All cases
            of a patient come one after the other.
    """
    place: dict[str, int] = {}
    for prepared in cases:
        place.setdefault(prepared.case.patient_id, len(place))
    cases = sorted(cases, key=lambda prepared: place[prepared.case.patient_id])
    scheme = segmenter.scheme
    scorer = PatientScorer(scheme, cases, tolerance_mm=tolerance_mm)
    calibrations, raters = Calibrations(scheme.targets), RaterScores(scheme.targets)
    answers = segment_prepared(
        segmenter, cases, sampling, seed, Wanted(probability=True, members=any(p.raters > 1 for p in cases))
    )
    following: list[PreparedCase | None] = [*cases[1:], None]
    for number, (prepared, after, answer) in enumerate(zip(cases, following, answers, strict=True), start=1):
        patient, labels = prepared.case.patient_id, prepared.native_labels()
        scorer.add(prepared, answer.masks, answer.member_voxels)
        assert answer.probability is not None
        calibrations.add(answer.probability, majority(labels, scheme))
        if prepared.raters > 1:
            assert answer.members is not None
            raters.add(patient, score_raters(answer.members, pack_raters(labels, scheme, prepared.geometry.slice_axis)))
        if watch is not None:
            last = after is None or after.case.patient_id != patient
            watch(prepared, answer, scorer.mean_dice(patient) if last else None)
        report(Progress("evaluate", number, len(cases)))
    return Evaluation(scorer.scores(), raters, calibrations.results())
