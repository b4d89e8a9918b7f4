"""The federation's certificate authority: who is the server, who is a site, who no longer is.

One authority, its key on the coordinator's machine, no intermediate (path length 0). It copies nothing out of a signing
request but the public key; names, dates and purposes are its own. ECDSA P-384 with SHA-384 throughout.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from client.certificates import (
    UNREADABLE,
    certificate_pem,
    key_fingerprint,
    name_in,
    private_pem,
    read_bytes,
    read_certificate,
    refuse_readable_by_others,
)
from medsegdiff.errors import UserError

CA_DAYS = 3650
MAX_SITE_DAYS = 90
MAX_SERVER_DAYS = 825  # Apple's and the browsers' old limit for a leaf; a server is renewed with one command
LOOPBACK = ("localhost", "127.0.0.1")  # the gateway and the SuperLink speak TLS with one another on one machine
AHEAD = timedelta(minutes=5)  # certificates are valid from a little earlier on: sites' clocks differ

_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


class Authority:
    """Certificate and key of the authority."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self._key = key

    @classmethod
    def create(cls, federation: str, days: float = CA_DAYS, now: datetime | None = None) -> Authority:
        """A new authority, which certifies for `federation` (the organisation in every certificate)."""
        key = ec.generate_private_key(ec.SECP384R1())
        name = _name(federation, "certificate authority")
        builder = _dated(_builder(name, name, key.public_key()), days, None, now)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        return cls(builder.sign(key, hashes.SHA384()), key)

    @classmethod
    def load(cls, certificate: Path, key: Path) -> Authority:
        """Read both files.

        Raises:
            UserError: one is missing or damaged, they do not belong together, or others may read the key.
        """
        found = read_certificate(certificate)
        refuse_readable_by_others(key)
        try:
            private = serialization.load_pem_private_key(read_bytes(key), None)
        except UNREADABLE as error:
            raise UserError(f"{key}: is no private key. Restore it from a backup.") from error
        if not isinstance(private, ec.EllipticCurvePrivateKey) or not _same_key(private.public_key(), found):
            raise UserError(f"{key}: is not the key of {certificate}. Restore both from a backup.")
        return cls(found, private)

    @property
    def federation(self) -> str:
        """The name it certifies for."""
        return name_in(self.certificate, NameOID.ORGANIZATION_NAME)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the certificate: what is compared on the phone."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def certificate_pem(self) -> bytes:
        """The certificate, which every site gets."""
        return certificate_pem(self.certificate)

    def key_pem(self) -> bytes:
        """The private key, which nobody gets."""
        return private_pem(self._key)

    def sign(self, message: bytes) -> bytes:
        """ECDSA signature (SHA-384, DER)."""
        return self._key.sign(message, ec.ECDSA(hashes.SHA384()))

    def issue_server(
        self, key: ec.EllipticCurvePublicKey, hosts: Sequence[str], days: float, now: datetime | None = None
    ) -> x509.Certificate:
        """A certificate for the server, reached by `hosts` and on its own machine by loopback.

        Raises:
            UserError: a host is no host name or IP address, there is none, or the authority has expired.
        """
        names = [_general_name(host) for host in dict.fromkeys((*check_hosts(hosts), *LOOPBACK))]
        builder = self._leaf(key, hosts[0][:64], ExtendedKeyUsageOID.SERVER_AUTH, days, now)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA384())

    def issue_site(
        self, key: ec.EllipticCurvePublicKey, site: str, days: float, now: datetime | None = None
    ) -> x509.Certificate:
        """A client certificate for `site` of at most 90 days.

        Raises:
            UserError: the authority has expired.
        """
        days = min(days, MAX_SITE_DAYS)
        return self._leaf(key, site, ExtendedKeyUsageOID.CLIENT_AUTH, days, now).sign(self._key, hashes.SHA384())

    def revocation_list(self, serials: Iterable[int], number: int, now: datetime | None = None) -> bytes:
        """A PEM revocation list, in force until the authority itself ends.

        A list with a date of its own would, once that passed unnoticed, have nginx turn every site away.

        Args:
            number: has to grow from list to list.
        """
        now = now or datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - AHEAD)
            .next_update(max(self.certificate.not_valid_after_utc, now + AHEAD))
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(self._authority_identifier(), critical=False)
        )
        for serial in sorted(set(serials)):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - AHEAD).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self._key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)

    def _leaf(
        self,
        key: ec.EllipticCurvePublicKey,
        common_name: str,
        purpose: x509.ObjectIdentifier,
        days: float,
        now: datetime | None,
    ) -> x509.CertificateBuilder:
        own = self.certificate
        builder = _builder(_name(self.federation, common_name), own.subject, key)
        builder = _dated(builder, days, own.not_valid_after_utc, now)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(digital_signature=True), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        return builder.add_extension(self._authority_identifier(), critical=False)

    def _authority_identifier(self) -> x509.AuthorityKeyIdentifier:
        identifier = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def check_hosts(hosts: Sequence[str]) -> tuple[str, ...]:
    """The names and addresses a server certificate is to hold.

    Raises:
        UserError: there is none, or one is neither a host name nor an IP address.
    """
    if not hosts:
        raise UserError(
            "0 host names were given; nothing was made. Name every host name or IP address by which sites reach the "
            "server: clients look at the subject alternative names (SAN) alone, and certificates made by hand without "
            "them are a known reason why no site can connect."
        )
    for host in hosts:
        _general_name(host)
    return tuple(hosts)


def _general_name(host: str) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        if address.is_unspecified or address.is_multicast or "%" in host:
            raise UserError(f"host {host!r}: no site can reach the server by it. Give the address that sites use.")
        return x509.IPAddress(address)
    labels = host.removesuffix(".").split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
        raise UserError(
            f"host {host[:80]!r} is neither a host name nor an IP address. Give it as sites type it, without https://, "
            "port and wildcard; a name with other letters than a-z in its xn-- form."
        )
    return x509.DNSName(host.removesuffix(".").lower())


def subject_line(site: str, federation: str) -> str:
    """A site certificate's subject as nginx gives it in $ssl_client_s_dn (RFC 2253)."""
    return f"CN={site},O={federation}"


def serial_of(certificate: x509.Certificate) -> str:
    """The serial in hex, as the register keeps it."""
    return f"{certificate.serial_number:x}"


def list_number(revocation_list: bytes) -> int:
    """The number of a PEM revocation list; 0 where it cannot be read."""
    try:
        found = x509.load_pem_x509_crl(revocation_list)
        return found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except (ValueError, x509.ExtensionNotFound):
        return 0


def _name(organisation: str, common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return builder.serial_number(x509.random_serial_number())


def _dated(
    builder: x509.CertificateBuilder, days: float, end: datetime | None, now: datetime | None
) -> x509.CertificateBuilder:
    """Valid for `days` in all, from up to 5 minutes ago (1 % of the days where they are few), and not beyond `end`."""
    now = (now or datetime.now(UTC)).replace(microsecond=0)
    length = timedelta(days=days)
    start = now - min(AHEAD, length / 100)
    if end is not None and end <= now:
        raise UserError(
            f"the federation's authority expired on {end:%Y-%m-%d}; nothing was signed. Make a new federation."
        )
    return builder.not_valid_before(start).not_valid_after(min(start + length, end or datetime.max.replace(tzinfo=UTC)))


def _key_usage(digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _same_key(key: ec.EllipticCurvePublicKey, certificate: x509.Certificate) -> bool:
    return key_fingerprint(key) == key_fingerprint(certificate.public_key())
