"""What four radiologists outlined on a scan of LIDC-IDRI: their XML files, and which outlines mean one nodule."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

import numpy as np
from numpy.typing import NDArray

from medsegdiff.data.guard import DataFileError, decoding
from simulations.published.markup import read_xml, text_of

READERS = 4  # by the protocol of the collection (Armato et al. 2011)

_FAR = 10_000  # pixels: no point of an outline lies beyond


@dataclass(frozen=True, eq=False)
class Contour:
    """One closed line on one slice."""

    slice_uid: str  # SOP instance UID of the image
    points: NDArray[np.int64]  # (P, 2): column, row, from 0
    inclusion: bool  # True: it surrounds nodule; False: a hole in it


Outline = tuple[Contour, ...]  # of one nodule by one reader
Nodule = tuple[Outline, ...]  # one outline a reader; () of a reader who drew none


@dataclass(frozen=True, eq=False)
class Reading:
    """One scan's XML file."""

    path: Path
    series_uid: str
    sessions: tuple[tuple[Outline, ...], ...]  # the outlines of each reader; small nodules (one point) are left out
    content: str  # of all sessions, to tell a file that was submitted twice from one that was corrected


def read_reading(path: Path) -> Reading | None:
    """Read one XML file; None where it is a reading of something else than a CT scan (radiographs).

    Raises:
        DataFileError: the file is no XML, or a coordinate in it is no whole number.
    """
    root = read_xml(path)
    if root.tag != "LidcReadMessage":
        return None
    header = root.find("ResponseHeader")
    sessions = root.findall("readingSession")
    with decoding(path):
        return Reading(
            path,
            "" if header is None else text_of(header, "SeriesInstanceUid"),
            tuple(tuple(_outlines(session)) for session in sessions),
            "".join(tostring(session, encoding="unicode") for session in sessions),
        )


def _outlines(session: Element) -> Iterable[Outline]:
    """A session's outlines of nodules of 3 mm and more; smaller ones are marked by a single point."""
    for nodule in session.findall("unblindedReadNodule"):
        contours = [_contour(roi) for roi in nodule.findall("roi")]
        if sum(len(contour.points) for contour in contours) > 1:
            yield tuple(contours)


def _contour(roi: Element) -> Contour:
    points = [(int(text_of(edge, "xCoord")), int(text_of(edge, "yCoord"))) for edge in roi.findall("edgeMap")]
    if any(not 0 <= number < _FAR for point in points for number in point):
        raise ValueError("a coordinate lies outside every image")
    inclusion = text_of(roi, "inclusion").upper() != "FALSE"
    return Contour(text_of(roi, "imageSOP_UID"), np.array(points, np.int64).reshape(-1, 2), inclusion)


def choose(readings: Sequence[Reading]) -> Reading | None:
    """The reading of a scan that counts, of all that describe it; None where they differ and none is a correction.

    Files submitted twice are equal in content. The collection corrected one scan's file (LIDC-IDRI-0101, 2012) and
    kept both; the name of the new one says so.
    """
    corrected = [reading for reading in readings if "correct" in reading.path.name.lower()]
    equal = len({reading.content for reading in readings}) == 1
    return readings[0] if equal else corrected[0] if len(corrected) == 1 else None


def nodules_of(sessions: Sequence[Sequence[Outline]]) -> list[Nodule]:
    """Outlines grouped to nodules: those that share a voxel, directly or through others, mean the same one.

    The collection publishes no grouping (it was done by eye). Two outlines of one reader in a group are one nodule to
    the others: they are joined. Outlines without a voxel inside belong to no nodule. In the order of first appearance.
    """
    drawn = [(reader, outline) for reader, session in enumerate(sessions) for outline in session]
    voxels = [_voxels(outline) for _, outline in drawn]
    group = list(range(len(drawn)))  # of each outline: the first of its group
    for one, other in itertools.combinations(range(len(drawn)), 2):
        if group[one] != group[other] and _share(voxels[one], voxels[other]):
            low, high = sorted((group[one], group[other]))
            group = [low if name == high else name for name in group]
    return [
        tuple(
            tuple(
                contour
                for (drawer, outline), name in zip(drawn, group, strict=True)
                if drawer == reader and name == first
                for contour in outline
            )
            for reader in range(len(sessions))
        )
        for first in sorted(set(group))
        if voxels[first]
    ]


def _voxels(outline: Outline) -> dict[str, set[tuple[int, int]]]:
    """The voxels inside an outline: slice -> (column, row); slices without any are left out."""
    found = {}
    for uid in {contour.slice_uid for contour in outline}:
        points = np.concatenate([contour.points for contour in outline if contour.slice_uid == uid])
        corner = points.min(axis=0)
        width, height = points.max(axis=0) - corner + 1
        rows, columns = np.nonzero(fill(outline, uid, corner, (int(width), int(height))))
        if len(rows):
            found[uid] = set(zip((columns + corner[0]).tolist(), (rows + corner[1]).tolist(), strict=True))
    return found


def _share(one: dict[str, set[tuple[int, int]]], other: dict[str, set[tuple[int, int]]]) -> bool:
    return any(not voxels.isdisjoint(other.get(uid, ())) for uid, voxels in one.items())


def fill(outline: Outline, slice_uid: str, corner: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The nodule on one slice, within a box.

    Readers drew the line just outside the nodule ("outer border", McNitt-Gray et al. 2007): its own pixels do not
    belong to the nodule; those of the line around a hole, on the nodule's outside as well, do not either.

    Args:
        corner: column and row of the box's upper left pixel.
        size: width and height of the box.

    Returns:
        (height, width) bool.
    """
    from PIL import Image, ImageDraw

    inside = np.zeros(size[::-1], bool)
    lines = [contour for contour in outline if contour.slice_uid == slice_uid and len(contour.points)]
    for contour in sorted(lines, key=lambda contour: not contour.inclusion):  # holes last
        canvas = Image.new("L", size)
        polygon = [(int(column), int(row)) for column, row in contour.points - corner]
        if len(polygon) > 1:
            ImageDraw.Draw(canvas).polygon(polygon, fill=1, outline=0 if contour.inclusion else 1)
        filled = np.asarray(canvas, bool)
        inside = inside | filled if contour.inclusion else inside & ~filled
    return inside


def series_of(readings: Iterable[Reading]) -> dict[str, list[Reading]]:
    """Readings by the scan they describe. Raises DataFileError for one that names no scan."""
    found: dict[str, list[Reading]] = {}
    for reading in readings:
        if not reading.series_uid:
            raise DataFileError(reading.path, "the reading names no series (ResponseHeader/SeriesInstanceUid)")
        found.setdefault(reading.series_uid, []).append(reading)
    return found
