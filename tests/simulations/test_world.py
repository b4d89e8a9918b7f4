from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from client.site import SiteConfig
from medsegdiff.data.cases import SPLITS
from medsegdiff.data.dataset import Case, Dataset, DatasetConfig, open_dataset
from medsegdiff.data.images import read_image, read_mask
from medsegdiff.errors import UserError
from medsegdiff.strict import dump_yaml, read_config
from simulations.phantoms import PhantomConfig, write_phantoms
from simulations.world import whole_folder, write_world
from tests.medsegdiff.data.conftest import save_dicom

CONFIG = DatasetConfig("test", "none", ("grey",), {"background": 0, "lesion": (1, 7), "other": 3}, {"all": ("lesion",)})
ASSIGNMENT = {"north": ["elm-001", "alder-002"], "south.2": ["alder-001"]}
SPLIT = {"elm-001": "test", "alder-001": "train", "alder-002": "val", "elm-002": "train"}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("source") / "data"
    write_phantoms(PhantomConfig(sites=("alder", "elm"), patients=2, slices=4), folder)
    return open_dataset(folder)


def by_id(dataset: Dataset) -> dict[str, Case]:
    return {case.case_id: case for case in dataset.cases}


def real(path: Path) -> Path:
    return path.resolve(strict=True)


@pytest.mark.parametrize("copy", [True, False])
def test_a_site_holds_its_own_patients_and_their_images(phantoms, tmp_path, copy) -> None:
    """Each site reads back as a dataset with exactly the assigned patients, their split and the original bytes."""
    paths = write_world(phantoms, ASSIGNMENT, SPLIT, tmp_path / "world", copy)
    assert paths == tuple(tmp_path / "world" / site / "site.yaml" for site in ASSIGNMENT)
    originals = by_id(phantoms)
    for path, (site, patients) in zip(paths, ASSIGNMENT.items(), strict=True):
        config = read_config(path, SiteConfig)
        assert config == SiteConfig(name=site, data="data")
        assert list(yaml.safe_load(path.read_text())) == ["name", "data", "cache", "device"]
        dataset = open_dataset(path.parent / config.data)
        assert dataset.config == phantoms.config
        assert [case.patient_id for case in dataset.cases] == sorted(patients)
        for case in dataset.cases:
            original = originals[case.case_id]
            assert (case.site, case.split) == (site, SPLIT[case.patient_id])
            for found, source in zip(
                case.image_paths + case.mask_paths, original.image_paths + original.mask_paths, strict=True
            ):
                assert found.read_bytes() == source.read_bytes()
                assert (real(found) == real(source)) is not copy
                assert real(found).is_relative_to(real(path.parent)) is copy
    assert sorted(entry.name for entry in (tmp_path / "world").iterdir()) == sorted(ASSIGNMENT)


def test_a_copied_site_stands_alone(phantoms, tmp_path) -> None:
    """Moved to another place with source and world gone, it still reads; its files may be replaced or deleted."""
    source = tmp_path / "source"
    shutil.copytree(phantoms.root, source)
    for file in source.rglob("*.gz"):
        file.chmod(0o444)
    write_world(open_dataset(source), ASSIGNMENT, SPLIT, tmp_path / "world", copy=True)
    shutil.move(tmp_path / "world" / "north", tmp_path / "elsewhere")
    shutil.rmtree(source)
    dataset = open_dataset(tmp_path / "elsewhere" / "data")
    volumes = [read_image(case.image_paths, 1) for case in dataset.cases]
    assert [volume.array.shape for volume in volumes] == [(1, 64, 64, 4), (1, 72, 72, 4)]
    assert all(file.stat().st_mode & 0o200 for file in (tmp_path / "elsewhere").rglob("*.gz"))


def test_a_linked_world_moves_with_its_source(phantoms, tmp_path) -> None:
    """Paths are relative: source and world moved together still belong together."""
    before = tmp_path / "before"
    before.mkdir()
    shutil.copytree(phantoms.root, before / "source")
    write_world(open_dataset(before / "source"), ASSIGNMENT, SPLIT, before / "world", copy=False)
    before.rename(tmp_path / "after")
    dataset = open_dataset(tmp_path / "after" / "world" / "north" / "data")
    assert all(case.image_paths[0].is_file() for case in dataset.cases)
    assert str(tmp_path) not in (tmp_path / "after" / "world" / "north" / "data" / "cases.csv").read_text()


