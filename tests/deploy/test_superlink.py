"""What is shipped to Flower, and the guard that lets a node answer for itself alone."""

from __future__ import annotations

import io
import zipfile

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import FlowerError
from flwr.superlink.servicer.fleet import fleet_handlers

from deploy.control import stub
from deploy.superlink import guarded_push_messages


def request(node: int, sources: list[int], trees: int = 1) -> PushMessagesRequest:
    messages = [Message(metadata=Metadata(src_node_id=source)) for source in sources]
    return PushMessagesRequest(
        node=Node(node_id=node), messages_list=messages, message_object_trees=[ObjectTree()] * trees
    )


def test_an_answer_of_the_node_itself_passes_unchanged() -> None:
    """Flower's handler gets the request and the state, and its answer is given back."""
    seen = []
    push = guarded_push_messages(lambda request, state: seen.append((request, state)) or "answer")
    good = request(7, [7])
    assert push(request=good, state="state") == "answer"
    assert seen == [(good, "state")]


@pytest.mark.parametrize(
    ("sources", "trees"), [([8], 1), ([7, 8], 1), ([7, 7], 1), ([], 1), ([7], 2), ([7], 0), ([0], 1)]
)
def test_anything_else_never_reaches_flower(sources: list[int], trees: int) -> None:
    """As another node, two answers in one request, none, or more object trees than answers."""

    def untouched(**_: object) -> None:
        pytest.fail("the handler was called")

    with pytest.raises(FlowerError):
        guarded_push_messages(untouched)(request=request(7, sources, trees), state=None)


def test_flower_calls_the_handler_by_its_module() -> None:
    """The guard replaces a name in a module; it would be passed by if Flower imported the function itself."""
    from flwr.superlink.routers.fleet import router

    assert router.fleet_handlers is fleet_handlers


def test_what_is_shipped_is_a_stub() -> None:
    """Four small files, the same bytes at every call; not a line of the applications that really run."""
    assert stub() == stub()
    with zipfile.ZipFile(io.BytesIO(stub())) as bundle:
        code = {name: bundle.read(name).decode() for name in bundle.namelist() if name.endswith(".py")}
    assert set(code) == {f"medsegfed_run/{name}.py" for name in ("__init__", "server_app", "client_app")}
    assert sum(map(len, code.values())) < 1000
    assert "from server.app import main" in code["medsegfed_run/server_app.py"]
