"""The supervisor's line to its own SuperLink: who may connect, which run is carried out.

Flower's Control API, over TLS on loopback. A SuperLink keeps its state in memory: after its death the nodes are
registered anew and the run is started anew, under our own run id, from its checkpoint.

The application that Flower insists on shipping with a run is a stub of a few lines. The server executes its installed
`server.app`; sites execute theirs and never unpack what is shipped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from flwr.app.user_config import UserConfig
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from client.certificates import load_node_key

_SERVER_APP = b'''"""What Flower ships to start a run; the application itself is the one installed at the server."""

from flwr.serverapp import ServerApp

from server.app import main

app = ServerApp()
app.main()(main)
'''
_CLIENT_APP = b'''"""Sites execute the application that they have installed and approved, never this file."""

from flwr.clientapp import ClientApp

app = ClientApp()
'''
_PROJECT = """\
[project]
name = "medsegfed"
version = "{version}"
description = "Starts a run; both ends execute what they have installed."
license = {{file = "LICENSE"}}
dependencies = ["flwr>={flwr}"]

[tool.flwr.app]
publisher = "medsegfed"
fab-format-version = 1
flwr-version-target = "{flwr}"
fab-include = ["medsegfed_run/*.py", "LICENSE"]

[tool.flwr.app.components]
serverapp = "medsegfed_run.server_app:app"
clientapp = "medsegfed_run.client_app:app"

[tool.flwr.app.config]
run-folder = ""
"""


@dataclass(frozen=True)
class FlowerRun:
    """How Flower's own run stands; its id changes with every new start and means nothing to us."""

    id: int
    status: str  # pending, starting, running or finished
    detail: str  # of a finished one: completed, stopped or failed, and why


@cache
def stub() -> bytes:
    """The bundle that is shipped: the same bytes for the same version."""
    project = _PROJECT.format(version=version("medsegfed"), flwr=version("flwr"))
    files = {
        "pyproject.toml": project.encode(),
        "LICENSE": b"Apache-2.0\n",
        "medsegfed_run/__init__.py": b"",
        "medsegfed_run/server_app.py": _SERVER_APP,
        "medsegfed_run/client_app.py": _CLIENT_APP,
    }
    return build_fab_from_files(files)[0]


class Control:
    """A connection to the Control API of one SuperLink. Calls raise httpx.HTTPError when it is not there."""

    def __init__(self, address: str, ca_file: Path) -> None:
        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=ca_file.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def register(self, wanted: dict[str, str]) -> tuple[list[str], list[str]]:
        """Make the SuperLink know exactly the nodes `wanted` (site -> OpenSSH public key).

        Returns:
            Sites that were added, and sites that were removed.
        """
        keys = {site: public_key_to_bytes(load_node_key(line)) for site, line in wanted.items()}
        known = {
            node.public_key: node
            for node in self._client.ListNodes(ListNodesRequest()).nodes_info
            if node.status != "unregistered"
        }
        added, removed = [], []
        for key, node in known.items():
            if key not in keys.values():
                self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
                removed.append(node.name)
        for site, key in keys.items():
            if key not in known:
                self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=site))
                added.append(site)
        return added, removed

    def start(self, run_folder: Path) -> int:
        """Start the run of a folder; returns Flower's id of it."""
        bundle = stub()
        config: UserConfig = {"run-folder": str(run_folder.resolve())}
        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})),
            override_config=user_config_to_proto(config),
        )
        return int(self._client.StartRun(request).run_id)

    def run(self, run_id: int) -> FlowerRun | None:
        """How a run stands; None when this SuperLink does not know it (it was started anew)."""
        found = self._client.ListRuns(ListRunsRequest()).run_dict.get(run_id)  # the newest 20; one is carried out
        if found is None:
            return None
        status = found.status
        return FlowerRun(run_id, status.status, f"{status.sub_status} {status.details}".strip())

    def stop(self, run_id: int) -> None:
        """End Flower's run at once."""
        self._client.StopRun(StopRunRequest(run_id=run_id))
