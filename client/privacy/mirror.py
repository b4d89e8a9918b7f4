"""The audit log's notes of a privacy ledger, and what the two together still know when one of them is damaged.

Every line of a ledger by which anything counts has a `number`: 1, 2, ... Right after it is written, the audit log notes
it: its event behind `privacy_`, its fields, and as `ledger` its hash. What a kill kept from being noted, or is gone
because the audit log was begun anew or put back, the next reservation notes first. So an audit log lacks no more than
the last lines, and where it lacks another, their numbers have a gap.

A **fact** is what such a line says, wherever it was read: in a ledger, in a recovered ledger (whose line names, as
`lost`, the hashes that the fact had before) or in a note. Facts that share a hash are one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

from client.privacy.account import ANCHOR, VERSION, Ceiling, is_head, whole
from client.privacy.accounting import Mechanism
from medsegdiff.chained_log import ChainedLog

NOTE = "privacy_"
_OF_THE_LOG = ("n", "time", "event", "prev", "hash")
_FIGURES = ("run", "round", "sigma", "q", "steps", "epsilon")
Kind = Literal[
    "allowed", "reserved", "written_off", "over"
]  # over: nothing counts by it, such as the end of a training


@dataclass
class Fact:
    """What one line of a ledger said."""

    number: int
    kind: Kind
    fields: Mapping[str, Any]
    heads: set[str]  # every hash under which it was, or is, a ledger's line


class Facts:
    """What is known of a ledger, each fact once."""

    def __init__(self) -> None:
        self.spare: set[str] = set()  # hashes of lines of which nothing but that is known
        self._all: list[Fact] = []
        self._by_head: dict[str, Fact] = {}

    def read_ledger(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take in lines of a ledger, each of which is as it was written.

        Raises:
            KeyError, TypeError, ValueError, UserError: one that this version does not read.
        """
        for line in lines:
            if line["event"] != "log_mended":
                self._take(str(line["event"]), line, {line["hash"], *line.get("lost", ())})

    def read_notes(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Take in an audit log. Raises as `read_ledger`."""
        for entry in entries:
            if ANCHOR not in entry:
                continue
            heads = {entry[ANCHOR], *entry.get("lost", ())}
            if entry["event"].startswith(NOTE):
                self._take(entry["event"].removeprefix(NOTE), entry, heads)
            else:
                self.spare |= heads

    def _take(self, event: str, line: Mapping[str, Any], heads: set[str]) -> None:
        if not all(map(is_head, heads)):
            raise ValueError(f"{event[:40]}: a hash that is none")
        if event == "head_lost" and "number" not in line:
            self.spare |= heads
            return
        kind, fields = _said(event, line)
        known = next((self._by_head[head] for head in heads if head in self._by_head), None)
        if known is None:
            known = Fact(whole(line["number"]), kind, fields, set())
            self._all.append(known)
        known.heads |= heads
        self._by_head.update(dict.fromkeys(heads, known))

    def __iter__(self) -> Iterator[Fact]:
        """In the order of their numbers."""
        return iter(sorted(self._all, key=lambda fact: fact.number))

    @property
    def heads(self) -> set[str]:
        """All hashes that are known to have been a line's."""
        return self.spare | self._by_head.keys()

    @property
    def last(self) -> int:
        """The highest number; 0 without any."""
        return max((fact.number for fact in self._all), default=0)

    def gap(self) -> tuple[int, int] | None:
        """The first numbers (from, to) of which nothing is known; those before a write-off are covered by it."""
        before = max((fact.number for fact in self._all if fact.kind == "written_off"), default=1) - 1
        for fact in self:
            if fact.number > before + 1:
                return before + 1, fact.number - 1
            before = max(before, fact.number)
        return None

    def allowed(self) -> list[Ceiling]:
        """All that is known to have been allowed, or taken for spent."""
        return [Ceiling(f.fields["epsilon"], f.fields["delta"]) for f in self if f.kind in ("allowed", "written_off")]


def _said(event: str, line: Mapping[str, Any]) -> tuple[Kind, dict[str, Any]]:
    """What counts by an event's fields. Raises as `Facts.read_ledger`, for all that a ledger's reader would refuse."""
    match event:
        case "opened" if line["version"] != VERSION:
            raise ValueError(f"version {line['version']!r}")
        case "opened" | "ceiling":
            return "allowed", _checked(line)
        case "written_off":
            if not all(map(is_head, line["anchors"])):
                raise ValueError("an anchor that is none")
            return "written_off", {**_checked(line), "anchors": list(line["anchors"])}
        case "reserved" | "recovered":
            return "reserved", _reserved(line, line["steps"])
        case "committed" if "beyond" in line:  # more steps than were reserved
            return "reserved", _reserved(line, line["beyond"])
        case "committed" | "head_lost":
            return "over", {}
        case _:
            raise ValueError(f"an event '{event[:40]}'")


def _checked(line: Mapping[str, Any]) -> dict[str, Any]:
    ceiling = Ceiling(line["epsilon"], line["delta"])
    return {"epsilon": ceiling.epsilon, "delta": ceiling.delta}


def _reserved(line: Mapping[str, Any], steps: int) -> dict[str, Any]:
    Mechanism(line["sigma"], line["q"], steps)
    whole(line["round"])
    order = {"order": line["order"]} if "order" in line else {}
    return {**{name: line[name] for name in _FIGURES}, "steps": steps, **order}


def note_missing(audit: ChainedLog, lines: Iterable[Mapping[str, Any]], noted: Set[str]) -> None:
    """Note those lines of a ledger of which the audit log has no note; `noted`: the hashes of which it has.

    Raises:
        UserError: the disk refuses, or the audit log is not sound.
    """
    for line in lines:
        if line["event"] != "log_mended" and noted.isdisjoint({line["hash"], *line.get("lost", ())}):
            note(audit, line["event"], {name: line[name] for name in line if name not in _OF_THE_LOG}, line["hash"])


def note(audit: ChainedLog, event: str, fields: Mapping[str, Any], head: str) -> None:
    """Note one line of a ledger. Raises as `note_missing`."""
    audit.append(NOTE + event, **fields, **{ANCHOR: head})
