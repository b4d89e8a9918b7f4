"""The authority's certificates, judged by OpenSSL on both ends of real TLS 1.3 connections."""

from __future__ import annotations

import base64
import dataclasses
import ipaddress
import ssl
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID
from tls_talk import SECRET, client_context, server_context, talk

from client.certificates import certificate_pem, new_tls_key, private_pem, signing_request
from deploy.authority import Authority, check_hosts, list_number, subject_line
from deploy.credentials import (
    certified_hosts,
    check_authority,
    check_signing_request,
    check_site_certificate,
    signed_by_authority,
)
from medsegdiff.errors import UserError

DAY = timedelta(days=1)
CSR = "CERTIFICATE REQUEST"


@dataclasses.dataclass
class Desk:
    """An authority with its certificate as a file, and pairs made on demand."""

    folder: Path
    authority: Authority

    @property
    def ca(self) -> Path:
        path = self.folder / "ca.crt"
        path.write_bytes(self.authority.certificate_pem())
        return path

    def server(
        self, hosts: Sequence[str] = ("fed.example.org",), days: float = 30, now: datetime | None = None
    ) -> Path:
        key = ec.generate_private_key(ec.SECP384R1())
        return self._pair("server", key, self.authority.issue_server(key.public_key(), hosts, days, now))

    def site(self, days: float = 30, now: datetime | None = None) -> Path:
        key = new_tls_key()
        return self._pair("site", key, self.authority.issue_site(key.public_key(), "alder", days, now))

    def revocations(self, *pairs: Path) -> Path:
        path = self.folder / "ca.crl"
        serials = [x509.load_pem_x509_certificate(pair.read_bytes()).serial_number for pair in pairs]
        path.write_bytes(self.authority.revocation_list(serials, 1))
        return path

    def _pair(self, name: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> Path:
        path = self.folder / f"{name}-{certificate.serial_number}.pem"
        path.write_bytes(private_pem(key) + certificate_pem(certificate))
        return path


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path, Authority.create("demo"))


@pytest.fixture
def rival(tmp_path: Path) -> Desk:
    """Another authority that calls itself the same."""
    (tmp_path / "rival").mkdir()
    return Desk(tmp_path / "rival", Authority.create("demo"))


def test_a_good_pair_talks_tls_1_3(desk: Desk) -> None:
    """Server and site know one another, with the revocation list in force, by name and by address."""
    server = desk.server(("fed.example.org", "10.1.2.3", "fd00::7"))
    site = desk.site()
    ends = server_context(desk.ca, server, desk.revocations()), client_context(desk.ca, site)
    for host in ("fed.example.org", "FED.example.org", "10.1.2.3", "fd00::7", "localhost", "127.0.0.1"):
        found = talk(*ends, host)
        assert (found.heard, found.server_error, found.client_error) == (SECRET, "", "")
        assert found.version == "TLSv1.3"


def test_the_server_is_verified(desk: Desk, rival: Desk) -> None:
    """Of another authority, another host, expired, not yet valid, or a site's: nothing is sent to it."""
    site, now = desk.site(), datetime.now(UTC)
    good = desk.server()
    assert not talk(server_context(desk.ca, good), client_context(desk.ca, site), "fed.example.org").refused
    for pair, host, reason in (
        (rival.server(), "fed.example.org", "unable to get local issuer"),
        (good, "other.example.org", "Hostname mismatch"),
        (good, "10.1.2.3", "IP address mismatch"),
        (desk.server(("example.org",)), "fed.example.org", "Hostname mismatch"),
        (desk.server(days=1, now=now - 2 * DAY), "fed.example.org", "expired"),
        (desk.server(days=9, now=now + DAY), "fed.example.org", "not yet valid"),
        (desk.site(), "fed.example.org", "unsuitable certificate purpose"),
    ):
        found = talk(server_context(desk.ca, pair), client_context(desk.ca, site), host)
        assert found.refused
        assert reason in found.client_error, (host, found)


