"""The driver carries out every budget once, in order, keeps what is finished and summarises whole repetitions alone."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import privacy_utility
from benchmarks.privacy_utility import PATIENTS, RECIPES, cells_of, summarise, work_through
from benchmarks.turns import RESULTS
from simulations.budgets import budget_cells, rows_a_step
from simulations.recipe import read_recipe

SMALL = """
name: small
world:
  phantoms: {sites: [alder, birch], patients: 6, slices: 4}
  partition: {by: site}
  test_fraction: 0.34
  privacy: {epsilon: 8, delta: 1.0e-2, q: 0.5, clip: 0.05, slices: 1, draws: 1}
pretrain: {public_fraction: 0.2, steps: 2}
run:
  model: {preset: tiny, image_size: 16, base_channels: 8}
  rounds: 1
  local_steps: 1
  privacy: {train: low_rank}
  sampling: {steps: 1, members: 1}
  training: {batch_size: 2}
  threads: 1
epsilons: [8, null]
repeats: 2
arms: [local]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A comparison of seconds: one budget, none, all weights; twice."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_cells_are_those_of_the_recipe(recipe: Path, tmp_path: Path) -> None:
    """Each budget of each repetition once; the first of a repetition is marked, and comes first."""
    cells = cells_of(recipe, None, tmp_path)
    assert [cell.label for cell in cells] == [label for label, _ in budget_cells(read_recipe(recipe))]
    assert [cell.repetition for cell in cells] == [0, 0, 0, 1, 1, 1]
    assert [cell.first for cell in cells] == [True, False, False] * 2
    assert summarise(recipe, cells) is None


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_comparisons_can_be_read(name: str, tmp_path: Path) -> None:
    """Three repetitions of five budgets and none, and data looked for by the dataset's name."""
    cells = cells_of(Path(name), tmp_path, tmp_path / "out")
    assert len(cells) == 3 * 7
    dataset = read_recipe(Path(name)).world.dataset
    drawn = tmp_path / "out" / read_recipe(Path(name)).name / PATIENTS
    assert cells[0].data == (tmp_path / dataset if dataset else drawn)
    assert read_recipe(cells[0].recipe).world.dataset == (dataset or "phantoms")


def test_the_page_tells_the_rows_that_a_step_takes() -> None:
    """Private and plain steps of the published comparisons, as their recipes and their measured patients give them."""
    measured = json.loads((RESULTS / "privacy_utility.json").read_text())["comparisons"]
    private, plain = [], []
    for found in measured:
        cells = dict(budget_cells(read_recipe(Path(found["recipe"]))))
        patients = found["patients"] / found["sites"]
        private.append(f"{rows_a_step(cells['epsilon-8-0'], patients):.0f}")
        assert rows_a_step(cells["none-0"], patients) == rows_a_step(cells["all-weights-0"], patients)
        plain.append(f"{rows_a_step(cells['none-0'], patients):.0f}")
    page = " ".join((RESULTS.parents[1] / "docs" / "privacy.md").read_text().split())
    assert f"on average {private[0]} rows at a hospital of the hippocampi and {private[1]} of the gliomas" in page
    assert f"a plain step takes {plain[0]} and {plain[1]} rows" in page


@pytest.mark.slow
def test_a_comparison_is_carried_out_and_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every cell in a process of its own; a second call finds all of them done; a cut keeps whole repetitions."""
    out = tmp_path / "out"
    monkeypatch.setenv("MEDSEGFED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        sys, "argv", ["x", "--out", str(out), "--recipe", str(recipe), "--jobs", "2", "--device", "cpu"]
    )
    privacy_utility.main()
    result = json.loads((out / "privacy_utility.json").read_text())
    assert result["failed"] == {}
    (figures,) = result["comparisons"]
    assert [row["name"] for row in figures["rows"]] == ["epsilon-8", "none", "all-weights"]
    assert 0 < figures["rows"][0]["spent"] <= 8
    assert [row["rows_a_step"] for row in figures["rows"]] == [0.5 * 3 * 1 * 1, 2, 2]  # three patients train at a site
    assert "small: Dice against epsilon" in capsys.readouterr().out
    cells = cells_of(recipe, None, out)
    assert all(cell.finished for cell in cells)
    assert work_through(cells, 1, "cpu", 1, 0.0) == {}
    (out / "small" / cells[-1].label / "arms" / "start.json").unlink()
    cut = summarise(recipe, cells)
    assert cut is not None
    assert cut["repetitions"] == 1


@pytest.mark.slow
def test_a_failed_cell_is_told_and_the_others_go_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe whose dataset is not there fails by name; what waits for its public model is not begun."""
    cells = [replace(cell, data=tmp_path / "nowhere") for cell in cells_of(recipe, None, tmp_path / "out")]
    monkeypatch.setenv("MEDSEGFED_CACHE", str(tmp_path / "cache"))
    failed = work_through(cells, 2, "cpu", 1, 60.0, [])
    assert set(failed) == {f"small/{cell.label}" for cell in cells if cell.first}
