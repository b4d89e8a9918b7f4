"""A whole federation on one machine, of real processes over real TLS: `make federation`.

A server and a site for each virtual hospital of a recipe go through all that a real federation goes through - init,
join, admit, kit, start, run, approve - as the commands that people type. The same world is then simulated with the same
seed: the federated weights must be equal bit for bit, and the scores with them.

    python -m deploy.rehearsal [RECIPE] [--out DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deploy.child import guarded
from deploy.processes import LOOPBACK, free_ports
from deploy.runs import wanted
from medsegdiff.errors import EXIT_CODE, UserError
from medsegdiff.files import write_atomic
from medsegdiff.strict import dump_yaml, plain
from medsegdiff.weights import hash_weights, load_model
from server.journal import Event, read_events
from server.rounds import ENDED, run_state
from simulations.display import make_console
from simulations.recipe import Recipe, read_recipe
from simulations.simulate import simulate, write_sites

Step = Callable[[str], None]


class Rehearsal:
    """One federation in one folder: `server/`, and a folder per site in `sites/`.

    Args:
        folder: must not exist.
        hosts: by which the sites reach the server.
        enter: what stands before a command that runs at the server or at a site, such as `ip netns exec NAME`.
    """

    def __init__(
        self,
        folder: Path,
        hosts: Sequence[str] = (LOOPBACK,),
        enter: Callable[[str], tuple[str, ...]] = lambda _: (),
        environment: Callable[[str], Mapping[str, str]] = lambda _: {},
    ) -> None:
        self.folder = folder.resolve()
        self.server = self.folder / "server"
        self.sites: dict[str, Path] = {}
        self.hosts, self.enter, self.environment = hosts, enter, environment
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def command(self, place: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """One medsegfed command, typed at the server or at a site, to its end.

        Raises:
            UserError: it failed; with what it said.
        """
        done = subprocess.run(
            [*self.enter(place), *self._program(), *arguments],
            capture_output=True, text=True, check=False, cwd=self._place(place), env=self._env(place), timeout=300,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise UserError(f"{place}: medsegfed {' '.join(arguments)} failed: {done.stderr.strip() or done.stdout}")
        return done

    def prepare(self, recipe: Recipe, data: Path | None = None, port: int | None = None) -> None:
        """Make the hospitals, the federation, and every site's membership in it."""
        self.make_sites(recipe, data)
        self.make_federation(port)
        for site in self.sites:
            self.admit(site)

    def make_sites(self, recipe: Recipe, data: Path | None = None) -> None:
        """Make the hospitals."""
        self.folder.mkdir(parents=True)
        write_sites(recipe, data, self.folder / "sites", make_console())
        self.sites = {path.name: path for path in sorted((self.folder / "sites").iterdir())}

    def make_federation(self, port: int | None = None) -> None:
        """Make the federation, which has no members yet."""
        ports = free_ports(8)
        names = [word for host in self.hosts for word in ("--host", host)]
        self.command("", "init", "rehearsal", *names, "--port", str(port or ports[0]), "--folder", str(self.server))
        self.change(self.server / "federation.yaml", "internal_port: 18100", f"internal_port: {_run_of_ports()}")

    def admit(self, site: str, patients: int = 1000) -> None:
        """One site's way into the federation: keys and request there, admission here, kit there."""
        place = self.sites[site]
        with open(place / "site.yaml", "a", encoding="utf-8") as handle:
            handle.write("keys: keys\npolicy: {min_patients: 1}\n")
        self.command(site, "join", site, "--patients", str(patients))
        kit = self.server / "kits" / f"{site}.kit"
        self.command("server", "admit", str(place / f"{site}.request"), "--folder", str(self.server))
        shutil.copyfile(kit, place / kit.name)
        self.command(site, "join", "--kit", kit.name)

    @staticmethod
    def change(path: Path, old: str, new: str) -> None:
        """Edit a configuration as a person would."""
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{old!r} is not in {path}"
        write_atomic(path, text.replace(old, new).encode())

    def start(self, place: str) -> None:
        """Start the server or a site, and leave it running; it does not outlive this process, however that ends."""
        verb = ("server", "start", "--folder", str(self.server)) if place == "server" else ("site", "start")
        with open(self.folder / f"{place}.log", "ab") as log:
            self._started[place] = subprocess.Popen(
                [*guarded("exec", str(os.getpid())), *self.enter(place), *self._program(), *verb],
                stdout=log, stderr=log, cwd=self._place(place), env=self._env(place), start_new_session=True,
            )  # fmt: skip

    def stop(self, place: str, number: int = signal.SIGTERM) -> int:
        """End what was started, and wait for it; returns its exit code."""
        process = self._started.pop(place)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        try:
            return process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait(10)

    @contextlib.contextmanager
    def running(self, places: Sequence[str] | None = None) -> Iterator[None]:
        """Server and sites running; all are ended at the end, whatever happens."""
        try:
            for place in places if places is not None else ("server", *self.sites):
                self.start(place)
            yield
        finally:
            for place in reversed(list(self._started)):
                self.stop(place)

    def run_file(
        self, recipe: Recipe, name: str | None = None, sites: Sequence[str] | None = None, **changes: Any
    ) -> Path:
        """RUN.yaml for the recipe's run, as a coordinator would write it.

        Args:
            name: in place of the recipe's.
            sites: who takes part; default: all admitted sites.
            changes: of the recipe's `run` section.
        """
        name = name or recipe.name
        dataset = next(iter(self.sites.values())) / "data" / "dataset.yaml"  # with the recipe's targets
        asked = {"name": name, "seed": recipe.seed, "dataset": str(dataset), "run": plain(recipe.run) | changes}
        if sites is not None:
            asked["sites"] = list(sites)
        path = self.folder / f"{name}.run.yaml"
        write_atomic(path, dump_yaml(asked).encode())
        return path

    def begin(self, run_file: Path) -> str:
        """Ask for the run at the server; returns its id."""
        said = self.command("server", "run", str(run_file), "--folder", str(self.server), "--detach").stdout
        return said.split()[1].rstrip(":")

    def events(self, run: str) -> list[Event]:
        """The journal of a run, by its folder's name."""
        return read_events(self.server / "runs" / run / "journal.jsonl")

    def wait(self, run: str, true: Callable[[list[Event]], bool], seconds: float, what: str) -> list[Event]:
        """Wait until something is true of a run's journal.

        Raises:
            UserError: it was not within so many seconds, or the run ended first.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            going_on = wanted(self.server / "runs" / run)
            events = self.events(run)
            if true(events):
                return events
            if not going_on:
                raise UserError(f"{what}: the run is {run_state(events)}: {events[-1]}")
            time.sleep(0.5)
        raise UserError(f"{what}: not within {seconds:.0f} s; see the logs in {self.folder}")

    def approve(self, run_id: str, sites: Sequence[str] | None = None) -> None:
        """Every site's data officer, each as soon as the run has asked there."""
        chosen = sites if sites is not None else tuple(self.sites)
        with ThreadPoolExecutor(len(chosen)) as officers:
            list(officers.map(lambda site: self._approve(site, run_id), chosen))

    def _approve(self, site: str, run_id: str) -> None:
        def asked(events: list[Event]) -> bool:
            return any(event["event"] in ("refused", "site") and event.get("site") == site for event in events)

        self.wait(run_id.rpartition("-")[0], asked, 180, f"{site} was not asked")
        self.command(site, "approve", run_id, "--yes")

    def _place(self, place: str) -> Path:
        return self.sites.get(place, self.folder)

    def _env(self, place: str) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("MEDSEGFED_")}
        return env | {"PYTHONSAFEPATH": "1"} | dict(self.environment(place))  # as an installed command: not from here

    @staticmethod
    def _program() -> tuple[str, ...]:
        return sys.executable, "-m", "deploy.cli"