@pytest.mark.parametrize("copy", [True, False])
def test_links_in_the_way_are_followed(phantoms, tmp_path, monkeypatch, copy) -> None:
    """A dataset and a world given by relative paths through links are found; a linked file keeps its own name."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    store = tmp_path / "deep" / "er" / "data"
    shutil.copytree(phantoms.root, store)
    image = store / "images" / "elm-001.nii.gz"
    image.rename(store / "0123abcd")  # as content-addressed stores keep their files
    image.symlink_to("../0123abcd")
    (tmp_path / "data").symlink_to(store)
    (tmp_path / "worlds").symlink_to(tmp_path / "deep" / "er")  # another depth: ".." means something else there
    monkeypatch.chdir(tmp_path)
    paths = write_world(open_dataset(Path("data")), {"one": ["elm-001"]}, SPLIT, Path("worlds/world"), copy)
    case = open_dataset(paths[0].parent / "data").cases[0]
    assert case.image_paths[0].name == "elm-001.nii.gz"
    assert np.array_equal(read_image(case.image_paths, 1).array, read_image([image], 1).array)


def write_nifti(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 3.0, 1.0])), path)


def test_a_copied_site_holds_series_and_voxels_beside_their_headers(tmp_path) -> None:
    """A folder's DICOM files and the raw files of .mhd and .nhdr come along, from inside the dataset and from outside;
    other files of the folder stay. A torn header and an empty folder are copied as they are: preparation names them."""
    root = tmp_path / "source"
    array = np.random.default_rng(0).integers(0, 99, (5, 4, 3)).astype(np.int16)
    series = save_dicom(root / "p1" / "series", array)
    (series / "report.txt").write_text("of a person")
    elsewhere = tmp_path / "outside"
    elsewhere.mkdir()
    image = SimpleITK.GetImageFromArray(array)
    for path in (root / "p1" / "mask.mhd", root / "p2.nhdr", elsewhere / "p2.mhd", elsewhere / "p1.nhdr"):
        SimpleITK.WriteImage(image, str(path))
    (root / "torn.mhd").write_text("NDims = 3")
    (root / "empty").mkdir()
    rows = ["p1/series;../outside/p1.nhdr,p1/mask.mhd", "../outside/p2.mhd,p2.nhdr", "torn.mhd,empty"]
    lines = [f"p{number},p{number},{row}" for number, row in enumerate(rows, start=1)]
    (root / "cases.csv").write_text("\n".join(["case_id,patient_id,image_path,mask_path", *lines]) + "\n")
    (root / "dataset.yaml").write_text(dump_yaml(CONFIG))
    splits = {f"p{number}": "train" for number in (1, 2, 3)}
    before = [case.image_paths + case.mask_paths for case in open_dataset(root).cases[:2]]
    expected = [[read_image([path], 1).array for path in paths] for paths in before]
    write_world(open_dataset(root), {"one": list(splits)}, splits, tmp_path / "world", copy=True)
    shutil.rmtree(root)
    shutil.rmtree(elsewhere)
    data = tmp_path / "world" / "one" / "data"
    cases = open_dataset(data).cases
    for case, arrays in zip(cases, expected, strict=False):
        for path, array_ in zip(case.image_paths + case.mask_paths, arrays, strict=True):
            assert np.array_equal(read_image([path], 1).array, array_)
    assert not list(data.rglob("report.txt"))
    assert (data / "torn.mhd").read_text() == "NDims = 3"


def make_nnunet(folder: Path) -> None:
    for index, name in enumerate(("p1", "p2")):
        for channel in range(2):
            write_nifti(
                folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz", np.full((3, 4, 5), index + 10 * channel, "f4")
            )
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", np.full((3, 4, 5), index, np.uint8))
    (folder / "dataset.json").write_text(
        '{"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}'
    )


def make_decathlon(folder: Path) -> None:
    for index, name in enumerate(("p1", "p2")):
        array = np.stack([np.full((3, 4, 5), index + 10 * channel, "f4") for channel in range(2)], axis=-1)
        write_nifti(folder / "imagesTr" / f"{name}.nii.gz", array)
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", np.full((3, 4, 5), index, np.uint8))
    listed = ", ".join(f'{{"image": "./imagesTr/{n}.nii.gz", "label": "./labelsTr/{n}.nii.gz"}}' for n in ("p1", "p2"))
    (folder / "dataset.json").write_text(
        '{"name": "T", "modality": {"0": "T1", "1": "T2"}, "labels": {"0": "background", "1": "liver"}, '
        f'"training": [{listed}]}}'
    )


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("make", [make_nnunet, make_decathlon])
def test_other_forms_become_cases(tmp_path, make, copy) -> None:
    """nnU-Net's file a channel and the Decathlon's 4D file read the same from a site as from their own folder."""
    make(tmp_path / "source")
    source = open_dataset(tmp_path / "source")
    paths = write_world(source, {"A": ["p2"], "B": ["p1"]}, {"p1": "train", "p2": "test"}, tmp_path / "world", copy)
    dataset = open_dataset(paths[0].parent / "data")
    assert dataset.config == source.config
    (case,), original = dataset.cases, by_id(source)["p2"]
    assert len(case.image_paths) == len(original.image_paths)
    volume = read_image(case.image_paths, 2)
    assert [float(channel.mean()) for channel in volume.array] == [1.0, 11.0]
    assert np.array_equal(
        read_mask(case.mask_paths, dataset.config, volume), read_mask(original.mask_paths, source.config)
    )


SCALAR = st.floats(0.01, 100, allow_nan=False)
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=6)
CASES = st.builds(
    Case,
    case_id=TEXT,
    patient_id=TEXT,
    image_paths=st.just((Path("a/x.png"), Path("b/x.png"))),
    mask_paths=st.sampled_from([(), (Path("m.png"),), (Path("m.png"), Path("deep/n.png"))]),
    volume_id=st.none() | TEXT,
    slice_index=st.integers(-5, 500),
    spacing_mm=st.none() | st.tuples(SCALAR, SCALAR) | st.tuples(SCALAR, SCALAR, SCALAR),
)


@settings(max_examples=30, deadline=None)
@given(case=CASES, split=st.sampled_from(SPLITS))
def test_every_field_of_a_case_survives(tmp_path_factory, case, split) -> None:
    """Whatever a case says of itself is read back from the site's cases.csv; spacing to the last bit."""
    root = tmp_path_factory.mktemp("root")
    placed = replace(
        case,
        image_paths=tuple(root / path for path in case.image_paths),
        mask_paths=tuple(root / path for path in case.mask_paths),
        slice_index=case.slice_index if case.volume_id else None,
    )
    patient = placed.patient_id
    paths = write_world(
        Dataset(root, CONFIG, (placed,)), {"A": [patient]}, {patient: split}, root / "world", copy=False
    )
    dataset = open_dataset(paths[0].parent / "data")
    assert dataset.config == CONFIG
    read = dataset.cases[0]
    resolved = replace(
        read,
        image_paths=tuple(path.resolve() for path in read.image_paths),
        mask_paths=tuple(path.resolve() for path in read.mask_paths),
    )
    assert resolved == replace(placed, site="A", split=split)


