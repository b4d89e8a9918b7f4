"""Approvals: signed by this site, for one run, one task and one program; waiting runs are bounded."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from client.approvals import (
    _DOMAIN,
    MAX_BYTES,
    MAX_PENDING,
    Approval,
    PendingRun,
    approve,
    approved_runs,
    check_approval,
    discard_pending,
    keep_pending,
    pending_run,
    pending_runs,
    revoke_approval,
    shown,
    task_hash,
)
from client.contract import TrainTask
from client.keys import SiteKeys
from client.policy import Refusal
from medsegdiff.errors import UserError
from medsegdiff.strict import compact_json, plain

PROGRAM = "a" * 64
RUN = "trial-0123456789ab"
NOW = datetime(2026, 3, 4, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> SiteKeys:
    return SiteKeys.create(tmp_path_factory.mktemp("site") / "keys")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> SiteKeys:
    return SiteKeys.create(tmp_path_factory.mktemp("other") / "keys")


def approved(folder: Path, task: TrainTask, keys: SiteKeys, run: str = RUN) -> Path:
    keep_pending(folder, task, run)
    approve(folder, pending_run(folder, run), keys, PROGRAM, "Dr. Ada", NOW)
    return folder / "approvals" / f"{run}.json"


def refused(folder: Path, task: TrainTask, keys: SiteKeys, match: str, code: str = "not-approved", **more: str) -> None:
    with pytest.raises(Refusal, match=match) as caught:
        check_approval(folder, task, more.get("run", RUN), keys, more.get("application", PROGRAM))
    assert caught.value.code == code
    assert str(folder) not in str(caught.value), "logs and the server see refusals: no path"


def test_an_approval_holds_for_run_task_and_program(tmp_path: Path, keys, tiny_task) -> None:
    """It is found again with all that was signed; the run waits no longer; nobody else may read the file."""
    path = approved(tmp_path, tiny_task, keys)
    expected = Approval(RUN, task_hash(tiny_task), PROGRAM, "2026-03-04T12:00:00.000Z", "Dr. Ada", 2, 2)
    assert check_approval(tmp_path, tiny_task, RUN, keys, PROGRAM) == expected
    assert approved_runs(tmp_path, keys) == ({RUN: (expected, tiny_task)}, {})
    assert pending_runs(tmp_path) == []
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("change", [{"rounds": 3}, {"local_steps": 3}, {"seed": 6}, {"proximal_mu": 0.1}])
def test_another_task_is_not_approved(tmp_path, keys, tiny_task, change) -> None:
    """Any field of the task, down to the seed."""
    approved(tmp_path, tiny_task, keys)
    refused(tmp_path, replace(tiny_task, **change), keys, "another task")


def test_another_run_or_program_is_not_approved(tmp_path, keys, tiny_task) -> None:
    """No approval, and one given before the program was updated, are told apart."""
    approved(tmp_path, tiny_task, keys)
    refused(tmp_path, tiny_task, keys, "is not approved. To see what it would do", run="other")
    refused(tmp_path, tiny_task, keys, "installed now is", "application-changed", application="b" * 64)


def test_a_revoked_approval_is_gone(tmp_path, keys, tiny_task) -> None:
    """From the next request on; taking it back twice says that there was none."""
    approved(tmp_path, tiny_task, keys)
    assert revoke_approval(tmp_path, RUN)
    assert not revoke_approval(tmp_path, RUN)
    refused(tmp_path, tiny_task, keys, "is not approved")


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    for key, value in changes.items():
        if key in data["approval"]:
            data["approval"][key] = value
        elif key in data["task"]:
            data["task"][key] = value
        else:
            data[key] = value
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change",
    [{"rounds": 3}, {"run": "other"}, {"by": "Dr. Eve"}, {"application": "b" * 64}, {"task_hash": "c" * 64},
     {"approved_at": "2027-03-04T12:00:00Z"}, {"seed": 9}, {"signature": "00" * 64}, {"signature": ""},
     {"signature": "zz"}, {"key": "00" * 32}, {"more": 1}],
)  # fmt: skip
def test_an_edited_approval_is_none(tmp_path, keys, tiny_task, change) -> None:
    """Any field of it, of the task beside it, the signature, or a field more."""
    path = approved(tmp_path, tiny_task, keys)
    edit(path, **change)
    refused(tmp_path, tiny_task, keys, "is no approval of run")
    good, bad = approved_runs(tmp_path, keys)
    assert (good, list(bad)) == ({}, [f"{RUN}.json"])


def test_a_wider_task_beside_a_narrow_signature_is_none(tmp_path, keys, tiny_task) -> None:
    """The file's task is compared with the signed hash, so that what is shown as approved was approved."""
    path = approved(tmp_path, tiny_task, keys)
    data = json.loads(path.read_text())
    data["task"] = plain(replace(tiny_task, rounds=99))
    path.write_text(json.dumps(data))
    refused(tmp_path, tiny_task, keys, "the task in it is not the one that was signed")


