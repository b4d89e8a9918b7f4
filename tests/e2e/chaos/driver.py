"""kill -9 at moments drawn from a seed, all over a federation of real processes; then: was anything lost?

    python -m tests.e2e.chaos.driver --kills 100 --seed 7 --out /tmp/chaos

Every kill hits one process or two, of all kinds in turn: of the server, of a site, a supervisor (started again as
systemd would), a whole machine. The run has to end with the weights of a simulation that nobody disturbed, every
update counted once and no site trained twice for a round. The same seed kills the same processes in the same rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy import guard
from deploy.rehearsal import Rehearsal
from deploy.supervisor import read_status
from medsegdiff.chained_log import audit_lines, verify_log
from medsegdiff.errors import EXIT_CODE, UserError
from medsegdiff.weights import hash_weights, load_model
from server.journal import Event
from simulations.recipe import Recipe, read_recipe
from simulations.simulate import simulate

SITES = ("alder", "birch", "elm")
SERVER_KINDS = ("serverapp", "superexec", "superlink", "gateway", "worker", "supervisor", "machine", "disk")
SITE_KINDS = ("supernode", "runner", "supervisor", "machine")
WHOLE = ("supervisor", "machine", "disk")  # are started again by the driver, as systemd would
PACE = 2  # rounds between kills
STALL_SECONDS = 300.0  # longest wait for a round; on two busy cores everything takes several times as long

RECIPE = """\
name: chaos
seed: {seed}
world:
  phantoms: {{sites: [alder, birch, elm], patients: 3, slices: 4}}
  partition: {{by: site}}
  test_fraction: 0.3
run:
  model: {{preset: tiny, image_size: 16, base_channels: 8, channel_multipliers: [1], attention_levels: [],
    fusion_levels: []}}
  rounds: {rounds}
  local_steps: 2
  threads: 1
  training: {{batch_size: 2}}
  sampling: {{steps: 1}}
  evaluate_every: {rounds}
  deadline_seconds: 3600
  absence_seconds: 3600
