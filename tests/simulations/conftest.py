"""Federations of the tiny world whose sites can be watched, spoiled and killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from server.app import app as server_app
from simulations.inline import run_inline
from tests.watched_sites import Sites


@pytest.fixture
def carry_out(make_run, untouched_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sites]:
    """Call with a name, what the task changes, and what is to go wrong; each run has a world of its own."""
    monkeypatch.setenv("MEDSEGFED_WORLD", "")

    def run(name: str, task: dict[str, object], sites: Sites | None = None, **changes: object) -> Sites:
        folder = tmp_path / "runs" / name
        if not folder.exists():
            made = make_run(name, task={"rounds": 3, **task}, **changes)
            shutil.copytree(untouched_world, tmp_path / f"world-{name}", symlinks=True)
            shutil.copytree(made, folder)
        os.environ["MEDSEGFED_WORLD"] = str((tmp_path / f"world-{name}").resolve())
        sites = sites or Sites()
        run_inline(server_app, sites, 3, folder)  # type: ignore[arg-type]  # called like a ClientApp
        return sites

    return run
