"""The server's own certificate: renewed in time, and taken up by gateway and SuperLink whatever fails on the way."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy import server_certificate
from deploy.server_certificate import ServerCertificate
from medsegdiff.errors import UserError
from tests.deploy.small_federation import new_federation


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A server's certificate whose time is told by the test, a queue, and what was asked of gateway and SuperLink."""
    federation = new_federation(tmp_path / "federation")
    found = SimpleNamespace(left=90.0, run=None, faults=[], applied=0, restarted=0, told=[], renewed=0)

    def fail(what: str) -> None:
        if what in found.faults:
            raise UserError(f"{what} failed")

    def apply() -> None:
        fail("apply")
        found.applied += 1

    def restart() -> None:
        found.restarted += 1

    def renew(_: Any) -> None:
        fail("renew")
        found.renewed += 1
        found.left = 90.0
        touch()

    def touch() -> None:
        stamp = federation.server_crt.stat().st_mtime_ns + 1_000_000
        os.utime(federation.server_crt, ns=(stamp, stamp))

    life = server_certificate.read_certificate(federation.server_crt)
    found.life = (life.not_valid_after_utc - life.not_valid_before_utc).total_seconds() / 86_400
    monkeypatch.setattr(server_certificate, "renew_server", renew)
    monkeypatch.setattr(server_certificate, "renewal_due", lambda _: found.left < 30)
    monkeypatch.setattr(server_certificate, "days_left", lambda _: found.left)
    monkeypatch.setattr(server_certificate, "next_run", lambda _: found.run)
    found.touch = touch
    found.certificate = ServerCertificate(federation, apply, restart, lambda e, f: found.told.append((e, f)))
    return found


def test_a_renewed_certificate_is_taken_up_once(scene) -> None:
    """By both, and then never again."""
    scene.certificate.look()
    assert (scene.renewed, scene.applied, scene.restarted) == (0, 0, 0)
    scene.left = 29.0
    for _ in range(3):
        scene.certificate.look()
    assert (scene.renewed, scene.applied, scene.restarted) == (1, 1, 1)
    assert scene.told == [("server_renewed", {})]


def test_a_failed_reload_is_tried_again(scene) -> None:
    """The gateway would serve the old certificate until it expires."""
    scene.touch()
    scene.faults = ["apply"]
    scene.certificate.look()
    assert (scene.applied, scene.restarted) == (0, 0)
    scene.faults = []
    scene.certificate.look()
    assert (scene.applied, scene.restarted) == (1, 1)


def test_a_run_is_disturbed_only_when_the_old_certificate_ends_soon(scene) -> None:
    """A run that is paused ends when sites come in, and none comes in past an expired certificate."""
    scene.run = Path("night")
    scene.touch()
    scene.left = scene.life / 6 + 0.1
    scene.faults = ["renew"]  # renewed by hand already
    for _ in range(3):
        scene.certificate.look()
    assert scene.restarted == 0
    scene.left = scene.life / 6 - 0.1
    scene.certificate.look()
    scene.certificate.look()
    assert scene.restarted == 1


def test_what_cannot_be_renewed_is_told_once(scene) -> None:
    """Not every five seconds for four months; and anew once it has been well."""
    scene.left, scene.faults = 29.0, ["renew"]
    for _ in range(5):
        scene.certificate.look()
    assert scene.told == [("not_renewed", {"reason": "renew failed", "days_left": 29.0})]
    scene.faults = []
    scene.certificate.look()
    scene.left, scene.faults = 29.0, ["renew"]
    scene.certificate.look()
    assert [event for event, _ in scene.told] == ["not_renewed", "server_renewed", "not_renewed"]
