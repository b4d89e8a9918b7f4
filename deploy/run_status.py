"""One run of a federation as its plan and its journal tell it, without the seconds it takes to load torch.

The plan is read as plain data; fields that are missing or odd are None, for only the server needs them.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from medsegdiff.errors import UserError
from medsegdiff.strict import load_yaml
from server.journal import Event, read_events
from server.records import weighted_loss
from server.rounds import ENDED, committed_rounds, round_seconds, run_state, sample_size, scored_rounds

RECENT_ROUNDS = 10  # whose seconds foretell the next ones
AUDIT_TAIL = 256 * 1024  # bytes: some hundred decisions, more than a round of many sites has
LONGEST_REASON = 200  # signs; a site's own words are cut here
LONGEST_END = 1000  # of why a run ended: it closes with what to do


@dataclass(frozen=True)
class ToldRun:
    """One run. `queued`: it was asked for and has not ended since."""

    folder: Path
    plan: Mapping[str, Any]
    events: Sequence[Event]
    queued: bool = False

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def roster(self) -> dict[str, Any]:
        found = self.plan.get("roster")
        return {printable(site, 64): n for site, n in found.items()} if isinstance(found, dict) else {}

    @property
    def rounds(self) -> int | None:
        task = self.plan.get("task")
        return _whole(task.get("rounds") if isinstance(task, dict) else None)

    @property
    def state(self) -> str:
        """As `run_state` says, or "queued"."""
        state = run_state(self.events)
        return "queued" if self.queued and state in (*ENDED, "not started") else state

    @property
    def under_way(self) -> bool:
        return self.state not in (*ENDED, "not started", "queued")

    @property
    def committed(self) -> int:
        """The last committed round; 0 before the first."""
        return max((event["round"] for event in committed_rounds(self.events)), default=0)

    @property
    def session(self) -> Sequence[Event]:
        """The events since the server took the run up (again)."""
        starts = [index for index, event in enumerate(self.events) if event["event"] == "session"]
        return self.events[starts[-1] :] if starts else self.events

    @property
    def scoring(self) -> bool:
        """Whether the last committed round is still to be scored."""
        done, every = self.committed, _whole(self.plan.get("evaluate_every")) or 1
        due = done > 0 and (done % every == 0 or done == self.rounds)
        return self.under_way and due and done not in scored_rounds(self.events)

    @property
    def round_at_hand(self) -> int:
        """The round whose answers are awaited."""
        return self.committed + (0 if self.scoring else 1)

    def since(self, *kinds: str) -> Sequence[Event]:
        """This session's events from the latest one of these kinds on; all of the session's if there is none."""
        session = self.session
        begins = [index for index, event in enumerate(session) if event["event"] in kinds]
        return session[begins[-1] :] if begins else session

    def at_hand(self) -> Sequence[Event]:
        """The events of the training or the scoring that is under way."""
        return self.since("round", "scores")

    def status(self, now: float) -> dict[str, Any]:
        """The run's part of the status."""
        state, rounds = self.state, self.rounds
        seconds = round_seconds(self.events)[-RECENT_ROUNDS:]
        pace = statistics.median(seconds) if seconds else None
        scores = scored_rounds(self.events)
        last = scores[max(scores)] if scores else {}
        dice = [row["dice"] for row in last.values() if row.get("dice") is not None]
        pause = next((event for event in reversed(self.events) if event["event"] in ("paused", "interrupted")), None)
        finished = next((event for event in reversed(self.events) if event["event"] == "finished"), None)
        return {
            "name": self.name,
            "state": state,
            "phase": self._phase() if state == "running" else None,
            "round": self.committed,
            "rounds": rounds,
            "round_at_hand": self.round_at_hand if self.under_way else None,
            "sites": len(self.roster),
            "quorum": _whole(self.plan.get("quorum")) or self._sample or None,
            "sample": None if self.plan.get("sample") is None else self._sample,
            "seconds_per_round": None if pace is None else round(pace, 1),
            "eta_seconds": self._eta(pace, now) if state == "running" else None,
            "dice": math.fsum(dice) / len(dice) if dice else None,
            "dice_sites": len(dice),
            "dice_round": max(scores) if scores else None,
            "waits_for": waits_for(pause) if state == "paused" and pause else {},
            "model_hash": finished.get("model_hash") if finished and state == "finished" else None,
            "started": self.events[0].get("time") if self.events else None,
            "last_event": self.events[-1].get("time") if self.events else None,
        }

    @property
    def _sample(self) -> int:
        """Updates that a round is to be made of."""
        sample = self.plan.get("sample")
        known = isinstance(sample, (int, float)) and not isinstance(sample, bool)
        return sample_size(sample if known else None, len(self.roster))

    def drawn(self, site: str) -> bool:
        """Whether the round at hand asks a site: all of them, unless the plan asks for a sample."""
        told = next((event for event in reversed(self.events) if event["event"] == "chosen"), None)
        return told is None or told.get("round") != self.round_at_hand or site in told.get("sites", [])

    def _phase(self) -> str:
        """What a run that goes on is at."""
        if not any(event["event"] == "site" for event in self.session):
            return "waiting for sites"
        return "scoring" if self.scoring else "training"

    def _eta(self, pace: float | None, now: float) -> float | None:
        """Seconds until the last round is committed, if the next rounds take as long as the recent ones."""
        if pace is None or self.rounds is None:
            return None
        spent = max(0.0, now - float(self.since("round", "resumed")[0]["time"]))
        return round(max(0.0, (self.rounds - self.committed) * pace - min(spent, pace)), 1)

    def accepted(self, audit: Path) -> set[str]:
        """The sites whose update for the round at hand was accepted: the journal tells it at the commit only."""
        if not self.under_way or self.scoring:
            return set()
        begin = float(self.at_hand()[0]["time"]) - 1.0  # two readings of one clock, rounded differently
        run_id = re.compile(re.escape(self.name) + "-[0-9a-f]{12}")
        return {
            str(line.get("site"))
            for line in _tail(audit)
            if (line.get("event"), line.get("decision")) == ("update", "accepted")
            and line.get("round") == self.round_at_hand
            and run_id.fullmatch(str(line.get("run")))
            and _seconds(line.get("time")) >= begin
        }


