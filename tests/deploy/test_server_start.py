"""What `server start` puts together."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy import server_start
from deploy.gateway import Nginx
from deploy.server_start import Server
from tests.deploy.small_federation import new_federation


@pytest.mark.parametrize("addresses", [("0.0.0.0",), ("0.0.0.0", "[::]")])
def test_the_gateway_listens_where_the_machine_does(
    addresses: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that sites reach over IPv6 alone is certified and written into kits: the port must be open there."""
    monkeypatch.setattr(server_start, "require_programs", lambda: Nginx("/usr/sbin/nginx", (1, 22, 1)))
    monkeypatch.setattr(server_start, "listen_addresses", lambda: addresses)
    written: list[str] = []

    def install(state: Path, text: str) -> Path:
        written.append(text)
        return state / "nginx.conf"

    monkeypatch.setattr(server_start, "install_config", install)
    federation = new_federation(tmp_path / "federation")
    federation.state.mkdir(exist_ok=True)
    Server(federation, lambda event, facts: None)
    port = federation.config.port
    listening = [line.strip() for line in written[0].splitlines() if f":{port} ssl" in line]
    assert listening == [f"listen {address}:{port} ssl;" for address in addresses]
