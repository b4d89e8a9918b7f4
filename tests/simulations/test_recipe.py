"""Recipes: those that are shipped read, misspelt ones are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from medsegdiff.data.dataset import DatasetConfig
from medsegdiff.errors import UserError
from medsegdiff.strict import read_config
from simulations.recipe import SHIPPED, open_source, read_recipe, shipped_dataset, with_targets

RECIPES = sorted((SHIPPED.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_reads(path) -> None:
    """By path and by bare name; its dataset, if any, is one the project knows, with the recipe's targets."""
    recipe = read_recipe(path)
    assert read_recipe(Path(path.stem)) == recipe
    assert recipe.name == path.stem
    if recipe.world.dataset is not None:
        config = read_config(shipped_dataset(recipe.world.dataset), DatasetConfig)
        recipe.run.task(with_targets(config, recipe.world.targets), recipe.seed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("threads:", "thraeds:")], r"run.thraeds: unknown key; did you mean 'threads'\?"),
        (
            [("  test_fraction: 0.3", "  test_fraction: 1.5")],
            "world: test_fraction must lie between 0 and 1, found 1.5",
        ),
        ([("name: tiny", "name: ../tiny")], "name '../tiny' must be"),
        ([("seed: 1", "seed: -1")], "seed must lie in"),
        ([("rounds: 2", "rounds: 0")], "run: rounds must lie in 1..100000, found 0"),
        ([("preset: tiny", "preset: tyni")], "run.model: preset 'tyni' is unknown"),
        ([("[local, pooled]", "[lokal]")], "arms.0"),
        (
            [("  phantoms: {sites: [alder, elm], patients: 3, slices: 4}\n", "")],
            "exactly one of `phantoms` and `dataset`",
        ),
        ([("  test_fraction", "  dataset: lgg_tcga\n  test_fraction")], "exactly one of `phantoms` and `dataset`"),
        ([("seed: 1", "seed: 1\nseed: 2")], "key 'seed' stands twice"),
        ([("seed: 1", "seed: [")], "is not valid YAML"),
    ],
)
def test_a_fault_is_named_with_file_and_key(tiny_recipe, changes, message) -> None:
    """One UserError that starts with the recipe's path."""
    path = tiny_recipe(*changes)
    with pytest.raises(UserError, match=message) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found nothing"),
        (b"- a\n- b\n", "found a list"),
        (b"\x00\xff\xfe binary", "cannot be read as a YAML text file|not valid YAML"),
        (b"a: 1\n" + b"#" * 2_000_000, "2,000,005 bytes are no configuration file"),
        (b"[" * 100_000, "not valid YAML"),
        (b"x: !!python/object/apply:os.system [true]", "not valid YAML"),
    ],
    ids=["empty", "list", "binary", "huge", "nested", "python-object"],
)
def test_what_is_no_recipe_is_refused(tmp_path, content, message) -> None:
    """Whatever lies under the name, one line comes back; nothing in it is carried out."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_recipe(path)


def test_a_missing_recipe_is_named(tmp_path) -> None:
    """Neither a path nor a shipped name."""
    with pytest.raises(UserError, match="there is no such file"):
        read_recipe(tmp_path / "none.yaml")


def test_a_dataset_recipe_asks_for_its_folder(tmp_path) -> None:
    """Without --data, and with a folder that is not there."""
    recipe = read_recipe(Path("hippocampus"))
    with pytest.raises(UserError, match="--data DIR"):
        open_source(recipe, None)
    with pytest.raises(UserError, match="there is no such folder"):
        open_source(recipe, tmp_path / "none")
    with pytest.raises(UserError, match=r"'mars' is not known; choose one of .*lgg_tcga"):
        shipped_dataset("mars")


def test_targets_are_replaced_or_refused(tiny_task) -> None:
    """Joined labels become the target; a label that is not there is named."""
    assert with_targets(tiny_task.dataset, None) is tiny_task.dataset
    assert with_targets(tiny_task.dataset, {"all": ("lesion",)}).targets == {"all": ("lesion",)}
    with pytest.raises(UserError, match=r"world.targets: target all joins \['tumour'\]"):
        with_targets(tiny_task.dataset, {"all": ("tumour",)})


def test_a_folder_that_describes_itself_needs_no_shipped_description(tmp_path) -> None:
    """world.dataset may name your own dataset; a folder that says it is another one is refused."""
    (tmp_path / "cases.csv").write_text("case_id,patient_id,image_path,mask_path\na,a,a.png,b.png\n")
    described = "name: mine\nmodality: MR\nchannels: [T1]\nlabels: {background: 0, lesion: 1}\n"
    (tmp_path / "dataset.yaml").write_text(described)
    shipped = read_recipe(Path("hippocampus"))
    own = replace(shipped, world=replace(shipped.world, dataset="mine", targets=None))
    assert open_source(own, tmp_path).config.name == "mine"
    with pytest.raises(UserError, match="names mine, recipe 'hippocampus' works on msd_hippocampus"):
        open_source(replace(own, world=replace(own.world, dataset="msd_hippocampus")), tmp_path)
    (tmp_path / "dataset.yaml").unlink()
    with pytest.raises(UserError, match="'mine' is not known"):
        open_source(own, tmp_path)
