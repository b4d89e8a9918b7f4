"""Files of many kinds, and faults of many kinds."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, inv_ornt_aff
from numpy.typing import NDArray
from PIL import Image

from medsegdiff.data import images
from medsegdiff.data.cases import DatasetConfig
from medsegdiff.data.images import DataFileError, Volume, read_image, read_mask, write_mask
from medsegdiff.errors import UserError

ORIENTATIONS = [
    np.array([[axis, flip] for axis, flip in zip(axes, flips, strict=True)], dtype=float)
    for axes in itertools.permutations(range(3))
    for flips in itertools.product([1, -1], repeat=3)
]


def stored_as(array: NDArray[Any], orientation: NDArray[np.float64], spacing: tuple[float, ...]) -> nibabel.Nifti1Image:
    """A RAS array as a file whose axes run as `orientation` says; the header tells the truth about it."""
    affine = np.diag([*spacing, 1.0])
    return nibabel.Nifti1Image(apply_orientation(array, orientation), affine @ inv_ornt_aff(orientation, array.shape))


def load_nifti(path: Path) -> Any:
    return nibabel.load(path)


@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=str)
def test_volumes_are_turned_to_ras_and_masks_back(
    tmp_path: Path, volume_config: DatasetConfig, orientation: NDArray[np.float64]
) -> None:
    """All 48 orientations read as nibabel's canonical image does, and a mask goes back onto the file's own grid."""
    array = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    path = tmp_path / "i.nii.gz"
    nibabel.save(stored_as(array, orientation, (1.0, 2.0, 3.0)), path)
    volume = read_image([path], 1)
    canonical = nibabel.as_closest_canonical(load_nifti(path))
    assert np.array_equal(volume.array[0], np.asarray(canonical.dataobj))
    assert np.array_equal(volume.array[0], array)
    assert volume.spacing_mm == pytest.approx((1.0, 2.0, 3.0))

    mask = (array % 3).astype(np.uint8)
    write_mask(tmp_path / "m.nii.gz", mask, volume)
    written = load_nifti(tmp_path / "m.nii.gz")
    assert np.allclose(written.affine, load_nifti(path).affine)
    assert written.shape == load_nifti(path).shape
    assert np.array_equal(read_mask([tmp_path / "m.nii.gz"], volume_config, volume)[0], mask)


def test_writing_equal_masks_gives_equal_bytes(tmp_path: Path, nifti: Callable[..., Path]) -> None:
    """No time or name enters the compressed file."""
    volume = read_image([nifti(tmp_path / "i.nii", np.zeros((3, 4, 5), np.float32))], 1)
    mask = np.ones((3, 4, 5), np.uint8)
    write_mask(tmp_path / "a.nii.gz", mask, volume)
    write_mask(tmp_path / "b.nii.gz", mask, volume)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    with pytest.raises(UserError, match=r"\.nii"):
        write_mask(tmp_path / "a.png", mask, volume)


def test_a_picture_mask_is_written_without_loss(tmp_path: Path) -> None:
    """A picture's mask comes back as it was; a lossy ending is refused."""
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    volume = Volume(np.zeros((1, 3, 4, 1), np.float32), None, None)
    write_mask(tmp_path / "m.png", mask, volume)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "m.png")), mask[..., 0])
    with pytest.raises(UserError, match=r"\.png"):
        write_mask(tmp_path / "m.jpg", mask, volume)


def test_scaled_and_four_dimensional_nifti(tmp_path: Path) -> None:
    """Slope and intercept are applied, and the fourth axis holds the channels."""
    array = np.arange(2 * 3 * 4 * 2, dtype=np.int16).reshape(2, 3, 4, 2)
    image = nibabel.Nifti1Image(array, np.eye(4))
    image.header.set_slope_inter(2.0, -5.0)
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "i.nii")
    volume = read_image([tmp_path / "i.nii"], 2)
    stored = np.asarray(load_nifti(tmp_path / "i.nii").dataobj)
    assert np.allclose(volume.array, np.moveaxis(stored, 3, 0))
    assert volume.spacing_mm == (1000.0, 1000.0, 1000.0)
    with pytest.raises(DataFileError, match="holds 2 channel"):
        read_image([tmp_path / "i.nii"], 1)


