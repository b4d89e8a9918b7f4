"""BTCV, Synapse-8, KiTS and BraTS: NIfTI volumes taken as they are."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import volume_layouts as official

from medsegdiff.data.cases import Case
from medsegdiff.data.dataset import open_dataset
from medsegdiff.data.prepare import prepare
from medsegdiff.errors import UserError
from medsegdiff.labels import LabelScheme
from simulations.published import layout
from simulations.published.catalogue import published
from simulations.published.layout import LayoutError, Summary, import_published
from simulations.recipe import open_source, read_recipe

BUILD: dict[str, Callable[[Path], object]] = {
    "btcv": official.btcv,
    "synapse8": official.btcv,
    "kits19": lambda root: official.kits(root, "segmentation.nii.gz", (1, 2), unlabelled=(2,)),
    "kits21": lambda root: official.kits(root, "aggregated_MAJ_seg.nii.gz", (1, 2, 3)),
    "kits23": lambda root: official.kits(root, "segmentation.nii.gz", (1, 2, 3)),
    "brats2020": official.brats2020,
    "brats2021": lambda root: official.brats(root, ["BraTS2021_00000", "BraTS2021_01666"]),
}
NAMES = tuple(BUILD)
MASK = {
    "btcv": "RawData/Training/label/label0008.nii.gz",
    "synapse8": "RawData/Training/label/label0008.nii.gz",
    "kits19": "case_00001/segmentation.nii.gz",
    "kits21": "case_00001/aggregated_MAJ_seg.nii.gz",
    "kits23": "case_00001/segmentation.nii.gz",
    "brats2020": "BraTS20_Training_355/W39_1998.09.19_Segm.nii",
    "brats2021": "BraTS2021_01666/BraTS2021_01666_seg.nii.gz",
}
CASE = {
    "btcv": "case0008", "synapse8": "case0008", "kits19": "case_00001", "kits21": "case_00001", "kits23": "case_00001",
    "brats2020": "BraTS20_Training_355", "brats2021": "BraTS2021_01666",
}  # fmt: skip
INDICES = {"btcv": 13, "synapse8": 13, "kits19": 2, "kits21": 3, "kits23": 3, "brats2020": 3, "brats2021": 3}


def build(name: str, tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    BUILD[name](source)
    return source


def imported(name: str, tmp_path: Path) -> tuple[dict[str, Case], Summary]:
    summary = import_published(published(name), build(name, tmp_path), tmp_path / "done")
    return {case.case_id: case for case in open_dataset(tmp_path / "done").cases}, summary


@pytest.mark.parametrize("name", NAMES)
def test_an_import_is_read_and_prepared(name: str, tmp_path: Path) -> None:
    """Every imported case is prepared, and its labels are those of the published mask, voxel for voxel."""
    cases, summary = imported(name, tmp_path)
    done = prepare(open_dataset(tmp_path / "done"), 16, tmp_path / "cache")
    assert not done.faults
    assert len(done.cases) == len(cases) == summary.cases == summary.patients
    found = next(case for case in done.cases if case.case.case_id == CASE[name]).native_labels().numpy()
    assert sorted(np.unique(found)) == list(range(INDICES[name] + 1))
    mask = np.asarray(nib.as_closest_canonical(nib.load(tmp_path / "source" / MASK[name])).dataobj)
    table = {4: 3} if name.startswith("brats") else {}  # value -> index, where they differ
    assert np.array_equal(found[0], np.vectorize(lambda value: table.get(value, value))(mask))
    assert done.cases[0].geometry.slices == 4, "slices are axial ones, wherever the file keeps that axis"


@pytest.mark.parametrize("name", NAMES)
def test_files_are_linked_not_copied(name: str, tmp_path: Path) -> None:
    """A NIfTI file takes no second place on the disk, and every case is a patient of its own."""
    cases, summary = imported(name, tmp_path)
    case = cases[CASE[name]]
    assert case.mask_paths[0].samefile(tmp_path / "source" / MASK[name])
    assert summary.copied == summary.converted == 0
    assert summary.linked == sum(len(case.image_paths) + len(case.mask_paths) for case in cases.values())
    assert all(case.patient_id == case.case_id for case in cases.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_takes_the_import(name: str, tmp_path: Path) -> None:
    """The shipped recipe of the same name reads what was imported."""
    imported(name, tmp_path)
    recipe = read_recipe(Path(name))
    dataset = open_source(recipe, tmp_path / "done")
    assert recipe.world.dataset == name == dataset.config.name
    assert recipe.world.note
    assert LabelScheme.of(dataset.config).targets == tuple(dataset.config.targets or dataset.config.label_names[1:])


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_layout_is_told_from_the_right_one(name: str, tmp_path: Path) -> None:
    """A folder of something else is answered with what was expected and what is there; nothing is written."""
    source = tmp_path / "source"
    (source / "holiday").mkdir(parents=True)
    with pytest.raises(LayoutError) as caught:
        import_published(published(name), source, tmp_path / "done")
    message = str(caught.value)
    assert f"Expected: {published(name).layout[0]}" in message
    assert "holiday/" in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["btcv", "synapse8", "brats2020", "brats2021"])
def test_a_missing_mask_is_named(name: str, tmp_path: Path) -> None:
    """Where every published case has a mask, an absent one is an incomplete download."""
    source = build(name, tmp_path)
    (source / MASK[name]).unlink()
    stem = "BraTS20_Training_355_seg" if name == "brats2020" else Path(MASK[name]).name.removesuffix(".nii.gz")
    with pytest.raises(LayoutError, match=stem):
        import_published(published(name), source, tmp_path / "done")
    assert not (tmp_path / "done").exists()


def test_the_split_is_that_of_transunet(tmp_path: Path) -> None:
    """The 12 scans held out by TransUNet, and no other, are test scans."""
    cases, summary = imported("synapse8", tmp_path)
    assert {case.case_id for case in cases.values() if case.split == "test"} == {
        f"case{number:04d}" for number in (8, 22, 38, 36, 32, 2, 29, 3, 1, 4, 25, 35)
    }
    assert summary.splits == {"test": 12, "train": 2}


def test_synapse_needs_its_test_scans(tmp_path: Path) -> None:
    """A figure on fewer than the 12 test scans would not be the benchmark's; BTCV itself has no such rule."""
    source = build("btcv", tmp_path)
    (source / "RawData/Training/img/img0036.nii.gz").unlink()
    with pytest.raises(LayoutError, match=r"img0036\.nii\.gz"):
        import_published(published("synapse8"), source, tmp_path / "done")
    assert import_published(published("btcv"), source, tmp_path / "done").cases == 13


