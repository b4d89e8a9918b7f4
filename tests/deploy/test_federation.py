"""A federation's folder: made whole or not at all, private, readable to its coordinator."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.certificates import certificate_days_left, read_certificate, spoken
from deploy import federation as federation_module
from deploy.credentials import certified_hosts
from deploy.federation import Federation, FederationConfig, LimitsConfig, address, init_federation, open_federation
from medsegdiff.chained_log import audit_lines, verify_log
from medsegdiff.errors import UserError

HOSTS = ["fed.example.org", "10.1.2.3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return init_federation(
        tmp_path_factory.mktemp("f") / "federation", "demo", HOSTS, 8443, contact="Dr. Roe, 555-0100"
    )


def test_everything_is_there(made: Federation) -> None:
    """The files of the design, secrets 0600, no folder open to others."""
    files = sorted(str(path.relative_to(made.folder)) for path in made.folder.rglob("*") if path.is_file())
    assert files == [
        "audit.jsonl", "audit.jsonl.head", "ca/ca.crl", "ca/ca.crt", "ca/ca.key", "federation.yaml", "guide.md",
        "server/server.crt", "server/server.key",
    ]  # fmt: skip
    assert made.ca_key.stat().st_mode & 0o777 == 0o600
    assert made.server_key.stat().st_mode & 0o777 == 0o600
    folders = [made.folder, *(path for path in made.folder.rglob("*") if path.is_dir())]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}
    assert {path.name for path in folders[1:]} == {"ca", "server", "requests", "kits", "runs", "state"}


def test_it_is_opened_again(made: Federation) -> None:
    """federation.yaml says what was asked; certificates and names fit it."""
    again = open_federation(made.folder)
    assert again.config == FederationConfig("demo", tuple(HOSTS), 8443)
    assert again.server == "fed.example.org:8443"
    assert again.authority().federation == "demo"
    assert {*HOSTS, "localhost"} < certified_hosts(read_certificate(again.server_crt))
    assert 364.9 < certificate_days_left(again.server_crt) <= 365
    assert 3649.9 < certificate_days_left(again.ca_crt) <= 3650
    assert again.members() == {}
    assert again.kit("alder") == made.folder / "kits" / "alder.kit"


def test_ports_are_counted_up(made: Federation) -> None:
    """Six ports on loopback from internal_port on, none of them twice."""
    assert made.ports == (18100, 18101, 18102, 18103, 18104, 18105)
    assert (made.ports.superlink, made.ports.renewal, made.ports.health) == (18100, 18103, 18105)


def test_its_beginning_is_audited(made: Federation) -> None:
    """The first line of the log names the authority."""
    verify_log(made.audit_file)
    first = next(iter(audit_lines(made.audit_file)))
    assert (first["event"], first["ca"]) == ("federation_created", made.authority().fingerprint)


def test_the_page_for_sites_says_what_they_need(made: Federation) -> None:
    """Address and port for the firewall, proxy, clock, what never leaves, whom to phone, the fingerprint; no secret."""
    page = made.guide.read_text()
    for text in ("outgoing TCP to `fed.example.org`, port `8443`", "HTTPS_PROXY", "NTP", "never leaves", "555-0100",
                 spoken(made.authority().fingerprint), "medsegfed join --kit", "medsegfed doctor"):  # fmt: skip
        assert text in page, text
    assert "PRIVATE" not in page
    assert len(page.splitlines()) < 70


def test_an_existing_federation_is_left_alone(made: Federation) -> None:
    """Made again in the same folder: refused, and not a byte changes."""
    before = {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds a federation already; nothing was changed"):
        init_federation(made.folder, "other", ["x.example.org"], 8444)
    assert {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    """Neither a stranger's folder nor a file is written into."""
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="nothing was written"):
            init_federation(folder, "demo", HOSTS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"hosts": []}, "SAN"),
        ({"hosts": ["https://fed.example.org"]}, "neither a host name"),
        ({"name": "St. Mary"}, "letters, digits"),
        ({"name": ""}, "letters, digits"),
        ({"name": "../x"}, "letters, digits"),
        ({"port": 0}, "port must lie"),
        ({"port": 70_000}, "port must lie"),
        ({"port": 18_103}, "one of the internal ports 18100..18105"),
        ({"internal_port": 80}, "internal_port must lie"),
        ({"internal_port": 65_533}, "internal_port must lie"),
        ({"site_days": 91}, "site_days must lie in .*..90"),
        ({"site_days": 0}, "site_days"),
        ({"site_days": float("nan")}, "site_days"),
        ({"server_days": 1e9}, "server_days"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, object], fault: str) -> None:
    """Before anything is made: one line, and no folder."""
    with pytest.raises(UserError, match=fault):
        init_federation(tmp_path / "f", **{"name": "demo", "hosts": HOSTS, "port": 8443, **changes})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "hosts", "days"),
    [
        ("no", ["::1", "10.0.0.1"], 60 / 86_400),
        ("1e5", ["1e5"], 0.5),
        ("0x1F", ["yes"], 90.0),
        ("a" * 64, ["a" * 63], 1.5),
    ],
)
def test_its_configuration_reads_back(tmp_path: Path, name: str, hosts: list[str], days: float) -> None:
    """Names that YAML would take for something else, fractions of a day, IPv6."""
    made = init_federation(tmp_path / "f", name, hosts, 443, 20_000, days, days)
    assert made.config == FederationConfig(name, tuple(hosts), 443, 20_000, days, days, LimitsConfig())
    assert made.authority().federation == name