def test_the_site_is_verified(desk: Desk, rival: Desk) -> None:
    """No certificate, another authority's, an expired or revoked one, the server's own: the server hears nothing."""
    server, now = desk.server(), datetime.now(UTC)
    good, stolen = desk.site(), desk.site()
    context = server_context(desk.ca, server, desk.revocations(stolen))
    assert not talk(context, client_context(desk.ca, good), "fed.example.org").refused
    for pair, reason in (
        (None, "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        (rival.site(), "CERTIFICATE_VERIFY_FAILED"),
        (desk.site(days=1, now=now - 2 * DAY), "CERTIFICATE_VERIFY_FAILED"),
        (desk.site(days=1, now=now + DAY), "CERTIFICATE_VERIFY_FAILED"),
        (stolen, "CERTIFICATE_VERIFY_FAILED"),
        (desk.server(), "CERTIFICATE_VERIFY_FAILED"),
    ):
        found = talk(context, client_context(desk.ca, pair), "fed.example.org")
        assert found.refused
        assert found.server_error == reason, (pair, found)


def test_revocation_is_what_refuses(desk: Desk) -> None:
    """The same certificate passes without the list, and with a list that does not name it."""
    server, site, other = desk.server(), desk.site(), desk.site()
    client = client_context(desk.ca, site)
    assert not talk(server_context(desk.ca, server), client, "localhost").refused
    assert not talk(server_context(desk.ca, server, desk.revocations(other)), client, "localhost").refused
    assert talk(server_context(desk.ca, server, desk.revocations(site, other)), client, "localhost").refused


def test_older_tls_is_refused(desk: Desk) -> None:
    """A client that speaks TLS 1.2 at most."""
    client = client_context(desk.ca, desk.site())
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert talk(server_context(desk.ca, desk.server()), client, "localhost").refused


def test_a_site_cannot_certify(desk: Desk) -> None:
    """A certificate that a site signs with its own key, sent along with its own, opens nothing."""
    site, key = desk.site(), new_tls_key()
    issuer = x509.load_pem_x509_certificate(site.read_bytes())
    forged = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "birch")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(issuer.not_valid_before_utc)
        .not_valid_after(issuer.not_valid_after_utc)
        .sign(_key_of(site), hashes.SHA256())
    )
    chain = desk.folder / "forged.pem"
    chain.write_bytes(private_pem(key) + certificate_pem(forged) + certificate_pem(issuer))
    assert talk(server_context(desk.ca, desk.server()), client_context(desk.ca, chain), "localhost").refused


