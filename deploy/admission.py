"""The coordinator's side of belonging: a request becomes a kit, a member becomes a stranger."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from client.certificates import certificate_pem, public_fingerprints, read_certificate, spoken
from deploy.authority import Authority, list_number, serial_of
from deploy.credentials import certified_hosts, check_signing_request
from deploy.documents import FORMAT, KIT, Request, document, parse_request, read_document, signed_part
from deploy.federation import Federation
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from server.members import MAX_PATIENTS, Member, edit_members, iso, unexpired


def read_request(path: Path) -> Request:
    """A checked request, for a person to look at and to compare its fingerprint. Raises UserError."""
    return parse_request(read_document(path), str(path))


def admit(
    federation: Federation,
    request_path: Path,
    patients: int | None = None,
    fingerprint: str | None = None,
    now: datetime | None = None,
) -> Path:
    """Sign a request into a kit and enter the site into the register.

    A site that is admitted already, with the same keys, gets a new certificate and kit.

    Args:
        patients: the largest weight for the site, in place of what it asks.
        fingerprint: the request must have it (hex, blanks and colons allowed): what was read out on the phone.

    Returns:
        The kit's path.

    Raises:
        UserError: the request or the register speaks against it; nobody was admitted.
    """
    now = now or datetime.now(UTC)
    request = read_request(request_path)
    if fingerprint is not None and re.sub(r"[\s:]", "", fingerprint).lower() != request.fingerprint:
        raise UserError(
            f"{request_path}: has the fingerprint {spoken(request.fingerprint)}, not the one that was read out; "
            "nothing was admitted. Somebody may have changed it on its way: have the site send it again."
        )
    if patients is not None and not 1 <= patients <= MAX_PATIENTS:
        raise UserError(f"{patients:,} training patients: give a number in 1..{MAX_PATIENTS:,}. Nothing was admitted.")
    patients = patients or request.patients
    authority = federation.authority()
    _check_server(federation)
    with edit_members(federation.members_file) as members:
        known = _check_conflicts(members, request, str(request_path))
        key = check_signing_request(request.csr, request.site)
        certificate = authority.issue_site(key, request.site, federation.config.site_days, now)
        members[request.site] = _entry(known, request, patients, certificate, now)
        write_atomic(federation.requests / f"{request.site}.request", request_path.read_bytes())
        federation.audit().append(
            "site_admitted",
            site=request.site,
            request=request.fingerprint,
            node_key=request.node_key,
            signing_key=request.signing_key,
            patients=patients,
            serial=serial_of(certificate),
            not_after=iso(certificate.not_valid_after_utc),
        )
    path = federation.kit(request.site)  # after the register, which knows of every certificate that leaves
    try:
        write_atomic(path, _kit(federation, authority, request, certificate, now))
    except UserError as error:
        raise UserError(
            f"{error} {request.site} is admitted, but its kit is not written: mend that and admit the same request"
            " again."
        ) from error
    return path


def _check_server(federation: Federation) -> None:
    """The address in the kit must be in the server's certificate, or no site that gets it can connect."""
    host = federation.config.hosts[0]
    if host.removesuffix(".").lower() not in certified_hosts(read_certificate(federation.server_crt)):
        raise UserError(
            f"{federation.config_file}: hosts begins with {host}, which is not in the server's certificate; nothing "
            f"was admitted. Run: medsegfed renew --folder {federation.folder}"
        )


def _check_conflicts(members: Mapping[str, Member], request: Request, source: str) -> Member | None:
    """The site's entry, if it has one. Raises UserError where the register speaks against the request."""
    for name, other in members.items():
        if name == request.site:
            continue
        if name.lower() == request.site.lower():
            raise UserError(
                f"{source}: the name {request.site} and that of the member {name} differ in capitals alone; nothing "
                "was admitted. Have the site take another name."
            )
        if {request.node_key, request.signing_key} & {other.node_key, other.signing_key, *other.retired}:
            raise UserError(
                f"{source}: its keys are those of {name}; nothing was admitted. A key belongs to one site: have "
                f"{request.site} move its keys folder away and run medsegfed join again."
            )
    known = members.get(request.site)
    if known is None:
        return None
    same = (request.node_key, request.signing_key) == (known.node_key, known.signing_key)
    if known.status != "revoked" and not same:
        raise UserError(
            f"{source}: {request.site} is {known.status} with other keys (since {known.admitted}); nothing was "
            f"admitted. If the site lost its keys, run medsegfed revoke {request.site}, then admit it again; if not, "
            "somebody else asks in its name."
        )
    returning = {known.node_key, known.signing_key} if known.status == "revoked" else set()
    if {request.node_key, request.signing_key} & {*returning, *known.retired}:
        raise UserError(
            f"{source}: its keys were revoked, and revoked keys do not return; nothing was admitted. Have "
            f"{request.site} move its keys folder away and run medsegfed join again."
        )
    return known