def test_files_from_outside_the_dataset_keep_apart_when_copied(tmp_path) -> None:
    """Two files of one name in two foreign folders do not overwrite each other."""
    cases = []
    for index, folder in enumerate(("one", "two")):
        path = tmp_path / folder / "scan.nii.gz"
        write_nifti(path, np.full((2, 2, 2), index, np.uint8))
        cases.append(Case(f"c{index}", f"p{index}", (path,), (path,)))
    (tmp_path / "root").mkdir()
    source = Dataset(tmp_path / "root", CONFIG, tuple(cases))
    paths = write_world(source, {"A": ["p0", "p1"]}, {"p0": "train", "p1": "test"}, tmp_path / "world", copy=True)
    means = [read_image(case.image_paths, 1).array.mean() for case in open_dataset(paths[0].parent / "data").cases]
    assert means == [0.0, 1.0]


def test_a_missing_file_stays_the_readers_affair(phantoms, tmp_path) -> None:
    """A case whose image is gone is listed, not dropped: the site's preparation names and counts it."""
    gone = replace(phantoms.cases[0], image_paths=(phantoms.root / "images" / "gone.nii.gz",))
    paths = write_world(
        replace(phantoms, cases=(gone,)), {"A": [gone.patient_id]}, SPLIT, tmp_path / "world", copy=True
    )
    case = open_dataset(paths[0].parent / "data").cases[0]
    assert (case.image_paths[0].name, case.image_paths[0].exists()) == ("gone.nii.gz", False)
    assert case.mask_paths[0].exists()


