"""What a site's data officer has approved, signed with the site's own key, and which runs wait for it.

    approvals/RUN.json   {approval, task, key, signature}: signed over `Approval`, which names the task by its hash
    pending/RUN.json     a run that asked and is not approved, kept to be looked at; the latest 20, of 64 KiB at most

An approval holds for one run, one task and one program. Edited by hand, moved to another run's name, or signed by
another site's key, it counts as none. The names of runs come over the network: none becomes a path before it is found
to be a plain name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from client.contract import TrainTask
from client.refusal import Refusal
from medsegdiff.errors import UserError
from medsegdiff.files import FOLDER_NAME, write_atomic
from medsegdiff.strict import Strict, compact_json, parse_config, plain

MAX_PENDING = 20  # runs kept: a server that invents names must not fill the site's disk
MAX_BYTES = 65_536  # of a file; a task takes two kilobytes, one with 255 labels twenty
_DOMAIN = b"medsegfed/approval/1\n"  # keeps this signature from serving as one over anything else that the key signs
_PRIVATE = 0o600


class SigningKeys(Protocol):
    """The site's Ed25519 key (`client.keys.SiteKeys`)."""

    @property
    def signing_public(self) -> str:
        """The public key, 64 hex digits."""

    def sign(self, message: bytes) -> bytes:
        """An Ed25519 signature."""


@dataclass(frozen=True)
class Approval(Strict):
    """What a data officer allowed, as it is signed."""

    run: str
    task_hash: str  # hex SHA-256 of the task
    application: str  # hex SHA-256 of the program, `client.application`
    approved_at: str  # UTC
    by: str  # who, as typed at the site; it is not sent
    rounds: int
    local_steps: int


@dataclass(frozen=True)
class PendingRun(Strict):
    """A run that asked and was refused for want of an approval."""

    run: str
    task: TrainTask
    asked_at: str  # UTC, of the first time this task was asked


@dataclass(frozen=True)
class _Signed(Strict):
    approval: Approval
    task: TrainTask
    key: str
    signature: str


def task_hash(task: TrainTask) -> str:
    """Hex SHA-256 of a task: of all that the site is asked to do."""
    return hashlib.sha256(compact_json(task).encode()).hexdigest()


def is_run_name(run: str) -> bool:
    """Whether a name from the network may become a file's name."""
    return FOLDER_NAME.fullmatch(run) is not None


def shown(text: str, limit: int = 64) -> str:
    """Text from elsewhere, fit for a terminal and a log: one line, no control or invisible signs, not endless."""
    kept = "".join(sign if sign.isprintable() else "?" for sign in text[: limit + 1])
    return kept if len(text) <= limit else kept[: limit - 3] + "..."


# --- approving --------------------------------------------------------------------------------------------------------


def approve(
    folder: Path, waiting: PendingRun, keys: SigningKeys, application: str, by: str, now: datetime | None = None
) -> Approval:
    """Sign and store the approval of a run; the run waits no longer.

    Args:
        folder: the site's.
        waiting: the run as it was shown to the officer; the very object, so that nothing else is signed than was read.
        by: who approves.

    Raises:
        UserError: nobody is named, the run's name is none, or the disk refuses.
    """
    if not by.strip() or len(by) > 100 or not by.isprintable():
        raise UserError(f"{shown(by)!r} names nobody: an approval says who gave it, in 1 to 100 letters.")
    path = _path(folder, "approvals", waiting.run)
    approval = Approval(
        run=waiting.run,
        task_hash=task_hash(waiting.task),
        application=application,
        approved_at=_utc(now),
        by=by.strip(),
        rounds=waiting.task.rounds,
        local_steps=waiting.task.local_steps,
    )
    signed = _Signed(approval, waiting.task, keys.signing_public, keys.sign(_statement(approval)).hex())
    _write(path, signed)
    discard_pending(folder, waiting.run)
    return approval


def revoke_approval(folder: Path, run: str) -> bool:
    """Take an approval back: from the next request on the run is refused. Returns whether there was one."""
    return _remove(_path(folder, "approvals", run))


def approved_runs(folder: Path, keys: SigningKeys) -> tuple[dict[str, tuple[Approval, TrainTask]], dict[str, str]]:
    """All approvals that hold, with the tasks they are for; and of each file that holds none, what is wrong."""
    good: dict[str, tuple[Approval, TrainTask]] = {}
    bad: dict[str, str] = {}
    for path in sorted((folder / "approvals").glob("*.json")):
        try:
            found = _read_signed(folder, path.stem, keys)
        except UserError as error:
            bad[path.name] = str(error)
            continue
        if found is not None:
            good[path.stem] = (found.approval, found.task)
    return good, bad


def check_approval(folder: Path, task: TrainTask, run: str, keys: SigningKeys, application: str) -> Approval:
    """The approval under which this site may carry the task out with the program that runs.

    Raises:
        Refusal: there is none; it was not signed by this site's key, or edited; it is for another run, another task or
            another program.
    """
    found = _read_signed(folder, run, keys)
    if found is None:
        raise Refusal(
            "not-approved",
            f"run {run}: is not approved. To see what it would do and to decide: medsegfed approve {run}",
        )
    approval = found.approval
    if approval.task_hash != task_hash(task):
        raise Refusal(
            "not-approved",
            f"run {run}: the server now asks for another task ({task_hash(task)[:12]}) than was approved on "
            f"{approval.approved_at} ({approval.task_hash[:12]}). To see it and decide: medsegfed approve {run}",
        )
    if approval.application != application:
        raise Refusal(
            "application-changed",
            f"run {run}: was approved for the program {approval.application[:12]}; installed now is "
            f"{application[:12]}. If the change is meant: medsegfed approve {run}",
        )
    return approval


