"""The gateway under attack: a real nginx, real TLS, and a SuperLink that records whatever reaches it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy import gateway as module
from deploy import guard
from deploy.gateway import (
    FLEET_ROUTES,
    answers,
    check_config,
    gateway_child,
    reload,
    render_nginx,
    require_programs,
    worker_user,
)
from deploy.logfiles import BEGINNING, Access, LogPosition, read_access_log, rotate_log
from deploy.ports import listen_addresses, port_holder, require_free_port
from deploy.supervisor import Supervisor
from medsegdiff.errors import UserError
from tests.deploy.gateway_upstream import (
    SECRET,
    Client,
    Gateway,
    Request,
    Service,
    World,
    free_port,
    running,
    until,
)

MIB = 1 << 20


class Scene:
    """One gateway with two sites, for all tests that leave it as it is."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder / "world")
        self.a, self.b = self.world.site("site-a"), self.world.site("Site_B.2")
        self.stranger = World(folder / "strangers").site("site-a")
        self.superlink = Service(self.world.server, answer=b"\x0a\x00")
        self.renewal = Service(answer=b"new certificate")
        keys = {site.name: site.node_key for site in (self.a, self.b)}
        self.gateway = Gateway(folder / "state", self.world, self.superlink.port, self.renewal.port, node_keys=keys)

    @property
    def seen(self) -> list[Request]:
        return self.superlink.seen + self.renewal.seen

    def log(self, position: LogPosition = BEGINNING) -> list[Access]:
        return read_access_log(self.gateway.state / "logs" / "access.jsonl", position)[0]

    def position(self) -> LogPosition:
        """Where the access log ends, once the requests before have been logged: that is after their answers."""
        time.sleep(0.02)
        return read_access_log(self.gateway.state / "logs" / "access.jsonl")[1]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    scene = Scene(tmp_path_factory.mktemp("gateway"))
    with running(scene.gateway):
        yield scene
    scene.superlink.close()
    scene.renewal.close()


@pytest.fixture
def scene(shared: Scene) -> Scene:
    shared.superlink.seen.clear()
    shared.renewal.seen.clear()
    return shared


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Scene]:
    """A scene of one's own, to be started and changed."""
    scene = Scene(tmp_path)
    yield scene
    scene.superlink.close()
    scene.renewal.close()


def plain_arguments(**changes: Any) -> dict[str, Any]:
    paths = {name: Path(f"/f/{name}") for name in ("state", "ca", "crl", "certificate", "key")}
    return {
        "federation": "f", "node_keys": {"a": "QUJD" * 20}, "port": 8443, "superlink_port": 18100,
        "renewal_port": 18103, "renewal_secret": SECRET,
    } | paths | changes  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [
        {"federation": 'f"; }'}, {"federation": ""}, {"node_keys": {"a b": "QUJD" * 20}}, {"node_keys": {"a": 'x" 1;'}},
        {"node_keys": {"a": ""}}, {"renewal_secret": "short"}, {"renewal_secret": "x;" * 20},
    ],
)  # fmt: skip
def test_what_could_change_the_configuration_is_refused(bad: dict[str, Any]) -> None:
    """Names, keys and secrets go into nginx's language: nothing but their own form is let through."""
    with pytest.raises(ValueError, match=r"name|key|secret"):
        render_nginx(**plain_arguments(**bad))


@pytest.mark.parametrize("sign", ['"', "'", "$", "\\", ";", "{", "}", "#", "\n"])
def test_paths_that_nginx_would_misread_are_refused(sign: str) -> None:
    """Blanks and letters of any language are fine; what nginx interprets is not."""
    assert '"/f/Größe 1/ca"' in render_nginx(**plain_arguments(ca=Path("/f/Größe 1/ca")))
    with pytest.raises(UserError, match="nginx cannot use a path"):
        render_nginx(**plain_arguments(ca=Path(f"/f/{sign}/ca")))


def test_equal_arguments_give_equal_text() -> None:
    """So that a reload is due only when something changed; and no private thing but the secret is in it."""
    assert render_nginx(**plain_arguments()) == render_nginx(**plain_arguments())
    assert "user " not in render_nginx(**plain_arguments()).replace("this user", "")
    assert "user nobody nogroup;" in render_nginx(**plain_arguments(user="nobody nogroup"))


