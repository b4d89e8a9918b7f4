"""Three sites in networks of their own, firewalls that let nobody in, a proxy: a run from its refusal to its end."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from medsegdiff.chained_log import verify_log
from medsegdiff.weights import hash_weights, load_model
from tests.e2e.federation.conftest import PATIENCE, ROUNDS, SITES, FirstRun, Scene
from tests.e2e.federation.network import ADDRESSES, PROXY_INSIDE, PROXY_PORT, SERVER, Loopback, Namespaces


@pytest.fixture
def apart(network: Loopback) -> Namespaces:
    """The network, if its parts are apart."""
    if not isinstance(network, Namespaces):
        pytest.skip(network.why)
    return network


def audit(folder: Path) -> list[dict[str, object]]:
    """The lines of an audit log."""
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def test_all_rounds_with_all_three_sites(scene: Scene, first_run: FirstRun) -> None:
    """Every round counted every site's update once; nobody was absent, rejected or a stranger."""
    rounds = [event for event in first_run.events if event["event"] == "round" and event["round"]]
    assert [event["round"] for event in rounds] == list(range(1, ROUNDS + 1))
    assert all(sorted(event["accepted"]) == sorted(SITES) for event in rounds)
    assert all(not event["absent"] and not event["rejected"] for event in rounds)
    assert {event["event"] for event in first_run.events} & {"stranger", "rejected", "below_quorum", "failed"} == set()
    told = {event["site"]: event for event in first_run.events if event["event"] == "site"}
    assert {site: told[site]["faults"] for site in SITES} == dict.fromkeys(SITES, 1), "the broken case is counted"


def test_what_nobody_approved_is_refused_at_both_ends(scene: Scene, first_run: FirstRun) -> None:
    """The journal and the coordinator's audit log know the refusal, so does the site's; nothing was trained before."""
    codes = {(event["site"], event["code"]) for event in first_run.refused if event["event"] == "refused"}
    assert codes == {(site, "not-approved") for site in SITES}
    noted = {(e["site"], e["code"]) for e in audit(scene.stage.server) if e["event"] == "refused"}
    assert codes <= noted
    for site in SITES:
        events = [e for e in audit(scene.stage.sites[site]) if e.get("run") == first_run.id]
        assert (events[0]["event"], events[0]["decision"]) == ("refused", "not-approved")
        approved = [e["event"] for e in events].index("approved")
        assert {e["event"] for e in events[:approved]} == {"refused"}
        assert [e["round"] for e in events if e["event"] == "update"] == list(range(1, ROUNDS + 1))


def test_each_site_calls_one_address_and_port(apart: Namespaces, scene: Scene, first_run: FirstRun) -> None:
    """From its start through a whole run, doctor and approvals included; one site knows nothing but its proxy."""
    port = scene.federation.config.port
    assert apart.called("alder") == {(SERVER, "tcp", port)}
    assert apart.called("birch") == {(SERVER, "tcp", port)}
    assert apart.called("elm") == {(PROXY_INSIDE, "tcp", PROXY_PORT)}
    assert apart.ports() == {("tcp", port)}, "of the server one port is called from outside"
    assert apart.called("server") == set(), "the server calls nobody"
    assert f'Established connection to host "{SERVER}"' in (scene.folder / "tinyproxy.log").read_text()


def test_nothing_comes_in_at_a_site(apart: Namespaces, scene: Scene, first_run: FirstRun) -> None:
    """In a whole run nobody knocked; who does is dropped and counted, which shows that it would have been seen."""
    assert {site: apart.knocks(site) for site in SITES} == dict.fromkeys(SITES, 0)
    for site, neighbour in (("alder", "server"), ("birch", "outside"), ("elm", "proxy")):
        address = (ADDRESSES[site], 4000)
        listener = apart.inside(site, lambda address=address: socket.create_server(address))
        with listener:
            apart.inside(site, lambda address=address: socket.create_connection(address, 5)).close()
            with pytest.raises(TimeoutError):
                apart.inside(neighbour, lambda address=address: socket.create_connection(address, 1.5))
        assert apart.knocks(site) > 0


