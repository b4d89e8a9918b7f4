"""Train and score on real data, in pieces: start it, and start it again until it says that nothing is left.

    python -m benchmarks.real.pack --data DIR --out cache.safetensors            where the datasets lie
    python -m benchmarks.real.train --cache cache.safetensors --out runs/real --budget-seconds 540 --peer

A plan (plan.py) is a queue of jobs: dataset x held-out site x model, each with a fixed number of steps. One call works
through the queue until its budget is spent; the next call goes on where it stopped. `--peer` adds MONAI's DynUNet.
Without it nothing but torch, numpy, safetensors and this repository is imported.

What survives what, per job, in the folder `--out`:
    JOB.state.safetensors     weights, moments and weight average, written every minute and at the end of a piece;
                              up to 400 MB, removed when the job is done. A killed process goes on from it; on a CPU it
                              ends with the same bits, on a GPU within the noise of its kernels.
    JOB.json                  steps done, time, FLOP, and each row as it is scored; a few kilobytes.
    JOB.examples.safetensors  a few slices for pictures, under 1 MB. Real data: not for the repository.

The state is too large to travel between machines; the other two are small. So a job takes minutes, and on a machine
that lacks its state it starts anew, unless it is done: carry *.json and *.examples.safetensors over, and finished jobs
are not repeated. A job whose training diverges is recorded as failed, and the queue goes on.

Both models see the same slices in the same order with the same augmentation. MedSegDiff takes the plan's number of
steps; DynUNet as many as cost the same FLOP (convolutions and matrix products, forward and backward, counted).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.real.cache import PackedCase, PackedDataset, job_cases, read_cache
from benchmarks.real.learner import Learner
from benchmarks.real.ours import Ours, model_config, step_flop
from benchmarks.real.plan import OURS, PEER, PLANS, Job, Plan, find_plan, fingerprint, jobs
from benchmarks.real.score import answer, score, write_examples
from medsegdiff.data.batches import SliceBatches
from medsegdiff.devices import choose_device
from medsegdiff.ensemble import derive_seed
from medsegdiff.errors import UserError
from medsegdiff.files import sha256_of_file, write_atomic
from medsegdiff.weights import hash_weights, read_tensors

BLOCK = 50  # steps between two looks at the clock
SAVE_SECONDS = 60.0  # training between saved states

Result = dict[str, Any]


class Budget:
    """Seconds of this call; None: no end."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def spent(self) -> bool:
        """Asked after each piece of work, not before: every call gets one piece further, however small its budget."""
        return self._end is not None and time.monotonic() >= self._end


@dataclass(frozen=True)
class Run:
    """What all jobs of one call share."""

    plan: Plan
    cache: Mapping[str, PackedDataset]
    fingerprint: str
    out: Path
    device: torch.device
    budget: Budget


def work_through(run: Run, peer: bool) -> bool:
    """Go through the queue; whether all of it is done. Raises UserError where `out` belongs to another run."""
    for job in jobs(run.plan):
        if job.model == PEER and not peer:
            continue
        if not work(run, job):
            return False
    return True


def work(run: Run, job: Job) -> bool:
    """Take one job as far as the budget allows; whether it is done (or failed)."""
    result_path, state_path = run.out / f"{job.name}.json", run.out / f"{job.name}.state.safetensors"
    result = _earlier(result_path, run.fingerprint)
    if result.get("stage") in ("done", "failed"):
        state_path.unlink(missing_ok=True)  # a kill may have come between the last row and this
        return True
    if not state_path.exists():
        result = {}  # rows of a training that is lost would not belong to the new one
    dataset, train, test = job_cases(run.cache, run.plan, job)
    learner, facts = _learner(run, job, dataset, train)
    result |= {"fingerprint": run.fingerprint, **facts, **_counts(train, test), **_machine(run.device)}
    begin = _resume(run, learner, state_path)
    try:
        trained = _train(run, job, learner, result, state_path, begin)
    except UserError as error:
        print(f"{job.name}: failed: {error}", flush=True)
        _write(result_path, result | {"stage": "failed", "message": str(error)})
        state_path.unlink(missing_ok=True)
        return True
    if not trained or not _score(run, job, learner, result, dataset, test):
        return False
    state_path.unlink()
    return True


def _earlier(path: Path, identity: str) -> Result:
    if not path.exists():
        return {}
    result: Result = json.loads(path.read_text())
    if result["fingerprint"] != identity:
        raise UserError(
            f"{path}: belongs to a run with another plan or other data; nothing was changed. Choose another --out."
        )
    return result


