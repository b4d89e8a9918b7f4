"""What `doctor` says of the way to the server: real TLS servers and proxies on loopback, one fault each."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from client.certificates import certificate_pem, private_pem
from deploy.authority import Authority
from deploy.doctor.checks import Check
from deploy.doctor.connection import Link, Proxy, proxy_for, split_address
from deploy.doctor.network import NAMES, check_server, clock_check

SECONDS = 0.6  # a step may take in these tests
Handler = Callable[[socket.socket], None]


class Listener:
    """Accepts connections on loopback and hands each to `handle` in a thread of its own."""

    def __init__(self, handle: Handler, host: str = "127.0.0.1") -> None:
        self.handle = handle
        self.accepted = 0
        self.received: list[bytes] = []
        self._socket = socket.create_server((host, 0))
        self.host, self.port = host, self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        with connection, contextlib.suppress(OSError):
            self.handle(connection)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()


@pytest.fixture
def listen() -> Iterator[Callable[..., Listener]]:
    """Call with a handler to get a listener; all are closed at the end."""
    opened: list[Listener] = []

    def start(handle: Handler, host: str = "127.0.0.1") -> Listener:
        opened.append(Listener(handle, host))
        return opened[-1]

    yield start
    for listener in opened:
        listener.close()


class Federation:
    """An authority with one server certificate and one site's pair, on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.create("north")
        self.ca = self._write("ca.crt", self.authority.certificate_pem())
        key = ec.generate_private_key(ec.SECP384R1())
        site = self.authority.issue_site(key.public_key(), "st-mary", 90)
        self.site = site
        self.pair = self._write("tls.pem", private_pem(key) + certificate_pem(site))

    def server(self, days: float = 365, now: datetime | None = None, authority: Authority | None = None) -> Path:
        """Key and certificate of a server for localhost and 127.0.0.1, as one PEM file."""
        key = ec.generate_private_key(ec.SECP384R1())
        issued = (authority or self.authority).issue_server(key.public_key(), ["localhost"], days, now)
        return self._write("server.pem", private_pem(key) + certificate_pem(issued))

    def _write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """One federation for all tests of this file."""
    return Federation(tmp_path_factory.mktemp("federation"))


def corporate(folder: Path) -> Path:
    """Key and certificate for localhost as an inspecting firewall makes them on the fly."""
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Corporate Proxy CA")])
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().issuer_name(issuer).subject_name(subject).public_key(key.public_key())
    builder = builder.serial_number(7).not_valid_before(now).not_valid_after(now + timedelta(days=9))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    path = folder / "corporate.pem"
    path.write_bytes(private_pem(key) + certificate_pem(builder.sign(ca_key, hashes.SHA256())))
    return path


