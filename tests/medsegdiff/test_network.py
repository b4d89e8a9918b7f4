"""The denoiser's promises: what it depends on, what it holds, what sizes it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from medsegdiff.config import PRESETS, ModelConfig, preset
from medsegdiff.ff_parser import DynamicFusion
from medsegdiff.network import Attention, MedSegDiff, channels_last, parameter_count, timestep_embedding

SMALL = ModelConfig(
    image_size=16, image_channels=2, mask_channels=3, base_channels=8, channel_multipliers=(1, 2, 3),
    fusion_levels=(1, 2), attention_levels=(2,),
)  # fmt: skip
FUSIONS: list[tuple[int, ...]] = [(), (0,), (1,), (2,), (0, 2), (1, 2)]


def network(config: ModelConfig = SMALL, seed: int = 0) -> MedSegDiff:
    torch.manual_seed(seed)
    return MedSegDiff(config)


def inputs(config: ModelConfig = SMALL, batch: int = 2, size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A noisy mask, timesteps and an image."""
    generator = torch.Generator().manual_seed(1)
    side = size or config.image_size
    mask = torch.randn(batch, config.mask_channels, side, side, generator=generator)
    image = torch.randn(batch, config.image_channels, side, side, generator=generator)
    return mask, torch.randint(0, 1000, (batch,), generator=generator), image


@pytest.mark.parametrize("fusion_levels", FUSIONS)
def test_every_parameter_receives_a_gradient(fusion_levels: tuple[int, ...]) -> None:
    """No parameter is left out of the loss, wherever the fusion stands."""
    config = replace(SMALL, fusion_levels=fusion_levels, blocks_per_level=2)
    net = network(config)
    net(*inputs(config)).square().mean().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert silent == []
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


def test_forward_creates_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer made inside forward would be random at every call and never trained."""
    net, made = network(), []
    first = nn.Module.__init__

    def counted(self: nn.Module, *args: object, **kwargs: object) -> None:
        made.append(type(self).__name__)
        first(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__init__", counted)
    before = list(net.state_dict())
    net(*inputs())
    assert made == []
    assert list(net.state_dict()) == before
    network()
    assert "Conv2d" in made, "the counter counts"


@pytest.mark.parametrize("fusion_levels", FUSIONS)
@torch.no_grad()
def test_cached_image_features_give_the_same_answer(fusion_levels: tuple[int, ...]) -> None:
    """`denoise` on `image_features` equals `forward`, and the features know nothing of mask or time."""
    config = replace(SMALL, fusion_levels=fusion_levels)
    net, (mask, t, image) = network(config).eval(), inputs(config)
    features = net.image_features(image)
    assert len(features) == min(fusion_levels, default=2) + 1
    kept = [level.clone() for level in features]
    assert torch.equal(net.denoise(mask, t, features), net(mask, t, image))
    assert torch.equal(net.denoise(-mask, t // 2, features), net(-mask, t // 2, image))
    assert all(torch.equal(a, b) for a, b in zip(features, kept, strict=True)), "features are reused, not changed"
    assert not torch.allclose(net.denoise(mask, t, net.image_features(image.flip(0))), net(mask, t, image), atol=1e-4)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_state_is_real_and_holds_no_batch_statistics(name: str) -> None:
    """Every preset: float32 entries alone, no buffers, no BatchNorm, nothing complex."""
    with torch.device("meta"):
        net = MedSegDiff(preset(name))
    assert {value.dtype for value in net.state_dict().values()} == {torch.float32}
    assert list(net.buffers()) == []
    assert not [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    assert len(net.state_dict()) == len(list(net.parameters()))
    assert parameter_count(net) == sum(value.numel() for value in net.state_dict().values())


@pytest.mark.parametrize("size", [4, 12, 20, 28])
def test_other_image_sizes_work(size: int) -> None:
    """Any size divisible by the downsampling gives a finite answer of the mask's size."""
    net = network().eval()
    mask, t, image = inputs(size=size)
    out = net(mask, t, image)
    assert out.shape == mask.shape
    assert bool(out.isfinite().all())


def test_sides_may_differ() -> None:
    """Height and width are independent."""
    mask, t, image = inputs(size=24)
    assert network()(mask[..., :12], t, image[..., :12]).shape == (2, 3, 24, 12)


@pytest.mark.parametrize(("image_channels", "mask_channels"), [(1, 1), (4, 3), (3, 14)])
@pytest.mark.parametrize("multipliers", [(1,), (1, 1), (1, 3, 5, 2)])
def test_any_channels_classes_and_depth(image_channels: int, mask_channels: int, multipliers: tuple[int, ...]) -> None:
    """The answer has the mask's channels, whatever the image's channels and the levels."""
    config = ModelConfig(
        image_size=16, image_channels=image_channels, mask_channels=mask_channels, base_channels=8,
        channel_multipliers=multipliers, fusion_levels=(0,), attention_levels=(len(multipliers) - 1,),
    )  # fmt: skip
    mask, t, image = inputs(config)
    assert network(config)(mask, t, image).shape == mask.shape


