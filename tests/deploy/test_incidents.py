"""What the supervisor's journal says failed, and for how long."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.incidents import incidents


def story(*events: dict[str, Any]) -> list[tuple[float, str, float | None]]:
    return [(told["time"], told["what"], told["seconds"]) for told in incidents(events)]


def at(time: float, event: str, child: str | None = None, **facts: Any) -> dict[str, Any]:
    return {"event": event, "time": time} | ({"child": child} if child else {}) | facts


UP = (at(0, "started", "superlink", restarts=0), at(5, "ready", "superlink"))


def test_a_quiet_day_has_none() -> None:
    """Start and orderly end are no incidents, and nor is the next start."""
    down = at(9, "ending", "superlink", reason="stopping"), at(10, "exited", "superlink", how="exit code 0")
    assert story(*UP, *down, at(11, "stopped", "superlink"), *UP) == []


def test_a_killed_process_costs_the_time_until_it_is_ready() -> None:
    """Companions that were ended for it are incidents of their own; what is not mended has no seconds yet."""
    told = story(
        *UP,
        at(100, "exited", "superlink", how="signal 9, Killed"),
        at(100, "ending", "superexec", reason="superlink ended"),
        at(101, "exited", "superexec", how="exit code 0"),
        at(102, "started", "superlink", restarts=1),
        at(112, "ready", "superlink"),
    )
    assert told == [(100, "superlink: signal 9, Killed", 12.0), (100, "superexec: superlink ended", None)]


def test_one_that_hangs_is_told_by_its_reason() -> None:
    """Ended by the supervisor: one incident, not two."""
    told = story(
        *UP,
        at(50, "ending", "superlink", reason="no answer 3 times"),
        at(60, "exited", "superlink", how="signal 9, Killed"),
        at(61, "started", "superlink", restarts=1),
        at(70, "ready", "superlink"),
    )
    assert told == [(50, "superlink: no answer 3 times", 20.0)]


def test_a_lost_run_and_a_certificate_are_mended_by_their_own_events() -> None:
    """A certificate that cannot be renewed is one incident however often it is tried."""
    told = story(
        at(10, "run_lost", run="night", reason="its ServerApp's process is gone"),
        at(11, "run_started", run="night"),
        at(20, "not_renewed", reason="no line"),
        at(30, "not_renewed", reason="no line"),
        at(45, "renewed"),
    )
    assert told == [(10, "run night: its ServerApp's process is gone", 1.0), (20, "certificate: no line", 25.0)]


def test_a_lost_run_is_taken_up_when_its_own_journal_says_so() -> None:
    """Not when its ServerApp was started; each loss with the next session; one that is still to come has no seconds."""
    lost = [at(time, "run_lost", run="night", reason="x") for time in (10, 50, 90)]
    started = [at(time, "run_started", run="night") for time in (10, 50, 90)]
    events = [event for pair in zip(lost, started, strict=True) for event in pair]
    night = [
        at(1, "session"),
        at(3, "round"),
        at(17.5, "session"),
        at(61, "session"),
        {"event": "session", "time": "x"},
    ]
    assert [told["seconds"] for told in incidents(events, {"night": night})] == [7.5, 11.0, None]
    assert [told["seconds"] for told in incidents(events, {"day": night})] == [0.0, 0.0, 0.0]
    assert all(set(told) == {"time", "what", "done", "seconds"} for told in incidents(events, {"night": night}))


def test_a_supervisor_that_was_killed_shows_at_the_next_start() -> None:
    """It ended nothing: what it had started begins anew."""
    again = at(200, "started", "superlink", restarts=0), at(207, "ready", "superlink")
    assert story(*UP, *again) == [(200, "the supervisor was killed, or the machine went down", 7.0)]


def test_a_killed_supervisor_costs_the_time_since_it_was_last_seen() -> None:
    """Not since the next one began; one that never told, or a clock that was put back, hides nothing."""
    again = at(200, "started", "superlink", restarts=0), at(207, "ready", "superlink")
    what = "the supervisor was killed, or the machine went down"
    for last, told in (("00:03:00", (180, what, 27.0)), ("00:15:00", (200, what, 7.0)), ("x", (200, what, 7.0))):
        seen = at(199, "predecessor_killed", last_seen=f"1970-01-01T{last}+00:00")
        assert story(*UP, seen, *again) == [told]


def test_the_servers_own_certificate_is_mended_by_its_renewal() -> None:
    """Told by another event than a site's."""
    told = story(at(20, "not_renewed", reason="ca.key: cannot be read"), at(45, "server_renewed"))
    assert told == [(20, "certificate: ca.key: cannot be read", 25.0)]


@pytest.mark.parametrize("time", [None, "soon", {}])
def test_a_line_without_a_time_hides_no_other(time) -> None:
    """Changed from outside: the rest is told."""
    damaged = at(5, "run_lost", run="night", reason="x") | {"time": time}
    assert story(damaged, at(10, "run_lost", run="day", reason="y")) == [(10, "run day: y", None)]
