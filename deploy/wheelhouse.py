"""A folder that installs MedSegFed on a machine without internet: python -m deploy.wheelhouse OUT

Run it in a checkout, on a machine that reaches a package index. OUT holds one wheel of each package, in the versions of
constraints.txt and with the build of torch that was chosen; requirements.lock, which pins each by version and SHA-256;
SHA256SUMS; install.sh and INSTALL.md; and deploy/files. What was written is checked before OUT appears.

    python -m deploy.wheelhouse OUT                                            torch as it is installed here
    python -m deploy.wheelhouse OUT --torch-index URL [--torch 2.13.0+cu130]   the build that hospitals' GPUs need
    python -m deploy.wheelhouse OUT --check                                    is OUT whole, and as it was made?

On the other machine `sh install.sh` needs nothing but Python and that folder; a changed byte makes it fail.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from deploy.wheels import Facts, Wheel, check_versions, needed_wheels, platform_tags, read_pins, read_wheels, text_of
from medsegdiff.errors import EXIT_CODE, UserError
from medsegdiff.files import new_folder, sha256_of_file
from medsegdiff.strict import parse_config

ROOT = Path(__file__).resolve().parents[1]
FACTS, LOCK, SUMS = "wheelhouse.json", "requirements.lock", "SHA256SUMS"
OLDEST_GLIBC = 28  # manylinux_2_28: the oldest system that torch's wheels run on (2018, RHEL 8)
# The same sources give the same wheel, byte for byte, whenever it is built: setuptools dates its files by this.
BUILD_EPOCH = "315532800"  # 1980-01-01, the first day that a zip file can name


def make_wheelhouse(
    out: Path,
    python: str,
    platform_tag: str,
    torch: str | None = None,
    torch_index: str | None = None,
    root: Path = ROOT,
) -> Facts:
    """Fill the new folder `out`; it appears whole and checked, or not at all.

    Args:
        python: version of the target machine, such as 3.11.
        platform_tag: newest platform tag that it accepts; older ones of the same family are taken too.
        torch: version with its build (2.13.0+cpu); default: the newest allowed one of `torch_index`, else the one
            that is installed here.
        torch_index: package index to take torch from; default: where pip takes everything else.
        root: the checkout.

    Raises:
        UserError: no checkout, a package that cannot be had, one that constraints.txt does not pin or pins otherwise,
            a dependency that is missing, or `out` holds something.
    """
    pins = read_pins(root / "constraints.txt")
    project = tomllib.loads(text_of(root / "pyproject.toml"))
    wanted_torch = _wanted_torch(project, torch, torch_index)
    platforms = platform_tags(platform_tag)
    if not re.fullmatch(r"3\.\d+", python):
        raise UserError(f"--python {python}: name a version such as 3.11.")
    with new_folder(out) as folder:
        own = build_own_wheel(root, folder)
        target = [
            "--only-binary", ":all:", "--python-version", python, "--implementation", "cp",
            *(f"--platform={tag}" for tag in platforms),
        ]  # fmt: skip
        index = ["--index-url", torch_index] if torch_index else []
        # torch goes first: asked for as a dependency it would come from elsewhere, with gigabytes of CUDA libraries.
        _pip("download", "--dest", str(folder), "--no-deps", *target, *index, wanted_torch)
        chosen = next(wheel for wheel in read_wheels(folder) if wheel.name == "torch")
        # The libraries of torch's build may lie on its index alone.
        extra = ["--extra-index-url", torch_index] if torch_index else []
        _pip(
            "download", "--dest", str(folder), "--find-links", str(folder), *target, *extra,
            "--constraint", str(root / "constraints.txt"), f"torch=={chosen.version}", str(own),
        )  # fmt: skip
        facts = Facts(project["project"]["version"], _commit(root), chosen.version, python, platform_tag)
        wheels = _without_surplus(read_wheels(folder), facts)
        check_versions(wheels, pins)
        files = root / "deploy" / "files"
        shutil.copytree(files, folder / "files", ignore=shutil.ignore_patterns("install.sh", "__pycache__"))
        shutil.copy(files / "install.sh", folder)
        # What is built from this folder as context finds its rules where Docker and Podman look for them.
        for name in (".containerignore", ".dockerignore"):
            shutil.copy(files / "containerignore", folder / name)
        (folder / FACTS).write_text(json.dumps(vars(facts), indent=2) + "\n", encoding="utf-8")
        (folder / LOCK).write_text(lock_text(wheels, facts), encoding="utf-8")
        (folder / "INSTALL.md").write_text(_install_page(facts), encoding="utf-8")
        (folder / SUMS).write_text(_sums_text(folder), encoding="utf-8")
        check_wheelhouse(folder)
    return facts


def _without_surplus(wheels: tuple[Wheel, ...], facts: Facts) -> tuple[Wheel, ...]:
    """Remove what pip fetched for this machine's Python and the target's has no use for."""
    needed = needed_wheels(wheels, facts)
    for wheel in wheels:
        if wheel.name not in needed:
            wheel.path.unlink()
    return tuple(wheel for wheel in wheels if wheel.name in needed)


def check_wheelhouse(folder: Path) -> Facts:
    """That the folder holds what its lock names, each file as it was made, and that nothing a package needs is missing.

    Raises:
        UserError: names the first file that is missing, changed or added, or the dependency that is not met.
    """
    facts = parse_config(_json_of(folder / FACTS), Facts, str(folder / FACTS))
    listed = _read_sums(folder / SUMS)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {SUMS}
    again = "Do not install from it; copy the folder again, or make it anew."
    if missing := sorted(listed.keys() - present):
        raise UserError(f"{folder}: {missing[0]} is missing ({len(missing)} of {len(listed)} files are). {again}")
    if added := sorted(present - listed.keys()):
        raise UserError(f"{folder}: {added[0]} is not named in {SUMS} ({len(added)} such files). {again}")
    for name, digest in listed.items():
        if sha256_of_file(folder / name) != digest:
            raise UserError(f"{folder}: {name} is not the file that was put there (its SHA-256 differs). {again}")
    wheels = read_wheels(folder)
    if text_of(folder / LOCK) != lock_text(wheels, facts):
        raise UserError(f"{folder}: {LOCK} does not name exactly the {len(wheels)} wheels beside it. {again}")
    if surplus := sorted({wheel.name for wheel in wheels} - needed_wheels(wheels, facts)):
        raise UserError(f"{folder}: nothing asks for {', '.join(surplus)}. {again}")
    return facts


def lock_text(wheels: Iterable[Wheel], facts: Facts) -> str:
    """requirements.lock: each package by version and hash, in the form that `pip install --require-hashes` wants."""
    lines = [
        f"# MedSegFed {facts.version} with torch {facts.torch}, for Python {facts.python} on {facts.platform}.",
        f"# pip install --no-index --find-links . --require-hashes --requirement {LOCK}",
    ]
    lines += [f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}" for wheel in wheels]
    return "\n".join(lines) + "\n"


def build_own_wheel(root: Path, folder: Path) -> Path:
    """MedSegFed itself as a wheel, from a copy so that nothing is left in the checkout. Equal sources, equal bytes.

    Raises:
        UserError: the build failed; its last line says why.
    """
    with tempfile.TemporaryDirectory(prefix="medsegfed-build-") as scratch:
        source = Path(scratch) / "source"
        # Only what the build reads: a checkout may hold datasets, runs and environments beside it.
        names = [path.name for path in root.iterdir() if (path / "__init__.py").is_file()]
        source.mkdir()
        for name in names:
            shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in root.iterdir():
            if path.name == "pyproject.toml" or path.name.startswith(("README", "LICENSE")):
                shutil.copy(path, source)
        _pip(
            "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", str(folder), str(source),
            SOURCE_DATE_EPOCH=BUILD_EPOCH,
        )  # fmt: skip
    return next(folder.glob("medsegfed-*.whl"))


def _wanted_torch(project: dict[str, Any], version: str | None, index: str | None) -> str:
    """What pip is asked for: an exact build, or the range of pyproject.toml from an index that was named."""
    if version is not None:
        return f"torch=={version}"
    if index is not None:
        return next(str(line) for line in project["project"]["dependencies"] if Requirement(line).name == "torch")
    try:
        return f"torch=={importlib.metadata.version('torch')}"
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            "torch is not installed here, so which build do the hospitals need? Name its package index: --torch-index "
            "URL (a CPU or CUDA build)."
        ) from error


def _pip(command: str, *arguments: str, **environment: str) -> None:
    """Run pip with the machine's own settings (index, proxy, certificates)."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, "--disable-pip-version-check", *arguments],
        env=os.environ | environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode != 0:
        raise UserError(f"pip {command} failed, nothing was kept: {_reason(done.stdout, done.stderr)}")


