"""DDTI: thyroid nodules on B-mode ultrasound, outlined in XML files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from medsegdiff.data.guard import DataFileError
from medsegdiff.data.pictures import read_picture, write_picture_mask
from simulations.published.layout import Converted, Found, LayoutError, Published, Row, expect_files
from simulations.published.markup import read_xml, text_of

Polygon = tuple[tuple[float, float], ...]  # corners (x, y) in pixels

_FAR = 100_000  # pixels: no corner of an outline lies beyond


def read_ddti(root: Path) -> Found:
    """Rows in the order of cases; a case (an XML file) is a patient and may have several images.

    An image all of whose outlines cannot be read is left out: published files hold outlines that break off and marks
    without an outline, and half an annotation is a wrong one.
    """
    images = {path.stem: path for path in expect_files(root, "*_*.jpg")}
    rows, faulty = [], list[str]()
    for path in sorted(expect_files(root, "*.xml"), key=lambda path: (len(path.stem), path.stem)):
        try:
            outlines = _outlines(read_xml(path))
        except DataFileError:
            faulty.append(path.name)
            continue
        for number, polygons in outlines.items():
            stem = f"{path.stem}_{number}"
            image = images.pop(stem, None)
            if image is None or polygons is None:
                faulty.append(stem)
            else:
                mask = Converted(f"{stem}.png", _nodules(image, polygons))
                rows.append(Row(stem, f"case_{path.stem}", (image,), (mask,)))
    if not rows:
        raise LayoutError(f"no image in {root} has an outline that could be read")
    notes = []
    if faulty:
        notes.append(f"left out, for an outline or the image cannot be read: {', '.join(faulty)}.")
    if images:
        notes.append(f"left out, for nobody outlined anything: {', '.join(sorted(images))}.")
    return Found(rows, tuple(notes))


def _outlines(root: Element) -> dict[str, tuple[Polygon, ...] | None]:
    """Image number -> its outlines, None where one of them cannot be read. Marks without an outline do not count."""
    found: dict[str, tuple[Polygon, ...] | None] = {}
    for mark in root.iter("mark"):
        number, text = text_of(mark, "image"), text_of(mark, "svg")
        if not text:
            continue
        polygons, before = _polygons(text), found.get(number, ())
        found[number] = None if polygons is None or before is None else before + polygons
    return found


def _polygons(text: str) -> tuple[Polygon, ...] | None:
    """The regions of one mark, JSON in spite of the element's name `svg`; None where it is no such list."""
    try:
        return tuple(_polygon(region) for region in json.loads(text)) or None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _polygon(region: Any) -> Polygon:
    corners = tuple((float(point["x"]), float(point["y"])) for point in region["points"])
    if len(corners) < 3 or not all(abs(number) < _FAR for corner in corners for number in corner):
        raise ValueError("not the outline of a region")
    return corners


def _nodules(image: Path, polygons: tuple[Polygon, ...]) -> Callable[[Path], None]:
    """The mask of an image: 255 inside and on any outline."""

    def write(path: Path) -> None:
        from PIL import Image, ImageDraw

        rows, columns = read_picture(image, 1).shape[1:3]
        canvas = Image.new("L", (columns, rows))
        for polygon in polygons:
            ImageDraw.Draw(canvas).polygon(polygon, fill=255)
        write_picture_mask(path, np.asarray(canvas, dtype=np.uint8))

    return write


DDTI = Published(
    name="ddti",
    title="DDTI (thyroid nodules)",
    source=(
        "cimalab.intec.co/applications/thyroid; a copy on Kaggle (dasmehdixtr/ddti-thyroid-ultrasound-images). Pedraza "
        "et al. 2015, doi:10.1117/12.2073532. Called open access, no licence text found."
    ),
    layout=("1.xml", "1_1.jpg, 1_2.jpg ... (the images of case 1)", "the same for every case, all in one folder"),
    read=read_ddti,
)