def read_run(folder: Path) -> ToldRun:
    """The run of a run folder. Raises UserError: no plan that is YAML, or a damaged journal."""
    plan = load_yaml(folder / "run.yaml")
    events = read_events(folder / "journal.jsonl")
    try:
        _check(events)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder / 'journal.jsonl'}: an event has not the fields this version knows ({type(error).__name__}: "
            f"{error}); the run is left out here. Use the version of medsegfed that the run was made with."
        ) from error
    return ToldRun(folder, plan if isinstance(plan, dict) else {}, events, _asked_for(folder, events))


def _check(events: Sequence[Event]) -> None:
    """What is read of events must be there, in the right type; raises whatever reading it raises."""
    run_state(events)
    round_seconds(events)
    for event in committed_rounds(events):
        _ = [int(row["patients"]) for row in event["accepted"].values()]
        _ = weighted_loss(event["accepted"].values())  # a private site tells none
        _ = [*event.get("rejected", {}).items(), *event.get("absent", [])]
    for sites in scored_rounds(events).values():
        _ = [float(row["dice"] or 0.0) for row in sites.values()]


def _asked_for(folder: Path, events: Sequence[Event]) -> bool:
    """Whether queued.json asks for the run and it has not ended since (deploy/runs.py writes it)."""
    try:
        asked = json.loads((folder / "queued.json").read_bytes())["events"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(asked, int) and run_state(events[asked:]) not in ENDED


def waits_for(pause: Event) -> dict[str, str]:
    """Site -> why it is awaited."""
    absent = pause.get("absent")
    if isinstance(absent, dict):
        return {printable(site, 64): printable(reason) for site, reason in absent.items()}
    return {printable(site, 64): "absent" for site in absent} if isinstance(absent, list) else {}


def tell(event: Event) -> str:
    """An event of a journal as one line for a person; of a later version's event its name."""
    try:
        said = _WORDS[str(event["event"])](event)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError):
        said = str(event.get("event"))
    return printable(said, LONGEST_END if event.get("event") in ("failed", "interrupted") else LONGEST_REASON)


