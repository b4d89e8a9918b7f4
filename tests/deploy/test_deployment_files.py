"""Units, container, compose, firewall and proxy files: judged by the programs that read them, and tried out.

A program that is not installed leaves its tests out, with the reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.alive import alive
from deploy.child import Child
from deploy.supervisor import Supervisor

FILES = Path(__file__).parents[2] / "deploy" / "files"
UNITS = ("medsegfed-server", "medsegfed-site")
DROP_INS = {
    "site-proxy.conf": "medsegfed-site", "site-gpu.conf": "medsegfed-site", "site-data.conf": "medsegfed-site",
    "server-port-443.conf": "medsegfed-server",
}  # fmt: skip
# What `systemd-analyze security` gives (0 safe ... 10 exposed; an unhardened service has 9.6). Only lower it.
MOST_EXPOSURE = {"medsegfed-server": 1.2, "medsegfed-site": 1.2}


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def need_root_and_namespaces() -> None:
    need("ip", "nft", "unshare")
    tried = subprocess.run(["unshare", "--net", "nft", "list", "ruleset"], capture_output=True, check=False)
    if tried.returncode != 0:
        pytest.skip("network namespaces with nftables are not permitted here")


def told(*command: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=60, **more
    )


def read_unit(path: Path) -> dict[str, list[str]]:
    """Key -> values in order; an empty assignment is kept, since it clears what stood before."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found[key].append(value)
    return found


# systemd


@pytest.fixture
def unit(tmp_path: Path) -> Callable[[str], Path]:
    """A unit file whose program exists here: systemd refuses one whose program does not."""

    def copy(name: str, text: str = "") -> Path:
        text = text or (FILES / "systemd" / f"{name}.service").read_text()
        (path := tmp_path / f"{name}.service").write_text(text.replace("/opt/medsegfed/bin/medsegfed", "/bin/true"))
        return path

    return copy


@pytest.mark.parametrize("name", UNITS)
def test_systemd_reads_the_units_without_a_word(unit: Callable[..., Path], name: str) -> None:
    """Unknown keys and values are only warned about: silence is what counts. A misspelt key is heard."""
    need("systemd-analyze")
    verdict = told("systemd-analyze", "verify", unit(name))
    assert (verdict.returncode, verdict.stdout + verdict.stderr) == (0, "")
    wrong = (FILES / "systemd" / f"{name}.service").read_text().replace("ProtectHome=", "ProtectHomes=")
    assert "'ProtectHomes'" in told("systemd-analyze", "verify", unit(name, wrong)).stderr


@pytest.mark.parametrize("name", DROP_INS)
def test_systemd_reads_the_drop_ins_without_a_word(unit: Callable[..., Path], name: str) -> None:
    """Laid beside the unit as on a hospital's machine."""
    need("systemd-analyze")
    path = unit(DROP_INS[name])
    folder = path.with_name(f"{path.name}.d")
    folder.mkdir()
    shutil.copy(FILES / "systemd" / name, folder)
    verdict = told("systemd-analyze", "verify", path)
    assert (verdict.returncode, verdict.stdout + verdict.stderr) == (0, "")
    (folder / name).write_text("[Service]\nNonsense=1\n")
    assert "Nonsense" in told("systemd-analyze", "verify", path).stderr  # drop-ins are read at all


@pytest.mark.parametrize("name", UNITS)
def test_units_are_as_hardened_as_they_were(unit: Callable[..., Path], name: str) -> None:
    """The score of systemd itself; without the hardening it would be above 9."""
    need("systemd-analyze")
    verdict = told("systemd-analyze", "security", "--offline=yes", "--no-pager", unit(name))
    exposure = float(re.findall(r"Overall exposure level for .*: ([0-9.]+)", verdict.stdout)[0])
    assert exposure <= MOST_EXPOSURE[name]


