"""A site's keys: made there, readable by nobody else, in the forms that Flower takes, never torn."""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import os
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from client import keys as keys_module
from client.certificates import (
    certificate_pem,
    expiry_warning,
    load_node_key,
    load_pair,
    new_tls_key,
    openssh_line,
    public_fingerprints,
)
from client.keys import KEY_FILES, Membership, SiteKeys, certificate_days_left, node_key_header
from deploy.authority import Authority
from medsegdiff.errors import UserError

HERE = Membership("demo", "alder", "fed.example.org:8443")


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("demo")


@pytest.fixture
def keys(tmp_path: Path) -> SiteKeys:
    return SiteKeys.create(tmp_path / "keys")


def installed(keys: SiteKeys, authority: Authority, days: float = 90) -> SiteKeys:
    certificate = authority.issue_site(keys.tls_key().public_key(), "alder", days)
    keys.install(HERE, authority.certificate_pem(), certificate_pem(certificate))
    return keys


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_are_there_and_private(keys: SiteKeys) -> None:
    """Every file 0600 in a folder 0700, whatever the umask, and nothing else beside them."""
    assert sorted(path.name for path in keys.folder.iterdir()) == sorted(KEY_FILES)
    assert {path.stat().st_mode & 0o777 for path in keys.folder.iterdir()} == {0o600}
    assert keys.folder.stat().st_mode & 0o777 == 0o700


def test_a_lax_umask_opens_nothing(tmp_path: Path, authority: Authority) -> None:
    """With umask 0 keys and an installed kit are as private as ever."""
    old = os.umask(0)
    try:
        keys = installed(SiteKeys.create(tmp_path / "keys"), authority)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in keys.folder.iterdir()} == {0o600}


def test_they_are_read_back(keys: SiteKeys) -> None:
    """Load gives the same keys; no two sites have one in common."""
    again = SiteKeys.load(keys.folder)
    assert again.fingerprints() == keys.fingerprints()
    assert (again.signing_public, again.node_public_ssh) == (keys.signing_public, keys.node_public_ssh)
    other = SiteKeys.create(keys.folder.parent / "other")
    assert not set(other.fingerprints().values()) & set(keys.fingerprints().values())
    assert len(set(keys.fingerprints().values())) == 3


def test_existing_keys_are_not_overwritten(keys: SiteKeys) -> None:
    """Create on a folder that holds something changes nothing."""
    before = contents(keys.folder)
    with pytest.raises(UserError, match="nothing was written"):
        SiteKeys.create(keys.folder)
    assert contents(keys.folder) == before


def test_flower_takes_the_node_key(keys: SiteKeys) -> None:
    """Flower's own readers: the SuperNode's private key, the register command's public key, the header it sends."""
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    given = argparse.Namespace(auth_supernode_private_key=str(keys.node_key_file), auth_supernode_public_key=None)
    private, public = _try_setup_client_authentication(given)
    registered = try_load_public_key(keys.folder / "node.pub")
    assert isinstance(private.curve, ec.SECP384R1)
    header = node_key_header(keys.node_public_ssh)
    assert base64.b64decode(header, validate=True) == registered
    assert FLEET_HTTP_PUBLIC_KEY_HEADER == "flwr-public-key"
    assert base64.b64encode(NodeAuthHttpInterceptor(private, public)._public_key_bytes).decode() == header


def test_signatures_hold(keys: SiteKeys) -> None:
    """Ed25519 by the key that `signing_public` names; changed by one bit, the message is refused."""
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(keys.signing_public))
    public.verify(keys.sign(b"round 3"), b"round 3")
    with pytest.raises(InvalidSignature):
        public.verify(keys.sign(b"round 3"), b"round 2")


def test_fingerprints_are_of_the_public_keys(keys: SiteKeys) -> None:
    """SHA-256 over SubjectPublicKeyInfo, the same on both sides."""
    public = load_node_key(keys.node_public_ssh)
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    prints = keys.fingerprints()
    assert prints["node"] == hashlib.sha256(der).hexdigest()
    assert public_fingerprints(keys.node_public_ssh, keys.signing_public) == {k: prints[k] for k in ("node", "signing")}


def test_case_names_are_hashed_with_the_sites_own_key(keys: SiteKeys) -> None:
    """HMAC-SHA256 under names.key, 12 digits; another site's hash of the same name differs; any name can be hashed."""
    secret = bytes.fromhex((keys.folder / "names.key").read_text().strip())
    assert keys.case_hash("Müller^Anna") == hmac.new(secret, "Müller^Anna".encode(), "sha256").hexdigest()[:12]
    other = SiteKeys.create(keys.folder.parent / "other")
    assert other.case_hash("Müller^Anna") != keys.case_hash("Müller^Anna")
    assert len({keys.case_hash(name) for name in ("", "a", "a\udcff", "a\ud800")}) == 4


