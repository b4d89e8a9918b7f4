"""Certificates are renewed over the network: a new pair each time, never torn, by the enrolled site alone."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from renewal_server import connect_proxy, renewal_server
from small_federation import Template, files_of, join, keys_of, make_template, new_federation, rewrite
from tls_talk import client_context, server_context, talk

from client import keys as keys_module
from client.certificates import (
    certificate_days_left,
    certificate_pem,
    expiry_warning,
    key_fingerprint,
    new_tls_key,
    read_certificate,
    signing_request,
)
from deploy.admission import admit, revoke
from deploy.credentials import certified_hosts
from deploy.documents import document, signed_part
from deploy.federation import Federation, open_federation
from deploy.joining import install_kit, make_request
from deploy.renewal import (
    MOST_CERTIFICATES,
    RenewalRefused,
    answer_renewal,
    renew_server,
    renew_site,
    renewal_due,
)
from medsegdiff.chained_log import audit_lines, verify_log
from medsegdiff.errors import UserError
from server.members import edit_members, iso

DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here pulls the plug: what is written need not be on the disk before the next step."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """With the kit installed."""
    made = make_template(tmp_path_factory.mktemp("template"))
    federation = open_federation(made.folder / "federation")
    install_kit(made.folder / "alder", admit(federation, made.folder / "alder" / "alder.request"))
    return made


@pytest.fixture
def federation(tmp_path: Path, template: Template) -> Federation:
    return template.federation(tmp_path / "federation")


@pytest.fixture
def site(tmp_path: Path, template: Template) -> Path:
    return template.asked(tmp_path / "alder")


def at_port(site: Path, port: int) -> None:
    """Point the site at a server on this machine."""
    path = site / "keys" / "federation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "server": f"127.0.0.1:{port}"}))


def asking(site: Path, changes: dict[str, Any] | None = None, now: datetime | None = None) -> bytes:
    """What the site would send; `changes` are made before it is signed."""
    keys = keys_of(site)
    said = {
        "kind": "medsegfed renewal", "format": 1, "site": "alder", "csr": signing_request(new_tls_key(), "alder"),
        "time": iso(now or datetime.now(UTC)), **(changes or {}),
    }  # fmt: skip
    return document({**said, "signature": keys.sign(signed_part(said)).hex()})


# --- over the network -------------------------------------------------------------------------------------------------


def test_a_site_renews_over_mutual_tls(federation: Federation, site: Path) -> None:
    """A new key and certificate, which open the next connection; the register knows both; the logs tell it."""
    old = federation.members()["alder"]
    before = keys_of(site).fingerprints()
    with renewal_server(federation) as served:
        at_port(site, served.port)
        first = renew_site(site)
        middle = keys_of(site).fingerprints()
        second = renew_site(site)
    after, member = keys_of(site).fingerprints(), federation.members()["alder"]
    assert served.heard == ["alder", "alder"]
    assert len({before["tls"], middle["tls"], after["tls"]}) == 3
    assert (after["node"], after["signing"]) == (before["node"], before["signing"])
    assert member.serial == second.serial == f"{keys_of(site).certificate().serial_number:x}"
    assert set(member.earlier) == {old.serial, first.serial}
    assert 89.9 < second.days_left <= 90
    verify_log(federation.audit_file)
    assert [line["event"] for line in audit_lines(federation.audit_file)][-2:] == ["site_renewed"] * 2
    assert [line["event"] for line in audit_lines(site / "audit.jsonl")][-2:] == ["certificate_renewed"] * 2
    assert sorted(files_of(site / "keys")) == sorted(
        ["ca.crt", "federation.json", "names.key", "node.key", "node.pub", "signing.key", "tls.pem"]
    )


def test_the_old_certificate_goes_on(federation: Federation, site: Path, tmp_path: Path) -> None:
    """Connections made with the one before are accepted until it expires: no round is lost."""
    old = tmp_path / "old.pem"
    shutil.copy(site / "keys" / "tls.pem", old)
    with renewal_server(federation) as served:
        at_port(site, served.port)
        renew_site(site)
    pair = tmp_path / "server.pem"
    pair.write_bytes(federation.server_key.read_bytes() + federation.server_crt.read_bytes())
    server = server_context(federation.ca_crt, pair, federation.ca_crl)
    for each in (old, site / "keys" / "tls.pem"):
        assert not talk(server, client_context(federation.ca_crt, each), "127.0.0.1").refused
    revoke(federation, "alder", "left")
    server = server_context(federation.ca_crt, pair, federation.ca_crl)
    for each in (old, site / "keys" / "tls.pem"):
        assert talk(server, client_context(federation.ca_crt, each), "127.0.0.1").refused


def test_a_loaded_context_takes_the_new_pair(federation: Federation, site: Path, tmp_path: Path) -> None:
    """What the SuperNode does: the very context, given the file again, shows the new certificate."""
    pair = tmp_path / "server.pem"
    pair.write_bytes(federation.server_key.read_bytes() + federation.server_crt.read_bytes())
    context = keys_of(site).tls_context()
    with renewal_server(federation) as served:
        at_port(site, served.port)
        renew_site(site)
    context.load_cert_chain(site / "keys" / "tls.pem")
    serial = federation.members()["alder"].serial
    revoked = federation.folder / "old.crl"
    old = [int(each, 16) for each in federation.members()["alder"].earlier]
    revoked.write_bytes(federation.authority().revocation_list(old, 9))
    assert serial not in old
    assert not talk(server_context(federation.ca_crt, pair, revoked), context, "127.0.0.1").refused


def test_a_site_renews_through_a_proxy(federation: Federation, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTPS_PROXY is honoured: the only connection goes to the proxy, which is asked for the server."""
    with renewal_server(federation) as served, connect_proxy() as (url, asked):
        at_port(site, served.port)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HTTPS_PROXY", url)
        renew_site(site)
        assert asked == [f"127.0.0.1:{served.port}"]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        renew_site(site)
        assert len(asked) == 1


