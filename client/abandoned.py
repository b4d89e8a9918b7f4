"""Flower's SuperNode gives a message up when its run ends while it is fetched, and leaves the task for it behind.

A runner that takes the task waits for the message's objects for more than an hour, deaf to every later run. Here what a
given-up message left behind is taken back: nobody takes its task, or whoever has it finds the objects gone and goes on.

Stands on flwr 1.41's `start_client_internal._pull_and_store_message`; the version is pinned exactly, and the end-to-end
tests, which stop a run while sites fetch its messages, would hang without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.common.constant import Status, SubStatus


def tidied(pull: Callable[..., int | None]) -> Callable[..., int | None]:
    """Flower's function `pull`, after which no task is left of a message that it did not deliver."""

    def pull_and_store_message(
        *, state: Any, object_store: Any, receive: Callable[[], Any], **others: Any
    ) -> int | None:
        came: list[str] = []
        before = {task.task_id for task in state.get_tasks(statuses=(Status.PENDING,))}

        def noting() -> Any:
            found = receive()
            if found is not None:
                came.append(found[0].metadata.message_id)
            return found

        run = pull(state=state, object_store=object_store, receive=noting, **others)
        if run is None and came:
            state.delete_messages(message_ids=came)
            for message in came:
                object_store.delete(message)
            for task in state.get_tasks(statuses=(Status.PENDING,)):  # one that the runner has taken it gives up itself
                if task.task_id not in before:
                    state.finish_task(task.task_id, sub_status=SubStatus.STOPPED, details="its message was given up")
        return run

    return pull_and_store_message
