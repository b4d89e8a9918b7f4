"""Image and mask files as arrays, whatever their format.

Volumes (NIfTI, MetaImage, NRRD, DICOM series) are turned to right-anterior-superior axes; pictures (PNG, TIFF, GIF,
JPEG, BMP, DICOM radiographs) stay as stored, rows first. Files come from many hands: sizes are checked before memory is
taken (`medsegdiff.data.guard`), and whatever is wrong with a file is a `DataFileError` that names it. Torch is not
imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medsegdiff.data.cases import MAX_VALUE, DatasetConfig
from medsegdiff.data.guard import MAX_VOXELS, DataFileError, format_of, times
from medsegdiff.files import sha256_of_file

if TYPE_CHECKING:
    from medsegdiff.data.geometry import Geometry

__all__ = ["DataFileError", "Placement", "Volume", "read_image", "read_mask", "sha256_of_image", "write_mask"]

UNKNOWN = 255  # index of a mask value that no label declares


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a stored volume's voxels lie, so that a mask can be written back on the same grid."""

    affine: NDArray[np.float64]  # (4, 4): indices as stored in the file -> mm to the right, to the front, upwards
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
        from medsegdiff.data.geometry import Geometry  # here: it needs torch, reading does not

        x, y, z = self.array.shape[1:]
        thin = [axis for axis, size in enumerate((x, y, z)) if size == 1]
        axis = thin[0] if len(thin) == 1 else config.slice_axis
        return Geometry((x, y, z), 2 if self.placement is None else axis, self.spacing_mm)


def read_image(paths: Sequence[Path], channels: int, spacing_mm: tuple[float, ...] | None = None) -> Volume:
    """Read the image of one case.

    A file holds channels / len(paths) channels. A picture in colour gives three channels, or one grey channel
    (ITU-R 601 luma) where one is wanted; an alpha channel is dropped. The fourth axis of a NIfTI file is its channels.

    Args:
        paths: one file a channel, or one file with all channels; a folder holds a DICOM series.
        channels: C, as the dataset declares them.
        spacing_mm: for pictures; a volume's own spacing is the truth.

    Raises:
        DataFileError: missing, torn, of an unknown format or another number of channels, of differing sizes or grids,
            with voxels that are not finite, beyond the limits of `medsegdiff.data.guard`, or for DICOM what
            `medsegdiff.data.dicom` says.
    """
    each, rest = divmod(channels, len(paths))
    if rest:
        fact = f"{len(paths)} files were given for {channels} declared channel{'s' * (channels != 1)}"
        raise DataFileError(paths[0], f"{fact}, and they share them equally: give one file for all, or one for each")
    volumes = [_read_one(path, each) for path in paths]
    first = volumes[0]
    for path, volume in zip(paths, volumes, strict=True):
        _check_size(path, volume.array.shape[1:], first.array.shape[1:], paths[0].name)
        _check_grid(path, volume.placement, first.placement, paths[0].name)
        if not np.isfinite(volume.array).all():
            raise DataFileError(path, f"{np.count_nonzero(~np.isfinite(volume.array)):,} voxels are NaN or infinite")
    array = first.array if len(volumes) == 1 else np.concatenate([volume.array for volume in volumes])
    return Volume(array, first.spacing_mm or spacing_mm, first.placement)


def _read_one(path: Path, channels: int) -> Volume:
    # Imported here: a cache is read, and a model trained from it, without nibabel, pydicom and Pillow.
    match format_of(path):
        case "nifti":
            from medsegdiff.data.nifti import read_nifti

            return read_nifti(path, channels)
        case "metaimage":
            from medsegdiff.data.metaimage import read_metaimage

            return read_metaimage(path, channels)
        case "nrrd":
            from medsegdiff.data.nrrd import read_nrrd

            return read_nrrd(path, channels)
        case "dicom":
            from medsegdiff.data.dicom import read_dicom

            return read_dicom(path, channels)
        case "picture":
            from medsegdiff.data.pictures import read_picture

            return Volume(read_picture(path, channels), None, None)


def read_mask(paths: Sequence[Path], config: DatasetConfig, image: Volume | None = None) -> NDArray[np.uint8]:
    """Read the masks of one case, one file a rater.

    Args:
        image: whose size and grid the masks must have; no more memory is taken for a mask than that asks for.

    Returns:
        (R, X, Y, Z) label indices: 0 background, then in the order of `config.labels`.

    Raises:
        DataFileError: as for images, and where a value is not integral or is declared by no label.
    """
    masks = []
    limit = MAX_VOXELS if image is None else int(np.prod(image.array.shape[1:]))
    for path in paths:
        values, placement = _read_values(path, config.in_colours, limit)
        if image is not None:
            _check_size(path, values.shape, image.array.shape[1:], "its image")
            _check_grid(path, placement, image.placement, "its image")
        masks.append(_indices(path, values, config))
    for path, mask in zip(paths, masks, strict=True):
        _check_size(path, mask.shape, masks[0].shape, paths[0].name)
    return np.stack(masks)


def _read_values(path: Path, colours: bool, limit: int) -> tuple[NDArray[np.int32], Placement | None]:
    kind = format_of(path)
    if kind == "picture":
        from medsegdiff.data.pictures import read_picture_values

        return read_picture_values(path, colours), None
    if kind == "dicom":
        raise DataFileError(path, "masks are not read from DICOM; write them as NIfTI, MetaImage or NRRD")
    if colours:
        raise DataFileError(path, "labels are declared as colours, but the masks of volumes hold numbers")
    if kind == "nifti":
        from medsegdiff.data.nifti import read_nifti_values as read
    elif kind == "metaimage":
        from medsegdiff.data.metaimage import read_metaimage_values as read
    else:
        from medsegdiff.data.nrrd import read_nrrd_values as read
    values, placement = read(path, limit)
    return np.ascontiguousarray(_whole(path, values)), placement


def _whole(path: Path, array: NDArray[Any]) -> NDArray[np.int32]:
    """Integers as they are; floats where they are whole numbers."""
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.rint(array)).all()):
        raise DataFileError(path, "the mask holds values that are not whole numbers")
    limit = np.iinfo(np.int32)
    if array.size and not (limit.min <= array.min() and array.max() <= limit.max):
        raise DataFileError(
            path, f"the mask holds values from {array.min()} to {array.max()}; no label has such a value"
        )
    return array.astype(np.int32)


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


def sha256_of_image(path: Path) -> str:
    """Hex SHA-256 over what an image is read from: its bytes, with a header the file it points to, or a folder's files.

    A folder's files count whatever their names and order: a series copied to names of its own is the same image.
    """
    kind = format_of(path)
    if kind == "dicom" and path.is_dir():
        from medsegdiff.data.dicom import files_of

        return _joined(sorted(sha256_of_file(file) for file in files_of(path)))
    if kind in ("metaimage", "nrrd"):
        from medsegdiff.data.metaimage import metaimage_stored
        from medsegdiff.data.nrrd import nrrd_stored

        stored = (metaimage_stored if kind == "metaimage" else nrrd_stored)(path)[0]
        if stored.data != path:
            return _joined([sha256_of_file(path), sha256_of_file(stored.data)])
    return sha256_of_file(path)


def _joined(digests: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _check_size(path: Path, shape: Sequence[int], expected: Sequence[int], other: str) -> None:
    if tuple(shape) != tuple(expected):
        raise DataFileError(path, f"its size is {times(shape)}, that of {other} is {times(expected)}")


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