def _run_of_ports() -> int:
    """The first of a row of free loopback ports."""
    for _ in range(100):
        (first,) = free_ports(1)
        if first < 65_000 and _all_free(range(first, first + 8)):
            return first
    raise UserError("no row of free ports was found on this machine; end some programs and try again.")


def _all_free(ports: Sequence[int]) -> bool:
    import socket

    for port in ports:
        with socket.socket() as trial:
            try:
                trial.bind((LOOPBACK, port))
            except OSError:
                return False
    return True


def rehearse(recipe: Recipe, recipe_path: Path, out: Path, data: Path | None, say: Step) -> bool:
    """The rehearsal of `make federation`; whether real and simulated federation agree."""
    began = time.monotonic()

    def step(text: str) -> None:
        say(f"{time.monotonic() - began:5.0f} s  {text}")

    stage = Rehearsal(out / "federation")
    stage.prepare(recipe, data)
    step(f"federation made, {len(stage.sites)} hospitals joined: {', '.join(stage.sites)}")
    with stage.running():
        run_id = stage.begin(stage.run_file(recipe))
        step(f"server and sites started, run {run_id} asked for")
        stage.approve(run_id)
        step("every site refused it, showed it to its data officer, and approved it")
        last = 0
        while run_state(events := stage.events(recipe.name)) not in ENDED:
            for event in events[last:]:
                if event["event"] == "round" and event["round"]:
                    step(f"round {event['round']} of {recipe.run.rounds}: {', '.join(event['accepted'])}")
            last = len(events)
            if time.monotonic() - began > 900:
                raise UserError(f"the run has not ended after 15 minutes; see the logs in {stage.folder}")
            time.sleep(0.5)
        if run_state(events) != "finished":
            raise UserError(f"the run is {run_state(events)}: {events[-1]}")
        report = json.loads(
            stage.command("server", "report", recipe.name, "--json", "--folder", str(stage.server)).stdout
        )
        for place, folder in (("server", stage.server), *stage.sites.items()):
            stage.command(place, "audit", "verify", "--folder", str(folder))
        step(f"finished; {1 + len(stage.sites)} audit logs verified")
    step("all processes ended; the same world is simulated")
    simulated = simulate(recipe_path, data, out / "simulated", "inline", False).report
    return _compare(stage.server / "runs" / recipe.name, out / "simulated", report, simulated, step)


