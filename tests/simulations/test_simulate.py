"""A whole simulation on phantoms: what it leaves, that it repeats bit for bit, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from medsegdiff.errors import UserError
from simulations.simulate import simulate


def run(recipe: Path, out: Path, data: Path | None = None, resume: bool = False):
    return simulate(recipe, data, out, "inline", resume)


def comparable(folder: Path) -> dict:
    report = json.loads((folder / "report.json").read_text())
    return {key: value for key, value in report.items() if key not in ("seconds", "engine")}


def models(folder: Path) -> dict[str, bytes]:
    paths = [folder / "model.safetensors", *(folder / "arms").glob("*.safetensors")]
    return {path.name: path.read_bytes() for path in paths if ".state." not in path.name}


@pytest.mark.slow
def test_a_simulation_leaves_a_whole_run_folder_and_repeats_bit_for_bit(tiny_recipe, tmp_path) -> None:
    """All files of the design; a second run gives the same bytes of every model; a finished run resumes to itself."""
    recipe = tiny_recipe()
    outcome = run(recipe, tmp_path / "one")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {
        "recipe.yaml", "world", "run.yaml", "journal.jsonl", "checkpoints", "model.safetensors", "arms", "report.json",
        "report.html", "metrics.csv",
    } <= names  # fmt: skip
    assert set(models(tmp_path / "one")) == {
        "model.safetensors", "local-alder.safetensors", "local-elm.safetensors", "pooled.safetensors"
    }  # fmt: skip
    report = outcome.report
    assert (report["run"], report["rounds"], report["engine"], list(report["sites"])) == (
        "tiny", 2, "inline", ["alder", "elm"]
    )  # fmt: skip
    assert set(report["arms"]) == {"federated", "local", "pooled"}
    assert report["sites"]["alder"]["patients"] == {"train": 2, "test": 1}
    assert (report["training"]["batch_size"], report["sampling"]["steps"], report["participation"]["asked"]) == (
        2,
        1,
        2,
    )
    # Up: an update a site and round. Down: the first model, and after each round the new one, scored and trained.
    assert report["bytes"]["up"] * 3 == report["bytes"]["down"] * 2 > 0
    run(recipe, tmp_path / "two")
    assert models(tmp_path / "one") == models(tmp_path / "two")
    assert comparable(tmp_path / "one") == comparable(tmp_path / "two")
    before = models(tmp_path / "one")
    run(recipe, tmp_path / "one", resume=True)
    assert models(tmp_path / "one") == before


def test_a_folder_in_use_is_left_alone(tiny_recipe, tmp_path) -> None:
    """Files of any kind: nothing is changed, the line says --resume and --out."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"already holds a run or other files; nothing was changed.*--resume.*--out"):
        run(tiny_recipe(), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_resume_needs_a_run_of_the_same_recipe(tiny_recipe, tmp_path) -> None:
    """No run there; another recipe there."""
    with pytest.raises(UserError, match="holds no run that could be resumed"):
        run(tiny_recipe(), tmp_path / "none", resume=True)
    (tmp_path / "out").mkdir()
    shutil.copy(tiny_recipe(("seed: 1", "seed: 2")), tmp_path / "out" / "recipe.yaml")
    with pytest.raises(UserError, match="was started with another recipe"):
        run(tiny_recipe(), tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("  test_f", "  partition: {by: iid, sites: 9}\n  test_f")], "6 patients cannot be dealt out to 9 sites"),
        ([("  test_f", "  partition: {by: quantity, sites: 4}\n  test_f")], "at least 2 each, 8 in all"),
        ([("  rounds: 2", "  quorum: 3\n  rounds: 2")], "quorum must lie in 1..2"),
        ([("  test_f", "  targets: {x: [tumour]}\n  test_f")], "world.targets: target x joins"),
    ],
)
def test_a_fault_before_training_leaves_no_folder_behind(tiny_recipe, tmp_path, changes, message) -> None:
    """The mended command finds the folder empty again, as if the first had never been given."""
    with pytest.raises(UserError, match=message):
        run(tiny_recipe(*changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=message):
        run(tiny_recipe(*changes), tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_phantoms_take_the_recipes_targets(tiny_recipe, tmp_path) -> None:
    """world.targets holds for phantoms too; with data given, the contradiction is named."""
    with pytest.raises(UserError, match=r"makes its own patients .world.phantoms.\. Leave --data out"):
        run(tiny_recipe(), tmp_path / "out", data=tmp_path)
    recipe = tiny_recipe(("  test_f", "  targets: {spot: [lesion]}\n  test_f"), ("[local, pooled]", "[]"))
    outcome = run(recipe, tmp_path / "out")
    assert outcome.report["dataset"]["targets"] == ["spot"]
    assert set(outcome.report["arms"]) == {"federated"}
    assert yaml.safe_load((tmp_path / "out" / "world" / "alder" / "data" / "dataset.yaml").read_text())["targets"] == {
        "spot": ["lesion"]
    }
