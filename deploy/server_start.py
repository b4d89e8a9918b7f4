"""`medsegfed server start`: the coordinator's long-running end.

    superlink   Flower's SuperLink with the guard, on loopback; state in memory, committed rounds in the run folders
    superexec   starts the ServerApp of the run at hand
    gateway     nginx, the only public port

In this process: the keeper (members, runs), renewals, metrics and the health service, on loopback.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from client.certificates import node_key_header
from deploy import guard
from deploy.child import Child
from deploy.control import Control
from deploy.federation import Federation, open_federation
from deploy.gateway import (
    CUT_SECONDS,
    gateway_child,
    install_config,
    reload,
    render_nginx,
    require_programs,
    worker_user,
)
from deploy.health import HealthServer, probe
from deploy.keeper import RunKeeper
from deploy.metrics import serve_metrics
from deploy.ports import listen_addresses
from deploy.processes import GIVE_BACK, LOOPBACK, Events, answers_https, environment, shared_secret, teller
from deploy.renewal_service import serve_renewals
from deploy.server_certificate import ServerCertificate
from deploy.supervisor import Supervisor, hold
from medsegdiff.errors import UserError

log = logging.getLogger("medsegfed.supervisor")

MEMORY_MIB = 16_384  # of the SuperLink: an authenticated site can fill it in steps of 8 MiB; beyond it is started anew


class Server:
    """All parts of one federation's server."""

    def __init__(self, federation: Federation, events: Events) -> None:
        self.federation = federation
        self.state = federation.state.absolute()
        self.tell = events
        self.nginx = require_programs()
        self.renewal_secret = secrets.token_hex(32)
        self.config = self._configure()
        self.supervisor = Supervisor(self._children(), events, state=self.state)
        self._out_before = self._out()
        self._lock = threading.Lock()  # the keeper and the watch over the certificate may reload at once

    def _children(self) -> list[Child]:
        federation, ports = self.federation, self.federation.ports
        secret = shared_secret(self.state / "superexec.secret").resolve()
        env = environment(self.state / "flower", MEDSEGFED_FEDERATION=str(federation.folder.resolve()), **GIVE_BACK)
        for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            env.pop(name, None)  # the server calls nobody but itself
        link = f"{LOOPBACK}:{ports.superlink}"
        superlink = Child(
            name="superlink",
            command=(
                sys.executable, "-m", "deploy.superlink",
                "--host", LOOPBACK,
                "--port", str(ports.superlink),
                "--ssl-ca-certfile", str(federation.ca_crt.resolve()),
                "--ssl-certfile", str(federation.server_crt.resolve()),
                "--ssl-keyfile", str(federation.server_key.resolve()),
                "--enable-supernode-auth",
                "--isolation", "process",
                "--superexec-auth-secret-file", str(secret),
                "--disable-runtime-dependency-installation",
                "--health-server-address", f"{LOOPBACK}:{ports.superlink_health}",
            ),
            log=self.state / "logs" / "superlink.log",
            env=env,
            ready=lambda: probe(f"{LOOPBACK}:{ports.superlink_health}")
            and answers_https(ports.superlink, federation.ca_crt),
            health=lambda: probe(f"{LOOPBACK}:{ports.superlink_health}"),
            restart_with=("superexec",),
            memory_mib=MEMORY_MIB,
        )  # fmt: skip
        superexec = Child(
            name="superexec",
            command=(
                str(Path(sys.executable).parent / "flower-superexec"),
                "--runtime-api-address", link,
                "--root-certificates", str(federation.ca_crt.resolve()),
                "--superexec-auth-secret-file", str(secret),
                "--health-server-address", f"{LOOPBACK}:{ports.superexec_health}",
            ),
            log=self.state / "logs" / "superexec.log",
            env=env,
            ready=lambda: probe(f"{LOOPBACK}:{ports.superexec_health}"),
            health=lambda: probe(f"{LOOPBACK}:{ports.superexec_health}"),
            after=("superlink",),
        )  # fmt: skip
        gateway = gateway_child(
            self.nginx, self.config, federation.config.port, federation.ca_crt, after=("superlink",)
        )
        return [superlink, superexec, gateway]

    def _configure(self) -> Path:
        """Write the gateway's configuration for the members of this moment; nginx has accepted it then."""
        federation, config = self.federation, self.federation.config
        admitted = {s: m.node_key for s, m in federation.members().items() if m.active}
        text = render_nginx(
            state=self.state,
            federation=federation.name,
            node_keys={site: node_key_header(key) for site, key in admitted.items()},
            port=config.port,
            superlink_port=federation.ports.superlink,
            renewal_port=federation.ports.renewal,
            renewal_secret=self.renewal_secret,
            ca=federation.ca_crt.absolute(),
            crl=federation.ca_crl.absolute(),
            certificate=federation.server_crt.absolute(),
            key=federation.server_key.absolute(),
            addresses=listen_addresses(),
            body_mib=config.limits.body_mib,
            connections_per_site=config.limits.connections_per_site,
            requests_per_second=config.limits.requests_per_second,
            user=worker_user(),
        )
        return install_config(self.state, text)

    def _out(self) -> set[str]:
        """Who, and which certificates, may not come in."""
        members = self.federation.members().values()
        sites = {member.site for member in members if member.status != "admitted"}
        return sites | {serial for member in members for serial in member.revoked}

    def apply(self) -> None:
        """Have the gateway take up members, revocation list and certificate as they are now."""
        with self._lock:
            self._configure()
            out = self._out()
            hurry, self._out_before = bool(out - self._out_before), out
            pid = self.supervisor.status()["gateway"]["pid"]
            if pid is not None:
                reload(self.config, pid, CUT_SECONDS if hurry else None)
        self.tell("gateway_reloaded", {"revoked": sorted(out)} if hurry else {})

    def connect(self) -> Control:
        return Control(f"{LOOPBACK}:{self.federation.ports.superlink}", self.federation.ca_crt)

    def well(self) -> dict[str, bool]:
        """By service: does it run and answer? For the health service."""
        return {name: bool(child["healthy"]) for name, child in self.supervisor.status().items()}

    def serverapp_lives(self) -> bool:
        """Whether superexec has a living ServerApp; nobody waits for one that was killed, so it stays as a zombie."""
        leader = self.supervisor.status()["superexec"]["pid"]
        if leader is None:
            return False
        for process in guard.session_members(leader):
            with contextlib.suppress(OSError):
                if b"flwr-serverapp" in Path(f"/proc/{process.pid}/cmdline").read_bytes():
                    return True
        return False

    @contextlib.contextmanager
    def helpers(self) -> Iterator[None]:
        """What runs beside the children, in threads of this process."""
        ports = self.federation.ports
        keeper = RunKeeper(self.federation, self.connect, self.apply, self.tell, self.serverapp_lives)
        stop = threading.Event()
        with contextlib.ExitStack() as stack:
            try:
                renewals = serve_renewals(self.federation, ports.renewal, self.renewal_secret)
                stack.callback(renewals.shutdown)
                stack.callback(serve_metrics(self.federation.folder, LOOPBACK, ports.metrics))
                health = HealthServer(f"{LOOPBACK}:{ports.health}", self.well)
                stack.callback(health.stop)
            except OSError as error:
                raise UserError(
                    f"a loopback port of {ports.renewal}..{ports.health} is taken ({error.strerror or error}). End the "
                    f"program that holds it, or change internal_port in {self.federation.config_file}."
                ) from error
            keeper.start()
            stack.callback(keeper.stop)
            certificate = ServerCertificate(self.federation, self.apply, self._restart_superlink, self.tell)
            threading.Thread(target=certificate.follow, args=(stop,), name="certificate", daemon=True).start()
            stack.callback(stop.set)
            yield

    def _restart_superlink(self) -> None:
        self.supervisor.restart("superlink", "its certificate was renewed")


def start_server(folder: Path, events: Events) -> None:
    """Run a federation's server until SIGTERM or SIGINT.

    Args:
        events: told what happens, beside the journal in state/supervisor.jsonl.

    Raises:
        UserError: no federation, a missing program, a port that is taken, or another process runs this federation.
    """
    federation = open_federation(folder.resolve())
    federation.state.mkdir(mode=0o700, exist_ok=True)
    with hold(federation.state / "lock"):
        pass  # a second server would write over the configuration of the first before its supervisor finds that out
    server = Server(federation, teller(federation.state / "supervisor.jsonl", events))
    with server.helpers():
        server.supervisor.run()
