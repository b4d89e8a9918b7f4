"""A line that loses requests and answers between Flower's own SuperNode and its SuperLink, with our parts in place.

What Flower's two ends do is theirs: the fleet handlers with the link state in memory, and the functions with which a
SuperNode fetches a message and sends its reply. Between them, instead of a network, stands a line that loses what the
test tells it to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, Status
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from flwr.supernode.start_client_internal import _insert_message, _pull_and_store_message, _push_messages
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from client.abandoned import tidied
from client.supernode import delivered
from deploy.object_guard import MOST_FAILED, ObjectGuard, whole_replies

Fate = Literal["request", "answer", "nothing"]  # what the line loses of a call

QUESTIONS = 3
MOST_TURNS = 30  # of the SuperNode's loop, until a question must be answered
NAMES = ("activate_node", "pull_messages", "pull_object", "confirm_message_received", "push_messages", "push_object")


class SuperLink:
    """Flower's handlers and link state, guarded or plain, with one run and one node."""

    def __init__(self, guarded: bool = True) -> None:
        self.store = InMemoryObjectStore()
        self.state = InMemoryLinkState(NoOpFederationManager(), self.store)
        self.keys: tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey] = generate_key_pairs()
        self.node = self.state.create_node("o", "o", public_key_to_bytes(self.keys[1]), 30.0)
        self.run = self.state.create_run("f/a", "1", "0" * 64, {}, NOOP_FEDERATION_ID, None, None, "SERVER_APP")
        self.task = self.state.get_run_info(run_ids=[self.run])[0].primary_task_id
        assert self.state.claim_task(self.task) is not None
        assert self.state.activate_task(self.task)
        guard = ObjectGuard()
        self.handlers: dict[str, Callable[..., Any]] = {
            name: getattr(guard, name)(getattr(fleet_handlers, name)) if guarded else getattr(fleet_handlers, name)
            for name in NAMES
        }

    def ask(self, number: int) -> str:
        """A question of the ServerApp to the node, whole; its id."""
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = self.task, self.run, SUPERLINK_NODE_ID
        message = Message(RecordDict({"q": ConfigRecord({"number": number})}), self.node, "train")
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(self.run)
        objects = get_all_nested_objects(message)
        stored, missing = self.state.store_message_and_object_tree(message, get_object_tree(message), session)
        assert stored
        for name in missing:
            assert self.state.store_object(self.run, session, name, objects[name].deflate())
        return message.object_id

    def replies(self, questions: set[str]) -> list[Message]:
        """As the ServerApp fetches them: once."""
        get = whole_replies(InMemoryLinkState.get_message_res)
        return [reply for reply in get(self.state, questions, self.run) if not reply.has_error()]


class Line:
    """Carries the calls of one SuperNode after the other, each with the fate that is next; then all of them."""

    def __init__(self, link: SuperLink, fates: list[Fate]) -> None:
        self.link, self.fates = link, iter(fates)
        self.calls: list[str] = []

    def carry(self, name: str, request: Any) -> Any:
        # A node whose activation is lost is refused until its lease ends: a minute, and another test's.
        fate = "nothing" if name == "activate_node" else next(self.fates, "nothing")
        self.calls.append(name)
        if fate == "request":
            raise httpx.ReadError("lost")
        others = {"store": self.link.store} if name in ("pull_messages", "confirm_message_received") else {}
        try:
            answer = self.link.handlers[name](request=request, state=self.link.state, **others)
        except FlowerError as error:  # as the SuperLink says it
            response = httpx.Response(403, json=error.to_json("no"), request=httpx.Request("POST", "https://x"))
            raise httpx.HTTPStatusError("no", request=response.request, response=response) from error
        if fate == "answer":
            raise httpx.ReadError("lost")
        return answer


class Client(FleetHttpClient):
    """Flower's fleet client on the line."""

    line: Line

    def _unary_unary(self, *, rpc_method: str, request: Any, **_: Any) -> Any:
        flat = "".join(f"_{c.lower()}" if c.isupper() else c for c in rpc_method.rsplit("/", 1)[1]).lstrip("_")
        if flat == "send_node_heartbeat":  # comes when it likes, and is about nothing here
            return SendNodeHeartbeatResponse(success=True)
        if flat == "deactivate_node":
            self.line.link.state.deactivate_node(request.node_id)
            return None
        return self.line.carry(flat, request)


class SuperNode:
    """Flower's loop, turn by turn, and a runner that answers every question at once; started anew where it ends."""

    def __init__(self, line: Line) -> None:
        self.line, self.starts = line, 0
        self.received: list[str] = []
        self._start()

    def turn(self) -> None:
        """One pull, and the reply to what it brought. Time passes without it: nothing is waited for."""
        try:
            if self.connection is None:
                self._start()
            _, receive, send, get_run, get_fab, pull_object, push_object, confirm = self.callbacks
            run = tidied(_pull_and_store_message)(
                state=self.state, object_store=self.store, node_config={}, receive=receive, get_run=get_run,
                get_fab=get_fab, pull_object=pull_object, confirm_message_received=confirm, trusted_entities=None,
            )  # fmt: skip
            if run is None:
                return
            self._answer()
            delivered(_push_messages)(state=self.state, object_store=self.store, send=send, push_object=push_object)
        except RuntimeError:  # `delivered`: an answer was lost
            self.end()

    def _start(self) -> None:
        self.starts += 1
        self.store = InMemoryObjectStore()
        self.state = InMemoryNodeState(self.store)
        self.connection = fleet_http_connection.http_request_response("x:1", True, None, self.line.link.keys)
        self.callbacks = self.connection.__enter__()
        self.state.set_node_id(self.callbacks[0])
        self.state.store_run(self.line.link.state.get_run_info(run_ids=[self.line.link.run])[0])

    def _answer(self) -> None:
        for message in self.state.get_messages_legacy(is_reply=False):
            name = message.metadata.message_id
            tree = self.store.get_object_tree(name)
            assert all(self.store.get(node.object_id) for node in iterate_object_tree(tree)), "all of it is here"
            self.received.append(name)
            TaskIdentity.node_id = self.line.link.node
            reply = Message(RecordDict({"a": ConfigRecord({"to": name})}), reply_to=message)
            _insert_message(reply, self.state, self.store)

    def end(self) -> None:
        """Go offline."""
        if self.connection is not None:
            self.connection.__exit__(None, None, None)
            self.connection = None


