"""A canary over real processes: who is ready, who is not and why, and nothing of the run itself touched."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deploy.rehearsal import Rehearsal
from server.canary import SUFFIX
from simulations.recipe import Recipe, read_recipe
from tests.conftest import TINY_RECIPE

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = tmp_path_factory.mktemp("recipe") / "long.yaml"
    path.write_text(TINY_RECIPE.replace("name: tiny", "name: long").replace("rounds: 2", "rounds: 40"))
    return read_recipe(path)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Iterator[Rehearsal]:
    found = Rehearsal(tmp_path_factory.mktemp("canary") / "federation")
    found.prepare(recipe)
    with found.running():
        yield found


def canary(stage: Rehearsal, run_file: Path, seconds: int, *more: str) -> subprocess.CompletedProcess[str]:
    where = ("--folder", str(stage.server))
    return stage.command("server", "run", str(run_file), *where, "--canary", "--wait", str(seconds), *more, check=False)


def canary_id(stage: Rehearsal) -> str:
    """As the coordinator's audit log has it."""
    lines = (stage.server / "audit.jsonl").read_text().splitlines()
    queued = [json.loads(line) for line in lines if '"run_queued"' in line]
    return str(queued[-1]["run"])


def begun(stage: Rehearsal) -> None:
    """Wait until the server has taken the canary up."""
    end = time.monotonic() + 120
    while not stage.events(f"long{SUFFIX}"):
        assert time.monotonic() < end, "the canary was not taken up"
        time.sleep(0.5)


def test_a_site_that_has_not_approved_is_told_and_then_all_are_ready(stage: Rehearsal, recipe: Recipe) -> None:
    """First alder alone has approved: exit code 1, elm's reason. Then both: exit code 0, seconds, bytes, a forecast."""
    run_file = stage.run_file(recipe)

    def approved(*sites: str) -> subprocess.CompletedProcess[str]:
        with ThreadPoolExecutor(1) as other:
            going = other.submit(canary, stage, run_file, 40, "--json")
            begun(stage)
            stage.approve(canary_id(stage), sites)
            return going.result()

    first = approved("alder")
    told: dict[str, Any] = json.loads(first.stdout)
    assert first.returncode == 1, first.stderr
    assert told["sites"]["alder"]["ready"]
    assert not told["sites"]["elm"]["ready"]
    assert "not-approved" in told["sites"]["elm"]["problem"]

    second = approved("elm")
    told = json.loads(second.stdout)
    assert second.returncode == 0, second.stderr
    assert all(row["ready"] and row["bytes"]["up"] > 0 and row["answer_seconds"] > 0 for row in told["sites"].values())
    assert told["forecast"]["bytes"]["up"] == 2 * 40 * told["sites"]["elm"]["bytes"]["up"]

    shown = canary(stage, run_file, 40)
    assert shown.returncode == 0
    assert "All 2 sites are ready. Next: medsegfed run RUN.yaml" in shown.stdout
    assert [path.name for path in (stage.server / "runs").iterdir()] == [f"long{SUFFIX}"]
    assert not list((stage.server / "runs").rglob("*.safetensors"))
    for place in stage.sites.values():
        assert {path.name for path in (place / "outbox").iterdir()} <= {canary_id(stage)}
