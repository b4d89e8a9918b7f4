"""The report's figures: bars and learning curves as inline SVG, example slices as PNG data URIs.

Equal input gives equal bytes: Matplotlib's object API without pyplot (no global state, no chosen backend), its
default settings whatever the user's matplotlibrc says, a fixed salt for SVG ids, and no date in any file.
Colours are told apart by readers with colour vision deficiency: Okabe and Ito (2008) for the arms, the "muted" set
of Tol (2021) for the sites; shape, order or dash always says the same as the colour.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from server.report_schema import Arm, Example, Report
from server.report_text import ARM_NAMES, dice_text

ARM_COLOURS: dict[Arm, str] = {
    "federated": "#0072b2",
    "personalised": "#56b4e9",
    "local": "#e69f00",
    "pooled": "#009e73",
}
SITE_COLOURS = ("#cc6677", "#332288", "#aa4499", "#999933", "#882255", "#a0714f", "#117733", "#6e6e6e")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
TARGET_COLOURS = ("#ffd400", "#3fd0ff", "#ff7ac0", "#7dff8a", "#ff9a3d", "#d0b3ff")  # bright: they lie on grey images
INK, FAINT = "#222222", "#8a8a8a"
FIGURE_WIDTH = 5.4  # inches, 518 CSS pixels: two beside each other on a desktop, legible when a phone shrinks one
PANEL_PIXELS = 300  # longest side of an example panel
DOTTED = (0, (1.2, 1.6))
LABEL_LENGTH = 20  # longer site names lose their middle inside a figure; the tables hold them whole

# Matplotlib types the keys of its settings as literals, one by one; a plain dict is Any to them.
SETTINGS: Any = {
    "svg.fonttype": "none",  # real text: it takes the page's font, can be searched and read aloud
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a site may be called "a$b$c"
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@contextmanager
def _settings() -> Iterator[None]:
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS)
        yield


def dice_bars(report: Report) -> str | None:
    """Test Dice per site, one bar per arm, as inline SVG; None when no site's Dice is known."""
    arms = [arm for arm in report.present_arms if any(site.dice_of(arm) is not None for site in report.sites.values())]
    if not arms:
        return None
    thickness = 0.8 / len(arms)
    with _settings():
        figure = Figure(
            figsize=(FIGURE_WIDTH, 0.75 + len(report.sites) * (0.2 + 0.19 * len(arms))), layout="constrained"
        )
        axes = figure.add_subplot()
        for position, arm in enumerate(arms):
            _draw_arm(axes, report, arm, (position - (len(arms) - 1) / 2) * thickness, thickness)
        axes.set_yticks(range(len(report.sites)), labels=[shortened(name) for name in report.sites])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_ylim(len(report.sites) - 0.45, -0.55)  # the first site on top
        axes.set_xlim(0, 1.08)  # bars start at zero; room for the number beside a full one
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.set_xlabel("Dice on held-out patients")
        figure.legend(loc="outside upper left", ncols=len(arms), frameon=False, handlelength=1.0, columnspacing=1.2)
        return _inline_svg(
            figure, "bars", "Bars: Dice on held-out patients per site and arm; the table gives the numbers"
        )


def _draw_arm(axes: Axes, report: Report, arm: Arm, offset: float, thickness: float) -> None:
    scores = [(row, site.dice_of(arm)) for row, site in enumerate(report.sites.values())]
    known = [(row + offset, dice) for row, dice in scores if dice is not None]
    places, lengths = [place for place, _ in known], [dice for _, dice in known]
    axes.barh(places, lengths, height=thickness * 0.9, color=ARM_COLOURS[arm], label=ARM_NAMES[arm])
    for place, dice in known:
        axes.text(dice + 0.01, place, dice_text(dice), va="center", fontsize=8.5)


def learning_curves(report: Report, quantity: Literal["loss", "dice"]) -> str | None:
    """The federated model's training loss or Dice per round: each site thin, their mean bold; inline SVG.

    The mean of a round is over the sites that reported in it. None when nothing was recorded.
    """
    curves = _curves(report, quantity)
    if not curves:
        return None
    with _settings():
        figure = Figure(figsize=(FIGURE_WIDTH, 3.3), layout="constrained")
        axes = figure.add_subplot()
        ends = [_draw_site(axes, report, name, curve) for name, curve in curves.items()]
        if len(curves) > 1:
            ends.append(_draw_mean(axes, curves))
        axes.set_xlabel("Round")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        if len({number for curve in curves.values() for number, _ in curve}) == 1:
            only = next(iter(curves.values()))[0][0]
            axes.set_xlim(only - 1.5, only + 1.5)  # else the axis counts fractions of a round
        axes.set_ylabel("Training loss" if quantity == "loss" else "Dice")
        low, high = (0.0, 1.0) if quantity == "dice" else _loss_range(curves)
        axes.set_ylim(low, high)
        if len(report.sites) <= len(SITE_COLOURS):
            _label_ends(axes, ends)
        label = f"Curves: {'training loss' if quantity == 'loss' else 'Dice'} per round at each site, and their mean"
        return _inline_svg(figure, quantity, label)


