"""Image and mask files as arrays, whatever their format.

Volumes (NIfTI) are turned to right-anterior-superior axes; pictures (PNG, TIFF, GIF, JPEG, BMP) stay as stored, rows
first. Files come from many hands: sizes are checked before memory is taken, and whatever is wrong with a file is a
`DataFileError` that names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medsegdiff.data.cases import MAX_VALUE, DatasetConfig
from medsegdiff.data.geometry import Geometry
from medsegdiff.errors import UserError

MAX_VOXELS = 2_000_000_000  # of one file, all channels: 8 GB as float32; a larger header is a mistake or an attack
UNKNOWN = 255  # index of a mask value that no label declares

NIFTI = (".nii", ".nii.gz")
PICTURES = (".png", ".tif", ".tiff", ".gif", ".jpg", ".jpeg", ".bmp")


class DataFileError(UserError):
    """One file that cannot be used, and why."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"{file}: {reason}.")
        self.file = file
        self.reason = " ".join(reason.split())


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a NIfTI file's voxels lie, so that a mask can be written back on the same grid."""

    affine: NDArray[np.float64]  # (4, 4): indices as stored in the file -> mm
    orientation: NDArray[np.float64]  # (3, 2), nibabel's: axis and flip that turn the stored array to RAS
    shape: tuple[int, ...]  # of the first three axes as stored


@dataclass(frozen=True, eq=False)
class Volume:
    """An image in memory."""

    array: NDArray[np.float32]  # (C, X, Y, Z) in RAS order; a picture is (C, rows, columns, 1)
    spacing_mm: (
        tuple[float, ...] | None
    )  # of X, Y, Z; for a picture what is known of rows, columns[, distance of slices]
    placement: Placement | None  # None for a picture

    def geometry(self, config: DatasetConfig) -> Geometry:
        """How this volume is cut into slices: along the dataset's axis; a picture or a single slice is one slice."""
        x, y, z = self.array.shape[1:]
        thin = [axis for axis, size in enumerate((x, y, z)) if size == 1]
        axis = thin[0] if len(thin) == 1 else config.slice_axis
        return Geometry((x, y, z), 2 if self.placement is None else axis, self.spacing_mm)


def read_image(paths: Sequence[Path], channels: int, spacing_mm: tuple[float, ...] | None = None) -> Volume:
    """Read the image of one case.

    A file holds channels / len(paths) channels. A picture in colour gives three channels, or one grey channel
    (ITU-R 601 luma) where one is wanted; an alpha channel is dropped. The fourth axis of a NIfTI file is its channels.

    Args:
        paths: one file a channel, or one file with all channels.
        channels: C, as the dataset declares them.
        spacing_mm: for pictures; a NIfTI file's own spacing is the truth.

    Raises:
        DataFileError: missing, torn, too large, of an unknown format or another number of channels, of differing sizes
            or grids, or with voxels that are not finite.
    """
    each, rest = divmod(channels, len(paths))
    if rest:
        raise DataFileError(paths[0], f"{len(paths)} files cannot hold the {channels} declared channels in equal parts")
    volumes = [_read_one(path, each) for path in paths]
    first = volumes[0]
    for path, volume in zip(paths, volumes, strict=True):
        _check_size(path, volume.array.shape[1:], first.array.shape[1:], paths[0].name)
        _check_grid(path, volume.placement, first.placement, paths[0].name)
        if not np.isfinite(volume.array).all():
            raise DataFileError(path, f"{np.count_nonzero(~np.isfinite(volume.array)):,} voxels are NaN or infinite")
    array = first.array if len(volumes) == 1 else np.concatenate([volume.array for volume in volumes])
    return Volume(array, spacing_mm if first.placement is None else first.spacing_mm, first.placement)


def _read_one(path: Path, channels: int) -> Volume:
    # Imported here: a cache is read, and a model trained from it, without nibabel and Pillow.
    if is_nifti(path):
        from medsegdiff.data.nifti import read_nifti

        return read_nifti(path, channels)
    from medsegdiff.data.pictures import read_picture

    return Volume(read_picture(path, channels), None, None)


def read_mask(paths: Sequence[Path], config: DatasetConfig, image: Volume | None = None) -> NDArray[np.uint8]:
    """Read the masks of one case, one file a rater.

    Args:
        image: whose size and grid the masks must have.

    Returns:
        (R, X, Y, Z) label indices: 0 background, then in the order of `config.labels`.

    Raises:
        DataFileError: as for images, and where a value is not integral or is declared by no label.
    """
    masks = []
    for path in paths:
        values, placement = _read_values(path, config.in_colours)
        if image is not None:
            _check_size(path, values.shape, image.array.shape[1:], "its image")
            _check_grid(path, placement, image.placement, "its image")
        masks.append(_indices(path, values, config))
    for path, mask in zip(paths, masks, strict=True):
        _check_size(path, mask.shape, masks[0].shape, paths[0].name)
    return np.stack(masks)


def _read_values(path: Path, colours: bool) -> tuple[NDArray[np.int32], Placement | None]:
    if is_nifti(path):
        from medsegdiff.data.nifti import read_nifti_values

        if colours:
            raise DataFileError(path, "labels are declared as colours, but NIfTI masks hold numbers")
        return read_nifti_values(path)
    from medsegdiff.data.pictures import read_picture_values

    return read_picture_values(path, colours), None


