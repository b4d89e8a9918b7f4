"""How a federation stands: its run, its sites, its services. Read from files alone, and nothing is disturbed by it.

    members.json                   who belongs, certificates
    runs/*/run.yaml journal.jsonl  the plan and what happened
    audit.jsonl                    which updates of the round at hand were accepted
    state/logs/access.jsonl        who was seen at the gateway, and when
    state/supervisor.json          the server's processes

`status_of` gives plain data, fit for JSON; status.py shows it, metrics.py counts it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from client.certificates import certificate_days_left, expiry_warning
from deploy.federation import Federation, open_federation
from deploy.incidents import incidents
from deploy.logfiles import BEGINNING, LogPosition, read_access_log
from deploy.run_status import ToldRun, printable, read_run, tell
from deploy.supervisor import read_status
from medsegdiff.errors import UserError
from server.journal import Event, read_events
from server.members import Member, moment
from server.rounds import committed_rounds, scored_rounds

ACCESS_LOG = "access.jsonl"  # in the federation's folder of logs
AHEAD_SECONDS = 5.0  # of a request that seems to come from the future: beyond, the clock was set back since
ONLINE_SECONDS = 60.0  # a site's SuperNode asks for work every 3 s and gives a sign of life every 30 s: two are missing
SHOWN_EVENTS = 8
SHOWN_INCIDENTS = 5

T = TypeVar("T")


@dataclass
class GatewayTally:
    """What the gateway saw of each site, followed from where the last look at its log ended.

    Requests without a certificate of the federation are counted under the site None.
    """

    path: Path
    last_seen: dict[str, float] = field(default_factory=dict)  # site -> time of its last answered request
    received: Counter[str | None] = field(default_factory=Counter)  # bytes, by site
    sent: Counter[str | None] = field(default_factory=Counter)
    requests: Counter[tuple[str | None, int]] = field(default_factory=Counter)  # (site, HTTP status)
    position: LogPosition = BEGINNING

    def update(self) -> None:
        """Count what was logged since the last call."""
        while True:
            entries, self.position = read_access_log(self.path, self.position)
            for entry in entries:
                self.received[entry.site] += max(0, entry.received)
                self.sent[entry.site] += max(0, entry.sent)
                self.requests[entry.site, entry.status] += 1
                if entry.site is not None and entry.status == 200:
                    self.last_seen[entry.site] = entry.time  # not the highest: a clock may have been ahead
            if not entries:
                return


def access_log(federation: Federation) -> Path:
    """Where the gateway logs its requests."""
    return federation.logs / ACCESS_LOG


class Standing:
    """A federation to be looked at again and again: what has not changed since the last look is not read anew."""

    def __init__(self, folder: Path) -> None:
        self.federation = open_federation(folder)
        self.tally = GatewayTally(access_log(self.federation))
        self._known: dict[Path, tuple[tuple[int, ...], ToldRun]] = {}  # run folder -> its files' stamps, the run

    def status(self, now: float, run: str | None = None) -> dict[str, Any]:
        """How the federation stands, as `status_of` tells it."""
        federation, problems = self.federation, list[str]()
        self.tally.update()
        nobody: dict[str, Member] = {}
        members = _tolerant(federation.members, nobody, problems)
        runs = self.runs(problems)
        told = _choose(runs, federation.runs, run)
        accepted = told.accepted(federation.audit_file) if told else set()
        names = dict.fromkeys([*members, *(told.roster if told else ())])
        server = read_status(federation.state)
        if told and server is None and (told.under_way or told.state == "queued"):
            how = "stands still" if told.under_way else "waits"
            problems.append(f"{told.name} {how}: the server is not running. To go on: medsegfed server start")
        return {
            "federation": federation.name,
            "time": round(now, 3),
            "run": told.status(now) if told else None,
            "queued": [found.name for found in runs if found.state == "queued"],
            "sites": [_site(name, members.get(name), told, accepted, self.tally, now) for name in names],
            "services": _services(server),
            "server_pid": server["pid"] if server else None,
            "certificates": _certificates(federation, now, problems),
            "events": [
                {"time": event.get("time"), "event": str(event["event"]), "text": tell(event)}
                for event in (told.events[-SHOWN_EVENTS:] if told else [])
            ],
            "events_total": len(told.events) if told else 0,
            "incidents": _tolerant(lambda: self._incidents(runs), list[dict[str, Any]](), problems)[-SHOWN_INCIDENTS:],
            "problems": problems,
        }

    def _incidents(self, runs: Sequence[ToldRun]) -> list[dict[str, Any]]:
        events = read_events(self.federation.state / "supervisor.jsonl")
        return incidents(events, {run.name: run.events for run in runs})

    def runs(self, problems: list[str]) -> list[ToldRun]:
        """All runs, the latest first. One that cannot be read is as it was at the last look, or left out."""
        stamps = {path.parent: _stamps(path.parent) for path in self.federation.runs.glob("*/run.yaml")}
        for folder, stamp in stamps.items():
            if folder not in self._known or self._known[folder][0] != stamp:
                try:
                    self._known[folder] = (stamp, read_run(folder))
                except UserError as error:
                    problems.append(str(error))
        latest = sorted(stamps, key=lambda folder: max(stamps[folder][::2]), reverse=True)
        return [self._known[folder][1] for folder in latest if folder in self._known]


def status_of(folder: Path, now: float, run: str | None = None) -> dict[str, Any]:
    """How the federation in `folder` stands.

    Args:
        now: seconds of the epoch.
        run: name of the run to tell about; None takes the one under way, else the latest.

    Returns:
        Plain data: federation, time, run (None without one), queued, sites, services, server_pid, certificates, events,
        events_total, incidents, problems. What is not known is None. A file that cannot be read is named in `problems`,
        and the rest is told.

    Raises:
        UserError: there is no federation, or no run of that name.
    """
    return Standing(folder).status(now, run)


# --- which run --------------------------------------------------------------------------------------------------------


def _stamps(folder: Path) -> tuple[int, ...]:
    """When the files of a run were last changed (ns) and their sizes, in turn: another stamp, another content."""
    found: list[int] = []
    for name in ("run.yaml", "journal.jsonl", "queued.json"):
        try:
            stat = (folder / name).stat()
        except OSError:
            found += [0, 0]
        else:
            found += [stat.st_mtime_ns, stat.st_size]
    return tuple(found)


def _choose(found: list[ToldRun], runs: Path, name: str | None) -> ToldRun | None:
    """The run of that name; without one the run under way, else the latest."""
    if name is None:
        return next((run for run in found if run.under_way), found[0] if found else None)
    for run in found:
        if run.name == name:
            return run
    if (runs / name / "run.yaml").exists():
        read_run(runs / name)  # raises what keeps it from being told
    known = ", ".join(sorted(run.name for run in found)) or "none"
    raise UserError(f"{name}: there is no such run in {runs}; the runs are: {known}.")


# --- one site ---------------------------------------------------------------------------------------------------------


def _site(
    name: str, member: Member | None, run: ToldRun | None, accepted: set[str], tally: GatewayTally, now: float
) -> dict[str, Any]:
    seen = tally.last_seen.get(name)
    away = None if seen is None else max(0.0, now - seen)
    online = seen is not None and -AHEAD_SECONDS <= now - seen <= ONLINE_SECONDS
    days = (moment(member.not_after).timestamp() - now) / 86_400 if member else None
    took_part = [event for event in committed_rounds(run.events) if name in event["accepted"]] if run else []
    scores = scored_rounds(run.events) if run else {}
    own = [row[name]["dice"] for _, row in sorted(scores.items()) if row.get(name, {}).get("dice") is not None]
    answered = run is not None and name in accepted
    state, reason = _state(name, member, run, answered, online)
    return {
        "site": name,
        "status": member.status if member else None,
        "takes_part": (member is None or member.active) and (run is None or name in run.roster),
        "online": online,
        "last_seen_seconds": None if away is None else round(away, 1),
        "certificate_days": None if days is None else round(days, 2),
        "certificate_warning": None if days is None else expiry_warning(days),
        "round_answered": run.round_at_hand if run and answered else (took_part[-1]["round"] if took_part else None),
        "dice": own[-1] if own else None,
        "loss": took_part[-1]["accepted"][name].get("loss") if took_part else None,
        "state": state,
        "reason": reason,
        "rejected": sum(event["event"] == "rejected" and event.get("site") == name for event in run.events)
        if run
        else 0,
        "received_bytes": tally.received.get(name, 0),
        "sent_bytes": tally.sent.get(name, 0),
    }


State = tuple[str, str | None]  # what a site is at, and why if it is not as it should be


def _state(name: str, member: Member | None, run: ToldRun | None, answered: bool, online: bool) -> State:
    if member is not None and member.status != "admitted":
        return member.status, None
    if run is None or name not in run.roster or run.state == "queued":
        return ("idle" if online else "absent"), None
    return _at_work(name, run, answered, online) if run.under_way else _end_state(name, run, online)


def _at_work(name: str, run: ToldRun, answered: bool, online: bool) -> State:
    introduced, trouble = _last_word(name, run.session)
    rejection = _last_of("rejected", name, run.at_hand())
    if answered:
        return "answered", None
    if rejection is not None:
        return "rejected", printable(rejection.get("reason", ""))
    if trouble is not None:
        return trouble
    if not online:
        return "absent", None
    if not run.scoring and not run.drawn(name):
        return "idle", None
    at_work = "scoring" if run.scoring else "training"
    return (at_work if introduced and run.state == "running" else "waiting"), None


def _end_state(name: str, run: ToldRun, online: bool) -> State:
    """How a site stands after a run: as the last committed round left it."""
    rounds = committed_rounds(run.events)
    last: Mapping[str, Any] = rounds[-1] if rounds else {}
    if name in last.get("accepted", {}):
        return "answered", None
    if name in last.get("rejected", {}):
        return "rejected", printable(last["rejected"][name])
    if name in last.get("absent", []):
        return "absent", f"in round {last.get('round')}"
    return ("idle" if online else "absent"), None


def _last_word(name: str, events: Sequence[Event]) -> tuple[bool, State | None]:
    """Whether a site has introduced itself in these events, and what it met with since."""
    for event in reversed(events):
        if event["event"] == "round" and name in event.get("accepted", {}):
            return True, None
        if event.get("site") == name and event["event"] in ("site", "lost"):
            return True, None
        if event.get("site") == name and event["event"] == "refused":
            return False, ("refused", printable(event.get("reason") or event.get("code", "")))
    return False, None


def _last_of(kind: str, name: str, events: Iterable[Event]) -> Event | None:
    found = [event for event in events if event["event"] == kind and event.get("site") == name]
    return found[-1] if found else None


# --- services and certificates ----------------------------------------------------------------------------------------


def _services(server: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The supervised processes; none when no supervisor lives."""
    children = server.get("children") if server else None
    if not isinstance(children, dict):
        return []
    keys = ("phase", "pid", "since", "restarts", "healthy", "last_exit")
    return [
        {"service": printable(name, 64), **{key: child.get(key) for key in keys}}
        for name, child in children.items()
        if isinstance(child, dict)
    ]


def _certificates(federation: Federation, now: float, problems: list[str]) -> dict[str, float | None]:
    """Days left of the server's certificate and of the authority's."""
    at = datetime.fromtimestamp(now).astimezone()

    def left(path: Path) -> float | None:
        return _tolerant(lambda: round(certificate_days_left(path, at), 2), None, problems)

    return {"server": left(federation.server_crt), "ca": left(federation.ca_crt)}


def _tolerant(read: Callable[[], T], otherwise: T, problems: list[str]) -> T:
    """What `read` gives; a fault becomes one of the problems."""
    try:
        return read()
    except UserError as error:
        problems.append(str(error))
        return otherwise
