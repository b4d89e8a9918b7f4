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
from client.encoding import likely_size
from client.personalisation import sent_shapes
from client.policy import SitePolicy
from client.privacy.policy import SitePrivacy, tightened
from client.private_training import terms_of
from client.refusal import Refusal
from medsegdiff.labels import LabelScheme
from medsegdiff.weights import weight_shapes

WIDTH = 100
MARKS = ("[ok] ", "[NO] ", "[?] ", "!! ", "    ")
FEW_HELD_OUT = 5  # an average over fewer patients says much about each of them

# Contract field -> what it is, in the words of somebody who does not write programs.
WORDS = {
    "personal_dice": "the mean Dice of this site's own second model, where it has one: one number",
    "personal_hd95_mm": "the mean surface distance (HD95, mm) of that model: one number",
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
    "private": "whether this site trains with differential privacy",
    "epsilon": "with differential privacy: what the patients here have spent of it in all, over all runs",
    "privacy_delta": "with differential privacy: the delta at which epsilon holds",
    "ledger_anchor": "with differential privacy: a mark of the ledger's state, which only this site can read; a ledger "
    "that is put back to an older copy shows by it",
    "dice": "the mean Dice over held-out patients and targets: one number",
    "dice_by_target": "the mean Dice over held-out patients, one number a target",
    "hd95_mm": "the mean surface distance (HD95, mm) over held-out patients and targets: one number",
    "hd95_undefined": "how many of these distances are not defined (one mask empty)",
}
# With privacy on, these are sent empty, or hold what the data officer wrote down beforehand.
WITHHELD = {
    (Presence, "train_patients"): "the planned weight of site.yaml, not the number of patients",
    (Presence, "test_patients"): "zero, whatever it is",
    (Presence, "faults"): "zero, whatever it is",
    (Presence, "audit_head"): "nothing: withheld",
    (Update, "patients"): "the planned weight of site.yaml, not the number of patients",
    (Update, "loss"): "nothing: withheld",
    (Update, "seconds"): "nothing: withheld",
}
SCORING = (
    "patients", "dice", "dice_by_target", "hd95_mm", "hd95_undefined", "seconds", "personal_dice", "personal_hd95_mm"
)  # fmt: skip
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
    privacy: SitePrivacy | None = None  # of site.yaml
    spent: float | None = None  # epsilon in the ledger
    planned: float | None = None  # epsilon when the run will have ended

    def is_private(self, task: TrainTask) -> bool:
        """Whether this site would train the task with differential privacy."""
        return self.privacy is not None and task.privacy is not None