def _key_of(pair: Path) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(pair.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


@pytest.mark.parametrize(("kind", "purpose"), [("site", "sslclient"), ("server", "sslserver")])
def test_openssl_finds_no_fault(desk: Desk, kind: str, purpose: str) -> None:
    """`openssl verify -x509_strict` with the revocation list, for the one purpose and not for the other."""
    pair = desk.site() if kind == "site" else desk.server()
    command = ["openssl", "verify", "-x509_strict", "-crl_check", "-CAfile", desk.ca, "-CRLfile", desk.revocations()]
    assert subprocess.run([*command, "-purpose", purpose, pair], capture_output=True, check=False).returncode == 0
    other = {"sslclient": "sslserver", "sslserver": "sslclient"}[purpose]
    assert subprocess.run([*command, "-purpose", other, pair], capture_output=True, check=False).returncode != 0


def test_the_subject_is_as_nginx_tells_it(desk: Desk) -> None:
    """$ssl_client_s_dn is RFC 2253; OpenSSL is what nginx asks."""
    command = ["openssl", "x509", "-noout", "-subject", "-nameopt", "RFC2253", "-in", desk.site()]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert told == f"subject={subject_line('alder', 'demo')}"


def test_what_the_certificates_say(desk: Desk) -> None:
    """Curves, constraints, usages and lengths, as the design asks."""
    ca = desk.authority.certificate
    limits = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert isinstance(ca.public_key(), ec.EllipticCurvePublicKey)
    assert ca.public_key().curve.name == "secp384r1"
    assert (limits.critical, limits.value.ca, limits.value.path_length) == (True, True, 0)
    assert (usage.critical, usage.value.key_cert_sign, usage.value.crl_sign) == (True, True, True)
    assert not usage.value.digital_signature
    assert ca.not_valid_after_utc - ca.not_valid_before_utc == 3650 * DAY
    site = x509.load_pem_x509_certificate(desk.site(days=400).read_bytes())
    assert site.not_valid_after_utc - site.not_valid_before_utc == 90 * DAY
    server = x509.load_pem_x509_certificate(desk.server(("Fed.Example.org.", "10.1.2.3", "fd00::7")).read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address(text) for text in ("10.1.2.3", "fd00::7", "127.0.0.1")
    ]
    assert certified_hosts(server) == {"fed.example.org", "localhost", "10.1.2.3", "fd00::7", "127.0.0.1"}
    assert certified_hosts(site) == set()


def test_certificates_of_a_minute(desk: Desk) -> None:
    """Valid at once and for about 60 seconds; clocks that differ a little matter where there is time."""
    now = datetime.now(UTC)
    short = x509.load_pem_x509_certificate(desk.site(days=60 / 86_400, now=now).read_bytes())
    assert now - timedelta(seconds=2) <= short.not_valid_before_utc <= now
    assert timedelta(seconds=57) < short.not_valid_after_utc - now <= timedelta(seconds=60)
    long = x509.load_pem_x509_certificate(desk.site(days=90, now=now).read_bytes())
    assert timedelta(seconds=299) < now - long.not_valid_before_utc < timedelta(seconds=302)


def test_nothing_outlives_the_authority(tmp_path: Path) -> None:
    """A certificate ends with its authority at the latest; an expired authority signs nothing."""
    now = datetime.now(UTC)
    authority = Authority.create("demo", days=10, now=now)
    key = new_tls_key().public_key()
    assert authority.issue_site(key, "alder", 90, now).not_valid_after_utc == authority.certificate.not_valid_after_utc
    with pytest.raises(UserError, match="authority expired"):
        authority.issue_site(key, "alder", 90, now + 11 * DAY)


@pytest.mark.parametrize(
    "host",
    [
        "", " ", "https://fed.example.org", "fed.example.org:8443", "*.example.org", "-fed.example.org", "fed..org",
        "a" * 64,
        "fed_example.org", "klinikum-münchen.de", "10.0.0.300", "10.0.0", "0.0.0.0", "::", "224.0.0.1", "fe80::1%eth0",
        "fed.example.org\n", "x." * 127 + "org",
    ],
)  # fmt: skip
def test_what_is_no_host_is_refused(desk: Desk, host: str) -> None:
    """Neither a name nor an address: said before anything is signed."""
    with pytest.raises(UserError, match="host"):
        desk.server((host,))


def test_a_server_without_names_is_refused(desk: Desk) -> None:
    """The fault of hand-made kits: no subject alternative name."""
    with pytest.raises(UserError, match="SAN"):
        check_hosts([])
    with pytest.raises(UserError, match="SAN"):
        desk.server(())


def test_a_signing_request_is_checked() -> None:
    """The site's own name, an EC key of 256 or 384 bits, signed by that key; nothing in it but the key is used."""
    key = new_tls_key()
    good = signing_request(key, "alder")
    assert check_signing_request(good, "alder") == key.public_key()
    p384 = ec.generate_private_key(ec.SECP384R1())
    assert check_signing_request(signing_request(p384, "alder"), "alder") == p384.public_key()
    two_names = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in ("alder", "birch")])
    bad = {
        "not name exactly the site": signing_request(key, "birch"),
        "exactly": _csr(x509.CertificateSigningRequestBuilder().subject_name(two_names).sign(key, hashes.SHA256())),
        "not ECDSA": signing_request(ec.generate_private_key(ec.SECP521R1()), "alder"),
        "P-256 or": _csr(
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "alder")]))
            .sign(rsa.generate_private_key(65537, 2048), hashes.SHA256())
        ),
        "limit": good + "x" * 10_000,
        "no PEM certificate signing": good.replace("MII", "ZZZ", 1) if "MII" in good else "nothing",
        "no PEM": "",
        "PEM certificate": "ä",
    }
    for fault, text in bad.items():
        with pytest.raises(UserError, match=fault):
            check_signing_request(text, "alder")


