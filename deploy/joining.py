"""A hospital's side of belonging: its keys, its request, the kit that it gets for it.

    site         medsegfed join             keys are made there; NAME.request
    coordinator  medsegfed admit REQUEST    fingerprint compared on the phone; NAME.kit (admission.py)
    site         medsegfed join --kit FILE  fingerprint of the authority compared on the phone; installed

Private keys stay where they were made. What is cut short is simply done again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from client.certificates import certificate_pem, days_left, key_fingerprint, parse_certificate, read_certificate, spoken
from client.keys import Membership, SiteKeys
from deploy.authority import serial_of
from deploy.credentials import check_authority, check_site_certificate, signed_by_authority
from deploy.documents import Kit, compose_request, parse_kit, parse_request, read_document, signed_part, unhex
from deploy.site_guide import new_site_yaml
from medsegdiff.chained_log import AUDIT_LOG, ChainedLog
from medsegdiff.errors import UserError
from medsegdiff.files import FOLDER_NAME, write_atomic
from medsegdiff.strict import load_yaml
from server.members import MAX_PATIENTS

SITE_CONFIG = "site.yaml"

_SERVER = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9.-]{1,253}):([0-9]{1,5})")


@dataclass(frozen=True)
class Joining:
    """What `make_request` did."""

    request: Path
    new_keys: bool
    new_config: Path | None  # site.yaml, where it was written
    fingerprint: str  # of the request
    lines: list[str]  # for a person


@dataclass(frozen=True)
class Installed:
    """What `install_kit` did."""

    membership: Membership
    ca_fingerprint: str
    days_left: float  # of the site's certificate
    lines: list[str]  # for a person


def make_request(site_folder: Path, name: str, patients: int) -> Joining:
    """Make the site's keys where there are none, site.yaml likewise, and NAME.request.

    Existing keys are kept: asked again, the site makes the same request again.

    Args:
        patients: training patients, the largest weight that the site's updates may claim.

    Raises:
        UserError: the name cannot be one, site.yaml is of another site or without keys, or the keys are not sound.
    """
    if not FOLDER_NAME.fullmatch(name):
        raise UserError(
            f"site name {name[:80]!r} cannot be used; nothing was made. Take 1 to 64 letters, digits, '-', '_' and "
            "'.', beginning with a letter or digit."
        )
    if not 1 <= patients <= MAX_PATIENTS:
        raise UserError(f"{patients:,} training patients: give a number in 1..{MAX_PATIENTS:,}. Nothing was made.")
    config = site_folder / SITE_CONFIG
    is_new = not config.exists()
    folder = site_folder / ("keys" if is_new else keys_folder(config, name))
    has_keys = folder.is_dir() and any(folder.iterdir())
    keys = SiteKeys.load(folder) if has_keys else SiteKeys.create(folder)
    if is_new:
        write_atomic(config, new_site_yaml(name).encode())
    path = site_folder / f"{name}.request"
    write_atomic(path, compose_request(keys, name, patients, version("medsegfed")))
    request = parse_request(read_document(path), str(path))
    lines = [
        f"Keys: {folder} ({'made now' if not has_keys else 'those that were there'}; mode 0600, they stay here)",
        *([f"Configuration: {config} (look through it: data folder, policy)"] if is_new else []),
        *request.lines(),
        f"Send {path} to the coordinator and read them the fingerprint on the phone. With the kit that comes back: "
        "medsegfed join --kit FILE",
    ]
    return Joining(path, not has_keys, config if is_new else None, request.fingerprint, lines)


def keys_folder(config: Path, name: str | None = None) -> str:
    """`keys` of a site.yaml, looked at without all that the rest of it needs.

    Raises:
        UserError: it is of another site than `name`, or names no keys.
    """
    data = load_yaml(config)
    data = data if isinstance(data, dict) else {}
    if name is not None and data.get("name") != name:
        raise UserError(
            f"{config}: is of the site {data.get('name')!r}, not {name!r}; nothing was made. Use that name, or another "
            "--folder."
        )
    if not isinstance(keys := data.get("keys"), str) or not keys:
        raise UserError(f"{config}: names no folder for the site's keys; nothing was done. Add a line: keys: keys")
    return keys


def open_keys(site_folder: Path) -> SiteKeys:
    """The keys of the site in a folder. Raises UserError where there are none."""
    config = site_folder / SITE_CONFIG
    if not config.is_file():
        raise UserError(
            f"{site_folder}: holds no {SITE_CONFIG}. Name the site's folder with --folder; or run medsegfed join."
        )
    return SiteKeys.load(site_folder / keys_folder(config))


def install_kit(
    site_folder: Path,
    kit_path: Path,
    replace: bool = False,
    ca_fingerprint: str | None = None,
    now: datetime | None = None,
) -> Installed:
    """Check a kit against the site's keys and put it in place, all of it or nothing.

    That the authority in the kit is the federation's own only the phone can tell: compare `ca_fingerprint` of the
    result, or give the one that was read out.

    Args:
        replace: leave the federation that the site belongs to for the kit's.
        ca_fingerprint: hex SHA-256, blanks and colons allowed; the kit's authority must have it.

    Raises:
        UserError: says what does not fit; nothing was changed.
    """
    keys = open_keys(site_folder)
    kit, ca, certificate = _check_kit(kit_path, read_document(kit_path))
    own = str(load_yaml(site_folder / SITE_CONFIG)["name"])
    if kit.site != own:
        raise _no_kit(kit_path, f"is for the site {kit.site}, and this is {own}. Ask for the kit of {own}")
    found = ca.fingerprint(hashes.SHA256()).hex()
    if ca_fingerprint is not None and re.sub(r"[\s:]", "", ca_fingerprint).lower() != found:
        raise _no_kit(
            kit_path,
            f"is of an authority with the fingerprint {spoken(found)}, not the one that was read out. Perhaps somebody "
            "changed the kit on its way: phone the coordinator",
        )
    prints = keys.fingerprints()
    if key_fingerprint(certificate.public_key()) != prints["tls"]:
        raise _no_kit(kit_path, "certifies another TLS key than the one here. Run medsegfed join and send the request")
    if (kit.node_fingerprint, kit.signing_fingerprint) != (prints["node"], prints["signing"]):
        raise _no_kit(kit_path, "was made for other keys than those here. Run medsegfed join and send the request")
    _check_dates(kit_path, certificate, now or datetime.now(UTC))
    if keys.ca_file.exists() and not replace and read_certificate(keys.ca_file) != ca:
        raise _no_kit(
            kit_path,
            f"is of another authority than that of {keys.membership().federation}, where this site belongs. To leave "
            "that federation for this one, compare the fingerprint on the phone and repeat with --replace",
        )
    membership = Membership(kit.federation, kit.site, kit.server)
    keys.install(membership, certificate_pem(ca), certificate_pem(certificate))
    ChainedLog(site_folder / AUDIT_LOG).append(
        "kit_installed", federation=kit.federation, server=kit.server, ca=found, serial=serial_of(certificate)
    )
    left = days_left(certificate, now)
    lines = [
        f"federation   {kit.federation}, server {kit.server}",
        f"certificate  {kit.site}, {left:.0f} days left"
        if left >= 2
        else f"certificate  {kit.site}, {left:.3g} days left",
        f"authority    {spoken(found)}",
        "Compare the authority's fingerprint with the coordinator's on the phone. Then run: medsegfed doctor",
    ]
    return Installed(membership, found, left, lines)


def _check_kit(path: Path, data: dict[str, object]) -> tuple[Kit, x509.Certificate, x509.Certificate]:
    """A kit that holds together: signed by the authority in it, which certifies the site in it."""
    kit = parse_kit(data, str(path))
    try:
        ca = parse_certificate(kit.ca.encode())
        certificate = parse_certificate(kit.certificate.encode())
    except ValueError as error:
        raise _no_kit(path, "holds no readable certificates. Ask for it again") from error
    try:
        check_authority(ca)
        if not signed_by_authority(ca, unhex(kit.signature), signed_part(data)):
            raise UserError("its signature is not the authority's: it was changed on its way.")
        check_site_certificate(certificate, ca, kit.site)
    except UserError as error:
        raise _no_kit(path, f"{str(error).removesuffix('.')}. Ask for it again") from error
    server = _SERVER.fullmatch(kit.server)
    if server is None or not 1 <= int(server[2]) <= 65_535:
        raise _no_kit(path, f"names {kit.server[:80]!r} as the server, which is no host:port. Ask for it again")
    if not FOLDER_NAME.fullmatch(kit.site) or not FOLDER_NAME.fullmatch(kit.federation):
        raise _no_kit(path, "has a name in it that cannot be one. Ask for it again")
    return kit, ca, certificate


def _check_dates(path: Path, certificate: x509.Certificate, now: datetime) -> None:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < start:
        raise _no_kit(
            path,
            f"has a certificate that is not valid before {start:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} "
            "UTC here. Set this machine's clock (NTP), then repeat",
        )
    if now >= end:
        raise _no_kit(
            path,
            f"has a certificate that expired on {end:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} UTC here. If "
            "this machine's clock is right, run medsegfed join and send the request again",
        )


def _no_kit(path: Path, fault: str) -> UserError:
    return UserError(f"{path}: {fault}. Nothing was installed.")