@pytest.mark.parametrize(
    ("assignment", "splits", "message"),
    [
        ({}, SPLIT, "0 sites"),
        ({"A": []}, SPLIT, "site A has 0 patients"),
        ({"A": ["elm-001", "nobody"]}, SPLIT, "patient nobody is not among the 4 patients"),
        ({"A": ["elm-001"], "B": ["elm-001"]}, SPLIT, "patient elm-001 is assigned to A and B"),
        ({"A": ["elm-001", "elm-001"]}, SPLIT, "patient elm-001 is assigned to A and A"),
        ({"A": ["elm-001"]}, {}, "elm-001 of site A has the split None"),
        ({"A": ["elm-001"]}, {"elm-001": "holdout"}, "has the split 'holdout', which is none of train, val, test"),
        ({"CS": ["elm-001"], "cs": ["elm-002"]}, SPLIT, "CS, cs differ in case only"),
        *[
            ({name: ["elm-001"]}, SPLIT, "cannot name a folder")
            for name in ("", ".", "..", "a/b", "../x", "a b", "-x", ".x", "ä", "a\n", "a\0", "x" * 65)
        ],
    ],
)
def test_what_is_no_world_is_refused_before_anything_is_written(
    phantoms, tmp_path, assignment, splits, message
) -> None:
    """One line with the fact; the folder is not there afterwards."""
    with pytest.raises(UserError, match=message):
        write_world(phantoms, assignment, splits, tmp_path / "world", copy=False)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_the_table_cannot_hold_is_refused(phantoms, tmp_path) -> None:
    """A separator in a file name would read back as two files."""
    odd = replace(phantoms.cases[0], image_paths=(phantoms.root / "a;b.png",))
    with pytest.raises(UserError, match=r"a;b.png.*cannot stand in cases.csv"):
        write_world(replace(phantoms, cases=(odd,)), {"A": [odd.patient_id]}, SPLIT, tmp_path / "world", copy=False)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(phantoms, tmp_path) -> None:
    """Neither a folder nor a file nor a dangling link of that name is touched."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        with pytest.raises(UserError, match=f"{name}: is already there; nothing was written"):
            write_world(phantoms, ASSIGNMENT, SPLIT, tmp_path / name, copy=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_nothing(phantoms, tmp_path, monkeypatch) -> None:
    """An error half-way becomes one line, and no half world stays."""
    copied: list[Path] = []

    def failing(source: Path, target: Path) -> None:
        if copied:
            raise OSError(28, "No space left on device", str(target))
        copied.append(target)

    monkeypatch.setattr("simulations.world.shutil.copyfile", failing)
    with pytest.raises(UserError, match=r"world: could not be written .*No space left"):
        write_world(phantoms, ASSIGNMENT, SPLIT, tmp_path / "world", copy=True)
    assert copied
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from medsegdiff.progress import listening
from medsegdiff.data.dataset import open_dataset
from simulations.world import write_world

def kill(progress):
    if progress.done == 1:
        os.kill(os.getpid(), signal.SIGKILL)

source, world = Path(sys.argv[1]), Path(sys.argv[2])
with listening(kill):
    write_world(open_dataset(source), {"A": ["elm-001"], "B": ["elm-002"]},
                {"elm-001": "train", "elm-002": "train"}, world, copy=True)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_no_half_world(phantoms, tmp_path) -> None:
    """Killed after the first of two sites, there is no world; the next run makes a whole one."""
    world = tmp_path / "world"
    command = [sys.executable, "-c", KILLED, str(phantoms.root), str(world)]
    killed = subprocess.run(
        command, check=False, cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL
    assert not world.exists()
    assert [path.name.startswith(".world.") for path in tmp_path.iterdir()] == [True]
    write_world(phantoms, {"A": ["elm-001"], "B": ["elm-002"]}, SPLIT, world, copy=True)
    assert len(list(world.glob("*/site.yaml"))) == 2


def test_whole_folder_lets_other_errors_through(tmp_path) -> None:
    """A defect keeps its own type, and leaves nothing either."""

    def defect() -> None:
        with whole_folder(tmp_path / "x") as partial:
            (partial / "file").write_text("half")
            raise KeyError("defect")

    with pytest.raises(KeyError):
        defect()
    assert list(tmp_path.iterdir()) == []


def test_real_institutions_become_sites(real_data, tmp_path) -> None:
    """The four institutions of lgg_tcga, linked: every slice is reachable and no patient is shared."""
    (tmp_path / "dataset.yaml").write_text(
        dump_yaml({"name": "lgg", "modality": "MR", "channels": ["a", "b", "c"], "labels": {"background": 0, "t": 255}})
    )
    dataset = open_dataset(real_data("lgg_tcga"), tmp_path / "dataset.yaml")
    assignment: dict[str, list[str]] = {}
    for patient, site in sorted({(case.patient_id, str(case.site)) for case in dataset.cases}):
        assignment.setdefault(site, []).append(patient)
    splits = {case.patient_id: "train" for case in dataset.cases}
    paths = write_world(dataset, assignment, splits, tmp_path / "world", copy=False)
    worlds = [open_dataset(path.parent / "data") for path in paths]
    assert sum(len(world.cases) for world in worlds) == len(dataset.cases)
    assert all(
        path.is_file() for world in worlds for case in world.cases for path in case.image_paths + case.mask_paths
    )
    patients = [{case.patient_id for case in world.cases} for world in worlds]
    assert [len(group) for group in patients] == [10] * 4
    assert len(set.union(*patients)) == 40
