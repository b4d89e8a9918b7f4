"""What `medsegfed privacy plan` and `medsegfed ledger` show: lines, tables and JSON."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from client.privacy.account import Account, Ceiling, Spent, as_head, check_noted, ledger_path, spent
from client.privacy.accounting import Epsilon
from client.privacy.planning import Plan
from client.site import SiteConfig
from deploy.joining import SITE_CONFIG
from medsegdiff.chained_log import AUDIT_LOG
from medsegdiff.errors import UserError
from medsegdiff.strict import read_config

ROWS = 40  # of the table, unless all are asked for


# --- a plan -----------------------------------------------------------------------------------------------------------


def plan_figures(plan: Plan) -> dict[str, Any]:
    """All figures of a plan, for JSON."""
    return {
        "patients": plan.patients, "epsilon": plan.limit, "delta": plan.delta, "rounds": plan.rounds,
        "sigma": plan.sigma, "q": plan.q, "steps_per_round": plan.steps_per_round, "steps": plan.steps,
        "expected_batch": plan.expected_batch, "clip": plan.clip, "parameters": plan.parameters, "draws": plan.draws,
        "epsilon_reached": _accountants(plan.reached),
        "noise_per_parameter": plan.noise_per_parameter, "noise_norm": plan.noise_norm,
        "signal_over_noise": {"step": plan.step_ratio, "training": plan.training_ratio},
        "most_parameters": plan.most_parameters, "passes": plan.passes,
        "verdict": plan.verdict(), "warnings": plan.warnings(),
    }  # fmt: skip


def plan_lines(plan: Plan) -> list[str]:
    """A plan for a person."""
    reached = plan.reached
    prv = "too large for it" if reached.prv is None else f"{reached.prv:.3f}"
    return [
        f"sigma              {plan.sigma:.4g}   noise multiplier: standard deviation {plan.sigma * plan.clip:.4g} on "
        f"the sum of gradients clipped to {plan.clip:g}",
        f"q                  {plan.q:g}   each of {plan.patients:,} patients is in a step with this probability",
        f"steps              {plan.steps:,}   {plan.rounds:,} rounds x {plan.steps_per_round:,}",
        f"expected batch     {plan.expected_batch:g}   patients a step; {plan.passes:,.0f} passes in all "
        f"({plan.draws} draws a patient and step)",
        f"epsilon            {reached.value:.3f} of {plan.limit:g}   at delta {plan.delta:g}, add or remove one "
        f"patient (PRV {prv}, PLD {reached.pld:.3f})",
        f"signal / noise     {plan.step_ratio:.3g} a step, {plan.training_ratio:.3g} over the training, at best, for "
        f"{plan.parameters:,} parameters",
        f"noise a step       {plan.noise_norm:.4g} long on the mean gradient; the signal is at most {plan.clip:g}",
        "",
        *plan.warnings(),
    ]


# --- a ledger ---------------------------------------------------------------------------------------------------------


def open_account(site: Path, anchor: str | None = None) -> tuple[Account, Spent | None]:
    """A site's ledger, verified against the audit log, and what is spent at site.yaml's delta; None while nothing is.

    Raises:
        UserError: the folder is no site's, or the ledger is not sound.
    """
    check_site(site)
    account = check_noted(ledger_path(site), site / AUDIT_LOG, anchor)
    if account.ceiling is None:
        return account, None
    ceiling = ceiling_of(site)
    if ceiling is not None:  # a run may have asked for a tighter one, and the ledger has not seen a new one yet
        account = replace(account, ceiling=ceiling)
    assert account.ceiling is not None
    return account, spent(account, account.ceiling.delta)


def ceiling_of(site: Path) -> Ceiling | None:
    """The limit in site.yaml's privacy section, None where it has none. Raises UserError: it cannot be read."""
    privacy = read_config(site / SITE_CONFIG, SiteConfig).privacy
    return Ceiling(privacy.mechanism.epsilon, privacy.mechanism.delta) if privacy is not None else None


