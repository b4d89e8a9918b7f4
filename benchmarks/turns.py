"""Two programs that cannot share an interpreter take turns: long-lived workers, driven by JSON lines.

Timing one after the other would charge whatever the machine did meanwhile to one side alone. A worker sleeps in a read
while the other one works. It imports torch and the standard library
alone: the peer's interpreter loads it too.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"

Answer = dict[str, Any]


class Worker:
    """A module of this package that runs `serve` in an interpreter of its own.

    Raises:
        SystemExit: the interpreter is not there, or the worker died or reported an error.
    """

    def __init__(self, module: str, python: Path | str, threads: int) -> None:
        if not Path(python).exists():
            raise SystemExit(f"{python}: there is no such interpreter. Make it as benchmarks/README.md says.")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment.setdefault("GOMP_SPINCOUNT", "10000")  # as our package sets it, for every side
        self.module = module
        self._process = subprocess.Popen(
            [str(python), "-m", module],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ask("threads", count=threads)

    def ask(self, what: str, **arguments: Any) -> Answer:
        """Have the worker do `what` and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.module} ended during '{what}' (status {self._process.wait()}); see its message.")
        answer: Answer = json.loads(line)
        return answer

    def close(self) -> None:
        """End the worker: it stops at the end of its input."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=30)


def serve(actions: Mapping[str, Callable[..., Answer]]) -> None:
    """Answer requests on standard input until it ends; all else that is printed goes to standard error."""
    out, sys.stdout = sys.stdout, sys.stderr
    known = {"threads": _set_threads, **actions}
    for line in sys.stdin:
        request: Answer = json.loads(line)
        print(json.dumps(known[request.pop("what")](**request)), file=out, flush=True)


def _set_threads(count: int) -> Answer:
    torch.set_num_threads(count)
    return {"threads": torch.get_num_threads()}


def spread(values: Sequence[float], digits: int = 2) -> Answer:
    """Median and quartiles, and how many values they are of."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": round(middle, digits),
        "quartiles": [round(low, digits), round(high, digits)],
        "count": len(values),
    }


def hardware(threads: int) -> Answer:
    """What the numbers were measured on; no host name, no path."""
    return {
        "cpu": _cpu_model(),
        "logical_cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def publish(name: str, result: Answer) -> None:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns padded to their widest entry; the first to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
