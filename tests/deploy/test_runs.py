"""Runs as a coordinator asks for them: the plan, the queue, stopping, going on."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch

from deploy.runs import (
    initial_file,
    next_run,
    queue_run,
    read_queued,
    resolve_run,
    run_of,
    stop_run,
    wanted,
    warning_of,
)
from medsegdiff.errors import UserError
from medsegdiff.strict import read_config
from medsegdiff.weights import hash_weights, initial_weights, save_model
from server.config import RunPlan
from server.initial import first_weights
from server.journal import Journal

MEMBERS = {"alder": 10, "birch": 7}
RUN = """\
name: first
dataset: msd_hippocampus
targets: {hippocampus: [anterior, posterior]}
run: {rounds: 3, local_steps: 2, model: {preset: tiny, image_size: 32}}
"""


def written(tmp_path: Path, text: str = RUN) -> Path:
    path = tmp_path / "RUN.yaml"
    path.write_text(text)
    return path


def queued(tmp_path: Path, name: str = "first") -> Path:
    plan = resolve_run(written(tmp_path, RUN.replace("first", name)), MEMBERS)
    return queue_run(tmp_path / "runs", plan, "day")


def test_the_plan_names_members_data_and_engine(tmp_path) -> None:
    """All admitted sites with their enrolled patients, the shipped description with other targets."""
    plan = resolve_run(written(tmp_path), MEMBERS)
    assert (plan.roster, plan.engine, plan.required) == (MEMBERS, "network", 2)
    assert plan.task.dataset.targets == {"hippocampus": ("anterior", "posterior")}
    assert plan.run_id.startswith("first-")


def test_a_description_beside_the_file_and_a_choice_of_sites(tmp_path) -> None:
    """`dataset` may be a file, `sites` some of the members."""
    plan = resolve_run(written(tmp_path), MEMBERS)
    (tmp_path / "own.yaml").write_text("name: own\nmodality: MR\nchannels: [T1]\nlabels: {background: 0, lesion: 1}\n")
    own = resolve_run(written(tmp_path, RUN.replace("msd_hippocampus", "own.yaml").replace(
        "targets: {hippocampus: [anterior, posterior]}\n", "sites: [birch]\n")), MEMBERS)  # fmt: skip
    assert (own.roster, own.task.dataset.channels) == ({"birch": 7}, ("T1",))
    assert own.run_id != plan.run_id


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: first", "name: ../first", "1 to 48 letters"),
        ("msd_hippocampus", "nowhere", "'nowhere' is not known"),
        ("msd_hippocampus", "no.yaml", "RUN.yaml: dataset: no file"),
        ("run: {", "sites: [elm]\nrun: {", "elm not admitted; the admitted sites are alder, birch"),
        ("run: {", "sites: [birch, birch]\nrun: {", "stands twice"),
        ("rounds: 3", "rounds: 0", "rounds must lie in"),
        ("rounds: 3", "rounds: 3, quorum: 5", "quorum must lie in 1..2"),
        ("run: {", "ruhn: 1\nrun: {", "did you mean 'run'"),
        ("posterior", "liver", "world.targets"),
    ],
)
def test_a_wrong_run_file_is_answered_by_its_fault(tmp_path, old, new, message) -> None:
    """Each before anything is written."""
    with pytest.raises(UserError, match=re.escape(message)):
        resolve_run(written(tmp_path, RUN.replace(old, new)), MEMBERS)
    assert not (tmp_path / "runs").exists()


def test_without_members_nobody_could_train(tmp_path) -> None:
    """Said, with what to do."""
    with pytest.raises(UserError, match=r"no site is admitted yet.*medsegfed admit"):
        resolve_run(written(tmp_path), {})


def test_the_queue_is_worked_off_in_order(tmp_path) -> None:
    """First asked, first carried out; the next one once the first has ended."""
    first = queued(tmp_path)
    time.sleep(0.01)
    second = queued(tmp_path, "second")
    runs = tmp_path / "runs"
    assert next_run(runs) == first
    Journal(first / "journal.jsonl").append("session")
    assert next_run(runs) == first
    Journal(first / "journal.jsonl").append("finished", model_hash="a")
    assert next_run(runs) == second
    assert not wanted(first)


@pytest.mark.parametrize("end", ["stopped", "failed"])
def test_a_run_that_ended_early_goes_on_when_it_is_asked_for_again(tmp_path, end) -> None:
    """The same file, the same folder, the same plan; a finished run does not go on."""
    folder = queued(tmp_path)
    before = (folder / "run.yaml").read_bytes()
    Journal(folder / "journal.jsonl").append(end)
    assert next_run(tmp_path / "runs") is None
    assert queued(tmp_path) == folder
    assert next_run(tmp_path / "runs") == folder
    assert (folder / "run.yaml").read_bytes() == before
    Journal(folder / "journal.jsonl").append("finished", model_hash="a")
    with pytest.raises(UserError, match="has finished"):
        queued(tmp_path)


def test_another_plan_under_the_same_name_is_refused(tmp_path) -> None:
    """The sites approved the first one under that name."""
    folder = queued(tmp_path)
    before = (folder / "run.yaml").read_bytes()
    with pytest.raises(UserError, match="another plan"):
        queue_run(
            tmp_path / "runs", resolve_run(written(tmp_path, RUN.replace("rounds: 3", "rounds: 4")), MEMBERS), "x"
        )
    assert (folder / "run.yaml").read_bytes() == before


def test_the_quorum_may_change_while_a_run_rests(tmp_path) -> None:
    """The sites approved the task, not the patience: the same run goes on; while it is under way it does not change."""
    folder = queued(tmp_path)
    other = resolve_run(written(tmp_path, RUN.replace("rounds: 3", "rounds: 3, quorum: 1")), MEMBERS)
    with pytest.raises(UserError, match="under way; stop it"):
        queue_run(tmp_path / "runs", other, "day")
    Journal(folder / "journal.jsonl").append("failed")
    assert queue_run(tmp_path / "runs", other, "day") == folder
    assert read_config(folder / "run.yaml", RunPlan).required == 1


def test_a_damaged_journal_holds_up_no_other_run(tmp_path) -> None:
    """The queue passes it over."""
    first = queued(tmp_path)
    time.sleep(0.01)
    second = queued(tmp_path, "second")
    (first / "journal.jsonl").write_text("not a journal\n{}\n")
    assert next_run(tmp_path / "runs") == second
    stop_run(first, "day")
    assert (first / "stop.json").exists(), "its ServerApp, if one lives, can be ended all the same"


def test_a_stop_is_for_a_run_under_way(tmp_path) -> None:
    """Written for the ServerApp to find; taken back when the run is asked for again; refused where nothing runs."""
    folder = queued(tmp_path)
    stop_run(folder, "day")
    assert json.loads((folder / "stop.json").read_text())["by"] == "day"
    assert wanted(folder), "it has to be started once more to say that it stopped"
    Journal(folder / "journal.jsonl").append("stopped")
    with pytest.raises(UserError, match="is stopped"):
        stop_run(folder, "day")
    queued(tmp_path)
    assert not (folder / "stop.json").exists()
    with pytest.raises(UserError, match="no such run"):
        stop_run(tmp_path / "runs" / "other", "day")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"events": "0", "time": 1.0}', '{"time": 1.0}'])
def test_a_damaged_request_asks_for_nothing(tmp_path, text) -> None:
    """A torn queued.json is no run; asking again mends it."""
    folder = queued(tmp_path)
    (folder / "queued.json").write_text(text)
    assert read_queued(folder) is None
    assert next_run(tmp_path / "runs") is None
    queued(tmp_path)
    assert next_run(tmp_path / "runs") == folder


def test_which_run_is_meant(tmp_path) -> None:
    """By name; without one the run at hand, else the newest; a name is no path."""
    with pytest.raises(UserError, match="no run yet"):
        run_of(tmp_path / "runs", None)
    first = queued(tmp_path)
    second = queued(tmp_path, "second")
    assert run_of(tmp_path / "runs", None) == first
    assert run_of(tmp_path / "runs", "second") == second
    for name in ("third", "../runs/first"):
        with pytest.raises(UserError, match="the runs are: first, second"):
            run_of(tmp_path / "runs", name)
    assert read_config(first / "run.yaml", RunPlan).engine == "network"


def test_a_run_starts_from_the_model_that_it_names(tmp_path) -> None:
    """Looked at when the run is asked for, copied into its folder, part of its identity; a wrong one starts nothing."""
    fresh = resolve_run(written(tmp_path), MEMBERS)
    weights = initial_weights(fresh.task.model, 7)
    save_model(tmp_path / "public.safetensors", fresh.task.card, weights)
    path = written(tmp_path, RUN.replace("run: {", "run: {initial: public.safetensors, "))
    plan = resolve_run(path, MEMBERS)
    assert plan.initial == hash_weights(weights)
    assert plan.run_id != fresh.run_id
    folder = queue_run(tmp_path / "runs", plan, "x", initial_file(path))
    found = first_weights(plan, folder)
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    (tmp_path / "public.safetensors").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"public\.safetensors"):
        resolve_run(path, MEMBERS)


def test_a_small_correction_of_fresh_weights_is_warned_of(tmp_path) -> None:
    """It would spend a budget for nothing; no other run is spoken of."""
    private = RUN.replace("run: {", "run: {privacy: {train: TRAIN}, initial: MODEL, ")

    def warned(train: str, model: str) -> bool:
        text = private.replace("TRAIN", train).replace("MODEL", model)
        return warning_of(resolve_run(written(tmp_path, text), MEMBERS)) is not None

    plan = resolve_run(written(tmp_path), MEMBERS)
    assert warning_of(plan) is None
    save_model(tmp_path / "public.safetensors", plan.task.card, initial_weights(plan.task.model, 7))
    found = {
        (train, model): warned(train, model)
        for train in ("low_rank", "all")
        for model in ("null", "public.safetensors")
    }
    assert [key for key, said in found.items() if said] == [("low_rank", "null")]