def tls(pair: Path, ca: Path | None = None, highest: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """A server's context; with `ca` it asks for a client certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair)
    if ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(ca)
    if highest is not None:
        context.maximum_version = highest
    return context


def gateway(context: ssl.SSLContext, shift: float = 0.0, answer: bytes = b"HTTP/1.1 403 Forbidden") -> Handler:
    """A server that answers every request alike, with a Date header `shift` seconds off."""

    def handle(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            received = b""
            while b"\r\n\r\n" not in received:
                block = secured.recv(4096)
                if not block:
                    return  # who asked has hung up; a thread that waits on would spin beside all later tests
                received += block
            date = formatdate(time.time() + shift, usegmt=True).encode()
            head, _, body = answer.partition(b"\r\n\r\n")
            secured.sendall(head + b"\r\nDate: " + date + b"\r\nConnection: close\r\n\r\n" + body)

    return handle


def check(federation: Federation, port: int, host: str = "localhost", **changes: object) -> dict[str, Check]:
    """All five checks by name."""
    settings = {"ca": federation.ca, "pair": federation.pair, "seconds": SECONDS} | changes
    checks = list(check_server(Link(host, port, **settings)))  # type: ignore[arg-type]
    assert [c.name for c in checks] == list(NAMES)
    return {c.name: c for c in checks}


def failed(checks: dict[str, Check], name: str) -> str:
    """The detail of the one failed check; those before it are well, those after it are skipped."""
    place = NAMES.index(name)
    assert [checks[n].status for n in NAMES] == ["ok"] * place + ["fail"] + ["skipped"] * (len(NAMES) - place - 1)
    assert checks[name].advice
    return checks[name].detail


def test_a_good_server_passes_every_check(federation: Federation, listen: Callable[..., Listener]) -> None:
    """Mutual TLS 1.3, a 403 as the gateway gives it, clocks together."""
    server = listen(gateway(tls(federation.server(), federation.ca)))
    checks = check(federation, server.port)
    assert {c.status for c in checks.values()} == {"ok"}, checks
    assert "TLSv1.3" in checks["server TLS"].detail
    assert server.accepted == 1


def test_an_inspecting_firewall_is_named_by_its_issuer(
    federation: Federation, listen: Callable[..., Listener], tmp_path: Path
) -> None:
    """Another issuer is named, IT is told what to exempt, and no request reaches the firewall."""
    requests: list[bytes] = []
    context = tls(corporate(tmp_path))

    def handle(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            requests.append(secured.recv(4096))

    server = listen(handle)
    checks = check(federation, server.port)
    detail = failed(checks, "server TLS")
    assert "issued by 'CN=Corporate Proxy CA', not by the federation" in detail
    assert f"localhost:{server.port}" in checks["server TLS"].advice
    assert server.accepted == 2
    assert b"".join(requests) == b""


def test_a_firewall_with_tls_1_2_is_named_too(
    federation: Federation, listen: Callable[..., Listener], tmp_path: Path
) -> None:
    """The older protocol must not hide who sits between."""
    server = listen(gateway(tls(corporate(tmp_path), highest=ssl.TLSVersion.TLSv1_2)))
    assert "CN=Corporate Proxy CA" in failed(check(federation, server.port), "server TLS")


def test_the_federations_own_server_with_tls_1_2_is_refused(
    federation: Federation, listen: Callable[..., Listener]
) -> None:
    """A gateway without TLS 1.3 is told as that, not as a stranger."""
    server = listen(gateway(tls(federation.server(), highest=ssl.TLSVersion.TLSv1_2)))
    assert "TLS 1.3 is required" in failed(check(federation, server.port), "server TLS")


def test_an_authority_of_the_same_name_with_another_key_is_told_apart(
    federation: Federation, listen: Callable[..., Listener]
) -> None:
    """A CA made anew, or feigned, is no firewall."""
    server = listen(gateway(tls(federation.server(authority=Authority.create("north")))))
    assert "another key signed it" in failed(check(federation, server.port), "server TLS")


def test_a_wrong_host_name_shows_the_names_that_would_do(
    federation: Federation, listen: Callable[..., Listener]
) -> None:
    """The certificate's names and the one that was dialled stand side by side."""
    server = listen(gateway(tls(federation.server())), host="127.0.0.2")
    detail = failed(check(federation, server.port, host="127.0.0.2"), "server TLS")
    assert "is for localhost, 127.0.0.1, not for 127.0.0.2" in detail


@pytest.mark.parametrize(("days_ago", "words"), [(3, "expired on"), (-2, "is valid from")])
def test_a_certificate_out_of_its_time_is_told_with_this_machines_clock(
    federation: Federation, listen: Callable[..., Listener], days_ago: int, words: str
) -> None:
    """Expired and not yet valid differ, and the clock that judged is shown."""
    pair = federation.server(days=1, now=datetime.now(UTC) - timedelta(days=days_ago))
    detail = failed(check(federation, listen(gateway(tls(pair))).port), "server TLS")
    assert words in detail
    assert f"clock says {datetime.now(UTC):%Y-%m-%d}" in detail


def test_a_port_without_tls_is_told(federation: Federation, listen: Callable[..., Listener]) -> None:
    """A plain web server answers a ClientHello in plain text."""

    def handle(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    assert "plain text" in failed(check(federation, listen(handle).port), "server TLS")


def test_a_silent_port_ends_at_its_time_limit(federation: Federation, listen: Callable[..., Listener]) -> None:
    """A port that accepts and never answers costs one time-out, not the whole examination."""
    started = time.monotonic()
    detail = failed(check(federation, listen(lambda connection: time.sleep(8)).port), "server TLS")
    assert "says nothing for 0.6 s" in detail
    assert time.monotonic() - started < 4 * SECONDS


def test_a_connection_cut_in_the_handshake_is_told(federation: Federation, listen: Callable[..., Listener]) -> None:
    """A firewall that knows TLS by its first bytes hangs up on them."""
    server = listen(lambda connection: connection.recv(16) and None)
    assert "hangs up" in failed(check(federation, server.port), "server TLS")


def test_a_refusing_port_is_told(federation: Federation) -> None:
    """Nothing listens: that is the coordinator's affair before it is the firewall's."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    checks = check(federation, port)
    assert "refuses the connection" in failed(checks, "server connection")
    assert checks["server connection"].advice.startswith("Ask the coordinator")


def test_packets_that_are_dropped_are_told(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer at all sounds otherwise than a refusal."""

    def silent(address: tuple[str, int], timeout: float) -> socket.socket:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    assert "does not answer within 0.6 s" in failed(check(federation, 8443), "server connection")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (socket.gaierror(socket.EAI_NONAME, "unknown"), "DNS knows no"),
        (socket.gaierror(socket.EAI_AGAIN, "later"), "DNS cannot answer"),
    ],
)
def test_a_name_that_does_not_resolve_is_told(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, fault: OSError, words: str
) -> None:
    """A wrong name and a name server that is away differ."""

    def look_up(*arguments: object, **keywords: object) -> None:
        raise fault

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert words in failed(check(federation, 8443, host="fl.example.org"), "server address")


