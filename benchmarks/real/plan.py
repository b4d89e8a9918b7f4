"""What is trained and scored: plans, their jobs, and the rows of the result table.

A plan is fixed in code, so that a result names all it was made with; the hash of a plan and its data tells pieces of
one run from pieces of another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from medsegdiff.config import AugmentConfig, TrainingConfig
from medsegdiff.errors import UserError
from medsegdiff.strict import Strict, canonical_json

OURS, PEER = "medsegdiff", "dynunet"
AUXILIARY_ROW = "auxiliary head only"


@dataclass(frozen=True)
class Task(Strict):
    """One dataset: how it is trained on."""

    dataset: str
    image_size: int  # pixels a side
    steps: int  # of MedSegDiff; the peer's number follows from equal FLOP
    training: TrainingConfig
    leave_out: tuple[str, ...] = ()  # sites left out in turn, tested on all their patients; none: one split by patient


@dataclass(frozen=True)
class Plan(Strict):
    """All jobs of a run."""

    name: str
    what: str  # for the table's caption
    preset: str  # of medsegdiff.config
    tasks: tuple[Task, ...]
    peer_width: int  # channels of DynUNet's first level; they double at each level
    peer_widest: int  # and stop here
    complete: bool  # whether a finished row of this plan is a result; false: it shows that the script works
    samplings: tuple[tuple[int, int], ...] = ((1, 1), (5, 1), (20, 1), (100, 1), (5, 5), (5, 25))  # steps, members
    ema_decay: float = 0.999
    test_slices: int | None = None  # at most so many, of the patients with the fewest; None: every test patient
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """One training and the scoring of its test patients."""

    task: Task
    held_out: str | None  # a site, or None for the split by patient
    model: str  # OURS or PEER

    @property
    def name(self) -> str:
        """Unique within a plan; a file name."""
        return "-".join((self.task.dataset, self.held_out or "split", self.model))


def jobs(plan: Plan) -> Iterator[Job]:
    """Every job, most wanted first: the plan's datasets in turn, both models of one split beside each other."""
    for task in plan.tasks:
        for held_out in task.leave_out or (None,):
            for model in (OURS, PEER):
                yield Job(task, held_out, model)


def row_names(plan: Plan, model: str) -> list[str]:
    """The rows that a finished job holds."""
    if model == PEER:
        return ["DynUNet"]
    return [AUXILIARY_ROW, *(sampling_name(steps, members) for steps, members in plan.samplings)]


def sampling_name(steps: int, members: int) -> str:
    """A row's name: "5 steps", "5 steps x 25"."""
    each = f"{steps} step{'s' if steps > 1 else ''}"
    return each if members == 1 else f"{each} x {members}"


def fingerprint(plan: Plan, cache_sha256: str) -> str:
    """Identity of a run: hex SHA-256 of everything in the plan and of the data."""
    return hashlib.sha256(canonical_json({"plan": plan, "cache": cache_sha256}).encode()).hexdigest()


def find_plan(name: str) -> Plan:
    """A plan by name. Raises UserError for a name that is none."""
    if name not in PLANS:
        raise UserError(f"plan {name!r} is unknown; choose one of {', '.join(PLANS)}.")
    return PLANS[name]


_TURNED = AugmentConfig(flip=True, rotate_degrees=15, scale=0.1, intensity=0.1, gamma=0.1, noise=0.02)
_UPRIGHT = AugmentConfig(flip=False, rotate_degrees=10, scale=0.1, intensity=0.1, gamma=0.1, noise=0.02)
_SITES = ("CS", "DU", "FG", "HT")


def _training(batch: int, rate: float, foreground: float, augment: AugmentConfig) -> TrainingConfig:
    return TrainingConfig(batch_size=batch, learning_rate=rate, foreground_fraction=foreground, augment=augment)


PLANS = {
    plan.name: plan
    for plan in (
        Plan(
            name="full",
            what="preset S on a GPU",
            preset="S",
            tasks=(
                Task("lgg_tcga", 128, 2000, _training(16, 5e-4, 0.5, _TURNED), leave_out=_SITES),
                Task("ddti_thyroid", 128, 1500, _training(16, 5e-4, 0.0, _UPRIGHT)),
                Task("drishti_gs_cupdisc", 128, 1000, _training(16, 5e-4, 0.0, _TURNED)),
                Task("msd_hippocampus", 64, 3000, _training(16, 5e-4, 0.25, _UPRIGHT)),
            ),
            peer_width=32,  # nnU-Net's widths for 2D
            peer_widest=512,
            complete=True,
        ),
        Plan(
            name="proof",
            what="preset tiny, 64 px, 60 steps of 4 slices, one test patient (at most 6 slices) a site, one CPU thread",
            preset="tiny",
            tasks=(Task("lgg_tcga", 64, 60, _training(4, 2e-3, 0.5, _TURNED), leave_out=_SITES),),
            peer_width=16,
            peer_widest=128,
            complete=False,
            ema_decay=0.9,
            test_slices=6,
        ),
    )
}