@pytest.mark.parametrize("name", [*KEY_FILES, "."])
def test_keys_that_others_may_read_are_refused(keys: SiteKeys, name: str) -> None:
    """One bit for group or others, on any file or the folder, and nothing is done with the keys."""
    path, right = keys.folder / name, 0o700 if name == "." else 0o600
    for bit in (0o40, 0o20, 0o10, 0o4, 0o2, 0o1):
        path.chmod(right | bit)
        with pytest.raises(UserError, match=rf"others than its owner .*chmod {right:o}"):
            SiteKeys.load(keys.folder)
    path.chmod(right)
    SiteKeys.load(keys.folder)


@pytest.mark.parametrize("name", KEY_FILES)
def test_a_missing_file_is_named(keys: SiteKeys, name: str) -> None:
    """An incomplete set is told from none at all: new keys would make the site a stranger."""
    (keys.folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name} of 5 key files are missing"):
        SiteKeys.load(keys.folder)


def test_no_keys_are_told_as_such(tmp_path: Path) -> None:
    """A folder that is not there or empty: make them."""
    with pytest.raises(UserError, match="holds no keys"):
        SiteKeys.load(tmp_path / "nothing")


@pytest.mark.parametrize("name", KEY_FILES)
def test_damage_is_told(keys: SiteKeys, name: str) -> None:
    """Empty, binary or broken: one line with the file's name."""
    for data in (b"", b"\x00\xff" * 40, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        (keys.folder / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            SiteKeys.load(keys.folder).tls_key()


def test_keys_of_the_wrong_kind_are_refused(keys: SiteKeys) -> None:
    """An Ed25519 node key, an EC signing key, a public key of another node."""
    files = contents(keys.folder)
    other = SiteKeys.create(keys.folder.parent / "other")
    for name, data, fault in (
        ("node.key", files["signing.key"], "P-384"),
        ("node.key", files["tls.pem"], "P-384"),
        ("signing.key", files["node.key"], "Ed25519"),
        ("node.pub", (other.folder / "node.pub").read_bytes(), "does not belong"),
    ):
        (keys.folder / name).write_bytes(data)
        with pytest.raises(UserError, match=fault):
            SiteKeys.load(keys.folder)
        (keys.folder / name).write_bytes(files[name])
    SiteKeys.load(keys.folder)


def test_a_kit_is_installed_whole(keys: SiteKeys, authority: Authority) -> None:
    """Key and certificate in one file that TLS reads; the keys are untouched; days are counted."""
    before = contents(keys.folder)
    with pytest.raises(UserError, match="no kit is installed"):
        keys.certificate()
    installed(keys, authority)
    after = contents(keys.folder)
    assert sorted(after) == sorted([*KEY_FILES, "ca.crt", "federation.json"])
    assert {name: after[name] for name in before if name != "tls.pem"} == {
        name: before[name] for name in before if name != "tls.pem"
    }
    assert after["tls.pem"].startswith(before["tls.pem"])
    assert keys.membership() == HERE
    assert 89.9 < certificate_days_left(keys.tls_file) <= 90
    context = keys.tls_context()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert len(context.get_ca_certs()) == 1


@pytest.mark.parametrize("dies_at", range(4))
def test_an_installation_that_is_killed_is_finished(
    keys: SiteKeys, authority: Authority, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    """Killed before the n-th file is in its place: whoever opens the keys next finds the whole kit."""
    installed(keys, authority)
    old = contents(keys.folder)
    rival = Authority.create("rival")
    certificate = certificate_pem(rival.issue_site(keys.tls_key().public_key(), "alder", 90))
    real, count = Path.replace, 0

    class Killed(BaseException):
        """No handler of ours may catch it, as none catches SIGKILL."""

    def replace(self: Path, target: Path) -> Path:
        nonlocal count
        if self.parent.name == ".kit":
            if count == dies_at:
                raise Killed
            count += 1
        return real(self, target)

    there = Membership("rival", "alder", "elsewhere:1")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        if dies_at < 3:
            with pytest.raises(Killed):
                keys.install(there, rival.certificate_pem(), certificate)
        else:
            keys.install(there, rival.certificate_pem(), certificate)
    again = SiteKeys.load(keys.folder)
    assert again.membership() == there
    assert again.ca_file.read_bytes() == rival.certificate_pem()
    assert again.tls_file.read_bytes().endswith(certificate)
    again.tls_context()
    assert sorted(contents(keys.folder)) == sorted(old)


def test_a_full_disk_leaves_the_old_kit(keys: SiteKeys, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at any file of a kit: one line, and not a byte of the installed one has changed."""
    installed(keys, authority)
    before = contents(keys.folder)
    rival = Authority.create("rival")
    certificate = certificate_pem(rival.issue_site(keys.tls_key().public_key(), "alder", 90))
    real = keys_module.write_atomic
    for full_at in range(3):
        left = full_at

        def write(path: Path, data: bytes, mode: int) -> None:
            nonlocal left
            if left == 0:
                raise UserError("No space left on device")
            left -= 1
            real(path, data, mode)

        with monkeypatch.context() as patch:
            patch.setattr(keys_module, "write_atomic", write)
            with pytest.raises(UserError, match="No space"):
                keys.install(Membership("rival", "alder", "elsewhere:1"), rival.certificate_pem(), certificate)
        assert contents(SiteKeys.load(keys.folder).folder) == before


def test_leftovers_of_a_killed_installation_go(keys: SiteKeys, authority: Authority) -> None:
    """A half-written kit holds a copy of the TLS key: the next installation removes it."""
    leftover = keys.folder / "..kit.99999999.partial"
    leftover.mkdir()
    (leftover / "tls.pem").write_text("half")
    installed(keys, authority)
    assert not leftover.exists()


def test_a_pair_is_never_torn(keys: SiteKeys, authority: Authority) -> None:
    """A reader that loads the file again and again while renewals replace it never meets key and certificate apart."""
    installed(keys, authority)
    done, faults, reads = threading.Event(), [], 0

    def read() -> None:
        nonlocal reads
        while not done.is_set():
            try:
                load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), keys.tls_file)
                keys.certificate()
                reads += 1
            except Exception as error:
                faults.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    seen = set()
    for _ in range(60):
        key = new_tls_key()
        keys.replace_pair(key, certificate_pem(authority.issue_site(key.public_key(), "alder", 1)))
        seen.add(keys.certificate().serial_number)
    done.set()
    reader.join()
    assert faults == []
    assert len(seen) == 60
    assert reads > 10


def test_a_certificate_of_another_key_is_told(keys: SiteKeys, authority: Authority) -> None:
    """A file put together by hand from two pairs is not used."""
    installed(keys, authority)
    stranger = certificate_pem(authority.issue_site(new_tls_key().public_key(), "alder", 1))
    keys.tls_file.write_bytes(keys.tls_file.read_bytes().split(b"-----BEGIN CERTIFICATE")[0] + stranger)
    with pytest.raises(UserError, match="not of its key"):
        keys.tls_context()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"site": 1}', "[" * 100_000])
def test_a_damaged_membership_is_told(keys: SiteKeys, authority: Authority, text: str) -> None:
    """federation.json that is not one: install the kit again."""
    installed(keys, authority)
    (keys.folder / "federation.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        keys.membership()


@pytest.mark.parametrize(
    ("days", "warning"),
    [(90, None), (30.001, None), (30, 30), (7.0001, 30), (7, 7), (1.5, 7), (1, 1), (0.0007, 1), (0, 1), (-3, 1)],
)
def test_warnings_are_due_at_30_7_and_1_days(days: float, warning: int | None) -> None:
    """The nearest limit that has been passed; fractions of a day count."""
    assert expiry_warning(days) == warning


def test_a_certificate_of_a_minute_counts_down(keys: SiteKeys, authority: Authority) -> None:
    """60 seconds are 60/86400 days; afterwards the count is negative."""
    installed(keys, authority, days=60 / 86_400)
    now = datetime.now(UTC)
    assert 50 < certificate_days_left(keys.tls_file, now) * 86_400 <= 60
    assert certificate_days_left(keys.tls_file, now + timedelta(seconds=61)) < 0
    with pytest.raises(UserError, match="holds no certificate"):
        certificate_days_left(keys.folder / "node.key")
    with pytest.raises(UserError, match="cannot be read"):
        certificate_days_left(keys.folder / "nothing")


@pytest.mark.parametrize("text", ["", "ssh-ed25519 AAAA", "ecdsa-sha2-nistp384 AAAA", "ä", "ecdsa " + "A" * 100])
def test_what_is_no_node_key_is_refused(text: str) -> None:
    """Raises ValueError, whatever is wrong."""
    with pytest.raises(ValueError, match="node key"):
        node_key_header(text)


def test_a_compressed_point_is_no_node_key() -> None:
    """The first byte of the point says how it is written; the library knows one way and raises NotImplementedError."""
    line = openssh_line(ec.generate_private_key(ec.SECP384R1()).public_key())
    kind, _, text = line.partition(" ")
    data = bytearray(base64.b64decode(text))
    data[-97] ^= 1
    with pytest.raises(ValueError, match="no OpenSSH public key"):
        load_node_key(f"{kind} {base64.b64encode(bytes(data)).decode()}")


def test_a_node_key_has_one_form_only(keys: SiteKeys) -> None:
    """A comment, a blank or a line break more, and two texts would mean one key: refused."""
    for text in (keys.node_public_ssh + " me@host", keys.node_public_ssh + "\n", " " + keys.node_public_ssh):
        with pytest.raises(ValueError, match=r"plain form|no OpenSSH"):
            load_node_key(text)
    other_curve = ec.generate_private_key(ec.SECP256R1()).public_key()
    line = other_curve.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    with pytest.raises(ValueError, match="P-384"):
        load_node_key(line)
