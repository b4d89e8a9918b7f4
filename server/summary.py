"""What a report says about the programs and the machine it was made with."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from medsegdiff.software import software

__all__ = ["hardware", "software"]


def hardware(threads: int) -> dict[str, str | int | None]:
    """Processor, torch threads and GPU, without any name of the machine."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"cpu": _cpu_name(), "threads": threads, "gpu": gpu}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
