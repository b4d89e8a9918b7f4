"""A wheelhouse: what is in it, that nothing is missing or changed, and that it installs with no network at all."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from deploy import wheelhouse
from deploy.wheelhouse import check_wheelhouse, lock_text, make_wheelhouse
from deploy.wheels import Facts, Wheel, check_versions, needed_wheels, platform_tags, read_pins, read_wheels
from medsegdiff.errors import UserError

ROOT = Path(__file__).parents[2]
TORCH = version("torch")  # the build that is installed here is the one that is taken by default
PYTHON = f"3.{sys.version_info.minor}"
FACTS = Facts("9.9", "", TORCH, PYTHON, "manylinux_2_28_x86_64")


def write_wheel(folder: Path, name: str, release: str, requires: Sequence[str] = (), content: str = "") -> Path:
    """The smallest wheel there can be: one module of the package's name."""
    path = folder / f"{name}-{release}-py3-none-any.whl"
    info = f"{name}-{release}.dist-info"
    files = {
        f"{name}.py": content or f"RELEASE = {release!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n"
        + "".join(f"Requires-Dist: {line}\n" for line in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for inner, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{inner},sha256={digest},{len(text)}\n"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for inner, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(zipfile.ZipInfo(inner), text)
    return path


def wheel(name: str, release: str = "1.0", *requires: str) -> Wheel:
    """A wheel as its metadata has it, with no file behind it."""
    return Wheel(Path(f"{name}-{release}-py3-none-any.whl"), name, release, requires, "0" * 64)


def write_folder(folder: Path) -> Path:
    """A wheelhouse made without pip: MedSegFed, which needs alpha."""
    write_wheel(folder, "medsegfed", "9.9", ["alpha>=1"])
    write_wheel(folder, "alpha", "1.2")
    (folder / "files").mkdir()
    (folder / "files" / "note").write_text("a file of the deployment\n")
    (folder / wheelhouse.FACTS).write_text(json.dumps(vars(FACTS)))
    (folder / wheelhouse.LOCK).write_text(lock_text(read_wheels(folder), FACTS))
    (folder / wheelhouse.SUMS).write_text(wheelhouse._sums_text(folder))
    return folder


def refresh_sums(folder: Path) -> None:
    (folder / wheelhouse.SUMS).unlink()
    (folder / wheelhouse.SUMS).write_text(wheelhouse._sums_text(folder))


# What a machine accepts and needs


def test_platform_tags_are_those_that_pip_would_accept_on_such_a_machine() -> None:
    """The oracle is packaging's own list for this machine, cut at the tag asked for."""
    from packaging.tags import platform_tags as of_this_machine

    here = list(of_this_machine())
    newest = next(tag for tag in here if tag.startswith("manylinux_2_"))
    assert list(platform_tags(newest)) == here[here.index(newest) :]
    assert platform_tags("manylinux_2_28_x86_64")[0] == "manylinux_2_28_x86_64"


@pytest.mark.parametrize("tag", ["win_amd64", "manylinux_2_28", "manylinux_3_1_x86_64", "", "manylinux_2_28_x86_64;"])
def test_a_platform_that_is_none_is_refused(tag: str) -> None:
    """Only Linux with glibc: torch has no other wheels for servers."""
    with pytest.raises(UserError, match="manylinux_2_28_x86_64"):
        platform_tags(tag)


def test_what_is_needed_follows_extras_and_the_targets_python() -> None:
    """Conditions are weighed by the target, not by the Python that made the folder."""
    wheels = [
        wheel("medsegfed", "9.9", "alpha[fast]>=1", "old-only; python_version < '3.12'", "win; os_name == 'nt'"),
        wheel("alpha", "1.2", "speed==2.*; extra == 'fast'", "unused; extra == 'slow'"),
        wheel("speed", "2.1", "medsegfed"),  # a circle ends
        wheel("old-only"),
        wheel("unused"),
    ]
    assert needed_wheels(wheels, FACTS_AT["3.11"]) == {"medsegfed", "alpha", "speed", "old-only"}
    assert needed_wheels(wheels, FACTS_AT["3.13"]) == {"medsegfed", "alpha", "speed"}


FACTS_AT = {python: Facts("9.9", "", TORCH, python, "manylinux_2_28_x86_64") for python in ("3.11", "3.13")}


@pytest.mark.parametrize(
    ("wheels", "told"),
    [
        ([wheel("medsegfed", "9.9", "alpha")], "needs alpha on Python 3.11, and it is not there"),
        ([wheel("medsegfed", "9.9", "alpha>=2"), wheel("alpha")], "there as 1.0"),
        ([wheel("medsegfed", "9.9", "alpha"), wheel("alpha", "1.0", "what ever")], "nobody can read"),
        ([wheel("alpha")], "no wheel of MedSegFed"),
    ],
)
def test_a_missing_or_unfit_dependency_is_named(wheels: list[Wheel], told: str) -> None:
    """It would be noticed in the hospital otherwise, where nothing can be fetched."""
    with pytest.raises(UserError, match=told):
        needed_wheels(wheels, FACTS_AT["3.11"])


def test_only_torch_and_what_its_build_brings_may_come_without_a_pin() -> None:
    """A CUDA build brings libraries that constraints.txt, made for another build, does not know."""
    wheels = [
        wheel("medsegfed", "9.9", "torch", "alpha"),
        wheel("torch", TORCH, "nvidia-cublas; platform_system == 'Linux'"),
        wheel("nvidia-cublas", "13.0", "nvidia-deep"),
        wheel("nvidia-deep"),
        wheel("alpha"),
    ]
    check_versions(wheels, {"alpha": "1.0"})
    with pytest.raises(UserError, match="pins no version of alpha"):
        check_versions(wheels, {})
    with pytest.raises(UserError, match=r"pins alpha==2\.0"):
        check_versions(wheels, {"alpha": "2.0"})


def test_pins_are_read_as_pip_reads_them(tmp_path: Path) -> None:
    """Names are canonical; a line that pins nothing is refused with its number."""
    path = tmp_path / "constraints.txt"
    path.write_text("# head\nPyYAML==6.0.3  # why\n\nzope.thing==1\n")
    assert read_pins(path) == {"pyyaml": "6.0.3", "zope-thing": "1"}
    path.write_text("fine==1\nloose>=2\n")
    with pytest.raises(UserError, match="line 2"):
        read_pins(path)


def test_the_projects_own_constraints_pin_all_that_is_installed_here() -> None:
    """What the tests run with is what the hospitals get: every needed package is pinned at the installed version."""
    from importlib.metadata import distributions, requires

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    installed = {canonicalize_name(found.metadata["Name"]): found for found in distributions()}
    wheels = [
        Wheel(Path(f"{name}.whl"), name, found.version, tuple(found.requires or ()), "")
        for name, found in installed.items()
    ]
    needed = needed_wheels(wheels, Facts("", "", TORCH, PYTHON, "manylinux_2_28_x86_64"))
    check_versions([one for one in wheels if one.name in needed], read_pins(ROOT / "constraints.txt"))
    assert {Requirement(line).name.lower() for line in requires("torch") or () if "extra" not in line} <= needed


# A folder as it should be, and as it should not


def test_a_whole_folder_passes(tmp_path: Path) -> None:
    """The check returns what the folder was made for."""
    assert check_wheelhouse(write_folder(tmp_path / "w")) == FACTS


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("victim", ["alpha-1.2-py3-none-any.whl", "requirements.lock", "files/note"])
def test_one_changed_bit_is_found_and_named(tmp_path: Path, victim: str) -> None:
    """In a wheel, in the lock, in a file beside them."""
    folder = write_folder(tmp_path / "w")
    _flip(folder / victim)
    with pytest.raises(UserError, match=f"{victim} is not the file"):
        check_wheelhouse(folder)


def test_missing_and_added_files_are_named(tmp_path: Path) -> None:
    """A copy that ended early, and a wheel that somebody put beside the others."""
    folder = write_folder(tmp_path / "w")
    write_wheel(folder, "extra", "1.0")
    with pytest.raises(UserError, match=r"extra-1\.0.*is not named in SHA256SUMS"):
        check_wheelhouse(folder)
    refresh_sums(folder)  # whoever adds a wheel can add its sum
    with pytest.raises(UserError, match="does not name exactly the 3 wheels"):
        check_wheelhouse(folder)
    (folder / wheelhouse.LOCK).write_text(lock_text(read_wheels(folder), FACTS))
    refresh_sums(folder)
    with pytest.raises(UserError, match="nothing asks for extra"):
        check_wheelhouse(folder)
    (folder / "alpha-1.2-py3-none-any.whl").unlink()
    with pytest.raises(UserError, match=r"alpha-1\.2-py3-none-any\.whl is missing"):
        check_wheelhouse(folder)


@pytest.mark.parametrize("content", ["", "no sums\n", "0" * 63 + "  file\n"])
def test_a_torn_list_of_sums_is_no_list(tmp_path: Path, content: str) -> None:
    """An empty list would vouch for everything."""
    folder = write_folder(tmp_path / "w")
    (folder / wheelhouse.SUMS).write_text(content)
    with pytest.raises(UserError, match="not a list of checksums"):
        check_wheelhouse(folder)


def test_what_is_no_wheel_is_refused(tmp_path: Path) -> None:
    """A source archive would run its code while it is installed; two versions leave open which is meant."""
    write_wheel(tmp_path / "two", "alpha", "1.0")
    write_wheel(tmp_path / "two", "alpha", "1.1")
    with pytest.raises(UserError, match="alpha twice"):
        read_wheels(tmp_path / "two")
    for name in ("alpha-1.0.tar.gz", "alpha-1.0-py3-none-any.whl"):
        (folder := tmp_path / name).mkdir()
        (folder / name).write_bytes(b"no zip")
        with pytest.raises(UserError, match="is not a wheel"):
            read_wheels(folder)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, project: Path) -> None:
    """Before pip is asked for anything."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(UserError, match="not an empty folder"):
        make_wheelhouse(tmp_path / "out", PYTHON, FACTS.platform, root=project)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


# Made by pip from a local index, installed with no network


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkout that needs torch and beta (which needs alpha), and the wheels that pip may find."""
    root = tmp_path / "checkout"
    (root / "client").mkdir(parents=True)
    (root / "client" / "__init__.py").write_text("HERE = True\n")
    shutil.copytree(ROOT / "deploy" / "files", root / "deploy" / "files")
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools>=77"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "medsegfed"\nversion = "9.9"\ndependencies = ["torch>=2.11,<2.14", "beta"]\n'
        '[tool.setuptools.packages.find]\ninclude = ["client*"]\n'
    )
    (root / "constraints.txt").write_text("# pins\nbeta==1.1\nalpha==1.0\n")
    shelf = tmp_path / "shelf"
    write_wheel(shelf, "torch", TORCH)
    write_wheel(shelf, "alpha", "1.0")
    write_wheel(shelf, "alpha", "1.5")
    write_wheel(shelf, "beta", "1.1", ["alpha>=1"])
    write_wheel(shelf, "beta", "1.2", ["alpha>=1"])
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return root