@pytest.mark.parametrize("name", UNITS)
def test_units_never_give_up_and_own_one_folder(name: str) -> None:
    """Hospitals wait for nobody to start a service anew; a service writes into its own folder and nowhere else."""
    found = read_unit(FILES / "systemd" / f"{name}.service")
    own = f"/var/lib/medsegfed/{name.removeprefix('medsegfed-')}"
    assert found["Restart"] == ["always"]
    assert found["StartLimitIntervalSec"] == ["0"]
    assert found["User"] == [name]
    assert found["WorkingDirectory"] == found["ReadWritePaths"] == [own]
    assert found["ProtectSystem"] == ["strict"]
    assert found["UMask"] == ["0077"]
    assert found["CapabilityBoundingSet"] == [""]
    assert found["LimitCORE"] == ["0"]


def test_users_and_folders_are_made_by_systemd_for_nobody_else(tmp_path: Path) -> None:
    """Two users without a shell; their folders 0700."""
    need("systemd-sysusers", "systemd-tmpfiles")
    if os.geteuid() != 0:
        pytest.skip("needs root to make users, in a folder of the test")
    (tmp_path / "etc").mkdir()
    for command in (
        ("systemd-sysusers", f"--root={tmp_path}", FILES / "systemd" / "medsegfed.sysusers"),
        ("systemd-tmpfiles", f"--root={tmp_path}", "--create", FILES / "systemd" / "medsegfed.tmpfiles"),
    ):
        verdict = told(*command)
        assert verdict.returncode == 0, verdict.stderr
    users = dict(re.findall(r"^(medsegfed-\w+):.*:(.*)$", (tmp_path / "etc" / "passwd").read_text(), re.MULTILINE))
    assert set(users) == set(UNITS)
    assert all(shell.endswith("nologin") for shell in users.values())
    for end in ("server", "site"):
        assert (tmp_path / "var/lib/medsegfed" / end).stat().st_mode & 0o777 == 0o700


def allowed_calls(name: str) -> set[str]:
    """The system calls that a unit's SystemCallFilter lets through, expanded by systemd itself."""

    def expand(group: str) -> set[str]:
        listing = told("systemd-analyze", "syscall-filter", "--no-pager", group).stdout
        calls: set[str] = set()
        for line in listing.splitlines()[1:]:
            call = line.strip()
            if call and not call.startswith("#"):
                calls |= expand(call) if call.startswith("@") else {call}
        return calls

    calls: set[str] = set()
    for value in read_unit(FILES / "systemd" / f"{name}.service")["SystemCallFilter"]:
        for group in value.removeprefix("~").split():
            calls = calls - expand(group) if value.startswith("~") else calls | expand(group)
    return calls


def forbid_other_calls(calls: set[str]) -> Callable[[], None]:
    """For preexec_fn: this process and its children get EPERM for any call but these, as systemd would have it."""
    try:
        seccomp = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("libseccomp is not installed")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    allow, refuse = 0x7FFF0000, 0x00050000 | 1  # SCMP_ACT_ALLOW, SCMP_ACT_ERRNO(EPERM)
    context = ctypes.c_void_p(seccomp.seccomp_init(ctypes.c_uint32(refuse)))
    for call in calls:
        number = seccomp.seccomp_syscall_resolve_name(call.encode())
        if number >= 0:  # negative: another architecture's
            seccomp.seccomp_rule_add(context, ctypes.c_uint32(allow), number, 0)

    def load() -> None:
        if seccomp.seccomp_load(context) != 0:
            os._exit(99)

    return load


TRAINS = """
import ssl, socket, subprocess, sqlite3, tempfile, threading, torch
network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.SiLU())
for dtype in (torch.float32, torch.bfloat16):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        network(torch.randn(4, 1, 32, 32)).float().square().mean().backward()
torch.optim.AdamW(network.parameters()).step()
torch.fft.rfft2(torch.randn(8, 32, 32))
with tempfile.TemporaryDirectory() as folder:
    sqlite3.connect(f"{folder}/x").execute("create table t (a)")
socket.create_server(("127.0.0.1", 0)).close()
subprocess.run(["true"], check=True, start_new_session=True)
threading.Thread(target=print).start()
try:
    import ctypes
    assert ctypes.CDLL(None, use_errno=True).swapoff(b"/none") == -1 and ctypes.get_errno() == 1
finally:
    print("done")
"""


