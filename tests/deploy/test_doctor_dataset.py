"""What `doctor` says of a dataset: planted faults are counted, and nobody is named."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
from rich.console import Console

from deploy.doctor.checks import Check, Names, as_plain, checks_table
from deploy.doctor.dataset import NAMES, Expectations, check_dataset
from deploy.doctor.reading import kind_of_fault, look_at
from medsegdiff.data.cases import Case, DatasetConfig
from medsegdiff.data.dataset import open_dataset
from medsegdiff.data.prepare import prepare
from medsegdiff.data.splits import SPLIT_SEED, TEST_FRACTION, split_patients
from medsegdiff.progress import Progress, listening

CANARY = "Zwetschgenknoedel"  # a name that stands in every file, folder, patient and case of the planted datasets
LABELS = "{background: 0, lesion: 1, core: 2}"


class Planted:
    """A dataset folder of small volumes, each of them sound until a test spoils it."""

    def __init__(self, folder: Path, patients: int = 6) -> None:
        self.folder = folder / f"{CANARY}-data"
        (self.folder / CANARY).mkdir(parents=True)
        self.rows: dict[str, dict[str, str]] = {}
        (self.folder / "dataset.yaml").write_text(
            f"{{name: {CANARY}, modality: MR, channels: [{CANARY}], labels: {LABELS}}}"
        )
        for number in range(patients):
            self.add(number)

    def add(self, number: int, **changes: str) -> str:
        case = f"{CANARY}-case-{number}"
        voxels = np.random.default_rng(number).integers(0, 900, (8, 9, 4)).astype(np.int16)
        mask = np.zeros((8, 9, 4), np.uint8)
        mask[2:4, 2:5, 1:3], mask[3, 3, 1] = 1, 2
        self.image(case, voxels)
        self.mask(case, mask)
        self.rows[case] = {
            "case_id": case,
            "patient_id": f"{CANARY}-patient-{number}",
            "image_path": f"{CANARY}/{case}.nii.gz",
            "mask_path": f"{CANARY}/{case}-mask.nii.gz",
            "split": "",
            "spacing_mm": "",
        } | changes
        return case

    def path(self, case: str) -> Path:
        return self.folder / CANARY / f"{case}.nii.gz"

    def image(self, case: str, voxels: np.ndarray, affine: np.ndarray | None = None, codes: int = 1) -> None:  # type: ignore[type-arg]
        image = nibabel.Nifti1Image(voxels, np.diag([1.0, 1.0, 3.0, 1.0]) if affine is None else affine)
        image.set_sform(image.affine, code=codes)
        image.set_qform(image.affine if codes else None, code=codes)
        self.path(case).write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))

    def mask(self, case: str, values: np.ndarray) -> None:  # type: ignore[type-arg]
        image = nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 3.0, 1.0]))
        self.path(f"{case}-mask").write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))

    def case(self, number: int) -> str:
        return f"{CANARY}-case-{number}"

    def write(self) -> Path:
        with open(self.folder / "cases.csv", "w", newline="") as handle:
            table = csv.DictWriter(handle, next(iter(self.rows.values())).keys())
            table.writeheader()
            table.writerows(self.rows.values())
        return self.folder

    def examine(self, names: Names = Names(), **expected: object) -> dict[str, Check]:  # noqa: B008
        """All checks by name; without `names.shown` the canary must be nowhere in what is shown."""
        checks = list(check_dataset(self.write(), Expectations(**expected), names))  # type: ignore[arg-type]
        assert [check.name for check in checks] == list(NAMES)
        if not names.shown:
            refuse_canary(checks)
        return {check.name: check for check in checks}


def refuse_canary(checks: Sequence[Check]) -> None:
    """Neither data nor lines may hold the canary."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(checks_table(checks))
    assert CANARY.lower() not in (json.dumps(as_plain(checks)) + console.export_text()).lower()


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    """Six sound patients."""
    return Planted(tmp_path)


