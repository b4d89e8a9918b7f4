"""What really runs at this site, as one hash that a data officer approves and that a change of one byte changes.

It covers the bytes of every file of the installed packages client/ and medsegdiff/, the version of every distribution
that medsegfed needs (its requirements, their requirements, and so on) and the version of Python. It does not cover the
bytes of those other distributions: who can change them on the site's machine can change the program that computes this
hash. Nor `__pycache__` and hidden files, for the same reason. Versions of torch name the kind of machine ("2.11.0+cpu",
"+cu130"), so sites with different hardware have different hashes: each approves its own.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import client
import medsegdiff
from medsegdiff.errors import UserError
from medsegdiff.files import sha256_of_file
from medsegdiff.strict import canonical_json

PRODUCT = "medsegfed"
ROOTS = tuple(Path(package.__path__[0]) for package in (client, medsegdiff))


@dataclass(frozen=True)
class Application:
    """What runs here, for a person."""

    hash: str  # hex SHA-256
    medsegfed: str
    torch: str
    flwr: str
    python: str
    files: int  # of client/ and medsegdiff/ that the hash covers
    distributions: int  # whose versions it covers

    def lines(self) -> list[str]:
        """As text."""
        return [
            f"application {self.hash}",
            f"            medsegfed {self.medsegfed}, torch {self.torch}, flwr {self.flwr}, Python {self.python}; "
            f"{self.files} files, {self.distributions} distributions",
        ]


def application_hash(roots: Sequence[Path] = ROOTS) -> str:
    """Hex SHA-256 over the files below `roots` and the versions of all that medsegfed needs.

    Args:
        roots: package folders; their own names count, what they lie in does not.

    Raises:
        UserError: a file cannot be read, a folder inside is a link, or medsegfed is not installed.
    """
    return _digest(_files(roots), distributions())


def application_summary(roots: Sequence[Path] = ROOTS) -> Application:
    """The hash and what stands behind it. Raises UserError as `application_hash`."""
    files, found = _files(roots), distributions()
    versions = {name: found.get(name) or "missing" for name in (PRODUCT, "torch", "flwr")}
    return Application(_digest(files, found), **versions, python=_python(), files=len(files), distributions=len(found))


def distributions() -> dict[str, str | None]:
    """Name -> version of everything that medsegfed requires, directly or not, itself included; None: not installed.

    Raises:
        UserError: medsegfed is not installed as a distribution.
    """
    # Looking all up takes 0.3 s. Installing or removing a distribution changes the folder it lies in, hence its time.
    return dict(_distributions(tuple((entry, _changed(entry)) for entry in sys.path)))


def _changed(entry: str) -> int:
    try:
        return os.stat(entry or ".").st_mtime_ns  # noqa: PTH116  # sys.path holds text
    except OSError:
        return 0


@lru_cache(maxsize=4)
def _distributions(_search_path: tuple[tuple[str, int], ...]) -> tuple[tuple[str, str | None], ...]:
    found: dict[str, str | None] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(PRODUCT, "")]  # distribution, extra
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            found[name] = None
            continue
        found[name] = distribution.version
        for text in distribution.requires or ():
            required = Requirement(text)
            if required.marker is None or required.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(required.name), wanted) for wanted in ("", *sorted(required.extras))]
    if found[PRODUCT] is None:
        raise UserError(
            f"{PRODUCT} is not installed in this Python ({sys.executable}), so it cannot be told what runs. Install it "
            "with pip, then repeat."
        )
    return tuple(sorted(found.items()))


def _files(roots: Sequence[Path]) -> dict[str, str]:
    """Relative name, with the package's own, -> SHA-256 of the bytes."""
    hashes: dict[str, str] = {}
    for root in roots:
        before = len(hashes)
        for path in _below(root):
            try:
                hashes[f"{root.name}/{path.relative_to(root).as_posix()}"] = sha256_of_file(path)
            except OSError as error:
                raise UserError(
                    f"{path}: a file of the program cannot be read ({error.strerror}). Install medsegfed anew."
                ) from error
        if len(hashes) == before:
            raise UserError(f"{root}: holds no file of the program. Install medsegfed anew.")
    return hashes


def _below(root: Path) -> list[Path]:
    """All files, those of folders inside too; __pycache__ and hidden ones, which are never imported, are left out."""
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        if links := [name for name in folders if (here / name).is_symlink()]:
            raise UserError(
                f"{here / links[0]}: is a link, so it cannot be told which files belong to the program. Install "
                "medsegfed anew."
            )
        paths += [here / name for name in sorted(names) if not name.startswith(".")]
    return paths


def _digest(files: dict[str, str], versions: dict[str, str | None]) -> str:
    stated = {"files": files, "distributions": versions, "python": _python()}
    return hashlib.sha256(canonical_json(stated).encode()).hexdigest()


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"
