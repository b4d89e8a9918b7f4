"""The inputs of each step, made ahead of the device that is to use them.

A GPU that waits for a batch does nothing. One thread makes the next few steps' inputs while the present step runs, and
pinned memory lets them be copied without halting the program. Inputs are pure functions of the step, so neither the
thread's timing nor a step taken twice can change them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice

import torch
from torch import Tensor

AHEAD = 3  # steps in the making: one may take long (an epoch's end, a cold disk) without being waited for


class Loader:
    """Makes the inputs of steps, in their order, and counts the time that was spent waiting for them.

    Args:
        make: step -> tensors by name, on the CPU; called by one thread at a time.
        device: where the tensors are wanted.
        ahead: steps made in advance by a thread; 0 makes each when it is asked for. None: ahead for a GPU alone, since
            on a CPU the thread would take its time from the cores that train.

    Attributes:
        waited_seconds: time for which `load` kept its caller waiting, in total. On a GPU, over the time of the
            training, the share in which the device may have starved.

    Guarantees:
        What `load` yields equals `make`, bit for bit and in order, whatever `ahead`.
    """

    def __init__(
        self, make: Callable[[int], Mapping[str, Tensor]], device: torch.device, ahead: int | None = None
    ) -> None:
        self.make = make
        self.device = device
        self.ahead = (AHEAD if device.type == "cuda" else 0) if ahead is None else ahead
        self.waited_seconds = 0.0

    def load(self, steps: Iterable[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Each step with its inputs on the device. Close the iterator to stop the thread before the last step.

        Raises:
            Exception: whatever `make` raised for a step, when that step's turn has come.
        """
        if self.ahead == 0:
            for step in steps:
                yield step, self.place(self._waiting(partial(self.make, step)))
            return
        with ThreadPoolExecutor(1, "loader") as thread:
            queue: deque[tuple[int, Future[dict[str, Tensor]]]] = deque()
            rest = iter(steps)
            try:
                while True:
                    for step in islice(rest, self.ahead - len(queue)):
                        queue.append((step, thread.submit(self._make_pinned, step)))
                    if not queue:
                        return
                    step, future = queue.popleft()
                    yield step, self.place(self._waiting(future.result))
            finally:
                for _, future in queue:
                    future.cancel()

    def place(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on the device; the copy of a pinned one is queued, not waited for."""
        return {name: tensor.to(self.device, non_blocking=tensor.is_pinned()) for name, tensor in tensors.items()}

    def _make_pinned(self, step: int) -> dict[str, Tensor]:
        pin = self.device.type == "cuda"
        return {name: tensor.pin_memory() if pin else tensor for name, tensor in self.make(step).items()}

    def _waiting(self, take: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        begun = time.perf_counter()
        try:
            return take()
        finally:
            self.waited_seconds += time.perf_counter() - begun