def _compare(real: Path, simulated: Path, report: dict[str, Any], other: dict[str, Any], step: Step) -> bool:
    hashes = [
        hash_weights(load_model(folder / "model.safetensors").network.state_dict()) for folder in (real, simulated)
    ]
    dice = [
        {site: row["dice"]["federated"] for site, row in sorted(found["sites"].items())} for found in (report, other)
    ]
    step(f"weights of real and simulated federation: {hashes[0][:16]} and {hashes[1][:16]}")
    for site, value in dice[0].items():
        step(f"Dice at {site}: {value:.4f} and {dice[1][site]:.4f}")
    same = hashes[0] == hashes[1] and dice[0] == dice[1]
    step("equal, bit for bit" if same else "NOT EQUAL")
    return same


def main() -> int:
    """Rehearse; exit code 1 where the two differ."""
    parser = argparse.ArgumentParser(prog="python -m deploy.rehearsal", description=__doc__)
    parser.add_argument("recipe", nargs="?", type=Path, default=Path("rehearsal"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/federation"))
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_CODE))  # server and sites are ended on the way out
    try:
        if given.out.exists():
            raise UserError(f"{given.out}: is there already; remove it, or choose another folder with --out.")
        same = rehearse(
            read_recipe(given.recipe), given.recipe, given.out, given.data, lambda line: print(line, flush=True)
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
