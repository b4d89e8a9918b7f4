"""`medsegfed status`: what it reads out of files that others are writing, and how it shows it."""

from __future__ import annotations

import io
import json
import re
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from rich.console import Console
from told_run import BEGIN, ROUND, Events, beginning, one_round, story
from watched_federation import RUN_ID, at, decide, make_federation, requests, supervise, tell_run

from deploy.federation import Federation
from deploy.run_status import tell
from deploy.standing import GatewayTally, Standing, access_log, status_of
from deploy.status import render_status, show, summary_line, watch
from medsegdiff.chained_log import ChainedLog
from medsegdiff.errors import UserError
from server.journal import Journal
from server.members import edit_members, iso

NOW = BEGIN + 15 + 2 * ROUND + 25  # 25 s after the second of ten rounds was committed, 20 s after it was scored
HOSTILE = "\x1b[31mred[bold]\nline"


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Three members, no server, no run."""
    return make_federation(tmp_path / "federation")


def told(kind: str, time: float, **fields: object) -> dict:
    return {"event": kind, "time": time, **fields}


def two_of_ten() -> Events:
    return story(2, finished=False)


def everybody_online(federation: Federation, now: float = NOW) -> None:
    requests(federation, *((now - 3, site, 200) for site in ("alder", "birch", "elm")))


def sites(federation: Federation, now: float = NOW) -> dict[str, dict]:
    return {row["site"]: row for row in status_of(federation.folder, now)["sites"]}


def states(federation: Federation, now: float = NOW) -> dict[str, str]:
    return {name: row["state"] for name, row in sites(federation, now).items()}


def screen(status: dict, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), record=True, color_system=None)
    console.print(render_status(status))
    return console.export_text()


# --- the run ----------------------------------------------------------------------------------------------------------


def test_a_run_under_way(federation) -> None:
    """Two of ten rounds of a minute each: the third is at hand, and the rest takes eight minutes less 25 seconds."""
    tell_run(federation, two_of_ten(), rounds=10)
    run = status_of(federation.folder, NOW)["run"]
    assert run == {
        "name": "glioma-1", "state": "running", "phase": "training", "round": 2, "rounds": 10, "round_at_hand": 3,
        "sites": 3, "quorum": 2, "sample": None, "seconds_per_round": 60.0, "eta_seconds": 455.0,
        "dice": pytest.approx((0.71 + 0.67 + 0.59) / 3), "dice_sites": 3, "dice_round": 2,
        "waits_for": {}, "model_hash": None, "started": BEGIN, "last_event": BEGIN + 140,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("events", "state", "phase"),
    [
        ([], "queued", None),
        (beginning()[:2], "running", "waiting for sites"),
        (beginning(), "running", "training"),
        (two_of_ten()[:-1], "running", "scoring"),
        ([*two_of_ten(), told("paused", NOW, round=3, need=2, absent={"elm": "absent"})], "paused", None),
        ([*two_of_ten(), told("stopped", NOW)], "stopped", None),
        ([*two_of_ten(), told("failed", NOW, reason="x")], "failed", None),
        (story(3), "finished", None),
    ],
)
def test_the_state_of_a_run(federation, events, state, phase) -> None:
    """From the queue to its end; only a run that goes on has a time to go."""
    tell_run(federation, events)
    run = status_of(federation.folder, NOW)["run"]
    assert (run["state"], run["phase"]) == (state, phase)
    assert (run["eta_seconds"] is not None) == (state == "running" and run["round"] > 0)


@pytest.mark.parametrize("private", [["elm"], ["alder", "birch", "elm"]])
def test_a_run_with_private_sites_is_told_like_any(federation, private) -> None:
    """They tell neither loss nor seconds."""
    events = two_of_ten()
    for event in events:
        for site in private if event["event"] == "round" and event["round"] else ():
            event["accepted"][site] |= {"loss": None, "seconds": None, "epsilon": 1.0, "privacy_delta": 1e-5}
    tell_run(federation, events, rounds=10)
    status = status_of(federation.folder, NOW)
    assert (status["run"]["name"], status["run"]["round"]) == ("glioma-1", 2)
    assert not any("journal" in problem for problem in status["problems"])
    assert [row["loss"] is None for row in status["sites"]] == [row["site"] in private for row in status["sites"]]
    assert "glioma-1" in screen(status)
    said = [tell(event) for event in events if event["event"] == "round" and event["round"]]
    assert all(("loss" in line) == (len(private) < 3) and "3 updates" in line for line in said)


def test_a_stopped_run_that_was_asked_for_again_is_queued(federation) -> None:
    """The coordinator queued it anew, and the server has not taken it up yet."""
    folder = tell_run(federation, [*two_of_ten(), told("stopped", NOW)])
    asked = json.loads((folder / "queued.json").read_text()) | {"events": len(two_of_ten()) + 1}
    (folder / "queued.json").write_text(json.dumps(asked))
    status = status_of(federation.folder, NOW)
    assert (status["run"]["state"], status["queued"]) == ("queued", ["glioma-1"])


def test_the_run_under_way_comes_before_a_newer_one_that_waits(federation) -> None:
    """A second run was queued meanwhile: told as queued. By name any run can be seen; an unknown name is refused."""
    tell_run(federation, two_of_ten(), rounds=10)
    tell_run(federation, [], name="later")
    tell_run(federation, story(3), name="earlier")
    status = status_of(federation.folder, NOW)
    assert (status["run"]["name"], status["queued"]) == ("glioma-1", ["later"])
    assert status_of(federation.folder, NOW, run="earlier")["run"]["state"] == "finished"
    with pytest.raises(UserError, match=r"nowhere: there is no such run .*earlier, glioma-1, later"):
        status_of(federation.folder, NOW, run="nowhere")


def test_no_run_and_no_federation(federation, tmp_path) -> None:
    """A federation before its first run shows its sites; a folder that holds none is named."""
    status = status_of(federation.folder, NOW)
    assert status["run"] is None
    assert [row["site"] for row in status["sites"]] == ["alder", "birch", "elm"]
    assert "no run yet" in screen(status)
    with pytest.raises(UserError, match="holds no federation"):
        status_of(tmp_path / "nowhere", NOW)


# --- the sites --------------------------------------------------------------------------------------------------------


def test_sites_are_online_while_the_gateway_sees_them(federation) -> None:
    """Answered requests count, refused ones do not; after a minute of silence a site is away; never is never."""
    requests(federation, (NOW - 300, "alder", 200), (NOW - 5, "alder", 403), (NOW - 59, "birch", 200))
    requests(federation, (NOW - 1, "", 400))
    rows = sites(federation)
    assert {name: row["online"] for name, row in rows.items()} == {"alder": False, "birch": True, "elm": False}
    assert [row["last_seen_seconds"] for row in rows.values()] == [300.0, 59.0, None]
    assert sites(federation, NOW + 2)["birch"]["online"] is False


def test_what_each_site_is_at(federation) -> None:
    """Accepted: answered, as the audit log says. Rejected and refused with their reasons; the rest trains."""
    events = [
        *two_of_ten(),
        told("rejected", BEGIN + 150, round=3, site="birch", reason=HOSTILE),
        told("refused", BEGIN + 151, site="elm", code="not-approved"),
    ]
    tell_run(federation, events, rounds=10)
    everybody_online(federation)
    assert states(federation) == {"alder": "training", "birch": "rejected", "elm": "refused"}
    decide(federation, 3, "alder", BEGIN + 155)
    rows = sites(federation)
    assert (rows["alder"]["state"], rows["alder"]["round_answered"]) == ("answered", 3)
    assert (rows["birch"]["reason"], rows["birch"]["round_answered"]) == ("?[31mred[bold] line", 2)
    assert rows["elm"]["reason"] == "not-approved"


def test_decisions_of_another_round_run_or_session_are_not_this_ones(federation) -> None:
    """The audit log holds years: only an accepted update for the round at hand, of this run, in this session counts."""
    tell_run(federation, two_of_ten(), rounds=10)
    everybody_online(federation)
    decide(federation, 2, "alder", BEGIN + 150)
    decide(federation, 3, "birch", BEGIN + 150, decision="rejected: x")
    decide(federation, 3, "elm", BEGIN + 100)
    assert set(states(federation).values()) == {"training"}
    tell_run(federation, [*two_of_ten(), told("session", BEGIN + 160)], rounds=10)
    decide(federation, 3, "alder", BEGIN + 150)
    assert set(states(federation).values()) == {"waiting"}  # nobody has introduced itself to the new session


def test_the_audit_log_is_read_as_it_is_written(federation) -> None:
    """A line by the log itself, at this moment, is understood."""
    now = time.time()
    tell_run(federation, [told("session", now), *[event | {"time": now} for event in beginning()[1:]]])
    ChainedLog(federation.audit_file).append("update", run=RUN_ID, round=1, site="elm", decision="accepted")
    assert states(federation, now)["elm"] == "answered"


def test_a_site_that_refused_and_came_back_is_at_work(federation) -> None:
    """Approved in the meantime: it introduces itself, or its update counts in a round."""
    refused = told("refused", BEGIN + 3, site="elm", code="not-approved")
    tell_run(federation, [beginning()[0], refused, *beginning()[1:]], rounds=10)
    everybody_online(federation)
    assert states(federation)["elm"] == "training"
    tell_run(federation, [*beginning(), refused, *one_round(1, BEGIN + 75)], rounds=10)
    assert states(federation)["elm"] == "training"


def test_who_is_away_revoked_or_waiting(federation) -> None:
    """A site that is offline is absent, a revoked one is that, the others wait with a run that is paused."""
    pause = told("paused", BEGIN + 150, round=3, need=2, absent={"elm": "absent", "birch": "not-approved"})
    tell_run(federation, [*two_of_ten(), pause], rounds=10)
    requests(federation, (NOW - 3, "alder", 200), (NOW - 200, "elm", 200))
    with edit_members(federation.members_file) as members:
        members["birch"] = members["birch"].__class__(**{**vars(members["birch"]), "status": "revoked"})
    assert states(federation) == {"alder": "waiting", "birch": "revoked", "elm": "absent"}
    assert "waits for elm (absent), birch (not-approved)" in screen(status_of(federation.folder, NOW))


def test_while_a_round_is_scored(federation) -> None:
    """Sites score the committed model, and decisions on the updates of that round are past."""
    tell_run(federation, two_of_ten()[:-1], rounds=10)
    everybody_online(federation)
    decide(federation, 2, "alder", BEGIN + 134)
    assert set(states(federation).values()) == {"scoring"}


def test_after_the_end_the_last_round_is_told(federation) -> None:
    """Who was in the last model, who was not and why."""
    events = story(3)
    last = [event for event in events if event["event"] == "round"][-1]
    del last["accepted"]["birch"], last["accepted"]["elm"]
    last["absent"], last["rejected"] = ["birch"], {"elm": "it is not signed"}
    tell_run(federation, events)
    rows = sites(federation)
    assert [(row["state"], row["reason"]) for row in rows.values()] == [
        ("answered", None), ("absent", "in round 3"), ("rejected", "it is not signed"),
    ]  # fmt: skip
    assert [row["round_answered"] for row in rows.values()] == [3, 2, 2]


@pytest.mark.parametrize(("days", "warning"), [(45, None), (29.5, 30), (6.9, 7), (0.5, 1), (-1, 1)])
def test_certificates_run_out_in_sight(federation, days, warning) -> None:
    """Days left of each site's newest certificate, and which warning is due."""
    with edit_members(federation.members_file) as members:
        ends = iso(at(NOW) + timedelta(days=days))
        members["elm"] = members["elm"].__class__(**{**vars(members["elm"]), "not_after": ends})
    row = sites(federation)["elm"]
    assert (row["certificate_days"], row["certificate_warning"]) == (pytest.approx(days, abs=0.01), warning)
    assert ("expired" in screen(status_of(federation.folder, NOW))) == (days < 0)


