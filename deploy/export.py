"""A model for programs that are not ours: ONNX graphs with a description of everything around them.

The work behind `model export --to onnx`. The folder holds MODEL_{S}px_features.onnx, MODEL_{S}px_denoise.onnx and
MODEL_{S}px.json, which is enough to draw masks with no line of our code (docs/export.md).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deploy.onnx_graphs import OPSET, make_graphs
from medsegdiff.config import SamplingConfig
from medsegdiff.data.normalise import AIR_FRACTION, LIMIT, PERCENTILES
from medsegdiff.errors import UserError
from medsegdiff.files import new_folder, sha256_of_file, write_atomic
from medsegdiff.network import MedSegDiff, parameter_count
from medsegdiff.samplers import sample
from medsegdiff.segment import label_values
from medsegdiff.weights import Segmenter, hash_weights, load_model

FORMAT = 1  # of the description
TOLERANCE = 1e-4  # largest relative difference between torch and ONNX Runtime; both compute in float32
CHECKED_BATCHES = (1, 3)  # other than the one that is exported
MAX_PARAMETERS = 500_000_000  # an ONNX file is a protobuf message, which ends at 2 GiB
INSTALL = "pip install onnx onnxscript onnxruntime"


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: str
    files: list[str]
    relative_error: float | None  # the largest found against torch; None for a bundle, which holds the model itself


def export_onnx(model: Path, out: Path, size: int | None = None) -> Exported:
    """Write a model as ONNX graphs into the new folder `out`, checked against torch.

    Args:
        size: pixels a side of the images; default: those the model was trained on.

    Raises:
        UserError: no model, a size that does not fit it, a folder that holds something, a package that is missing, or
            graphs that differ from torch by more than `TOLERANCE`; nothing is left behind then.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require(name)
    segmenter = load_model(model)
    size = _checked_size(segmenter, model, size)
    stem = f"{model.stem}_{size}px"
    with new_folder(out) as folder:
        graphs = make_graphs(segmenter.network, segmenter.diffusion, size)
        files = {name: folder / f"{stem}_{name}.onnx" for name in graphs}
        for name, data in graphs.items():
            write_atomic(files[name], data)
        errors = compare(segmenter, size, graphs)
        worst = max(errors, key=lambda name: errors[name])
        if not errors[worst] <= TOLERANCE:  # NaN is refused as well
            raise UserError(
                f"{model}: ONNX Runtime differs from torch by {errors[worst]:.1e} in '{worst}', more than "
                f"{TOLERANCE:.0e}, so nothing was exported. Report this with the model's settings."
            )
        described = _describe(segmenter, model, size, files, errors)
        text = json.dumps(described, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        write_atomic(folder / f"{stem}.json", text.encode())
    return Exported(str(out), [path.name for path in files.values()] + [f"{stem}.json"], errors[worst])


def require(name: str) -> Any:
    """The module `name`, or a UserError that says how to come by it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"the package {name} is not installed, so nothing was exported. Run: {INSTALL}") from error


def _checked_size(segmenter: Segmenter, model: Path, size: int | None) -> int:
    config = segmenter.card.model
    if parameter_count(segmenter.network) > MAX_PARAMETERS:
        raise UserError(
            f"{model}: {parameter_count(segmenter.network):,} parameters do not fit into one ONNX file (limit "
            f"{MAX_PARAMETERS:,}); nothing was exported. Use --to monai-bundle."
        )
    try:
        return config.image_size if size is None else replace(config, image_size=size).image_size
    except ValueError as error:
        raise UserError(f"--size {size}: {error}. Choose a multiple of {config.downsampling}.") from error


@torch.inference_mode()
def compare(segmenter: Segmenter, size: int, graphs: Mapping[str, bytes]) -> dict[str, float]:
    """Largest relative difference of each output between ONNX Runtime and our network, on random input.

    Relative to the largest value of the case. The network is the one that segments, Fourier transform and all.
    """
    runtime = require("onnxruntime")
    sessions = {
        name: runtime.InferenceSession(data, providers=["CPUExecutionProvider"]) for name, data in graphs.items()
    }
    network, diffusion = segmenter.network.eval(), segmenter.diffusion
    generator = torch.Generator().manual_seed(0)
    worst: dict[str, float] = {}
    for batch in CHECKED_BATCHES:
        shape = (batch, network.config.mask_channels, size, size)
        image = torch.randn(batch, network.config.image_channels, size, size, generator=generator)
        x_t = torch.randn(shape, generator=generator)
        t = torch.linspace(len(diffusion.alpha_bar) - 1, 0, batch).round().long()
        features = network.image_features(image)
        previous = torch.rand(shape, generator=generator) * 2 - 1
        known = (previous,) if network.config.self_conditioning else ()
        clean = diffusion.clean_from(network.denoise(x_t, t, features, *known), x_t, t)

        names = [f"features_{level}" for level in range(len(features))]
        expected = dict(zip(names, features, strict=True))
        if network.config.auxiliary_head:
            expected["auxiliary"] = network.auxiliary(image)
        given = {"x_t": x_t, "t": t, **dict(zip(names, features, strict=True))}
        given |= {"previous": previous} if network.config.self_conditioning else {}
        found = _run(sessions["features"], {"image": image}) | _run(sessions["denoise"], given)
        # x_0 from eps is a difference divided by sqrt(abar): its rounding is that of x_t / sqrt(abar), in any program.
        rounding = x_t / diffusion.powers(t)[0] if diffusion.config.prediction == "eps" else clean
        for name, value in {**expected, "clean": clean}.items():
            scale = torch.maximum(_peak(value), _peak(rounding)) if name == "clean" else _peak(value)
            error = (_peak(found[name] - value) / scale.clamp(min=1e-12)).max().item()
            worst[name] = error if math.isnan(error) else max(worst.get(name, 0.0), error)
    return worst


def _peak(values: Tensor) -> Tensor:
    return values.abs().flatten(1).amax(dim=1)


def _run(session: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [output.name for output in session.get_outputs()]
    answers = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    return {name: torch.from_numpy(answer) for name, answer in zip(names, answers, strict=True)}


def sampling_steps(alpha_bar: Tensor, config: SamplingConfig) -> list[dict[str, float]]:
    """The sampler as numbers: each step is x <- a x + b clean + c (the clean of the step before) + d noise.

    Every sampler is linear in these four, so the numbers are read off `sample` itself, run in float64 on vectors with
    one component for x_T, one for each step's clean mask and one for each step's noise.

    Returns:
        For each step: t, alpha_bar at t, and the factors "x", "clean", "previous", "noise".
    """
    steps = min(config.steps, len(alpha_bar))
    times: list[int] = []
    states: list[Tensor] = []

    def unit(index: int) -> Tensor:
        vector = torch.zeros(1 + 2 * steps, dtype=torch.float64)
        vector[index] = 1.0
        return vector

    def predict_clean(x: Tensor, t: int) -> Tensor:
        times.append(t)
        states.append(x)
        return unit(len(states))

    states.append(sample(predict_clean, unit(0), alpha_bar, config, lambda: unit(steps + len(states))))
    rows = []
    for number, t in enumerate(times):
        before, after = states[number], states[number + 1]
        # x's own factor shows at any component that x holds and no other term does: not at the last clean mask.
        visible = before.abs().clone()
        if number:
            visible[number] = 0.0
        witness = int(visible.argmax())
        factor = float(after[witness] / before[witness])
        rest = after - factor * before
        rows.append(
            {
                "t": t,
                "alpha_bar": float(alpha_bar[t]),
                "x": factor,
                "clean": float(rest[number + 1]),
                "previous": float(rest[number]) if number else 0.0,
                "noise": float(rest[steps + number + 1]),
            }
        )
    return rows


def _describe(
    segmenter: Segmenter, model: Path, size: int, files: Mapping[str, Path], errors: Mapping[str, float]
) -> dict[str, Any]:
    """Everything that a program needs beside the graphs, as plain data."""
    card, network = segmenter.card, segmenter.network
    scale = card.diffusion.mask_scale
    return {
        "format": FORMAT,
        "model": {
            "file_sha256": sha256_of_file(model),
            "weights_sha256": hash_weights(network.state_dict()),
            "parameters": parameter_count(network),
        },
        "image_size": size,
        "opset": OPSET,
        "graphs": {name: _graph(path) for name, path in files.items()},
        "sampling": {
            "sampler": card.sampling.sampler,
            "steps": sampling_steps(segmenter.diffusion.alpha_bar, card.sampling),
            "start": "x is standard normal noise, (B, K, S, S), and the clean mask before the first step is 0",
            "step": (
                "clean = clip(denoise(x_t=x, t, features[, previous: the clean mask of the step before])); "
                "x = step.x * x + step.clean * clean + step.previous * previous + step.noise * fresh noise"
            ),
            "clip": [-scale, scale],
            "divide_by": scale,  # the result, so that it lies in [-1, 1]
            "members": card.sampling.members,
            "fuse": card.sampling.fuse,
        },
        "image": _image(segmenter),
        "mask": _mask(segmenter, network),
        "check": {
            "against": f"torch {torch.__version__.partition('+')[0]}",
            "with": f"onnxruntime {require('onnxruntime').__version__}",
            "tolerance": TOLERANCE,
            "relative_error": dict(errors),
        },
    }


def _graph(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    session = require("onnxruntime").InferenceSession(data, providers=["CPUExecutionProvider"])

    def sides(values: Any) -> list[dict[str, Any]]:
        kinds = {"tensor(float)": "float32", "tensor(int64)": "int64"}
        return [{"name": value.name, "dtype": kinds[value.type], "shape": list(value.shape)} for value in values]

    return {
        "file": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "inputs": sides(session.get_inputs()),
        "outputs": sides(session.get_outputs()),
    }


def _image(segmenter: Segmenter) -> dict[str, Any]:
    dataset = segmenter.card.dataset
    return {
        "channels": list(dataset.channels),
        "modality": dataset.modality,
        "orientation": "volumes: axes turned to right, anterior, superior; pictures: rows, columns",
        "slice_axis": dataset.slice_axis,  # of the turned axes
        "normalisation": {
            "percentiles": list(PERCENTILES),
            "limit": LIMIT,
            "air_fraction": AIR_FRACTION,
            "how": (
                "over the whole image, each channel by itself: leave out the voxels that hold the minimum if they are "
                "at least air_fraction of all; clip to the percentiles of the rest; subtract their mean, divide by "
                "their standard deviation, clip to +-limit. A constant channel becomes 0."
            ),
        },
        "geometry": {
            "fit": "the longer side in mm fills the square; the slice is centred, sides rounded to whole pixels",
            "resize": "bilinear, antialiased, pixel centres (align_corners false)",
            "outside": "the least value of the normalised channel",
            "back": "cut the slice out of the square, resize the drawn values the same way, then decide",
        },
    }


def _mask(segmenter: Segmenter, network: MedSegDiff) -> dict[str, Any]:
    scheme = segmenter.scheme
    decide = {
        "binary": "inside where the value is above 0",
        "multiclass": "the channel with the largest value; the first of equals",
        "regions": "inside a target where its channel is above 0; targets overlap",
    }
    first = ["background"] if scheme.kind == "multiclass" else []
    return {
        "kind": scheme.kind,
        "channels": [*first, *scheme.targets],
        "decide": decide[scheme.kind],
        "values": label_values(segmenter),  # of the targets in a label map
        "self_conditioning": network.config.self_conditioning,
        "auxiliary_head": network.config.auxiliary_head,  # output "auxiliary": a mask in (-1, 1) without sampling
    }
