"""A plan small enough for seconds, packed from the phantoms of the tiny world."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.real.pack import pack
from benchmarks.real.plan import Plan, Task
from medsegdiff.config import TrainingConfig


@pytest.fixture(scope="session")
def small_plan() -> Plan:
    """One dataset at 16 px, two sites left out in turn, 3 steps."""
    training = TrainingConfig(batch_size=2, foreground_fraction=0.5)
    task = Task("source", 16, 3, training, leave_out=("alder", "elm"))
    samplings = ((1, 1), (2, 3))
    return Plan("small", "a test", "tiny", (task,), 32, 64, True, samplings, ema_decay=0.5, test_slices=8)


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory, tiny_source: Path, small_plan: Plan) -> Path:
    """The packed cache of that plan."""
    out = tmp_path_factory.mktemp("packed") / "cache.safetensors"
    pack(small_plan, tiny_source.parent, out)
    return out
