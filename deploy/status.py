"""`medsegfed status`: the state of a federation as a table that renews itself, as plain lines, or as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.federation import Federation
from deploy.run_status import printable
from deploy.standing import Standing, status_of
from medsegdiff.errors import EXIT_CODE
from server.rounds import ENDED

__all__ = ["render_status", "show", "status_of", "watch"]

REFRESH_SECONDS = 2.0
PLAIN_SECONDS = 30.0  # between plain lines when nothing happens
SHORT_REASON = 60  # signs of a reason in the table; the events below it have more
NONE = "–"
STYLES = {
    "training": "cyan", "scoring": "cyan", "answered": "green", "rejected": "bold red", "refused": "yellow",
    "absent": "yellow", "revoked": "red", "suspended": "red",
    "running": "cyan", "finished": "green", "paused": "yellow", "stopped": "yellow", "failed": "bold red",
}  # fmt: skip


Look = Callable[[], dict[str, Any]]
Sleep = Callable[[float], None]


def show(
    federation: Federation, name: str | None = None, as_json: bool = False, console: Console | None = None
) -> None:
    """Show how a federation stands at this moment, with the run `name`, or the one at hand, or the last.

    Raises:
        UserError: there is no run of that name.
    """
    console = console or Console()
    status = status_of(federation.folder, time.time(), name)
    if as_json:
        _print(console, json.dumps(status, indent=1, allow_nan=False))
    else:
        console.print(render_status(status))


def watch(
    federation: Federation,
    name: str | None = None,
    as_json: bool = False,
    console: Console | None = None,
    clock: Callable[[], float] = time.time,
    sleep: Sleep = time.sleep,
) -> int:
    """Show it again every two seconds until the run has ended, or Ctrl-C, which ends the watching alone.

    On a terminal a table renews itself in place; elsewhere each change is a line; with `as_json` each look is an object
    on a line of its own.

    Returns:
        An exit code: 0 when the run has finished or Ctrl-C was pressed, 1 when it was stopped, 2 when it failed.

    Raises:
        UserError: there is no run of that name.
    """
    console = console or Console()
    standing = Standing(federation.folder)

    def look() -> dict[str, Any]:
        return standing.status(clock(), name)

    follow = _watch_json if as_json else _watch_table if console.is_terminal else _watch_lines
    try:
        state = follow(look, console, sleep)["run"]["state"]
    except KeyboardInterrupt:
        return 0
    return {"failed": EXIT_CODE, "stopped": 1}.get(state, 0)


def ended(status: dict[str, Any]) -> bool:
    """Whether there is nothing more to watch."""
    return status["run"] is not None and status["run"]["state"] in ENDED


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)


def _watch_json(look: Look, console: Console, sleep: Sleep) -> dict[str, Any]:
    while True:
        status = look()
        _print(console, json.dumps(status, allow_nan=False))
        if ended(status):
            return status
        sleep(REFRESH_SECONDS)


def _watch_table(look: Look, console: Console, sleep: Sleep) -> dict[str, Any]:
    status = look()
    with Live(render_status(status), console=console, auto_refresh=False) as live:
        while not ended(status):
            sleep(REFRESH_SECONDS)
            status = look()
            live.update(render_status(status), refresh=True)
    return status


def _watch_lines(look: Look, console: Console, sleep: Sleep) -> dict[str, Any]:
    run, told, shown, since = "", 0, "", 0.0
    problems: list[str] = []
    while True:
        status = look()
        if status["run"] and status["run"]["name"] != run:
            run, told = status["run"]["name"], 0
        new = max(0, status["events_total"] - told)
        lines = [f"{_clock(event['time'])} {event['text']}" for event in status["events"][-new:]] if new else []
        told = status["events_total"]
        lines += [problem for problem in status["problems"] if problem not in problems]
        problems = status["problems"]
        summary = summary_line(status)
        if summary != shown and (lines or since >= PLAIN_SECONDS or not shown):
            lines, shown, since = [*lines, summary], summary, 0.0
        for line in lines:
            _print(console, line)
        if ended(status):
            return status
        sleep(REFRESH_SECONDS)
        since += REFRESH_SECONDS


def summary_line(status: dict[str, Any]) -> str:
    """The state in one line."""
    sites = [site for site in status["sites"] if site["takes_part"]]
    online = sum(site["online"] for site in sites)
    return " · ".join([*_run_parts(status), f"{online} of {len(sites)} sites online"])


def _run_parts(status: dict[str, Any]) -> list[str]:
    run = status["run"]
    if run is None:
        return ["no run yet"]
    parts = [f"run {run['name']}", str(run["phase"] or run["state"])]
    if run["rounds"] is not None:
        parts.append(f"{run['round']} of {run['rounds']} rounds")
    if run["quorum"] is not None:
        parts.append(f"quorum {run['quorum']} of {run['sites'] if run['sample'] is None else run['sample']}")
    if run["sample"] is not None:
        parts.append(f"{run['sample']} of {run['sites']} sites a round")
    if run["dice"] is not None:
        few = f" of {run['dice_sites']} of {run['sites']} sites" if run["dice_sites"] < run["sites"] else ""
        parts.append(f"mean Dice {run['dice']:.3f}{few}")
    if run["seconds_per_round"] is not None:
        parts.append(f"{span(run['seconds_per_round'])} a round")
    if run["eta_seconds"] is not None:
        parts.append(f"{span(run['eta_seconds'])} to go")
    return parts


def render_status(status: dict[str, Any]) -> RenderableType:
    """The state for a terminal: the run, its sites, the services, what happened last."""
    run = status["run"]
    head = Text(f"{status['federation']}  ", style="bold")
    head.append(" · ".join(_run_parts(status)), style=STYLES.get(run["state"], "") if run else "")
    parts: list[RenderableType] = [head]
    if run and run["waits_for"]:
        awaited = ", ".join(f"{site} ({reason})" for site, reason in run["waits_for"].items())
        parts.append(Text(f"waits for {awaited}", style="yellow"))
    if status["queued"]:
        parts.append(Text(f"queued: {', '.join(status['queued'])}"))
    parts += ["", _sites_table(status), "", _services_table(status), _certificates(status)]
    if status["events"]:
        parts += ["", _events_table(status)]
    if status["incidents"]:
        parts += ["", _incidents_table(status)]
    parts += [Text(problem, style="bold red") for problem in status["problems"]]
    return Group(*parts)


def _sites_table(status: dict[str, Any]) -> Table:
    table = _table("Site", "Seen", "Certificate", "Round", "Dice", "Loss", "State")
    for column in table.columns[1:6]:
        column.justify, column.no_wrap = "right", True
    for site in status["sites"]:
        state = Text(site["state"], style=STYLES.get(site["state"], ""))
        if site["reason"]:
            state.append(f": {printable(site['reason'], SHORT_REASON)}")
        table.add_row(
            Text(site["site"], overflow="fold"),
            _seen(site),
            _days(site["certificate_days"]),
            Text(NONE if site["round_answered"] is None else str(site["round_answered"])),
            Text(NONE if site["dice"] is None else f"{site['dice']:.3f}"),
            Text(NONE if site["loss"] is None else f"{site['loss']:.3f}"),
            state,
        )
    if not status["sites"]:
        table.add_row(Text("none admitted"))
    return table


def _seen(site: dict[str, Any]) -> Text:
    away = site["last_seen_seconds"]
    if away is None:
        return Text("never", style="yellow")
    return Text("online", style="green") if site["online"] else Text(f"{span(away)} ago", style="yellow")


def _days(days: float | None) -> Text:
    """Days left, in the colour of the warning that is due (30, 7, 1 days)."""
    if days is None:
        return Text(NONE)
    style = "bold red" if days <= 1 else "red" if days <= 7 else "yellow" if days <= 30 else ""
    return Text("expired" if days <= 0 else f"{days:.0f} d" if days >= 2 else span(days * 86_400), style=style)


def _services_table(status: dict[str, Any]) -> Table:
    table = _table("Service", "State", "Since", "Restarts")
    for row in status["services"]:
        well = bool(row["healthy"])
        state = Text(str(row["phase"] or NONE) + ("" if well else ", not well"), style="green" if well else "bold red")
        restarts = row["restarts"]
        table.add_row(
            Text(row["service"]),
            state,
            Text(_clock(row["since"])),
            Text(NONE if restarts is None else str(restarts), style="yellow" if restarts else ""),
        )
    if not status["services"]:
        table.add_row(Text("server"), Text("not running", style="yellow"))
    return table


def _certificates(status: dict[str, Any]) -> Text:
    days = status["certificates"]
    return Text.assemble("Certificates: server ", _days(days["server"]), ", authority ", _days(days["ca"]))


def _events_table(status: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for event in status["events"]:
        table.add_row(Text(_clock(event["time"])), Text(event["text"]))
    return table


def _incidents_table(status: dict[str, Any]) -> Table:
    table = _table("Failed", "What", "Done", "After")
    for row in status["incidents"]:
        mended = row["seconds"] is not None
        table.add_row(
            Text(_clock(row["time"])),
            Text(printable(row["what"], SHORT_REASON), overflow="fold"),
            Text(row["done"] if mended else "not yet", style="" if mended else "bold red"),
            Text(span(row["seconds"]) if mended else NONE),
        )
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, header_style="dim")
    return table


def _clock(moment: object) -> str:
    """Time of day here, of seconds of the epoch or of an ISO 8601 time."""
    try:
        found = (
            datetime.fromtimestamp(moment) if isinstance(moment, int | float) else datetime.fromisoformat(str(moment))
        )
        return found.astimezone().strftime("%H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return NONE


def span(seconds: float) -> str:
    """A duration as a person says it: two units at most."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d"