def test_an_approval_under_another_name_is_none(tmp_path, keys, tiny_task) -> None:
    """A copy of a good file does not approve a second run."""
    path = approved(tmp_path, tiny_task, keys)
    (path.parent / "other.json").write_bytes(path.read_bytes())
    refused(tmp_path, tiny_task, keys, f"it is that of run {RUN}", run="other")


def test_another_sites_approval_is_none(tmp_path, keys, stranger, tiny_task) -> None:
    """Signed soundly, by a key that is not this site's; also with this site's key written in its place."""
    path = approved(tmp_path, tiny_task, stranger)
    refused(tmp_path, tiny_task, keys, "not as it was signed by this site's key")
    edit(path, key=keys.signing_public)
    refused(tmp_path, tiny_task, keys, "not as it was signed by this site's key")


def test_a_signature_over_something_else_is_none(tmp_path, keys, tiny_task) -> None:
    """The site's key signs updates, too: without the approval's own prefix a signature approves nothing."""
    path = approved(tmp_path, tiny_task, keys)
    statement = compact_json(json.loads(path.read_text())["approval"]).encode()
    edit(path, signature=keys.sign(_DOMAIN + statement).hex())
    check_approval(tmp_path, tiny_task, RUN, keys, PROGRAM)
    edit(path, signature=keys.sign(statement).hex())
    refused(tmp_path, tiny_task, keys, "not as it was signed")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"{}", b"x" * 300_000])
def test_a_damaged_approval_is_none(tmp_path, keys, tiny_task, content) -> None:
    """Torn, huge, deep, not JSON: refused like a missing one, never a traceback."""
    path = approved(tmp_path, tiny_task, keys)
    path.write_bytes(content)
    with pytest.raises(UserError):
        check_approval(tmp_path, tiny_task, RUN, keys, PROGRAM)
    assert approved_runs(tmp_path, keys)[0] == {}


def test_a_full_disk_leaves_the_run_unapproved(tmp_path, keys, tiny_task, monkeypatch) -> None:
    """The approval is there whole or not at all, and the run goes on waiting."""
    keep_pending(tmp_path, tiny_task, RUN)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        approve(tmp_path, pending_run(tmp_path, RUN), keys, PROGRAM, "Dr. Ada")
    monkeypatch.undo()
    refused(tmp_path, tiny_task, keys, "is not approved")
    assert pending_run(tmp_path, RUN).task == tiny_task


@pytest.mark.parametrize("by", ["", "  ", "x" * 101, "Ada\x1b[2J"])
def test_an_approval_names_who_gave_it(tmp_path, keys, tiny_task, by) -> None:
    """An empty, endless or unprintable name is refused."""
    with pytest.raises(UserError, match="names nobody"):
        approve(tmp_path, PendingRun(RUN, tiny_task, ""), keys, PROGRAM, by)


def test_what_was_shown_is_what_is_signed(tmp_path, keys, tiny_task) -> None:
    """The server asks for something else while the officer reads: the approval is for what was read."""
    keep_pending(tmp_path, tiny_task, RUN)
    read = pending_run(tmp_path, RUN)
    keep_pending(tmp_path, replace(tiny_task, rounds=99), RUN)
    approve(tmp_path, read, keys, PROGRAM, "Dr. Ada")
    check_approval(tmp_path, tiny_task, RUN, keys, PROGRAM)
    refused(tmp_path, replace(tiny_task, rounds=99), keys, "another task")


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_a_waiting_run_is_kept_once(tmp_path, tiny_task) -> None:
    """The first time counts; the same question leaves the file alone, another task replaces it."""
    keep_pending(tmp_path, tiny_task, RUN, NOW)
    path = tmp_path / "pending" / f"{RUN}.json"
    before = path.stat().st_mtime_ns, path.read_bytes()
    keep_pending(tmp_path, tiny_task, RUN)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
    assert pending_run(tmp_path, RUN) == PendingRun(RUN, tiny_task, "2026-03-04T12:00:00.000Z")
    keep_pending(tmp_path, replace(tiny_task, seed=8), RUN)
    assert pending_run(tmp_path, RUN).task.seed == 8
    assert discard_pending(tmp_path, RUN)
    assert not discard_pending(tmp_path, RUN)


