"""A round of training with patient-level differential privacy, and what a private site answers in place of figures.

The order is the guarantee: policy, gate, reservation in the ledger, steps, commit, and only then an update. Whatever
fails on the way leaves the reservation open, which counts in full; a round that is trained again draws fresh noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from client.contract import Assignment, Scores, TrainTask, Update
from client.policy import SPARE_TRAININGS
from client.privacy.account import Ceiling, ledger_path
from client.privacy.engines import choose_engine
from client.privacy.gate import random_patients, require_exact
from client.privacy.ledger import Ledger
from client.privacy.patients import DiffusionRowLoss, PatientRows
from client.privacy.policy import PrivacyPolicy, SitePrivacy, tightened
from client.privacy.step import released
from client.privacy.trainer import PrivateTrainer
from client.refusal import Refusal
from client.site import Site
from client.training import build_trained, change
from medsegdiff.chained_log import AUDIT_LOG
from medsegdiff.devices import choose_device
from medsegdiff.progress import Progress, report
from medsegdiff.strict import compact_json
from medsegdiff.weights import hash_weights, initial_weights

_exact: set[str] = set()  # tasks and devices that passed the gate in this process


@dataclass(frozen=True)
class Terms:
    """What a private site trains a run by."""

    privacy: SitePrivacy  # the data officer's
    policy: PrivacyPolicy  # its mechanism, tightened as the run asks


def terms_of(privacy: SitePrivacy | None, task: TrainTask) -> Terms | None:
    """How a site trains for a task; None: without privacy, which neither of them asks for.

    Raises:
        Refusal: the run wants privacy that the site has not set up, gives none where the site wants it, or would
            loosen the site's policy.
    """
    asked = task.privacy
    if privacy is None:
        if asked is not None and asked.required:
            raise Refusal(
                "privacy-missing",
                "privacy: the run asks every site for patient-level privacy, and site.yaml has no `privacy` section. "
                "Nothing was trained. Write one (docs/privacy.md; `medsegfed privacy plan` works out its numbers), or "
                "ask the coordinator for a run with `privacy.required: false`.",
            )
        return None
    if asked is None:
        raise Refusal(
            "privacy-floor",
            "privacy: the run trains without privacy, and this site's site.yaml asks for it. Nothing was trained. Ask "
            "the coordinator for a run with a `privacy` section.",
        )
    policy = tightened(privacy.mechanism, asked.asks)
    for what, wanted, most in (
        ("local_steps", task.local_steps, policy.steps),
        ("rounds", task.rounds, policy.rounds),
    ):
        if wanted > most:
            raise Refusal(
                "privacy-floor",
                f"privacy: the run asks for {what} {wanted:,}; the site's policy allows at most {most:,}. Nothing was "
                "trained. A run may only tighten the site's policy.",
            )
    return Terms(privacy, policy)


def open_ledger(folder: Path, policy: PrivacyPolicy, audited: bool) -> Ledger:
    """The ledger of the site in `folder`; a real site's heads are noted in its audit log."""
    return Ledger(ledger_path(folder), Ceiling(policy.epsilon, policy.delta), folder / AUDIT_LOG if audited else None)


def forecast(ledger: Ledger, policy: PrivacyPolicy, task: TrainTask, run: str) -> float:
    """Epsilon when the run will have ended, told before its first round.

    Raises:
        Refusal: the whole run does not fit under the site's ceiling, with the number of rounds that would.
    """
    return ledger.forecast(run, policy.sigma, policy.q, task.local_steps, task.rounds)


def train_privately(
    site: Site,
    task: TrainTask,
    assignment: Assignment,
    weights: Mapping[str, Tensor],
    terms: Terms,
    anchor: Callable[[str], str] | None = None,
) -> tuple[Update, dict[str, Tensor]]:
    """Train the received weights for `task.local_steps` noised steps.

    Args:
        anchor: what is told of the ledger's head, for the server to remember; a site without keys tells nothing.

    Returns:
        What leaves the site: an update whose fields are public, and its noised delta, zero where nothing is trained.

    Raises:
        Refusal: "budget-spent", before any step.
        UserError: the network has no exact per-patient gradients, or the ledger is not sound; nothing was trained.
    """
    policy = terms.policy
    data = site.data(task)
    device = choose_device(site.config.device)
    torch.set_num_threads(task.threads)
    segmenter = build_trained(task, weights)
    segmenter.network.to(device)
    require_exact_training(task, device)
    patients = PatientRows(
        data.train,
        segmenter.scheme,
        task.training,
        policy,
        segmenter.diffusion.config.timesteps,
        task.model.self_conditioning,
        device,
    )
    trainer = PrivateTrainer(
        segmenter.network,
        segmenter.diffusion,
        patients,
        task.training,
        policy,
        task.rounds * task.local_steps,
        choose_engine(device),
        task.proximal_mu,
    )
    first = (assignment.round - 1) * task.local_steps

    def tell(steps: int) -> None:
        report(Progress("train", steps, task.local_steps, site.name, assignment.round))

    folder, audited = site.path.parent, site.config.keys is not None
    ledger = open_ledger(folder, policy, audited)
    # The outbox counts trainings whose update was kept; this, those that spent: a fault behind the ledger (a full disk)
    # has the round asked for again and again.
    if sum(entry.run == assignment.run for entry in ledger.account().entries) >= task.rounds + SPARE_TRAININGS:
        raise Refusal("too-many-rounds", f"run {assignment.run}: its trainings that spent of the budget are used up.")
    reservation = ledger.reserve(assignment.run, assignment.round, policy.sigma, policy.q, task.local_steps)
    trainer.run(first, first + task.local_steps, tell)
    ledger.commit(reservation, task.local_steps)
    delta = released(change(segmenter.network, weights), trainer.private_step)
    update = Update(
        site=site.name,
        run=assignment.run,
        round=assignment.round,
        base_hash=assignment.model_hash,
        patients=terms.privacy.weight,
        steps=task.local_steps,
        loss=None,
        seconds=None,
        delta_hash=hash_weights(delta),
        epsilon=ledger.spent().epsilon,
        privacy_delta=policy.delta,
        ledger_anchor=anchor(ledger.head) if anchor is not None else "",
    )
    return update, delta


def require_exact_training(task: TrainTask, device: torch.device) -> None:
    """Ask the gate about the task's network and this machine's engine; once a process, for it takes seconds.

    Raises:
        UserError: the engine would not bound a patient's influence on the network.
    """
    asked = compact_json(task) + device.type
    if asked in _exact:
        return
    segmenter = build_trained(task, initial_weights(task.model, 0))
    loss = DiffusionRowLoss(segmenter.diffusion, task.training.auxiliary_weight)
    patients = random_patients(task.model, task.diffusion.timesteps)
    require_exact(segmenter.network, loss, patients, choose_engine(device))
    _exact.add(asked)


def withheld_scores(site: Site, assignment: Assignment) -> Scores:
    """What a private site answers when it is asked to score: that it scores nothing. No data is read."""
    return Scores(
        site=site.name,
        run=assignment.run,
        round=assignment.round,
        model_hash=assignment.model_hash,
        patients=0,
        dice=None,
    )


def wait_for_release(since: float, every: float) -> None:
    """Sleep until a multiple of `every` seconds has passed since `since` (time.monotonic()): rounds off a duration."""
    if every > 0:
        time.sleep(-(time.monotonic() - since) % every)