@pytest.mark.parametrize("channels", [8, 32, 40, 64, 72, 104, 112, 200, 256])
def test_attention_takes_any_width_a_network_can_have(channels: int) -> None:
    """Heads always share the channels evenly, 32 each where 32 divides them, and the result has the input's shape."""
    attention = Attention(channels)
    x = torch.randn(1, channels, 2, 3, generator=torch.Generator().manual_seed(0))
    assert attention(x).shape == x.shape
    assert channels % attention.heads == 0
    if channels % 32 == 0:
        assert attention.heads == channels // 32


def test_attention_is_softmax_of_scaled_products() -> None:
    """Two heads equal the formula of Vaswani et al. 2017 written as a loop over heads and cases."""
    torch.manual_seed(0)
    attention, x = Attention(64), torch.randn(2, 64, 3, 4)
    packed = attention.query_key_value(attention.norm(x)).flatten(2)  # (B, 3 C, pixels)
    mixed = torch.empty(2, 64, 12)
    for case in range(2):
        for head in range(2):
            rows = slice(32 * head, 32 * head + 32)
            q, k, v = (packed[case, 64 * part : 64 * part + 64][rows] for part in range(3))
            mixed[case, rows] = v @ torch.softmax(q.T @ k / 32**0.5, dim=1).T
    torch.testing.assert_close(attention(x), x + attention.out(mixed.view(2, 64, 3, 4)), atol=1e-5, rtol=1e-4)


def test_channels_last_changes_the_speed_alone() -> None:
    """The same numbers to 1e-4, with kernels stored channels-last."""
    mask, t, image = inputs()
    plain_answer = network()(mask, t, image)
    fast = channels_last(network())
    assert fast.mask_stem.weight.is_contiguous(memory_format=torch.channels_last)
    answer = fast(
        mask.contiguous(memory_format=torch.channels_last), t, image.contiguous(memory_format=torch.channels_last)
    )
    torch.testing.assert_close(answer, plain_answer, rtol=1e-4, atol=1e-5)


def test_eval_is_deterministic_and_dropout_is_not() -> None:
    """In eval the answer repeats to the bit, also with dropout in the network; in training dropout acts."""
    net = network(replace(SMALL, dropout=0.5))
    assert not torch.equal(net(*inputs()), net(*inputs()))
    net.eval()
    assert torch.equal(net(*inputs()), net(*inputs()))


@torch.no_grad()
def test_time_image_and_mask_all_matter() -> None:
    """The answer moves with each of its three inputs."""
    net = network().eval()
    mask, t, image = inputs()
    answer = net(mask, t, image)
    for other in (net(mask, (t + 300) % 1000, image), net(mask, t, image.flip(0)), net(mask.flip(0), t, image)):
        assert float((other - answer).abs().mean()) > 1e-3 * float(answer.abs().mean())


