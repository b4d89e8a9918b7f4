"""Masks and scores of prepared cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from medsegdiff.config import DiffusionConfig, Fuse, ModelConfig, SamplingConfig
from medsegdiff.data.cases import Case, Dataset, DatasetConfig
from medsegdiff.data.geometry import Geometry, restack, restore
from medsegdiff.data.prepare import prepare
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.ensemble import derive_seed, segment_images
from medsegdiff.evaluation import score_cases, segment_many, segment_prepared, segment_slices
from medsegdiff.labels import LabelScheme
from medsegdiff.memory import bytes_per_sample
from medsegdiff.network import MedSegDiff
from medsegdiff.progress import Progress, listening
from medsegdiff.sampling import sample_masks
from medsegdiff.weights import ModelCard, Segmenter, build

DATASET = DatasetConfig("made", "US", ("grey",), {"background": 0, "lesion": 255})
MODEL = ModelConfig(
    image_size=16, base_channels=8, channel_multipliers=(1, 2), fusion_levels=(1,), attention_levels=()
)  # fmt: skip
SAMPLING = SamplingConfig(steps=2, members=2)


class Bright(MedSegDiff):
    """Stands in for a perfect network: positive where the image is bright."""

    def image_features(self, image_BCHW: Tensor) -> list[Tensor]:
        return [image_BCHW]

    def denoise(self, mask_BKHW: Tensor, t_B: Tensor, features: list[Tensor]) -> Tensor:
        return (features[0] > 0).float() * 2 - 1


@pytest.fixture(scope="module")
def fresh() -> Segmenter:
    """An untrained network with a loud last layer."""
    torch.manual_seed(0)
    built = build(ModelCard(MODEL, DiffusionConfig(timesteps=50), SAMPLING, DATASET))
    with torch.no_grad():
        built.network.out.weight.mul_(30)
    return built


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedCase, ...]:
    """Five pictures of four patients at network size: bright squares that are the lesion."""
    root = tmp_path_factory.mktemp("pictures")
    found = []
    for number in range(5):
        mask = np.zeros((16, 16), np.uint8)
        mask[2 + number : 8 + number, 3:9] = 255
        for kind, pixels in (("i", mask // 2 + 20), ("m", mask)):
            Image.fromarray(pixels).save(root / f"{kind}{number}.png")
        paths = ((root / f"i{number}.png",), (root / f"m{number}.png",))
        found.append(Case(f"c{number}", f"p{min(number, 3)}", *paths))
    return prepare(Dataset(root, DATASET, tuple(found)), 16, root / "cache").cases


def test_many_cases_equal_one_by_one(fresh: Segmenter) -> None:
    """Cases of any length, sharing batches, come back in order and as each alone, at their own sizes."""
    generator = torch.Generator().manual_seed(0)
    lengths, shapes = [1, 3, 1, 40], [(16, 16, 1), (20, 12, 3), (9, 30, 1), (16, 16, 40)]
    inputs = [
        (torch.randn(n, 1, 16, 16, generator=generator), Geometry(shape, 2, None), seed)
        for seed, (n, shape) in enumerate(zip(lengths, shapes, strict=True))
    ]
    together = list(segment_many(fresh, inputs, SAMPLING))
    assert len(together) == 4
    for answer, (images, geometry, seed), shape in zip(together, inputs, shapes, strict=True):
        alone = segment_slices(fresh, images, geometry, SAMPLING, seed)
        assert answer.masks.shape == (1, *shape)
        assert answer.masks.dtype == torch.bool
        assert answer.uncertainty.shape == shape
        assert bool(((answer.uncertainty >= 0) & (answer.uncertainty <= 1)).all())
        # Batched convolutions differ in the last bits, which may turn a voxel at the threshold.
        assert float((alone.masks != answer.masks).float().mean()) < 0.002
    assert list(segment_many(fresh, [], SAMPLING)) == []


def test_slices_go_back_along_their_axis(fresh: Segmenter) -> None:
    """A volume cut along its first axis is stacked along it again."""
    bright = Segmenter(fresh.card, Bright(MODEL), fresh.diffusion, fresh.scheme)
    images = -torch.ones(5, 1, 16, 16)
    images[2] = 1
    answer = segment_slices(bright, images, Geometry((5, 16, 16), 0, None), SAMPLING, 0)
    assert answer.masks.shape == (1, 5, 16, 16)
    assert answer.masks[0].flatten(1).all(1).tolist() == [False, False, True, False, False]
    assert not bool(answer.masks[0, [0, 1, 3, 4]].any())


def test_the_noise_of_a_case_depends_on_its_name_and_the_seed(
    fresh: Segmenter, cases: tuple[PreparedCase, ...]
) -> None:
    """Order and company of the cases do not matter; the seed does."""
    forth = [a.masks for a in segment_prepared(fresh, cases, SAMPLING, 1)]
    back = [a.masks for a in segment_prepared(fresh, cases[::-1], SAMPLING, 1)][::-1]
    few = [a.masks for a in segment_prepared(fresh, cases[2:3], SAMPLING, 1)]
    other = [a.masks for a in segment_prepared(fresh, cases, SAMPLING, 2)]

    def differing(one: list[Tensor], two: list[Tensor]) -> float:
        return float((torch.stack(one) != torch.stack(two)).float().mean())

    assert differing(forth, back) < 0.005
    assert differing(forth[2:3], few) < 0.005
    assert differing(forth, other) > 0.02


class Noisy(MedSegDiff):
    """Every member its own disc of another size, on a channel each: stands in for an ensemble that disagrees."""

    def image_features(self, image_BCHW: Tensor) -> list[Tensor]:
        return [image_BCHW]

    def denoise(self, mask_BKHW: Tensor, t_B: Tensor, features: list[Tensor]) -> Tensor:
        side = torch.linspace(-1, 1, mask_BKHW.shape[-1])
        radius = (0.5 + mask_BKHW[:, :, :1, :1].sigmoid() / 3) ** 2
        return ((radius - side[:, None] ** 2 - side**2) * 4).clamp(-1, 1)


def noisy(dataset: DatasetConfig) -> Segmenter:
    channels = LabelScheme.of(dataset).channels
    built = build(ModelCard(replace(MODEL, mask_channels=channels), DiffusionConfig(timesteps=50), SAMPLING, dataset))
    return Segmenter(built.card, Noisy(built.card.model), built.diffusion, built.scheme)


MANY = {
    "binary": DATASET,
    "multiclass": DatasetConfig("made", "US", ("grey",), {"background": 0, "a": 1, "b": 2}),
    "regions": DatasetConfig(
        "made", "US", ("grey",), {"background": 0, "rim": 1, "cup": 2}, {"disc": ("rim", "cup"), "cup": ("cup",)}
    ),
}


@pytest.mark.parametrize("kind", MANY)
def test_member_sizes_are_those_of_each_member_alone(kind: str) -> None:
    """Counted while members pass by, in batches over cases of several sizes: as if each were restored and decoded."""
    segmenter, sampling = noisy(MANY[kind]), SamplingConfig(steps=1, members=5)
    assert segmenter.scheme.kind == kind
    shapes = [(16, 16, 2), (20, 12, 3), (9, 30, 1), (11, 16, 45)]
    inputs = [(torch.zeros(shape[2], 1, 16, 16), Geometry(shape, 2, None), n) for n, shape in enumerate(shapes)]
    for answer, (images, geometry, seed) in zip(segment_many(segmenter, inputs, sampling), inputs, strict=True):
        for member in range(5):
            seeds = [derive_seed(seed, member)] * len(images)
            own = sample_masks(
                segmenter.network, segmenter.diffusion, images, list(range(len(images))), sampling, seeds
            )
            decoded = segmenter.scheme.decode(restore(own.detach(), geometry))
            assert answer.member_voxels[member].tolist() == decoded.flatten(2).sum(dim=(0, 2)).tolist()
        assert answer.member_voxels.shape == (5, len(segmenter.scheme.targets))
        assert answer.variance.shape == answer.uncertainty.shape == geometry.shape
        assert 0 < float(answer.variance.max()) <= 1


def test_one_member_is_its_own_range(fresh: Segmenter) -> None:
    """Without company there is no variance, and the member's size is the mask's."""
    answer = segment_slices(
        fresh, torch.randn(2, 1, 16, 16), Geometry((20, 20, 2), 2, None), SamplingConfig(steps=1), 0
    )
    assert answer.member_voxels.tolist() == [[int(answer.masks.sum())]]
    assert torch.equal(answer.variance, torch.zeros(20, 20, 2))


@pytest.mark.parametrize("kind", MANY)
def test_fusions_agree_where_members_do_and_differ_elsewhere(kind: str) -> None:
    """All three give masks of about the same size; STAPLE of a case is STAPLE over all of its slices."""
    segmenter, found = noisy(MANY[kind]), {}
    images, geometry = torch.zeros(40, 1, 16, 16), Geometry((16, 16, 40), 2, None)
    rules: tuple[Fuse, ...] = ("mean", "majority", "staple")
    for how in rules:
        answer = segment_slices(segmenter, images, geometry, SamplingConfig(steps=1, members=5, fuse=how), 3)
        low, high = answer.member_voxels.amin(dim=0), answer.member_voxels.amax(dim=0)
        sizes = answer.masks.flatten(1).sum(dim=1)
        if kind != "multiclass":  # there the mean of the largest is not the largest of the mean
            assert bool(((sizes > 0.8 * low) & (sizes < 1.2 * high)).all())
        found[how] = answer
    for how in rules:
        assert torch.equal(found[how].member_voxels, found["mean"].member_voxels)
        assert torch.equal(found[how].uncertainty, found["mean"].uncertainty)
    assert not torch.equal(found["mean"].masks, found["staple"].masks)
    if kind == "binary":
        config = SamplingConfig(steps=1, members=5, fuse="staple")
        seeds = [3] * 40
        whole = segment_images(segmenter.network, segmenter.diffusion, images, config, seeds).fused("staple")
        assert torch.equal(found["staple"].masks[0], restack(whole > 0, geometry)[0])


def test_a_member_is_one_reading_of_the_whole_case() -> None:
    """Equal slices of one case are segmented alike by each member; another case's noise is another."""
    segmenter, sampling = noisy(DATASET), SamplingConfig(steps=1, members=3)
    geometry = Geometry((16, 16, 3), 2, None)
    inputs = [(torch.zeros(3, 1, 16, 16), geometry, seed) for seed in (1, 2)]
    first, second = segment_many(segmenter, inputs, sampling)
    assert torch.equal(first.masks[..., 0], first.masks[..., 1])
    assert torch.equal(first.masks[..., 0], first.masks[..., 2])
    assert not torch.equal(first.masks, second.masks)
    assert len({tuple(sizes) for sizes in first.member_voxels.tolist()}) > 1, "members differ from each other"


