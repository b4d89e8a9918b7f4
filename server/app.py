"""The Flower ServerApp: reads the run folder it is given and carries its plan out."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from medsegdiff.errors import UserError
from medsegdiff.strict import read_config
from medsegdiff.weights import hash_weights, save_model
from server.canary import carry_out_canary
from server.checkpoints import CheckpointStore
from server.config import RunPlan
from server.exchange import RunStopped
from server.initial import first_weights
from server.journal import Journal
from server.membership import Membership
from server.rounds import STOP
from server.strategy import FederatedAveraging

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or go on with, the plan in the run folder (run configuration `run-folder`, or MEDSEGFED_RUN)."""
    folder = str(context.run_config.get("run-folder") or os.environ.get("MEDSEGFED_RUN") or "")
    if not folder:
        raise UserError("no run folder is named: set run-folder in the run configuration, or MEDSEGFED_RUN.")
    run_federation(grid, Path(folder))


def run_federation(grid: Grid, folder: Path) -> None:
    """Carry out `folder`/run.yaml over `grid`, from where the folder stands; ends with `folder`/model.safetensors.

    In a real federation (MEDSEGFED_FEDERATION) every outcome is told by the journal's last event: finished, stopped or
    failed, the last with the reason. A run that ended so is not started again by itself. A disk that refuses is no
    outcome: the run is interrupted, and goes on by itself once there is space.
    """
    plan = read_config(folder / "run.yaml", RunPlan)
    journal, membership = Journal(folder / "journal.jsonl"), Membership.here()
    if membership is None:
        _carry_out(grid, folder, plan, journal, None)
        return
    try:
        journal.append("session")
        model_hash = _carry_out(grid, folder, plan, journal, membership)
    except RunStopped:
        journal.append("stopped")
        membership.note("stopped", run=plan.run_id)
        return
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            with contextlib.suppress(UserError):
                journal.append("interrupted", reason=str(error))
            raise
        journal.append("failed", reason=str(error))
        membership.note("failed", run=plan.run_id)
        raise
    journal.append("finished", model_hash=model_hash)
    membership.note("finished", run=plan.run_id, model=model_hash)


def _carry_out(grid: Grid, folder: Path, plan: RunPlan, journal: Journal, membership: Membership | None) -> str:
    if plan.canary:
        return carry_out_canary(grid, folder, plan, journal, membership, (folder / STOP).exists)
    store = CheckpointStore(folder / "checkpoints")
    strategy = FederatedAveraging(plan, store, journal, membership, (folder / STOP).exists)
    strategy.summary()
    if store.latest(plan.run_id) is None:
        strategy.begin(first_weights(plan, folder))
    strategy.start(grid, ArrayRecord(), num_rounds=plan.task.rounds, timeout=plan.deadline_seconds)
    assert strategy.chosen is not None
    save_model(folder / "model.safetensors", plan.task.card, strategy.chosen.released)
    return hash_weights(strategy.chosen.released)
