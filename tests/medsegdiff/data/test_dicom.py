"""A DICOM series is ordered by where its slices lie, and refused where they do not lie evenly."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, RLELossless, generate_uid

from medsegdiff.data.dicom import open_series
from medsegdiff.data.guard import check_image_file
from medsegdiff.data.images import DataFileError, read_image, read_mask

Make = Callable[..., Path]


def made(shape: tuple[int, int, int] = (5, 6, 7)) -> NDArray[np.int16]:
    return np.random.default_rng(0).integers(-500, 500, shape).astype(np.int16)


def edit(file: Path, **changes: Any) -> None:
    """Set attributes of a file, or remove those given as None."""
    data = pydicom.dcmread(file)
    for name, value in changes.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    data.save_as(file)


def slices(folder: Path) -> list[Path]:
    """Files from the feet upwards."""
    return [frame.path for frame in open_series(folder).frames]


def test_slices_are_ordered_by_position(tmp_path: Path, dicom: Make) -> None:
    """Neither file names nor instance numbers count."""
    array = made()
    folder = dicom(tmp_path / "s", array, np.diag([-1.0, -1.0, 2.0, 1.0]))
    assert slices(folder) != sorted(slices(folder))
    for number, file in enumerate(sorted(folder.iterdir())):
        edit(file, InstanceNumber=number)
    volume = read_image([folder], 1)
    assert np.array_equal(volume.array[0], array[::-1, ::-1])
    assert volume.spacing_mm == (1.0, 1.0, 2.0)


def test_rescaled_slice_by_slice(tmp_path: Path, dicom: Make) -> None:
    """Each file's own slope and intercept is applied, as PET needs it."""
    array = made()
    folder = dicom(tmp_path / "s", array, RescaleSlope="0.5", RescaleIntercept="-1024")
    edit(slices(folder)[2], RescaleSlope="3")
    expected = array.astype(np.float32) * 0.5 - 1024
    expected[:, :, 2] = array[:, :, 2] * 3.0 - 1024
    assert np.array_equal(read_image([folder], 1).array[0], expected)


@pytest.mark.parametrize(("kind", "last"), [("i2", -1), ("u2", 4095)])
def test_inverted_greys(tmp_path: Path, dicom: Make, kind: str, last: int) -> None:
    """MONOCHROME1 is turned so that large values are bright, within the range of the stored bits."""
    array = np.arange(5 * 6 * 7).reshape(5, 6, 7).astype(kind)
    folder = dicom(tmp_path / "s", array, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11)
    assert np.array_equal(read_image([folder], 1).array[0], last - array.astype(np.float32))


@pytest.mark.filterwarnings("ignore:Invalid value for VR")  # by pydicom, when the fault is written
def test_faults_of_a_series_name_what_is_wrong(tmp_path: Path, dicom: Make) -> None:
    """Gaps, doubles, turned and sheared slices, several series, missing positions: none is guessed away."""
    whole = dicom(tmp_path / "whole", made(), np.diag([-1.0, -1.0, 3.0, 1.0]))

    def spoilt(name: str, spoil: Callable[[list[Path]], object]) -> Path:
        folder = shutil.copytree(whole, tmp_path / name)
        spoil(slices(folder))
        return folder

    def shear(files: list[Path]) -> None:
        for number, file in enumerate(files):
            edit(file, ImagePositionPatient=[0, number, 3 * number])

    faults = {
        "gap": (lambda files: files[3].unlink(), r"6\.00 mm, elsewhere 3\.00 mm"),
        "double": (lambda files: shutil.copy(files[3], files[3].parent / "more.dcm"), "same place, 1 such pair"),
        "turned": (lambda files: edit(files[3], ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), "localizer"),
        "nowhere": (lambda files: edit(files[3], ImagePositionPatient=None), "lacks a position"),
        "skewed": (lambda files: [edit(f, ImageOrientationPatient=[1, 0, 0, 1, 1, 0]) for f in files], "right angle"),
        "sheared": (shear, "sheared"),
        "sized": (lambda files: edit(files[3], Columns=4), "size is 4x6"),
        "endless": (lambda files: edit(files[3], ImagePositionPatient=[0, 0, "NaN"]), "finite"),
        "flat": (lambda files: [edit(f, PixelSpacing=[0, 0]) for f in files], "not invertible"),
        "other": (lambda files: edit(files[3], SeriesInstanceUID=generate_uid()), "2 series .*: 1; .*: 6|: 6; .*: 1"),
        "none": (lambda files: [file.unlink() for file in files], "no DICOM file"),
        "reports": (lambda files: [edit(f, Rows=None) for f in files], "no DICOM image"),
        "palette": (lambda files: edit(files[3], PhotometricInterpretation="PALETTE COLOR"), "PALETTE"),
        "table": (lambda files: edit(files[3], ModalityLUTSequence=Sequence([Dataset()])), "modality table"),
    }
    for name, (spoil, words) in faults.items():
        folder = spoilt(name, spoil)
        for read in (lambda: read_image([folder], 1), lambda: check_image_file([folder])):  # noqa: B023
            with pytest.raises(DataFileError, match=words):
                read()
    with pytest.raises(DataFileError, match=r"hold 1 channel\(s\), 2"):
        read_image([whole], 2)


