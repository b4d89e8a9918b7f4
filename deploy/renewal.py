"""New certificates before the old ones end, without a new kit and without losing a round.

The site makes a new TLS key, asks over the connection that its present certificate opens, and swaps key and certificate
in one step. The server enters the new certificate into the register; the one before stays valid until it expires, so
that connections which still use it go on. Asked for the same key again, because its answer was lost on the way, the
server gives the same certificate again.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.certificates import (
    UNREADABLE,
    certificate_pem,
    days_left,
    key_fingerprint,
    parse_certificate,
    read_bytes,
    read_certificate,
    refuse_readable_by_others,
    signing_request,
)
from client.keys import SiteKeys
from deploy.authority import serial_of
from deploy.credentials import check_signing_request, check_site_certificate
from deploy.documents import (
    FORMAT,
    LARGEST,
    RENEWAL,
    RENEWED,
    Renewal,
    document,
    parse_document,
    parse_renewal,
    signed_by,
    signed_part,
)
from deploy.federation import Federation
from deploy.joining import open_keys
from medsegdiff.chained_log import AUDIT_LOG, ChainedLog
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from server.members import Member, edit_members, iso, moment, unexpired

ROUTE = "/v1/medsegfed/renew"
CLOCK_SECONDS = 300.0  # that the clocks of site and server may differ by; Flower's own limit
MOST_CERTIFICATES = 16  # of one site at a time: a site that renews without end would fill the register
SECONDS = 30.0  # for each step of the connection


class RenewalRefused(UserError):
    """The server will not renew; its text is sent to the site and names nothing that the site did not."""


@dataclass(frozen=True)
class Renewed:
    """A site's new certificate."""

    serial: str
    not_after: datetime
    days_left: float

    def line(self) -> str:
        """For a person."""
        return (
            f"Renewed until {self.not_after:%Y-%m-%d %H:%M} UTC ({self.days_left:.4g} days); nothing need be restarted."
        )


def renewal_due(certificate: x509.Certificate, now: datetime | None = None) -> bool:
    """Whether less than a third of a certificate's time is left: 30 of 90 days."""
    length = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return days_left(certificate, now) < length.total_seconds() / 86_400 / 3


def renew_site(site_folder: Path, now: datetime | None = None) -> Renewed:
    """Get the site a new TLS key and certificate from its federation's server; HTTPS_PROXY is honoured.

    Raises:
        UserError: the certificate has expired, the server cannot be reached, or it refuses; the present key and
            certificate stay as they are.
    """
    keys = open_keys(site_folder)
    membership, present = keys.membership(), keys.certificate()
    left = days_left(present, now)
    if left <= 0:
        raise UserError(
            f"{membership.site}: its certificate expired on {present.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and only "
            "a valid one can be renewed over the network. Run medsegfed join and send the request to the coordinator; "
            "the keys stay."
        )
    key = keys.next_key()
    said = {
        "kind": RENEWAL,
        "format": FORMAT,
        "site": membership.site,
        "csr": signing_request(key, membership.site),
        "time": iso(now or datetime.now(UTC)),
    }
    answer = _post(keys, document({**said, "signature": keys.sign(signed_part(said)).hex()}), left)
    certificate = _check_answer(keys, key, answer, now or datetime.now(UTC))
    keys.replace_pair(key, certificate_pem(certificate))
    serial, end = serial_of(certificate), certificate.not_valid_after_utc
    ChainedLog(site_folder / AUDIT_LOG).append("certificate_renewed", serial=serial, not_after=iso(end))
    return Renewed(serial, end, days_left(certificate, now))


def _post(keys: SiteKeys, body: bytes, left: float) -> bytes:
    """Send a renewal and take the server's answer. Raises UserError."""
    membership = keys.membership()
    stays = f"The present certificate is valid for another {left:.3g} days"
    try:
        with (
            httpx.Client(verify=keys.tls_context(), timeout=SECONDS, follow_redirects=False) as client,
            client.stream(
                "POST",
                f"https://{membership.server}{ROUTE}",
                content=body,
                headers={"content-type": "application/json"},
            ) as response,
        ):
            answer = b""
            for piece in response.iter_raw():
                answer += piece
                if len(answer) > LARGEST:
                    break
            status = response.status_code
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise UserError(
            f"{membership.server}: could not be asked to renew ({type(error).__name__}: {_plain(str(error))}). "
            f"{stays}. See what is in the way with medsegfed doctor, then repeat medsegfed renew."
        ) from error
    if status != 200:
        raise UserError(
            f"{membership.server}: the certificate was not renewed, the server answered {status} "
            f"({_reason(answer)}). {stays}. Ask the coordinator."
        )
    return answer


def _check_answer(keys: SiteKeys, key: ec.EllipticCurvePrivateKey, answer: bytes, now: datetime) -> x509.Certificate:
    """The certificate in the server's answer, which must be of the site, for the new key and by its own authority."""
    membership = keys.membership()
    try:
        data = parse_document(answer, "the server's answer")
        if data.get("kind") != RENEWED or not isinstance(pem := data.get("certificate"), str):
            raise UserError("the answer holds no certificate.")
        certificate = parse_certificate(pem.encode())
        check_site_certificate(certificate, read_certificate(keys.ca_file), membership.site)
        if key_fingerprint(certificate.public_key()) != key_fingerprint(key.public_key()):
            raise UserError("the certificate is for another key.")
        if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
            raise UserError(
                f"the certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
                f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} here: set the "
                "clock."
            )
    except (UserError, ValueError) as error:
        raise UserError(
            f"{membership.server}: its answer cannot be used ({_plain(str(error)).removesuffix('.')}); the present "
            "certificate stays in use. Ask the coordinator."
        ) from error
    return certificate


