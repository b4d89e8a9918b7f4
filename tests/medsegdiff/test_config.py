"""What a configuration accepts, and what it says of the rest."""

from __future__ import annotations

import math
from typing import Any

import pytest

from medsegdiff.config import (
    PRESETS,
    AugmentConfig,
    DiffusionConfig,
    ModelConfig,
    SamplingConfig,
    TrainingConfig,
    preset,
)
from medsegdiff.errors import UserError
from medsegdiff.strict import parse_config


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (ModelConfig, {"image_size": 0}),
        (ModelConfig, {"image_size": 66}),
        (ModelConfig, {"image_size": 2**45}),
        (ModelConfig, {"base_channels": 8 * 10**15}),
        (ModelConfig, {"blocks_per_level": 200_000}),
        (ModelConfig, {"channel_multipliers": (1,) * 20}),
        (ModelConfig, {"channel_multipliers": (1, 10**9)}),
        (ModelConfig, {"image_channels": 0}),
        (ModelConfig, {"mask_channels": -1}),
        (ModelConfig, {"base_channels": 12}),
        (ModelConfig, {"channel_multipliers": ()}),
        (ModelConfig, {"channel_multipliers": (1, 0, 1)}),
        (ModelConfig, {"fusion_levels": (3,)}),
        (ModelConfig, {"attention_levels": (-1,)}),
        (ModelConfig, {"dropout": 1.0}),
        (ModelConfig, {"dropout": math.nan}),
        (DiffusionConfig, {"timesteps": 1}),
        (DiffusionConfig, {"mask_scale": 0.0}),
        (DiffusionConfig, {"min_snr_gamma": 0.0}),
        (DiffusionConfig, {"min_snr_gamma": math.nan}),
        (DiffusionConfig, {"mask_scale": math.nan}),
        (SamplingConfig, {"steps": 0}),
        (SamplingConfig, {"members": 0}),
        (SamplingConfig, {"members": 1001}),
        (SamplingConfig, {"eta": 1.01}),
        (AugmentConfig, {"rotate_degrees": -1.0}),
        (AugmentConfig, {"noise": 1.0}),
        (AugmentConfig, {"gamma": math.nan}),
        (TrainingConfig, {"batch_size": 0}),
        (TrainingConfig, {"learning_rate": 0.0}),
        (TrainingConfig, {"learning_rate": math.inf}),
        (TrainingConfig, {"weight_decay": -1e-9}),
        (TrainingConfig, {"gradient_clip": 0.0}),
        (TrainingConfig, {"auxiliary_weight": 0.0}),
        (TrainingConfig, {"auxiliary_weight": math.inf}),
        (TrainingConfig, {"warmup_fraction": 1.1}),
        (TrainingConfig, {"final_rate": -0.1}),
        (TrainingConfig, {"foreground_fraction": 2.0}),
    ],
)
def test_values_out_of_range_are_refused_by_name(kind: type, wrong: dict[str, Any]) -> None:
    """In code by ValueError, from a file by UserError; both name the field."""
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        kind(**wrong)
    with pytest.raises(UserError, match=name):
        parse_config(wrong, kind, "file")


@pytest.mark.parametrize(
    ("kind", "key"), [(DiffusionConfig, "schedule"), (DiffusionConfig, "prediction"), (SamplingConfig, "sampler")]
)
def test_unknown_choices_name_the_known_ones(kind: type, key: str) -> None:
    """A schedule, parametrisation or sampler that is none lists those that are."""
    with pytest.raises(UserError, match=rf"{key}: Input should be '\w+'.*found 'other'"):
        parse_config({key: "other"}, kind, "file")


def test_pure_noise_cannot_be_read_as_eps() -> None:
    """zero_terminal_snr with eps is refused and names the way out; with x0 and v it is not."""
    with pytest.raises(UserError, match="zero_terminal_snr needs prediction x0 or v"):
        parse_config({"zero_terminal_snr": True, "prediction": "eps"}, DiffusionConfig, "file")
    for prediction in ("x0", "v"):
        parse_config({"zero_terminal_snr": True, "prediction": prediction}, DiffusionConfig, "file")


@pytest.mark.parametrize(("name", "downsamplings"), [("tiny", 2), ("S", 4), ("B", 5), ("L", 6)])
def test_presets_have_the_depth_of_the_papers_scales(name: str, downsamplings: int) -> None:
    """S, B and L downsample 4, 5 and 6 times."""
    config = preset(name)
    assert config.downsampling == 2**downsamplings
    assert len(config.channel_multipliers) == downsamplings + 1


def test_a_preset_takes_changes_and_keeps_the_rest() -> None:
    """Changed fields change; the table of presets does not."""
    assert preset("tiny", image_size=32, mask_channels=4).image_size == 32
    assert preset("tiny", image_size=32).base_channels == preset("tiny").base_channels
    assert PRESETS["tiny"]["image_size"] == 64


def test_wrong_presets_are_the_users_errors() -> None:
    """An unknown name lists the known ones; a change that does not fit is explained."""
    with pytest.raises(UserError, match="choose one of tiny, S, B, L"):
        preset("XL")
    with pytest.raises(UserError, match="image_size 100 is not divisible by 16"):
        preset("S", image_size=100)
