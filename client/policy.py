"""A site's policy: what it lets run, when, and how often. The stricter side wins.

The policy stands in site.yaml and is the data officer's. `check_policy` is asked before any work, each time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, time
from pathlib import Path
from typing import Any

from client.application import application_hash
from client.approvals import Approval, SigningKeys, check_approval, is_run_name, keep_pending, shown
from client.contract import TrainTask
from client.refusal import Refusal
from medsegdiff.errors import UserError
from medsegdiff.strict import Strict

__all__ = ["Refusal", "SitePolicy", "check_policy"]

SPARE_TRAININGS = 5  # beyond a run's rounds: answers that were lost with a disk, a server restored from a backup

_HASH = re.compile(r"[0-9a-f]{64}")
_HOURS = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class SitePolicy(Strict):
    """The `policy` section of site.yaml."""

    application: str | None = None  # hex SHA-256 of the one program that may run; null: what each approval names
    max_rounds: int = 200  # of a run
    # Least number of training patients with which the site takes part. An update computed from one or two patients is
    # close to a statement about them; five is the least count that health statistics commonly release.
    min_patients: int = 5
    privacy_floor: Any = None  # always null; Any, so that whatever stands here is answered with the reason
    allowed_hours: str | None = None  # "18:00-07:00", this machine's clock; work begun inside may end outside
    approval_required: bool = True  # false: whatever keeps to the rest of the policy runs without being looked at

    def __post_init__(self) -> None:
        _require(
            self.application is None or bool(_HASH.fullmatch(self.application)),
            "application must be the 64 hexadecimal digits that medsegfed doctor shows, or null",
        )
        _require(self.max_rounds >= 1, f"max_rounds must be at least 1, found {self.max_rounds}")
        _require(self.min_patients >= 1, f"min_patients must be at least 1, found {self.min_patients}")
        _require(
            self.privacy_floor is None,
            "privacy_floor must be null: what a site asks of privacy is the section `privacy` of site.yaml "
            "(docs/privacy.md), and no run may loosen that",
        )
        if self.allowed_hours is not None:
            _require(
                bool(_HOURS.fullmatch(self.allowed_hours)),
                f'allowed_hours must be of the form "18:00-07:00", or null for any time, found {self.allowed_hours!r}',
            )
            begin, end = self.hours()
            _require(begin != end, "allowed_hours begin and end at the same minute; null means any time")

    def hours(self) -> tuple[time, time]:
        """Begin (included) and end (excluded) of the allowed hours; the whole day where none are set."""
        found = _HOURS.fullmatch(self.allowed_hours or "")
        if found is None:
            return time.min, time.max
        begin_hour, begin_minute, end_hour, end_minute = (int(part) for part in found.groups())
        return time(begin_hour, begin_minute), time(end_hour, end_minute)

    def is_open(self, now: datetime) -> bool:
        """Whether work may begin now; hours may run across midnight. A time with a zone is turned to the local one."""
        if self.allowed_hours is None:
            return True
        begin, end = self.hours()
        clock = (now.astimezone() if now.tzinfo is not None else now).time().replace(tzinfo=None)
        return begin <= clock < end if begin < end else clock >= begin or clock < end


def check_policy(
    policy: SitePolicy,
    task: TrainTask,
    run: str,
    round_: int | None = None,
    train_patients: int | None = None,
    *,
    keys: SigningKeys,
    folder: Path,
    application: str | None = None,
    now: datetime | None = None,
    trainings: int = 0,
) -> Approval | None:
    """Let a request pass, or refuse it. Before any work, and again once the patients are counted.

    A run that is not approved is kept in `folder`/pending for the data officer, whatever else would forbid it.

    Args:
        round_: asked for; None where the request is not about a round.
        train_patients: of the site's data; None where it is not known yet, and then not checked.
        application: hash of what runs; None: worked out.
        now: default: the clock.
        trainings: with a request to train, how often the site has trained for this run already: a server that asks
            for rounds again and again, from ever other models, gets about as many answers as there are rounds.

    Returns:
        The approval under which it runs; None where the policy asks for none.

    Raises:
        Refusal: with the code of the first rule that forbids it.
    """
    now = now or datetime.now().astimezone()
    if not is_run_name(run):
        raise Refusal("not-approved", f"run {shown(run)!r}: is no name of a run (letters, digits, '-', '_', '.').")
    installed = application_hash() if application is None else application
    approval = _approved(policy, task, run, keys, folder, installed, now)
    if policy.application not in (None, installed):
        raise Refusal(
            "application-changed",
            f"run {run}: policy.application allows the program {str(policy.application)[:12]}, {installed[:12]} is "
            "installed. If the change is meant, write the new hash (medsegfed doctor shows it) into site.yaml.",
        )
    if task.rounds > policy.max_rounds:
        raise Refusal(
            "too-many-rounds",
            f"run {run}: has {task.rounds:,} rounds; policy.max_rounds is {policy.max_rounds:,}. Nothing was trained.",
        )
    if round_ is not None and not 1 <= round_ <= task.rounds:
        raise Refusal("round-out-of-range", f"run {run}: asks for round {round_:,} of {task.rounds:,}.")
    if trainings >= task.rounds + SPARE_TRAININGS:
        raise Refusal(
            "too-many-rounds",
            f"run {run}: this site has trained {trainings:,} times for its {task.rounds:,} rounds; the server asks for "
            "rounds again. Ask the coordinator why before anything else is approved.",
        )
    if not policy.is_open(now):
        raise Refusal(
            "outside-hours", f"run {run}: it is {now:%H:%M}; policy.allowed_hours are {policy.allowed_hours}. It waits."
        )
    if train_patients is not None and train_patients < policy.min_patients:
        raise Refusal(
            "too-few-patients",
            f"run {run}: the site has {train_patients:,} training patients; policy.min_patients is "
            f"{policy.min_patients:,}. Nothing was trained.",
        )
    return approval


def _approved(
    policy: SitePolicy, task: TrainTask, run: str, keys: SigningKeys, folder: Path, application: str, now: datetime
) -> Approval | None:
    if not policy.approval_required:
        return None
    try:
        return check_approval(folder, task, run, keys, application)
    except Refusal as refusal:
        try:
            keep_pending(folder, task, run, now)
        except Refusal:
            raise
        except UserError as error:  # a full disk keeps the officer from looking, not the site from refusing
            raise Refusal(refusal.code, f"{refusal} (It could not be kept in pending/: the disk refuses.)") from error
        raise