def test_real_and_simulated_federation_are_equal(
    scene: Scene, first_run: FirstRun, report: Any, simulating: subprocess.Popen[bytes]
) -> None:
    """The same world and seed in one process: equal weights bit for bit, though the real run was stopped in between."""
    assert simulating.wait(PATIENCE) == 0, (scene.folder / "simulated.log").read_text()
    simulated = json.loads((scene.folder / "simulated" / "report.json").read_text())
    hashes = {
        hash_weights(load_model(folder / "model.safetensors").network.state_dict())
        for folder in (scene.stage.server / "runs" / "first", scene.folder / "simulated")
    }
    assert hashes == {first_run.events[-1]["model_hash"]}
    assert sorted(report["sites"]) == sorted(SITES)
    for site in SITES:
        real, virtual = report["sites"][site], simulated["sites"][site]
        assert real["dice"]["federated"] == virtual["dice"]["federated"]
        assert real["hd95_mm"]["federated"] == virtual["hd95_mm"]["federated"]
    assert report["arms"]["federated"] == simulated["arms"]["federated"]
    assert report["arms"]["federated"]["mean"] > 0


def test_a_run_stops_within_seconds_and_goes_on(first_run: FirstRun) -> None:
    """`stop` ends it, committed rounds stay, `run` with the same file finishes it without repeating one."""
    assert first_run.stop_seconds < 15
    assert first_run.stopped[-1]["event"] == "stopped"
    done = [event["round"] for event in first_run.stopped if event["event"] == "round"]
    assert 1 <= max(done) < ROUNDS
    assert [e["round"] for e in first_run.events if e["event"] == "round"] == list(range(ROUNDS + 1))
    assert [e["event"] for e in first_run.events].count("session") == 2


def test_status_tells_who_is_waited_for(first_run: FirstRun) -> None:
    """While the run waits for approvals: sites online, their reasons, services well."""
    status = first_run.status
    assert status["run"]["name"] == "first"
    assert status["run"]["waits_for"] in ({}, dict.fromkeys(SITES, "not-approved"))
    rows = {row["site"]: row for row in status["sites"]}
    assert all(rows[site]["online"] and rows[site]["state"] == "refused" for site in SITES), rows
    assert not rows["mallory"]["online"]
    assert {row["service"] for row in status["services"]} >= {"superlink", "superexec", "gateway"}
    assert all(row["healthy"] for row in status["services"])
    assert not status["problems"]


def test_doctor_finds_a_working_site_well(first_run: FirstRun) -> None:
    """At a site, during a run: it reaches the gateway with its certificate; the one broken case is counted."""
    checks = {check["name"]: check for check in first_run.doctor["checks"]}
    failed = {name: check for name, check in checks.items() if check["status"] == "fail"}
    assert not failed


def test_audit_logs_of_all_ends_hold(scene: Scene, first_run: FirstRun) -> None:
    """Each is whole; what the other end has seen of it is in it; a change of one letter is found."""
    stage = scene.stage
    heads = {e["site"]: e["audit_head"] for e in audit(stage.server) if e["event"] == "site"}
    assert sorted(heads) == sorted(SITES)
    for place, folder in (("server", stage.server), *((site, stage.sites[site]) for site in SITES)):
        anchor = ("--anchor", str(heads[place])) if place in heads else ()
        found = json.loads(stage.command(place, "audit", "verify", "--json", "--folder", str(folder), *anchor).stdout)
        assert found["lines"] >= 5
    copy = scene.folder / "edited.jsonl"
    copy.write_bytes((stage.server / "audit.jsonl").read_bytes().replace(b'"alder"', b'"alden"', 1))
    Path(f"{copy}.head").write_bytes((stage.server / "audit.jsonl.head").read_bytes())
    with pytest.raises(Exception, match="line"):
        verify_log(copy)


def test_the_report_is_written(scene: Scene, report: Any) -> None:
    """report.json and report.html of the finished run stand in its folder."""
    folder = scene.stage.server / "runs" / "first"
    assert json.loads((folder / "report.json").read_text()) == report
    assert (report["run"], report["rounds"], report["engine"]) == ("first", ROUNDS, "network")
    assert (folder / "report.html").stat().st_size > 1000