@pytest.mark.parametrize("items", [1, 5])
def test_masks_do_not_depend_on_the_memory(monkeypatch: pytest.MonkeyPatch, items: int) -> None:
    """A machine on which few samples fit gives the same masks and sizes, and never draws more at once."""
    segmenter, sampling = noisy(DATASET), SamplingConfig(steps=1, members=3)
    inputs = [(torch.zeros(n, 1, 16, 16), Geometry((16, 16, n), 2, None), n) for n in (2, 40)]
    usual = list(segment_many(segmenter, inputs, sampling))
    drawn: list[int] = []

    def counted(*arguments: Any) -> Tensor:
        drawn.append(len(arguments[3]))
        return sample_masks(*arguments)

    monkeypatch.setattr("medsegdiff.ensemble.sample_masks", counted)
    monkeypatch.setattr("medsegdiff.memory.room_on_cpu", lambda: items * bytes_per_sample(MODEL, 16, 16) + 1)
    for tight, wide in zip(segment_many(segmenter, inputs, sampling), usual, strict=True):
        assert torch.equal(tight.masks, wide.masks)
        assert torch.equal(tight.member_voxels, wide.member_voxels)
    assert max(drawn) == {1: 1, 5: 4}[items]


def test_volume_ranges_of_patients_cover_the_truth_or_not(fresh: Segmenter, cases: tuple[PreparedCase, ...]) -> None:
    """Sizes of all a patient's images are summed member by member; one member makes no range."""
    scores = score_cases(noisy(DATASET), cases, SamplingConfig(steps=1, members=4), 0, distances=False)
    answers = list(segment_prepared(noisy(DATASET), cases, SamplingConfig(steps=1, members=4), 0))
    sums = answers[3].member_voxels + answers[4].member_voxels
    size = scores[3].sizes["lesion"]
    assert (size.unit, size.low, size.high) == ("voxels", float(sums.min()), float(sums.max()))
    assert size.true == 2 * 36
    assert size.predicted == float(answers[3].masks.sum() + answers[4].masks.sum())
    assert score_cases(fresh, cases[:1], SamplingConfig(steps=1), 0, distances=False)[0].sizes == {}


def test_a_perfect_network_scores_one_and_an_inverted_one_zero(
    fresh: Segmenter, cases: tuple[PreparedCase, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One score per patient, in order; pictures of one patient are pooled."""
    bright = Segmenter(fresh.card, Bright(MODEL), fresh.diffusion, fresh.scheme)
    scores = score_cases(bright, cases, SAMPLING, 0, distances=False)
    assert [score.patient_id for score in scores] == ["p0", "p1", "p2", "p3"]
    assert [score.mean_dice for score in scores] == [1.0] * 4
    assert [score.volumes for score in scores] == [1, 1, 1, 2]
    monkeypatch.setattr(Bright, "image_features", lambda self, image: [-image])
    assert [score.dice["lesion"] for score in score_cases(bright, cases, SAMPLING, 0, distances=False)] == [0.0] * 4


def test_progress_names_site_and_round(fresh: Segmenter, cases: tuple[PreparedCase, ...]) -> None:
    """One report per case."""
    heard: list[Progress] = []
    with listening(heard.append):
        score_cases(fresh, cases, SAMPLING, 0, site="north", round_=3, distances=False)
    assert heard == [Progress("evaluate", number, 5, "north", 3) for number in range(1, 6)]
