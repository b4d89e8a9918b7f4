"""nginx as the gateway of a federation: the only port that the outside sees.

Who comes in is decided three times before Flower hears of it: a certificate of the federation's own authority over
TLS 1.3, a request line that is one of eleven, and a node key that is the one enrolled with that certificate's site.
Bodies are bounded before they are read. The reason for each setting stands beside it in templates/nginx.conf.j2.

nginx needs nothing of /etc/nginx or /var: configuration, pid, temporary folders and logs lie in the federation's
state/. It runs in the foreground, as the supervisor's child; started by an ordinary user it is that user (the port must
then be 1024 or above), started by root its workers are www-data or nobody.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from deploy import guard
from deploy.authority import subject_line
from deploy.child import Child
from medsegdiff.errors import UserError
from medsegdiff.files import FOLDER_NAME, write_atomic

FLEET_ROUTES = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
FLEET_HEADERS = (  # what flwr 1.41 reads of a SuperNode's request beside the usual ones
    "flwr-public-key",
    "flwr-signature",
    "flwr-timestamp",
    "flwr-package-name",
    "flwr-package-version",
    "flwr-component-name",
)
RENEWAL_PATH = "/v1/medsegfed/renew"
SITE_HEADER = "MedSegFed-Site"  # to the renewal service: common name of the verified certificate
SECRET_HEADER = "MedSegFed-Gateway"  # to the renewal service: proves that the gateway wrote the other one
SUPERLINK_NAME = "localhost"  # stands in every server certificate

OLDEST = (1, 18, 0)  # Ubuntu 22.04
INSTALL = "sudo apt-get install nginx-light"
HANDSHAKE_SECONDS = 5.0
APPLY_SECONDS = 10.0  # that new workers may take to appear after a reload
CUT_SECONDS = 5.0  # that old ones may still take to finish when somebody was revoked

_PLAIN_PATH = re.compile(r"[^\x00-\x1f\x7f\"'\\$;{}#]+")  # what an nginx string holds without being read otherwise
_SECRET = re.compile(r"[0-9a-f]{32,128}")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{40,2000}={0,2}")
_NEEDED_MODULES = (
    "ssl", "map", "rewrite", "limit_conn", "limit_req", "proxy", "upstream_keepalive", "fastcgi", "uwsgi", "scgi",
)  # fmt: skip


class Nginx(NamedTuple):
    """The program that is installed."""

    path: str
    version: tuple[int, ...]


def require_programs() -> Nginx:
    """The nginx to use.

    Raises:
        UserError: it is not installed, too old, or built without a part that is needed; with the command that helps.
    """
    everywhere = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"))
    path = shutil.which("nginx", path=everywhere)
    if path is None:
        raise UserError(
            "nginx is not installed: the server needs it as its gateway and was not started. On Debian and Ubuntu: "
            f"{INSTALL}"
        )
    try:
        text = subprocess.run([path, "-V"], capture_output=True, text=True, timeout=30, check=True).stderr
        version = tuple(int(part) for part in re.findall(r"nginx/(\d+)\.(\d+)\.(\d+)", text)[0])
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UserError(f"{path}: does not say its version ({error}). Install nginx anew: {INSTALL}") from error
    if version < OLDEST:
        raise UserError(
            f"{path} is version {_dotted(version)}; the gateway needs {_dotted(OLDEST)} or later. Update it: {INSTALL}"
        )
    missing = [name for name in _NEEDED_MODULES if f"--without-http_{name}_module" in text]
    if "--with-http_ssl_module" not in text:
        missing.append("ssl")
    if missing:
        raise UserError(f"{path} is built without {', '.join(missing)}. Install the distribution's: {INSTALL}")
    return Nginx(path, version)


def _dotted(version: Iterable[int]) -> str:
    return ".".join(map(str, version))


def worker_user() -> str | None:
    """Whom nginx's workers are to be, with their group; None where this process is not root and stays who it is."""
    if os.geteuid() != 0:
        return None
    for name in ("www-data", "nginx", "nobody"):
        with contextlib.suppress(KeyError):
            return f"{name} {grp.getgrgid(pwd.getpwnam(name).pw_gid).gr_name}"
    return None


