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
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid

from client.contract import ContractError, Invitation, Presence, to_wire
from client.encoding import Compression, largest_size
from medsegdiff.weights import weight_shapes
from server.config import RunPlan
from server.journal import Journal
from server.membership import Membership
from server.screening import refusal_of, screen_presence, short_reason

log = logging.getLogger("medsegfed.server")

POLL_SECONDS = 0.2  # between looks for replies when none came; Flower's default of 3 s dominates short rounds
LONGEST_POLL_SECONDS = 1.0  # the pause grows to a twentieth of the time that nothing came: a look is a request a site
LOOK_SECONDS = 2.0  # between looks who is online, who was revoked, whether the run is to stop
FETCHED_ROUNDS = 2  # after which an answer that does not count any more is not fetched to free the SuperLink of it
RETRY_SECONDS = 10.0  # until a site that refused is asked again: a data officer may have approved in the meantime
MOST_AT_ONCE = 4  # questions of one round that a site is sent without a pause, and that it may owe
LOST = (
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
)  # Flower's own answers for a node that lost its line or its process: the SuperLink gives them in its own name


Records = dict[str, ArrayRecord | ConfigRecord | MetricRecord]
Late = Callable[[str, int, Message], None]  # site, round that was asked about, reply


class RunStopped(Exception):
    """The coordinator stopped the run."""


@dataclass
class _Question:
    """What one node was asked, until it has answered."""

    site: str | None  # None: "who is there?"
    activation: str  # of the node when it was asked
    nonce: str = ""
    with_model: bool = True  # or its hash alone: the site has it
    kind: str = MessageType.QUERY
    round: int = 0


