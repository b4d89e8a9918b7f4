"""A model as two ONNX graphs: what is computed once an image, and what is computed once a sampling step.

Every operation is one that common runtimes have. The Fourier filter is written as matrix products: ONNX Runtime refuses
the inverse of a real transform (operator DFT), others have no Fourier transform at all.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from medsegdiff.diffusion import Diffusion, to_clean
from medsegdiff.ff_parser import DynamicFusion, FFParser
from medsegdiff.network import MedSegDiff

OPSET = 18  # the first that torch's exporter translates to, hence the one that most runtimes can read
EXAMPLE_BATCH = 2  # torch.export takes a size of 1 for a constant


class MatrixFilter(nn.Module):
    """An FFParser for one size, by constant matrices: irfft2(A * rfft2(m)) with every transform a matrix product.

    Args:
        parser: the filter, whose map is read at `size`.
        size: S, pixels a side of the feature maps.
    """

    cos_rows: Tensor  # (S, S)
    sin_rows: Tensor
    cos_columns: Tensor  # (S, F), F = S // 2 + 1
    sin_columns: Tensor
    cos_back: Tensor  # (F, S)
    sin_back: Tensor
    map_real: Tensor  # (C, S, F)
    map_imaginary: Tensor

    def __init__(self, parser: FFParser, size: int) -> None:
        super().__init__()
        rows = _angles(size, size)
        columns = _angles(size, size // 2 + 1)
        # A real signal's spectrum mirrors itself: all frequencies but 0 and S / 2 count for two.
        twice = torch.full((size // 2 + 1,), 2.0, dtype=torch.float64)
        twice[0] = 1.0
        if size % 2 == 0:
            twice[-1] = 1.0
        constants = {
            "cos_rows": rows.cos(),
            "sin_rows": rows.sin(),
            "cos_columns": columns.cos(),
            "sin_columns": columns.sin(),
            "cos_back": (columns.cos() * twice).T / size**2,
            "sin_back": (columns.sin() * twice).T / size**2,
        }
        real, imaginary = parser.map_at(size, size).detach().unbind(dim=-1)
        for name, value in {**constants, "map_real": real, "map_imaginary": imaginary}.items():
            self.register_buffer(name, value.to(torch.float32).contiguous())

    def forward(self, m_BCHW: Tensor) -> Tensor:
        """Filter feature maps (B, C, S, S)."""
        real, imaginary = m_BCHW @ self.cos_columns, -(m_BCHW @ self.sin_columns)
        real, imaginary = (
            self.cos_rows @ real + self.sin_rows @ imaginary,
            self.cos_rows @ imaginary - self.sin_rows @ real,
        )
        real, imaginary = (
            real * self.map_real - imaginary * self.map_imaginary,
            real * self.map_imaginary + imaginary * self.map_real,
        )
        real, imaginary = (
            self.cos_rows @ real - self.sin_rows @ imaginary,
            self.cos_rows @ imaginary + self.sin_rows @ real,
        )
        return real @ self.cos_back - imaginary @ self.sin_back


def _angles(size: int, frequencies: int) -> Tensor:
    """2 pi n k / S for pixel n and frequency k, (S, frequencies), float64, brought below 2 pi in whole numbers."""
    turns = torch.outer(torch.arange(size), torch.arange(frequencies)) % size
    return turns.to(torch.float64) * (2 * math.pi / size)


class FeatureGraph(nn.Module):
    """image (B, C, S, S) -> the image features of each level, and the auxiliary head's mask where there is one."""

    def __init__(self, network: MedSegDiff) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.network.image_features(image)
        if self.network.auxiliary_head is None:
            return tuple(features)
        return (*features, (self.network.auxiliary_logits(features) / 2).tanh())


class DenoiseGraph(nn.Module):
    """x_t (B, K, S, S), t (B,), features[, previous] -> the estimate of x_0 (B, K, S, S), not yet clipped."""

    signal: Tensor
    sigma: Tensor

    def __init__(self, network: MedSegDiff, diffusion: Diffusion) -> None:
        super().__init__()
        self.network = network
        self.prediction = diffusion.config.prediction
        self.register_buffer("signal", diffusion.alpha_bar.sqrt().to(torch.float32))
        self.register_buffer("sigma", (1 - diffusion.alpha_bar).sqrt().to(torch.float32))

    def forward(self, x_t: Tensor, t: Tensor, features: Sequence[Tensor], previous: Tensor | None = None) -> Tensor:
        answer = self.network.denoise(x_t, t, list(features), previous)
        signal, sigma = (table[t][:, None, None, None] for table in (self.signal, self.sigma))
        return to_clean(self.prediction, answer, x_t, signal, sigma)


def make_graphs(network: MedSegDiff, diffusion: Diffusion, size: int) -> dict[str, bytes]:
    """The graphs "features" and "denoise" for images of size x size, as ONNX files; the batch is free.

    The network is not changed. No path and no source text is in them: equal weights give equal bytes.
    """
    network = _without_fourier(network, size).eval()
    config = network.config
    image = torch.zeros(EXAMPLE_BATCH, config.image_channels, size, size)
    mask = torch.zeros(EXAMPLE_BATCH, config.mask_channels, size, size)
    with torch.no_grad():
        features = network.image_features(image)
    names = [f"features_{level}" for level in range(len(features))]
    outputs = [*names, "auxiliary"] if config.auxiliary_head else names
    # A tensor of its own: torch.export takes one tensor given twice for one input.
    known = (torch.zeros_like(mask),) if config.self_conditioning else ()
    return {
        "features": _export(FeatureGraph(network), (image,), ["image"], outputs),
        "denoise": _export(
            DenoiseGraph(network, diffusion),
            (mask, torch.zeros(EXAMPLE_BATCH, dtype=torch.int64), features, *known),
            ["x_t", "t", *names, *["previous"][: len(known)]],
            ["clean"],
        ),
    }


def _without_fourier(network: MedSegDiff, size: int) -> MedSegDiff:
    changed = copy.deepcopy(network).cpu().requires_grad_(False)
    for level, fusion in changed.fusions.items():
        assert isinstance(fusion, DynamicFusion)
        if isinstance(fusion.parser, FFParser):
            fusion.add_module("parser", MatrixFilter(fusion.parser, size // 2 ** int(level)))
    return changed


def _export(graph: nn.Module, inputs: tuple[Any, ...], names: list[str], outputs: list[str]) -> bytes:
    batch = torch.export.Dim("batch")
    shapes = tuple([{0: batch}] * len(part) if isinstance(part, list) else {0: batch} for part in inputs)
    with _quiet():
        program = torch.onnx.export(
            graph.eval(), inputs, dynamo=True, opset_version=OPSET, dynamic_shapes=shapes, input_names=names,
            output_names=outputs, verbose=False,
        )  # fmt: skip
    assert program is not None
    model: Any = program.model_proto
    _forget_origin(model)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _forget_origin(model: Any) -> None:
    """Removes what the exporter notes of source files (their paths among it): it differs from machine to machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    for function in model.functions:
        for part in (function, *function.node, *function.value_info):
            del part.metadata_props[:]
            part.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter speaks of its own insides (deprecations, packages it does not find)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
