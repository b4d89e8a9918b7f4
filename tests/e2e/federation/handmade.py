"""A site played by hand: it speaks to the real gateway with a member's real keys, in whatever order a test wants."""

from __future__ import annotations

import os
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.contract import Assignment, TrainTask, Update, arrays_to_wire, from_wire, sign, to_wire
from client.keys import SiteKeys
from client.supernode import CERTIFICATE, CertifiedFleetClient
from medsegdiff.weights import hash_weights, weight_shapes

OK = 200
ARRIVAL_SECONDS = 30.0  # that an object may take to arrive at the server, once its message was announced
LONG_SECONDS = 1800.0  # heartbeat interval: the node counts as online for so long without another one


@dataclass
class Question:
    """A message from the server as it came: the tree names its objects, which have not been fetched."""

    proto: Any
    tree: ObjectTree

    @property
    def id(self) -> str:
        return str(self.proto.metadata.message_id)

    @property
    def run(self) -> int:
        return int(self.proto.metadata.run_id)

    @property
    def kind(self) -> str:
        return str(self.proto.metadata.message_type)

    @property
    def round(self) -> int:
        return int(self.proto.metadata.group_id or 0)

    def ids(self) -> list[str]:
        """Of all its objects, children before their parents."""
        return [tree.object_id for tree in iterate_object_tree(self.tree)]


@dataclass
class Answer:
    """A reply as it is sent: message, tree of objects, their contents by id."""

    message: Message
    tree: ObjectTree
    contents: dict[str, bytes]


class HandmadeNode:
    """One member without processes.

    Args:
        folder: the site's, with keys and kit.
        inside: does a piece of work with the network of the place that the node stands in.
    """

    def __init__(self, name: str, folder: Path, inside: Callable[[Callable[[], Any]], Any]) -> None:
        self.name, self.folder, self._inside = name, folder, inside
        self.keys = SiteKeys.load(folder / "keys")
        self.private = self.keys._node  # as flower-supernode reads it from node.key
        self._client = self._connect(NodeAuthHttpInterceptor(self.private, self.private.public_key()))
        self.id = 0

    def _connect(self, identity: Any) -> CertifiedFleetClient:
        before = os.environ.get(CERTIFICATE)
        os.environ[CERTIFICATE] = str(self.keys.tls_file)
        try:
            return CertifiedFleetClient.from_server_address(
                self.keys.membership().server,
                False,
                self.keys.ca_file.read_bytes(),
                interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperNode"), identity],
            )
        finally:
            os.environ.pop(CERTIFICATE)
            if before is not None:
                os.environ[CERTIFICATE] = before

    def close(self) -> None:
        self._client.close()

    # --- what a SuperNode does ----------------------------------------------------------------------------------------

    def call(self, method: str, request: Any, identity: Any = None) -> Any:
        """One request of Flower's fleet protocol. Raises httpx.HTTPStatusError where it is refused."""
        client = self._client if identity is None else self._connect(identity)
        return self._inside(lambda: getattr(client, method)(request))

    def status(self, method: str, request: Any, identity: Any = None) -> int:
        """HTTP status of one request."""
        try:
            self.call(method, request, identity)
        except httpx.HTTPStatusError as error:
            return error.response.status_code
        return OK

    @property
    def proto(self) -> NodeProto:
        return NodeProto(node_id=self.id)

    def activate(self) -> None:
        request = fleet_pb2.ActivateNodeRequest(
            public_key=public_key_to_bytes(self.private.public_key()), heartbeat_interval=LONG_SECONDS
        )
        # Flower's own: ours keeps the number of a node on disk, for a SuperNode that is started anew
        self.id = int(self._inside(lambda: FleetHttpClient.ActivateNode(self._client, request)).node_id)

    def pull(self) -> Question | None:
        """The next question that waits, if one does."""
        answer = self.call("PullMessages", fleet_pb2.PullMessagesRequest(node=self.proto))
        return Question(answer.messages_list[0], answer.message_object_trees[0]) if answer.messages_list else None

    def wish(self, run: int, object_id: str) -> Any:
        """The request for one object."""
        return message_pb2.PullObjectRequest(node=self.proto, run_id=run, object_id=object_id)

    def fetch(self, question: Question) -> Message:
        """The question, whole."""
        contents = {object_id: self._object(question, object_id) for object_id in question.ids()}
        self.confirm(question)
        message = inflate_object_from_contents(question.id, contents)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = question.id
        return message

    def skim(self, question: Question) -> Message:
        """The question without the model, which takes some two hundred requests."""
        (content,) = question.tree.children
        names = {"local_steps": "task", "model_hash": "assignment"}
        found = {}
        for record in content.children:
            if not record.children:  # those of the model have some
                text = ConfigRecord.inflate(self._object(question, record.object_id))
                name = next(name for key, name in names.items() if f'"{key}"' in str(text["json"]))
                found[name] = text
        self.confirm(question)
        return make_message(message_from_proto(question.proto).metadata, RecordDict(found))

    def _object(self, question: Question, object_id: str) -> bytes:
        """One object; a message may be seen before all of it is there."""
        end = time.monotonic() + ARRIVAL_SECONDS
        while True:
            found = self.call("PullObject", self.wish(question.run, object_id))
            if found.object_available:
                return bytes(found.object_content)
            assert found.object_found, f"{self.name}: an object of {question.kind} {question.round} is gone"
            assert time.monotonic() < end, f"{self.name}: an object of {question.kind} {question.round} does not come"
            time.sleep(0.2)

    def confirm(self, question: Question) -> None:
        """Have the server forget a question; it does so once all of it has arrived there."""
        end = time.monotonic() + ARRIVAL_SECONDS
        while self.status("ConfirmMessageReceived", self.confirmation(question)) != OK:
            assert time.monotonic() < end, f"{self.name}: {question.kind} {question.round} cannot be confirmed"
            time.sleep(0.2)

    def confirmation(self, question: Question) -> Any:
        return message_pb2.ConfirmMessageReceivedRequest(
            node=self.proto, run_id=question.run, message_object_id=question.id
        )

    def work(self, message: Message) -> RecordDict:
        """What the site's own application answers to a whole question."""
        from client.app import app

        context = Context(
            run_id=message.metadata.run_id, node_id=self.id, node_config={}, state=RecordDict(), run_config={}
        )
        with _variable("MEDSEGFED_SITE", str((self.folder / "site.yaml").resolve())):
            content: RecordDict = app(message, context).content
        return content

    def craft(self, message: Message, value: float) -> RecordDict:
        """A properly signed update for a question, whose every number is `value`: few objects, and no training."""
        task = from_wire(message.content, "task", TrainTask)
        asked = from_wire(message.content, "assignment", Assignment)
        delta = {name: torch.full(shape, value) for name, shape in weight_shapes(task.model).items()}
        update = Update(
            site=self.name,
            run=asked.run,
            round=asked.round,
            base_hash=asked.model_hash,
            patients=3,
            steps=task.local_steps,
            loss=0.5,
            seconds=0.1,
            delta_hash=hash_weights(delta),
        )
        content = RecordDict({"update": to_wire(update), "delta": arrays_to_wire(delta)})
        return sign(content, "update", self.keys.sign)

    def answer(self, message: Message, content: RecordDict, source: int | None = None) -> Answer:
        """A reply to a question, under this or another node's number."""
        reply = Message(content, reply_to=message)
        if source is not None:
            reply.metadata.__dict__["_src_node_id"] = source
        reply.metadata.__dict__["_message_id"] = reply.object_id
        contents = {key: value.deflate() for key, value in get_all_nested_objects(reply).items()}
        return Answer(reply, get_object_tree(reply), contents)

    def announcement(self, *answers: Answer) -> Any:
        """The request that replies are announced with, before their objects are sent."""
        return fleet_pb2.PushMessagesRequest(
            node=self.proto,
            messages_list=[message_to_proto(remove_content_from_message(answer.message)) for answer in answers],
            message_object_trees=[answer.tree for answer in answers],
            clientapp_runtime_list=[1.0 for _ in answers],
        )

    def send(self, answer: Answer, leave_out: Sequence[str] = ()) -> Any:
        """Announce a reply and send its objects; returns what the announcement was answered with."""
        said = self.call("PushMessages", self.announcement(answer))
        for object_id in dict.fromkeys(said.objects_to_push):  # one that stands twice in the tree is named twice
            if object_id in answer.contents and object_id not in leave_out:
                pushed = self.call("PushObject", self.object(answer, object_id, said.session_id))
                assert pushed.stored, f"{self.name}: an object was not taken"
        return said

    def object(self, answer: Answer, object_id: str, session: str) -> Any:
        """The request that one object of a reply is sent with."""
        return message_pb2.PushObjectRequest(
            node=self.proto,
            run_id=answer.message.metadata.run_id,
            object_id=object_id,
            object_content=answer.contents[object_id],
            session_id=session,
        )


