"""Pictures of an evaluation: the best and the worst cases, and whether probabilities mean what they say.

Equal input gives equal bytes: Matplotlib's object API without pyplot, its default settings, no date in any file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray
from torch import Tensor

from medsegdiff.calibration import Calibration
from medsegdiff.data.geometry import restore, to_slices
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.evaluation import Segmentation
from medsegdiff.labels import LabelScheme
from medsegdiff.raters import majority
from server.plots import DOTTED, FAINT, INK, SETTINGS, TARGET_COLOURS, draw_contours, uncertainty_colour

SHOWN = 3  # best and worst each
PICTURES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp", ".gif")  # rows and columns as they are seen
PANEL = 2.9  # inches, the longer side of a panel
DPI = 130
SMALLEST_DETAIL = 24  # voxels along a side of a detail


@dataclass(frozen=True)
class Example:
    """A patient's slice with most of the structure, turned as a reader expects it; bytes for numbers save memory."""

    patient_id: str
    place: str
    dice: float  # the patient's
    image: NDArray[np.uint8]  # (H, W), or (H, W, 3) in colour
    truth: NDArray[np.bool_]  # (T, H, W)
    prediction: NDArray[np.bool_]  # (T, H, W)
    uncertainty: NDArray[np.uint8]  # (H, W): 255 is one bit
    aspect: float  # height of a pixel over its width
    size: tuple[int, int]  # voxels of truth and of the prediction


