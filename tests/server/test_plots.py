"""The report's pictures: contours where the masks are, colours that can be read, labels that do not collide."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from server.plots import example_panels, heat, spread
from server.report import Example


def decoded(source: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int64)


def test_panels_show_contours_where_the_masks_are() -> None:
    """The plain panel is grey; a contour's colour lies on the edge of its mask, at the picture's border too."""
    image = np.linspace(0, 1, 60 * 60).reshape(60, 60)
    truth, prediction = np.zeros((1, 60, 60), bool), np.zeros((1, 60, 60), bool)
    truth[0, 10:30, 10:30] = True
    prediction[0, 40:60, 40:60] = True  # reaches the border: its contour must be closed there
    example = Example("A", "t", image, truth, prediction, np.zeros((60, 60)), ("x",))
    plain, reference, predicted, uncertain = (decoded(panel.source) for panel in example_panels(example))
    assert np.ptp(plain, axis=2).max() == 0
    assert (plain == uncertain).all()
    rows, columns = np.nonzero(np.ptp(reference, axis=2) > 80)
    for ends in ((rows.min(), rows.max()), (columns.min(), columns.max())):  # rows 10 to 29, five pixels each
        assert ends == pytest.approx((50, 150), abs=2)
    rows, columns = np.nonzero(np.ptp(predicted, axis=2) > 80)
    for ends in ((rows.min(), rows.max()), (columns.min(), columns.max())):
        assert ends == pytest.approx((200, 299), abs=2)
    closing = np.ptp(predicted, axis=2)[297:, 210:290]
    assert (closing.max(axis=0) > 80).all()  # the border itself is drawn, not left open


def test_uncertainty_lights_up_in_place() -> None:
    """Certain pixels keep their grey; the uncertain corner is coloured, more so the more uncertain."""
    uncertainty = np.zeros((50, 50))
    uncertainty[:10, :10], uncertainty[40:, 40:] = 1.0, 0.4
    none = np.zeros((1, 50, 50), bool)
    panels = example_panels(Example("A", "t", np.full((50, 50), 7.0), none, none, uncertainty, ("x",)))
    colour = np.ptp(decoded(panels[3].source), axis=2)
    assert colour[30:270, 70:230].max() == 0
    assert colour[:50, :50].min() > 60
    assert colour[250:, 250:].min() > 60


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (600, 40)])
def test_pictures_of_any_size_are_drawn(shape: tuple[int, int]) -> None:
    """Slices of any shape, constant ones too, give panels no larger than 300 pixels a side."""
    masks = np.ones((2, *shape), bool)
    example = Example("A", "t", np.zeros(shape), masks, ~masks, np.ones(shape) + 1e-6, ("x", "y"))
    for panel in example_panels(example):
        assert max(decoded(panel.source).shape) <= 300


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("truth", np.zeros((2, 8, 8), bool), "truth has shape"),
        ("prediction", np.zeros((1, 8, 9), bool), "prediction has shape"),
        ("uncertainty", np.full((8, 8), 1.5), "uncertainty leaves"),
        ("uncertainty", np.full((8, 8), np.nan), "uncertainty leaves"),
        ("image", np.full((8, 8), np.nan), "NaN"),
    ],
)
def test_examples_that_do_not_fit_are_refused(field: str, value: Any, fault: str) -> None:
    """Shapes that disagree and values out of range are refused when the example is made."""
    parts: dict[str, Any] = {
        "image": np.zeros((8, 8)),
        "truth": np.zeros((1, 8, 8), bool),
        "prediction": np.zeros((1, 8, 8), bool),
        "uncertainty": np.zeros((8, 8)),
    }
    with pytest.raises(ValueError, match=fault):
        Example(site="A", title="t", targets=("x",), **(parts | {field: value}))


@given(st.lists(st.floats(0, 1), max_size=9))
def test_curve_labels_keep_their_order_and_distance(heights: list[float]) -> None:
    """Labels end up in the order of their curves, a gap apart, and inside the axes since nine of them fit."""
    placed = spread(heights, gap=0.068)
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    steps = np.diff([placed[index] for index in order])
    assert (steps >= 0.068 - 1e-9).all()
    assert all(-1e-9 <= height <= 1 + 1e-9 for height in placed)


@given(st.floats(0, 1))
def test_heat_map_text_can_be_read(value: float) -> None:
    """Text on every colour of the heat map keeps the contrast of 4.5 : 1 that WCAG 2.1 asks of normal text."""
    ground, ink = (_luminance(colour) for colour in heat(value, 0.0, 1.0))
    assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) >= 4.5


def _luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2.1)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