arms: []
"""


@dataclass(frozen=True)
class Target:
    """One process, or all of a machine; `disk`: all of the server, and its newest checkpoint is torn besides."""

    place: str  # "server" or a site
    kind: str

    def __str__(self) -> str:
        return f"{self.kind} of {self.place}"


@dataclass(frozen=True)
class Kill:
    """What dies together, and when."""

    round: int  # after the commit of this round
    delay: float  # seconds after that commit
    targets: tuple[Target, ...]
    back: float  # seconds until a supervisor or machine is started again


def plan_kills(number: int, seed: int) -> list[Kill]:
    """Kills of all kinds in turn, a third of them in pairs."""
    chance = random.Random(seed)
    kinds = [("server", kind) for kind in SERVER_KINDS] + [("site", kind) for kind in SITE_KINDS]
    waiting: list[Target] = []

    def draw() -> Target:
        if not waiting:
            waiting.extend(Target(p if p == "server" else chance.choice(SITES), k) for p, k in kinds)
            chance.shuffle(waiting)
        return waiting.pop()

    kills = []
    for index in range(number):
        targets = (draw(), draw()) if chance.random() < 1 / 3 else (draw(),)
        kills.append(Kill(1 + PACE * index, chance.uniform(0.0, 6.0), targets, chance.uniform(0.0, 6.0)))
    return kills


class Federation:
    """A federation of three sites in `folder`, and the means to hurt it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.recipe_path = self.folder / "chaos.yaml"
        self.recipe: Recipe = read_recipe(self.recipe_path)
        self.rounds = self.recipe.run.rounds
        self.stage = Rehearsal(self.folder / "federation")
        if (self.stage.folder / "sites").exists():  # an earlier one, to look into
            self.stage.sites = {path.name: path for path in sorted((self.stage.folder / "sites").iterdir())}

    @classmethod
    def make(cls, folder: Path, rounds: int, seed: int) -> Federation:
        """A new one."""
        folder.mkdir(parents=True)
        (folder / "chaos.yaml").write_text(RECIPE.format(rounds=rounds, seed=seed), encoding="utf-8")
        return cls(folder)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Server and sites up, the run asked for and approved."""
        self.stage.prepare(self.recipe)
        for site in self.stage.sites:
            self.stage.change(
                self.stage.sites[site] / "site.yaml", "{min_patients: 1}", "{min_patients: 1, max_rounds: 10000}"
            )
        with self.stage.running():
            self.stage.approve(self.stage.begin(self.stage.run_file(self.recipe)))
            yield

    def events(self) -> list[Event]:
        return self.stage.events("chaos")

    def committed(self, round_: int, seconds: float = STALL_SECONDS) -> Event:
        """Wait for a round's commit."""
        found = self.stage.wait(
            "chaos", lambda events: any(_is(event, round_) for event in events), seconds, f"round {round_}"
        )
        return next(event for event in found if _is(event, round_))

    def last_round(self) -> int:
        return max((event["round"] for event in self.events() if event["event"] == "round"), default=0)

    def finished(self) -> None:
        """Wait for the run's end."""
        self.stage.wait("chaos", lambda events: events[-1]["event"] == "finished", STALL_SECONDS, "the end")

    # --- who dies -----------------------------------------------------------------------------------------------------

    def victims(self, target: Target) -> list[guard.Process]:
        """The living processes that a target means; none while it is being started anew."""
        state = (self.stage.server if target.place == "server" else self.stage.sites[target.place]) / "state"
        status = read_status(state)
        if status is None:
            return []
        found = guard.processes()
        if target.kind in WHOLE:
            own = [process for process in found if process.pid == status["pid"]]
            return own if target.kind == "supervisor" else own + _descendants(status["pid"], found)
        parent = {"serverapp": "superexec", "worker": "gateway"}.get(target.kind, target.kind)
        pid = status["children"][parent]["pid"]
        if pid is None:
            return []
        if target.kind == "worker":
            return [process for process in found if process.parent == pid]
        if target.kind == "serverapp":
            return [process for process in _descendants(pid, found) if b"flwr-serverapp" in _command(process.pid)]
        return [process for process in found if process.pid == pid]

    def kill(self, targets: Sequence[Target], back: float) -> list[str]:
        """kill -9 to all of them at once; supervisors and machines are started again after `back` seconds.

        Returns:
            Whom it met: a process may be dead already.
        """
        met = {target: self.victims(target) for target in targets}
        for process in (process for found in met.values() for process in found):
            guard.send(process, signal.SIGKILL)
        again = {target.place for target, found in met.items() if found and target.kind in WHOLE}
        if again:
            time.sleep(back)
        for place in again:
            self.stage.stop(place, signal.SIGKILL)
        if any(target.kind == "disk" for target, found in met.items() if found):
            newest = max((self.stage.server / "runs" / "chaos" / "checkpoints").glob("round-*.safetensors"))
            os.truncate(newest, newest.stat().st_size - 1)
        for place in again:
            self.stage.start(place)
        return [str(target) for target, found in met.items() if found]

    # --- was anything lost? -------------------------------------------------------------------------------------------

    def faults(self) -> list[str]:
        """What is not as it has to be after the run's end; nothing, if nothing was lost."""
        said: list[str] = []
        rounds = [event for event in self.events() if event["event"] == "round"]
        hashes: dict[int, str] = {}
        for event in rounds:  # one whose checkpoint was torn comes again, and out the same
            number, model = event["round"], event["model_hash"]
            if number > len(hashes) or hashes.setdefault(number, model) != model:
                said.append(f"round {number} came after {len(hashes) - 1}, or is not what was committed before")
        if len(hashes) != self.rounds + 1:
            said.append(f"the journal knows {len(hashes) - 1} rounds")
        for event in rounds[1:]:
            if sorted(event["accepted"]) != sorted(SITES) or event["absent"] or event["rejected"]:
                said.append(f"round {event['round']} was committed with {sorted(event['accepted'])}")
        counted = self._counted(said)
        for site, folder in self.stage.sites.items():
            self._check_site(site, folder, counted, said)
        for log in (self.stage.server / "audit.jsonl", *(f / "audit.jsonl" for f in self.stage.sites.values())):
            try:
                verify_log(log)
            except UserError as error:
                said.append(str(error))
        return said

    def same_weights(self) -> bool:
        """Whether the run came to the weights of a simulation that nobody disturbed."""
        simulated = self.folder / "simulated"
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            simulate(self.recipe_path, None, simulated, "inline", False)
        return _weights(self.stage.server / "runs" / "chaos") == _weights(simulated)

    def _counted(self, said: list[str]) -> dict[tuple[int, str], str]:
        """(round, site) -> the update that the server's audit log has as accepted."""
        deltas: dict[tuple[int, str], set[str]] = defaultdict(set)
        committed: dict[int, set[str]] = defaultdict(set)
        for line in audit_lines(self.stage.server / "audit.jsonl"):
            if line["event"] == "update" and line["decision"] == "accepted":
                deltas[line["round"], line["site"]].add(line["delta"])
            elif line["event"] == "committed":
                committed[line["round"]].add(line["model"])
        wrong = {number: committed[number] for number in range(1, self.rounds + 1) if len(committed[number]) != 1}
        if wrong:
            said.append(f"models that the server's audit log has as committed: {wrong}")
        for (round_, site), found in deltas.items():
            if len(found) != 1:
                said.append(f"round {round_}: {len(found)} different updates of {site} were accepted")
        return {key: min(found) for key, found in deltas.items()}

    def _check_site(self, site: str, folder: Path, counted: dict[tuple[int, str], str], said: list[str]) -> None:
        """The site's own log: one training a round, and the update that the server counted."""
        trained: dict[int, list[str]] = defaultdict(list)
        repeated: dict[int, set[str]] = defaultdict(set)
        for line in audit_lines(folder / "audit.jsonl"):
            if line["event"] == "update":
                trained[line["round"]].append(line["delta"])
            elif line["event"] == "repeated":
                repeated[line["round"]].add(line["delta"])
        for round_ in range(1, self.rounds + 1):
            # A kill between outbox and audit log leaves an update that its log knows by its repetition alone.
            known = set(trained[round_]) | repeated[round_]
            expected = counted.get((round_, site))
            if len(trained[round_]) > 1 or known != {expected}:
                said.append(f"round {round_}: {site} trained {len(trained[round_])} times; {known} for {expected}")


