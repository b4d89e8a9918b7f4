"""The arms a federation is compared with: fair in steps, the same bits when interrupted."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from client.contract import Assignment
from client.site import open_site
from client.training import train_round
from medsegdiff.progress import listening
from medsegdiff.weights import hash_weights, initial_weights
from simulations.arms import make_arms, train_arm


@pytest.fixture
def sites(tiny_world):
    return {name: open_site((tiny_world / name / "site.yaml").resolve()) for name in ("alder", "elm")}


def test_every_arm_takes_the_federations_steps(sites, tiny_task) -> None:
    """Local: a site's own steps on its own patients; pooled: the sum over sites on all of them."""
    local_a, local_e, pooled = make_arms(tiny_task, sites, ("local", "pooled"))
    assert [(arm.name, arm.steps) for arm in (local_a, local_e, pooled)] == [
        ("local-alder", 4), ("local-elm", 4), ("pooled", 8)
    ]  # fmt: skip
    assert len(pooled.cases) == len(local_a.cases) + len(local_e.cases) == 4
    assert {case.case.split for case in pooled.cases} == {"train"}
    assert make_arms(tiny_task, sites, ()) == []


def test_a_local_arm_is_its_sites_training_without_a_federation(sites, tiny_task, tmp_path) -> None:
    """One round of one site alone is the very update the site would send."""
    task = replace(tiny_task, rounds=1)
    arm = make_arms(task, sites, ("local",))[0]
    weights, _ = train_arm(arm, task, tmp_path)
    start = initial_weights(task.model, task.seed)
    _, delta = train_round(sites["alder"], task, Assignment("r", 1, hash_weights(start)), start)
    assert hash_weights({k: weights[k] - start[k] for k in start}) == hash_weights(delta)


def test_an_interrupted_arm_ends_with_the_same_bytes(sites, tiny_task, tmp_path) -> None:
    """Stopped after each step in turn and gone on with; finished work is not done again."""
    arm = make_arms(tiny_task, sites, ("pooled",))[0]
    weights, _ = train_arm(arm, tiny_task, tmp_path / "whole")
    whole = (tmp_path / "whole" / "pooled.safetensors").read_bytes()

    class Killed(Exception):
        pass

    for stop in (1, 5):
        folder = tmp_path / f"stop-{stop}"

        def kill(progress, stop=stop) -> None:
            if progress.done == stop:
                raise Killed

        with pytest.raises(Killed), listening(kill):
            train_arm(arm, tiny_task, folder)
        train_arm(arm, tiny_task, folder)
        assert (folder / "pooled.safetensors").read_bytes() == whole
    again, _ = train_arm(arm, tiny_task, tmp_path / "whole")
    assert hash_weights(dict(again)) == hash_weights(weights)
    shutil.rmtree(tmp_path / "whole")
