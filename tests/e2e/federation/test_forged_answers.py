"""A member that keeps to no rule, before the real gateway, SuperLink and ServerApp: none of its forgeries counts."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.proto import fleet_pb2, heartbeat_pb2
from flwr.proto.message_pb2 import ObjectTree

from client.contract import SIGNATURE, Update, arrays_from_wire, arrays_to_wire, from_wire, sign, to_wire
from server.journal import Event
from tests.e2e.federation.conftest import ENROLLED, HANDMADE, PATIENCE, QUICK, Scene
from tests.e2e.federation.handmade import OK, HandmadeNode, Identity, Question
from tests.e2e.federation.network import until

DEADLINE = 24.0  # of a round, in seconds
Forge = Callable[[HandmadeNode, RecordDict], RecordDict]


@dataclass
class Duel:
    """A run of the two members by hand; each test takes a round of it, or two."""

    scene: Scene
    mallory: HandmadeNode
    victim: HandmadeNode
    round: int = 0
    asked: dict[str, Question] = field(default_factory=dict)  # questions that are not fetched yet
    open: dict[str, Message] = field(default_factory=dict)  # questions that are not answered yet

    def receive(self) -> dict[str, Question]:
        """The next round's questions, as they came; "who is there?" is answered on the way."""
        if self.asked:  # a test that failed has left its round open
            self.skim()
        if "victim" in self.open:
            self.close()
        self.round += 1
        self.asked = {node.name: self._next(node) for node in (self.mallory, self.victim)}
        return dict(self.asked)

    def _next(self, node: HandmadeNode) -> Question:
        def look() -> Question | None:
            question = node.pull()
            if question is not None and question.kind == "query":
                message = node.fetch(question)
                node.send(node.answer(message, node.work(message)))
                return None
            return question

        question: Question = until(look, PATIENCE, f"{node.name} is asked for round {self.round}")
        assert (question.kind, question.round) == ("train", self.round)
        return question

    def skim(self) -> tuple[Message, Message]:
        """Both questions without the model: mallory's and the victim's."""
        asked, self.asked = self.asked, {}
        self.open = {node.name: node.skim(asked[node.name]) for node in (self.mallory, self.victim)}
        return self.open["mallory"], self.open["victim"]

    def begin(self) -> tuple[Message, Message]:
        self.receive()
        return self.skim()

    def crafted(self, name: str = "mallory") -> RecordDict:
        """A good answer to the question that is open; the same one whenever it is asked for."""
        node, value = (self.mallory, 1e-3) if name == "mallory" else (self.victim, 2e-3)
        return node.craft(self.open[name], value * self.round)

    def send(self, content: RecordDict) -> None:
        """Mallory's answer, good or not."""
        self.mallory.send(self.mallory.answer(self.open.pop("mallory"), content))

    def close(self) -> Event:
        """The victim answers, if it has not; the round as the journal has it."""
        if "victim" in self.open:
            content = self.crafted("victim")
            self.victim.send(self.victim.answer(self.open.pop("victim"), content))

        def committed(events: list[Event]) -> bool:
            return any(event["event"] == "round" and event["round"] == self.round for event in events)

        events = self.scene.wait("hostile", committed, f"round {self.round} is committed")
        return next(event for event in events if event["event"] == "round" and event["round"] == self.round)


@pytest.fixture(scope="module")
def duel(scene: Scene) -> Iterator[Duel]:
    """The run, its two members introduced."""
    stage = scene.stage
    # Mallory goes on after any number of rejections, and whatever is crafted may be as large as it likes.
    patient = {"norm_factor": None, "strikes": 1000}
    run = stage.run_file(
        scene.recipe, "hostile", HANDMADE, rounds=100, quorum=1, evaluate_every=100, deadline_seconds=DEADLINE,
        absence_seconds=DEADLINE, screening=patient, **QUICK,
    )  # fmt: skip
    for node in scene.nodes.values():
        node.activate()
    stage.begin(run)
    found = Duel(scene, scene.nodes["mallory"], scene.nodes["victim"])
    found.begin()  # the clock of a first round runs while sites introduce themselves
    found.send(found.crafted())
    found.close()
    yield found
    stage.command("server", "stop", "hostile", "--folder", str(stage.server))
    scene.wait("hostile", lambda events: events[-1]["event"] == "stopped", "the hostile run stops")


