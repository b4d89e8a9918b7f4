"""Where the parts of a federation stand: each in a network namespace of its own, or all on loopback.

                     10.77.0.0/24 on a bridge                      10.78.0.0/24, a cable
    server .1    alder .11    birch .12    outside .66    proxy .8 ---------- elm .2 (sees nothing but the proxy)

Each site's firewall drops whatever was not begun from inside, and keeps a list of whom the site called. The server's
keeps a list of the ports that were called, and of whom the server called. The bridge lies in a namespace, too: the
machine's own network is not touched. Everything bears a name of its own, so that two test runs do not meet.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from deploy.child import guarded
from deploy.processes import LOOPBACK, free_ports

T = TypeVar("T")

CLONE_NEWNET = 0x40000000  # linux/sched.h
PREFIX = "msfed"
PROXY_PORT = 8888
SERVER, OUTSIDE, PROXY, PROXY_INSIDE, BEHIND = "10.77.0.1", "10.77.0.66", "10.77.0.8", "10.78.0.1", "10.78.0.2"
ADDRESSES = {"server": SERVER, "alder": "10.77.0.11", "birch": "10.77.0.12", "outside": OUTSIDE, "elm": BEHIND}

SITE_FIREWALL = """
table inet watch {
  counter knocks {}
  set called { type ipv4_addr . inet_proto . inet_service; flags dynamic; size 1024; }
  chain input {
    type filter hook input priority 0; policy drop;
    iif lo accept
    ct state established,related accept
    tcp flags & (fin|syn|rst|ack) != syn drop comment "of a connection that has ended"
    counter name knocks
  }
  chain output {
    type filter hook output priority 0; policy accept;
    oif lo accept
    meta l4proto { tcp, udp } ct state new add @called { ip daddr . meta l4proto . th dport }
    meta l4proto != { tcp, udp } add @called { ip daddr . meta l4proto . 0 }
  }
}
"""
SERVER_FIREWALL = """
table inet watch {
  set ports { type inet_proto . inet_service; flags dynamic; size 1024; }
  set called { type ipv4_addr . inet_proto . inet_service; flags dynamic; size 1024; }
  chain input {
    type filter hook input priority 0; policy accept;
    iif lo accept
    meta l4proto { tcp, udp } ct state new add @ports { meta l4proto . th dport }
  }
  chain output {
    type filter hook output priority 0; policy accept;
    oif lo accept
    meta l4proto { tcp, udp } ct state new add @called { ip daddr . meta l4proto . th dport }
  }
}
"""


class Loopback:
    """All on this machine's loopback: for machines where namespaces may not be made."""

    host = LOOPBACK

    def __init__(self, why: str = "") -> None:
        self.why = why  # not namespaces
        self._proxy: subprocess.Popen[bytes] | None = None
        (self._proxy_port,) = free_ports(1)

    def enter(self, place: str) -> tuple[str, ...]:
        """What stands before a command that runs there."""
        return ()

    def inside(self, place: str, work: Callable[[], T]) -> T:
        """Do something with the network of a place; the sockets that are made stay there."""
        return work()

    def environment(self, place: str) -> dict[str, str]:
        """What a place has to know of the network."""
        url = f"http://{self._proxy_host}:{self._proxy_port}"
        return {"HTTPS_PROXY": url, "https_proxy": url, "NO_PROXY": "", "no_proxy": ""} if place == "elm" else {}

    @property
    def _proxy_host(self) -> str:
        return LOOPBACK

    def start_proxy(self, folder: Path, port: int) -> None:
        """tinyproxy, which lets through what goes to the server's port."""
        config = folder / "tinyproxy.conf"
        config.write_text(
            f"Port {self._proxy_port}\nListen {self._proxy_host}\nTimeout 600\nMaxClients 50\nConnectPort {port}\n"
            f'LogFile "{folder / "tinyproxy.log"}"\nLogLevel Connect\nFilterDefaultDeny No\n'
        )
        program = shutil.which("tinyproxy", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/bin", "/usr/sbin")))
        assert program, "tinyproxy is not installed"
        with open(folder / "tinyproxy.out", "ab") as out:
            self._proxy = subprocess.Popen(
                [*guarded("exec", str(os.getpid())), *self.enter("proxy"), program, "-d", "-c", str(config)],
                stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def close(self) -> None:
        if self._proxy is not None:
            self._proxy.terminate()
            self._proxy.wait(10)


class Namespaces(Loopback):
    """Six places that see of each other what the picture above shows."""

    host = SERVER

    def __init__(self) -> None:
        super().__init__()
        self._tag = f"{PREFIX}{os.getpid()}-{secrets.token_hex(2)}"
        self._proxy_port = PROXY_PORT
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._made: list[str] = []

    @property
    def _proxy_host(self) -> str:
        return PROXY_INSIDE

    def name(self, place: str) -> str:
        return f"{self._tag}-{place}"

    def enter(self, place: str) -> tuple[str, ...]:
        return ("nsenter", f"--net=/run/netns/{self.name(place)}", "--") if place in (*ADDRESSES, "proxy") else ()

    def inside(self, place: str, work: Callable[[], T]) -> T:
        if place not in self._threads:
            self._threads[place] = ThreadPoolExecutor(1, place, _move_to, (self.name(place),))
        return self._threads[place].submit(work).result(120)

    def build(self) -> None:
        """Make all of it. Raises RuntimeError or OSError where this may not be done."""
        _sweep()
        for place in ("switch", "server", "alder", "birch", "outside", "proxy", "elm"):
            run("ip", "netns", "add", self.name(place))
            self._made.append(place)
            run(
                *self._at(place),
                "sysctl",
                "-q",
                "net.ipv6.conf.all.disable_ipv6=1",
                "net.ipv6.conf.default.disable_ipv6=1",
            )
            self._ip(place, "link", "set", "lo", "up")
        self._ip("switch", "link", "add", "bridge", "type", "bridge")
        self._ip("switch", "link", "set", "bridge", "up")
        for place in ("server", "alder", "birch", "outside"):
            self._plug(place, ADDRESSES[place])
        self._plug("proxy", PROXY)
        self._ip("proxy", "link", "add", "inside", "type", "veth", "peer", "name", "eth0", "netns", self.name("elm"))
        self._up("proxy", "inside", PROXY_INSIDE)
        self._up("elm", "eth0", BEHIND)
        for place in ("alder", "birch", "elm"):
            self._firewall(place, SITE_FIREWALL)
        self._firewall("server", SERVER_FIREWALL)

    def close(self) -> None:
        super().close()
        for pool in self._threads.values():
            pool.shutdown(wait=True)
        while self._made:
            run("ip", "netns", "del", self.name(self._made.pop()))

    # What the firewalls have seen.

    def knocks(self, site: str) -> int:
        """New connections that somebody tried to a site; they were dropped."""
        (found,) = self._listed(site, "counter", "knocks")
        return int(found["packets"])

    def called(self, place: str) -> set[tuple[str, str, int]]:
        """Whom a place called: address, protocol, port."""
        return {tuple(entry) for entry in self._elements(place, "called")}  # type: ignore[misc]

    def ports(self) -> set[tuple[str, int]]:
        """The server's ports that were called from outside."""
        return {tuple(entry) for entry in self._elements("server", "ports")}  # type: ignore[misc]

    def _elements(self, place: str, name: str) -> list[list[Any]]:
        (found,) = self._listed(place, "set", name)
        elements = [element.get("elem", element) for element in found.get("elem", [])]
        return [element.get("val", element)["concat"] for element in elements]

    def _listed(self, place: str, kind: str, name: str) -> list[dict[str, Any]]:
        text = run(*self._at(place), "nft", "-j", "list", kind, "inet", "watch", name)
        return [entry[kind] for entry in json.loads(text)["nftables"] if kind in entry]

    def _at(self, place: str) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name(place))

    def _ip(self, place: str, *words: str) -> None:
        run("ip", "-n", self.name(place), *words)

    def _plug(self, place: str, address: str) -> None:
        """A cable from the switch to a place."""
        self._ip("switch", "link", "add", place, "type", "veth", "peer", "name", "eth0", "netns", self.name(place))
        self._ip("switch", "link", "set", place, "master", "bridge", "up")
        self._up(place, "eth0", address)

    def _up(self, place: str, device: str, address: str) -> None:
        self._ip(place, "address", "add", f"{address}/24", "dev", device)
        self._ip(place, "link", "set", device, "up")

    def _firewall(self, place: str, rules: str) -> None:
        run(*self._at(place), "nft", "-f", "-", feed=rules)


def _move_to(namespace: str) -> None:
    """Move this thread into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(descriptor)


def _sweep() -> None:
    """Remove what test runs that were killed have left."""
    for name in (Path(path).name for path in Path("/run/netns").glob(f"{PREFIX}*-*")):
        owner = name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            run("ip", "netns", "del", name)


def run(*command: str, feed: str | None = None) -> str:
    """A command to its end; its output."""
    done = subprocess.run(command, input=feed, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def placed() -> Iterator[Loopback]:
    """Namespaces where they may be made, loopback elsewhere."""
    network: Loopback = Namespaces()
    try:
        assert isinstance(network, Namespaces)
        network.build()
    except (RuntimeError, OSError) as error:
        network.close()
        network = Loopback(f"network namespaces cannot be made here ({error})")
    try:
        yield network
    finally:
        network.close()


def until(true: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait for something to become true; returns it."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)
    return found