def _tell_round(event: Event) -> str:
    if event["round"] == 0:
        return "the first model stands"
    parts = [f"round {event['round']} committed: {len(event['accepted'])} updates"]
    loss = weighted_loss(event["accepted"].values())
    if loss is not None:
        parts[0] += f", loss {loss:.3f}"
    if event.get("rejected"):
        parts.append(f"rejected {', '.join(event['rejected'])}")
    if event.get("absent"):
        parts.append(f"absent {', '.join(event['absent'])}")
    return "; ".join(parts)


def _tell_scores(event: Event) -> str:
    dice = {site: row["dice"] for site, row in event["sites"].items() if row.get("dice") is not None}
    if not dice:
        return f"round {event['round']} scored: no Dice was reported"
    worst = min(dice, key=lambda site: dice[site])
    mean = math.fsum(dice.values()) / len(dice)
    over = "1 site" if len(dice) == 1 else f"{len(dice)} sites"
    return f"round {event['round']} scored: mean Dice {mean:.3f} of {over}, lowest {dice[worst]:.3f} at {worst}"


def _tell_pause(event: Event) -> str:
    awaited = ", ".join(f"{site} ({reason})" for site, reason in waits_for(event).items())
    return f"round {event['round']} waits, {event.get('need')} updates are needed: {awaited}"


_WORDS: dict[str, Callable[[Event], str]] = {
    "session": lambda _: "the server takes the run up",
    "site": lambda e: f"{e['site']} is here: {e['train_patients']} training and {e['test_patients']} test patients",
    "refused": lambda e: f"{e['site']} refuses: {e.get('reason') or e['code']}",
    "rejected": lambda e: f"round {e['round']}: {e['site']} is left out: {e['reason']}",
    "suspended": lambda e: f"{e['site']} is suspended: {e['strikes']} updates in a row were rejected",
    "selected": lambda e: f"the model of round {e['round']} of {e['rounds']} is handed out, the best by {e['by']}",
    "stranger": lambda e: f"a message is left out: {e['reason']}",
    "left": lambda e: f"{e['site']} is no member any more",
    "canary": lambda e: (
        f"a canary: {len(e['sites'])} sites are asked " + ("for one step" if e["step"] else "who they are")
    ),
    "tried": lambda e: (
        f"{e['site']} " + (f"would fail: {e['reason']}" if "reason" in e else f"is ready: {e['seconds']:.1f} s a step")
    ),
    "chosen": lambda e: f"round {e['round']} asks {len(e['sites'])} sites: {', '.join(e['sites'])}",
    "lost": lambda e: f"{e['site']} lost its line",
    "paused": _tell_pause,
    "interrupted": lambda e: f"interrupted, tried again until it works: {e['reason']}",
    "resumed": lambda e: f"round {e['round']} goes on",
    "round": _tell_round,
    "scores": _tell_scores,
    "below_quorum": lambda e: f"round {e['round']} has too few updates: {len(e['accepted'])}",
    "stopped": lambda e: "stopped" + (f" by {e['by']}" if e.get("by") else ""),
    "failed": lambda e: f"failed: {e['reason']}",
    "finished": lambda e: f"finished: model {str(e['model_hash'])[:12]}",
}


def printable(text: object, longest: int = LONGEST_REASON) -> str:
    """One line of printable signs: what comes from a site writes neither pages nor commands to a terminal."""
    line = " ".join(str(text).split())
    shown = "".join(sign if sign.isprintable() else "?" for sign in line)
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last lines of a log of JSON objects; lines that are cut or damaged are left out."""
    try:
        with open(path, "rb") as handle:
            size = handle.seek(0, 2)
            handle.seek(max(0, size - AUDIT_TAIL))
            lines = handle.read(AUDIT_TAIL).split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def _seconds(time: object) -> float:
    """An ISO 8601 time in seconds of the epoch; minus infinity when it is none."""
    try:
        return datetime.fromisoformat(str(time)).timestamp()
    except (ValueError, OverflowError):
        return -math.inf


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
