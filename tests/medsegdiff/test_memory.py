"""How many samples are drawn at once: what the memory holds, the same on every run, less when it runs out."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medsegdiff.config import DiffusionConfig, SamplingConfig, preset
from medsegdiff.diffusion import Diffusion
from medsegdiff.errors import UserError
from medsegdiff.memory import Bound, bytes_per_sample, find_bound, room_on_cpu
from medsegdiff.network import MedSegDiff
from medsegdiff.sampling import sample_masks

GIB = 2**30


class Alive(TorchDispatchMode):
    """Follows every storage that an operation makes, from birth to death."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, 0)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny", {}),
        ("tiny", {"mask_channels": 14}),
        ("tiny", {"self_conditioning": True, "auxiliary_head": True}),
        ("tiny", {"channel_multipliers": (1, 8, 16), "attention_levels": (0,)}),
        ("S", {"base_channels": 32}),
    ],
)
def test_the_estimate_is_above_what_is_counted_and_below_twice_it(name: str, changes: dict[str, Any]) -> None:
    """Counted: all tensors alive at once while two masks are drawn, by following each from birth to death."""
    network = MedSegDiff(preset(name, image_size=32, **changes))
    images, config = torch.zeros(2, 1, 32, 32), SamplingConfig(steps=2)
    with torch.inference_mode(), Alive() as alive:
        sample_masks(network, Diffusion(DiffusionConfig(timesteps=10)), images, [0, 1], config, [0, 1])
    estimate = bytes_per_sample(network.config, 32, 32)
    assert alive.peak / 2 < estimate < alive.peak


def machine(folder: Path, total: float, free: float, groups: dict[str, str] | None = None) -> Path:
    """A system folder that tells of so many GiB, and of control groups by file."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text(
        f"MemTotal: {int(total * 2**20)} kB\nMemFree: 1 kB\nMemAvailable: {int(free * 2**20)} kB\nHugePages_Free: 0\n"
    )
    for name, content in (groups or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


@pytest.mark.parametrize(
    ("total", "free", "groups", "room"),
    [
        (64, 60, {}, 16),
        (64, 40, {}, 16),  # what is free does not matter while there is enough of it
        (64, 8, {}, 4),
        (
            64, 60,
            {
                "proc/self/cgroup": "0::/box/inner\n",
                "sys/fs/cgroup/box/memory.max": str(8 * GIB),
                "sys/fs/cgroup/box/memory.stat": f"anon {GIB}\nfile {7 * GIB}\n",
                "sys/fs/cgroup/box/inner/memory.max": "max\n",
                "sys/fs/cgroup/box/inner/memory.stat": "anon 0\n",
            },
            2,
        ),
        (
            64, 60,
            {
                "proc/self/cgroup": "4:memory:/job\n3:cpu:/\n0::/\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(6 * GIB),
                "sys/fs/cgroup/memory/job/memory.stat": f"cache {GIB}\ntotal_rss {5 * GIB}\n",
            },
            0.5,
        ),
        (64, 60, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max"}, 16),
    ],
)  # fmt: skip
def test_room_on_a_cpu(tmp_path: Path, total: float, free: float, groups: dict[str, str], room: float) -> None:
    """A quarter of the memory, half of the free; a container's or service's limit counts, its page cache does not."""
    assert room_on_cpu(machine(tmp_path, total, free, groups)) == int(room * GIB)


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No /proc: the usual batch."""
    assert room_on_cpu(tmp_path) is None
    monkeypatch.setattr("medsegdiff.memory.room_on_cpu", lambda: None)
    assert find_bound(torch.device("cpu"), GIB) == Bound(64)


@pytest.mark.parametrize(
    ("room", "each", "items"),
    [(64 * 100, 100, 64), (10**12, 1, 64), (6399, 100, 32), (100, 100, 1), (5, 100, 1), (0, 100, 1), (700, 100, 4)],
)
def test_a_bound_is_a_power_of_two_that_fits(monkeypatch: pytest.MonkeyPatch, room: int, each: int, items: int) -> None:
    """At most 64 on a CPU, at least 1."""
    monkeypatch.setattr("medsegdiff.memory.room_on_cpu", lambda: room)
    assert find_bound(torch.device("cpu"), each) == Bound(items)


def test_a_gpu_takes_more_by_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """70 % of free and cached memory, at most 256."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (600, 5000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 1000)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 600)
    assert find_bound(torch.device("cuda"), 10) == Bound(64)
    assert find_bound(torch.device("cuda"), 1) == Bound(256)


def test_batches_keep_to_the_bound_and_to_the_order() -> None:
    """Whatever fits at once, every item is worked on once and in order; the failed attempts are given up."""
    for fits in (1, 2, 3, 5, 100):

        def work(batch: Sequence[int], fits: int = fits) -> Tensor:
            if len(batch) > fits:
                raise torch.OutOfMemoryError
            return torch.tensor(batch)

        bound = Bound(8)
        found = list(bound.batches(range(21), work))
        assert [item for batch, _ in found for item in batch] == list(range(21))
        assert torch.equal(torch.cat([result for _, result in found]), torch.arange(21))
        assert bound.items == {1: 1, 2: 2, 3: 2, 5: 4, 100: 8}[fits]


def test_one_item_that_does_not_fit_is_said() -> None:
    """One line with what to do; other errors pass."""

    def work(batch: Sequence[int]) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match="does not hold one slice"):
        list(Bound(4).batches([1, 2, 3], work))

    def broken(batch: Sequence[int]) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(Bound(4).batches([1, 2, 3], broken))
