"""Training in pieces ends where one piece ends, costs both models the same, and needs three packages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.real import train
from benchmarks.real.cache import read_cache, split_cases
from benchmarks.real.ours import Ours
from benchmarks.real.plan import PLANS, Plan, jobs, row_names
from benchmarks.real.score import answer, score
from medsegdiff.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

# As on a bare machine: whatever is neither of the standard library nor one of the three, or what torch itself asks
# for, is not there.
BARE = """
import sys
ALLOWED = {"torch", "numpy", "safetensors", "medsegdiff", "benchmarks", *sys.stdlib_module_names}
ALLOWED |= {"torchgen", "functorch", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec"}
ALLOWED |= {"typing_extensions", "setuptools", "triton", "nvidia", "cuda"}

class Bare:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        there = top in ALLOWED or top.startswith("_sysconfigdata")
        return self.finder.find_spec(name, path, target) if there else None

sys.meta_path[:] = [Bare(finder) for finder in sys.meta_path]
"""


@pytest.fixture
def piece(small_plan: Plan, small_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Call to work on a run folder: one piece of it, with a budget in seconds or until it is finished."""
    monkeypatch.setitem(PLANS, "small", small_plan)
    monkeypatch.setattr(train, "BLOCK", 1)

    def work(out: Path, budget: float | None = None, peer: bool = True) -> int:
        given = ["--plan", "small", "--cache", str(small_cache), "--out", str(out), "--device", "cpu"]
        given += [] if budget is None else ["--budget-seconds", str(budget)]
        return train.main(given + (["--peer"] if peer else []))

    return work


def _results(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}


def _lasting(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what depends on the clock."""
    rows = {name: row["dice"] for name, row in result["rows"].items()}
    return {key: result[key] for key in ("weights_sha256", "steps", "steps_done", "stage", "loss")} | {"rows": rows}


def _assert_equal_compute(ours: dict[str, Any], peer: dict[str, Any]) -> None:
    """The peer's steps bring its FLOP to ours within half of one of its steps, on the same slices."""
    assert abs(ours["training_pflop"] - peer["training_pflop"]) * 1e6 <= peer["gflop_per_step"] / 2 + 1e-9
    assert ours["training_pflop"] * 1e6 == pytest.approx(ours["gflop_per_step"] * ours["steps"])
    assert ours["train_slices"] == peer["train_slices"]


@pytest.mark.slow
def test_pieces_end_with_the_bits_of_one_run(
    piece: Callable[..., int], small_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every step and every row, both models end with the same weights and scores as in one go."""
    plan = replace(small_plan, tasks=(replace(small_plan.tasks[0], leave_out=("alder",)),))
    monkeypatch.setitem(PLANS, "small", plan)
    assert piece(tmp_path / "one") == 0
    whole = _results(tmp_path / "one")
    assert list(whole) == sorted(job.name for job in jobs(plan))
    _assert_equal_compute(whole["source-alder-medsegdiff"], whole["source-alder-dynunet"])
    steps = sum(int(result["steps"]) for result in whole.values())
    for _ in range(steps + sum(len(row_names(plan, job.model)) for job in jobs(plan))):
        piece(tmp_path / "many", budget=0)
    pieces = _results(tmp_path / "many")
    assert {name: _lasting(result) for name, result in pieces.items()} == {
        name: _lasting(result) for name, result in whole.items()
    }
    for job in jobs(plan):
        assert list(whole[job.name]["rows"]) == row_names(small_plan, job.model)
    assert not list((tmp_path / "many").glob("*.state.safetensors"))
    assert all(path.stat().st_size < 1_000_000 for path in (tmp_path / "many").glob("*.examples.safetensors"))


@pytest.mark.slow
def test_a_job_whose_state_is_lost_starts_anew(piece: Callable[..., int], tmp_path: Path) -> None:
    """Rows of a training that is gone are not kept beside those of the next; finished jobs are not repeated."""
    name = "source-alder-medsegdiff"
    for _ in range(4):  # 3 steps and a row
        piece(tmp_path, budget=0, peer=False)
    before = _results(tmp_path)[name]
    assert before["stage"] == "scoring"
    (tmp_path / f"{name}.state.safetensors").unlink()
    piece(tmp_path, budget=0, peer=False)
    assert _results(tmp_path)[name].get("rows", {}) == {}
    assert piece(tmp_path, peer=False) == 0
    done = _results(tmp_path)[name]
    assert done["stage"] == "done"
    assert piece(tmp_path, peer=False) == 0
    assert _results(tmp_path)[name] == done


def test_a_folder_of_another_run_is_left_alone(
    piece: Callable[..., int], small_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of one plan are never continued with another."""
    piece(tmp_path, budget=0)
    before = _results(tmp_path)
    monkeypatch.setitem(PLANS, "small", replace(small_plan, seed=7))
    assert piece(tmp_path) == 2
    assert _results(tmp_path) == before


def test_a_diverged_job_is_recorded_and_the_queue_goes_on(
    piece: Callable[..., int], small_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody watches a GPU at work: one failure must not cost the rest of its time."""
    run = Ours.run

    def diverge(self: Ours, first: int, last: int) -> float:
        if not (tmp_path / "source-alder-medsegdiff.json").exists():
            raise UserError("training diverged: a test.")
        return run(self, first, last)

    monkeypatch.setattr(Ours, "run", diverge)
    assert piece(tmp_path, peer=False) == 0
    stages = {name: result["stage"] for name, result in _results(tmp_path).items()}
    assert stages == {"source-alder-medsegdiff": "failed", "source-elm-medsegdiff": "done"}


def test_dice_pools_a_patients_slices(small_cache: Path) -> None:
    """The row's Dice is 2 |A and B| / (|A| + |B|) over all slices of a patient, then a mean over patients."""
    dataset = read_cache(small_cache)["source"]
    _, cases = split_cases(dataset, "alder")
    generator = torch.Generator().manual_seed(3)
    truth = torch.cat([dataset.scheme.truth(case.tensor("labels")[0]) for case in cases])
    guess = truth ^ (torch.rand(truth.shape, generator=generator) < 0.05)

    def predict(images: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        start = predict.done  # type: ignore[attr-defined]
        predict.done += len(images)  # type: ignore[attr-defined]
        assert len(seeds) == len(images)
        mean = guess[start : start + len(images)].float() * 2 - 1
        return mean, torch.zeros_like(mean)

    predict.done = 0  # type: ignore[attr-defined]
    row = score(cases, dataset.scheme, answer(cases, dataset.scheme, predict, 0, torch.device("cpu")))
    owners = [case.case.patient_id for case in cases for _ in range(case.slices)]
    expected = []
    for patient in dict.fromkeys(owners):
        mine = [number for number, owner in enumerate(owners) if owner == patient]
        both, found, true = (int(m[mine].sum()) for m in (guess & truth, guess, truth))
        expected.append(2 * both / (found + true))
    assert row["mean_dice"] == pytest.approx(sum(expected) / len(expected), abs=1e-12)
    by_slice = [
        2 * float((g & t).sum()) / max(1.0, float(g.sum() + t.sum())) for g, t in zip(guess, truth, strict=True)
    ]
    assert abs(row["mean_dice"] - sum(by_slice) / len(by_slice)) > 1e-3  # a mean over slices is another number


def _script(small_cache: Path, out: Path, steps: int = 3, bare: bool = True) -> list[str]:
    body = f"""
from dataclasses import replace
from benchmarks.real import train
from benchmarks.real.plan import PLANS, Plan, Task
from medsegdiff.config import TrainingConfig
task = Task("source", 16, {steps}, TrainingConfig(batch_size=2, foreground_fraction=0.5), leave_out=("alder",))
PLANS["small"] = Plan("small", "a test", "tiny", (task,), 8, 32, True, ((1, 1), (2, 3)), ema_decay=0.5)
train.BLOCK, train.SAVE_SECONDS = 2, 0.0
sys.exit(train.main(["--plan", "small", "--cache", {str(small_cache)!r}, "--out", {str(out)!r}, "--device", "cpu"]))
"""
    return [sys.executable, "-c", (BARE if bare else "import sys\n") + body]


@pytest.mark.slow
def test_the_core_path_needs_three_packages(small_cache: Path, tmp_path: Path) -> None:
    """Three steps and their scores on a machine that has torch, numpy and safetensors and nothing else."""
    done = subprocess.run(_script(small_cache, tmp_path), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = _results(tmp_path).values()
    assert result["stage"] == "done"


@pytest.mark.slow
def test_the_peer_is_refused_on_a_bare_machine(small_cache: Path, tmp_path: Path) -> None:
    """The bare machine of the test above is bare indeed: asking for MONAI there fails."""
    command = _script(small_cache, tmp_path)
    command[-1] = command[-1].replace('"--device"', '"--peer", "--device"')
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "No module named 'monai'" in done.stderr


@pytest.mark.slow
def test_a_kill_changes_no_bit(small_cache: Path, tmp_path: Path) -> None:
    """Killed in the middle (SIGKILL) and started again, a job ends with the weights of an unbroken one."""
    subprocess.run(_script(small_cache, tmp_path / "whole", 16, bare=False), cwd=ROOT, check=True)
    command = _script(small_cache, tmp_path / "torn", 16, bare=False)
    process = subprocess.Popen(command, cwd=ROOT)
    begun = tmp_path / "torn" / "source-alder-medsegdiff.json"
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert _results(tmp_path / "torn")["source-alder-medsegdiff"]["stage"] == "training"
    subprocess.run(command, cwd=ROOT, check=True)
    whole, torn = (_results(tmp_path / name)["source-alder-medsegdiff"] for name in ("whole", "torn"))
    assert _lasting(whole) == _lasting(torn)
