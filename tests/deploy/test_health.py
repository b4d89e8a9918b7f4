"""gRPC health: our service as any client sees it, our client against other servers, and what is not well."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from deploy.health import MOST_WATCHERS, HealthServer, probe

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Federation:
    """What the probe says, to be changed by a test."""

    def __init__(self) -> None:
        self.well: dict[str, bool] = {"gateway": True, "superlink": True, "superexec": True}
        self.fault: Exception | None = None

    def __call__(self) -> dict[str, bool]:
        if self.fault is not None:
            raise self.fault
        return self.well


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who watch see a change soon."""
    monkeypatch.setattr("deploy.health.WATCH_SECONDS", 0.02)


@pytest.fixture
def served() -> Iterator[tuple[Federation, str]]:
    """A health server on a free port, and what it asks."""
    federation = Federation()
    server = HealthServer("127.0.0.1:0", federation)
    yield federation, f"127.0.0.1:{server.port}"
    server.stop()


def stub(address: str) -> health_pb2_grpc.HealthStub:
    return health_pb2_grpc.HealthStub(grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)))


def check(address: str, service: str = "") -> int:
    """The status by the protocol's own client."""
    return stub(address).Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status


def test_the_whole_and_each_service(served) -> None:
    """All well; one down: that one and the whole are not, the others are; an unknown one is NOT_FOUND."""
    federation, address = served
    assert {name: check(address, name) for name in ("", *federation.well)} == dict.fromkeys(
        ("", *federation.well), SERVING
    )
    federation.well["superlink"] = False
    assert [check(address, name) for name in ("", "gateway", "superlink")] == [NOT_SERVING, SERVING, NOT_SERVING]
    with pytest.raises(grpc.RpcError) as caught:
        check(address, "nginx")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("fault", [RuntimeError("x"), KeyError("y")])
def test_what_cannot_be_looked_at_is_not_well(served, fault) -> None:
    """A probe that raises, and one that knows no service: nothing is said to be well."""
    federation, address = served
    federation.fault = fault
    assert check(address) == NOT_SERVING
    federation.fault = None
    federation.well = {}
    assert check(address) == NOT_SERVING
    assert not probe(address)


def test_watching_tells_changes_as_they_come(served) -> None:
    """The state at once, then each change, an unknown service included; the end of the server ends the stream."""
    federation, address = served
    seen: list[int] = []
    stream = stub(address).Watch(health_pb2.HealthCheckRequest(service="runs"), timeout=20)
    changes: list[Callable[[], None]] = [
        lambda: federation.well.update(runs=True),
        lambda: federation.well.update(runs=False),
        stream.cancel,
    ]

    def follow() -> None:
        for answer in stream:
            seen.append(answer.status)
            changes[len(seen) - 1]()

    with pytest.raises(grpc.RpcError) as caught:
        follow()
    assert seen == [UNKNOWN, SERVING, NOT_SERVING]
    assert caught.value.code() == grpc.StatusCode.CANCELLED


def test_a_stopped_server_tells_those_who_watch() -> None:
    """NOT_SERVING, then the end of the stream, within the grace; the port is free again."""
    server = HealthServer("127.0.0.1:0", lambda: {"gateway": True})
    address = f"127.0.0.1:{server.port}"
    stream = stub(address).Watch(health_pb2.HealthCheckRequest(), timeout=20)
    assert next(stream).status == SERVING
    stopper = threading.Thread(target=server.stop)
    stopper.start()
    assert [answer.status for answer in stream] == [NOT_SERVING]
    stopper.join(timeout=10)
    assert not stopper.is_alive()
    HealthServer(address, dict).stop()


def test_watchers_do_not_starve_the_checks(served) -> None:
    """One too many is turned away; checks are answered all the same, and a watcher that left makes room."""
    _, address = served
    streams = [stub(address).Watch(health_pb2.HealthCheckRequest(), timeout=30) for _ in range(MOST_WATCHERS)]
    assert [next(stream).status for stream in streams] == [SERVING] * MOST_WATCHERS
    with pytest.raises(grpc.RpcError) as caught:
        next(stub(address).Watch(health_pb2.HealthCheckRequest(), timeout=10))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert probe(address)
    streams[0].cancel()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert next(stub(address).Watch(health_pb2.HealthCheckRequest(), timeout=10)).status == SERVING
            break
        except grpc.RpcError:
            time.sleep(0.1)
    else:
        pytest.fail("a watcher that left still holds its place")


def test_a_port_that_is_taken_is_an_error() -> None:
    """By a program of another kind, and by a second health server, which would else share the port in silence."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(OSError, match="cannot be opened"):
            HealthServer(f"127.0.0.1:{holder.getsockname()[1]}", dict)
    first = HealthServer("127.0.0.1:0", dict)
    with pytest.raises(OSError, match="cannot be opened"):
        HealthServer(f"127.0.0.1:{first.port}", dict)
    first.stop()


@pytest.fixture
def other_server() -> Iterator[tuple[health.HealthServicer, str]]:
    """The protocol's reference implementation."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(0).wait()


def test_the_probe_agrees_with_the_reference_implementation(other_server) -> None:
    """SERVING alone is well; another status, and a service that is not known, are not."""
    servicer, address = other_server
    servicer.set("", SERVING)
    servicer.set("a", NOT_SERVING)
    assert probe(address)
    assert not probe(address, "a")
    assert not probe(address, "b")
    servicer.set("a", SERVING)
    assert probe(address, "a")
    servicer.enter_graceful_shutdown()
    assert not probe(address)


def test_the_probe_understands_flowers_health_service() -> None:
    """What `--health-server-address` of Flower's programs starts."""
    from flwr.supercore.grpc_health import run_health_server_grpc_no_tls

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    server = run_health_server_grpc_no_tls(address)
    assert probe(address)
    server.stop(0).wait()
    assert not probe(address)


def test_the_probe_has_a_deadline(served, monkeypatch) -> None:
    """Nobody there, one that accepts and says nothing, one that speaks no gRPC, a probe that hangs: False, in time."""
    federation, address = served
    started = time.monotonic()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        assert not probe(f"127.0.0.1:{silent.getsockname()[1]}", seconds=0.3)
        silent.listen()
        assert not probe(f"127.0.0.1:{silent.getsockname()[1]}", seconds=0.3)
    hanging = threading.Event()
    monkeypatch.setattr(Federation, "__call__", lambda self: {"gateway": hanging.wait(20)})
    assert not probe(address, seconds=0.3)
    hanging.set()
    assert time.monotonic() - started < 5
    assert federation.fault is None


def test_a_proxy_of_the_house_is_not_asked(served, monkeypatch) -> None:
    """HTTPS_PROXY and its kin are for the way out."""
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert probe(served[1])