def test_a_missing_or_old_nginx_is_answered_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package to install is named; so is a version that is too old, or a build that lacks a part."""
    monkeypatch.setattr(module.shutil, "which", lambda *names, **options: None)
    with pytest.raises(UserError, match="apt-get install nginx-light"):
        require_programs()
    fake = tmp_path / "nginx"
    monkeypatch.setattr(module.shutil, "which", lambda *names, **options: str(fake))
    for text, complaint in (
        ("nginx version: nginx/1.14.2\nconfigure arguments: --with-http_ssl_module", "version 1.14.2"),
        ("nginx version: nginx/1.24.0 (Ubuntu)\n--with-http_ssl_module --without-http_limit_req_module", "limit_req"),
        ("nginx version: nginx/1.24.0", "ssl"),
        ("who knows", "does not say its version"),
    ):
        fake.write_text(f"#!/bin/sh\necho '{text}' >&2\n")
        fake.chmod(0o755)
        with pytest.raises(UserError, match=complaint):
            require_programs()
    fake.write_text("#!/bin/sh\necho 'nginx version: nginx/1.18.0 (Ubuntu) --with-http_ssl_module' >&2\n")
    assert require_programs() == (str(fake), (1, 18, 0))


def test_a_port_that_is_taken_names_its_holder() -> None:
    """Who has the port is said where it can be seen."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} at 127.0.0.1: .*held by process {os.getpid()} \("):
            require_free_port(port, ("127.0.0.1",))
        assert str(os.getpid()) in port_holder(port)
    require_free_port(port, listen_addresses())
    with pytest.raises(UserError, match="assign"):
        require_free_port(port, ("192.0.2.1",))
    assert "cannot see" in port_holder(port)


@pytest.mark.e2e
@pytest.mark.parametrize("route", FLEET_ROUTES)
def test_fleet_routes_pass(scene: Scene, route: str) -> None:
    """What a SuperNode needs reaches the SuperLink, whole, and nothing is left on the gateway's disk."""
    body = os.urandom(5 * MIB) if route == "push-object" else b"x" * 100
    assert scene.gateway.ask(scene.a, route, body) == 200
    (request,) = scene.seen
    assert request.line == f"POST /v1/fleet/{route} HTTP/1.1"
    assert hashlib.sha256(request.body).digest() == hashlib.sha256(body).digest()
    assert request.header("flwr-public-key") == [scene.a.node_key]
    assert not [path for path in (scene.gateway.state / "gateway-temp").rglob("*") if path.is_file()]


@pytest.mark.e2e
@pytest.mark.parametrize("route", [*FLEET_ROUTES, "../medsegfed/renew"])
def test_without_a_certificate_nothing_passes(scene: Scene, route: str) -> None:
    """No certificate, one of a stranger's authority under a member's name, an expired one, the server's own."""
    expired, position = scene.world.expired_site("site-a"), scene.position()
    for pem in (None, scene.stranger.pem, expired.pem, scene.world.server):
        with scene.gateway.connect(pem) as client:
            path = "/v1/medsegfed/renew" if "renew" in route else f"/v1/fleet/{route}"
            assert client.post(path, b"x", **{"flwr-public-key": scene.a.node_key}) == 400
    assert scene.seen == []
    entries = until(lambda: len(found := scene.log(position)) == 4 and found)
    assert {(entry.site, entry.status) for entry in entries} == {(None, 400)}, "an unverified name is no site's"


@pytest.mark.e2e
@pytest.mark.parametrize("route", FLEET_ROUTES)
def test_a_certificate_is_bound_to_its_node_key(scene: Scene, route: str) -> None:
    """Another site's key, none, one that differs in the case of a letter, two at a time, one in disguise: 403."""
    a, b = scene.a, scene.b
    letter = next(i for i, sign in enumerate(a.node_key) if sign.isalpha() and i > 100)
    swapped = a.node_key[:letter] + a.node_key[letter].swapcase() + a.node_key[letter + 1 :]
    for headers in (
        {"flwr-public-key": b.node_key}, {}, {"flwr-public-key": swapped}, {"flwr-public-key": a.node_key + "="},
        {"flwr_public_key": a.node_key}, {"flwr-public-key": b.node_key, "Flwr-Public-Key": a.node_key},
        {"flwr-public-key": f"{a.node_key}, {b.node_key}"}, {"flwr-public-key": f"{a.node_key}\x00"},
    ):  # fmt: skip
        with scene.gateway.connect(a) as client:
            assert client.post(f"/v1/fleet/{route}", b"x", **headers) in (400, 403), headers
    assert scene.seen == []
    with scene.gateway.connect(a) as client:  # the first of two counts (nginx < 1.23), and it alone goes on
        status = client.post(
            f"/v1/fleet/{route}", b"x", **{"flwr-public-key": a.node_key, "FLWR-public-key": b.node_key}
        )
    assert [request.header("flwr-public-key") for request in scene.seen] == ([[a.node_key]] if status == 200 else [])


