"""XML files of a dataset: from many hands, so nothing in them is expanded or fetched."""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element

from medsegdiff.data.guard import DataFileError, decoding

MAX_XML_BYTES = 50_000_000  # the longest reading of LIDC-IDRI takes about one megabyte


def read_xml(path: Path) -> Element:
    """The root of an XML file, its tags without their namespace.

    Raises:
        DataFileError: missing, too large, not well-formed, or with entity declarations, which could expand without end.
    """
    from defusedxml.ElementTree import parse

    with decoding(path):
        if path.stat().st_size > MAX_XML_BYTES:
            raise DataFileError(path, f"{path.stat().st_size:,} bytes are no annotation (limit {MAX_XML_BYTES:,})")
        root = parse(path).getroot()
        if root is None:
            raise DataFileError(path, "the file holds no element")
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def text_of(element: Element, name: str) -> str:
    """The text of the first child of that name, without blanks around it; "" where there is none."""
    return (element.findtext(name) or "").strip()
