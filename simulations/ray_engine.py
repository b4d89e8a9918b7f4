"""Flower's own simulation engine: the same applications, each site's work in a Ray actor."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp


def run_ray(server_app: ServerApp, client_app: ClientApp, sites: int, run_folder: Path, threads: int) -> None:
    """Run both applications on Ray, as many sites side by side as the machine's cores allow.

    Raises whatever the ServerApp raised.
    """
    from flwr.simulation import run_simulation

    os.environ["MEDSEGFED_RUN"] = str(run_folder.resolve())
    cores = os.cpu_count() or 1
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=sites,
        backend_config={
            "client_resources": {"num_cpus": min(threads, cores), "num_gpus": 0.0},
            "init_args": {"num_cpus": cores, "include_dashboard": False, "log_to_driver": False},
        },
    )
