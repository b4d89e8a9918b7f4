"""Disks that are full and a clock that is ten minutes wrong, in one run of a federation of three sites, all needed.

The server's runs and alder's outbox lie on file systems of 2 MB; elm's processes see a clock that the tests move.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from deploy.rehearsal import Rehearsal
from server.journal import Event
from tests.e2e.chaos.driver import Federation, left_behind

ROUNDS = 22  # more than pass while the tests break things
PATIENCE = 240.0  # seconds for a step that takes ten to ninety
DISK = "2m"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root"),
]


class SmallDisk:
    """A file system of 2 MB in place of a folder that is empty yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ballast = folder / ".ballast"
        folder.mkdir(mode=0o700, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0700", "small", str(folder)], check=True)

    def fill(self) -> None:
        """Leave no byte."""
        with contextlib.suppress(OSError), open(self.ballast, "ab", buffering=0) as handle:
            while True:
                handle.write(bytes(4096))

    def free(self) -> None:
        self.ballast.unlink()

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


class Clock:
    """The wall clock of a site's processes (clock/sitecustomize.py); deadlines are measured by another one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.move(0)

    def move(self, seconds: int) -> None:
        self.path.write_text(f"{seconds:+d}")

    def environment(self) -> Mapping[str, str]:
        own = Path(__file__).parent / "clock"
        paths = [str(own), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"MEDSEGFED_TEST_CLOCK": str(self.path), "PYTHONPATH": os.pathsep.join(paths)}


class Scene:
    """The federation, and what of it can be spoilt."""

    def __init__(self, federation: Federation, runs: SmallDisk, outbox: SmallDisk, clock: Clock) -> None:
        self.federation, self.runs, self.outbox, self.clock = federation, runs, outbox, clock

    def told(self, name: str) -> list[Event]:
        return [event for event in self.federation.events() if event["event"] == name]

    def wait(self, true: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < end, f"{what}: not within {PATIENCE:.0f} s"
            time.sleep(0.5)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("disks")
    clock = Clock(folder / "clock")
    federation = Federation.make(folder / "chaos", ROUNDS, seed=5)
    federation.stage = stage = Rehearsal(
        federation.folder / "federation", environment=lambda place: clock.environment() if place == "elm" else {}
    )
    stage.prepare(federation.recipe)
    with contextlib.ExitStack() as stack:
        disks = [SmallDisk(stage.server / "runs"), SmallDisk(stage.sites["alder"] / "outbox")]
        for disk in disks:
            stack.callback(disk.close)
        with stage.running():
            stage.approve(stage.begin(stage.run_file(federation.recipe, absence_seconds=5.0)))
            yield Scene(federation, *disks, clock)
        assert left_behind(federation.folder) == []


def test_a_full_disk_of_the_server_costs_time_alone(scene: Scene) -> None:
    """No round is committed that could not be written; with space the run goes on by itself."""
    federation = scene.federation
    federation.committed(2)
    scene.runs.fill()
    time.sleep(5.0)  # the round at hand may have been written before
    stuck = federation.last_round()
    time.sleep(15.0)
    assert federation.last_round() == stuck
    scene.runs.free()
    began = time.monotonic()
    federation.committed(stuck + 1, PATIENCE)
    print(f"the run went on {time.monotonic() - began:.0f} s after there was space")
    said = federation.stage.command("server", "status", "--folder", str(federation.stage.server)).stdout
    assert "No space left" in said or "taken up again" in said, said


def test_a_full_disk_of_a_site_lets_nothing_leave(scene: Scene) -> None:
    """An update that cannot be kept is not sent: the site says that it has a fault, and is asked again."""
    federation = scene.federation
    before = len([event for event in scene.told("refused") if event["code"] == "fault"])
    scene.outbox.fill()
    scene.wait(
        lambda: len([event for event in scene.told("refused") if event["code"] == "fault"]) > before, "alder's fault"
    )
    assert scene.told("refused")[-1]["site"] == "alder"
    stuck = federation.last_round()
    time.sleep(5.0)
    assert federation.last_round() == stuck
    scene.outbox.free()
    began = time.monotonic()
    federation.committed(stuck + 1, PATIENCE)
    print(f"alder answered {time.monotonic() - began:.0f} s after there was space")


def test_a_clock_that_is_ten_minutes_wrong_costs_time_alone(scene: Scene) -> None:
    """Flower turns elm's requests down; the run waits for it and says so; right again, elm comes back and counts."""
    federation = scene.federation
    paused = len(scene.told("paused"))
    scene.clock.move(600)
    scene.wait(lambda: len(scene.told("paused")) > paused, "the run waits")
    assert scene.told("paused")[-1]["absent"] == {"elm": "absent"}
    stuck = federation.last_round()
    doctor = federation.stage.command("elm", "doctor", "--json", check=False).stdout
    assert '"clock"' in doctor
    scene.clock.move(0)
    began = time.monotonic()
    federation.committed(stuck + 1, PATIENCE)
    print(f"elm was back {time.monotonic() - began:.0f} s after its clock was right")


def test_nothing_was_lost(scene: Scene) -> None:
    """Every round, every update once, no second training, the weights of a run that nobody disturbed."""
    scene.federation.finished()
    assert scene.federation.faults() == []
    assert scene.federation.same_weights()
