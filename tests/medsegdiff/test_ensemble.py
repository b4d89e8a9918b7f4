"""Members of an ensemble: independent of their company, fused by mean and vote."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medsegdiff.config import DiffusionConfig, Fuse, ModelConfig, Sampler, SamplingConfig
from medsegdiff.diffusion import Diffusion
from medsegdiff.ensemble import Ensemble, _binary_entropy, derive_seed, segment_images
from medsegdiff.memory import Bound
from medsegdiff.network import MedSegDiff
from medsegdiff.sampling import sample_masks
from medsegdiff.staple import staple, staple_labels

CONFIG = ModelConfig(
    image_size=8, image_channels=1, mask_channels=2, base_channels=8, channel_multipliers=(1, 2), fusion_levels=(1,),
    attention_levels=(1,),
)  # fmt: skip


def fresh_network() -> MedSegDiff:
    """A network with a loud last layer, so that samples differ visibly."""
    torch.manual_seed(0)
    network = MedSegDiff(CONFIG)
    with torch.no_grad():
        network.out.weight.mul_(30)
    return network


def images(count: int) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def diffusion(scale: float = 1.0, prediction: str = "x0") -> Diffusion:
    return Diffusion(DiffusionConfig(timesteps=100, mask_scale=scale, prediction=prediction))  # type: ignore[arg-type]


SAMPLERS: list[Sampler] = ["ddpm", "ddim", "dpmpp_2m"]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_batches_change_nothing(sampler: Sampler, batch: int) -> None:
    """Members in batches of any size equal each (image, member) sampled by itself."""
    network, config = fresh_network(), SamplingConfig(sampler, steps=3, members=3, eta=0.5)
    seeds = [11, 22]
    together = segment_images(network, diffusion(), images(2), config, seeds, batch=batch)
    for index, seed in enumerate(seeds):
        members = torch.cat(
            [
                sample_masks(network, diffusion(), images(2), [index], config, [derive_seed(seed, member)]).detach()
                for member in range(3)
            ]
        )
        torch.testing.assert_close(together.mean[index], members.mean(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_company_of_an_image_does_not_matter(sampler: Sampler) -> None:
    """An image with its seed gives the same mean alone, in another place and among others."""
    network, config = fresh_network(), SamplingConfig(sampler, steps=3, members=2, eta=1.0)
    three = segment_images(network, diffusion(), images(3), config, [1, 2, 3])
    turned = segment_images(network, diffusion(), images(3).flip(0), config, [3, 2, 1])
    alone = segment_images(network, diffusion(), images(3)[1:2], config, [2])
    torch.testing.assert_close(three.mean, turned.mean.flip(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(three.mean[1:2], alone.mean, atol=1e-4, rtol=1e-4)
    other_seed = segment_images(network, diffusion(), images(3)[1:2], config, [4])
    assert float((other_seed.mean - alone.mean).abs().max()) > 0.01


def test_members_differ_and_equal_seeds_agree_to_the_bit() -> None:
    """Members draw different noise; the whole repeats exactly and leaves torch's own random state alone."""
    network, config = fresh_network(), SamplingConfig(steps=3, members=4)
    state = torch.random.get_rng_state()
    first = segment_images(network, diffusion(), images(2), config, [5, 6])
    again = segment_images(network, diffusion(), images(2), config, [5, 6])
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.entropy, again.entropy)
    assert torch.equal(state, torch.random.get_rng_state())
    assert float(first.entropy.max()) > 0, "some members disagree somewhere"


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
@pytest.mark.parametrize("members", [1, 5])
def test_mean_and_entropy_keep_to_their_ranges(scale: float, prediction: str, members: int) -> None:
    """The mean lies in [-1, 1] and the entropy in [0, 1], whatever the input scale and the parametrisation."""
    config = SamplingConfig(steps=3, members=members)
    result = segment_images(fresh_network(), diffusion(scale, prediction), images(2), config, [0, 1])
    assert result.mean.shape == result.entropy.shape == (2, 2, 8, 8)
    assert float(result.mean.abs().max()) <= 1 + 1e-6
    assert float(result.mean.abs().max()) > 0.05
    assert bool(((result.entropy >= 0) & (result.entropy <= 1 + 1e-6)).all())


