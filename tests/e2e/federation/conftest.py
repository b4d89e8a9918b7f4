"""One federation of real processes that all tests of this folder share.

alder, birch    call the server directly; birch's certificates are short-lived
elm             reaches it through an HTTP CONNECT proxy alone
mallory         a member that keeps to no rule, played by the tests from outside
victim          a member of whom mallory knows all that there is to know, played by the tests, too
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from client.certificates import node_key_header
from deploy import guard
from deploy.admission import admit
from deploy.child import guarded
from deploy.federation import Federation, open_federation
from deploy.joining import install_kit, make_request
from deploy.rehearsal import Rehearsal
from deploy.supervisor import read_status
from server.journal import Event
from simulations.phantoms import PhantomConfig
from simulations.recipe import Recipe, read_recipe
from tests.e2e.federation.canaries import add_broken_cases, write_canaries
from tests.e2e.federation.handmade import Caller, HandmadeNode
from tests.e2e.federation.network import ADDRESSES, Loopback, placed, until

ROOT = Path(__file__).parents[3]
SITES = ("alder", "birch", "elm")
HANDMADE = ("mallory", "victim")
PATIENCE = 400.0  # seconds for a step that takes some; a machine that others use is ten times as slow
ROUNDS = 8  # of the first run: so many that it can be stopped before it ends
BIRCH_SECONDS = 900.0  # life of its first certificate: the site looks after its age every 45 seconds
STALL_SECONDS = 30.0  # that a body may make no progress, as deploy/gateway.py has it
RENEWED_SECONDS = 90.0  # life of every renewed certificate
ENROLLED = 100
QUICK = {"local_steps": 2}  # for runs whose scores nobody looks at

RECIPE = """\
# Training that scores well above zero on every processor (.45 with AVX2 and with SSE alone): scores that are all zero
# would be equal whatever was trained.
name: first
seed: 2
world:
  dataset: phantoms
  partition: {by: site}
  test_fraction: 0.3
run:
  model: {preset: tiny, image_size: 16, base_channels: 8, channel_multipliers: [1, 2], attention_levels: [1]}
  rounds: ROUNDS
  local_steps: 40
  threads: 1
  training: {batch_size: 8, learning_rate: 3.0e-3, foreground_fraction: 0.5}
  sampling: {steps: 4}
  evaluate_every: ROUNDS
  deadline_seconds: 600