def test_a_sound_dataset_is_found_sound(planted: Planted, tmp_path: Path) -> None:
    """Every check is well, and the numbers are those of the files."""
    checks = planted.examine(cache=tmp_path / "not" / "there", image_size=32)
    assert {check.status for check in checks.values()} == {"ok", "warn"}
    assert [name for name, check in checks.items() if check.status == "warn"] == ["splits"]  # one patient is held out
    assert checks["dataset"].figures == {"cases": 6, "patients": 6, "read": 6, "usable": 6}
    assert checks["labels"].figures["masks_by_label_index"] == {"0": 6, "1": 6, "2": 6}
    assert checks["orientation"].detail == "all 6 volumes stored along RAS axes"
    assert checks["spacing"].detail == "1 x 1 x 3 mm"
    assert checks["cache"].figures["due_bytes"] == 6 * (4 * 32**2 * (2 + 1) + 8 * 9 * 4)


def test_each_case_is_told_while_it_is_read(planted: Planted) -> None:
    """A person before a large dataset sees that something moves."""
    told: list[Progress] = []
    with listening(told.append):
        planted.examine()
    assert [(p.done, p.total) for p in told] == [(n, 6) for n in range(7)]


def test_one_image_under_two_patients_fails(planted: Planted) -> None:
    """Another compression of the same voxels under another id is the same scan: a leak between patients."""
    voxels = np.random.default_rng(0).integers(0, 900, (8, 9, 4)).astype(np.int16)
    image = nibabel.Nifti1Image(voxels, np.diag([1.0, 1.0, 3.0, 1.0]))
    planted.path(planted.case(3)).write_bytes(gzip.compress(image.to_bytes(), 9, mtime=77))
    check = planted.examine()["duplicates"]
    assert check.status == "fail"
    assert check.detail == "1 image under more than one patient (2 patients)"
    assert check.cases == ()  # a site without keys names nobody


def test_one_image_twice_under_a_patient_is_looked_at(planted: Planted) -> None:
    """Counted double in training, but no leak."""
    planted.rows[planted.case(3)]["patient_id"] = planted.rows[planted.case(0)]["patient_id"]
    planted.path(planted.case(3)).write_bytes(planted.path(planted.case(0)).read_bytes())
    check = planted.examine()["duplicates"]
    assert (check.status, check.figures["under_one_patient"], check.figures["under_two_patients"]) == ("warn", 1, 0)


def test_two_blank_slices_are_no_duplicates(planted: Planted) -> None:
    """Empty slices of different patients are alike and nobody's; a blank volume is told elsewhere."""
    for number in (1, 2):
        planted.image(planted.case(number), np.zeros((8, 9, 4), np.int16))
    checks = planted.examine()
    assert checks["duplicates"].status == "ok"
    assert checks["masks"].status == "warn"
    assert checks["masks"].figures["blank_images"] == 2


def test_a_value_that_no_label_declares_is_counted(planted: Planted) -> None:
    """One mask in six is looked at; the case is left out of training, and the count says so."""
    mask = np.zeros((8, 9, 4), np.uint8)
    mask[1:3] = 7
    planted.mask(planted.case(2), mask)
    checks = planted.examine()
    assert checks["labels"].status == "warn"
    assert checks["labels"].detail.startswith("1 of 6 masks")
    assert checks["files"].detail == "1 of 6 cases cannot be used: 1 mask value that no label declares"
    assert checks["dataset"].figures["usable"] == 5


def test_masks_of_another_scale_fail(planted: Planted) -> None:
    """0/255 where 0/1 is declared: beyond a fifth of the cases the site would refuse to train."""
    for number in range(6):
        planted.mask(planted.case(number), np.full((8, 9, 4), 255, np.uint8))
    checks = planted.examine()
    assert checks["labels"].status == checks["files"].status == checks["splits"].status == "fail"
    assert checks["labels"].figures["undeclared"] == 6


def test_a_label_that_is_never_drawn_is_looked_at(planted: Planted) -> None:
    """Its value may be misspelt in dataset.yaml."""
    for number in range(6):
        planted.mask(planted.case(number), np.ones((8, 9, 4), np.uint8))
    check = planted.examine()["labels"]
    assert check.status == "warn"
    assert check.detail.startswith("1 of 2 labels never drawn in 6 masks")


