"""A model as a MONAI bundle: the work behind `model export --to monai-bundle`.

The model travels as its own safetensors file, unchanged, and the bundle's configuration names our loader for it: no
pickled weights, so MONAI's required models/model.pt is left out (MONAI Bundle Specification, "Directory Structure").
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deploy.export import Exported
from medsegdiff.errors import UserError
from medsegdiff.files import new_folder, write_atomic
from medsegdiff.weights import Segmenter, hash_weights, load_model

# The one that the bundles of MONAI's model zoo name; `monai.bundle verify_metadata` fetches it.
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
LOADER = "medsegdiff.monai_bundle"
MEMBERS, THREADS = 5, 2  # as `medsegfed segment` has them


def export_bundle(model: Path, out: Path) -> Exported:
    """Write a model as a MONAI bundle into the new folder `out`.

    Raises:
        UserError: no model, or a folder that holds something; nothing is left behind then.
    """
    segmenter = load_model(model)
    files = {
        "configs/metadata.json": _json(_metadata(segmenter)),
        "configs/inference.json": _json(_inference()),
        "models/model.safetensors": _bytes_of(model),
        "docs/README.md": _readme(segmenter).encode(),
        "LICENSE": _NOTICE.encode(),
    }
    with new_folder(out) as folder:
        for name, data in files.items():
            write_atomic(folder / name, data)
    return Exported(str(out), list(files), None)


def _inference() -> dict[str, Any]:
    return {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "model": "$@bundle_root + '/models/model.safetensors'",
        "scans": ["scan.nii.gz"],
        "output_dir": "$@bundle_root + '/masks'",
        "device": {"_target_": "medsegdiff.devices.choose_device", "name": "auto"},
        "threads": THREADS,
        "members": MEMBERS,
        "seed": 0,
        "network_def": {
            "_target_": f"{LOADER}.network",
            "path": "@model",
            "device": "@device",
            "members": "@members",
            "seed": "@seed",
        },
        "initialize": ["$torch.set_num_threads(@threads)"],
        "run": [
            {
                "_target_": f"{LOADER}.segment",
                "network": "@network_def",
                "scans": "@scans",
                "output_dir": "@output_dir",
            }
        ],
    }


def _metadata(segmenter: Segmenter) -> dict[str, Any]:
    """metadata.json with the fields that MONAI's specification asks for."""
    dataset, scheme = segmenter.card.dataset, segmenter.scheme
    size = segmenter.card.model.image_size
    first = ["background"] if scheme.kind == "multiclass" else []
    unstated = "not stated; whoever holds the weights writes it here"
    packages = ("medsegfed", "nibabel", "safetensors", "pillow", "pydantic")
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"weights {hash_weights(segmenter.network.state_dict())}"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in packages},
        "name": dataset.name,
        "task": f"Segmentation of {', '.join(scheme.targets)} in {dataset.modality}",
        "description": (
            "MedSegDiff (arXiv 2211.00611), a diffusion model that segments slices; several samples an image make the "
            "mask and tell its uncertainty. Trained with MedSegFed."
        ),
        "authors": unstated,
        "copyright": unstated,
        "intended_use": "Research. Not a medical device; no clinical claim is made.",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": dataset.modality,
                    "num_channels": len(dataset.channels),
                    "spatial_shape": [size, size],
                    "dtype": "float32",
                    "value_range": [-5, 5],
                    "is_patch_data": False,
                    "channel_def": {str(index): name for index, name in enumerate(dataset.channels)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    # "labels": the largest channel wins; "classes": each channel by itself.
                    "format": "labels" if scheme.kind == "multiclass" else "classes",
                    "modality": "n/a",
                    "num_channels": scheme.channels,
                    "spatial_shape": [size, size],
                    "dtype": "float32",
                    "value_range": [-1, 1],
                    "is_patch_data": False,
                    "channel_def": {str(index): name for index, name in enumerate([*first, *scheme.targets])},
                }
            },
        },
    }


def _readme(segmenter: Segmenter) -> str:
    dataset, scheme = segmenter.card.dataset, segmenter.scheme
    return f"""# {dataset.name}

Segments {", ".join(scheme.targets)} in {dataset.modality} (channels: {", ".join(dataset.channels)}) with MedSegDiff, a
diffusion model. Not a medical device; no clinical claim is made.

Needs `pip install medsegfed 'monai[fire]'`. In the bundle's folder:

    python -m monai.bundle run --config_file configs/inference.json --scans "['scan.nii.gz']" --output_dir masks

This writes scan_mask.nii.gz on the scan's own grid, the uncertainty maps and scan.json with the volumes, as
`medsegfed segment models/model.safetensors scan.nii.gz -o masks` does, voxel for voxel. Channels in files of their
own are one scan, joined by `;`. From another folder add `--bundle_root FOLDER`. Also `--members`, `--seed`,
`--threads`, `--device`.

`network_def` alone is a torch module: normalised slices (N, {len(dataset.channels)}, S, S) to masks (N,
{scheme.channels}, S, S) in [-1, 1]. The weights are models/model.safetensors, read without pickle. `LICENSE` says what
is still to be stated.
"""


_NOTICE = """\
The program that loads and runs this bundle, MedSegFed, is under the Apache License, Version 2.0
(http://www.apache.org/licenses/LICENSE-2.0).

That licence does not cover the weights in models/. Their terms are for those to state whose data trained them; until
they are stated here, no right to use or pass on the weights is given. The terms of a public training dataset hold too.
"""


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=4, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); nothing was exported.") from error
