"""The journal: every event there or the run stops; a torn tail is cut, damage elsewhere refused."""

from __future__ import annotations

import json

import pytest
from full_disk import file_limit
from hypothesis import given, settings
from hypothesis import strategies as st

from medsegdiff.errors import UserError
from server.journal import Journal, read_events


def filled(path, rounds: int = 3) -> Journal:
    journal = Journal(path)
    for number in range(rounds):
        journal.append("round", round=number, model_hash=f"h{number}", sites={"ä": None})
    return journal


def test_events_are_read_back(tmp_path) -> None:
    """In order, with their fields and a time; names keep their letters."""
    path = tmp_path / "new" / "journal.jsonl"
    written = filled(path).events
    read = Journal(path).events
    assert read == written
    assert [event["round"] for event in read] == [0, 1, 2]
    assert "ä" in path.read_text(encoding="utf-8")


def test_the_latest_match_is_found(tmp_path) -> None:
    """By kind and fields, the newest first; None where there is none."""
    journal = filled(tmp_path / "j")
    journal.append("round", round=1, model_hash="again")
    assert journal.last("round", round=1)["model_hash"] == "again"
    assert journal.last("round")["model_hash"] == "again"
    assert journal.last("round", round=1, model_hash="h1")["round"] == 1
    assert journal.last("scores") is None
    assert journal.last("round", nothing=3) is None


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 400))
def test_a_torn_tail_is_cut_and_the_rest_kept(tmp_path_factory, cut) -> None:
    """Cut at any byte: whole lines are kept, the torn one goes, and the next event stands on a line of its own."""
    path = tmp_path_factory.mktemp("j") / "journal.jsonl"
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    kept = whole[: max(0, len(whole) - cut)].count(b"\n")
    journal = Journal(path)
    assert [event["round"] for event in journal.events] == list(range(kept))
    journal.append("session")
    assert [event["event"] for event in Journal(path).events] == ["round"] * kept + ["session"]


@pytest.mark.parametrize("tail", [b'{"event": "rou', b'{"event": "rou\n', b"\x00\x00\x00\x00", b"[1]\n", b"\xff\n"])
def test_a_torn_block_is_cut(tmp_path, tail) -> None:
    """What a crash may leave behind the last whole line, with or without a line break."""
    path = tmp_path / "j"
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert len(Journal(path).events) == 3
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"{}", b"not json", b"", b"7", b'{"event": '])
def test_damage_in_the_middle_is_refused(tmp_path, line) -> None:
    """An edited line is named with its number; the file stays as it is."""
    path = tmp_path / "j"
    filled(path)
    lines = path.read_bytes().split(b"\n")
    lines[1] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match="line 2 of 3 is not a journal entry"):
        Journal(path)
    assert path.read_bytes() == b"\n".join(lines)


def test_a_number_that_json_has_not_is_refused(tmp_path) -> None:
    """NaN would be written as something other programs cannot read."""
    journal = Journal(tmp_path / "j")
    with pytest.raises(ValueError, match="JSON compliant"):
        journal.append("round", loss=float("nan"))
    assert journal.events == []


def test_a_disk_that_refuses_stops_the_run(tmp_path) -> None:
    """A folder in the place of the file: one line, and the event does not count as told."""
    journal = Journal(tmp_path / "j")
    (tmp_path / "j").mkdir()
    with pytest.raises(UserError, match="an event could not be written"):
        journal.append("session")
    assert journal.events == []


def test_each_line_is_one_json_object(tmp_path) -> None:
    """Line breaks inside a field do not tear the line."""
    journal = Journal(tmp_path / "j")
    journal.append("rejected", reason="two\nlines\u2028and more")
    assert [json.loads(line)["event"] for line in (tmp_path / "j").read_bytes().split(b"\n")[:-1]] == ["rejected"]
    assert len(Journal(tmp_path / "j").events) == 1


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400))
def test_a_reader_disturbs_nothing(tmp_path_factory, cut) -> None:
    """Whatever part of a line is there when somebody looks: the whole events are told, no byte is taken away."""
    path = tmp_path_factory.mktemp("j") / "journal.jsonl"
    filled(path)
    whole = path.read_bytes()
    seen = whole[: max(0, len(whole) - cut)]
    path.write_bytes(seen)
    assert [event["round"] for event in read_events(path)] == list(range(seen.count(b"\n")))
    assert path.read_bytes() == seen


def test_a_reader_names_what_it_cannot_read(tmp_path) -> None:
    """No journal yet is no fault; damage in the middle and a folder in its place are, in one line."""
    path = tmp_path / "j"
    assert read_events(path) == []
    filled(path)
    path.write_bytes(path.read_bytes().replace(b"round", b"\x00\x00", 1))
    with pytest.raises(UserError, match="line 1 of 3 is not a journal entry"):
        read_events(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_events(tmp_path)


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path) -> None:
    """Half a line fits: nothing of it stays, and the next event, once there is space, stands on a line of its own."""
    path = tmp_path / "j"
    journal = filled(path)
    before = path.read_bytes()
    with file_limit(len(before) + 20), pytest.raises(UserError, match="Free space"):
        journal.append("round", round=3, text="x" * 200)
    assert path.read_bytes() == before
    journal.append("round", round=3)
    assert [event["round"] for event in read_events(path)] == [0, 1, 2, 3]
    assert journal.events == read_events(path)