def test_a_site_of_the_roster_that_is_no_member_is_shown(federation) -> None:
    """The register was put back to an older one: the site is there, with what is not known left out."""
    tell_run(federation, two_of_ten(), rounds=10)
    with edit_members(federation.members_file) as members:
        del members["elm"]
    row = sites(federation)["elm"]
    assert (row["status"], row["certificate_days"], row["dice"]) == (None, None, pytest.approx(0.59))


# --- services and files -----------------------------------------------------------------------------------------------


def test_services_as_their_supervisor_tells(federation) -> None:
    """Each process with its restarts; none when no supervisor lives, and then a run is said to stand still."""
    tell_run(federation, two_of_ten(), rounds=10)
    status = status_of(federation.folder, NOW)
    assert status["services"] == []
    assert "the server is not running" in status["problems"][0]
    supervise(federation, gateway={}, superlink={"restarts": 2, "healthy": False, "phase": "waiting"})
    status = status_of(federation.folder, NOW)
    assert [(row["service"], row["healthy"], row["restarts"]) for row in status["services"]] == [
        ("gateway", True, 0), ("superlink", False, 2),
    ]  # fmt: skip
    assert status["problems"] == []
    assert re.search(r"superlink +waiting, not well", screen(status))


def test_nothing_is_disturbed(federation) -> None:
    """Every file is as it was, half a journal line and half an access line included."""
    folder = tell_run(federation, two_of_ten(), rounds=10)
    everybody_online(federation)
    for path in (folder / "journal.jsonl", access_log(federation)):
        with path.open("a") as handle:
            handle.write('{"event": "rou')
    before = {path: path.read_bytes() for path in federation.folder.rglob("*") if path.is_file()}
    show(federation, console=Console(file=io.StringIO()))
    assert {path: path.read_bytes() for path in federation.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda f: (f.runs / "glioma-1" / "journal.jsonl").write_text("x\n{}\n"), "line 1 of 2 is not a journal entry"),
        (lambda f: (f.runs / "glioma-1" / "journal.jsonl").write_text('{"event": "round"}\n'), "has not the fields"),
        (lambda f: (f.runs / "glioma-1" / "run.yaml").write_text("a: [b"), "is not valid YAML"),
        (lambda f: f.members_file.write_text("{}"), "no list of members"),
        (lambda f: f.server_crt.unlink(), "server.crt"),
    ],
)
def test_a_damaged_file_hides_nothing_else(federation, spoil, problem) -> None:
    """It is named among the problems; a run beside the damaged one, and the sites, are still told."""
    tell_run(federation, two_of_ten(), rounds=10)
    tell_run(federation, story(3), name="earlier")
    supervise(federation, gateway={})
    spoil(federation)
    status = status_of(federation.folder, NOW)
    assert len(status["problems"]) == 1
    assert problem in status["problems"][0]
    assert status["run"] is not None
    assert len(status["sites"]) == 3
    assert problem in " ".join(screen(status, width=300).split())


