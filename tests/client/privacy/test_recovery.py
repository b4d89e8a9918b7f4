"""A lost, damaged or older ledger is brought up to what was noted, and never counts less than was spent."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.privacy import account as accounts
from client.privacy import accounting
from client.privacy.account import Ceiling, check_noted, frozen_delta, ledger_path, read_account, spent
from client.privacy.accounting import Mechanism, epsilon
from client.privacy.ledger import Ledger
from client.privacy.recovery import recover, write_off
from client.privacy.renyi import renyi_epsilon
from client.refusal import Refusal
from medsegdiff.chained_log import AUDIT_LOG, ChainedLog, audit_lines
from medsegdiff.errors import UserError

CEILING = Ceiling(3.0, 1e-5)


def quick(history: Iterable[Mechanism], delta: float) -> accounting.Epsilon:
    """The Renyi bound alone: where the file is tested, not the figure."""
    value = renyi_epsilon(history, delta)
    return accounting.Epsilon(value, value, value)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "epsilon", quick)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return ledger_path(tmp_path)


def book_of(path: Path, ceiling: Ceiling = CEILING) -> Ledger:
    return Ledger(path, ceiling, path.with_name(AUDIT_LOG))


def files_of(path: Path) -> list[Path]:
    return [path, path.with_name(f"{path.name}.head")]


def keep(path: Path) -> list[bytes | None]:
    return [file.read_bytes() if file.exists() else None for file in files_of(path)]


def put_back(path: Path, kept: list[bytes | None]) -> None:
    for file, data in zip(files_of(path), kept, strict=True):
        file.unlink(missing_ok=True)
        if data is not None:
            file.write_bytes(data)


def recovered(path: Path, ceiling: Ceiling = CEILING) -> tuple[int, int, int]:
    done = recover(path, ceiling, path.with_name(AUDIT_LOG))
    return done.reservations, done.heads, len(done.moved)


def rounds_counted(path: Path) -> Counter[tuple[str, int, int]]:
    """What counts, by run, round and steps: two trainings of a round are two."""
    return Counter((e.run, e.round, e.charged.steps) for e in read_account(path).counted)


def used(path: Path, trainings: int = 3) -> Ledger:
    """A ledger of some committed trainings."""
    book = book_of(path)
    for number in range(trainings):
        book.commit(book.reserve("a", number, 6.0, 0.1, 20), 20)
    return book


def test_a_lost_ledger_is_written_anew_from_the_audit_log(path: Path) -> None:
    """All of it, in full, under the first filter's order; refused before, at work after, and sound."""
    book = used(path)
    before = book.account()
    put_back(path, [None, None])
    with pytest.raises(UserError, match="medsegfed ledger recover"):
        book_of(path).reserve("a", 3, 6.0, 0.1, 20)
    assert recovered(path) == (3, 6, 0)
    after = check_noted(path, path.with_name(AUDIT_LOG))
    assert (after.history, after.order) == (before.history, before.order)
    assert [entry.state for entry in after.entries] == ["recovered"] * 3
    assert before.heads - after.heads == {read_head for read_head in before.heads if read_head not in noted(path)}
    fresh = book_of(path)
    fresh.commit(fresh.reserve("a", 3, 6.0, 0.1, 20), 20)
    assert fresh.account().history == (Mechanism(6.0, 0.1, 80),)
    assert recovered(path) == (0, 0, 0)


def noted(path: Path) -> set[str]:
    return {line["ledger"] for line in audit_lines(path.with_name(AUDIT_LOG)) if "ledger" in line}


def test_an_older_copy_gets_what_it_lacks_and_no_more(path: Path) -> None:
    """The reservation that was open in the copy stays so: its end is known to the audit log alone, and 20 >= 15."""
    book = used(path, 1)
    opened = book.reserve("a", 1, 6.0, 0.1, 20)
    kept = keep(path)
    book.commit(opened, 15)
    book.commit(book.reserve("a", 2, 6.0, 0.1, 20), 20)
    put_back(path, kept)
    assert recovered(path) == (1, 3, 0)
    assert [(e.round, e.state) for e in read_account(path).entries] == [(0, "committed"), (1, "open"), (2, "recovered")]
    assert read_account(path).history == (Mechanism(6.0, 0.1, 60),)