arms: []
""".replace("ROUNDS", str(ROUNDS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these start real processes, share a slow fixture, and need patience on a busy machine."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for mark in (pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3000)):
                item.add_marker(mark)


@dataclass
class Scene:
    """The running federation."""

    stage: Rehearsal
    network: Loopback
    recipe: Recipe
    recipe_path: Path
    data: Path
    folder: Path
    nodes: dict[str, HandmadeNode] = field(default_factory=dict)
    program: dict[str, Path] = field(default_factory=dict)  # place -> tree whose program runs there; default: this one

    @property
    def federation(self) -> Federation:
        return open_federation(self.stage.server)

    @property
    def server(self) -> str:
        """host:port that sites call."""
        return self.federation.server

    def inside(self, place: str) -> Callable[[Callable[[], Any]], Any]:
        return lambda work: self.network.inside(place, work)

    def outside(self, work: Callable[[], Any]) -> Any:
        """Do something as anybody on the internet."""
        return self.network.inside("outside", work)

    def pid(self, child: str) -> int:
        """Of a part of the server."""
        status = read_status(self.stage.server / "state")
        assert status is not None, "the server does not run"
        return int(status["children"][child]["pid"])

    def resident(self) -> dict[str, float]:
        """MiB of memory that SuperLink and gateway hold, each with all of its processes."""
        return {
            name: guard.memory_of(guard.session_members(self.pid(name))) / 2**20 for name in ("superlink", "gateway")
        }

    def events(self, run: str) -> list[Event]:
        return self.stage.events(run)

    def wait(self, run: str, true: Callable[[list[Event]], bool], what: str, seconds: float = PATIENCE) -> list[Event]:
        return self.stage.wait(run, true, seconds, what)

    def approve_quietly(self, run_id: str, *sites: str) -> None:
        """Data officers who look at nothing: signed approvals of a run that the server has planned."""
        from client.application import application_hash
        from client.approvals import PendingRun, approve
        from client.keys import SiteKeys
        from medsegdiff.strict import read_config
        from server.config import RunPlan

        plan = read_config(self.stage.server / "runs" / run_id.rpartition("-")[0] / "run.yaml", RunPlan)
        assert plan.run_id == run_id
        for site in sites:
            folder = self.stage.sites[site]
            approve(
                folder,
                PendingRun(run_id, plan.task, "2020-01-01T00:00:00.000Z"),
                SiteKeys.load(folder / "keys"),
                application_hash(),
                "test",
            )

    def enrol(self, site: str, like: str, policy: str) -> Path:
        """A further hospital, with the data of another one, admitted without a command being typed."""
        folder = self.stage.sites[site] = self.stage.folder / "sites" / site
        source = self.stage.sites[like]
        shutil.copytree(source / "data", folder / "data")
        (folder / "site.yaml").write_text(f"name: {site}\ndata: data\nkeys: keys\npolicy: {policy}\n")
        request = make_request(folder, site, ENROLLED).request
        install_kit(folder, admit(self.federation, request))
        return folder

    def environment(self, place: str) -> dict[str, str]:
        """Of the processes that are started at a place."""
        own = {"PYTHONPATH": str(self.program.get(place, ROOT)), "OMP_NUM_THREADS": "1"}
        return own | self.network.environment(place)

    def enter(self, place: str) -> tuple[str, ...]:
        if not place:
            return ()
        return self.network.enter(place if place in ADDRESSES else "outside")


@pytest.fixture(scope="session")
def network() -> Iterator[Loopback]:
    """Namespaces where they may be made, else all on loopback."""
    with placed() as found:
        yield found


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory, network: Loopback) -> Iterator[Scene]:
    """A federation with five members, its server and three sites running."""
    folder = tmp_path_factory.mktemp("federation")
    data, recipe_path = folder / "source", folder / "first.yaml"
    write_canaries(PhantomConfig(sites=SITES, patients=4, slices=4), data)
    recipe_path.write_text(RECIPE)
    stage = Rehearsal(folder / "stage", hosts=(network.host,))
    scene = Scene(stage, network, read_recipe(recipe_path), recipe_path, data, folder)
    stage.enter, stage.environment = scene.enter, scene.environment
    stage.make_sites(scene.recipe, data)
    for site in SITES:
        add_broken_cases(stage.sites[site])
    stage.make_federation()
    config = stage.server / "federation.yaml"
    for site in SITES:
        _set_days(config, BIRCH_SECONDS / 86_400 if site == "birch" else 90)
        stage.admit(site, ENROLLED)
    _set_days(config, 90)
    for name in HANDMADE:
        scene.enrol(name, "alder", "{min_patients: 1, approval_required: false}")
    _set_days(config, RENEWED_SECONDS / 86_400)  # what the running server gives out
    network.start_proxy(folder, scene.federation.config.port)
    try:
        with stage.running(("server", *SITES)):
            until(lambda: _ready(stage.server), PATIENCE, "the server is ready")
            scene.nodes = {name: HandmadeNode(name, stage.sites[name], scene.inside("outside")) for name in HANDMADE}
            yield scene
            for node in scene.nodes.values():
                node.close()
    finally:
        left = _left(folder)
        for process in left:
            guard.send(process, 9)  # type: ignore[arg-type]
    assert not left, f"{len(left)} processes outlived the federation"


def _set_days(config: Path, days: float) -> None:
    import re

    text = config.read_text()
    config.write_text(re.sub(r"(?m)^site_days: \S+", f"site_days: {days!r}", text))


def _ready(server: Path) -> bool:
    status = read_status(server / "state")
    children = status["children"].values() if status else ()
    return bool(children) and all(child["healthy"] for child in children)


def _left(folder: Path) -> list[guard.Process]:
    """Processes that still work in a folder, once those that are ending had time to."""
    own = str(folder).encode()

    def ours() -> list[guard.Process]:
        found = []
        for process in guard.processes():
            try:
                command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            except OSError:
                continue
            if own in command and process.state != "Z":
                found.append(process)
        return found

    end = time.monotonic() + 15
    while (left := [process for process in ours() if not _is_proxy(process)]) and time.monotonic() < end:
        time.sleep(0.2)
    return left


def _is_proxy(process: guard.Process) -> bool:
    return b"tinyproxy" in Path(f"/proc/{process.pid}/cmdline").read_bytes()  # the network's; it ends with that


@dataclass
class FirstRun:
    """What was seen of the first run: asked for, refused, approved, stopped after a round, gone on with, finished."""

    id: str
    refused: list[Event]  # the journal when all had refused
    doctor: Any  # what doctor said at alder while the run waited
    status: Any  # `medsegfed status --json` at that moment
    stop_seconds: float  # from the command to the journal's word
    stopped: list[Event]  # the journal then
    kept: Path  # a copy of alder's outbox then
    events: list[Event]  # the journal at its end


@pytest.fixture(scope="session")
def first_run(scene: Scene, simulating: subprocess.Popen[bytes], dawdlers: dict[str, float]) -> FirstRun:
    """The run that all three sites take part in."""
    stage = scene.stage
    run_file = stage.run_file(scene.recipe, sites=SITES)
    run_id = stage.begin(run_file)

    def all_refused(events: list[Event]) -> bool:
        return {e["site"] for e in events if e["event"] == "refused"} >= set(SITES)

    refused = scene.wait("first", all_refused, "every site refuses what nobody approved")
    status = stage.command("server", "status", "--json", "--folder", str(stage.server))
    with ThreadPoolExecutor(1) as other:
        looking = other.submit(stage.command, "alder", "doctor", "--json", check=False)
        stage.approve(run_id, SITES)
        doctor = looking.result()
    scene.wait("first", lambda events: _committed(events) >= 1, "the first round", 2 * PATIENCE)
    stage.command("server", "stop", "--folder", str(stage.server))
    asked = time.monotonic()
    stopped = scene.wait("first", lambda events: any(e["event"] == "stopped" for e in events), "the run stops")
    seconds = time.monotonic() - asked
    kept = scene.folder / "outbox"
    shutil.copytree(stage.sites["alder"] / "outbox", kept)
    assert stage.begin(run_file) == run_id
    events = scene.wait("first", lambda found: found[-1]["event"] == "finished", "the run finishes", 2 * PATIENCE)
    return FirstRun(
        run_id, refused, json.loads(doctor.stdout), json.loads(status.stdout), seconds, stopped, kept, events
    )


def _committed(events: list[Event]) -> int:
    return max((e["round"] for e in events if e["event"] == "round"), default=0)


@pytest.fixture(scope="session")
def report(scene: Scene, first_run: FirstRun) -> Any:
    """report.json of the first run, as its command prints it; report.html lies in the run's folder then, too."""
    said = scene.stage.command("server", "report", "first", "--json", "--folder", str(scene.stage.server))
    return json.loads(said.stdout)