def test_entropy_is_that_of_the_votes() -> None:
    """With members known, the entropy is -p log2 p - q log2 q of the share of positive members, by loop."""
    network, config = fresh_network(), SamplingConfig(steps=2, members=4)
    result = segment_images(network, diffusion(), images(1), config, [9])
    members = sample_masks(network, diffusion(), images(1), [0] * 4, config, [derive_seed(9, m) for m in range(4)])
    for k in range(2):
        for y in range(8):
            for x in range(8):
                p = sum(float(member[k, y, x]) > 0 for member in members) / 4
                expected = -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)
                assert float(result.entropy[0, k, y, x]) == pytest.approx(expected, abs=1e-5)


@given(p=st.floats(0, 1))
@settings(deadline=None)
def test_binary_entropy_is_bounded_and_symmetric(p: float) -> None:
    """0 at certainty, 1 bit at a half, the same for p and 1 - p."""
    value = float(_binary_entropy(torch.tensor(p, dtype=torch.float64)))
    assert 0 <= value <= 1 + 1e-12
    assert value == pytest.approx(float(_binary_entropy(torch.tensor(1 - p, dtype=torch.float64))), abs=1e-9)


def test_binary_entropy_at_known_points() -> None:
    """No NaN at the ends, 1 at a half, 0.8113 at a quarter."""
    known = _binary_entropy(torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(known.float(), torch.tensor([0.0, 0.811278, 1.0, 0.0]))


def test_a_sample_is_not_the_networks_raw_answer() -> None:
    """With several steps the mask differs from the first answer to pure noise."""
    network, config = fresh_network(), SamplingConfig(steps=1)
    one = sample_masks(network, diffusion(), images(1), [0], config, [7])
    many = sample_masks(network, diffusion(), images(1), [0], SamplingConfig(steps=8), [7])
    assert float((one - many).abs().max()) > 0.01


def test_derived_seeds_are_the_same_everywhere_and_differ_by_part() -> None:
    """Pinned, so that a model's masks repeat on every machine; parts and their order matter."""
    assert derive_seed(0, "noise", 1) == derive_seed("0", "noise", "1")
    seeds = {derive_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_sampling_puts_the_network_in_eval() -> None:
    """Dropout is off while masks are drawn, even straight from training."""
    network = fresh_network().train()
    segment_images(network, diffusion(), images(1), SamplingConfig(steps=1), [0])
    assert not network.training


def members_of(image: int, seed: int, count: int, config: SamplingConfig) -> Tensor:
    """Every member by itself, (M, K, H, W)."""
    seeds = [derive_seed(seed, member) for member in range(count)]
    return sample_masks(fresh_network(), diffusion(), images(image + 1), [image] * count, config, seeds).detach()


def test_variance_is_that_of_the_members() -> None:
    """The members' population variance, by torch; between 0 and 1, and 0 for one member."""
    config = SamplingConfig(steps=2, members=5)
    result = segment_images(fresh_network(), diffusion(), images(1), config, [9])
    expected = members_of(0, 9, 5, config).var(dim=0, correction=0)
    torch.testing.assert_close(result.variance[0], expected, atol=1e-5, rtol=1e-4)
    assert 0.01 < float(result.variance.max()) <= 1
    one = segment_images(fresh_network(), diffusion(), images(1), SamplingConfig(steps=2), [9])
    assert torch.equal(one.variance, torch.zeros_like(one.variance))


@pytest.mark.parametrize("exclusive", [False, True])
def test_majority_and_staple_fuse_what_the_members_chose(exclusive: bool) -> None:
    """Votes by loop: positive channels, or the largest alone; STAPLE sees both images as one case."""
    config = SamplingConfig(steps=2, members=5, fuse="staple")
    result = segment_images(fresh_network(), diffusion(), images(2), config, [9, 4], exclusive=exclusive)
    members = torch.stack([members_of(0, 9, 5, config), members_of(1, 4, 5, config)], dim=1)  # (M, N, K, H, W)
    labels = members.argmax(dim=2)
    chosen = torch.stack([labels == k for k in range(2)], dim=2) if exclusive else members > 0
    share = chosen.float().mean(dim=0)
    torch.testing.assert_close(result.share, share)
    torch.testing.assert_close(result.fused("majority"), 2 * share - 1)
    assert torch.equal(result.fused("majority") > 0, share > 0.5)
    assert torch.equal(result.fused("mean"), result.mean)
    if exclusive:
        truth = staple_labels(labels, 2).probability.movedim(0, 1)
    else:
        truth = torch.stack([staple(chosen[:, :, k]).probability for k in range(2)], dim=1)
    torch.testing.assert_close(result.fused("staple"), (2 * truth - 1).float(), atol=1e-5, rtol=0)
    by_slice = torch.cat([part.fused("staple") for part in result.split([1, 1])])
    assert float((by_slice - result.fused("staple")).abs().max()) > 0.01, "rates of a slice are not those of a case"


@pytest.mark.parametrize("how", ["mean", "majority", "staple"])
def test_fusing_one_member_keeps_its_mask(how: Fuse) -> None:
    """Whatever the rule, a single member is the result."""
    config = SamplingConfig(steps=2, fuse=how)
    result = segment_images(fresh_network(), diffusion(), images(2), config, [1, 2])
    assert torch.equal(result.fused(how) > 0, result.mean > 0)
    assert float(result.fused(how).abs().max()) <= 1


def test_parts_are_joined_and_split_as_they_were() -> None:
    """Images in two calls, joined, equal one call; split again each part has its own."""
    config = SamplingConfig(steps=2, members=3, fuse="staple")
    parts = [segment_images(fresh_network(), diffusion(), images(3)[i : i + 1], config, [i]) for i in range(3)]
    joined = Ensemble.join(parts)
    first, second = joined.split([1, 2])
    for name in ("mean", "entropy", "variance", "share"):
        assert torch.equal(getattr(joined, name)[1], getattr(parts[1], name)[0])
        assert torch.equal(getattr(first, name), getattr(parts[0], name))
        assert torch.equal(getattr(second, name)[1], getattr(parts[2], name)[0])
    assert first.choices is not None
    assert second.choices is not None
    assert parts[2].choices is not None
    assert torch.equal(second.choices[:, 1], parts[2].choices[:, 0])
    assert first.choices.shape == (3, 1, 2, 8, 8)
    assert segment_images(fresh_network(), diffusion(), images(1), SamplingConfig(members=2), [0]).choices is None


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that holds three samples: the batch falls to two and stays there, and the result is the same."""
    network, config = fresh_network(), SamplingConfig(steps=2, members=3)
    whole = segment_images(network, diffusion(), images(3), config, [1, 2, 3])
    tried: list[int] = []

    def small(*arguments: Any) -> Tensor:
        tried.append(len(arguments[3]))
        if tried[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample_masks(*arguments)

    monkeypatch.setattr("medsegdiff.ensemble.sample_masks", small)
    bound = Bound(16)
    halved = segment_images(network, diffusion(), images(3), config, [1, 2, 3], bound)
    assert tried == [9, 8, 4, 2, 2, 2, 2, 1]
    assert bound.items == 2
    for name in ("mean", "variance", "share"):
        torch.testing.assert_close(getattr(halved, name), getattr(whole, name), atol=1e-4, rtol=1e-4)


def test_the_watcher_sees_every_member_once() -> None:
    """In order, before they are added up; their mean is the result's."""
    seen: dict[tuple[int, int], Tensor] = {}
    config = SamplingConfig(steps=2, members=3)
    result = segment_images(
        fresh_network(), diffusion(), images(2), config, [1, 2], batch=4,
        watch=lambda pairs, masks: seen.update(zip(pairs, masks, strict=True)),
    )  # fmt: skip
    assert list(seen) == [(index, member) for index in range(2) for member in range(3)]
    mean = sum(seen[1, member] for member in range(3)) / 3
    torch.testing.assert_close(result.mean[1], mean)
