"""Slices go into the square and come out again where they were."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medsegdiff.data.cases import DatasetConfig
from medsegdiff.data.geometry import Geometry, Letterbox, restack, restore, to_slices
from medsegdiff.data.images import Placement, Volume
from medsegdiff.data.prepare import prepare_image, prepare_labels

SIDE = st.integers(1, 40)
SPACING = st.floats(0.2, 5)
GEOMETRIES = st.builds(
    Geometry, st.tuples(SIDE, SIDE, SIDE), st.integers(0, 2), st.none() | st.tuples(SPACING, SPACING, SPACING)
)


@given(GEOMETRIES, st.sampled_from([16, 48, 64]))
def test_the_letterbox_keeps_the_aspect_ratio_in_millimetres(geometry: Geometry, size: int) -> None:
    """The longer side in mm fills the square, the other is in proportion, and the box is centred inside."""
    box = Letterbox.of(geometry, size)
    extent = np.array(geometry.plane) * np.array(geometry.plane_spacing_mm)
    found = np.array([box.height, box.width])
    assert found.max() == size
    assert np.all(
        np.abs(found - extent / extent.max() * size) <= np.maximum(0.5 + 1e-6, 1 - extent / extent.max() * size)
    )
    assert 0 <= size - box.height - 2 * box.top <= 1
    assert 0 <= size - box.width - 2 * box.left <= 1


def test_spacing_decides_the_proportions() -> None:
    """20 x 20 voxels of 1 x 2 mm become twice as wide as high; ignoring the spacing would give a square."""
    box = Letterbox.of(Geometry((20, 20, 5), 2, (1.0, 2.0, 9.0)), 64)
    assert (box.height, box.width) == (32, 64)
    box = Letterbox.of(Geometry((20, 5, 20), 1, (1.0, 9.0, 2.0)), 64)
    assert (box.height, box.width) == (32, 64)
    assert Letterbox.of(Geometry((20, 20, 1), 2, (1.0, 2.0)), 64) == Letterbox(16, 0, 32, 64)


@given(GEOMETRIES)
def test_restack_undoes_to_slices(geometry: Geometry) -> None:
    """Whatever the axis, slices put back give the volume."""
    volume = torch.arange(2 * math.prod(geometry.shape)).reshape(2, *geometry.shape)
    slices = to_slices(volume, geometry)
    assert slices.shape == (geometry.slices, 2, *geometry.plane)
    assert torch.equal(restack(slices, geometry), volume)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_are_what_indexing_gives(axis: int) -> None:
    """Slice i along an axis is the array indexed there, with the other axes in their order."""
    volume = torch.arange(2 * 3 * 4).reshape(1, 2, 3, 4)
    slices = to_slices(volume, Geometry((2, 3, 4), axis, None))
    for index in range(volume.shape[axis + 1]):
        assert torch.equal(slices[index], volume.select(axis + 1, index))


def smooth_volume(shape: tuple[int, int, int], spacing: tuple[float, float, float] | None) -> Volume:
    x, y, z = np.meshgrid(*[np.linspace(0, 1, n) for n in shape], indexing="ij")
    array = (np.sin(3 * x) + np.cos(2 * y) + z)[None].astype(np.float32)
    return Volume(array, spacing, Placement(np.eye(4), np.array([[0, 1], [1, 1], [2, 1]], float), shape))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("spacing", [None, (1.0, 1.5, 0.7)])
def test_restore_undoes_the_letterbox(axis: int, spacing: tuple[float, float, float] | None) -> None:
    """A smooth image comes back to its native size and place; a shift by two voxels would be far off."""
    volume = smooth_volume((40, 50, 36), spacing)
    config = DatasetConfig("d", "MR", ("x",), {"background": 0, "a": 1}, slice_axis=axis)
    geometry = volume.geometry(config)
    prepared = prepare_image(volume, 96, config)
    assert prepared.shape == (geometry.slices, 1, 96, 96)
    back = restack(restore(prepared, geometry), geometry)[0].numpy()
    native = volume.array[0]
    expected = (native - native.mean()) / native.std()
    inner = (slice(4, -4),) * 3
    error = np.abs(back - expected)[inner].max()
    moved = max(np.abs(np.roll(back, 2, moving) - expected)[inner].max() for moving in range(3) if moving != axis)
    assert error < 0.05 < moved


@given(GEOMETRIES, st.integers(0, 100))
def test_labels_are_taken_from_the_nearest_voxel(geometry: Geometry, seed: int) -> None:
    """Every network pixel holds the label of the native voxel its centre lies in; outside lies background."""
    native = torch.from_numpy(np.random.default_rng(seed).integers(1, 5, (2, *geometry.shape), dtype=np.uint8))
    labels = prepare_labels(native, 24, geometry)
    box = Letterbox.of(geometry, 24)
    slices = to_slices(native, geometry)
    rows, row_sure = _nearest(geometry.plane[0], box.height)
    columns, column_sure = _nearest(geometry.plane[1], box.width)
    expected = slices[:, :, rows][..., columns].transpose(0, 1)
    inside = labels[..., box.top : box.top + box.height, box.left : box.left + box.width]
    sure = row_sure[:, None] & column_sure
    assert torch.equal(inside[..., sure], expected[..., sure])
    outside = labels.clone()
    outside[..., box.top : box.top + box.height, box.left : box.left + box.width] = 0
    assert not outside.any()


def _nearest(native: int, size: int) -> tuple[Tensor, Tensor]:
    """The native voxel that each pixel's centre lies in, and whether it lies clearly inside it."""
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * native / size
    return centre.floor().long(), (centre - centre.round()).abs() > 1e-4
