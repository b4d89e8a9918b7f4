"""Malicious virtual sites do what their names say, and nothing to the others; the rules meet them in real rounds."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from fake_sites import FakeSites, delta_of
from flwr.app import Message, MessageType

from client.contract import Update, arrays_from_wire, from_wire
from medsegdiff.strict import read_config
from medsegdiff.weights import hash_weights, load_model, weight_shapes
from server.app import app as server_app
from server.config import RunPlan, ScreeningConfig, StrategyConfig
from server.journal import Journal
from simulations.attacks import ATTACKS, CLAIMED, Malicious, flip_masks
from simulations.inline import run_inline

OPEN = ScreeningConfig(norm_factor=None)


def carry_out(folder: Path, attack: str) -> tuple[RunPlan, dict[str, Message]]:
    """A run in which alder, the first in the order of names, lies; returns the last update of each site."""
    plan = read_config(folder / "run.yaml", RunPlan)
    liar, sent = Malicious(FakeSites(plan), attack), {}  # type: ignore[arg-type]

    def listen(message: Message, context) -> Message:
        reply = liar(message, context)
        if message.metadata.message_type == MessageType.TRAIN:
            sent[list(plan.roster)[context.node_config["partition-id"]]] = reply
        return reply

    run_inline(server_app, listen, len(plan.roster), folder)
    return plan, sent


FACTORS = {
    "none": 1,
    "nan": math.nan,
    "sign_flip": -1,
    "scaled": -10,
    "fivefold": -5,
    "many": -1,
    "free_rider": 0,
    "label_flip": 1,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_each_attack_is_what_its_name_says(make_run, attack) -> None:
    """The liar's update is its honest one times a factor, under a hash that fits; the others' are untouched."""
    plan, sent = carry_out(make_run(quorum=2, task={"rounds": 1}), attack)
    shapes = weight_shapes(plan.task.model)
    for site, reply in sent.items():
        update = from_wire(reply.content, "update", Update)
        honest = delta_of(site, 1, plan.task)
        factor = FACTORS[attack] if site == "alder" else 1
        if math.isnan(factor):
            packed = np.frombuffer(next(iter(reply.content.array_records["delta"].values())).data, "<f4")
            assert np.isnan(packed).all()
            continue
        delta = arrays_from_wire(reply.content.array_records["delta"], shapes)
        assert update.delta_hash == hash_weights(delta)
        assert update.patients == (CLAIMED if (site, attack) == ("alder", "many") else plan.roster[site])
        assert all(torch.equal(delta[name], value * factor) for name, value in honest.items())


@pytest.mark.parametrize(("attack", "accepted"), [("nan", False), ("many", False), ("scaled", True), ("none", True)])
def test_screening_leaves_out_what_no_rule_has_to_bear(make_run, attack, accepted) -> None:
    """NaN and a billion patients never reach a rule; what is merely wrong does, and is the rule's to bear."""
    folder = make_run(quorum=2, task={"rounds": 1}, screening=OPEN)
    carry_out(folder, attack)
    assert ("alder" in Journal(folder / "journal.jsonl").last("round")["accepted"]) == accepted


def test_a_median_is_moved_less_than_a_mean(make_run) -> None:
    """-10 times an update: the mean of three is moved by several honest updates, the median by less than one."""
    moved = {}
    for rule in ("mean", "median"):
        models = []
        for attack in ("none", "scaled"):
            folder = make_run(
                f"{rule}-{attack}", strategy=StrategyConfig(rule=rule), task={"rounds": 1}, screening=OPEN
            )
            carry_out(folder, attack)
            models.append(load_model(folder / "model.safetensors").network.state_dict())
        distance = sum(float((models[0][name] - value).square().sum()) for name, value in models[1].items())
        moved[rule] = math.sqrt(distance)
    assert moved["median"] < moved["mean"] / 4


def test_flipped_masks_are_turned_inside_out(tmp_path, untouched_world, tiny_source) -> None:
    """Every voxel of every mask of the site; images stay; done twice, they are as they were."""
    site = tmp_path / "alder"
    shutil.copytree(untouched_world / "alder", site)
    shutil.copytree(tiny_source, site / "data" / "own")
    table = site / "data" / "cases.csv"
    lines = [line.split(",") for line in table.read_text().splitlines()]
    for line in lines[1:]:
        for column in (lines[0].index("image_path"), lines[0].index("mask_path")):
            line[column] = "own/" + "/".join(line[column].split("/")[-2:])
    table.write_text("\n".join(",".join(line) for line in lines) + "\n")

    def read() -> dict[str, np.ndarray]:
        masks = [site / "data" / line[lines[0].index("mask_path")] for line in lines[1:]]
        return {path.name: np.asarray(nibabel.load(path).dataobj) for path in masks}

    before = read()
    assert flip_masks(site) == len(before) == 4
    for name, labels in read().items():
        assert np.array_equal(labels, 1 - before[name])
        assert set(np.unique(labels)) == {0, 1}
    flip_masks(site)
    assert all(np.array_equal(labels, before[name]) for name, labels in read().items())
