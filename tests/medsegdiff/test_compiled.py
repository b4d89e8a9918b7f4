"""torch.compile must not change what a step learns."""

from __future__ import annotations

import pytest
import torch

from medsegdiff.config import DiffusionConfig, ModelConfig
from medsegdiff.devices import autocast
from medsegdiff.diffusion import Diffusion
from medsegdiff.network import MedSegDiff, channels_last
from medsegdiff.objective import denoising_loss

NETWORK = ModelConfig(
    image_size=16, base_channels=16, channel_multipliers=(1, 2), fusion_levels=(1,), attention_levels=()
)


@pytest.mark.slow
def test_compiled_bf16_gradients_are_those_of_the_plain_step() -> None:
    """Compiled bf16 is as near to float32 as plain bf16 is, and no parameter loses its gradient."""
    diffusion = Diffusion(DiffusionConfig())
    torch.manual_seed(0)
    network = channels_last(MedSegDiff(NETWORK))
    images, noise = torch.randn(2, 4, 1, 16, 16)
    masks, t_B = torch.randn(4, 1, 16, 16).sign(), torch.tensor([10, 300, 600, 990])

    def gradients(loss: object, precision: str) -> dict[str, torch.Tensor]:
        network.zero_grad(set_to_none=True)
        with autocast(torch.device("cpu"), precision):  # type: ignore[arg-type]
            value = loss(network, diffusion, images, masks, noise, t_B)  # type: ignore[operator]
        value.backward()
        return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    exact = gradients(denoising_loss, "fp32")
    compiled = gradients(torch.compile(denoising_loss), "bf16")
    assert compiled.keys() == exact.keys()
    for name, expected in exact.items():
        assert 0.5 < float(compiled[name].norm() / expected.norm()) < 2, f"{name}: a gradient was lost"
    whole = [torch.cat([g[name].flatten() for name in exact]) for g in (compiled, exact)]
    assert float((whole[0] - whole[1]).norm() / whole[1].norm()) < 0.02
