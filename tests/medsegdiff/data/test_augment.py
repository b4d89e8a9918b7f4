"""Random changes keep image and mask together and depend on the generator alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scipy import ndimage
from torch import Generator, Tensor

from medsegdiff.config import AugmentConfig
from medsegdiff.data import augment as module
from medsegdiff.data.augment import augment

NOTHING = AugmentConfig(flip=False, rotate_degrees=0, scale=0, shift=0, intensity=0, gamma=0, noise=0)
SPATIAL = dataclasses.replace(NOTHING, flip=True, rotate_degrees=30, scale=0.2, shift=0.1)


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def only(**changes: float | bool) -> AugmentConfig:
    return dataclasses.replace(NOTHING, **changes)  # type: ignore[arg-type]


def batch(size: int = 24, count: int = 6) -> tuple[Tensor, Tensor]:
    """Smooth images with two channels, and labels of three discs."""
    generator = seeded(1)
    noise = torch.randn(count, 2, size, size, generator=generator).numpy()
    images = torch.from_numpy(ndimage.gaussian_filter(noise, (0, 0, 2, 2))) * 5
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    labels = torch.zeros(count, size, size, dtype=torch.uint8)
    for index, (row, column) in enumerate([(7, 8), (16, 9), (12, 16)], start=1):
        labels[:, (y - row) ** 2 + (x - column) ** 2 < 12] = index
    return images, labels


def test_everything_switched_off_changes_nothing() -> None:
    """Zeros and false leave the batch as it is."""
    images, labels = batch()
    changed, moved = augment(images, labels, NOTHING, seeded())
    assert torch.equal(changed, images)
    assert torch.equal(moved, labels)


def test_the_generator_alone_decides() -> None:
    """Equal states give equal bits, another state others; the input is untouched."""
    images, labels = batch()
    before = images.clone(), labels.clone()
    config = AugmentConfig(shift=0.1)
    one, two, other = (augment(images, labels, config, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])


def test_flips_are_one_of_four_mirrorings_for_image_and_mask_alike() -> None:
    """All four occur, each the same in image and labels."""
    images, labels = batch(count=64)
    changed, moved = augment(images, labels, only(flip=True), seeded())
    seen = set()
    for before, after, mask, moved_mask in zip(images, changed, labels, moved, strict=True):
        ways = [axes for axes in ((), (1,), (2,), (1, 2)) if torch.allclose(before.flip(axes), after, atol=1e-4)]
        assert len(ways) == 1
        seen.add(ways[0])
        assert torch.equal(mask.flip([axis - 1 for axis in ways[0]]), moved_mask)
    assert len(seen) == 4


@pytest.mark.parametrize("config", [SPATIAL, only(rotate_degrees=180), only(scale=0.3), only(shift=0.2)])
def test_labels_move_with_the_image(config: AugmentConfig) -> None:
    """An image that shows the labels still shows them afterwards; labels moved otherwise would not agree."""
    _, labels = batch(48, 16)
    images = labels[:, None].float()
    changed, moved = augment(images, labels, config, seeded())
    assert moved.dtype == torch.uint8
    assert set(moved.unique().tolist()) <= {0, 1, 2, 3}
    close = ((changed[:, 0] - moved).abs() < 0.51) | (changed[:, 0] != changed[:, 0].round())
    assert close.float().mean() > 0.999
    _, otherwise = augment(images, labels, config, seeded(9))
    agree = ((changed[:, 0].round() == moved) & (moved > 0)).sum() / (moved > 0).sum()
    wrong = ((changed[:, 0].round() == otherwise) & (otherwise > 0)).sum() / (otherwise > 0).sum()
    assert agree > 0.85 > wrong


def test_rotation_equals_scipys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed angle gives scipy's rotation inside the square."""
    images, labels = batch()
    monkeypatch.setattr(module, "_uniform", lambda limit, shape, generator: torch.full(shape, limit))
    turned, _ = augment(images, labels, only(rotate_degrees=20), seeded())
    expected = ndimage.rotate(images.numpy(), -20, axes=(2, 3), reshape=False, order=1, mode="nearest")
    opposite = ndimage.rotate(images.numpy(), 20, axes=(2, 3), reshape=False, order=1, mode="nearest")
    inner = (slice(None), slice(None), slice(6, -6), slice(6, -6))
    difference = min(abs(turned.numpy() - found)[inner].max() for found in (expected, opposite))
    assert difference < 1e-3


