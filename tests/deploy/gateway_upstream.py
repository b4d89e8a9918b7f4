"""What stands around the gateway in its tests: an authority, sites, services that record, clients."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from client.certificates import certificate_pem, new_tls_key, node_key_header, openssh_line, private_pem
from deploy import guard
from deploy.authority import Authority
from deploy.gateway import answers, gateway_command, install_config, render_nginx, require_programs, worker_user

SECRET = "5e" * 24
FEDERATION = "Heart-1.x"  # signs that mean something to a regular expression


@dataclass(frozen=True)
class Request:
    """What reached a service behind the gateway."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]


class Service:
    """A service that answers everything with 200 and remembers it; over TLS if it has a certificate."""

    def __init__(self, certificate: Path | None = None, answer: bytes = b"") -> None:
        self.seen: list[Request] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                service.seen.append(Request(self.requestline, list(self.headers.items()), body))
                self.send_response(200)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a handshake that the gateway broke off

        self.server = Server(("127.0.0.1", 0), Handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(
                self.server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@dataclass
class Site:
    """A site: certificate and key in one file, the value of its node key header, the certificate's serial."""

    name: str
    pem: Path
    node_key: str
    serial: int
    node: ec.EllipticCurvePrivateKey


@dataclass
class World:
    """A federation's authority and what it has issued, in a folder."""

    folder: Path
    authority: Authority = field(default_factory=lambda: Authority.create(FEDERATION))
    lists: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "ca.crt").write_bytes(self.authority.certificate_pem())
        self.revoke()
        self.server = self._pair("server", lambda key: self.authority.issue_server(key, ["example.org"], 10))

    def _pair(self, name: str, issue: Callable[[ec.EllipticCurvePublicKey], Any]) -> Path:
        key = new_tls_key()
        path = self.folder / f"{name}.pem"
        self.certificate = issue(key.public_key())
        path.write_bytes(private_pem(key) + certificate_pem(self.certificate))
        path.chmod(0o600)
        return path

    def site(self, name: str, file: str | None = None, now: datetime | None = None) -> Site:
        """A new site; `now`: when it was certified, for 10 days."""
        node = ec.generate_private_key(ec.SECP384R1())
        pem = self._pair(file or name, lambda key: self.authority.issue_site(key, name, 10, now))
        return Site(name, pem, node_key_header(openssh_line(node.public_key())), self.certificate.serial_number, node)

    def expired_site(self, name: str) -> Site:
        return self.site(name, f"{name}-expired", datetime.now(UTC) - timedelta(days=11))

    def revoke(self, *serials: int) -> None:
        self.lists += 1
        (self.folder / "ca.crl").write_bytes(self.authority.revocation_list(serials, self.lists))


class Gateway:
    """A running nginx before a SuperLink."""

    def __init__(self, state: Path, world: World, superlink: int, renewal: int = 9, **changes: Any) -> None:
        self.state, self.world = state, world
        self.port = free_port()
        self.arguments: dict[str, Any] = {
            "state": state, "federation": FEDERATION, "port": self.port, "addresses": ("127.0.0.1",),
            "superlink_port": superlink, "renewal_port": renewal, "renewal_secret": SECRET, "user": worker_user(),
            "ca": world.folder / "ca.crt", "crl": world.folder / "ca.crl", "node_keys": {},
            "certificate": world.server, "key": world.server,
        } | changes  # fmt: skip
        self.config = self.install()
        self.process: subprocess.Popen[bytes]

    def install(self, **changes: Any) -> Path:
        return install_config(self.state, render_nginx(**self.arguments | changes))

    def start(self, **popen: Any) -> None:
        with open(self.state / "logs" / "gateway.log", "ab") as log:
            command = gateway_command(require_programs(), self.config)
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **popen)
        self.await_answer()

    def await_answer(self) -> None:
        deadline = time.monotonic() + 10
        while not answers(self.port, self.world.folder / "ca.crt"):
            log = (self.state / "logs" / "gateway.log").read_text()
            assert self.process.poll() is None, log
            assert time.monotonic() < deadline, log
            time.sleep(0.02)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)

    def workers(self) -> list[guard.Process]:
        return [process for process in guard.processes() if process.parent == self.process.pid]

    def connect(self, site: Site | Path | None, **options: Any) -> Client:
        return Client(self.port, site.pem if isinstance(site, Site) else site, self.world.folder / "ca.crt", **options)

    def ask(self, site: Site, route: str, body: bytes = b"x", key: str | None = None) -> int:
        """Status of a well-formed request on a connection of its own."""
        with self.connect(site) as client:
            return client.post(f"/v1/fleet/{route}", body, **{"flwr-public-key": key or site.node_key})


@contextlib.contextmanager
def running(gateway: Gateway) -> Iterator[Gateway]:
    gateway.start()
    try:
        yield gateway
    finally:
        gateway.stop()


class Client:
    """One TLS connection, to write on as one likes."""

    def __init__(self, port: int, pem: Path | None, ca: Path, **options: Any) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(ca)
        context.maximum_version = options.get("highest", ssl.TLSVersion.MAXIMUM_SUPPORTED)
        if pem:
            context.load_cert_chain(pem)
        if options.get("alpn"):
            context.set_alpn_protocols(options["alpn"])
        self.context = options.get("context", context)
        self.asked, self.body = "", b""
        plain = socket.create_connection(("127.0.0.1", port), timeout=10)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = self.context.wrap_socket(plain, server_hostname="localhost", session=options.get("session"))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def send(self, text: str | bytes) -> None:
        self.socket.sendall(text.encode("latin-1") if isinstance(text, str) else text)

    def head(self, path: str, length: int | None, line: str = "POST {} HTTP/1.1", **headers: str) -> None:
        self.asked = line
        lines = [line.format(path), "Host: example.org"]
        lines += [] if length is None else [f"Content-Length: {length}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.send("\r\n".join(lines) + "\r\n\r\n")

    def post(self, path: str, body: bytes = b"", **headers: str) -> int:
        self.head(path, len(body), **headers)
        self.send(body)
        return self.status()

    def status(self) -> int:
        """Status of the next answer, whose body is read; 0 if the connection ended instead."""
        self.body = b""
        try:
            reader = self.socket.makefile("rb")
            while (line := reader.readline()).split()[1:2] == [b"100"]:  # go on: an answer is still to come
                reader.readline()
            if not line.startswith(b"HTTP/1.1 "):
                return 0
            length = 0
            while (field := reader.readline()) not in (b"\r\n", b""):
                if field.lower().startswith(b"content-length:"):
                    length = int(field.split(b":")[1])
            self.body = b"" if self.asked.startswith("HEAD") else reader.read(length)
            return int(line.split()[1])
        except (ConnectionError, ssl.SSLError):
            return 0

    def ended(self, seconds: float) -> bool:
        """Whether the other side ends the connection within some time."""
        self.socket.settimeout(seconds)
        try:
            return self.socket.recv(1) == b""
        except TimeoutError:
            return False
        except (ConnectionError, ssl.SSLError):
            return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)
    return found