def _is(event: Event, round_: int) -> bool:
    return bool(event["event"] == "round" and event["round"] >= round_)


def _weights(folder: Path) -> str:
    return hash_weights(load_model(folder / "model.safetensors").network.state_dict())


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _descendants(pid: int, found: Sequence[guard.Process]) -> list[guard.Process]:
    children = [process for process in found if process.parent == pid]
    return children + [one for child in children for one in _descendants(child.pid, found)]


def left_behind(folder: Path) -> list[str]:
    """Command lines of living processes that belong to a federation in `folder`."""
    mark, found = os.fsencode(folder), []
    for process in guard.processes():
        if process.pid == os.getpid() or process.state == "Z":
            continue
        with contextlib.suppress(OSError):
            place = Path(f"/proc/{process.pid}")
            if mark in (place / "environ").read_bytes() or mark in os.fsencode((place / "cwd").readlink()):
                found.append(f"{process.pid} {_command(process.pid).replace(bytes(1), b' ').decode(errors='replace')}")
    return found


def stall(events: Sequence[Event], moment: float) -> float:
    """The longest time without a commit around a kill: from the last one before it to the second one after it."""
    times = [float(event["time"]) for event in events if event["event"] == "round"]
    after = [time for time in times if time > moment][:2]
    before = [time for time in times if time <= moment][-1:]
    return max((b - a for a, b in zip([*before, *after], after, strict=False)), default=0.0)


def chaos(folder: Path, kills: Sequence[Kill], seed: int, say: bool = True) -> list[str]:
    """One run with all these kills; returns what was lost."""
    federation = Federation.make(folder, 2 + PACE * len(kills), seed)
    moments: list[tuple[float, list[str]]] = []
    prefix: list[Event] = []
    said: list[str] = []
    with federation.running():
        for number, kill in enumerate(kills, start=1):
            federation.committed(kill.round)
            time.sleep(kill.delay)
            events = federation.events()
            if events[: len(prefix)] != prefix:
                said.append(f"kill {number}: the journal does not begin with what stood in it at the kill before")
            prefix = events
            moments.append((time.time(), federation.kill(kill.targets, kill.back)))
            if say:
                last = federation.last_round()
                print(f"kill {number}: after round {last}: {', '.join(moments[-1][1]) or 'met nobody'}", flush=True)
        federation.finished()
    events = federation.events()
    left = left_behind(federation.folder)
    if left:
        said.append(f"left behind: {left}")
    said += federation.faults()
    if not federation.same_weights():
        said.append("the weights are not those of an undisturbed run")
    if say:
        rounds = [float(event["time"]) for event in events if event["event"] == "round"]
        usual = statistics.median(b - a for a, b in itertools.pairwise(rounds))
        print(f"{len(rounds) - 1} rounds, usually {usual:.1f} s each")
        for moment, met in moments:
            print(f"{stall(events, moment):6.1f} s  {', '.join(met)}")
    return said


def read_pairs(words: Sequence[str]) -> list[tuple[Target, ...]]:
    """PLACE:KIND, joined by +, as targets. Raises ValueError: there is no such process."""
    known = {f"server:{kind}" for kind in SERVER_KINDS} | {f"{site}:{kind}" for site in SITES for kind in SITE_KINDS}
    for one in (one for word in words for one in word.split("+")):
        if one not in known:
            raise ValueError(f"--only {one}: there is no such process; there are {', '.join(sorted(known))}")
    return [tuple(Target(*one.split(":")) for one in word.split("+")) for word in words]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where something was lost, with the seed; 2 where it was asked for what cannot be, and nothing ran."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.chaos.driver", description=__doc__)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="must not exist; default: runs/chaos-SEED")
    parser.add_argument(
        "--only", nargs="*", help="PLACE:KIND ... in this order, in place of drawn ones; + joins a pair"
    )
    given = parser.parse_args(arguments)
    if given.kills < 1:
        parser.error(f"--kills {given.kills}: without a kill nothing is proved; give 1 or more")
    if not 0 <= given.seed < 2**63:
        parser.error(f"--seed {given.seed}: must lie in 0..2**63 - 1")
    try:
        pairs = read_pairs(given.only or ())
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_CODE))  # what runs is ended on the way out
    out = given.out or Path("runs") / f"chaos-{given.seed}"
    if out.exists():
        print(f"error: {out}: is there already; remove it, or choose another folder with --out.", file=sys.stderr)
        return EXIT_CODE
    kills = plan_kills(given.kills, given.seed)
    if pairs:
        kills = [Kill(1 + PACE * index, 2.0, pair, 5.0) for index, pair in enumerate(pairs)]
    try:
        said = chaos(out, kills, given.seed)
    except UserError as error:
        said = [str(error)]
    for line in said:
        print(f"LOST: {line}")
    print(json.dumps({"seed": given.seed, "kills": len(kills), "lost": len(said)}))
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
