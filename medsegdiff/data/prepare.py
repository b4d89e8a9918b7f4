"""From files to tensors at the network's size, each case once: later runs map the cached tensors into memory.

The key of a cached case is a hash over the bytes of its files and over everything else that changes the result, so a
changed file, label table or image size makes a new entry and an old one is never mistaken for it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from medsegdiff.data.cases import Case, Dataset, DatasetConfig
from medsegdiff.data.geometry import Geometry, Letterbox, to_slices
from medsegdiff.data.images import DataFileError, Volume, read_image, read_mask, sha256_of_image
from medsegdiff.data.normalise import normalise
from medsegdiff.data.prepared import PreparedCase, load, store
from medsegdiff.errors import UserError
from medsegdiff.progress import Progress, report
from medsegdiff.strict import canonical_json

FORMAT = 1  # of the cached tensors; raised whenever normalisation, letterbox or layout change
MAX_FAULTY = 0.2  # of the cases: beyond this the dataset, not a file, is wrong
CHUNK = 32  # slices resized at once, so that memory does not grow with a volume's depth


@dataclass(frozen=True)
class CaseFault:
    """A case that could not be used, and why. Names files: fit for the site's own terminal only."""

    case_id: str
    file: str
    reason: str


@dataclass(frozen=True)
class Prepared:
    """The usable cases of a dataset, in its order, and the faulty ones."""

    cases: tuple[PreparedCase, ...]
    faults: tuple[CaseFault, ...]


def prepare(dataset: Dataset, image_size: int, cache: Path) -> Prepared:
    """Bring every case to image_size x image_size slices, reading from `cache` what was prepared before.

    Raises:
        UserError: more than 20 % of the cases are faulty, or the cache cannot be written.
    """
    cases: list[PreparedCase] = []
    faults: list[CaseFault] = []
    total = len(dataset.cases)
    for done, case in enumerate(dataset.cases):
        report(Progress("prepare", done, total))
        try:
            cases.append(_prepare_case(case, dataset.config, image_size, cache))
        except DataFileError as fault:
            faults.append(CaseFault(case.case_id, str(fault.file), fault.reason))
    report(Progress("prepare", total, total))
    if len(faults) > MAX_FAULTY * total:
        raise _too_many(dataset, faults)
    return Prepared(tuple(cases), tuple(faults))


def _too_many(dataset: Dataset, faults: list[CaseFault]) -> UserError:
    first = "; ".join(f"{fault.case_id}: {fault.file}: {fault.reason}" for fault in faults[:3])
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return UserError(
        f"{dataset.root}: {len(faults)} of {len(dataset.cases)} cases are faulty, more than {MAX_FAULTY:.0%}, so "
        f"nothing was trained or scored. {first}{more}. Mend or remove them."
    )


def _prepare_case(case: Case, config: DatasetConfig, image_size: int, cache: Path) -> PreparedCase:
    _check_files(case)
    path = cache / f"{_key(case, config, image_size)}.safetensors"
    found = load(path, case)
    if found is not None:
        return found
    volume = read_image(case.image_paths, len(config.channels), case.spacing_mm)
    if case.volume_id is not None and min(volume.array.shape[1:]) > 1:
        raise DataFileError(case.image_paths[0], "volume_id ties single slices together, but this file is a volume")
    native = torch.from_numpy(read_mask(case.mask_paths, config, volume))
    geometry = volume.geometry(config)
    image = prepare_image(volume, image_size, config)
    labels = prepare_labels(native, image_size, geometry)
    store(path, image, labels, native, geometry)
    return load(path, case, verify=False) or _vanished(path)


def _vanished(path: Path) -> PreparedCase:
    raise UserError(
        f"{path}: the cached case could not be read back; is the disk failing? Choose another cache folder."
    )


def _check_files(case: Case) -> None:
    nameless = Path(f"(case {case.case_id})")
    if not case.image_paths:
        raise DataFileError(case.mask_paths[0] if case.mask_paths else nameless, "the mask has no image")
    if not case.mask_paths:
        raise DataFileError(case.image_paths[0], "the image has no mask")
    for path in (*case.image_paths, *case.mask_paths):
        if not path.exists():  # a folder may hold a DICOM series
            raise DataFileError(path, "there is no such file")


def _key(case: Case, config: DatasetConfig, image_size: int) -> str:
    """Everything the prepared tensors depend on. Names of labels and targets are not among it."""
    return hashlib.sha256(
        canonical_json(
            {
                "format": FORMAT,
                "image_size": image_size,
                "channels": len(config.channels),
                "labels": config.label_values,
                "slice_axis": config.slice_axis,
                "spacing_mm": case.spacing_mm,
                "images": [_digest(path) for path in case.image_paths],
                "masks": [_digest(path) for path in case.mask_paths],
            }
        ).encode()
    ).hexdigest()


def _digest(path: Path) -> str:
    try:
        return sha256_of_image(path)
    except OSError as error:
        raise DataFileError(path, f"cannot be read ({error.strerror or error})") from error


def prepare_image(volume: Volume, image_size: int, config: DatasetConfig) -> Tensor:
    """What the network sees of an image: normalised, letterboxed.

    Returns:
        (N, C, S, S) float32 in [-5, 5]; bilinear with antialiasing. Outside the slice each channel holds its own
        minimum, which for most modalities is air.
    """
    array = normalise(volume.array)
    geometry = volume.geometry(config)
    box = Letterbox.of(geometry, image_size)
    slices = to_slices(torch.from_numpy(array), geometry)
    empty = torch.from_numpy(array.min(axis=(1, 2, 3))).view(1, -1, 1, 1)
    square = empty.expand(slices.shape[0], -1, image_size, image_size).contiguous()
    for part, target in zip(torch.split(slices, CHUNK), torch.split(square, CHUNK), strict=True):
        box.crop(target).copy_(
            F.interpolate(
                part.contiguous(), (box.height, box.width), mode="bilinear", align_corners=False, antialias=True
            )
        )
    return square


def prepare_labels(native: Tensor, image_size: int, geometry: Geometry) -> Tensor:
    """Label indices (R, X, Y, Z) uint8 -> (R, N, S, S) uint8: nearest, background outside the slice."""
    box = Letterbox.of(geometry, image_size)
    slices = to_slices(native, geometry)  # raters as channels
    square = torch.zeros(slices.shape[0], slices.shape[1], image_size, image_size, dtype=torch.uint8)
    box.crop(square).copy_(F.interpolate(slices.contiguous(), (box.height, box.width), mode="nearest-exact"))
    return square.transpose(0, 1).contiguous()
