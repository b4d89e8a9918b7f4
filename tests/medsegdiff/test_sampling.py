"""Drawing masks from a network: what it is asked, with what, and that nothing but image and seed decides."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from medsegdiff.config import DiffusionConfig, ModelConfig, Prediction, Sampler, SamplingConfig, Schedule
from medsegdiff.diffusion import Diffusion
from medsegdiff.network import MedSegDiff
from medsegdiff.sampling import sample_masks

MODEL = ModelConfig(
    image_size=8, mask_channels=2, base_channels=8, channel_multipliers=(1, 2), fusion_levels=(1,),
    attention_levels=(1,),
)  # fmt: skip
SAMPLERS = get_args(Sampler)


def network(self_conditioning: bool = False) -> MedSegDiff:
    """A network with a loud last layer, so that samples differ visibly."""
    torch.manual_seed(0)
    made = MedSegDiff(replace(MODEL, self_conditioning=self_conditioning))
    with torch.no_grad():
        made.out.weight.mul_(30)
    return made.eval()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def drawn(net: MedSegDiff, diffusion: Diffusion, sampler: Sampler, steps: int, *indices: int) -> Tensor:
    """A mask for each image of `indices`, with seed 10 * index."""
    config = SamplingConfig(sampler, steps=steps, eta=0.5)
    return sample_masks(net, diffusion, images(), list(indices), config, [10 * index for index in indices])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("self_conditioning", [False, True])
def test_a_batch_is_its_cases_one_by_one(sampler: Sampler, self_conditioning: bool) -> None:
    """Sampling together, in any order, equals sampling alone; the same call twice gives the same bits."""
    net, diffusion = network(self_conditioning), Diffusion(DiffusionConfig())
    together = drawn(net, diffusion, sampler, 4, 2, 0, 1)
    assert torch.equal(together, drawn(net, diffusion, sampler, 4, 2, 0, 1))
    alone = torch.cat([drawn(net, diffusion, sampler, 4, index) for index in (2, 0, 1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert float((together[0] - together[1]).abs().max()) > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("self_conditioning", [False, True])
def test_cached_features_sample_the_same(sampler: Sampler, self_conditioning: bool) -> None:
    """Image features computed once an image give the masks of the whole network run at every step."""
    net, diffusion = network(self_conditioning), Diffusion(DiffusionConfig())
    cached = drawn(net, diffusion, sampler, 4, 0, 2, 2)
    whole, calls = images()[[0, 2, 2]], []

    class Uncached(MedSegDiff):
        def denoise(
            self, mask_BKHW: Tensor, t_B: Tensor, features: list[Tensor], previous_BKHW: Tensor | None = None
        ) -> Tensor:
            calls.append(len(features))
            return net(mask_BKHW, t_B, whole, previous_BKHW)

    again = drawn(Uncached(net.config), diffusion, sampler, 4, 0, 2, 2)
    torch.testing.assert_close(again, cached, rtol=1e-5, atol=1e-5)
    assert calls == [2] * 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_network_sees_its_last_clean_estimate(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing at the first step, then x_0 of the step before, clamped to the masks' range."""
    net, diffusion = network(True), Diffusion(DiffusionConfig(mask_scale=0.5))
    seen: list[tuple[Tensor, ...]] = []
    answers: list[Tensor] = []
    denoise = net.denoise

    def spy(x: Tensor, t_B: Tensor, features: list[Tensor], *previous: Tensor) -> Tensor:
        seen.append(previous)
        answers.append(denoise(x, t_B, features, *previous))
        return answers[-1]

    monkeypatch.setattr(net, "denoise", spy)
    drawn(net, diffusion, sampler, 4, 0, 1)
    assert seen[0] == ()
    assert [len(previous) for previous in seen[1:]] == [1, 1, 1]
    for (previous,), answer in zip(seen[1:], answers, strict=False):
        assert torch.equal(previous, answer.clamp(-0.5, 0.5))
    assert max(float(answer.abs().max()) for answer in answers) > 0.5, "the clamp had something to do"


def test_the_estimate_matters_and_is_not_kept_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network deprived of its estimates draws another mask; a second call starts without one."""
    net, diffusion = network(True), Diffusion(DiffusionConfig())
    first = drawn(net, diffusion, "dpmpp_2m", 4, 0)
    assert torch.equal(first, drawn(net, diffusion, "dpmpp_2m", 4, 0))
    denoise = net.denoise
    monkeypatch.setattr(net, "denoise", lambda x, t_B, features, *previous: denoise(x, t_B, features))
    assert float((first - drawn(net, diffusion, "dpmpp_2m", 4, 0)).abs().max()) > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_is_not_the_networks_raw_answer(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask differs from what the network said of pure noise, and from its last answer if that is no x_0."""
    net, answers = network(), []
    denoise = net.denoise
    monkeypatch.setattr(net, "denoise", lambda *args: answers.append(denoise(*args)) or answers[-1])
    for prediction in get_args(Prediction):
        answers.clear()
        mask = drawn(net, Diffusion(DiffusionConfig(prediction=prediction)), sampler, 4, 0)
        assert float((mask - answers[0]).abs().max()) > 0.01
        if prediction != "x0":
            assert float((mask - answers[-1]).abs().max()) > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_sampling_from_zero_terminal_snr_is_finite(
    sampler: Sampler, schedule: Schedule, prediction: Prediction, steps: int
) -> None:
    """Any sampler and number of steps, from abar = 0 exactly, ends in range."""
    config = DiffusionConfig(timesteps=50, schedule=schedule, prediction=prediction, zero_terminal_snr=True)
    mask = drawn(network(), Diffusion(config), sampler, steps, 0, 1)
    assert bool(mask.isfinite().all())
    assert float(mask.abs().max()) <= 1
    assert float(mask.abs().max()) > 0.05
