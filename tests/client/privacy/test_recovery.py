"""A lost, damaged or older ledger is brought up to what was noted, and never counts less than was spent."""

from __future__ import annotations

import errno
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
from client.privacy import ledger as ledgers
from client.privacy.account import Ceiling, check_noted, frozen_delta, ledger_path, read_account, spent
from client.privacy.accounting import Mechanism, epsilon
from client.privacy.ledger import Ledger
from client.privacy.recovery import recover, write_off
from client.privacy.renyi import renyi_epsilon
from client.refusal import Refusal
from medsegdiff import chained_log
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
    assert recovered(path) == (3, 7, 0)  # the ceiling, and the ends of the trainings, too
    after = check_noted(path, path.with_name(AUDIT_LOG))
    assert (after.history, after.order) == (before.history, before.order)
    assert [entry.state for entry in after.entries] == ["recovered"] * 3
    assert before.heads < after.heads
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


@pytest.mark.parametrize("written_off", [False, True])
def test_an_audit_log_that_was_begun_later_is_told_all_by_the_next_reservation(path: Path, written_off: bool) -> None:
    """Before it, of a damaged ledger not all is known: refused, untouched. After it, a lost one is recovered whole."""
    used(path)
    wide = Ceiling(6.0, 2e-5)
    if written_off:
        write_off(path, CEILING, path.with_name(AUDIT_LOG), CEILING)
    begin_audit_anew(path)
    ChainedLog(path.with_name(AUDIT_LOG)).append("introduced")
    whole = keep(path)
    assert whole[0] is not None
    spoiled = [
        whole[0].replace(b'"event":"committed"', b'"event":"comnitted"').replace(b'"anchors"', b'"anchXrs"'),
        None,
    ]
    for copy in (spoiled, [b"x", None], [b"x", whole[1]]):
        put_back(path, copy)
        with pytest.raises(UserError, match="write-off"):
            recovered(path, wide)
        assert keep(path) == copy
    put_back(path, whole)
    book_of(path, wide).reserve("b", 1, 6.0, 0.1, 20)
    put_back(path, [None, None])
    recovered(path, wide)
    account = check_noted(path, path.with_name(AUDIT_LOG))
    assert account.history == (Mechanism(6.0, 0.1, 20 if written_off else 80),)
    assert account.written_off == (CEILING if written_off else None)


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


def copies_of(path: Path) -> tuple[list[bytes | None], list[bytes | None]]:
    return keep(path), keep(path.with_name(AUDIT_LOG))


class Killed(Exception):
    """In place of a SIGKILL."""


def killed(*_: object) -> None:
    raise Killed


