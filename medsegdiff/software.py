"""Versions of the programs that results may depend on."""

from __future__ import annotations

import platform
from importlib.metadata import version


def software() -> dict[str, str]:
    """Name -> version of medsegfed, torch, flwr and Python, as installed; nothing heavy is imported."""
    return {**{name: version(name) for name in ("medsegfed", "torch", "flwr")}, "python": platform.python_version()}