def _learner(run: Run, job: Job, dataset: PackedDataset, train: list[PackedCase]) -> tuple[Learner, Result]:
    """A model at its first step, and what is to be said of it."""
    task, plan = job.task, run.plan
    seed = derive_seed(plan.seed, "real", task.dataset, job.held_out)  # of both models: the same slices
    batches = SliceBatches(train, dataset.scheme, task.training, seed)
    config = model_config(plan, task, dataset.channels, dataset.scheme)
    flop = step_flop(config, task)
    learner: Learner
    if job.model == OURS:
        steps, learner = task.steps, Ours(plan, task, config, batches, seed, run.device)
    else:
        from benchmarks.real import dynunet  # here alone: MONAI

        network = dynunet.make_network(plan, task, dataset.channels, dataset.scheme, seed)
        total, flop = flop * task.steps, dynunet.step_flop(network, task, dataset.channels, dataset.scheme)
        steps = max(1, round(total / flop))
        learner = dynunet.Peer(plan, task, network, batches, steps, run.device)
    facts = {"dataset": task.dataset, "held_out": job.held_out, "model": job.model, "plan": plan.name}
    return learner, facts | {
        "targets": dataset.scheme.targets,
        "parameters": learner.parameters,
        "steps": steps,
        "gflop_per_step": flop / 1e9,
        "training_pflop": steps * flop / 1e15,
    }


def _counts(train: list[PackedCase], test: list[PackedCase]) -> Result:
    return {
        f"{name}_{what}": number
        for name, cases in (("train", train), ("test", test))
        for what, number in (
            ("patients", len({case.case.patient_id for case in cases})),
            ("slices", sum(case.slices for case in cases)),
        )
    }


def _machine(device: torch.device) -> Result:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return {"device": name, "torch": str(torch.__version__)}


def _resume(run: Run, learner: Learner, state_path: Path) -> tuple[int, float, float]:
    """Go on from a saved state, if there is one: steps done, seconds of training, last loss."""
    if not state_path.exists():
        return 0, 0.0, float("nan")
    tensors, metadata = read_tensors(state_path)
    if metadata.get("fingerprint") != run.fingerprint:
        raise UserError(f"{state_path}: belongs to a run with another plan or other data. Choose another --out.")
    return learner.restore(tensors, metadata), float(metadata["seconds"]), float(metadata["loss"])


def _train(
    run: Run, job: Job, learner: Learner, result: Result, state_path: Path, begin: tuple[int, float, float]
) -> bool:
    """Train until the job's steps or the budget's end; whether the steps are done.

    Raises:
        UserError: the training diverged, or a single slice does not fit into memory.
    """
    done, seconds, loss = begin
    saved_at = seconds
    while done < result["steps"]:
        last = min(done + BLOCK, result["steps"])
        begun = time.perf_counter()
        loss = learner.run(done, last)
        seconds += time.perf_counter() - begun
        done = last
        finished = done == result["steps"]
        if finished or run.budget.spent or seconds - saved_at >= SAVE_SECONDS:
            learner.save(state_path, done, fingerprint=run.fingerprint, seconds=repr(seconds), loss=repr(loss))
            saved_at = seconds
            print(f"{job.name}: {done} of {result['steps']} steps, {1e3 * seconds / done:.0f} ms each, loss {loss:.4f}")
            sys.stdout.flush()
            result |= {"stage": "training", "steps_done": done, "train_seconds": seconds, "loss": loss}
            _write(state_path.with_name(f"{job.name}.json"), result)
        if run.budget.spent:
            return False
    return True


def _score(
    run: Run, job: Job, learner: Learner, result: Result, dataset: PackedDataset, test: list[PackedCase]
) -> bool:
    """Score the rows that are not scored yet, one by one; whether all are."""
    path = run.out / f"{job.name}.json"
    rows: Result = result.setdefault("rows", {})
    result |= {"stage": "scoring", "weights_sha256": hash_weights(learner.weights())}
    ways = learner.rows()
    seed = derive_seed(run.plan.seed, "sample", job.task.dataset, job.held_out)
    for name, predict in ways.items():
        if name in rows:
            continue
        answers = answer(test, dataset.scheme, predict, seed, run.device)
        rows[name] = score(test, dataset.scheme, answers)
        print(
            f"{job.name}, {name}: Dice {rows[name]['mean_dice']:.3f}, {rows[name]['seconds_per_image']:.4f} s an image",
            flush=True,
        )
        if name == list(ways)[-1]:
            write_examples(run.out / f"{job.name}.examples.safetensors", test, dataset.scheme, answers)
            result["stage"] = "done"
        _write(path, result)
        if run.budget.spent and result["stage"] != "done":
            return False
    return True


def _write(path: Path, result: Result) -> None:
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())


def main(arguments: list[str] | None = None) -> int:
    """One piece of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="made by benchmarks.real.pack with the same plan")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run; started before: goes on")
    parser.add_argument("--plan", default="full", help=f"one of {', '.join(PLANS)}")
    parser.add_argument("--budget-seconds", type=float, default=None, help="stop after so long; default: when done")
    parser.add_argument("--peer", action="store_true", help="DynUNet beside it (needs MONAI)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; bits depend on it")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    try:
        budget, plan = Budget(given.budget_seconds), find_plan(given.plan)
        device = choose_device(given.device)
        cache = read_cache(given.cache)
        run = Run(plan, cache, fingerprint(plan, sha256_of_file(given.cache)), given.out, device, budget)
        finished = work_through(run, given.peer)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("nothing is left to do" if finished else "the budget is spent; the same command goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
