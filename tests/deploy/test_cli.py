"""The command: wrong input is one line and exit code 2; right input goes from data to masks."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medsegdiff.weights import ModelCard, initial_weights, save_model, serialise

Run = Callable[..., tuple[int, str, str]]


def assert_refused(result: tuple[int, str, str], *facts: str) -> None:
    code, out, err = result
    assert code == 2, result
    assert "Traceback" not in out + err
    lines = [line for line in err.splitlines() if not line.startswith("left out: ") and " are left out" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for fact in facts:
        assert fact in lines[0]
    assert out == ""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_task) -> Path:
    """An untrained model of the tiny network."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, tiny_task.card, initial_weights(tiny_task.model, 0))
    return path


@pytest.fixture
def source(tmp_path: Path, tiny_source: Path) -> Path:
    """A dataset folder of 12 patients that a test may spoil."""
    return Path(shutil.copytree(tiny_source, tmp_path / "source"))


# --- recipes and folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ([("threads", "thread")], ["tiny.yaml", "run.thread", "did you mean 'threads'"]),
        ([("preset: tiny", "preset: XXL")], ["tiny.yaml", "preset 'XXL' is unknown", "tiny, S, B, L"]),
        ([("rounds: 2", "rounds: 0")], ["tiny.yaml", "rounds must lie in 1..100000"]),
        ([("image_size: 16", "image_size: 17")], ["tiny.yaml", "image_size 17 is not divisible by 2"]),
        ([("  test_f", "  partition: {by: iid, sites: 7}\n  test_f")], ["6 patients", "7 sites"]),
    ],
)
def test_a_bad_recipe_is_one_line(medsegfed, tiny_recipe, tmp_path, changes, facts) -> None:
    """File, key, near miss or numbers; nothing is left in the run folder."""
    assert_refused(medsegfed("simulate", tiny_recipe(*changes), "--out", tmp_path / "out"), *facts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n\xff\xfe", b"x: " + b"y" * 2_000_000], ids=["empty", "binary", "huge"]
)
def test_a_file_that_is_no_recipe_is_one_line(medsegfed, tmp_path, content) -> None:
    """Whatever it holds."""
    path = tmp_path / "some.file"
    path.write_bytes(content)
    assert_refused(medsegfed("simulate", path, "--out", tmp_path / "out"), str(path))


def test_wrong_ways_to_start_a_simulation(medsegfed, tiny_recipe, tmp_path) -> None:
    """Missing recipe, unknown engine, no data, absent data, a folder in use, nothing to resume, another recipe."""
    out = tmp_path / "out"
    recipe = tiny_recipe()
    assert_refused(medsegfed("simulate", tmp_path / "none.yaml"), "there is no such file")
    assert_refused(medsegfed("simulate", recipe, "--engine", "spark"), "--engine spark: choose inline or ray")
    assert_refused(medsegfed("simulate", "hippocampus", "--out", out), "--data DIR")
    assert_refused(medsegfed("simulate", "hippocampus", "--data", tmp_path / "no", "--out", out), "no such folder")
    assert not out.exists()
    assert_refused(medsegfed("simulate", recipe, "--out", recipe), "is a file", "--out")
    assert_refused(medsegfed("simulate", recipe, "--out", out, "--resume"), "holds no run that could be resumed")
    out.mkdir()
    shutil.copy(tiny_recipe(("seed: 1", "seed: 2"), name="other.yaml"), out / "recipe.yaml")
    assert_refused(medsegfed("simulate", recipe, "--out", out), "already holds a run", "--resume")
    assert_refused(medsegfed("simulate", recipe, "--out", out, "--resume"), "was started with another recipe")