def test_channels_in_several_files_are_stacked(tmp_path: Path, nifti: Callable[..., Path]) -> None:
    """One file a channel, in the order given; another size is a fault of the second file."""
    one = nifti(tmp_path / "a.nii", np.full((2, 3, 4), 1, np.float32))
    two = nifti(tmp_path / "b.nii", np.full((2, 3, 4), 2, np.uint8))
    odd = nifti(tmp_path / "c.nii", np.zeros((2, 3, 5), np.uint8))
    assert read_image([one, two], 2).array[:, 0, 0, 0].tolist() == [1.0, 2.0]
    with pytest.raises(DataFileError, match=r"c\.nii.*2x3x5.*2x3x4"):
        read_image([one, odd], 2)
    with pytest.raises(DataFileError, match="2 files were given for 3 declared channels"):
        read_image([one, two], 3)


def save_picture(path: Path, array: NDArray[Any], mode: str | None = None) -> Path:
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path)
    return path


@pytest.mark.parametrize("ending", [".png", ".tif", ".bmp", ".gif"])
def test_grey_pictures_of_every_lossless_format(tmp_path: Path, ending: str) -> None:
    """Rows come first and values are those stored."""
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    volume = read_image([save_picture(tmp_path / f"i{ending}", pixels)], 1, (0.5, 0.7))
    assert np.array_equal(volume.array, pixels[None, :, :, None])
    assert (volume.spacing_mm, volume.placement) == ((0.5, 0.7), None)


def test_sixteen_bits_survive(tmp_path: Path) -> None:
    """A 16-bit PNG is not squeezed into 8 bits."""
    pixels = np.array([[0, 300], [40_000, 65_535]], np.uint16)
    assert np.array_equal(read_image([save_picture(tmp_path / "i.png", pixels)], 1).array[0, ..., 0], pixels)


