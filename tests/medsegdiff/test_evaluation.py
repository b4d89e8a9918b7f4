"""Masks and scores of prepared cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from medsegdiff.config import DiffusionConfig, ModelConfig, SamplingConfig
from medsegdiff.data.cases import Case, Dataset, DatasetConfig
from medsegdiff.data.geometry import Geometry
from medsegdiff.data.prepare import prepare
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.evaluation import score_cases, segment_many, segment_prepared, segment_slices
from medsegdiff.network import MedSegDiff
from medsegdiff.progress import Progress, listening
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
