"""Flower's SuperNode gives a message up when its run ends while it is fetched, and leaves the task for it behind.

The runner has that task by then. It would wait for the message's objects for more than an hour, deaf to every later
run. Here whatever a given-up message left behind is taken back: the runner finds its objects gone and goes on.

Stands on flwr 1.41's `start_client_internal._pull_and_store_message`; the version is pinned exactly, and the end-to-end
tests, which stop a run while sites fetch its messages, would hang without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.common.constant import Status, SubStatus

UNFINISHED = (Status.PENDING, Status.STARTING, Status.RUNNING)


def tidied(pull: Callable[..., int | None]) -> Callable[..., int | None]:
    """Flower's function `pull`, after which no task is left of a message that it did not deliver."""

    def pull_and_store_message(
        *, state: Any, object_store: Any, receive: Callable[[], Any], **others: Any
    ) -> int | None:
        came: list[str] = []
        before = {task.task_id for task in state.get_tasks(statuses=UNFINISHED)}

        def noting() -> Any:
            found = receive()
            if found is not None:
                came.append(found[0].metadata.message_id)
            return found

        run = pull(state=state, object_store=object_store, receive=noting, **others)
        if run is None and came:
            state.delete_messages(message_ids=came)
            for task in state.get_tasks(statuses=UNFINISHED):
                if task.task_id not in before:
                    state.finish_task(task.task_id, sub_status=SubStatus.STOPPED, details="its message was given up")
            for message in came:
                object_store.delete(message)
        return run

    return pull_and_store_message
