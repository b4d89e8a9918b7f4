"""The site's policy: what it refuses, under which code, and that the stricter side wins."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.approvals import approve, pending_run, pending_runs
from client.contract import REFUSALS, TrainTask
from client.keys import SiteKeys
from client.policy import SPARE_TRAININGS, Refusal, SitePolicy, check_policy
from client.site import SiteConfig
from medsegdiff.errors import UserError
from medsegdiff.strict import parse_config

PROGRAM = "a" * 64
NOON = datetime(2026, 3, 4, 12, 0)
RUN = "trial-0123456789ab"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> SiteKeys:
    return SiteKeys.create(tmp_path_factory.mktemp("site") / "keys")


def config(**policy: Any) -> SitePolicy:
    data = {"name": "alder", "data": "data", "policy": policy}
    return parse_config(data, SiteConfig, "site.yaml").policy


# --- the section of site.yaml -----------------------------------------------------------------------------------------


def test_the_defaults_are_cautious() -> None:
    """Without a policy section: approval asked for, no fewer than five patients, no program pinned, any hour."""
    policy = parse_config({"name": "alder", "data": "data"}, SiteConfig, "site.yaml").policy
    assert policy == SitePolicy(None, 200, 5, None, None, True)
    assert hash(policy) == hash(SitePolicy())


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        ({"application": "abc"}, r"site\.yaml: policy: application must be the 64 hexadecimal digits"),
        ({"application": "A" * 64}, "application must be"),
        ({"max_rounds": 0}, "max_rounds must be at least 1, found 0"),
        ({"min_patients": 0}, "min_patients must be at least 1, found 0"),
        ({"max_rounds": "many"}, "policy.max_rounds: .*found 'many'"),
        ({"privacy_floor": 8}, "privacy_floor must be null: what a site asks of privacy is the section `privacy`"),
        ({"privacy_floor": {"epsilon": 8.0}}, "privacy_floor must be null"),
        ({"privacy_floor": "strict"}, "privacy_floor must be null"),
        ({"allowed_hours": "18-7"}, "must be of the form \"18:00-07:00\", or null for any time, found '18-7'"),
        ({"allowed_hours": "24:00-07:00"}, "must be of the form"),
        ({"allowed_hours": "18:00-07:00\n"}, "must be of the form"),
        ({"allowed_hours": "18:00-18:00"}, "begin and end at the same minute"),
        ({"approval_require": False}, "did you mean 'approval_required'"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(policy: dict[str, Any], match: str) -> None:
    """Each fault is named with what was found and what would do."""
    with pytest.raises(UserError, match=match):
        config(**policy)


@pytest.mark.parametrize(
    ("hours", "open_at", "closed_at"),
    [
        ("18:00-07:00", ["18:00", "23:59", "00:00", "06:59"], ["07:00", "12:00", "17:59"]),
        ("08:30-17:00", ["08:30", "12:00", "16:59"], ["08:29", "17:00", "23:00", "00:00"]),
        ("00:00-23:59", ["00:00", "23:58"], ["23:59"]),
        ("23:00-00:00", ["23:00", "23:59"], ["00:00", "22:59"]),
    ],
)
def test_hours_may_run_across_midnight(hours: str, open_at: list[str], closed_at: list[str]) -> None:
    """The first minute is inside, the last one outside."""
    policy = config(allowed_hours=hours)

    def at(text: str) -> bool:
        return policy.is_open(datetime.fromisoformat(f"2026-03-04T{text}:30"))

    assert [t for t in open_at + closed_at if at(t)] == open_at


@given(begin=st.times(), end=st.times(), now=st.datetimes())
def test_hours_and_their_opposite_share_the_day(begin, end, now) -> None:
    """Any moment lies in exactly one of "begin-end" and "end-begin"."""
    first, second = f"{begin:%H:%M}", f"{end:%H:%M}"
    if first != second:
        both = [SitePolicy(allowed_hours=h).is_open(now) for h in (f"{first}-{second}", f"{second}-{first}")]
        assert sorted(both) == [False, True]


def test_hours_are_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time with a zone is turned to this machine's clock."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        policy = config(allowed_hours="18:00-19:00")
        assert policy.is_open(datetime(2026, 3, 4, 9, 30, tzinfo=UTC))
        assert not policy.is_open(datetime(2026, 3, 4, 18, 30, tzinfo=UTC))
    finally:
        monkeypatch.undo()
        time.tzset()


# --- decisions --------------------------------------------------------------------------------------------------------


def ask(folder: Path, keys: SiteKeys, task: TrainTask, policy: SitePolicy, run: str = RUN, **more: Any) -> Any:
    return check_policy(policy, task, run, **({"application": PROGRAM, "now": NOON} | more), keys=keys, folder=folder)


def refused(code: str, folder: Path, keys: SiteKeys, task: TrainTask, policy: SitePolicy, **more: Any) -> str:
    with pytest.raises(Refusal) as caught:
        ask(folder, keys, task, policy, **more)
    assert caught.value.code == code, str(caught.value)
    assert caught.value.outward == f"{code}: {REFUSALS[code]}"
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("code", "policy", "more", "text"),
    [
        ("application-changed", {"application": "b" * 64}, {}, "allows the program bbbbbbbbbbbb, aaaaaaaaaaaa is"),
        ("too-many-rounds", {"max_rounds": 1}, {}, "has 2 rounds; policy.max_rounds is 1"),
        ("round-out-of-range", {}, {"round_": 0}, "asks for round 0 of 2"),
        ("round-out-of-range", {}, {"round_": 3}, "asks for round 3 of 2"),
        ("round-out-of-range", {}, {"round_": -(10**30)}, "asks for round -1,000"),
        ("too-many-rounds", {}, {"trainings": 2 + SPARE_TRAININGS}, "has trained 7 times for its 2 rounds"),
        ("outside-hours", {"allowed_hours": "18:00-07:00"}, {}, "it is 12:00; policy.allowed_hours are 18:00-07:00"),
        ("too-few-patients", {}, {"train_patients": 4}, "has 4 training patients; policy.min_patients is 5"),
        ("too-few-patients", {"min_patients": 10}, {"train_patients": 9}, "has 9 training patients"),
    ],
)
@pytest.mark.parametrize("approval_required", [True, False])
def test_what_the_policy_forbids_is_refused_by_name(
    tmp_path, keys, tiny_task, code, policy, more, text, approval_required
) -> None:
    """An approved run, and one that needs no approval, are held to every limit; the text says what was found."""
    asked = config(approval_required=approval_required, **policy)
    if approval_required:
        refused("not-approved", tmp_path, keys, tiny_task, asked)
        approve(tmp_path, pending_run(tmp_path, RUN), keys, PROGRAM, "Dr. Ada")
    assert text in refused(code, tmp_path, keys, tiny_task, asked, **more)


@pytest.mark.parametrize("more", [{}, {"round_": 1}, {"round_": 2, "train_patients": 5, "trainings": 6}])
def test_what_keeps_to_the_policy_passes(tmp_path, keys, tiny_task, more) -> None:
    """At every limit's edge; with the approval it runs under, or None where none is asked for."""
    strict = config(application=PROGRAM, max_rounds=2, allowed_hours="12:00-12:01")
    refused("not-approved", tmp_path, keys, tiny_task, strict, **more)
    given_ = approve(tmp_path, pending_run(tmp_path, RUN), keys, PROGRAM, "Dr. Ada")
    assert ask(tmp_path, keys, tiny_task, strict, **more) == given_
    loose = config(approval_required=False)
    assert ask(tmp_path, keys, tiny_task, loose, run="another", **more) is None
    assert [run.run for run in pending_runs(tmp_path)] == []


