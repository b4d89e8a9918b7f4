"""A model's masks on prepared cases, and their scores per patient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medsegdiff.config import SamplingConfig
from medsegdiff.data.geometry import Geometry, restack, restore
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.ensemble import derive_seed, segment_images
from medsegdiff.metrics import PatientScore, PatientScorer
from medsegdiff.progress import Progress, report
from medsegdiff.weights import Segmenter

SLICES_AT_ONCE = 32  # bounds the memory of maps at native size, not the result


@dataclass(frozen=True)
class Segmentation:
    """A model's answer at the image's own size, in the array order of `Volume` (RAS for volumes).

    masks: (T, X, Y, Z) bool, one per target.
    uncertainty: (X, Y, Z) float32 in [0, 1] bits: the largest entropy over channels of the members' votes.
    """

    masks: Tensor
    uncertainty: Tensor


def segment_slices(
    segmenter: Segmenter, images: Tensor, geometry: Geometry, sampling: SamplingConfig, seed: int
) -> Segmentation:
    """Segment the slices (N, C, S, S) of one case and put the masks back on its own grid."""
    return next(segment_many(segmenter, [(images, geometry, seed)], sampling))


def segment_many(
    segmenter: Segmenter, cases: Iterable[tuple[Tensor, Geometry, int]], sampling: SamplingConfig
) -> Iterator[Segmentation]:
    """Segment cases given as (slices (N, C, S, S), geometry, seed), in order.

    Slices of several small cases share a batch: single pictures one by one would leave the processor idle. The noise
    of a slice comes from its case's seed and its index, so the company it is in does not matter.
    """
    waiting: list[tuple[Tensor, Geometry, int]] = []
    for case in cases:
        waiting.append(case)
        if sum(len(images) for images, _, _ in waiting) >= SLICES_AT_ONCE:
            yield from _segment_together(segmenter, waiting, sampling)
            waiting = []
    yield from _segment_together(segmenter, waiting, sampling)


def _segment_together(
    segmenter: Segmenter, cases: Sequence[tuple[Tensor, Geometry, int]], sampling: SamplingConfig
) -> Iterator[Segmentation]:
    if not cases:
        return
    device = next(segmenter.network.parameters()).device
    images = torch.cat([images for images, _, _ in cases])
    seeds = [derive_seed(seed, index) for images_, _, seed in cases for index in range(len(images_))]
    means, entropies = [], []
    for start in range(0, len(images), SLICES_AT_ONCE):
        chunk = images[start : start + SLICES_AT_ONCE].to(device).contiguous(memory_format=torch.channels_last)
        ensemble = segment_images(
            segmenter.network, segmenter.diffusion, chunk, sampling, seeds[start : start + SLICES_AT_ONCE]
        )
        means.append(ensemble.mean)
        entropies.append(ensemble.entropy)
    lengths = [len(images_) for images_, _, _ in cases]
    for mean, entropy, (_, geometry, _) in zip(
        torch.cat(means).split(lengths), torch.cat(entropies).split(lengths), cases, strict=True
    ):
        yield _at_native_size(segmenter, mean, entropy, geometry)


def _at_native_size(segmenter: Segmenter, mean: Tensor, entropy: Tensor, geometry: Geometry) -> Segmentation:
    masks, uncertainty = [], []
    for start in range(0, len(mean), SLICES_AT_ONCE):
        part = slice(start, start + SLICES_AT_ONCE)
        masks.append(segmenter.scheme.decode(restore(mean[part], geometry)))
        uncertainty.append(restore(entropy[part], geometry).amax(dim=1, keepdim=True).clamp(0, 1))
    return Segmentation(restack(torch.cat(masks), geometry), restack(torch.cat(uncertainty), geometry)[0])


def segment_prepared(
    segmenter: Segmenter, cases: Sequence[PreparedCase], sampling: SamplingConfig, seed: int
) -> Iterator[Segmentation]:
    """Segment prepared cases in order; the noise of each depends on the seed and its case_id alone."""
    inputs = ((p.images(), p.geometry, derive_seed(seed, "sample", p.case.case_id)) for p in cases)
    return segment_many(segmenter, inputs, sampling)


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
        scorer.add(prepared, answer.masks)
        report(Progress("evaluate", number, len(cases), site, round_))
    return scorer.scores()