@pytest.mark.parametrize("plan", ["", "[1]", "roster: 3", "task: 7\nroster: {alder: x}", "quorum: many"])
def test_an_odd_plan_leaves_figures_out(federation, plan) -> None:
    """A plan of another version: what it does not say is not shown."""
    folder = tell_run(federation, two_of_ten())
    (folder / "run.yaml").write_text(plan)
    status = status_of(federation.folder, NOW)
    assert (status["run"]["rounds"], status["run"]["round"]) == (None, 2)
    assert "glioma-1" in screen(status)


def test_a_second_look_sees_what_changed_and_keeps_what_became_unreadable(federation) -> None:
    """The same eyes: a new event is told; a journal damaged under them is named, and the run stays as it was seen."""
    folder = tell_run(federation, two_of_ten(), rounds=10)
    standing = Standing(federation.folder)
    assert standing.status(NOW)["events_total"] == len(two_of_ten())
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps(told("stopped", NOW)) + "\n")
    assert standing.status(NOW)["run"]["state"] == "stopped"
    (folder / "journal.jsonl").write_text("x\n{}\n")
    status = standing.status(NOW)
    assert (status["run"]["state"], len(status["problems"])) == ("stopped", 1)


def test_a_run_that_cannot_be_read_is_not_denied(federation) -> None:
    """By its name: the reason, not "there is no such run"."""
    folder = tell_run(federation, two_of_ten())
    (folder / "journal.jsonl").write_text("x\n{}\n")
    with pytest.raises(UserError, match="line 1 of 2 is not a journal entry"):
        status_of(federation.folder, NOW, "glioma-1")
    with pytest.raises(UserError, match="there is no such run"):
        status_of(federation.folder, NOW, "other")