def test_a_flipped_orientation_is_counted(planted: Planted) -> None:
    """One volume is stored along other axes than the rest; the usual ones are named."""
    affine = np.diag([-1.0, 1.0, 3.0, 1.0])
    affine[0, 3] = 7.0
    planted.image(planted.case(4), np.random.default_rng(4).integers(0, 900, (8, 9, 4)).astype(np.int16), affine)
    check = planted.examine()["orientation"]
    assert check.status == "warn"
    assert check.detail == "1 of 6 volumes stored along other axes than the usual RAS"
    assert check.figures["axes"] == {"LAS": 1, "RAS": 5}


def test_a_header_without_direction_is_counted(planted: Planted) -> None:
    """NIfTI with neither sform nor qform, image and mask alike: readers assume axes, perhaps the wrong ones."""
    planted.image(planted.case(4), np.random.default_rng(4).integers(0, 900, (8, 9, 4)).astype(np.int16), codes=0)
    planted.image(f"{planted.case(4)}-mask", np.ones((8, 9, 4), np.uint8), codes=0)
    check = planted.examine()["orientation"]
    assert check.status == "warn"
    assert "1 of 6 whose header does not say where the axes point" in check.detail
    assert check.figures["unknown"] == 1


def test_an_odd_spacing_is_counted(planted: Planted) -> None:
    """Ten times the median: metres for millimetres, or a header typed by hand."""
    voxels = np.random.default_rng(5).integers(0, 900, (8, 9, 4)).astype(np.int16)
    planted.image(planted.case(5), voxels, np.diag([10.0, 1.0, 3.0, 1.0]))
    check = planted.examine()["spacing"]
    assert check.status == "warn"
    assert check.figures["outliers"] == 1
    assert check.detail == "1-10 x 1 x 3 mm; 1 case more than 3 times off the median"


def test_thick_slices_are_told_and_no_fault(planted: Planted) -> None:
    """Anisotropy is a fact of many scans, not something to mend."""
    for number in range(6):
        voxels = np.random.default_rng(number).integers(0, 900, (8, 9, 4)).astype(np.int16)
        planted.image(planted.case(number), voxels, np.diag([0.5, 0.5, 5.0, 1.0]))
    check = planted.examine()["spacing"]
    assert check.status == "ok"
    assert check.figures["largest_ratio"] == 10.0


def test_bad_files_are_counted_by_reason(planted: Planted) -> None:
    """Torn, missing, maskless, of another size, not finite: each kind in fixed words, in the order of frequency."""
    for number in range(6, 30):
        planted.add(number)
    torn = planted.path(planted.case(0))
    torn.write_bytes(torn.read_bytes()[:200])
    planted.path(planted.case(1)).unlink()
    planted.rows[planted.case(2)]["mask_path"] = ""
    planted.mask(planted.case(3), np.zeros((8, 9, 5), np.uint8))
    spoilt = np.ones((8, 9, 4), np.float32)
    spoilt[0, 0, 0] = np.nan
    planted.image(planted.case(4), spoilt)
    planted.path(planted.case(5)).write_bytes(b"no image")
    checks = planted.examine()
    assert checks["files"].status == "warn"
    assert checks["files"].figures["kinds"] == {
        "file missing": 1,
        "file torn": 1,
        "files of one case differ in size": 1,
        "image cannot be read": 1,
        "image without a mask": 1,
        "voxels that are not finite": 1,
    }


def test_what_is_counted_as_usable_is_what_preparation_uses(planted: Planted, tmp_path: Path) -> None:
    """The oracle: the very function that training reads its cases with."""
    for number in range(6, 20):
        planted.add(number)
    planted.path(planted.case(1)).unlink()
    planted.mask(planted.case(2), np.full((8, 9, 4), 9, np.uint8))
    planted.path(planted.case(3)).write_bytes(b"")
    checks = planted.examine()
    prepared = prepare(open_dataset(planted.folder), 16, tmp_path / "cache")
    assert checks["dataset"].figures["usable"] == len(prepared.cases) == 17
    assert checks["files"].figures["bad"] == len(prepared.faults) == 3
    parts = split_patients([p.case for p in prepared.cases], TEST_FRACTION, 0.0, SPLIT_SEED)
    assert checks["splits"].figures["train_patients"] == list(parts.values()).count("train")


