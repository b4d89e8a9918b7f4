"""The ablations' figures are what their columns say, and the page shows the last ones."""

from __future__ import annotations

import json

import torch

from benchmarks.ablations import FEW, PAGE, VARIANTS, WAYS, BareFusion, segment_each_way, with_table
from benchmarks.turns import RESULTS
from medsegdiff.config import DiffusionConfig, SamplingConfig, preset
from medsegdiff.diffusion import Diffusion
from medsegdiff.ensemble import segment_images
from medsegdiff.network import MedSegDiff


def test_each_way_is_what_it_says() -> None:
    """The first of the ensemble's members is the sample without company; the head answers where there is one."""
    torch.manual_seed(0)
    network = MedSegDiff(preset("tiny", image_size=16, base_channels=8, auxiliary_head=True)).eval()
    with torch.no_grad():
        network.out.weight.mul_(30)  # loud, so that samples differ visibly
    images, diffusion, seeds = torch.randn(2, 1, 16, 16), Diffusion(DiffusionConfig()), [3, 4]
    found = segment_each_way(network, diffusion, images, seeds)
    assert set(found) == set(WAYS)
    alone = segment_images(network, diffusion, images, SamplingConfig(steps=FEW), seeds).mean
    torch.testing.assert_close(found[f"{FEW} steps"], alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["auxiliary"], network.auxiliary(images))
    assert all(float((found[a] - found[b]).abs().max()) > 0.01 for a in WAYS for b in WAYS if a < b)


def test_every_variant_is_a_network_and_differs_from_the_default() -> None:
    """Settings that contradict each other, or nothing, would otherwise show after minutes of training."""
    made = {
        name: (preset("tiny", image_size=32, **variant.model), variant.diffusion, variant.residual)
        for name, variant in VARIANTS.items()
    }
    assert len(set(made.values())) == len(VARIANTS)


def test_the_bare_fusion_is_the_residual_one_less_the_image() -> None:
    """(LN(m_I) LN(FF(m_x))) m_I and nothing beside it, in the norms' own arithmetic."""
    torch.manual_seed(0)
    fusion, image, mask = BareFusion(8, 6), torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)
    product = fusion.norm_image(image) * fusion.norm_mask(fusion.parser(mask)) * image
    torch.testing.assert_close(fusion(image, mask), product, atol=1e-5, rtol=0)


def test_the_page_shows_the_last_results() -> None:
    """The table in docs/model.md is that of benchmarks/results/ablations.json, and another result would change it."""
    page, result = PAGE.read_text(), json.loads((RESULTS / "ablations.json").read_text())
    assert with_table(page, result) == page
    result["rows"][0]["dice"]["1 step"] += 0.01
    assert with_table(page, result) != page
