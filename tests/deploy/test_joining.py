"""From a hospital's request to its kit, and out again: what fits is taken, all else is refused and changes nothing."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st
from small_federation import Template, files_of, join, keys_of, make_template, new_federation, rewrite

from client.certificates import (
    certificate_pem,
    name_in,
    new_tls_key,
    openssh_line,
    parse_certificate,
    read_certificate,
    signing_request,
)
from client.keys import SiteKeys, node_key_header
from client.policy import SitePolicy
from client.site import SiteConfig
from deploy import admission
from deploy.admission import admit, lift, read_request, revoke
from deploy.authority import list_number
from deploy.documents import compose_request
from deploy.federation import Federation, init_federation, open_federation
from deploy.joining import install_kit, make_request, open_keys
from medsegdiff.chained_log import audit_lines, verify_log
from medsegdiff.errors import UserError
from medsegdiff.strict import read_config

DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here pulls the plug: what is written need not be on the disk before the next step."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def federation(tmp_path: Path, template: Template) -> Federation:
    return template.federation(tmp_path / "federation")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Where a site will be."""
    return tmp_path / "alder"


@pytest.fixture
def asked(site: Path, template: Template) -> Path:
    """A site that has made its keys and its request."""
    return template.asked(site)


@pytest.fixture(scope="module")
def others_request(template: Template) -> dict[str, Any]:
    """A good request of another site that calls itself the same; two fields are made different."""
    found = json.loads(make_request(template.folder / "other", "alder", 13).request.read_bytes())
    return {**found, "site": "birch", "software": "9"}


@pytest.fixture(scope="module")
def others_kit(template: Template) -> dict[str, Any]:
    """A good kit of another site in another federation; two fields are made different."""
    request = make_request(template.folder / "birch", "birch", 12).request
    kit = admit(new_federation(template.folder / "rival", "rival"), request)
    return {**json.loads(kit.read_bytes()), "server": "evil.example.org:443", "issued": "2020-01-01T00:00:00+00:00"}


@pytest.fixture
def request_file(asked: Path) -> Path:
    return asked / "alder.request"


def events(federation: Federation) -> list[str]:
    verify_log(federation.audit_file)
    return [line["event"] for line in audit_lines(federation.audit_file)]


# --- the request ------------------------------------------------------------------------------------------------------


def test_a_hospital_joins(federation: Federation, site: Path) -> None:
    """Request, admission, kit: the register knows the keys, the site its server; the way is in both audit logs."""
    joining = make_request(site, "alder", 120)
    kit = admit(federation, joining.request, fingerprint=joining.fingerprint)
    installed = install_kit(site, kit, ca_fingerprint=federation.authority().fingerprint)
    keys, member = open_keys(site), federation.members()["alder"]
    assert kit == federation.kit("alder")
    assert (member.node_key, member.signing_key) == (keys.node_public_ssh, keys.signing_public)
    assert (member.patients, member.status) == (120, "admitted")
    assert int(member.serial, 16) == keys.certificate().serial_number
    assert keys.membership() == installed.membership == ("demo", "alder", "127.0.0.1:8443")
    assert 89.9 < installed.days_left <= 90
    assert name_in(keys.certificate(), x509.NameOID.COMMON_NAME) == "alder"
    assert name_in(keys.certificate(), x509.NameOID.ORGANIZATION_NAME) == "demo"
    assert node_key_header(member.node_key)
    assert events(federation) == ["federation_created", "site_admitted"]
    assert [line["event"] for line in audit_lines(site / "audit.jsonl")] == ["kit_installed"]
    keys.tls_context()


