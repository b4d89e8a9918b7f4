"""The faulty line itself: a test that stands on it must not pass because it is a good one."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.e2e.chaos.proxy import FaultProxy


@pytest.fixture
def line() -> Iterator[FaultProxy]:
    """A proxy in front of a server that sends back what it gets."""
    server = socket.create_server(("127.0.0.1", 0))

    def echo(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(4096):
                connection.sendall(data)

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    proxy = FaultProxy(server.getsockname()[1])
    yield proxy
    proxy.close()
    server.close()


def call(line: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", line.port), timeout=1.0)


def ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(10) == b""
    except ConnectionError:
        return True


def test_an_open_line_carries_and_a_silent_one_only_holds_on(line: FaultProxy) -> None:
    """What was sent into the silence arrives when the line heals; nobody is told meanwhile."""
    with call(line) as connection:
        connection.sendall(b"one")
        assert connection.recv(10) == b"one"
        line.become("silent")
        connection.sendall(b"two")
        with pytest.raises(TimeoutError):
            connection.recv(10)
        with call(line) as another, pytest.raises(TimeoutError):
            another.recv(10)
        line.become("open")
        assert connection.recv(10) == b"two"


def test_a_cut_line_resets(line: FaultProxy) -> None:
    """Connections that stand, and new ones; after the heal new ones are carried."""
    with call(line) as connection:
        connection.sendall(b"one")
        assert connection.recv(10) == b"one"
        line.become("cut")
        assert ended(connection)
    line.become("open")
    with call(line) as connection:
        connection.sendall(b"two")
        assert connection.recv(10) == b"two"


def test_a_slow_line_drips(line: FaultProxy) -> None:
    """4 KiB at 8 KiB a second, there and back: no sooner than half a second."""
    line.bytes_per_second = 8192.0
    line.become("slow")
    with call(line) as connection:
        began, came = time.monotonic(), 0
        connection.settimeout(5.0)
        connection.sendall(bytes(4096))
        while came < 4096:
            block = connection.recv(4096)
            assert block, f"the line ended after {came} bytes"
            came += len(block)
        assert time.monotonic() - began > 0.5


def test_the_answer_that_is_meant_is_lost(line: FaultProxy) -> None:
    """The second one from now: what was asked has arrived, and the connection ends without a byte of the answer."""
    with call(line) as connection, call(line) as another:
        connection.sendall(b"before")
        assert connection.recv(10) == b"before"
        line.lose(2)
        another.sendall(b"first")
        assert another.recv(10) == b"first"
        connection.sendall(b"second")
        assert ended(connection)
        came, end = 2 * len(b"before" + b"first") + len(b"second"), time.monotonic() + 5
        while line.carried < came and time.monotonic() < end:  # counted when it is through
            time.sleep(0.01)
        assert (line.carried, line.lost) == (came, 1)
        another.sendall(b"third")
        assert another.recv(10) == b"third"
