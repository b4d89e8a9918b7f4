"""`medsegfed doctor`: the preflight of either end. Each line of its report says what is so and what to do.

    checks.py        what a check is; how they are run, scrubbed and shown
    site.py          the hospital's list       coordinator.py   the coordinator's
    connection.py    DNS, proxy, TCP           network.py       TLS, the site's certificate, the clock
    credentials.py   keys and certificates     machine.py       disk, memory, versions, environment
    dataset.py       the site's data           reading.py       its table, and one case

Every check is independent: one that crashes or hangs is a failed line, and the others go on. The report holds counts,
fixed words and keyed hashes, so that a hospital may mail it; names of cases and files appear with `names` alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from deploy.doctor.checks import Check, as_plain, checks_table, exit_code, summary_line
from medsegdiff.errors import UserError

__all__ = ["Check", "as_plain", "checks_table", "exit_code", "report", "run_checks", "summary_line"]


def run_checks(
    folder: Path, now: Callable[[], float] = time.time, names: bool = False, data_seconds: float | None = None
) -> list[Check]:
    """Examine a site's folder (it holds site.yaml) or a federation's (federation.yaml).

    Args:
        now: the clock, seconds since 1970.
        names: name cases and files: for the site's own terminal.
        data_seconds: after which no further case is read; default: ten minutes.

    Raises:
        UserError: the folder holds neither file.
    """
    if (folder / "site.yaml").is_file():
        from deploy.doctor.dataset import DATA_SECONDS
        from deploy.doctor.site import examine_site

        return examine_site(folder, now, names, DATA_SECONDS if data_seconds is None else data_seconds)
    if (folder / "federation.yaml").is_file():
        from deploy.doctor.coordinator import examine_federation

        return examine_federation(folder, now)
    raise UserError(
        f"{folder}: holds neither site.yaml nor federation.yaml, so there is nothing to examine. Name the folder with "
        "--folder."
    )


def report(folder: Path, names: bool = False, as_json: bool = False, data_seconds: float | None = None) -> int:
    """Examine, print the report to standard output and progress to standard error; returns the exit code.

    Raises:
        UserError: as `run_checks`.
    """
    from simulations.display import single_bar

    with single_bar("doctor"):
        checks = run_checks(folder, names=names, data_seconds=data_seconds)
    if as_json:
        print(json.dumps(as_plain(checks), indent=1, allow_nan=False, ensure_ascii=False))
        return exit_code(checks)
    from rich.console import Console

    console = Console()
    console.print(checks_table(checks))
    console.print(summary_line(checks), highlight=False)
    return exit_code(checks)