def test_site_yaml_is_written_and_reads_back(site: Path) -> None:
    """As the site's software reads it, with the policy's defaults spelt out; an existing one is not touched."""
    assert make_request(site, "alder", 12).new_config == site / "site.yaml"
    text = (site / "site.yaml").read_text()
    assert read_config(site / "site.yaml", SiteConfig) == SiteConfig("alder", "data", keys="keys")
    for field in set(SitePolicy.__dataclass_fields__) - {"privacy_floor"}:  # always null: the section `privacy` says it
        assert re.search(rf"^  {field}: \S+ +# .{{20,}}", text, re.MULTILINE), field
    (site / "site.yaml").write_text(text + "# mine\n")
    assert make_request(site, "alder", 12).new_config is None
    assert (site / "site.yaml").read_text() == text + "# mine\n"


@pytest.mark.parametrize("name", ["no", "1e5", "0x1F", "2026-01-01", "a" * 64])
def test_names_that_yaml_would_take_for_something_else(federation: Federation, site: Path, name: str) -> None:
    """They join like any other."""
    install_kit(site, admit(federation, make_request(site, name, 12).request))
    assert read_config(site / "site.yaml", SiteConfig).name == name


def test_private_keys_never_travel(federation: Federation, site: Path) -> None:
    """No secret of the site, in hex or base64, is in anything that left it, nor anywhere at the coordinator's."""
    join(federation, site)
    keys = keys_of(site)
    secrets = {
        "node": keys._node.private_numbers().private_value.to_bytes(48, "big").lstrip(b"\0"),
        "tls": keys.tls_key().private_numbers().private_value.to_bytes(32, "big"),
        "signing": keys._signing.private_bytes_raw(),
        "names": keys._names,
    }

    def found(text: bytes) -> set[str]:
        compact = text.replace(b"\\n", b"").replace(b"\n", b"")
        return {name for name, secret in secrets.items() if any(form in compact for form in written_forms(secret))}

    assert found(b"".join(files_of(site / "keys").values())) == set(secrets)  # the search finds them where they are
    assert found(b"".join(files_of(federation.folder).values()) + (site / "alder.request").read_bytes()) == set()


def written_forms(secret: bytes) -> list[bytes]:
    """Raw, hex, and base64 at each of the three places a byte may have in a group; the ends are left out."""
    return [secret, secret.hex().encode(), *(base64.b64encode(bytes(shift) + secret)[4:-4] for shift in range(3))]


def test_a_repeated_join_makes_the_same_request(federation: Federation, site: Path) -> None:
    """The same keys and fingerprint, before and after the kit; another number of patients is another fingerprint."""
    first = make_request(site, "alder", 12)
    keys = files_of(site / "keys")
    again = make_request(site, "alder", 12)
    assert (first.new_keys, again.new_keys) == (True, False)
    assert again.fingerprint == first.fingerprint
    assert files_of(site / "keys") == keys
    install_kit(site, admit(federation, again.request))
    assert make_request(site, "alder", 12).fingerprint == first.fingerprint
    assert make_request(site, "alder", 13).fingerprint != first.fingerprint


def test_an_incomplete_set_of_keys_is_not_replaced(site: Path) -> None:
    """One file lost: told, and no new key is made silently."""
    make_request(site, "alder", 12)
    (site / "keys" / "signing.key").unlink()
    before = files_of(site)
    with pytest.raises(UserError, match=r"signing\.key of 5 key files are missing"):
        make_request(site, "alder", 12)
    assert files_of(site) == before


@pytest.mark.parametrize(
    "name", ["", "St. Mary", "../alder", "-alder", ".alder", "a" * 65, "älder", "alder\n", "a/b", "a b"]
)
def test_names_that_cannot_be_are_refused(site: Path, name: str) -> None:
    """Before anything is made."""
    with pytest.raises(UserError, match="nothing was made"):
        make_request(site, name, 12)
    assert not site.exists()


