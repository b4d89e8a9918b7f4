"""Distances of surfaces: MONAI with our arguments gives what the definitions give, in millimetres."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist
from torch import Tensor

from medsegdiff.surface import SurfaceScore, assd_mm, hd95_mm, score_surface, surface_dice

FULL, EMPTY = torch.zeros(6, 5, 4, dtype=torch.bool), torch.zeros(6, 5, 4, dtype=torch.bool)
FULL[1:4, 1:4, 1:3] = True


def ragged(seed: int, shape: tuple[int, ...] = (12, 11, 10)) -> tuple[Tensor, Tensor]:
    """Two boxes that overlap, with holes, one of them at the border."""
    predicted, truth = torch.zeros(2, *shape, dtype=torch.bool)
    predicted[tuple(slice(0, size // 2) for size in shape)] = True
    truth[tuple(slice(size // 4, 3 * size // 4) for size in shape)] = True
    return predicted & (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.9), truth


def naive_assd(predicted: Tensor, truth: Tensor, spacing: tuple[float, ...]) -> float:
    """The mean over all surface voxels of both masks of the distance to the nearest one of the other."""

    def surface(mask: Tensor) -> Tensor:
        array = mask.numpy()
        return torch.from_numpy(array & ~binary_erosion(array)).nonzero() * torch.tensor(spacing)

    distances = torch.from_numpy(cdist(surface(predicted), surface(truth)))
    return float(torch.cat([distances.amin(dim=1), distances.amin(dim=0)]).mean())


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 2.0, 3.0)])
@pytest.mark.parametrize("seed", range(3))
def test_assd_equals_the_distances_between_all_surface_voxels(seed: int, spacing: tuple[float, ...]) -> None:
    """Both directions in one mean; neither one direction alone nor the mean of the two means."""
    predicted, truth = ragged(seed)
    expected = naive_assd(predicted, truth, spacing)
    assert assd_mm(predicted, truth, spacing) == pytest.approx(expected, rel=1e-5)
    assert assd_mm(truth, predicted, spacing) == pytest.approx(expected, rel=1e-5)


def naive_contour(mask: Tensor, spacing: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Corners of pixels where the contour passes, in mm, and its length there, as marching squares draw it."""
    padded = torch.nn.functional.pad(mask.int(), (1, 1, 1, 1))
    places, lengths = [], []
    slanted = math.hypot(*spacing) / 2  # cuts one corner off
    for row, column in itertools.product(range(padded.shape[0] - 1), range(padded.shape[1] - 1)):
        four = padded[row : row + 2, column : column + 2]
        if int(four.sum()) in (0, 4):
            continue
        if int(four.sum()) in (1, 3):
            length = slanted
        elif bool(four[0, 0] == four[1, 1]):
            length = 2 * slanted
        else:
            length = spacing[1] if bool(four[0, 0] == four[0, 1]) else spacing[0]
        places.append([row * spacing[0], column * spacing[1]])
        lengths.append(length)
    return torch.tensor(places), torch.tensor(lengths)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 1.9)])
