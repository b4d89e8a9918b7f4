"""Does this end of a federation live? For container health checks: python -m deploy.alive STATE

Reads what the supervisor writes; asks no network, so it costs nothing and says nothing about the other end.
Exit code 0: the supervisor and all its children are well. 1: some are not; the line names them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from deploy.supervisor import read_status


def alive(state: Path) -> tuple[bool, str]:
    """Whether all is well with the supervisor of a state folder, and a line about each child."""
    status = read_status(state)
    if status is None:
        return False, f"{state}: no supervisor is running"
    children = status["children"]
    line = ", ".join(f"{name} {child['phase']} since {child['since']}" for name, child in children.items())
    return all(child["healthy"] for child in children.values()), line


def main() -> int:
    """Tell, and end with the exit code."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    well, line = alive(Path(sys.argv[1]))
    print(line)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
