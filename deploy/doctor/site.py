"""The doctor at a hospital: which checks there are, in which order, and what each needs to know."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from client.keys import SiteKeys
from client.privacy.account import check_noted, ledger_path
from deploy.doctor.checks import Check, Names, Probe, counted, reason_of, run_probes, without_names
from deploy.doctor.connection import STEP_SECONDS, Link, proxy_for, split_address
from deploy.doctor.credentials import check_certificates, check_keys
from deploy.doctor.dataset import DATA_SECONDS, Expectations, check_dataset
from deploy.doctor.machine import (
    COPIES,
    Load,
    check_disk,
    check_environment,
    check_memory,
    check_versions,
    check_writable,
    model_bytes,
)
from deploy.doctor.network import NAMES, check_server
from deploy.supervisor import read_status
from medsegdiff.chained_log import AUDIT_LOG, audit_lines, verify_log
from medsegdiff.errors import UserError
from medsegdiff.strict import read_config

if TYPE_CHECKING:  # both bring torch and Flower, which take seconds
    from client.contract import TrainTask
    from client.site import SiteConfig

REMOVED = (
    "Restore the newest copy of the log and of its head file; without one, tell the coordinator and keep what is left."
)
HEAVY_SECONDS = 180.0  # for a check that imports torch, on a slow disk the first time


@dataclass
class Examined:
    """The site that is examined; what several checks need is read once, when the first asks."""

    folder: Path
    now: Callable[[], float]
    names: Names
    data_seconds: float
    step_seconds: float

    @cached_property
    def config(self) -> SiteConfig:
        """site.yaml. Raises UserError."""
        from client.site import SiteConfig

        return read_config(self.folder / "site.yaml", SiteConfig)

    @property
    def key_folder(self) -> Path | None:
        """None at a virtual site, which has no keys."""
        return None if self.config.keys is None else self.folder / self.config.keys

    @cached_property
    def keys(self) -> SiteKeys | None:
        """None where there are none that can be opened."""
        try:
            return SiteKeys.load(self.key_folder) if self.key_folder else None
        except UserError:
            return None

    @cached_property
    def tasks(self) -> dict[str, TrainTask]:
        """Run -> task, of the runs that are approved or wait for it."""
        from client.approvals import approved_runs, pending_runs

        waiting = {run.run: run.task for run in pending_runs(self.folder)}
        approved = approved_runs(self.folder, self.keys)[0] if self.keys else {}
        return waiting | {run: task for run, (_, task) in approved.items()}

    @property
    def cache(self) -> Path:
        """Where prepared cases go, by the same rule as `client.site.Site`."""
        if self.config.cache:
            return self.folder / self.config.cache
        shared = os.environ.get("MEDSEGFED_CACHE")
        return Path(shared) if shared else self.folder / "cache"

    @property
    def data(self) -> Path:
        return self.folder / self.config.data


def examine_site(
    folder: Path,
    now: Callable[[], float] = time.time,
    names: bool = False,
    data_seconds: float = DATA_SECONDS,
    step_seconds: float = STEP_SECONDS,
) -> list[Check]:
    """Every check of a site.

    Args:
        now: the clock, seconds since 1970.
        names: name cases and files, for the site's own terminal.
        data_seconds: after which no further case is read.
        step_seconds: that one step of a network check may take.
    """
    site = Examined(folder, now, Names(shown=names), data_seconds, step_seconds)
    hidden = [str(folder.resolve()), str(folder)] if folder != Path() else [str(folder.resolve())]
    first = run_probes([Probe("site.yaml", lambda: _config_check(site), HEAVY_SECONDS)], site.names, hidden)
    if first[0].status == "fail":
        rest = [Probe("environment", lambda: [check_environment()])]
        return first + run_probes(rest, site.names, hidden)
    if site.keys is not None:
        site.names = Names(names, site.keys.case_hash)
    hidden += [str(site.data.resolve()), str(site.data), site.config.data]
    return first + run_probes(_probes(site), site.names, hidden)


def _probes(site: Examined) -> list[Probe]:
    return [
        Probe("keys", lambda: _keys_checks(site)),
        Probe("server connection", lambda: _server_checks(site), 12 * site.step_seconds),
        Probe("versions", lambda: [check_versions()]),
        Probe("application", lambda: [_application_check(site)], HEAVY_SECONDS),
        Probe("policy", lambda: [_policy_check(site)], HEAVY_SECONDS),
        Probe("approvals", lambda: [_approvals_check(site)], HEAVY_SECONDS),
        Probe("audit log", lambda: [audit_check(site.folder / AUDIT_LOG, _first_event(site))], HEAVY_SECONDS),
        Probe("ledger", lambda: [_ledger_check(site.folder)], HEAVY_SECONDS),
        Probe("privacy", lambda: [_privacy_check(site)], HEAVY_SECONDS),
        Probe("processes", lambda: [processes_check(site.folder / "state", "medsegfed site start")]),
        Probe("environment", lambda: [check_environment()]),
        Probe("folders", lambda: [check_writable(_state_folders(site))]),
        Probe("outbox", lambda: [_outbox_check(site)], HEAVY_SECONDS),
        Probe("memory", lambda: [_memory_check(site)], HEAVY_SECONDS),
        Probe("dataset", lambda: _data_checks(site), site.data_seconds + HEAVY_SECONDS),
    ]


def _config_check(site: Examined) -> Iterator[Check]:
    try:
        config = site.config
    except UserError as error:
        reason = reason_of(error, site.names, [str(site.folder.resolve()), str(site.folder)])
        yield Check("site.yaml", "fail", reason, "Mend that key; --names shows its value and the file.")
        return
    kind = "a virtual site" if config.keys is None else "a site of a federation"
    yield Check("site.yaml", "ok", f"{config.name}: {kind}, every key known")


def _keys_checks(site: Examined) -> Iterator[Check]:
    if site.key_folder is None:
        yield Check("keys", "skipped", "a virtual site has none")
        yield Check("certificates", "skipped", "a virtual site has none")
        return
    yield check_keys(site.key_folder)
    if site.keys is None:
        yield Check("certificates", "skipped", "needs 'keys' first")
    else:
        yield check_certificates(site.key_folder, site.config.name, site.now())


def _server_checks(site: Examined) -> Iterator[Check]:
    """The way to the server, where the site belongs to a federation."""
    keys = site.keys
    try:
        member = keys.membership() if keys else None
        host, port = split_address(member.server) if member else ("", 0)
        proxy = proxy_for(host, port) if member else None
    except UserError:
        keys = None
    except ValueError as error:
        yield Check(NAMES[0], "fail", str(error), "Mend HTTPS_PROXY; if it is well, install the kit once more.")
        yield from (Check(name, "skipped", f"needs '{NAMES[0]}' first") for name in NAMES[1:])
        return
    if keys is None or member is None:
        why = "a virtual site calls nobody" if site.key_folder is None else "needs 'certificates' first"
        yield from (Check(name, "skipped", why) for name in NAMES)
        return
    link = Link(host, port, keys.ca_file, keys.tls_file, proxy, site.step_seconds)
    yield from check_server(link, site.now)


def _application_check(site: Examined) -> Check:
    """What would run here, and whether the policy and the approvals are for it."""
    from client.application import application_summary
    from client.approvals import approved_runs

    found = application_summary()
    approved = approved_runs(site.folder, site.keys)[0] if site.keys else {}
    other = sum(approval.application != found.hash for approval, _ in approved.values())
    pinned = site.config.policy.application
    fact = f"{found.hash} ({found.files} files, {found.distributions} distributions)"
    figures = {"hash": found.hash, "pinned": pinned, "approvals": len(approved), "approvals_of_another": other}
    if pinned not in (None, found.hash):
        fact += f"; policy.application allows {str(pinned)[:12]}... only"
        advice = "Is the change meant? Then write the new hash into site.yaml; else install the program anew."
        return Check("application", "fail", fact, advice, figures)
    if other:
        fact += f"; {other} of {counted(len(approved), 'approval')} are for another program"
        return Check("application", "warn", fact, "Look at those runs again: medsegfed approve RUN.", figures)
    pin = "pinned by the policy" if pinned else "not pinned"
    same = f", all {counted(len(approved), 'approval')} are for it" if approved else ""
    return Check("application", "ok", f"{fact}; {pin}{same}", figures=figures)


def _policy_check(site: Examined) -> Check:
    """The policy in numbers, and whether work may begin now."""
    policy = site.config.policy
    local = datetime.fromtimestamp(site.now())
    figures = {
        "max_rounds": policy.max_rounds,
        "min_patients": policy.min_patients,
        "open": policy.is_open(local),
        "approval_required": policy.approval_required,
    }
    fact = f"at most {counted(policy.max_rounds, 'round')}, at least {counted(policy.min_patients, 'patient')}; "
    fact += "each run is approved" if policy.approval_required else "runs are NOT approved one by one"
    if policy.allowed_hours is None:
        fact += "; open at any hour"
    elif policy.is_open(local):
        fact += f"; open now ({policy.allowed_hours})"
    else:
        begin, _ = policy.hours()
        fact += f"; closed now, {local:%H:%M}: opens at {begin:%H:%M}"
    if not policy.approval_required:
        return Check(
            "policy", "warn", fact, "Set approval_required: true, unless the data officer wants it so.", figures
        )
    return Check("policy", "ok", fact, figures=figures)


def _approvals_check(site: Examined) -> Check:
    """Approvals that hold and that do not, and the runs that wait."""
    from client.approvals import approved_runs, pending_runs

    if site.keys is None:
        return Check("approvals", "skipped", "needs 'keys' first")
    good, bad = approved_runs(site.folder, site.keys)
    waiting = pending_runs(site.folder)
    figures = {"approved": len(good), "waiting": len(waiting), "void": len(bad)}
    fact = f"{counted(len(good), 'run')} approved, {len(waiting)} waiting"
    if bad:
        fact += f", {counted(len(bad), 'approval')} void: edited, moved, or signed by another key"
        return Check("approvals", "fail", fact, "Who changed them? Delete them, then medsegfed approve RUN.", figures)
    if waiting and site.config.policy.approval_required:
        return Check("approvals", "warn", fact, "Look at what waits: medsegfed approve.", figures)
    return Check("approvals", "ok", fact, figures=figures)


def _first_event(site: Examined) -> str | None:
    """What the audit log begins with; None where there need not be one."""
    installed = site.key_folder is not None and (site.key_folder / "federation.json").exists()
    return "kit_installed" if installed else None


def audit_check(path: Path, first: str | None) -> Check:
    """Every line of the audit log against the chain and the head file.

    Args:
        first: the event that it begins with, where it has been begun.
    """
    if not path.exists() and not path.with_name(f"{path.name}.head").exists():
        if first is None:
            return Check("audit log", "ok", "nothing is logged yet", figures={"lines": 0})
        return Check("audit log", "fail", "there is none, and there has been one: it was removed", REMOVED)
    try:
        found = verify_log(path)
        begins = next(audit_lines(path), {}).get("event")
    except UserError as error:
        reason = without_names(str(error), [str(path), str(path.parent.resolve())])
        return Check("audit log", "fail", reason, "See medsegfed audit verify; keep both files as evidence.")
    fact = (
        f"whole: {counted(found.lines, 'line')}, the last of {(found.last or 'no time')[:19]}, head {found.head[:12]}"
    )
    figures = {"lines": found.lines, "head": found.head}
    if first is not None and begins != first:
        return Check(
            "audit log",
            "warn",
            f"{fact}; but it does not begin with '{first}': it is not the first one",
            REMOVED,
            figures,
        )
    return Check("audit log", "ok", fact, figures=figures)


def _ledger_check(folder: Path) -> Check:
    """The privacy ledger, line by line, and against every head of it that the audit log has noted."""
    path, log = ledger_path(folder), folder / AUDIT_LOG
    try:
        account = check_noted(path, log)
    except UserError as error:
        reason = without_names(str(error), [str(path), str(log), str(folder.resolve()), str(folder)])
        return Check("ledger", "fail", reason, "See medsegfed ledger verify; keep the file as evidence.")
    if not account.entries:
        return Check("ledger", "ok", "no privacy budget is spent", figures={"reservations": 0})
    fact = f"whole: {counted(len(account.entries), 'reservation')}, head {account.head[:12]}"
    return Check("ledger", "ok", fact, figures={"reservations": len(account.entries), "head": account.head})


def _privacy_check(site: Examined) -> Check:
    """What the site's privacy budget still buys."""
    privacy = site.config.privacy
    if privacy is None:
        return Check("privacy", "ok", "site.yaml has no privacy section: what is trained here is not protected by it")
    from client.private_training import open_ledger
    from client.refusal import Refusal

    policy = privacy.mechanism
    try:
        ledger = open_ledger(site.folder, policy, audited=site.config.keys is not None)
        spent = ledger.spent().epsilon if ledger.account().entries else 0.0
    except UserError:
        return Check("privacy", "skipped", "needs 'ledger' first")
    fact = f"epsilon {spent:.2f} of {policy.epsilon:g} is spent (delta {policy.delta:g}, sigma {policy.sigma:g})"
    figures = {"spent": spent, "limit": policy.epsilon, "delta": policy.delta}
    try:
        after = ledger.forecast("a new run", policy.sigma, policy.q, policy.steps, policy.rounds)
    except Refusal:
        return Check(
            "privacy",
            "warn",
            f"{fact}; a run of the planned {policy.rounds:,} rounds x {policy.steps:,} steps no longer fits",
            "See medsegfed ledger show; take part in shorter runs, or decide on a higher limit in site.yaml.",
            figures,
        )
    fact = f"{fact}; a run as planned would take it to {after:.2f}"
    drawn = policy.q * _training_patients(site)
    if drawn and not 0.5 <= policy.batch / drawn <= 2:
        return Check(
            "privacy",
            "warn",
            f"{fact}; a step draws {drawn:.3g} patients on average, and batch is {policy.batch:,}",
            "The promise holds, and little is learnt: work out q and batch with medsegfed privacy plan.",
            figures,
        )
    return Check("privacy", "ok", fact, figures=figures)


