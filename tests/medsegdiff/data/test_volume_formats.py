"""One volume in four formats is one volume; headers lead to no other file than the one beside them."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nibabel.orientations import inv_ornt_aff
from numpy.typing import NDArray

from medsegdiff.data.cases import Case, Dataset, DatasetConfig
from medsegdiff.data.guard import check_image_file
from medsegdiff.data.images import DataFileError, Volume, read_image, read_mask, sha256_of_image
from medsegdiff.data.prepare import prepare

sitk: Any = pytest.importorskip("SimpleITK")

Make = Callable[..., Path]


def affine(kind: str) -> NDArray[np.float64]:
    """RAS affines: axial, axial stored feet last, sagittal, and oblique by two turns."""
    spacing, origin = np.diag([0.7, 0.9, 2.5]), np.array([12.5, -30.25, 100.0])
    a, b = 0.3, -0.4
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    axes = {
        "axial": np.diag([-1.0, -1.0, 1.0]),
        "downwards": np.diag([-1.0, 1.0, -1.0]),
        "sagittal": np.array([[0, 0, 1.0], [-1.0, 0, 0], [0, -1.0, 0]]),
        "oblique": turn @ tilt @ np.diag([-1.0, -1.0, 1.0]),
    }[kind]
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = axes @ spacing, origin
    return out


def save_itk(path: Path, array: NDArray[Any], ras: NDArray[np.float64], compressed: bool = False) -> Path:
    """Write (I, J, K[, C]) by SimpleITK, the oracle for these formats."""
    image = sitk.GetImageFromArray(np.swapaxes(array, 0, 2), isVector=array.ndim == 4)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ras
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), useCompression=compressed)
    return path


def in_ras(volume: Volume) -> NDArray[np.float64]:
    """The affine of the turned array."""
    assert volume.placement is not None
    return volume.placement.affine @ inv_ornt_aff(volume.placement.orientation, volume.placement.shape)


@pytest.mark.parametrize("kind", ["axial", "downwards", "sagittal", "oblique"])
def test_one_volume_in_four_formats(tmp_path: Path, nifti: Make, dicom: Make, kind: str) -> None:
    """NIfTI, MetaImage, NRRD and DICOM read voxel for voxel equal, at the same place, and pass the check."""
    array = np.random.default_rng(0).integers(-1000, 3000, (5, 6, 7)).astype(np.int16)
    ras = affine(kind)
    expected = read_image([nifti(tmp_path / "i.nii.gz", array, ras)], 1)
    files = [save_itk(tmp_path / f"plain{ending}", array, ras) for ending in (".mha", ".mhd", ".nrrd", ".nhdr")]
    files += [save_itk(tmp_path / f"packed{ending}", array, ras, True) for ending in (".mha", ".mhd", ".nrrd")]
    for path in (*files, dicom(tmp_path / "series", array, ras)):
        check_image_file([path])
        found = read_image([path], 1)
        assert np.array_equal(found.array, expected.array), path.name
        assert found.spacing_mm == pytest.approx(expected.spacing_mm, abs=1e-6), path.name
        assert np.allclose(in_ras(found), in_ras(expected), atol=1e-4), path.name


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"])
def test_every_type_of_voxel(tmp_path: Path, dtype: str) -> None:
    """Values come through in all types, whole and packed."""
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for name in ("a.mha", "a.nrrd"):
        for compressed in (False, True):
            found = read_image([save_itk(tmp_path / name, array, affine("axial"), compressed)], 1)
            flipped = array[::-1, ::-1]  # stored to the left and to the back
            assert np.array_equal(found.array[0], flipped.astype(np.float32))


def test_channels_of_one_file(tmp_path: Path) -> None:
    """Vectors become channels, wherever NRRD keeps them; another number is a fault."""
    array = np.random.default_rng(0).random((4, 5, 6, 3)).astype(np.float32)
    ras = np.eye(4)
    for name in ("c.mha", "c.nrrd"):
        path = save_itk(tmp_path / name, array, ras)
        assert np.array_equal(read_image([path], 3).array, np.moveaxis(array, 3, 0))
        with pytest.raises(DataFileError, match=r"holds 3 channel\(s\), 1"):
            read_image([path], 1)
    header = (
        "NRRD0004\ntype: float\ndimension: 4\nspace: RAS\nsizes: 4 5 6 3\nspace directions: (1, 0, 0) (0,1,0) (0,0,1) "
        "none\nspace origin: (0, 0, 0)\nkinds: domain domain domain list\nendian: little\nencoding: gzip\n"
        "# a remark\nmodality:=MR\n\n"
    )
    last = tmp_path / "last.nrrd"
    last.write_bytes(header.encode() + gzip.compress(array.tobytes(order="F")))
    assert np.array_equal(read_image([last], 3).array, np.moveaxis(array, 3, 0))


def test_big_endian_and_header_size(tmp_path: Path) -> None:
    """A raw file of another machine, its voxels after a header of its own."""
    array = np.arange(24).reshape(2, 3, 4)
    (tmp_path / "v.raw").write_bytes(bytes(10) + array.astype(">i2").tobytes(order="F"))
    for skipped in (10, -1):
        (tmp_path / "v.mhd").write_text(
            "ObjectType = Image\nNDims = 3\nBinaryDataByteOrderMSB = True\nDimSize = 2 3 4\nElementType = MET_SHORT\n"
            f"HeaderSize = {skipped}\nElementDataFile = v.raw\n"
        )
        assert np.array_equal(read_image([tmp_path / "v.mhd"], 1).array[0], array[::-1, ::-1])


MHD = "NDims = 3\nDimSize = {size}\nElementType = MET_FLOAT\nElementDataFile = {file}\n"
NHDR = "NRRD0004\ntype: float\ndimension: 3\nsizes: {size}\nencoding: raw\nendian: little\ndata file: {file}\n\n"


@pytest.mark.parametrize("form", [MHD, NHDR], ids=["mhd", "nhdr"])
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("../secret.raw", "only a file beside"),
        ("/etc/passwd", "only a file beside"),
        ("sub/secret.raw", "only a file beside"),
        ("..\\secret.raw", "only a file beside"),
        ("LIST", "several files"),
        ("slice%03d.raw 1 4 1", "several files"),
        ("nowhere.raw", "no such file"),
        ("short.raw", "the file holds 90"),
    ],
)
def test_headers_that_point_elsewhere(tmp_path: Path, form: str, file: str, words: str) -> None:
    """Another folder, a list or a pattern of files, and a file that is too short are refused, also by the check."""
    folder = tmp_path / "scan"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "secret.raw", folder / "sub" / "secret.raw"):
        place.write_bytes(bytes(96))
    (folder / "short.raw").write_bytes(bytes(90))
    path = folder / ("i.mhd" if form is MHD else "i.nhdr")
    path.write_text(form.format(size="2 3 4", file=file))
    for read in (lambda: read_image([path], 1), lambda: check_image_file([path])):
        with pytest.raises(DataFileError, match=words):
            read()


@pytest.mark.parametrize("name", ["m.mha", "m.nrrd", "m.mhd"])
def test_masks_in_these_formats(tmp_path: Path, dicom: Make, volume_config: DatasetConfig, name: str) -> None:
    """A mask of the DICOM series's grid becomes label indices; a larger one is refused by its header."""
    labels = np.random.default_rng(0).integers(0, 3, (5, 6, 7)).astype(np.uint8)
    ras = affine("oblique")
    image = read_image([dicom(tmp_path / "series", labels.astype(np.int16), ras)], 1)
    mask = read_mask([save_itk(tmp_path / name, labels, ras, True)], volume_config, image)
    assert np.array_equal(mask[0], image.array[0].astype(np.uint8))
    huge = save_itk(tmp_path / f"large_{name}", np.zeros((9, 9, 9), np.uint8), ras, True)
    with pytest.raises(DataFileError, match="729 voxels; its image has 210"):
        read_mask([huge], volume_config, image)