def test_a_certificate_of_a_minute_is_renewed(tmp_path: Path) -> None:
    """60-second certificates: due when a third is left, warned of all the time, replaced by one that lasts longer."""
    federation = new_federation(tmp_path / "federation", site_days=60 / 86_400)
    site = join(federation, tmp_path / "alder")
    keys = keys_of(site)
    present = keys.certificate()
    end = present.not_valid_after_utc
    assert not renewal_due(present, end - timedelta(seconds=25))
    assert renewal_due(present, end - timedelta(seconds=15))
    assert expiry_warning(certificate_days_left(keys.tls_file)) == 1
    time.sleep(1.1)  # dates in certificates are whole seconds
    with renewal_server(federation) as served:
        at_port(site, served.port)
        renewed = renew_site(site)
    assert end < renewed.not_after <= datetime.now(UTC) + timedelta(seconds=60)
    assert federation.members()["alder"].not_after == iso(renewed.not_after)


def test_ninety_days_are_renewed_at_thirty(site: Path) -> None:
    """A third of the time."""
    present = keys_of(site).certificate()
    end = present.not_valid_after_utc
    assert not renewal_due(present, end - 31 * DAY)
    assert renewal_due(present, end - 29 * DAY)


def refuses(site: Path, fault: str) -> None:
    """A renewal ends in one line, and the site's files are as before, but for the key that it asked with."""
    before = files_of(site)
    with pytest.raises(UserError, match=fault) as caught:
        renew_site(site)
    assert str(caught.value).isprintable()
    after = files_of(site)
    for files in (before, after):
        files.pop("keys/next.key", None)
    assert after == before