# --- data -------------------------------------------------------------------------------------------------------------


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "cases.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    with open(folder / "cases.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def respoil(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    volume = nib.load(path)
    array = change(np.asarray(volume.dataobj))
    nib.save(nib.Nifti1Image(array, volume.affine, dtype=array.dtype), path)


def with_nan(array: np.ndarray) -> np.ndarray:
    changed = array.astype(np.float32)
    changed[0, 0, 0] = np.nan
    return changed


FAULTS: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "missing image": (lambda f, c: (f / "images" / f"{c}.nii.gz").unlink(), "images/"),
    "truncated image": (
        lambda f, c: (f / "images" / f"{c}.nii.gz").write_bytes((f / "images" / f"{c}.nii.gz").read_bytes()[:900]),
        "images/",
    ),
    "missing mask": (lambda f, c: (f / "masks" / f"{c}.nii.gz").unlink(), "masks/"),
    "mask of another size": (lambda f, c: respoil(f / "masks" / f"{c}.nii.gz", lambda a: a[1:]), "masks/"),
    "unknown mask value": (lambda f, c: respoil(f / "masks" / f"{c}.nii.gz", lambda a: a + 7), "masks/"),
    "NaN voxels": (lambda f, c: respoil(f / "images" / f"{c}.nii.gz", with_nan), "images/"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_case_is_left_out_counted_and_named(medsegfed, source, kind) -> None:
    """One of twelve: the other eleven are used, the twelfth is named with its file; --json says the same."""
    spoil, file = FAULTS[kind]
    spoil(source, "alder-002")
    code, out, err = medsegfed("data", "check", source, "--size", 16)
    assert code == 0, err
    assert "11 cases of 11 patients" in out
    left_out = [line for line in out.splitlines() if line.startswith("left out: case alder-002: ")]
    assert len(left_out) == 1
    assert f"{file}alder-002.nii.gz" in left_out[0]
    _, out, _ = medsegfed("data", "check", source, "--size", 16, "--json")
    assert [fault["case_id"] for fault in json.loads(out)["left_out"]] == ["alder-002"]


def test_an_image_without_a_mask_is_left_out(medsegfed, source) -> None:
    """An empty mask_path is no background."""
    rows = rows_of(source)
    rows[0]["mask_path"] = ""
    write_rows(source, rows)
    code, out, _ = medsegfed("data", "check", source, "--size", 16)
    assert code == 0
    assert f"left out: case {rows[0]['case_id']}: the image has no mask" in out


def test_more_than_a_fifth_faulty_ends_before_training(medsegfed, source, tmp_path) -> None:
    """Three of twelve: numbers, the first cases, exit 2 from check and train; no model folder with a model."""
    for number in (1, 2, 3):
        (source / "images" / f"elm-00{number}.nii.gz").unlink()
    assert_refused(medsegfed("data", "check", source, "--size", 16), "3 of 12 cases are faulty", "20%", "elm-001")
    result = medsegfed("train", source, "-o", tmp_path / "model", "--size", 16, "--steps", 1, "--batch", 1)
    assert_refused(result, "3 of 12 cases are faulty")
    assert not (tmp_path / "model" / "model.safetensors").exists()


DATA_RECIPE = """\
name: phantom-data
world: {dataset: phantoms, partition: {by: site}}
run:
  model: {preset: tiny, image_size: 16, base_channels: 8, channel_multipliers: [1, 2], attention_levels: [1]}
  rounds: 1
  local_steps: 1
  threads: 1
arms: []
"""


@pytest.fixture
def data_recipe(source, tmp_path, monkeypatch) -> Path:
    """A recipe that reads the phantoms with --data, as recipes of published datasets do."""
    shipped = tmp_path / "datasets"
    shipped.mkdir()
    shutil.copy(source / "dataset.yaml", shipped / "phantoms.yaml")
    monkeypatch.setattr("simulations.recipe.SHIPPED", shipped)
    path = tmp_path / "recipe.yaml"
    path.write_text(DATA_RECIPE)
    return path


def test_a_patient_in_two_splits_is_refused(medsegfed, source, data_recipe, tmp_path) -> None:
    """Two cases of one patient, one to train on, one to test on."""
    rows = [row | {"split": "train"} for row in rows_of(source)]
    rows[1] |= {"patient_id": rows[0]["patient_id"], "split": "test"}
    write_rows(source, rows)
    result = medsegfed("simulate", data_recipe, "--data", source, "--out", tmp_path / "out")
    assert_refused(result, "patient alder-001 stands in the splits train and test")
    assert not (tmp_path / "out").exists()


def test_a_site_without_usable_patients_is_refused(medsegfed, source, data_recipe, tmp_path) -> None:
    """A site whose only case is faulty does not vanish in silence."""
    rows = rows_of(source)
    rows[0] |= {"site": "gone", "image_path": "images/none.nii.gz"}
    write_rows(source, rows)
    result = medsegfed("simulate", data_recipe, "--data", source, "--out", tmp_path / "out")
    assert_refused(result, "all cases of the site(s) gone are faulty")


def test_a_site_that_holds_out_everyone_is_refused(medsegfed, source, data_recipe, tmp_path) -> None:
    """All patients of a site in the test split: it has nobody to train on."""
    rows = [row | {"split": "test" if row["site"] == "elm" else "train"} for row in rows_of(source)]
    write_rows(source, rows)
    result = medsegfed("simulate", data_recipe, "--data", source, "--out", tmp_path / "out")
    assert_refused(result, "elm: none of its 4 patients is in the training split")


def test_sites_are_written_to_disk(medsegfed, source, data_recipe, tmp_path) -> None:
    """data split: one line a site; each folder is a dataset of its own, images and all."""
    code, out, err = medsegfed("data", "split", data_recipe, "--data", source, "-o", tmp_path / "worlds")
    assert code == 0, err
    assert [Path(line).parent.name for line in out.splitlines()] == ["alder", "birch", "elm"]
    shutil.rmtree(source)
    code, out, _ = medsegfed("data", "check", tmp_path / "worlds" / "elm" / "data", "--size", 16)
    assert code == 0
    assert "4 cases of 4 patients" in out
    result = medsegfed("data", "split", data_recipe, "--data", tmp_path / "worlds", "-o", tmp_path / "w2")
    assert_refused(result, "neither cases.csv nor a dataset.json")


# --- models -----------------------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_file_that_is_no_model_is_one_line(medsegfed, tiny_model, tiny_task, tiny_source, tmp_path) -> None:
    """Missing, text, truncated, a pickle whose payload must not run, safetensors of another program or network."""
    scan = next((tiny_source / "images").iterdir())
    whole = tiny_model.read_bytes()
    fired = tmp_path / "fired"
    other = serialise(
        ModelCard(tiny_task.model, tiny_task.diffusion, tiny_task.sampling, tiny_task.dataset),
        {k: v[..., :1].contiguous() if v.dim() else v for k, v in initial_weights(tiny_task.model, 0).items()},
    )
    files = {
        "text": b"hello",
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "header": b"\xff" * 8 + whole[8:],
        "pickle": pickle.dumps(Payload(fired)),
        "foreign": whole.replace(b"medsegfed", b"medsegfox"),
        "other network": other,
    }
    for name, content in files.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        assert_refused(medsegfed("segment", path, scan, "-o", tmp_path / "masks"), str(path))
        assert_refused(medsegfed("evaluate", path, tiny_source), str(path))
    assert_refused(medsegfed("evaluate", tmp_path / "none", tiny_source), "there is no such file")
    assert not fired.exists()
    assert not (tmp_path / "masks").exists()


def test_evaluate_uses_the_models_own_configuration_where_the_folder_has_none(medsegfed, tiny_model, source) -> None:
    """Without dataset.yaml the same scores come out; without the model's, the folder cannot be read."""
    code, with_own, _ = medsegfed("evaluate", tiny_model, source, "--split", "test", "--json")
    assert code == 0
    (source / "dataset.yaml").unlink()
    code, without, _ = medsegfed("evaluate", tiny_model, source, "--split", "test", "--json")
    assert code == 0
    assert json.loads(with_own)["patients"] == json.loads(without)["patients"]
    assert_refused(medsegfed("data", "check", source), "has cases.csv but no dataset.yaml", "--dataset-config")


def test_evaluate_refuses_what_does_not_fit(medsegfed, tiny_model, source) -> None:
    """Other channels, an unknown split, an empty split, a device that is not there."""
    assert_refused(medsegfed("evaluate", tiny_model, source, "--split", "tset"), "--split tset: choose all")
    assert_refused(medsegfed("evaluate", tiny_model, source, "--split", "val"), "no patient is in split val")
    assert_refused(medsegfed("evaluate", tiny_model, source, "--device", "abacus"), "device 'abacus'")
    text = (source / "dataset.yaml").read_text()
    (source / "dataset.yaml").write_text(text.replace("scan", "echo"))
    assert_refused(medsegfed("evaluate", tiny_model, source), "its channels are ['echo'], the model was trained on")


def test_a_preset_is_described(medsegfed) -> None:
    """Figures for a person and as JSON; an unknown preset and a size that does not fit are one line."""
    code, out, _ = medsegfed("model", "show", "tiny", "--size", 32)
    assert code == 0
    assert "parameters" in out
    _, out, _ = medsegfed("model", "show", "tiny", "--size", 32, "--json")
    assert json.loads(out)["model"]["image_size"] == 32
    assert_refused(medsegfed("model", "show", "M"), "preset 'M' is unknown")
    assert_refused(medsegfed("model", "show", "tiny", "--size", 33), "image_size 33 is not divisible by 4")


def test_from_data_to_masks(medsegfed, source, tmp_path) -> None:
    """train, evaluate on the held-out patients, segment: a mask on the scan's own grid; a bad scan is named."""
    model_folder = tmp_path / "alone"
    train = ["train", source, "-o", model_folder, "--size", 16, "--steps", 2, "--batch", 2, "--threads", 1]
    code, out, err = medsegfed(*train)
    assert code == 0, err
    model = model_folder / "model.safetensors"
    assert f"medsegfed evaluate {model}" in out
    assert_refused(medsegfed(*train), "already holds files", "--resume")
    before = model.read_bytes()
    assert medsegfed(*train, "--resume")[0] == 0
    assert model.read_bytes() == before

    code, out, _ = medsegfed("evaluate", model, source, "--split", "test", "--steps", 1, "--threads", 1, "--json")
    assert code == 0
    assert 1 <= len(json.loads(out)["patients"]) < 12

    scan, bad = source / "images" / "elm-001.nii.gz", tmp_path / "bad.nii.gz"
    bad.write_bytes(b"no scan")
    options = ["-o", tmp_path / "masks", "--steps", 1, "--members", 2, "--threads", 1]
    code, out, err = medsegfed("segment", model, scan, bad, *options)
    assert code == 2
    assert "Traceback" not in err
    assert "not segmented: " in err
    assert "bad.nii.gz" in err
    mask, image = nib.load(tmp_path / "masks" / "elm-001_mask.nii.gz"), nib.load(scan)
    assert mask.shape == image.shape
    assert np.allclose(mask.affine, image.affine)
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}
    assert (tmp_path / "masks" / "elm-001_uncertainty.nii.gz").exists()
    assert (tmp_path / "masks" / "elm-001_variance.nii.gz").exists()
    described = json.loads((tmp_path / "masks" / "elm-001.json").read_text())
    for low, high in described["interval_ml"].values():
        assert f"[{low}, {high}]" in out


def test_evaluate_with_members_reports_volumes_and_how_often_ranges_hold_them(medsegfed, tiny_model, source) -> None:
    """Per patient and in the summary, as JSON and as a table; nothing of it with one member."""
    command = ["evaluate", tiny_model, source, "--split", "test", "--steps", 1, "--threads", 1]
    code, out, _ = medsegfed(*command, "--members", 3, "--fuse", "staple", "--json")
    assert code == 0
    result = json.loads(out)
    held = 0
    for patient in result["patients"]:
        (size,) = patient["sizes"].values()
        assert size["unit"] == "ml"
        assert size["covered"] == (size["low"] <= size["true"] <= size["high"])
        held += size["covered"]
    (found,) = result["summary"]["volume_coverage"].values()
    assert (found["covered"], found["patients"], found["expected"]) == (held, len(result["patients"]), 0.5)
    assert found["wilson_95"][0] <= found["share"] <= found["wilson_95"][1]
    code, out, _ = medsegfed(*command, "--members", 3, "--fuse", "majority")
    assert code == 0
    assert f"{found['patients']} (" in out.replace("\n", " ")
    assert "50 % if the truth were one more member" in " ".join(out.split())
    code, out, _ = medsegfed(*command, "--json")
    assert json.loads(out)["summary"]["volume_coverage"] is None
    assert all(patient["sizes"] is None for patient in json.loads(out)["patients"])


def test_an_unknown_fusion_is_refused(medsegfed, tiny_model, source, tmp_path) -> None:
    """Before anything is read."""
    assert_refused(medsegfed("evaluate", tiny_model, source, "--fuse", "vote"), "--fuse vote: choose mean")
    refused = medsegfed("segment", tiny_model, source, "-o", tmp_path / "masks", "--fuse", "STAPLE")
    assert_refused(refused, "--fuse STAPLE: choose mean, majority or staple")


@pytest.mark.parametrize("option", [["--lr", "nan"], ["--lr", "5"], ["--size", "18"], ["--preset", "XL"]])
def test_train_refuses_settings_out_of_range(medsegfed, tiny_source, tmp_path, option) -> None:
    """Before anything is prepared."""
    assert_refused(medsegfed("train", tiny_source, "-o", tmp_path / "model", *option))
    assert not (tmp_path / "model").exists()


def test_no_seed_makes_evaluate_score_patients_that_train_learnt_from(source, tmp_path) -> None:
    """`train` and `evaluate --split test` hold the same patients out, whatever the seed of the training."""
    from medsegdiff.alone import training_cases
    from medsegdiff.data.dataset import open_dataset
    from medsegdiff.data.splits import SPLIT_SEED, TEST_FRACTION, split_patients

    dataset = open_dataset(source)
    train, test = training_cases(dataset, 16, tmp_path / "cache")
    splits = split_patients(dataset.cases, TEST_FRACTION, 0.0, SPLIT_SEED)
    assert {case.case.patient_id for case in test} == {name for name, split in splits.items() if split == "test"}
    assert not {case.case.patient_id for case in train} & {case.case.patient_id for case in test}


def test_a_folder_for_a_model_and_a_file_for_a_dataset_are_named_as_such(medsegfed, source, tmp_path) -> None:
    """With the file that may have been meant."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").touch()
    scan = tmp_path / "scan.nii.gz"
    scan.touch()
    _, _, told = medsegfed("segment", tmp_path / "run", scan, "-o", tmp_path / "masks")
    assert f"is a folder. Give the path of a model: {tmp_path / 'run' / 'model.safetensors'}" in told
    _, _, told = medsegfed("data", "check", scan)
    assert "is a file; a dataset is a folder" in told


@pytest.mark.parametrize("verb", [["simulate"], ["train"], ["evaluate"], ["segment"], ["model", "show"]])
def test_help_explains_every_argument(medsegfed, verb) -> None:
    """A newcomer learns from --help what the arguments are (some click versions lose these texts)."""
    code, out, _ = medsegfed(*verb, "--help")
    words = {"simulate": "shipped", "train": "Decathlon", "evaluate": "masks", "segment": "NIfTI", "show": "tiny"}
    arguments = out.partition("Arguments")[2].partition("Options")[0]
    assert code == 0
    assert words[verb[-1]] in arguments


def test_a_misspelt_shipped_recipe_names_those_there_are(medsegfed) -> None:
    """`simulate quickstrat` tells which recipes exist."""
    assert_refused(medsegfed("simulate", "quickstrat"), "glas, hippocampus, isic2018")


def test_a_world_without_held_out_patients_is_refused(medsegfed, tiny_recipe, tmp_path) -> None:
    """One patient a site leaves nobody to score on: refused before training."""
    recipe = tiny_recipe(("patients: 3", "patients: 1"))
    assert_refused(medsegfed("simulate", recipe, "--out", tmp_path / "run"), "would be held out")


def test_a_shipped_description_goes_by_its_name(medsegfed, source, tmp_path) -> None:
    """--dataset-config takes a bare name; one that is neither a file nor shipped is refused."""
    (source / "dataset.yaml").unlink()
    code, out, _ = medsegfed("data", "check", source, "--dataset-config", "msd_hippocampus", "--size", 16)
    assert code == 0
    assert "msd_hippocampus" in out
    assert_refused(medsegfed("data", "check", source, "--dataset-config", "mars"), "there is no such file")


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["segment"], "Missing argument"),
        (["frobnicate"], "No such command 'frobnicate'. Look at: medsegfed --help"),
        (["admit", "--nope"], "No such option: --nope. Look at: medsegfed admit --help"),
        (["train", "x", "--steps", "many"], "Invalid value for '--steps'"),
    ],
)
def test_a_command_that_cannot_be_read_is_one_line(medsegfed, arguments, fact) -> None:
    """Missing, unknown and misspelt words name the page that helps."""
    assert_refused(medsegfed(*arguments), fact)


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 12345"), OSError("no username")])
def test_a_user_without_a_name_is_told_by_number(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers run under a number alone; who asked for a run is noted all the same."""
    from deploy import cli_federation

    def nobody() -> str:
        raise error

    monkeypatch.setattr(cli_federation.getpass, "getuser", nobody)
    assert cli_federation._me() == f"uid {os.getuid()}"
