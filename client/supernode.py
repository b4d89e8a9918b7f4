"""flower-supernode with the site's client certificate: the process that calls out, and the only one.

Flower has no flag for a client certificate. Started through this launcher, its one connection to the federation is
mutual TLS 1.3 pinned to the federation's own CA; HTTPS_PROXY (HTTP CONNECT) works as usual, redirects are not followed.
The certificate is read again when its file changes, so that a renewal costs no round.

A SuperNode that was killed counts as online until its lease ends, and for that minute Flower refuses its successor. The
number of the node is therefore kept on disk, and the successor takes its predecessor's leave first.

Stands on flwr 1.41's `FleetHttpClient.from_server_address`; the version is pinned exactly, and the end-to-end tests
would fail without the certificate.
"""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import httpx
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    DeactivateNodeResponse,
)
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient

from client.abandoned import tidied
from client.certificates import load_pair
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic

log = logging.getLogger("medsegfed.site")

CERTIFICATE = "MEDSEGFED_CERTIFICATE"  # environment: PEM file with the site's TLS key and certificate
LOOK_SECONDS = 2.0  # between looks whether the certificate was renewed


def client_context(ca: str, certificate: Path) -> ssl.SSLContext:
    """TLS 1.3 towards the federation: its CA alone is trusted, host names are checked, the site shows its certificate.

    Args:
        ca: the federation's CA certificate, PEM text.
        certificate: PEM file with key and certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=ca)
    load_pair(context, certificate)
    return context


class CertifiedFleetClient(FleetHttpClient):
    """Flower's fleet client over mutual TLS."""

    @classmethod
    def from_server_address(
        cls, server_address: str, insecure: bool, root_certificates: bytes | str | None, *args: Any, **kwargs: Any
    ) -> Self:
        """As Flower's, with the certificate of MEDSEGFED_CERTIFICATE; a plaintext connection is refused."""
        interceptors = args[0] if args else kwargs.pop("interceptors")
        if insecure or not isinstance(root_certificates, bytes):
            raise SystemExit("the federation is reached over TLS with its own CA (--root-certificates) only")
        path = Path(os.environ[CERTIFICATE])
        context = client_context(root_certificates.decode("ascii"), path)
        client = cls(f"https://{server_address}", interceptors=interceptors, verify=context, **kwargs)
        client._client.follow_redirects = False  # the server that was verified is the one that is spoken to
        threading.Thread(target=_follow, args=(path, context), name="certificate", daemon=True).start()
        return client

    def _unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        """One request. Flower gives up for good where an error's text speaks of TLS: a line that is silent or breaks in
        the middle of a handshake is none of that, and is tried again; a certificate that is turned down is."""
        try:
            return super()._unary_unary(*args, **kwargs)
        except httpx.TransportError as error:
            if "certificate" in str(error).lower():
                raise
            raise httpx.ConnectError(f"the line broke ({type(error).__name__})") from error

    def ActivateNode(self, request: ActivateNodeRequest) -> ActivateNodeResponse:  # noqa: N802 - Flower's name
        """Go online; a predecessor that was killed goes offline first."""
        place = Path(os.environ["FLWR_HOME"]) / "node"
        with contextlib.suppress(OSError, ValueError, httpx.HTTPStatusError):  # none, or the server forgot it
            super().DeactivateNode(DeactivateNodeRequest(node_id=int(place.read_text(encoding="ascii"))))
        response = super().ActivateNode(request)
        try:
            write_atomic(place, str(response.node_id).encode(), 0o600)
        except UserError as error:  # costs a minute after a kill, no more
            log.warning("%s", error)
        return response

    def DeactivateNode(self, request: DeactivateNodeRequest) -> DeactivateNodeResponse:  # noqa: N802
        """Go offline; a successor has nothing to take leave of."""
        response = super().DeactivateNode(request)
        (Path(os.environ["FLWR_HOME"]) / "node").unlink(missing_ok=True)
        return response


def delivered(push: Callable[..., None]) -> Callable[..., None]:
    """Flower's `_push_messages`, which raises where an answer was lost on its way.

    Flower drops such an answer with a line in the log, and the server would miss it for the 180 s of a push session. It
    happens when a connection breaks while a part is sent: repeated, the part belongs to no session any more. Raised,
    the node goes offline and is started anew, the server asks again, and the answer comes from the outbox.
    """

    def push_messages(*, send: Callable[..., Any], push_object: Callable[..., Any], **others: Any) -> None:
        lost: list[Exception] = []

        def noting(ask: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                try:
                    return ask(*arguments)
                except Exception as error:
                    lost.append(error)
                    raise

            return call

        push(send=noting(send), push_object=noting(push_object), **others)
        if lost:
            raise RuntimeError("an answer was lost on its way; the SuperNode is started anew") from lost[0]

    return push_messages


def _follow(path: Path, context: ssl.SSLContext) -> None:
    """Give new connections the renewed certificate; those that stand keep the one they began with."""
    wake, seen = threading.Event(), 0
    with contextlib.suppress(OSError):
        seen = path.stat().st_mtime_ns
    while not wake.wait(LOOK_SECONDS):
        try:
            stamp = path.stat().st_mtime_ns
            if stamp != seen:
                load_pair(context, path)
                seen = stamp
        except (OSError, ssl.SSLError):
            continue  # replaced this very moment, or damaged: the loaded one goes on, doctor names the damage


def main() -> None:
    """Start flower-supernode; its arguments are Flower's."""
    from flwr.supernode.cli.flower_supernode import flower_supernode

    setattr(fleet_http_connection, "FleetHttpClient", CertifiedFleetClient)  # noqa: B010 - a name of Flower's own
    start_client_internal._pull_and_store_message = tidied(start_client_internal._pull_and_store_message)
    start_client_internal._push_messages = delivered(start_client_internal._push_messages)
    flower_supernode()
    # It has given up, and threads of Flower's would keep the process for ever: the supervisor must see its end.
    print("flower-supernode has ended; it is to be started anew", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()
