"""Questions to sites and their replies, one at a time, over Flower's grid.

Flower's own loop keeps every reply of a round in memory, waits for ever for absent nodes and asks nobody twice. Here a
reply is pulled, handed on and freed; a site that joins late, lost its line or restarted is asked again within the
round; a site that refuses is asked again after a while. In a simulation (a grid whose nodes are always there) nothing
is waited for.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid

from client.contract import ContractError, Invitation, Presence, to_wire
from server.config import RunPlan
from server.journal import Journal
from server.membership import Membership
from server.screening import refusal_of, screen_presence, short_reason

log = logging.getLogger("medsegfed.server")

POLL_SECONDS = 0.2  # between looks for replies when none came; Flower's default of 3 s dominates short rounds
LONGEST_POLL_SECONDS = 1.0  # the pause grows to a twentieth of the time that nothing came: a look is a request a site
LOOK_SECONDS = 2.0  # between looks who is online, who was revoked, whether the run is to stop
RETRY_SECONDS = 10.0  # until a site that refused is asked again: a data officer may have approved in the meantime
LOST = (
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
)  # Flower's own answers for a node that lost its line or its process: the SuperLink gives them in its own name


Records = dict[str, ArrayRecord | ConfigRecord | MetricRecord]


class RunStopped(Exception):
    """The coordinator stopped the run."""


@dataclass
class _Question:
    """What one node was asked, until it has answered."""

    site: str | None  # None: "who is there?"
    activation: str  # of the node when it was asked
    nonce: str = ""


@dataclass
class _Round:
    """Who has answered one round's question, and who must be left alone for a while."""

    kind: str
    records: Callable[[], Records]
    group: str
    wave: int  # sites that are asked at the same time
    answered: set[str] = field(default_factory=set)
    not_before: dict[str, float] = field(default_factory=dict)  # site -> earliest next question


