"""Files are there whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from medsegdiff.errors import UserError
from medsegdiff.files import sha256_of_file, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_bytes_are_written_and_overwritten(tmp_path: Path) -> None:
    """Folders are made, an older file is replaced, nothing else is left."""
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomic(path, b"first, and longer")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert names(path.parent) == ["file.bin"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """A disk that refuses while flushing or renaming: the old bytes stay, the partial file goes, one line says why."""
    path = tmp_path / "file.bin"
    write_atomic(path, b"old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if broken == "fsync" else (Path, "replace")), full)
    with pytest.raises(UserError, match=r"No space left on device\); 3 bytes were due") as caught:
        write_atomic(path, b"new")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_a_folder_in_place_of_the_file_is_kept(tmp_path: Path) -> None:
    """The target is a folder: it stays with all it holds, and no partial file lies beside it."""
    (tmp_path / "file.bin").mkdir()
    (tmp_path / "file.bin" / "inside").write_text("x")
    with pytest.raises(UserError, match=r"file\.bin"):
        write_atomic(tmp_path / "file.bin", b"new")
    assert names(tmp_path) == ["file.bin"]
    assert names(tmp_path / "file.bin") == ["inside"]


def test_a_file_in_place_of_the_folder_is_kept(tmp_path: Path) -> None:
    """A parent that is a file is an error of the user's, not a traceback."""
    (tmp_path / "parent").write_text("x")
    with pytest.raises(UserError):
        write_atomic(tmp_path / "parent" / "file.bin", b"new")
    assert (tmp_path / "parent").read_text() == "x"


def test_the_new_file_appears_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment of renaming the target is still the old one and the new bytes are complete and flushed."""
    path, seen = tmp_path / "file.bin", []
    write_atomic(path, b"old")
    flushed: list[int] = []
    real_fsync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.append(descriptor), real_fsync(descriptor))[1])

    def watched(self: Path, target: Path) -> Path:
        seen.append((self.read_bytes(), path.read_bytes(), self.parent, len(flushed)))
        return real_replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    write_atomic(path, b"new")
    assert seen == [(b"new", b"old", tmp_path, 1)]
    assert len(flushed) == 2, "file, then folder"


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    """Equal to hashlib over the whole, across blocks."""
    data = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(data)
    assert sha256_of_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