def test_a_clock_that_was_ahead_shows_nobody_as_online(federation) -> None:
    """The server's clock was set back by an hour: a request of before is no sign of life; one of after it counts."""
    requests(federation, (NOW + 3600, "alder", 200), (NOW + 3600, "birch", 200), (NOW - 9, "birch", 200))
    rows = sites(federation, NOW)
    assert (rows["alder"]["online"], rows["birch"]["online"]) == (False, True)


def test_the_access_log_is_followed(federation) -> None:
    """Counted once, whatever the number of looks; bytes and answers by site, the unknown ones apart."""
    tally = GatewayTally(access_log(federation))
    tally.update()
    requests(federation, (NOW - 9, "alder", 200), (NOW - 8, "", 403))
    tally.update()
    requests(federation, (NOW - 7, "alder", 200), (NOW - 6, "alder", 413))
    for _ in range(3):
        tally.update()
    assert dict(tally.requests) == {("alder", 200): 2, (None, 403): 1, ("alder", 413): 1}
    assert (tally.received["alder"], tally.sent[None]) == (3000, 500)
    assert tally.last_seen == {"alder": NOW - 7}


# --- what is shown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_table_tells_the_essentials_at_any_width(federation, width) -> None:
    """Names, states and figures are there, no line is longer than the terminal, no control sign reaches it."""
    rejected = told("rejected", BEGIN + 150, round=3, site="birch", reason=HOSTILE)
    tell_run(federation, [*two_of_ten(), rejected], rounds=10)
    everybody_online(federation)
    text = screen(status_of(federation.folder, NOW), width)
    assert max(len(line) for line in text.splitlines()) <= width
    for word in ("brain-net", "glioma-1", "alder", "birch", "rejected", "online", "0.710", "90 d", "Certificates"):
        assert word in text
    assert "\x1b" not in text
    assert "[bold]" in text


