"""The Flower ServerApp: reads the run folder it is given and carries its plan out."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from client.contract import arrays_to_wire
from medsegdiff.errors import UserError
from medsegdiff.strict import read_config
from medsegdiff.weights import initial_weights, save_model
from server.checkpoints import CheckpointStore
from server.config import RunPlan
from server.journal import Journal
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
    """Carry out `folder`/run.yaml over `grid`, from where the folder stands; ends with `folder`/model.safetensors."""
    plan = read_config(folder / "run.yaml", RunPlan)
    strategy = FederatedAveraging(plan, CheckpointStore(folder / "checkpoints"), Journal(folder / "journal.jsonl"))
    strategy.summary()
    initial = arrays_to_wire(initial_weights(plan.task.model, plan.task.seed))
    strategy.start(grid, initial, num_rounds=plan.task.rounds, timeout=plan.deadline_seconds)
    save_model(folder / "model.safetensors", plan.task.card, strategy.weights)
