"""A TCP proxy that does what bad lines do: it delays, drips, cuts, or swallows everything and says nothing."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import Literal

Mode = Literal["open", "slow", "silent", "cut"]

LOOK_SECONDS = 0.1
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a close sends RST


class FaultProxy:
    """Listens on a loopback port and carries every connection to another one.

    open    as a good line
    slow    `bytes_per_second` each way, after `delay` seconds a piece
    silent  connections stand and new ones are accepted, and nothing comes through: a firewall that forgot them
    cut     connections are reset, new ones at once
    """

    def __init__(self, to: int) -> None:
        self.to = to
        self.mode: Mode = "open"
        self.delay = 0.0
        self.bytes_per_second = 8192.0
        self.carried = 0  # bytes, both ways
        self.lost = 0  # answers
        self._until_lost = 0  # answers: with the last of them the line breaks
        self._asked: set[tuple[socket.socket, socket.socket]] = set()  # something went there, nothing has come back
        self._counting = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def become(self, mode: Mode) -> None:
        """Change the line; what is cut is cut at once."""
        self.mode = mode
        if mode == "cut":
            for pair in list(self._pairs):
                self._end(pair)

    def lose(self, nth: int) -> None:
        """Break the line with the nth answer that comes from now on, before any of it is through: 1 is the next."""
        self._until_lost = nth

    def close(self) -> None:
        """End the listener and all connections."""
        self.mode = "cut"
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._listener.close()
        self.become("cut")

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self.mode == "cut":
                    raise OSError("cut")
                far = socket.create_connection(("127.0.0.1", self.to), timeout=5)
            except OSError:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                near.close()
                continue
            pair = (near, far)
            self._pairs.add(pair)
            for source, sink in (pair, (far, near)):
                source.settimeout(LOOK_SECONDS)
                threading.Thread(target=self._carry, args=(source, sink, pair), name="line", daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, pair: tuple[socket.socket, socket.socket]) -> None:
        try:
            while True:
                if self.mode == "silent":
                    time.sleep(LOOK_SECONDS)
                    continue
                piece = 1024 if self.mode == "slow" else 65_536
                try:
                    data = source.recv(piece)
                except (TimeoutError, BlockingIOError):  # the latter: the other direction has just changed the wait
                    continue
                if not data or self._loses(pair, answer=source is pair[1]):
                    break
                while self.mode == "silent":  # it was under way when the line went dead
                    time.sleep(LOOK_SECONDS)
                if self.mode == "slow":
                    time.sleep(self.delay + len(data) / self.bytes_per_second)
                sink.settimeout(None)
                sink.sendall(data)
                sink.settimeout(LOOK_SECONDS)
                self.carried += len(data)
        except OSError:
            pass
        self._end(pair)

    def _loses(self, pair: tuple[socket.socket, socket.socket], answer: bool) -> bool:
        """Note that something comes through; whether it is the answer that is to be lost."""
        with self._counting:
            if not answer:
                self._asked.add(pair)
                return False
            if pair not in self._asked:  # the rest of an answer
                return False
            self._asked.discard(pair)
            self._until_lost -= 1
            self.lost += self._until_lost == 0
            return self._until_lost == 0

    def _end(self, pair: tuple[socket.socket, socket.socket]) -> None:
        self._pairs.discard(pair)
        self._asked.discard(pair)
        for one in pair:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
