"""What site and coordinator hand each other: requests, kits, renewals. Small JSON documents, signed, holding no secret.

A signature covers the canonical JSON of all other fields. `kind` is one of them, so that a signature on one kind of
document serves for no other. Requests and renewals are read strictly. A kit may hold fields that later versions
know, for it does not depend on the version of the software.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from client.certificates import key_fingerprint, load_node_key, signing_request, spoken
from client.keys import SiteKeys
from deploy.credentials import check_signing_request
from medsegdiff.errors import UserError
from medsegdiff.files import FOLDER_NAME
from medsegdiff.strict import Strict, canonical_json, parse_config, plain

REQUEST, KIT, RENEWAL, RENEWED = "medsegfed request", "medsegfed kit", "medsegfed renewal", "medsegfed renewed"
FORMAT = 1
LARGEST = 65_536  # bytes; a request has 2,000, a kit 3,000
SIGNATURES = ("signature", "node_signature")

_KEY = re.compile(r"[a-z][a-z0-9_]{0,39}")
_HEX = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9A-Za-z.+_-]{1,64}")

T = TypeVar("T")


@dataclass(frozen=True)
class Request(Strict):
    """NAME.request: a site asks to belong. `parse_request` gives checked ones only."""

    kind: str
    format: int
    site: str
    csr: str  # PEM, for the TLS key
    node_key: str  # OpenSSH line
    signing_key: str  # hex Ed25519
    patients: int  # training patients
    software: str  # version of medsegfed that wrote this; told, not checked
    node_signature: str  # hex ECDSA (SHA-384, DER) by the node key: the site holds it
    signature: str  # hex Ed25519 by the signing key

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of name, keys and patients, to be compared on the phone. The same for a repeated request."""
        tls = key_fingerprint(check_signing_request(self.csr, self.site))
        said = {"site": self.site, "node": self.node_key, "signing": self.signing_key, "tls": tls}
        return hashlib.sha256(canonical_json({**said, "patients": self.patients}).encode()).hexdigest()

    def lines(self) -> list[str]:
        """For a person: what is asked, and what to read out."""
        return [
            f"site         {self.site}",
            f"patients     {self.patients:,} for training",
            f"software     medsegfed {self.software}",
            f"fingerprint  {spoken(self.fingerprint)}",
        ]


@dataclass(frozen=True)
class Kit:
    """NAME.kit: what an admitted site is given. Fields of later versions are passed over, but are signed too."""

    kind: str
    format: int
    federation: str
    site: str
    server: str  # host:port
    ca: str  # PEM
    certificate: str  # PEM
    node_fingerprint: str  # hex SHA-256, as `SiteKeys.fingerprints`
    signing_fingerprint: str
    issued: str  # ISO 8601
    signature: str  # hex ECDSA (SHA-384, DER) by the authority


@dataclass(frozen=True)
class Renewal(Strict):
    """What a site sends over its mutually authenticated connection to get a new certificate."""

    kind: str
    format: int
    site: str
    csr: str  # PEM, for a new TLS key
    time: str  # ISO 8601
    signature: str  # hex Ed25519 by the site's signing key


def compose_request(keys: SiteKeys, site: str, patients: int, software: str) -> bytes:
    """The bytes of NAME.request."""
    said = {
        "kind": REQUEST,
        "format": FORMAT,
        "site": site,
        "csr": signing_request(keys.tls_key(), site),
        "node_key": keys.node_public_ssh,
        "signing_key": keys.signing_public,
        "patients": patients,
        "software": software,
    }
    message = signed_part(said)
    return document({**said, "node_signature": keys.sign_as_node(message).hex(), "signature": keys.sign(message).hex()})


def parse_request(data: Mapping[str, Any], source: str) -> Request:
    """A request, everything in it checked: keys, types, forms, both signatures.

    Raises:
        UserError: names `source` and the fault.
    """
    request = _strictly(data, Request, REQUEST, source)
    _require(bool(FOLDER_NAME.fullmatch(request.site)), source, "its site's name is not 1 to 64 plain characters")
    _require(bool(_VERSION.fullmatch(request.software)), source, "its software version is none")
    _require(bool(_HEX.fullmatch(request.signing_key)), source, "its signing key is not 64 hex digits")
    _require(1 <= request.patients <= 10_000_000, source, f"it is for {request.patients:,} training patients")
    try:
        node = load_node_key(request.node_key)
        tls = check_signing_request(request.csr, request.site)
    except (UserError, ValueError) as error:
        raise UserError(
            f"{source}: {str(error).removesuffix('.')}; nothing was admitted. Ask for a new request."
        ) from error
    _require(key_fingerprint(tls) != key_fingerprint(node), source, "its TLS key is its node key")
    message = signed_part(data)
    signed = signed_by(request.signing_key, request.signature, message)
    signed = signed and _signed_by_node(node, request.node_signature, message)
    _require(signed, source, "it does not bear the signatures of its own keys: it was changed on its way")
    return request


