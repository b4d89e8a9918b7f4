"""What tests of several packages share: real data where it is, and a tiny federation that is always there."""

from __future__ import annotations

import os
import shutil

# Before torch: one thread a process keeps tests quick on small machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from client.contract import TrainTask
from medsegdiff.config import SamplingConfig, TrainingConfig
from medsegdiff.data.dataset import open_dataset
from medsegdiff.strict import dump_yaml
from server.config import RunPlan, StrategyConfig
from simulations.phantoms import PhantomConfig, write_phantoms
from simulations.world import write_world
from tests.fake_sites import SMALLEST

ROOT = Path(__file__).parents[1]
SITES = {"alder": 3, "birch": 2, "elm": 1}  # site -> training patients of the tiny world

TINY_RECIPE = """\
name: tiny
seed: 1
world:
  phantoms: {sites: [alder, elm], patients: 3, slices: 4}
  test_fraction: 0.3
run:
  model: {preset: tiny, image_size: 16, base_channels: 8, channel_multipliers: [1, 2], attention_levels: [1]}
  rounds: 2
  local_steps: 2
  threads: 1
  training: {batch_size: 2}
  sampling: {steps: 1}
arms: [local, pooled]
"""


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Call with a dataset's name to get its folder; skips the test where it is not there."""
    base = Path(os.environ.get("MEDSEGFED_DATA") or ROOT.parent / "shared" / "data")

    def folder(name: str) -> Path:
        if not (base / name).is_dir():
            pytest.skip(f"real data: {base / name} is not there (set MEDSEGFED_DATA)")
        return base / name

    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared slices of tests go to a folder of their own; the caller's cache and environment stay as they were."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSEGFED_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("MEDSEGFED_SITE", "MEDSEGFED_WORLD", "MEDSEGFED_RUN"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder of phantoms: 3 scanners, 4 patients each, 4 slices."""
    folder = tmp_path_factory.mktemp("tiny") / "source"
    write_phantoms(PhantomConfig(sites=tuple(SITES), patients=4, slices=4), folder)
    return folder


@pytest.fixture(scope="session")
def untouched_world(tmp_path_factory: pytest.TempPathFactory, tiny_source: Path) -> Path:
    """Three virtual hospitals with 3, 2 and 1 training patients and one held-out patient each. To copy, not to run."""
    dataset = open_dataset(tiny_source)
    world = tmp_path_factory.mktemp("worlds") / "untouched"
    assignment = {site: [f"{site}-{number:03d}" for number in range(1, n + 2)] for site, n in SITES.items()}
    splits = {name: "train" for names in assignment.values() for name in names}
    splits |= {names[-1]: "test" for names in assignment.values()}
    write_world(dataset, assignment, splits, world, copy=False)
    return world


@pytest.fixture(scope="session")
def tiny_world(untouched_world: Path) -> Path:
    """A copy that tests run on and share: what their runs leave at its sites stays for the next test."""
    return Path(shutil.copytree(untouched_world, untouched_world.with_name("world"), symlinks=True))


@pytest.fixture(scope="session")
def tiny_task(tiny_source: Path) -> TrainTask:
    """A task of 2 rounds x 2 steps on 16 x 16 pixels: the smallest network there is."""
    return TrainTask(
        dataset=open_dataset(tiny_source).config,
        model=SMALLEST,
        rounds=2,
        local_steps=2,
        seed=5,
        training=TrainingConfig(batch_size=2),
        sampling=SamplingConfig(steps=1),
        threads=1,
    )


@pytest.fixture
def make_run(
    tmp_path: Path, tiny_world: Path, tiny_task: TrainTask, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Call to get a run folder whose run.yaml stands; keywords change the plan, `task` entries those of the task."""

    def make(name: str = "run", task: dict[str, object] | None = None, **changes: object) -> Path:
        folder = tmp_path / name
        strategy = changes.pop("strategy", StrategyConfig())
        plan = RunPlan("tiny", "tiny", strategy, dict(SITES), replace(tiny_task, **(task or {})))  # type: ignore[arg-type]
        folder.mkdir()
        (folder / "run.yaml").write_text(dump_yaml(replace(plan, **changes)))
        monkeypatch.setenv("MEDSEGFED_WORLD", str(tiny_world.resolve()))
        return folder

    return make


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Call to write a recipe of 2 sites; each pair of arguments replaces one text in it by another."""

    def write(*changes: tuple[str, str], name: str = "tiny.yaml") -> Path:
        text = TINY_RECIPE
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write
