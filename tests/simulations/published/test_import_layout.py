"""What all imports share: everything is written or nothing, and a wrong layout is answered with what was expected."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsegdiff.data.dataset import open_dataset
from medsegdiff.errors import UserError
from medsegdiff.progress import listening
from simulations.published.catalogue import PUBLISHED, catalogue_lines, published
from simulations.published.layout import (
    Converted,
    Found,
    LayoutError,
    Published,
    Row,
    expect_files,
    find_folder,
    import_published,
    summary_lines,
)
from simulations.recipe import read_recipe, shipped_dataset

ROOT = Path(__file__).parents[3]


def picture(path: Path, value: int = 9) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 5), value, np.uint8)).save(path)
    return path


def toy(read) -> Published:
    """A dataset whose description is one of the shipped ones."""
    return Published("cvc_clinicdb", "Toy", "nowhere", ("a/1.png", "b/1.png"), read)


def one_row(source: Path, **changes: object) -> Found:
    row = Row("one", "p", (picture(source / "a" / "1.png"),), (picture(source / "b" / "1.png", 255),))
    return Found([replace(row, **changes)])


# --- writing ----------------------------------------------------------------------------------------------------------


def test_files_are_linked_and_named_by_case(tmp_path: Path) -> None:
    """One file on the disk under two names; several of a case are numbered; the description is the shipped one."""
    source, target = tmp_path / "source", tmp_path / "target"
    raters = tuple(picture(source / "b" / f"{n}.PNG", 255) for n in (1, 2))
    summary = import_published(
        toy(lambda root: one_row(root, masks=raters, split="val", site="x", spacing_mm=(0.5, 2.0))), source, target
    )
    (case,) = open_dataset(target).cases
    assert [path.relative_to(target).as_posix() for path in (*case.image_paths, *case.mask_paths)] == [
        "images/one.png",
        "masks/one_1.png",
        "masks/one_2.png",
    ]
    assert case.image_paths[0].samefile(source / "a" / "1.png")
    assert (case.split, case.site, case.spacing_mm) == ("val", "x", (0.5, 2.0))
    assert (target / "dataset.yaml").read_bytes() == shipped_dataset("cvc_clinicdb").read_bytes()
    assert (summary.cases, summary.patients, summary.sites, summary.splits) == (1, 1, ("x",), {"val": 1})
    assert (summary.linked, summary.copied, summary.converted) == (3, 0, 0)
    assert any("3 linked" in line for line in summary_lines(summary))


def test_a_link_in_the_source_gives_a_file_in_the_target(tmp_path: Path) -> None:
    """A relative symbolic link would point nowhere from its new place."""
    source = tmp_path / "source"
    real = picture(tmp_path / "elsewhere" / "1.png")
    (source / "a").mkdir(parents=True)
    (source / "a" / "link.png").symlink_to(os.path.relpath(real, source / "a"))
    import_published(toy(lambda root: one_row(root, images=(root / "a" / "link.png",))), source, tmp_path / "target")
    assert (tmp_path / "target" / "images" / "one.png").read_bytes() == real.read_bytes()
    assert not (tmp_path / "target" / "images" / "one.png").is_symlink()


def test_where_links_are_impossible_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another disk refuses hard links."""

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "source").mkdir()
    summary = import_published(toy(one_row), tmp_path / "source", tmp_path / "target")
    assert (summary.linked, summary.copied) == (0, 2)
    (case,) = open_dataset(tmp_path / "target").cases
    assert not case.image_paths[0].samefile(tmp_path / "source" / "a" / "1.png")


def test_progress_is_reported(tmp_path: Path) -> None:
    """From none to all rows."""
    (tmp_path / "source").mkdir()
    seen = []
    with listening(lambda report: seen.append((report.stage, report.done, report.total))):
        import_published(toy(one_row), tmp_path / "source", tmp_path / "target")
    assert ("import", 0, 1) in seen
    assert ("import", 1, 1) in seen


# --- all or nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [UserError("torn"), KeyboardInterrupt(), RuntimeError("ours"), OSError(28, "full")])
def test_a_stopped_import_leaves_nothing(tmp_path: Path, fault: BaseException) -> None:
    """Neither the target nor the folder it is written in, whatever stopped it; the source is as it was."""
    source = tmp_path / "source"

    def write(path: Path) -> None:
        raise fault

    with pytest.raises(UserError if isinstance(fault, OSError) else type(fault)):
        import_published(
            toy(lambda root: one_row(root, masks=(Converted("one.png", write),))),
            source_of(source),
            tmp_path / "target",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert (source / "a" / "1.png").is_file()


def source_of(folder: Path) -> Path:
    folder.mkdir()
    return folder


KILLED = """
import os, signal
from pathlib import Path
from simulations.published.layout import Converted, Found, Published, Row, import_published
def kill(path):
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
row = Row("one", "p", (Converted("one.png", kill),), ())
import_published(Published("cvc_clinicdb", "", "", (), lambda root: Found([row])), Path("source"), Path("target"))
"""


@pytest.mark.slow
def test_a_killed_import_leaves_no_target(tmp_path: Path) -> None:
    """SIGKILL in the middle: the target is not there, and the import can be repeated."""
    (tmp_path / "source").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=environment, check=False)
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "target").exists()
    import_published(toy(one_row), tmp_path / "source", tmp_path / "target")
    assert open_dataset(tmp_path / "target").cases


