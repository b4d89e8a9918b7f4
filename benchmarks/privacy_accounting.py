"""What privacy accounting costs: python -m benchmarks.privacy_accounting

Both accountants over 100 rounds, once with one sigma and once with a different one in each round; and the ledger's
reserve and commit with 10, 1000 and 10,000 entries in it, flushed to the disk of the folder `--folder`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.turns import Answer, hardware, publish, spread, table
from client.privacy import account as accounts
from client.privacy import accounting
from client.privacy.account import Ceiling, ledger_path, read_account
from client.privacy.accounting import Mechanism
from client.privacy.ledger import Ledger
from client.privacy.renyi import renyi_epsilon
from medsegdiff.chained_log import ChainedLog

DELTA, Q, STEPS, ROUNDS = 1e-5, 0.1, 20, 100
HISTORIES = {
    "one sigma": tuple(Mechanism(6.3, Q, STEPS) for _ in range(ROUNDS)),
    "100 sigmas": tuple(Mechanism(5.0 + 0.03 * k, Q, STEPS) for k in range(ROUNDS)),
}
ENTRIES = (10, 1000, 10_000)
REPEATS = 10


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def measure_accountants(repeats: int) -> list[Answer]:
    """Seconds and epsilon of each accountant and history, nothing remembered from call to call."""
    measured = []
    for name, history in HISTORIES.items():
        entries = accounting.merged(history)
        bound = renyi_epsilon(entries, DELTA)
        for accountant, work in (
            ("PRV", lambda entries=entries: accounting._prv.__wrapped__(entries, DELTA)),
            ("PLD", lambda entries=entries, bound=bound: accounting._pld(entries, DELTA, bound)),
        ):
            value = work()  # imports, too
            times = [seconds(work) for _ in range(repeats if len(entries) == 1 else 1)]
            measured.append(
                {"history": name, "accountant": accountant, "epsilon": round(value, 4), "seconds": spread(times, 4)}
            )
    return measured


def fill(path: Path, entries: int) -> None:
    """A ledger of so many reservations, written under one lock; each line is flushed as ever."""
    with ChainedLog(path).held() as log:
        log.append("opened", version=accounts.VERSION, **accounts.PROMISE, epsilon=8.0, delta=DELTA)
        for number in range(entries):
            first = {} if number else {"order": 12}
            made = log.append("reserved", run="run", round=number, sigma=6.3, q=Q, steps=1, epsilon=1.0, **first)
            log.append("committed", run="run", round=number, steps=number % 2, reservation=made)


def measure_ledger(entries: int, folder: Path, repeats: int) -> Answer:
    """Seconds of a reserve and a commit, with the accountants and without them, and of reading all."""
    path = ledger_path(folder / str(entries))
    path.parent.mkdir()
    fill(path, entries)
    book = Ledger(path, Ceiling(8.0, DELTA))
    whole, bare, commits = [], [], []
    exact = accounts.epsilon

    def quick(history: Iterable[Mechanism], delta: float) -> accounting.Epsilon:
        value = renyi_epsilon(history, delta)
        return accounting.Epsilon(value, value, value)

    for number in range(repeats):
        for times, accountant in ((whole, exact), (bare, quick)):
            accounts.epsilon = accountant  # type: ignore[assignment]
            begun = time.perf_counter()
            reservation = book.reserve("run", entries + number, 6.3, Q, 1)
            times.append(time.perf_counter() - begun)
            commits.append(seconds(lambda made=reservation: book.commit(made, 1)))
    accounts.epsilon = exact
    pair = spread(bare, 5)["median"] + spread(commits, 5)["median"]
    return {
        "entries": entries,
        "reserve_seconds": spread(whole, 4),
        "reserve_without_accounting_seconds": spread(bare, 4),
        "commit_seconds": spread(commits, 4),
        "read_seconds": spread([seconds(lambda: read_account(path)) for _ in range(repeats)], 4),
        "pairs_per_second": round(1 / (spread(whole, 5)["median"] + spread(commits, 5)["median"]), 1),
        "pairs_per_second_without_accounting": round(1 / pair, 1),
    }


def describe(result: Answer) -> str:
    """The tables for the terminal."""
    accountants = [
        [f"{case['history']}, {case['accountant']}", case["epsilon"], case["seconds"]["median"]]
        for case in result["accountants"]
    ]
    ledgers = [
        [
            case["entries"],
            *(
                case[f"{what}_seconds"]["median"]
                for what in ("read", "reserve", "reserve_without_accounting", "commit")
            ),
            case["pairs_per_second"],
            case["pairs_per_second_without_accounting"],
        ]
        for case in result["ledger"]
    ]
    return "\n\n".join(
        [
            table([f"{ROUNDS} rounds of {STEPS} steps", "epsilon", "seconds"], accountants),
            table(
                ["entries", "read s", "reserve s", "without accounting", "commit s", "pairs/s", "without accounting"],
                ledgers,
            ),
        ]
    )


def main() -> None:
    """Measure, write benchmarks/results/privacy_accounting.json, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="whose disk the ledgers are written to; default: the temporary one")
    parser.add_argument("--quick", action="store_true", help="a smoke test; results in privacy_accounting_quick.json")
    given = parser.parse_args()
    repeats = 2 if given.quick else REPEATS
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        result = {
            "what": "seconds of PRV and PLD over 100 rounds, and of the ledger's reserve and commit",
            "hardware": hardware(1),
            "accountants": measure_accountants(repeats),
            "ledger": [
                measure_ledger(entries, Path(folder), repeats) for entries in ENTRIES[: 2 if given.quick else 3]
            ],
        }
    publish("privacy_accounting_quick" if given.quick else "privacy_accounting", result)
    print(describe(result))


if __name__ == "__main__":
    main()