def test_misspelt_keys_are_named(tmp_path: Path) -> None:
    """In federation.yaml and in its limits."""
    made = init_federation(tmp_path / "f", "demo", HOSTS)
    text = made.config_file.read_text()
    for old, new, fault in (
        ("site_days", "site_day", "did you mean 'site_days'"),
        ("body_mib: 8", "body_mb: 8", "did you mean 'body_mib'"),
        ("body_mib: 8", "body_mib: 5", "body_mib must lie in 6"),
        ('hosts: ["fed.example.org", "10.1.2.3"]', "hosts: []", "SAN"),
    ):
        assert old in text
        made.config_file.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=fault):
            open_federation(made.folder)


def test_no_federation_is_told(tmp_path: Path) -> None:
    """With the command that makes one."""
    with pytest.raises(UserError, match="medsegfed init"):
        open_federation(tmp_path)


def test_a_changed_name_is_told(tmp_path: Path) -> None:
    """The certificates bear the old one: nothing is signed."""
    made = init_federation(tmp_path / "f", "demo", HOSTS)
    made.config_file.write_text(made.config_file.read_text().replace('"demo"', '"other"'))
    with pytest.raises(UserError, match="authority certifies for demo"):
        open_federation(made.folder).authority()


@pytest.mark.parametrize("fails_at", range(7))
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    """Refused at any of its files: no folder, no leftovers."""
    real, count = federation_module.write_atomic, 0

    def write(path: Path, data: bytes, mode: int = 0o666) -> None:
        nonlocal count
        if count == fails_at:
            raise UserError("No space left on device")
        count += 1
        real(path, data, mode)

    monkeypatch.setattr(federation_module, "write_atomic", write)
    with pytest.raises(UserError, match="No space"):
        init_federation(tmp_path / "f", "demo", HOSTS)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from deploy import federation
real = federation.write_atomic
def write(path, data, mode=0o666):
    real(path, data, mode)
    if path.name == "server.key":
        Path(sys.argv[1]).with_name("now").touch()
        time.sleep(60)
federation.write_atomic = write
federation.init_federation(Path(sys.argv[1]), "demo", ["fed.example.org"])
"""


@pytest.mark.e2e
def test_a_killed_init_leaves_no_federation(tmp_path: Path) -> None:
    """SIGKILL with half of the files written: the folder is not there, and the next init makes it."""
    folder = tmp_path / "f"
    root = Path(__file__).parents[2]
    child = subprocess.Popen([sys.executable, "-c", KILLED, folder], cwd=root)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "now").exists():
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert not folder.exists()
    with pytest.raises(UserError, match="no federation"):
        open_federation(folder)
    init_federation(folder, "demo", HOSTS).authority()


def test_addresses() -> None:
    """IPv6 in brackets."""
    assert address("fd00::7", 8443) == "[fd00::7]:8443"
    assert address("fed.example.org", 443) == "fed.example.org:443"