def test_a_target_in_use_is_refused_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    """Nothing that lies in the target is touched."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is already there; nothing was written"):
        import_published(toy(one_row), source, target)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
    (target / "mine.txt").unlink()
    import_published(toy(one_row), source, target)
    assert open_dataset(target).cases
    with pytest.raises(UserError, match="no such folder"):
        import_published(toy(one_row), tmp_path / "none", tmp_path / "other")


def test_rows_that_contradict_one_another_are_refused_before_writing(tmp_path: Path) -> None:
    """A case twice; two files that would take one name; a name that cannot stand in cases.csv."""
    source = source_of(tmp_path / "source")
    row = one_row(source).rows[0]
    other = replace(row, case_id="two", masks=(Converted("one.png", lambda path: None),))
    for rows, message in (
        ([row, row], "case_id one stands twice"),
        ([row, other], "would both be named masks/one.png"),
        ([replace(row, case_id="a;b")], "cannot stand in cases.csv"),
        ([replace(row, images=(source / "scan.mhd",))], "not taken as it is"),
    ):
        with pytest.raises(UserError, match=message):
            import_published(toy(lambda root, rows=rows: Found(rows)), source, tmp_path / "target")
        assert not (tmp_path / "target").exists()


# --- the layout -------------------------------------------------------------------------------------------------------


def test_a_wrong_layout_names_what_was_expected_and_what_was_found(tmp_path: Path) -> None:
    """The first thing missing, the expected tree, at most ten entries of what is there."""
    source = source_of(tmp_path / "source")
    for number in range(12):
        (source / f"file{number:02d}.txt").touch()
    with pytest.raises(LayoutError) as caught:
        import_published(toy(lambda root: Found(expect_files(root / "a", "*.png"))), source, tmp_path / "target")
    text = str(caught.value)
    assert "this is not Toy as published" in text
    assert f"the folder {source / 'a'} is not there" in text
    assert "Expected: a/1.png; b/1.png" in text
    assert "file00.txt" in text
    assert "file09.txt and 2 more" in text
    assert "file10" not in text
    assert "\n" not in text
    assert not (tmp_path / "target").exists()


def test_files_are_found_whatever_their_case_and_hidden_ones_are_not(tmp_path: Path) -> None:
    """Archives from other systems carry .DS_Store and ._copies."""
    for name in ("b.JPG", "a.jpg", "._a.jpg", ".DS_Store", "c.png"):
        (tmp_path / name).touch()
    assert [path.name for path in expect_files(tmp_path, "*.jpg")] == ["a.jpg", "b.JPG"]
    with pytest.raises(LayoutError, match=r"no file \*\.bmp lies in"):
        expect_files(tmp_path, "*.bmp")


@pytest.mark.parametrize("place", ["X", "X/X", "archive/X", "archive/X/X", "Y"])
def test_folders_are_found_where_archives_are_unpacked(tmp_path: Path, place: str) -> None:
    """In the source itself or a folder deeper, or doubled; under any of its names."""
    (tmp_path / place).mkdir(parents=True)
    assert find_folder(tmp_path, "X", "Y") == tmp_path / place
    with pytest.raises(LayoutError, match="the folder Z is not there"):
        find_folder(tmp_path, "Z")


# --- the catalogue ----------------------------------------------------------------------------------------------------

MINE = ("isic2018", "refuge", "lidc", "cvc_clinicdb", "glas", "ddti")


@pytest.mark.parametrize("name", MINE)
def test_every_dataset_has_a_description_a_recipe_and_a_section(name: str) -> None:
    """Under the same name; the recipe takes the shipped description and says when its sites are artificial."""
    dataset = published(name)
    assert dataset.name == name
    assert dataset.layout
    assert shipped_dataset(name).is_file()
    recipe = read_recipe(Path(name))
    assert (recipe.name, recipe.world.dataset, recipe.run.model.preset) == (name, name, "S")
    assert recipe.world.note
    assert recipe.world.partition.by == "site" or "artificial" in recipe.world.note
    assert f"### `{name}`" in (ROOT / "docs" / "datasets.md").read_text()


def test_an_unknown_name_lists_the_known_ones() -> None:
    """And the catalogue tells each one's origin."""
    with pytest.raises(UserError, match=r"'isic' is no published dataset.*isic2018, refuge"):
        published("isic")
    assert len(catalogue_lines()) == len(PUBLISHED)
    assert all(line.startswith(f"{name}: ") for name, line in zip(PUBLISHED, catalogue_lines(), strict=True))
