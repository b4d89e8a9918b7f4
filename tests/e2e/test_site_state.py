"""What sites keep between rounds over real processes: control variates, own models, what compression left out.

Every run has a site's runner and SuperNode killed after its second round: what counts in the third was on disk, or the
weights are others than those of a simulation that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from deploy.rehearsal import Rehearsal
from deploy.supervisor import read_status
from medsegdiff.weights import hash_weights, load_model
from server.journal import Event
from server.rounds import ENDED, run_state
from simulations.recipe import read_recipe
from simulations.simulate import simulate
from tests.conftest import TINY_RECIPE

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE = 400.0
KINDS = {
    "scaffold": "strategy: {name: scaffold}",
    "ditto": "personalisation: {kind: ditto, pull: 0.3}\n  compression: {kind: int8}",
    "norms": "personalisation: {kind: local_norms}\n  compression: {kind: bf16}",
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of four rounds, the models of the second and of the last are scored; all over the same two hospitals."""
    folder, found = tmp_path_factory.mktemp("recipes"), {}
    for name, asked in KINDS.items():
        text = TINY_RECIPE.replace("name: tiny", f"name: {name}").replace("rounds: 2", "rounds: 4\n  evaluate_every: 2")
        text = text.replace("sampling: {steps: 1}", f"sampling: {{steps: 1}}\n  {asked}\n  deadline_seconds: 600")
        found[name] = folder / f"{name}.yaml"
        found[name].write_text(text.replace("arms: [local, pooled]", "arms: []"))
    return found


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, recipes: dict[str, Path]) -> Iterator[Rehearsal]:
    made = Rehearsal(tmp_path_factory.mktemp("state") / "federation")
    made.prepare(read_recipe(recipes["ditto"]))
    with made.running():
        yield made


def committed(events: list[Event], round_: int) -> bool:
    return any(event["event"] == "round" and event["round"] >= round_ for event in events)


def kill(stage: Rehearsal, site: str, child: str) -> None:
    status = read_status(stage.sites[site] / "state")
    assert status is not None
    assert status["children"][child]["pid"] is not None
    os.kill(status["children"][child]["pid"], signal.SIGKILL)


def weights_of(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_model(path).network.state_dict()
    return found


def own_models(sites: Path, run: str) -> dict[str, str]:
    """Hash of each site's own model of a run, by site."""
    return {
        path.parents[1].name: hash_weights(weights_of(path)) for path in sites.glob(f"*/models/{run}-*.safetensors")
    }


@pytest.mark.parametrize("name", KINDS)
def test_a_killed_site_goes_on_with_what_it_kept(
    stage: Rehearsal, recipes: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Common model, every site's own and all scores are those of the simulation."""
    recipe = read_recipe(recipes[name])
    run_id = stage.begin(stage.run_file(recipe))
    stage.approve(run_id)
    stage.wait(name, lambda events: committed(events, 2), PATIENCE, "two rounds")
    for child in ("runner", "supernode"):
        kill(stage, "elm", child)
    events = stage.wait(name, lambda found: run_state(found) in ENDED, PATIENCE, "the end")
    assert run_state(events) == "finished", events[-1]
    report = json.loads(stage.command("server", "report", name, "--json", "--folder", str(stage.server)).stdout)

    simulated = simulate(recipes[name], None, tmp_path / "simulated", "inline", False).report
    real, other = stage.server / "runs" / name, tmp_path / "simulated"
    hashes = [hash_weights(weights_of(folder / "model.safetensors")) for folder in (real, other)]
    assert hashes[0] == hashes[1]
    assert own_models(stage.folder / "sites", name) == own_models(other / "world", name)
    assert set(own_models(other / "world", name)) == (set() if name == "scaffold" else {"alder", "elm"})
    for site, row in simulated["sites"].items():
        assert report["sites"][site]["dice"] == row["dice"]