@pytest.mark.parametrize("patients", [0, -1, 10**9])
def test_counts_that_cannot_be_are_refused(federation: Federation, site: Path, patients: int) -> None:
    """At the site and at the coordinator's."""
    with pytest.raises(UserError, match="training patients"):
        make_request(site, "alder", patients)
    assert not site.exists()
    request = make_request(site, "alder", 12).request
    with pytest.raises(UserError, match="training patients"):
        admit(federation, request, patients=patients)
    assert federation.members() == {}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("name: birch\nkeys: keys\n", "is of the site 'birch'"),
        ("name: alder\ndata: data\n", "Add a line: keys: keys"),
        ("", "is of the site None"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_site_yaml_that_does_not_fit_is_told(site: Path, text: str, fault: str) -> None:
    """Of another site, or without keys: nothing is made."""
    site.mkdir()
    (site / "site.yaml").write_text(text)
    with pytest.raises(UserError, match=fault):
        make_request(site, "alder", 12)
    assert [path.name for path in site.iterdir()] == ["site.yaml"]


# --- admission --------------------------------------------------------------------------------------------------------


def spoil(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change a request and sign it anew with the site's own keys: only what it says can be wrong then."""
    keys = keys_of(path.parent)

    def sign(message: bytes) -> bytes:
        return keys.sign(message)

    rewrite(path, change)
    rewrite(path, lambda data: data.update(node_signature=keys.sign_as_node(_signed(data)).hex()), sign)
    return path


def _signed(data: dict[str, Any]) -> bytes:
    from deploy.documents import signed_part

    return signed_part(data)


def test_respelt_requests_pass_when_signed(federation: Federation, request_file: Path) -> None:
    """The helper of the next test itself: signed anew without a change, a request is good."""
    admit(federation, spoil(request_file, lambda data: None))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda d: d.update(site="birch"), "not name exactly the site birch"),
        (lambda d: d.update(site="../alder"), "plain characters"),
        (lambda d: d.update(patients=0), "0 training patients"),
        (lambda d: d.update(patients="12"), "another type"),
        (lambda d: d.update(patients=True), "another type"),
        (lambda d: d.update(patients=12.0), "another type"),
        (lambda d: d.update(patients=None), "patients"),
        (lambda d: d.update(format=2), "has format 2"),
        (lambda d: d.update(kind="medsegfed kit"), "is no request"),
        (lambda d: d.update(extra=1), "extra: unknown key"),
        (lambda d: d.pop("software"), "software"),
        (lambda d: d.update(software="\x1b[2J"), "software version"),
        (lambda d: d.update(software="v" * 65), "software version"),
        (lambda d: d.update(signing_key="zz"), "signing key"),
        (lambda d: d.update(node_key=d["node_key"] + " me@host"), "plain form"),
        (lambda d: d.update(csr="nothing"), "no PEM"),
        (lambda d: d.update(csr=signing_request(new_tls_key(), "birch")), "not name exactly"),
    ],
)
def test_a_request_that_says_what_cannot_be_is_refused(
    federation: Federation, request_file: Path, change: Callable[[dict[str, Any]], Any], fault: str
) -> None:
    """Well signed, yet refused: one line, nobody admitted, nothing written."""
    request = spoil(request_file, change)
    before = files_of(federation.folder)
    with pytest.raises(UserError, match=fault):
        admit(federation, request)
    assert files_of(federation.folder) == before


@pytest.mark.parametrize(
    "field", ["site", "csr", "node_key", "signing_key", "patients", "software", "node_signature", "signature"]
)
def test_a_request_that_was_changed_on_its_way_is_refused(
    federation: Federation, request_file: Path, others_request: dict[str, Any], field: str
) -> None:
    """Any field replaced by that of another good request of the same name."""
    rewrite(request_file, lambda data: data.update({field: others_request[field]}))
    with pytest.raises(UserError, match=r"alder\.request: .*nothing was admitted"):
        admit(federation, request_file)


def test_the_signatures_are_both_needed(federation: Federation, site: Path, request_file: Path) -> None:
    """A request for somebody else's node key, signed well by the asker's own signing key."""
    stranger = SiteKeys.create(site.parent / "stranger")
    keys = keys_of(site)
    rewrite(request_file, lambda data: data.update(node_key=stranger.node_public_ssh), keys.sign)
    with pytest.raises(UserError, match="signatures of its own keys"):
        admit(federation, request_file)