class Disk:
    """A site's ledger and audit log under all that befalls them, and what was trained all the same."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.audit = path, path.with_name(AUDIT_LOG)
        self.chance = random.Random(seed)
        self.made: Counter[tuple[str, int]] = Counter()
        self.taken: dict[int, int] = {}
        self.ledgers: list[list[bytes | None]] = [[None, None]]
        self.audits: list[list[bytes | None]] = []
        self.current = True  # the audit log is no older copy, or was told since what it lacked
        self.complete = True  # and it lacks no last line whose note was killed
        self.opened: dict[int, str] = {}

    def train(self, number: int, noted: bool = True) -> None:
        """Reserve; without its note, as after a kill, nothing is trained and the reservation may be forgotten."""
        with pytest.MonkeyPatch.context() as patch:
            if not noted:
                patch.setattr(ledgers, "note", killed)
            try:
                reservation = book_of(self.path).reserve("a", number, 6.0, 0.1, 10)
            except Killed:
                self.current, self.complete = True, False
            else:
                self.current = self.complete = True
                self.opened[number] = reservation
                self.made["a", number] += 1
                self.taken[number] = 10

    def end(self, word: str) -> None:
        which, reservation = self.opened.popitem()
        try:
            book_of(self.path).commit(reservation, steps := 5 if word == "half" else 10)
            self.taken[which] = steps
            self.current = self.complete = True
        except UserError:  # recovered since: it counts in full
            pass

    def spoil(self) -> None:
        file = self.chance.choice(files_of(self.path))
        if file.exists() and (data := file.read_bytes()):
            for _ in range(self.chance.randrange(1, 4)):
                at = self.chance.randrange(len(data))
                data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            file.write_bytes(data)
            self.complete = self.complete and file == self.path  # another digit in a head file is another end

    def recover(self) -> bool:
        """Whether the ledger is in order then; where it is not, nothing was changed."""
        before = keep(self.path)
        try:
            recovered(self.path)
        except UserError:
            assert keep(self.path) == before
            return False
        self.current = self.complete = True
        return True

    def sound(self) -> bool:
        try:
            book_of(self.path).account()
        except UserError:
            return False
        return True


WORDS = ["reserve", "reserve", "killed", "half", "full", "keep", "lose", "back", "spoil", "older audit", "new audit"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.sampled_from(WORDS), max_size=24), seed=st.integers(0, 2**16))
def test_whatever_is_lost_never_less_is_counted_than_was_spent(tmp_path_factory, plan: list[str], seed: int) -> None:
    """Trainings, kills, losses, older copies of ledger and audit log: a sound ledger has each training, and once.

    What nobody on the site's disk can know is left out: a ledger lost, or older, while the audit log is older as well.
    """
    disk = Disk(ledger_path(tmp_path_factory.mktemp("ledger")), seed)
    for number, word in enumerate(plan):
        match word:
            case "reserve" | "killed":
                disk.train(number, word == "reserve")
            case "half" | "full" if disk.opened:
                disk.end(word)
            case "keep":
                disk.ledgers.append(keep(disk.path))
                disk.audits.append(keep(disk.audit))
            case "lose" | "back" if disk.current:
                put_back(disk.path, disk.ledgers[0] if word == "lose" else disk.chance.choice(disk.ledgers))
            case "spoil":
                disk.spoil()
            case "older audit" if disk.audits and disk.sound() and disk.audits[-1][0] is not None:
                put_back(disk.audit, disk.chance.choice(disk.audits))
                disk.current = False
            case "new audit" if disk.made and disk.sound():
                put_back(disk.audit, [None, None])
                disk.current = False
        if not disk.sound() and not disk.recover():
            assert not (disk.current and disk.complete)
            return  # said to be unknown: for a person to write off
    if not disk.made:
        return
    account = check_noted(disk.path, disk.audit)
    counted = Counter((e.run, e.round) for e in account.entries if e.round in disk.taken)
    assert counted == disk.made
    for entry in account.entries:
        assert disk.taken.get(entry.round, 0) <= entry.charged.steps <= 10


def dying_at(number: int, work: Callable[..., Any] = os.pwrite) -> Callable[..., Any]:
    """A system call, whose call of this number kills the process."""
    calls = itertools.count(1)

    def dying(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*arguments, **options)

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


@pytest.mark.parametrize("renames", [False, True])
def test_killed_half_way_a_damaged_ledger_is_still_there(path: Path, renames: bool) -> None:
    """Its legible lines are all that knows the third training; SIGKILL at every write, or rename, of the recovery."""
    used(path, 2)
    kept = keep(path.with_name(AUDIT_LOG))
    book = book_of(path)
    book.commit(book.reserve("a", 2, 6.0, 0.1, 20), 20)
    put_back(path.with_name(AUDIT_LOG), kept)
    path.write_bytes(path.read_bytes().replace(b'"opened"', b'"openEd"', 1).replace(b'"steps":20', b'"steps":02', 1))
    before = copies_of(path)
    for number in range(1, 24):
        put_back(path, before[0])
        put_back(path.with_name(AUDIT_LOG), before[1])
        child = os.fork()
        if child == 0:
            if renames:
                os.rename = dying_at(number, os.rename)  # type: ignore[assignment]
                os.replace = dying_at(number, os.replace)  # type: ignore[assignment]
            else:
                os.pwrite = dying_at(number)
            recovered(path)
            os._exit(0)
        os.waitpid(child, 0)
        recovered(path)
        assert rounds_counted(path) == Counter({("a", which, 20): 1 for which in range(3)})
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
        with pytest.raises(UserError, match="less than was allowed or written off here"):
            write_off(path, ceiling, audit, gone)
    before = lower(path)
    for _ in range(2):  # sound, then damaged: it had 3 once
        with pytest.raises(UserError, match="less than was allowed or written off here"):
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


def test_a_write_off_whose_note_failed_is_not_forgotten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged audit log is refused first; moved away, the write-off holds after the ledger is lost once more."""
    used(path)
    audit, wide = path.with_name(AUDIT_LOG), Ceiling(9.0, 3e-5)
    put_back(path, [None, None])
    audit.with_name(f"{audit.name}.head").unlink()
    for attempt in (lambda: recovered(path), lambda: write_off(path, CEILING, audit, CEILING)):
        with pytest.raises(UserError, match=r"If there is no copy, move audit\.jsonl .*write-off"):
            attempt()
        assert keep(path) == [None, None]
    begin_audit_anew(path)
    write_off(path, CEILING, audit, CEILING)
    book_of(path, wide).reserve("b", 1, 6.0, 0.1, 20)
    before = book_of(path, wide).spent()
    put_back(path, [None, None])
    recovered(path, wide)
    assert book_of(path, wide).spent() == before
    assert before.epsilon > 3.0


