"""Who belongs to a real federation, and its audit log, as a run sees them: read anew, so revocations count at once."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from medsegdiff.chained_log import AUDIT_LOG, ChainedLog, audit_lines
from server.members import Member, edit_members, read_members

FEDERATION = "MEDSEGFED_FEDERATION"  # environment: the coordinator's federation folder


class Membership:
    """Members and audit log of one federation folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._audit = ChainedLog(folder / AUDIT_LOG)

    @classmethod
    def here(cls) -> Membership | None:
        """The federation this process serves (MEDSEGFED_FEDERATION), or None in a simulation."""
        folder = os.environ.get(FEDERATION)
        return cls(Path(folder)) if folder else None

    def active(self) -> dict[str, Member]:
        """Site -> its entry, for those admitted and neither revoked nor suspended at this moment."""
        members = read_members(self.folder / "members.json")
        return {site: member for site, member in members.items() if member.active}

    def suspended(self) -> set[str]:
        """Members whom some run has suspended, and nobody has lifted."""
        members = read_members(self.folder / "members.json")
        return {site for site, member in members.items() if member.status == "suspended"}

    def suspend(self, site: str, **fields: Any) -> None:
        """Shut a member out until the coordinator lifts it (`medsegfed lift`); done again for the same cause, nothing.

        Args:
            fields: the cause, for the audit log.
        """
        if self.has("site_suspended", site=site, **fields):
            return
        with edit_members(self.folder / "members.json") as members:
            if site in members and members[site].status == "admitted":
                members[site] = replace(members[site], status="suspended")
        self.note("site_suspended", site=site, **fields)

    def note(self, event: str, **fields: Any) -> None:
        """One line in the federation's audit log."""
        self._audit.append(event, **fields)

    def ledger_anchor(self, site: str) -> str:
        """What a site said last of its privacy ledger; empty where it never did. Reads all of the audit log."""
        told = ""
        for line in audit_lines(self._audit.path):
            if line["event"] in ("site", "update") and line.get("site") == site and line.get("ledger_anchor"):
                told = str(line["ledger_anchor"])
        return told

    def has(self, event: str, **match: Any) -> bool:
        """Whether the audit log has an entry of this kind with these fields. Reads all of it."""
        return any(
            line["event"] == event and all(line.get(name) == value for name, value in match.items())
            for line in audit_lines(self._audit.path)
        )
