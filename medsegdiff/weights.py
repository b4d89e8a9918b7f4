"""model.safetensors: weights as plain tensors, with all that is needed to rebuild the network and read a scan for it.

The configuration is JSON under one metadata key, in the order of declaration, without time, path or run name: equal
weights and settings give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from medsegdiff.config import DiffusionConfig, ModelConfig, SamplingConfig
from medsegdiff.data.dataset import DatasetConfig
from medsegdiff.diffusion import Diffusion
from medsegdiff.errors import UserError
from medsegdiff.files import no_model, write_atomic
from medsegdiff.labels import LabelScheme
from medsegdiff.network import MedSegDiff
from medsegdiff.strict import Strict, compact_json, parse_config

METADATA_KEY = "medsegfed"
FORMAT = 1


@dataclass(frozen=True)
class ModelCard(Strict):
    """Everything but the weights: how the network is built, how it is sampled, what data it speaks of."""

    model: ModelConfig
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    dataset: DatasetConfig
    format: int = FORMAT


@dataclass(frozen=True)
class Segmenter:
    """A model ready for use."""

    card: ModelCard
    network: MedSegDiff
    diffusion: Diffusion
    scheme: LabelScheme


def build(card: ModelCard, weights: Mapping[str, Tensor] | None = None) -> Segmenter:
    """A network of the card's shape, with the given weights or fresh ones from torch's current seed."""
    network = MedSegDiff(card.model)
    if weights is not None:
        network.load_state_dict(dict(weights))
    return Segmenter(card, network, Diffusion(card.diffusion), LabelScheme.of(card.dataset))


def initial_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Fresh weights from `seed`, on the CPU, without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: value.detach() for name, value in MedSegDiff(config).state_dict().items()}


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a network, without allocating it."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in MedSegDiff(config).state_dict().items()}


def held_to(values: Mapping[str, Tensor], longest: float) -> dict[str, Tensor]:
    """The values, shortened to `longest` where their common 2-norm is above it, float32.

    Guarantees:
        Up to 1.01 times `longest`, which rounding may make of what is exactly that long, no bit changes.
        The same bits for any number of threads (numpy sums with one).
    """
    squares = (float(np.square(value.double().numpy()).sum()) for value in values.values())
    norm = math.sqrt(math.fsum(squares))
    if norm <= 1.01 * longest:
        return dict(values)
    return {name: (value.double() * (longest / norm)).float() for name, value in values.items()}


def serialise(card: ModelCard, weights: Mapping[str, Tensor]) -> bytes:
    """The bytes of a model file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(weights.items())}
    return save(tensors, metadata={METADATA_KEY: compact_json(card)})


def save_model(path: Path, card: ModelCard, weights: Mapping[str, Tensor]) -> None:
    """Write a model file atomically."""
    write_atomic(path, serialise(card, weights))


def load_model(path: Path) -> Segmenter:
    """Read a model file written by `save_model`.

    Raises:
        UserError: no file, no safetensors, no MedSegFed metadata, or weights that do not fit the stated network.
    """
    tensors, metadata = read_tensors(path)
    if METADATA_KEY not in metadata:
        raise UserError(
            f"{path}: is a safetensors file, but not a model of MedSegFed (metadata key '{METADATA_KEY}' is missing). "
            "Give the model.safetensors of a run folder."
        )
    try:
        described: Any = json.loads(metadata[METADATA_KEY])
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"{path}: its metadata is damaged ({error}). Take the file from the run folder again."
        ) from error
    card = parse_config(described, ModelCard, source=f"{path} (metadata)")
    if card.format != FORMAT:
        raise UserError(f"{path}: model format {card.format}, this version reads {FORMAT}. Update medsegfed.")
    expected = weight_shapes(card.model)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        odd = sorted(set(found.items()) ^ set(expected.items()))[0][0]
        raise UserError(
            f"{path}: its weights do not fit the network its metadata states (first at '{odd}'). The file is damaged."
        )
    _check_fit(path, card)
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise UserError(
            f"{path}: {len(bad)} of its arrays hold values that are not finite (first '{bad[0]}'). The file is damaged."
        )
    return build(card, tensors)


def _check_fit(path: Path, card: ModelCard) -> None:
    """The network must read the dataset's channels and answer in its targets' channels."""
    stated = (card.model.image_channels, card.model.mask_channels)
    due = (len(card.dataset.channels), LabelScheme.of(card.dataset).channels)
    if stated != due:
        raise UserError(
            f"{path}: its network has {stated[0]} image and {stated[1]} mask channels, its dataset asks for {due[0]} "
            f"and {due[1]}. The file was changed from outside; take it from the run folder again."
        )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file. Raises UserError when it is none."""
    if not path.is_file():
        raise UserError(no_model(path))
    try:
        with safe_open(str(path), framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(
            f"{path}: is not a readable safetensors file ({error}). Give the model.safetensors of a run."
        ) from error


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names, types, shapes and bytes of the tensors in name order: the model's identity."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_packed(data: bytes, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """`hash_weights` of float32 tensors that lie end to end, little endian, in the order of their names."""
    digest, view, at = hashlib.sha256(), memoryview(data), 0
    for name in sorted(shapes):
        size = 4 * math.prod(shapes[name])
        digest.update(f"{name}|{torch.float32}|{tuple(shapes[name])}|".encode())
        digest.update(view[at : at + size])
        at += size
    return digest.hexdigest()