def test_one_key_for_two_purposes_is_refused(federation: Federation, site: Path) -> None:
    """The node key used for TLS as well."""
    make_request(site, "alder", 12)
    keys = keys_of(site)
    data = json.loads(compose_request(keys, "alder", 12, "0.1.0"))
    data["csr"] = signing_request(keys._node, "alder")
    assert openssh_line(keys._node.public_key()) == data["node_key"]
    (site / "alder.request").write_text(json.dumps(data))
    with pytest.raises(UserError, match="its TLS key is its node key"):
        admit(federation, spoil(site / "alder.request", lambda data: None))


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"kind": "medsegfed request"}', b"[" * 60_000, b'{"a": 1, "a": 2}',
     b'{"kind": NaN}', b'{"kind": 1e999}', b'{"kind": "\\ud800"}', b'{"\x1b[2J": 1}', b'{"K": 1}', b" " * 70_000,
     b'{"format": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_what_is_no_request_is_told(federation: Federation, tmp_path: Path, raw: bytes) -> None:
    """Empty, torn, binary, nested too deep, too large, a key twice: one line of printable text."""
    path = tmp_path / "x.request"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"x\.request") as caught:
        admit(federation, path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_what_is_no_file_is_told(federation: Federation, tmp_path: Path) -> None:
    """A folder, a device that never ends, nothing at all."""
    for path, fault in ((tmp_path, "no file"), (Path("/dev/zero"), "no file"), (tmp_path / "nothing", "no such file")):
        with pytest.raises(UserError, match=fault):
            admit(federation, path)


def test_a_kit_that_cannot_be_written_is_told_with_what_stands(federation: Federation, site: Path) -> None:
    """The register has the site then; the same request, admitted again, gives the kit."""
    request = make_request(site, "alder", 12).request
    federation.kits.rmdir()
    federation.kits.write_text("no folder")
    with pytest.raises(UserError, match=r"alder is admitted, but its kit is not written.*again"):
        admit(federation, request)
    assert federation.members()["alder"].active
    federation.kits.unlink()
    federation.kits.mkdir()
    assert admit(federation, request).is_file()


def test_a_contact_stands_on_a_page(tmp_path: Path) -> None:
    """Nothing that commands a terminal, and no book."""
    for contact in ("Dr. Day \x1b[31m", "line\nline", "x" * 201):
        with pytest.raises(UserError, match=r"at most 200 printable characters.*Nothing was made"):
            init_federation(tmp_path / "new", "demo", ["localhost"], contact=contact)
    assert not (tmp_path / "new").exists()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_bit_of_a_request_can_change(template: Template, data: st.DataObject) -> None:
    """One bit of the file flipped anywhere: refused, or the very same request (a blank became another)."""
    good = (template.folder / "alder" / "alder.request").read_bytes()
    position = data.draw(st.integers(0, len(good) - 1))
    raw = bytearray(good)
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    path = template.folder / "changed.request"
    path.write_bytes(raw)
    try:
        found = read_request(path)
    except UserError:
        return
    assert found == read_request(template.folder / "alder" / "alder.request")


def test_another_fingerprint_is_refused(federation: Federation, site: Path) -> None:
    """What was read out on the phone is not what came by mail; blanks and capitals do not matter."""
    joining = make_request(site, "alder", 12)
    with pytest.raises(UserError, match="not the one that was read out"):
        admit(federation, joining.request, fingerprint="0" * 64)
    spoken = next(line for line in joining.lines if line.startswith("fingerprint")).removeprefix("fingerprint")
    admit(federation, joining.request, fingerprint=spoken.upper())


def test_the_coordinator_may_enrol_fewer_patients(federation: Federation, site: Path) -> None:
    """The weight that updates may claim is the coordinator's word."""
    admit(federation, make_request(site, "alder", 5000).request, patients=50)
    assert federation.members()["alder"].patients == 50


def test_a_site_is_admitted_again_with_the_same_keys(federation: Federation, site: Path) -> None:
    """A new certificate; the one before stays valid and is known; nothing else about the member changes."""
    join(federation, site)
    before = federation.members()["alder"]
    kit = admit(federation, make_request(site, "alder", 20).request)
    after = federation.members()["alder"]
    assert after.serial != before.serial
    assert after.earlier == {before.serial: before.not_after}
    assert (after.patients, after.admitted, after.node_key) == (20, before.admitted, before.node_key)
    install_kit(site, kit)
    assert int(after.serial, 16) == keys_of(site).certificate().serial_number


def test_a_name_is_not_taken_over(federation: Federation, tmp_path: Path, site: Path) -> None:
    """Other keys under an admitted name, or a name that differs in capitals alone."""
    join(federation, site)
    before = files_of(federation.folder)
    thief = make_request(tmp_path / "thief", "alder", 12).request
    with pytest.raises(UserError, match=r"admitted with other keys .*medsegfed revoke alder"):
        admit(federation, thief)
    with pytest.raises(UserError, match="in capitals alone"):
        admit(federation, make_request(tmp_path / "twin", "Alder", 12).request)
    assert files_of(federation.folder) == before


@pytest.mark.parametrize("shared", ["node.key", "signing.key"])
def test_a_key_belongs_to_one_site(federation: Federation, tmp_path: Path, site: Path, shared: str) -> None:
    """The node key or the signing key of a member under another name, also after it was revoked and replaced."""
    join(federation, site)
    other = tmp_path / "birch"
    make_request(other, "birch", 12)
    names = (shared, "node.pub") if shared == "node.key" else (shared,)
    for name in names:
        (other / "keys" / name).write_bytes((site / "keys" / name).read_bytes())
    request = make_request(other, "birch", 12).request
    with pytest.raises(UserError, match="its keys are those of alder"):
        admit(federation, request)
    revoke(federation, "alder", "laptop stolen")
    join(federation, tmp_path / "alder-new")
    with pytest.raises(UserError, match="its keys are those of alder"):
        admit(federation, request)
    assert set(federation.members()) == {"alder"}


def test_a_kit_that_could_not_be_used_is_not_made(federation: Federation, site: Path, request_file: Path) -> None:
    """federation.yaml names a host that the server's certificate does not hold: no site could connect."""
    text = federation.config_file.read_text()
    federation.config_file.write_text(text.replace('["127.0.0.1"]', '["fed.example.org"]'))
    with pytest.raises(UserError, match=r"medsegfed renew --folder"):
        admit(open_federation(federation.folder), request_file)
    assert federation.members() == {}


def test_a_full_disk_at_admission_can_be_repeated(
    federation: Federation, site: Path, request_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kit cannot be written: the register knows the certificate all the same, and admitting again mends it."""
    real = admission.write_atomic

    def write(path: Path, data: bytes) -> None:
        if path.suffix == ".kit":
            raise UserError("No space left on device")
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(admission, "write_atomic", write)
        with pytest.raises(UserError, match="No space"):
            admit(federation, request_file)
    lost = federation.members()["alder"].serial
    install_kit(site, admit(federation, request_file))
    assert lost in federation.members()["alder"].earlier


# --- the kit ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def kit(federation: Federation, request_file: Path) -> Path:
    return admit(federation, request_file)


def test_a_kit_of_a_later_version_is_installed(federation: Federation, site: Path, kit: Path) -> None:
    """Fields that this version does not know, signed by the authority, are passed over."""
    more = {"relays": ["fed2.example.org:443"], "limits": {"body_mib": 8}, "note": "since 0.9"}
    rewrite(kit, lambda data: data.update(more), federation.authority().sign)
    assert install_kit(site, kit).membership.site == "alder"


def test_a_kit_does_not_depend_on_the_software(
    federation: Federation, site: Path, kit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request comes from another version; no version stands in the kit."""
    assert not re.search(r"version|software", kit.read_text())
    monkeypatch.setattr("deploy.joining.version", lambda name: "99.0.dev1")
    install_kit(site, admit(federation, make_request(site, "alder", 12).request))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda d: d.update(format=2), "format 2, and 1 is the latest"),
        (lambda d: d.update(format="1"), "another type"),
        (lambda d: d.update(kind="medsegfed request"), "is no kit"),
        (lambda d: d.pop("server"), "server"),
        (lambda d: d.update(server="fed.example.org"), "no host:port"),
        (lambda d: d.update(server="fed.example.org:99999"), "no host:port"),
        (lambda d: d.update(server="http://fed:80"), "no host:port"),
        (lambda d: d.update(server="fed:443/x"), "no host:port"),
        (lambda d: d.update(federation="../x"), "cannot be one"),
        (lambda d: d.update(site="birch"), "not of the site birch"),
        (lambda d: d.update(certificate="nothing"), "no readable certificates"),
        (lambda d: d.update(certificate=d["ca"]), "not of the site"),
        (lambda d: d.update(node_fingerprint="0" * 64), "other keys"),
        (lambda d: d.update(signing_fingerprint="0" * 64), "other keys"),
    ],
)
def test_a_kit_that_says_what_cannot_be_is_refused(
    federation: Federation, site: Path, kit: Path, change: Callable[[dict[str, Any]], Any], fault: str
) -> None:
    """Signed by the authority, yet refused: one line, nothing installed."""
    rewrite(kit, change, federation.authority().sign)
    before = files_of(site)
    with pytest.raises(UserError, match=fault):
        install_kit(site, kit)
    assert files_of(site) == before


