"""A false server before a real SuperNode: whatever is wrong with its certificate, not a word of a site reaches it."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from client.certificates import certificate_pem, new_tls_key, private_pem
from deploy.authority import Authority
from deploy.child import guarded
from deploy.processes import environment, free_ports, shared_secret
from tests.e2e.federation.conftest import PATIENCE, ROOT, Scene
from tests.e2e.federation.network import until

ELSEWHERE = "127.0.0.2"  # of no certificate


@dataclass
class Impostor:
    """A TLS server that writes down what it is told, in plain bytes."""

    certificate: Path | None  # None: it speaks no TLS at all

    def __post_init__(self) -> None:
        self.heard = b""
        self.calls = 0
        self.newest = ssl.TLSVersion.TLSv1_3
        self.listener = socket.create_server((ELSEWHERE, 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = self.newest
        if self.certificate is not None:
            context.load_cert_chain(self.certificate)
        while True:
            try:
                plain, _ = self.listener.accept()
            except OSError:
                return
            self.calls += 1
            plain.settimeout(5)
            with contextlib.suppress(OSError), plain:
                if self.certificate is None:
                    hello = plain.recv(10_000)
                    self.heard += b"" if hello[:1] == b"\x16" else hello  # a handshake is no word of the site's
                    continue
                with context.wrap_socket(plain, server_side=True) as secured:
                    self.heard += secured.recv(10_000)

    def close(self) -> None:
        self.listener.close()


@pytest.fixture(scope="module")
def impostors(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Impostor]]:
    """One of each kind, with a real SuperNode of a member that is told to call it."""
    folder = tmp_path_factory.mktemp("impostors")
    own, strange = scene.federation.authority(), Authority.create("rehearsal")
    past = datetime.now(UTC) - timedelta(days=30)

    def pair(name: str, issue: Callable[[ec.EllipticCurvePublicKey], object]) -> Path:
        key = new_tls_key()
        path = folder / f"{name}.pem"
        path.write_bytes(private_pem(key) + certificate_pem(issue(key.public_key())))  # type: ignore[arg-type]
        return path

    found = {
        "right": Impostor(pair("right", lambda key: own.issue_server(key, [ELSEWHERE], 10))),
        "wrong authority": Impostor(pair("strange", lambda key: strange.issue_server(key, [ELSEWHERE], 10))),
        "wrong name": Impostor(pair("misnamed", lambda key: own.issue_server(key, ["fed.example.org"], 10))),
        "expired": Impostor(pair("expired", lambda key: own.issue_server(key, [ELSEWHERE], 10, past))),
        "a site's": Impostor(pair("site", lambda key: own.issue_site(key, "alder", 10))),
        "no TLS": Impostor(None),
    }
    nodes = [_supernode(scene, folder / name.replace(" ", "-"), impostor) for name, impostor in found.items()]
    try:
        yield found
    finally:
        for node in nodes:
            node.kill()
            node.wait(10)
        for impostor in found.values():
            impostor.close()


def _supernode(scene: Scene, folder: Path, impostor: Impostor) -> subprocess.Popen[bytes]:
    """The very process that `site start` starts, with mallory's keys and another address."""
    keys = scene.nodes["mallory"].keys
    folder.mkdir()
    (port,) = free_ports(1)
    command = (
        sys.executable, "-m", "client.supernode",
        "--superlink", f"{ELSEWHERE}:{impostor.port}",
        "--root-certificates", str(keys.ca_file),
        "--auth-supernode-private-key", str(keys.node_key_file),
        "--isolation", "process",
        "--superexec-auth-secret-file", str(shared_secret(folder / "secret")),
        "--host", "127.0.0.1",
        "--port", str(port),
    )  # fmt: skip
    env = environment(folder / "flower", MEDSEGFED_CERTIFICATE=str(keys.tls_file), PYTHONPATH=str(ROOT))
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(
            [*guarded("exec", str(os.getpid())), *command],
            stdout=log, stderr=log, env=env, cwd=folder, start_new_session=True,
        )  # fmt: skip


def test_a_site_speaks_to_its_federation_alone(impostors: dict[str, Impostor]) -> None:
    """Wrong authority, wrong name, expired, a site's certificate, no TLS: called, and told nothing."""
    until(lambda: impostors["right"].heard, PATIENCE, "the right server is told something")
    assert impostors["right"].heard.startswith(b"POST /v1/fleet/activate-node HTTP/1.1")
    false = {name: impostor for name, impostor in impostors.items() if name != "right"}
    until(lambda: all(impostor.calls for impostor in false.values()), PATIENCE, "each impostor is called")
    time.sleep(3)  # and tried again
    assert {name: impostor.heard for name, impostor in false.items()} == dict.fromkeys(false, b"")
