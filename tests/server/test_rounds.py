"""What is read out of a journal: how a run stands, its seconds, its rounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from told_run import BEGIN, ROUND, beginning, one_round, story

from server.rounds import (
    absences,
    committed_rounds,
    history,
    round_seconds,
    run_incidents,
    run_state,
    site_seconds,
    traffic,
    working_seconds,
)


def told(kind: str, time: float = BEGIN, **fields):
    return {"event": kind, "time": time, **fields}


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "not started"),
        (beginning(), "running"),
        (story(1, finished=False), "running"),
        (story(3), "finished"),
        ([*story(2, finished=False), told("paused", round=3)], "paused"),
        ([*story(2, finished=False), told("paused", round=3), told("refused", site="elm", code="x")], "paused"),
        ([*story(2, finished=False), told("paused", round=3), told("site", site="elm")], "paused"),
        ([*story(2, finished=False), told("paused", round=3), told("resumed", round=3)], "running"),
        ([*story(1, finished=False), told("stopped", by="coordinator")], "stopped"),
        ([*story(1, finished=False), told("stopped", by="coordinator"), told("session")], "running"),
        ([*story(1, finished=False), told("below_quorum", round=2)], "failed"),
        ([*story(1, finished=False), told("failed", reason="x")], "failed"),
        ([told("something of a later version")], "not started"),
    ],
)
def test_the_last_telling_event_says_how_a_run_stands(events, state) -> None:
    """A refusal, a rejected answer or a site that comes changes nothing; a new session does."""
    assert run_state(events) == state


def test_a_repeated_round_counts_once_as_it_was_committed() -> None:
    """A crash between commit and telling, or a lost checkpoint: the later record is the true one."""
    events = [*story(2, finished=False), *one_round(2, BEGIN + 500, absent=["elm"], bytes={"up": 7, "down": 8})]
    assert [event["round"] for event in committed_rounds(events)] == [1, 2]
    assert absences(events, "elm") == {"absent_rounds": [2], "rejected_rounds": []}
    assert traffic(events) == {"up": 3007, "down": 3608}
    assert traffic([*events, events[-1] | {"bytes": {"down": 50}}]) == {"up": 3007, "down": 3658}
    assert len(history(events)) == 6


def test_seconds_of_sites_side_by_side_or_in_turn() -> None:
    """The slowest site where they work at once, the sum where one machine plays them all."""
    events = story(2)
    assert site_seconds(events, max) == (2 * 54.0, 2 * 4.0)
    assert site_seconds(events, sum) == (2 * (54.0 + 47.0 + 39.0), 2 * 12.0)
    trained = next(event for event in events if event["event"] == "round" and event["round"] > 0)
    next(iter(trained["accepted"].values()))["seconds"] = None  # as a site with privacy answers
    assert site_seconds(events, max) == (None, 2 * 4.0)


def test_time_between_sessions_and_in_pauses_is_no_work() -> None:
    """10 s, a night, 20 s, a pause of an hour, 5 s; an open session counts up to now."""
    events = [
        told("session", 0.0), told("round", 10.0, round=0),
        told("session", 40_000.0), told("paused", 40_020.0), told("refused", 41_000.0), told("resumed", 43_620.0),
        told("scores", 43_625.0),
    ]  # fmt: skip
    assert working_seconds(events) == 35.0
    assert working_seconds(events, now=43_635.0) == 45.0
    assert working_seconds([]) == 0.0
    assert working_seconds(events[:4], now=99_999.0) == 30.0


def test_a_round_lasts_from_where_its_work_began() -> None:
    """The first from the last introduction, the others from commit to commit, or from the session that went on."""
    assert round_seconds(story(3)) == [ROUND, ROUND, ROUND]
    events = [*story(2, finished=False), told("session", BEGIN + 9000), *one_round(3, BEGIN + 9040)]
    assert round_seconds(events) == [ROUND, ROUND, 40.0]
    late = told("site", BEGIN + 100, site="oak")  # joins while the second round is on
    assert round_seconds([*story(1, finished=False), late, *one_round(2, BEGIN + 15 + 2 * ROUND)]) == [ROUND, ROUND]


@given(st.lists(st.tuples(st.sampled_from(["session", "round", "paused", "resumed", "site", "x"]), st.floats(0, 1e9))))
def test_no_clock_makes_a_time_negative(steps) -> None:
    """Clocks are set back: times are then wrong, but no report or metric breaks on them."""
    events = [told(kind, time, round=1) for kind, time in steps]
    assert working_seconds(events) >= 0
    assert all(seconds >= 0 for seconds in round_seconds(events))


def test_what_befell_a_run_is_told_with_what_it_cost() -> None:
    """A wait, a full disk, two lost lines that one round mends, a round made again; what is not over has no seconds."""
    events = [
        told("session"),
        told("round", BEGIN + 1, round=1, model_hash="a"),
        told("paused", BEGIN + 10, round=2, need=2, absent={"elm": "absent", "birch": "not-approved"}),
        told("resumed", BEGIN + 40),
        told("lost", BEGIN + 41, site="elm"),
        told("lost", BEGIN + 42, site="birch"),
        told("round", BEGIN + 50, round=2, model_hash="b"),
        told("interrupted", BEGIN + 60, reason="no space"),
        told("session", BEGIN + 75.5),
        told("round", BEGIN + 80, round=2, model_hash="b"),
        told("paused", BEGIN + 90, round=3, need=2, absent={"elm": "absent"}),
    ]
    assert [(row["time"] - BEGIN, row["what"], row["done"], row["seconds"]) for row in run_incidents(events)] == [
        (10, "round 2 waited for birch (not-approved), elm (absent)", "went on by itself", 30.0),
        (41, "elm lost its line", "asked again", 9.0),
        (42, "birch lost its line", "asked again", 8.0),
        (60, "no space", "taken up again", 15.5),
        (80, "the checkpoint of round 2 was damaged", "made again, the same", 0.0),
        (90, "round 3 waited for elm (absent)", "went on by itself", None),
    ]
