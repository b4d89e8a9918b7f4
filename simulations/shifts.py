"""Hospitals that differ, on purpose: scanners, readers, channels, label values and attendance.

What a recipe asks of a site is done to its files as its folder is written, so that the site cannot tell: images are
changed voxel by voxel, masks drawn anew, dataset.yaml told what stands in them. Attendance alone is not in the files:
`Unreliable` answers in a site's place.
"""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from flwr.app import Context, Error, Message, MessageType
from flwr.common.constant import ErrorCode
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from client.contract import Assignment, from_wire
from medsegdiff.data.cases import BACKGROUND
from medsegdiff.data.dataset import Case, DatasetConfig
from medsegdiff.data.images import Volume, read_image, read_mask, write_mask
from medsegdiff.data.orientation import as_stored
from medsegdiff.ensemble import derive_seed
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from medsegdiff.strict import Strict

FIELD_ORDER = 3  # of the bias field's polynomial, as is usual (van Leemput et al. 1999)
_FWHM = 2 * math.sqrt(2 * math.log(2))  # full width at half maximum of a Gaussian, in standard deviations

Slices = NDArray[np.float32]  # (C, X, Y, Z)


@dataclass(frozen=True)
class SiteShift(Strict):
    """How a site differs from what the dataset holds. The defaults change nothing."""

    # Images: exp of a polynomial of order 3 over the scan, its coefficients uniform in +- this, multiplies them.
    bias_field: float = 0.0
    gamma: float = 1.0  # contrast: exponent on intensities rescaled to [0, 1]
    resolution: float = 1.0  # in-plane: seen through voxels this many times as long, on the same grid
    noise: float = 0.0  # standard deviation, in those of the image's channel
    noise_kind: Literal["gaussian", "rician"] = "gaussian"  # rician: magnitude MRI (Gudbjartsson and Patz 1995)
    # Masks: margin in voxels of a slice by which the site's readers draw too wide (positive) or too narrow.
    margin: int = 0
    # Whether held-out patients are scored against the readers' honest masks, which shows the harm, or the site's own.
    test_masks: Literal["honest", "same"] = "honest"
    labels: dict[str, int] | None = None  # values that stand in this site's mask files, by label name
    missing_channels: tuple[str, ...] = ()  # that this site does not acquire; the network sees their mean there

    def __post_init__(self) -> None:
        for name, low, high in (
            ("bias_field", 0.0, 2.0), ("gamma", 0.1, 10.0), ("resolution", 1.0, 16.0), ("noise", 0.0, 10.0),
            ("margin", -64, 64),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must lie in {low:g}..{high:g}, found {value}")

    @property
    def of_images(self) -> bool:
        """Whether images are written anew."""
        return (self.bias_field, self.gamma, self.resolution, self.noise) != (0.0, 1.0, 1.0, 0.0) or bool(
            self.missing_channels
        )

    @property
    def of_masks(self) -> bool:
        """Whether masks are written anew."""
        return self.margin != 0 or self.labels is not None


@dataclass(frozen=True)
class Attendance(Strict):
    """When a site answers. Rounds are counted from 1."""

    joins: int = 1  # the first round it answers in
    leaves: int | None = None  # the last one; null: it stays
    absent: tuple[int, ...] = ()  # rounds between that it misses: a straggler whose answer comes too late to count

    def __post_init__(self) -> None:
        if self.joins < 1 or (self.leaves is not None and self.leaves < self.joins):
            raise ValueError(f"joins must be at least 1 and leaves not before it, found {self.joins}, {self.leaves}")
        if any(round_ < 1 for round_ in self.absent):
            raise ValueError(f"absent must name rounds from 1 on, found {list(self.absent)}")

    def answers(self, round_: int) -> bool:
        """Whether the site answers in a round."""
        return self.joins <= round_ <= (self.leaves or round_) and round_ not in self.absent


# --- files ------------------------------------------------------------------------------------------------------------


def check_shift(shift: SiteShift, config: DatasetConfig, site: str) -> None:
    """Raises UserError for labels or channels that the dataset does not have."""
    if shift.labels is not None and set(shift.labels) != set(config.labels):
        raise UserError(
            f"world.shifts: {site}: labels must give a value to each of {', '.join(config.labels)}, found "
            f"{', '.join(shift.labels) or 'none'}; nothing was written."
        )
    unknown = [name for name in shift.missing_channels if name not in config.channels]
    if unknown or len(shift.missing_channels) >= len(config.channels):
        raise UserError(
            f"world.shifts: {site}: missing_channels {list(shift.missing_channels)} must be some, not all, of the "
            f"channels {', '.join(config.channels)}; nothing was written."
        )


def shifted_config(shift: SiteShift, config: DatasetConfig) -> DatasetConfig:
    """The dataset.yaml of a shifted site: its channels, and the values that stand in its masks."""
    labels = shift.labels
    if labels is None and shift.of_masks:  # masks drawn anew hold the labels' indices
        labels = {name: index for index, name in enumerate(config.label_names)}
    channels = tuple(name for name in config.channels if name not in shift.missing_channels)
    changed = replace(config, channels=channels)
    return changed if labels is None else replace(changed, labels={name: labels[name] for name in config.labels})


def shift_case(
    shift: SiteShift, case: Case, config: DatasetConfig, split: str, site: str, seed: int, folder: Path
) -> Case:
    """Write a case's changed files into `folder`; the case that names them.

    Args:
        config: of the files as they are.
        split: of its patient: honest masks of test patients are left as they were drawn.
        seed: the recipe's; with site and case it fixes field and noise.

    Raises:
        UserError: a picture of two or more than three channels, or the disk refuses.
        DataFileError: the case cannot be read.
    """
    volume = read_image(case.image_paths, len(config.channels), case.spacing_mm)
    rng = np.random.default_rng(derive_seed(seed, "shift", site, case.case_id))
    images, masks = case.image_paths, case.mask_paths
    if shift.of_images:
        axis = volume.geometry(config).slice_axis
        array = shift_image(shift, volume.array, axis, rng)
        kept = [i for i, name in enumerate(config.channels) if name not in shift.missing_channels]
        images = write_image(folder / case.case_id, replace(volume, array=array[kept]))
    if shift.of_masks:
        margin = 0 if split == "test" and shift.test_masks == "honest" else shift.margin
        values = _values(shift, config)
        raters = read_mask(case.mask_paths, config, volume)
        ending = ".nii.gz" if volume.placement is not None else ".png"
        masks = tuple(folder / f"{case.case_id}-mask{number}{ending}" for number in range(len(raters)))
        axis = volume.geometry(config).slice_axis
        for path, labels in zip(masks, raters, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_mask(path, values[redraw(labels, margin, axis)], volume)
    return replace(case, image_paths=images, mask_paths=masks)


def _values(shift: SiteShift, config: DatasetConfig) -> NDArray[np.uint8]:
    """Value in the files by label index."""
    names = config.label_names
    values = [shift.labels[name] for name in names] if shift.labels is not None else list(range(len(names)))
    if not all(0 <= value <= 255 for value in values):
        raise UserError(f"world.shifts: label values must lie in 0..255, found {values}; nothing was written.")
    return np.array(values, np.uint8)


def write_image(stem: Path, volume: Volume) -> tuple[Path, ...]:
    """Write an image without loss of geometry: NIfTI for a volume, else a picture; returns its files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    if volume.placement is not None:
        path = stem.with_name(f"{stem.name}.nii.gz")
        stored = as_stored(np.moveaxis(volume.array, 0, 3), volume.placement)
        image = nib.Nifti1Image(stored.astype(np.float32), volume.placement.affine)
        write_atomic(path, gzip.compress(image.to_bytes(), mtime=0))
        return (path,)
    channels = volume.array[..., 0]
    data = io.BytesIO()
    if len(channels) == 3:
        path = stem.with_name(f"{stem.name}.png")
        Image.fromarray(channels.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(data, format="PNG")
        write_atomic(path, data.getvalue())
        return (path,)
    paths = tuple(stem.with_name(f"{stem.name}-{number}.tif") for number in range(len(channels)))
    for path, pixels in zip(paths, channels, strict=True):  # grey, with fractions
        data = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels, np.float32)).save(data, format="TIFF")
        write_atomic(path, data.getvalue())
    return paths


# --- images -----------------------------------------------------------------------------------------------------------


def shift_image(shift: SiteShift, array: Slices, axis: int, rng: np.random.Generator) -> Slices:
    """The image as this site's scanner would have made it: field, contrast, resolution, then noise.

    Args:
        array: (C, X, Y, Z).
        axis: of X, Y, Z that counts slices.
    """
    found = array.astype(np.float64)
    if shift.bias_field > 0:
        low = found.min(axis=(1, 2, 3), keepdims=True)
        found = (found - low) * bias_field(array.shape[1:], shift.bias_field, rng) + low
    if shift.gamma != 1.0:
        found = change_contrast(found, shift.gamma)
    if shift.resolution > 1.0:
        found = np.stack([lower_resolution(channel, shift.resolution, axis) for channel in found])
    if shift.noise > 0:
        found = add_noise(found, shift.noise, shift.noise_kind, rng)
    return found.astype(np.float32)


def bias_field(shape: Sequence[int], strength: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """A smooth positive field: exp of a polynomial of order 3 in coordinates of [-1, 1], of mean logarithm zero.

    Every monomial's coefficient is uniform in +- strength (the convention of TorchIO's RandomBiasField, whose default
    is 0.5), the constant's aside.
    """
    grids = np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape), indexing="ij")
    logarithm = np.zeros(shape)
    for i in range(FIELD_ORDER + 1):
        for j in range(FIELD_ORDER + 1 - i):
            for k in range(FIELD_ORDER + 1 - i - j):
                coefficient = rng.uniform(-strength, strength)
                if i + j + k > 0:
                    logarithm += coefficient * grids[0] ** i * grids[1] ** j * grids[2] ** k
    field: NDArray[np.float64] = np.exp(logarithm - logarithm.mean())
    return field


def change_contrast(array: NDArray[np.float64], gamma: float) -> NDArray[np.float64]:
    """x^gamma on each channel's intensities rescaled to [0, 1]; its range stays."""
    low = array.min(axis=(1, 2, 3), keepdims=True)
    span = array.max(axis=(1, 2, 3), keepdims=True) - low
    rescaled = np.divide(array - low, span, out=np.zeros_like(array), where=span > 0)
    changed: NDArray[np.float64] = low + span * rescaled**gamma
    return changed


def lower_resolution(channel: NDArray[np.float64], factor: float, axis: int) -> NDArray[np.float64]:
    """In-plane: blurred to the point spread of voxels `factor` times as long, sampled there, and brought back."""
    sigma = [0.0 if number == axis else factor / _FWHM for number in range(3)]
    small = [n if number == axis else max(1, round(n / factor)) for number, n in enumerate(channel.shape)]
    blurred = ndimage.gaussian_filter(channel, sigma, mode="nearest")
    sampled = ndimage.zoom(blurred, [m / n for m, n in zip(small, channel.shape, strict=True)], order=1, grid_mode=True,
                           mode="nearest")  # fmt: skip
    back: NDArray[np.float64] = ndimage.zoom(
        sampled,
        [n / m for m, n in zip(sampled.shape, channel.shape, strict=True)],
        order=1,
        grid_mode=True,
        mode="nearest",
    )
    return back


def add_noise(
    array: NDArray[np.float64], level: float, kind: Literal["gaussian", "rician"], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Noise of `level` standard deviations of each channel: added, or of a complex signal's magnitude.

    Rician: sqrt((x + n1)^2 + n2^2), x measured from the channel's least value; background noise then has the mean
    level sqrt(pi / 2), as on a scanner.
    """
    scale = level * array.std(axis=(1, 2, 3), keepdims=True)
    if kind == "gaussian":
        noisy: NDArray[np.float64] = array + scale * rng.standard_normal(array.shape)
        return noisy
    low = array.min(axis=(1, 2, 3), keepdims=True)
    real = array - low + scale * rng.standard_normal(array.shape)
    magnitude: NDArray[np.float64] = low + np.hypot(real, scale * rng.standard_normal(array.shape))
    return magnitude


# --- masks ------------------------------------------------------------------------------------------------------------


def redraw(labels: NDArray[np.uint8], margin: int, axis: int) -> NDArray[np.uint8]:
    """Masks (X, Y, Z) drawn `margin` voxels wider (or narrower) within each slice; new voxels take the nearest label.

    The foreground as a whole grows or shrinks; the borders between labels stay.
    """
    if margin == 0:
        return labels
    cross = np.moveaxis(ndimage.generate_binary_structure(2, 1)[..., None], 2, axis)
    if margin < 0:
        kept = ndimage.binary_erosion(labels > 0, cross, iterations=-margin)
        narrower: NDArray[np.uint8] = np.where(kept, labels, 0).astype(np.uint8)
        return narrower
    found = labels.copy()
    for number in range(labels.shape[axis]):
        here = tuple(number if a == axis else slice(None) for a in range(3))
        plane = labels[here]
        if plane.any():
            wide = ndimage.binary_dilation(plane > 0, iterations=margin)
            nearest = ndimage.distance_transform_edt(plane == 0, return_distances=False, return_indices=True)
            found[here] = np.where(wide, plane[tuple(nearest)], 0)
    return found


# --- attendance -------------------------------------------------------------------------------------------------------

App = Callable[[Message, Context], Message]


class Unreliable:
    """The sites' app, in which some sites do not train in some rounds. Called like a ClientApp.

    Their held-out patients are scored all the same: the researcher has them, and wants to see what absence costs.

    Args:
        app: the honest one.
        attendance: of sites by number, in the order of names; the others always answer.
    """

    def __init__(self, app: App, attendance: dict[int, Attendance]) -> None:
        self.app, self.attendance = app, attendance

    def __call__(self, message: Message, context: Context) -> Message:
        """The answer, or the error that stands for none."""
        known = self.attendance.get(int(context.node_config["partition-id"]))
        if known is not None and message.metadata.message_type == MessageType.TRAIN:
            assignment = from_wire(message.content, "assignment", Assignment)
            if not known.answers(assignment.round):
                return Message(Error(ErrorCode.NODE_UNAVAILABLE, "the site is not there"), reply_to=message)
        return self.app(message, context)


def attendance_by_number(asked: dict[str, Attendance], sites: Sequence[str]) -> dict[int, Attendance]:
    """Attendance by the number of the site, in the order of names. Raises UserError for a site that is none."""
    unknown = [site for site in asked if site not in sites]
    if unknown:
        raise UserError(
            f"world.attendance: {', '.join(unknown)}: no such site; the sites are {', '.join(sites)}. Nothing was "
            "trained."
        )
    return {number: asked[site] for number, site in enumerate(sorted(sites)) if site in asked}


assert BACKGROUND == "background"  # index 0 of `label_names`, on which `redraw` rests
