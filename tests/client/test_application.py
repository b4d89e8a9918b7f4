"""The application's hash: the same for the same program, another after any change."""

from __future__ import annotations

import re
import shutil
from importlib import metadata
from pathlib import Path

import pytest

from client import application
from client.application import ROOTS, application_hash, application_summary, distributions
from medsegdiff.errors import UserError


@pytest.fixture
def copied(tmp_path: Path) -> list[Path]:
    """The installed packages, copied elsewhere."""
    return [Path(shutil.copytree(root, tmp_path / root.name)) for root in ROOTS]


def test_the_same_program_has_the_same_hash_wherever_it_lies(copied: list[Path]) -> None:
    """64 hex digits; the folder above, the order of the roots, caches and hidden files do not count."""
    whole = application_hash()
    assert re.fullmatch("[0-9a-f]{64}", whole)
    for root in copied:
        for cache in root.rglob("__pycache__"):
            shutil.rmtree(cache)
    (copied[0] / "__pycache__").mkdir()
    (copied[0] / "__pycache__" / "app.cpython-311.pyc").write_bytes(b"x")
    (copied[0] / ".app.py.swp").write_bytes(b"x")
    (copied[1] / ".cache").mkdir()
    (copied[1] / ".cache" / "x.py").write_bytes(b"x")
    assert application_hash(copied) == application_hash(copied[::-1]) == whole


def test_one_changed_byte_anywhere_changes_it(copied: list[Path]) -> None:
    """Every file of the copy in turn; the sum of all changes undone gives the old hash."""
    whole = application_hash(copied)
    files = [path for root in copied for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) > 50
    for path in files:
        data = path.read_bytes()
        changed = bytes([data[len(data) // 2] ^ 1]) if data else b"x"
        path.write_bytes(data[: len(data) // 2] + changed + data[len(data) // 2 + 1 :])
        assert application_hash(copied) != whole, path
        path.write_bytes(data)
    assert application_hash(copied) == whole


@pytest.mark.parametrize("name", ["client/new.py", "client/app.pyc", "medsegdiff/data/table.bin", "medsegdiff/x/y.py"])
def test_a_file_more_or_elsewhere_changes_it(copied: list[Path], name: str) -> None:
    """Whatever Python could import or read; also a file that only moved, and one that went."""
    whole = application_hash(copied)
    path = copied[0].parent / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    assert application_hash(copied) != whole
    path.unlink()
    assert application_hash(copied) == whole
    (copied[0] / "gate.py").rename(copied[0] / "gates.py")
    assert application_hash(copied) != whole
    (copied[0] / "gates.py").unlink()
    assert application_hash(copied) != whole


def test_bytes_do_not_pass_from_one_file_to_the_next(tmp_path: Path) -> None:
    """Where one file ends and the next begins is part of the hash."""
    (tmp_path / "p").mkdir()
    hashes = set()
    for first, second in ((b"ab", b"c"), (b"a", b"bc"), (b"abc", b"")):
        (tmp_path / "p" / "x.py").write_bytes(first)
        (tmp_path / "p" / "y.py").write_bytes(second)
        hashes.add(application_hash([tmp_path / "p"]))
    assert len(hashes) == 3


def test_the_versions_of_all_that_is_needed_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closure reaches past direct requirements and through extras; another version or Python, another hash."""
    found = distributions()
    whole = application_hash()
    assert found["medsegfed"] == metadata.version("medsegfed")
    assert found["flwr"] == "1.41.0"
    assert {"torch", "ray", "cffi", "typing-extensions"} <= set(found), "ray: an extra; cffi: of cryptography"
    assert not {"pytest", "mypy", "ruff"} & set(found), "what only developers need is not there"
    monkeypatch.setattr(application, "distributions", lambda: found | {"cffi": "9.9"})
    changed = application_hash()
    monkeypatch.undo()
    monkeypatch.setattr(application.platform, "python_version", lambda: "3.11.0")
    assert len({whole, changed, application_hash()}) == 3


def test_an_installation_during_the_run_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution that comes to lie in front of the installed one: its version counts at the next call."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = application_hash()
    info = tmp_path / "cffi-99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cffi\nVersion: 99.0\n")
    assert distributions()["cffi"] == "99.0"
    assert application_hash() != before


def test_what_cannot_be_hashed_is_told(tmp_path: Path, copied: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A linked folder, an empty one, a dangling file, and medsegfed run without being installed."""
    (copied[1] / "more").symlink_to(copied[0])
    with pytest.raises(UserError, match="more: is a link"):
        application_hash(copied)
    (copied[1] / "more").unlink()
    (copied[1] / "gone.py").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone\.py: a file of the program cannot be read"):
        application_hash(copied)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file"):
        application_hash([tmp_path / "empty"])
    monkeypatch.setattr(application, "PRODUCT", "medsegfed-that-is-not-installed")
    application._distributions.cache_clear()
    with pytest.raises(UserError, match="is not installed in this Python"):
        application_hash()
    application._distributions.cache_clear()


def test_a_summary_for_a_person() -> None:
    """The hash, versions and counts in two lines."""
    summary = application_summary()
    assert summary.hash == application_hash()
    assert summary.flwr == "1.41.0"
    assert summary.files > 50 < summary.distributions
    assert [summary.hash in summary.lines()[0], f"torch {summary.torch}" in summary.lines()[1]] == [True, True]
