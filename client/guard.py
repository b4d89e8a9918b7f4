"""What stands between a real site and the federation: policy, approvals, signatures, outbox and audit log.

Every request passes `admit` before any data is touched; everything that leaves is signed and told to the audit log.
Virtual sites, which have no keys, have no guard.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from flwr.app import RecordDict
from torch import Tensor

from client.application import application_hash
from client.approvals import shown, task_hash
from client.contract import Assignment, Presence, Scores, TrainTask, Update
from client.keys import SiteKeys
from client.outbox import Outbox
from client.policy import SPARE_TRAININGS, check_policy
from client.privacy.account import ANCHOR, is_head
from client.privacy.ledger import Ledger
from client.private_training import Terms, forecast, open_ledger, terms_of
from client.refusal import Refusal
from client.site import Site, SiteConfig
from medsegdiff.chained_log import AUDIT_LOG, GENESIS, ChainedLog
from medsegdiff.errors import UserError
from medsegdiff.strict import read_config

REPEATABLE = 2  # committed rounds that the server may have to ask for again: it keeps three checkpoints
MOST_TOLD = 100  # refusals an hour that the audit log is told of: a server that invents names cannot fill the disk
MOST_REPEATED = 600  # answers an hour to what may be asked without end; each is told, so more would fill the disk, too


class Guard:
    """One real site's guard.

    Args:
        folder: the site's folder, which holds site.yaml.

    Raises:
        UserError: the keys are missing, damaged or readable by others, or no kit is installed.
    """

    def __init__(self, folder: Path, config: SiteConfig) -> None:
        assert config.keys is not None, "virtual sites have no guard"
        self.folder = folder
        self.policy, self.privacy = config.policy, config.privacy
        self.keys = SiteKeys.load(folder / config.keys)
        self.audit = ChainedLog(folder / AUDIT_LOG)
        self.outbox = Outbox(folder / "outbox")
        self.application = application_hash()  # of what this process has loaded
        if self.keys.membership().site != config.name:
            raise UserError(
                f"{folder / 'site.yaml'}: is named '{config.name}', its keys belong to '{self.keys.membership().site}'."
                " Put the enrolled name back."
            )
        self._told: dict[str, str] = {}  # run -> code of the refusal that the audit log knows
        self._lines: list[float] = []  # when refusals were told in the last hour
        self._repeated: list[float] = []  # when answers left in the last hour that may be asked for without end
        self._stamp = (folder / "site.yaml").stat().st_mtime_ns  # of the policy at hand

    def sign(self, message: bytes) -> bytes:
        """Signature of the site over what leaves."""
        return self.keys.sign(message)

    def start_logging(self) -> None:
        """Send this process's log to the site's folder, scrubbed of everything that could name a patient."""
        from client.scrub import federation_logging

        federation_logging(self.folder, self.keys)

    def admit(
        self,
        task: TrainTask,
        run: str,
        round_: int | None = None,
        train_patients: int | None = None,
        trains: bool = False,
    ) -> Terms | None:
        """Let a request pass, or refuse it.

        Args:
            round_: asked for; None where the request is not about one.
            train_patients: of the site's data, once it is known. With privacy on, the planned weight counts instead:
                a refusal must not depend on a patient.
            trains: whether it asks for a new training; more of them than the run has rounds are refused.

        Returns:
            The terms of privacy that it passes by, if any.

        Raises:
            Refusal: the policy or the missing approval forbids it; told once a run in the audit log.
        """
        self._read_policy()
        try:
            if application_hash() != self.application:
                raise Refusal(
                    "application-changed",
                    "the installed program was changed while it ran. Start the site anew under its new hash.",
                )
            terms = terms_of(self.privacy, task)  # first: nobody should be asked to approve what cannot be trained
            known = train_patients is not None and self.privacy is not None
            check_policy(
                self.policy,
                task,
                run,
                round_,
                self.privacy.weight if known and self.privacy is not None else train_patients,
                application=self.application,
                keys=self.keys,
                folder=self.folder,
                trainings=self.outbox.trainings(run) if round_ is not None and trains else 0,
            )
        except Refusal as refusal:
            self._tell_refusal(refusal, run, task, round_)
            raise
        self._told.pop(run, None)
        return terms

    def _tell_refusal(self, refusal: Refusal, run: str, task: TrainTask, round_: int | None) -> None:
        """One line in the audit log, not at every repetition; a flood of names is bounded, and that it was is told."""
        if self._told.get(run) == refusal.code:
            return
        if len(self._told) >= MOST_TOLD:
            del self._told[next(iter(self._told))]
        self._told[run] = refusal.code
        now = time.monotonic()
        self._lines = [moment for moment in self._lines if now - moment < 3600.0]
        if len(self._lines) < MOST_TOLD:
            self._lines.append(now)
            self._note("refused", shown(run), task, round=round_, decision=refusal.code)
            if len(self._lines) == MOST_TOLD:
                self.audit.append("refusals_left_out", hourly=MOST_TOLD)

    def _bound_repetitions(self, run: str, task: TrainTask, round_: int | None) -> None:
        """Let one more answer pass that the run's rounds do not bound. Raises Refusal: there were too many."""
        now = time.monotonic()
        self._repeated = [moment for moment in self._repeated if now - moment < 3600.0]
        if len(self._repeated) >= MOST_REPEATED:
            refusal = Refusal(
                "too-often", f"run {run}: asks for the same again and again, {MOST_REPEATED} times an hour."
            )
            self._tell_refusal(refusal, run, task, round_)
            raise refusal
        self._repeated.append(now)

    def _read_policy(self) -> None:
        """The policy as it stands in site.yaml now. Raises UserError where it cannot be read: nothing passes then."""
        stamp = (self.folder / "site.yaml").stat().st_mtime_ns
        if stamp != self._stamp:
            config = read_config(self.folder / "site.yaml", SiteConfig)
            self.policy, self.privacy = config.policy, config.privacy
            self._stamp = stamp

    def admit_scoring(self, task: TrainTask, assignment: Assignment, train_patients: int | None) -> None:
        """Let a request to score pass, or refuse it: a round's model is scored, not as many models as a server likes.

        Each model's averages say something of the held-out patients; a server may have as many as the run has rounds,
        and a few more for rounds that were repeated.
        """
        self.admit(task, assignment.run, assignment.round, train_patients)
        if self.outbox.has_scored(assignment.run, assignment.model_hash):
            self._bound_repetitions(assignment.run, task, assignment.round)
        if not self.outbox.may_score(assignment.run, assignment.model_hash, task.rounds + SPARE_TRAININGS):
            refusal = Refusal("too-many-rounds", f"run {assignment.run}: asks for scores of ever more models.")
            self._tell_refusal(refusal, assignment.run, task, assignment.round)
            raise refusal

    def note_fault(self, code: str) -> None:
        """Tell the audit log that a request was not answered; the site's log says where. Not at every repetition."""
        if self._told.get("") != code:
            self._told[""] = code
            self.audit.append("not_answered", decision=code, application=self.application)

    def introduce(self, presence: Presence, task: TrainTask, terms: Terms | None, remembered: str = "") -> Presence:
        """The site's introduction, with what proves what runs here.

        Args:
            remembered: what the server says this site told it last of its ledger.

        Raises:
            Refusal: too few patients; it was asked too often; the ledger is not the one that the server remembers; the
                run does not fit into the budget.
        """
        self.admit(task, presence.run, train_patients=presence.train_patients)
        self._bound_repetitions(presence.run, task, None)
        self._told.pop("", None)
        fields = {"patients": presence.train_patients, "decision": "answered"}
        if terms is None:
            self._note("introduced", presence.run, task, **fields)
            return replace(presence, application=self.application, audit_head=self.audit.head)
        ledger = open_ledger(self.folder, terms.policy, audited=True)
        try:
            self._check_remembered(ledger, remembered)
            planned = forecast(ledger, terms.policy, task, presence.run)
        except Refusal as refusal:
            self._tell_refusal(refusal, presence.run, task, None)
            raise
        told = ledger.head  # noted: a ledger that is recovered from the audit log has to know it
        self._note("introduced", presence.run, task, **fields, epsilon_planned=planned, **{ANCHOR: told})
        return replace(presence, application=self.application, ledger_anchor=self.keys.anchor(told))

    def _check_remembered(self, ledger: Ledger, remembered: str) -> None:
        """The head that the server remembers must be one of this ledger's, or of one that was written off."""
        if not remembered:
            return
        account = ledger.account()
        if remembered not in {self.keys.anchor(head) for head in {*account.heads, GENESIS}} | account.anchors:
            # The server's word stands in a command that a person may copy: digits, or not at all.
            told = (
                f"medsegfed ledger write-off --anchor {remembered}, with the highest --epsilon and --delta that "
                "site.yaml ever had."
                if is_head(remembered)
                else "ask the coordinator."
            )
            raise Refusal(
                "ledger-rolled-back",
                f"{ledger.path}: the server remembers a state of this ledger that is none of its lines: the ledger was "
                "put back to an older copy, removed or replaced, or keys/names.key is another one than then. What was "
                "spent since is missing, so nothing is trained. Restore the newest copy of both. If there is none: "
                f"{told}",
            )

    def kept(self, assignment: Assignment, task: TrainTask) -> RecordDict | None:
        """The answer that was given, or was about to be given, to this very question; None: it is to be worked out.

        Raises:
            Refusal: the round was trained from another model, a second answer would be a second training; or it was
                asked too often.
        """
        before = self.outbox.base_of(assignment.run, assignment.round)
        if before not in (None, assignment.model_hash):
            refusal = Refusal(
                "base-changed", f"round {assignment.round} was trained from another model; it is not repeated."
            )
            self._tell_refusal(refusal, assignment.run, task, assignment.round)
            raise refusal
        self.committed(assignment.run, assignment.round - 1)
        found = self.outbox.find(assignment, task)
        if found is None or found[0].base_hash != assignment.model_hash:  # never trained, or from a damaged file
            return None
        update, content = found
        self._bound_repetitions(assignment.run, task, assignment.round)
        self.audit.append("repeated", run=assignment.run, round=assignment.round, delta=update.delta_hash)
        return content

    def keep(self, update: Update, delta: dict[str, Tensor], content: RecordDict, task: TrainTask) -> None:
        """Write an update to the outbox and the audit log; only then may it leave."""
        self.outbox.keep(update, delta, content)
        self._note(
            "update",
            update.run,
            task,
            round=update.round,
            patients=update.patients,
            base=update.base_hash,
            delta=update.delta_hash,
            decision="sent",
        )

    def committed(self, run: str, round_: int) -> None:
        """The server has shown that it committed all rounds up to this one.

        Its last checkpoints may be damaged before it goes on: it then repeats the rounds after the last good one.
        """
        self.outbox.forget(run, round_ - REPEATABLE)

    def note_scores(self, scores: Scores, task: TrainTask) -> None:
        """Write to the audit log that averages over held-out patients leave."""
        self._note(
            "scores",
            scores.run,
            task,
            round=scores.round,
            patients=scores.patients,
            model=scores.model_hash,
            decision="sent",
        )

    def _note(self, event: str, run: str, task: TrainTask, **fields: object) -> None:
        self.audit.append(
            event,
            run=run,
            config=task_hash(task),
            application=self.application,
            key=self.keys.signing_public,
            **fields,
        )


@lru_cache(maxsize=64)
def _guard(folder: Path, config: SiteConfig) -> Guard:
    return Guard(folder, config)


def guard_of(site: Site) -> Guard | None:
    """The guard of a real site, made once a process; None for a virtual one."""
    return _guard(site.path.parent, site.config) if site.config.keys is not None else None