def test_a_server_that_invents_names_does_not_fill_the_disk(tmp_path, tiny_task) -> None:
    """Two hundred names: the latest twenty are kept, small, and nothing beside them; a name is kept once."""
    for number in range(200):
        keep_pending(tmp_path, replace(tiny_task, seed=number), f"run-{number}")
        os.utime(tmp_path / "pending" / f"run-{number}.json", (number, number))
    for number in range(20):
        keep_pending(tmp_path, replace(tiny_task, seed=number), "run-199")
    files = list((tmp_path / "pending").iterdir())
    assert sorted(path.stem for path in files) == sorted(f"run-{n}" for n in range(180, 200))
    assert len(files) == MAX_PENDING
    assert sum(path.stat().st_size for path in files) < MAX_PENDING * 4096
    assert len(pending_runs(tmp_path)) == MAX_PENDING


def test_a_huge_task_is_not_kept(tmp_path, tiny_task) -> None:
    """Its size is told; nothing is written."""
    huge = replace(tiny_task, dataset=replace(tiny_task.dataset, name="x" * MAX_BYTES))
    with pytest.raises(Refusal, match=r"its task takes 6\d,\d\d\d bytes, the limit is 65,536"):
        keep_pending(tmp_path, huge, RUN)
    assert not (tmp_path / "pending").exists()


def test_a_damaged_waiting_run_is_replaced(tmp_path, tiny_task) -> None:
    """What cannot be read is no run, and asks again soon; the names that wait are told."""
    keep_pending(tmp_path, tiny_task, RUN)
    keep_pending(tmp_path, tiny_task, "second")
    (tmp_path / "pending" / f"{RUN}.json").write_text("{")
    with pytest.raises(UserError, match=f"run {RUN}: does not wait for an approval; those that do: second"):
        pending_run(tmp_path, RUN)
    keep_pending(tmp_path, tiny_task, RUN)
    assert pending_run(tmp_path, RUN).task == tiny_task


@pytest.mark.parametrize("run", ["../x", "/etc/x", "a/b", "", "..", "x\0", ".x", "x" * 65, "x\n"])
def test_no_function_takes_a_hostile_name(tmp_path, keys, tiny_task, run) -> None:
    """Each of them, by itself: refused, and nothing is written, read or removed outside."""
    site = tmp_path / "site"
    site.mkdir()
    (tmp_path / "x.json").write_text("{}")
    for act in (
        lambda: keep_pending(site, tiny_task, run),
        lambda: pending_run(site, run),
        lambda: discard_pending(site, run),
        lambda: approve(site, PendingRun(run, tiny_task, ""), keys, PROGRAM, "Dr. Ada"),
        lambda: check_approval(site, tiny_task, run, keys, PROGRAM),
        lambda: revoke_approval(site, run),
    ):
        with pytest.raises(Refusal, match="is no name of a run"):
            act()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["site", "x.json"]


def test_a_waiting_run_under_another_name_does_not_wait(tmp_path, tiny_task) -> None:
    """A copy of the file under a second name is not that run."""
    keep_pending(tmp_path, tiny_task, RUN)
    path = tmp_path / "pending" / f"{RUN}.json"
    (path.parent / "copy.json").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="copy: does not wait"):
        pending_run(tmp_path, "copy")


def test_a_largest_dataset_can_still_be_approved(tmp_path, keys, tiny_task) -> None:
    """255 labels with long names: kept, approved, found."""
    labels = {"background": 0} | {f"a rather long name of a structure {n}": n for n in range(1, 200)}
    task = replace(tiny_task, dataset=replace(tiny_task.dataset, labels=labels, targets=None))
    approved(tmp_path, task, keys)
    check_approval(tmp_path, task, RUN, keys, PROGRAM)


def test_the_order_of_labels_is_part_of_a_task(tiny_task) -> None:
    """It is the order of indices, so another order is another task."""
    first = replace(
        tiny_task, dataset=replace(tiny_task.dataset, labels={"background": 0, "a": 1, "b": 2}, targets=None)
    )
    second = replace(
        tiny_task, dataset=replace(tiny_task.dataset, labels={"background": 0, "b": 2, "a": 1}, targets=None)
    )
    assert task_hash(first) != task_hash(second)


def test_text_from_elsewhere_is_shown_tame() -> None:
    """Control signs and text direction become question marks; endless text ends in dots."""
    assert shown("a\x1b[2Jb\u202ec\n") == "a?[2Jb?c?"
    assert shown("x" * 1000) == "x" * 61 + "..."
    assert shown("x" * 64) == "x" * 64