def _training_patients(site: Examined) -> int:
    """How many patients the dataset's table gives to training; 0 where it cannot be read, which another check tells."""
    from medsegdiff.data.dataset import open_dataset
    from medsegdiff.data.splits import SPLIT_SEED, TEST_FRACTION, split_patients

    try:
        cases = open_dataset(site.data).cases
        return list(split_patients(cases, TEST_FRACTION, 0.0, SPLIT_SEED).values()).count("train")
    except UserError:
        return 0


def processes_check(state: Path, command: str) -> Check:
    """What the supervisor of this folder says of its processes."""
    found = read_status(state)
    if found is None:
        return Check("processes", "ok", f"not running; it is started by: {command}", figures={"running": False})
    children = found.get("children", {})
    up = [name for name, child in children.items() if child.get("phase") == "running"]
    restarts = sum(int(child.get("restarts", 0)) for child in children.values())
    figures = {"running": True, "processes": len(children), "up": len(up), "restarts": restarts}
    fact = f"running: {len(up)} of {counted(len(children), 'process', 'processes')} up, "
    fact += f"{counted(restarts, 'restart')} since the start"
    if len(up) < len(children):
        down = ", ".join(name for name in children if name not in up)
        return Check("processes", "warn", f"{fact}; not up: {down}", "Its log is in state/logs.", figures)
    return Check("processes", "ok", fact, figures=figures)


