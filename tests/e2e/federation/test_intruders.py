"""The attack list against the assembled server: who may ask what, how much, how slowly, over which TLS."""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fastapi.routing import iter_route_contexts

from client.certificates import certificate_pem, new_tls_key, node_key_header, private_pem
from client.keys import SiteKeys
from deploy.authority import Authority
from deploy.gateway import FLEET_ROUTES, RENEWAL_PATH
from tests.e2e.federation.conftest import STALL_SECONDS, Scene
from tests.e2e.federation.handmade import Caller

MIB = 2**20
HEADER_SECONDS = 10.0  # for a whole header


@dataclass
class Intruders:
    """Callers of the gateway with all kinds of credentials, and what they are answered."""

    scene: Scene
    folder: Path
    closed: list[Caller]

    def caller(self, pem: Path | None, **options: ssl.TLSVersion) -> Caller:
        found = Caller(self.scene.server, self.scene.federation.ca_crt, pem, self.scene.outside, **options)
        self.closed.append(found)
        return found

    @property
    def mallory(self) -> Path:
        """A member's real key and certificate."""
        return self.scene.nodes["mallory"].keys.tls_file

    def header(self, site: str) -> dict[str, str]:
        """The node key of a site, as its SuperNode names it."""
        return {
            "flwr-public-key": node_key_header(SiteKeys.load(self.scene.stage.sites[site] / "keys").node_public_ssh)
        }

    def pair(self, name: str, authority: Authority, site: str, now: datetime | None = None) -> Path:
        """A key and a certificate for a site by an authority."""
        key = new_tls_key()
        path = self.folder / f"{name}.pem"
        path.write_bytes(private_pem(key) + certificate_pem(authority.issue_site(key.public_key(), site, 10, now)))
        path.chmod(0o600)
        return path

    def stranger(self) -> Path:
        """Of an authority with the federation's name, and the name of a member: the stranger's own."""
        return self.pair("stranger", Authority.create("rehearsal"), "mallory")

    def expired(self) -> Path:
        """Of the federation's authority, ended yesterday."""
        return self.pair(
            "expired", self.scene.federation.authority(), "mallory", datetime.now(UTC) - timedelta(days=11)
        )

    def unknown(self) -> Path:
        """Of the federation's authority, valid, for a site that is no member."""
        return self.pair("unknown", self.scene.federation.authority(), "nobody")


@pytest.fixture(scope="module")
def intruders(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Intruders]:
    found = Intruders(scene, tmp_path_factory.mktemp("intruders"), [])
    yield found
    for caller in found.closed:
        caller.close()


def all_routes() -> list[tuple[str, str]]:
    """Method and path of everything that a SuperLink offers, from Flower itself, and the renewal of certificates."""
    from flwr.superlink.main import create_app

    found = {
        (method, context.path) for context in iter_route_contexts(create_app().routes) for method in context.methods
    }
    return sorted({*found, ("POST", RENEWAL_PATH)})


def test_no_route_is_open_to_whom_it_is_not_meant_for(intruders: Intruders) -> None:
    """Every route, for every wrong credential: refused, and counted; the control shows that the right one passes."""
    routes = all_routes()
    assert len(routes) >= 84
    own, others = intruders.header("mallory"), intruders.header("victim")
    fleet = [("POST", f"/v1/fleet/{name}") for name in FLEET_ROUTES]
    beyond = [route for route in routes if route not in [*fleet, ("POST", RENEWAL_PATH)]]
    attacks: dict[str, tuple[Caller, dict[str, str], list[tuple[str, str]], int]] = {
        "no certificate": (intruders.caller(None), own, routes, 400),
        "a stranger's authority": (intruders.caller(intruders.stranger()), own, routes, 400),
        "an expired certificate": (intruders.caller(intruders.expired()), own, routes, 400),
        "a certificate of no member": (intruders.caller(intruders.unknown()), own, fleet, 403),
        "another site's node key": (intruders.caller(intruders.mallory), others, fleet, 403),
        "no node key": (intruders.caller(intruders.mallory), {}, fleet, 403),
        "a member beyond the fleet": (intruders.caller(intruders.mallory), own, beyond, 403),
    }
    refused = 0
    for what, (caller, header, paths, status) in attacks.items():
        for method, path in paths:
            assert caller.ask(method, path, header) == status, f"{what}: {method} {path}"
            refused += 1
    assert refused == 3 * len(routes) + 3 * len(fleet) + len(beyond)
    assert refused >= 350
    control = intruders.caller(intruders.mallory)
    assert control.ask("POST", "/v1/fleet/get-run", own) not in (0, 400, 403), "Flower itself answers"
    assert control.ask("POST", RENEWAL_PATH, {}) == 403
    assert b"reason" in control.said, "the renewal service itself answers: that was no request for a renewal"