@pytest.mark.parametrize(
    "field", ["server", "federation", "site", "ca", "certificate", "node_fingerprint", "issued", "signature"]
)
def test_a_kit_that_was_changed_on_its_way_is_refused(
    site: Path, kit: Path, others_kit: dict[str, Any], field: str
) -> None:
    """Any field, without the authority's signature over it."""
    rewrite(kit, lambda data: data.update({field: others_kit[field]}))
    with pytest.raises(UserError, match="Nothing was installed"):
        install_kit(site, kit)


def test_a_field_added_to_a_kit_breaks_its_signature(site: Path, kit: Path) -> None:
    """Unknown fields are passed over, but not unsigned ones."""
    rewrite(kit, lambda data: data.update(note="added"))
    with pytest.raises(UserError, match="not the authority's"):
        install_kit(site, kit)


def test_an_authority_made_up_on_the_way_is_seen_on_the_phone(tmp_path: Path, site: Path, kit: Path) -> None:
    """A sound kit of somebody else's authority for the site's own keys: the fingerprint alone tells."""
    expected = install_kit(site, kit).ca_fingerprint
    fresh = tmp_path / "fresh"
    evil = admit(new_federation(tmp_path / "evil"), make_request(fresh, "alder", 12).request)
    with pytest.raises(UserError, match="not the one that was read out"):
        install_kit(fresh, evil, ca_fingerprint=expected)
    found = install_kit(fresh, evil)
    assert found.ca_fingerprint != expected
    assert any(found.ca_fingerprint[:4] in line for line in found.lines)