def test_who_keeps_to_the_rules_counts(duel: Duel) -> None:
    """The control: by the very means of the tests below, the application's answer and a crafted one make a round."""
    asked = duel.receive()
    message = duel.victim.fetch(asked["victim"])
    duel.victim.send(duel.victim.answer(message, duel.victim.work(message)))
    duel.asked, duel.open = {}, {"mallory": duel.mallory.skim(asked["mallory"])}
    duel.send(duel.crafted())
    assert sorted(duel.close()["accepted"]) == ["mallory", "victim"]


def test_an_update_is_good_for_one_round(duel: Duel) -> None:
    """Mallory's signed update of a round, sent again in the next one, is rejected by name and reason."""
    duel.begin()
    old = duel.crafted()
    duel.send(old)
    assert "mallory" in duel.close()["accepted"]
    duel.begin()
    duel.send(old)
    event = duel.close()
    assert event["rejected"] == {"mallory": f"it is for round '{duel.round - 1}', not '{duel.round}'"}
    assert list(event["accepted"]) == ["victim"]


def test_an_update_is_good_for_one_site(duel: Duel) -> None:
    """The victim's own signed update, sent by mallory for the very same round, is not mallory's."""
    duel.begin()
    duel.send(duel.crafted("victim"))
    event = duel.close()
    assert event["rejected"] == {"mallory": "its signature is not the enrolled key's over this message"}
    assert list(event["accepted"]) == ["victim"]


def unsigned(node: HandmadeNode, content: RecordDict) -> RecordDict:
    del content[SIGNATURE]
    return content


def other_arrays(node: HandmadeNode, content: RecordDict) -> RecordDict:
    arrays = content.array_records["delta"]
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    content["delta"] = arrays_to_wire({name: -10 * t for name, t in arrays_from_wire(arrays, shapes).items()})
    return content


def told(node: HandmadeNode, content: RecordDict, **changes: Any) -> RecordDict:
    """The update with other fields, properly signed."""
    del content[SIGNATURE]
    content["update"] = to_wire(replace(from_wire(content, "update", Update), **changes))
    return sign(content, "update", node.keys.sign)


def heavy(node: HandmadeNode, content: RecordDict) -> RecordDict:
    return told(node, content, patients=ENROLLED + 1)


class Bomb(Array):
    """An array that names its one piece a hundred thousand times: half a megabyte on the wire, gigabytes unpacked."""

    __qualname__ = "Array"  # what Flower takes for an object's kind

    def deflate(self) -> bytes:
        head, _, body = super().deflate().partition(bytes(1))
        said = json.dumps(json.loads(body) | {"arraychunk_ids": [0] * 100_000}).encode()
        return head.rsplit(b" ", 1)[0] + f" {len(said)}".encode() + bytes(1) + said


def bomb(node: HandmadeNode, content: RecordDict) -> RecordDict:
    (array,) = content.array_records["delta"].values()
    record = ArrayRecord()
    record["packed"] = Bomb(array.dtype, array.shape, array.stype, array.data)
    content["delta"] = record
    return content


class Wreck(Bomb):
    """An array whose words are none."""

    __qualname__ = "Array"

    def deflate(self) -> bytes:
        return super().deflate()[:-20] + b"x" * 20


def wreck(node: HandmadeNode, content: RecordDict) -> RecordDict:
    content = bomb(node, content)
    array = content.array_records["delta"]["packed"]
    content.array_records["delta"]["packed"] = Wreck(array.dtype, array.shape, array.stype, array.data)
    return content


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (bomb, "its arrays have more than"),
        (wreck, "it cannot be read"),
        (unsigned, "it holds the records"),
        (other_arrays, "not the ones that were signed"),
        (heavy, f"claims {ENROLLED + 1} training patients, {ENROLLED} are enrolled"),
    ],
)
def test_a_forged_update_is_rejected_by_its_fault(duel: Duel, forge: Forge, reason: str) -> None:
    """Each forgery travels the whole way as a well-formed message, and does not count; the victim's update does."""
    duel.begin()
    duel.send(forge(duel.mallory, duel.crafted()))
    event = duel.close()
    assert reason in event["rejected"]["mallory"]
    assert list(event["accepted"]) == ["victim"]


