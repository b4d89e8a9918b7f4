"""`doctor` at a whole site: a federation, keys and a kit as they are made, real TLS, a dataset that names everybody."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from test_doctor_dataset import CANARY, Planted
from test_doctor_network import Listener, gateway, tls

from client.application import application_hash
from client.approvals import PendingRun, approve, keep_pending, task_hash
from client.contract import TrainTask
from client.keys import SiteKeys, node_key_header
from client.privacy.account import Ceiling, ledger_path
from client.privacy.ledger import Ledger
from deploy import guard
from deploy.admission import admit, revoke
from deploy.doctor import exit_code, report, run_checks, site
from deploy.doctor.checks import Check, as_plain
from deploy.doctor.credentials import check_certificates, check_keys, span
from deploy.federation import Federation, init_federation, open_federation
from deploy.gateway import answers, gateway_command, install_config, reload, render_nginx, require_programs, worker_user
from deploy.joining import install_kit, make_request
from medsegdiff.chained_log import ChainedLog
from medsegdiff.errors import UserError

DAY = 86_400.0


class Hospital:
    """A site's folder, and the federation it belongs to."""

    def __init__(self, folder: Path, federation: Federation) -> None:
        self.folder = folder
        self.federation = federation

    @property
    def yaml(self) -> Path:
        return self.folder / "site.yaml"

    def edit(self, old: str, new: str) -> None:
        text = self.yaml.read_text()
        assert old in text, old
        self.yaml.write_text(text.replace(old, new))

    def keys(self) -> SiteKeys:
        return SiteKeys.load(self.folder / "keys")

    def examine(self, names: bool = False, **settings: Any) -> dict[str, Check]:
        """All checks by name; the canary must not be in what may be mailed."""
        checks = run_checks(self.folder, names=names, **settings)
        if not names:
            assert CANARY.lower() not in json.dumps(as_plain(checks)).lower()
        assert len({check.name for check in checks}) == len(checks)
        return {check.name: check for check in checks}


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    """A federation and a site that has joined it; the site's data name everybody."""
    place = tmp_path_factory.mktemp("joined")
    federation = init_federation(place / "federation", "north", ["localhost"], port=1)
    folder = place / "site"
    request = make_request(folder, "st-mary", 10).request
    install_kit(folder, admit(federation, request))
    planted = Planted(folder, patients=12)
    planted.write()
    hospital = Hospital(folder, federation)
    hospital.yaml.write_text(f"{{name: st-mary, data: {CANARY}-data, keys: keys, policy: {{min_patients: 5}}}}\n")
    return hospital


@pytest.fixture
def hospital(joined: Hospital, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hospital:
    """A copy of the joined site to spoil; the memory forecast, which takes seconds, is a constant."""
    monkeypatch.setattr("deploy.doctor.machine._forecast", lambda *arguments: 2**20)
    monkeypatch.setattr("deploy.doctor.site.model_bytes", lambda models: 2**20)
    shutil.copytree(joined.folder, tmp_path / "site")
    return Hospital(tmp_path / "site", joined.federation)


@pytest.fixture
def server(hospital: Hospital, tmp_path: Path) -> Iterator[Listener]:
    """The federation's server on a free port of this machine, which the site's kit names."""
    pair = tmp_path / "server.pem"
    pair.write_bytes(hospital.federation.server_key.read_bytes() + hospital.federation.server_crt.read_bytes())
    listener = Listener(gateway(tls(pair, hospital.federation.ca_crt)))
    kit = hospital.folder / "keys" / "federation.json"
    kit.write_text(json.dumps({**json.loads(kit.read_text()), "server": f"localhost:{listener.port}"}))
    yield listener
    listener.close()


def test_a_healthy_site_passes_everything(hospital: Hospital, server: Listener) -> None:
    """Network, keys, policy, machine and data; nothing fails and the exit code is 0."""
    checks = hospital.examine()
    bad = {name: check for name, check in checks.items() if check.status not in ("ok", "skipped")}
    assert set(bad) <= {"environment"}, bad  # tests may run as root
    assert [name for name, check in checks.items() if check.status == "skipped"] == []
    assert exit_code(checks.values()) == 0
    assert checks["client certificate"].status == checks["clock"].status == "ok"
    assert checks["splits"].figures["train_patients"] == 10
    assert checks["application"].figures["hash"] == application_hash()


def test_nothing_of_the_examination_is_left_behind(hospital: Hospital, server: Listener) -> None:
    """Trial files go; no file of the site is changed."""
    before = {path: path.stat().st_mtime_ns for path in hospital.folder.rglob("*") if path.is_file()}
    hospital.examine()
    assert {path: path.stat().st_mtime_ns for path in hospital.folder.rglob("*") if path.is_file()} == before


def test_names_are_shown_at_the_own_terminal_alone(hospital: Hospital) -> None:
    """A torn file is a keyed hash for everybody else."""
    torn = next((hospital.folder / f"{CANARY}-data" / CANARY).glob("*case-3.nii.gz"))
    torn.write_bytes(torn.read_bytes()[:100])
    quiet = hospital.examine()["files"]
    assert quiet.cases == (hospital.keys().case_hash(f"{CANARY}-case-3"),)
    assert torn.name in hospital.examine(names=True)["files"].cases[0]


# site.yaml


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{name: st-mary, data: data, polcy: {}}", "polcy: unknown key; did you mean 'policy'?"),
        (f"{{name: st-mary, data: {CANARY}, device: [{CANARY}]}}", "device"),
        (f"{{name: st-mary, data: data, policy: {{allowed_hours: '{CANARY}'}}}}", "policy"),
        (f"{{name: st-mary, data: {CANARY}: 3", "is not valid YAML near line 1"),
        (f"{CANARY}", "expected a mapping"),
    ],
)
def test_a_fault_of_site_yaml_is_told_without_its_values(hospital: Hospital, text: str, words: str) -> None:
    """The key is named, the value only at the own terminal; what needs no configuration is examined all the same."""
    hospital.yaml.write_text(text)
    checks = hospital.examine()
    assert list(checks) == ["site.yaml", "environment"]
    assert checks["site.yaml"].status == "fail"
    assert words in checks["site.yaml"].detail


