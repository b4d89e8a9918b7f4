"""Devices by index and by name, on machines that are pretended; precision where it applies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from medsegdiff.devices import autocast, choose_device
from medsegdiff.errors import UserError

TWO = ("NVIDIA H200", "NVIDIA A100-SXM4-80GB")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A machine with the GPUs that the test is parametrised with."""
    names: tuple[str, ...] = getattr(request, "param", TWO)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=139 << 30))


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("auto", "cuda"), ("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), ("0", "cuda:0"), ("1", "cuda:1"),
        (1, "cuda:1"), ("H200", "cuda:0"), ("a100", "cuda:1"), (" nvidia h200 ", "cuda:0"),
    ],
)  # fmt: skip
def test_a_device_is_chosen_by_kind_index_or_name(name: str | int, device: str) -> None:
    """Part of a name is enough, in any case."""
    assert choose_device(name) == torch.device(device)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("name", ["2", "cuda:2", "NVIDIA", "B200", "", "cuda:", "cuda:-1", "-1", "mps", "cpu:0"])
def test_what_fits_no_gpu_or_several_is_answered_with_the_list(name: str) -> None:
    """One line: what was asked, and every GPU's index, name and memory."""
    with pytest.raises(UserError) as error:
        choose_device(name)
    message = str(error.value)
    assert f"device '{name}'" in message
    assert "0 = NVIDIA H200 (139 GiB), 1 = NVIDIA A100-SXM4-80GB (139 GiB)" in message
    assert ("fits 2 GPUs" in message) == (name == "NVIDIA")


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("gpus", [("NVIDIA H200", "NVIDIA H200")], indirect=True)
def test_twins_are_told_apart_by_index_alone() -> None:
    """Two GPUs of one name: the name is ambiguous, the index is not."""
    with pytest.raises(UserError, match=r"fits 2 GPUs.*Choose by index"):
        choose_device("H200")
    assert choose_device("1") == torch.device("cuda:1")


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("gpus", [()], indirect=True)
def test_a_machine_without_gpus_says_so() -> None:
    """auto is the CPU; everything else that is not the CPU is refused."""
    assert choose_device("auto") == choose_device("cpu") == CPU
    for name in ("cuda", "cuda:0", "0", "H200"):
        with pytest.raises(UserError, match=f"device '{name}'.*this machine shows 0 GPUs"):
            choose_device(name)


def test_precision_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto: bf16 on a GPU that has it and nowhere else; bf16 anywhere when asked for; fp32 never."""

    def product() -> torch.dtype:
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    for precision, expected in (("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(CPU, precision):  # type: ignore[arg-type]
            assert product() == expected

    asked: list[tuple[str, torch.dtype]] = []
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype: asked.append((kind, dtype)))
    for has_bf16 in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bf16: has)
        for precision in ("auto", "fp32", "bf16"):
            autocast(CUDA, precision)  # type: ignore[arg-type]
    assert asked == [("cuda", torch.bfloat16)] * 3  # bf16 without it; auto and bf16 with it