class Exchange:
    """Conversations of one run with its sites.

    Args:
        grid: Flower's; `get_nodes`, where it has one, tells who is online under which name.
        plan: names the roster and the task.
        journal: is told who came, who refused and what is waited for.
        membership: a real federation's members; None in a simulation.
        stopped: asked every two seconds; True ends the conversation with `RunStopped`.
    """

    def __init__(
        self,
        grid: Grid,
        plan: RunPlan,
        journal: Journal,
        membership: Membership | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.grid, self.plan, self.journal, self.membership, self.stopped = grid, plan, journal, membership, stopped
        self.patient = membership is not None  # a real network: sites come late and come back
        self.sites: dict[int, str] = {}  # node -> site, once it has introduced itself
        self.refused: dict[str, str] = {}  # site (or node) -> code of its last refusal
        self.suspended: set[str] = set()  # in a simulation; a federation's register says who is a member
        self._pending: dict[str, tuple[int, _Question]] = {}  # message id -> node, question
        self._online: dict[int, tuple[str, str]] = {}  # node -> name it is registered by, activation
        self._looked = -LOOK_SECONDS
        self._retry: dict[int, float] = {}  # node -> earliest next introduction
        self._keys: dict[str, str | None] = dict.fromkeys(plan.roster)

    def key_of(self, site: str) -> str | None:
        """The site's enrolled signing key (hex); None for a virtual site."""
        return self._keys.get(site)

    def is_member(self, site: str) -> bool:
        """Whether the site's answers count at this moment; a revocation takes effect here within a look."""
        return site in self._keys and site not in self.suspended

    def ask(
        self,
        kind: str,
        round_: int,
        records: Callable[[], Records],
        met: Callable[[], bool],
        absence_seconds: float,
    ) -> Iterator[tuple[str, Message]]:
        """Ask every site of the roster and yield (site, reply) as they come.

        Ends when all members have answered; or when `met()` and the deadline has passed; or when `met()`, nobody online
        owes an answer and the others had `absence_seconds` to come back. Short of that a simulation ends as soon as
        nobody owes an answer; a real federation says that it waits, and goes on when sites return.

        Args:
            kind: MessageType.TRAIN or EVALUATE.
            records: makes what is sent beside the task, the same to all. Called whenever somebody is asked: a model
                is not kept for that.
            met: whether the replies so far suffice.

        Raises:
            RunStopped: the coordinator wants the run to end.
        """
        wave = self.plan.sites_at_once if kind == MessageType.TRAIN else len(self.plan.roster)
        question = _Round(kind, records, str(round_), wave)
        started = quiet_since = last_came = time.monotonic()
        paused = told_late = False
        while True:
            self._look()
            known = len(self.sites)
            moved = self._send(question)  # something came about that the round is about
            came = False
            for site, reply in self._pull(question):
                came = True
                if site is not None:
                    moved = True
                    yield site, reply
            moved = moved or len(self.sites) > known
            missing = [site for site in self.plan.roster if self.is_member(site) and site not in question.answered]
            now = time.monotonic()
            late = now - started > self.plan.deadline_seconds
            if late:
                question.wave = len(self.plan.roster)  # who was not asked yet waits for nobody any more
            if moved or self._owed():
                quiet_since = now
            if paused and moved:
                self.journal.append("resumed", round=round_)
                paused, told_late = False, told_late or late
            if not missing or (met() and (late or now - quiet_since > absence_seconds)):
                break
            if not self.patient and (late or (self._online and not self._pending and not came)):
                break
            if (
                self.patient
                and not paused
                and not met()
                and ((late and not told_late) or now - quiet_since > absence_seconds)
            ):
                paused, told_late = self._tell_pause(round_, missing), late
            last_came = now if came else last_came
            if not came:
                time.sleep(min(LONGEST_POLL_SECONDS, max(POLL_SECONDS, (now - last_came) / 20)))
        self._pending = {i: (n, q) for i, (n, q) in self._pending.items() if q.site is None}

    # --- who is there -------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Every two seconds: stop? revoked? who is online?"""
        if self._online and time.monotonic() - self._looked < LOOK_SECONDS:
            return
        if self.stopped():
            raise RunStopped
        self._look_at_members()
        self._online = self._nodes()
        self._looked = time.monotonic()

    def _look_at_members(self) -> None:
        if self.membership is not None:
            active = self.membership.active()
            gone = [site for site in self._keys if site not in active]
            for site in gone:
                self._leave(site)
            self._keys = {site: active[site].signing_key for site in self.plan.roster if site in active}

    def _nodes(self) -> dict[int, tuple[str, str]]:
        if self.patient:
            nodes = self.grid.get_nodes()  # Flower's HttpGrid
            return {node.node_id: (node.name, node.last_activated_at) for node in nodes if node.name in self._keys}
        return dict.fromkeys(self.grid.get_node_ids(), ("", ""))

    def _leave(self, site: str) -> None:
        """A site that was revoked or suspended: nothing of it counts from now on."""
        log.warning("%s is no member any more; its answers do not count", site)
        self.journal.append("left", site=site)
        self.sites = {node: name for node, name in self.sites.items() if name != site}
        self._pending = {i: (n, q) for i, (n, q) in self._pending.items() if q.site != site}

    def _tell_pause(self, round_: int, waiting_for: list[str]) -> bool:
        reasons = {site: self.refused.get(site, "absent") for site in waiting_for}
        log.warning(
            "round %d waits: below the quorum of %d without %s. It goes on when they return; `medsegfed stop` ends it.",
            round_,
            self.plan.required,
            ", ".join(f"{site} ({reason})" for site, reason in reasons.items()),
        )
        self.journal.append("paused", round=round_, need=self.plan.required, absent=reasons)
        return True

    # --- questions and replies ----------------------------------------------------------------------------------------

    def _owed(self) -> bool:
        """Whether somebody works on an answer; one who has refused to introduce himself does not."""
        return any(q.site is not None or node not in self._retry for node, q in self._pending.values())

    def _send(self, round_state: _Round) -> bool:
        """Introductions to strangers, the round's question to every site that owes an answer and has not been asked.

        Returns:
            Whether a site was asked the round's question that has not refused or lost it before: one that is asked
            again and again holds nobody up.
        """
        now = time.monotonic()
        asked = {(node, q.site is None, q.activation) for node, q in self._pending.values()}
        due: list[tuple[int, _Question]] = []
        for node, (_, activation) in self._online.items():
            site = self.sites.get(node)
            if site is None:
                if (node, True, activation) not in asked and now >= self._retry.get(node, 0.0):
                    due.append((node, _Question(None, activation, secrets.token_hex(16))))
            elif (
                self.is_member(site)
                and site not in round_state.answered
                and (node, False, activation) not in asked
                and now >= round_state.not_before.get(site, 0.0)
            ):
                due.append((node, _Question(site, activation)))
        due.sort(key=lambda pair: pair[1].site or "")  # site order: a simulation trains in it
        due = self._wave(due, round_state.wave)
        ids = self.grid.push_messages(self._compose(due, round_state)) if due else []
        for message_id, (node, question) in zip(ids, due, strict=False):
            if message_id is not None:
                self._pending[message_id] = (node, question)
        return any(question.site and question.site not in round_state.not_before for _, question in due)

    def _wave(self, due: list[tuple[int, _Question]], most: int) -> list[tuple[int, _Question]]:
        """Introductions, and as many of the round's questions as may be open: each may end in an answer, a model large,
        that the SuperLink has to hold until it is fetched."""
        free = most - len({q.site for _, q in self._pending.values() if q.site is not None})
        sent = []
        for node, question in due:
            if question.site is not None:
                if free <= 0:
                    continue
                free -= 1
            sent.append((node, question))
        return sent

    def _compose(self, due: list[tuple[int, _Question]], round_state: _Round) -> list[Message]:
        """The messages; what goes to several sites is made once."""
        task = to_wire(self.plan.task)
        records = round_state.records() if any(question.site for _, question in due) else {}
        messages = []
        for node, question in due:
            if question.site is None:
                invitation = to_wire(Invitation(self.plan.run_id, question.nonce))
                content = RecordDict({"task": task, "invitation": invitation})
                messages.append(Message(content, node, MessageType.QUERY))
            else:
                content = RecordDict({"task": task, **records})
                messages.append(Message(content, node, round_state.kind, group_id=round_state.group))
        return messages

    def _pull(self, round_state: _Round) -> Iterator[tuple[str | None, Message]]:
        """Replies that are here, one at a time; the site is None for what does not count in the round."""
        for message_id in list(self._pending):
            if message_id not in self._pending:
                continue  # the site answered another copy of the question, or left
            for reply in self.grid.pull_messages([message_id]):  # one: each may be a model
                node, question = self._pending.pop(message_id)
                site = None
                if question.site is None:
                    self._introduce(node, question.nonce, reply)
                elif (site := self._sender(question.site, node, reply, round_state)) is not None:
                    round_state.answered.add(site)
                    self._pending = {i: (n, q) for i, (n, q) in self._pending.items() if q.site != site}
                yield site, reply

    def _sender(self, site: str, node: int, reply: Message, round_state: _Round) -> str | None:
        """The site a reply counts for; None when it is to be asked again, or the reply is a stranger's."""
        lost = reply.has_error() and reply.error.code in LOST
        if reply.metadata.src_node_id not in ((node, SUPERLINK_NODE_ID) if lost else (node,)):
            self._stranger(f"a reply to {site}'s question came from another node")
            return None
        self._look_at_members()  # revoked since the last look: what arrives now does not count any more
        if site in round_state.answered or not self.is_member(site):
            return None
        if not self.patient or not reply.has_error():
            self.refused.pop(site, None)
            return site
        if lost and reply.metadata.src_node_id == SUPERLINK_NODE_ID:  # a site's own word for it is a refusal
            log.warning("%s lost its line; it is asked again when it is back", site)
            self.journal.append("lost", site=site)
            round_state.not_before[site] = time.monotonic() + LOOK_SECONDS
            self._looked = -LOOK_SECONDS
            return None
        code = "fault" if lost else refusal_of(reply)
        if code is None:
            return site  # an error that screening names
        self._refuse(site, code)
        round_state.not_before[site] = time.monotonic() + RETRY_SECONDS
        return None

    def _introduce(self, node: int, nonce: str, reply: Message) -> None:
        name = self._online.get(node, ("", ""))[0]
        if self.patient and not name:
            return  # it went offline, or was revoked, while it answered; it is asked again when it is back
        try:
            if self.patient and reply.has_error():
                self._retry[node] = time.monotonic() + (LOOK_SECONDS if reply.error.code in LOST else RETRY_SECONDS)
                if (code := refusal_of(reply)) is not None:
                    self._refuse(name, code)
                return
            presence = screen_presence(reply, self.plan.run_id, nonce, self._keys)
            if self.patient and name != presence.site:
                raise ContractError(f"a node registered as '{name}' says it is '{presence.site}'")
            if presence.site in self.sites.values():
                raise ContractError(f"'{presence.site}' is here twice; the first one counts")
        except Exception as error:  # one stranger must not end the run of the others
            self._retry[node] = time.monotonic() + (RETRY_SECONDS if self.patient else float("inf"))
            self._stranger(short_reason(error))
            return
        self.sites[node] = presence.site
        self.refused.pop(presence.site, None)
        self._tell_site(node, presence)

    def _tell_site(self, node: int, presence: Presence) -> None:
        told = {
            "site": presence.site,
            "train_patients": presence.train_patients,
            "test_patients": presence.test_patients,
            "faults": presence.faults,
            "software": presence.software,
            "application": presence.application,
        }
        self.journal.append("site", node=node, **told)
        if self.membership is not None:
            self.membership.note("site", run=self.plan.run_id, audit_head=presence.audit_head, **told)

    def _refuse(self, site: str, code: str) -> None:
        if self.refused.get(site) != code:  # once, not every time it is asked again
            self.refused[site] = code
            log.warning("%s refuses: %s", site, code)
            self.journal.append("refused", site=site, code=code)
            if self.membership is not None:
                self.membership.note("refused", run=self.plan.run_id, site=site, code=code)

    def _stranger(self, reason: str) -> None:
        log.warning("a reply is left out: %s", reason)
        self.journal.append("stranger", reason=reason)