@pytest.fixture(scope="module", autouse=True)
def at_once() -> Iterator[None]:
    """Calls are repeated without a pause, and made one after the other: each example has one course."""
    with pytest.MonkeyPatch.context() as patch:

        def invoker() -> RetryInvoker:
            found = make_simple_http_retry_invoker()
            found.wait_function = lambda seconds: None
            return found

        patch.setattr(fleet_http_connection, "make_simple_http_retry_invoker", invoker)
        patch.setattr(fleet_http_connection, "FleetHttpClient", Client)
        one = functools.partial(start_client_internal.pull_objects, max_concurrent_pulls=1)
        patch.setattr(start_client_internal, "pull_objects", one)
        yield


def converse(link: SuperLink, fates: list[Fate]) -> tuple[SuperNode, Line]:
    """The ServerApp asks its questions one by one; as ours, it asks again where the SuperNode was started anew.

    Raises:
        AssertionError: a question was not answered.
    """
    line = Line(link, fates)
    Client.line = line
    node = SuperNode(line)
    try:
        for number in range(QUESTIONS):
            asked, starts = {link.ask(number)}, node.starts
            for _ in range(MOST_TURNS):
                node.turn()
                if link.replies(asked):
                    break
                if node.starts > starts:
                    asked.add(link.ask(number))
                starts = node.starts
            else:
                raise AssertionError(f"question {number} was never answered: {line.calls}")
        return node, line
    finally:
        node.end()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(fates=["answer"])  # the question itself
@example(fates=["nothing"] * 4 + ["answer"])  # its confirmation
@example(fates=["answer"] * 6)
@given(fates=st.lists(st.sampled_from(get_args(Fate)), max_size=24))
def test_every_question_is_answered_whatever_is_lost(fates: list[Fate]) -> None:
    """Each is received whole, by each process at most once."""
    node, _ = converse(SuperLink(), fates)
    assert len(node.received) == len(set(node.received))
    assert len(node.received) >= QUESTIONS


@pytest.mark.parametrize("fates", [["answer"], ["nothing"] * 4 + ["answer"]])
def test_a_lost_question_and_a_lost_confirmation_cost_no_restart(fates: list[Fate]) -> None:
    """Three questions, three messages, one process; the call that was lost is the one that is meant."""
    node, line = converse(SuperLink(), list(fates))
    assert (len(node.received), node.starts) == (QUESTIONS, 1)
    assert line.calls[len(fates)] in ("pull_messages", "confirm_message_received")


def test_flower_alone_drops_a_question_whose_way_broke() -> None:
    """The control: it counts as delivered, and nobody has it."""
    with pytest.raises(AssertionError, match="never answered"):
        converse(SuperLink(guarded=False), ["answer"])


def test_a_message_that_is_never_confirmed_is_not_given_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    """Nor where it is heard of each time: others have their turn. Unheard of, without end; but not after the run's."""
    link = SuperLink()
    link.state.activate_node(link.node, 30.0)
    node, first, second = Node(node_id=link.node), link.ask(1), link.ask(2)

    def given_now() -> list[str]:
        response = link.handlers["pull_messages"](
            request=PullMessagesRequest(node=node), state=link.state, store=link.store
        )
        return [message.metadata.message_id for message in response.messages_list]

    assert [given_now() for _ in range(3 * MOST_FAILED)] == [[first]] * 3 * MOST_FAILED
    for _ in range(MOST_FAILED - 1):
        link.handlers["pull_object"](
            request=PullObjectRequest(node=node, run_id=link.run, object_id=first), state=link.state
        )
        assert given_now() == [first]
    link.handlers["pull_object"](
        request=PullObjectRequest(node=node, run_id=link.run, object_id=first), state=link.state
    )
    assert [given_now() for _ in range(3)] == [[second]] * 3
    assert [record.getMessage() for record in caplog.records if record.name == "medsegfed.server"] == [
        f"node {link.node} began to fetch message {first[:12]} {MOST_FAILED} times and has not confirmed it: it is not "
        "given again"
    ]
    link.state.stop_run(link.run)
    assert link.state.get_run_status({link.run})[link.run].status == Status.FINISHED
    assert given_now() == []


def test_a_new_process_is_not_given_its_predecessors_messages() -> None:
    """The ServerApp sees that the node is another one, and asks again itself."""
    link = SuperLink()
    Client.line = Line(link, [])
    first = SuperNode(Client.line)
    lost = link.ask(1)
    link.handlers["pull_messages"](
        request=PullMessagesRequest(node=Node(node_id=link.node)), state=link.state, store=link.store
    )
    first.end()
    second = SuperNode(Client.line)
    again = link.ask(1)
    second.turn()
    second.end()
    assert second.received == [again]
    assert lost != again