def test_the_eight_organs_of_synapse_leave_five_to_the_background() -> None:
    """Synapse-8 scores eight disjoint organs; the masks still hold all thirteen."""
    from medsegdiff.data.cases import DatasetConfig
    from medsegdiff.strict import read_config
    from simulations.recipe import shipped_dataset

    config = read_config(shipped_dataset("synapse8"), DatasetConfig)
    scheme = LabelScheme.of(config)
    assert len(config.labels) == 14
    assert scheme.kind == "multiclass"
    assert set(scheme.targets) == {
        "aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach",
    }  # fmt: skip


def test_kits_leaves_out_what_has_no_mask(tmp_path: Path) -> None:
    """The challenge's test cases are left out and counted."""
    cases, summary = imported("kits19", tmp_path)
    assert sorted(cases) == ["case_00000", "case_00001"]
    assert summary.notes == ("1 of 3 cases have no segmentation.nii.gz and were left out.",)


def test_kits_without_its_scans_is_no_dataset(tmp_path: Path) -> None:
    """The repository alone holds masks; the scan that was not fetched is named."""
    source = build("kits23", tmp_path)
    (source / "case_00001/imaging.nii.gz").unlink()
    with pytest.raises(LayoutError, match=r"case_00001/imaging\.nii\.gz"):
        import_published(published("kits23"), source, tmp_path / "done")


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_brats_channels_and_sites(ending: str, tmp_path: Path) -> None:
    """Four sequences in the order of the description; the contributor comes from the scan's name of 2019."""
    source = tmp_path / "source"
    source.mkdir()
    official.brats2020(source, ending)
    summary = import_published(published("brats2020"), source, tmp_path / "done")
    dataset = open_dataset(tmp_path / "done")
    assert dataset.config.channels == ("FLAIR", "T1", "T1ce", "T2")
    for case in dataset.cases:
        for path, sequence in zip(case.image_paths, ("flair", "t1", "t1ce", "t2"), strict=True):
            assert path.samefile(source / case.case_id / f"{case.case_id}_{sequence}{ending}")
    sites = {case.case_id[-3:]: case.site for case in dataset.cases}
    assert sites == {"001": "CBICA", "002": "TCIA", "336": "added2020", "355": "2013"}
    assert summary.sites == ("2013", "CBICA", "TCIA", "added2020")


def test_brats_without_its_table_has_no_sites(tmp_path: Path) -> None:
    """The table of names is not part of every copy: the import says that sites are lacking."""
    source = build("brats2020", tmp_path)
    (source / "name_mapping.csv").unlink()
    summary = import_published(published("brats2020"), source, tmp_path / "done")
    assert summary.sites == ()
    assert "name_mapping.csv" in summary.notes[0]


def test_a_torn_table_is_refused(tmp_path: Path) -> None:
    """A name_mapping.csv with other columns is not taken for one without sites."""
    source = build("brats2020", tmp_path)
    (source / "name_mapping.csv").write_text("Grade,Name\nHGG,BraTS20_Training_001\n")
    with pytest.raises(LayoutError, match="BraTS_2019_subject_ID"):
        import_published(published("brats2020"), source, tmp_path / "done")


@pytest.mark.parametrize("name", NAMES)
def test_what_stops_in_the_middle_leaves_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import that is interrupted between two files leaves no folder, whole or partial, and its source as it was."""
    source = build(name, tmp_path)
    before = sorted(path.relative_to(source) for path in source.rglob("*"))
    calls = []

    def link(path: object, target: object) -> None:
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        shutil.copyfile(str(path), str(target))

    monkeypatch.setattr(layout.os, "link", link)
    with pytest.raises(KeyboardInterrupt):
        import_published(published(name), source, tmp_path / "done")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert sorted(path.relative_to(source) for path in source.rglob("*")) == before


def test_the_table_holds_what_the_description_says(tmp_path: Path) -> None:
    """cases.csv names files below its own folder alone, so that it can be moved."""
    imported("brats2021", tmp_path)
    with open(tmp_path / "done" / "cases.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["case_id"] for row in rows] == ["BraTS2021_00000", "BraTS2021_01666"]
    for row in rows:
        for name in (*row["image_path"].split(";"), row["mask_path"]):
            assert (tmp_path / "done" / name).is_file()
            assert not Path(name).is_absolute()


def test_a_folder_in_use_is_not_touched(tmp_path: Path) -> None:
    """A target with files in it is refused before anything is read."""
    source = build("brats2021", tmp_path)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already there"):
        import_published(published("brats2021"), source, tmp_path / "done")
    assert (tmp_path / "done" / "notes.txt").read_text() == "mine"
