"""What a real federation costs beside training: python -m benchmarks.federation [--models tiny S B136] [--sites 2 4]
[--wave 1] [--rounds 3]

A server and its sites, real processes over real TLS on this machine, carry out a few rounds of hardly any training.
Reported: seconds of a round beyond the training of its slowest site, the highest resident memory of each process, and
the bytes that went through the gateway beside the weights' own size. All sites share this machine's cores: a hospital
with a machine of its own waits less. `--wave`: how many sites train at a time; of a round with several waves the
training of each wave's slowest site is taken off. Figures that are there for other models, sites and waves stay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

from benchmarks.turns import RESULTS, Answer, hardware, publish, spread, table
from deploy import guard
from deploy.rehearsal import Rehearsal
from medsegdiff.strict import read_config
from medsegdiff.weights import weight_shapes
from server.config import RunPlan
from server.journal import Event
from simulations.recipe import Recipe, read_recipe

ROUNDS = 5  # by default; the first is left out: connections are made and networks built in it
LOOK_SECONDS = 0.1
LONGEST_SECONDS = 1500.0  # for a run of five rounds

# name -> what is changed of a preset; weights of 2, 79 and 515 MB
MODELS = {
    "tiny": {"preset": "tiny"},
    "S": {"preset": "S"},
    "B136": {"preset": "B", "base_channels": 136},
}
SMALL = {"image_size": 32}

# What a command line holds -> the process's part; the first that fits.
PARTS = (
    ("flwr-serverapp", "ServerApp"),
    ("deploy.superlink", "SuperLink"),
    ("flower-superexec", "SuperExec"),
    ("nginx:", "gateway"),
    ("server start", "supervisor of the server"),
    ("client.supernode", "SuperNode"),
    ("client.runner", "runner"),
    ("site start", "supervisor of a site"),
)

RECIPE = """\
name: bench
seed: 0
world:
  phantoms: {{sites: [{sites}], patients: 3, slices: 4}}
  partition: {{by: site}}
  test_fraction: 0.3
run:
  model: {model}
  rounds: {rounds}
  local_steps: 1
  threads: 1
  training: {{batch_size: 1}}
  sampling: {{steps: 1}}
  evaluate_every: {rounds}
  wave: {wave}
arms: []
"""


class Memory(threading.Thread):
    """Looks at the peak resident memory (VmHWM) of every process of a federation, by part, until it is stopped."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.mark = str(folder).encode()
        self.peaks: dict[str, int] = defaultdict(int)  # part -> bytes of the largest of its processes
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            for process in guard.processes():
                self._look(process.pid)

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def _look(self, pid: int) -> None:
        place = Path("/proc") / str(pid)
        try:
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ")
            inside = self.mark in command or self.mark in os.fsencode((place / "cwd").readlink())
            part = next((name for words, name in PARTS if words.encode() in command), None) if inside else None
            if part is not None:
                self.peaks[part] = max(self.peaks[part], _peak(place / "status"))
        except OSError:
            return  # it has ended


def _peak(status: Path) -> int:
    line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return 1024 * int(line.split()[1])


def measure(model: str, sites: int, wave: int | None, rounds: int, folder: Path) -> Answer:
    """One federation, one run; the folder is made and may be deleted afterwards."""
    recipe = _recipe(model, sites, wave, rounds, folder)
    stage = Rehearsal(folder / "federation")
    stage.prepare(recipe)
    memory = Memory(stage.folder)
    with stage.running():
        memory.start()
        stage.approve(stage.begin(stage.run_file(recipe)))
        events = stage.wait("bench", lambda found: found[-1]["event"] == "finished", LONGEST_SECONDS, "the end")
        memory.stop()
    plan = read_config(stage.server / "runs" / "bench" / "run.yaml", RunPlan)
    weights = 4 * sum(math.prod(shape) for shape in weight_shapes(plan.task.model).values())
    return {
        "model": model,
        "sites": sites,
        "wave": wave,
        "rounds": rounds,
        "weights_mb": round(weights / 1e6, 1),
        "seconds_beyond_training": spread(beyond_training(events, wave)[1:]),
        "peak_mb": {name: round(memory.peaks[name] / 1e6) for _, name in PARTS},
        "bytes_over_weights": carried(stage.server / "state" / "logs", weights, sites, rounds),
    }


