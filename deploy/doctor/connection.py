"""The way to the server as far as TCP goes: its name, the proxy before it, the connection.

Each hindrance has words of its own, for whoever mends it differs: the one who wrote site.yaml, the hospital's IT, the
coordinator.
"""

from __future__ import annotations

import base64
import os
import re
import socket
import ssl
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.doctor.checks import Check, counted, deadline, plain_text, within

STEP_SECONDS = 5.0  # a hospital's slow line answers within one; a port that is silently dropped never does
LARGEST_ANSWER = 65_536  # bytes of an HTTP answer that are read


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy, as HTTPS_PROXY names it."""

    host: str
    port: int
    credentials: str | None = None  # user:password; never shown

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Link:
    """Where the server is, how it is reached and what is shown to it."""

    host: str
    port: int
    ca: Path  # PEM, the federation's
    pair: Path | None = None  # PEM with the site's TLS key and certificate; None: no certificate is shown
    proxy: Proxy | None = None
    seconds: float = STEP_SECONDS  # for each step

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Hindrance(Exception):
    """The way ends here: the check that says so."""

    def __init__(self, name: str, detail: str, advice: str) -> None:
        super().__init__(detail)
        self.check = Check(name, "fail", detail, advice)


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` as host and port. Raises ValueError."""
    parts = urllib.parse.urlsplit(f"//{address}")
    if not parts.hostname or parts.port is None or parts.path or parts.username is not None:
        raise ValueError("the server's address is not of the form host:port")
    return parts.hostname, parts.port


def proxy_for(host: str, port: int, environment: Mapping[str, str] = os.environ) -> Proxy | None:
    """The proxy that stands before `host`, by the environment as Flower's HTTP client reads it.

    Raises:
        ValueError: the proxy's address cannot be used; the text is fit to be shown.
    """
    values = {name.lower(): value for name, value in environment.items() if value}
    values |= {name: value for name, value in environment.items() if value and name.islower()}  # lower case wins
    url = values.get("https_proxy") or values.get("all_proxy")
    if not url or bypassed(f"{host}:{port}", values.get("no_proxy", "")):
        return None
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http":
        raise ValueError(f"HTTPS_PROXY names a proxy of the kind {parts.scheme}://; http:// (HTTP CONNECT) is wanted")
    try:
        found, number = parts.hostname, parts.port or 80
    except ValueError:
        found, number = None, 0
    if not found:
        raise ValueError("HTTPS_PROXY is no address of the form http://host:port")
    user = None
    if parts.username is not None:
        user = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return Proxy(found, number, user)


def bypassed(address: str, no_proxy: str) -> bool:
    """Whether NO_PROXY excepts `host:port` from the proxy."""
    return bool(urllib.request.proxy_bypass_environment(address, {"no": no_proxy}))  # type: ignore[attr-defined]