def test_a_run_that_waits_is_kept_whatever_else_forbids_it(tmp_path, keys, tiny_task) -> None:
    """At noon, outside the hours, with too many rounds: the officer can look at it before the evening."""
    policy = config(allowed_hours="18:00-07:00", max_rounds=1)
    refused("not-approved", tmp_path, keys, tiny_task, policy)
    assert pending_run(tmp_path, RUN).task == tiny_task


def test_the_installed_program_is_hashed_where_none_is_given(tmp_path, keys, tiny_task) -> None:
    """Pinned to another program: refused; approval for what is installed: passes."""
    from client.application import application_hash

    policy = config(application=PROGRAM, approval_required=False)
    refused("application-changed", tmp_path, keys, tiny_task, policy, application=None)
    pinned = config(application=application_hash(), approval_required=False)
    assert ask(tmp_path, keys, tiny_task, pinned, application=None) is None


def test_a_full_disk_does_not_let_a_run_pass(tmp_path, keys, tiny_task) -> None:
    """What cannot be kept for looking at is refused all the same, with its own code; no path is told."""
    (tmp_path / "pending").write_text("a file in its place")
    text = refused("not-approved", tmp_path, keys, tiny_task, SitePolicy())
    assert "could not be kept in pending/" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize(
    "run",
    ["", ".", "..", "../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", "a\n", ".hidden", "-rf", "x" * 65,
     "ä", "run\u202e", "a b", "x" * 100_000, "\x1b[2J", "con:", "a;b"],
)  # fmt: skip
def test_a_hostile_name_never_becomes_a_path(tmp_path, keys, tiny_task, run, required) -> None:
    """Refused before anything is looked up or written, also where no approval is asked for; short, on one line."""
    site = tmp_path / "deep" / "er" / "site"
    site.mkdir(parents=True)
    with pytest.raises(Refusal, match="is no name of a run") as caught:
        ask(site, keys, tiny_task, config(approval_required=required), run=run)
    assert caught.value.code == "not-approved"
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert list(site.iterdir()) == []


def test_a_refusal_has_a_code_of_the_contract() -> None:
    """Any other code is our own mistake: the server would be told something nobody agreed to."""
    with pytest.raises(ValueError, match="none of the contract's refusals"):
        Refusal("patient-mueller", "x")