def test_what_stands_in_the_way_is_told(federation: Federation, site: Path, tmp_path: Path) -> None:
    """Nobody there, another server, an authority not ours: the pair stays, and how long it lasts is said."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    at_port(site, free)
    refuses(site, "ConnectError: .*another 90 days.*medsegfed doctor")
    rival = new_federation(tmp_path / "rival")
    with renewal_server(rival) as served:
        at_port(site, served.port)
        refuses(site, "CERTIFICATE_VERIFY_FAILED")
        assert served.heard == []


def test_another_host_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose certificate lacks the name that the site calls."""
    federation = new_federation(tmp_path / "federation", hosts=["fed.example.org"])
    site = join(federation, tmp_path / "alder")
    path = site / "keys" / "federation.json"
    with renewal_server(federation) as served:
        path.write_text(path.read_text().replace("fed.example.org:8443", f"127.0.0.2:{served.port}"))
        with pytest.raises(UserError, match=r"ConnectError|mismatch"):
            renew_site(site)
        assert served.heard == []


def test_a_revoked_site_is_turned_away(federation: Federation, site: Path) -> None:
    """By the gateway already: its certificate is on the list."""
    revoke(federation, "alder", "laptop stolen")
    with renewal_server(federation) as served:
        at_port(site, served.port)
        refuses(site, "could not be asked to renew")
        assert served.heard == []


def test_a_refusal_is_passed_on(federation: Federation, site: Path) -> None:
    """The server's reason, without control characters, and not without end."""
    evil = b"\x1b[2Jno \x00" + b"x" * 100_000
    with renewal_server(federation, lambda *_: (403, evil)) as served:
        at_port(site, served.port)
        refuses(site, r"server answered 403 \( ?\[2Jno x{100,300}\)")
    with edit_members(federation.members_file) as members:
        members["alder"] = replace(members["alder"], status="suspended")
    with renewal_server(federation) as served:
        at_port(site, served.port)
        refuses(site, r"answered 403 \(alder is suspended")


@pytest.mark.parametrize(
    "answer",
    [b"", b"{}", b'{"kind": "medsegfed renewed"}', b'{"kind": "medsegfed renewed", "certificate": 7}', b"\xff" * 90_000,
     b'{"kind": "medsegfed renewed", "certificate": "nothing"}', b"<html>502 Bad Gateway</html>"],
)  # fmt: skip
def test_an_answer_that_is_none_is_told(federation: Federation, site: Path, answer: bytes) -> None:
    """Whatever a middlebox or a broken server sends, the pair in use stays."""
    with renewal_server(federation, lambda *_: (200, answer)) as served:
        at_port(site, served.port)
        refuses(site, "answer cannot be used")


def test_a_certificate_that_is_not_ours_is_not_installed(federation: Federation, site: Path, tmp_path: Path) -> None:
    """Of another key, another site, another authority, or not valid now."""
    authority, rival = federation.authority(), new_federation(tmp_path / "rival").authority()
    now = datetime.now(UTC)

    def issue(how: Callable[[Any], Any]) -> Callable[[str, bytes], tuple[int, bytes]]:
        def answer(_: str, body: bytes) -> tuple[int, bytes]:
            from deploy.credentials import check_signing_request

            key = check_signing_request(json.loads(body)["csr"], "alder")
            return 200, document({"kind": "medsegfed renewed", "certificate": certificate_pem(how(key)).decode()})

        return answer

    for how, fault in (
        (lambda key: authority.issue_site(new_tls_key().public_key(), "alder", 9), "another key"),
        (lambda key: authority.issue_site(key, "birch", 9), "not of the site alder"),
        (lambda key: rival.issue_site(key, "alder", 9), "not signed by"),
        (lambda key: authority.issue_server(key, ["alder"], 9), "client authentication"),
        (lambda key: authority.issue_site(key, "alder", 9, now - 20 * DAY), "set the clock"),
        (lambda key: authority.issue_site(key, "alder", 9, now + DAY), "set the clock"),
    ):
        with renewal_server(federation, issue(how)) as served:
            at_port(site, served.port)
            refuses(site, fault)