def test_nobody_answers_as_another(duel: Duel) -> None:
    """Replies in the victim's name, alone or beside one's own, are refused by the guard before anything is stored."""
    own_question, question = duel.begin()
    mallory, victim = duel.mallory, duel.victim
    own = mallory.answer(own_question, duel.crafted())
    forged = mallory.answer(question, duel.crafted(), source=victim.id)
    assert forged.message.metadata.src_node_id == victim.id
    assert forged.message.metadata.reply_to_message_id == question.metadata.message_id
    other_node = mallory.announcement(forged)
    other_node.node.node_id = victim.id
    refused = [
        mallory.status("PushMessages", request)
        for request in (
            mallory.announcement(forged),
            mallory.announcement(own, forged),
            mallory.announcement(forged, own),
            mallory.announcement(own, own),
            mallory.announcement(),
            other_node,
        )
    ]
    assert len(refused) == 6
    assert all(400 <= status < 500 for status in refused), refused
    assert refused[-1] == 401, "Flower's own check: the request names another node than the key's"
    duel.send(duel.crafted())
    assert sorted(duel.close()["accepted"]) == ["mallory", "victim"]
    committed = duel.scene.stage.server / "runs" / "hostile" / "checkpoints"
    assert list(committed.glob(f"*{duel.round:06d}*"))


def test_a_node_needs_its_own_key_and_the_time(duel: Duel) -> None:
    """A heartbeat under the victim's public key, with a stranger's signature, of an hour ago or to come, is refused."""
    mallory, victim = duel.mallory, duel.victim
    beat = heartbeat_pb2.SendNodeHeartbeatRequest(node=mallory.proto, heartbeat_interval=1800)
    public, stranger = mallory.private.public_key(), ec.generate_private_key(ec.SECP384R1())
    assert mallory.status("SendNodeHeartbeat", beat, Identity(public, mallory.private)) == OK
    assert mallory.status("SendNodeHeartbeat", beat, Identity(victim.private.public_key(), mallory.private)) == 403
    assert mallory.status("SendNodeHeartbeat", beat, Identity(victim.private.public_key(), victim.private)) == 403
    assert mallory.status("SendNodeHeartbeat", beat, Identity(stranger.public_key(), stranger)) == 403
    assert mallory.status("SendNodeHeartbeat", beat, Identity(public, stranger)) == 401
    assert mallory.status("SendNodeHeartbeat", beat, Identity(public, mallory.private, seconds=-400)) == 401
    assert mallory.status("SendNodeHeartbeat", beat, Identity(public, mallory.private, seconds=60)) == 401
    assert mallory.status("PullMessages", fleet_pb2.PullMessagesRequest(node=victim.proto)) == 401


def test_what_another_site_gets_and_sends_stays_its_own(duel: Duel) -> None:
    """Knowing every id, mallory reads, confirms and writes none of the victim's objects."""
    questions = duel.receive()
    mallory, victim, asked = duel.mallory, duel.victim, questions["victim"]
    ours = set(questions["mallory"].ids())
    alone = [object_id for object_id in asked.ids() if object_id not in ours]
    assert asked.id in alone
    refused = [mallory.status("PullObject", mallory.wish(asked.run, object_id)) for object_id in alone]
    refused.append(mallory.status("ConfirmMessageReceived", mallory.confirmation(asked)))
    _, message = duel.skim()  # all of it is still there
    reply = victim.answer(message, duel.crafted("victim"))
    said = victim.call("PushMessages", victim.announcement(reply))
    first, *rest = dict.fromkeys(said.objects_to_push)
    refused.append(mallory.status("PushObject", mallory.object(reply, first, said.session_id)))
    refused.append(mallory.status("PushObject", mallory.object(reply, first, "")))  # Flower takes any open upload then
    for object_id in rest:
        assert victim.call("PushObject", victim.object(reply, object_id, said.session_id)).stored
    refused += [mallory.status("PullObject", mallory.wish(asked.run, object_id)) for object_id in rest]
    confirmation = mallory.confirmation(asked)
    confirmation.message_object_id = reply.message.metadata.message_id
    refused.append(mallory.status("ConfirmMessageReceived", confirmation))
    assert victim.call("PushObject", victim.object(reply, first, said.session_id)).stored
    duel.open.pop("victim")
    duel.send(duel.crafted())
    assert sorted(duel.close()["accepted"]) == ["mallory", "victim"]
    assert len(refused) == len(alone) + len(rest) + 4
    assert set(refused) == {403}


