"""A site's keys: made at the site, readable by nobody else, and never sent anywhere.

    keys/               0700, every file in it 0600
      node.key node.pub   ECDSA P-384, OpenSSH: who the site's SuperNode is towards Flower
      signing.key         Ed25519, PEM: signs what the site answers
      names.key           32 random bytes, hex: turns names of cases into hashes for logs
      tls.pem             TLS key (ECDSA P-256) and, once a kit is installed, its certificate, in ONE file
      next.key            TLS key that a certificate was asked for, until that is here
      ca.crt              certificate of the federation's authority, from the kit
      federation.json     {federation, site, server: "host:port"}, from the kit

TLS key and certificate share a file because a renewal replaces both: one rename swaps the pair, so whoever opens it at
whatever moment reads a key and the certificate that belongs to it. `client.certificates.load_pair` gives it to TLS.

A kit brings three files. They are first written whole into keys/.kit, which appears by one rename; from then on the kit
counts as installed. Should a kill come before its files are in their places, whoever opens the keys next moves them.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import shutil
import ssl
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.certificates import (
    UNREADABLE,
    certificate_days_left,
    key_fingerprint,
    load_pair,
    new_tls_key,
    node_key_header,
    openssh_line,
    parse_certificate,
    private_pem,
    read_bytes,
    refuse_readable_by_others,
)
from medsegdiff.errors import UserError
from medsegdiff.files import new_folder, write_atomic

__all__ = ["Membership", "SiteKeys", "certificate_days_left", "node_key_header"]

KEY_FILES = ("node.key", "node.pub", "signing.key", "names.key", "tls.pem")
KIT_FILES = ("federation.json", "ca.crt", "tls.pem")
SECRET = 0o600

_STAGED = ".kit"


class Membership(NamedTuple):
    """federation.json: where the site belongs."""

    federation: str
    site: str
    server: str  # host:port


class SiteKeys:
    """The keys of one site, opened."""

    def __init__(
        self, folder: Path, node: ec.EllipticCurvePrivateKey, signing: Ed25519PrivateKey, names: bytes
    ) -> None:
        self.folder = folder
        self._node = node
        self._signing = signing
        self._names = names

    @classmethod
    def create(cls, folder: Path) -> SiteKeys:
        """Make all keys anew; `folder` appears whole or not at all.

        Raises:
            UserError: `folder` holds something already, or the disk refuses.
        """
        node = ec.generate_private_key(ec.SECP384R1())
        files = {
            "node.key": node.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
            ),
            "node.pub": openssh_line(node.public_key()).encode() + b"\n",
            "signing.key": private_pem(Ed25519PrivateKey.generate()),
            "names.key": secrets.token_hex(32).encode() + b"\n",
            "tls.pem": private_pem(new_tls_key()),
        }
        with new_folder(folder) as partial:
            partial.chmod(0o700)
            for name, data in files.items():
                write_atomic(partial / name, data, SECRET)
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> SiteKeys:
        """Open the keys, and finish an installation that was cut short.

        Raises:
            UserError: a file is missing or damaged, or others than its owner may read it.
        """
        _finish_installation(folder)
        missing = [name for name in KEY_FILES if not (folder / name).is_file()]
        if len(missing) == len(KEY_FILES):
            raise UserError(f"{folder}: holds no keys of a site. Make them with medsegfed join.")
        if missing:
            raise UserError(
                f"{folder}: {', '.join(missing)} of {len(KEY_FILES)} key files are missing, so the site cannot "
                "prove who it is. Restore the folder from a backup; or move it away, run medsegfed join, and tell the "
                "coordinator that the site's old keys are lost."
            )
        for path in (folder, *(folder / name for name in KEY_FILES)):
            refuse_readable_by_others(path)
        node, signing = (_private(read_bytes(folder / name), folder / name) for name in ("node.key", "signing.key"))
        if not isinstance(node, ec.EllipticCurvePrivateKey) or not isinstance(node.curve, ec.SECP384R1):
            raise _damaged(folder / "node.key", "an ECDSA P-384 key")
        if not isinstance(signing, Ed25519PrivateKey):
            raise _damaged(folder / "signing.key", "an Ed25519 key")
        keys = cls(folder, node, signing, _read_names(folder / "names.key"))
        if read_bytes(folder / "node.pub").split()[:2] != keys.node_public_ssh.encode().split():
            raise UserError(f"{folder / 'node.pub'}: does not belong to node.key. Restore {folder} from a backup.")
        return keys

    @property
    def node_key_file(self) -> Path:
        """For `flower-supernode --auth-supernode-private-key`."""
        return self.folder / "node.key"

    @property
    def tls_file(self) -> Path:
        """Key and certificate in one file; the certificate is there once a kit is installed."""
        return self.folder / "tls.pem"

    @property
    def ca_file(self) -> Path:
        """The federation's authority; there once a kit is installed."""
        return self.folder / "ca.crt"

    @property
    def node_public_ssh(self) -> str:
        """The node key's public half as one OpenSSH line, without a comment."""
        return openssh_line(self._node.public_key())

    @property
    def signing_public(self) -> str:
        """The Ed25519 public key, 64 hex digits."""
        return self._signing.public_key().public_bytes_raw().hex()

    def sign(self, message: bytes) -> bytes:
        """Ed25519 signature, 64 bytes."""
        return self._signing.sign(message)

    def sign_as_node(self, message: bytes) -> bytes:
        """ECDSA signature (SHA-384, DER) by the node key: proof at enrolment that the site holds it."""
        return self._node.sign(message, ec.ECDSA(hashes.SHA384()))

    def fingerprints(self) -> dict[str, str]:
        """Hex SHA-256 of the public keys (SubjectPublicKeyInfo): node, signing, tls."""
        return {
            "node": key_fingerprint(self._node.public_key()),
            "signing": key_fingerprint(self._signing.public_key()),
            "tls": key_fingerprint(self.tls_key().public_key()),
        }

    def case_hash(self, name: str) -> str:
        """What logs and reports call a case: 12 hex digits that only this site's names.key ties to the name."""
        return hmac.new(self._names, name.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:12]

    def anchor(self, head: str) -> str:
        """What a server may remember of a log's head: only this site can tell which line it stands for."""
        return hmac.new(self._names, b"log head\0" + head.encode(), hashlib.sha256).hexdigest()

    def tls_key(self) -> ec.EllipticCurvePrivateKey:
        """The TLS key in use."""
        return self._tls_key(read_bytes(self.tls_file))

    def _tls_key(self, pem: bytes) -> ec.EllipticCurvePrivateKey:
        key = _private(pem, self.tls_file)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise _damaged(self.tls_file, "an ECDSA key")
        return key

    def certificate(self) -> x509.Certificate:
        """The site's certificate. Raises UserError before a kit is installed, or where it is not of the TLS key."""
        self.membership()
        pem = read_bytes(self.tls_file)  # once: a renewal may swap the pair at any moment
        try:
            found = parse_certificate(pem)
        except ValueError as error:
            raise UserError(f"{self.tls_file}: holds no certificate. Install the site's kit once more.") from error
        if key_fingerprint(found.public_key()) != key_fingerprint(self._tls_key(pem).public_key()):
            raise UserError(f"{self.tls_file}: its certificate is not of its key. Install the site's kit once more.")
        return found

    def membership(self) -> Membership:
        """Federation, site and server. Raises UserError before a kit is installed."""
        path = self.folder / "federation.json"
        if not path.exists():
            raise UserError(
                f"{self.folder}: no kit is installed, so there is no federation to reach. Send the request of "
                "medsegfed join to the coordinator, then run medsegfed join --kit FILE."
            )
        try:
            found = json.loads(read_bytes(path))
            return Membership(str(found["federation"]), str(found["site"]), str(found["server"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: is damaged. Install the site's kit once more.") from error

    def tls_context(self) -> ssl.SSLContext:
        """TLS 1.3 towards the federation: its authority alone is trusted, host names are checked, the site shows its
        certificate.

        Raises:
            UserError: no kit is installed, or its files are damaged.
        """
        self.certificate()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_verify_locations(self.ca_file)
            load_pair(context, self.tls_file)
        except (OSError, ssl.SSLError) as error:
            raise UserError(
                f"{self.ca_file} or tls.pem: cannot be used ({error}). Install the site's kit once more."
            ) from error
        return context

    def install(self, membership: Membership, ca: bytes, certificate: bytes) -> None:
        """Put a checked kit in place: all of it or nothing, however the installation ends.

        Args:
            ca, certificate: PEM.

        Raises:
            UserError: the disk refuses; what was installed before stays.
        """
        files = {
            "federation.json": json.dumps(membership._asdict(), indent=1).encode() + b"\n",
            "ca.crt": ca,
            "tls.pem": private_pem(self.tls_key()) + certificate,
        }
        for leftover in self.folder.glob(f".{_STAGED}.*.partial"):  # of a killed installation
            shutil.rmtree(leftover, ignore_errors=True)
        with new_folder(self.folder / _STAGED) as partial:
            partial.chmod(0o700)
            for name in KIT_FILES:
                write_atomic(partial / name, files[name], SECRET)
        _finish_installation(self.folder)

    def next_key(self) -> ec.EllipticCurvePrivateKey:
        """The TLS key of the pair to come, made before its certificate is asked for and kept until that is here.

        Where the answer is lost, or the disk refuses it, the server is asked for the certificate of the same key, and
        gives the one that it has given before: it gives out so many and no more.
        """
        try:
            refuse_readable_by_others(self._next_file)
            key = _private(read_bytes(self._next_file), self._next_file)
            if isinstance(key, ec.EllipticCurvePrivateKey):
                return key
        except UserError:
            pass  # none, or one that was damaged or exposed: nothing hangs on it
        key = new_tls_key()
        write_atomic(self._next_file, private_pem(key), SECRET)
        return key

    def replace_pair(self, key: ec.EllipticCurvePrivateKey, certificate: bytes) -> None:
        """A renewed TLS key and its certificate (PEM) take the place of the old pair in one step."""
        write_atomic(self.tls_file, private_pem(key) + certificate, SECRET)
        with contextlib.suppress(OSError):  # it would be renewed with the same key once more
            self._next_file.unlink(missing_ok=True)

    @property
    def _next_file(self) -> Path:
        return self.folder / "next.key"


def _finish_installation(folder: Path) -> None:
    """Move the files of a staged kit into their places; done twice, or by two processes at once, it changes nothing."""
    staged = folder / _STAGED
    if not staged.is_dir():
        return
    try:
        for name in KIT_FILES:
            with contextlib.suppress(FileNotFoundError):
                (staged / name).replace(folder / name)
        with contextlib.suppress(FileNotFoundError):
            staged.rmdir()
    except OSError as error:
        raise UserError(
            f"{folder}: the kit is complete in {staged} and could not be moved into place ({error.strerror}). Make the "
            "folder writable, then repeat the command."
        ) from error


def _private(data: bytes, path: Path) -> object:
    try:
        if b"OPENSSH" in data[:64]:
            return serialization.load_ssh_private_key(data, None)
        return serialization.load_pem_private_key(data, None)
    except UNREADABLE as error:
        raise _damaged(path, "a private key without a passphrase") from error


def _read_names(path: Path) -> bytes:
    try:
        data = bytes.fromhex(read_bytes(path).decode("ascii"))
    except ValueError as error:
        raise _damaged(path, "64 hex digits") from error
    if len(data) != 32:
        raise _damaged(path, "64 hex digits")
    return data


def _damaged(path: Path, wanted: str) -> UserError:
    return UserError(f"{path}: is not {wanted}; the file is damaged. Restore {path.parent} from a backup.")