def test_json_is_one_object(federation) -> None:
    """What a program reads is what the table shows; every number is one that JSON has."""
    tell_run(federation, two_of_ten(), rounds=10)
    out = io.StringIO()
    show(federation, as_json=True, console=Console(file=out, width=40))
    found = json.loads(out.getvalue())
    assert found["run"]["name"] == "glioma-1"
    assert set(found) == {
        "federation", "time", "run", "queued", "sites", "services", "server_pid", "certificates", "events",
        "events_total", "incidents", "problems",
    }  # fmt: skip


class Clock:
    """Time that passes while the watcher sleeps; `script` says what happens at which look."""

    def __init__(self, script: dict[int, object]) -> None:
        self.now, self.looks, self.script = NOW, 0, script

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.looks += 1
        assert self.looks < 100, "the watcher does not end"
        action = self.script.get(self.looks)
        if callable(action):
            action()


def test_watching_on_no_terminal_is_a_line_a_change(federation) -> None:
    """Each event once, in order, and the state when it changed; it ends with the run and its exit code is 0."""
    tell_run(federation, two_of_ten())
    clock = Clock(
        {
            3: lambda: tell_run(federation, story(3, finished=False)),
            5: lambda: tell_run(federation, story(3)),
        }
    )
    out = io.StringIO()
    code = watch(federation, console=Console(file=out, width=40), clock=clock, sleep=clock.sleep)
    lines = out.getvalue().splitlines()
    assert code == 0
    assert clock.looks == 5
    assert sum("round 3 committed" in line for line in lines) == 1
    assert sum("round 2 scored" in line for line in lines) == 1
    assert "finished: model" in lines[-2]
    assert lines[-1].startswith("run glioma-1 · finished · 3 of 3 rounds")
    assert len(lines) < 20


@pytest.mark.parametrize(("end", "code"), [(told("stopped", NOW), 1), (told("failed", NOW, reason="x"), 2)])
def test_watching_ends_with_the_runs_fate(federation, end, code) -> None:
    """A script can tell a stopped or failed run from one that has finished."""
    tell_run(federation, [*two_of_ten(), end])
    assert watch(federation, console=Console(file=io.StringIO())) == code


def test_a_queued_run_is_watched_on(federation) -> None:
    """Just asked for: there is something to come."""
    tell_run(federation, [])
    clock = Clock({2: lambda: tell_run(federation, story(3))})
    assert watch(federation, console=Console(file=io.StringIO()), clock=clock, sleep=clock.sleep) == 0
    assert clock.looks == 2


