"""What a wheelhouse is made of: wheels, what they ask for, and whether they are all that a machine needs.

Nothing here reaches a network or runs pip; deploy/wheelhouse.py does.
"""

from __future__ import annotations

import email
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from medsegdiff.errors import UserError
from medsegdiff.files import sha256_of_file
from medsegdiff.strict import Strict

LEGACY_TAGS = {5: "manylinux1", 12: "manylinux2010", 17: "manylinux2014"}  # PEP 600: the same thing, older names


@dataclass(frozen=True)
class Facts(Strict):
    """wheelhouse.json: what the folder was made for, and from what."""

    version: str  # of MedSegFed
    commit: str  # of the checkout; ends in "+changes" where it was not committed; "" where there is no git
    torch: str  # with its build: 2.13.0+cpu
    python: str  # 3.11
    platform: str  # newest platform tag that the target machine accepts, such as manylinux_2_28_x86_64


@dataclass(frozen=True)
class Wheel:
    """One package as a file."""

    path: Path
    name: str  # canonical: lower case, single dashes
    version: str
    requires: tuple[str, ...]  # as its metadata says, with extras and markers
    sha256: str


def read_wheels(folder: Path) -> tuple[Wheel, ...]:
    """The wheels of a folder by name.

    Raises:
        UserError: two of one package, a file that is no wheel, or a source archive, which would run code to install.
    """
    found: dict[str, Wheel] = {}
    for path in sorted([*folder.glob("*.whl"), *folder.glob("*.tar.gz"), *folder.glob("*.zip")]):
        try:
            name, version, _, _ = parse_wheel_filename(path.name)
            with zipfile.ZipFile(path) as archive:
                inner = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
                metadata = email.message_from_bytes(archive.read(inner))
        except (InvalidWheelFilename, zipfile.BadZipFile, StopIteration, OSError) as error:
            raise UserError(f"{path}: is not a wheel ({error or 'no METADATA'}). Make the folder anew.") from error
        if name in found:
            raise UserError(f"{folder}: holds {name} twice, {found[name].version} and {version}. Make it anew.")
        requires = tuple(metadata.get_all("Requires-Dist") or ())
        found[name] = Wheel(path, name, str(version), requires, sha256_of_file(path))
    return tuple(found[name] for name in sorted(found))


def read_pins(path: Path) -> dict[str, str]:
    """constraints.txt: canonical name -> version. Raises UserError for a line that is not NAME==VERSION."""
    pins: dict[str, str] = {}
    for number, line in enumerate(text_of(path).splitlines(), 1):
        if not (text := line.split("#")[0].strip()):
            continue
        name, sign, version = text.partition("==")
        if not sign:
            raise UserError(f"{path}: line {number}, {text!r}, pins no version. Write NAME==VERSION.")
        pins[canonicalize_name(name)] = version
    return pins


def check_versions(wheels: Iterable[Wheel], pins: Mapping[str, str]) -> None:
    """Every wheel is as pinned; without a pin may come torch, what its build brings along, and MedSegFed itself.

    Raises:
        UserError: names the packages that are not pinned, or pinned otherwise.
    """
    by_name = {wheel.name: wheel for wheel in wheels}
    free = {"medsegfed"} | _reachable("torch", by_name)
    unpinned = sorted(by_name.keys() - pins.keys() - free)
    if unpinned:
        raise UserError(
            f"constraints.txt pins no version of {', '.join(unpinned)}, so two wheelhouses could differ. Nothing was "
            "kept. Add the lines (pip freeze in the tested environment names them), then repeat."
        )
    for wheel in by_name.values():
        if wheel.version != pins.get(wheel.name, wheel.version):
            raise UserError(
                f"{wheel.path.name}: constraints.txt pins {wheel.name}=={pins[wheel.name]}. Nothing was kept."
            )


def _reachable(name: str, by_name: Mapping[str, Wheel]) -> set[str]:
    """The package and all it can lead to among the wheels, whatever extras and markers say."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        if (wheel := by_name.get(todo.pop())) and wheel.name not in seen:
            seen.add(wheel.name)
            todo += [canonicalize_name(Requirement(line).name) for line in wheel.requires]
    return seen


def needed_wheels(wheels: Iterable[Wheel], facts: Facts) -> set[str]:
    """Names of all that MedSegFed needs on the target machine; each is there, in a version that all who ask accept.

    pip weighs conditions such as `python_version < "3.12"` by the interpreter it runs on; this weighs them by the
    target, so that a folder made by another Python is not found wanting only in the hospital.

    Raises:
        UserError: names the requirement and who asks.
    """
    by_name = {wheel.name: wheel for wheel in wheels}
    if "medsegfed" not in by_name:
        raise UserError("there is no wheel of MedSegFed itself. Make the wheelhouse anew.")
    target = target_environment(facts)
    todo: list[tuple[str, frozenset[str]]] = [("medsegfed", frozenset())]
    seen = set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in by_name[name].requires:
            try:
                asked = Requirement(line)
            except InvalidRequirement as error:
                raise UserError(f"{by_name[name].path.name}: asks for {line!r}, which nobody can read.") from error
            if asked.marker and not any(asked.marker.evaluate({**target, "extra": e}) for e in extras | {""}):
                continue
            needed = by_name.get(canonicalize_name(asked.name))
            if needed is None or not asked.specifier.contains(needed.version, prereleases=True):
                found = "not there" if needed is None else f"there as {needed.version}"
                raise UserError(
                    f"{name} needs {line} on Python {facts.python}, and it is {found}, so an "
                    f"installation would fail. Make the wheelhouse with Python {facts.python} itself, or mend "
                    "constraints.txt."
                )
            todo.append((needed.name, frozenset(asked.extras)))
    return {name for name, _ in seen}


def target_environment(facts: Facts) -> dict[str, str]:
    """The values that conditions of requirements are weighed by, on the target machine."""
    machine = re.sub(r"^(manylinux_\d+_\d+|linux)_", "", facts.platform)
    environment = {name: str(value) for name, value in default_environment().items()}
    return environment | {
        "python_version": facts.python,
        "python_full_version": f"{facts.python}.0",
        "implementation_version": f"{facts.python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "platform_machine": machine,
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
    }


def platform_tags(newest: str) -> tuple[str, ...]:
    """All platform tags that a machine accepts whose newest is `newest`: manylinux_2_28_x86_64 and those before it.

    Raises:
        UserError: it is no tag of that kind.
    """
    match = re.fullmatch(r"manylinux_2_(\d+)_(x86_64|aarch64)", newest)
    if match is None:
        raise UserError(f"--platform {newest}: name a tag such as manylinux_2_28_x86_64 or manylinux_2_28_aarch64.")
    machine = match[2]
    tags = []
    for minor in range(int(match[1]), 4, -1):
        tags.append(f"manylinux_2_{minor}_{machine}")
        if minor in LEGACY_TAGS:
            tags.append(f"{LEGACY_TAGS[minor]}_{machine}")
    return (*tags, f"linux_{machine}")


def text_of(path: Path) -> str:
    """A small text file. Raises UserError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}). A wheelhouse is made in a checkout of MedSegFed, and checked where it "
            "was made."
        ) from error
