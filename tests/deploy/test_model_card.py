"""The forecast of `model show`: within 15 % of what torch's allocator gives out when the same step is really taken."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from benchmarks.memory import measure
from deploy import model_card
from deploy.model_card import AllocationCount, describe_preset, description_lines, sampling_bytes, training_bytes
from medsegdiff.config import ModelConfig, preset
from medsegdiff.network import MedSegDiff, parameter_count

CPU = torch.device("cpu")
TINY = preset("tiny")


def assert_within_15_percent(found: dict[str, Any]) -> None:
    for what in ("training", "sampling"):
        assert 0.85 < found[what]["ratio"] < 1.15, found


# A processor without bf16 computes it with float32 copies of everything, which neither a GPU nor the forecast has.
IN_BF16 = pytest.param(
    "bf16",
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bf16 instructions"
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", IN_BF16])
@pytest.mark.parametrize(("name", "size", "batch"), [("tiny", 64, 1), ("tiny", 64, 8)])
def test_the_forecast_is_what_the_allocator_counts(name: str, size: int, batch: int, precision: str) -> None:
    """A real trainer's third step and a real sampling, counted event by event; nothing of the forecast is used."""
    assert_within_15_percent(measure(name, size, batch, precision, CPU))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "batch"), [("S", 64, 2), ("S", 128, 2), ("B", 128, 1)])
def test_the_forecast_holds_for_large_networks(name: str, size: int, batch: int) -> None:
    """The weights' share is the larger here."""
    assert_within_15_percent(measure(name, size, batch, "fp32", CPU))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "size", "batch"), [("S", 256, 8), ("B", 256, 8)])
def test_the_forecast_holds_on_a_gpu(name: str, size: int, batch: int, precision: str) -> None:
    """Beside torch.cuda.max_memory_allocated."""
    assert_within_15_percent(measure(name, size, batch, precision, torch.device("cuda")))


@pytest.mark.slow
def test_leaving_out_any_part_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants that miss it: a GPU's rules for a CPU, an N x N attention matrix, no average, no backward pass."""
    right = training_bytes(TINY, 8, "bf16", gpu=False)
    assert training_bytes(TINY, 8, "bf16", gpu=True) > 1.15 * right
    monkeypatch.setattr(model_card, "_Fused", lambda gpu: nullcontext())
    assert training_bytes(TINY, 8, "bf16", gpu=False) > 1.1 * right
    monkeypatch.undo()
    small = preset("S", image_size=64)
    whole, weights = training_bytes(small, 1, "fp32", gpu=False), 4 * parameter_count(MedSegDiff(small))
    assert training_bytes(small, 1, "fp32", average=False, gpu=False) == whole - weights < 0.85 * whole
    assert sampling_bytes(small, 1, "fp32") < 0.5 * whole


def test_allocations_are_counted_until_they_are_let_go() -> None:
    """By hand: 4 kB there, 4 kB made, 8 kB made and dropped, a view and an operation in place for nothing."""
    there = torch.zeros(1000)
    count = AllocationCount([there])
    with count:
        made = there + 1
        wide = torch.cat([there, made])
        wide.view(2, 1000).mul_(2)
        assert (count.live, count.peak) == (16_000, 16_000)
        del wide
        assert (count.live, count.peak) == (8_000, 16_000)
        made = made * 2  # the new one is there before the old one goes
        assert (count.live, count.peak) == (8_000, 16_000)
    assert count.live == 8_000


@pytest.mark.slow
def test_the_forecast_grows_as_it_must() -> None:
    """Linear in the batch beyond the weights; more for more pixels, fp32, an average, more mask channels."""
    one, two, three = (training_bytes(TINY, batch, "fp32") for batch in (1, 2, 3))
    assert three - two == pytest.approx(two - one, rel=0.02)
    assert training_bytes(preset("tiny", image_size=128), 1, "fp32") > 2 * one
    assert training_bytes(TINY, 3, "bf16") < three
    assert training_bytes(preset("tiny", mask_channels=4), 1, "fp32") > one


@pytest.mark.slow
def test_autocast_on_a_gpu_is_counted_with_its_float32_parts() -> None:
    """In fp32 there is no such difference between the devices."""
    assert training_bytes(TINY, 2, "fp32", gpu=True) == training_bytes(TINY, 2, "fp32", gpu=False)


@pytest.mark.slow
def test_every_kind_of_network_can_be_described() -> None:
    """Auxiliary head, self-conditioning, dropout, several channels."""
    config = ModelConfig(image_size=16, image_channels=3, mask_channels=2, auxiliary_head=True, self_conditioning=True)
    assert training_bytes(config, 2, "bf16") > training_bytes(ModelConfig(image_size=16), 2, "bf16")


@pytest.mark.slow
def test_figures_and_their_lines() -> None:
    """Parameters as the network has them; training is three forward passes; both precisions are told."""
    figures = describe_preset("tiny", 32, 4, 1, 1)
    network = MedSegDiff(preset("tiny", image_size=32))
    assert figures["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert figures["gflop_training"] == pytest.approx(3 * figures["gflop_forward"], rel=0.02)
    assert figures["mib_training"]["fp32"] > figures["mib_training"]["bf16"] > figures["mib_weights"]
    text = "\n".join(description_lines(figures))
    for number in (f"{figures['gflop_training']:.2f} GFLOP training", f"{figures['mib_training']['bf16']:,.0f} MiB in"):
        assert number in text
