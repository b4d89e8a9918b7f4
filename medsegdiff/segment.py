"""From a scan to a mask on the scan's own grid."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medsegdiff.config import SamplingConfig
from medsegdiff.data.folder import SEPARATOR
from medsegdiff.data.images import Volume, read_image
from medsegdiff.data.prepare import prepare_image
from medsegdiff.ensemble import derive_seed
from medsegdiff.errors import UserError
from medsegdiff.evaluation import Segmentation, segment_slices
from medsegdiff.files import sha256_of_file, write_atomic
from medsegdiff.metrics import voxel_ml
from medsegdiff.weights import Segmenter

ENDINGS = (".nii.gz", ".nii", ".png", ".tif", ".tiff", ".jpg", ".jpeg", ".gif", ".bmp")


@dataclass(frozen=True)
class ScanResult:
    """What was written for one scan."""

    scan: str
    masks: list[str]
    uncertainty: str | None  # entropy of the members' votes, in percent of one bit
    variance: str | None  # of the members' values, in percent of the largest there can be
    volumes_ml: dict[str, float | None]  # per target; None where the spacing is unknown
    voxels: dict[str, int]
    interval_ml: dict[str, tuple[float, float] | None]  # the smallest and the largest member; None for one member
    interval_voxels: dict[str, tuple[int, int] | None]


def segment_scan(
    segmenter: Segmenter, scan: str, out: Path, sampling: SamplingConfig, seed: int, with_uncertainty: bool
) -> ScanResult:
    """Segment one scan and write NAME_mask and NAME.json into the folder `out`.

    With uncertainty NAME_uncertainty is written too, and NAME_variance where there are several members.

    Args:
        scan: path of the image; several files of one scan (channels) joined by `;`.
        seed: with the scan's bytes, fixes the result.

    Raises:
        UserError: the scan cannot be read, or has other channels than the model was trained on.
    """
    paths = [Path(part) for part in scan.split(SEPARATOR)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file, so it was not segmented. Check the path.")
    config = segmenter.card.dataset
    volume = read_image(paths, len(config.channels))
    slices = prepare_image(volume, segmenter.card.model.image_size, config)
    scan_seed = derive_seed(seed, *(sha256_of_file(path) for path in paths))
    answer = segment_slices(segmenter, slices, volume.geometry(config), sampling, scan_seed)
    result = _write(segmenter, answer, volume, out, _stem(paths[0]), scan, with_uncertainty)
    write_atomic(out / f"{_stem(paths[0])}.json", (json.dumps(vars(result), indent=1) + "\n").encode())
    return result


def label_values(segmenter: Segmenter) -> dict[str, int]:
    """The value of each target in a written mask: its own label's where that is one number of 1..255, else 1, 2, ..."""
    config, scheme = segmenter.card.dataset, segmenter.scheme
    own: dict[str, int] = {}
    for target, members in zip(scheme.targets, scheme.members, strict=True):
        values = [value for index in members for value in config.label_values[index]]
        if len(values) == 1 and isinstance(values[0], int) and 0 < values[0] < 256:
            own[target] = values[0]
    if len(own) == len(scheme.targets):
        return own
    return {target: number for number, target in enumerate(scheme.targets, start=1)}


def _write(
    segmenter: Segmenter, answer: Segmentation, volume: Volume, out: Path, stem: str, scan: str, with_uncertainty: bool
) -> ScanResult:
    scheme = segmenter.scheme
    masks = answer.masks.numpy()
    written = []
    if scheme.kind == "regions":  # overlapping targets do not fit one label map
        for target, mask in zip(scheme.targets, masks, strict=True):
            written.append(_write_map(out, f"{stem}_{target}_mask", mask.astype(np.uint8) * _visible(volume), volume))
    else:
        values = label_values(segmenter)
        label_map = np.zeros(masks.shape[1:], dtype=np.uint8)
        for target, mask in zip(scheme.targets, masks, strict=True):
            label_map[mask] = values[target]
        written.append(_write_map(out, f"{stem}_mask", label_map, volume))
    several = len(answer.member_voxels) > 1
    uncertainty = _write_percent(out, f"{stem}_uncertainty", answer.uncertainty, volume) if with_uncertainty else None
    variance = (
        _write_percent(out, f"{stem}_variance", answer.variance, volume) if with_uncertainty and several else None
    )
    counts = {target: int(mask.sum()) for target, mask in zip(scheme.targets, masks, strict=True)}
    low, high = answer.member_voxels.amin(dim=0).tolist(), answer.member_voxels.amax(dim=0).tolist()
    ranges = dict(zip(scheme.targets, zip(low, high, strict=True), strict=True))
    unit = voxel_ml(volume.spacing_mm)
    return ScanResult(
        scan=scan,
        masks=written,
        uncertainty=uncertainty,
        variance=variance,
        volumes_ml={target: None if unit is None else round(n * unit, 4) for target, n in counts.items()},
        voxels=counts,
        interval_ml={
            target: (round(a * unit, 4), round(b * unit, 4)) if several and unit is not None else None
            for target, (a, b) in ranges.items()
        },
        interval_voxels={target: pair if several else None for target, pair in ranges.items()},
    )


def _write_percent(out: Path, name: str, values: Tensor, volume: Volume) -> str:
    """A map in [0, 1] as whole percents."""
    return _write_map(out, name, (values.numpy() * 100).round().astype(np.uint8), volume)


def _visible(volume: Volume) -> int:
    """Pictures are looked at: their masks are white. Volumes are computed with: 1."""
    return 255 if volume.placement is None else 1


def _write_map(out: Path, name: str, values: NDArray[np.uint8], volume: Volume) -> str:
    if volume.placement is not None:
        from medsegdiff.data.nifti import write_nifti_mask

        path = out / f"{name}.nii.gz"
        write_nifti_mask(path, values, volume.placement)
        return str(path)
    from PIL import Image

    path = out / f"{name}.png"
    buffer = io.BytesIO()
    Image.fromarray(values[..., 0]).save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())
    return str(path)


def _stem(path: Path) -> str:
    for ending in ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.name
