"""State on disk that survives a kill at any moment.

A file is written beside its target, flushed to the disk, and renamed over it: a reader sees the old bytes or the
new ones, never a mixture (POSIX rename is atomic; the directory is flushed so that the rename itself survives).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from medsegdiff.errors import UserError

# Names that become folders on any system, and parts of certificates: no separators, no blanks, no leading dot or dash.
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def write_atomic(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write `data` to `path` so that a crash leaves the old file or the new one.

    Args:
        mode: of the new file, less the umask; 0o600 for secrets, which then are at no moment readable by others.

    Raises:
        UserError: the disk is full, or the folder cannot be written; the old file is untouched.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
        _flush_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # a parent that is a file fails here as it failed above
            partial.unlink(missing_ok=True)
        raise UserError(
            f"{path}: could not be written ({error.strerror or error}); {len(data):,} bytes were due and the earlier "
            "file, if any, is untouched. Free space or choose another folder, then repeat the command."
        ) from error


def clear_partials(folder: Path) -> None:
    """Remove what `write_atomic` left half-written in a folder when its process was killed; living ones keep theirs."""
    for path in folder.glob(".*.partial"):
        number = path.name.split(".")[-2]
        if number.isdigit() and path.is_file() and not Path(f"/proc/{number}").exists():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` when all went well and vanishes otherwise.

    Raises:
        UserError: `out` is a file or holds something, or the disk refuses.
    """
    target = out.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{out}: is there already and not an empty folder; nothing was written. Choose another.")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)  # takes the place of an empty folder
    except OSError as error:
        raise UserError(
            f"{out}: could not be written ({error.strerror or error}); nothing was kept. Free space or choose another "
            "folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks so that memory does not grow with the file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def no_model(path: Path) -> str:
    """What to say where a model was asked for and there is no file."""
    if path.is_dir():
        beside = path / "model.safetensors"
        return f"{path}: is a folder. Give the path of a model: {beside if beside.is_file() else 'model.safetensors'}"
    return f"{path}: there is no such file. Give the path of a model.safetensors."