@pytest.mark.parametrize("how", ["flipped", "cut", "headless", "logless", "empty"])
def test_a_damaged_ledger_is_moved_aside(path: Path, how: str) -> None:
    """Nothing of it is thrown away, byte for byte."""
    used(path)
    log, head = files_of(path)
    data = log.read_bytes()
    match how:
        case "flipped":
            log.write_bytes(data.replace(b'"steps":20', b'"steps":02', 1))
        case "cut":
            log.write_bytes(data[:-100])
        case "empty":
            log.write_bytes(b"")
        case "headless":
            head.unlink()
        case "logless":
            log.unlink()
    there = {file.read_bytes() for file in files_of(path) if file.exists()}
    assert recovered(path)[0] == 3
    aside = list(path.parent.glob("*.damaged-*"))
    assert {file.read_bytes() for file in aside} == there
    assert check_noted(path, path.with_name(AUDIT_LOG)).history == (Mechanism(6.0, 0.1, 60),)


def older_audit(path: Path, kept: list[bytes]) -> None:
    for file, data in zip(files_of(path.with_name(AUDIT_LOG)), kept, strict=True):
        file.write_bytes(data)


@pytest.mark.parametrize("line", ["first", "last"])
def test_an_older_audit_log_does_not_forget_what_a_damaged_ledger_still_tells(path: Path, line: str) -> None:
    """Its legible lines count; where its last one is illegible and not noted, nothing is recovered, nothing moved."""
    used(path, 2)
    kept = [file.read_bytes() for file in files_of(path.with_name(AUDIT_LOG))]
    book = book_of(path)
    book.commit(book.reserve("a", 2, 6.0, 0.1, 20), 20)
    lines = path.read_bytes().splitlines(keepends=True)
    which = 1 if line == "first" else -1
    lines[which] = lines[which].replace(b'"', b"'", 1)
    path.write_bytes(b"".join(lines))
    older_audit(path, kept)
    before = keep(path)
    if line == "last":
        with pytest.raises(UserError, match="write-off"):
            recovered(path)
        assert keep(path) == before
    else:
        assert recovered(path)[0] == 3
        assert rounds_counted(path) == Counter({("a", number, 20): 1 for number in range(3)})
        check_noted(path, path.with_name(AUDIT_LOG))


def test_a_training_that_overran_counts_whole(path: Path) -> None:
    """20 steps reserved, 26 taken, which the commit alone tells; lost with its reservation, or without."""
    book = used(path, 1)
    reservation = book.reserve("a", 1, 6.0, 0.1, 20)
    kept = keep(path)
    with pytest.raises(UserError, match="took 26 steps"):
        book.commit(reservation, 26)
    for copy in ([None, None], kept):
        put_back(path, copy)
        recovered(path)
        assert check_noted(path, path.with_name(AUDIT_LOG)).history == (Mechanism(6.0, 0.1, 46),)


def test_what_overran_counts_where_the_audit_log_knows_the_end_alone(path: Path) -> None:
    """The reservation stands in the ledger's copy; the log that notes its commit was begun after it."""
    book = used(path, 1)
    reservation = book.reserve("a", 1, 6.0, 0.1, 20)
    begin_audit_anew(path)
    book.reserve("a", 2, 6.0, 0.1, 20)
    kept = keep(path)
    with pytest.raises(UserError, match="took 26 steps"):
        book.commit(reservation, 26)
    put_back(path, kept)
    assert recovered(path)[0] == 1
    assert read_account(path).history == (Mechanism(6.0, 0.1, 66),)


def begin_audit_anew(path: Path) -> None:
    """As a message of the log advises where its files are damaged: they are moved elsewhere."""
    for file in files_of(path.with_name(AUDIT_LOG)):
        file.rename(file.with_name(f"old-{file.name}"))


@pytest.mark.parametrize("written_off", [False, True])
def test_an_audit_log_that_was_begun_later_does_not_know_all(path: Path, written_off: bool) -> None:
    """Refused, untouched; with a copy of the ledger that reaches into it, nothing is missing."""
    used(path)
    wide = Ceiling(6.0, 2e-5)
    if written_off:
        write_off(path, CEILING, path.with_name(AUDIT_LOG), CEILING)
    begin_audit_anew(path)
    short = keep(path)
    book = book_of(path, wide)
    reservation = book.reserve("b", 1, 6.0, 0.1, 20)
    kept = keep(path)
    book.commit(reservation, 20)
    for copy in ([None, None], short, [b"x", None]):
        put_back(path, copy)
        with pytest.raises(UserError, match="begun when the ledger was in use"):
            recovered(path, wide)
        assert keep(path) == copy
    put_back(path, kept)
    assert recovered(path, wide)[0] == 0
    assert read_account(path).history == (Mechanism(6.0, 0.1, 20 if written_off else 80),)


