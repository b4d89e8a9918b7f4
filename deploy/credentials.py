"""What others present - signing requests, certificates, signatures of an authority - and whether it is sound."""

from __future__ import annotations

from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from client.certificates import UNREADABLE, name_in
from medsegdiff.errors import UserError

MAX_SIGNING_REQUEST = 8192  # characters; one for P-384 has 500

_CURVES = (ec.SECP256R1, ec.SECP384R1)

E = TypeVar("E", bound=x509.ExtensionType)


def check_signing_request(text: str, site: str) -> ec.EllipticCurvePublicKey:
    """The public key of a PEM signing request that `site` made itself.

    Raises:
        UserError: says what is wrong with the request.
    """
    if len(text) > MAX_SIGNING_REQUEST:
        raise UserError(f"the signing request has {len(text):,} characters; {MAX_SIGNING_REQUEST:,} are the limit.")
    try:
        request = x509.load_pem_x509_csr(text.encode("ascii"))
        signed, names = request.is_signature_valid, request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        key = request.public_key()
    except UNREADABLE as error:
        raise UserError("the signing request is no PEM certificate signing request.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise UserError("the signing request is for a key that is not ECDSA P-256 or P-384.")
    if not signed:
        raise UserError("the signing request is not signed by the key it is for.")
    if [name.value for name in names] != [site]:
        raise UserError(f"the signing request does not name exactly the site {site}.")
    return key


def check_site_certificate(certificate: x509.Certificate, ca: x509.Certificate, site: str) -> None:
    """That `ca` certifies this `site`, as a client and for no other use; dates are looked at elsewhere.

    Raises:
        UserError: says what is wrong.
    """
    check_authority(ca)
    try:
        certificate.verify_directly_issued_by(ca)
    except (*UNREADABLE, InvalidSignature) as error:
        raise UserError("the certificate is not signed by the federation's authority.") from error
    found = name_in(certificate, NameOID.COMMON_NAME), name_in(certificate, NameOID.ORGANIZATION_NAME)
    if found != (site, name_in(ca, NameOID.ORGANIZATION_NAME)):
        raise UserError(f"the certificate is of {found[0]!r} in {found[1]!r}, not of the site {site}.")
    purposes = _extension(certificate, x509.ExtendedKeyUsage)
    if purposes is None or list(purposes) != [ExtendedKeyUsageOID.CLIENT_AUTH]:
        raise UserError("the certificate is not one for a site (client authentication).")


def check_authority(ca: x509.Certificate) -> None:
    """That a certificate is one of an authority, signed by itself. Raises UserError."""
    limits, usage = _extension(ca, x509.BasicConstraints), _extension(ca, x509.KeyUsage)
    try:
        ca.verify_directly_issued_by(ca)
        sound = limits is not None and limits.ca and usage is not None and usage.key_cert_sign
    except (*UNREADABLE, InvalidSignature):
        sound = False
    if not sound:
        raise UserError("the authority's certificate is not one of an authority.")


def signed_by_authority(ca: x509.Certificate, signature: bytes, message: bytes) -> bool:
    """Whether the authority signed `message`."""
    key = ca.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    try:
        key.verify(signature, message, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def certified_hosts(certificate: x509.Certificate) -> set[str]:
    """The host names and addresses in a server certificate."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except (*UNREADABLE, x509.ExtensionNotFound):
        return None