def test_a_folder_of_slices_is_a_case(tmp_path: Path, dicom: Make, volume_config: DatasetConfig) -> None:
    """cases.csv may name a folder; one more file or another byte makes a new cache entry, another name does not."""
    labels = np.ones((5, 6, 7), np.uint8)
    series = dicom(tmp_path / "series", np.random.default_rng(0).integers(0, 99, (5, 6, 7)).astype(np.int16))
    mask = save_itk(tmp_path / "m.mhd", labels, np.eye(4))
    dataset = Dataset(tmp_path, volume_config, (Case("c", "p", (series,), (mask,)),))
    (case,) = prepare(dataset, 12, tmp_path / "cache").cases
    assert case.images().shape == (7, 1, 12, 12)
    first = sorted(series.iterdir())[0]
    first.rename(series / "zzz")
    assert prepare(dataset, 12, tmp_path / "cache").cases[0].path == case.path
    before = sha256_of_image(series)
    data = bytearray((series / "zzz").read_bytes())
    data[-1] ^= 1
    (series / "zzz").write_bytes(bytes(data))
    assert sha256_of_image(series) != before
    raw = sha256_of_image(mask)
    (tmp_path / "m.raw").write_bytes(bytes(210))
    assert sha256_of_image(mask) != raw  # the header alone did not change