def test_half_an_answer_holds_nobody_up(duel: Duel) -> None:
    """An answer of which a part never comes: the round ends at its deadline, and the answer is late for the next one.

    Its tree lies, too: it says of an object that the server will send to everybody that there is more to it.
    """
    question, _ = duel.begin()
    mallory, victim = duel.mallory, duel.victim
    begun = time.monotonic()
    answer = mallory.answer(question, duel.crafted())
    tree = ObjectTree()
    tree.CopyFrom(answer.tree)
    never = hashlib.sha256(b"never sent").hexdigest()
    task = question.content["task"].object_id  # the same in every round
    tree.children.append(ObjectTree(object_id=task, children=[ObjectTree(object_id=never)]))
    mallory.send(replace(answer, tree=tree))
    late = told(mallory, duel.crafted(), loss=999.0)
    event = duel.close()
    assert time.monotonic() - begun < DEADLINE + 45
    assert (list(event["accepted"]), event["absent"]) == (["victim"], ["mallory"])
    asked = duel.receive()
    whole = victim.fetch(asked["victim"])  # though mallory said that more belongs to it
    duel.asked, duel.open = {}, {"mallory": mallory.skim(asked["mallory"]), "victim": whole}
    mallory.status("PushMessages", mallory.announcement(mallory.answer(question, late)))  # to the question before
    duel.send(duel.crafted())
    event = duel.close()
    assert sorted(event["accepted"]) == ["mallory", "victim"]
    assert event["accepted"]["mallory"]["loss"] == 0.5


def test_a_second_answer_to_a_question_does_not_count(duel: Duel) -> None:
    """The first one stands, whatever comes after it."""
    question, _ = duel.begin()
    duel.mallory.send(duel.mallory.answer(question, duel.crafted()))
    second = duel.mallory.answer(question, told(duel.mallory, duel.crafted(), loss=999.0))
    assert not duel.mallory.call("PushMessages", duel.mallory.announcement(second)).objects_to_push
    duel.open.pop("mallory")
    assert duel.close()["accepted"]["mallory"]["loss"] == 0.5


def test_a_hasty_confirmation_harms_nobody(duel: Duel) -> None:
    """A question that is confirmed while the ServerApp is still writing it stays; the ServerApp lives on."""
    for _ in range(2):
        asked = duel.receive()
        hasty = duel.mallory.status("ConfirmMessageReceived", duel.mallory.confirmation(asked["mallory"]))
        if hasty == OK:  # it was there already
            duel.open, duel.asked = {"victim": duel.victim.skim(asked["victim"])}, {}
        else:
            duel.skim()
            duel.send(duel.crafted())
        assert "victim" in duel.close()["accepted"]


def test_the_serverapp_came_through_all_of_it(duel: Duel) -> None:
    """It was started once, and nothing of the server was started anew."""
    assert [event["event"] for event in duel.scene.events("hostile")].count("session") == 1
    stage = duel.scene.stage
    told = [
        json.loads(line)["event"] for line in (stage.server / "state" / "supervisor.jsonl").read_text().splitlines()
    ]
    assert not {"run_lost", "run_ended_by_force", "exited", "unhealthy"} & set(told)
