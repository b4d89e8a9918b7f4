"""flower-superlink with a guard: what a node sends must be its own.

Flower checks that a request comes from the node it names, not that the reply inside names that node as its source: site
A could answer as site B. The guard closes that before anything is stored. It stands on flwr 1.41's fleet handlers; the
version is pinned exactly, and the attack list of the end-to-end tests would fail without it.
"""

from __future__ import annotations

from typing import Any

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.superlink.servicer.fleet import fleet_handlers

from deploy.object_guard import guard_objects


def guarded_push_messages(push: Any) -> Any:
    """Flower's handler `push`, for requests with exactly one message whose source is the authenticated node."""

    def push_messages(request: PushMessagesRequest, state: Any) -> Any:
        sources = [message.metadata.src_node_id for message in request.messages_list]
        if len(request.message_object_trees) != 1 or sources != [request.node.node_id]:
            raise FlowerError(
                ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED,
                f"guard: node {request.node.node_id} sent replies of the nodes {sources[:4]}",
            )
        return push(request=request, state=state)

    return push_messages


def main() -> None:
    """Start flower-superlink with the guard; its arguments are Flower's."""
    from flwr.superlink.cli.flower_superlink import flower_superlink

    fleet_handlers.push_messages = guarded_push_messages(fleet_handlers.push_messages)
    guard_objects()
    flower_superlink()


if __name__ == "__main__":
    main()