Curve = list[tuple[int, float]]
End = tuple[str, str, float]  # label, colour, height of a curve's last point


def _curves(report: Report, quantity: str) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for entry in report.history:
        value = entry.loss if quantity == "loss" else entry.dice
        if value is not None:
            curves.setdefault(entry.site, []).append((entry.round, value))
    return {name: sorted(curves[name]) for name in report.sites if name in curves}


def _loss_range(curves: dict[str, Curve]) -> tuple[float, float]:
    values = [value for curve in curves.values() for _, value in curve]
    low, high = min(0.0, *values), max(values)
    return low, high + 0.06 * ((high - low) or 1.0)


def _draw_site(axes: Axes, report: Report, name: str, curve: Curve) -> End:
    """A marker at every measured round: a gap between markers is a round without this site."""
    index = list(report.sites).index(name)
    many = len(report.sites) > len(SITE_COLOURS)  # then the single site is not told apart, only the spread is shown
    colour = "#b5b5b5" if many else SITE_COLOURS[index]
    style = "-" if many else DASHES[index % len(DASHES)]
    rounds, values = [number for number, _ in curve], [value for _, value in curve]
    axes.plot(rounds, values, color=colour, linestyle=style, linewidth=1.1, marker="o", markersize=2.6)
    return shortened(name), colour, values[-1]


def _draw_mean(axes: Axes, curves: dict[str, Curve]) -> End:
    by_round: dict[int, list[float]] = {}
    for curve in curves.values():
        for number, value in curve:
            by_round.setdefault(number, []).append(value)
    rounds = sorted(by_round)
    means = [sum(by_round[number]) / len(by_round[number]) for number in rounds]
    axes.plot(rounds, means, color=ARM_COLOURS["federated"], linewidth=2.6, marker="o", markersize=4)
    return "mean of sites", ARM_COLOURS["federated"], means[-1]


def _label_ends(axes: Axes, ends: list[End]) -> None:
    """Name each curve at its end, labels pushed apart so that none covers another."""
    low, high = axes.get_ylim()
    heights = spread([(height - low) / (high - low) for _, _, height in ends], gap=0.068)
    for (label, colour, _), height in zip(ends, heights, strict=True):
        weight = "bold" if label == "mean of sites" else "normal"
        axes.text(
            1.02, height, label, color=colour, weight=weight, va="center", fontsize=9, transform=axes.transAxes
        )  # fmt: skip