def test_a_name_server_that_hangs_ends_at_its_time_limit(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's resolver has no time limit of its own that a program could set."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(5))
    assert "no answer for fl.example.org within" in failed(check(federation, 8443, host="fl.example.org"), NAMES[0])


def test_a_revoked_certificate_is_told_apart_from_a_fault_of_the_server(
    federation: Federation, listen: Callable[..., Listener], tmp_path: Path
) -> None:
    """The server's alert names the reason; the server itself is found well."""
    context = tls(federation.server(), federation.ca)
    crl = tmp_path / "ca.crl"
    crl.write_bytes(federation.authority.revocation_list([federation.site.serial_number], 2))
    context.load_verify_locations(crl)
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    checks = check(federation, listen(gateway(context)).port)
    assert "it is revoked" in failed(checks, "client certificate")
    assert "with new keys" in checks["client certificate"].advice


def test_a_certificate_of_another_federation_is_told(
    federation: Federation, listen: Callable[..., Listener], tmp_path: Path
) -> None:
    """The site trusts the server, the server does not know the site."""
    stranger = Federation(tmp_path)
    server = listen(gateway(tls(federation.server(), federation.ca)))
    checks = check(federation, server.port, pair=stranger.pair)
    assert "CA is not known there" in failed(checks, "client certificate")


@pytest.mark.parametrize(
    ("title", "words"),
    [
        (b"400 The SSL certificate error", "revoked, or of another federation"),
        (b"400 No required SSL certificate was sent", "this site shows none"),
    ],
)
def test_nginx_turns_certificates_down_in_http(
    federation: Federation, listen: Callable[..., Listener], title: bytes, words: str
) -> None:
    """nginx finishes the handshake and answers 400 with a page of its own."""
    page = b"HTTP/1.1 400 Bad Request\r\n\r\n<html><head><title>" + title + b"</title></head></html>"
    checks = check(federation, listen(gateway(tls(federation.server()), answer=page)).port)
    assert words in checks["client certificate"].detail
    assert checks["client certificate"].status == "fail"
    assert checks["clock"].status == "ok"  # its Date header is as good as any


def test_a_server_that_shakes_hands_and_says_nothing_is_told(
    federation: Federation, listen: Callable[..., Listener]
) -> None:
    """A gateway whose workers hang is no certificate's fault."""
    context = tls(federation.server())

    def handle(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True):
            time.sleep(4)

    checks = check(federation, listen(handle).port)
    assert "shakes hands and then says nothing" in failed(checks, "client certificate")


def test_a_site_without_its_pair_is_told_so(federation: Federation, tmp_path: Path) -> None:
    """A damaged tls.pem is this site's fault, and the port is not tried with less."""
    broken = tmp_path / "tls.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        checks = check(federation, server.getsockname()[1], pair=broken)
    assert "cannot be loaded" in failed(checks, "server TLS")


# The clock


@pytest.mark.parametrize(("shift", "status"), [(0, "ok"), (130, "fail"), (-7, "fail")])
def test_the_clock_is_judged_by_the_servers_date(
    federation: Federation, listen: Callable[..., Listener], shift: float, status: str
) -> None:
    """A server `shift` seconds ahead, over real TLS."""
    checks = check(federation, listen(gateway(tls(federation.server()), shift)).port)
    clock = checks["clock"]
    assert clock.status == status, clock
    assert clock.figures["offset_seconds"] == pytest.approx(-shift, abs=0.8)
    assert shift == 0 or ("behind" in clock.detail) == (shift > 0)


@pytest.mark.parametrize(
    ("ahead", "status"),
    [
        (-121, "fail"),
        (-119, "warn"),
        (-31, "warn"),
        (-29, "ok"),
        (4.4, "ok"),
        (4.6, "warn"),
        (5.4, "warn"),
        (5.6, "fail"),
    ],
)
def test_a_clock_behind_has_minutes_and_one_ahead_five_seconds(ahead: float, status: str) -> None:
    """Flower takes signatures that are 300 s old, and none that is more than 5 s ahead."""
    assert clock_check(formatdate(1_000_000, usegmt=True), 1_000_000.5 + ahead, 0.0).status == status


def test_half_the_round_trip_and_the_whole_second_are_uncertain() -> None:
    """A Date header of 12:00:00 may have been written up to a second later."""
    date = formatdate(1_000_000, usegmt=True)
    exact = clock_check(date, 1_000_000.5, 0.0)
    assert exact.figures == {"offset_seconds": 0.0, "error_seconds": 0.5}
    assert clock_check(date, 1_000_000.5, 3.0).figures["error_seconds"] == 2.0
    assert clock_check(date, 1_000_006.5, 3.0).status == "warn"  # 6 s ahead, give or take 2: not certain
    assert clock_check(date, 1_000_006.5, 0.0).status == "fail"


@pytest.mark.parametrize("date", [None, "", "yesterday", "Thu, 99 Jan 1970 00:00:00 GMT"])
def test_a_server_that_tells_no_time_gives_a_warning(date: str | None) -> None:
    """An absent or senseless header is no offset of 56 years."""
    assert clock_check(date, 1e9, 0.0).status == "warn"


# Proxies


class ConnectProxy:
    """A handler that opens tunnels (HTTP CONNECT), or answers with a status."""

    def __init__(self, status: int = 200, credentials: str | None = None) -> None:
        self.status = status
        self.credentials = credentials
        self.requests: list[str] = []

    def __call__(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (sign := connection.recv(1)):
                return
            head += sign
        self.requests.append(head.decode())
        status = self.status
        if self.credentials is not None and f"Proxy-Authorization: Basic {self.credentials}" not in head.decode():
            status = 407
        if status != 200:
            connection.sendall(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode())
            return
        host, port = split_address(head.split()[1].decode())
        with socket.create_connection((host, port), timeout=5) as target:
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=pump, args=(target, connection), daemon=True)
            back.start()
            pump(connection, target)
            back.join(5)


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Bytes from one to the other until the first is closed."""
    with contextlib.suppress(OSError):
        while block := source.recv(65_536):
            sink.sendall(block)
        sink.shutdown(socket.SHUT_WR)


def test_a_proxy_that_works_leads_to_the_server(federation: Federation, listen: Callable[..., Listener]) -> None:
    """The certificate is checked end to end, through the tunnel."""
    server = listen(gateway(tls(federation.server(), federation.ca)))
    handler = ConnectProxy()
    proxy = listen(handler)
    checks = check(federation, server.port, proxy=Proxy("127.0.0.1", proxy.port))
    assert {c.status for c in checks.values()} == {"ok"}, checks
    assert "through the proxy" in checks["server connection"].detail
    assert handler.requests[0].startswith(f"CONNECT localhost:{server.port} HTTP/1.1\r\n")
    assert (server.accepted, proxy.accepted) == (1, 1)


def test_a_firewall_behind_a_proxy_is_named(
    federation: Federation, listen: Callable[..., Listener], tmp_path: Path
) -> None:
    """The second look goes through the proxy as well."""
    server, proxy = listen(gateway(tls(corporate(tmp_path)))), listen(ConnectProxy())
    checks = check(federation, server.port, proxy=Proxy("127.0.0.1", proxy.port))
    assert "CN=Corporate Proxy CA" in failed(checks, "server TLS")
    assert proxy.accepted == 2


def test_a_proxy_that_wants_a_password_gets_it_and_shows_it_to_nobody(
    federation: Federation, listen: Callable[..., Listener]
) -> None:
    """407 is told in its own words; with the account of HTTPS_PROXY the way is open."""
    server = listen(gateway(tls(federation.server(), federation.ca)))
    proxy = listen(ConnectProxy(credentials="dXNlcjpzM2NyZXQ="))
    checks = check(federation, server.port, proxy=Proxy("127.0.0.1", proxy.port))
    assert "asks for a user name and password (407)" in failed(checks, "server connection")
    checks = check(federation, server.port, proxy=Proxy("127.0.0.1", proxy.port, "user:wrong"))
    assert "refuses the user name and password (407)" in failed(checks, "server connection")
    assert "wrong" not in repr(checks)
    checks = check(federation, server.port, proxy=Proxy("127.0.0.1", proxy.port, "user:s3cret"))
    assert {c.status for c in checks.values()} == {"ok"}
    assert "s3cret" not in repr(checks)


@pytest.mark.parametrize(("status", "words"), [(403, "forbids the connection"), (500, "cannot reach localhost:8443")])
def test_a_proxy_that_refuses_is_told_by_its_status(
    federation: Federation, listen: Callable[..., Listener], status: int, words: str
) -> None:
    """A rule of the proxy and a server it cannot reach have different people to ask."""
    proxy = listen(ConnectProxy(status))
    checks = check(federation, 8443, proxy=Proxy("127.0.0.1", proxy.port))
    detail = failed(checks, "server connection")
    assert words in detail
    assert f"({status})" in detail


def test_a_dead_proxy_is_told_as_the_proxy(federation: Federation, listen: Callable[..., Listener]) -> None:
    """The server is not accused of a proxy's absence."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    checks = check(federation, 8443, proxy=Proxy("127.0.0.1", port))
    assert failed(checks, "server connection").startswith(f"the proxy 127.0.0.1:{port} refuses the connection")
    assert "HTTPS_PROXY" in checks["server connection"].advice


@pytest.mark.parametrize(
    ("handle", "words"),
    [
        (lambda connection: time.sleep(4), "gives no answer within"),
        (lambda connection: connection.recv(16) and None, "hangs up"),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9\r\n\r\n"), "does not speak HTTP"),
    ],
)
def test_what_is_no_proxy_is_told(
    federation: Federation, listen: Callable[..., Listener], handle: Handler, words: str
) -> None:
    """A silent, a rude and a foreign service behind HTTPS_PROXY."""
    checks = check(federation, 8443, proxy=Proxy("127.0.0.1", listen(handle).port))
    assert words in failed(checks, "server connection")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"HTTPS_PROXY": "http://proxy.example:3128"}, Proxy("proxy.example", 3128)),
        ({"HTTPS_PROXY": "proxy.example:3128"}, Proxy("proxy.example", 3128)),
        ({"HTTPS_PROXY": "http://p:1", "https_proxy": "http://q:2"}, Proxy("q", 2)),
        ({"ALL_PROXY": "http://u%40x:p%3Aw@proxy.example"}, Proxy("proxy.example", 80, "u@x:p:w")),
        ({"HTTP_PROXY": "http://proxy.example:3128"}, None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "127.0.0.1,example.org"}, None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "other.org"}, Proxy("p", 1)),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}, None),
    ],
)
def test_the_proxy_is_the_one_that_the_environment_names(environment: dict[str, str], expected: Proxy | None) -> None:
    """HTTPS_PROXY, ALL_PROXY and NO_PROXY as HTTP clients read them."""
    assert proxy_for("fl.example.org", 8443, environment) == expected


