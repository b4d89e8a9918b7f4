"""The register of members: what was written is read, what was not is told, changes made at once do not get lost."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from medsegdiff.errors import UserError
from server import members as members_module
from server.members import Member, edit_members, iso, moment, read_members, unexpired, write_members

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
NODE = "ecdsa-sha2-nistp384 " + "A" * 180


def member(site: str = "alder", **changes: object) -> Member:
    fields = {
        "site": site, "node_key": NODE, "signing_key": "0f" * 32, "patients": 12, "serial": "ab1", "status": "admitted",
        "not_after": iso(NOW + timedelta(days=90)), "admitted": iso(NOW),
    }  # fmt: skip
    return Member(**{**fields, **changes})  # type: ignore[arg-type]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """All fields, in order; no file is no member."""
    path = tmp_path / "members.json"
    assert read_members(path) == {}
    full = member(
        "birch", earlier={"a": iso(NOW)}, revoked={"b": iso(NOW)}, retired=(NODE, "0f" * 32), status="revoked"
    )
    write_members(path, {"elm": member("elm"), "birch": full})
    assert list(read_members(path).items()) == [("elm", member("elm")), ("birch", full)]


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "../alder"}, {"site": ""}, {"site": "a" * 65}, {"node_key": "ssh-ed25519 AAAA"},
        {"node_key": NODE + "\n"}, {"node_key": NODE + " me@host"}, {"signing_key": "0F" * 32}, {"signing_key": "0f"},
        {"patients": 0},
        {"patients": -1}, {"patients": 10**9}, {"serial": "xyz"}, {"serial": ""}, {"not_after": "soon"},
        {"not_after": "2026-03-01T12:00:00"}, {"admitted": ""}, {"earlier": {"q": iso(NOW)}},
        {"revoked": {"a": "never"}},
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    """In code at once, in a file with the entry's name and the key."""
    with pytest.raises(ValueError, match=r"."):
        member(**changes)
    path = tmp_path / "members.json"
    write_members(path, {"alder": member()})
    data = json.loads(path.read_text())
    data["members"]["alder"].update(changes)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"members.json: 'alder'"):
        read_members(path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 2, "members": {}}', '{"format": 1}', '{"format": 1, "members": []}',
     '{"format": 1, "members": {"alder": 7}}', '{"format": 1, "members": {"alder": {"site": "alder"}}}', "[" * 100_000,
     "\xff"],
)  # fmt: skip
def test_what_is_no_register_is_told(tmp_path: Path, text: str) -> None:
    """Empty, torn, another format, too deep: one line, never an empty register."""
    path = tmp_path / "members.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"members\.json"):
        read_members(path)


def test_unknown_keys_and_statuses_are_refused(tmp_path: Path) -> None:
    """A slip in an edit by hand names the key."""
    path = tmp_path / "members.json"
    write_members(path, {"alder": member()})
    text = path.read_text()
    for old, new, fault in (
        ('"admitted",', '"admited",', "status"),
        ('"patients"', '"patient"', "did you mean 'patients'"),
        ('"alder": {', '"birch": {', "is of the site 'alder'"),
    ):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=fault):
            read_members(path)


def test_a_huge_register_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit it is the wrong file."""
    monkeypatch.setattr(members_module, "MAX_BYTES", 1000)
    path = tmp_path / "members.json"
    path.write_text('{"format": 1, "members": {}}' + " " * 1000)
    with pytest.raises(UserError, match="1,028 bytes"):
        read_members(path)


def test_an_exception_changes_nothing(tmp_path: Path) -> None:
    """Whatever is raised inside the block, the register stays as it was, and the lock is given back."""
    path = tmp_path / "members.json"
    write_members(path, {"alder": member()})
    before = path.read_bytes()
    with pytest.raises(KeyError), edit_members(path) as members:
        members["birch"] = members["nobody"] if members.pop("alder") else member("birch")
    assert path.read_bytes() == before
    with edit_members(path) as members:
        members["birch"] = member("birch")
    assert set(read_members(path)) == {"alder", "birch"}


def test_an_unchanged_register_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking under the lock costs no write."""
    path = tmp_path / "members.json"
    write_members(path, {"alder": member()})
    monkeypatch.setattr(members_module, "write_atomic", lambda *_: pytest.fail("written"))
    with edit_members(path) as members:
        members["alder"] = replace(members["alder"])


def _count_up(path: Path, times: int) -> None:
    for _ in range(times):
        with edit_members(path) as members:
            members["alder"] = replace(members["alder"], patients=members["alder"].patients + 1)


def test_changes_at_once_do_not_get_lost(tmp_path: Path) -> None:
    """Three processes add up 1 + 60 changes; without the lock some would be overwritten."""
    path = tmp_path / "members.json"
    write_members(path, {"alder": member(patients=1)})
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_count_up, args=(path, 20)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert read_members(path)["alder"].patients == 61


def test_certificates_that_count() -> None:
    """Newest first; neither expired ones nor revoked ones."""
    old, new = iso(NOW - timedelta(seconds=1)), iso(NOW + timedelta(days=1))
    entry = member(serial="c", not_after=new, earlier={"b": new, "a": old, "d": new}, revoked={"d": new})
    assert list(entry.certificates(NOW)) == ["c", "b"]
    assert entry.certificates(NOW + timedelta(days=2)) == {}
    assert unexpired({"a": old, "b": new}, NOW) == {"b": new}


def test_only_admitted_members_are_active() -> None:
    """Neither a revoked nor a suspended one."""
    assert [member(status=status).active for status in ("admitted", "revoked", "suspended")] == [True, False, False]


def test_times_are_told_with_their_offset() -> None:
    """UTC to the second, read back as the same moment."""
    local = NOW.astimezone().replace(microsecond=999)
    assert moment(iso(local)) == NOW
    assert iso(NOW).endswith("+00:00")
