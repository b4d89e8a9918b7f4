"""The standard gRPC health protocol (grpc.health.v1) on loopback: our service, and a client for ours and Flower's.

The whole server is the service "", each of its processes one by its name. Watchers that poll find the same service that
Flower's `--health-server-address` offers, so one probe does for all.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import grpc  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

log = logging.getLogger("medsegfed.health")

WHOLE = ""
WATCH_SECONDS = 1.0  # between looks for those who watch
WORKERS = 8
MOST_WATCHERS = 4  # each holds a worker; the other workers stay free for checks
PROBE_SECONDS = 2.0

_LOCAL = (("grpc.enable_http_proxy", 0),)  # a hospital's HTTPS_PROXY has no business with loopback


class HealthServer:
    """Serves health from the moment it is made until `stop`.

    Args:
        address: host:port on loopback; port 0 takes a free one.
        probe: by service, whether it is well; asked at each check. One that raises means that nothing is.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, address: str, probe: Callable[[], Mapping[str, bool]]) -> None:
        self._servicer = _Health(probe)
        self._server = grpc.server(
            futures.ThreadPoolExecutor(WORKERS, thread_name_prefix="health"),
            options=(("grpc.so_reuseport", 0),),  # else a second server would share the port and answer for the first
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        try:
            self.port: int = self._server.add_insecure_port(address)
        except RuntimeError as error:  # that is all gRPC says
            raise OSError(errno.EADDRINUSE, f"{address} cannot be opened") from error
        self._server.start()

    def stop(self) -> None:
        """Give the port back; those who watch are told that nothing is served any more."""
        self._servicer.stopped.set()
        self._server.stop(grace=1.0).wait()


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Check and Watch over what the probe says at this moment."""

    def __init__(self, probe: Callable[[], Mapping[str, bool]]) -> None:
        self.probe = probe
        self.stopped = threading.Event()
        self._watchers = threading.BoundedSemaphore(MOST_WATCHERS)

    def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        """SERVING or NOT_SERVING; NOT_FOUND for a service that there is not."""
        state = self._state(request.service)
        if state == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return health_pb2.HealthCheckResponse(status=state)

    def Watch(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        """The state, and again whenever it changes; an unknown service may come to be known."""
        if not self._watchers.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MOST_WATCHERS} watch already")
        try:
            told = None
            while context.is_active():
                ending = self.stopped.is_set()
                state = self._state(request.service)
                if state != told:
                    told = state
                    yield health_pb2.HealthCheckResponse(status=state)
                if ending:
                    return
                self.stopped.wait(WATCH_SECONDS)
        finally:
            self._watchers.release()

    def _state(self, service: str) -> int:
        answer = health_pb2.HealthCheckResponse
        try:
            well = dict(self.probe())
        except Exception:  # whatever is wrong, the answer is that nothing is known to be well
            log.exception("health could not be looked at")
            well = {}
        well[WHOLE] = bool(well) and all(well.values())
        if self.stopped.is_set():
            well = dict.fromkeys(well, False)
        if service not in well:
            return int(answer.SERVICE_UNKNOWN)
        return int(answer.SERVING if well[service] else answer.NOT_SERVING)


def probe(address: str, service: str = WHOLE, seconds: float = PROBE_SECONDS) -> bool:
    """Whether a gRPC health service at host:port says SERVING within `seconds`; whatever else it meets is False."""
    with grpc.insecure_channel(address, options=_LOCAL) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=seconds)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
