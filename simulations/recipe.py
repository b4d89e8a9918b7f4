"""Recipes: one YAML file says which virtual hospitals there are and what they train together."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from medsegdiff.data.dataset import Dataset, DatasetConfig, open_dataset
from medsegdiff.errors import UserError
from medsegdiff.strict import Strict, read_config
from server.config import RunRequest
from simulations.partition import PartitionConfig
from simulations.phantoms import PhantomConfig
from simulations.private_world import Pretraining, WorldPrivacy
from simulations.shifts import Attendance, SiteShift

SHIPPED = Path(__file__).parent / "datasets"


@dataclass(frozen=True)
class WorldConfig(Strict):
    """Where the patients come from and how they are dealt out to sites."""

    phantoms: PhantomConfig | None = None  # made on the spot; or
    dataset: str | None = None  # name of a dataset, read from --data: one in simulations/datasets, or your own
    targets: dict[str, tuple[str, ...]] | None = None  # what to segment, in place of the dataset's own targets
    partition: PartitionConfig = PartitionConfig()
    test_fraction: float = 0.2  # of each site's patients, held out
    privacy: WorldPrivacy | None = None  # patient-level differential privacy at every site
    shifts: dict[str, SiteShift] | None = None  # site -> how its scanner, readers and files differ
    attendance: dict[str, Attendance] | None = None  # site -> the rounds it takes part in; the others in all
    note: str | None = None  # printed in the report, e.g. that a split is artificial

    def __post_init__(self) -> None:
        if (self.phantoms is None) == (self.dataset is None):
            raise ValueError("exactly one of `phantoms` and `dataset` says where the patients come from")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction must lie between 0 and 1, found {self.test_fraction}")


@dataclass(frozen=True)
class Recipe(Strict):
    """A simulation, whole."""

    name: str
    world: WorldConfig
    run: RunRequest
    arms: tuple[Literal["local", "pooled"], ...] = ("local", "pooled")  # what federation is compared with
    seed: int = 0
    pretrain: Pretraining | None = None  # train on patients set apart as public, and start from there
    # Run the recipe once for each of these budgets, null being without privacy, and compare them (epsilon.html).
    epsilons: tuple[float | None, ...] | None = None
    repeats: int = 1  # of each, from other seeds

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", self.name):
            raise ValueError(f"name {self.name!r} must be 1 to 64 letters, digits, '-', '_' or '.': it names a folder")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0..2**63 - 1, found {self.seed}")
        if self.world.attendance and self.run.quorum is None:
            raise ValueError(
                "world.attendance needs run.quorum: by default a round takes all sites, and one that is absent ends it"
            )
        asked = self.run.privacy
        if self.world.privacy is not None and asked is None:
            raise ValueError("world.privacy (what sites grant) needs run.privacy (what the run asks), if only {}")
        if self.world.privacy is None and asked is not None and asked.required:
            raise ValueError("run.privacy asks every site for privacy; world.privacy, which would give it, is missing")
        if self.pretrain is not None and self.run.initial is not None:
            raise ValueError("pretrain and run.initial both say what the run starts from; choose one")
        if not 1 <= self.repeats <= 1000 or (self.repeats > 1 and self.epsilons is None):
            raise ValueError(f"repeats must lie in 1..1000, and be 1 without epsilons, found {self.repeats}")
        budgets = self.epsilons
        if budgets is not None and (self.world.privacy is None or not budgets or len(set(budgets)) != len(budgets)):
            raise ValueError("epsilons needs world.privacy, and at least one budget, none of them twice")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe; a bare name such as `quickstart` means the one that is shipped."""
    if (
        not path.exists()
        and path.suffix == ""
        and (shipped := Path(__file__).parent / "recipes" / f"{path}.yaml").exists()
    ):
        path = shipped
    if not path.exists() and path.parent == Path():
        names = ", ".join(sorted(p.stem for p in (Path(__file__).parent / "recipes").glob("*.yaml")))
        raise UserError(f"{path}: there is no such file and no such recipe; those shipped are {names}.")
    return read_config(path, Recipe)


def shipped_dataset(name: str) -> Path:
    """The dataset.yaml of a dataset the project knows. Raises UserError with the known names."""
    path = SHIPPED / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
        raise UserError(f"world.dataset: '{name}' is not known; choose one of {known}.")
    return path


def open_source(recipe: Recipe, data: Path | None) -> Dataset:
    """The dataset a recipe names, read from `data`, with the recipe's targets.

    Raises:
        UserError: no folder was given, it is not there, or it is no dataset.
    """
    name = recipe.world.dataset
    assert name is not None, "phantom worlds have no source"
    if data is None:
        raise UserError(
            f"recipe '{recipe.name}' works on the dataset {name}, which is not part of the program: name its "
            "folder with --data DIR (docs/datasets.md names its origin)."
        )
    if not data.is_dir():
        raise UserError(f"--data {data}: there is no such folder. Give the folder that holds {name}'s cases.csv.")
    own = (data / "dataset.yaml").is_file()  # it describes itself; the name need not be one that is shipped
    dataset = open_dataset(data, None if own else shipped_dataset(name))
    if own and dataset.config.name != name:
        raise UserError(
            f"--data {data}: its dataset.yaml names {dataset.config.name}, recipe '{recipe.name}' works on {name}. "
            "Give that dataset's folder, or change world.dataset in the recipe."
        )
    return replace(dataset, config=with_targets(dataset.config, recipe.world.targets))


def with_targets(config: DatasetConfig, targets: dict[str, tuple[str, ...]] | None) -> DatasetConfig:
    """The configuration with other targets. Raises UserError when they name labels that do not exist."""
    if targets is None:
        return config
    try:
        return replace(config, targets=targets)
    except ValueError as error:
        raise UserError(f"world.targets: {error}.") from error
