"""Tables and plots of docs/results.md, and pictures beside a run.

    python -m benchmarks.real.table --plan full --run runs/real      collect a run, then write docs/results.md
    python -m benchmarks.real.table                                  write docs/results.md from what was collected

Collected numbers live in benchmarks/results/real_PLAN.json and go into the repository. Pictures show real patients:
they stay in the run's folder, under pictures/. What was not run stands in the tables as such.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.real.plan import OURS, PEER, PLANS, Job, Plan, Task, find_plan, jobs, row_names
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
BEGIN, END = "<!-- tables: made by benchmarks.real.table -->", "<!-- end of tables -->"
NOT_RUN = "not run"

Results = Mapping[str, dict[str, Any]]  # job name -> what train.py wrote


def collect(plan: Plan, run: Path) -> Results:
    """Every job's JSON of a run. Raises UserError when there is none, or when jobs come from different runs."""
    found = {}
    for job in jobs(plan):
        path = run / f"{job.name}.json"
        if path.is_file():
            found[job.name] = json.loads(path.read_text())
    if not found:
        raise UserError(f"{run}: holds no result of plan {plan.name}; nothing was written. Check the folder.")
    if len({result["fingerprint"] for result in found.values()}) > 1:
        raise UserError(f"{run}: its results come from different plans or data; they must not share a table.")
    return found


def status(plan: Plan, job: Job, results: Results, row: str) -> str:
    """One row's mark: complete, partial (why), failed, or not run."""
    result = results.get(job.name)
    if result is None:
        return NOT_RUN
    if result["stage"] == "failed":
        return f"failed: {result['message']}"
    if row not in result.get("rows", {}):
        return f"{NOT_RUN} (trained {result['steps_done']} of {result['steps']} steps)"
    done = f"{plan.preset}, {result['device']}, {result['steps_done']} steps"
    return "complete" if plan.complete else f"partial: {done}"


def dice_table(plan: Plan, task: Task, results: Results) -> list[str]:
    """Dice by row: a column for each site left out, or for each target; mean, seconds an image and status."""
    splits = task.leave_out or (None,)
    targets = _targets(task, results)
    columns = [*task.leave_out] if task.leave_out else [*targets]
    lines = [
        f"| model, row | {' | '.join(columns)} | mean | s / image | status |",
        f"|---|{'---|' * len(columns)}---|---|---|",
    ]
    for model in (OURS, PEER):
        wanted = [Job(task, held_out, model) for held_out in splits]
        for row in row_names(plan, model):
            lines.append(_dice_row(plan, wanted, results, row, targets))
    return lines


def _dice_row(plan: Plan, wanted: Sequence[Job], results: Results, row: str, targets: Sequence[str]) -> str:
    found = [results.get(job.name, {}).get("rows", {}).get(row) for job in wanted]
    if wanted[0].held_out is None:
        cells = [_number(found[0] and found[0]["dice"][target]) for target in targets]
    else:
        cells = [_number(value and value["mean_dice"]) for value in found]
    scored = [value for value in found if value]
    mean = statistics.fmean(value["mean_dice"] for value in scored) if len(scored) == len(wanted) else None
    seconds = f"{statistics.median(v['seconds_per_image'] for v in scored):.3g}" if scored else "-"
    marks: dict[str, list[str]] = {}
    for job in wanted:
        marks.setdefault(status(plan, job, results, row), []).append(job.held_out or "")
    mark = next(iter(marks)) if len(marks) == 1 else "; ".join(f"{', '.join(s)}: {text}" for text, s in marks.items())
    name = row if wanted[0].model == PEER else f"MedSegDiff, {row}"
    return f"| {name} | {' | '.join(cells)} | {_number(mean)} | {seconds} | {mark} |"