def test_an_expired_certificate_needs_a_new_kit(federation: Federation, site: Path) -> None:
    """Said before anything is sent; the keys stay, and the kit made anew is installed over the old one."""
    late = datetime.now(UTC) + 91 * DAY
    before = files_of(site)
    with pytest.raises(UserError, match=r"expired on .*medsegfed join.*the keys stay"):
        renew_site(site, now=late)
    assert files_of(site) == before
    prints = keys_of(site).fingerprints()
    install_kit(site, admit(federation, make_request(site, "alder", 12).request, now=late), now=late)
    assert keys_of(site).fingerprints() == prints


def test_a_full_disk_keeps_the_old_pair(federation: Federation, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new pair cannot be written: the old one works, and the next renewal too.

    The server gives out so many certificates and no more: a night with a full disk must not use them up, whether the
    key that is asked with finds room or not.
    """
    write = keys_module.write_atomic
    for spared in ("", "next.key"):

        def full(path: Path, *rest: Any, spared: str = spared) -> None:
            if path.name != spared:
                raise UserError("No space left on device")
            write(path, *rest)

        before = len(federation.members()["alder"].earlier)
        with renewal_server(federation) as served:
            at_port(site, served.port)
            with monkeypatch.context() as patch:
                patch.setattr(keys_module, "write_atomic", full)
                for _ in range(20):
                    refuses(site, "No space")
            renew_site(site)
        assert len(federation.members()["alder"].earlier) == before + 1
    assert not (site / "keys" / "next.key").exists()


def test_an_answer_that_was_lost_is_given_again(federation: Federation, site: Path) -> None:
    """However often: one certificate, one line in the audit log. The next renewal is of another key."""
    lost = 20

    def lose(*asked: Any) -> tuple[int, bytes]:
        answer_renewal(federation, *asked)
        return 504, b""

    with renewal_server(federation, lose) as served:
        at_port(site, served.port)
        for _ in range(lost):
            refuses(site, "answered 504")
    with renewal_server(federation) as served:
        at_port(site, served.port)
        renewed = renew_site(site)
        assert renewed.serial == federation.members()["alder"].serial
        assert len(federation.members()["alder"].earlier) == 1
        assert [line["event"] for line in audit_lines(federation.audit_file)].count("site_renewed") == 1
        assert renew_site(site).serial != renewed.serial


def test_an_answer_that_cannot_be_kept_is_given_all_the_same(federation: Federation, site: Path) -> None:
    """The certificate stands in the register already; asked again, the server makes another one."""
    federation.renewals.parent.mkdir(parents=True, exist_ok=True)
    federation.renewals.write_text("a file where the folder should be")
    body = asking(site)
    first, second = (json.loads(answer_renewal(federation, "alder", body)) for _ in range(2))
    assert first["kind"] == "medsegfed renewed"
    assert first["certificate"] != second["certificate"]


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff" * 100, b'{"kind": "medsegfed renewed", "certificate": 7}'])
def test_an_answer_that_was_damaged_or_revoked_is_not_given_again(
    federation: Federation, site: Path, damage: bytes
) -> None:
    """Another certificate is made; the site's half-written key counts for none."""
    keys = keys_of(site)
    key = new_tls_key()
    body = asking(site, {"csr": signing_request(key, "alder")})
    first = answer_renewal(federation, "alder", body)
    assert answer_renewal(federation, "alder", body) == first
    with edit_members(federation.members_file) as members:
        member = members["alder"]
        members["alder"] = replace(member, revoked={member.serial: member.not_after})
    second = answer_renewal(federation, "alder", body)
    assert second != first
    (federation.renewals / "alder.json").write_bytes(damage)
    assert answer_renewal(federation, "alder", body) not in (first, second)
    (keys.folder / "next.key").write_bytes(damage)
    (keys.folder / "next.key").chmod(0o600)
    made = keys.next_key()
    assert key_fingerprint(keys.next_key().public_key()) == key_fingerprint(made.public_key())
    (keys.folder / "next.key").chmod(0o644)
    assert key_fingerprint(keys.next_key().public_key()) != key_fingerprint(made.public_key())


def test_after_a_renewal_the_site_can_ask_again(federation: Federation, site: Path) -> None:
    """Request and kit are of the TLS key in use; a kit of the one before is refused."""
    old_kit = federation.kit("alder").read_bytes()
    with renewal_server(federation) as served:
        at_port(site, served.port)
        renew_site(site)
    stale = site / "stale.kit"
    stale.write_bytes(old_kit)
    with pytest.raises(UserError, match="another TLS key"):
        install_kit(site, stale)
    install_kit(site, admit(federation, make_request(site, "alder", 12).request))


# --- the server's side ------------------------------------------------------------------------------------------------


def test_the_helper_is_answered(federation: Federation, site: Path) -> None:
    """What the next tests change is good as it is; the certificate is for the key that was sent."""
    body = asking(site)
    answer = json.loads(answer_renewal(federation, "alder", body))
    path = site / "answer.pem"
    path.write_text(answer["certificate"])
    assert f"{read_certificate(path).serial_number:x}" == federation.members()["alder"].serial
    assert answer["kind"] == "medsegfed renewed"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"site": "birch"}, "not for the site whose certificate"),
        ({"kind": "medsegfed request"}, "is no renewal"),
        ({"format": 2}, "format 2"),
        ({"extra": 1}, "unknown key"),
        ({"csr": "nothing"}, "no PEM"),
        ({"csr": signing_request(new_tls_key(), "birch")}, "not name exactly"),
        ({"time": "now"}, "no ISO 8601"),
        ({"time": "2026-01-01T00:00:00"}, "offset"),
        ({"time": 7}, "time"),
    ],
)
def test_a_renewal_that_says_what_cannot_be_is_refused(
    federation: Federation, site: Path, changes: dict[str, Any], fault: str
) -> None:
    """Signed by the site, yet refused; nothing is signed or noted."""
    before = files_of(federation.folder)
    with pytest.raises(RenewalRefused, match=fault):
        answer_renewal(federation, "alder", asking(site, changes))
    assert files_of(federation.folder) == before