def resolve(link: Link) -> Check:
    """Whether DNS knows the server, or the proxy that will look it up. Raises Hindrance."""
    host, port = (link.proxy.host, link.proxy.port) if link.proxy else (link.host, link.port)
    name = "server address"
    try:
        found = within(link.seconds, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except TimeoutError:
        remedy = "Ask IT which name server this machine should use (/etc/resolv.conf)."
        raise Hindrance(name, f"DNS gives no answer for {host} within {link.seconds:g} s", remedy) from None
    except (socket.gaierror, UnicodeError) as error:
        if isinstance(error, socket.gaierror) and error.errno not in (socket.EAI_NONAME, _EAI_NODATA):
            fact, remedy = f"DNS cannot answer for {host} at the moment", "Is this machine on the network? Then ask IT."
        else:
            spelt = "in HTTPS_PROXY" if link.proxy else "with the coordinator"
            fact = f"DNS knows no {host}"
            remedy = f"Check the spelling {spelt}, or ask IT to let this machine resolve the name."
        raise Hindrance(name, fact, remedy) from None
    count = len({entry[4][0] for entry in found})
    fact = f"the {'proxy' if link.proxy else 'server'}'s name has {counted(count, 'address', 'addresses')}"
    rest = "; the proxy looks up the server's" if link.proxy else ""
    return Check(name, "ok", fact + rest, figures={"addresses": count, "proxy": link.proxy is not None})


_EAI_NODATA = getattr(socket, "EAI_NODATA", socket.EAI_NONAME)  # glibc's; other systems have no such number


def connect(link: Link) -> socket.socket:
    """A connection to the server, through the proxy where there is one. Raises Hindrance."""
    host, port = (link.proxy.host, link.proxy.port) if link.proxy else (link.host, link.port)
    whom = f"the proxy {link.proxy}" if link.proxy else str(link)
    advice = (
        f"Check HTTPS_PROXY, or ask IT whether the proxy {link.proxy} runs."
        if link.proxy
        else f"Ask IT to allow outgoing TCP to {link}, one host and one port; is a proxy needed? Then set HTTPS_PROXY."
    )
    try:
        connection = socket.create_connection((host, port), timeout=link.seconds)
    except TimeoutError:
        fact = f"{whom} does not answer within {link.seconds:g} s: a firewall drops the packets, or it is down"
    except ConnectionRefusedError:
        fact = f"{whom} refuses the connection: nothing listens there, or a firewall rejects it"
        if not link.proxy:
            advice = f"Ask the coordinator whether the server runs at {link}, then IT about the firewall."
    except OSError as error:
        fact = f"no way leads to {whom} ({plain_text(error.strerror or type(error).__name__)})"
    else:
        if link.proxy:
            try:
                _tunnel(link, link.proxy, connection)
            except BaseException:
                connection.close()
                raise
        return connection
    raise Hindrance(_CONNECTION, fact, advice)


_CONNECTION = "server connection"


def _tunnel(link: Link, proxy: Proxy, connection: socket.socket) -> None:
    """HTTP CONNECT (RFC 9110, 9.3.6)."""
    request = f"CONNECT {link} HTTP/1.1\r\nHost: {link}\r\n"
    if proxy.credentials is not None:
        request += f"Proxy-Authorization: Basic {base64.b64encode(proxy.credentials.encode()).decode()}\r\n"
    try:
        connection.sendall(f"{request}\r\n".encode())
        status = status_of(read_answer(connection, link.seconds))
        if status == 200:
            return
        fact, advice = _refused_tunnel(link, proxy, status)
    except TimeoutError:
        fact = (
            f"takes the request and gives no answer within {link.seconds:g} s: {link} is out of its reach, or forbidden"
        )
        advice = f"Ask IT to let the proxy connect to {link}."
    except OSError:
        fact, advice = "hangs up on the request", f"Ask IT to let the proxy connect (HTTP CONNECT) to {link}."
    raise Hindrance(_CONNECTION, f"the proxy {proxy} {fact}", advice)


def _refused_tunnel(link: Link, proxy: Proxy, status: int | None) -> tuple[str, str]:
    """Fact and advice for a proxy that answers otherwise than with 200."""
    if status is None:
        return "does not speak HTTP", "Check HTTPS_PROXY: host and port of an HTTP proxy are wanted."
    if status == 407:
        fact = "refuses the user name and password" if proxy.credentials else "asks for a user name and password"
        return f"{fact} (407)", "Set HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT, with an account that IT gives out."
    if status in (500, 502, 503, 504):  # tinyproxy says 500, squid 503
        return (
            f"cannot reach {link} ({status}): the server is down, or a firewall behind the proxy is in the way",
            f"Ask the coordinator whether the server runs at {link}, then IT about the proxy's way out.",
        )
    verb = "forbids" if status in (400, 401, 403, 405) else "does not open"
    return f"{verb} the connection to {link} ({status})", f"Ask IT to allow HTTP CONNECT to {link} at the proxy."


def read_answer(connection: socket.socket, seconds: float, whole: bool = False) -> str:
    """An HTTP answer up to the end of its headers, or the `whole` of it, read within `seconds` all in all.

    Raises:
        TimeoutError: the headers are not complete by then.
        OSError: the connection ended before.
    """
    left = deadline(seconds)
    data = b""
    while len(data) < LARGEST_ANSWER and (whole or b"\r\n\r\n" not in data):
        connection.settimeout(left())
        try:
            # In a tunnel byte by byte: what follows the proxy's headers is the server's.
            block = connection.recv(4096 if whole else 1)
        except (TimeoutError, ssl.SSLEOFError, ConnectionResetError):
            if b"\r\n\r\n" in data:
                break
            raise
        if not block:
            break
        data += block
    if not data:
        raise ConnectionResetError("closed without a word")
    return data.decode("latin-1")


def status_of(answer: str) -> int | None:
    """The status of an HTTP answer; None where it is none."""
    found = re.match(r"HTTP/1\.[01] (\d{3})\b", answer)
    return int(found[1]) if found else None