def _targets(task: Task, results: Results) -> list[str]:
    for result in results.values():
        if result["dataset"] == task.dataset:
            return list(result["targets"])
    return ["each target"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def training_table(plan: Plan, results: Results) -> list[str]:
    """What each job cost."""
    lines = [
        "| job | parameters, M | train patients / slices | test patients / slices | steps | GFLOP a step | TFLOP | "
        "training, s | device |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for job in jobs(plan):
        r = results.get(job.name)
        if r is None:
            lines.append(f"| {job.name} | {' | '.join(['-'] * 7)} | {NOT_RUN} |")
            continue
        steps = f"{r.get('steps_done', 0)} of {r['steps']}"
        lines.append(
            f"| {job.name} | {r['parameters'] / 1e6:.2f} | {r['train_patients']} / {r['train_slices']} | "
            f"{r['test_patients']} / {r['test_slices']} | {steps} | {r['gflop_per_step']:.1f} | "
            f"{1e3 * r['training_pflop']:.3g} | {r.get('train_seconds', 0):.0f} | {r['device']} |"
        )
    return lines


def sections(plan: Plan, results: Results, plots: Mapping[str, str]) -> list[str]:
    """A plan's part of the document. `plots`: dataset -> file name beside the document."""
    lines = [f"## Plan `{plan.name}`: {plan.what}", ""]
    for task in plan.tasks:
        lines += [f"### {task.dataset}, {task.image_size} px", "", *dice_table(plan, task, results), ""]
        if task.dataset in plots:
            lines += [f"![Dice by sampling steps, {task.dataset}]({plots[task.dataset]})", ""]
    return [*lines, "### What training took", "", *training_table(plan, results), ""]


def plot(plan: Plan, task: Task, results: Results, path: Path) -> bool:
    """Mean Dice over the held-out sites against sampling steps and members; False where no site is finished."""
    from matplotlib.figure import Figure

    finished = [
        (ours, results[peer]["rows"])
        for held_out in task.leave_out or (None,)
        if (ours := results.get(Job(task, held_out, OURS).name, {})).get("stage") == "done"
        and results.get(peer := Job(task, held_out, PEER).name, {}).get("stage") == "done"
    ]
    if not finished:
        return False

    def mean(side: int, row: str) -> float:
        rows = [(ours["rows"], peer)[side][row]["mean_dice"] for ours, peer in finished]
        return statistics.fmean(rows)

    names = row_names(plan, OURS)
    labels = [*(f"MedSegDiff, {name}" for name in names), *row_names(plan, PEER)]
    values = [mean(0, name) for name in names] + [mean(1, name) for name in row_names(plan, PEER)]
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(labels, values, color=["#4477aa"] * len(names) + ["#cc6677"])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"Dice, mean over {len(finished)} held-out site(s)" if task.leave_out else "Dice")
    kind = "" if plan.complete else " - partial: shows that the script works, not how good either model is"
    axes.set_title(f"{task.dataset}, {task.image_size} px{kind}", fontsize=9)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    return True


def draw_pictures(plan: Plan, run: Path) -> list[Path]:
    """Image, truth, both models' masks and our entropy of a few test slices of each job, as PNGs beside the run."""
    from matplotlib.figure import Figure

    drawn = []
    for job in jobs(plan):
        path = run / f"{job.name}.examples.safetensors"
        if job.model == PEER or not path.is_file():
            continue
        ours = load_file(path)
        other = run / f"{Job(job.task, job.held_out, PEER).name}.examples.safetensors"
        peer = load_file(other)["mask"] if other.is_file() else None
        count = len(ours["image"])
        figure = Figure(figsize=(10, 2.1 * count), layout="constrained")
        grid = figure.subplots(count, 5, squeeze=False)
        for number in range(count):
            image = ours["image"][number].float().mean(dim=0).numpy()
            maps = [None, ours["truth"][number], ours["mask"][number], None if peer is None else peer[number]]
            titles = ["image", "truth", "MedSegDiff", "DynUNet" if peer is not None else f"DynUNet: {NOT_RUN}"]
            for axes, title, masks in zip(grid[number], titles, maps, strict=False):
                axes.imshow(image, cmap="gray")
                for target, mask in enumerate(() if masks is None else masks):
                    if mask.any():
                        axes.contour(mask.numpy(), levels=[0.5], colors=f"C{target}", linewidths=1)
                axes.set_title(title, fontsize=8)
            grid[number][4].imshow(ours["entropy"][number].numpy() / 255, cmap="magma", vmin=0, vmax=1)
            grid[number][4].set_title("entropy, bits", fontsize=8)
        for axes in grid.flat:
            axes.set_axis_off()
        drawn.append(run / "pictures" / f"{job.task.dataset}-{job.held_out or 'split'}.png")
        drawn[-1].parent.mkdir(exist_ok=True)
        figure.savefig(drawn[-1], dpi=100)
    return drawn


def write_document(results: Mapping[str, Results], document: Path) -> None:
    """Put the tables of all plans between the document's two marks. Raises UserError where these are missing."""
    text = document.read_text() if document.is_file() else ""
    if BEGIN not in text or END not in text:
        raise UserError(f"{document}: the lines '{BEGIN}' and '{END}' are missing; nothing was written. Add them.")
    lines = []
    for plan in PLANS.values():
        plots = {}
        for task in plan.tasks:
            name = f"results-{plan.name}-{task.dataset}.png"
            if plot(plan, task, results.get(plan.name, {}), document.with_name(name)):
                plots[task.dataset] = name
        lines += sections(plan, results.get(plan.name, {}), plots)
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    write_atomic(document, "\n".join([before + BEGIN, "", *lines, END + after]).encode())


def main() -> int:
    """Collect a run if one is given; write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="full", help=f"of --run; one of {', '.join(PLANS)}")
    parser.add_argument("--run", type=Path, default=None, help="a folder that benchmarks.real.train wrote")
    given = parser.parse_args()
    try:
        if given.run is not None:
            plan = find_plan(given.plan)
            found = json.dumps(collect(plan, given.run), indent=1)
            write_atomic(RESULTS / f"real_{plan.name}.json", (found + "\n").encode())
            for path in draw_pictures(plan, given.run):
                print(f"{path} (real data: stays out of the repository)")
        kept = {name: RESULTS / f"real_{name}.json" for name in PLANS}
        results = {name: json.loads(path.read_text()) for name, path in kept.items() if path.is_file()}
        write_document(results, DOCS / "results.md")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(DOCS / "results.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
