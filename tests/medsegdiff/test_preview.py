"""The preview: which way round a scan hangs, its proportions, and what is drawn on it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from medsegdiff.data.images import Placement, Volume
from medsegdiff.preview import COLOURS, LINE, MARGIN, PANEL, preview

SHAPE, SPACING = (40, 20, 10), (1.0, 2.0, 3.0)  # 40 x 40 x 30 mm
TOP = MARGIN + 2 * LINE  # of the first panel
FAR = np.array([39, 19, 9])  # the right, front, upper corner


def volume(array: np.ndarray, spacing: tuple[float, ...] = SPACING) -> Volume:
    return Volume(array[None].astype(np.float32), spacing, Placement(np.eye(4), np.zeros((3, 2)), array.shape))


def drawn(*arguments: object) -> np.ndarray:
    """The picture's pixels, (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(preview(*arguments)))).astype(int)  # type: ignore[arg-type]


def panels(pixels: np.ndarray, sizes: list[tuple[int, int]], column: int) -> list[np.ndarray]:
    """The panels of one column, top down; sizes are (height, width)."""
    found, top = [], TOP
    for height, width in sizes:
        left = MARGIN + column * (PANEL + MARGIN)
        found.append(pixels[top : top + height, left : left + width])
        top += height + LINE + MARGIN
    return found


def centre(bright: np.ndarray) -> tuple[float, float]:
    """Of what is bright, from top left, as fractions of height and width."""
    rows, columns = np.nonzero(bright)
    return rows.mean() / bright.shape[0], columns.mean() / bright.shape[1]


SIZES = [(320, 320), (240, 320), (240, 320)]  # axial 40 x 40 mm, coronal and sagittal 30 x 40 mm


@pytest.mark.parametrize("corner", [(39, 19, 9), (0, 19, 9), (39, 0, 9), (39, 19, 0), (0, 0, 0)])
def test_volumes_hang_as_radiologists_hang_them(corner: tuple[int, int, int]) -> None:
    """A bright block in a corner of the body: right is left and front is up (axial), up is up, front is left
    (sagittal)."""
    array = np.zeros(SHAPE)
    block = tuple(slice(0, n // 4) if at == 0 else slice(n - n // 4, n) for at, n in zip(corner, SHAPE, strict=True))
    array[block] = 100
    pixels = drawn(volume(array), array[None] > 0, None, ["it"])
    right, front, upper = (at > 0 for at in corner)
    # (upper half of the panel?, left half?) for each plane
    expected = [(front, right), (upper, right), (upper, front)]
    for panel, (high, left) in zip(panels(pixels, SIZES, 0), expected, strict=True):
        y, x = centre(panel[20:-20, 20:-20].min(axis=2) > 128)  # without the marks at the edges
        assert (y < 0.5, x < 0.5) == (high, left)


def test_proportions_are_those_of_the_body() -> None:
    """A ball in millimetres is round in every plane though its voxels are not cubes."""
    grid = np.meshgrid(*[(np.arange(n) + 0.5) * s for n, s in zip(SHAPE, SPACING, strict=True)], indexing="ij")
    ball = sum((axis - middle) ** 2 for axis, middle in zip(grid, (20, 20, 15), strict=True)) < 100
    pixels = drawn(volume(np.zeros(SHAPE)), ball[None], None, ["ball"])
    for panel in panels(pixels, SIZES, 1):
        rows, columns = np.nonzero((panel == COLOURS[0]).all(axis=2))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert (height, width) == pytest.approx((160, 160), abs=26)  # 20 mm at 8 pixels a mm, a voxel of 3 mm at most


def test_outlines_and_uncertainty_lie_where_masks_are() -> None:
    """The outline is the mask's edge in its target's colour, the inside stays the scan; heat only where bits are."""
    masks, bits = np.zeros((2, *SHAPE), bool), np.zeros(SHAPE, np.float32)
    masks[0, 10:20, 5:15, 2:8] = True
    masks[1, 25:35, 5:15, 2:8] = True
    bits[10:20, 5:15, 2:8] = 1
    pixels = drawn(volume(np.zeros(SHAPE)), masks, bits, ["one", "two"])
    scan, outlined, heated = (panels(pixels, SIZES[:1], column)[0] for column in range(3))
    inside = (slice(100, 220), slice(180, 220))  # rows 80..240, columns 160..240 from the right: x = 10..20
    for colour, columns in ((COLOURS[0], (160, 239)), (COLOURS[1], (40, 119))):
        rows, found = np.nonzero((outlined == colour).all(axis=2))
        assert (rows.min(), rows.max(), found.min(), found.max()) == (80, 239, *columns)
    assert np.array_equal(outlined[inside], scan[inside])
    assert (heated[inside] == (255, 255, 0)).all()
    assert np.array_equal(heated[30:75, 30:150], scan[30:75, 30:150])


def test_without_a_mask_the_middle_slice_is_shown() -> None:
    """Nothing found: no outline, and the slice in the middle of each axis."""
    array = np.zeros(SHAPE)
    array[:, :, 5] = 100
    pixels = drawn(volume(array), np.zeros((1, *SHAPE), bool), None, ["it"])
    axial = panels(pixels, SIZES, 0)[0]
    assert (axial[60:120, 60:120] > 200).all()
    assert not (panels(pixels, SIZES, 1)[0] == COLOURS[0]).all(axis=2).any()


def test_a_colour_picture_stays_as_it_is_stored() -> None:
    """Rows first, colours kept, no marks of a body's sides; one row of panels."""
    array = np.zeros((3, 20, 40, 1), np.float32)
    array[0, :10, :20] = 255  # red, upper left
    array[1, 10:, 20:] = 255
    picture = Volume(array, None, None)
    pixels = drawn(picture, np.zeros((1, 20, 40, 1), bool), None, ["it"])
    (panel,) = panels(pixels, [(160, 320)], 0)
    assert (panel[20:60, 20:120] == (255, 0, 0)).all()
    assert (panel[100:140, 200:300] == (0, 255, 0)).all()
    assert (panel[20:60, 200:300] == 0).all()
    assert len(pixels) < TOP + 160 + 4 * LINE + 3 * MARGIN


@pytest.mark.parametrize(
    ("shape", "planes"), [((1, 12, 9), 1), ((12, 1, 9), 1), ((12, 9, 1), 1), ((1, 1, 1), 3), ((300, 2, 2), 3)]
)
def test_odd_shapes_are_drawn(shape: tuple[int, int, int], planes: int) -> None:
    """Single slices along any axis, from the front alone; a single voxel, a needle; constant grey values."""
    bits, spacing = np.ones(shape, np.float32), (1.0, 1.0, 1.0)
    pixels = drawn(volume(np.ones(shape), spacing), np.ones((9, *shape), bool), bits, ["x"] * 9)
    coloured = (pixels == COLOURS[8 % len(COLOURS)]).all(axis=2).any(axis=1)  # the outline of the last; and the legend
    starts = np.flatnonzero(coloured[1:] & ~coloured[:-1])
    assert len(starts) == planes + 2, "two of nine targets share a colour in the legend"
