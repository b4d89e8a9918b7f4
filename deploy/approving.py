"""`medsegfed approve`: the data officer looks at a run that asks, and decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from client.application import application_summary
from client.approvals import (
    approve,
    approved_runs,
    check_approval,
    pending_run,
    pending_runs,
    revoke_approval,
    shown,
    task_hash,
)
from client.contract import TrainTask
from client.explain import SiteFacts, explain_task
from client.keys import SiteKeys
from client.refusal import Refusal
from client.site import Site
from deploy.site_start import open_site_folder
from medsegdiff.chained_log import AUDIT_LOG, ChainedLog
from medsegdiff.errors import UserError


def pending_lines(folder: Path) -> list[str]:
    """Runs that wait for a decision, and those that are approved."""
    _, keys = open_site_folder(folder)
    waiting = pending_runs(folder)
    good, bad = approved_runs(folder, keys)
    lines = [
        f"waits     {shown(run.run)}   asked {run.asked_at}   {run.task.rounds:,} x {run.task.local_steps:,} steps"
        for run in waiting
    ]
    lines += [f"approved  {name}   {approval.approved_at} by {approval.by}" for name, (approval, _) in good.items()]
    lines += [f"BROKEN    {name}   {fault}" for name, fault in bad.items()]
    if not lines:
        return ["No run has asked yet. One that does is refused and kept here until you decide."]
    if waiting:
        lines.append(f"To see what it would do, and to decide: medsegfed approve {shown(waiting[0].run)}")
    return lines


def approve_run(folder: Path, run: str, by: str, confirmed: Callable[[list[str]], bool]) -> str:
    """Show what a waiting run would do; sign its approval once `confirmed` says so. Returns a line for the officer.

    Raises:
        UserError: the run does not wait here, or the site's files are not sound.
    """
    config, keys = open_site_folder(folder)
    application = application_summary()
    good, _ = approved_runs(folder, keys)
    waiting = next((asked for asked in pending_runs(folder) if asked.run == run), None)
    if waiting is None and run in good:
        approval, task = good[run]
        try:
            check_approval(folder, task, run, keys, application.hash)
        except Refusal as refusal:
            raise UserError(f"{refusal} It will wait here again as soon as the server asks.") from None
        return f"{run} is approved already: {approval.approved_at}, by {approval.by}."
    waiting = waiting or pending_run(folder, run)
    known = SiteFacts(config.policy, config.name, application, privacy=config.privacy)
    facts = _budget(folder, waiting.task, run, _facts(folder, waiting.task, known, keys))
    if not confirmed(explain_task(waiting.task, run, facts)):
        return f"{run}: not approved; it goes on waiting, and nothing is trained."
    approval = approve(folder, waiting, keys, application.hash, by)
    try:
        _note(folder, "approved", run, waiting.task, approval.application, by)
    except UserError:
        revoke_approval(folder, run)  # nothing runs under an approval that the audit log does not know
        raise
    return (
        f"{run} is approved. The server asks again within seconds. To take it back: medsegfed approve {run} --take-back"
    )


def withdraw(folder: Path, run: str, by: str) -> str:
    """Take an approval back. Raises UserError when there is none."""
    _, keys = open_site_folder(folder)
    good, _ = approved_runs(folder, keys)
    if not revoke_approval(folder, run):
        raise UserError(f"{shown(run)}: is not approved here; approved are {', '.join(good) or 'none'}.")
    task = good[run][1] if run in good else None
    _note(folder, "approval_withdrawn", run, task, None, by)
    return (
        f"{run}: the approval is taken back. From its next question on the server is refused; what was sent stays sent."
    )


def _facts(folder: Path, task: TrainTask, facts: SiteFacts, keys: SiteKeys) -> SiteFacts:
    """What is known of the site, with counts of its data where it can be read."""
    from dataclasses import replace

    membership = keys.membership()
    facts = replace(facts, federation=membership.federation, server=membership.server)
    try:
        data = Site(folder / "site.yaml").data(task)
    except UserError:
        return facts  # the page shows that nothing was counted; doctor says why
    slices = sum(case.slices for case in data.train)
    return replace(facts, train_patients=data.train_patients, test_patients=data.test_patients, train_slices=slices)


def _budget(folder: Path, task: TrainTask, run: str, facts: SiteFacts) -> SiteFacts:
    """What the ledger says of the run; nothing where the site is not private or refuses the run anyway."""
    from dataclasses import replace

    from client.private_training import forecast, open_ledger, terms_of

    try:
        terms = terms_of(facts.privacy, task)
    except Refusal:
        return facts  # the page says why
    if terms is None:
        return facts
    ledger = open_ledger(folder, terms.policy, audited=True)
    account = ledger.account()
    facts = replace(facts, spent=ledger.spent().epsilon if account.entries else 0.0)
    try:
        return replace(facts, planned=forecast(ledger, terms.policy, task, run))
    except Refusal:
        return facts


def _note(folder: Path, event: str, run: str, task: TrainTask | None, application: str | None, by: str) -> None:
    config = task_hash(task) if task is not None else None
    ChainedLog(folder / AUDIT_LOG).append(event, run=run, config=config, application=application, by=by)