def render_nginx(
    *,
    state: Path,
    federation: str,
    node_keys: Mapping[str, str],
    port: int,
    superlink_port: int,
    renewal_port: int,
    renewal_secret: str,
    ca: Path,
    crl: Path,
    certificate: Path,
    key: Path,
    addresses: Sequence[str] = ("0.0.0.0",),
    superlink_name: str = SUPERLINK_NAME,
    body_mib: int = 8,
    connections_per_site: int = 16,
    requests_per_second: int = 50,
    stall_seconds: int = 30,
    user: str | None = None,
) -> str:
    """The gateway's configuration, from nothing but its arguments.

    Args:
        state: folder of pid, logs and temporary folders; absolute, as all paths.
        federation: name that the authority certifies for.
        node_keys: of the admitted sites and of nobody else: name -> value of Flower's key header
            (`client.keys.node_key_header`).
        renewal_secret: hex digits that the renewal service demands in `SECRET_HEADER`; the configuration is written
            where only its owner can read it.
        superlink_name: DNS name in the SuperLink's certificate (nginx does not look at IP addresses).
        body_mib: largest request body. A site can make the gateway hold this much for each of its connections.
        stall_seconds: that a body may make no progress.
        user: whom the workers are to be, if root starts nginx.

    Raises:
        UserError: a path holds a character that nginx would not take literally.
        ValueError: a name, key or secret is not of its form.
    """
    import jinja2

    for name in (federation, *node_keys):
        if not FOLDER_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a federation or site")
    for site, node_key in node_keys.items():
        if not _BASE64.fullmatch(node_key):
            raise ValueError(f"{site}: its node key is not the value of Flower's header")
    if not _SECRET.fullmatch(renewal_secret):
        raise ValueError("the renewal secret must be 32 to 128 hex digits")
    template = Path(__file__).parent / "templates" / "nginx.conf.j2"
    environment = jinja2.Environment(  # text for nginx: quoted by `quote` and `_file`, not as HTML
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        autoescape=False,
    )  # fmt: skip
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        path=lambda name: _file(state / name),
        file=_file,
        quote=re.escape,
        federation=federation,
        bindings=[(subject_line(site, federation), node_key) for site, node_key in node_keys.items()],
        port=port,
        addresses=addresses,
        superlink_port=superlink_port,
        superlink_name=superlink_name,
        renewal_port=renewal_port,
        renewal_path=RENEWAL_PATH,
        renewal_secret=renewal_secret,
        site_header=SITE_HEADER,
        secret_header=SECRET_HEADER,
        fleet_routes=FLEET_ROUTES,
        fleet_headers=FLEET_HEADERS,
        ca=ca,
        crl=crl,
        certificate=certificate,
        key=key,
        body_mib=body_mib,
        connections_per_site=connections_per_site,
        requests_per_second=requests_per_second,
        stall_seconds=stall_seconds,
        header_seconds=min(10, stall_seconds),
        user=user,
    )


def _file(path: Path) -> str:
    """A path as an nginx string."""
    text = str(path.absolute())
    if not _PLAIN_PATH.fullmatch(text):
        raise UserError(
            f"{text!r}: nginx cannot use a path with quotes, $, backslashes, semicolons, # or braces. Move the "
            "federation's folder to a plainer path."
        )
    return f'"{text}"'


def gateway_command(program: Nginx, config: Path) -> tuple[str, ...]:
    """What starts nginx in the foreground."""
    early_log = ("-e", "stderr") if program.version >= (1, 19, 5) else ()  # before it has read where to log
    return (program.path, *early_log, "-p", str(config.parent), "-c", str(config))


def check_config(path: Path) -> None:
    """Let nginx judge a configuration, certificates included.

    Raises:
        UserError: it would not start with it; in nginx's words.
    """
    command = (*gateway_command(require_programs(), path.absolute()), "-t", "-q")
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{command[0]}: could not be asked about {path} ({error}).") from error
    if done.returncode:
        said = re.findall(r"\[(?:emerg|alert|crit|error)\] (?:\d+#\d+: )?(.*)", done.stderr) or [done.stderr]
        raise UserError(
            f"{path}: nginx refuses this configuration ({said[0].strip()}); nothing was changed. Mend federation.yaml "
            "or the file named there, then repeat the command."
        )


