"""The renewal route over mutual TLS on loopback, and an HTTP proxy that speaks CONNECT."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from deploy.federation import Federation
from deploy.renewal import ROUTE, answer_renewal
from medsegdiff.errors import UserError

Answer = Callable[[str, bytes], tuple[int, bytes]]  # site of the certificate, body -> status, body


@dataclass
class Served:
    """A running server: where it is, and which sites were heard."""

    port: int
    heard: list[str] = field(default_factory=list)


@contextlib.contextmanager
def renewal_server(federation: Federation, answer: Answer | None = None) -> Iterator[Served]:
    """Answers as the gateway and the renewal service do together."""

    def by_register(site: str, body: bytes) -> tuple[int, bytes]:
        try:
            return 200, answer_renewal(federation, site, body)
        except UserError as error:
            return 403, json.dumps({"reason": str(error)}).encode()

    reply = answer or by_register
    served = Served(0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == ROUTE
            subject = dict(pair[0] for pair in self.connection.getpeercert()["subject"])
            served.heard.append(subject["commonName"])
            status, body = reply(subject["commonName"], self.rfile.read(int(self.headers["content-length"])))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def get_request(self) -> tuple[socket.socket, object]:
            plain, address = super().get_request()
            plain.settimeout(10)
            try:
                return context().wrap_socket(plain, server_side=True), address
            except (ssl.SSLError, OSError):
                plain.close()
                raise

        def handle_error(self, *_: object) -> None:
            pass

    def context() -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        made.load_cert_chain(federation.server_crt, federation.server_key)
        made.load_verify_locations(federation.ca_crt)
        made.load_verify_locations(federation.ca_crl)  # read anew for each connection, as after a reload
        made.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        made.verify_mode = ssl.CERT_REQUIRED
        return made

    server = Server(("127.0.0.1", 0), Handler)
    served.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@contextlib.contextmanager
def connect_proxy() -> Iterator[tuple[str, list[str]]]:
    """Yields the proxy's URL and the list of addresses it was asked to connect to."""
    asked: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def serve(client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(4096)
        address = head.split()[1].decode()
        asked.append(address)
        host, port = address.rsplit(":", 1)
        with client, socket.create_connection((host, int(port)), timeout=10) as target:
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=pump, args=(target, client), daemon=True)
            back.start()
            pump(client, target)
            back.join(10)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
    finally:
        listener.close()