def answer_renewal(
    federation: Federation, site_of_client_certificate: str, body: bytes, now: datetime | None = None
) -> bytes:
    """The server's side of `renew_site`.

    Args:
        site_of_client_certificate: common name of the verified certificate that the connection was made with.
        body: what the site sent.

    Returns:
        The answer's body, JSON with the new certificate.

    Raises:
        RenewalRefused: the request speaks against itself or the register against it; nothing was signed.
        UserError: the server's own files are not sound.
    """
    now = now or datetime.now(UTC)
    request, key = _check_renewal(site_of_client_certificate, body, now)
    authority = federation.authority()
    with edit_members(federation.members_file) as members:
        member = members.get(request.site)
        _check_standing(member, request, body)
        assert member is not None, "checked above"
        given = federation.renewals / f"{request.site}.json"
        if (answer := _given_before(given, key, member, now)) is not None:
            return answer
        _check_count(member, now)
        certificate = authority.issue_site(key, request.site, federation.config.site_days, now)
        serial, not_after = serial_of(certificate), iso(certificate.not_valid_after_utc)
        members[request.site] = replace(
            member,
            serial=serial,
            not_after=not_after,
            earlier=member.certificates(now),
            revoked=unexpired(member.revoked, now),
        )
        federation.audit().append("site_renewed", site=request.site, serial=serial, not_after=not_after)
    answer = document({"kind": RENEWED, "format": FORMAT, "certificate": certificate_pem(certificate).decode()})
    with contextlib.suppress(UserError):  # a full disk: should this answer be lost, the next one is another certificate
        write_atomic(given, answer)
    return answer


def _given_before(path: Path, key: ec.EllipticCurvePublicKey, member: Member, now: datetime) -> bytes | None:
    """The answer that the site was given last, if it is of this key and its certificate still is the site's."""
    try:
        answer = path.read_bytes()
        certificate = parse_certificate(str(parse_document(answer, "the last renewal")["certificate"]).encode())
    except (OSError, UserError, ValueError, KeyError):
        return None  # there was none, or it was damaged: a new one does as well
    same = key_fingerprint(certificate.public_key()) == key_fingerprint(key)
    return answer if same and serial_of(certificate) in member.certificates(now) else None


def _check_renewal(site: str, body: bytes, now: datetime) -> tuple[Renewal, ec.EllipticCurvePublicKey]:
    """A renewal's form, site, time and signing request."""
    try:
        request = parse_renewal(parse_document(body, "the renewal"), "the renewal")
        if request.site != site:
            raise UserError("the renewal is not for the site whose certificate opened the connection.")
        behind = (now - moment(request.time)).total_seconds()
        if abs(behind) > CLOCK_SECONDS:
            raise UserError(
                f"the site's clock is {abs(behind):,.0f} s {'behind' if behind > 0 else 'ahead of'} the server's; "
                f"{CLOCK_SECONDS:.0f} s are allowed. Set it by NTP."
            )
        key = check_signing_request(request.csr, site)
    except (UserError, ValueError) as error:
        raise RenewalRefused(str(error)) from error
    return request, key


def _check_standing(member: Member | None, request: Renewal, body: bytes) -> None:
    """The register's word on a renewal."""
    if member is None or not member.active:
        raise RenewalRefused(f"{request.site} is {member.status if member else 'not a member'}. Ask the coordinator.")
    if not signed_by(member.signing_key, request.signature, signed_part(parse_document(body, "the renewal"))):
        raise RenewalRefused("the renewal is not signed by the site's enrolled key. Ask the coordinator.")


def _check_count(member: Member, now: datetime) -> None:
    """A site has so many certificates at a time and no more."""
    count = len(member.certificates(now))
    if count >= MOST_CERTIFICATES:
        raise RenewalRefused(
            f"{member.site} has {count} certificates that have not expired, the most that are given out. Renew less "
            "often."
        )


def renew_server(federation: Federation, now: datetime | None = None) -> x509.Certificate:
    """A new certificate for the server's key, with the hosts that federation.yaml names now; one file is replaced.

    The running gateway takes it up when it is reloaded; sites need nothing, they know the authority.

    Raises:
        UserError: the key or the authority is missing or damaged; the old certificate stays.
    """
    refuse_readable_by_others(federation.server_key)
    try:
        key = serialization.load_pem_private_key(read_bytes(federation.server_key), None)
    except UNREADABLE as error:
        raise UserError(f"{federation.server_key}: is no private key. Restore it from a backup.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{federation.server_key}: is not an ECDSA key. Restore it from a backup.")
    config = federation.config
    certificate = federation.authority().issue_server(key.public_key(), config.hosts, config.server_days, now)
    write_atomic(federation.server_crt, certificate_pem(certificate))
    federation.audit().append(
        "server_renewed",
        hosts=list(config.hosts),
        serial=serial_of(certificate),
        not_after=iso(certificate.not_valid_after_utc),
    )
    return certificate


def _reason(answer: bytes) -> str:
    """Why the server refused: {"reason": ...}, or whatever something between the two answered."""
    text = answer.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(text)
        text = str(said["reason"]) if isinstance(said, dict) and "reason" in said else text
    return _plain(text) or "without a word"


def _plain(text: str) -> str:
    """At most 300 printable characters of a text that anybody on the network may have written."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text[:300]).split())
