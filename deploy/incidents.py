"""What failed, when, what was done about it and what it cost, told from a supervisor's journal (supervisor.jsonl)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from server.journal import Event


class _Story:
    """The incidents so far; an open one is mended by a later event."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self._open: dict[str, dict[str, Any]] = {}  # by what mends it
        self._stopping: set[str] = set()
        self._alive: set[str] = set()
        self._last_seen: float | None = None  # of a supervisor that was killed

    def hear(self, event: Event) -> None:
        """One event of the journal, in order."""
        if not isinstance(event.get("time"), int | float):
            return  # a line that was changed from outside; the others still tell their story
        kind, child, time = str(event["event"]), str(event.get("child")), float(event["time"])
        if kind == "ending" and event.get("reason") == "stopping":
            self._stopping.add(child)
        elif kind == "ending" or (kind == "exited" and child not in self._stopping):
            why = event.get("reason") or event.get("how")
            self._begin(f"ready {child}", time, f"{child}: {why}", "started again")
        elif kind == "predecessor_killed":
            self._last_seen = _seconds(event.get("last_seen"))
        elif kind == "run_lost":
            what = f"run {event.get('run')}: {event.get('reason')}"
            self._begin("run_started", time, what, "taken up again", run=str(event.get("run")))
        elif kind == "not_renewed":
            self._begin("renewed", time, f"certificate: {event.get('reason')}", "renewed")
        elif kind == "server_renewed":
            kind = "renewed"
        elif kind == "started" and event.get("restarts") == 0 and child in self._alive:
            self._alive.clear()  # of an earlier supervisor, which did not live to end them
            since = time if self._last_seen is None else min(time, self._last_seen)
            self._begin(f"ready {child}", since, "the supervisor was killed, or the machine went down", "started again")
        if kind in ("exited", "stopped"):
            self._alive.discard(child)
        if kind == "started":
            self._stopping.discard(child)
            self._alive.add(child)
        self._end(f"ready {child}" if kind == "ready" else kind, time)

    def _begin(self, mended_by: str, time: float, what: str, done: str, **more: str) -> None:
        if mended_by not in self._open:
            self._open[mended_by] = {"time": time, "what": what, "done": done, "seconds": None, **more}
            self.told.append(self._open[mended_by])

    def _end(self, mended_by: str, time: float) -> None:
        found = self._open.pop(mended_by, None)
        if found is not None:
            found["seconds"] = round(max(0.0, time - found["time"]), 1)


def _seconds(text: object) -> float | None:
    """Epoch seconds of an ISO 8601 time with its offset."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None


def incidents(events: Iterable[Event], runs: Mapping[str, Iterable[Event]] | None = None) -> list[dict[str, Any]]:
    """In order: time (epoch seconds), what, done, and the seconds until it was (None: not yet).

    Args:
        runs: name -> journal. A run that was lost is told as taken up again when its own journal says so, some seconds
            after its ServerApp was started; where there is no such journal, when it was started.
    """
    story = _Story()
    for event in events:
        story.hear(event)
    for told in story.told:
        run = told.pop("run", None)
        if run in (runs or {}):
            told["seconds"] = _until_taken_up(told["time"], (runs or {})[run])
    return story.told


def _until_taken_up(lost: float, journal: Iterable[Event]) -> float | None:
    """Seconds from the loss of a run to the next session in its journal; None where there is none yet."""
    sessions = [event.get("time") for event in journal if event["event"] == "session"]
    later = [time - lost for time in sessions if isinstance(time, int | float) and time >= lost]
    return round(min(later), 1) if later else None