def test_colours_become_channels_or_grey(tmp_path: Path) -> None:
    """Three declared channels are red, green, blue; one is grey; a grey file cannot give three."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    colour = save_picture(tmp_path / "c.png", pixels)
    assert np.array_equal(read_image([colour], 3).array[..., 0], pixels.transpose(2, 0, 1))
    tinted = 100 + pixels // 12  # nearly grey: see test_a_colour_picture_is_no_grey_one
    luma = tinted @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read_image([save_picture(tmp_path / "t.png", tinted)], 1).array[0, ..., 0] - luma).max() <= 1
    alpha = save_picture(tmp_path / "a.png", np.dstack([pixels, np.zeros((5, 6), np.uint8)]))
    assert np.array_equal(read_image([alpha], 3).array[..., 0], pixels.transpose(2, 0, 1))
    grey = save_picture(tmp_path / "g.png", np.repeat(pixels[..., :1], 3, axis=2))
    assert np.array_equal(read_image([grey], 1).array[0, ..., 0], pixels[..., 0])
    with pytest.raises(DataFileError, match="mode L cannot give the 3 channels"):
        read_image([save_picture(tmp_path / "l.png", pixels[..., 0])], 3)


@pytest.mark.parametrize("kind", ["grey", "palette", "equal colours", "float nifti"])
def test_masks_of_numbers(tmp_path: Path, nifti: Callable[..., Path], kind: str) -> None:
    """Values map to label indices by the configuration, however the file stores whole numbers."""
    config = DatasetConfig("d", "MR", ("x",), {"b": (7, 9), "background": 0, "a": 3})
    values = np.array([[0, 7, 9], [3, 0, 3]], np.uint8)
    path = tmp_path / ("m.nii" if kind == "float nifti" else "m.png")
    if kind == "float nifti":
        nifti(path, values[..., None].astype(np.float32))
    elif kind == "palette":
        picture = Image.fromarray(values, mode="P")
        picture.putpalette([5, 5, 5] * 256)
        picture.save(path)
    else:
        save_picture(path, values if kind == "grey" else np.repeat(values[..., None], 3, axis=2))
    assert read_mask([path], config)[0, ..., 0].tolist() == [[0, 1, 1], [2, 0, 2]]


def test_masks_of_colours_and_several_raters(tmp_path: Path) -> None:
    """Colours map whatever their capitals; a rater a file."""
    config = DatasetConfig(
        "d", "x", ("x",), {"background": "#000000", "red": "#FF0000", "other": ("#00ff00", "#0000ff")}
    )
    pixels = np.array([[[0, 0, 0], [255, 0, 0]], [[0, 255, 0], [0, 0, 255]]], np.uint8)
    path = save_picture(tmp_path / "m.png", pixels)
    black = save_picture(tmp_path / "n.png", np.zeros((2, 2, 3), np.uint8))
    assert read_mask([path, black], config)[..., 0].tolist() == [[[0, 1], [2, 2]], [[0, 0], [0, 0]]]
    with pytest.raises(DataFileError, match="#010000"):
        read_mask([save_picture(tmp_path / "o.png", np.array([[[1, 0, 0]]], np.uint8))], config)


@given(st.lists(st.integers(0, 65_535), min_size=1, max_size=20))
def test_no_value_is_mapped_silently(values: list[int]) -> None:
    """A mask is read exactly if all its values are declared; otherwise the unknown ones are counted and named."""
    config = DatasetConfig("d", "x", ("x",), {"background": 0, "a": 1, "b": 65_535})
    known = {0: 0, 1: 1, 65_535: 2}
    array = np.array(values, np.int32).reshape(-1, 1, 1)
    unknown = [value for value in values if value not in known]
    if unknown:
        with pytest.raises(DataFileError, match=f"{len(unknown)} voxels hold {min(unknown)}"):
            images._indices(Path("m"), array, config)
    else:
        assert images._indices(Path("m"), array, config).ravel().tolist() == [known[value] for value in values]


def _fault_files(root: Path, nifti: Callable[..., Path]) -> dict[str, tuple[Path, str]]:
    """Name -> (image file, words its fault must hold)."""
    good = nifti(root / "good.nii.gz", np.random.default_rng(0).random((8, 8, 8)).astype(np.float32))
    torn = root / "torn.nii.gz"
    torn.write_bytes(good.read_bytes()[:600])
    plain = nifti(root / "plain.nii", np.ones((8, 8, 8), np.float32))
    short = root / "short.nii"
    short.write_bytes(plain.read_bytes()[:1000])
    nan = np.zeros((2, 2, 2), np.float32)
    nan[0, 0, 0], nan[1, 1, 1] = np.nan, np.inf
    huge = bytearray(plain.read_bytes())
    huge[40:56] = np.array([3, 32_000, 32_000, 32_000, 1, 1, 1, 1], "<i2").tobytes()
    (root / "huge.nii.gz").write_bytes(gzip.compress(bytes(huge)))
    empty = bytearray(plain.read_bytes())
    empty[40:56] = np.array([3, 8, 0, 8, 1, 1, 1, 1], "<i2").tobytes()
    (root / "empty.nii").write_bytes(bytes(empty))
    for ending in ("nii", "mha", "nrrd", "dcm", "png", "xyz"):
        (root / f"text.{ending}").write_text("not an image")
    for ending in ("png", "jpg", "tif", "gif"):
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
        whole = save_picture(root / f"good.{ending}", pixels).read_bytes()
        (root / f"torn.{ending}").write_bytes(whole[: len(whole) // 2])
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (0, 200)]
    frames[0].save(root / "film.gif", save_all=True, append_images=frames[1:])
    complex_ = nifti(root / "complex.nii", np.zeros((2, 2, 2), np.complex64))
    flat = bytearray(plain.read_bytes())
    flat[280:296] = bytes(16)  # srow_x: the first row of the affine
    (root / "flat.nii").write_bytes(bytes(flat))
    return {
        "truncated gzip": (torn, "cannot be decoded"),
        "truncated": (short, "2,400 bytes, the file holds 1,000"),
        "NaN and Inf": (nifti(root / "nan.nii", nan), "2 voxels are NaN or infinite"),
        "huge header": (root / "huge.nii.gz", "32,768,000,000,000 voxels"),
        "empty axis": (root / "empty.nii", "size is 8x0x8"),
        "text as NIfTI": (root / "text.nii", "not NIfTI"),
        "text as MetaImage": (root / "text.mha", "not that of a MetaImage"),
        "text as NRRD": (root / "text.nrrd", "not NRRD"),
        "text as DICOM": (root / "text.dcm", "cannot be decoded"),
        "text as PNG": (root / "text.png", "cannot be decoded"),
        "torn PNG": (root / "torn.png", "cannot be decoded"),
        "torn JPEG": (root / "torn.jpg", "cannot be decoded"),
        "torn TIFF": (root / "torn.tif", "cannot be decoded"),
        "torn GIF": (root / "torn.gif", "cannot be decoded"),
        "several frames": (root / "film.gif", "several frames"),
        "unknown format": (root / "text.xyz", "not read"),
        "missing": (root / "nowhere.nii.gz", "no such file"),
        "missing picture": (root / "nowhere.png", "no such file"),
        "complex": (complex_, "complex64"),
        "five axes": (nifti(root / "five.nii", np.zeros((2, 2, 2, 2, 2), np.float32)), "5 axes"),
        "singular affine": (root / "flat.nii", "affine"),
    }


def test_whatever_is_wrong_with_an_image_is_a_fault_that_names_it(tmp_path: Path, nifti: Callable[..., Path]) -> None:
    """No decoder's exception and no memory request of a hostile header gets through."""
    for name, (path, words) in _fault_files(tmp_path, nifti).items():
        fault = _fault_of(path)
        assert fault is not None, name
        assert fault.file == path, name
        assert words in fault.reason, (name, fault.reason)
        assert "\n" not in fault.reason


