"""Certificates are renewed and a site is shut out while a run is under way."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.certificates import read_certificate
from client.keys import SiteKeys
from deploy.authority import serial_of
from deploy.gateway import RENEWAL_PATH
from deploy.renewal import renewal_due
from server.journal import Event
from tests.e2e.federation.conftest import PATIENCE, QUICK, RENEWED_SECONDS, SITES, Scene
from tests.e2e.federation.handmade import Caller
from tests.e2e.federation.network import until

RUN = "changes"
SHUT_SECONDS = 30.0  # from the command to the gateway's refusal; two looks and a reload take about ten


@pytest.fixture(scope="module")
def run(scene: Scene) -> Iterator[str]:
    """A long run of all three sites, of whom two suffice."""
    stage = scene.stage
    run_id = stage.begin(
        stage.run_file(scene.recipe, RUN, SITES, rounds=200, quorum=2, evaluate_every=200, absence_seconds=20, **QUICK)
    )
    scene.approve_quietly(run_id, *SITES)
    yield run_id
    stage.command("server", "stop", RUN, "--folder", str(stage.server))
    scene.wait(RUN, lambda events: events[-1]["event"] == "stopped", "the run stops")


def rounds(events: list[Event]) -> list[Event]:
    return [event for event in events if event["event"] == "round" and event["round"]]


def await_round(scene: Scene, number: int) -> list[Event]:
    """The journal once so many rounds are committed."""
    return scene.wait(RUN, lambda events: len(rounds(events)) >= number, f"round {number}")


def members(scene: Scene) -> dict[str, Any]:
    return scene.federation.members()


def test_certificates_are_renewed_without_losing_a_round(scene: Scene, run: str) -> None:
    """A site's, by its command, by itself when its time is short, and the server's: every round has every site."""
    stage, folder = scene.stage, scene.stage.sites["birch"]
    keys = SiteKeys.load(folder / "keys")
    first, server = serial_of(keys.certificate()), serial_of(read_certificate(scene.federation.server_crt))
    assert members(scene)["birch"].serial == first or renewal_due(keys.certificate())
    await_round(scene, 1)
    before = told(folder)

    assert "Renewed until" in stage.command("birch", "renew").stdout
    second = serial_of(keys.certificate())
    assert second != first
    assert members(scene)["birch"].serial == second
    assert first in members(scene)["birch"].earlier, "the one before is good until it ends: connections stand on it"

    assert "Renewed until" in stage.command("server", "renew", "--folder", str(stage.server)).stdout
    renewed = serial_of(read_certificate(scene.federation.server_crt))
    assert renewed != server
    until(lambda: presented(scene) == renewed, PATIENCE, "the gateway presents its new certificate")

    def by_itself() -> bool:
        return serial_of(keys.certificate()) not in (first, second)

    until(by_itself, RENEWED_SECONDS + PATIENCE, "birch renews its certificate by itself, two thirds into its life")
    third = serial_of(keys.certificate())
    until(lambda: members(scene)["birch"].serial == third, 30, "the register knows it")
    assert set(told(folder)[len(before) :]) == {"renewed"}, "nothing was started anew for it"

    found = rounds(await_round(scene, len(rounds(scene.events(RUN))) + 1))
    assert len(found) >= 3
    assert all(sorted(event["accepted"]) == sorted(SITES) for event in found), [event["absent"] for event in found]
    whole = json.loads(stage.command("birch", "audit", "verify", "--json").stdout)
    assert whole["lines"] > 5


def told(folder: Path) -> list[str]:
    """What a site's supervisor has told."""
    return [json.loads(line)["event"] for line in (folder / "state" / "supervisor.jsonl").read_text().splitlines()]


def presented(scene: Scene) -> str:
    """Serial of the certificate that the gateway shows."""
    from cryptography import x509

    caller = Caller(scene.server, scene.federation.ca_crt, None, scene.outside)
    with caller.connect() as connection:
        shown = connection.getpeercert(binary_form=True)
    assert shown is not None
    return serial_of(x509.load_der_x509_certificate(shown))


def test_a_revoked_site_is_out_within_the_round(scene: Scene, run: str, tmp_path: Path) -> None:
    """Its requests end at the gateway within seconds; the run goes on without it, and nothing of it counts again."""
    stage = scene.stage
    elm = Caller(
        scene.server, scene.federation.ca_crt, SiteKeys.load(stage.sites["elm"] / "keys").tls_file, scene.outside
    )
    assert elm.ask("POST", RENEWAL_PATH) == 403, "the renewal service speaks to a member"
    assert b"reason" in elm.said
    stage.command("server", "revoke", "elm", "--reason", "end-to-end test", "--folder", str(stage.server))
    begun = time.monotonic()
    until(lambda: elm.ask("POST", RENEWAL_PATH) == 400 and b"certificate" in elm.said, PATIENCE, "the gateway refuses")
    assert time.monotonic() - begun < SHUT_SECONDS
    elm.close()
    events = scene.wait(RUN, lambda found: any(e["event"] == "left" for e in found), "the run knows")
    left = next(number for number, event in enumerate(events) if event["event"] == "left")
    assert events[left]["site"] == "elm"
    after = len(rounds(events[:left]))
    events = await_round(scene, after + 2)
    later = rounds(events[left:])
    assert len(later) >= 2
    assert all(sorted(event["accepted"]) == ["alder", "birch"] for event in later)
    assert members(scene)["elm"].status == "revoked"
    entries = [json.loads(line) for line in (stage.server / "state" / "logs" / "access.jsonl").read_text().splitlines()]
    tail = [entry for entry in entries if entry["site"] == "" and entry["status"] == 400]
    assert tail, "elm goes on asking, and is refused"
    said = stage.command("elm", "renew", check=False)
    assert said.returncode == 2
    assert "not renewed" in said.stderr or "could not be asked" in said.stderr