def _indices(path: Path, values: NDArray[np.int32], config: DatasetConfig) -> NDArray[np.uint8]:
    """File values to label indices. A colour's value is 65536 r + 256 g + b."""
    if config.in_colours:
        return _colour_indices(path, values, config)
    table = np.full(MAX_VALUE + 1, UNKNOWN, np.uint8)
    for index, found in enumerate(config.label_values):
        table[[int(value) for value in found]] = index
    outside = (values < 0) | (values > MAX_VALUE)
    indices = table[np.where(outside, 0, values)] if outside.any() else table[values]
    indices[outside] = UNKNOWN
    _check_known(path, values, indices, "{}", config)
    return indices


def _colour_indices(path: Path, values: NDArray[np.int32], config: DatasetConfig) -> NDArray[np.uint8]:
    indices = np.full(values.shape, UNKNOWN, np.uint8)
    for index, found in enumerate(config.label_values):
        for colour in found:
            indices[values == int(str(colour).removeprefix("#"), 16)] = index
    _check_known(path, values, indices, "#{:06x}", config)
    return indices


def _check_known(
    path: Path, values: NDArray[np.int32], indices: NDArray[np.uint8], form: str, config: DatasetConfig
) -> None:
    unknown = indices == UNKNOWN
    if unknown.any():
        found = [form.format(value) for value in np.unique(values[unknown])[:5]]
        declared = [str(value) for values in config.label_values for value in values]
        raise DataFileError(
            path,
            f"{np.count_nonzero(unknown):,} voxels hold {', '.join(found)}, which no label declares (declared: "
            f"{', '.join(declared[:10])})",
        )


def write_mask(path: Path, mask: NDArray[np.uint8], image: Volume) -> None:
    """Write a mask (X, Y, Z) in the geometry of the image it was made from: NIfTI for a volume, else a grey picture.

    Raises:
        UserError: the ending does not suit the image, or the disk refuses.
    """
    if image.placement is None:
        from medsegdiff.data.pictures import write_picture_mask

        write_picture_mask(path, mask[..., 0])
        return
    from medsegdiff.data.nifti import write_nifti_mask

    write_nifti_mask(path, mask, image.placement)


def is_nifti(path: Path) -> bool:
    """Whether the file's name is that of a NIfTI file.

    Raises:
        DataFileError: the ending is that of no format that is read.
    """
    name = path.name.lower()
    if not name.endswith(NIFTI + PICTURES):
        raise DataFileError(path, f"this format is not read; read are {', '.join(NIFTI + PICTURES)}")
    return name.endswith(NIFTI)


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into a fault of the file it decodes."""
    try:
        yield
    except DataFileError:
        raise
    except FileNotFoundError as error:
        raise DataFileError(path, "there is no such file") from error
    # Decoders answer hostile and torn files with almost any exception (SyntaxError, KeyError, zlib.error, ...).
    except Exception as error:
        raise DataFileError(path, f"cannot be decoded ({type(error).__name__}: {error})") from error


def check_voxels(path: Path, shape: Sequence[int]) -> None:
    """Refuse a header's shape before memory is taken for it."""
    count = 1
    for size in shape:
        count *= int(size)
    if min(shape) <= 0:
        raise DataFileError(path, f"the image is empty: its size is {_times(shape)}")
    if count > MAX_VOXELS:
        raise DataFileError(
            path, f"the header declares {_times(shape)} = {count:,} voxels; the limit is {MAX_VOXELS:,}"
        )


def _check_size(path: Path, shape: Sequence[int], expected: Sequence[int], other: str) -> None:
    if tuple(shape) != tuple(expected):
        raise DataFileError(path, f"its size is {_times(shape)}, that of {other} is {_times(expected)}")


def _check_grid(path: Path, found: Placement | None, expected: Placement | None, other: str) -> None:
    """Refuse a file whose axes run otherwise and whose header puts it elsewhere.

    Files of one case are matched voxel by voxel, as every tool does, so a header with another origin is harmless while
    the axes run alike. Where they do not, one file is turned and the other not: then the headers must agree.
    """
    if (found is None) != (expected is None):
        raise DataFileError(path, f"a picture and a volume cannot belong to one case ({other} is of the other kind)")
    if found is None or expected is None or np.array_equal(found.orientation, expected.orientation):
        return
    apart = np.abs(_corners(found) - _corners(expected)).max()
    voxel = np.linalg.norm(expected.affine[:3, :3], axis=0).max()
    if apart > voxel:
        raise DataFileError(path, f"its header turns it otherwise than {other} and puts it {apart:.1f} mm away")


def _corners(placement: Placement) -> NDArray[np.float64]:
    """Least and greatest coordinates in mm of the grid's corner voxels, (2, 3)."""
    grid = np.meshgrid(*[[0, size - 1] for size in placement.shape], indexing="ij")
    corners = np.stack([axis.ravel() for axis in grid], axis=1) @ placement.affine[:3, :3].T + placement.affine[:3, 3]
    return np.stack([corners.min(axis=0), corners.max(axis=0)])


def _times(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)