def install_config(state: Path, text: str) -> Path:
    """Put a configuration in place once nginx has accepted it, and make the folders it needs. Returns its path.

    Raises:
        UserError: nginx refuses it, or the disk does; the configuration before stays.
    """
    state = state.absolute()
    try:
        for folder in (state, state / "logs", state / "gateway-temp"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(f"{state}: the gateway's folders could not be made ({error.strerror}).") from error
    candidate, config = state / "nginx.conf.new", state / "nginx.conf"
    write_atomic(candidate, text.encode(), 0o600)
    try:
        check_config(candidate)
    except UserError:
        candidate.unlink(missing_ok=True)
        raise
    candidate.replace(config)
    return config


def reload(config: Path, pid: int, cut_after: float | None = CUT_SECONDS) -> None:
    """Have the running nginx take up its changed configuration, certificates and revocation list.

    Connections that stand were let in by the old ones. Idle ones end at once, since old workers close them. Requests
    under way may finish within `cut_after` seconds; then the old workers are ended, and whoever was revoked is out.

    Args:
        pid: of the master: the supervisor's child.
        cut_after: None where nobody was revoked: old workers are then left to finish, for 200 seconds at most, and this
            returns at once. Cut off, the upload of a site on a slow line would have to begin again.

    Raises:
        UserError: no gateway runs under this number, nginx refuses the configuration, or did not take it up.
    """
    check_config(config)
    master = guard.read_process(pid)
    if master is None or not _runs(pid, config):
        raise UserError(f"{config}: process {pid} is not its gateway; nothing was reloaded. Start the server.")
    old = _workers(pid)
    guard.send(master, signal.SIGHUP)
    deadline = time.monotonic() + APPLY_SECONDS
    while not _workers(pid) - old:
        if time.monotonic() > deadline:
            raise UserError(
                f"{config}: the gateway has not taken up the change in {APPLY_SECONDS:.0f} s and goes on with what it "
                "had. Its log says why: logs/gateway.log."
            )
        time.sleep(0.05)
    if cut_after is None:
        return
    deadline = time.monotonic() + cut_after
    while old & _workers(pid):
        if time.monotonic() > deadline:
            for worker in old & _workers(pid):
                guard.send(worker, signal.SIGKILL if time.monotonic() > deadline + 1 else signal.SIGTERM)
        time.sleep(0.05)


def _runs(pid: int, config: Path) -> bool:
    """Whether the process is an nginx with this configuration."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"nginx" in command and os.fsencode(config.absolute()) in command
    return False


def _workers(master: int) -> set[guard.Process]:
    """Living workers; their fields other than number and start time are set equal, so that sets compare."""
    return {
        process._replace(state="", session=0)
        for process in guard.processes()
        if process.parent == master and process.state != "Z"
    }


def answers(port: int, ca: Path, address: str = "127.0.0.1") -> bool:
    """Whether the gateway completes a TLS 1.3 handshake, as its server; leaves no line in the access log."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # by loopback; its authority is checked
    try:
        context.load_verify_locations(ca)
        with (
            socket.create_connection((address, port), timeout=HANDSHAKE_SECONDS) as plain,
            context.wrap_socket(plain) as connection,
        ):
            return connection.version() == "TLSv1.3"
    except OSError:
        return False


def gateway_child(
    program: Nginx, config: Path, port: int, ca: Path, after: tuple[str, ...] = (), address: str = "127.0.0.1"
) -> Child:
    """nginx as a child of the supervisor: watched by handshakes, its access log bounded.

    SIGTERM reaches the workers, too, and ends them at once: sites find their connection gone and try again.
    """
    return Child(
        name="gateway",
        command=gateway_command(program, config),
        log=config.parent / "logs" / "gateway.log",
        more_logs=(config.parent / "logs" / "access.jsonl",),
        ready=lambda: answers(port, ca, address),
        health=lambda: answers(port, ca, address),
        after=after,
        grace_seconds=5.0,
    )