def test_control_c_ends_the_watching_alone(federation) -> None:
    """On a terminal, where the table renews itself in place: no traceback, exit code 0."""
    tell_run(federation, two_of_ten(), rounds=10)

    def interrupt() -> None:
        raise KeyboardInterrupt

    clock, out = Clock({4: interrupt}), io.StringIO()
    code = watch(federation, console=Console(file=out, force_terminal=True), clock=clock, sleep=clock.sleep)
    assert code == 0
    assert out.getvalue().count("brain-net") >= 4
    assert out.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_watching_as_json_is_an_object_a_line(federation) -> None:
    """Each look is parsed on its own."""
    tell_run(federation, two_of_ten())
    clock, out = Clock({2: lambda: tell_run(federation, story(3))}), io.StringIO()
    watch(federation, as_json=True, console=Console(file=out, width=40), clock=clock, sleep=clock.sleep)
    assert [json.loads(line)["run"]["round"] for line in out.getvalue().splitlines()] == [2, 2, 3]


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (told("round", 0, round=0), "the first model stands"),
        (one_round(2, 0, absent=["elm"], rejected={"birch": "x"})[0], "loss 0.450; rejected birch; absent elm"),
        (one_round(3, 0)[1], "round 3 scored: mean Dice 0.757 of 3 sites, lowest 0.690 at elm"),
        (
            told("paused", 0, round=4, need=2, absent={"elm": "not-approved"}),
            "2 updates are needed: elm (not-approved)",
        ),
        (told("refused", 0, site="elm", code="not-approved"), "elm refuses: not-approved"),
        (told("suspended", 0, round=3, site="elm", strikes=3), "elm is suspended: 3 updates in a row were rejected"),
        (told("selected", 0, round=7, rounds=9, by="worst"), "the model of round 7 of 9 is handed out, the best by"),
        (told("stopped", 0), "stopped"),
        (told("failed", 0, reason=HOSTILE), "failed: ?[31mred[bold] line"),
        (told("finished", 0), "finished"),  # a field is missing: the event's name remains
        (told("of a later version", 0), "of a later version"),
    ],
)
def test_events_in_words(event, text) -> None:
    """Every event is a line of printable signs, an odd or unknown one its name."""
    assert text in tell(event)
    assert tell(event).isprintable()


def test_the_summary_is_one_line(federation) -> None:
    """Run, phase, round, pace and who is online."""
    tell_run(federation, two_of_ten(), rounds=10)
    requests(federation, (NOW - 3, "alder", 200))
    assert summary_line(status_of(federation.folder, NOW)) == (
        "run glioma-1 · training · 2 of 10 rounds · quorum 2 of 3 · mean Dice 0.657 · 1 min a round · 8 min to go"
        " · 1 of 3 sites online"
    )


def test_a_mean_of_few_sites_says_so_and_those_who_left_are_not_waited_for(federation) -> None:
    """One of three was scored; elm was revoked, and its requests do not make it a site of the run."""
    events = two_of_ten()
    for site in ("birch", "elm"):
        events[-1]["sites"].pop(site, None)
    tell_run(federation, events, rounds=10)
    with edit_members(federation.members_file) as members:
        members["elm"] = replace(members["elm"], status="revoked")
    requests(federation, (NOW - 3, "alder", 200), (NOW - 3, "elm", 200))
    line = summary_line(status_of(federation.folder, NOW))
    assert "of 1 of 3 sites · " in line
    assert line.endswith(" · 1 of 2 sites online")


def test_a_queued_run_without_a_server_says_what_is_missing(federation) -> None:
    """It waits for nobody else; with a server there is nothing to say."""
    tell_run(federation, [], rounds=10)
    (problem,) = status_of(federation.folder, NOW)["problems"]
    assert problem == "glioma-1 waits: the server is not running. To go on: medsegfed server start"


def test_the_end_of_a_run_is_told_whole() -> None:
    """Its last words are what to do."""
    reason = "x " * 200 + "go on with medsegfed run RUN.yaml, or lower run.quorum."
    assert tell(told("failed", 0, reason=reason)).endswith("or lower run.quorum.")
    assert len(tell(told("refused", 0, site="elm", code="y" * 900))) <= 200


def test_a_year_of_decisions_costs_no_more(federation) -> None:
    """Of the audit log only its end is read, be it cut in the middle of a line."""
    tell_run(federation, two_of_ten(), rounds=10)
    everybody_online(federation)
    decide(federation, 3, "alder", BEGIN + 155)
    old = federation.audit_file.read_text()
    federation.audit_file.write_text('{"event": "update"}\n' * 50_000 + old)
    assert states(federation)["alder"] == "answered"


def test_what_failed_is_told_with_what_it_cost(federation) -> None:
    """From the supervisor's journal: what is mended with its seconds, what is not in red."""
    journal = Journal(federation.state / "supervisor.jsonl")
    for event in ("exited", "ready"):
        journal.append(event, child="superlink", how="signal 9, Killed")
    journal.append("run_lost", run="night", reason="its ServerApp's process is gone")
    status = status_of(federation.folder, NOW)
    assert [(row["what"], row["seconds"]) for row in status["incidents"]] == [
        ("superlink: signal 9, Killed", pytest.approx(0.0, abs=5.0)),
        ("run night: its ServerApp's process is gone", None),
    ]
    assert re.search(r"superlink: signal 9, Killed +started again +\d s", screen(status))
    assert re.search(r"ServerApp's process is gone +not yet", screen(status))