@pytest.fixture(scope="session")
def simulating(scene: Scene) -> Iterator[subprocess.Popen[bytes]]:
    """The first run's world, simulated in one process while the real run goes on."""
    command = [sys.executable, "-m", "deploy.cli", "simulate", str(scene.recipe_path), "--data", str(scene.data)]
    env = {name: value for name, value in os.environ.items() if name not in ("MEDSEGFED_SITE", "MEDSEGFED_WORLD")}
    with open(scene.folder / "simulated.log", "wb") as log:
        process = subprocess.Popen(
            [*guarded("exec", str(os.getpid())), *command, "--out", str(scene.folder / "simulated")],
            stdout=log, stderr=log, env=env | scene.environment(""), cwd=scene.folder,
        )  # fmt: skip
    yield process
    process.kill()
    process.wait(10)


@pytest.fixture(scope="session")
def dawdlers(scene: Scene) -> dict[str, float]:
    """Senders that take their time, begun early: how long each was listened to."""
    header = node_key_header(scene.nodes["mallory"].keys.node_public_ssh)
    kinds: dict[str, tuple[str, bytes, float]] = {  # what is sent at once, what is sent then, and how often
        "header": ("POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nX-A: ", b"a", 1.0),
        "body": (f"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nflwr-public-key: {header}\r\n"
                 "Content-Length: 1000\r\n\r\nx", b"", STALL_SECONDS * 10),
        "handshake": ("", b"", STALL_SECONDS * 10),
    }  # fmt: skip
    told: dict[str, float] = {}
    threads = [
        threading.Thread(target=_dawdle, args=(scene, kind, *how, told), daemon=True) for kind, how in kinds.items()
    ]
    for thread in threads:
        thread.start()
    return told


def _dawdle(scene: Scene, kind: str, begin: str, drop: bytes, pause: float, told: dict[str, float]) -> None:
    caller = Caller(scene.server, scene.federation.ca_crt, scene.nodes["mallory"].keys.tls_file, scene.outside)
    connection = caller.dial() if kind == "handshake" else caller.connect()
    begun = time.monotonic()
    with contextlib.suppress(OSError), connection:
        connection.sendall(begin.encode())
        connection.settimeout(min(pause, STALL_SECONDS * 3))
        while time.monotonic() - begun < STALL_SECONDS * 3:
            with contextlib.suppress(TimeoutError):
                if not connection.recv(1000):
                    break
            connection.sendall(drop)
    told[kind] = time.monotonic() - begun
