"""Keeps a federation's run going: registers the members at the SuperLink and has the run at hand carried out.

One look every two seconds compares what should be with what is, and mends the difference. So a run that was queued
starts, a SuperLink that came back without its memory is told everything anew, and a ServerApp that died is started
again from the last committed round - all by the same few lines.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from deploy.control import Control
from deploy.federation import Federation
from deploy.processes import Events
from deploy.runs import has_ended, next_run, wanted
from medsegdiff.errors import UserError
from server.journal import read_events
from server.rounds import STOP, committed_rounds

log = logging.getLogger("medsegfed.supervisor")

LOOK_SECONDS = 2.0
AGAIN_SECONDS = 3.0  # between a ServerApp's death and its next start; doubled up to
LONGEST_SECONDS = 60.0
STOP_SECONDS = 30.0  # a ServerApp that was asked to stop and has not: Flower ends it
GONE_SECONDS = 3.0  # without a ServerApp's process: Flower itself notices after 43 to 58 s
UNSEEN_SECONDS = 60.0  # the same, of a ServerApp that is only starting


class RunKeeper:
    """Looks after the SuperLink's members and the run at hand.

    Args:
        connect: a new connection to the SuperLink's Control API.
        members_changed: told when the set of admitted sites changed (the gateway has to know).
        events: told what happens, as the supervisor's.
        serverapp_lives: whether the process of a ServerApp lives on this machine; default: Flower's word alone counts.
    """

    def __init__(
        self,
        federation: Federation,
        connect: Callable[[], Control],
        members_changed: Callable[[], None],
        events: Events,
        serverapp_lives: Callable[[], bool] = lambda: True,
    ) -> None:
        self.federation, self.connect, self.members_changed, self.tell = federation, connect, members_changed, events
        self.serverapp_lives = serverapp_lives
        self._admitted: dict[str, str] | None = None
        self._run: tuple[Path, int] | None = None  # folder, Flower's id
        self._committed = 0  # rounds, when it was started
        self._events = 0  # of its journal, then
        self._lived = 0.0  # until when its ServerApp is taken to live
        self._not_before = 0.0
        self._pause = AGAIN_SECONDS
        self._stop = threading.Event()
        self._trouble = ""
        self._control: Control | None = None

    def start(self) -> threading.Thread:
        """Look after it in a thread until `stop`."""
        thread = threading.Thread(target=self._serve, name="keeper", daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        """End the thread at its next look."""
        self._stop.set()

    def _serve(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            try:
                self.look()
                self._trouble = ""
            except httpx.HTTPError:
                continue  # the SuperLink is not there; the supervisor starts it again
            except Exception as error:  # a keeper that ended would look after nothing any more
                known = isinstance(error, (UserError, OSError))
                reason = str(error) if known else f"{type(error).__name__}: {error}"
                if reason != self._trouble:  # once, not at every look
                    self._trouble = reason
                    log.exception("the keeper could not do its work") if not known else None
                    self.tell("trouble", {"reason": reason})

    def look(self) -> None:
        """Compare what should be with what is, and mend the difference."""
        admitted = {s: m.node_key for s, m in self.federation.members().items() if m.active}
        if admitted != self._admitted:
            # At the first look, too: somebody may have come in since the gateway was configured.
            self.members_changed()
            self._admitted = admitted
        self._control = self._control or self.connect()  # kept: a new TLS connection at every look costs the SuperLink
        try:
            added, removed = self._control.register(admitted)
            if added or removed:
                self.tell("nodes", {"added": added, "removed": removed})
            self._look_at_run(self._control)
        except httpx.HTTPError:
            self._control.close()
            self._control = None
            raise

    def _look_at_run(self, control: Control) -> None:
        if self._run is not None and self._is_over(control, *self._run):
            self._run = None
        if self._run is None and time.monotonic() >= self._not_before:
            folder = next_run(self.federation.runs)
            if folder is not None:
                events = read_events(folder / "journal.jsonl")
                run_id = control.start(folder)
                self._run = (folder, run_id)
                self._events, self._committed = len(events), len(committed_rounds(events))
                self._lived = time.monotonic() + UNSEEN_SECONDS
                self.tell("run_started", {"run": folder.name, "flower_run": run_id})

    def _is_over(self, control: Control, folder: Path, run_id: int) -> bool:
        """Whether Flower's run has ended. One that died is started again, after pauses that grow while it does.

        A run that has committed rounds since its start is no run that dies of itself: it waits for nothing.
        """
        found = control.run(run_id)
        try:
            # A run that the coordinator stopped and asked for again at once is wanted, but nothing of it was lost.
            going_on = wanted(folder) and not has_ended(folder, self._events)
            damage = {}
        except UserError as error:
            # A damaged journal: nothing goes on with it, and once Flower's run is over others do.
            going_on, damage = False, {"reason": str(error)}
        reason = "the SuperLink was started anew" if found is None else f"its ServerApp ended: {found.detail[:200]}"
        if found is not None and found.status != "finished":
            if _asked_to_stop(folder) > STOP_SECONDS:
                control.stop(run_id)
                self.tell("run_ended_by_force", {"run": folder.name})
                return False
            if not going_on or not self._serverapp_gone(found.status):
                return False
            control.stop(run_id)
            reason = "its ServerApp's process is gone"
        if going_on:
            if len(committed_rounds(read_events(folder / "journal.jsonl"))) > self._committed:
                self._pause = AGAIN_SECONDS
            elif found is not None:
                self._not_before = time.monotonic() + self._pause
                self._pause = min(LONGEST_SECONDS, 2 * self._pause)
            self.tell("run_lost", {"run": folder.name, "reason": reason})
        else:
            self._pause = AGAIN_SECONDS
            self.tell("run_ended", {"run": folder.name, **damage})
        return True

    def _serverapp_gone(self, status: str) -> bool:
        """Whether the process that should be at work has been missing for too long. A killed one tells nobody."""
        now = time.monotonic()
        if status == "pending" or self.serverapp_lives():
            self._lived = now + (UNSEEN_SECONDS if status == "pending" else GONE_SECONDS)
        return now > self._lived


def _asked_to_stop(folder: Path) -> float:
    """Seconds since the coordinator asked for the run's end; 0 when nobody did."""
    try:
        return time.time() - (folder / STOP).stat().st_mtime
    except OSError:
        return 0.0