@dataclass
class _Round:
    """Who has answered one round's question, and who must be left alone for a while."""

    kind: str
    records: Callable[[bool], Records]
    model_hash: str
    number: int
    wave: int  # sites that are asked at the same time
    asked: set[str] = field(default_factory=set)  # who is to answer
    answered: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)  # in a simulation: who was asked and is not there
    refused: set[str] = field(default_factory=set)  # who did so once: asked again, and waited for as if absent
    times: Counter[str] = field(default_factory=Counter)  # how often a site was asked
    late: Late | None = None  # takes what comes of earlier rounds

    @property
    def before(self) -> int:
        """Questions to train of rounds before this one are past."""
        return self.number + (self.kind != MessageType.TRAIN)

    def asks(self, question: _Question) -> bool:
        """Whether a question is this round's."""
        return question.site is not None and (question.kind, question.round) == (self.kind, self.number)

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
        self.carries = plan.stragglers.policy == "carry"
        self.sites: dict[int, str] = {}  # node -> site, once it has introduced itself
        self.refused: dict[str, str] = {}  # site (or node) -> code of its last refusal
        self.suspended: set[str] = set()  # in a simulation; a federation's register says who is a member
        self.holds: dict[str, str] = {}  # site -> hash of the model that it has shown to have: it is not sent again
        self.asked_at: dict[str, float] = {}  # site -> when it was asked last, by the monotonic clock
        self.bytes_down = 0  # of weights, sent to sites in all
        self._pending: dict[str, tuple[int, _Question]] = {}  # message id -> node, question
        self._online: dict[int, tuple[str, str]] = {}  # node -> name it is registered by, activation
        self._looked = -LOOK_SECONDS
        self._retry: dict[int, float] = {}  # node -> earliest next introduction
        self._keys: dict[str, str | None] = dict.fromkeys(plan.roster)
        self.beside_bytes = 0  # what comes down with every question at hand, with the model or without
        self.model_bytes = largest_size(Compression(), weight_shapes(plan.task.model))

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
        records: Callable[[bool], Records],
        model_hash: str,
        met: Callable[[], bool],
        absence_seconds: float,
        who: Callable[[Collection[str]], Collection[str]] | None = None,
        full: Callable[[], bool] = lambda: False,
        late: Late | None = None,
        need: Callable[[], int] | None = None,
    ) -> Iterator[tuple[str, Message]]:
        """Ask sites, by default all of the roster, and yield (site, reply) as they come.

        Ends when all members have answered, or it is `full()`; or when `met()` and the deadline has passed; or when
        `met()`, nobody online owes an answer and the others had `absence_seconds` to come back. Short of that a
        simulation ends as soon as nobody owes an answer; a real federation says that it waits, and goes on when sites
        return.

        Args:
            kind: MessageType.TRAIN or EVALUATE.
            records: makes what is sent beside the task, the same to all, with the model or without. Called whenever
                somebody is asked: a model is not kept for that.
            model_hash: of the model that the question is about; who holds it gets no weights.
            met: whether the replies so far suffice.
            who: is to answer, by the sites that will not in a simulation (none elsewhere); asked again and again.
            full: whether no further reply is of use.
            late: is given the answers to earlier rounds' questions to train, where the plan carries them on: a site
                that still works on one is neither asked nor waited for.
            need: replies that `met` asks for at this moment, for people; default: those that the plan asks for.

        Raises:
            RunStopped: the coordinator wants the run to end.
        """
        wave = self.plan.sites_at_once if kind == MessageType.TRAIN else len(self.plan.roster)
        question = _Round(kind, records, model_hash, round_, wave, late=late)
        started = quiet_since = last_came = time.monotonic()
        paused = told_late = False
        while True:
            self._look()
            question.asked = set(self.plan.roster if who is None else who(self._gone(question)))
            known = len(self.sites)
            moved = self._send(question)  # something came about that the round is about
            came = False
            for site, reply in self._pull(question):
                came = True
                if site is not None:
                    moved = True
                    yield site, reply
                    if full():
                        break
            question.asked = set(self.plan.roster if who is None else who(self._gone(question)))
            moved = moved or len(self.sites) > known
            working = self.working(question.before)
            missing = [site for site in self.plan.roster if self._owes(site, question)]
            if met():
                missing = [site for site in missing if site not in working]
            now = time.monotonic()
            overdue = now - started > self.plan.deadline_seconds
            if overdue:
                question.wave = len(self.plan.roster)  # who was not asked yet waits for nobody any more
            if moved or self._owed(question):
                quiet_since = now
            if paused and moved:
                self.journal.append("resumed", round=round_)
                paused, told_late = False, told_late or overdue
            if full() or not missing or (met() and (overdue or now - quiet_since > absence_seconds)):
                break
            if not self.patient and (overdue or (self._online and not self._pending and not came)):
                break
            if (
                self.patient
                and not paused
                and not met()
                and ((overdue and not told_late) or now - quiet_since > absence_seconds)
            ):
                due = need() if need is not None else self.plan.required
                paused, told_late = self._tell_pause(round_, missing, due), overdue
            last_came = now if came else last_came
            if not came:
                time.sleep(min(LONGEST_POLL_SECONDS, max(POLL_SECONDS, (now - last_came) / 20)))
        self._pending = {i: (n, q) for i, (n, q) in self._pending.items() if self._is_kept(q, round_)}

    def _is_kept(self, question: _Question, round_: int) -> bool:
        """Whether an answer is still of use when a round ends: late, it may count in the next one; and where it does
        not, it is fetched if it comes soon, for until then the SuperLink holds it in memory."""
        most = self.plan.stragglers.max_staleness if self.carries else FETCHED_ROUNDS
        trains = self.patient and question.kind == MessageType.TRAIN and round_ + 1 - question.round <= most
        return question.site is None or trains

    def working(self, before: int) -> set[str]:
        """Sites that still work on the update of a round before this one, and whose update will count: nothing else is
        asked of them until it is here. One that was started anew since it was asked works on nothing."""
        if not self.carries:
            return set()
        return {
            question.site
            for node, question in self._pending.values()
            if question.site is not None
            and question.round < before
            and self._online.get(node, ("", ""))[1] == question.activation
        }

    def meet(self, wait_seconds: float) -> None:
        """Ask who is there, and nothing else, until all members have said so or so many seconds have passed.

        Raises:
            RunStopped: the coordinator wants the run to end.
        """
        nobody, started = _Round(MessageType.QUERY, lambda _: {}, "", 0, 0), time.monotonic()
        while True:
            self._look()
            self._send(nobody)
            for _ in self._pull(nobody):
                pass
            here = set(self.sites.values())
            missing = [site for site in self.plan.roster if self.is_member(site) and site not in here]
            waits = self.patient or any(node not in self.sites and node not in self._retry for node in self._online)
            if not missing or not waits or time.monotonic() - started > wait_seconds:
                break
            time.sleep(POLL_SECONDS)

    # --- who is there -------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Every two seconds: stop? revoked? who is online?"""
        if self._online and time.monotonic() - self._looked < LOOK_SECONDS:
            return
        if self.stopped():
            raise RunStopped
        self.look_at_members()
        self._online = self._nodes()
        self._looked = time.monotonic()

    def look_at_members(self) -> None:
        """Who left is told and not asked any more; done at every look, and when members have just been changed."""
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
        self.holds.pop(site, None)
        self.sites = {node: name for node, name in self.sites.items() if name != site}
        self._pending = {i: (n, q) for i, (n, q) in self._pending.items() if q.site != site}

    def _tell_pause(self, round_: int, waiting_for: list[str], need: int) -> bool:
        reasons = {site: self.refused.get(site, "absent") for site in waiting_for}
        log.warning(
            "round %d waits: below the quorum of %d without %s. It goes on when they return; `medsegfed stop` ends it.",
            round_,
            need,
            ", ".join(f"{site} ({reason})" for site, reason in reasons.items()),
        )
        self.journal.append("paused", round=round_, need=need, absent=reasons)
        return True

    # --- questions and replies ----------------------------------------------------------------------------------------

    def _owes(self, site: str, round_state: _Round) -> bool:
        return self.is_member(site) and site in round_state.asked and site not in round_state.answered

    def _gone(self, round_state: _Round) -> set[str]:
        """In a simulation, who will not answer; where sites come back, nobody is given up."""
        if self.patient or not all(node in self.sites or node in self._retry for node in self._online):
            return set()
        here = set(self.sites.values()) if self._online else set(self.plan.roster)
        return round_state.gone | (set(self.plan.roster) - here)

    def _owed(self, round_state: _Round) -> bool:
        """Whether somebody works on an answer; one who has refused it, or to introduce himself, does not."""
        return any(
            (round_state.asks(q) and q.site not in round_state.refused) or (q.site is None and node not in self._retry)
            for node, q in self._pending.values()
        )

    def _send(self, round_state: _Round) -> bool:
        """Introductions to strangers, the round's question to every site that owes an answer and has not been asked.

        Returns:
            Whether a site was asked the round's question that has not refused or lost it before: one that is asked
            again and again holds nobody up.
        """
        now = time.monotonic()
        asked = {
            (node, q.site is None, q.activation)
            for node, q in self._pending.values()
            if q.site is None or round_state.asks(q)
        }
        working = self.working(round_state.before)
        due: list[tuple[int, _Question]] = []
        for node, (_, activation) in self._online.items():
            site = self.sites.get(node)
            if site is None:
                if (node, True, activation) not in asked and now >= self._retry.get(node, 0.0):
                    due.append((node, _Question(None, activation, secrets.token_hex(16))))
            elif (
                self._owes(site, round_state)
                and site not in working
                and (node, False, activation) not in asked
                and now >= round_state.not_before.get(site, 0.0)
            ):
                with_model = self.holds.get(site) != round_state.model_hash
                due.append((node, _Question(site, activation, "", with_model, round_state.kind, round_state.number)))
        due.sort(key=lambda pair: pair[1].site or "")  # site order: a simulation trains in it
        due = self._wave(due, round_state)
        ids = self.grid.push_messages(self._compose(due, round_state)) if due else []
        for message_id, (node, question) in zip(ids, due, strict=False):
            if message_id is not None:
                self._pending[message_id] = (node, question)
                if question.site is not None:
                    self.asked_at[question.site] = now
                    self.bytes_down += self.beside_bytes + (self.model_bytes if question.with_model else 0)
                    self._bound(question.site, round_state)
        return any(question.site and question.site not in round_state.not_before for _, question in due)

    def _bound(self, site: str, round_state: _Round) -> None:
        """A site that is started anew again and again is asked at leisure, holds nobody up, and costs few questions."""
        round_state.times[site] += 1
        if round_state.times[site] < MOST_AT_ONCE:
            return
        round_state.refused.add(site)
        round_state.not_before[site] = time.monotonic() + RETRY_SECONDS
        copies = [i for i, (_, q) in self._pending.items() if q.site == site and round_state.asks(q)]
        for message_id in copies[:-MOST_AT_ONCE]:
            del self._pending[message_id]

    def _wave(self, due: list[tuple[int, _Question]], round_state: _Round) -> list[tuple[int, _Question]]:
        """Introductions, and as many of the round's questions as may be open: each may end in an answer, a model large,
        that the SuperLink has to hold until it is fetched."""
        asked = [q for _, q in self._pending.values() if q.site is not None]
        own = {q.site for q in asked if round_state.asks(q)}
        # One at least: stragglers, whose answers may lie there as well, must not keep a round from its beginning.
        free = max(1, round_state.wave - len({q.site for q in asked} - own)) - len(own)
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
        asked = {question.with_model for _, question in due if question.site is not None}
        records = {with_model: round_state.records(with_model) for with_model in asked}
        messages = []
        for node, question in due:
            if question.site is None:
                invitation = to_wire(Invitation(self.plan.run_id, question.nonce, self._anchor(node)))
                content = RecordDict({"task": task, "invitation": invitation})
                messages.append(Message(content, node, MessageType.QUERY))
            else:
                content = RecordDict({"task": task, **records[question.with_model]})
                messages.append(Message(content, node, round_state.kind, group_id=str(round_state.number)))
        return messages

    def _anchor(self, node: int) -> str:
        """What the site of a node said last of its privacy ledger: it refuses to train on an older one."""
        if self.membership is None or self.plan.task.privacy is None:
            return ""
        return self.membership.ledger_anchor(self._online[node][0])

    def _pull(self, round_state: _Round) -> Iterator[tuple[str | None, Message]]:
        """Replies that are here, one at a time; the site is None for what does not count in the round."""
        for message_id in list(self._pending):
            if message_id not in self._pending:
                continue  # the site answered another copy of the question, or left
            past = self._pending[message_id][1].site is not None and not round_state.asks(self._pending[message_id][1])
            if past and self.carries and round_state.late is None:
                continue  # it counts in the next round; until then it lies with the SuperLink
            for reply in self.grid.pull_messages([message_id]):  # one: each may be a model
                node, question = self._pending.pop(message_id)
                site = None
                if question.site is None:
                    self._introduce(node, question.nonce, reply)
                elif past:
                    self._take_late(question, node, reply, round_state)
                elif (site := self._sender(question, node, reply, round_state)) is not None:
                    round_state.answered.add(site)
                    # Other copies of the question, of before a restart of the site: their answers would count again.
                    self._pending = {
                        i: (n, q) for i, (n, q) in self._pending.items() if q.site != site or not round_state.asks(q)
                    }
                yield site, reply

    def _take_late(self, question: _Question, node: int, reply: Message, round_state: _Round) -> None:
        """Hand an answer to an earlier round's question on, or drop it: a refusal, or where nothing is carried on."""
        site = question.site
        assert site is not None
        if round_state.late is None or reply.has_error():
            return
        if reply.metadata.src_node_id != node:
            self._stranger(f"a reply to {site}'s question came from another node")
            return
        self.look_at_members()
        if self.is_member(site):
            round_state.late(site, question.round, reply)

    def _sender(self, question: _Question, node: int, reply: Message, round_state: _Round) -> str | None:
        """The site a reply counts for; None when it is to be asked again, or the reply is a stranger's."""
        site = question.site
        assert site is not None
        lost = reply.has_error() and reply.error.code in LOST
        if reply.metadata.src_node_id not in ((node, SUPERLINK_NODE_ID) if lost else (node,)):
            self._stranger(f"a reply to {site}'s question came from another node")
            return None
        away = lost and not self.patient  # a simulation's word for a site that is not there in this round
        if away:
            round_state.gone.add(site)
            round_state.answered.add(site)
        self.look_at_members()  # revoked since the last look: what arrives now does not count any more
        if away or not self.is_member(site) or self._lacks_model(question, reply):
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
        round_state.refused.add(site)
        round_state.not_before[site] = time.monotonic() + RETRY_SECONDS
        return None

    def _lacks_model(self, question: _Question, reply: Message) -> bool:
        """Whether the site was sent a hash and has not kept the model. No fault: it is asked again, with it."""
        lacks = not question.with_model and refusal_of(reply) == "model-missing"
        if lacks:
            log.info("%s has not kept the model; it is sent again", question.site)
            self.holds.pop(str(question.site), None)
        return lacks

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
        } | ({"private": True} if presence.private else {})
        self.journal.append("site", node=node, **told)
        if self.membership is not None:
            heads = {"audit_head": presence.audit_head, "ledger_anchor": presence.ledger_anchor}
            self.membership.note("site", run=self.plan.run_id, **heads, **told)

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
