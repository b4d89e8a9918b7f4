"""The in-process engine with real sites: training, FedAvg and FedProx as written out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from client.app import app as client_app
from client.contract import Assignment
from client.site import open_site
from client.training import train_round
from medsegdiff.strict import read_config
from medsegdiff.weights import hash_weights, initial_weights, load_model
from server.app import app as server_app
from server.config import RunPlan, StrategyConfig
from simulations.inline import InlineGrid, run_inline


def federate(folder: Path) -> dict[str, Tensor]:
    run_inline(server_app, client_app, 3, folder)
    return dict(load_model(folder / "model.safetensors").network.state_dict())


def test_a_round_is_the_patients_weighted_mean_of_what_sites_train(make_run, tiny_world) -> None:
    """The engine's model equals a hand-written FedAvg over `train_round`; two runs give the same bytes."""
    folder, again = make_run("one", task={"rounds": 1}), make_run("two", task={"rounds": 1})
    found = federate(folder)
    plan = read_config(folder / "run.yaml", RunPlan)
    weights = initial_weights(plan.task.model, plan.task.seed)
    total = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in weights.items()}
    for name in plan.roster:
        site = open_site((tiny_world / name / "site.yaml").resolve())
        assignment = Assignment(plan.run_id, 1, hash_weights(weights))
        update, delta = train_round(site, plan.task, assignment, weights)
        assert update.patients == plan.roster[name]
        for key, value in delta.items():
            total[key] += update.patients * value.double()
    for key, value in weights.items():
        wanted = (value.double() + total[key] / sum(plan.roster.values())).float()
        torch.testing.assert_close(found[key], wanted, rtol=3e-7, atol=3e-8)
        assert not torch.equal(found[key], value) or value.numel() == 0 or float(total[key].abs().max()) < 1e-7
    federate(again)
    assert (folder / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_fedprox_pulls_towards_the_received_model(tiny_world, tiny_task) -> None:
    """The larger mu, the smaller the change after the same steps from the same batches and noise."""
    site = open_site((tiny_world / "alder" / "site.yaml").resolve())
    weights = initial_weights(tiny_task.model, 0)
    sizes = []
    for mu in (0.0, 0.1, 1.0, 10.0):
        task = replace(tiny_task, local_steps=30, proximal_mu=mu, rounds=1)
        _, delta = train_round(site, task, Assignment("r", 1, hash_weights(weights)), weights)
        sizes.append(sum(float(value.square().sum()) for value in delta.values()) ** 0.5)
    assert sizes == sorted(sizes, reverse=True)
    assert 0 < sizes[-1] < sizes[0] / 4


def test_fedprox_reaches_the_sites(make_run) -> None:
    """The plan's strategy stands in the task, and changes the model."""
    plain = make_run("avg", task={"rounds": 1})
    prox = make_run("prox", strategy=StrategyConfig("fedprox", 900.0), task={"rounds": 1, "proximal_mu": 900.0})
    assert hash_weights(federate(plain)) != hash_weights(federate(prox))


def test_the_grid_knows_its_nodes_and_has_no_flower_run() -> None:
    """Nodes 1000, 1001, ...; asking for Flower's run record says what to use instead."""
    grid = InlineGrid(client_app, 2)
    assert list(grid.get_node_ids()) == [1000, 1001]
    with pytest.raises(NotImplementedError, match="run_id"):
        _ = grid.run