def test_a_nifti_header_with_endless_extensions_is_harmless(tmp_path: Path, nifti: Callable[..., Path]) -> None:
    """An extension that declares less than nothing makes nibabel read to the end; it is passed over instead."""
    plain = nifti(tmp_path / "i.nii", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    raw = bytearray(plain.read_bytes())
    for size in (-16, 2**31 - 16):
        raw[348:352] = b"\x01\0\0\0"
        extension = np.array([size, 6], "<i4").tobytes() + bytes(24)
        raw[108:112] = np.float32(352 + len(extension)).tobytes()  # vox_offset
        (tmp_path / "e.nii.gz").write_bytes(gzip.compress(bytes(raw[:352]) + extension + bytes(raw[352:])))
        assert np.array_equal(read_image([tmp_path / "e.nii.gz"], 1).array, read_image([plain], 1).array)


def _fault_of(path: Path) -> DataFileError | None:
    try:
        read_image([path], 1)
    except DataFileError as fault:
        return fault
    return None


def test_a_picture_that_unpacks_to_a_giant_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's bomb limit is a fault before the pixels are unpacked."""
    path = save_picture(tmp_path / "i.png", np.zeros((40, 40), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataFileError, match="DecompressionBomb"):
        read_image([path], 1)


def test_faulty_masks(tmp_path: Path, nifti: Callable[..., Path], volume_config: DatasetConfig) -> None:
    """Another size, an unknown value, a fraction, NaN, and colours where numbers are declared."""
    image = read_image([nifti(tmp_path / "i.nii", np.zeros((2, 3, 4), np.float32))], 1)
    half = np.full((2, 3, 4), 0.5, np.float32)
    for name, array, words in (
        ("size", np.zeros((2, 3, 5), np.uint8), "2x3x5"),
        ("value", np.full((2, 3, 4), 9, np.uint8), "24 voxels hold 9"),
        ("negative", np.full((2, 3, 4), -1, np.int16), "hold -1"),
        ("large", np.full((2, 3, 4), 2**40, np.int64), "1099511627776"),
        ("fraction", half, "whole numbers"),
        ("nan", half * np.nan, "whole numbers"),
        ("axes", np.zeros((2, 3, 4, 2), np.uint8), "three axes"),
    ):
        with pytest.raises(DataFileError, match=words):
            read_mask([nifti(tmp_path / f"{name}.nii", array)], volume_config, image)
    red = save_picture(tmp_path / "red.png", np.array([[[9, 0, 0]]], np.uint8))
    with pytest.raises(DataFileError, match="in colour"):
        read_mask([red], volume_config)
    with pytest.raises(DataFileError, match="1x1x1"):
        read_mask([red], DatasetConfig("d", "x", ("x",), {"background": "#000000", "a": "#090000"}), image)


def test_a_mask_turned_otherwise_than_its_image_is_a_fault(
    tmp_path: Path, nifti: Callable[..., Path], volume_config: DatasetConfig
) -> None:
    """Headers that disagree about the axes would flip one file only; agreement in millimetres makes it harmless."""
    array = np.zeros((4, 5, 6), np.uint8)
    array[0] = 1
    flipped = np.diag([-1.0, 1, 1, 1])
    image = read_image([nifti(tmp_path / "i.nii", array.astype(np.float32), flipped)], 1)
    with pytest.raises(DataFileError, match="turns it otherwise"):
        read_mask([nifti(tmp_path / "wrong.nii", array)], volume_config, image)
    moved = np.eye(4)
    moved[0, 3] = -3  # the same place in mm, axes reversed
    mask = read_mask([nifti(tmp_path / "right.nii", array[::-1].copy(), moved)], volume_config, image)
    assert np.array_equal(mask[0], image.array[0].astype(np.uint8))
    shifted = flipped.copy()
    shifted[:3, 3] = 40  # another origin alone is harmless: voxels are matched one by one
    assert read_mask([nifti(tmp_path / "origin.nii", array, shifted)], volume_config, image).sum() == 30


def test_a_single_slice_is_cut_along_its_thin_axis(
    tmp_path: Path, nifti: Callable[..., Path], volume_config: DatasetConfig
) -> None:
    """A NIfTI file that holds one sagittal slice is one slice, whatever the dataset's axis."""
    volume = read_image([nifti(tmp_path / "i.nii", np.zeros((1, 5, 6), np.float32))], 1)
    geometry = volume.geometry(volume_config)
    assert (geometry.slices, geometry.plane, geometry.slice_axis) == (1, (5, 6), 0)


def test_a_colour_picture_is_no_grey_one(tmp_path: Path) -> None:
    """One channel is read from grey stored in colour, also tinted; a photograph in colour is refused."""
    grey = np.random.default_rng(0).integers(0, 200, size=(20, 20, 1), dtype=np.uint8)
    for name, tint, fits in (("grey", (0, 0, 0), True), ("tinted", (10, 0, 0), True), ("colour", (50, 0, 20), False)):
        path = tmp_path / f"{name}.png"
        Image.fromarray(grey + np.array(tint, dtype=np.uint8)).save(path)
        if fits:
            assert read_image([path], 1).array.shape == (1, 20, 20, 1)
            continue
        with pytest.raises(DataFileError, match="a colour picture"):
            read_image([path], 1)
