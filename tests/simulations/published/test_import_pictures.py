"""ISIC 2018, REFUGE, CVC-ClinicDB and GlaS from small files in their official layouts."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsegdiff.data.dataset import Case, open_dataset
from medsegdiff.data.prepare import prepare
from medsegdiff.data.splits import split_patients
from simulations.published.catalogue import published
from simulations.published.cvc_clinicdb import SEQUENCE_ENDS
from simulations.published.layout import LayoutError, Summary, import_published
from simulations.recipe import open_source, read_recipe

SIZE = (10, 12)  # rows, columns
BOX = (slice(2, 7), slice(3, 9))  # where the structure lies


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path, **options)
    return path


def colour(path: Path, seed: int) -> Path:
    return save(path, np.random.default_rng(seed).integers(0, 256, (*SIZE, 3)))


def mask(path: Path, inside: int = 255, outside: int = 0) -> Path:
    array = np.full(SIZE, outside)
    array[BOX] = inside
    return save(path, array)


def isic(root: Path, test: bool = True) -> None:
    for part, ids in {"Training": (0, 1, 3), "Validation": (12,), "Test": (30, 31)}.items():
        if part == "Test" and not test:
            continue
        for number in ids:
            colour(root / f"ISIC2018_Task1-2_{part}_Input" / f"ISIC_{number:07d}.jpg", number)
            mask(root / f"ISIC2018_Task1_{part}_GroundTruth" / f"ISIC_{number:07d}_segmentation.png")
        for name in ("ATTRIBUTION.txt", "LICENSE.txt"):
            (root / f"ISIC2018_Task1-2_{part}_Input" / name).touch()


def refuge_mask(path: Path) -> Path:
    array = np.full(SIZE, 255)
    array[BOX] = 128
    array[4:6, 5:7] = 0
    return save(path, array)


def refuge(root: Path) -> None:
    for kind, letter in (("Glaucoma", "g"), ("Non-Glaucoma", "n")):
        colour(root / "Training400" / kind / f"{letter}0001.jpg", 1)
        refuge_mask(root / "Annotation-Training400" / "Disc_Cup_Masks" / kind / f"{letter}0001.bmp")
    (root / "Annotation-Training400" / "Fovea_location.xlsx").touch()
    colour(root / "REFUGE-Validation400" / "V0001.jpg", 2)
    refuge_mask(root / "REFUGE-Validation400-GT" / "Disc_Cup_Masks" / "V0001.bmp")
    for number, kind in ((1, "G"), (2, "N")):
        colour(root / "Test400" / f"T000{number}.jpg", 3 + number)
        refuge_mask(root / "REFUGE-Test-GT" / "Disc_Cup_Masks" / kind / f"T000{number}.bmp")


def clinicdb(root: Path, folder: str = "", frames: tuple[int, ...] = (1, 25, 26, 205, 206, 612)) -> None:
    for frame in frames:
        colour(root / folder / "Original" / f"{frame}.tif", frame)
        mask(root / folder / "Ground Truth" / f"{frame}.tif")


GRADES = ["train_1,2, malignant, x", "train_2,9, benign, healthy", "testA_1,9, benign, healthy", "testB_1,3, benign, x"]


def glas(root: Path) -> None:
    folder = root / "Warwick QU Dataset (Released 2016_07_08)"
    for line in GRADES:
        name = line.partition(",")[0]
        colour(folder / f"{name}.bmp", len(name))
        array = np.zeros(SIZE)
        array[BOX], array[8:, 10:] = 1, 2  # two glands, each with a number of its own
        save(folder / f"{name}_anno.bmp", array)
    header = "name,patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)"
    (folder / "Grade.csv").write_bytes("\r".join([header, *GRADES, ""]).encode())  # the lines of old Macs


BUILDERS: dict[str, Callable[[Path], None]] = {
    "isic2018": isic, "refuge": refuge, "cvc_clinicdb": clinicdb, "glas": glas,
}  # fmt: skip


def imported(name: str, tmp_path: Path) -> tuple[Summary, dict[str, Case]]:
    summary = import_published(published(name), tmp_path / "source", tmp_path / "target")
    return summary, {case.case_id: case for case in open_dataset(tmp_path / "target").cases}


@pytest.mark.parametrize("name", BUILDERS)
def test_every_case_can_be_prepared(tmp_path: Path, name: str) -> None:
    """Images in three colours, masks with the labels of the description and nothing else."""
    BUILDERS[name](tmp_path / "source")
    summary, _ = imported(name, tmp_path)
    dataset = open_dataset(tmp_path / "target")
    prepared = prepare(dataset, 16, tmp_path / "cache")
    assert not prepared.faults
    assert len(prepared.cases) == summary.cases > 3
    assert split_patients(dataset.cases, 0.2, 0.0, 0)
    assert open_source(read_recipe(Path(name)), tmp_path / "target").cases == dataset.cases
    for case in prepared.cases:
        native = case.native_labels()[0, ..., 0].numpy()
        assert ((native > 0)[BOX]).all()
        assert native[0, 0] == 0


def test_isic_keeps_the_official_parts(tmp_path: Path) -> None:
    """Three parts, six images; each image is its own patient and keeps its name."""
    isic(tmp_path / "source")
    summary, cases = imported("isic2018", tmp_path)
    assert summary.splits == {"train": 3, "val": 1, "test": 2}
    assert {cases[name].split for name in ("ISIC_0000030", "ISIC_0000031")} == {"test"}
    assert cases["ISIC_0000012"].patient_id == "ISIC_0000012"
    assert (summary.linked, summary.converted) == (12, 0)


def test_refuge_masks_are_dark_where_the_structure_is(tmp_path: Path) -> None:
    """0 is the cup, 128 the rim, 255 the background; masks of the test part lie in G/ and N/."""
    refuge(tmp_path / "source")
    summary, cases = imported("refuge", tmp_path)
    assert summary.splits == {"train": 2, "val": 1, "test": 2}
    assert sorted(cases) == ["test_T0001", "test_T0002", "train_g0001", "train_n0001", "val_V0001"]
    prepared = prepare(open_dataset(tmp_path / "target"), 16, tmp_path / "cache")
    native = prepared.cases[0].native_labels()[0, ..., 0].numpy()
    assert Counter(native.ravel().tolist()) == {0: 120 - 30, 1: 30 - 4, 2: 4}
    assert native[4, 5] == 2


def test_refuge_with_archives_in_folders_of_their_own(tmp_path: Path) -> None:
    """REFUGE-Training400/Training400, Annotation-Training400/Annotation-Training400."""
    source = tmp_path / "source"
    refuge(tmp_path / "flat")
    source.mkdir()
    for name, outer in {
        "Training400": "REFUGE-Training400", "Annotation-Training400": "Annotation-Training400",
        "REFUGE-Validation400": "REFUGE-Validation400", "REFUGE-Validation400-GT": "REFUGE-Validation400-GT",
        "Test400": "REFUGE-Test400", "REFUGE-Test-GT": "other",
    }.items():  # fmt: skip
        (source / outer).mkdir()
        shutil.move(tmp_path / "flat" / name, source / outer / name)
    assert imported("refuge", tmp_path)[0].cases == 5


def test_clinicdb_sequences(tmp_path: Path) -> None:
    """The table has 29 sequences of at least six frames over 612; the sequence is the patient, so none is torn."""
    ends = (0, *SEQUENCE_ENDS)
    assert (len(SEQUENCE_ENDS), ends[-1]) == (29, 612)
    assert all(last - first >= 6 for first, last in pairwise(ends))
    clinicdb(tmp_path / "source", "TIF")
    colour(tmp_path / "source" / "PNG" / "Original" / "1.png", 1)
    soft = np.zeros(SIZE)
    soft[BOX], soft[0], soft[1] = 250, 120, 130  # as a copy that was resampled has it
    save(tmp_path / "source" / "TIF" / "Ground Truth" / "26.tif", soft)
    summary, cases = imported("cvc_clinicdb", tmp_path)
    assert (summary.linked, summary.converted) == (6, 6)
    assert np.array_equal(np.asarray(Image.open(cases["frame_026"].mask_paths[0])), np.where(soft > 125, 255, 0))
    assert {name: case.patient_id for name, case in cases.items()} == {
        "frame_001": "sequence_01",
        "frame_025": "sequence_01",
        "frame_026": "sequence_02",
        "frame_205": "sequence_10",
        "frame_206": "sequence_11",
        "frame_612": "sequence_29",
    }
    assert {case.split for case in cases.values()} == {None}


def test_glas_says_which_patients_the_official_split_tears(tmp_path: Path) -> None:
    """Patient 9 is in training and test: two patients here, and a note. Numbered glands become one label."""
    glas(tmp_path / "source")
    summary, cases = imported("glas", tmp_path)
    assert {name: (case.patient_id, case.split) for name, case in cases.items()} == {
        "train_1": ("patient_2_train", "train"),
        "train_2": ("patient_9_train", "train"),
        "testA_1": ("patient_9_test", "test"),
        "testB_1": ("patient_3_test", "test"),
    }
    assert len(summary.notes) == 1
    assert "1 of 3 patients" in summary.notes[0]
    assert "(9)" in summary.notes[0]
    masks = [np.asarray(Image.open(path)) for path in (tmp_path / "target" / "masks").iterdir()]
    assert {(mask.max(), mask.sum()) for mask in masks} == {(1, 30 + 4)}


# --- wrong layouts ----------------------------------------------------------------------------------------------------


def remove(*parts: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        path = root.joinpath(*parts)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


GLAS = "Warwick QU Dataset (Released 2016_07_08)"


@pytest.mark.parametrize(
    ("name", "spoil", "missing"),
    [
        ("isic2018", remove("ISIC2018_Task1-2_Test_Input"), "the folder ISIC2018_Task1-2_Test_Input is not there"),
        ("isic2018", remove("ISIC2018_Task1_Training_GroundTruth", "ISIC_0000003_segmentation.png"), "ISIC_0000003_"),
        ("refuge", remove("REFUGE-Test-GT"), "the folder REFUGE-Test-GT is not there"),
        ("refuge", remove("REFUGE-Test-GT", "Disc_Cup_Masks", "N", "T0002.bmp"), "no mask T0002.bmp"),
        ("cvc_clinicdb", remove("Ground Truth"), "the folder Ground Truth is not there"),
        ("cvc_clinicdb", remove("Ground Truth", "26.tif"), "26.tif has no mask"),
        ("cvc_clinicdb", lambda root: colour(root / "Original" / "613.tif", 1), "a frame number from 1 to 612"),
        ("glas", remove(GLAS, "Grade.csv"), "Grade.csv is not there"),
        ("glas", remove(GLAS, "train_1_anno.bmp"), "train_1_anno.bmp is not there"),
        ("glas", lambda root: colour(root / GLAS / "train_99.bmp", 1), "train_99.bmp is not one of"),
        ("glas", lambda root: (root / GLAS / "Grade.csv").write_text("a,b"), "does not begin with"),
    ],
)
def test_a_wrong_layout_is_answered_and_nothing_is_written(tmp_path: Path, name: str, spoil, missing: str) -> None:
    """What is missing, what was expected, what was found."""
    BUILDERS[name](tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(LayoutError) as caught:
        imported(name, tmp_path)
    assert missing in str(caught.value)
    assert published(name).layout[0] in str(caught.value)
    assert "Found in" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