@pytest.mark.slow
def test_the_site_can_train_with_the_system_calls_it_is_left() -> None:
    """torch, TLS, SQLite, threads and children under the very filter; a forbidden call is answered with EPERM."""
    need("systemd-analyze")
    done = told(sys.executable, "-c", TRAINS, preexec_fn=forbid_other_calls(allowed_calls("medsegfed-site")))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("done")


@pytest.mark.slow
def test_nginx_runs_with_the_system_calls_that_the_server_is_left(tmp_path: Path) -> None:
    """Master and workers answer a request; started as an ordinary user where this test may become one."""
    need("systemd-analyze", "nginx")
    port = free_port()
    tmp_path.chmod(0o777)
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; worker_processes 2; error_log stderr;\n"
        "events {}\n"
        f"http {{ access_log off; {' '.join(f'{kind}_temp_path {tmp_path}/{kind};' for kind in TEMPORARY)}\n"
        f"  server {{ listen 127.0.0.1:{port}; return 200 well; }} }}\n"
    )
    as_nobody: dict[str, Any] = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
    for folder in (tmp_path, *tmp_path.parents[:3]):
        with contextlib.suppress(OSError):
            folder.chmod(folder.stat().st_mode | 0o055)
    process = subprocess.Popen(
        ["nginx", "-e", "stderr", "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path)],
        preexec_fn=forbid_other_calls(allowed_calls("medsegfed-server")),  # noqa: PLW1509  # no thread is running
        stderr=subprocess.PIPE, text=True, **as_nobody,
    )  # fmt: skip
    try:
        answer = ask(port, b"GET / HTTP/1.0\r\n\r\n")
    finally:
        process.terminate()
        trouble = process.communicate(timeout=10)[1]
    assert answer.endswith(b"well"), trouble


TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


# Containers


def test_hadolint_finds_nothing_in_the_containerfile() -> None:
    """Not even a remark; what is deliberately otherwise says so beside the line."""
    beside = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if beside is None:
        pytest.skip("hadolint is not installed")
    verdict = told(beside, "--no-color", "--failure-threshold", "style", FILES / "Containerfile")
    assert (verdict.returncode, verdict.stdout + verdict.stderr) == (0, "")


def stages() -> dict[str, list[tuple[str, str]]]:
    """Stage -> its instructions, those of the stage it builds on first."""
    text = re.sub(r"^\s*#.*\n", "", (FILES / "Containerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if not line.strip():
            continue
        word, _, rest = line.partition(" ")
        if word == "FROM":
            origin, _, name = rest.partition(" AS ")
            current = found[name] = list(found.get(origin, []))
        current.append((word, rest))
    return found


def test_both_images_run_as_nobody_in_particular_and_install_only_what_is_vouched_for() -> None:
    """A fixed number that is not root; wheels from the folder alone, each by its hash; no shell at the start."""
    found = stages()
    installs = [rest for word, rest in found["build"] if word == "RUN" and " install " in rest]
    assert installs
    assert all("--no-index" in rest and "--require-hashes" in rest for rest in installs)
    for target, command in (("site", ["site", "start"]), ("server", ["server", "start"])):
        last = dict(found[target])  # the last of each kind is what holds
        assert last["USER"] == "10001:10001"
        assert json.loads(last["ENTRYPOINT"]) == ["medsegfed"]
        assert json.loads(last["CMD"]) == command
        assert "deploy.alive" in last["HEALTHCHECK"]
        assert "ADD" not in last
    assert "nginx" not in json.dumps(found["site"])
    assert "EXPOSE" not in dict(found["site"])
    assert dict(found["server"])["EXPOSE"] == "8443"
    # the two base images are the same, and not whatever is newest
    bases = {
        rest.split(" ")[0] for word, rest in [pair for stage in found.values() for pair in stage] if word == "FROM"
    }
    assert "docker.io/library/python:${PYTHON_TAG}${PYTHON_DIGEST}" in bases
    assert "ARG PYTHON_TAG=3.11-slim" in (FILES / "Containerfile").read_text()


def test_the_context_lets_through_wheels_and_their_hashes_alone() -> None:
    """Everything first, then two exceptions."""
    rules = [line for line in (FILES / "containerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules == ["*", "!*.whl", "!requirements.lock"]


@pytest.fixture(scope="module", params=["server", "site"])
def composed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Which end, and its service as docker-compose understands it; docker-compose itself needs no engine for that."""
    need("docker-compose")
    end = request.param
    path = shutil.copy(FILES / f"compose.{end}.yaml", tmp_path_factory.mktemp("compose"))
    settings = {"PATH": os.environ["PATH"], "MEDSEGFED_DATA": "/srv/scans", "HTTPS_PROXY": "http://proxy.example:3128"}
    verdict = told("docker-compose", "-f", path, "config", env=settings)
    assert verdict.returncode == 0, verdict.stderr
    return end, yaml.safe_load(verdict.stdout)["services"][end]


def test_compose_gives_away_nothing(composed: tuple[str, dict[str, Any]]) -> None:
    """Read-only root, no capability, no new privilege, bounded memory, processes and logs; always back."""
    end, service = composed
    assert service["user"] == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "always"
    assert service["init"] is True
    assert service["mem_limit"] == service["memswap_limit"]
    assert service["pids_limit"] > 0
    assert service["ulimits"]["core"] == 0
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "5"}
    assert service["healthcheck"]["test"][:4] == ["CMD", "python", "-m", "deploy.alive"]
    assert service["pull_policy"] == "never"
    assert "network_mode" not in service
    own, *others = service["volumes"]
    assert own == f"{'federation' if end == 'server' else 'site'}:/var/lib/medsegfed:rw"
    assert all(volume.endswith(":ro") for volume in others)


def test_the_server_publishes_one_port_and_the_site_none(composed: tuple[str, dict[str, Any]]) -> None:
    """The site calls out, through a proxy where there is one, and reads its data without the right to write."""
    end, service = composed
    if end == "server":
        assert [(port["published"], port["target"]) for port in service["ports"]] == [(8443, 8443)]
        return
    assert not {"ports", "expose", "network_mode"} & service.keys()
    assert "/srv/scans:/data:ro" in service["volumes"]
    assert service["environment"] == {"HTTPS_PROXY": "http://proxy.example:3128", "NO_PROXY": "127.0.0.1,localhost"}


def test_the_site_does_not_start_without_a_data_folder(tmp_path: Path) -> None:
    """A forgotten folder is named; Docker would make an empty one."""
    need("docker-compose")
    path = shutil.copy(FILES / "compose.site.yaml", tmp_path)
    verdict = told("docker-compose", "-f", path, "config", env={"PATH": os.environ["PATH"]})
    assert verdict.returncode != 0
    assert "the folder of the dataset" in verdict.stderr


def test_a_container_is_well_while_its_supervisor_and_children_are(tmp_path: Path) -> None:
    """What the health checks ask: nothing runs, all runs, one child does not get ready, all is over."""
    sleeper = Child(name="sleeper", command=("sleep", "60"), log=tmp_path / "log")
    stuck = Child(name="stuck", command=("sleep", "60"), log=tmp_path / "log", ready=lambda: False)
    assert alive(tmp_path)[0] is False
    for children, well in (([sleeper], True), ([sleeper, stuck], False)):
        supervisor = Supervisor(children, lambda event, facts: None, state=tmp_path)
        supervisor.start()
        try:
            deadline = time.monotonic() + 30
            while alive(tmp_path)[1].count(" since ") < len(children) or "waiting" in alive(tmp_path)[1]:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert alive(tmp_path)[0] is well
        finally:
            supervisor.stop()
    assert alive(tmp_path)[0] is False


# Firewall and proxy


def fill_in(name: str, **values: str) -> str:
    """A firewall file with other addresses than the example's."""
    text = (FILES / "network" / name).read_text()
    for key, value in values.items():
        text, count = re.subn(rf"^define {key} = .*$", f"define {key} = {value}", text, flags=re.MULTILINE)
        assert count == 1
    return text


@pytest.mark.parametrize("name", ["site-firewall.nft", "site-firewall-service.nft"])
def test_nft_accepts_the_firewalls_twice_in_a_row(name: str, tmp_path: Path) -> None:
    """Loading it again replaces it; nothing piles up."""
    need_root_and_namespaces()
    (path := tmp_path / name).write_text(fill_in(name).replace('"medsegfed-site"', '"nobody"'))
    script = f"nft -c -f {path} && nft -f {path} && nft list ruleset > one && nft -f {path} && nft list ruleset > two"
    verdict = told("unshare", "--net", "sh", "-c", script, cwd=tmp_path)
    assert verdict.returncode == 0, verdict.stderr
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text() != ""


@pytest.fixture
def hospital(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Two namespaces with a cable between them: the world (10.77.0.1) and the site (10.77.0.2)."""
    need_root_and_namespaces()
    world, site = (f"msf{os.getpid()}{end}" for end in "ws")
    try:
        for name in (world, site):
            assert told("ip", "netns", "add", name).returncode == 0
        script = f"""
        ip link add {world} type veth peer name {site}
        ip link set {world} netns {world} && ip link set {site} netns {site}
        ip -n {world} addr add 10.77.0.1/24 dev {world} && ip -n {site} addr add 10.77.0.2/24 dev {site}
        for n in {world} {site}; do ip -n $n link set lo up && ip -n $n link set $n up; done
        """
        assert told("sh", "-c", script).returncode == 0
        yield world, site
    finally:
        for name in (world, site):
            told("ip", "netns", "del", name)


LISTEN = """
import socket, sys, time
held = [socket.create_server(("", int(port))) for port in sys.argv[1:]]
print("ready", flush=True)
time.sleep(60)
"""
CALL = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3])).close()
    print("open")
except OSError as error:
    print(type(error).__name__)
"""


@contextlib.contextmanager
def listening(namespace: str, *ports: int) -> Iterator[None]:
    process = subprocess.Popen(
        ["ip", "netns", "exec", namespace, sys.executable, "-c", LISTEN, *map(str, ports)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        process.kill()
        process.communicate()


def call(namespace: str, host: str, port: int, user: str = "root") -> str:
    prefix = ["runuser", "-u", user, "--"] if user != "root" else []
    python = sys.executable if user == "root" else "/usr/bin/python3"
    return told("ip", "netns", "exec", namespace, *prefix, python, "-c", CALL, host, str(port), "0.7").stdout.strip()


@pytest.mark.e2e
def test_behind_the_firewall_a_site_reaches_one_port_and_nobody_reaches_it(
    hospital: tuple[str, str], tmp_path: Path
) -> None:
    """Packets, not rules: the same calls before (all open) and after."""
    world, site = hospital
    (path := tmp_path / "rules.nft").write_text(fill_in("site-firewall.nft", server="10.77.0.1"))
    with listening(world, 8443, 8444), listening(site, 22, 9000):
        for _ in range(2):  # the first packets wait for the cable
            before = [call(site, "10.77.0.1", port) for port in (8443, 8444)] + [call(world, "10.77.0.2", 9000)]
        assert before == ["open"] * 3
        assert told("ip", "netns", "exec", site, "nft", "-f", path).returncode == 0
        assert call(site, "10.77.0.1", 8443) == "open"
        assert call(site, "10.77.0.1", 8444) != "open"
        assert call(world, "10.77.0.2", 9000) == "TimeoutError"  # dropped: as if nobody were there
        assert call(world, "10.77.0.2", 22) == "TimeoutError"
        assert call(site, "127.0.0.1", 9000) == "open"  # its own processes among themselves
        counted = told("ip", "netns", "exec", site, "nft", "list", "chain", "inet", "medsegfed", "incoming").stdout
        assert int(re.findall(r"counter packets (\d+)", counted)[0]) >= 2


@pytest.mark.e2e
def test_the_service_firewall_holds_one_user_and_nobody_else(hospital: tuple[str, str], tmp_path: Path) -> None:
    """The rest of the machine stays as the hospital has it."""
    need("runuser")
    if not Path("/usr/bin/python3").exists():
        pytest.skip("no Python that another user may run")
    world, site = hospital
    rules = fill_in("site-firewall-service.nft", server="10.77.0.1").replace('"medsegfed-site"', '"nobody"')
    (path := tmp_path / "rules.nft").write_text(rules)
    with listening(world, 8443, 8444):
        call(site, "10.77.0.1", 8443)
        assert told("ip", "netns", "exec", site, "nft", "-f", path).returncode == 0
        assert call(site, "10.77.0.1", 8443, "nobody") == "open"
        assert call(site, "10.77.0.1", 8444, "nobody") not in ("open", "TimeoutError")  # told at once, not left waiting
        assert [call(site, "10.77.0.1", port) for port in (8443, 8444)] == ["open", "open"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def ask(port: int, request: bytes) -> bytes:
    """The first bytes of an answer; waits until somebody listens."""
    deadline = time.monotonic() + 10
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(request)
                answer = b""
                while piece := connection.recv(1000):
                    answer += piece
                    if request.startswith(b"CONNECT"):
                        break
                return answer
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.mark.e2e
def test_the_proxy_lets_out_to_one_host_and_port(tmp_path: Path) -> None:
    """A real tinyproxy with the example's rules: another host, another port and plain HTTP are refused."""
    need("tinyproxy")
    port = free_port()
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
        target = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        text = (FILES / "network" / "tinyproxy.conf").read_text()
        for old, new in (
            ("User tinyproxy\nGroup tinyproxy\n", ""),
            ("Port 3128", f"Port {port}"),
            ("Listen 10.0.0.8", "Listen 127.0.0.1"),
            ("Allow 10.0.0.21", "Allow 127.0.0.1"),
            ('LogFile "/var/log/tinyproxy/tinyproxy.log"', f'LogFile "{tmp_path}/log"'),
            ("ConnectPort 8443", f"ConnectPort {target}"),
            ("/etc/tinyproxy/tinyproxy-allowed.txt", f"{tmp_path}/allowed"),
        ):
            assert text.count(old) == 1
            text = text.replace(old, new)
        assert text.count("\nConnectPort") == text.count("\nAllow") == 1
        (tmp_path / "tinyproxy.conf").write_text(text)
        allowed = (FILES / "network" / "tinyproxy-allowed.txt").read_text()
        (tmp_path / "allowed").write_text(allowed.replace(r"fed\.example\.org", "localhost"))
        process = subprocess.Popen(
            ["tinyproxy", "-d", "-c", str(tmp_path / "tinyproxy.conf")], stdout=subprocess.DEVNULL
        )
        try:

            def connect(host: str, port_there: int) -> int:
                request = f"CONNECT {host}:{port_there} HTTP/1.1\r\nHost: {host}:{port_there}\r\n\r\n"
                return int(ask(port, request.encode()).split()[1])

            assert connect("localhost", target) == 200
            assert connect("127.0.0.1", target) == 403  # another name, even of the same machine
            assert connect("localhost.evil.example", target) == 403
            assert connect("localhost", port) == 403
            plain = f"GET http://127.0.0.1:{target}/ HTTP/1.0\r\n\r\n"
            assert ask(port, plain.encode()).split()[1] == b"403"
        finally:
            process.terminate()
            process.wait(10)
            server.shutdown()


def test_squid_accepts_its_example(tmp_path: Path) -> None:
    """Squid's own parser."""
    need("squid")
    verdict = told("squid", "-k", "parse", "-f", FILES / "network" / "squid.conf")
    assert verdict.returncode == 0, verdict.stderr
    assert "WARNING" not in verdict.stderr