def beyond_training(events: Sequence[Event], wave: int | None = None) -> list[float]:
    """Of each round: seconds from the commit before it to its own, less the training of its slowest site.

    Args:
        wave: sites that train at a time (None: all). Of a round with several waves as many of the longest trainings are
            taken off; where the waves' slowest sites are not the slowest of all, that is a little too much.
    """
    rounds = [event for event in events if event["event"] == "round"]
    found = []
    for before, after in itertools.pairwise(rounds):
        seconds = sorted((site["seconds"] for site in after["accepted"].values()), reverse=True)
        waves = math.ceil(len(seconds) / (wave or len(seconds)))
        found.append(after["time"] - before["time"] - sum(seconds[:waves]))
    return found


def carried(logs: Path, weights: int, sites: int, rounds: int) -> dict[str, float]:
    """Bytes through the gateway over those of the weights alone, all that Flower and we say besides included.

    Up: every site's updates. Down: the model of every round, and the last one once more, to be scored.
    """
    up = down = 0
    for path in logs.glob("access.jsonl*"):
        for line in path.read_text(encoding="utf-8").splitlines():
            request = json.loads(line)
            up, down = up + request["received"], down + request["sent"]
    due_up, due_down = sites * rounds * weights, sites * (rounds + 1) * weights
    return {"up": round(up / due_up, 4), "down": round(down / due_down, 4)}


def _recipe(model: str, sites: int, wave: int | None, rounds: int, folder: Path) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    names = ", ".join(("alder", "birch", "cedar", "dogwood", "elm", "fir", "ginkgo", "hazel")[:sites])
    config = json.dumps(MODELS[model] | SMALL)
    text = RECIPE.format(sites=names, rounds=rounds, model=config, wave=json.dumps(wave))
    path = folder / "bench.yaml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def _kept(new: Sequence[Answer]) -> list[Answer]:
    """Earlier figures that no new one replaces."""
    path = RESULTS / "federation.json"
    before = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    again = {_case(result) for result in new}
    return [result for result in before if _case(result) not in again]


def _case(result: Answer) -> tuple[str, int, int | None]:
    return result["model"], result["sites"], result.get("wave")


def main() -> None:
    """Measure, write benchmarks/results/federation.json, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sites", nargs="+", type=int, choices=range(1, 9), default=[2, 4])
    parser.add_argument("--wave", type=int, help="sites that train at a time; default: the run's own")
    parser.add_argument("--rounds", type=int, default=ROUNDS, choices=range(3, 100), metavar="N")
    parser.add_argument("--keep", action="store_true", help="keep the federations' folders")
    given = parser.parse_args()
    results: list[Answer] = []
    for model, sites in itertools.product(given.models, given.sites):
        folder = Path(mkdtemp(prefix=f"federation-{model}-{sites}-"))
        results.append(measure(model, sites, given.wave, given.rounds, folder / "run"))
        print(json.dumps(results[-1]), flush=True)
        publish("federation", {"what": __doc__, "hardware": hardware(1), "results": _kept(results) + results})
        if not given.keep:
            shutil.rmtree(folder)
    rows = [
        [
            f"{r['model']}, {r['weights_mb']} MB, {r['sites']} sites, wave {r['wave'] or 'all'}",
            r["seconds_beyond_training"]["median"],
            *(r["peak_mb"][name] for name in ("ServerApp", "SuperLink", "SuperNode", "runner")),
            r["bytes_over_weights"]["up"],
            r["bytes_over_weights"]["down"],
        ]
        for r in results
    ]
    header = ["", "s beyond training", "ServerApp MB", "SuperLink MB", "SuperNode MB", "runner MB", "up", "down"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