def test_a_patient_in_two_splits_fails(planted: Planted) -> None:
    """Training would refuse; the count says how many are torn."""
    for number, split in ((0, "train"), (1, "test")):
        planted.rows[planted.case(number)] |= {"patient_id": f"{CANARY}-torn", "split": split}
    check = planted.examine()["splits"]
    assert check.status == "fail"
    assert check.detail == "1 of 5 patients in two splits"


@pytest.mark.parametrize(
    ("held_out", "status", "words"),
    [(0, "warn", "cannot score"), (1, "warn", "1 held out"), (2, "ok", "no patient in two splits")],
)
def test_the_held_out_patients_are_counted(planted: Planted, held_out: int, status: str, words: str) -> None:
    """One held-out patient's average is that patient's own Dice."""
    for number, row in enumerate(planted.rows.values()):
        row["split"] = "test" if number < held_out else "train"
    check = planted.examine()["splits"]
    assert check.status == status
    assert words in check.detail
    assert check.figures["test_patients"] == held_out


def test_fewer_patients_than_the_policy_asks_for_fail(planted: Planted) -> None:
    """The site itself would refuse each run."""
    check = planted.examine(min_patients=20)["splits"]
    assert check.status == "fail"
    assert "asks for 20" in check.detail


def test_patients_without_any_foreground_are_looked_at(planted: Planted) -> None:
    """An empty mask may be a healthy patient, or a mask that was never drawn."""
    planted.mask(planted.case(0), np.zeros((8, 9, 4), np.uint8))
    checks = planted.examine()
    assert checks["masks"].status == "warn"
    assert checks["masks"].detail == "1 of 6 masks empty (17%); 1 patient without any foreground"


def test_data_that_a_run_does_not_fit_fails(planted: Planted) -> None:
    """The run's channels and labels against the site's; their names are not told."""
    asked = DatasetConfig("other", "MR", ("t1", "t2"), {"background": 0, "lesion": 1})
    check = planted.examine(asked=(asked,))["dataset"]
    assert check.status == "fail"
    assert "a run asks for 2 channels, the data has 1" in check.detail


def test_reading_ends_in_time_and_says_how_far_it_came(planted: Planted) -> None:
    """A slow disk gives a part of the answer, marked as such."""
    ticks = iter(range(1000))
    checks = {c.name: c for c in check_dataset(planted.write(), Expectations(), Names(), 3.0, lambda: next(ticks))}
    assert checks["dataset"].status == "warn"
    assert checks["dataset"].figures["read"] == 4
    assert "of the first 4" in checks["dataset"].detail


def test_keyed_hashes_name_the_cases_where_there_are_keys(planted: Planted) -> None:
    """The coordinator can speak of a case with the site and learns nothing of it."""
    planted.path(planted.case(1)).unlink()
    check = planted.examine(Names(hashed=lambda name: f"hash-{len(name)}"))["files"]
    assert check.cases == (f"hash-{len(planted.case(1))}",)


def test_names_appear_where_they_are_asked_for(planted: Planted) -> None:
    """The site's own terminal: case, file and reason."""
    planted.path(planted.case(1)).unlink()
    planted.path(planted.case(3)).write_bytes(planted.path(planted.case(0)).read_bytes())
    checks = planted.examine(Names(shown=True))
    assert planted.case(1) in checks["files"].cases[0]
    assert f"{planted.case(1)}.nii.gz" in checks["files"].cases[0]
    assert planted.case(0) in checks["duplicates"].cases[0]
    assert planted.case(3) in checks["duplicates"].cases[0]


# A folder that is no dataset


def spoil_twice(planted: Planted) -> None:
    planted.rows["again"] = planted.rows[planted.case(0)]


