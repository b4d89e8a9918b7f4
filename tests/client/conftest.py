"""Fixtures of the hospital's side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from client.contract import TrainTask
from tests.hospital import Hospital, make_hospital


@pytest.fixture
def hospital(
    tmp_path: Path, tiny_world: Path, tiny_task: TrainTask, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Hospital]:
    """Call with site.yaml's policy, and more lines of it; the site's data are alder's of the tiny world."""

    def make(policy: str = "{min_patients: 1}", more: str = "", task: TrainTask = tiny_task) -> Hospital:
        monkeypatch.setenv("MEDSEGFED_SITE", str(tmp_path / "alder" / "site.yaml"))
        return make_hospital(tmp_path / "alder", tiny_world, task, policy, more)

    return make
