"""The table says what was run, how far, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real import table
from benchmarks.real.plan import OURS, PEER, Job, Plan, jobs, row_names
from medsegdiff.errors import UserError


def _result(plan: Plan, job: Job, rows: int | None = None, **changes: object) -> dict[str, Any]:
    """What train.py writes of a job with its first `rows` rows scored."""
    row = {"dice": {"tumour": 0.5}, "mean_dice": 0.5, "patients": [0.5], "seconds_per_image": 0.01}
    facts = {"dataset": job.task.dataset, "held_out": job.held_out, "model": job.model, "targets": ["tumour"]}
    counts = dict.fromkeys(("train_patients", "train_slices", "test_patients", "test_slices"), 3)
    cost = {"parameters": 1000, "steps": 4, "steps_done": 4, "gflop_per_step": 1.0, "training_pflop": 4e-6}
    return {
        **facts,
        **counts,
        **cost,
        "fingerprint": "a",
        "stage": "done",
        "train_seconds": 2.0,
        "device": "CPU",
        "rows": dict.fromkeys(row_names(plan, job.model)[:rows], row),
        **changes,
    }


def test_each_row_says_how_far_it_came(small_plan: Plan) -> None:
    """Complete only where the plan counts as a result and the row was scored; the rest says why not."""
    job = next(jobs(small_plan))
    names = row_names(small_plan, OURS)
    found = {job.name: _result(small_plan, job, rows=2)}
    assert table.status(small_plan, job, found, names[1]) == "complete"
    assert table.status(small_plan, job, found, names[2]) == "not run (trained 4 of 4 steps)"
    assert table.status(replace(small_plan, complete=False), job, found, names[1]) == "partial: tiny, CPU, 4 steps"
    assert table.status(small_plan, job, {}, names[1]) == "not run"
    failed = {job.name: _result(small_plan, job, stage="failed", message="diverged")}
    assert table.status(small_plan, job, failed, names[1]) == "failed: diverged"


def test_a_mean_needs_every_site(small_plan: Plan) -> None:
    """A mean over some of the sites would pass for one over all of them."""
    both = {job.name: _result(small_plan, job) for job in jobs(small_plan)}
    lines = table.dice_table(small_plan, small_plan.tasks[0], both)
    assert lines[2] == "| MedSegDiff, auxiliary head only | 0.500 | 0.500 | 0.500 | 0.01 | complete |"
    assert len(lines) == 2 + len(row_names(small_plan, OURS)) + len(row_names(small_plan, PEER))
    one = {name: result for name, result in both.items() if "alder" in name}
    lines = table.dice_table(small_plan, small_plan.tasks[0], one)
    assert lines[2] == ("| MedSegDiff, auxiliary head only | 0.500 | - | - | 0.01 | alder: complete; elm: not run |")


def test_the_document_keeps_what_a_person_wrote(tmp_path: Path, small_plan: Plan) -> None:
    """Only the text between the marks changes, and writing twice changes nothing."""
    document = tmp_path / "results.md"
    document.write_text(f"# Title\n\n{table.BEGIN}\nold\n{table.END}\n\nafter\n")
    table.write_document({}, document)
    text = document.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| DynUNet | - | - | - | - | - | - | not run |" in text
    table.write_document({}, document)
    assert document.read_text() == text
    document.write_text("no marks")
    with pytest.raises(UserError, match="are missing"):
        table.write_document({}, document)
