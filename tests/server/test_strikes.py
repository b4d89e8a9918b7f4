"""Rejections in a row: who counts, who forgets, who is suspended, and that nothing counts twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from server.journal import Journal
from server.members import edit_members, read_members
from server.membership import Membership
from server.strikes import strikes_after, strikes_record, suspend_sites, suspended_in
from tests.server.test_members import member

ROUNDS = st.lists(st.dictionaries(st.sampled_from("abc"), st.booleans()), max_size=12)  # site -> accepted?


@given(rounds=ROUNDS)
def test_a_count_is_the_rejections_since_the_last_accepted_update(rounds) -> None:
    """Against counting backwards through the history; absence neither counts nor forgives."""
    record: dict = {}
    for number, outcome in enumerate(rounds, start=1):
        accepted = [site for site, good in outcome.items() if good]
        rejected = [site for site, good in outcome.items() if not good]
        record = {"strikes": strikes_after(record, accepted, rejected)}
        for site in "abc":
            due = 0
            for earlier in reversed(rounds[:number]):
                if earlier.get(site) is True:
                    break
                due += earlier.get(site) is False
            assert record["strikes"].get(site, 0) == due


def test_a_suspension_takes_the_place_of_the_count() -> None:
    """After the third: the site is out with those that were and are; its count begins anew when it is lifted."""
    before = {"strikes": {"a": 2, "b": 1}, "suspended": ["c", "d"]}
    found = strikes_record(before, [], ["a", "b"], 3, out=["c"])
    assert found == {"strikes": {"b": 2}, "suspends": ["a"], "suspended": ["a", "c"]}
    assert suspended_in(found) == ["a", "c"]
    assert suspended_in({"suspends": ["a"]}) == ["a"]  # as a federation's rounds were told once
    assert strikes_record(before, ["b"], ["a"], 3, out=[]) == {"suspends": ["a"], "suspended": ["a"]}
    assert strikes_record({}, ["a"], [], 3, out=[]) == {}
    assert strikes_record({}, ["a"], [], 3, ["c"], earlier={"round": 2, "strikes": {"b": 1}}) == {"strikes": {"b": 1}}


def test_the_register_is_changed_once_and_told_once(tmp_path: Path) -> None:
    """A crash between commit and suspension is made good; a lifted site is not suspended again for the old cause; one
    that was revoked stays so."""
    with edit_members(tmp_path / "members.json") as members:
        members["alder"] = member(site="alder")
        members["birch"] = member(site="birch", status="revoked")
    journal, membership = Journal(tmp_path / "journal.jsonl"), Membership(tmp_path)
    record = {"round": 4, "suspends": ["alder", "birch"]}

    def status() -> list[str]:
        return [m.status for m in read_members(tmp_path / "members.json").values()]

    for _ in range(2):
        suspend_sites(record, "run-1", 3, journal, membership)
        assert status() == ["suspended", "revoked"]
    assert [(e["event"], e["site"], e["strikes"]) for e in journal.events] == [
        ("suspended", "alder", 3), ("suspended", "birch", 3)
    ]  # fmt: skip
    with edit_members(tmp_path / "members.json") as members:
        members["alder"] = replace(members["alder"], status="admitted")
    suspend_sites(record, "run-1", 3, Journal(tmp_path / "journal.jsonl"), Membership(tmp_path))
    assert status() == ["admitted", "revoked"]
    suspend_sites(record | {"round": 9}, "run-1", 3, journal, membership)
    assert status() == ["suspended", "revoked"]
