"""`medsegfed audit verify`: 0 for a whole log, 1 for a damaged one, 2 for a question that cannot be answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from medsegdiff.chained_log import AUDIT_LOG
from tests.deploy.small_federation import new_federation

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return new_federation(tmp_path / "federation").folder


def verify(medsegfed: Run, folder: Path, *more: str) -> tuple[int, str, str]:
    return medsegfed("audit", "verify", "--folder", str(folder), *more)


def test_a_whole_log(medsegfed: Run, folder: Path) -> None:
    """For people and for programs."""
    code, out, _ = verify(medsegfed, folder)
    assert (code, out.splitlines()[-1][:3]) == (0, "OK:")
    code, out, _ = verify(medsegfed, folder, "--json")
    said = json.loads(out)
    assert (code, said["whole"], said["lines"]) == (0, True, len((folder / AUDIT_LOG).read_text().splitlines()))


def test_a_damaged_log(medsegfed: Run, folder: Path) -> None:
    """One changed letter; programs get the fault as JSON, too."""
    path = folder / AUDIT_LOG
    path.write_bytes(path.read_bytes().replace(b"created", b"creaked", 1))
    code, out, _ = verify(medsegfed, folder)
    assert (code, out.splitlines()[-1][:6]) == (1, "FAULT:")
    code, out, _ = verify(medsegfed, folder, "--json")
    said = json.loads(out)
    assert (code, said["whole"]) == (1, False)
    assert "line 1" in said["fault"]


def test_a_head_that_is_none_says_nothing_of_the_log(medsegfed: Run, folder: Path) -> None:
    """A slip at the keyboard is no damage."""
    for more in ((), ("--json",)):
        code, out, err = verify(medsegfed, folder, "--anchor", "9f31", *more)
        assert (code, out) == (2, "")
        assert "is no head of a log" in err


def test_version(medsegfed: Run) -> None:
    """What a person is asked for first."""
    code, out, _ = medsegfed("--version")
    assert code == 0
    assert "medsegfed" in out
    assert "flwr 1.41.0" in out