def test_torn_and_foreign_volumes(tmp_path: Path) -> None:
    """Cut-off voxels, types and spaces that are not read, and a doubled size are faults of the file."""
    array = np.random.default_rng(0).random((6, 6, 6)).astype(np.float32)
    for name in ("t.mha", "t.nrrd"):
        path = save_itk(tmp_path / name, array, np.eye(4), True)
        path.write_bytes(path.read_bytes()[:-200])
        for read in (lambda: read_image([path], 1), lambda: check_image_file([path])):  # noqa: B023
            with pytest.raises(DataFileError, match=r"cut off|cannot be decoded"):
                read()
    body = zlib.compress(bytes(96))
    for header, words in (
        ("NDims = 3\nDimSize = 2 3\n", "DimSize holds 2 numbers"),
        ("NDims = 4\nDimSize = 2 3 4 1\n", "4 axes"),
        ("NDims = 3\nDimSize = 2 0 4\n", "empty"),
        ("NDims = 3\nDimSize = 2 3 4\nTransformMatrix = 1 0 0 0 1 0 0 0 0\n", "not invertible"),
        ("NDims = 3\nDimSize = 2 3 4\nBinaryData = False\n", "text"),
    ):
        text = f"{header}CompressedData = True\nElementType = MET_FLOAT\nElementDataFile = LOCAL\n"
        (tmp_path / "h.mha").write_bytes(text.encode() + body)
        with pytest.raises(DataFileError, match=words):
            read_image([tmp_path / "h.mha"], 1)
    for change, words in (
        (("space: RAS", "space: scanner-xyz"), "space 'scanner-xyz'"),
        (("type: float", "type: block"), "type block"),
        (("encoding: raw", "encoding: text"), "in text"),
        (("encoding: raw", "encoding: raw\nbyte skip: 4"), "skip"),
        (("sizes: 2 3 4", "sizes: 2 3 4 5"), "4 sizes"),
    ):
        text = "NRRD0004\ntype: float\ndimension: 3\nspace: RAS\nsizes: 2 3 4\nencoding: raw\nendian: little\n\n"
        (tmp_path / "h.nrrd").write_bytes(text.replace(*change).encode() + bytes(96))
        with pytest.raises(DataFileError, match=words):
            read_image([tmp_path / "h.nrrd"], 1)
