"""What a journal says of a run: its rounds, scores, seconds and bytes. Pure functions over events, light to import."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from server.journal import Event

RunState = Literal["not started", "running", "paused", "stopped", "failed", "finished"]
STOP = "stop.json"  # in the run folder: the coordinator wants the run to end; its content says who and when
ENDED: tuple[RunState, ...] = ("stopped", "failed", "finished")

# The latest event of these kinds says how a run stands; the others (site, refused, rejected, ...) do not change it.
_STATES: dict[str, RunState] = {
    "session": "running",
    "round": "running",
    "scores": "running",
    "resumed": "running",
    "paused": "paused",
    "interrupted": "paused",  # the disk refuses
    "stopped": "stopped",
    "below_quorum": "failed",
    "failed": "failed",
    "finished": "finished",
}
_STARTS = ("session", "resumed")  # work begins, or goes on


def sample_size(sample: int | float | None, sites: int) -> int:
    """Updates that a round is to be made of: the sample, or one of every site. A part is rounded, half up."""
    if sample is None:
        return sites
    return max(1, math.floor(sample * sites + 0.5)) if isinstance(sample, float) else sample


def committed_rounds(events: Iterable[Event]) -> list[Event]:
    """The committed rounds in order; a round that was repeated after a crash counts as it was committed."""
    rounds = {event["round"]: event for event in events if event["event"] == "round"}
    return [rounds[number] for number in sorted(rounds) if number > 0]


def scored_rounds(events: Iterable[Event]) -> dict[int, dict[str, dict[str, Any]]]:
    """Round -> site -> its averages over its held-out patients."""
    return {event["round"]: event["sites"] for event in events if event["event"] == "scores"}


def released_round(events: Iterable[Event]) -> int | None:
    """The round whose model is handed out: the selected one, else the last committed one; None before the first."""
    found = None
    for event in events:
        if event["event"] in ("round", "selected") and event["round"] > 0:
            found = event["round"]
    return found


def released_hash(events: Sequence[Event]) -> str | None:
    """Hash of the model that is handed out."""
    told = [event for event in events if event["event"] in ("round", "selected") and event["round"] > 0]
    return told[-1].get("released", told[-1]["model_hash"]) if told else None


def run_state(events: Sequence[Event]) -> RunState:
    """How the run stands by what was told last; whether a process still works on it, a journal cannot know."""
    told = (_STATES[str(event["event"])] for event in reversed(events) if str(event["event"]) in _STATES)
    return next(told, "not started")


def history(events: Sequence[Event]) -> list[dict[str, Any]]:
    """The federated model at each site after each round, as report.json holds it."""
    scored = scored_rounds(events)
    rows = []
    for event in committed_rounds(events):
        number = event["round"]
        for site in sorted(set(event["accepted"]) | set(scored.get(number, {}))):
            rows.append(
                {
                    "round": number,
                    "site": site,
                    "loss": event["accepted"].get(site, {}).get("loss"),
                    "dice": scored.get(number, {}).get(site, {}).get("dice"),
                }
            )
    return rows


def absences(events: Iterable[Event], site: str) -> dict[str, Any]:
    """The committed rounds without a site: those it was absent from, and those whose update was rejected."""
    rounds = committed_rounds(events)
    found: dict[str, Any] = {
        "absent_rounds": [event["round"] for event in rounds if site in event.get("absent", [])],
        "rejected_rounds": [
            {"round": event["round"], "reason": event["rejected"][site]}
            for event in rounds
            if site in event.get("rejected", {})
        ],
    }
    # A site whose third rejection suspends it was asked in that round.
    suspended = [e["round"] for e in rounds if site in e.get("suspended", []) and site not in e.get("suspends", [])]
    found |= {"suspended_rounds": suspended} if suspended else {}
    late = [
        {"round": row["round"], "counted": event["round"]}
        for event in rounds
        for row in event.get("late", [])
        if row["site"] == site
    ]
    found |= {"late_rounds": late} if late else {}
    sampled = [event for event in rounds if "chosen" in event]
    return found | ({"chosen_rounds": [e["round"] for e in sampled if site in e["chosen"]]} if sampled else {})


def spent_privacy(events: Iterable[Event], site: str) -> tuple[float | None, float | None]:
    """Epsilon and delta that a site's patients have spent in all, by its last counted update; None without privacy."""
    rows: list[tuple[int, Event]] = []  # by the round that the update was made in: a late one tells of an earlier state
    for event in committed_rounds(events):
        rows += [(event["round"], event["accepted"][site])] if site in event["accepted"] else []
        rows += [(row["round"], row) for row in event.get("late", []) if row["site"] == site]
    last = max(rows, key=lambda row: row[0])[1] if rows else {}
    return last.get("epsilon"), last.get("privacy_delta")


