"""Loaded by every Python process that has this folder on PYTHONPATH: its wall clock follows a file.

MEDSEGFED_TEST_CLOCK names the file; it holds seconds. The monotonic clock cannot be moved, as on a real machine.
"""

import os
import threading
import time

import time_machine


def _offset() -> float:
    try:
        with open(os.environ["MEDSEGFED_TEST_CLOCK"], encoding="ascii") as handle:
            return float(handle.read() or 0)
    except (OSError, ValueError):
        return 0.0


def _follow(look: threading.Event = threading.Event()) -> None:  # noqa: B008 - one for the process
    true, traveller, seen = time.time, None, 0.0
    while True:
        offset = _offset()
        if offset != seen:
            if traveller is not None:
                traveller.stop()
            traveller = time_machine.travel(true() + offset, tick=True) if offset else None
            if traveller is not None:
                traveller.start()
            seen = offset
        look.wait(0.5)


if "MEDSEGFED_TEST_CLOCK" in os.environ:
    threading.Thread(target=_follow, name="clock", daemon=True).start()
