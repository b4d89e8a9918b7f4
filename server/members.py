"""members.json: who belongs to a federation, with which keys and certificates.

Read anew wherever it matters, so that a revocation counts at once; changed under a lock, since admitting by hand and
renewing over the network may meet.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from medsegdiff.errors import UserError
from medsegdiff.files import FOLDER_NAME, write_atomic
from medsegdiff.strict import Strict, parse_config, plain

FORMAT = 1
MAX_BYTES = 16_000_000  # some thousand members with all their certificates
MAX_PATIENTS = 10_000_000  # a slip of the finger, not a hospital

_NODE_KEY = re.compile(r"ecdsa-sha2-nistp384 [A-Za-z0-9+/]{100,300}={0,2}")
_SIGNING_KEY = re.compile(r"[0-9a-f]{64}")
_SERIAL = re.compile(r"[0-9a-f]{1,40}")


@dataclass(frozen=True)
class Member(Strict):
    """One site's entry. Serials are hex; times are ISO 8601 with their offset from UTC."""

    site: str
    node_key: str  # OpenSSH line, ECDSA P-384: who may speak to Flower as this site
    signing_key: str  # hex Ed25519: who may sign updates as this site
    patients: int  # enrolled training patients: the largest weight its updates may claim
    serial: str  # of the newest certificate
    not_after: str  # when that one expires
    status: Literal["admitted", "revoked", "suspended"]
    admitted: str  # when
    earlier: dict[str, str] = field(default_factory=dict)  # serial -> not_after: older certificates, valid beside it
    revoked: dict[str, str] = field(default_factory=dict)  # serial -> not_after: what the revocation list names
    retired: tuple[str, ...] = ()  # node and signing keys that were revoked: they never return

    def __post_init__(self) -> None:
        _require(bool(FOLDER_NAME.fullmatch(self.site)), f"site {self.site!r} is no name of a site")
        _require(bool(_NODE_KEY.fullmatch(self.node_key)), "node_key is no ECDSA P-384 key in OpenSSH form")
        _require(bool(_SIGNING_KEY.fullmatch(self.signing_key)), "signing_key must be 64 lower-case hex digits")
        _require(
            1 <= self.patients <= MAX_PATIENTS, f"patients must lie in 1..{MAX_PATIENTS:,}, found {self.patients:,}"
        )
        for serial in (self.serial, *self.earlier, *self.revoked):
            _require(bool(_SERIAL.fullmatch(serial)), f"serial {serial[:80]!r} must be 1 to 40 lower-case hex digits")
        for time in (self.not_after, self.admitted, *self.earlier.values(), *self.revoked.values()):
            moment(time)

    @property
    def active(self) -> bool:
        """Takes part at this moment."""
        return self.status == "admitted"

    def certificates(self, now: datetime) -> dict[str, str]:
        """Serial -> not_after of the certificates that have not expired and were not revoked, the newest first."""
        known = {self.serial: self.not_after, **self.earlier}
        return unexpired({serial: end for serial, end in known.items() if serial not in self.revoked}, now)


def read_members(path: Path) -> dict[str, Member]:
    """Site -> entry, in the order of admission; empty when there is no file yet.

    Raises:
        UserError: the file cannot be read, or names the entry and key that are not as they were written.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    try:
        data = json.loads(raw) if len(raw) <= MAX_BYTES else None
        entries = data["members"] if isinstance(data, dict) and data.get("format") == FORMAT else None
    except (ValueError, KeyError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise UserError(f"{path}: {len(raw):,} bytes, and no list of members (format {FORMAT}). Restore a backup.")
    members = {name: parse_config(entry, Member, f"{path}: {name[:80]!r}") for name, entry in entries.items()}
    for name, member in members.items():
        if member.site != name:
            raise UserError(f"{path}: the entry {name[:80]!r} is of the site {member.site!r}. Restore a backup.")
    return members


def write_members(path: Path, members: Mapping[str, Member]) -> None:
    """Replace the register. Inside `edit_members` only, or nobody else may be at work."""
    data = {"format": FORMAT, "members": {name: plain(member) for name, member in members.items()}}
    write_atomic(path, json.dumps(data, indent=1, allow_nan=False).encode() + b"\n")


@contextmanager
def edit_members(path: Path) -> Iterator[dict[str, Member]]:
    """The register to change, for this process and thread alone; written when the block ends well.

    Raises:
        UserError: as `read_members`, or the disk refuses; the register is untouched then, as after any other exception.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f"{path.name}.lock"), "wb")  # noqa: SIM115  # closed below
    except OSError as error:
        raise UserError(
            f"{path}: cannot be locked ({error.strerror}); nothing was changed. Mend its rights."
        ) from error
    with lock:  # closing it gives the lock back
        fcntl.flock(lock, fcntl.LOCK_EX)
        members = read_members(path)
        before = dict(members)
        yield members
        if members != before:
            write_members(path, members)


def moment(text: str) -> datetime:
    """An ISO 8601 time with its offset. Raises ValueError."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text[:80]!r} is no ISO 8601 time") from None
    if found.tzinfo is None:
        raise ValueError(f"{text!r} does not say its offset from UTC")
    return found


def iso(time: datetime) -> str:
    """A time in UTC, to the second."""
    return time.astimezone(UTC).isoformat(timespec="seconds")


def unexpired(serials: Mapping[str, str], now: datetime) -> dict[str, str]:
    """Those of serial -> not_after that have not expired."""
    return {serial: end for serial, end in serials.items() if moment(end) > now}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
