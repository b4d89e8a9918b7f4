"""Where tensors live, and in which precision matrix work is done there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from medsegdiff.config import Precision
from medsegdiff.errors import UserError


def choose_device(name: str | int) -> torch.device:
    """The device of a configuration.

    Args:
        name: "auto" (a GPU where there is one, else the CPU), "cpu", "cuda", "cuda:1", a GPU's index ("1"), or part
            of its name ("H200", in any case).

    Raises:
        UserError: this machine has no such device, or several that the name fits; the message lists its GPUs.
    """
    wanted = str(name).strip().lower()
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    index = wanted.removeprefix("cuda:")
    if wanted in ("cpu", "cuda") or index.isdecimal():
        device = torch.device("cuda", int(index)) if index.isdecimal() else torch.device(wanted)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"device '{name}' is not there: {_gpus()}. Choose one of them, auto or cpu.")
        return device
    named = [index for index, gpu in enumerate(_gpu_names()) if wanted and wanted in gpu.lower()]
    if len(named) != 1:
        fact = f"fits {len(named)} GPUs" if named else "is no index and part of no GPU's name"
        raise UserError(f"device '{name}' {fact}: {_gpus()}. Choose by index (0), by name, cuda, auto or cpu.")
    return torch.device("cuda", named[0])


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Matrix products and convolutions inside the block run in bf16 or, for "fp32", as their tensors are.

    "auto" is bf16 on a GPU that has it, fp32 elsewhere: on a CPU the default must keep its bits.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if precision == "bf16" or (precision == "auto" and has_bf16):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU, where torch has no exception of its own for it."""
    signs = ("can't allocate memory", "not enough memory", "ALLOC_FAILED")  # the last: cuBLAS and cuDNN
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def _gpu_names() -> list[str]:
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _gpus() -> str:
    """The machine's GPUs in words: index, name, memory."""
    found = [
        f"{index} = {name} ({torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB)"
        for index, name in enumerate(_gpu_names())
    ]
    return f"this machine has {', '.join(found)}" if found else "this machine shows 0 GPUs"
