"""Is a port free, and if not, who has it?"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from deploy import guard
from medsegdiff.errors import UserError


def listen_addresses() -> tuple[str, ...]:
    """All addresses of this machine, as nginx writes them: IPv4, and IPv6 where it has that."""
    try:
        with _socket("[::]") as probe:
            probe.bind(("::", 0))
    except OSError:
        return ("0.0.0.0",)
    return ("0.0.0.0", "[::]")


def _socket(address: str) -> socket.socket:
    if ":" not in address:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    opened = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return opened


def require_free_port(port: int, addresses: Sequence[str] = ("0.0.0.0",)) -> None:
    """Make sure that the server will be able to open its public port.

    Raises:
        UserError: somebody has it (named where that can be seen), or this user may not.
    """
    for address in addresses:
        with contextlib.ExitStack() as stack:
            try:
                probe = stack.enter_context(_socket(address))
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as nginx
                probe.bind((address.strip("[]"), port))
            except PermissionError as error:
                raise UserError(
                    f"port {port}: an ordinary user may not open ports below 1024, and the server was not started. "
                    "Choose a port from 1024 in federation.yaml, or give the service CAP_NET_BIND_SERVICE."
                ) from error
            except OSError as error:
                why = f"held by {port_holder(port)}" if error.errno == errno.EADDRINUSE else error.strerror
                raise UserError(
                    f"port {port} at {address}: cannot be opened, {why}; the server was not started. Free it or "
                    "choose another port in federation.yaml."
                ) from error


def port_holder(port: int) -> str:
    """Who listens on a TCP port: "process 812 (nginx)", or how to find out where this user cannot see it."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as handle:
            for line in handle.readlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:  # listening; proc_net_tcp(5)
                    sockets.add(f"socket:[{fields[9]}]")
    for process in guard.processes() if sockets else []:
        with contextlib.suppress(OSError):
            for descriptor in os.scandir(f"/proc/{process.pid}/fd"):
                if os.readlink(descriptor.path) in sockets:  # noqa: PTH115 - no path
                    name = Path(f"/proc/{process.pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
                    return f"process {process.pid} ({name})"
    return f"a process that this user cannot see (sudo ss -ltnp 'sport = :{port}')"
