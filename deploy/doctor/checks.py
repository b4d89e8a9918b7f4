"""What a check is, how checks are run so that none can stop or hang the others, and how they are shown.

The output may be mailed to the coordinator: a `Check` holds counts, fixed words and keyed hashes. Names appear only
where the site's own terminal asked for them (`Names.shown`).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, TypeVar

from rich.markup import escape
from rich.table import Table

from medsegdiff.errors import UserError

Status = Literal["ok", "warn", "fail", "skipped"]

SHOWN = 5  # hashes or names on the terminal; --json holds all
LONGEST = 300  # characters of a foreign text (an exception, a certificate's issuer)

T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    name: str
    status: Status
    detail: str  # one line: counts and fixed words
    advice: str = ""  # what to do; empty where nothing need be done
    figures: Mapping[str, Any] = field(default_factory=dict)  # the counts again, for programs
    cases: tuple[str, ...] = ()  # cases or patients concerned: keyed hashes, or names where they were asked for


@dataclass(frozen=True)
class Names:
    """How cases and patients are named: not at all, by keyed hash, or plainly on the site's own terminal."""

    shown: bool = False
    hashed: Callable[[str], str] | None = None  # None before the site has its keys

    def of(self, names: Iterable[str], plain: Iterable[str] | None = None) -> tuple[str, ...]:
        """Sorted and without repetition; `plain` is what the terminal shows instead of the bare names."""
        if self.shown:
            return tuple(sorted(set(names if plain is None else plain)))
        if self.hashed is None:
            return ()
        return tuple(sorted({self.hashed(name) for name in names}))


@dataclass(frozen=True)
class Probe:
    """Work that yields checks, and the seconds it may take before it is given up."""

    name: str  # of the check that stands for it when it fails as a whole
    work: Callable[[], Iterable[Check]]
    seconds: float = 20.0


def run_probes(probes: Iterable[Probe], names: Names, hidden: Sequence[str] = ()) -> list[Check]:
    """All checks of all probes, in their order. A probe that crashes or hangs is one failed check; the others go on.

    Args:
        hidden: texts that must not appear in the reason of a crash, such as the path of the data folder.
    """
    return [check for probe in probes for check in _run(probe, names, hidden)]


def _run(probe: Probe, names: Names, hidden: Sequence[str]) -> list[Check]:
    found: list[Check] = []

    def work() -> None:
        for check in probe.work():
            found.append(check)

    try:
        within(probe.seconds, work)
    except TimeoutError:
        late = f"no answer within {probe.seconds:g} s; the other checks went on"
        return [*found, Check(probe.name, "fail", late, "Is a network folder or a device hanging? Then try again.")]
    except Exception as error:
        return [*found, Check(probe.name, "fail", f"this check broke off: {reason_of(error, names, hidden)}")]
    return found


def within(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`, which runs in a thread of its own and is left behind there when it takes too long.

    Raises:
        TimeoutError: it took longer than `seconds`.
    """
    outcome: list[T] = []
    fault: list[Exception] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            fault.append(error)

    thread = threading.Thread(target=run, name="doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    if fault:
        raise fault[0]
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return outcome[0]


def reason_of(error: BaseException, names: Names, hidden: Sequence[str] = ()) -> str:
    """Why something failed, without the names of files, cases or patients.

    Of a `UserError` the text stays, less paths and what was found; of other exceptions the kind, and for a refusal of
    the operating system its standard words.
    """
    if names.shown:
        return f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error)
    if isinstance(error, UserError):
        return without_names(str(error), hidden)
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__} ({plain_text(error.strerror)})"
    return type(error).__name__


def without_names(text: str, hidden: Sequence[str] = ()) -> str:
    """A message of our own less paths, quoted texts and what was found in a file."""
    for path in sorted((path for path in hidden if "/" in path), key=len, reverse=True):
        text = text.replace(path, "...")
    if found := re.search(r"(.*is not valid YAML): .*?(line \d+)", text):  # the parser quotes the line
        text = f"{found[1]} near {found[2]}."
    text = re.sub(r"\S*/\S*", "...", text)
    # What the program itself suggests stays: a known key, an example of a form.
    quoted = r"(did you mean |of the form )?('[^']*'|\"[^\"]*\")"
    text = re.sub(quoted, lambda found: found[0] if found[1] else "'...'", text)
    text = re.sub(r"([;,] found) .*?(?=$|; |\. )", r"\1 ...", text)
    return plain_text(text).removeprefix("... ")


def plain_text(text: str) -> str:
    """One line of printable characters, cut where it grows long: the text may come from anybody on the network."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in str(text)).split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def exit_code(checks: Iterable[Check]) -> int:
    """0 when nothing fails, else 1."""
    return int(any(check.status == "fail" for check in checks))


def as_plain(checks: Sequence[Check]) -> dict[str, Any]:
    """The report as data, ready for JSON."""
    return {
        "healthy": exit_code(checks) == 0,
        "counts": _counts(checks),
        "checks": [
            {
                "name": check.name,
                "status": check.status,
                "detail": check.detail,
                "advice": check.advice,
                "figures": dict(check.figures),
                "cases": list(check.cases),
            }
            for check in checks
        ],
    }


def checks_table(checks: Sequence[Check]) -> Table:
    """The report for a terminal, readable at 80 columns. Checks skipped in a row for one reason share a line."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=False)
    table.add_column(width=7, no_wrap=True)
    table.add_column(width=18)
    table.add_column(overflow="fold")
    for (status, detail, *_), group in groupby(checks, key=_row_key):
        same = list(group)
        lines = [escape(detail)]
        if len(same) > 1:
            lines.append(f"[dim]also {escape(', '.join(check.name for check in same[1:]))}[/dim]")
        cases = same[0].cases
        if cases:
            more = f" and {len(cases) - SHOWN} more (--json lists them)" if len(cases) > SHOWN else ""
            lines.append(f"[dim]{escape(', '.join(cases[:SHOWN]))}{more}[/dim]")
        if same[0].advice:
            lines.append(f"[italic]{escape(same[0].advice)}[/italic]")
        table.add_row(f"[{_STYLES[status]}]{status}[/]", escape(same[0].name), "\n".join(lines))
    return table


def _row_key(check: Check) -> tuple[Status, str, str]:
    """Equal for checks that share a row."""
    return check.status, check.detail, "" if check.status == "skipped" else check.name


def summary_line(checks: Sequence[Check]) -> str:
    """How many checks ended how."""
    counts = _counts(checks)
    words = {"ok": "ok", "warn": "to look at", "fail": "failed", "skipped": "skipped"}
    return f"{len(checks)} checks: " + ", ".join(f"{counts[s]} {words[s]}" for s in words if counts[s])


_STYLES: dict[Status, str] = {"ok": "green", "warn": "bold yellow", "fail": "bold red", "skipped": "dim"}


def _counts(checks: Iterable[Check]) -> dict[str, int]:
    found = [check.status for check in checks]
    return {status: found.count(status) for status in _STYLES}


def deadline(seconds: float) -> Callable[[], float]:
    """A function that tells the seconds left, never less than a hundredth (a socket takes 0 for "do not wait")."""
    end = time.monotonic() + seconds
    return lambda: max(0.01, end - time.monotonic())


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 case`, `3 cases`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def gibibytes(number: float) -> str:
    """Bytes as `1.5 GiB`, or `20 MiB` where they are few."""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.0f} MiB"
