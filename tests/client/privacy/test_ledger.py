"""The ledger never counts less than was spent: kills, rivals, edits, cuts, older copies, full disks."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from client.privacy import account as accounts
from client.privacy import accounting
from client.privacy import ledger as ledgers
from client.privacy.account import (
    FILTER_SHARE,
    Ceiling,
    check_noted,
    frozen_delta,
    ledger_path,
    noted_heads,
    read_account,
)
from client.privacy.accounting import Mechanism, epsilon
from client.privacy.ledger import Ledger
from client.privacy.renyi import RenyiFilter, choose_order, renyi_epsilon
from medsegdiff import chained_log
from medsegdiff.chained_log import GENESIS, ChainedLog
from medsegdiff.errors import UserError
from tests.full_disk import file_limit

CEILING = Ceiling(3.0, 1e-5)


def quick(history: Iterable[Mechanism], delta: float) -> accounting.Epsilon:
    """The Renyi bound alone, in place of the two accountants: where the file is tested, not the figure."""
    value = renyi_epsilon(history, delta)
    return accounting.Epsilon(value, value, value)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "epsilon", quick)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return ledger_path(tmp_path)


def head_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")


def refused(path: Path, match: str) -> None:
    """Nothing is read, reserved or committed, and nothing is written."""
    before = path.read_bytes() if path.exists() else None
    for attempt in (
        lambda: Ledger(path, CEILING).spent(),
        lambda: Ledger(path, CEILING).reserve("run", 9, 6.0, 0.1, 1),
        lambda: Ledger(path, CEILING).commit("0" * 64, 1),
    ):
        with pytest.raises(UserError, match=match):
            attempt()
    assert (path.read_bytes() if path.exists() else None) == before


# --- the plain way ----------------------------------------------------------------------------------------------------


def test_rounds_are_reserved_and_committed(path: Path) -> None:
    """By the real accountants: what is shown is the epsilon of what counts, at the frozen share of delta."""
    book = Ledger(path, CEILING)
    assert book.head == GENESIS
    assert book.spent().epsilon == 0.0
    assert not path.exists()  # reading writes nothing
    first = book.reserve("a", 0, 6.0, 0.1, 300)
    book.commit(first, 200)
    second = book.reserve("a", 1, 6.0, 0.1, 300)
    account = book.account()
    assert [(e.id, e.run, e.round, e.steps, e.taken, e.state) for e in account.entries] == [
        (first, "a", 0, 300, 200, "committed"), (second, "a", 1, 300, None, "open"),
    ]  # fmt: skip
    assert account.history == (Mechanism(6.0, 0.1, 500),)
    expected = epsilon([Mechanism(6.0, 0.1, 500)], frozen_delta(1e-5))
    assert account.entries[1].epsilon == book.spent().epsilon == expected.value
    assert book.spent().order is None
    assert book.head == account.head
    assert expected.value < 1.006 * epsilon([Mechanism(6.0, 0.1, 500)], 1e-5).value  # what the share costs


def test_the_ceiling_is_kept_before_any_step(path: Path) -> None:
    """The error names spent, asked, limit and remedy; nothing is written; fewer steps still go."""
    book = Ledger(path, Ceiling(1.0, 1e-5))
    book.commit(book.reserve("a", 0, 6.0, 0.1, 200), 200)
    before, spent = path.read_bytes(), book.spent().epsilon
    asked = epsilon([Mechanism(6.0, 0.1, 600)], frozen_delta(1e-5)).value
    with pytest.raises(UserError) as caught:
        book.reserve("a", 1, 6.0, 0.1, 400)
    for part in (f"spent {spent:.4f}", f"to {asked:.4f}", "limit is 1.0000", "Nothing was trained", "site.yaml"):
        assert part in str(caught.value)
    assert path.read_bytes() == before
    book.reserve("a", 1, 6.0, 0.1, 10)


@pytest.mark.usefixtures("quickly")
def test_an_open_reservation_counts_in_full_and_a_retry_is_another(path: Path) -> None:
    """After a crash nobody knows how many steps were taken."""
    book = Ledger(path, CEILING)
    book.reserve("a", 0, 6.0, 0.1, 100)
    retry = book.reserve("a", 0, 6.0, 0.1, 100)
    book.commit(retry, 100)
    assert book.account().history == (Mechanism(6.0, 0.1, 200),)


@pytest.mark.usefixtures("quickly")
def test_commits_that_are_refused(path: Path) -> None:
    """Unknown, twice, not a count: nothing changes."""
    book = Ledger(path, CEILING)
    first = book.reserve("a", 0, 6.0, 0.1, 10)
    with pytest.raises(UserError, match="unknown"):
        book.commit("f" * 64, 1)
    for bad in (-1, 1.0, True):
        with pytest.raises(UserError, match="whole number"):
            book.commit(first, bad)  # type: ignore[arg-type]
    book.commit(first, 3)
    with pytest.raises(UserError, match="committed before"):
        book.commit(first, 1)
    assert book.account().history == (Mechanism(6.0, 0.1, 3),)


@pytest.mark.usefixtures("quickly")
def test_more_steps_than_reserved_count_and_raise(path: Path) -> None:
    """The caller may send nothing; what was done is not forgotten."""
    book = Ledger(path, CEILING)
    first = book.reserve("a", 0, 6.0, 0.1, 10)
    with pytest.raises(UserError, match=r"took 12 steps and had reserved 10.*nothing of the round may be sent"):
        book.commit(first, 12)
    assert book.account().history == (Mechanism(6.0, 0.1, 12),)
    assert book.account().entries[0].state == "overrun"


@pytest.mark.parametrize(
    "bad", [("", 0, 6.0, 0.1, 1), ("a", -1, 6.0, 0.1, 1), ("a", 0, 0.4, 0.1, 1), ("a", 0, 6.0, 0.0, 1),
            ("a", 0, 6.0, 0.1, 0), ("a", 0, float("nan"), 0.1, 1), ("x" * 201, 0, 6.0, 0.1, 1)]
)  # fmt: skip
def test_reservations_that_mean_nothing(path: Path, bad: tuple) -> None:
    """Refused before the file is touched."""
    with pytest.raises(UserError):
        Ledger(path, CEILING).reserve(*bad)
    assert not path.exists()


@pytest.mark.parametrize(
    "bad", [(0.0, 1e-5), (float("inf"), 1e-5), (float("nan"), 1e-5), (1.0, 0.0), (1.0, 1.0), (True, 1e-5)]
)
def test_ceilings_that_are_none(bad: tuple[float, float]) -> None:
    """A ceiling of infinity is none."""
    with pytest.raises(UserError):
        Ceiling(*bad)


@pytest.mark.usefixtures("quickly")
def test_the_ceiling_is_the_sites_and_its_changes_are_written_down(path: Path) -> None:
    """Lowered below what is spent nothing goes any more; raised it goes on, with the order of the filter as it was."""
    Ledger(path, Ceiling(1.0, 1e-5)).reserve("a", 0, 6.0, 0.1, 100)
    order = read_account(path).order
    with pytest.raises(UserError, match=r"limit is 0\.1000"):
        Ledger(path, Ceiling(0.1, 1e-5)).reserve("a", 1, 6.0, 0.1, 1)
    assert read_account(path).ceiling == Ceiling(0.1, 1e-5)
    Ledger(path, Ceiling(8.0, 1e-5)).reserve("a", 1, 6.0, 0.1, 100)
    assert read_account(path).ceiling == Ceiling(8.0, 1e-5)
    assert read_account(path).order == order


# --- schedules that change --------------------------------------------------------------------------------------------


def test_another_schedule_turns_to_the_filter_for_good(path: Path) -> None:
    """The order stands since the first reservation; the whole history is charged at 1/20 of delta."""
    book = Ledger(path, CEILING)
    order = choose_order(6.0, 0.1, 3.0, 1e-5 * FILTER_SHARE)
    book.commit(book.reserve("a", 0, 6.0, 0.1, 100), 100)
    assert book.account().order == order
    assert "frozen" in book.spent().method
    book.reserve("b", 0, 7.0, 0.2, 50)
    history = [Mechanism(6.0, 0.1, 100), Mechanism(7.0, 0.2, 50)]
    expected = RenyiFilter(order, 1e-5 * FILTER_SHARE).epsilon(history)
    assert book.spent().epsilon == pytest.approx(expected)
    assert expected > epsilon(history, 1e-5).value
    assert "Renyi" in book.spent().method
    book.reserve("a", 1, 6.0, 0.1, 1)  # the first schedule again: the filter stays
    assert book.spent().order == order


def test_a_change_that_the_filter_cannot_afford_is_refused_and_the_frozen_schedule_goes_on(path: Path) -> None:
    """PRV and PLD are tighter than the filter: near the ceiling only the frozen schedule fits."""
    book = Ledger(path, Ceiling(1.0, 1e-5))
    book.commit(book.reserve("a", 0, 6.0, 0.1, 230), 230)
    with pytest.raises(UserError, match=r"leaves the frozen schedule \(sigma 6, q 0.1\)"):
        book.reserve("b", 0, 6.5, 0.1, 1)
    book.reserve("a", 1, 6.0, 0.1, 1)
    assert book.spent().order is None


# --- where the file is not as it was written --------------------------------------------------------------------------


@pytest.fixture
def kept(path: Path, quickly: None) -> Path:
    """A ledger of three rounds."""
    book = Ledger(path, CEILING)
    for number in range(3):
        book.commit(book.reserve("a", number, 6.0, 0.1, 20), 20)
    return path


def test_any_edit_is_found(kept: Path) -> None:
    """A byte anywhere, seeded: all is refused."""
    whole, source = kept.read_bytes(), random.Random(5)
    for _ in range(40):
        place = source.randrange(len(whole))
        byte = bytes([(whole[place] + source.randrange(1, 255)) % 256])
        kept.write_bytes(whole[:place] + byte + whole[place + 1 :])
        refused(kept, "privacy-ledger.jsonl")
    kept.write_bytes(whole)
    Ledger(kept, CEILING).reserve("a", 3, 6.0, 0.1, 1)


def test_a_line_made_smaller_with_its_own_hash_mended_is_found(kept: Path) -> None:
    """Whoever knows the format and edits one line breaks the chain behind it."""
    import hashlib

    lines = kept.read_bytes().splitlines(keepends=True)
    body = lines[1].split(b',"hash":')[0].replace(b'"steps":20', b'"steps":10')
    lines[1] = body + f',"hash":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode()
    kept.write_bytes(b"".join(lines))
    refused(kept, "line 3 is not as it was written")


@pytest.mark.parametrize("which", range(7))
def test_a_deleted_line_is_found(kept: Path, which: int) -> None:
    """The first, one in the middle, the last."""
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == 7
    kept.write_bytes(b"".join(lines[:which] + lines[which + 1 :]))
    refused(kept, "privacy-ledger.jsonl")


@pytest.mark.parametrize("left", [0, 1, 100, -1, -200])
def test_a_truncated_file_is_found(kept: Path, left: int) -> None:
    """To nothing, within a line, at its end."""
    whole = kept.read_bytes()
    kept.write_bytes(whole[:left])
    refused(kept, "privacy-ledger.jsonl")


def test_a_missing_file_or_head_is_found(kept: Path) -> None:
    """One of the two gone is no new ledger."""
    saved = head_file(kept).read_bytes()
    head_file(kept).unlink()
    refused(kept, "head file is missing")
    head_file(kept).write_bytes(saved)
    kept.unlink()
    refused(kept, "no such log|the log is gone")


def test_a_rolled_back_pair_is_found_by_its_anchors(tmp_path: Path, quickly: None) -> None:
    """Older copies of both files hold together; a head noted elsewhere, in the audit log or in memory tells."""
    path, audit = ledger_path(tmp_path), tmp_path / "audit.jsonl"
    book = Ledger(path, CEILING, audit)
    book.reserve("a", 0, 6.0, 0.1, 20)
    old = path.read_bytes(), head_file(path).read_bytes()
    middle = book.head
    book.reserve("a", 1, 6.0, 0.1, 20)
    book.check_anchor(middle)
    book.check_anchor(book.head)
    book.check_anchor(GENESIS)
    newest = book.head
    assert noted_heads(audit) == set(Ledger(path, CEILING).account().heads)
    assert {middle, newest} < noted_heads(audit)
    assert check_noted(path, audit, newest).head == newest
    path.write_bytes(old[0])
    head_file(path).write_bytes(old[1])
    Ledger(path, CEILING).account()  # by itself it looks sound
    for attempt in (
        lambda: Ledger(path, CEILING).check_anchor(newest),  # the server knows it
        lambda: Ledger(path, CEILING, audit).reserve("a", 1, 6.0, 0.1, 1),
        lambda: Ledger(path, CEILING, audit).spent(),
        lambda: book.reserve("a", 1, 6.0, 0.1, 1),  # the running process knows it
        lambda: check_noted(path, audit),
    ):
        with pytest.raises(UserError, match="older copy"):
            attempt()
    path.unlink()
    head_file(path).unlink()
    with pytest.raises(UserError, match="older copy"):
        Ledger(path, CEILING, audit).reserve("a", 1, 6.0, 0.1, 1)


def test_torn_tails_never_count_less(kept: Path) -> None:
    """A reservation's line cut anywhere, head file not yet renamed: whole it counts, torn it was never granted."""
    before_log, before_head = kept.read_bytes(), head_file(kept).read_bytes()
    base = read_account(kept).history[0].steps
    Ledger(kept, CEILING).reserve("a", 3, 6.0, 0.1, 7)
    line = kept.read_bytes()[len(before_log) :]
    for cut in (1, len(line) // 2, len(line) - 1, len(line)):
        kept.write_bytes(before_log + line[:cut])
        head_file(kept).write_bytes(before_head)
        expected = base + (7 if cut == len(line) else 0)
        assert read_account(kept).history == (Mechanism(6.0, 0.1, expected),)  # read only
        Ledger(kept, CEILING).reserve("a", 4, 6.0, 0.1, 1)  # mends
        assert read_account(kept).history == (Mechanism(6.0, 0.1, expected + 1),)


@pytest.mark.parametrize(
    ("event", "fields", "match"),
    [
        ("reserved", {"run": "a", "round": 0, "sigma": 0.1, "q": 0.1, "steps": 5, "epsilon": 1}, "0.1 is outside"),
        ("reserved", {"run": "a", "round": 0, "sigma": 6.0, "q": 0.1, "steps": -5, "epsilon": 0.1}, "no whole number"),
        ("reserved", {"run": "a", "round": 0, "sigma": 6.0, "q": 0.1, "epsilon": 0.1}, "steps"),
        ("reserved", {"run": "a", "round": 0, "sigma": 6.0, "q": 0.1, "steps": 5, "epsilon": 0.1}, "number"),
        ("committed", {"reservation": "f" * 64, "steps": 1}, "KeyError"),
        ("refunded", {"steps": 100}, "no place there"),
        ("opened", {"version": 1}, "no place there"),
    ],
)  # fmt: skip
def test_lines_of_another_program_are_refused(kept: Path, event: str, fields: dict, match: str) -> None:
    """In a sound chain: what this version does not know might be spending."""
    numbered = fields if match == "number" else fields | {"number": 8}
    ChainedLog(kept).append(event, **numbered)
    refused(kept, match)


@pytest.mark.parametrize(
    "opened", [{"version": 1}, {"version": 3}, {"unit": "slice"}, {"neighbours": "replace one"}, {"delta": 0.5}]
)
def test_another_version_or_promise_is_refused(path: Path, opened: dict) -> None:
    """Epsilons of slices and of patients cannot be added."""
    promise = {"version": 2, "unit": "patient", "neighbours": "add or remove one", "epsilon": 3.0, "delta": 1e-5}
    ChainedLog(path).append("opened", **(promise | opened), number=1)
    refused(path, "Install the version that wrote it")


def test_a_disk_that_refuses_lets_nothing_be_trained(kept: Path) -> None:
    """A full disk at reserve: no reservation; at commit: it stays open, in full."""
    book = Ledger(kept, CEILING)
    before = book.account().history
    with file_limit(kept.stat().st_size + 10), pytest.raises(UserError, match="could not be written"):
        book.reserve("a", 3, 6.0, 0.1, 5)
    assert book.account().history == before
    reservation = book.reserve("a", 3, 6.0, 0.1, 5)
    with file_limit(kept.stat().st_size + 10), pytest.raises(UserError, match="could not be written"):
        book.commit(reservation, 1)
    assert book.account().entries[-1].state == "open"


def test_an_unreadable_ledger_is_refused(tmp_path: Path) -> None:
    """A folder in its place."""
    path = ledger_path(tmp_path)
    path.mkdir()
    for attempt in (Ledger(path, CEILING).spent, lambda: Ledger(path, CEILING).reserve("a", 0, 6.0, 0.1, 1)):
        with pytest.raises(UserError):
            attempt()


@pytest.mark.usefixtures("quickly")
def test_an_audit_log_that_refuses_lets_nothing_be_reserved(tmp_path: Path) -> None:
    """Asked again and again, the site does not spend for nothing."""
    path, audit = ledger_path(tmp_path), tmp_path / "audit.jsonl"
    audit.mkdir()
    for _ in range(3):
        with pytest.raises(UserError):
            Ledger(path, CEILING, audit).reserve("a", 0, 6.0, 0.1, 5)
    assert not path.exists()


@pytest.mark.usefixtures("quickly")
def test_another_process_in_between_is_no_older_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reservation between the reading of the ledger and of its notes."""
    path, audit = ledger_path(tmp_path), tmp_path / "audit.jsonl"
    Ledger(path, CEILING, audit).reserve("a", 0, 6.0, 0.1, 5)
    numbers = iter(range(1, 9))

    def between(read: Callable[..., Any]) -> Callable[..., Any]:
        def reading(*arguments: object) -> object:
            found = read(*arguments)
            monkeypatch.undo()
            monkeypatch.setattr(accounts, "epsilon", quick)
            Ledger(path, CEILING, audit).reserve("b", next(numbers), 6.0, 0.1, 5)
            return found

        return reading

    for module, name in ((ledgers, "read_account"), (ledgers, "noted_heads")):
        monkeypatch.setattr(module, name, between(getattr(module, name)))
        Ledger(path, CEILING, audit).account()
    for name in ("read_account", "noted_heads"):
        monkeypatch.setattr(accounts, name, between(getattr(accounts, name)))
        check_noted(path, audit)
    assert len(read_account(path).entries) == 5


# --- against a slow model ---------------------------------------------------------------------------------------------


class Rivals(RuleBasedStateMachine):
    """Two handles of one ledger, two schedules, crashes, against a list in memory and the accounting done anew."""

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.path = ledger_path(self.folder / str(time.monotonic_ns()))
        self.ceiling = Ceiling(2.0, 1e-5)
        self.books = [Ledger(self.path, self.ceiling) for _ in range(2)]
        self.model: dict[str, list] = {}  # id -> [sigma, q, reserved, taken]
        self.order: float | None = None

    def value(self, entries: list[tuple[float, float, int]]) -> float:
        history = [Mechanism(*entry) for entry in entries]
        kinds = {(sigma, q) for sigma, q, *_ in self.model.values()} | {(s, q) for s, q, _ in entries}
        if len(kinds) <= 1:
            return renyi_epsilon(history, 1e-5 * 0.95)
        assert self.order is not None
        return RenyiFilter(self.order, 1e-5 * 0.05).epsilon(history)

    def counted(self) -> list[tuple[float, float, int]]:
        return [(s, q, n if taken is None else taken) for s, q, n, taken in self.model.values()]

    @rule(book=st.sampled_from([0, 1]), sigma=st.sampled_from([6.0, 6.0, 6.0, 9.0]), steps=st.integers(1, 400))
    def reserve(self, book: int, sigma: float, steps: int) -> None:
        first = self.order is None
        if first:
            self.order = choose_order(sigma, 0.1, 2.0, 1e-5 * 0.05)
        fits = self.value([*self.counted(), (sigma, 0.1, steps)]) <= 2.0
        try:
            self.model[self.books[book].reserve("r", 0, sigma, 0.1, steps)] = [sigma, 0.1, steps, None]
            assert fits
        except UserError:
            assert not fits
            self.order = None if first else self.order

    @precondition(lambda self: any(entry[3] is None for entry in self.model.values()))
    @rule(book=st.sampled_from([0, 1]), data=st.data())
    def commit(self, book: int, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from([k for k, entry in self.model.items() if entry[3] is None]))
        taken = data.draw(st.integers(0, self.model[chosen][2]))
        self.books[book].commit(chosen, taken)
        self.model[chosen][3] = taken

    @rule(book=st.sampled_from([0, 1]))
    def restart(self, book: int) -> None:
        self.books[book] = Ledger(self.path, self.ceiling)

    @invariant()
    def agrees(self) -> None:
        account = self.books[0].account()
        assert [[e.sigma, e.q, e.steps, e.taken] for e in account.entries] == list(self.model.values())
        spent = self.books[1].spent().epsilon
        assert spent == pytest.approx(self.value(self.counted()) if self.counted() else 0.0)
        assert spent <= 2.0


@pytest.mark.usefixtures("quickly")
def test_the_ledger_agrees_with_a_slow_model(tmp_path: Path) -> None:
    """Any sequence of reservations, commits and restarts."""
    run_state_machine_as_test(
        type("Machine", (Rivals,), {"folder": tmp_path}),
        settings=settings(
            max_examples=12, stateful_step_count=15, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


# --- processes --------------------------------------------------------------------------------------------------------


def forked(work: Callable[[], None]) -> int:
    """A real child process that shares nothing but the disk; its accountants are those of this test."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except UserError as error:
            os._exit(3 if "would take epsilon" in str(error) else 4)
        except BaseException:
            os._exit(5)
    return child


@pytest.mark.usefixtures("quickly")
def test_two_processes_race_for_the_last_epsilon(tmp_path: Path) -> None:
    """Exactly one wins, in each of ten races."""
    for race in range(10):
        path = ledger_path(tmp_path / str(race))
        limit = renyi_epsilon([Mechanism(6.0, 0.1, 150)], frozen_delta(1e-5)) + 1e-9  # for the order of the sum
        Ledger(path, Ceiling(limit, 1e-5)).reserve("a", 0, 6.0, 0.1, 50)
        start = time.monotonic() + 0.05

        def rival(path: Path = path, limit: float = limit, start: float = start) -> None:
            book = Ledger(path, Ceiling(limit, 1e-5))
            time.sleep(max(0.0, start - time.monotonic()))
            book.reserve("a", 1, 6.0, 0.1, 100)

        codes = sorted(
            os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in [forked(rival) for _ in range(2)]
        )
        assert codes == [0, 3]
        assert read_account(path).history == (Mechanism(6.0, 0.1, 150),)


def _train(path: Path, steps_file: Path, seed: int) -> None:
    """Rounds without end: reserve, steps (each written down before it is taken), commit."""
    source, book = random.Random(seed), Ledger(path, Ceiling(1e4, 1e-5))
    steps = os.open(steps_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        reserved = source.randrange(1, 6)
        reservation = book.reserve("killed", seed, 6.0, 0.1, reserved)
        taken = source.randrange(reserved + 1)
        for _ in range(taken):
            os.write(steps, f"{reservation}\n".encode())
            time.sleep(source.random() * 0.006)
        book.commit(reservation, taken)


def _await_growth(path: Path, size: int) -> None:
    """Until a child has written to the ledger: on a busy machine it may take a while to begin."""
    deadline = time.monotonic() + 30
    while (path.stat().st_size if path.exists() else 0) <= size:
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.mark.slow
@pytest.mark.usefixtures("quickly")
def test_a_hundred_kills_never_count_less_than_was_spent(tmp_path: Path) -> None:
    """SIGKILL at seeded moments; after each the ledger is sound, and no reservation counts less than its steps."""
    source = random.Random(20)
    path, steps_file = ledger_path(tmp_path), tmp_path / "steps"
    found = {"open": 0, "committed": 0}
    for number in range(100):
        before = path.stat().st_size if path.exists() else 0
        child = forked(lambda number=number: _train(path, steps_file, number))  # type: ignore[misc]
        if number % 4:  # else the kill may come before, or in, the first reservation
            _await_growth(path, before)
        time.sleep(source.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL  # it was at work until then
        account = read_account(path)
        counted = {entry.id: entry.charged.steps for entry in account.entries}
        taken: dict[str, int] = {}
        for reservation in steps_file.read_text().split() if steps_file.exists() else []:
            taken[reservation] = taken.get(reservation, 0) + 1
        assert all(counted.get(reservation, 0) >= n for reservation, n in taken.items())
        for entry in account.entries:
            if entry.taken is not None:
                assert entry.taken == taken.get(entry.id, 0)
    for entry in account.entries:
        found[entry.state] += 1
    Ledger(path, Ceiling(1e4, 1e-5)).reserve("after", 0, 6.0, 0.1, 1)
    assert found["open"] >= 20  # kills did fall between reserve and commit
    assert found["committed"] >= 20


def test_a_ledger_of_ten_thousand_entries_is_read_at_once(tmp_path: Path) -> None:
    """Read and verified within two seconds (0.2 to 0.3 where it was written)."""
    path = ledger_path(tmp_path)
    write_long(path, 10_000)
    begun = time.process_time()
    account = read_account(path)
    assert time.process_time() - begun < 2.0
    assert len(account.entries) == 5000
    assert account.history == (Mechanism(6.0, 0.1, 5000),)


def write_long(path: Path, lines: int) -> None:
    """A ledger as the program would have written it, without a flush to the disk for each line."""
    head, size, out = GENESIS, 0, []

    def add(event: str, **fields: object) -> str:
        nonlocal head, size
        line = chained_log._compose(len(out) + 1, event, fields, head)
        out.append(line)
        head, size = line[-67:-3].decode(), size + len(line)
        return head

    add("opened", version=2, unit="patient", neighbours="add or remove one", epsilon=3.0, delta=1e-5, number=1)
    while (number := len(out) + 1) <= lines:
        order = {"order": 12} if number == 2 else {}
        made = add("reserved", run="a", round=number, sigma=6.0, q=0.1, steps=1, epsilon=1.0, number=number, **order)
        if number < lines:
            add("committed", run="a", round=number, steps=1, reservation=made, number=number + 1)
    path.write_bytes(b"".join(out))
    head_file(path).write_bytes(f'{{"count":{len(out)},"head":"{head}","bytes":{size}}}\n'.encode())