def test_clocks_may_differ_by_five_minutes(federation: Federation, site: Path) -> None:
    """Beyond that the message says by how much, and which way: an old message cannot be used again."""
    now = datetime.now(UTC).replace(microsecond=0)
    body = asking(site, now=now)
    for seconds in (-300, 300):
        answer_renewal(federation, "alder", body, now=now + timedelta(seconds=seconds))
    with pytest.raises(RenewalRefused, match="301 s behind the server"):
        answer_renewal(federation, "alder", body, now=now + timedelta(seconds=301))
    with pytest.raises(RenewalRefused, match="ahead of the server"):
        answer_renewal(federation, "alder", body, now=now - timedelta(seconds=400))


def test_the_enrolled_key_signs(federation: Federation, site: Path, tmp_path: Path) -> None:
    """A thief of the TLS key alone cannot renew; a member cannot renew for another."""
    birch = join(federation, tmp_path / "birch", "birch")
    with pytest.raises(RenewalRefused, match="enrolled key"):
        answer_renewal(federation, "alder", asking(birch, {"site": "alder"}))
    with pytest.raises(RenewalRefused, match="not for the site whose certificate"):
        answer_renewal(federation, "birch", asking(site))
    path = tmp_path / "body"
    path.write_bytes(asking(site))
    rewrite(path, lambda data: data.update(csr=signing_request(new_tls_key(), "alder")))
    with pytest.raises(RenewalRefused, match="enrolled key"):
        answer_renewal(federation, "alder", path.read_bytes())
    request = json.loads((site / "alder.request").read_bytes())
    with pytest.raises(RenewalRefused, match="is no renewal"):
        answer_renewal(federation, "alder", json.dumps(request).encode())


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"x" * 70_000, b"\xff", b"[" * 50_000])
def test_bodies_that_are_none_are_refused(federation: Federation, body: bytes) -> None:
    """One line that may go back to the site."""
    with pytest.raises(RenewalRefused, match="the renewal"):
        answer_renewal(federation, "alder", body)


