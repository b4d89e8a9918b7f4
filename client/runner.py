"""The site's runner: takes tasks from the site's own SuperNode and executes the application installed here.

Flower ships an application with every run and would unpack and execute it. This runner never looks into what was
shipped: what runs is `client.app`, whose hash the data officer has approved. It speaks to the SuperNode on loopback
alone.

    python -m client.runner SITE.yaml --node 127.0.0.1:9094 --secret FILE
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import sys
import time
from pathlib import Path

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from client.contract import REFUSALS, REFUSED

log = logging.getLogger("medsegfed.site")

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
POLL_SECONDS = 0.3  # the SuperNode is on this machine; its own poll of the server takes 3 s
LOST = (ObjectPullError, ObjectPushError, httpx.HTTPError, RunNotRunningException, RuntimeError, ValueError)
RETRY_SECONDS = 20.0  # that one call to the SuperNode is tried for; it may be starting anew


class Runner:
    """Executes tasks one at a time. While its SuperNode is started anew it finishes the work at hand, and waits."""

    def __init__(self, node: str, secret: bytes) -> None:
        self.node = node
        self.tasks = self._client(
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({ACQUIRE})),
            tries=1,  # Flower's pauses between tries double up to 16 s; `serve` asks again soon
        )

    def serve(self) -> None:
        """For ever."""
        silent = False
        while True:
            try:
                token = self._acquire()
            except (httpx.HTTPError, RunNotRunningException, ValueError) as error:
                if not silent:
                    log.warning("the SuperNode does not answer (%s); trying on", type(error).__name__)
                silent = True
                time.sleep(1.0)
                continue
            silent = False
            if token is None:
                time.sleep(POLL_SECONDS)
            else:
                self._carry_out(token)
                gc.collect()  # message, weights and reply of a round go before the next one comes

    def _acquire(self) -> str | None:
        """The token of the oldest waiting task, if there is one."""
        answer = self.tasks.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        return answer.token if answer.HasField("task") and answer.token else None

    def _carry_out(self, token: str) -> None:
        client = self._client(RuntimeVersionHttpInterceptor("flwr-clientapp"), RuntimeTokenHttpInterceptor(token))
        heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
        context: Context | None = None
        done = False
        try:
            heartbeat.start()
            message, context, _, _ = pull_task_input(client)  # the shipped bundle is let lie
            reply = self._answer(message, context)
            del message
            push_message(client, reply, context)
            done = True
        except (*LOST, KeyboardInterrupt) as error:  # Flower interrupts the process whose task was taken back (401)
            log.error("a task was lost on its way to or from the SuperNode (%s)", type(error).__name__)
        finally:
            if done:  # else: the claim on the task runs out, and the SuperNode, which would wait for ever, goes on
                with contextlib.suppress(*LOST):  # the answer has arrived; a SuperNode that has gone asks no more of it
                    push_task_output(client, context, SubStatus.COMPLETED, "")
            if heartbeat.is_running:
                heartbeat.stop()
            client.close()

    @staticmethod
    def _answer(message: Message, context: Context) -> Message:
        from client.app import app

        try:
            return app(message, context)
        except Exception as error:
            # Flower would send the text of the exception; it may hold the name of a file or a patient.
            log.error("the application failed (%s)", type(error).__name__)
            return Message(Error(REFUSED, f"fault: {REFUSALS['fault']}"), reply_to=message)

    def _client(self, *interceptors: ProtobufClientInterceptor, tries: int | None = None) -> RuntimeHttpClient:
        retries = make_simple_http_retry_invoker()
        retries.max_tries = tries
        retries.max_time = RETRY_SECONDS
        return RuntimeHttpClient.from_server_address(
            server_address=self.node,
            insecure=True,  # loopback; the SuperNode asks for the shared secret
            root_certificates=None,
            interceptors=list(interceptors),
            retry_invoker=retries,
        )


def main(arguments: list[str] | None = None) -> None:
    """Serve one site."""
    parser = argparse.ArgumentParser(prog="python -m client.runner", description=__doc__)
    parser.add_argument("site", type=Path, help="site.yaml")
    parser.add_argument("--node", required=True, help="host:port of the SuperNode's Runtime API on this machine")
    parser.add_argument("--secret", type=Path, required=True, help="file with the secret shared with the SuperNode")
    given = parser.parse_args(arguments)
    os.environ["MEDSEGFED_SITE"] = str(given.site.resolve())
    os.environ.pop("MEDSEGFED_WORLD", None)
    from client.guard import guard_of
    from client.site import open_site
    from medsegdiff.errors import EXIT_CODE, UserError

    try:
        guard = guard_of(open_site(given.site.resolve()))
        if guard is None:
            raise UserError(f"{given.site}: names no keys, so this is no site of a federation. Run medsegfed join.")
        guard.start_logging()
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every look for work
        log.info("ready: application %s", guard.application)
        Runner(given.node, given.secret.read_bytes()).serve()
    except UserError as error:
        log.error("%s", error)
        print(f"error: {error}", file=sys.stderr)  # before the log was set up
        sys.exit(EXIT_CODE)


if __name__ == "__main__":
    main()