def spread(heights: list[float], gap: float) -> list[float]:
    """Heights at least `gap` apart in unchanged order, inside [0, 1] while they fit, moved little."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = [heights[index] for index in order]
    for index in range(1, len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + gap)
    ceiling = max(1.0, gap * (len(placed) - 1))
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    result = [0.0] * len(heights)
    for index, height in zip(order, placed, strict=True):
        result[index] = height
    return result


def shortened(name: str) -> str:
    """Names of sites often differ at their end, so that both ends stay."""
    return name if len(name) <= LABEL_LENGTH else f"{name[:10]}…{name[-(LABEL_LENGTH - 11) :]}"


def _inline_svg(figure: Figure, salt: str, label: str) -> str:
    """A figure as an <svg> element that scales with its box; no prologue, no namespaces: HTML implies them."""
    buffer = io.BytesIO()
    # A salt of its own keeps the ids of clip paths and markers distinct between the figures of one page.
    with mpl.rc_context({"svg.hashsalt": f"medsegfed-{salt}"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None, "Matplotlib gives every SVG a viewBox"
    body = re.sub(r'<g id="[^"]*">', "<g>", body)  # group ids repeat between figures and nothing refers to them
    return f'<svg {box.group()} role="img" aria-label="{html.escape(label)}">{body}'


def heat(value: float, low: float, high: float) -> tuple[str, str]:
    """Background and legible text colour, as hex, for `value` on a scale from `low` to `high`."""
    place = 0.0 if high <= low else (value - low) / (high - low)
    place = 0.03 + 0.82 * min(max(place, 0.0), 1.0)  # the ends of the map are too close to white and to black
    red, green, blue, _ = mpl.colormaps["Blues"](place)
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]  # WCAG 2.1, relative luminance
    # Black on anything lighter than 0.179 and white on anything darker keep a contrast above 4.5 : 1.
    return to_hex((red, green, blue)), "#000000" if luminance > 0.179 else "#ffffff"


def gradient(colour: Callable[[float], str]) -> str:
    """A CSS gradient that passes through colour(0) ... colour(1)."""
    return f"linear-gradient(to right, {', '.join(colour(step / 8) for step in range(9))})"


def uncertainty_colour(value: float) -> tuple[float, float, float, float]:
    """RGBA for an uncertainty in [0, 1]: clear at 0, then purple, orange, pale yellow."""
    red, green, blue, _ = mpl.colormaps["inferno"](0.25 + 0.72 * value)
    return red, green, blue, min(1.0, 1.6 * value)


def uncertainty_on_grey(value: float) -> str:
    """The colour of an uncertainty over mid grey, as hex: what the legend shows."""
    *colour, alpha = uncertainty_colour(value)
    red, green, blue = (alpha * part + (1 - alpha) * 0.45 for part in colour)
    return to_hex((red, green, blue))


@dataclass(frozen=True)
class Panel:
    """One picture of an example: its caption and a PNG as a data URI."""

    caption: str
    source: str


def example_panels(example: Example) -> list[Panel]:
    """Image; reference contour; prediction with the reference dotted in white; uncertainty over the image."""
    grey = _windowed(example.image)
    levels = np.array([uncertainty_colour(step / 255) for step in range(256)])
    overlay = levels[np.round(np.clip(example.uncertainty, 0, 1) * 255).astype(int)]

    def nothing(_: Axes) -> None:
        """The image as it is."""

    def reference(axes: Axes) -> None:
        draw_contours(axes, example.truth, TARGET_COLOURS, "-")

    def prediction(axes: Axes) -> None:
        draw_contours(axes, example.prediction, TARGET_COLOURS, "-")
        draw_contours(axes, example.truth, ("#ffffff",), DOTTED)

    def uncertainty(axes: Axes) -> None:
        axes.imshow(overlay, extent=_extent(grey), aspect="auto")

    drawn: list[tuple[str, Callable[[Axes], None]]] = [
        ("Image", nothing),
        ("Reference", reference),
        ("Prediction", prediction),
        ("Uncertainty", uncertainty),
    ]
    return [Panel(caption, _picture(grey, draw)) for caption, draw in drawn]


def _windowed(image: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Grey values in [0, 1] between the 0.5th and 99.5th percentile: a few hot pixels do not darken the rest."""
    low, high = np.percentile(image, [0.5, 99.5])
    grey: NDArray[np.float64] = np.clip((image.astype(np.float64) - low) / max(high - low, 1e-12), 0, 1)
    return grey


def _extent(grey: NDArray[np.float64]) -> tuple[float, float, float, float]:
    height, width = grey.shape
    return (-0.5, width - 0.5, height - 0.5, -0.5)


def draw_contours(axes: Axes, masks_THW: NDArray[np.bool_], colours: Sequence[str], style: Any) -> None:
    """The outline of each target's mask, in its colour; an empty one has none."""
    outline = [Stroke(linewidth=2.6, foreground="#00000099"), Normal()]  # legible on bright tissue too
    for index, mask in enumerate(masks_THW):
        if not mask.any():
            continue
        padded = np.pad(mask.astype(np.float64), 1)  # so that a mask at the border has a closed contour
        height, width = mask.shape
        lines = axes.contour(
            np.arange(-1, width + 1), np.arange(-1, height + 1), padded, levels=[0.5],
            colors=[colours[index % len(colours)]], linewidths=1.5, linestyles=[style],
        )  # fmt: skip
        lines.set_path_effects(outline)


def _picture(grey: NDArray[np.float64], draw: Callable[[Axes], None]) -> str:
    """One panel as a PNG data URI, PANEL_PIXELS along its longer side."""
    height, width = grey.shape
    scale = PANEL_PIXELS / max(height, width)
    with _settings():
        figure = Figure(figsize=(max(1, round(width * scale)) / 100, max(1, round(height * scale)) / 100), dpi=100)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=_extent(grey), aspect="auto")
        draw(axes)
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(height - 0.5, -0.5)
        canvas.draw()  # type: ignore[no-untyped-call]
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