def test_cases_of_a_batch_do_not_meet() -> None:
    """A case's answer is the same in company and alone: the ground of per-patient gradients."""
    net = network().eval()
    mask, t, image = inputs(batch=3)
    alone = torch.cat([net(mask[i : i + 1], t[i : i + 1], image[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(net(mask, t, image), alone, rtol=1e-4, atol=1e-5)


def test_every_fusion_sees_both_encoders() -> None:
    """At each fusion level the image features leave the fusion changed by the noisy mask, and stay the image's."""
    net, (mask, t, image) = network().eval(), inputs()
    seen: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, Tensor], Tensor], None]:
        return lambda module, args, out: seen.append((name, *args, out))

    for name, fusion in net.fusions.items():
        assert isinstance(fusion, DynamicFusion)
        fusion.register_forward_hook(keep(name))
    net(mask, t, image)
    net(mask.flip(0), t, image)
    assert [name for name, *_ in seen] == ["1", "2", "1", "2"]
    (_, image_1, mask_1, out_1), (_, image_2, mask_2, out_2) = seen[0], seen[2]
    assert torch.equal(image_1, image_2), "before the first fusion the image path does not see the mask"
    assert not torch.allclose(mask_1, mask_2, atol=1e-3)
    assert not torch.allclose(out_1, out_2, atol=1e-3)
    assert not torch.allclose(seen[1][1], seen[3][1], atol=1e-3), "after it, it does"


def test_per_case_gradients_by_vmap_equal_the_loop() -> None:
    """vmap(grad) over functional_call gives the gradients of one case at a time; they sum to the batch's."""
    net, (mask, t, image) = network(), inputs(batch=3)
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def loss(weights: dict[str, Tensor], mask: Tensor, t: Tensor, image: Tensor) -> Tensor:
        answer = torch.func.functional_call(net, weights, (mask[None], t[None], image[None]))
        return answer.square().mean()

    per_case = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(weights, mask, t, image)
    for case in range(3):
        net.zero_grad()
        net(mask[case : case + 1], t[case : case + 1], image[case : case + 1]).square().mean().backward()
        for name, p in net.named_parameters():
            torch.testing.assert_close(per_case[name][case], p.grad, rtol=1e-3, atol=1e-5, msg=name)
    net.zero_grad()
    net(mask, t, image).square().mean().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(per_case[name].mean(0), p.grad, rtol=1e-3, atol=1e-5, msg=name)


HEADED = replace(SMALL, auxiliary_head=True, self_conditioning=True)


@pytest.mark.parametrize("fusion_levels", FUSIONS)
@torch.no_grad()
def test_the_auxiliary_mask_is_the_images_alone(fusion_levels: tuple[int, ...]) -> None:
    """tanh of half the log-odds, of the mask's shape, case by case, with no fusion taking part."""
    net, (mask, _, image) = network(replace(HEADED, fusion_levels=fusion_levels)).eval(), inputs()
    for fusion in net.fusions.values():
        fusion.register_forward_hook(lambda *_: pytest.fail("a fusion was asked"))
    answer = net.auxiliary(image)
    assert answer.shape == mask.shape
    assert float(answer.abs().max()) < 1
    probability = net.auxiliary_logits(net.image_features(image)).sigmoid()
    torch.testing.assert_close(answer, 2 * probability - 1, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(answer[1:], net.auxiliary(image[1:]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(answer[0], answer[1], atol=1e-3)


@torch.no_grad()
def test_the_auxiliary_head_reads_every_level() -> None:
    """Noise in the features of any level moves the mask, the levels beyond the first fusion included."""
    net, (_, _, image) = network(HEADED).eval(), inputs()
    answer = net.auxiliary(image)
    for level, stage in enumerate(net.image_stages):
        hook = stage.register_forward_hook(lambda module, args, out: out + torch.ones_like(out[:, :1]).cumsum(3))
        assert not torch.allclose(net.auxiliary(image), answer, atol=1e-3), level
        hook.remove()
    assert torch.equal(net.auxiliary(image), answer)


@pytest.mark.parametrize("size", [4, 12, 20])
def test_the_auxiliary_head_takes_other_sizes(size: int) -> None:
    """Any size divisible by the downsampling, and sides that differ."""
    mask, _, image = inputs(size=size)
    assert network(HEADED).auxiliary(image).shape == mask.shape
    assert network(HEADED).auxiliary(image[..., :4]).shape == mask[..., :4].shape


def test_a_network_without_the_head_says_so() -> None:
    """There is no silent answer of another kind."""
    with pytest.raises(ValueError, match="auxiliary_head is false"):
        network().auxiliary(inputs()[2])


@torch.no_grad()
def test_the_previous_estimate_is_seen_beside_the_mask() -> None:
    """It changes the answer, none is the same as zeros, and the two are not interchangeable."""
    net, (mask, t, image) = network(HEADED).eval(), inputs()
    estimate = mask.sign()
    answer = net(mask, t, image, estimate)
    assert not torch.allclose(answer, net(mask, t, image), atol=1e-4)
    assert torch.equal(net(mask, t, image), net(mask, t, image, torch.zeros_like(mask)))
    assert not torch.allclose(answer, net(estimate, t, image, mask), atol=1e-4)
    assert torch.equal(net.denoise(mask, t, net.image_features(image), estimate), answer)


def test_an_estimate_for_a_network_that_takes_none_is_an_error() -> None:
    """It is not ignored in silence."""
    mask, t, image = inputs()
    with pytest.raises(ValueError, match="self_conditioning is false"):
        network()(mask, t, image, mask)


def test_the_time_embedding_is_the_papers_sinusoids() -> None:
    """cos and sin of t / 10000^(i / half), by loop; timesteps are told apart."""
    out = timestep_embedding(torch.tensor([0, 1, 537, 999]), 16).double()
    for row, t in zip(out, (0, 1, 537, 999), strict=True):
        for i in range(8):
            angle = torch.tensor(t / 10_000 ** (i / 8), dtype=torch.float64)
            assert float(row[i]) == pytest.approx(float(angle.cos()), abs=1e-4)
            assert float(row[8 + i]) == pytest.approx(float(angle.sin()), abs=1e-4)
    assert len({tuple(row.tolist()) for row in timestep_embedding(torch.arange(1000), 16)}) == 1000


def test_the_first_prediction_is_small() -> None:
    """A fresh network answers near nothing, so that the first loss is near the data's own power."""
    assert float(network()(*inputs()).square().mean()) < 0.1