@pytest.mark.e2e
def test_a_member_that_is_not_admitted_is_refused(scene: Scene) -> None:
    """A valid certificate of the authority does not suffice: suspended sites keep theirs."""
    assert scene.gateway.ask(scene.world.site("suspended"), "pull-messages") == 403
    assert scene.seen == []
    assert until(lambda: [entry for entry in scene.log() if entry.site == "suspended"])


TRICKS = [
    "/", "/docs", "/openapi.json", "/health", "/metrics", "/v1/fleet/", "/v1/fleet", "/v1/fleet/register-node",
    "/v1/fleet/unregister-node", "/v1/control/list-nodes", "/v1/control/register-node", "/v1/control/start-run",
    "/v1/runtime/acquire-task", "/v1/runtime/push-object", "/v1/fleet/get-run/", "/v1/fleet/get-run?x=1",
    "/v1/fleet/get-run?", "/v1/fleet/get-run#x", "//v1/fleet/get-run", "/v1//fleet/get-run", "/v1/fleet//get-run",
    "/v1/fleet/get-run/../get-fab", "/v1/fleet/./get-run", "/v1/fleet/../control/start-run",
    "/v1/fleet/get-run/../../control/start-run", "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol%2flist-runs", "/v1/fleet%2fget-run", "/v1/fleet/get%2drun", "/%76%31/fleet/get-run",
    "/v1/fleet/get-run%00", "/v1/fleet/get-run%0a", "/v1/fleet/get-run;x", "/v1/fleet/get-run%20",
    "/V1/FLEET/GET-RUN", "/v1/fleet/Get-Run", "/v1/fleet/get-runs", "/x/v1/fleet/get-run", "/v1/fleet/get-run\\..\\x",
    "\\v1\\fleet\\get-run", "v1/fleet/get-run", "*", "example.org:443", "https://example.org/v1/fleet/get-run",
    "http://127.0.0.1/v1/control/start-run", "https://user@example.org/v1/fleet/get-run", "/v1/medsegfed/renew/",
    "/v1/medsegfed/renew?site=b", "/v1/medsegfed//renew", "/v1/medsegfed/./renew", "/v1/medsegfed/%72enew",
    "/v1/medsegfed/Renew", "/v1/medsegfed", "/v1/fleet/../medsegfed/renew",
]  # fmt: skip


@pytest.mark.e2e
@pytest.mark.parametrize("path", TRICKS)
def test_other_routes_and_path_tricks_stay_outside(scene: Scene, path: str) -> None:
    """With a valid certificate and its key, too: whatever is not letter by letter a route is refused here."""
    position = scene.position()
    with scene.gateway.connect(scene.a) as client:
        status = client.post(path, b"x", **{"flwr-public-key": scene.a.node_key})
        assert status in (400, 403, 404, 405)
    assert scene.seen == []
    (entry,) = until(lambda: scene.log(position))
    assert (entry.site, entry.route, entry.status) == ("site-a", None, status)


