"""A private hospital and one that is not, over real processes: watched to the end, accounted, lost, recovered."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from client.privacy.account import ledger_path
from deploy.rehearsal import Rehearsal
from medsegdiff.chained_log import AUDIT_LOG, audit_lines
from simulations.recipe import Recipe, read_recipe
from tests.conftest import TINY_RECIPE

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE = 300.0
SECTION = """\
privacy:
  mechanism: {epsilon: 30, delta: 1.0e-4, sigma: 2, q: 0.5, clip: 1, batch: 2, steps: 2, rounds: 2, slices: 1, draws: 2}
  weight: 20
  answer_every: 0
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = tmp_path_factory.mktemp("recipe") / "private.yaml"
    path.write_text(TINY_RECIPE.replace("threads: 1", "threads: 1\n  deadline_seconds: 600\n  quorum: 2"))
    return read_recipe(path)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Iterator[Rehearsal]:
    found = Rehearsal(tmp_path_factory.mktemp("private") / "federation")
    found.prepare(recipe)
    with open(found.sites["alder"] / "site.yaml", "a", encoding="utf-8") as handle:
        handle.write(SECTION)
    with found.running():
        yield found


def run_id(stage: Rehearsal, name: str) -> str:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for line in audit_lines(stage.server / AUDIT_LOG):
            if line["event"] == "run_queued" and line["run"].startswith(f"{name}-"):
                return str(line["run"])
        time.sleep(0.2)
    raise AssertionError(f"{name} was not asked for")


def watched(
    stage: Rehearsal, recipe: Recipe, name: str, quorum: int = 2, sites: tuple[str, ...] = ("alder", "elm")
) -> subprocess.CompletedProcess[str]:
    """Start a run, approve it at sites, and watch it to its end as the coordinator does."""
    asked = {"privacy": {"train": "all", "required": False}, "quorum": quorum, "absence_seconds": 20}
    run_file = stage.run_file(recipe, name, **asked)
    with ThreadPoolExecutor(1) as coordinator:
        watching = coordinator.submit(stage.command, "server", "run", str(run_file), "--folder", str(stage.server))
        stage.approve(run_id(stage, name), sites)
        return watching.result(PATIENCE)


def report(stage: Rehearsal, name: str) -> dict[str, Any]:
    said = stage.command("server", "report", name, "--json", "--folder", str(stage.server)).stdout
    found: dict[str, Any] = json.loads(said)
    return found


def ledger(stage: Rehearsal) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(stage.command("alder", "ledger", "show", "--site", ".", "--json").stdout)
    return found


def test_a_private_run_is_watched_accounted_and_recovered(stage: Rehearsal, recipe: Recipe) -> None:
    """The watch ends with the run; of alder nothing but epsilon is told, which the ledger has; lost, it trains nothing
    until it is recovered, and then the server knows it again."""
    told = watched(stage, recipe, "first")
    assert "left out" not in told.stdout
    assert told.stdout.count("committed: 2 updates") == 2
    shown = ledger(stage)
    assert [(entry["round"], entry["state"]) for entry in shown["entries"]] == [(1, "committed"), (2, "committed")]
    row = report(stage, "first")["sites"]["alder"]
    assert row["dice"] is None
    assert row["epsilon"] == pytest.approx(shown["spent"]["epsilon"]), row
    assert stage.command("server", "status", "first", "--folder", str(stage.server)).returncode == 0

    alder = stage.sites["alder"]
    stage.stop("alder")
    for file in alder.glob(f"{ledger_path(alder).name}*"):
        file.unlink()
    stage.start("alder")
    lost = watched(stage, recipe, "second", quorum=1, sites=("elm",))
    assert lost.stdout.count("committed: 1 updates") == 2
    approved = stage.command("alder", "approve", run_id(stage, "second"), "--yes", check=False)
    assert (approved.returncode, "ledger recover" in approved.stderr) == (2, True)
    assert not ledger_path(alder).exists()
    said = stage.command("alder", "ledger", "recover", "--site", ".").stdout
    assert "2 reservations, each in full" in said
    assert ledger(stage)["spent"]["epsilon"] == shown["spent"]["epsilon"]

    older = {file: file.read_bytes() for file in alder.glob("*.jsonl*")}
    assert watched(stage, recipe, "third").stdout.count("committed: 2 updates") == 2
    assert ledger(stage)["spent"]["epsilon"] > shown["spent"]["epsilon"]

    stage.stop("alder")  # ledger and audit log both put back, and they fit: the server alone knows better
    for file, data in older.items():
        file.write_bytes(data)
    assert stage.command("alder", "ledger", "verify", "--site", ".").returncode == 0
    stage.start("alder")
    assert watched(stage, recipe, "fourth", quorum=1).stdout.count("committed: 1 updates") == 2
    refused = [event["code"] for event in stage.events("fourth") if event["event"] == "refused"]
    assert "ledger-rolled-back" in refused
