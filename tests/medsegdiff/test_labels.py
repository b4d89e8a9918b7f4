"""Label indices, diffused channels and masks belong together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medsegdiff.data.cases import DatasetConfig
from medsegdiff.labels import LabelScheme
from medsegdiff.strict import parse_config, plain

BINARY = LabelScheme(("background", "a", "b"), ("both",), ((1, 2),))
MULTICLASS = LabelScheme(("background", "a", "b", "c"), ("x", "y"), ((1, 3), (2,)))
PARTIAL = LabelScheme(("background", "a", "b", "c"), ("x", "y"), ((1,), (2,)))
REGIONS = LabelScheme(("background", "rim", "cup"), ("disc", "cup"), ((1, 2), (2,)))
SCHEMES = [BINARY, MULTICLASS, PARTIAL, REGIONS]


def labels_of(scheme: LabelScheme, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, len(scheme.labels), (3, 5, 4), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("scheme", "kind", "channels"),
    [(BINARY, "binary", 1), (MULTICLASS, "multiclass", 3), (PARTIAL, "multiclass", 3), (REGIONS, "regions", 2)],
)
def test_kind_and_channels_follow_from_the_targets(scheme: LabelScheme, kind: str, channels: int) -> None:
    """One target is binary, disjoint ones are one-hot with background, overlapping ones have a channel each."""
    assert (scheme.kind, scheme.channels) == (kind, channels)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_truth_equals_the_obvious_loop(scheme: LabelScheme) -> None:
    """A voxel belongs to a target exactly where its label is among the target's members."""
    labels = labels_of(scheme, 0)
    truth = scheme.truth(labels)
    assert truth.shape == (3, len(scheme.targets), 5, 4)
    assert truth.dtype == torch.bool
    for n in range(3):
        for t, members in enumerate(scheme.members):
            for h in range(5):
                for w in range(4):
                    assert truth[n, t, h, w] == (int(labels[n, h, w]) in members)


@given(scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 10_000), noise=st.floats(0, 0.9))
def test_decode_undoes_encode(scheme: LabelScheme, seed: int, noise: float) -> None:
    """Encoded labels decode to the truth, also when every channel is off by less than 1."""
    labels = labels_of(scheme, seed)
    encoded = scheme.encode(labels)
    assert encoded.shape == (3, scheme.channels, 5, 4)
    assert set(encoded.unique().tolist()) <= {-1.0, 1.0}
    generator = torch.Generator().manual_seed(seed)
    disturbed = encoded + noise * (torch.rand(encoded.shape, generator=generator) * 2 - 1)
    assert torch.equal(scheme.decode(disturbed), scheme.truth(labels))


def test_multiclass_is_one_hot_with_the_background_first() -> None:
    """Exactly one channel is +1; a label that no target holds counts as background."""
    encoded = PARTIAL.encode(torch.tensor([[[0, 1, 2, 3]]], dtype=torch.uint8))
    expected = torch.tensor([[1, -1, -1, 1], [-1, 1, -1, -1], [-1, -1, 1, -1]]).float()
    assert torch.equal(encoded[0, :, 0], expected)


@given(st.integers(0, 10_000))
def test_disjoint_targets_stay_disjoint_whatever_the_network_says(seed: int) -> None:
    """No voxel is given to two targets of a multiclass scheme."""
    noise = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    assert MULTICLASS.decode(noise).sum(dim=1).max() <= 1


def test_decode_takes_volumes() -> None:
    """Decoding works for any number of axes behind the channels."""
    assert MULTICLASS.decode(torch.randn(1, 3, 4, 5, 6)).shape == (1, 2, 4, 5, 6)


def test_default_targets_are_the_labels_without_the_background() -> None:
    """Wherever the background stands in dataset.yaml its index is 0."""
    config = DatasetConfig("d", "MR", ("T1",), {"a": 1, "background": 0, "b": [2, 3]})  # type: ignore[dict-item]
    scheme = LabelScheme.of(config)
    assert scheme == LabelScheme(("background", "a", "b"), ("a", "b"), ((1,), (2,)))


def test_a_scheme_survives_its_way_through_plain_data() -> None:
    """A scheme written into a model's metadata reads back equal."""
    assert parse_config(plain(REGIONS), LabelScheme, "metadata") == REGIONS


@pytest.mark.parametrize(
    ("targets", "members", "reason"),
    [
        ((), (), "targets"),
        (("a",), ((1,), (2,)), "as many"),
        (("a", "a"), ((1,), (2,)), "repeat"),
        (("a",), ((),), "joins"),
        (("a",), ((0,),), "run from 1"),
        (("a",), ((3,),), "run from 1"),
    ],
)
def test_impossible_schemes_are_refused(
    targets: tuple[str, ...], members: tuple[tuple[int, ...], ...], reason: str
) -> None:
    """Targets must be named once and join labels that exist, never the background."""
    with pytest.raises(ValueError, match=reason):
        LabelScheme(("background", "a", "b"), targets, members)