def test_another_authority_replaces_the_installed_one_only_when_told(
    federation: Federation, tmp_path: Path, site: Path, kit: Path
) -> None:
    """An accident, or an attack: refused; with replace, the whole kit changes."""
    install_kit(site, kit)
    other = new_federation(tmp_path / "other", "rival", port=9443)
    theirs = admit(other, make_request(site, "alder", 12).request)
    before = files_of(site)
    with pytest.raises(UserError, match=r"another authority than that of demo.*--replace"):
        install_kit(site, theirs)
    assert files_of(site) == before
    install_kit(site, theirs, replace=True)
    assert keys_of(site).membership() == ("rival", "alder", "127.0.0.1:9443")
    assert read_certificate(keys_of(site).ca_file) == other.authority().certificate
    keys_of(site).tls_context()


def test_the_kit_of_another_site_is_refused(federation: Federation, tmp_path: Path, site: Path, kit: Path) -> None:
    """Mixed up by the coordinator; or of the same name with other keys."""
    birch = tmp_path / "birch"
    make_request(birch, "birch", 12)
    with pytest.raises(UserError, match="is for the site alder, and this is birch"):
        install_kit(birch, kit)
    twin = tmp_path / "twin"
    make_request(twin, "alder", 12)
    with pytest.raises(UserError, match="another TLS key"):
        install_kit(twin, kit)