def test_a_recovered_ledger_that_is_damaged_counts_once(path: Path) -> None:
    """Its lines are recovered ones, whose lost heads the audit log knows."""
    used(path)
    put_back(path, [None, None])
    recovered(path)
    path.write_bytes(path.read_bytes().replace(b'"opened"', b'"openEd"', 1))
    assert recovered(path)[0] == 3
    assert read_account(path).history == (Mechanism(6.0, 0.1, 60),)


def test_a_ledger_of_another_version_is_left_alone(path: Path) -> None:
    """It is whole: what it says is only not understood here."""
    used(path)
    ChainedLog(path).append("forgiven", epsilon=1.0)
    before = keep(path)
    with pytest.raises(UserError, match="Install the version that wrote it"):
        recovered(path)
    assert keep(path) == before


@pytest.mark.parametrize("audit", ["gone", "edited"])
def test_nothing_is_recovered_from_an_audit_log_that_is_none(path: Path, audit: str) -> None:
    """Nor is anything touched."""
    used(path)
    file = path.with_name(AUDIT_LOG)
    if audit == "gone":
        for part in (file, file.with_name(f"{file.name}.head")):
            part.unlink()
    else:
        file.write_bytes(file.read_bytes().replace(b'"steps":20', b'"steps":02', 1))
    put_back(path, [b"x", None])
    with pytest.raises(UserError, match="write-off" if audit == "gone" else "not as it was written"):
        recovered(path)
    assert keep(path) == [b"x", None]


def test_lost_twice_it_counts_once(path: Path) -> None:
    """The audit log then knows the reservations and an earlier recovery of them."""
    used(path)
    for _ in range(2):
        put_back(path, [None, None])
        recovered(path)
        assert read_account(path).history == (Mechanism(6.0, 0.1, 60),)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plan=st.lists(st.sampled_from(["reserve", "half", "full", "keep", "lose", "back", "spoil"]), max_size=24),
    seed=st.integers(0, 2**16),
)
def test_whatever_is_lost_never_less_is_counted_than_was_spent(tmp_path_factory, plan: list[str], seed: int) -> None:
    """Trainings, copies, losses and older copies in any order: afterwards each training counts, none of them twice."""
    path = ledger_path(tmp_path_factory.mktemp("ledger"))
    chance = random.Random(seed)
    made: Counter[tuple[str, int]] = Counter()
    taken: dict[int, int] = {}
    copies: list[list[bytes | None]] = [[None, None]]
    opened: dict[int, str] = {}
    for number, word in enumerate(plan):
        match word:
            case "reserve":
                opened[number] = book_of(path).reserve("a", number, 6.0, 0.1, 10)
                made["a", number] += 1
                taken[number] = 10
            case "half" | "full" if opened:
                which, reservation = opened.popitem()
                known = {e.id for e in read_account(path).entries if e.taken is None and not e.recovered}
                if reservation in known:  # a recovered one counts in full as it is
                    taken[which] = 5 if word == "half" else 10
                    book_of(path).commit(reservation, taken[which])
            case "keep":
                copies.append(keep(path))
            case "lose" | "back":
                put_back(path, copies[0] if word == "lose" else chance.choice(copies))
                if made:
                    recovered(path)
            case "spoil" if path.exists() and (data := path.read_bytes()) and made:
                at = chance.randrange(len(data))
                path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
                recovered(path)
    if not made:
        return
    account = check_noted(path, path.with_name(AUDIT_LOG))
    assert Counter((e.run, e.round) for e in account.entries) == made
    for entry in account.entries:
        assert taken[entry.round] <= entry.charged.steps <= 10


def dying_at(number: int) -> Callable[..., int]:
    """os.pwrite, whose call of this number kills the process."""
    write, calls = os.pwrite, itertools.count(1)

    def dying(*arguments: Any) -> int:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments)

    return dying


def test_killed_half_way_it_is_called_again(path: Path) -> None:
    """SIGKILL at a random line of the recovery: nothing is lost, nothing counts twice."""
    used(path, 6)
    put_back(path, [None, None])
    for seed in range(8):
        child = os.fork()
        if child == 0:
            os.pwrite = dying_at(random.Random(seed).randrange(1, 12))
            recovered(path)
            os._exit(0)
        os.waitpid(child, 0)
    recovered(path)
    assert rounds_counted(path) == Counter({("a", number, 20): 1 for number in range(6)})
    check_noted(path, path.with_name(AUDIT_LOG))


# --- the audit log is lost as well ------------------------------------------------------------------------------------