class Gallery:
    """Keeps the best and the worst patients while an evaluation runs, and of each one slice."""

    def __init__(self, scheme: LabelScheme) -> None:
        self._scheme = scheme
        self._open: Example | None = None  # of the patient whose cases are coming
        self._kept: list[Example] = []  # worst first
        self._patients = 0

    def add(self, prepared: PreparedCase, answer: Segmentation, dice: float | None) -> None:
        """Look at a case; `dice` is the patient's and comes with the last one."""
        found = _example(prepared, answer, self._scheme)
        if self._open is None or found.size > self._open.size:
            self._open = found
        if dice is None:
            return
        self._kept.append(replace(self._open, dice=dice))
        self._open = None
        self._patients += 1
        self._kept.sort(key=lambda example: example.dice)  # stable: equals keep the folder's order
        if len(self._kept) > 2 * SHOWN:
            del self._kept[SHOWN]

    def pictures(self) -> dict[str, bytes]:
        """File name -> PNG: best_1 is the best, worst_1 the worst; no patient is in both."""
        best = self._kept[::-1][: min(SHOWN, (len(self._kept) + 1) // 2)]
        worst = self._kept[: min(SHOWN, len(self._kept) // 2)]
        return {
            f"{kind}_{rank}.png": draw_example(example, self._scheme.targets, f"{kind} {rank} of {self._patients}")
            for kind, examples in (("best", best), ("worst", worst))
            for rank, example in enumerate(examples, start=1)
        }


def _example(prepared: PreparedCase, answer: Segmentation, scheme: LabelScheme) -> Example:
    geometry = prepared.geometry
    truth = to_slices(majority(prepared.native_labels(), scheme), geometry)
    masks = to_slices(answer.masks, geometry)
    sizes = [(int(t.sum()), int(p.sum())) for t, p in zip(truth, masks, strict=True)]
    index = max(range(len(sizes)), key=lambda number: sizes[number])
    if sizes[index] == (0, 0):
        index = len(sizes) // 2
    seen = prepared.case.image_paths[0].suffix.lower() in PICTURES
    colours = 3 if seen and prepared.channels == 3 else 1
    image = restore(prepared.image(index)[None, :colours], geometry)[0]
    height_mm, width_mm = geometry.plane_spacing_mm
    mirrored = geometry.slice_axis != 0

    def turned(maps: Tensor) -> NDArray[Any]:
        return maps.numpy() if seen else upright(maps.numpy(), mirrored)

    grey = np.round(255 * _windowed(turned(image))).astype(np.uint8)
    case = prepared.case
    return Example(
        patient_id=case.patient_id,
        place=f"case {case.case_id}" + (f", slice {index + 1} of {len(sizes)}" if len(sizes) > 1 else ""),
        dice=0.0,
        image=grey[0] if colours == 1 else np.moveaxis(grey, 0, -1),
        truth=turned(truth[index]).copy(),
        prediction=turned(masks[index]).copy(),
        uncertainty=np.round(255 * turned(to_slices(answer.uncertainty[None], geometry)[index, 0])).astype(np.uint8),
        aspect=height_mm / width_mm if seen else width_mm / height_mm,
        size=sizes[index],
    )


def upright(plane: NDArray[Any], mirrored: bool) -> NDArray[Any]:
    """Maps (..., X, Y) of a volume whose axes run right, anterior, superior, as radiologists see them.

    The second axis points up; the first runs to the viewer's right, or, where it is left-right (axial and coronal
    slices), to the viewer's left: the patient's right is on the left.
    """
    rows = np.swapaxes(plane, -1, -2)[..., ::-1, :]
    return rows[..., ::-1] if mirrored else rows


def _windowed(image: NDArray[Any]) -> NDArray[np.float64]:
    """Grey values in [0, 1] between the 0.5th and 99.5th percentile: a few hot pixels do not darken the rest."""
    low, high = np.percentile(image, [0.5, 99.5])
    grey: NDArray[np.float64] = np.clip((image.astype(np.float64) - low) / max(high - low, 1e-12), 0, 1)
    return grey


def draw_example(example: Example, targets: Sequence[str], rank: str) -> bytes:
    """Image, truth, prediction and uncertainty beside one another, as PNG.

    Where the structure is small the image is whole, with a frame, and the others show what is in the frame.
    """
    height, width = example.truth.shape[1:]
    detail = _detail(example)
    zoomed = detail != (0, height, 0, width)
    parts = [detail, (0, height, 0, width)]
    sides = [((end - first) * example.aspect, right - left) for first, end, left, right in parts]
    tall, wide = (max(PANEL * side[axis] / max(side) for side in sides) for axis in (0, 1))
    with _settings():
        figure = Figure(figsize=(max(7.5, 4 * wide + 1.0), tall + 1.1), dpi=DPI, layout="constrained")
        panels = figure.subplots(1, 4)
        captions = ("Image", "Truth", "Prediction", "Uncertainty")
        for axes, caption in zip(panels, captions, strict=True):
            axes.set_title(caption + (" (detail)" if zoomed and caption != "Image" else ""), fontsize=10.5)
            _show(axes, example, (0, height, 0, width) if caption == "Image" else detail)
        if zoomed:
            corner, extent = (detail[2] - 0.5, detail[0] - 0.5), (detail[3] - detail[2], detail[1] - detail[0])
            panels[0].add_patch(Rectangle(corner, *extent, fill=False, edgecolor="#ffffff", linewidth=1.0))
        draw_contours(panels[1], example.truth, TARGET_COLOURS, "-")
        draw_contours(panels[2], example.prediction, TARGET_COLOURS, "-")
        draw_contours(panels[2], example.truth, ("#ffffff",), DOTTED)
        levels = np.array([uncertainty_colour(step / 255) for step in range(256)])
        panels[3].imshow(levels[example.uncertainty], interpolation="nearest", aspect=example.aspect)
        _frame(panels[3], detail)
        bar = figure.colorbar(ScalarMappable(cmap=ListedColormap(levels)), ax=panels[3], fraction=0.05, pad=0.02)
        bar.set_ticks([0, 0.5, 1], labels=["0", "", "1 bit"])
        bar.ax.set_facecolor("#737373")
        figure.suptitle(
            f"{rank}: patient {example.patient_id}, Dice {example.dice:.3f}  ({example.place})", fontsize=11.5
        )
        handles = [
            Line2D([], [], color=TARGET_COLOURS[t % len(TARGET_COLOURS)], lw=3, label=target)
            for t, target in enumerate(targets)
        ]
        handles.append(Line2D([], [], color=FAINT, lw=1.6, ls=DOTTED, label="truth over the prediction (white)"))
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, fontsize=9
        )
        return _png(figure)


def _detail(example: Example) -> tuple[int, int, int, int]:
    """Rows and columns (first, end, first, end) around the structure; the whole image where it fills much of it."""
    height, width = example.truth.shape[1:]
    places = np.argwhere((example.truth | example.prediction).any(axis=0))
    if not len(places):
        return 0, height, 0, width
    (top, left), (bottom, right) = places.min(axis=0), places.max(axis=0) + 1
    # A square in millimetres, twice as long as the structure.
    side = max((bottom - top) * example.aspect, right - left, SMALLEST_DETAIL / 2)
    rows, columns = _around(top, bottom, side / example.aspect, height), _around(left, right, side, width)
    if (rows[1] - rows[0]) * (columns[1] - columns[0]) > height * width / 2:
        return 0, height, 0, width
    return *rows, *columns


def _around(first: int, end: int, half: float, size: int) -> tuple[int, int]:
    centre = (first + end) / 2
    return max(0, round(centre - half)), min(size, round(centre + half))


def _show(axes: Axes, example: Example, part: tuple[int, int, int, int]) -> None:
    axes.set_axis_off()
    axes.imshow(example.image, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect=example.aspect)
    _frame(axes, part)


def _frame(axes: Axes, part: tuple[int, int, int, int]) -> None:
    axes.set_ylim(part[1] - 0.5, part[0] - 0.5)
    axes.set_xlim(part[2] - 0.5, part[3] - 0.5)


def draw_reliability(calibration: Mapping[str, Mapping[str, Calibration]]) -> bytes:
    """Per target the share of foreground over the probability, near the structure and over all voxels, as PNG."""
    columns = min(4, len(calibration))
    rows = -(-len(calibration) // columns)
    with _settings():
        figure = Figure(figsize=(max(4.6, 3.7 * columns), 4.9 * rows + 0.4), dpi=DPI, layout="constrained")
        grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3.2, 1.0] * rows)
        for number, (target, found) in enumerate(calibration.items()):
            row, column = 2 * (number // columns), number % columns
            upper = figure.add_subplot(grid[row, column])
            lower = figure.add_subplot(grid[row + 1, column], sharex=upper)
            _draw_reliability(upper, lower, target, found)
        handles = [
            Line2D([], [], color=colour, marker=marker, ms=5, lw=1.6, label=label)
            for colour, marker, label in _CURVES.values()
        ]
        handles.append(Line2D([], [], color=FAINT, lw=1.2, ls=DOTTED, label="as it should be"))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(columns + 1, 3), frameon=False, fontsize=9)
        return _png(figure)


_CURVES = {"all": ("#e69f00", "s", "all voxels"), "near": ("#0072b2", "o", "voxels near the structure")}  # last on top


def _draw_reliability(upper: Axes, lower: Axes, target: str, found: Mapping[str, Calibration]) -> None:
    upper.plot([0, 1], [0, 1], color=FAINT, lw=1.2, ls=DOTTED)
    for number, (name, (colour, marker, _)) in enumerate(_CURVES.items()):
        filled = [b for b in found[name].bins if b.voxels]
        points = [(b.probability or 0.0, b.foreground or 0.0) for b in filled]
        upper.plot([x for x, _ in points], [y for _, y in points], color=colour, marker=marker, ms=4.5, lw=1.6)
        width = 0.4 / len(found[name].bins)
        places = [(b.low + b.high) / 2 + (number - 0.5) * width for b in filled]
        lower.bar(places, [b.voxels for b in filled], width=width, color=colour)
    errors = ", ".join(f"{name} {'-' if c.ece is None else f'{c.ece:.4f}'}" for name, c in found.items())
    upper.set_title(f"{target}\nECE: {errors}", fontsize=10)
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that is foreground")
    upper.tick_params(labelbottom=False)
    lower.set(yscale="log", xlabel="probability of the ensemble", ylabel="voxels")
    lower.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    lower.yaxis.set_minor_formatter(NullFormatter())


@contextmanager
def _settings() -> Iterator[None]:
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS | {"axes.titlecolor": INK})
        yield


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return buffer.getvalue()