def explain_task(task: TrainTask, run: str, facts: SiteFacts) -> list[str]:
    """Lines of plain text, at most 100 signs wide: what approving `run` means for this site."""
    sections = (
        (f"Run {shown(run)}", _asked(task, facts)),
        ("What would be computed here", _computed(task, facts)),
        ("What would leave this house", _leaving(task, facts)),
        ("What would not leave", _staying()),
        ("How patients are protected", _protection(task, facts)),
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
    whole = 4 * _values(task) / 1e6
    megabytes = likely_size(task.compression, sent_shapes(task)) / 1e6
    where = f" to {shown(facts.server, 80)}" if facts.server else ""
    yield f"Everything goes{where} over TLS 1.3, both ends proven. This site calls out; nobody calls in."
    yield (
        f"Each round: the changes of the model's weights, {_sent_values(task):,} numbers, {_compressed(task)}"
        f"{_size(megabytes)}; {_size(megabytes * task.rounds)} over the run. ({_size(whole)} come in each round: a "
        "model that was scored here is not sent again to be trained.) With them, signed by this site's key:"
    )
    if task.compression.feeds_back:
        yield (
            "    What compression leaves out of a change stays here, on this site's disk, and goes with the next one: "
            "over the rounds, all of it leaves."
        )
    private = facts.is_private(task)
    yield from _fields(Update, private)
    if task.control_variates:
        yield (
            "Half of the numbers of a round are SCAFFOLD's control variate: how the mean gradient over a round's steps "
            "has changed. It says about the patients what the changes of the weights say. The common one comes in each "
            "round."
        )
    if own := _own_model(task):
        yield own
    withheld = private and facts.privacy is not None and facts.privacy.held_out == "withheld"
    what = "With each scoring, averages over the held-out patients"
    yield f"{what}: withheld, and so are those marked so below." if withheld else f"{what}:"
    yield from _fields(Scores, withheld)
    if not withheld and facts.test_patients is not None and 0 < facts.test_patients < FEW_HELD_OUT:
        whose = (
            "this site holds out ONE patient, so these averages ARE that patient's own figures"
            if facts.test_patients == 1
            else f"this site holds out {facts.test_patients} patients only, so these averages say much about each"
        )
        yield f"!! {whose}. Hold out more (column split of cases.csv), or none."
    yield "When the server asks who is there:"
    yield from _fields(Presence, private)
    yield "Where the site refuses: a word such as not-approved, and a fixed sentence for it. No error text."


def _compressed(task: TrainTask) -> str:
    """How the changes are made smaller; about how many bytes are left depends on the numbers."""
    match task.compression.kind:
        case "bf16":
            return "each rounded to 3 digits (bf16), about "
        case "int8":
            return "each rounded to one of 255 steps of its channel (int8), about "
        case "top_k":
            sent = task.compression.sent(_sent_values(task))
            return f"of which the {sent:,} largest are sent, rounded to 3 digits (top_k), about "
        case _:
            return ""


def _staying() -> Iterator[str]:
    yield "Images, masks, slices and anything drawn from a single one of them."
    yield "Names: of patients, cases, files and folders; tags of DICOM files; rows of cases.csv."
    yield "Logs and the audit log (of the latter only its last hash). Keys."


def _protection(task: TrainTask, facts: SiteFacts) -> Iterator[str]:
    if facts.privacy is not None and task.privacy is not None:
        yield from _private_protection(task, facts, facts.privacy)
        return
    if task.privacy is not None:
        yield (
            "The run is made for differential privacy; this site has no `privacy` section in site.yaml, so "
            + ("it cannot take part." if task.privacy.required else "it would train WITHOUT it.")
        )
    yield (
        "!! There is no protection beyond this: weights travel in place of images. Changes of weights can give away "
        "something of the data they were trained on; in experiments, images were in part recovered from such changes, "
        "and whether a given patient was trained on could be guessed. The fewer patients, the easier."
    )
    yield ("The coordinator sees this site's own changes, not only the sum over sites: there is no secure aggregation.")
    yield "The trained model goes to all sites of the run, and to whom the coordinator gives it."


def _private_protection(task: TrainTask, facts: SiteFacts, privacy: SitePrivacy) -> Iterator[str]:
    assert task.privacy is not None
    try:
        policy = tightened(privacy.mechanism, task.privacy.asks)
    except Refusal as refusal:
        yield f"[NO] {refusal}"
        return
    yield (
        f"Patient-level differential privacy: whatever leaves would look nearly the same had any one patient not been "
        f"here, with all scans of that patient. What 'nearly' means is one number, epsilon, and this site's limit is "
        f"{policy.epsilon:g} (delta {policy.delta:g}), over all runs ever. docs/privacy.md says what that hides."
    )
    yield (
        f"Each step draws every patient with probability {policy.q:g}, cuts what a patient may change to "
        f"{policy.clip:g} and adds noise of {policy.sigma:g} times that, from this machine's own randomness."
    )
    if facts.spent is not None:
        yield f"Spent so far: epsilon {facts.spent:.2f} of {policy.epsilon:g}."
    if facts.planned is not None:
        yield f"After this run, as planned: epsilon {facts.planned:.2f} of {policy.epsilon:g}."
    elif facts.spent is not None:
        yield "[NO] The budget does not cover this run: it will be refused. `medsegfed ledger show` says what is left."
    yield (
        "!! Not hidden: that this site takes part, when and how often; whatever staff here can see; and a patient who "
        "is at several hospitals spends at each."
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
    yield f"Hours: {hours}."
    yield from _privacy_verdict(task, facts)
    if not policy.approval_required:
        yield "!! approval_required is false: runs that keep to the above go ahead without anybody looking at them."


def _privacy_verdict(task: TrainTask, facts: SiteFacts) -> Iterator[str]:
    try:
        terms = terms_of(facts.privacy, task)
    except Refusal as refusal:
        yield f"[NO] {refusal}"
        return
    if terms is None:
        yield "Differential privacy: none is asked for here (section `privacy` of site.yaml)."
    else:
        yield "[ok] differential privacy: the run keeps to this site's policy"


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


def _fields(kind: type[Presence] | type[Update] | type[Scores], private: bool) -> Iterator[str]:
    for field in fields(kind):
        words = PATIENTS[kind] if field.name == "patients" else WORDS.get(field.name)
        if private:
            scoring = kind is Scores and field.name in SCORING
            words = "nothing: withheld" if scoring else WITHHELD.get((kind, field.name), words)
        yield f"    {field.name}: {words or 'NOT DESCRIBED HERE; ask what it is before approving'}"


def _verdict(met: bool | None, text: str) -> str:
    return f"{'[?]' if met is None else '[ok]' if met else '[NO]'} {text}" + (
        "; the run will be refused" * (met is False)
    )


def _own_model(task: TrainTask) -> str:
    """What of the model is this site's own; empty where nothing is."""
    match task.personalisation.kind:
        case "local_norms":
            what = "The normalisation layers' weights are trained here and stay here"
        case "shared_encoder":
            what = "The decoder's weights are trained here and stay here"
        case "ditto":
            what = "A second model is trained here in each round, for this site alone, and stays here"
        case "fine_tune":
            what = "Whenever the common model is scored, a copy of it is trained on here, and stays here"
        case _:
            return ""
    count = _values(task) if task.personalisation.trains_a_second else _values(task) - _sent_values(task)
    told = f"{what}: {count:,} numbers, on this site's disk (models/, personal/)."
    if task.personalisation.trains_a_second or task.privacy is None:
        told += " No privacy mechanism protects them: whoever is given that model is given what it learnt of patients."
    return told


def _sent_values(task: TrainTask) -> int:
    return sum(math.prod(shape) for shape in sent_shapes(task).values())


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
