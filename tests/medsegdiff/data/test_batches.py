"""Batches are a pure function of seed and step, fair to every slice, and quick."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from medsegdiff.config import AugmentConfig, TrainingConfig
from medsegdiff.data.batches import SliceBatches, SliceTable
from medsegdiff.data.cases import Case, Dataset, DatasetConfig
from medsegdiff.data.dataset import open_dataset
from medsegdiff.data.prepare import prepare
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.errors import UserError
from medsegdiff.labels import LabelScheme

NOTHING = AugmentConfig(flip=False, rotate_degrees=0, scale=0, shift=0, intensity=0, gamma=0, noise=0)


@pytest.fixture
def volumes(
    nifti: Callable[..., Path], volume_config: DatasetConfig, tmp_path: Path
) -> tuple[tuple[PreparedCase, ...], LabelScheme]:
    """Three volumes of 4, 5, 6 slices; slice k of volume v shows the grey value 10 v + k; every third is labelled.

    The second volume has two raters: the first draws label 1 everywhere, the second label 2.
    """
    cases = []
    for number in range(3):
        depth = 4 + number
        image = np.zeros((8, 8, depth), np.float32)
        image[:4] = 10 * number + np.arange(depth) - 1000  # normalisation turns it monotonically, values stay distinct
        image[0, 0] = 500
        mask = np.zeros((8, 8, depth), np.uint8)
        mask[:, :, ::3] = 1
        masks = [nifti(tmp_path / f"m{number}.nii", mask)]
        if number == 1:
            masks.append(nifti(tmp_path / "second.nii", mask * 2))
        path = nifti(tmp_path / f"i{number}.nii", image)
        cases.append(Case(f"c{number}", f"p{number}", (path,), tuple(masks)))
    dataset = Dataset(tmp_path, volume_config, tuple(cases))
    return prepare(dataset, 8, tmp_path / "cache").cases, LabelScheme.of(volume_config)


def training(batch_size: int = 4, foreground: float = 0.0, augment: AugmentConfig = NOTHING) -> TrainingConfig:
    return TrainingConfig(batch_size=batch_size, foreground_fraction=foreground, augment=augment)


def numbers_of(batches: SliceBatches, step: int) -> list[int]:
    return [number for stream in batches._streams for number in stream.take(step)]


def test_a_batch_depends_on_seed_and_step_alone(volumes: tuple[tuple[PreparedCase, ...], LabelScheme]) -> None:
    """Resuming at step 7 gives the batch an uninterrupted run would have seen, bit for bit."""
    cases, scheme = volumes
    config = training(foreground=0.5, augment=AugmentConfig())
    through = SliceBatches(cases, scheme, config, seed=3)
    seen = [through.batch(step) for step in range(9)]
    resumed = SliceBatches(cases, scheme, config, seed=3).batch(7)
    assert torch.equal(resumed[0], seen[7][0])
    assert torch.equal(resumed[1], seen[7][1])
    again = through.batch(2)  # going back works as well
    assert torch.equal(again[0], seen[2][0])
    other = SliceBatches(cases, scheme, config, seed=4).batch(7)
    assert not torch.equal(other[0], seen[7][0])
    assert not torch.equal(seen[7][0], seen[6][0])


def test_a_slice_is_changed_otherwise_at_every_step(volumes: tuple[tuple[PreparedCase, ...], LabelScheme]) -> None:
    """Augmentation is drawn anew: the same slice in the same place of a batch comes out differently each time."""
    cases, scheme = volumes
    batches = SliceBatches(cases[:1], scheme, training(1, augment=AugmentConfig()), 0)
    seen: dict[int, list[Tensor]] = {}
    for step in range(12):
        seen.setdefault(numbers_of(batches, step)[0], []).append(batches.batch(step)[0])
    for images in seen.values():
        assert len(images) == 3
        assert not torch.allclose(images[0], images[1], atol=1e-3)
        assert not torch.allclose(images[1], images[2], atol=1e-3)


def test_shapes_and_values(volumes: tuple[tuple[PreparedCase, ...], LabelScheme]) -> None:
    """Images are float32 (B, C, S, S), masks -1 or +1 (B, K, S, S)."""
    images, masks = SliceBatches(*volumes, training(5, augment=AugmentConfig()), 0).batch(0)
    assert images.shape == (5, 1, 8, 8)
    assert images.dtype == torch.float32
    assert masks.shape == (5, 3, 8, 8)
    assert set(masks.unique().tolist()) == {-1.0, 1.0}


def test_an_epoch_is_a_permutation_of_all_slices(volumes: tuple[tuple[PreparedCase, ...], LabelScheme]) -> None:
    """Fifteen slices in batches of four: after 15 batches each has come exactly four times, once an epoch."""
    batches = SliceBatches(*volumes, training(4), 0)
    assert len(batches.table) == 15
    drawn = [number for step in range(15) for number in numbers_of(batches, step)]
    for epoch in range(4):
        assert sorted(drawn[15 * epoch : 15 * epoch + 15]) == list(range(15))
    assert drawn[:15] != drawn[15:30]


def test_images_and_masks_belong_to_the_drawn_slices(volumes: tuple[tuple[PreparedCase, ...], LabelScheme]) -> None:
    """Without augmentation a batch holds exactly what the cases hold, at the drawn numbers."""
    cases, scheme = volumes
    batches = SliceBatches(cases, scheme, training(15), 0)
    flat = [(case, index) for case in cases for index in range(case.slices)]
    images, masks = batches.batch(0)
    for image, mask, number in zip(images, masks, numbers_of(batches, 0), strict=True):
        case, index = flat[number]
        assert torch.equal(image, case.image(index))
        options = [scheme.encode(case.labels(index, rater)[None])[0] for rater in range(case.raters)]
        assert any(torch.equal(mask, option) for option in options)


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_part_of_a_batch_holds_foreground(
    volumes: tuple[tuple[PreparedCase, ...], LabelScheme], fraction: float, expected: int
) -> None:
    """At least the stated share of every batch shows a target, and labelled slices come equally often."""
    cases, scheme = volumes
    batches = SliceBatches(cases, scheme, training(4, fraction), 0)
    marked = batches.table.foreground(scheme)
    assert marked == [0, 3, 4, 7, 9, 12]
    stream = batches._streams[1]
    drawn = Counter(number for step in range(30) for number in stream.take(step))
    assert sum(drawn.values()) == 30 * expected
    if expected:
        assert set(drawn) == set(marked)
        assert max(drawn.values()) - min(drawn.values()) <= 1
    for step in range(30):
        _, masks = batches.batch(step)
        assert ((masks[:, 1:] > 0).flatten(1).any(dim=1)).sum() >= expected


def test_without_any_foreground_the_batch_comes_from_all(volumes: tuple[tuple[PreparedCase, ...], LabelScheme]) -> None:
    """A site that has no lesion at all still trains."""
    cases, _ = volumes
    scheme = LabelScheme(("background", "a", "b"), ("b",), ((2,),))
    batches = SliceBatches([cases[0]], scheme, training(4, 0.5), 0)
    assert batches.batch(0)[0].shape[0] == 4


def test_raters_are_drawn_at_random_for_each_slice(volumes: tuple[tuple[PreparedCase, ...], LabelScheme]) -> None:
    """Both raters of the second volume are seen about equally often."""
    cases, scheme = volumes
    batches = SliceBatches([cases[1]], scheme, training(5, 1.0), 0)
    first = sum(int((batches.batch(step)[1][:, 1] > 0).flatten(1).any(1).sum()) for step in range(80))
    second = sum(int((batches.batch(step)[1][:, 2] > 0).flatten(1).any(1).sum()) for step in range(80))
    assert first + second == 400
    assert 150 < first < 250


def test_mapped_reading_equals_reading_from_memory(volumes: tuple[tuple[PreparedCase, ...], LabelScheme]) -> None:
    """Whether slices lie in memory or are read from disk makes no difference."""
    cases, _ = volumes
    raters = torch.rand(15, generator=torch.Generator().manual_seed(0)).tolist()
    held, mapped = (SliceTable(cases, ram_bytes).read(range(15), raters) for ram_bytes in (10**9, 0))
    assert torch.equal(held[0], mapped[0])
    assert torch.equal(held[1], mapped[1])


def test_no_cases_and_mixed_cases_are_refused(
    volumes: tuple[tuple[PreparedCase, ...], LabelScheme],
    picture_folder: Callable[..., Path],
    grey_config: DatasetConfig,
    tmp_path: Path,
) -> None:
    """Nothing to train on is the user's line; cases of two sizes are a defect of the caller."""
    cases, scheme = volumes
    with pytest.raises(UserError, match="no case to train on"):
        SliceBatches([], scheme, training(), 0)
    other = prepare(open_dataset(picture_folder(1), grey_config), 16, tmp_path / "cache").cases
    with pytest.raises(ValueError, match="different networks"):
        SliceBatches([*cases, *other], scheme, training(), 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_of_the_cpu(volumes: tuple[tuple[PreparedCase, ...], LabelScheme]) -> None:
    """But for the added noise, augmentation on a GPU gives what it gives on a CPU."""
    config = training(15, augment=AugmentConfig(noise=0))
    (here, masks), (there, masks_there) = (
        SliceBatches(*volumes, config, 0, device).batch(3) for device in ("cpu", "cuda")
    )
    assert there.is_cuda
    assert masks_there.is_cuda
    assert torch.allclose(here, there.cpu(), atol=1e-3)
    assert (masks != masks_there.cpu()).float().mean() < 0.01


def test_a_batch_takes_a_few_milliseconds(
    picture_folder: Callable[..., Path], grey_config: DatasetConfig, tmp_path: Path
) -> None:
    """At 48 pixels and 16 slices with augmentation: 1-4 ms on one core; the limit allows for a busy machine."""
    cases = prepare(open_dataset(picture_folder(20), grey_config), 48, tmp_path / "cache").cases
    batches = SliceBatches(cases, LabelScheme.of(grey_config), TrainingConfig(foreground_fraction=0.5), 0)
    batches.batch(0)
    fastest = min(_seconds(batches, step) for step in range(20))
    assert fastest < 0.02


def _seconds(batches: SliceBatches, step: int) -> float:
    start = time.perf_counter()
    batches.batch(step)
    return time.perf_counter() - start
