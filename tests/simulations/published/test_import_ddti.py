"""DDTI: outlines in XML become masks; what cannot be read is left out and named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medsegdiff.data.dataset import open_dataset
from medsegdiff.data.prepare import prepare
from simulations.published.catalogue import published
from simulations.published.ddti import _polygons
from simulations.published.layout import LayoutError, import_published

SQUARE = [(10, 8), (20, 8), (20, 30), (10, 30)]
TRIANGLE = [(40, 5), (55, 5), (40, 20)]


def region(points: list[tuple[int, int]]) -> dict[str, object]:
    return {"points": [{"x": x, "y": y} for x, y in points], "annotation": {}, "regionType": "freehand"}


def mark(image: int, *regions: list[tuple[int, int]]) -> str:
    svg = json.dumps([region(points) for points in regions]) if regions else ""
    return f"<mark><image>{image}</image><svg>{svg}</svg></mark>"


def case(root: Path, number: int, *marks: str, images: int = 1) -> None:
    root.mkdir(exist_ok=True)
    (root / f"{number}.xml").write_text(
        f"<case><number>{number}</number><age>40</age><tirads>4a</tirads>{''.join(marks)}</case>"
    )
    for image in range(1, images + 1):
        grey = np.random.default_rng(image).integers(0, 256, (36, 60, 1)).astype(np.uint8)
        Image.fromarray(np.repeat(grey, 3, axis=2)).save(  # stored in colour, as the published ones are
            root / f"{number}_{image}.jpg"
        )


def run(tmp_path: Path):
    summary = import_published(published("ddti"), tmp_path / "source", tmp_path / "target")
    return summary, {found.case_id: found for found in open_dataset(tmp_path / "target").cases}


def test_outlines_become_masks(tmp_path: Path) -> None:
    """Two marks of one image are one mask; images of a case are one patient; outlines belong to the nodule."""
    case(tmp_path / "source", 2, mark(1, SQUARE), mark(2, TRIANGLE), images=2)
    case(tmp_path / "source", 10, mark(1, SQUARE), mark(1, TRIANGLE))
    summary, cases = run(tmp_path)
    assert {name: found.patient_id for name, found in cases.items()} == {
        "2_1": "case_2",
        "2_2": "case_2",
        "10_1": "case_10",
    }
    assert summary.notes == ()
    assert (summary.linked, summary.converted) == (3, 3)
    both = np.asarray(Image.open(cases["10_1"].mask_paths[0]))
    rows, columns = np.mgrid[:36, :60]
    square = (columns >= 10) & (columns <= 20) & (rows >= 8) & (rows <= 30)
    triangle = (columns >= 40) & (rows >= 5) & (columns - 40 + rows - 5 <= 15)
    assert np.array_equal(both > 0, square | triangle)
    assert set(np.unique(both)) == {0, 255}
    prepared = prepare(open_dataset(tmp_path / "target"), 16, tmp_path / "cache")
    assert not prepared.faults
    assert {found.channels for found in prepared.cases} == {1}


def test_what_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    """An outline that breaks off, a torn XML file, a missing image, an image without outlines; the others stay."""
    source = tmp_path / "source"
    case(source, 1, mark(1, SQUARE), images=2)  # image 2 has no mark
    case(source, 2, mark(1, SQUARE).replace('"}]', ""))  # as in the published cases 197 and 205
    case(source, 3, mark(1, SQUARE), mark(1, TRIANGLE).replace('"}]', ""))  # half an annotation is a wrong one
    case(source, 4, mark(1), mark(1, TRIANGLE))  # an empty mark beside a good one
    case(source, 5, mark(1, SQUARE), mark(7, SQUARE))  # image 7 is not there
    case(source, 6, mark(1, SQUARE))
    (source / "6.xml").write_text("<case><mark>")
    case(source, 7, mark(1, SQUARE[:2]))  # a line
    summary, cases = run(tmp_path)
    assert list(cases) == ["1_1", "4_1", "5_1"]
    unreadable, without = summary.notes
    assert all(name in unreadable for name in ("2_1", "3_1", "5_7", "6.xml", "7_1"))
    assert "1_2" in without


def test_an_entity_bomb_is_no_annotation(tmp_path: Path) -> None:
    """A file that declares entities is left out, not expanded."""
    case(tmp_path / "source", 1, mark(1, SQUARE))
    case(tmp_path / "source", 2, mark(1, SQUARE))
    bomb = '<!DOCTYPE c [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'
    (tmp_path / "source" / "2.xml").write_text(f"{bomb}<case><mark><image>1</image><svg>&b;</svg></mark></case>")
    summary, cases = run(tmp_path)
    assert list(cases) == ["1_1"]
    assert "2.xml" in summary.notes[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["points", "x", "y"]), inner),
    max_leaves=8,
)


@given(JSON)
def test_any_json_is_polygons_or_refused(content: object) -> None:
    """Never another error, never a corner that is no number."""
    found = _polygons(json.dumps(content))
    assert found is None or all(len(polygon) >= 3 and np.isfinite(polygon).all() for polygon in found)


@pytest.mark.parametrize("number", ["1e9", "-1e9", "Infinity", "NaN", '"a"', "null"])
def test_a_corner_is_a_number_within_reach(number: str) -> None:
    """Nothing is drawn to a place that no image has."""
    corners = [f'{{"x": {x}, "y": 2}}' for x in ("1", "5.5", number)]
    assert _polygons(f'[{{"points": [{", ".join(corners)}]}}]') is None
    assert _polygons(f'[{{"points": [{", ".join([*corners[:2], corners[0]])}]}}]') == (((1, 2), (5.5, 2), (1, 2)),)


def test_a_wrong_layout_is_answered(tmp_path: Path) -> None:
    """No images, no XML files, or no outline in any of them."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "readme.txt").touch()
    with pytest.raises(LayoutError, match=r"no file \*_\*\.jpg lies in .*Expected: 1\.xml.*Found in .*readme\.txt"):
        run(tmp_path)
    case(source, 1)
    with pytest.raises(LayoutError, match="has an outline that could be read"):
        run(tmp_path)
    (source / "1.xml").unlink()
    with pytest.raises(LayoutError, match=r"no file \*\.xml"):
        run(tmp_path)
    assert not (tmp_path / "target").exists()