LINES = [
    *(f"{method} {{}} HTTP/1.1" for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT")),
    "post {} HTTP/1.1", "POSTS {} HTTP/1.1", "PRI {} HTTP/1.1",
    "POST {} HTTP/1.0", "POST {}", "POST {} HTTP/2.0", "POST {} HTTP/1.2", "POST  {} HTTP/1.1", "POST {}  HTTP/1.1",
    "POST {} HTTP/1.1 ", "POST\t{}\tHTTP/1.1", "POST {} http/1.1", "POST {} HTTP/01.1", " POST {} HTTP/1.1",
]  # fmt: skip


@pytest.mark.e2e
@pytest.mark.parametrize("line", LINES)
def test_other_methods_and_versions_stay_outside(scene: Scene, line: str) -> None:
    """POST and HTTP/1.1 and nothing else, for Flower's routes and for ours."""
    for path in ("/v1/fleet/get-run", "/v1/medsegfed/renew"):
        with scene.gateway.connect(scene.a) as client:
            client.head(path, 1, line, **{"flwr-public-key": scene.a.node_key})
            client.send("x")
            assert client.status() in (0, 400, 403, 405, 505)
    assert scene.seen == []


@pytest.mark.e2e
def test_other_protocols_stay_outside(scene: Scene) -> None:
    """TLS 1.2, HTTP/2, HTTP without TLS, something else altogether."""
    with pytest.raises(ssl.SSLError):
        scene.gateway.connect(scene.a, highest=ssl.TLSVersion.TLSv1_2)
    with pytest.raises(ssl.SSLError):
        scene.gateway.connect(scene.a, alpn=["h2"])
    with scene.gateway.connect(scene.a, alpn=["h2", "http/1.1"]) as client:
        assert client.socket.selected_alpn_protocol() == "http/1.1"
        client.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert client.status() in (0, 400, 405, 505)
    for text in (b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", b"\x00\xff" * 500):
        with socket.create_connection(("127.0.0.1", scene.gateway.port), timeout=5) as plain:
            plain.sendall(text)
            assert plain.recv(4096).split(b" ")[1:2] in ([b"400"], [])
    assert scene.seen == []


def memory(gateway: Gateway) -> int:
    return guard.memory_of(gateway.workers())


def pour(client: Client, blocks: int, seconds: float) -> int:
    """Send blocks of a MiB until the other side has had enough; returns how many went out."""
    deadline = time.monotonic() + seconds
    client.socket.settimeout(2)
    for sent in range(blocks):
        try:
            client.send(b"x" * MIB)
        except OSError:
            return sent
        if time.monotonic() > deadline:
            return sent
    return blocks


@pytest.mark.e2e
def test_large_bodies_are_refused_before_they_are_read(scene: Scene) -> None:
    """9 MB and 1 GB: 413 on the header alone; sent all the same, or without a length, it moves no memory."""
    gateway, headers = scene.gateway, {"flwr-public-key": scene.a.node_key}
    assert gateway.ask(scene.a, "push-object", b"x" * (8 * MIB)) == 200  # the largest that passes
    scene.superlink.seen.clear()
    before = memory(gateway)
    for size in (8 * MIB + 1, 9_000_000, 1 << 30, 1 << 62):
        with gateway.connect(scene.a) as client:
            client.head("/v1/fleet/push-object", size, **headers)
            assert client.status() == 413
    with gateway.connect(scene.a) as client:
        client.head("/v1/fleet/push-object", 1 << 30, **headers)
        pour(client, 1024, 1.5)
        assert memory(gateway) - before < 2 * MIB
    with gateway.connect(scene.a) as client:
        client.head("/v1/fleet/push-object", None, **headers, **{"Transfer-Encoding": "chunked"})
        client.send(f"{1 << 30:x}\r\n")
        assert client.status() == 411
        pour(client, 1024, 1.5)
        assert memory(gateway) - before < 2 * MIB
    for odd in ({"Transfer-Encoding": "chunked", "Content-Length": "5"}, {"Transfer-Encoding": "identity"},
                {"Content-Length": "-1"}, {"Content-Length": "1e9"}, {"Content-Length": "5, 6"}):  # fmt: skip
        with gateway.connect(scene.a) as client:
            client.head("/v1/fleet/push-object", None, **headers, **odd)
            assert client.status() in (400, 411, 501), odd
    assert scene.seen == []


@pytest.mark.e2e
def test_long_headers_are_refused(scene: Scene) -> None:
    """A header without end is no way into the gateway's memory, either."""
    for headers in ({"x": "y" * 20_000}, {f"x{n}": "y" * 1000 for n in range(100)}):
        with scene.gateway.connect(scene.a) as client:
            assert client.post("/v1/fleet/get-run", b"x", **{"flwr-public-key": scene.a.node_key}, **headers) in (
                0,
                400,
            )
    with scene.gateway.connect(scene.a) as client:
        assert client.post("/v1/fleet/" + "a" * 20_000) == 414
    assert scene.seen == []


@pytest.mark.e2e
def test_only_flowers_headers_go_on(scene: Scene) -> None:
    """Nobody outside speaks to the SuperLink as an executor, through a proxy, or about another host."""
    forged = {
        "X-Forwarded-For": "127.0.0.1", "X-Real-IP": "127.0.0.1", "Forwarded": "for=127.0.0.1", "Cookie": "a=b",
        "flwr-task-token": "t", "flwr-superexec-signature": "s", "Authorization": "Bearer x", "Upgrade": "websocket",
        "Connection": "Upgrade, flwr-public-key", "MedSegFed-Site": "Site_B.2", "Expect": "100-continue",
    }  # fmt: skip
    kept = {"flwr-public-key": scene.a.node_key, "flwr-timestamp": "now", "Accept": "application/x-protobuf"}
    with scene.gateway.connect(scene.a) as client:
        client.post("/v1/fleet/get-run", b"x", **kept, **forged)
    (request,) = scene.seen
    assert {name.lower(): value for name, value in request.headers} == {
        "host": "localhost", "content-length": "1", "accept": "application/x-protobuf", "flwr-timestamp": "now",
        "flwr-public-key": scene.a.node_key,
    }  # fmt: skip


@pytest.mark.e2e
def test_renewal_takes_the_certificate_alone_and_names_its_site(scene: Scene) -> None:
    """The service is told who came by a header that the client cannot write, and who tells it by a secret."""
    with scene.gateway.connect(scene.b) as client:
        forged = {"MedSegFed-Site": "site-a", "medsegfed-site": "site-a", "medsegfed_site": "site-a",
                  "MedSegFed-Gateway": "x"}  # fmt: skip
        assert client.post("/v1/medsegfed/renew", b"please", **forged, **{"Content-Type": "application/json"}) == 200
        assert client.body == b"new certificate"
    assert scene.superlink.seen == []
    (request,) = scene.renewal.seen
    assert request.line == "POST /v1/medsegfed/renew HTTP/1.1"
    assert {name.lower(): value for name, value in request.headers} == {
        "host": "127.0.0.1", "connection": "close", "content-length": "6", "content-type": "application/json",
        "medsegfed-site": "Site_B.2", "medsegfed-gateway": SECRET,
    }  # fmt: skip
    assert request.body == b"please"
    with scene.gateway.connect(scene.b) as client:
        assert client.post("/v1/medsegfed/renew", b"x" * 70_000) == 413
    assert scene.gateway.config.stat().st_mode & 0o777 == 0o600, "the secret is the owner's"


@pytest.mark.e2e
def test_the_access_log_tells_who_did_what(scene: Scene) -> None:
    """One JSON line a request, no bodies; it goes on after a rotation, though no worker may enter its folder."""
    log = scene.gateway.state / "logs" / "access.jsonl"
    position = scene.position()
    scene.gateway.ask(scene.b, "push-object", b"y" * 10_000)
    (entry,) = until(lambda: scene.log(position))
    assert (entry.site, entry.route, entry.status, entry.remote) == ("Site_B.2", "push-object", 200, "127.0.0.1")
    assert 10_000 < entry.received < 11_000
    assert 0 < entry.sent < 500
    assert 0 <= entry.seconds < 5
    assert abs(entry.time - time.time()) < 60
    assert log.parent.stat().st_mode & 0o777 == 0o700
    assert rotate_log(log, max_bytes=0)
    scene.gateway.ask(scene.a, "get-fab")
    assert [entry.route for entry in until(scene.log)] == ["get-fab"]


@pytest.mark.e2e
def test_flowers_own_client_passes(scene: Scene) -> None:
    """All calls of a real SuperNode's client, with its own signatures, over one connection."""
    import httpx
    from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    context = ssl.create_default_context(cafile=str(scene.world.folder / "ca.crt"))
    context.load_cert_chain(scene.a.pem)
    interceptors = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(scene.a.node, scene.a.node.public_key()),
    ]
    with FleetHttpClient(
        f"https://localhost:{scene.gateway.port}", interceptors=interceptors, verify=context
    ) as client:
        client.ActivateNode(fleet_pb2.ActivateNodeRequest())
        client.DeactivateNode(fleet_pb2.DeactivateNodeRequest())
        client.SendNodeHeartbeat(heartbeat_pb2.SendNodeHeartbeatRequest())
        client.PullMessages(fleet_pb2.PullMessagesRequest())
        client.PushMessages(fleet_pb2.PushMessagesRequest())
        client.GetRun(run_pb2.GetRunRequest())
        client.GetFab(fab_pb2.GetFabRequest())
        client.PushObject(message_pb2.PushObjectRequest(object_content=b"x" * 5 * MIB))
        client.PullObject(message_pb2.PullObjectRequest())
        client.ConfirmMessageReceived(message_pb2.ConfirmMessageReceivedRequest())
        with pytest.raises(httpx.HTTPStatusError, match="403"):
            client.RegisterNode(fleet_pb2.RegisterNodeFleetRequest())
    assert [request.line.split("/")[3].split()[0] for request in scene.seen] == list(FLEET_ROUTES)
    names = {name.lower() for request in scene.seen for name, _ in request.headers}
    assert names == {"host", "content-length", "content-type", "accept", *module.FLEET_HEADERS}


@pytest.mark.e2e
def test_slow_senders_are_cut_off(own: Scene) -> None:
    """A handshake, a header or a body that does not come is not waited for, and the SuperLink never hears of it."""
    own.gateway.install(stall_seconds=1)
    with running(own.gateway) as gateway:
        idle = socket.create_connection(("127.0.0.1", gateway.port), timeout=5)
        body, header, partial = (gateway.connect(own.a) for _ in range(3))
        body.head("/v1/fleet/push-object", 1000, **{"flwr-public-key": own.a.node_key})
        body.send("x")
        partial.send("POST /v1/fleet/get-run HTTP/1.1\r\nHos")
        begun = time.monotonic()
        header.send("POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nX: ")
        while not header.ended(0.1):  # one letter at a time: the header as a whole has a time limit
            assert time.monotonic() - begun < 4
            with contextlib.suppress(OSError):
                header.send("a")
        assert body.status() in (0, 408)
        assert body.ended(3)
        assert partial.status() in (0, 408)
        assert partial.ended(3)
        idle.settimeout(3)
        with contextlib.suppress(ConnectionError):
            assert idle.recv(1) == b""
    assert own.seen == []


@pytest.mark.e2e
def test_a_site_cannot_take_all_connections(own: Scene) -> None:
    """Its unfinished uploads count against the site, from whatever address; others go on."""
    own.gateway.install(connections_per_site=2)
    with running(own.gateway) as gateway:
        held = [gateway.connect(own.a) for _ in range(2)]
        for client in held:
            client.head("/v1/fleet/push-object", 1000, **{"flwr-public-key": own.a.node_key})
            client.send("x")
        until(lambda: gateway.ask(own.a, "pull-messages") == 503)  # what Flower tries again after a pause
        assert gateway.ask(own.b, "pull-messages") == 200
        held[0].send("x" * 999)
        assert held[0].status() == 200
        assert gateway.ask(own.a, "pull-messages") == 200


@pytest.mark.e2e
def test_a_site_that_asks_without_end_is_slowed_down(own: Scene) -> None:
    """A burst passes at once, what goes on comes at the rate, and nobody else waits for it."""
    own.gateway.install(requests_per_second=2)
    with running(own.gateway) as gateway, gateway.connect(own.a) as client:
        headers = {"flwr-public-key": own.a.node_key}
        begun = time.monotonic()
        assert {client.post("/v1/fleet/pull-messages", b"x", **headers) for _ in range(40)} == {200}
        assert time.monotonic() - begun < 5, "a model of many tensors must not wait"
        begun = time.monotonic()
        assert {client.post("/v1/fleet/pull-messages", b"x", **headers) for _ in range(4)} == {200}
        assert time.monotonic() - begun > 1
        begun = time.monotonic()
        assert gateway.ask(own.b, "pull-messages") == 200
        assert time.monotonic() - begun < 1.5
        with gateway.connect(own.b) as other:
            statuses = [other.post("/v1/medsegfed/renew", b"x") for _ in range(14)]
    assert statuses[:11] == [200] * 11
    assert statuses[-1] == 503


@pytest.mark.e2e
def test_revocation_ends_open_connections(own: Scene) -> None:
    """Within seconds: idle connections, uploads under way, new connections and resumed sessions of the revoked site."""
    with running(own.gateway) as gateway:
        headers = {"flwr-public-key": own.a.node_key}
        idle, busy, other = gateway.connect(own.a), gateway.connect(own.a), gateway.connect(own.b)
        assert idle.post("/v1/fleet/pull-messages", b"x", **headers) == 200
        assert other.post("/v1/fleet/pull-messages", b"x", **{"flwr-public-key": own.b.node_key}) == 200
        busy.head("/v1/fleet/push-object", 1000, **headers)
        busy.send("x")
        reload(gateway.config, gateway.process.pid, cut_after=None)  # somebody was admitted just before
        assert idle.ended(1)
        idle = gateway.connect(own.a)
        assert idle.post("/v1/fleet/pull-messages", b"x", **headers) == 200
        session = idle.socket.session
        own.world.revoke(own.a.serial)
        assert gateway.ask(own.a, "pull-messages") == 200, "the list alone, without a reload, changes nothing"
        begun = time.monotonic()
        reload(gateway.config, gateway.process.pid, cut_after=0.5)
        assert time.monotonic() - begun < 5
        assert idle.ended(1)
        assert busy.ended(1)
        seen = len(own.seen)
        for options in ({}, {"session": session, "context": idle.context}):
            with gateway.connect(own.a, **options) as again:
                assert not again.socket.session_reused
                assert again.post("/v1/fleet/pull-messages", b"x", **headers) == 400
        assert len(own.seen) == seen
        assert gateway.ask(own.b, "pull-messages") == 200
        until(lambda: own.log()[-1].site == "Site_B.2")


@pytest.mark.e2e
def test_members_come_and_go_with_a_reload(own: Scene) -> None:
    """Admission and suspension take effect without a restart; a slow upload of another site is not disturbed."""
    with running(own.gateway) as gateway:
        upload = gateway.connect(own.a)
        upload.head("/v1/fleet/push-object", 2, **{"flwr-public-key": own.a.node_key})
        upload.send("x")
        newcomer = own.world.site("newcomer")
        assert gateway.ask(newcomer, "activate-node") == 403
        gateway.install(node_keys={site.name: site.node_key for site in (own.a, newcomer)})
        before = {worker.pid for worker in gateway.workers()}
        reload(gateway.config, gateway.process.pid, cut_after=None)
        assert before & {worker.pid for worker in gateway.workers()}, "a slow upload must not hold up the next reload"
        upload.send("x")
        assert upload.status() == 200
        until(lambda: not before & {worker.pid for worker in gateway.workers() if worker.state != "Z"})
        assert gateway.ask(newcomer, "activate-node") == 200
        assert gateway.ask(own.b, "activate-node") == 403


@pytest.mark.e2e
def test_a_bad_configuration_never_replaces_a_good_one(own: Scene, tmp_path: Path) -> None:
    """A missing certificate, a damaged list, a stranger's process number: refused, and the gateway goes on."""
    with running(own.gateway) as gateway:
        good = gateway.config.read_bytes()
        with pytest.raises(UserError, match=r"nginx refuses this configuration .*no\.crt.*nothing was changed"):
            gateway.install(certificate=tmp_path / "no.crt")
        assert gateway.config.read_bytes() == good
        assert sorted(path.name for path in gateway.state.glob("nginx.conf*")) == ["nginx.conf"]
        crl = own.world.folder / "ca.crl"
        kept = crl.read_bytes()
        crl.write_bytes(b"torn")
        with pytest.raises(UserError, match=r"ca\.crl"):
            reload(gateway.config, gateway.process.pid)
        crl.write_bytes(kept)
        stranger = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])
        try:
            with pytest.raises(UserError, match=f"process {stranger.pid} is not its gateway"):
                reload(gateway.config, stranger.pid)
            assert stranger.poll() is None
        finally:
            stranger.kill()
            stranger.wait()
        assert gateway.ask(own.a, "get-run") == 200


