"""How long work reports on itself, wherever it runs.

Training and evaluation call `report(...)`; whoever started them decides what becomes of it: a live display on a
terminal, plain lines in a log, nothing in a test. The listener belongs to the process, not to a thread: Flower runs
a server application in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report: `done` of `total` units of `stage`, with what a person would like to see beside it."""

    stage: str  # "prepare", "train", "evaluate", ...
    done: int
    total: int
    site: str | None = None
    round: int | None = None
    loss: float | None = None
    dice: float | None = None


Listener = Callable[[Progress], None]

_listeners: list[Listener | None] = [None]


def report(progress: Progress) -> None:
    """Tell the innermost listener, if there is one."""
    listener = _listeners[-1]
    if listener is not None:
        listener(progress)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Send every report made inside the block to `listener` (None silences it)."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.pop()
