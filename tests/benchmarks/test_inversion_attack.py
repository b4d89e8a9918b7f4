"""The inversion attack recovers what it must, and its measures of likeness are right."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.leaks.inversion import (
    Search,
    fitted,
    invert,
    plain_gradient,
    private_gradient,
    psnr,
    ssim,
    trained_change,
)
from benchmarks.leaks.people import draw_people, draw_rows
from benchmarks.privacy_attacks import INVERTED
from client.privacy.engines import Rows
from client.privacy.patients import DiffusionRowLoss
from medsegdiff.config import DiffusionConfig
from medsegdiff.diffusion import Diffusion
from medsegdiff.network import MedSegDiff


class Linear(nn.Module):
    """y = W x: the gradient of W is an outer product with x itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))


def squared(network: nn.Module, rows: Rows) -> Tensor:
    """Distance of W x from a target."""
    assert isinstance(network, Linear)
    return (rows["images"].flatten(1) @ network.weight.T - rows["masks"]).square().mean()


def linear_rows() -> Rows:
    """One image of 4 x 4 pixels and its target."""
    generator = torch.Generator().manual_seed(1)
    return {
        "images": torch.randn(1, 1, 4, 4, generator=generator),
        "masks": torch.randn(1, 3, generator=generator) * 10,
    }


def found(target: list[Tensor], steps: int = 200) -> float:
    """How like the true image what the attacker finds is, in dB."""
    rows = linear_rows()
    hidden = [{**rows, "images": torch.zeros(1, 1, 4, 4)}]
    answers = invert(Linear(), squared, hidden, target, Search(steps, smoothness=0.0, starts=2), seed=0)
    return max(psnr(fitted(answer, rows["images"]), rows["images"]) for answer in answers)


def test_a_linear_layer_gives_its_input_away() -> None:
    """From the plain gradient of a linear layer the image comes back exactly; from a private step it does not."""
    rows = linear_rows()
    assert found(plain_gradient(Linear(), squared, rows)) > 50
    noised = [found(private_gradient(Linear(), squared, rows, 1.0, sigma=2.0)) for _ in range(3)]
    assert sorted(noised)[1] < 25


def test_a_private_gradient_is_clipped_and_noised() -> None:
    """Without noise its norm is C at most; with noise its entries have a deviation of sigma C."""
    rows = linear_rows()
    bare = private_gradient(Linear(), squared, rows, 0.5, sigma=0.0)
    assert float(bare[0].norm()) == pytest.approx(0.5, rel=1e-6)
    draws = torch.stack([private_gradient(Linear(), squared, rows, 0.5, sigma=4.0)[0] - bare[0] for _ in range(200)])
    assert float(draws.std()) == pytest.approx(2.0, rel=0.05)


def test_a_change_of_one_step_points_along_the_gradient() -> None:
    """AdamW's first step is the gradient's sign; the network is afterwards what it was."""
    network, rows = Linear(), linear_rows()
    before = network.weight.detach().clone()
    change = trained_change(network, squared, [rows], 1e-3)
    assert torch.equal(network.weight, before)
    assert network.weight.grad is None
    gradient = plain_gradient(network, squared, rows)[0]
    torch.testing.assert_close(change[0], 1e-3 * gradient.sign(), rtol=0.01, atol=1e-5)


@pytest.mark.slow
def test_a_diffusion_network_gives_its_image_away() -> None:
    """The positive control: from the plain gradient of a whole network a scan is recognised."""
    torch.manual_seed(0)
    network = MedSegDiff(INVERTED).train()
    people, diffusion = draw_people(30, 16, 0), Diffusion(DiffusionConfig())
    rows = dict(draw_rows(people, 0, 1, diffusion, torch.Generator().manual_seed(0)))
    rows = {name: value[:1] for name, value in rows.items()}
    loss = DiffusionRowLoss(diffusion, precision="fp32")
    target = plain_gradient(network, loss, rows)
    hidden = [{**rows, "images": torch.zeros_like(rows["images"])}]
    truth = rows["images"]
    answers = [fitted(image, truth) for image in invert(network, loss, hidden, target, Search(200), 0)]
    blind = fitted(people.images[1:, :1].mean(dim=0), truth)
    assert max(psnr(answer, truth) for answer in answers) > psnr(blind, truth) + 5


def test_likeness() -> None:
    """The truth is like itself; noise is not; brightness and contrast are given free; PSNR has a closed form."""
    truth = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    assert psnr(truth, truth) == math.inf
    assert ssim(truth, truth) == pytest.approx(1.0, abs=1e-5)
    assert abs(ssim(noise, truth)) < 0.2
    assert psnr(truth + 0.1, truth) == pytest.approx(20 + 20 * math.log10(float(truth.max() - truth.min())), abs=1e-3)
    torch.testing.assert_close(fitted(-3 * truth + 7, truth), truth)