def test_what_is_written_off_is_added_to_what_comes_after(path: Path) -> None:
    """Nothing is left under the old ceiling; under a larger one the sum of both, at what is left of delta."""
    used(path)
    audit = path.with_name(AUDIT_LOG)
    write_off(path, CEILING, audit, CEILING)
    assert book_of(path).spent().epsilon == 3.0
    for ceiling in (CEILING, Ceiling(9.0, 1e-5), Ceiling(3.0, 1e-4)):
        with pytest.raises(Refusal, match="larger epsilon and a larger delta") as refused:
            book_of(path, ceiling).reserve("b", 1, 6.0, 0.1, 20)
        assert refused.value.code == "budget-spent"
        with pytest.raises(Refusal):
            book_of(path, ceiling).forecast("b", 6.0, 0.1, 20, 5)
    wider = book_of(path, Ceiling(4.0, 3e-5))
    wider.commit(wider.reserve("b", 1, 8.0, 0.1, 20), 20)  # another sigma than before: a schedule of its own
    expected = 3.0 + quick([Mechanism(8.0, 0.1, 20)], frozen_delta(2e-5)).value
    assert wider.spent().epsilon == expected
    assert wider.forecast("b", 8.0, 0.1, 20, 1) == expected
    assert "written off" in wider.spent().method
    with pytest.raises(Refusal, match="rounds would fit"):
        wider.forecast("b", 8.0, 0.1, 20, 10_000)
    wider.reserve("b", 2, 6.0, 0.1, 20)
    account = wider.account()
    assert account.changed
    assert wider.spent() == spent(account, 3e-5)
    assert 3.0 < wider.spent().epsilon < 4.0


def test_the_sum_holds_by_the_real_accountants(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts, each within its share of delta: never below the epsilon of all steps together at the whole delta."""
    monkeypatch.setattr(accounts, "epsilon", epsilon)
    steps = Mechanism(4.0, 0.1, 50)
    known = Ceiling(epsilon([steps], 1e-5).value, 1e-5)
    write_off(path, known, path.with_name(AUDIT_LOG), known)
    book = book_of(path, Ceiling(9.0, 2e-5))
    book.reserve("b", 1, 4.0, 0.1, 50)
    assert book.spent().epsilon >= epsilon([Mechanism(4.0, 0.1, 100)], 2e-5).value


def lower(path: Path) -> list[bytes | None]:
    """A ceiling below what is spent: written down, and the reservation refused."""
    with pytest.raises(Refusal):
        book_of(path, Ceiling(0.01, 1e-6)).reserve("b", 1, 6.0, 0.1, 20)
    return keep(path)


def test_less_than_was_allowed_cannot_be_written_off(path: Path) -> None:
    """Neither less than site.yaml's ceiling nor than one that the ledger knows."""
    used(path)
    audit, before = path.with_name(AUDIT_LOG), keep(path)
    for ceiling, gone in (
        (CEILING, Ceiling(2.9, 1e-5)),
        (CEILING, Ceiling(3.0, 9e-6)),
        (Ceiling(1.0, 1e-6), Ceiling(2.0, 1e-6)),
    ):
        with pytest.raises(UserError, match="less than was allowed here"):
            write_off(path, ceiling, audit, gone)
    before = lower(path)
    for _ in range(2):  # sound, then damaged: it had 3 once
        with pytest.raises(UserError, match="less than was allowed here"):
            write_off(path, Ceiling(2.0, 1e-6), audit, Ceiling(2.5, 1e-5))
        assert keep(path) == before
        path.write_bytes(path.read_bytes().replace(b'"steps":20', b'"steps":02', 1))
        before = keep(path)
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        write_off(path, CEILING, audit, CEILING, ["f" * 63])
    assert keep(path) == before


def test_a_write_off_is_recovered_too(path: Path) -> None:
    """The ledger lost once more: what was written off, and all since."""
    used(path)
    audit, wide = path.with_name(AUDIT_LOG), Ceiling(6.0, 2e-5)
    write_off(path, CEILING, audit, CEILING, ["a" * 64])
    book_of(path, wide).reserve("b", 1, 6.0, 0.1, 20)
    before = read_account(path)
    put_back(path, [None, None])
    for again in range(2):
        if again:  # what was recovered is damaged in its turn: no second write-off, which would cover what came after
            path.write_bytes(path.read_bytes().replace(b'"opened"', b'"openEd"', 1))
        recovered(path, wide)
        after = check_noted(path, audit)
        assert (after.history, after.written_off, after.anchors) == (before.history, CEILING, frozenset(["a" * 64]))
        assert after.order == before.order
        assert book_of(path, wide).spent() == spent(before, 2e-5)
