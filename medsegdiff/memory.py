"""How many samples are drawn at once: found from the memory there is, smaller when it runs out after all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from medsegdiff.config import ModelConfig
from medsegdiff.devices import is_out_of_memory
from medsegdiff.errors import UserError

# Beyond these a batch is hardly faster. On a CPU results differ in their last bits with the batch, so it must not
# follow the memory that happens to be free: 64 fits wherever these networks do, and only a tight machine takes less.
CPU_BATCH = 64
GPU_BATCH = 256

# Maps of the widest level that are alive at once while it is decoded: the skip beside what comes from below, that
# normalised, activated, convolved. 10 to 11 are counted for every preset; the rest is a convolution's work space.
MAPS_ALIVE = 16

T = TypeVar("T")


@dataclass
class Bound:
    """At most this many items at once. Where that proves too many it falls to the next power of two for good."""

    items: int

    def batches(
        self, items: Sequence[T], work: Callable[[Sequence[T]], Tensor]
    ) -> Iterator[tuple[Sequence[T], Tensor]]:
        """(batch, work(batch)) over all items in order; a batch that does not fit is halved and worked on again.

        Raises:
            UserError: the memory does not hold a single item.
        """
        start = 0
        while start < len(items):
            batch = items[start : start + self.items]
            result = _try(work, batch)
            if result is not None:
                yield batch, result
                start += len(batch)
            elif len(batch) == 1:
                raise UserError(
                    "the memory does not hold one slice of this model, so nothing was segmented. Free memory, or "
                    "choose another --device."
                )
            else:
                torch.cuda.empty_cache()  # does nothing where no GPU is used
                self.items = _power_of_two(len(batch) - 1)


def _try(work: Callable[[Sequence[T]], Tensor], batch: Sequence[T]) -> Tensor | None:
    """None where memory ran out; a frame of its own, so that what the failed attempt held is free afterwards."""
    try:
        return work(batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def bytes_per_sample(config: ModelConfig, height: int, width: int) -> int:
    """About what one mask of height x width takes of memory while it is drawn, in float32; the weights not counted.

    A bound to be safe with, about 1.6 times what is alive at once; `medsegfed model show` forecasts the latter.
    """
    widest = max(factor / 4**level for level, factor in enumerate(config.channel_multipliers))
    return int(4 * height * width * (MAPS_ALIVE * config.base_channels * widest + 8 * config.mask_channels))


def find_bound(device: torch.device, bytes_per_item: int) -> Bound:
    """The largest power of two of items whose working memory fits the device with room to spare."""
    limit = GPU_BATCH if device.type == "cuda" else CPU_BATCH
    room = room_on_gpu(device) if device.type == "cuda" else room_on_cpu()
    fitting = limit if room is None else room // max(1, bytes_per_item)
    return Bound(_power_of_two(max(1, min(limit, fitting))))


def room_on_gpu(device: torch.device) -> int:
    """Bytes that a batch may take: 70 % of what is free, for convolutions need work space beside what they return."""
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(0.7 * (free + cached))


def room_on_cpu(system: Path = Path("/")) -> int | None:
    """Bytes that a batch may take: a quarter of the machine's memory, half of what is left of it if that is less.

    The first is the same on every run. None where the system does not tell (it is no Linux).
    """
    found = machine_memory(system)
    return None if found is None else max(0, min(found[0] // 4, found[1] // 2))


def machine_memory(system: Path = Path("/")) -> tuple[int, int] | None:
    """Bytes of memory, and those that are free; None where the system does not tell (it is no Linux).

    What a control group (a container, a service) may use counts as the machine's.
    """
    try:
        lines = (system / "proc/meminfo").read_text().splitlines()
        kibibytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        total, free = 1024 * kibibytes["MemTotal"], 1024 * kibibytes["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        return None
    for limit, used in _control_groups(system):
        total, free = min(total, limit), min(free, limit - used)
    return total, free


def _control_groups(system: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of each control group around this process that has a limit.

    Used is what cannot be given back (anonymous memory); the page cache can.
    """
    try:
        own = [line.split(":", 2) for line in (system / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (parts for parts in own if len(parts) == 3):
        second = controllers == ""
        if not second and "memory" not in controllers.split(","):
            continue
        root = system / "sys/fs/cgroup" / ("" if second else "memory")
        name, key = ("memory.max", "anon") if second else ("memory.limit_in_bytes", "total_rss")
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                try:
                    limit = int((group / name).read_text())
                    counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                    yield limit, int(counts[key])
                except (OSError, KeyError, ValueError):  # no such file, or no limit: "max"
                    continue


def _power_of_two(number: int) -> int:
    """The largest that is not above `number`, which is at least 1."""
    return 1 << (number.bit_length() - 1)
