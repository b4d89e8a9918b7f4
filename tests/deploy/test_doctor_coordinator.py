"""`doctor` at the coordinator's machine: a federation as `init`, `admit` and `revoke` make it, with one fault each."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from deploy import guard
from deploy.admission import admit, revoke
from deploy.doctor import coordinator, run_checks
from deploy.doctor.checks import Check
from deploy.federation import Federation, init_federation, open_federation
from deploy.joining import make_request
from medsegdiff.errors import UserError

DAY = 86_400.0


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A federation with two admitted sites and a revoked one."""
    place = tmp_path_factory.mktemp("founded")
    federation = init_federation(place / "federation", "north", ["localhost", "127.0.0.1"])
    for name in ("st-mary", "st-john", "st-luke"):
        admit(federation, make_request(place / name, name, 10).request)
    revoke(federation, "st-luke", "a drill")
    return federation


@pytest.fixture
def federation(founded: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    """A copy to spoil, on free ports; the largest preset's size is a constant."""
    monkeypatch.setattr("deploy.doctor.coordinator.model_bytes", lambda models: 2**20)
    shutil.copytree(founded.folder, tmp_path / "federation")
    config = tmp_path / "federation" / "federation.yaml"
    internal, public = free_block(7)
    text = (
        config.read_text()
        .replace("port: 8443", f"port: {public}")
        .replace("internal_port: 18100", f"internal_port: {internal}")
    )
    config.write_text(text)
    return open_federation(tmp_path / "federation")


def free_block(count: int) -> tuple[int, int]:
    """The first of count - 1 free ports in a row, and one free port behind them."""
    for start in range(21_000, 30_000, count):
        try:
            for port in range(start, start + count):
                with socket.socket() as trial:
                    trial.bind(("", port))
        except OSError:
            continue
        return start, start + count - 1
    raise AssertionError("no free ports")


def examine(federation: Federation, days: float = 0.0) -> dict[str, Check]:
    """All checks by name, `days` from now."""
    moment = datetime.now(UTC).timestamp() + days * DAY
    checks = run_checks(federation.folder, now=lambda: moment)
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def test_a_healthy_federation_passes_everything(federation: Federation) -> None:
    """No failure, and the numbers are those of the register."""
    checks = examine(federation)
    assert not [check for check in checks.values() if check.status == "fail"]
    assert checks["members"].figures == {"admitted": 2, "suspended": 0, "revoked": 1, "ending": 0, "expired": 0}
    assert checks["revocation list"].detail == "signed by the authority, names 1 certificate"
    assert checks["ports"].detail.endswith("6 loopback ports are free")
    assert checks["keys"].figures["authority"] == federation.authority().fingerprint
    assert checks["audit log"].figures["lines"] > 4


def test_a_fault_of_federation_yaml_is_told_and_the_rest_waits(federation: Federation) -> None:
    """The key is named; nothing is guessed from a configuration that cannot be read."""
    federation.config_file.write_text(federation.config_file.read_text().replace("site_days", "site_day"))
    checks = examine(federation)
    assert list(checks) == ["federation.yaml", "environment"]
    assert "site_day: unknown key; did you mean 'site_days'?" in checks["federation.yaml"].detail


def test_a_key_that_others_may_read_fails(federation: Federation) -> None:
    """Whoever holds the authority's key can make himself any site."""
    federation.ca_key.chmod(0o644)
    check = examine(federation)["keys"]
    assert check.status == "fail"
    assert stat.S_IMODE(federation.ca_key.stat().st_mode) == 0o644  # told, not mended behind the coordinator's back
    federation.ca_key.unlink()
    assert examine(federation)["keys"].detail == "ca.key not there"


def test_an_authority_that_does_not_fit_is_told_without_stopping_the_rest(
    federation: Federation, tmp_path: Path
) -> None:
    """Two federations' files mixed up by a restored backup."""
    other = init_federation(tmp_path / "other", "north", ["localhost"])
    shutil.copy(other.ca_crt, federation.ca_crt)
    checks = examine(federation)
    assert {checks[name].status for name in ("keys", "certificates", "revocation list")} == {"fail"}
    assert "not issued by this federation's authority" in checks["certificates"].detail
    assert checks["members"].status == "ok"


@pytest.mark.parametrize(
    ("days", "status", "words"),
    [(0, "ok", "valid"), (340, "warn", "within 30 days"), (364.5, "warn", "within 1 day"), (366, "fail", "expired")],
)
def test_the_servers_days_are_counted(federation: Federation, days: float, status: str, words: str) -> None:
    """The gateway with an expired certificate stops every site."""
    check = examine(federation, days)["certificates"]
    assert check.status == status
    assert words in check.detail


@pytest.mark.parametrize(("days", "ending", "expired"), [(61, 2, 0), (91, 2, 2)])
def test_members_whose_certificates_end_are_counted(
    federation: Federation, days: float, ending: int, expired: int
) -> None:
    """A site that does not run does not renew its own."""
    check = examine(federation, days)["members"]
    assert check.status == "warn"
    assert (check.figures["ending"], check.figures["expired"]) == (ending, expired)
    assert "st-mary" in check.detail
    assert "st-luke" not in check.detail


def test_a_host_that_the_certificate_lacks_fails(federation: Federation) -> None:
    """A name that was added to federation.yaml counts once the certificate is renewed."""
    text = federation.config_file.read_text().replace('"localhost",', '"localhost", "fl.example.org",')
    federation.config_file.write_text(text)
    check = examine(open_federation(federation.folder))["certificates"]
    assert check.status == "fail"
    assert "lacks fl.example.org" in check.detail
    assert "medsegfed renew" in check.advice


def test_a_host_that_nobody_can_look_up_is_told(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS here may differ from the sites', so it is a warning."""

    def look_up(host: str, *arguments: object) -> list[object]:
        if host == "localhost":
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    check = examine(federation)["hosts"]
    assert (check.status, check.figures) == ("warn", {"hosts": 2, "unknown": 1})


def test_a_revocation_that_the_list_lacks_fails(federation: Federation) -> None:
    """An older list put back would let a revoked site in."""
    federation.ca_crl.write_bytes(federation.authority().revocation_list([], 9))
    check = examine(federation)["revocation list"]
    assert check.status == "fail"
    assert "lacks 1 of 1 revoked certificate" in check.detail
    federation.ca_crl.write_text("damaged")
    assert examine(federation)["revocation list"].status == "fail"


# Programs and ports


def test_a_missing_nginx_is_answered_with_the_command(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to type on Debian."""

    def missing() -> None:
        raise UserError("nginx is not installed.")

    monkeypatch.setattr("deploy.gateway.require_programs", missing)
    check = examine(federation)["programs"]
    assert check.status == "fail"
    assert "sudo apt-get install nginx" in check.advice


def test_a_missing_flower_is_answered(tmp_path: Path) -> None:
    """A virtual environment that is only half there."""
    check = coordinator._programs_check(str(tmp_path))
    assert check.status == "fail"
    assert check.detail.startswith("flower-superlink and flower-superexec not found")


@pytest.mark.parametrize("which", ["public", "loopback"])
def test_a_port_that_another_program_holds_fails(federation: Federation, which: str) -> None:
    """With the command that tells who it is."""
    port = federation.config.port if which == "public" else federation.ports.renewal
    with socket.create_server(("127.0.0.1", port)):
        check = examine(federation)["ports"]
    assert check.status == "fail"
    assert check.detail.endswith(f"in use by another program: {port}")
    assert f"sport = :{port}" in check.advice


def running(federation: Federation) -> None:
    """A supervisor's record that names this process."""
    me = guard.read_process(os.getpid())
    assert me is not None
    record = {"boot": guard.boot(), "pid": me.pid, "start": me.start, "children": {"gateway": {"phase": "running"}}}
    (federation.state / "supervisor.json").write_text(json.dumps(record))


def test_ports_of_the_running_server_are_no_fault(federation: Federation) -> None:
    """Held by its own processes; a running server without its public port is one."""
    running(federation)
    with socket.create_server(("127.0.0.1", federation.config.port)):
        assert examine(federation)["ports"].status == "ok"
    check = examine(federation)["ports"]
    assert check.status == "fail"
    assert "nothing listens" in check.detail


def test_a_port_for_root_alone_is_told(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """443 without the right to it."""
    monkeypatch.setattr(coordinator, "_bind_fault", lambda host, port: 13 if not host else None)
    check = examine(federation)["ports"]
    assert check.status == "fail"
    assert "root alone" in check.detail


# Clock, disk


@pytest.mark.parametrize(("said", "status"), [("yes", "ok"), ("no", "warn"), ("", "skipped")])
def test_the_clocks_keeper_is_asked(tmp_path: Path, said: str, status: str) -> None:
    """systemd tells yes or no; a container tells nothing."""
    program = tmp_path / "timedatectl"
    program.write_text(f"#!/bin/sh\necho {said}\n")
    program.chmod(0o755)
    assert coordinator.clock_kept(str(program)).status == status


def test_a_system_without_timedatectl_is_skipped() -> None:
    """No keeper to ask is no fault."""
    assert coordinator.clock_kept("no-such-program").status == "skipped"


def test_the_runs_models_decide_on_the_disk(
    federation: Federation, make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of the largest model among the runs; a damaged plan is passed over."""
    shutil.copytree(make_run("tiny"), federation.runs / "tiny")
    (federation.runs / "torn").mkdir()
    (federation.runs / "torn" / "run.yaml").write_text("name: [")
    found = list(coordinator._models(federation.runs))
    assert [model.image_size for model in found] == [16]
    assert "taking the largest preset" not in examine(federation)["disk"].detail