def _reason(out: str, err: str) -> str:
    """What pip says is wrong: its lines that begin with ERROR, and who asks for what where versions conflict."""
    lines = [line.removeprefix("ERROR: ") for line in err.splitlines() if line.startswith("ERROR: ")]
    lines = [line for line in lines if not line.startswith("ResolutionImpossible")]  # advertises a page
    conflict = re.search(r"The conflict is caused by:\n((?: {4}.*\n)+)", out)
    if conflict:
        lines += [line.strip() for line in conflict[1].splitlines()]
    return "; ".join(lines[:6]) or (err or out).strip()[-500:]


def _commit(root: Path) -> str:
    """Which commit the checkout is at, with "+changes" where files differ from it; "" where git cannot tell."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _sums_text(folder: Path) -> str:
    """SHA256SUMS, as sha256sum --check reads it: every file of the folder but this one."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    return "".join(f"{sha256_of_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths)


def _read_sums(path: Path) -> dict[str, str]:
    matches = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in text_of(path).splitlines()]
    if not matches or None in matches:
        raise UserError(f"{path}: is not a list of checksums. Copy the folder again.")
    return {match[2]: match[1] for match in matches if match}


def _json_of(path: Path) -> Any:
    try:
        return json.loads(text_of(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}). Copy the folder again.") from error


