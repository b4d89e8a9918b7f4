"""The table of protections keeps up with the program, and can tell red from green."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from medsegdiff.errors import UserError
from tests.e2e.chaos.protections import PROTECTIONS, ROOT, check_text, goes_red


@pytest.mark.parametrize("protection", PROTECTIONS, ids=lambda p: p.fault)
def test_each_protection_is_where_the_table_says(protection) -> None:
    """Its text stands in its file once, and its tests exist."""
    check_text(protection, (ROOT / protection.file).read_text())
    for test in protection.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text()


def test_a_text_that_moved_on_is_told() -> None:
    """Gone or doubled: the entry is named."""
    entry = replace(PROTECTIONS[0], text="x = 1")
    for text in ("", "x = 1\nx = 1\n"):
        with pytest.raises(UserError, match=r"Mend the entry 'any process killed'"):
            check_text(entry, text)


@pytest.mark.slow
def test_red_and_green_are_told_apart() -> None:
    """The same entry with a replacement that changes nothing stays green."""
    entry = next(p for p in PROTECTIONS if p.fault == "journal torn")
    assert goes_red(entry)[0]
    assert not goes_red(replace(entry, without=entry.text + "  # as it was"))[0]
    assert Path(ROOT / entry.file).read_text().count(entry.text) == 1
