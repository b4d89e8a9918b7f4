"""One picture a scan for a person to look at: the scan, what was found in it, and where the members disagree.

Volumes are shown as radiologists hang them: the patient's right on the left of axial and coronal slices, the front on
top of axial slices and on the left of sagittal ones, the head upwards. Pictures are shown as they are stored.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from medsegdiff.data.images import Volume

PANEL = 320  # pixels of a panel's longer side
MARGIN, LINE = 10, 22  # pixels
MOST_TARGETS = 12  # named in the legend
SAMPLE = 10**6  # voxels that the window of grey values is taken from
GROUND, TEXT = (18, 18, 18), (225, 225, 225)
# Okabe and Ito's colours, which the colour-blind tell apart, without their black.
COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167), (0, 114, 178),
)  # fmt: skip
# Axis of a volume -> the plane across it, where its slices are counted from, marks at the left, right, top and bottom.
_PLANES = {
    2: ("axial", "from below", "RLAP"),
    1: ("coronal", "from the back", "RLSI"),
    0: ("sagittal", "from the left", "APSI"),
}

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class _View:
    """One slice as it is shown: rows from top to bottom, columns from left to right."""

    grey: NDArray[np.float32]  # (rows, columns, 1 or 3)
    masks: NDArray[np.bool_]  # (T, rows, columns)
    uncertainty: NDArray[np.float32] | None  # (rows, columns)
    size: tuple[int, int]  # width and height of its panel in pixels, in proportion to millimetres
    title: str
    marks: str  # of the left, right, upper and lower edge; "" for a picture


def preview(
    volume: Volume, masks: NDArray[np.bool_], uncertainty: NDArray[np.float32] | None, legend: Sequence[str]
) -> bytes:
    """A PNG: beside each other the scan, the outlines of the masks and, where given, the uncertainty.

    Of a volume it shows the axial, coronal and sagittal slice with the largest mask, or the middle one without any.

    Args:
        masks: (T, X, Y, Z), in the order of `volume.array`.
        uncertainty: (X, Y, Z) in [0, 1] bits.
        legend: T lines, what stands beside the colour of each target.
    """
    views = [_picture(volume, masks, uncertainty)] if volume.placement is None else _slices(volume, masks, uncertainty)
    low, high = _window(volume)
    heads = ["scan", "segmentation", *([] if uncertainty is None else ["uncertainty"])]
    lines = [
        *legend[:MOST_TARGETS],
        *([f"and {len(legend) - MOST_TARGETS} more"] if len(legend) > MOST_TARGETS else []),
    ]
    column = max(PANEL // 2, *(view.size[0] for view in views)) + MARGIN
    heights = [view.size[1] + LINE + MARGIN for view in views]
    below = LINE * (len(lines) + (uncertainty is not None) + 1) + 2 * MARGIN
    canvas = Image.new("RGB", (MARGIN + column * len(heads), MARGIN + LINE + sum(heights) + below), GROUND)
    draw = ImageDraw.Draw(canvas)
    draw.font = ImageFont.load_default(14)
    for number, head in enumerate(heads):
        draw.text((MARGIN + column * number, MARGIN), head, TEXT)
    top = MARGIN + LINE
    for view, height in zip(views, heights, strict=True):
        draw.text((MARGIN, top), view.title, TEXT)
        for number, panel in enumerate(_panels(view, low, high)):
            at = (MARGIN + column * number, top + LINE)
            canvas.paste(Image.fromarray(panel), at)
            _mark(draw, view, at)
        top += height
    for number, line in enumerate(lines):
        if number < MOST_TARGETS:
            draw.rectangle((MARGIN, top + 4, MARGIN + 12, top + 16), COLOURS[number % len(COLOURS)])
        draw.text((MARGIN + 20, top), line, TEXT)
        top += LINE
    if uncertainty is not None:
        bits = np.linspace(0, 1, 100)[None].repeat(12, axis=0)
        canvas.paste(Image.fromarray(_heated(np.full((12, 100, 3), GROUND, np.uint8), bits)), (MARGIN, top + 4))
        draw.text((MARGIN + 108, top), "0 bits: all members agree; 1 bit: they are split evenly", TEXT)
        top += LINE
    draw.text((MARGIN, top), "Computed; not checked by a person.", TEXT)
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    return buffer.getvalue()


def _picture(volume: Volume, masks: NDArray[np.bool_], uncertainty: NDArray[np.float32] | None) -> _View:
    channels = volume.array[..., 0] if len(volume.array) == 3 else volume.array[:1, ..., 0]
    rows, columns = channels.shape[1:]
    spacing = volume.spacing_mm or (1.0, 1.0)
    size = _size(rows * spacing[0], columns * spacing[1])
    shown = None if uncertainty is None else uncertainty[..., 0]
    return _View(channels.transpose(1, 2, 0), masks[..., 0], shown, size, "", "")


def _slices(volume: Volume, masks: NDArray[np.bool_], uncertainty: NDArray[np.float32] | None) -> list[_View]:
    found = masks.any(axis=0)
    spacing = volume.spacing_mm or (1.0, 1.0, 1.0)
    views = []
    for axis, (plane, origin, marks) in _PLANES.items():
        across, along = (other for other in range(3) if other != axis)  # shown from left to right, from top to bottom
        if 1 in (found.shape[across], found.shape[along]) and max(found.shape) > 1:
            continue  # a single slice is a line when seen from its side
        counts = found.sum(axis=(across, along))
        index = int(counts.argmax()) if counts.any() else len(counts) // 2
        views.append(
            _View(
                _turned(np.take(volume.array[0], index, axis))[..., None],
                np.stack([_turned(np.take(mask, index, axis)) for mask in masks]),
                None if uncertainty is None else _turned(np.take(uncertainty, index, axis)),
                _size(found.shape[along] * spacing[along], found.shape[across] * spacing[across]),
                f"{plane}, slice {index + 1} of {len(counts)} {origin}",
                marks,
            )
        )
    return views


def _turned(plane: NDArray[Any]) -> NDArray[Any]:
    """A slice of RAS axes (first, second) as rows from the end of the second, columns from the end of the first."""
    return np.flip(plane).T


def _size(height: float, width: float) -> tuple[int, int]:
    scale = PANEL / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _window(volume: Volume) -> tuple[float, float]:
    """The grey values that are shown black and white: all but half a percent at either end."""
    step = max(1, round((volume.array.size / SAMPLE) ** (1 / 3)))
    low, high = np.percentile(volume.array[:, ::step, ::step, ::step], (0.5, 99.5))
    return float(low), float(max(high, low + 1e-6))


def _panels(view: _View, low: float, high: float) -> list[Pixels]:
    """The scan, the scan with outlines and the scan under the uncertainty: (height, width, 3) each."""
    grey = ((view.grey - low) / (high - low)).clip(0, 1) * 255
    shades = [_resized(part, view.size, Image.Resampling.BICUBIC) for part in np.moveaxis(grey.astype(np.uint8), 2, 0)]
    scan = np.stack(shades if len(shades) == 3 else shades * 3, axis=-1)
    outlined = scan.copy()
    for number, mask in enumerate(view.masks):
        shown = _resized(mask.astype(np.uint8), view.size, Image.Resampling.NEAREST) > 0
        outlined[_outline(shown)] = COLOURS[number % len(COLOURS)]
    if view.uncertainty is None:
        return [scan, outlined]
    percent = (view.uncertainty.clip(0, 1) * 255).astype(np.uint8)
    return [scan, outlined, _heated(scan, _resized(percent, view.size, Image.Resampling.NEAREST) / 255)]


def _resized(pixels: Pixels, size: tuple[int, int], how: Image.Resampling) -> Pixels:
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, how))


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The two outermost pixels of a mask: what an erosion takes away."""
    inner = mask
    for _ in range(2):
        wide = np.pad(inner, 1)
        inner = inner & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return mask & ~inner


def _heated(scan: Pixels, bits: NDArray[np.float64]) -> Pixels:
    """Red at half a bit, yellow at one, nothing at none; (H, W, 3) under (H, W)."""
    heat = np.stack([(2 * bits).clip(0, 1), (2 * bits - 1).clip(0, 1), np.zeros_like(bits)], axis=-1) * 255
    cover = (1.5 * bits).clip(0, 1)[..., None]
    blended: Pixels = (scan * (1 - cover) + heat * cover).astype(np.uint8)
    return blended


def _mark(draw: ImageDraw.ImageDraw, view: _View, at: tuple[int, int]) -> None:
    (x, y), (width, height) = at, view.size
    places = (
        (x + 4, y + height / 2, "lm"), (x + width - 4, y + height / 2, "rm"), (x + width / 2, y + 3, "ma"),
        (x + width / 2, y + height - 3, "md"),
    )  # fmt: skip
    for mark, (left, top, anchor) in zip(view.marks, places, strict=False):  # a picture has no marks
        draw.text((left, top), mark, TEXT, anchor=anchor, stroke_width=2, stroke_fill=(0, 0, 0))
