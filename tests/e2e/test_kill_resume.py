"""kill -9 at any moment: what goes on with --resume ends with the bytes of a run that was never killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 500.0  # for one session to reach its moment; a loaded machine takes long to import torch

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]


def start(recipe: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "deploy.cli", "simulate", str(recipe), "--out", str(out), *options]
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def finish(recipe: Path, out: Path, *options: str) -> None:
    process = start(recipe, out, *options)
    assert process.wait(SECONDS) == 0, out.with_suffix(".log").read_text()[-2000:]


def fingerprint(folder: Path) -> frozenset[tuple[str, int, int]]:
    """What lies in the run folder: every change of it is a moment at which a kill may hurt."""
    found = []
    for path in folder.rglob("*"):
        try:
            state = path.stat()
        except FileNotFoundError:
            continue  # renamed or deleted while we looked
        found.append((str(path), state.st_size, state.st_mtime_ns))
    return frozenset(found)


def kill_when(process: subprocess.Popen[bytes], ready: Callable[[], bool], pause: float) -> bool:
    """Kill the process as soon as `ready`, plus a pause; False if it ended before."""
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and not ready():
        assert time.monotonic() < deadline, "the session did not get going"
        time.sleep(0.001)
    time.sleep(pause)
    if process.poll() is not None:
        return False
    os.kill(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def after_changes(folder: Path, number: int) -> Callable[[], bool]:
    """True once the folder has changed `number` times since now."""
    seen = {fingerprint(folder)}

    def ready() -> bool:
        seen.add(fingerprint(folder))
        return len(seen) > number

    return ready


def models(folder: Path) -> dict[str, bytes]:
    paths = [folder / "model.safetensors", *(folder / "arms").glob("*.safetensors")]
    return {path.name: path.read_bytes() for path in paths if ".state." not in path.name}


def comparable(folder: Path) -> dict[str, object]:
    report = json.loads((folder / "report.json").read_text())
    return {key: value for key, value in report.items() if key != "seconds"}


@pytest.mark.parametrize("seed", [0])
def test_a_killed_simulation_ends_with_the_same_bytes(tiny_recipe, tmp_path, seed) -> None:
    """Killed at seeded moments - world, rounds, each kind of arm, scoring - with a torn journal once in between."""
    recipe = tiny_recipe(("rounds: 2", "rounds: 4"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(recipe, whole)
    generator = random.Random(seed)
    arms, journal = killed / "arms", killed / "journal.jsonl"
    moments: list[Callable[[], Callable[[], bool]]] = [
        lambda: after_changes(killed, generator.randint(1, 12)),  # phantoms and world
        lambda: after_changes(killed, generator.randint(3, 9)),
        lambda: (killed / "checkpoints" / f"round-{generator.randint(1, 3):06d}.safetensors").exists,
        lambda: lambda: any(arms.glob("local-*.state.safetensors")),
        lambda: (arms / "pooled.state.safetensors").exists,
        lambda: (arms / "scores.json").exists,
    ]
    kills = []
    for number, moment in enumerate(moments):
        options = ("--resume",) if (killed / "recipe.yaml").exists() else ()
        process = start(recipe, killed, *options)
        kills.append(kill_when(process, moment(), generator.uniform(0.0, 0.02)))
        if number == 2:
            assert not (killed / "model.safetensors").exists()
            with open(journal, "ab") as handle:
                handle.write(b'{"event": "round", "ti')  # as a kill in the middle of a line leaves it
    assert sum(kills) >= 5, f"only {kills} of the kills hit; see {killed.with_suffix('.log').read_text()[-500:]}"
    finish(recipe, killed, "--resume")
    assert models(killed) == models(whole)
    assert comparable(killed) == comparable(whole)
    lines = journal.read_text(encoding="utf-8").splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert "Traceback" not in killed.with_suffix(".log").read_text()
