"""Two ends of a TLS 1.3 connection on loopback, and what each of them makes of the other."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

SECRET = b"the first bytes of an update"


@dataclass
class Talk:
    """What came of a connection."""

    heard: bytes = b""  # by the server
    server_error: str = ""
    client_error: str = ""
    version: str | None = None

    @property
    def refused(self) -> bool:
        """Somebody objected, and not a byte arrived."""
        return bool(self.server_error or self.client_error) and not self.heard


def talk(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> Talk:
    """The client connects, asks for `host` in the certificate, sends `SECRET`; the server answers with the length."""
    found = Talk()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)

        def serve() -> None:
            plain, _ = listener.accept()
            plain.settimeout(10)
            try:
                with server.wrap_socket(plain, server_side=True) as secured:
                    found.heard = secured.recv(1000)
                    secured.sendall(b"%d" % len(found.heard))
            except (ssl.SSLError, OSError) as error:
                found.server_error = getattr(error, "reason", None) or str(error)
            finally:
                plain.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with socket.create_connection(listener.getsockname(), timeout=10) as plain:
            try:
                with client.wrap_socket(plain, server_hostname=host) as secured:
                    found.version = secured.version()
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        secured.sendall(SECRET)
                    if not secured.recv(100):
                        found.client_error = "closed"
            except ssl.SSLCertVerificationError as error:
                found.client_error = error.verify_message
            except (ssl.SSLError, OSError) as error:
                found.client_error = getattr(error, "reason", None) or str(error)
        thread.join(20)
    return found


def server_context(ca: Path, pair: Path, revocations: Path | None = None) -> ssl.SSLContext:
    """As the gateway: TLS 1.3, a client certificate of the federation's authority, none that was revoked.

    Args:
        pair: PEM with key and certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(pair)
    context.load_verify_locations(ca)
    context.verify_mode = ssl.CERT_REQUIRED
    if revocations is not None:
        context.load_verify_locations(revocations)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def client_context(ca: Path, pair: Path | None) -> ssl.SSLContext:
    """As a site: TLS 1.3, the federation's authority alone, host names checked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(ca)
    if pair is not None:
        context.load_cert_chain(pair)
    return context