@pytest.mark.e2e
def test_the_superlink_has_to_prove_itself(own: Scene, tmp_path: Path) -> None:
    """Weights go to the federation's own SuperLink over TLS, or nowhere: 502, which Flower tries again."""
    false = Service(World(tmp_path / "false").server)
    misnamed = Service(own.a.pem)
    plain = Service()
    nobody = free_port()
    for service in (false.port, misnamed.port, plain.port, nobody):
        own.gateway.install(superlink_port=service)
        with running(own.gateway) as gateway:
            assert gateway.ask(own.a, "push-object") == 502
    assert false.seen + misnamed.seen + plain.seen == []
    for stopped in (false, misnamed, plain):
        stopped.close()


@pytest.mark.e2e
def test_the_workers_are_nobody_in_particular(own: Scene) -> None:
    """Started by root, what reads requests has no rights; and the folders need not be open to it."""
    if os.geteuid() != 0:
        pytest.skip("not root")
    with running(own.gateway) as gateway:
        users = {Path(f"/proc/{worker.pid}").stat().st_uid for worker in gateway.workers()}
        assert users
        assert 0 not in users
        assert str(worker_user()).split()[0] in ("www-data", "nginx", "nobody")
        assert gateway.state.stat().st_mode & 0o777 == 0o700
        assert gateway.ask(own.a, "push-object", b"x" * (8 * MIB)) == 200
    assert "crit" not in (own.gateway.state / "logs" / "gateway.log").read_text()