class Identity:
    """Headers of a node as one likes: whose key, whose signature, what time."""

    def __init__(self, public: Any, signer: Any, seconds: float = 0.0) -> None:
        self.public, self.signer, self.seconds = public, signer, seconds

    def intercept(self, context: Any, call_next: Any) -> Any:
        from datetime import timedelta

        stamp = (now() + timedelta(seconds=self.seconds)).isoformat()
        context.request.headers["flwr-public-key"] = b64encode(public_key_to_bytes(self.public)).decode()
        context.request.headers["flwr-timestamp"] = stamp
        context.request.headers["flwr-signature"] = b64encode(sign_message(self.signer, stamp.encode())).decode()
        return call_next(context)


class Caller:
    """Raw requests to the gateway over connections of one credential.

    Args:
        pem: file with key and certificate; None: no certificate.
        ca: the authority that the caller trusts.
    """

    def __init__(
        self,
        server: str,
        ca: Path,
        pem: Path | None,
        inside: Callable[[Callable[[], Any]], Any],
        newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ) -> None:
        self.host, port = server.rsplit(":", 1)
        self.port, self._inside = int(port), inside
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.load_verify_locations(ca)
        self.context.maximum_version = newest
        if pem is not None:
            self.context.load_cert_chain(pem)
        self._connection: Any = None

    def dial(self) -> socket.socket:
        """A connection of its own, without TLS."""
        found: socket.socket = self._inside(lambda: socket.create_connection((self.host, self.port), timeout=30))
        return found

    def connect(self) -> ssl.SSLSocket:
        """A connection of its own."""
        plain = self.dial()
        try:
            return self.context.wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"x") -> int:
        """Status of one request; 0 where the connection ended without an answer."""
        from http.client import HTTPException, HTTPSConnection

        for again in (True, False):
            if self._connection is None:
                self._connection = HTTPSConnection(self.host, self.port, context=self.context, timeout=30)
            try:
                return int(self._inside(lambda: self._once(method, path, headers or {}, body)))
            except ssl.SSLError:
                self.close()
                return 0
            except (HTTPException, OSError):  # an idle connection that the other side has closed is no answer
                fresh = self._fresh
                self.close()
                if fresh or not again:
                    return 0
        return 0

    def _once(self, method: str, path: str, headers: dict[str, str], body: bytes) -> int:
        self._fresh = self._connection.sock is None
        self._connection.request(method, path, body=body if method == "POST" else None, headers=headers)
        response = self._connection.getresponse()
        self.said = response.read()
        return int(response.status)

    said = b""
    _fresh = True

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