def verify_lines(site: Path, anchor: str | None = None) -> tuple[bool, list[str]]:
    """Whether a site's ledger is whole and the newest that the audit log knows, and lines for a person.

    Raises:
        UserError: the folder is no site's, or the anchor no head: that says nothing of the ledger.
    """
    check_site(site)
    anchor = None if anchor is None else as_head(anchor)
    path = ledger_path(site)
    lines = [f"ledger   {path}"]
    try:
        account, total = open_account(site, anchor)
    except UserError as error:
        return False, [*lines, f"FAULT: {error}"]
    if total is None:
        return True, [*lines, "OK: nothing was ever reserved here, and the audit log knows of nothing."]
    lines += [f"entries  {len(account.entries):,}", f"head     {account.head}", f"spent    epsilon {total.epsilon:.4f}"]
    return True, [*lines, "OK: no line was changed, removed or added, and every noted head is among them."]


def ledger_figures(site: Path, account: Account, total: Spent | None) -> dict[str, Any]:
    """A ledger for JSON."""
    ceiling = account.ceiling
    return {
        "ledger": str(ledger_path(site)),
        "head": account.head,
        "ceiling": {"epsilon": ceiling.epsilon, "delta": ceiling.delta} if ceiling else None,
        "spent": {
            "epsilon": total.epsilon,
            "method": total.method,
            "renyi_order": total.order,
            "accountants": _accountants(total.accountants) if total.accountants else None,
        }
        if total
        else None,
        "left": ceiling.epsilon - total.epsilon if ceiling and total else None,
        "entries": [
            {
                "id": entry.id, "run": entry.run, "round": entry.round, "sigma": entry.sigma, "q": entry.q,
                "steps_reserved": entry.steps, "steps_taken": entry.taken, "state": entry.state,
                "epsilon_after": entry.epsilon, "time": entry.time,
            }
            for entry in account.entries
        ],
    }  # fmt: skip


def ledger_table(account: Account, everything: bool = False) -> Table:
    """Reservations in order; without `everything` the last ones."""
    shown = account.entries if everything else account.entries[-ROWS:]
    hidden = len(account.entries) - len(shown)
    title = "Reservations" + (f" (the last {len(shown)}; {hidden:,} before them are left out)" if hidden else "")
    table = Table(title=Text(title), title_justify="left")
    for name in ("run", "round", "sigma", "q", "steps", "state", "epsilon after"):
        table.add_column(name, justify="left" if name in ("run", "state") else "right", overflow="fold")
    for entry in shown:
        steps = str(entry.steps) if entry.taken in (None, entry.steps) else f"{entry.taken} of {entry.steps}"
        table.add_row(
            Text(entry.run), str(entry.round), f"{entry.sigma:g}", f"{entry.q:g}", steps,
            entry.state, f"{entry.epsilon:.4f}",
        )  # fmt: skip
    return table


def ledger_lines(account: Account, total: Spent | None) -> list[str]:
    """What stands under the table."""
    if total is None or account.ceiling is None:
        return ["Nothing was ever reserved here: no run with differential privacy has trained on these patients."]
    left = account.ceiling.epsilon - total.epsilon
    lines = [
        f"spent    epsilon {total.epsilon:.4f} at delta {account.ceiling.delta:g}, add or remove one patient",
        f"ceiling  epsilon {account.ceiling.epsilon:g}",
        f"left     epsilon {max(0.0, left):.4f}"
        + (" (the ceiling was lowered below what is spent)" if left < 0 else ""),
        f"method   {total.method}",
    ]
    if total.accountants is not None:
        prv = total.accountants.prv
        lines.append(f"         PRV {'-' if prv is None else f'{prv:.4f}'}, PLD {total.accountants.pld:.4f}")
    if unfinished := sum(entry.state == "open" for entry in account.entries):
        lines.append(f"open     {unfinished:,}: under way, or ended by a crash; each counts in full")
    return [*lines, f"head     {account.head}"]


def check_site(site: Path) -> None:
    """Raises UserError for a folder that is no site's."""
    if not (site / SITE_CONFIG).is_file():
        raise UserError(f"{site / SITE_CONFIG}: is not there, so this is no site's folder. Name it with --site FOLDER.")


def _accountants(found: Epsilon) -> dict[str, float | None]:
    return {"value": found.value, "prv": found.prv, "pld": found.pld}
