"""Where tensors live."""

from __future__ import annotations

import torch

from medsegdiff.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device of a configuration: "auto" takes a GPU when there is one; else a torch device name.

    Raises:
        UserError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device '{name}' is unknown; use auto, cpu, cuda or cuda:0.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{name}' is not supported; use auto, cpu, cuda or cuda:0.")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"device '{name}' is not there: this machine shows {count} CUDA devices. Use auto or cpu.")
    return device