def test_dates_are_told_with_a_hint_at_the_clock(federation: Federation, site: Path, kit: Path) -> None:
    """Expired, or not valid yet by this machine's clock."""
    now = datetime.now(UTC)
    with pytest.raises(UserError, match=r"expired on .* clock is right"):
        install_kit(site, kit, now=now + 91 * DAY)
    with pytest.raises(UserError, match=r"not valid before .*Set this machine's clock"):
        install_kit(site, kit, now=now - DAY)
    install_kit(site, kit, now=now + 89 * DAY)


@pytest.mark.parametrize("raw", [b"", b"{}", b'{"kind": "medsegfed kit"}', b"x" * 70_000])
def test_what_is_no_kit_is_told(site: Path, kit: Path, raw: bytes) -> None:
    """One line with the file's name."""
    kit.write_bytes(raw)
    with pytest.raises(UserError, match=r"alder\.kit"):
        install_kit(site, kit)


def test_a_kit_needs_a_site(tmp_path: Path, kit: Path) -> None:
    """A folder without site.yaml: join first."""
    with pytest.raises(UserError, match=r"holds no site\.yaml"):
        install_kit(tmp_path / "nowhere", kit)


# --- revocation -------------------------------------------------------------------------------------------------------


def test_a_site_is_revoked(federation: Federation, site: Path) -> None:
    """All its certificates on the list, its status in the register, the reason in the log."""
    join(federation, site)
    first = federation.members()["alder"].serial
    admit(federation, make_request(site, "alder", 12).request)
    member = revoke(federation, "alder", "laptop  stolen\n")
    assert federation.members()["alder"] == member
    assert member.status == "revoked"
    assert set(member.revoked) == {first, member.serial}
    assert listed(federation) == {first, member.serial}
    last = list(audit_lines(federation.audit_file))[-1]
    assert (last["event"], last["site"], last["reason"]) == ("site_revoked", "alder", "laptop stolen")
    assert events(federation)[-1] == "site_revoked"


def listed(federation: Federation) -> set[str]:
    """Serials on the revocation list, which must be the authority's."""
    found = x509.load_pem_x509_crl(federation.ca_crl.read_bytes())
    assert found.is_signature_valid(federation.authority().certificate.public_key())  # type: ignore[arg-type]
    return {f"{entry.serial_number:x}" for entry in found}


def test_revoked_keys_do_not_return_but_the_site_may(federation: Federation, tmp_path: Path, site: Path) -> None:
    """The old keys are refused for good, under this name and others; new ones are admitted; the list keeps the old."""
    join(federation, site)
    old = federation.members()["alder"]
    revoke(federation, "alder", "laptop stolen")
    with pytest.raises(UserError, match="revoked keys do not return"):
        admit(federation, make_request(site, "alder", 12).request)
    join(federation, tmp_path / "alder-new")
    member = federation.members()["alder"]
    assert (member.status, member.revoked) == ("admitted", {old.serial: old.not_after})
    assert set(member.retired) == {old.node_key, old.signing_key}
    with pytest.raises(UserError, match="alder is admitted with other keys"):
        admit(federation, make_request(site, "alder", 12).request)
    revoke(federation, "alder", "again")
    with pytest.raises(UserError, match="revoked keys do not return"):
        admit(federation, make_request(site, "alder", 12).request)
    assert listed(federation) == {old.serial, member.serial}


