"""The loss against slow sums, and what its optional terms may and may not touch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medsegdiff.config import DiffusionConfig, ModelConfig, Prediction, Weighting
from medsegdiff.diffusion import Diffusion
from medsegdiff.network import MedSegDiff
from medsegdiff.objective import denoising_loss, segmentation_loss

MODEL = ModelConfig(
    image_size=8, mask_channels=2, base_channels=8, channel_multipliers=(1, 2), fusion_levels=(1,),
    attention_levels=(1,), auxiliary_head=True, self_conditioning=True,
)  # fmt: skip
T_B = torch.tensor([3, 200, 600, 990])
CONDITION_B = torch.tensor([True, False, True, False])


def network(config: ModelConfig = MODEL, seed: int = 0) -> MedSegDiff:
    """A network with a loud last layer, so that its estimate of x_0 counts."""
    torch.manual_seed(seed)
    made = MedSegDiff(config)
    with torch.no_grad():
        made.out.weight.mul_(20)
    return made


def batch(config: ModelConfig = MODEL, count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Images, masks of +-1 and noise."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, config.mask_channels, 8, 8)
    images = torch.randn(count, config.image_channels, 8, 8, generator=generator)
    return images, torch.randn(shape, generator=generator).sign(), torch.randn(shape, generator=generator)


def gradient(net: MedSegDiff, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def by_loop(logits: Tensor, masks: Tensor) -> float:
    """Cross-entropy and Dice with sums over pixels written out, in plain Python."""
    total = 0.0
    for case_logits, case_masks in zip(logits.tolist(), masks.tolist(), strict=True):
        for channel_logits, channel_masks in zip(case_logits, case_masks, strict=True):
            entropy, overlap, size, pixels = 0.0, 0.0, 0.0, 0
            for row_logits, row_masks in zip(channel_logits, channel_masks, strict=True):
                for logit, mask in zip(row_logits, row_masks, strict=True):
                    p, truth = 1 / (1 + math.exp(-logit)), mask > 0
                    entropy -= math.log(p if truth else 1 - p)
                    overlap += p * truth
                    size += p + truth
                    pixels += 1
            total += entropy / pixels + 1 - (2 * overlap + 1) / (size + 1)
    return total / (logits.shape[0] * logits.shape[1])


@settings(max_examples=25, deadline=None)
@given(cases=st.integers(1, 3), channels=st.integers(1, 3), side=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_segmentation_loss_is_its_formula(cases: int, channels: int, side: int, seed: int) -> None:
    """Dice per case and channel plus cross-entropy, by loop, for any shape."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(cases, channels, side, side, generator=generator)
    masks = torch.randn(logits.shape, generator=generator).sign()
    assert float(segmentation_loss(logits, masks)) == pytest.approx(by_loop(logits, masks), rel=1e-4)


def test_dice_over_the_batch_would_mix_patients() -> None:
    """The loss of two cases is the mean of theirs; Dice with sums over the batch is not."""
    _, masks, noise = batch()
    masks[0] = -1
    logits = 2 * noise
    alone = np.mean([float(segmentation_loss(logits[i : i + 1], masks[i : i + 1])) for i in range(4)])
    assert float(segmentation_loss(logits, masks)) == pytest.approx(alone, rel=1e-5)
    joined = [x.transpose(0, 1).reshape(1, 2, 8, 32) for x in (logits, masks)]
    assert abs(float(segmentation_loss(*joined)) - alone) > 0.01


@pytest.mark.parametrize("kind", ["binary", "one-hot", "regions", "empty"])
def test_the_right_mask_costs_nothing(kind: str) -> None:
    """Sure and right is worth 0, unsure more, wrong most: for one target, one-hot channels, regions and no target."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 3, (2, 8, 8), generator=generator)
    masks = {
        "binary": (classes == 1)[:, None],
        "one-hot": torch.nn.functional.one_hot(classes, 3).movedim(-1, 1),
        "regions": torch.stack([classes > 0, classes > 1], dim=1),
        "empty": torch.zeros(2, 1, 8, 8),
    }[kind].float() * 2 - 1
    right, unsure, wrong = (float(segmentation_loss(sure * masks, masks)) for sure in (20, 0, -20))
    assert right == pytest.approx(0, abs=1e-4)
    assert 0.5 < unsure < wrong


@pytest.mark.parametrize("weighting", get_args(Weighting))
@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_the_loss_is_the_diffusions_plus_the_weighted_heads(prediction: Prediction, weighting: Weighting) -> None:
    """Term by term: what the diffusion says of the answer, and auxiliary_weight times the head's loss."""
    net, diffusion = network(), Diffusion(DiffusionConfig(prediction=prediction, weighting=weighting, mask_scale=0.7))
    images, masks, noise = batch()
    answer = net(diffusion.add_noise(0.7 * masks, noise, T_B), T_B, images)
    first = diffusion.loss(answer, 0.7 * masks, noise, T_B)
    head = segmentation_loss(net.auxiliary_logits(net.image_features(images)), masks)
    for weight in (0.0, 0.5, 2.0):
        loss = denoising_loss(net, diffusion, images, masks, noise, T_B, weight)
        torch.testing.assert_close(loss, first + weight * head)
    assert float(head.detach()) > 0.1


