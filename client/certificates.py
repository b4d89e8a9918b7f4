"""Forms that keys and certificates take, and how long a certificate lasts. Holds no state and no secrets."""

from __future__ import annotations

import base64
import hashlib
import ssl
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from medsegdiff.errors import UserError

WARNING_DAYS = (30, 7, 1)  # days left on a certificate at which a warning is due

# What `cryptography` raises on bytes that are no certificate, signing request or key, or not one that it knows.
UNREADABLE = (
    ValueError,
    TypeError,
    NotImplementedError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


def new_tls_key() -> ec.EllipticCurvePrivateKey:
    """A key for TLS: P-256, which every TLS library does fastest."""
    return ec.generate_private_key(ec.SECP256R1())


def signing_request(key: ec.EllipticCurvePrivateKey, site: str) -> str:
    """A PEM certificate signing request for `site` (its common name)."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, site)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    """A private key as PKCS #8 PEM, not encrypted: the file's mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_fingerprint(key: PublicKeyTypes) -> str:
    """Hex SHA-256 of a public key (DER SubjectPublicKeyInfo)."""
    data = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(data).hexdigest()


def public_fingerprints(node_public_ssh: str, signing_public: str) -> dict[str, str]:
    """`SiteKeys.fingerprints` of the keys that the coordinator knows. Raises ValueError where one is none."""
    signing = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signing_public))
    return {"node": key_fingerprint(load_node_key(node_public_ssh)), "signing": key_fingerprint(signing)}


def spoken(fingerprint: str) -> str:
    """A fingerprint in groups of four, to be read out on the phone."""
    return " ".join(fingerprint[start : start + 4] for start in range(0, len(fingerprint), 4))


def openssh_line(key: ec.EllipticCurvePublicKey) -> str:
    """A public key as one OpenSSH line, without a comment."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode("ascii")


def load_node_key(node_public_ssh: str) -> ec.EllipticCurvePublicKey:
    """The public node key of one OpenSSH line.

    Raises:
        ValueError: not an ECDSA P-384 key in exactly the form that `SiteKeys.node_public_ssh` gives (no comment).
    """
    try:
        key = serialization.load_ssh_public_key(node_public_ssh.encode("ascii"))
    except UNREADABLE as error:
        raise ValueError("the node key is no OpenSSH public key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("the node key is not an ECDSA P-384 key")
    if openssh_line(key) != node_public_ssh:
        raise ValueError("the node key is not in plain form (type and base64, one space, no comment)")
    return key


def node_key_header(node_public_ssh: str) -> str:
    """The value of Flower's `flwr-public-key` header for a node key: base64 of its PEM SubjectPublicKeyInfo.

    flwr 1.41: `NodeAuthHttpInterceptor` sends b64encode(public_key_to_bytes(key)). The gateway ties each certificate to
    this text.
    """
    pem = load_node_key(node_public_ssh).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return base64.b64encode(pem).decode("ascii")


def parse_certificate(pem: bytes) -> x509.Certificate:
    """The first certificate in PEM text, all parts of it readable. Raises ValueError."""
    try:
        found = x509.load_pem_x509_certificate(pem)
        # cryptography reads these when they are asked for; later it would be too late.
        _ = found.subject, found.public_key(), found.extensions, found.not_valid_before_utc, found.not_valid_after_utc
    except UNREADABLE as error:
        raise ValueError(f"no readable certificate ({type(error).__name__})") from error
    return found


def read_certificate(path: Path) -> x509.Certificate:
    """The first certificate of a PEM file, which may hold a key before it.

    Raises:
        UserError: there is no such file, or no certificate in it.
    """
    try:
        return parse_certificate(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path}: holds no certificate that can be read. Install it anew.") from error


def load_pair(context: ssl.SSLContext, path: Path) -> None:
    """Have a TLS context use the key and the certificate in one PEM file, which a renewal may replace at any moment.

    OpenSSL opens the file twice, for the certificate and for the key, and a rename may fall between the two. So the
    file is opened once here, and OpenSSL is given that open file (Linux: /proc/self/fd), which stays the old pair
    however often the path is renamed over.

    Raises:
        OSError, ssl.SSLError: the file cannot be read, or holds no such pair.
    """
    with path.open("rb") as pair:
        pinned = Path(f"/proc/self/fd/{pair.fileno()}")
        context.load_cert_chain(pinned if pinned.exists() else path)


def days_left(certificate: x509.Certificate, now: datetime | None = None) -> float:
    """Days, with their fraction, until a certificate expires; negative afterwards."""
    return (certificate.not_valid_after_utc - (now or datetime.now(UTC))).total_seconds() / 86_400


def certificate_days_left(path: Path, now: datetime | None = None) -> float:
    """`days_left` of the certificate in a PEM file. Raises UserError when there is none."""
    return days_left(read_certificate(path), now)


def expiry_warning(days: float) -> int | None:
    """Which of the warnings (30, 7, 1 days) is due with `days` left, if any. An expired certificate stays at 1."""
    return min((limit for limit in WARNING_DAYS if days <= limit), default=None)


def name_in(certificate: x509.Certificate, which: x509.ObjectIdentifier) -> str:
    """One part of a certificate's subject; empty where it does not stand there exactly once."""
    found = certificate.subject.get_attributes_for_oid(which)
    return str(found[0].value) if len(found) == 1 else ""


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def read_bytes(path: Path) -> bytes:
    """A file's bytes; UserError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the path and its rights.") from error


def refuse_readable_by_others(path: Path) -> None:
    """A secret, or a folder of secrets, that others than its owner may read or change is not used: UserError."""
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Restore it from a backup.") from error
    if mode & 0o077:
        wanted = "700" if path.is_dir() else "600"
        raise UserError(
            f"{path}: may be read or changed by others than its owner (mode {mode:o}); nothing was done with it. Run "
            f"chmod {wanted} {path}; where somebody may have copied it, make new keys."
        )