def test_other_files_of_a_folder_are_passed_over(tmp_path: Path, dicom: Make) -> None:
    """Notes, hidden files, an index and a segmentation of the series do not matter, nor does jitter."""
    folder = dicom(tmp_path / "s", made())
    first, second = slices(folder)[:2]
    edit(second, ImagePositionPatient=[0, 0, 1.008])
    (folder / "notes.txt").write_text("not an image")
    (folder / ".DS_Store").write_bytes(first.read_bytes())
    (folder / "DICOMDIR").write_bytes(first.read_bytes())
    (folder / "deeper").mkdir()
    shutil.copy(first, folder / "seg.dcm")
    edit(folder / "seg.dcm", Modality="SEG", SeriesInstanceUID=generate_uid())
    assert np.array_equal(read_image([folder], 1).array[0], made())


def test_an_enhanced_image_is_a_series_in_one_file(tmp_path: Path, dicom: Make, enhanced: Make) -> None:
    """Frames are ordered by their positions; as a file or alone in a folder."""
    folder = dicom(tmp_path / "s", made(), np.diag([-1.0, -1.0, 3.0, 1.0]))
    file = enhanced(folder, tmp_path / "e" / "e.dcm")
    expected = read_image([folder], 1)
    for path in (file, file.parent):
        found = read_image([path], 1)
        assert np.array_equal(found.array, 2 * expected.array - 10)
        assert found.spacing_mm == expected.spacing_mm
    edit(file, NumberOfFrames=6)
    with pytest.raises(DataFileError, match="declares 6 frames and describes 7"):
        read_image([file], 1)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_series(tmp_path: Path, dicom: Make, syntax: str) -> None:
    """What a decoder here can unpack reads as the plain series does."""
    array = np.random.default_rng(0).integers(0, 4000, (40, 50, 2)).astype(np.uint16)
    folder = dicom(tmp_path / "s", array)
    expected = read_image([folder], 1).array
    for file in sorted(folder.iterdir()):
        if syntax == RLELossless:
            data = pydicom.dcmread(file)
            data.compress(syntax)
            data.save_as(file)
        else:
            _to_jpeg2000(file)
    check_image_file([folder])
    assert np.array_equal(read_image([folder], 1).array, expected)


def _to_jpeg2000(file: Path) -> None:
    data = pydicom.dcmread(file)
    buffer = io.BytesIO()
    Image.fromarray(data.pixel_array).save(buffer, "JPEG2000", irreversible=False, no_jp2=True)
    data.file_meta.TransferSyntaxUID = JPEG2000Lossless
    data.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = True
    data.save_as(file)


def test_a_codestream_of_another_size_is_refused(tmp_path: Path, dicom: Make) -> None:
    """Decoders take memory for the size inside the compressed frame, so that size has to be the header's."""
    folder = dicom(tmp_path / "s", np.zeros((40, 50, 1), np.uint16))
    (file,) = folder.iterdir()
    _to_jpeg2000(file)
    data = pydicom.dcmread(file)
    stream = bytearray(data.PixelData)
    at = stream.find(b"\xff\x4f\xff\x51")
    stream[at + 8 : at + 12] = (60_000).to_bytes(4, "big")
    data.PixelData = bytes(stream)
    data.save_as(file)
    with pytest.raises(DataFileError, match=r"frame is \(50, 60000\), the header says \(50, 40\)"):
        read_image([folder], 1)


def test_a_compression_without_a_decoder_says_what_to_install(
    tmp_path: Path, dicom: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JPEG Lossless needs pylibjpeg; the message names it and the way round."""
    folder = dicom(tmp_path / "s", np.zeros((40, 50, 1), np.uint16))
    (file,) = folder.iterdir()
    jpeg = (
        b"\xff\xd8\xff\xc3\x00\x0b\x10"
        + (50).to_bytes(2, "big")
        + (40).to_bytes(2, "big")
        + b"\x01\x01\x11\x00\xff\xd9"
    )
    data = pydicom.dcmread(file)
    data.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    data.PixelData = pydicom.encaps.encapsulate([jpeg])
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = True
    data.save_as(file)
    monkeypatch.setattr(pydicom.pixels.decoders.JPEGLosslessSV1Decoder, "_available", {})
    with pytest.raises(DataFileError, match=r"JPEG Lossless.*pylibjpeg.*gdcmconv"):
        read_image([folder], 1)


def test_a_radiograph_is_a_picture(tmp_path: Path, dicom: Make) -> None:
    """One image without a position keeps its rows and columns and the detector's spacing; colours become channels."""
    array = np.random.default_rng(0).integers(0, 4000, (5, 6, 1)).astype(np.uint16)
    (file,) = dicom(tmp_path / "s", array, ImagerPixelSpacing=["0.2", "0.3"], Modality="DX").iterdir()
    edit(file, ImagePositionPatient=None, ImageOrientationPatient=None, PixelSpacing=None)
    volume = read_image([file], 1)
    assert np.array_equal(volume.array[0, :, :, 0], array[:, :, 0].T)
    assert (volume.spacing_mm, volume.placement) == ((0.2, 0.3), None)
    rgb = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    edit(
        file, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0, BitsAllocated=8,
        BitsStored=8, HighBit=7, PixelData=rgb.tobytes(), ImagerPixelSpacing=None,
    )  # fmt: skip
    assert np.array_equal(read_image([file], 3).array[..., 0], rgb.transpose(2, 0, 1))
    assert np.abs(read_image([file], 1).array[0, ..., 0] - rgb @ [0.299, 0.587, 0.114]).max() < 1e-3


def test_masks_are_not_dicom(tmp_path: Path, dicom: Make, volume_config: Any) -> None:
    """A folder where a mask should be is refused in words."""
    with pytest.raises(DataFileError, match="masks are not read from DICOM"):
        read_mask([dicom(tmp_path / "s", made())], volume_config)