def test_the_head_is_left_out_where_there_is_none_or_its_weight_is_zero() -> None:
    """The same weights without the head give the same loss to the bit, whatever the weight."""
    net, diffusion = network(), Diffusion(DiffusionConfig())
    bare = MedSegDiff(replace(MODEL, auxiliary_head=False))
    bare.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("auxiliary_head")})
    inputs = (diffusion, *batch(), T_B)
    assert torch.equal(denoising_loss(net, *inputs), denoising_loss(bare, *inputs, 0.5))
    found = gradient(net, denoising_loss(net, *inputs))
    assert not [name for name in found if name.startswith("auxiliary_head")]


def manual(net: MedSegDiff, diffusion: Diffusion, detached: bool) -> Tensor:
    """Self-conditioning in two steps by hand: the estimate is shown to the cases of CONDITION_B."""
    images, masks, noise = batch()
    noisy = diffusion.add_noise(masks, noise, T_B)
    estimate = diffusion.clean_from(net(noisy, T_B, images), noisy, T_B).clamp(-1, 1)
    shown = estimate * CONDITION_B[:, None, None, None]
    answer = net(noisy, T_B, images, shown.detach() if detached else shown)
    return diffusion.loss(answer, masks, noise, T_B)


@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_the_estimate_is_shown_without_gradient(prediction: Prediction) -> None:
    """Loss and gradients are those of the two steps by hand; with the estimate in the graph they are not."""
    net, diffusion = network(), Diffusion(DiffusionConfig(prediction=prediction))
    ours = denoising_loss(net, diffusion, *batch(), T_B, 0.0, CONDITION_B)
    torch.testing.assert_close(ours, manual(net, diffusion, detached=True))
    found = gradient(net, ours)
    expected = gradient(net, manual(net, diffusion, detached=True))
    attached = gradient(net, manual(net, diffusion, detached=False))
    assert set(found) == set(expected)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)
    assert any(not torch.allclose(found[name], attached[name], rtol=0.01, atol=1e-3) for name in found)


def test_cases_not_chosen_see_zeros() -> None:
    """Without a choice, or with nobody chosen, the loss is that of no estimate; the chosen cases change it."""
    net, diffusion = network(), Diffusion(DiffusionConfig())

    def loss(condition_B: Tensor | None) -> Tensor:
        return denoising_loss(net, diffusion, *batch(), T_B, 0.0, condition_B)

    assert torch.equal(loss(None), loss(torch.zeros(4, dtype=torch.bool)))
    assert abs(float(loss(CONDITION_B)) - float(loss(None))) > 1e-4
    assert abs(float(loss(CONDITION_B)) - float(loss(~CONDITION_B))) > 1e-4


def test_a_choice_for_a_network_that_takes_no_estimate_is_an_error() -> None:
    """Nobody should believe in a self-conditioning that is not there."""
    net = network(replace(MODEL, self_conditioning=False))
    with pytest.raises(ValueError, match="self_conditioning is false"):
        denoising_loss(net, Diffusion(DiffusionConfig()), *batch(), T_B, 0.0, CONDITION_B)


@pytest.mark.parametrize("weighting", get_args(Weighting))
@pytest.mark.parametrize("first", [1, 2, 3])
def test_microbatches_weighted_by_their_size_are_the_batch(weighting: Weighting, first: int) -> None:
    """Loss and gradient of the whole batch, with every option on, from uneven parts; unweighted parts give another."""
    net, diffusion = network().double(), Diffusion(DiffusionConfig(weighting=weighting))
    images, masks, noise = (tensor.double() for tensor in batch())

    def loss(part: slice) -> Tensor:
        inputs = (images[part], masks[part], noise[part], T_B[part])
        return denoising_loss(net, diffusion, *inputs, 0.5, CONDITION_B[part])

    parts = [slice(0, first), slice(first, 4)]
    weighted = sum((loss(part) * (part.stop - part.start) / 4 for part in parts), torch.zeros(()))
    torch.testing.assert_close(loss(slice(0, 4)).double(), weighted.double(), rtol=1e-6, atol=1e-6)
    whole, summed = gradient(net, loss(slice(0, 4))), gradient(net, weighted)
    assert set(whole) == set(dict(net.named_parameters()))
    for name in whole:
        torch.testing.assert_close(whole[name], summed[name], rtol=1e-4, atol=1e-6, msg=name)
    if first != 2:
        plain = (loss(parts[0]) + loss(parts[1])) / 2
        assert abs(float(plain) - float(weighted)) > 1e-4


def test_under_autocast_the_estimate_takes_no_gradient_away() -> None:
    """Weights cast for the forward without gradient must not be reused, cut from the graph, in the one with it."""
    net, diffusion = network(), Diffusion(DiffusionConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = denoising_loss(net, diffusion, *batch(), T_B, 0.5, CONDITION_B)
    assert loss.dtype == torch.float32
    low, full = gradient(net, loss), gradient(net, denoising_loss(net, diffusion, *batch(), T_B, 0.5, CONDITION_B))
    assert set(low) == set(full) == set(dict(net.named_parameters()))
    for name in low:
        assert float((low[name] - full[name]).norm()) < 0.1 * float(full[name].norm()) + 1e-3, name