def test_zoom_and_shift_have_the_documented_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zoom 1.25 makes a square of 20 pixels 25 wide; a shift of 0.25 moves it by a quarter of the side."""
    image = torch.zeros(1, 1, 64, 64)
    image[..., 22:42, 22:42] = 1
    labels = image[:, 0].to(torch.uint8)
    monkeypatch.setattr(module, "_uniform", lambda limit, shape, generator: torch.full(shape, limit))
    _, zoomed = augment(image, labels, only(scale=0.25), seeded())
    assert zoomed[0, 32].sum() == pytest.approx(25, abs=1)
    _, shifted = augment(image, labels, only(shift=0.25), seeded())
    assert torch.equal(shifted[0, 6:26, 6:26], torch.ones(20, 20, dtype=torch.uint8))


def test_angles_and_zooms_cover_their_range() -> None:
    """Drawn transformations lie within the limits and come close to them."""
    matrices = module._affine(4000, only(rotate_degrees=15, scale=0.1), seeded())
    zoom = 1 / torch.linalg.det(matrices[:, :, :2]).sqrt()
    angle = torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0]) * 180 / math.pi
    assert 14.5 < angle.abs().max() <= 15.001
    assert zoom.min() == pytest.approx(0.9, abs=0.01)
    assert zoom.max() == pytest.approx(1.1, abs=0.01)


def test_intensity_is_a_gain_and_an_offset_per_channel() -> None:
    """Each channel changes linearly, within limits, and not as its neighbour does; labels stay."""
    images, labels = batch(count=50)
    changed, moved = augment(images, labels, only(intensity=0.2), seeded())
    assert torch.equal(moved, labels)
    x, y = images.flatten(2), changed.flatten(2)
    gain = ((x - x.mean(2, True)) * (y - y.mean(2, True))).sum(2) / ((x - x.mean(2, True)) ** 2).sum(2)
    offset = y.mean(2) - gain * x.mean(2)
    assert torch.allclose(y, gain[..., None] * x + offset[..., None], atol=1e-4)
    assert 0.19 < (gain - 1).abs().max() <= 0.2001
    assert 0.19 < offset.abs().max() <= 0.2001
    assert (gain[:, 0] - gain[:, 1]).abs().max() > 0.1
    assert (offset[:, 0] - offset[:, 1]).abs().max() > 0.1


def test_gamma_keeps_order_and_range() -> None:
    """A channel's darkest and brightest values stay, and so does the order of all others."""
    images, labels = batch()
    changed, _ = augment(images, labels, only(gamma=0.5), seeded())
    assert torch.allclose(changed.amin((2, 3)), images.amin((2, 3)), atol=1e-4)
    assert torch.allclose(changed.amax((2, 3)), images.amax((2, 3)), atol=1e-4)
    for before, after in zip(images.flatten(0, 1), changed.flatten(0, 1), strict=True):
        assert (after.flatten()[before.flatten().argsort()].diff() >= -1e-5).all()
    assert not torch.allclose(changed, images, atol=0.05)
    constant = torch.full((1, 1, 4, 4), 2.0)
    assert torch.allclose(augment(constant, labels[:1, :4, :4], only(gamma=0.5), seeded())[0], constant)


def test_noise_is_at_most_as_strong_as_stated() -> None:
    """Each slice has its own strength below the limit."""
    images, labels = torch.zeros(40, 1, 64, 64), torch.zeros(40, 64, 64, dtype=torch.uint8)
    changed, _ = augment(images, labels, only(noise=0.1), seeded())
    strength = changed.flatten(1).std(dim=1)
    assert 0.08 < strength.max() < 0.105
    assert strength.min() < 0.02
    assert changed.mean().abs() < 1e-3