def test_only_members_in_good_standing_renew(federation: Federation, site: Path) -> None:
    """Neither a suspended nor a revoked site, nor one that is not in the register."""
    for status in ("suspended", "revoked"):
        with edit_members(federation.members_file) as members:
            members["alder"] = replace(members["alder"], status=status)
        with pytest.raises(RenewalRefused, match=f"alder is {status}"):
            answer_renewal(federation, "alder", asking(site))
    with edit_members(federation.members_file) as members:
        del members["alder"]
    with pytest.raises(RenewalRefused, match="not a member"):
        answer_renewal(federation, "alder", asking(site))


def test_a_site_cannot_fill_the_register(federation: Federation, site: Path) -> None:
    """Renewals without end stop at a number; expired certificates make room again; all can still be revoked."""
    for _ in range(MOST_CERTIFICATES - 1):
        answer_renewal(federation, "alder", asking(site))
    with pytest.raises(RenewalRefused, match=f"has {MOST_CERTIFICATES} certificates"):
        answer_renewal(federation, "alder", asking(site))
    assert len(revoke(federation, "alder", "loops").revoked) == MOST_CERTIFICATES


def test_expired_certificates_are_forgotten(federation: Federation, site: Path) -> None:
    """After 91 days the register knows the new one alone."""
    late = datetime.now(UTC) + 91 * DAY
    answer_renewal(federation, "alder", asking(site, now=late), now=late)
    assert federation.members()["alder"].earlier == {}


def test_the_server_is_renewed(federation: Federation, site: Path, tmp_path: Path) -> None:
    """A new certificate for the same key, with the hosts of federation.yaml; sites go on as they are."""
    key = federation.server_key.read_bytes()
    old = read_certificate(federation.server_crt)
    text = federation.config_file.read_text()
    federation.config_file.write_text(text.replace('["127.0.0.1"]', '["127.0.0.1", "127.0.0.2"]'))
    changed = open_federation(federation.folder)
    new = renew_server(changed)
    assert federation.server_key.read_bytes() == key
    assert read_certificate(federation.server_crt) == new
    assert key_fingerprint(new.public_key()) == key_fingerprint(old.public_key())
    assert new.serial_number != old.serial_number
    assert "127.0.0.2" in certified_hosts(new) - certified_hosts(old)
    assert list(audit_lines(federation.audit_file))[-1]["event"] == "server_renewed"
    pair = tmp_path / "server.pem"
    pair.write_bytes(key + federation.server_crt.read_bytes())
    assert not talk(server_context(federation.ca_crt, pair), keys_of(site).tls_context(), "127.0.0.2").refused


def test_a_server_without_its_key_is_told(federation: Federation) -> None:
    """Damaged or open to others: the old certificate stays."""
    before = federation.server_crt.read_bytes()
    federation.server_key.chmod(0o644)
    with pytest.raises(UserError, match="others than its owner"):
        renew_server(federation)
    federation.server_key.chmod(0o600)
    federation.server_key.write_bytes(b"")
    with pytest.raises(UserError, match="no private key"):
        renew_server(federation)
    federation.server_key.unlink()
    with pytest.raises(UserError, match=r"server\.key"):
        renew_server(federation)
    assert federation.server_crt.read_bytes() == before


def test_a_context_needs_tls_1_3(site: Path) -> None:
    """The client's side speaks nothing older."""
    assert keys_of(site).tls_context().minimum_version == ssl.TLSVersion.TLSv1_3