def parse_kit(data: Mapping[str, Any], source: str) -> Kit:
    """A kit's fields; fields of later versions are left out. Its signature is looked at by who knows the authority.

    Raises:
        UserError: it is no kit, or one that this version cannot read.
    """
    if data.get("kind") == KIT and isinstance(data.get("format"), int) and data["format"] > FORMAT:
        raise UserError(
            f"{source}: is a kit of format {data['format']}, and {FORMAT} is the latest that this version of medsegfed "
            "reads; nothing was installed. Update medsegfed."
        )
    known = {field.name for field in fields(Kit)}
    return _strictly({name: value for name, value in data.items() if name in known}, Kit, KIT, source)


def parse_renewal(data: Mapping[str, Any], source: str) -> Renewal:
    """A renewal's fields, in form. Raises UserError."""
    return _strictly(data, Renewal, RENEWAL, source)


def read_document(path: Path) -> dict[str, Any]:
    """A file as a JSON object, looked at only as far as it may be one.

    Raises:
        UserError: the file is not there, is too large, or is no JSON object in plain form.
    """
    try:
        if not path.is_file():
            raise OSError(0, "it is no file" if path.exists() else "there is no such file")
        with open(path, "rb") as handle:
            raw = handle.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    return parse_document(raw, str(path))


def parse_document(raw: bytes, source: str) -> dict[str, Any]:
    """Bytes as a JSON object: UTF-8, every key a plain word and there once, no NaN. Raises UserError."""
    if len(raw) > LARGEST:
        raise UserError(
            f"{source}: has more than {LARGEST:,} bytes, so it is no document of medsegfed. Check the file."
        )
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
        if not isinstance(data, dict):
            raise ValueError("no object")
        signed_part(data)  # what cannot be written as canonical JSON cannot have been signed
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{source}: is empty, damaged or no document of medsegfed ({len(raw):,} bytes). Ask for it to be sent "
            "again, as a file and not as text in a mail."
        ) from error
    return data


def document(data: Mapping[str, Any]) -> bytes:
    """A document's bytes."""
    return json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def signed_part(data: Mapping[str, Any]) -> bytes:
    """What signatures in a document are over: canonical JSON of everything but them."""
    return canonical_json({name: value for name, value in data.items() if name not in SIGNATURES}).encode("utf-8")


def signed_by(signing_key: str, signature: str, message: bytes) -> bool:
    """Whether a hex Ed25519 signature is of the hex key over the message."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(signing_key)).verify(unhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _signed_by_node(key: ec.EllipticCurvePublicKey, signature: str, message: bytes) -> bool:
    try:
        key.verify(unhex(signature), message, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def _strictly(data: Mapping[str, Any], kind: type[T], name: str, source: str) -> T:
    """Data as the dataclass `kind`: exact keys, exact types, the right kind and format."""
    if data.get("kind") != name:
        raise UserError(f"{source}: is no {name.removeprefix('medsegfed ')} of medsegfed. Check which file it is.")
    found = parse_config(dict(data), kind, source)
    if canonical_json(found) != canonical_json(dict(data)):
        raise UserError(f"{source}: a value has another type than it should have ({', '.join(_changed(found, data))}).")
    if data["format"] != FORMAT:
        raise UserError(
            f"{source}: has format {data['format']}, and {FORMAT} is read here. Bring both sides' medsegfed up to date."
        )
    return found


def _changed(found: object, data: Mapping[str, Any]) -> list[str]:
    return [name for name, value in plain(found).items() if canonical_json(value) != canonical_json(data.get(name))]


def _require(condition: bool, source: str, fault: str) -> None:
    if not condition:
        raise UserError(f"{source}: {fault}; nothing was admitted. Ask the site for a new request.")


def unhex(text: str) -> bytes:
    """Lower-case hex as bytes; what is none becomes a signature that fits nothing."""
    try:
        found = bytes.fromhex(text)
    except ValueError:
        return b""
    return found if found.hex() == text else b""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names) or not all(_KEY.fullmatch(name) for name in names):
        raise ValueError("a key stands twice or is no plain word")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(name)
