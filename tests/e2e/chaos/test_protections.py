"""The table of protections keeps up with the program, and can tell red from green."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from medsegdiff.errors import UserError
from tests.e2e.chaos import driver, protections
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


@pytest.mark.parametrize(
    ("command", "words", "fault"),
    [
        (driver.main, ["--kills", "0"], "nothing is proved"),
        (driver.main, ["--kills", "1", "--seed", "-1"], "--seed -1: must lie in"),
        (driver.main, ["--only", "server:gateway+elm:gateway"], "--only elm:gateway: there is no such process"),
        (protections.main, ["--only", "nonsense"], "nothing was tried"),
    ],
)
def test_nothing_passes_that_tried_nothing(
    command: Callable[[list[str]], int], words: list[str], fault: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """No kill, no such seed, process or fault: exit code 2 and the reason, not "0 lost" nor "0 of 0"."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command(words)
    assert stop.value.code == 2
    assert fault in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_red_and_green_are_told_apart() -> None:
    """The same entry with a replacement that changes nothing stays green."""
    entry = next(p for p in PROTECTIONS if p.fault == "journal torn")
    assert goes_red(entry)[0]
    assert not goes_red(replace(entry, without=entry.text + "  # as it was"))[0]
    assert Path(ROOT / entry.file).read_text().count(entry.text) == 1