def test_a_signing_request_that_was_changed_is_refused() -> None:
    """Any bit of its body: in the name, the key or the signature."""
    body = base64.b64decode("".join(signing_request(new_tls_key(), "alder").splitlines()[1:-1]))
    for position in range(len(body)):
        changed = bytearray(body)
        changed[position] ^= 1 << position % 8
        inner = base64.b64encode(changed).decode()
        with pytest.raises(UserError):
            check_signing_request(f"-----BEGIN {CSR}-----\n{inner}\n-----END {CSR}-----\n", "alder")


def _csr(request: x509.CertificateSigningRequest) -> str:
    return request.public_bytes(Encoding.PEM).decode()


def test_certificates_of_sites_are_told_from_others(desk: Desk, rival: Desk) -> None:
    """The right authority, site and purpose, or an error."""
    site = x509.load_pem_x509_certificate(desk.site().read_bytes())
    ca = desk.authority.certificate
    check_site_certificate(site, ca, "alder")
    server = x509.load_pem_x509_certificate(desk.server(("alder",)).read_bytes())
    for certificate, authority, name, fault in (
        (site, rival.authority.certificate, "alder", "not signed by"),
        (site, ca, "birch", "not of the site birch"),
        (server, ca, "alder", "client authentication"),
        (site, site, "alder", "not one of an authority"),
        (ca, ca, "certificate authority", "client authentication"),
    ):
        with pytest.raises(UserError, match=fault):
            check_site_certificate(certificate, authority, name)
    with pytest.raises(UserError, match="not one of an authority"):
        check_authority(server)


def test_the_authority_signs(desk: Desk, rival: Desk) -> None:
    """Its own signature over the very message, nobody else's."""
    ca = desk.authority.certificate
    assert signed_by_authority(ca, desk.authority.sign(b"kit"), b"kit")
    assert not signed_by_authority(ca, desk.authority.sign(b"kit"), b"kit ")
    assert not signed_by_authority(ca, rival.authority.sign(b"kit"), b"kit")
    assert not signed_by_authority(ca, b"", b"kit")


def test_the_revocation_list(desk: Desk) -> None:
    """Names the serials once, grows in number, stays in force as long as the authority."""
    text = desk.authority.revocation_list([5, 3, 5], 8)
    found = x509.load_pem_x509_crl(text)
    assert sorted(entry.serial_number for entry in found) == [3, 5]
    assert list_number(text) == 8
    assert list_number(b"nothing") == 0
    assert found.next_update_utc == desk.authority.certificate.not_valid_after_utc
    assert found.is_signature_valid(desk.authority.certificate.public_key())  # type: ignore[arg-type]


def test_it_is_read_back(desk: Desk, rival: Desk) -> None:
    """From its two files; a key of another authority, a damaged, missing or open one is refused."""
    key = desk.folder / "ca.key"
    key.touch(mode=0o600)
    key.write_bytes(desk.authority.key_pem())
    assert Authority.load(desk.ca, key).fingerprint == desk.authority.fingerprint
    assert Authority.load(desk.ca, key).federation == "demo"
    key.chmod(0o644)
    with pytest.raises(UserError, match="others than its owner"):
        Authority.load(desk.ca, key)
    key.chmod(0o600)
    for data, fault in ((rival.authority.key_pem(), "is not the key of"), (b"", "no private key")):
        key.write_bytes(data)
        with pytest.raises(UserError, match=fault):
            Authority.load(desk.ca, key)
    key.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        Authority.load(desk.ca, key)
