"""Conversations over a network that loses lines: who is asked, asked again, waited for, and who is not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from client.contract import RAW, REFUSED, Invitation, Presence, arrays_to_wire, from_wire, to_wire
from client.encoding import Compression, largest_size
from medsegdiff.errors import UserError
from medsegdiff.strict import read_config
from medsegdiff.weights import initial_weights, weight_shapes
from server import exchange
from server.checkpoints import CheckpointStore
from server.config import RunPlan
from server.exchange import Exchange, RunStopped
from server.journal import Journal
from server.sampling import draw_order
from server.strategy import FederatedAveraging
from tests.fake_sites import FakeSites, put

NODES = {11: "alder", 12: "birch", 13: "elm"}
MODEL = "a" * 64
Answer = Callable[[Message], RecordDict | Error | None]  # None: no answer, now or ever


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.plans: list[tuple[float, Callable[[], None]]] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for due in [plan for plan in self.plans if plan[0] <= self.now]:
            self.plans.remove(due)
            due[1]()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self.plans.append((self.now + seconds, action))


@dataclass
class Node:
    """One node of the fake network."""

    name: str
    answer: Answer
    online: bool = True
    activation: str = "t0"


class Network:
    """Grid with `get_nodes`, as Flower's over HTTP."""

    def __init__(self) -> None:
        self.nodes = {node: Node(name, greet) for node, name in NODES.items()}
        self.numbers = itertools.count(1)
        self.sent: dict[str, Message] = {}
        self.asked: list[tuple[str, str]] = []
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def __getitem__(self, name: str) -> Node:
        return next(node for node in self.nodes.values() if node.name == name)

    def get_nodes(self) -> list[Any]:
        return [
            SimpleNamespace(node_id=number, name=node.name, last_activated_at=node.activation)
            for number, node in self.nodes.items()
            if node.online
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message_id = f"m{next(self.numbers)}"
            message.metadata.__dict__["_message_id"] = message_id
            self.sent[message_id] = message
            self.asked.append((self.nodes[message.metadata.dst_node_id].name, message.metadata.message_type))
            ids.append(message_id)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        replies = []
        for message_id in ids:
            message = self.sent[message_id]
            answer = self.nodes[message.metadata.dst_node_id].answer(message)
            if answer is not None:
                reply = Message(answer, reply_to=message)
                if isinstance(answer, Error) and answer.code in exchange.LOST:
                    reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID  # as flwr 1.41 does
                replies.append(reply)
        return replies

    def count_of(self, kind: str) -> int:
        return sum(asked == kind for _, asked in self.asked)

    def count(self, name: str, kind: str = MessageType.TRAIN) -> int:
        return self.asked.count((name, kind))


def greet(message: Message) -> RecordDict | Error | None:
    """A good site: introduces itself, answers training with a word."""
    if message.metadata.message_type == MessageType.QUERY:
        asked = from_wire(message.content, "invitation", Invitation)
        site = NODES[message.metadata.dst_node_id]
        return RecordDict({"presence": to_wire(Presence(site, asked.run, asked.nonce, 3, 1, 0))})
    return RecordDict({"word": ConfigRecord({"round": message.metadata.group_id})})


def only(kind: str, answer: RecordDict | Error | None) -> Answer:
    return lambda message: answer if message.metadata.message_type == kind else greet(message)


def records(with_model: bool) -> dict[str, Any]:
    """What is sent beside the task."""
    return {"weights": ArrayRecord({"w": Array("uint8", (1,), RAW, b"w")})} if with_model else {}


def missing(message: Message) -> RecordDict | Error | None:
    """A site that has not kept the model that it is told the hash of."""
    if message.metadata.message_type == MessageType.TRAIN and "weights" not in message.content:
        return Error(REFUSED, "model-missing: ...")
    return greet(message)


class Members:
    """A membership without files: virtual keys, so that nothing need be signed here."""

    def __init__(self) -> None:
        self.sites = dict.fromkeys(NODES.values())
        self.notes: list[dict[str, Any]] = []

    def active(self) -> dict[str, Any]:
        return {site: SimpleNamespace(signing_key=None) for site in self.sites}

    def suspended(self) -> set[str]:
        return set()

    def has(self, event: str, **fields: Any) -> bool:
        return any({"event": event, **fields}.items() <= note.items() for note in self.notes)

    def note(self, event: str, **fields: Any) -> None:
        self.notes.append({"event": event, **fields})


@dataclass
class Scene:
    """One conversation and all that it stands on."""

    clock: Clock
    network: Network
    members: Members
    journal: Journal
    talk: Exchange
    stop: list[bool]

    def ask(self, round_: int = 1, need: int | None = None, absence: float | None = None) -> list[str]:
        """Ask for training; the sites whose replies came, in order."""
        came: list[str] = []
        due = self.talk.plan.required if need is None else need
        wait = self.talk.plan.absence_seconds if absence is None else absence
        for site, _ in self.talk.ask(MessageType.TRAIN, round_, records, MODEL, lambda: len(came) >= due, wait):
            came.append(site)
        return came

    def told(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.journal.events if line["event"] == event]


@pytest.fixture
def scene(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scene]:
    """Call with changes of the plan; the clock moves only when somebody sleeps."""

    def make(**changes: object) -> Scene:
        folder = make_run(**({"deadline_seconds": 600.0, "absence_seconds": 60.0} | changes))
        clock, network, members, stop = Clock(), Network(), Members(), [False]
        monkeypatch.setattr(exchange, "time", clock)
        journal = Journal(folder / "journal.jsonl")
        plan = read_config(folder / "run.yaml", RunPlan)
        talk = Exchange(network, plan, journal, members, lambda: stop[0])  # type: ignore[arg-type]
        return Scene(clock, network, members, journal, talk, stop)

    return make


def test_all_are_asked_once_and_nobody_is_waited_for(scene) -> None:
    """Three sites here: three introductions, three answers, no second lost."""
    s = scene()
    assert s.ask() == ["alder", "birch", "elm"]
    assert [s.network.count(name, kind) for name in NODES.values() for kind in ("query", "train")] == [1] * 6
    assert s.clock.now < 1001
    assert s.ask(2) == ["alder", "birch", "elm"]
    assert s.network.count("elm", "query") == 1


def test_who_has_the_model_gets_its_hash(scene) -> None:
    """Alder has it, birch has another one, elm none: two models travel."""
    s = scene()
    s.talk.holds = {"alder": MODEL, "birch": "b" * 64}
    assert sorted(s.ask()) == ["alder", "birch", "elm"]
    asked = [m for m in s.network.sent.values() if m.metadata.message_type == MessageType.TRAIN]
    got = {NODES[message.metadata.dst_node_id]: "weights" in message.content for message in asked}
    assert got == {"alder": False, "birch": True, "elm": True}
    assert s.talk.bytes_down == 2 * largest_size(Compression(), weight_shapes(s.talk.plan.task.model))


def test_who_has_lost_the_model_is_asked_again_at_once(scene) -> None:
    """No refusal, no pause, and the model is with it; who then still says so refuses as others do."""
    s = scene()
    s.talk.holds = dict.fromkeys(NODES.values(), MODEL)
    s.network["birch"].answer = missing
    assert sorted(s.ask()) == ["alder", "birch", "elm"]
    assert s.network.count("birch", MessageType.TRAIN) == 2
    assert s.clock.now < 1002.0
    assert s.told("refused") == []
    assert "birch" not in s.talk.holds
    s.network["elm"].answer = only(MessageType.TRAIN, Error(REFUSED, "model-missing: ..."))
    assert sorted(s.ask(2, need=2)) == ["alder", "birch"]
    assert [event["code"] for event in s.told("refused")] == ["model-missing"]


def test_a_site_that_comes_late_still_takes_part(scene) -> None:
    """Elm's line stands after 40 seconds; the round waits for it."""
    s = scene(quorum=2)
    s.network["elm"].online = False
    s.clock.after(40, lambda: setattr(s.network["elm"], "online", True))
    assert s.ask() == ["alder", "birch", "elm"]
    assert 1040 <= s.clock.now < 1045


def test_with_the_quorum_an_absent_site_is_waited_for_no_longer_than_stated(scene) -> None:
    """60 seconds after the last answer, not the whole deadline."""
    s = scene(quorum=2)
    s.network["elm"].online = False
    assert s.ask() == ["alder", "birch"]
    assert 1060 <= s.clock.now < 1063


def test_a_straggler_is_waited_for_until_the_deadline(scene) -> None:
    """Elm is here, works and does not answer: the deadline ends the round, within seconds of it."""
    s = scene(quorum=2)
    s.network["elm"].answer = only(MessageType.TRAIN, None)
    assert s.ask() == ["alder", "birch"]
    assert 1600 <= s.clock.now < 1602


def test_a_lost_line_is_asked_again_and_counts_once(scene) -> None:
    """Flower reports the node as gone; it is back after 30 seconds and answers."""
    s = scene()
    lost = Error(ErrorCode.NODE_UNAVAILABLE, "gone")

    def leave(message: Message) -> RecordDict | Error | None:
        if message.metadata.message_type != MessageType.TRAIN:
            return greet(message)
        s.network["elm"].online = False
        s.network["elm"].answer = greet
        s.clock.after(30, lambda: setattr(s.network["elm"], "online", True))
        return lost

    s.network["elm"].answer = leave
    assert s.ask() == ["alder", "birch", "elm"]
    assert [line["site"] for line in s.told("lost")] == ["elm"]
    assert s.network.count("elm") == 2


def test_a_site_that_restarted_without_a_trace_is_asked_again(scene) -> None:
    """The process that the first question went to is dead: only the one activated anew, ten seconds later, answers."""
    s = scene()
    first: set[str] = set()

    def answer(message: Message) -> RecordDict | Error | None:
        if message.metadata.message_type == MessageType.TRAIN and s.network["elm"].activation == "t0":
            first.add(message.metadata.message_id)
        return None if message.metadata.message_id in first else greet(message)

    s.network["elm"].answer = answer
    s.clock.after(10, lambda: setattr(s.network["elm"], "activation", "t1"))
    assert s.ask() == ["alder", "birch", "elm"]
    assert s.network.count("elm") == 2
    assert s.clock.now < 1015


@pytest.mark.parametrize("steady", [None, 1040.0])
def test_a_site_that_starts_anew_all_the_time_holds_nobody_up(scene, steady: float | None) -> None:
    """Activated anew at every look, it is waited for as if absent, and asked seldom; once it stays up it counts."""
    s = scene(quorum=2)
    elm = s.network["elm"]

    def flap() -> None:
        if steady is None or s.clock.now < steady:
            elm.activation = f"t{s.clock.now}"
            s.clock.after(1, flap)
        else:
            elm.answer = greet

    elm.answer = only(MessageType.TRAIN, None)
    flap()
    assert s.ask() == (["alder", "birch"] if steady is None else ["alder", "birch", "elm"])
    assert s.network.count("elm") <= 12
    assert s.clock.now < 1080


def test_two_answers_to_one_round_count_once(scene) -> None:
    """A site that was activated anew is asked again, and then both questions are answered, at the same time."""
    s = scene()

    def answer(message: Message) -> RecordDict | Error | None:
        slow = message.metadata.message_type == MessageType.TRAIN and s.network.count("elm") < 2
        return None if slow else greet(message)

    s.network["elm"].answer = answer
    s.network["birch"].answer = lambda m: greet(m) if s.clock.now > 1030 else only(MessageType.TRAIN, None)(m)
    s.clock.after(10, lambda: setattr(s.network["elm"], "activation", "t1"))
    assert s.ask() == ["alder", "elm", "birch"]
    assert s.network.count("elm") == 2


def test_a_refusal_is_told_once_and_asked_again_until_it_is_lifted(scene) -> None:
    """The data officer approves after 70 seconds: asked every 10 seconds, one line in journal and audit log."""
    s = scene(quorum=2)
    s.network["elm"].answer = only(MessageType.QUERY, Error(REFUSED, "not-approved: x"))
    s.clock.after(70, lambda: setattr(s.network["elm"], "answer", greet))
    came = s.ask(absence=200.0)
    assert came == ["alder", "birch", "elm"]
    assert [(line["site"], line["code"]) for line in s.told("refused")] == [("elm", "not-approved")]
    assert [note["code"] for note in s.members.notes if note["event"] == "refused"] == ["not-approved"]
    assert 7 <= s.network.count("elm", "query") <= 9


def test_a_site_that_never_approves_does_not_hold_the_others_up(scene) -> None:
    """With the quorum, a refusing site is waited for no longer than one that is offline."""
    s = scene(quorum=2)
    s.network["elm"].answer = only(MessageType.QUERY, Error(REFUSED, "not-approved: x"))
    assert s.ask() == ["alder", "birch"]
    assert 1060 <= s.clock.now < 1065


@pytest.mark.parametrize("answer", [Error(REFUSED, "outside-hours: x"), Error(ErrorCode.CLIENT_APP_CRASHED, "x")])
def test_a_site_that_refuses_to_train_does_not_hold_the_others_up(scene, answer) -> None:
    """Introduced, it refuses, or loses its process, every time it is asked: 60 seconds, a refusal told once."""
    s = scene(quorum=2)
    s.network["elm"].answer = only(MessageType.TRAIN, answer)
    assert s.ask() == ["alder", "birch"]
    assert 1060 <= s.clock.now < 1065
    assert len(s.told("refused")) == (answer.code == REFUSED)


def test_a_round_that_is_late_says_so_once(scene) -> None:
    """Elm works for two deadlines, then answers: one line that it is waited for, one that the run goes on."""
    s = scene()
    slow = [True]
    s.network["elm"].answer = lambda m: None if m.metadata.message_type == "train" and slow[0] else greet(m)
    s.clock.after(1200, lambda: slow.__setitem__(0, False))
    assert s.ask() == ["alder", "birch", "elm"]
    assert [len(s.told(event)) for event in ("paused", "resumed")] == [1, 1]


def test_below_the_quorum_the_run_says_so_and_goes_on_when_sites_return(scene) -> None:
    """Two of three are gone for longer than the deadline: one line that names them, no end, then all three count."""
    s = scene()
    for name in ("birch", "elm"):
        s.network[name].online = False
    s.clock.after(2000, lambda: [setattr(s.network[name], "online", True) for name in ("birch", "elm")])
    assert s.ask() == ["alder", "birch", "elm"]
    assert [line["absent"] for line in s.told("paused")] == [{"birch": "absent", "elm": "absent"}]
    assert len(s.told("resumed")) == 1
    assert s.network.count("alder") == 1


@pytest.mark.parametrize(("wave", "most"), [(1, 1), (2, 2), (None, 3)])
def test_a_wave_is_the_most_answers_that_may_lie_about(scene, wave, most) -> None:
    """Nobody is asked while that many owe an answer; each that comes lets one more be asked."""
    s = scene(wave=wave)
    open_ = []

    def slowly(message: Message) -> RecordDict | Error | None:
        if message.metadata.message_type == MessageType.QUERY:
            return greet(message)
        open_.append(len(s.network.asked) - s.network.count_of("query") - len(done))
        begun.setdefault(message.metadata.message_id, s.clock.now)
        if s.clock.now - begun[message.metadata.message_id] < 5:
            return None
        done.append(message.metadata.message_id)
        return greet(message)

    begun: dict[str, float] = {}
    done: list[str] = []
    for name in NODES.values():
        s.network[name].answer = slowly
    assert sorted(s.ask()) == ["alder", "birch", "elm"]
    assert max(open_) == most
    assert [s.network.count(name) for name in NODES.values()] == [1, 1, 1]


def test_a_site_that_never_answers_does_not_keep_others_from_being_asked(scene) -> None:
    """After the deadline the wave is over: whoever was not asked yet is."""
    s = scene(wave=1, quorum=2)
    s.network["alder"].answer = lambda m: greet(m) if m.metadata.message_type == MessageType.QUERY else None
    assert s.ask() == ["birch", "elm"]
    assert 1600 <= s.clock.now < 1610


def test_a_revoked_site_leaves_within_the_round(scene) -> None:
    """Revoked while its answer is awaited: what it sends afterwards does not count, and it is asked nothing more."""
    s = scene(quorum=2)
    slow = [True]
    s.network["elm"].answer = lambda m: None if m.metadata.message_type == "train" and slow[0] else greet(m)

    def revoke() -> None:
        del s.members.sites["elm"]
        slow[0] = False

    s.clock.after(10, revoke)
    assert s.ask() == ["alder", "birch"]
    assert s.clock.now < 1015
    assert [line["site"] for line in s.told("left")] == ["elm"]
    assert s.ask(2) == ["alder", "birch"]
    assert s.network.count("elm") == 1


@pytest.mark.parametrize("delay", [0, 5, 20, 50, 100])
def test_a_site_that_refuses_slowly_is_waited_for_as_if_absent(scene, delay) -> None:
    """It is asked again and again, and thinks as long each time: the round ends a minute after its first refusal."""
    s = scene(quorum=2)
    asked: dict[str, float] = {}

    def refuse(message: Message) -> RecordDict | Error | None:
        if message.metadata.message_type == MessageType.QUERY:
            return greet(message)
        since = asked.setdefault(message.metadata.message_id, s.clock.now)
        return Error(REFUSED, "not-approved: ...") if s.clock.now - since >= delay else None

    s.network["elm"].answer = refuse
    began = s.clock.now
    assert s.ask() == ["alder", "birch"]
    assert delay + 55 <= s.clock.now - began <= delay + 65
    assert [line["site"] for line in s.told("refused")] == ["elm"]


def test_a_site_that_refused_and_then_answers_counts(scene) -> None:
    """Its data officer approves half a minute later, while the others are waited for."""
    s = scene(quorum=2)
    began = s.clock.now
    s.network["elm"].answer = lambda message: (
        Error(REFUSED, "not-approved: ...")
        if message.metadata.message_type == MessageType.TRAIN and s.clock.now < began + 30
        else greet(message)
    )
    assert s.ask() == ["alder", "birch", "elm"]
    assert s.clock.now - began < 45


def have_sites_answer(s: Any) -> None:
    """The scene's sites answer as real ones do, model and all."""
    sites = FakeSites(s.talk.plan)
    for site in NODES.values():
        s.network[site].answer = lambda m, site=site: sites.content(site, m.metadata.message_type, m)


def carry_out(s: Any, rounds: int) -> None:
    """The scene's run, from a fresh model, by the strategy of a real one."""
    store = CheckpointStore(s.journal.path.parent / "checkpoints")
    strategy = FederatedAveraging(s.talk.plan, store, s.journal, s.members)
    strategy.start(s.network, arrays_to_wire(initial_weights(s.talk.plan.task.model, 0)), rounds)


@pytest.mark.parametrize(("quorum", "ends"), [(None, True), (2, True), (3, False)])
def test_a_rejected_answer_ends_no_run_that_can_go_on(scene, quorum, ends) -> None:
    """Birch answers nonsense: with "all" the others go on without it; a quorum that was asked for stays."""
    s = scene(quorum=quorum)
    have_sites_answer(s)
    good = s.network["birch"].answer
    spoil = put(math.nan)
    s.network["birch"].answer = lambda m: spoil(good(m)) if m.metadata.message_type == MessageType.TRAIN else good(m)
    if not ends:
        with pytest.raises(UserError, match=r"birch was rejected .*Rounds up to 0 are kept.*lower run\.quorum"):
            carry_out(s, 2)
        return
    carry_out(s, 2)
    committed = [(sorted(line["accepted"]), list(line["rejected"])) for line in s.told("round")[1:]]
    assert committed == [(["alder", "elm"], ["birch"])] * 2
    said = [note["decision"] for note in s.members.notes if note["event"] == "update" and note["site"] == "birch"]
    assert [words.split(":")[0] for words in said] == ["rejected"] * 2


def test_a_run_that_ends_for_want_of_a_revoked_site_says_so(scene) -> None:
    """With all three asked for, elm leaves in round 1: no word of its log, nor of mending it."""
    s = scene(quorum=3)
    have_sites_answer(s)
    good = s.network["elm"].answer
    s.network["elm"].answer = lambda m: None if m.metadata.message_type == MessageType.TRAIN else good(m)
    s.clock.after(10, lambda: s.members.sites.pop("elm"))
    with pytest.raises(UserError) as caught:
        carry_out(s, 2)
    assert "the quorum is 3: elm is no member any more (revoked)." in str(caught.value)
    assert "Admit elm with new keys and go on with medsegfed run RUN.yaml, or lower run.quorum." in str(caught.value)


def test_a_node_under_another_name_is_left_out(scene) -> None:
    """Elm's node says it is birch: named in the journal, never asked to train."""
    s = scene(quorum=2)

    def lie(message: Message) -> RecordDict | Error | None:
        asked = from_wire(message.content, "invitation", Invitation)
        return RecordDict({"presence": to_wire(Presence("birch", asked.run, asked.nonce, 3, 1, 0))})

    s.network["elm"].answer = lie
    assert s.ask() == ["alder", "birch"]
    assert s.network.count("elm") == 0
    assert "registered as 'elm' says it is 'birch'" in s.told("stranger")[0]["reason"]


def test_an_old_answer_is_no_introduction(scene) -> None:
    """The answer to an earlier question, replayed, does not let a site in."""
    s = scene(quorum=2)
    old = RecordDict({"presence": to_wire(Presence("elm", s.talk.plan.run_id, "0" * 32, 3, 1, 0))})
    s.network["elm"].answer = only(MessageType.QUERY, old)
    assert s.ask() == ["alder", "birch"]
    assert "answers another question" in s.told("stranger")[0]["reason"]


def test_a_stop_ends_the_conversation_within_seconds(scene) -> None:
    """Asked to stop while a site works."""
    s = scene()
    s.network["elm"].answer = only(MessageType.TRAIN, None)
    s.clock.after(5, lambda: s.stop.__setitem__(0, True))
    with pytest.raises(RunStopped):
        s.ask()
    assert s.clock.now < 1010


def test_scoring_waits_for_nobody(scene) -> None:
    """With nothing to wait for, an offline site costs no second."""
    s = scene()
    assert s.ask() == ["alder", "birch", "elm"]
    s.network["birch"].online = False
    s.clock.now += 5
    assert s.ask(1, need=0, absence=0.0) == ["alder", "elm"]
    assert s.clock.now < 1010


def test_a_round_closes_with_the_answers_it_is_made_of(scene) -> None:
    """Two are asked for and come; elm, which would answer never, is not waited for, nor asked again."""
    s = scene()
    s.network["elm"].answer = only(MessageType.TRAIN, None)
    came: list[str] = []
    for site, _ in s.talk.ask(
        MessageType.TRAIN, 1, records, MODEL, lambda: len(came) >= 2, 60.0, full=lambda: len(came) >= 2
    ):
        came.append(site)
    assert came == ["alder", "birch"]
    assert s.clock.now < 1002.0
    assert s.network.count("elm") == 1


def test_only_who_was_drawn_is_asked_and_who_leaves_is_replaced(scene) -> None:
    """All introduce themselves; alder alone is asked, falls silent and is revoked: birch is asked in its place."""
    s = scene()
    s.network["alder"].answer = only(MessageType.TRAIN, None)
    s.clock.after(5.0, lambda: s.members.sites.pop("alder"))

    def who(gone) -> list[str]:
        assert not gone
        return [site for site in NODES.values() if s.talk.is_member(site)][:1]

    came: list[str] = []
    for site, _ in s.talk.ask(MessageType.TRAIN, 1, records, MODEL, lambda: len(came) >= 1, 60.0, who):
        came.append(site)
    assert came == ["birch"]
    assert [s.network.count(name) for name in NODES.values()] == [1, 1, 0]
    assert s.network.count_of(MessageType.QUERY) == 3


@pytest.mark.parametrize("closes", [True, False])
def test_a_sampled_round_waits_for_no_spare(scene, closes) -> None:
    """Two updates make a round, three sites are asked, one never answers: with a spare the round closes in seconds, and
    nobody was absent; without one it waits for its deadline, and says who was."""
    s = scene(sample=2, over_select=1 if closes else 0, quorum=1)
    have_sites_answer(s)
    silent = draw_order(s.talk.plan.task.seed, 1, s.talk.plan.roster)[0]
    good = s.network[silent].answer
    s.network[silent].answer = lambda m: None if m.metadata.message_type == MessageType.TRAIN else good(m)
    began = s.clock.now
    carry_out(s, 1)
    event = s.told("round")[-1]
    assert len(event["accepted"]) == (2 if closes else 1)
    assert (event["absent"], event["spare"]) == (([], [silent]) if closes else ([silent], []))
    assert (s.clock.now - began < 10) == closes
