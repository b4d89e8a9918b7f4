"""Bad lines between a site and the server, a certificate of a minute, a site that leaves for good.

One federation of three sites and one run; alder reaches the server through a proxy that the tests break.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.certificates import read_certificate
from medsegdiff.chained_log import audit_lines, verify_log
from medsegdiff.files import write_atomic
from server.journal import Event
from tests.e2e.chaos.driver import Federation, left_behind
from tests.e2e.chaos.proxy import FaultProxy

ROUNDS = 200  # more than there is time for
SILENCE = 90.0  # seconds
BACK_SECONDS = 90.0  # within which a site is back after its line healed
LEASE_SECONDS = 65.0  # until Flower takes a node that vanished for offline
ABSENCE = 10.0
ANSWERS = range(1, 15)  # of the server to a site, in one round
CERTIFICATE_SECONDS = 60.0  # life of elm's
SPARE_SECONDS = 60.0  # what a busy machine may take beyond the rules

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def line() -> Iterator[FaultProxy]:
    """Between alder and the gateway."""
    proxy = FaultProxy(0)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, line: FaultProxy) -> Iterator[Federation]:
    """The run goes on from test to test; its quorum is two, and a site that is offline is waited for 10 seconds."""
    found = Federation.make(tmp_path_factory.mktemp("lines") / "chaos", ROUNDS, seed=3)
    stage = found.stage
    stage.make_sites(found.recipe)
    stage.make_federation()
    stage.admit("alder")
    stage.admit("birch")
    membership = stage.sites["alder"] / "keys" / "federation.json"
    said = json.loads(membership.read_text())
    host, _, port = said["server"].rpartition(":")
    line.to = int(port)
    write_atomic(membership, json.dumps(said | {"server": f"{host}:{line.port}"}).encode(), 0o600)
    days = "site_days: 90"
    stage.change(stage.server / "federation.yaml", days, f"site_days: {CERTIFICATE_SECONDS / 86_400}")
    stage.admit("elm")
    with stage.running():
        run = stage.run_file(found.recipe, quorum=2, absence_seconds=ABSENCE, deadline_seconds=600)
        stage.approve(stage.begin(run))
        yield found
    assert left_behind(found.folder) == []


def trained(federation: Federation, site: str) -> list[int]:
    """Rounds for which a site has trained, by its own audit log."""
    log = federation.stage.sites[site] / "audit.jsonl"
    return [line["round"] for line in audit_lines(log) if line["event"] == "update"]


def next_round(federation: Federation, seconds: float) -> Event:
    """The commit after the last one."""
    return federation.committed(federation.last_round() + 1, seconds)


def with_alder(federation: Federation, seconds: float) -> Event:
    """The next commit that alder took part in."""
    end = time.monotonic() + seconds
    while True:
        event = next_round(federation, max(1.0, end - time.monotonic()))
        if "alder" in event["accepted"]:
            return event


def test_a_line_that_heals_brings_its_site_back(federation: Federation, line: FaultProxy) -> None:
    """90 seconds of silence: the others go on, alder is named absent, and counts again 90 seconds after the heal."""
    federation.committed(1)
    line.become("silent")
    began = time.monotonic()
    time.sleep(SILENCE)
    line.become("open")
    healed = time.monotonic()
    with_alder(federation, BACK_SECONDS + SPARE_SECONDS)
    print(f"alder was back {time.monotonic() - healed:.0f} s after the heal, {healed - began:.0f} s after the break")
    rounds = trained(federation, "alder")
    assert len(rounds) == len(set(rounds))


def test_a_slow_and_a_broken_line_cost_time_alone(federation: Federation, line: FaultProxy) -> None:
    """Dripping for a round, then cut every two seconds for twenty: alder counts."""
    federation.committed(1)
    line.bytes_per_second, line.delay = 16_384.0, 0.01
    line.become("slow")
    event = with_alder(federation, 240.0)
    line.become("open")
    for _ in range(10):
        line.become("cut")
        line.become("open")
        time.sleep(2.0)
    assert with_alder(federation, BACK_SECONDS + SPARE_SECONDS)["round"] > event["round"]


def test_a_site_counts_whichever_answer_is_lost(federation: Federation, line: FaultProxy) -> None:
    """One a round, each time another: to the question for work, for a part of it, its confirmation, to the update."""
    federation.committed(1)
    before = line.lost
    for nth in ANSWERS:
        line.lose(nth)
        began = time.monotonic()
        while line.lost == before:
            assert time.monotonic() - began < SPARE_SECONDS
            time.sleep(0.1)
        before = line.lost
        event = with_alder(federation, BACK_SECONDS)
        print(f"answer {nth} lost: alder counted in round {event['round']} after {time.monotonic() - began:.0f} s")
    rounds = trained(federation, "alder")
    assert len(rounds) == len(set(rounds))


def test_a_certificate_of_a_minute_is_renewed_by_itself(federation: Federation) -> None:
    """elm's first certificate has long expired; it has never been absent."""
    certificate = read_certificate(federation.stage.sites["elm"] / "keys" / "tls.pem")
    first = federation.events()[0]["time"]
    assert certificate.not_valid_after_utc.timestamp() > first + CERTIFICATE_SECONDS
    journal = federation.stage.sites["elm"] / "state" / "supervisor.jsonl"
    told = [json.loads(line)["event"] for line in journal.read_text().splitlines()]
    assert told.count("renewed") >= 2
    assert "not_renewed" not in told
    assert all(
        "elm" in event["accepted"] for event in federation.events() if event["event"] == "round" and event["round"]
    )


def test_a_site_that_leaves_for_good_is_named_absent(federation: Federation) -> None:
    """Its last round waits for the lease and for the absence, the later ones for the absence alone."""
    federation.stage.stop("alder", signal.SIGKILL)
    left = federation.last_round()
    began = time.monotonic()
    event = federation.committed(left + 1, LEASE_SECONDS + ABSENCE + SPARE_SECONDS)
    if event["absent"] != ["alder"]:  # it had answered before it left
        event = federation.committed(left + 2, LEASE_SECONDS + ABSENCE + SPARE_SECONDS)
    assert event["absent"] == ["alder"]
    print(f"the first round without alder took {time.monotonic() - began:.0f} s")
    later = federation.committed(event["round"] + 1, ABSENCE + SPARE_SECONDS)
    assert later["absent"] == ["alder"]
    print(f"the next one took {later['time'] - event['time']:.0f} s")
    federation.stage.command("server", "stop", "chaos", "--folder", str(federation.stage.server))
    federation.stage.wait("chaos", lambda events: events[-1]["event"] == "stopped", 60, "the end")
    rounds = [event["round"] for event in federation.events() if event["event"] == "round"]
    assert rounds == list(range(len(rounds)))
    for log in (federation.stage.server, *federation.stage.sites.values()):
        verify_log(Path(log) / "audit.jsonl")
    for site in federation.stage.sites:
        assert len(trained(federation, site)) == len(set(trained(federation, site)))
