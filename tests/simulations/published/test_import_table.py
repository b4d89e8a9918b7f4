"""What is told of the importers: the table of benchmarks, the descriptions, the recipes and the documentation agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import volume_layouts as official
from typer.testing import CliRunner

from deploy.cli import app
from medsegdiff.data.cases import DatasetConfig
from medsegdiff.data.dataset import open_dataset
from medsegdiff.strict import read_config
from simulations.published.catalogue import PUBLISHED
from simulations.recipe import read_recipe, shipped_dataset

DOCS = Path(__file__).parents[3] / "docs"
SETS = (
    "ISIC 2018", "CVC-ClinicDB", "GlaS", "BTCV", "REFUGE", "PROMISE12", "Synapse", "LIDC-IDRI", "ProstateX", "KiTS",
)  # fmt: skip
COLUMNS = 7


def rows() -> list[list[str]]:
    """The table's cells, without header and rule."""
    lines = [line for line in (DOCS / "benchmarks.md").read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def name_in(pattern: str, cell: str) -> str:
    match = re.fullmatch(pattern, cell)
    assert match, f"{cell} is no command of the form {pattern}"
    return match[1]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_commands_name_what_exists(row: list[str]) -> None:
    """Each row's importer and recipe exist and are of the same dataset; a published figure carries its caveat."""
    assert len(row) == COLUMNS
    imported = name_in(r"`medsegfed data import (\S+) SRC DST`", row[1])
    recipe = read_recipe(Path(name_in(r"`medsegfed simulate (\S+) --data DST`", row[2])))
    assert imported in PUBLISHED
    assert recipe.world.dataset == imported
    assert row[5] == "none known" or re.search(r"\([123]\)$", row[5])
    assert all(row)


def test_no_benchmark_is_missing() -> None:
    """Every set that MedSegDiff is named with has its row."""
    listed = [row[0] for row in rows()]
    assert [name for name in SETS if not any(entry.startswith(name) for entry in listed)] == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_dataset_is_described_wherever_it_is_needed(name: str) -> None:
    """The catalogue's key is the dataset's own name; description, recipe and documentation know it."""
    dataset = PUBLISHED[name]
    assert dataset.name == name == read_config(shipped_dataset(name), DatasetConfig).name
    recipe = read_recipe(Path(name))
    assert recipe.name == recipe.world.dataset == name
    recipe.run.task(read_config(shipped_dataset(name), DatasetConfig), seed=0)  # the network takes its channels
    assert re.search(rf"^#+ .*\b{name}\b", (DOCS / "datasets.md").read_text(), re.M), "docs/datasets.md has no section"
    assert dataset.title
    assert dataset.source
    assert dataset.layout


def test_the_command_imports(tmp_path: Path) -> None:
    """`medsegfed data import` writes what `open_dataset` reads, and says what it wrote."""
    official.promise12(tmp_path / "source", (0, 13))
    result = CliRunner().invoke(app, ["data", "import", "promise12", str(tmp_path / "source"), str(tmp_path / "done")])
    assert result.exit_code == 0, result.output
    assert "2" in result.output
    assert len(open_dataset(tmp_path / "done").cases) == 2