@pytest.mark.e2e
def test_an_ordinary_user_can_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without root, and with nothing of /etc/nginx or /var."""
    if os.geteuid() != 0:
        pytest.skip("all other tests show it already")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        monkeypatch.setattr("tests.deploy.gateway_upstream.worker_user", lambda: None)
        scene = Scene(folder)
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 65534, 65534)
        gateway = scene.gateway
        (gateway.state / "logs" / "access.jsonl").unlink(missing_ok=True)
        gateway.start(user=65534, group=65534, extra_groups=[])
        try:
            assert Path(f"/proc/{gateway.process.pid}").stat().st_uid == 65534
            assert gateway.ask(scene.a, "push-object", b"x" * (8 * MIB)) == 200
            assert "emerg" not in (gateway.state / "logs" / "gateway.log").read_text()
        finally:
            gateway.stop()
            scene.superlink.close()
            scene.renewal.close()


@pytest.mark.e2e
def test_supervised(own: Scene) -> None:
    """As a child of the supervisor: its master killed, the workers go with it, and a new one takes the port."""
    gateway = own.gateway
    child = gateway_child(require_programs(), gateway.config, gateway.port, own.world.folder / "ca.crt")
    events: list[str] = []
    supervisor = Supervisor([child], lambda event, facts: events.append(event), state=gateway.state)
    supervisor.start()
    try:
        until(lambda: "ready" in events)
        master = supervisor.status()["gateway"]["pid"]
        workers = [process.pid for process in guard.processes() if process.parent == master]
        assert port_holder(gateway.port).endswith("(nginx)")
        reload(gateway.config, master, cut_after=0)
        os.kill(master, signal.SIGKILL)
        until(lambda: events.count("ready") == 2)
        assert not any(guard.read_process(pid) for pid in workers)
        assert gateway.ask(own.a, "get-run") == 200
    finally:
        supervisor.stop()
    assert not answers(gateway.port, own.world.folder / "ca.crt")
    require_free_port(gateway.port, ("127.0.0.1",))


@pytest.mark.e2e
def test_nginx_accepts_what_a_federation_has(tmp_path: Path) -> None:
    """All addresses of the machine, many sites, long names: the syntax holds."""
    world = World(tmp_path / "Größe und Weite")
    sites = {f"site-{n}.{'x' * 50}": "QUJDREVG" * 36 for n in range(200)}
    gateway = Gateway(tmp_path / "state of things", world, 18100, node_keys=sites, addresses=listen_addresses())
    check_config(gateway.config)
    check_config(gateway.install(node_keys={}))


def test_sites_and_keys_are_named_once_each() -> None:
    """One line binds one site; nobody else's key stands beside it."""
    text = render_nginx(**plain_arguments(node_keys={"a": "QUJD" * 20, "b.c": "REVG" * 20}, federation="f.1"))
    lines = [line.strip() for line in text.splitlines() if line.strip().endswith(" 1;") and "SUCCESS" in line]
    assert lines == [
        rf'"~^SUCCESS\|CN=a,O=f\.1\|{"QUJD" * 20}\z" 1;',
        rf'"~^SUCCESS\|CN=b\.c,O=f\.1\|{"REVG" * 20}\z" 1;',
    ]