def test_paths_cannot_be_talked_round(intruders: Intruders) -> None:
    """Detours, encodings, other methods and versions of the fleet's routes end at the gateway."""
    caller, own = intruders.caller(intruders.mallory), intruders.header("mallory")
    tricks = [
        "/v1/fleet/../control/list-nodes", "/v1/fleet/%2e%2e/control/list-nodes", "//v1/fleet/get-run",
        "/v1/fleet/get-run/", "/v1/fleet/get-run?x=1", "/v1/fleet/get-run%00", "/v1/fleet/get-run;x",
        "/V1/FLEET/get-run", "/v1/fleet/get-run/../../control/start-run", "http://127.0.0.1/v1/control/start-run",
        "/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/medsegfed/renew/", "/", "*",
    ]  # fmt: skip
    refused = [caller.ask("POST", path, own) for path in tricks]
    assert all(status in (0, 400, 403, 404, 405) for status in refused), dict(zip(tricks, refused, strict=True))
    refused += [caller.ask(method, "/v1/fleet/get-run", own) for method in ("GET", "PUT", "DELETE", "PATCH", "TRACE")]
    assert set(refused[len(tricks) :]) <= {403, 405}
    assert len(refused) == 20


def test_large_bodies_are_refused_unread(intruders: Intruders) -> None:
    """9 MB, 1 GB and bodies of unknown length: 413 or 411, and the server's memory stays what it was."""
    scene, header = intruders.scene, intruders.header("mallory")["flwr-public-key"]
    before = scene.resident()
    statuses = []
    for length in (9 * MIB, 9 * MIB, 2**30, None):
        with intruders.caller(intruders.mallory).connect() as connection:
            size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
            head = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nflwr-public-key: {header}\r\n{size}\r\n\r\n"
            connection.sendall(head.encode())
            sent, piece = 0, b"40000\r\n" + b"x" * 0x40000 + b"\r\n"
            with contextlib.suppress(OSError):  # the gateway ends the connection
                while sent < (length or 64 * MIB):
                    sent += connection.send(piece)
            statuses.append(_status(connection))
    assert statuses == [413, 413, 413, 411]
    grown = {name: mib - before[name] for name, mib in scene.resident().items()}
    assert all(mib < 50 for mib in grown.values()), grown
    control = intruders.caller(intruders.mallory)
    assert control.ask("POST", "/v1/fleet/push-object", intruders.header("mallory"), b"x" * (7 * MIB)) not in (
        0,
        403,
        413,
    )


def _status(connection: ssl.SSLSocket) -> int:
    """Of the answer that waits on a connection; 0 if there is none."""
    connection.settimeout(10)
    try:
        line = connection.recv(100)
    except OSError:
        return 0
    return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else 0


def test_older_tls_is_refused(intruders: Intruders) -> None:
    """Whoever does not speak TLS 1.3 gets no further than its first words."""
    with pytest.raises(ssl.SSLError):
        intruders.caller(intruders.mallory, newest=ssl.TLSVersion.TLSv1_2).connect()
    with intruders.caller(intruders.mallory).connect() as connection:
        assert connection.version() == "TLSv1.3"


def test_the_server_has_one_open_port(intruders: Intruders) -> None:
    """SuperLink, control, metrics, health and renewals are not to be reached from outside, only from loopback."""
    import socket

    scene = intruders.scene
    ports = scene.federation.ports

    def reached(place: str, host: str) -> set[str]:
        found = set()
        for name, port in ports._asdict().items():
            try:
                scene.network.inside(place, lambda port=port: socket.create_connection((host, port), 3)).close()
                found.add(name)
            except OSError:
                continue
        return found

    assert reached("server", "127.0.0.1") == set(ports._fields), "the control: all are there"
    if not hasattr(scene.network, "knocks"):
        pytest.skip(scene.network.why)
    assert reached("outside", scene.network.host) == set()


def test_dawdlers_are_cut_off(dawdlers: dict[str, float]) -> None:
    """A header that comes letter by letter, a body and a handshake that do not come are not waited for."""
    end = time.monotonic() + STALL_SECONDS * 3
    while len(dawdlers) < 3 and time.monotonic() < end:
        time.sleep(0.2)
    assert sorted(dawdlers) == ["body", "handshake", "header"]
    assert dawdlers["header"] < HEADER_SECONDS + 15
    assert dawdlers["handshake"] < HEADER_SECONDS + 15
    assert dawdlers["body"] < STALL_SECONDS + 15