def begin_audit_anew(path: Path) -> None:
    """As a message of the log advises where its files are damaged: they are moved elsewhere."""
    for file in files_of(path.with_name(AUDIT_LOG)):
        if file.exists():
            file.rename(file.with_name(f"old-{file.name}"))


def test_a_write_off_that_was_killed_is_carried_out_by_the_recovery(path: Path) -> None:
    """Noted and not yet in the ledger: refused, then recovered as a write-off."""
    used(path)
    audit = path.with_name(AUDIT_LOG)
    for number in range(1, 6):
        kept = copies_of(path)
        child = os.fork()
        if child == 0:
            os.pwrite = dying_at(number)
            write_off(path, CEILING, audit, CEILING)
            os._exit(0)
        os.waitpid(child, 0)
        if any(line["event"] == "privacy_written_off" for line in audit_lines(audit)):
            if read_account(path).written_off is None:
                with pytest.raises(UserError, match="ledger recover"):
                    book_of(path).account()
                recovered(path)
            account = check_noted(path, audit)
            assert (account.written_off, account.counted) == (CEILING, ())
        elif read_account(path).written_off is not None:
            raise AssertionError("lost now, the ledger would be recovered as if nothing had been written off")
        put_back(path, kept[0])
        put_back(audit, kept[1])


def test_a_write_off_is_never_replaced_by_a_smaller_one(path: Path) -> None:
    """Nor one smaller than what a reservation had reached, though the ceiling was lowered and the ledger lost."""
    high, low = Ceiling(20.0, 2e-5), Ceiling(1.0, 1e-5)
    audit = path.with_name(AUDIT_LOG)
    book_of(path, high).reserve("a", 1, 1.0, 0.1, 100)
    reached = book_of(path, high).spent().epsilon
    assert reached > 3
    put_back(path, [None, None])

    def refused(ceiling: Ceiling) -> None:
        before = copies_of(path)
        with pytest.raises(UserError, match="less than was allowed or written off here"):
            write_off(path, low, audit, ceiling)
        assert copies_of(path) == before

    refused(low)
    refused(Ceiling(reached, 2e-5))
    recovered(path, low)
    refused(low)
    gone = Ceiling(25.0, 3e-5)  # more than any ceiling that is known
    write_off(path, low, audit, gone)
    refused(high)
    put_back(path, [None, None])
    refused(high)
    recovered(path, low)
    assert read_account(path).written_off == gone
    for beyond in (Ceiling(2e6, 3e-5), Ceiling(25.0, 0.05)):
        with pytest.raises(UserError, match="nothing could ever be trained"):
            write_off(path, low, audit, beyond)


