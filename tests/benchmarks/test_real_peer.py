"""The peer is trained as stated: its loss, its rate, its memory of momentum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.real import dynunet
from benchmarks.real.plan import PLANS, Plan
from medsegdiff.labels import LabelScheme

BINARY = LabelScheme(("background", "tumour"), ("tumour",), ((1,),))


def test_deep_supervision_halves_from_head_to_head() -> None:
    """The loss of three heads is (L1 + L2 / 2 + L3 / 4) / 1.75, each Dice plus cross-entropy written out."""
    generator = torch.Generator().manual_seed(0)
    answers = torch.randn(2, 3, 1, 6, 6, generator=generator)
    masks = (torch.randn(2, 1, 6, 6, generator=generator) > 0).float() * 2 - 1

    def obvious(logits: torch.Tensor) -> torch.Tensor:
        p, truth = logits.sigmoid(), (masks > 0).float()
        dice = [(2 * (a * t).sum() + 1) / (a.sum() + t.sum() + 1) for a, t in zip(p, truth, strict=True)]
        return F.binary_cross_entropy(p, truth) + 1 - torch.stack(dice).mean()

    expected = sum(obvious(answers[:, head]) / 2**head for head in range(3)) / 1.75
    torch.testing.assert_close(dynunet.supervised_loss(answers, masks), expected)


def test_the_network_is_nnu_nets(small_plan: Plan) -> None:
    """At 128 px: six levels down to 4 px, widths 32 to 512, about as many parameters as preset S."""
    plan = PLANS["full"]
    task = plan.tasks[0]
    with torch.device("meta"):
        network = dynunet.make_network(plan, task, 3, BINARY, seed=0)
    assert list(network.filters) == [32, 64, 128, 256, 512, 512]
    assert 20e6 < sum(p.numel() for p in network.parameters()) < 22e6
    assert len(network.heads) == 3


def test_one_seed_gives_one_network(small_plan: Plan) -> None:
    """Fresh weights come from the seed alone and leave torch's own stream as it was."""
    task = small_plan.tasks[0]
    state = torch.get_rng_state()
    first, second, other = (dynunet.make_network(small_plan, task, 1, BINARY, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("batch", [1, 3])
def test_flop_of_a_step_count_the_batch(small_plan: Plan, batch: int) -> None:
    """FLOP of a step are those of a real step of that batch, counted whole."""
    from dataclasses import replace

    from benchmarks.real.learner import count_flop

    task = replace(small_plan.tasks[0], training=replace(small_plan.tasks[0].training, batch_size=batch))
    network = dynunet.make_network(small_plan, task, 1, BINARY, seed=0)
    image = torch.zeros(batch, 1, task.image_size, task.image_size)
    whole = count_flop(lambda: dynunet.supervised_loss(network.train()(image), image).backward())
    assert dynunet.step_flop(network, task, 1, BINARY) == whole