def _install_page(facts: Facts) -> str:
    return f"""\
# MedSegFed {facts.version}, without internet

For Python {facts.python} on Linux ({facts.platform}), with torch {facts.torch}. Source: {facts.commit or "no git"}.

1. `sha256sum SHA256SUMS`: compare with what whoever made this folder tells you by telephone.
2. `sudo sh install.sh` checks every file and installs into a folder of its own; /opt/medsegfed leads to it.
   `PYTHON=/path/to/python{facts.python}` chooses an interpreter, an argument another place: `sh install.sh ~/medsegfed`
3. `/opt/medsegfed/bin/medsegfed --help`

An update is the same three steps with the new folder: the old version stays beside the new one, and /opt/medsegfed
leads to the new one from the moment it is complete. Then restart the service. Kits, keys and certificates stay.

By hand: `python{facts.python} -m venv PLACE`, then
`PLACE/bin/python -m pip install --no-index --find-links . --require-hashes --requirement {LOCK}`

files/ holds systemd units, container and compose files, firewall and proxy examples.
"""


def main() -> int:
    """Make or check a wheelhouse and tell what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must be new or empty")
    parser.add_argument("--python", default="3.11", help="version on the target machine; default: 3.11")
    parser.add_argument(
        "--platform",
        default=f"manylinux_2_{OLDEST_GLIBC}_{platform.machine()}",
        help="newest platform tag that the target machine accepts; default: %(default)s",
    )
    parser.add_argument("--torch", metavar="VERSION", help="build of torch, such as 2.13.0+cpu; default: see above")
    parser.add_argument("--torch-index", metavar="URL", help="package index to take torch from")
    parser.add_argument("--check", action="store_true", help="check a folder that is there; writes nothing")
    given = parser.parse_args()
    try:
        if given.check:
            facts = check_wheelhouse(given.out)
        else:
            facts = make_wheelhouse(given.out, given.python, given.platform, given.torch, given.torch_index)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    sizes = [path.stat().st_size for path in given.out.glob("*.whl")]
    print(
        f"{given.out}: MedSegFed {facts.version}, torch {facts.torch}, for Python {facts.python} on {facts.platform}; "
        f"{len(sizes)} wheels, {sum(sizes) / 1e6:.0f} MB, all as {SUMS} says\n"
        f"SHA-256 of {SUMS}, to be told by telephone: {sha256_of_file(given.out / SUMS)}\n"
        f"Next, on the machine without internet: sudo sh {given.out.name}/install.sh"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