def _read_signed(folder: Path, run: str, keys: SigningKeys) -> _Signed | None:
    path = _path(folder, "approvals", run)
    data = _read(path)
    if data is None:
        return None
    try:
        signed = parse_config(data, _Signed, str(path))
        approval = signed.approval
        if signed.key != keys.signing_public:
            raise ValueError("another key")
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(keys.signing_public))
        key.verify(bytes.fromhex(signed.signature), _statement(approval))
    except (UserError, ValueError, InvalidSignature) as error:
        raise _broken(path, run, "it is not as it was signed by this site's key") from error
    if approval.run != run:
        raise _broken(path, run, f"it is that of run {shown(approval.run)}")
    if task_hash(signed.task) != approval.task_hash:
        raise _broken(path, run, "the task in it is not the one that was signed")
    return signed


def _broken(path: Path, run: str, what: str) -> Refusal:
    return Refusal(
        "not-approved",
        f"approvals/{path.name}: is no approval of run {run}: {what}. To approve anew: medsegfed approve {run}",
    )


def _statement(approval: Approval) -> bytes:
    return _DOMAIN + compact_json(approval).encode()


# --- waiting ----------------------------------------------------------------------------------------------------------


def keep_pending(folder: Path, task: TrainTask, run: str, now: datetime | None = None) -> None:
    """Keep a run that asked, so that the data officer can look at it. The oldest goes where there are too many.

    Raises:
        Refusal: the name is none, or the task is too large to be a task.
        UserError: the disk refuses.
    """
    path = _path(folder, "pending", run)
    waiting = PendingRun(run, task, _utc(now))
    if (size := len(_bytes(waiting))) > MAX_BYTES:
        raise Refusal("not-approved", f"run {run}: its task takes {size:,} bytes, the limit is {MAX_BYTES:,}.")
    before = _read_pending(path)
    if before is not None and before.run == run and task_hash(before.task) == task_hash(task):
        return
    others = sorted((other for other in _listed(folder) if other != path), key=lambda other: other.stat().st_mtime_ns)
    for other in others[: max(0, len(others) - MAX_PENDING + 1)]:
        other.unlink(missing_ok=True)
    _write(path, waiting)


def pending_runs(folder: Path) -> list[PendingRun]:
    """Runs that wait for a decision, the latest first. What cannot be read is no run: the next request replaces it."""
    found = (_read_pending(path) for path in _listed(folder))
    return sorted((run for run in found if run is not None), key=lambda run: run.asked_at, reverse=True)


def pending_run(folder: Path, run: str) -> PendingRun:
    """The waiting run of a name. Raises UserError naming those that wait."""
    found = _read_pending(_path(folder, "pending", run))
    if found is None or found.run != run:
        names = ", ".join(waiting.run for waiting in pending_runs(folder)) or "none"
        raise UserError(
            f"run {run}: does not wait for an approval; those that do: {names}. A run can be approved once the server "
            "has asked this site for it."
        )
    return found


def discard_pending(folder: Path, run: str) -> bool:
    """Forget a waiting run; it comes back if it asks again. Returns whether it was there."""
    return _remove(_path(folder, "pending", run))


def _listed(folder: Path) -> list[Path]:
    return [path for path in (folder / "pending").glob("*.json") if is_run_name(path.stem)]


def _read_pending(path: Path) -> PendingRun | None:
    try:
        data = _read(path)
        return None if data is None else parse_config(data, PendingRun, str(path))
    except UserError:
        return None


# --- files ------------------------------------------------------------------------------------------------------------


def _path(folder: Path, kind: str, run: str) -> Path:
    if not is_run_name(run):
        raise Refusal(
            "not-approved",
            f"run {shown(run)!r}: is no name of a run: 1 to 64 letters, digits, '-', '_' or '.' are one.",
        )
    return folder / kind / f"{run}.json"


def _read(path: Path) -> Mapping[str, Any] | None:
    try:
        with open(path, "rb") as handle:
            raw = handle.read(2 * MAX_BYTES + 1)
        data = json.loads(raw)
        if len(raw) > 2 * MAX_BYTES or not isinstance(data, dict):
            raise ValueError("no such file of ours")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}). Delete it.") from error
    return data


def _bytes(content: object) -> bytes:
    return json.dumps(plain(content), indent=1, allow_nan=False).encode("ascii") + b"\n"


def _write(path: Path, content: object) -> None:
    with contextlib.suppress(OSError):  # told by the writing
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(path, _bytes(content), _PRIVATE)


def _remove(path: Path) -> bool:
    try:
        os.unlink(path)  # noqa: PTH108  # says whether it was there
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(
            f"{path}: could not be removed ({error.strerror}). Mend the permissions, then repeat."
        ) from error
    return True


def _utc(now: datetime | None) -> str:
    return (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
