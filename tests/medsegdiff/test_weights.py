"""Model files: what is written comes back, and anything else is refused in one line."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from medsegdiff.config import DiffusionConfig, ModelConfig, SamplingConfig
from medsegdiff.data.cases import DatasetConfig
from medsegdiff.errors import UserError
from medsegdiff.network import MedSegDiff, channels_last
from medsegdiff.strict import canonical_json, plain
from medsegdiff.weights import (
    METADATA_KEY,
    ModelCard,
    build,
    hash_weights,
    initial_weights,
    load_model,
    save_model,
    serialise,
    weight_shapes,
)

MODEL = ModelConfig(
    image_size=8, mask_channels=3, base_channels=8, channel_multipliers=(1, 2), fusion_levels=(1,),
    attention_levels=(1,),
)  # fmt: skip
CARD = ModelCard(
    MODEL,
    DiffusionConfig(timesteps=100, mask_scale=0.5),
    SamplingConfig(steps=3, members=2),
    DatasetConfig("made", "MR", ("T1",), {"background": 0, "näher": (1, 4), "b": 2}),
)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return initial_weights(MODEL, 0)


def refused(path: Path, *words: str) -> None:
    """The file is refused in one line that names it and holds the words."""
    with pytest.raises(UserError) as caught:
        load_model(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    for word in words:
        assert word in text


def test_a_model_comes_back_as_it_was_saved(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """Weights to the bit, card, label scheme and diffusion; the order of labels, which is that of channels, too."""
    save_model(tmp_path / "deep" / "model.safetensors", CARD, weights)
    back = load_model(tmp_path / "deep" / "model.safetensors")
    assert plain(back.card) == plain(CARD)
    assert back.scheme.targets == ("näher", "b")
    assert back.diffusion.config == CARD.diffusion
    assert all(torch.equal(back.network.state_dict()[name], value) for name, value in weights.items())
    assert hash_weights(back.network.state_dict()) == hash_weights(weights)


def test_equal_models_are_equal_bytes(weights: dict[str, Tensor]) -> None:
    """Order of the dictionary and layout in memory leave no trace; another weight or setting does."""
    network = channels_last(MedSegDiff(MODEL))
    network.load_state_dict(weights)
    first = serialise(CARD, weights)
    assert serialise(CARD, dict(reversed(list(weights.items())))) == first
    assert serialise(CARD, network.state_dict()) == first
    assert serialise(replace(CARD, sampling=SamplingConfig(steps=4)), weights) != first
    assert serialise(CARD, weights | {"out.bias": weights["out.bias"] + 1}) != first


def test_initial_weights_come_from_the_seed_alone(weights: dict[str, Tensor]) -> None:
    """Equal seeds agree whatever torch drew before, other seeds differ, and the caller's random state is untouched."""
    torch.rand(5)
    state = torch.random.get_rng_state()
    assert hash_weights(initial_weights(MODEL, 0)) == hash_weights(weights)
    assert torch.equal(state, torch.random.get_rng_state())
    assert hash_weights(initial_weights(MODEL, 1)) != hash_weights(weights)


def test_shapes_are_told_without_the_weights(weights: dict[str, Tensor]) -> None:
    """`weight_shapes` names exactly what a network holds."""
    assert weight_shapes(MODEL) == {name: tuple(value.shape) for name, value in weights.items()}


def test_a_built_network_takes_the_given_weights(weights: dict[str, Tensor]) -> None:
    """`build` loads what it is given and refuses weights of another shape."""
    assert torch.equal(build(CARD, weights).network.out.bias, weights["out.bias"])
    with pytest.raises(RuntimeError):
        build(CARD, {name: value for name, value in weights.items() if name != "out.bias"})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """No file, or a folder in its place."""
    refused(tmp_path / "none.safetensors", "no such file")
    refused(tmp_path, "is a folder")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, weights: dict[str, Tensor], keep: int) -> None:
    """Cut anywhere: at nothing, inside the header's length, inside the header, before the last byte."""
    path = tmp_path / "torn.safetensors"
    path.write_bytes(serialise(CARD, weights)[:keep])
    refused(path, "not a readable safetensors file")


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    """A pickle that would write a file when loaded is refused, and nothing is written."""
    mark = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (mark,))

    for name, data in (("a.pt", pickle.dumps(Bomb())), ("b.safetensors", pickle.dumps({"w": Bomb()}))):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "not a readable safetensors file")
    torch.save({"w": torch.zeros(2)}, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", "not a readable safetensors file")
    assert not mark.exists()


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    """A proper file of someone else's, with and without metadata."""
    path = tmp_path / "theirs.safetensors"
    for metadata in (None, {"format": "pt"}):
        path.write_bytes(save({"w": torch.zeros(2)}, metadata=metadata))
        refused(path, "not a model of MedSegFed", METADATA_KEY)


@pytest.mark.parametrize(
    ("metadata", "word"),
    [
        ("{", "damaged"),
        ("[]", "expected a mapping"),
        ("{}", "required"),
        (canonical_json(plain(CARD) | {"colour": 1}), "unknown key"),
        (canonical_json(plain(CARD) | {"format": 99}), "format 99"),
        (canonical_json(plain(CARD) | {"model": {"base_channels": -8}}), "base_channels"),
        (canonical_json(plain(CARD) | {"model": {"base_channels": "many"}}), "base_channels"),
    ],
)
def test_wrong_metadata_is_refused(tmp_path: Path, weights: dict[str, Tensor], metadata: str, word: str) -> None:
    """No JSON, no mapping, missing or unknown keys, values out of range, a later format."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(weights, metadata={METADATA_KEY: metadata}))
    refused(path, word)


def test_weights_that_do_not_fit_the_card_are_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """One weight missing, one too many, one of another shape: each is named."""
    path = tmp_path / "model.safetensors"
    lacking = {name: value for name, value in weights.items() if name != "out.bias"}
    for wrong in (lacking, weights | {"out.bias2": torch.zeros(1)}, weights | {"out.bias": torch.zeros(7)}):
        save_model(path, CARD, wrong)
        refused(path, "do not fit", "'out.bias")


def test_the_metadata_is_one_canonical_text(weights: dict[str, Tensor]) -> None:
    """One key, for several would be written in random order; labels in their own order, not the alphabet's."""
    data = serialise(CARD, weights)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == [METADATA_KEY]
    described = json.loads(header["__metadata__"][METADATA_KEY])
    assert described == plain(CARD)
    assert list(described["dataset"]["labels"]) == ["background", "näher", "b"]


def test_the_hash_sees_name_type_shape_and_value() -> None:
    """Anything that makes another model makes another hash; order and layout do not."""
    one = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(())}
    changes = [
        {"c": one["a"], "b": one["b"]},
        {"a": one["a"].reshape(3, 2), "b": one["b"]},
        {"a": one["a"].view(torch.int32), "b": one["b"]},
        {"a": one["a"].nextafter(torch.tensor(9.0)), "b": one["b"]},
        {"a": one["a"], "b": torch.tensor(-0.0)},
        {"a": one["a"]},
        {"a": one["b"], "b": one["a"]},
    ]
    hashes = {hash_weights(one), *(hash_weights(change) for change in changes)}
    assert len(hashes) == len(changes) + 1
    assert hash_weights({"b": one["b"], "a": one["a"].t().contiguous().t()}) == hash_weights(one)