def spoil_header(planted: Planted) -> None:
    planted.write()
    table = planted.folder / "cases.csv"
    table.write_text(table.read_text().replace("patient_id", CANARY, 1))


def spoil_yaml(planted: Planted) -> None:
    (planted.folder / "dataset.yaml").write_text(f"{CANARY}: [")


def spoil_patient(planted: Planted) -> None:
    planted.rows[planted.case(0)]["patient_id"] = ""


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_twice, "cases.csv contradicts itself: 1 case_id more than once"),
        (spoil_header, "cases.csv cannot be read"),
        (spoil_yaml, "dataset.yaml cannot be read"),
        (spoil_patient, "cases.csv cannot be read"),
        (lambda planted: (planted.folder / "dataset.yaml").unlink(), "dataset.yaml is not"),
    ],
)
def test_a_folder_that_cannot_be_opened_is_told_without_names(
    planted: Planted, spoil: Callable[[Planted], None], words: str
) -> None:
    """The reader's own message quotes files and patients: it is for the site's terminal only."""
    planted.write()
    spoil(planted)
    if spoil is not spoil_header:
        planted.write()
    checks = list(check_dataset(planted.folder, Expectations(), Names()))
    assert checks[0].status == "fail"
    assert words in checks[0].detail
    assert {check.status for check in checks[1:]} == {"skipped"}
    refuse_canary(checks)
    shown = next(check_dataset(planted.folder, Expectations(), Names(shown=True)))
    assert CANARY in shown.detail


@pytest.mark.parametrize("content", [None, "empty", "dataset.json"])
def test_what_is_no_dataset_at_all_is_told(tmp_path: Path, content: str | None) -> None:
    """No folder, an empty one, one with a dataset.json of something else."""
    folder = tmp_path / CANARY
    if content is not None:
        folder.mkdir()
    if content == "dataset.json":
        (folder / content).write_text("{}")
    checks = list(check_dataset(folder, Expectations(), Names()))
    assert checks[0].status == "fail"
    refuse_canary(checks)


# Kinds of faults


@pytest.mark.parametrize("reason", [f"its size is 1x1, that of {CANARY}_0000.nii is 2x2", f"odd {CANARY}", ""])
@pytest.mark.parametrize("step", ["image", "mask"])
def test_the_kind_of_a_fault_never_quotes_the_reader(reason: str, step: str) -> None:
    """Whatever the reader says, known or not, a fixed phrase is counted."""
    assert CANARY not in kind_of_fault(reason, step)
    assert kind_of_fault(reason, step)


def test_a_file_that_the_system_refuses_is_counted(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing disk, a folder without permission: the case is counted, the others are read."""

    def refuse(*arguments: object) -> None:
        raise OSError(5, "Input/output error", f"/data/{CANARY}")

    monkeypatch.setattr("deploy.doctor.reading.read_image", refuse)
    case = Case("c", "p", (planted.path(planted.case(0)),), (planted.path(planted.case(0)),))
    seen = look_at(case, open_dataset(planted.write()).config)
    assert seen.fault == "image cannot be read"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cases", "patients"), [("msd_hippocampus", 120, 120), ("lgg_tcga", 392, 40)])
def test_published_data_are_found_sound(
    real_data: Callable[[str], Path], tmp_path: Path, name: str, cases: int, patients: int
) -> None:
    """Real scans: everything readable, no duplicate, nobody without foreground."""
    source = real_data(name)
    folder = tmp_path / name
    folder.mkdir()
    for entry in source.iterdir():
        (folder / entry.name).symlink_to(entry)
    described = Path(__file__).parents[2] / "simulations" / "datasets" / f"{name}.yaml"
    (folder / "dataset.yaml").write_bytes(described.read_bytes())
    checks = {c.name: c for c in check_dataset(folder, Expectations(cache=tmp_path), Names())}
    assert checks["dataset"].figures == {"cases": cases, "patients": patients, "read": cases, "usable": cases}
    assert {c.status for c in checks.values()} <= {"ok", "skipped"}
    assert checks["masks"].figures["patients_without_foreground"] == 0