def test_revoking_again_mends_the_list(federation: Federation, tmp_path: Path, site: Path) -> None:
    """Cut short or repeated, the list ends up whole; it grows in number; others are not on it."""
    join(federation, site)
    join(federation, tmp_path / "birch", "birch")
    serial = federation.members()["alder"].serial
    numbers = []
    for _ in range(2):
        revoke(federation, "alder", "laptop stolen")
        numbers.append(list_number(federation.ca_crl.read_bytes()))
        assert listed(federation) == {serial}
    assert numbers == [2, 3]
    revoke(federation, "birch", "left")
    assert listed(federation) == {serial, federation.members()["birch"].serial}


def test_a_revocation_holds_though_the_register_cannot_be_written(
    federation: Federation, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list goes first: the disk fills up after it, and the certificate is out all the same."""
    join(federation, site)

    def full(*args: object) -> None:
        raise UserError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("server.members.write_members", full)
        with pytest.raises(UserError, match="No space"):
            revoke(federation, "alder", "laptop stolen")
    assert listed(federation) == {federation.members()["alder"].serial}


def test_expired_certificates_leave_the_list(federation: Federation, site: Path) -> None:
    """A list that only grew would in years be long."""
    join(federation, site)
    revoke(federation, "alder", "left")
    revoke(federation, "alder", "left", now=datetime.now(UTC) + 91 * DAY)
    assert listed(federation) == set()
    assert federation.members()["alder"].status == "revoked"


def test_whom_there_is_not_cannot_be_revoked(federation: Federation, site: Path) -> None:
    """The members are named; a reason is asked for."""
    join(federation, site)
    with pytest.raises(UserError, match=r"there is no site 'elder'.*Members: alder"):
        revoke(federation, "elder", "left")
    for reason in ("", " \n", "x" * 201):
        with pytest.raises(UserError, match="nothing was revoked"):
            revoke(federation, "alder", reason)
    assert federation.members()["alder"].status == "admitted"


def test_a_suspended_site_stays_so_when_admitted_again(federation: Federation, site: Path) -> None:
    """A new kit is no way around a suspension."""
    from dataclasses import replace

    from server.members import edit_members

    join(federation, site)
    with edit_members(federation.members_file) as members:
        members["alder"] = replace(members["alder"], status="suspended")
    admit(federation, make_request(site, "alder", 12).request)
    assert federation.members()["alder"].status == "suspended"


def test_a_suspended_site_is_lifted(federation: Federation, site: Path) -> None:
    """With its keys and certificates; only a suspended one; the audit log has it."""
    from dataclasses import replace

    from server.members import edit_members

    join(federation, site)
    before = federation.members()["alder"]
    with pytest.raises(UserError, match="alder is admitted, not suspended; nothing was lifted"):
        lift(federation, "alder")
    with edit_members(federation.members_file) as members:
        members["alder"] = replace(members["alder"], status="suspended")
    assert lift(federation, "alder") == before == federation.members()["alder"]
    assert events(federation)[-1] == "site_lifted"
    revoke(federation, "alder", "left")
    with pytest.raises(
        UserError, match=r"alder is revoked, not suspended; nothing was lifted\. It comes back with new"
    ):
        lift(federation, "alder")
    with pytest.raises(UserError, match=r"there is no site 'elder'.*Members: alder"):
        lift(federation, "elder")


def test_the_kits_certificate_is_the_registers(federation: Federation, site: Path, kit: Path) -> None:
    """What leaves is what the register knows, so that it can be revoked."""
    certificate = parse_certificate(json.loads(kit.read_bytes())["certificate"].encode())
    assert f"{certificate.serial_number:x}" == federation.members()["alder"].serial
    assert certificate_pem(certificate).decode() == json.loads(kit.read_bytes())["certificate"]