def traffic(events: Iterable[Event]) -> dict[str, int]:
    """Bytes of weights that travelled in committed rounds, and to have their models scored."""
    told = list(events)
    moved = [event["bytes"] for event in committed_rounds(told)]
    scored = {event["round"]: event.get("bytes", {"down": 0}) for event in told if event["event"] == "scores"}
    down = sum(m["down"] for m in (*moved, *scored.values()))
    return {"up": sum(m["up"] for m in moved), "down": down}


def site_seconds(events: Sequence[Event], over_sites: Callable[[list[float]], float]) -> tuple[float | None, float]:
    """Seconds that sites spent training and scoring in committed rounds; None where a private site does not tell.

    Args:
        over_sites: what the seconds of a round's sites make: `sum` where one machine plays all of them in turn, the
            largest where they work at the same time.
    """
    rounds = committed_rounds(events)
    training = [[row["seconds"] for row in event["accepted"].values()] for event in rounds]
    scoring = [over_sites([row["seconds"] for row in sites.values()]) for sites in scored_rounds(events).values()]
    told = all(spent is not None for spents in training for spent in spents)
    return math.fsum(map(over_sites, training)) if told else None, math.fsum(scoring)


def run_incidents(events: Iterable[Event]) -> list[dict[str, Any]]:
    """What befell a run: waiting below the quorum, a disk that refused, a lost line, a round that was made again.

    Returns:
        In order: time (seconds since 1970), what, done, and the seconds until it was (None: not yet).
    """
    told: list[dict[str, Any]] = []
    waits: dict[str, list[dict[str, Any]]] = {}  # kind of event that ends incidents -> the incidents
    seen: set[int] = set()
    for event in events:
        kind, time = event["event"], float(event["time"])
        for mended in waits.pop(kind, []):
            mended["seconds"] = round(max(0.0, time - mended["time"]), 1)
        if kind == "paused":
            who = ", ".join(f"{site} ({why})" for site, why in sorted(event["absent"].items()))
            found = _incident(time, f"round {event['round']} waited for {who}", "went on by itself")
            waits.setdefault("resumed", []).append(found)
        elif kind == "interrupted":
            found = _incident(time, str(event["reason"]), "taken up again")
            waits.setdefault("session", []).append(found)
        elif kind == "lost":
            found = _incident(time, f"{event['site']} lost its line", "asked again")
            waits.setdefault("round", []).append(found)
        elif kind == "round" and event["round"] in seen:
            found = _incident(time, f"the checkpoint of round {event['round']} was damaged", "made again, the same")
            found["seconds"] = 0.0
        else:
            found = None
        if kind == "round":
            seen.add(event["round"])
        if found is not None:
            told.append(found)
    return told


def _incident(time: float, what: str, done: str) -> dict[str, Any]:
    return {"time": time, "what": what, "done": done, "seconds": None}


def working_seconds(events: Iterable[Event], now: float | None = None) -> float:
    """Seconds of all sessions, without pauses and without the time between a session's last event and the next one.

    Args:
        now: end of the session that is open; None takes its last event.
    """
    total, since, last = 0.0, None, None
    for event in events:
        time = float(event["time"])
        if event["event"] in _STARTS or last is None:
            total += last - since if since is not None and last is not None else 0.0
            since = time
        elif event["event"] in ("paused", "interrupted") and since is not None:
            total += time - since
            since = None
        last = time
    if since is not None and last is not None:
        total += (last if now is None else now) - since
    return max(0.0, total)  # a clock that was set back in between must not give a negative time


def round_seconds(events: Iterable[Event]) -> list[float]:
    """Seconds from a round's beginning to its commit, one a committed round in the order of commits.

    A round begins where the one before was committed, or where the work began anew after that; the first begins when
    the last of its sites has introduced itself, for hospitals may need a day to get there.
    """
    seconds: list[float] = []
    since: float | None = None
    for event in events:
        time, kind = float(event["time"]), event["event"]
        if kind == "round" and event["round"] > 0 and since is not None:
            seconds.append(max(0.0, time - since))
        if kind in (*_STARTS, "round") or since is None or (kind == "site" and not seconds):
            since = time
    return seconds
