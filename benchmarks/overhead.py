"""What federation costs beside training and evaluation: python -m benchmarks.overhead RUN_FOLDER"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.turns import Answer, publish, table

PARTS = ("train", "evaluate", "overhead")


def read(run: Path) -> Answer:
    """The times of a run's report, and each part's share of the whole.

    Raises:
        SystemExit: no report.json there, or one without these times.
    """
    path = run / "report.json"
    if not path.is_file():
        raise SystemExit(f"{run}: holds no report.json. Give the folder of a finished run.")
    report = json.loads(path.read_text())
    seconds = report.get("seconds", {})
    if not all(isinstance(seconds.get(name), int | float) for name in ("total", *PARTS)) or seconds["total"] <= 0:
        raise SystemExit(f"{path}: its `seconds` lack a number for one of total, {', '.join(PARTS)}; found {seconds}.")
    return {
        "what": "seconds of a run; overhead is all that is neither training nor evaluation",
        "run": report.get("run"),
        "engine": report.get("engine"),
        "rounds": report.get("rounds"),
        "sites": len(report.get("sites", {})),
        "hardware": report.get("hardware"),
        "software": report.get("software"),
        "seconds": {name: seconds[name] for name in ("total", *PARTS)},
        "share": {name: round(seconds[name] / seconds["total"], 4) for name in PARTS},
    }


def main() -> None:
    """Read the report, write benchmarks/results/overhead.json, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    result = read(parser.parse_args().run)
    publish("overhead", result)
    rows = [[name, result["seconds"][name], f"{result['share'].get(name, 1.0):.1%}"] for name in ("total", *PARTS)]
    print(table(["part", "seconds", "share"], rows))


if __name__ == "__main__":
    main()
