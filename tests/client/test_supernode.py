"""The launcher that gives Flower's SuperNode the site's certificate."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    DeactivateNodeResponse,
    PullMessagesRequest,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient

from client import supernode
from client.certificates import certificate_pem, new_tls_key, private_pem
from client.supernode import CERTIFICATE, CertifiedFleetClient, client_context, delivered
from deploy.authority import Authority


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """The CA's certificate as text, and a site's key and certificate in one file."""
    authority, key = Authority.create("net"), new_tls_key()
    path = tmp_path / "tls.pem"
    path.write_bytes(private_pem(key) + certificate_pem(authority.issue_site(key.public_key(), "alder", 1)))
    monkeypatch.setenv(CERTIFICATE, str(path))
    return authority.certificate_pem().decode(), path


def test_only_the_federation_is_trusted_over_tls_1_3_by_name(pair) -> None:
    """No public authority, no older protocol, no unchecked host name."""
    context = client_context(*pair)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert len(context.get_ca_certs()) == 1


def test_flower_s_client_is_made_with_it_and_follows_no_redirect(pair) -> None:
    """As flwr 1.41 calls it: positional address, insecure and certificates, interceptors by name."""
    client = CertifiedFleetClient.from_server_address("fed.example.org:8443", False, pair[0].encode(), interceptors=[])
    assert client._base_url == "https://fed.example.org:8443"
    assert client._client.follow_redirects is False
    client.close()


@pytest.mark.parametrize(("insecure", "ca"), [(True, None), (False, None), (False, "/etc/ssl/certs/ca.pem")])
def test_plaintext_and_public_authorities_are_refused(pair, insecure, ca) -> None:
    """The process ends; no request is made."""
    with pytest.raises(SystemExit, match="over TLS with its own CA"):
        CertifiedFleetClient.from_server_address("x:1", insecure, ca, interceptors=[])


def test_a_renewed_certificate_is_taken_up(pair, monkeypatch) -> None:
    """The file is replaced: the context in use loads it, and a damaged one does not end the watch."""
    monkeypatch.setattr(supernode, "LOOK_SECONDS", 0.02)
    loaded: list[bytes] = []
    monkeypatch.setattr(supernode, "load_pair", lambda _, path: loaded.append(path.read_bytes()))
    client = CertifiedFleetClient.from_server_address("x:1", False, pair[0].encode(), interceptors=[])
    for text in (b"second", b"third"):
        time.sleep(0.02)
        partial = pair[1].with_suffix(".new")
        partial.write_bytes(text)
        partial.replace(pair[1])
        end = time.monotonic() + 5
        while loaded[-1] != text and time.monotonic() < end:
            time.sleep(0.02)
    assert loaded[-2:] == [b"second", b"third"]
    client.close()


def test_flower_still_makes_its_client_by_this_name() -> None:
    """The launcher replaces a name in Flower's module; the connection has to look it up there."""
    connect = fleet_http_connection.http_request_response.__wrapped__
    assert "FleetHttpClient" in connect.__code__.co_names
    assert connect.__globals__ is vars(fleet_http_connection)


class SuperLink:
    """Flower's: refuses a node that counts as online, and knows nodes by number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.node, self.online = 7, False
        monkeypatch.setattr(FleetHttpClient, "ActivateNode", lambda _, request: self.activate())
        monkeypatch.setattr(FleetHttpClient, "DeactivateNode", lambda _, request: self.deactivate(request.node_id))

    def activate(self) -> ActivateNodeResponse:
        if self.online:
            self.refuse()
        self.online = True
        return ActivateNodeResponse(node_id=self.node)

    def deactivate(self, node: int) -> DeactivateNodeResponse:
        if not self.online or node != self.node:
            self.refuse()
        self.online = False
        return DeactivateNodeResponse()

    @staticmethod
    def refuse() -> None:
        request = httpx.Request("POST", "https://x")
        raise httpx.HTTPStatusError("refused", request=request, response=httpx.Response(400, request=request))


def test_the_successor_of_a_killed_supernode_is_let_in_at_once(pair, monkeypatch, tmp_path) -> None:
    """It takes its predecessor's leave; what another SuperLink called the node does no harm; an orderly end is kept."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    link = SuperLink(monkeypatch)

    def start() -> CertifiedFleetClient:
        client = CertifiedFleetClient.from_server_address("x:1", False, pair[0].encode(), interceptors=[])
        assert client.ActivateNode(ActivateNodeRequest()).node_id == link.node
        return client

    start().close()  # killed: nobody said that it goes
    start().close()
    link.node, link.online = 8, False  # the SuperLink was started anew
    client = start()
    client.DeactivateNode(DeactivateNodeRequest(node_id=8))
    client.close()
    link.online = True  # a second machine with this key is online: it is not driven out
    with pytest.raises(httpx.HTTPStatusError):
        start()


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("_ssl.c:989: The handshake operation timed out", False),
        ("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol", False),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate", True),
        ("[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required", True),
    ],
)
def test_a_broken_line_is_tried_again_and_a_refused_certificate_is_not(pair, monkeypatch, text, final) -> None:
    """By Flower's own rule, which reads the error's text."""

    def fail(*_: object, **__: object) -> None:
        raise httpx.ConnectError(text)

    monkeypatch.setattr(FleetHttpClient, "_unary_unary", fail)
    client = CertifiedFleetClient.from_server_address("x:1", False, pair[0].encode(), interceptors=[])
    with pytest.raises(httpx.ConnectError) as caught:
        client.PullMessages(PullMessagesRequest())
    assert make_simple_http_retry_invoker().should_giveup(caught.value) is final
    client.close()


def test_a_supernode_that_gave_up_ends(monkeypatch) -> None:
    """Threads that Flower leaves running do not keep the process, which its supervisor would take for well."""
    ends: list[int] = []
    monkeypatch.setattr(
        importlib.import_module("flwr.supernode.cli.flower_supernode"), "flower_supernode", lambda: None
    )
    monkeypatch.setattr(supernode.os, "_exit", ends.append)
    monkeypatch.setattr(fleet_http_connection, "FleetHttpClient", FleetHttpClient)
    for name in ("_pull_and_store_message", "_push_messages"):
        monkeypatch.setattr(start_client_internal, name, lambda: None)
    supernode.main()
    assert ends == [1]


def test_a_lost_answer_ends_the_connection() -> None:
    """Flower's function swallows the fault; one whose run has ended is no fault, and a good one passes."""

    def push(*, send: Callable[[], None], push_object: Callable[[], None]) -> None:
        with contextlib.suppress(Exception, RunNotRunningException):  # as flwr 1.41 does
            send()
            push_object()

    def raises(error: BaseException) -> Callable[[], None]:
        def call() -> None:
            raise error

        return call

    def fine() -> None: ...

    with pytest.raises(RuntimeError, match="started anew"):
        delivered(push)(send=fine, push_object=raises(ValueError("session")))
    with pytest.raises(RuntimeError, match="started anew"):
        delivered(push)(send=raises(httpx.ReadError("x")), push_object=fine)
    delivered(push)(send=raises(RunNotRunningException()), push_object=fine)
    delivered(push)(send=fine, push_object=fine)
    names = inspect.signature(start_client_internal._push_messages).parameters
    assert {"send", "push_object"} < set(names)