def test_a_site_without_a_kit_is_told_what_to_do(hospital: Hospital) -> None:
    """Keys are there, the federation is not yet."""
    for name in ("federation.json", "ca.crt"):
        (hospital.folder / "keys" / name).unlink()
    checks = hospital.examine()
    assert checks["keys"].status == "ok"
    assert checks["certificates"].status == "fail"
    assert "join --kit" in checks["certificates"].advice
    assert {checks[name].status for name in site.NAMES} == {"skipped"}


def test_a_virtual_site_has_neither_keys_nor_network(
    tiny_world: Path, hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A simulated hospital's folder is examined as far as it goes."""
    checks = {check.name: check for check in run_checks(tiny_world / "alder")}
    assert not [name for name, check in checks.items() if check.status == "fail"]
    assert {checks[name].status for name in ("keys", "certificates", "approvals", *site.NAMES)} == {"skipped"}
    assert checks["splits"].figures["train_patients"] == 3


# Keys and certificates


@pytest.mark.parametrize("name", ["node.key", "signing.key", "names.key", "tls.pem"])
def test_a_key_that_others_may_read_fails(hospital: Hospital, name: str) -> None:
    """The mode is judged, and nothing is done with the key."""
    (hospital.folder / "keys" / name).chmod(0o640)
    check = check_keys(hospital.folder / "keys")
    assert check.status == "fail"
    assert check.detail.startswith("1 of 6 secret files")
    assert "chmod" in check.advice


def test_missing_and_foreign_key_files_fail(hospital: Hospital) -> None:
    """Some gone, all gone, one of another pair: each in its own words."""
    keys = hospital.folder / "keys"
    public = (keys / "node.pub").read_bytes()
    (keys / "node.pub").write_bytes(public.replace(b"A", b"B", 1))
    assert "does not belong to node.key" in check_keys(keys).detail
    (keys / "node.pub").unlink()
    assert check_keys(keys).detail == "1 of 5 key files are missing"
    shutil.rmtree(keys)
    assert check_keys(keys).detail == "the site has no keys yet"


@pytest.mark.parametrize(
    ("days", "status", "words"),
    [
        (10, "ok", "valid"),
        (61, "warn", "within 30 days"),
        (84, "warn", "within 7 days"),
        (89.5, "warn", "within 1 day"),
        (91, "fail", "has expired"),
        (-1, "fail", "not valid yet"),
    ],
)
def test_the_days_left_are_counted(joined: Hospital, days: float, status: str, words: str) -> None:
    """Warnings at 30, 7 and 1 days; a certificate of tomorrow is a wrong clock's."""
    now = datetime.now(UTC).timestamp() + days * DAY
    check = check_certificates(joined.folder / "keys", "st-mary", now)
    assert (check.status, words in check.detail) == (status, True), check
    assert check.figures["site_days"] == pytest.approx(90 - days, abs=0.1)


def test_three_names_must_be_one(joined: Hospital) -> None:
    """site.yaml, kit and certificate: a copied folder is noticed."""
    check = check_certificates(joined.folder / "keys", "st-john", datetime.now(UTC).timestamp())
    assert check.status == "fail"
    assert "site.yaml of st-john" in check.detail


def test_a_certificate_of_another_authority_fails(hospital: Hospital, tmp_path: Path) -> None:
    """A ca.crt that was put in by hand does not go with the kit."""
    other = init_federation(tmp_path / "other", "north", ["localhost"])
    (hospital.folder / "keys" / "ca.crt").write_bytes(other.ca_crt.read_bytes())
    check = check_certificates(hospital.folder / "keys", "st-mary", datetime.now(UTC).timestamp())
    assert check.status == "fail"
    assert "not issued by the authority" in check.detail


@pytest.mark.parametrize(
    ("days", "words"),
    [(89.9, "90 days"), (1.5, "36.0 hours"), (60 / DAY, "60 s"), (0, "expired"), (-3, "expired 3 days ago")],
)
def test_a_span_of_time_is_told_in_a_fitting_unit(days: float, words: str) -> None:
    """Drills use certificates of a minute."""
    assert span(days) == words


# Policy, approvals, program, logs, processes


def test_closed_hours_are_told_with_their_opening(hospital: Hospital) -> None:
    """A run that waits is no fault."""
    hospital.edit("min_patients: 5", "min_patients: 5, allowed_hours: '18:00-07:00'")
    noon, night = (datetime(2026, 3, 4, hour, 30).timestamp() for hour in (12, 23))
    closed, open_ = (hospital.examine(now=lambda time=time: time)["policy"] for time in (noon, night))
    assert "closed now, 12:30: opens at 18:00" in closed.detail
    assert "open now (18:00-07:00)" in open_.detail
    assert (closed.figures["open"], open_.figures["open"]) == (False, True)


def test_a_site_that_approves_everything_is_looked_at(hospital: Hospital) -> None:
    """The data officer may want it so, and should know."""
    hospital.edit("min_patients: 5", "min_patients: 5, approval_required: false")
    assert hospital.examine()["policy"].status == "warn"


def approved(hospital: Hospital, task: TrainTask, application: str = "") -> Path:
    """Approve a run at the site."""
    waiting = PendingRun("run-1", task, "2026-01-01T00:00:00Z")
    approve(hospital.folder, waiting, hospital.keys(), application or application_hash(), "Dr. Day")
    return hospital.folder / "approvals" / "run-1.json"


def test_runs_that_wait_and_approvals_are_counted(hospital: Hospital, tiny_task: TrainTask) -> None:
    """What waits is to be looked at; the memory is compared with what the runs ask for."""
    approved(hospital, tiny_task)
    keep_pending(hospital.folder, tiny_task, "run-2")
    checks = hospital.examine()
    assert checks["approvals"].figures == {"approved": 1, "waiting": 1, "void": 0}
    assert checks["approvals"].status == "warn"
    assert "run run-" in checks["memory"].detail
    assert checks["dataset"].status == "fail"  # this site's data has other labels than that run asks for
    assert checks["cache"].figures["image_size"] == 16


def test_an_edited_approval_fails(hospital: Hospital, tiny_task: TrainTask) -> None:
    """Whoever raised the rounds by hand did not have the key."""
    path = approved(hospital, tiny_task)
    path.write_text(path.read_text().replace('"rounds": 2', '"rounds": 3'))
    check = hospital.examine()["approvals"]
    assert (check.status, check.figures["void"]) == ("fail", 1)


def test_approvals_of_another_program_are_looked_at(hospital: Hospital, tiny_task: TrainTask) -> None:
    """After an update each run is to be approved anew."""
    assert task_hash(tiny_task)
    approved(hospital, tiny_task, "0" * 64)
    check = hospital.examine()["application"]
    assert (check.status, check.figures["approvals_of_another"]) == ("warn", 1)


def test_a_program_that_the_policy_does_not_allow_fails(hospital: Hospital) -> None:
    """The installed hash stands beside the allowed one."""
    hospital.edit("min_patients: 5", f"min_patients: 5, application: '{'a' * 64}'")
    check = hospital.examine()["application"]
    assert check.status == "fail"
    assert application_hash() in check.detail
    assert "aaaaaaaaaaaa..." in check.detail


def test_an_edited_audit_log_fails(hospital: Hospital) -> None:
    """One letter in one line."""
    log = ChainedLog(hospital.folder / "audit.jsonl")
    log.append("kit_installed")
    for number in range(3):
        log.append("update", round=number)
    assert hospital.examine()["audit log"].status == "ok"
    log.path.write_bytes(log.path.read_bytes().replace(b'"round":1', b'"round":2'))
    check = hospital.examine()["audit log"]
    assert check.status == "fail"
    assert "line" in check.detail
    assert str(hospital.folder) not in check.detail


def test_an_audit_log_that_was_removed_fails(hospital: Hospital) -> None:
    """With its head file: a site that has a kit has had a log since. One begun anew in its place does not hide it."""
    log = ChainedLog(hospital.folder / "audit.jsonl")
    log.append("kit_installed")
    for path in (log.path, log.path.with_name("audit.jsonl.head")):
        path.unlink()
    check = hospital.examine()["audit log"]
    assert (check.status, "it was removed" in check.detail) == ("fail", True)
    ChainedLog(log.path).append("approved", run="run-1")
    check = hospital.examine()["audit log"]
    assert (check.status, "is not the first one" in check.detail) == ("warn", True)
    (hospital.folder / "keys" / "federation.json").unlink()
    for path in (log.path, log.path.with_name("audit.jsonl.head")):
        path.unlink()
    assert hospital.examine()["audit log"].detail == "nothing is logged yet"


@pytest.mark.slow
def test_an_edited_or_rolled_back_ledger_fails(hospital: Hospital) -> None:
    """Nothing spent, something spent, an older copy put back, one figure changed."""
    assert hospital.examine()["ledger"].detail == "no privacy budget is spent"
    ledger = Ledger(ledger_path(hospital.folder), Ceiling(3.0, 1e-5), hospital.folder / "audit.jsonl")
    ledger.reserve("run-1", 1, 8.0, 0.1, 5)
    files = [ledger.path, ledger.path.with_name(f"{ledger.path.name}.head")]
    before = [path.read_bytes() for path in files]
    ledger.reserve("run-1", 2, 8.0, 0.1, 5)
    assert hospital.examine()["ledger"].figures["reservations"] == 2
    after = [path.read_bytes() for path in files]
    for path, content in zip(files, before, strict=True):
        path.write_bytes(content)
    check = hospital.examine()["ledger"]
    assert check.status == "fail"
    assert "noted elsewhere" in check.detail
    assert str(hospital.folder) not in check.detail
    for path, content in zip(files, after, strict=True):
        path.write_bytes(content.replace(b'"steps":5', b'"steps":4', 1))
    assert hospital.examine()["ledger"].status == "fail"


def test_processes_are_told_by_the_supervisors_own_record(hospital: Hospital) -> None:
    """A record of a process that is gone counts as not running."""
    assert hospital.examine()["processes"].figures == {"running": False}
    me = guard.read_process(os.getpid())
    assert me is not None
    record = {"boot": guard.boot(), "pid": me.pid, "start": me.start, "children": {
        "supernode": {"phase": "running", "restarts": 2}, "runner": {"phase": "waiting", "restarts": 0}}}  # fmt: skip
    (hospital.folder / "state").mkdir(exist_ok=True)
    path = hospital.folder / "state" / "supervisor.json"
    path.write_text(json.dumps(record))
    check = hospital.examine()["processes"]
    assert check.status == "warn"
    assert "1 of 2 processes up, 2 restarts since the start; not up: runner" in check.detail
    path.write_text(json.dumps(record | {"start": me.start - 1}))
    assert hospital.examine()["processes"].figures == {"running": False}


# The whole


def test_a_check_that_crashes_names_nobody_and_stops_nobody(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect of ours, with a patient's name in its text."""

    def crash(*arguments: object) -> Check:
        raise RuntimeError(f"/data/{CANARY}/scan.nii.gz")

    for name in ("check_versions", "audit_check", "check_environment"):
        monkeypatch.setattr(site, name, crash)
    checks = hospital.examine()
    assert {checks[name].detail for name in ("versions", "audit log", "environment")} == {
        "this check broke off: RuntimeError"
    }
    assert checks["dataset"].status == "ok"


def test_the_proxy_of_the_environment_is_taken(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTPS_PROXY leads the doctor as it leads the SuperNode; its password is nowhere."""
    monkeypatch.setenv("HTTPS_PROXY", "http://user:s3cret@127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    kit = hospital.folder / "keys" / "federation.json"
    kit.write_text(json.dumps({**json.loads(kit.read_text()), "server": "fl.example.org:8443"}))
    checks = hospital.examine()
    assert checks["server connection"].detail.startswith("the proxy 127.0.0.1:1 refuses the connection")
    monkeypatch.setenv("HTTPS_PROXY", "socks5://user:s3cret@127.0.0.1:1")
    checks |= {f"{name} again": check for name, check in hospital.examine().items()}
    assert "socks5" in checks["server address again"].detail
    assert "s3cret" not in repr(checks)


def test_the_report_is_printed_for_people_and_for_programs(
    hospital: Hospital, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1 here, for nothing answers at the kit's port; data go to standard output alone."""
    monkeypatch.setenv("COLUMNS", "80")
    assert report(hospital.folder, as_json=True) == 1
    out, _ = capsys.readouterr()
    data = json.loads(out)
    assert data["healthy"] is False
    assert report(hospital.folder) == 1
    out, _ = capsys.readouterr()
    assert "server connection" in out
    assert f"{len(data['checks'])} checks: " in out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert CANARY not in out


def test_a_folder_of_neither_end_is_refused(tmp_path: Path) -> None:
    """Nothing to examine is no clean bill of health."""
    with pytest.raises(UserError, match=r"neither site\.yaml nor federation\.yaml"):
        run_checks(tmp_path)


@pytest.mark.e2e
def test_the_real_gateway_and_a_revocation(hospital: Hospital, tmp_path: Path) -> None:
    """nginx as the server runs it takes the certificate; after a revocation it turns it down, and doctor knows."""
    federation = open_federation(shutil.copytree(hospital.federation.folder, tmp_path / "federation"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    kit = hospital.folder / "keys" / "federation.json"
    kit.write_text(json.dumps({**json.loads(kit.read_text()), "server": f"localhost:{port}"}))
    os.chmod(tmp_path, 0o755)  # noqa: PTH101  # nginx's workers may be another account
    text = render_nginx(
        state=federation.state.absolute(), federation="north",
        node_keys={"st-mary": node_key_header(hospital.keys().node_public_ssh)},
        port=port, superlink_port=1, renewal_port=2, renewal_secret="0" * 32, user=worker_user(),
        ca=federation.ca_crt.absolute(), crl=federation.ca_crl.absolute(),
        certificate=federation.server_crt.absolute(), key=federation.server_key.absolute(),
    )  # fmt: skip
    config = install_config(federation.state, text)
    process = subprocess.Popen(gateway_command(require_programs(), config), stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 20
        while not answers(port, federation.ca_crt):
            assert time.monotonic() < end
            time.sleep(0.05)
        checks = hospital.examine()
        assert [checks[name].status for name in site.NAMES] == ["ok"] * 5, checks
        assert checks["client certificate"].figures == {"status": 403}
        revoke(federation, "st-mary", "a drill")
        reload(config, process.pid)
        checks = hospital.examine()
        assert [checks[name].status for name in site.NAMES] == ["ok", "ok", "ok", "fail", "ok"], checks
        assert "revoked, or of another federation" in checks["client certificate"].detail
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
def test_the_privacy_budget_is_told_and_warned_of(hospital: Hospital) -> None:
    """Without a section that is said; with room for a run as planned ok; once that no longer fits, a warning."""
    assert "no privacy section" in hospital.examine()["privacy"].detail
    mechanism = (
        "{epsilon: 3.0, delta: 1.0e-5, sigma: 8.0, q: 0.1, clip: 1.0, batch: 1, steps: 5, rounds: 50, slices: 4, "
        "draws: 4}"
    )
    hospital.edit("{name:", f"{{privacy: {{weight: 200, mechanism: {mechanism}}}, name:")
    check = hospital.examine()["privacy"]
    assert check.status == "ok"
    assert check.detail.startswith("epsilon 0.00 of 3 is spent (delta 1e-05, sigma 8); a run as planned would take it")
    ledger = Ledger(ledger_path(hospital.folder), Ceiling(3.0, 1e-5), hospital.folder / "audit.jsonl")
    ledger.commit(ledger.reserve("run-1", 1, 8.0, 0.1, 3000), 3000)
    check = hospital.examine()["privacy"]
    assert check.status == "warn"
    assert "a run of the planned 50 rounds x 5 steps no longer fits" in check.detail


@pytest.mark.slow
def test_a_batch_that_no_step_can_draw_is_warned_of(hospital: Hospital) -> None:
    """Twenty, where a tenth of a handful is drawn: it protects, and learns nothing."""
    mechanism = "{epsilon: 8.0, delta: 1.0e-5, sigma: 2.5, q: 0.1, clip: 0.02, batch: 20, steps: 10, rounds: 20}"
    hospital.edit("{name:", f"{{privacy: {{weight: 200, mechanism: {mechanism}}}, name:")
    check = hospital.examine()["privacy"]
    assert check.status == "warn"
    assert "patients on average, and batch is 20" in check.detail
