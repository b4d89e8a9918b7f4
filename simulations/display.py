"""What a simulation shows while it works: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from medsegdiff.progress import Progress as Report
from medsegdiff.progress import listening

PLAIN_SECONDS = 15.0  # between plain lines


class Display:
    """Turns reports into one line: arm, round, site, loss, Dice, remaining time.

    Args:
        rounds: of the federation.
        units: total work; one unit is one training step. Scoring a case counts for its share of a step's work, so that
            the remaining time is right for both.
        case_units: units of scoring one case.
        round_units: units of one federated round, used where the engine reports rounds alone.
    """

    def __init__(self, console: Console, rounds: int, units: float, case_units: float, round_units: float) -> None:
        self._arm = "federated"
        self._console = console
        self._rounds = rounds
        self._units = units
        self._case_units = case_units
        self._round_units = round_units
        self._done = 0.0
        self._loss: float | None = None
        self._dice: float | None = None
        self._started = self._told = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    @property
    def arm(self) -> str:
        """What is worked on: federated, local-SITE, pooled, scoring."""
        return self._arm

    @arm.setter
    def arm(self, name: str) -> None:
        self._arm, self._loss, self._dice = name, None, None  # figures of the arm before would be taken for this one's

    def skip(self, units: float) -> None:
        """Count work that an earlier session did."""
        self._done += units

    def __call__(self, report: Report) -> None:
        if report.loss is not None:
            self._loss = report.loss
        if report.dice is not None:
            self._dice = report.dice
        if report.stage == "train":
            self._done += 1
        elif report.stage == "evaluate":
            self._done += self._case_units
        elif report.stage == "round":
            self._done = max(self._done, report.done * self._round_units)
        self._show(report)

    def _show(self, report: Report) -> None:
        text = self._describe(report)
        if self._bar is not None:
            self._bar.update(self._task, description=text, completed=min(self._done, self._units))
        elif time.monotonic() - self._told > PLAIN_SECONDS or report.stage == "round":
            self._told = time.monotonic()
            share = 100 * min(1.0, self._done / self._units)
            self._console.print(f"{text} | {share:.0f} % | {self._remaining()}", soft_wrap=True, highlight=False)

    def _describe(self, report: Report) -> str:
        parts = [self.arm]
        if self.arm == "federated" and report.round:
            parts.append(f"round {report.round}/{self._rounds}")
        if report.site and report.site != self.arm:
            parts.append(report.site)
        if report.stage not in ("train", "round"):
            parts.append(f"{report.stage} {report.done}/{report.total}")
        if self._loss is not None:
            parts.append(f"loss {self._loss:.3f}")
        if self._dice is not None:
            parts.append(f"Dice {self._dice:.3f}")
        return " · ".join(parts)

    def _remaining(self) -> str:
        elapsed = time.monotonic() - self._started
        left = elapsed / max(self._done, 1.0) * max(self._units - self._done, 0.0)
        return f"about {int(left // 60)} min {int(left % 60)} s left"

    @contextmanager
    def live(self) -> Iterator[None]:
        """Listen to reports inside the block."""
        if not self._console.is_terminal:
            with listening(self):
                yield
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self._console, refresh_per_second=4) as bar, listening(self):
            self._bar, self._task = bar, bar.add_task("starting", total=self._units, completed=int(self._done))
            yield


def make_console() -> Console:
    """Progress goes to standard error, so that standard output holds results alone."""
    return Console(stderr=True, force_terminal=True if sys.stderr.isatty() else None)


@contextmanager
def single_bar(stage: str) -> Iterator[None]:
    """A bar for one kind of work, as reports of `stage` count it; plain lines where there is no terminal."""
    console = make_console()
    told = time.monotonic()
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, refresh_per_second=4, disable=not console.is_terminal) as bar:
        task = bar.add_task(stage, total=None)

        def listen(report: Report) -> None:
            nonlocal told
            loss = f" · loss {report.loss:.3f}" if report.loss is not None else ""
            bar.update(task, description=f"{report.stage}{loss}", completed=report.done, total=report.total)
            if not console.is_terminal and time.monotonic() - told > PLAIN_SECONDS:
                told = time.monotonic()
                console.print(f"{report.stage}: {report.done} of {report.total}{loss}", highlight=False)

        with listening(listen):
            yield