def _state_folders(site: Examined) -> dict[str, Path]:
    folder = site.folder
    named = {
        "site": folder,
        "state": folder / "state",
        "outbox": folder / "outbox",
        "pending": folder / "pending",
        "approvals": folder / "approvals",
        "cache": site.cache,
    }
    return named | ({"keys": site.key_folder} if site.key_folder else {})


def _outbox_check(site: Examined) -> Check:
    models = [task.model for task in site.tasks.values()]
    # Beside updates: the model scored last (received/), the site's own one (models/), and of each kind of state that a
    # run keeps (client/state.py) that of up to four updates.
    tasks = site.tasks.values()
    kept = [
        any(task.compression.feeds_back for task in tasks),
        any(task.personalisation.keeps_state for task in tasks),
        any(task.control_variates for task in tasks),
    ]
    copies = COPIES + 1 + any(task.personalisation.kind != "none" for task in tasks) + 4 * sum(kept)
    return check_disk("outbox", site.folder / "outbox", model_bytes(models), bool(models), copies)


def _memory_check(site: Examined) -> Check:
    loads = [
        Load(run, task.model, task.training.batch_size, task.training.precision) for run, task in site.tasks.items()
    ]
    channels, classes = _channels(site)
    try:
        return check_memory(site.config.device, loads, channels, classes)
    except UserError as error:
        return Check("memory", "fail", reason_of(error, site.names), "Mend `device` in site.yaml.")


def _channels(site: Examined) -> tuple[int, int]:
    """Of image and mask, by the site's own dataset; one each where it cannot be opened."""
    from medsegdiff.data.dataset import open_dataset
    from medsegdiff.labels import LabelScheme

    try:
        config = open_dataset(site.data).config
    except UserError:
        return 1, 1
    return len(config.channels), LabelScheme.of(config).channels


def _data_checks(site: Examined) -> Iterator[Check]:
    tasks = site.tasks.values()
    expected = Expectations(
        min_patients=1 if site.key_folder is None else site.config.policy.min_patients,
        asked=tuple(task.dataset for task in tasks),
        image_size=max((task.model.image_size for task in tasks), default=Expectations.image_size),
        cache=site.cache,
    )
    yield from check_dataset(site.data, expected, site.names, site.data_seconds)