@pytest.mark.parametrize("url", ["socks5://p:1", "https://p:1", "http://", "http://p:port"])
def test_an_address_that_is_no_proxy_is_refused_without_being_shown(url: str) -> None:
    """A typing error must not spell a password out."""
    with pytest.raises(ValueError, match="HTTPS_PROXY") as caught:
        proxy_for("fl.example.org", 8443, {"HTTPS_PROXY": url.replace("//", "//user:s3cret@")})
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("address", ["", "host", "host:", "host:port", "https://host:1", "u@host:1", "host:1/x"])
def test_an_address_without_host_and_port_is_refused(address: str) -> None:
    """A damaged federation.json ends in words, not in a connection somewhere."""
    with pytest.raises(ValueError, match=r"."):
        split_address(address)
    assert split_address("[::1]:8443") == ("::1", 8443)


def test_what_a_server_claims_cannot_write_to_the_terminal(
    federation: Federation, listen: Callable[..., Listener], tmp_path: Path
) -> None:
    """Control signs in an issuer's name are taken out before anybody sees them."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "\x1b[2J[bold]Corp\nCA")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().issuer_name(name).subject_name(name).public_key(key.public_key())
    builder = builder.serial_number(7).not_valid_before(now).not_valid_after(now + timedelta(days=9))
    pair = tmp_path / "odd.pem"
    pair.write_bytes(private_pem(key) + certificate_pem(builder.sign(key, hashes.SHA256())))
    detail = failed(check(federation, listen(gateway(tls(pair))).port), "server TLS")
    assert "Corp" in detail
    assert all(sign.isprintable() for sign in detail)