@pytest.mark.parametrize("spoiled", [[0], [1], [2], [1, 2], [0, 1, 2]])
def test_trainings_that_neither_knows_are_noticed(path: Path, spoiled: list[int]) -> None:
    """An older audit log, and reservations between that are not legible: refused, not skipped."""
    used(path, 1)
    kept = keep(path.with_name(AUDIT_LOG))
    book = book_of(path)
    for number in range(1, 5):
        book.reserve("a", number, 6.0, 0.1, 20)
    put_back(path.with_name(AUDIT_LOG), kept)
    lines = path.read_bytes().splitlines(keepends=True)
    for which in spoiled:
        lines[3 + which] = lines[3 + which].replace(b'"', b"'", 1)
    path.write_bytes(b"".join(lines))
    before = keep(path)
    with pytest.raises(UserError, match=f"of its numbers {4 + spoiled[0]} to"):
        recovered(path)
    assert keep(path) == before


def test_an_older_audit_log_is_told_by_the_next_reservation(path: Path) -> None:
    """Put back while the ledger is whole, which refuses nothing; the ledger is lost later."""
    used(path, 1)
    kept = keep(path.with_name(AUDIT_LOG))
    book_of(path).reserve("a", 1, 6.0, 0.1, 20)
    put_back(path.with_name(AUDIT_LOG), kept)
    book_of(path).reserve("a", 2, 6.0, 0.1, 20)
    put_back(path, [None, None])
    recovered(path)
    assert rounds_counted(path) == Counter({("a", number, 20): 1 for number in range(3)})


def test_a_write_off_that_the_audit_log_lacks_covers_what_was_before_it_alone(path: Path) -> None:
    """It is legible in the damaged ledger, and stands before the training that came after it."""
    used(path)
    audit, wide = path.with_name(AUDIT_LOG), Ceiling(9.0, 3e-5)
    kept = keep(audit)
    write_off(path, CEILING, audit, CEILING)
    book_of(path, wide).reserve("b", 1, 6.0, 0.1, 20)
    before = book_of(path, wide).spent()
    put_back(audit, kept)
    path.write_bytes(path.read_bytes().replace(b'"opened"', b'"openEd"', 1))
    recovered(path, wide)
    assert book_of(path, wide).spent() == before


def test_a_damaged_ledger_of_another_version_is_left_alone(path: Path) -> None:
    """Its events may be spending."""
    used(path)
    ChainedLog(path).append("spent_otherwise", epsilon=1.0, number=8)
    path.write_bytes(path.read_bytes().replace(b'"opened"', b'"openEd"', 1))
    before = keep(path)
    with pytest.raises(UserError, match="Install the version that wrote it"):
        recovered(path)
    assert keep(path) == before


def test_an_audit_log_that_knows_nothing_recovers_nothing(path: Path) -> None:
    """There was a ledger, for its remains are there."""
    used(path)
    begin_audit_anew(path)
    ChainedLog(path.with_name(AUDIT_LOG)).append("introduced")
    for remains in ([b"x", None], [b"x", b"x"]):
        put_back(path, remains)
        with pytest.raises(UserError, match="what was spent cannot be known"):
            recovered(path)
        assert keep(path) == remains


def test_a_disk_that_dies_is_no_traceback(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in reading, in each of the commands."""
    used(path)

    def dying(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(chained_log, "_parse", dying)
    for attempt in (lambda: recovered(path), lambda: check_noted(path, path.with_name(AUDIT_LOG)), book_of(path).spent):
        with pytest.raises(UserError, match="Input/output error"):
            attempt()