def _entry(
    known: Member | None, request: Request, patients: int, certificate: x509.Certificate, now: datetime
) -> Member:
    """The register's entry of a site that is admitted, for the first time or again."""
    serial, not_after = serial_of(certificate), iso(certificate.not_valid_after_utc)
    entry = Member(
        request.site, request.node_key, request.signing_key, patients, serial, not_after, "admitted", iso(now)
    )
    if known is None:
        return entry
    if known.status == "revoked":
        retired = (*known.retired, known.node_key, known.signing_key)
        return replace(entry, revoked=unexpired(known.revoked, now), retired=retired)
    return replace(
        known, patients=patients, serial=serial, not_after=not_after, earlier=known.certificates(now),
        revoked=unexpired(known.revoked, now),
    )  # fmt: skip


def _kit(
    federation: Federation, authority: Authority, request: Request, certificate: x509.Certificate, now: datetime
) -> bytes:
    prints = public_fingerprints(request.node_key, request.signing_key)
    said = {
        "kind": KIT,
        "format": FORMAT,
        "federation": federation.name,
        "site": request.site,
        "server": federation.server,
        "ca": authority.certificate_pem().decode(),
        "certificate": certificate_pem(certificate).decode(),
        "node_fingerprint": prints["node"],
        "signing_fingerprint": prints["signing"],
        "issued": iso(now),
    }
    return document({**said, "signature": authority.sign(signed_part(said)).hex()})


def revoke(federation: Federation, site: str, reason: str, now: datetime | None = None) -> Member:
    """Shut a site out: its entry, its keys for good, and all its certificates that have not expired.

    Done again it changes nothing but the list's number. The gateway learns of it from the register and the list.

    Raises:
        UserError: there is no such site, or the disk refuses.
    """
    now = now or datetime.now(UTC)
    reason = " ".join(reason.split())
    if not reason or len(reason) > 200:
        raise UserError(
            f"a reason of {len(reason)} characters; nothing was revoked. Say in 1 to 200 why, for the audit log."
        )
    authority = federation.authority()
    with edit_members(federation.members_file) as members:
        if site not in members:
            raise UserError(
                f"there is no site {site[:80]!r}; nothing was revoked. Members: {', '.join(members) or 'none yet'}."
            )
        known = members[site]
        revoked = {**unexpired(known.revoked, now), **known.certificates(now)}
        members[site] = replace(known, status="revoked", earlier={}, revoked=revoked)
        write_revocations(federation, authority, members, now)  # first: should the rest fail, the site is out already
    federation.audit().append("site_revoked", site=site, reason=reason, serials=sorted(revoked), was=known.status)
    return members[site]


def lift(federation: Federation, site: str) -> Member:
    """Let a suspended site take part again, with the keys and certificates it has.

    Raises:
        UserError: there is no such site, it is not suspended, or the disk refuses.
    """
    with edit_members(federation.members_file) as members:
        if site not in members:
            raise UserError(
                f"there is no site {site[:80]!r}; nothing was lifted. Members: {', '.join(members) or 'none yet'}."
            )
        if members[site].status != "suspended":
            back = " It comes back with new keys: medsegfed join." if members[site].status == "revoked" else ""
            raise UserError(f"{site} is {members[site].status}, not suspended; nothing was lifted.{back}")
        members[site] = replace(members[site], status="admitted")
    federation.audit().append("site_lifted", site=site)
    return members[site]


def write_revocations(
    federation: Federation, authority: Authority, members: Mapping[str, Member], now: datetime
) -> None:
    """The revocation list, from all that the register knows. Inside `edit_members`: its number has to grow."""
    serials = {serial for member in members.values() for serial in unexpired(member.revoked, now)}
    path = federation.ca_crl
    number = list_number(path.read_bytes()) + 1 if path.exists() else 1
    write_atomic(path, authority.revocation_list([int(serial, 16) for serial in serials], number, now))