def install(folder: Path, place: Path) -> subprocess.CompletedProcess[str]:
    """install.sh, as a hospital runs it; where this test may, in a namespace that has no network."""
    cut_off = ["unshare", "--net"] if os.geteuid() == 0 and shutil.which("unshare") else []
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable}
    return subprocess.run(
        [*cut_off, "sh", str(folder / "install.sh"), str(place)],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_made_checked_installed_updated_and_refused_when_changed(tmp_path: Path, project: Path) -> None:
    """The whole life of a wheelhouse: pinned versions, one environment a version, no byte that nobody vouches for."""
    out = tmp_path / "out"
    facts = make_wheelhouse(out, PYTHON, FACTS.platform, root=project)
    assert (facts.version, facts.torch) == ("9.9", TORCH)
    names = {one.name: one.version for one in read_wheels(out)}
    assert names == {"medsegfed": "9.9", "torch": TORCH, "alpha": "1.0", "beta": "1.1"}  # the pins, not the newest
    assert check_wheelhouse(out) == facts

    place = tmp_path / "opt" / "medsegfed"
    first = install(out, place)
    assert first.returncode == 0, first.stderr
    asked = [str(place / "bin" / "python"), "-c", "import alpha, beta, client; print(alpha.RELEASE, beta.RELEASE)"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == "1.0 1.1\n"
    assert (place / "files" / "Containerfile").is_file()
    before = place.resolve()

    # The next version: another environment; the link moves, and the one before stays.
    (project / "client" / "__init__.py").write_text("HERE = 'newer'\n")
    newer = tmp_path / "newer"
    make_wheelhouse(newer, PYTHON, FACTS.platform, root=project)
    assert install(newer, place).returncode == 0
    assert place.resolve() != before
    assert before.is_dir()
    back = install(out, place)  # and back again, at once: it is complete
    assert (back.returncode, place.resolve()) == (0, before)

    # A changed byte, found by the sums; and by pip where somebody has mended the sums.
    _flip(newer / "beta-1.1-py3-none-any.whl")
    refused = install(newer, place)
    assert refused.returncode == 2
    assert "beta-1.1-py3-none-any.whl: FAILED" in refused.stdout + refused.stderr
    refresh_sums(newer)
    refused = install(newer, place)
    assert refused.returncode == 2
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    assert place.resolve() == before


@pytest.mark.slow
def test_the_same_sources_give_the_same_wheel(tmp_path: Path, project: Path) -> None:
    """Two sites can compare what they were given by one number; the build leaves nothing in the checkout."""
    before = sorted(project.rglob("*"))
    one, two = (wheelhouse.build_own_wheel(project, tmp_path / name) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert sorted(project.rglob("*")) == before


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    """Templates, recipes, descriptions, deployment files: what is missing here is noticed in the hospital otherwise."""
    packages = [path for path in ROOT.iterdir() if (path / "__init__.py").is_file() and path.name not in NOT_SHIPPED]
    due = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheelhouse.build_own_wheel(ROOT, tmp_path)) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == due


NOT_SHIPPED = ("tests", "benchmarks")


@pytest.mark.slow
def test_torch_comes_from_the_index_that_was_named(
    tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the newest version that is allowed, with the libraries that its index alone has; the rest from elsewhere."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "empty").as_uri())
    for name, release, requires in (
        ("torch", "2.12.0+cu130", ["cudalib"]),
        ("torch", "2.13.1+cu130", ["cudalib"]),
        ("torch", "2.14.0+cu130", ["cudalib"]),
        ("cudalib", "13.0", []),
    ):
        write_wheel(tmp_path / "simple" / name, name, release, requires)
    for folder in (tmp_path / "simple").iterdir():
        links = "".join(f'<a href="{path.name.replace("+", "%2B")}">{path.name}</a>' for path in folder.iterdir())
        (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")
    out = tmp_path / "out"
    facts = make_wheelhouse(out, PYTHON, FACTS.platform, torch_index=(tmp_path / "simple").as_uri(), root=project)
    assert facts.torch == "2.13.1+cu130"
    assert {one.name for one in read_wheels(out)} == {"medsegfed", "torch", "cudalib", "alpha", "beta"}


@pytest.mark.slow
def test_a_package_that_cannot_be_had_leaves_nothing_behind(tmp_path: Path, project: Path) -> None:
    """The reason is pip's own, in one line."""
    (project / "constraints.txt").write_text("beta==7\nalpha==1.0\n")
    with pytest.raises(UserError, match="beta") as told:
        make_wheelhouse(tmp_path / "out", PYTHON, FACTS.platform, root=project)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_the_command_says_what_is_wrong_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and no traceback; a good folder is told with the number to compare."""
    monkeypatch.setattr(sys, "argv", ["wheelhouse", str(tmp_path / "none"), "--check"])
    assert wheelhouse.main() == 2
    assert capsys.readouterr().err.startswith("error: ")
    folder = write_folder(tmp_path / "w")
    monkeypatch.setattr(sys, "argv", ["wheelhouse", str(folder), "--check"])
    assert wheelhouse.main() == 0
    assert hashlib.sha256((folder / wheelhouse.SUMS).read_bytes()).hexdigest() in capsys.readouterr().out
