"""A run in plain words, for the data officer who decides whether this site takes part.

What leaves the site is read off the contract's own fields, so that a field which somebody adds there shows up here,
with or without words for it. Names of labels, channels and data sets come from the server and are shown as text only.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from client.application import Application
from client.approvals import is_run_name, shown, task_hash
from client.contract import Presence, Scores, TrainTask, Update
from client.policy import SitePolicy
from medsegdiff.labels import LabelScheme
from medsegdiff.weights import weight_shapes

WIDTH = 100
MARKS = ("[ok] ", "[NO] ", "[?] ", "!! ", "    ")
FEW_HELD_OUT = 5  # an average over fewer patients says much about each of them

# Contract field -> what it is, in the words of somebody who does not write programs.
WORDS = {
    "site": "this site's name",
    "run": "the run's name",
    "round": "the round's number",
    "nonce": "signs the server made up, sent back so that an old answer cannot be used again",
    "train_patients": "how many patients of this site are trained on",
    "test_patients": "how many patients of this site are held out",
    "faults": "how many cases of the data cannot be used",
    "software": "versions of medsegfed, torch, flwr and Python",
    "application": "the hash of the program installed here",
    "audit_head": "the last hash of this site's audit log: it would show if the log were rolled back later",
    "contract_version": "which version of this list of fields is meant",
    "base_hash": "the hash of the model that training started from",
    "model_hash": "the hash of the model that was scored",
    "steps": "how many optimizer steps were taken",
    "loss": "the mean training loss over the round's steps: one number",
    "seconds": "how long the work took",
    "delta_hash": "the hash of the weight changes",
    "dice": "the mean Dice over held-out patients and targets: one number",
    "dice_by_target": "the mean Dice over held-out patients, one number a target",
    "hd95_mm": "the mean surface distance (HD95, mm) over held-out patients and targets: one number",
    "hd95_undefined": "how many of these distances are not defined (one mask empty)",
}
# What `patients` counts differs from message to message.
PATIENTS = {Update: "how many patients were trained on", Scores: "how many held-out patients were scored"}


@dataclass(frozen=True)
class SiteFacts:
    """What the site knows of itself; None where the data was not counted yet."""

    policy: SitePolicy
    site: str
    application: Application
    federation: str | None = None
    server: str | None = None  # host:port
    train_patients: int | None = None
    test_patients: int | None = None
    train_slices: int | None = None


def explain_task(task: TrainTask, run: str, facts: SiteFacts) -> list[str]:
    """Lines of plain text, at most 100 signs wide: what approving `run` means for this site."""
    sections = (
        (f"Run {shown(run)}", _asked(task, facts)),
        ("What would be computed here", _computed(task, facts)),
        ("What would leave this house", _leaving(task, facts)),
        ("What would not leave", _staying()),
        ("How patients are protected", _protection()),
        ("This site's policy", _limits(task, run, facts)),
        ("What approving means", _meaning(task, run, facts)),
    )
    lines: list[str] = []
    for title, items in sections:
        lines += ["", title, "-" * len(title)] if lines else [title, "=" * len(title)]
        lines += [line for item in items for line in _wrapped(item)]
    return lines


def _wrapped(item: str) -> list[str]:
    """An item with its mark in front: the one it brings, or a dash."""
    mark = next((mark for mark in MARKS if item.startswith(mark)), "- ")
    indent = " " * max(2, len(mark))
    return textwrap.wrap(item.removeprefix(mark), WIDTH, initial_indent=mark, subsequent_indent=indent)


def _asked(task: TrainTask, facts: SiteFacts) -> Iterator[str]:
    asked_by = f"the federation {shown(facts.federation)}" if facts.federation else "the federation"
    yield f"{shown(facts.site)} is asked by {asked_by} to train a segmentation model together with other sites."
    yield f"The data it is for: {shown(task.dataset.name)} ({shown(task.dataset.modality)})."


def _computed(task: TrainTask, facts: SiteFacts) -> Iterator[str]:
    scheme = LabelScheme.of(task.dataset)
    yield f"Image channels that are read: {_names(task.dataset.channels)}."
    yield f"Labels that the masks hold: {_names(scheme.labels)}."
    targets = (
        f"{shown(target)} (label{'s' if len(members) > 1 else ''} {_names(scheme.labels[i] for i in members)})"
        for target, members in zip(scheme.targets, scheme.members, strict=True)
    )
    yield f"What the model learns to draw: {'; '.join(targets)}."
    yield (
        f"Images are cut into slices and brought to {task.model.image_size} x {task.model.image_size} pixels. The "
        f"model, MedSegDiff, has {_values(task):,} weights."
    )
    steps = task.rounds * task.local_steps
    shown_slices = steps * task.training.batch_size
    yield (
        f"{task.rounds:,} rounds of {task.local_steps:,} optimizer steps: {steps:,} steps of "
        f"{task.training.batch_size:,} slices, {shown_slices:,} slices in all."
    )
    if facts.train_slices:
        yield (
            f"This site has {facts.train_slices:,} slices of {_count(facts.train_patients)} training patients: the run "
            f"goes about {_rough(shown_slices / facts.train_slices)} times over the data. The fewer the patients and "
            "the more the passes, the more of a single patient a model can keep."
        )
    else:
        yield "How often that goes over this site's data is told once the data was read (medsegfed doctor)."
    yield f"Between rounds the common model is scored on held-out patients: {_count(facts.test_patients)} here."


def _leaving(task: TrainTask, facts: SiteFacts) -> Iterator[str]:
    megabytes = 4 * _values(task) / 1e6
    where = f" to {shown(facts.server, 80)}" if facts.server else ""
    yield f"Everything goes{where} over TLS 1.3, both ends proven. This site calls out; nobody calls in."
    yield (
        f"Each round: the changes of the model's weights, {_values(task):,} numbers, {_size(megabytes)}; "
        f"{_size(megabytes * task.rounds)} over the run. (As much comes in, and once more for each scoring.) "
        "With them, signed by this site's key:"
    )
    yield from _fields(Update)
    yield "With each scoring, averages over the held-out patients:"
    yield from _fields(Scores)
    if facts.test_patients is not None and 0 < facts.test_patients < FEW_HELD_OUT:
        whose = (
            "this site holds out ONE patient, so these averages ARE that patient's own figures"
            if facts.test_patients == 1
            else f"this site holds out {facts.test_patients} patients only, so these averages say much about each"
        )
        yield f"!! {whose}. Hold out more (column split of cases.csv), or none."
    yield "When the server asks who is there:"
    yield from _fields(Presence)
    yield "Where the site refuses: a word such as not-approved, and a fixed sentence for it. No error text."


def _staying() -> Iterator[str]:
    yield "Images, masks, slices and anything drawn from a single one of them."
    yield "Names: of patients, cases, files and folders; tags of DICOM files; rows of cases.csv."
    yield "Logs and the audit log (of the latter only its last hash). Keys."


def _protection() -> Iterator[str]:
    yield (
        "!! There is no protection beyond this: weights travel in place of images. Changes of weights can give away "
        "something of the data they were trained on; in experiments, images were in part recovered from such changes, "
        "and whether a given patient was trained on could be guessed. The fewer patients, the easier."
    )
    yield (
        "The coordinator sees this site's own changes, not only the sum over sites. There is no differential privacy "
        "and no secure aggregation in this version."
    )
    yield "The trained model goes to all sites of the run, and to whom the coordinator gives it."


def _limits(task: TrainTask, run: str, facts: SiteFacts) -> Iterator[str]:
    policy = facts.policy
    yield _verdict(is_run_name(run), "the run's name is a plain name")
    yield _verdict(task.rounds <= policy.max_rounds, f"rounds: {task.rounds:,} asked, at most {policy.max_rounds:,}")
    enough = None if facts.train_patients is None else facts.train_patients >= policy.min_patients
    yield _verdict(
        enough, f"training patients: {_count(facts.train_patients)} here, at least {policy.min_patients:,} wanted"
    )
    if policy.application is not None:
        yield _verdict(
            policy.application == facts.application.hash, f"program: only {policy.application[:12]}... may run"
        )
    hours = f"work begins at {policy.allowed_hours} only" if policy.allowed_hours else "work begins at any hour"
    yield f"Hours: {hours}. Privacy floor: none can be set in this version."
    if not policy.approval_required:
        yield "!! approval_required is false: runs that keep to the above go ahead without anybody looking at them."


def _meaning(task: TrainTask, run: str, facts: SiteFacts) -> Iterator[str]:
    name = shown(run)
    program = facts.application
    yield (
        f"Approving signs, with this site's key: the run {name}; exactly the task above (hash "
        f"{task_hash(task)[:12]}..., whole in pending/{name}.json), {task.rounds:,} rounds of {task.local_steps:,} "
        f"steps; and the program installed here (hash {program.hash[:12]}...: medsegfed {program.medsegfed}, torch "
        f"{program.torch}, flwr {program.flwr})."
    )
    yield "Any other run, task or program is refused until it is approved in turn; so is this one after an update."
    yield (
        f"To take it back, at any moment: medsegfed approve {name} --take-back. Nothing is sent from then on; what was "
        "sent by then cannot be called back."
    )


def _fields(kind: type[Presence] | type[Update] | type[Scores]) -> Iterator[str]:
    for field in fields(kind):
        words = PATIENTS[kind] if field.name == "patients" else WORDS.get(field.name)
        yield f"    {field.name}: {words or 'NOT DESCRIBED HERE; ask what it is before approving'}"


def _verdict(met: bool | None, text: str) -> str:
    return f"{'[?]' if met is None else '[ok]' if met else '[NO]'} {text}" + (
        "; the run will be refused" * (met is False)
    )


def _values(task: TrainTask) -> int:
    return sum(math.prod(shape) for shape in weight_shapes(task.model).values())


def _names(names: Iterable[str], most: int = 20) -> str:
    listed = [shown(name) for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _count(number: int | None) -> str:
    return "(not counted yet)" if number is None else f"{number:,}"


def _rough(times: float) -> str:
    return f"{times:.0f}" if times >= 10 else f"{times:.1f}"


def _size(megabytes: float) -> str:
    return f"{megabytes:,.1f} MB" if megabytes < 1000 else f"{megabytes / 1000:,.1f} GB"