@pytest.mark.parametrize("seed", range(3))
def test_surface_dice_of_pictures_is_the_share_of_the_contours_length(seed: int, spacing: tuple[float, float]) -> None:
    """Every piece of contour by its length; counting pixels instead gives another number where spacing differs."""
    predicted, truth = ragged(seed, (20, 18))
    (p, p_length), (t, t_length) = naive_contour(predicted, spacing), naive_contour(truth, spacing)
    distances = torch.from_numpy(cdist(p, t))
    for tolerance in (0.5, 1.0, 2.5):
        near_p, near_t = distances.amin(dim=1) <= tolerance, distances.amin(dim=0) <= tolerance
        expected = float((p_length[near_p].sum() + t_length[near_t].sum()) / (p_length.sum() + t_length.sum()))
        found = surface_dice(predicted[..., None], truth[..., None], spacing, tolerance)
        assert found == pytest.approx(expected, rel=1e-5)
        assert surface_dice(truth[..., None], predicted[..., None], (*spacing, 9.0), tolerance) == found
        counted = float((near_p.sum() + near_t.sum()) / (len(p) + len(t)))
        if spacing[0] != spacing[1] and 0.1 < expected < 0.9:
            assert found != pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ((1.0, 1.0, 1.0), (0.415734, 0.703984, 0.934302, 1.0)),
        ((0.5, 0.75, 3.0), (0.620129, 0.780365, 0.895349, 0.938238)),
    ],
)
def test_surface_dice_of_volumes_is_that_of_its_authors(
    spacing: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    """Two ellipsoids; the figures are those of the package surface-distance 0.1 (DeepMind's, the Decathlon's)."""
    x, y, z = torch.meshgrid(torch.arange(16), torch.arange(14), torch.arange(12), indexing="ij")
    truth = ((x - 7) / 5) ** 2 + ((y - 6) / 4) ** 2 + ((z - 5) / 3) ** 2 <= 1
    predicted = ((x - 8) / 5) ** 2 + ((y - 7) / 5) ** 2 + ((z - 6) / 4) ** 2 <= 1
    found = [surface_dice(predicted, truth, spacing, tolerance) for tolerance in (0.5, 1.0, 2.0, 3.0)]
    assert found == pytest.approx(expected, abs=2e-6)


def test_a_shift_in_known_millimetres() -> None:
    """A slab moved by one voxel of 3 mm: its faces are 3 mm apart, within a tolerance of 3 and not of 2.9."""
    truth = torch.zeros(30, 30, 8, dtype=torch.bool)
    truth[:, :, 2:5] = True
    predicted, spacing = truth.roll(1, 2), (10.0, 10.0, 3.0)
    assert hd95_mm(predicted, truth, spacing) == pytest.approx(3.0)
    face, rim = 30 * 30, 4 * 29  # of the three layers two are face; of the rest only the rim, on the other's rim
    assert assd_mm(predicted, truth, spacing) == pytest.approx(3.0 * (2 * face - rim) / (2 * face + rim))
    assert surface_dice(predicted, truth, spacing, 3.0) == pytest.approx(1.0)
    assert 0 < (surface_dice(predicted, truth, spacing, 2.9) or 0) < 0.2


@pytest.mark.parametrize(
    ("predicted", "truth", "distance", "share"),
    [(EMPTY, EMPTY, 0.0, 1.0), (FULL, EMPTY, None, 0.0), (EMPTY, FULL, None, 0.0), (FULL, FULL, 0.0, 1.0)],
    ids=["both empty", "truth empty", "prediction empty", "equal"],
)
def test_empty_masks(predicted: Tensor, truth: Tensor, distance: float | None, share: float) -> None:
    """As the table of docs/metrics.md says, with every tolerance; without one nothing but HD95 is computed."""
    for tolerance in (0.0, 1.0, 50.0):
        assert score_surface(predicted, truth, (1, 1, 1), tolerance) == SurfaceScore(distance, distance, share)
    assert score_surface(predicted, truth, (1, 1, 1)) == SurfaceScore(distance)


def test_single_voxels_and_lines_have_distances() -> None:
    """The smallest masks there are, and images of one row."""
    one, other = torch.zeros(2, 5, 5, 5, dtype=torch.bool)
    one[0, 0, 0] = other[3, 0, 0] = True
    assert assd_mm(one, other, (2.0, 1.0, 1.0)) == pytest.approx(6.0)
    assert surface_dice(one, other, (2.0, 1.0, 1.0), 6.0) == pytest.approx(1.0)
    assert surface_dice(one, other, (2.0, 1.0, 1.0), 1.0) == 0.0
    line, moved = one[:, :1, :1], other[:, :1, :1]
    assert assd_mm(line, moved, (2.0, 1.0)) == assd_mm(line, moved, (2.0, 1.0, 1.0)) == pytest.approx(6.0)
    assert surface_dice(line, moved, (2.0, 1.0), 6.0) == pytest.approx(1.0)
