"""DICOM Segmentation objects, read again by highdicom and pydicom."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from medsegdiff.data.cases import DatasetConfig, SegmentCodes
from medsegdiff.data.dicom import open_series
from medsegdiff.data.dicom_seg import write_dicom_seg
from medsegdiff.data.images import read_image, write_mask
from medsegdiff.errors import UserError
from medsegdiff.strict import dump_yaml, parse_config, plain, read_config

nib: Any = nibabel
hd: Any = pytest.importorskip("highdicom")

Make = Callable[..., Path]
TARGETS = ("tumour", "oedema", "nothing")
CODES = {
    "tumour": SegmentCodes("49755003 |Morphologically Altered Structure|", "108369006 |Neoplasm|"),
    "oedema": SegmentCodes("49755003 |Morphologically Altered Structure|", "79654002 |Edema|"),
}


def oblique() -> NDArray[np.float64]:
    a = 0.3
    turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    out = np.eye(4)
    out[:3, :3] = turn @ np.diag([-0.7, -0.9, 2.5])
    out[:3, 3] = 12.5, -30.25, 100.0
    return out


def made(folder: Path, dicom: Make) -> tuple[Path, NDArray[np.bool_]]:
    """A series, and overlapping masks (3, X, Y, Z); the last target is nowhere, and some slices hold nothing."""
    array = np.random.default_rng(0).integers(0, 500, (9, 6, 7)).astype(np.int16)
    source = dicom(folder / "series", array, oblique())
    masks = np.zeros((3, *read_image([source], 1).array.shape[1:]), bool)
    masks[0, 1:5, 2:5, 2:6] = True
    masks[1, 4:8, 1:3, 4:6] = True
    return source, masks


def write(path: Path, masks: NDArray[np.bool_], source: Path, codes: Any = CODES) -> Path:
    write_dicom_seg(path, masks, source, TARGETS, codes, "0123abcd", "1.2.3")
    return path


def test_a_segmentation_is_the_mask_where_the_source_is(tmp_path: Path, dicom: Make) -> None:
    """highdicom finds each segment in each source slice voxel for voxel, coded and named as asked."""
    source, masks = made(tmp_path, dicom)
    seg = hd.seg.segread(write(tmp_path / "out.dcm", masks, source))
    frames = open_series(source).frames
    headers = [pydicom.dcmread(frame.path, stop_before_pixels=True) for frame in frames]
    nifti = tmp_path / "mask.nii.gz"
    for number in (1, 2):
        read = seg.get_pixels_by_source_instance(
            [header.SOPInstanceUID for header in headers],
            segment_numbers=[number],
            assert_missing_frames_are_empty=True,
        )[..., 0]
        write_mask(nifti, masks[number - 1].astype(np.uint8), read_image([source], 1))
        stored = np.asarray(nib.load(nifti).dataobj)  # columns, rows, slices
        assert read.sum() == masks[number - 1].sum() > 0
        assert np.array_equal(read.astype(bool), stored.transpose(2, 1, 0).astype(bool))
    assert (seg.number_of_segments, list(seg.segment_numbers)) == (3, [1, 2, 3])
    found = [seg.get_segment_description(number) for number in (1, 2, 3)]
    assert [segment.segment_label for segment in found] == list(TARGETS)
    assert found[0].segmented_property_type == hd.sr.CodedConcept("108369006", "SCT", "Neoplasm")
    assert found[0].segmented_property_category.meaning == "Morphologically Altered Structure"
    assert found[2].segmented_property_type == hd.sr.CodedConcept("85756007", "SCT", "Tissue")  # no code was given


def test_what_the_standard_asks_for(tmp_path: Path, dicom: Make) -> None:
    """pydicom: patient, study and frame of reference are the source's; each frame names its source and its place."""
    source, masks = made(tmp_path, dicom)
    data = pydicom.dcmread(write(tmp_path / "out.dcm", masks, source))
    frames = open_series(source).frames
    headers = [pydicom.dcmread(frame.path, stop_before_pixels=True) for frame in frames]
    for name in (
        "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime",
        "StudyID", "AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID",
    ):  # fmt: skip
        assert getattr(data, name) == getattr(headers[0], name), name
    assert (data.Modality, data.SegmentationType) == ("SEG", "BINARY")
    assert data.SOPClassUID == pydicom.uid.SegmentationStorage
    assert data.SeriesInstanceUID != headers[0].SeriesInstanceUID
    referenced = {item.ReferencedSOPInstanceUID for item in data.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referenced == {header.SOPInstanceUID for header in headers}
    assert data.ReferencedSeriesSequence[0].SeriesInstanceUID == headers[0].SeriesInstanceUID
    assert data.DeviceSerialNumber == "0123abcd"
    shared = data.SharedFunctionalGroupsSequence[0]
    assert np.allclose(
        np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float),
        np.array(headers[0].ImageOrientationPatient, float),
    )
    by_uid = {header.SOPInstanceUID: header for header in headers}
    pixels = data.pixel_array
    stored = {1: 4, 2: 2}  # slices that hold the segment
    for number, frame in enumerate(data.PerFrameFunctionalGroupsSequence):
        header = by_uid[frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID]
        place = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        assert np.allclose(place, np.array(header.ImagePositionPatient, float), atol=1e-6)
        assert pixels[number].any()
        stored[frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber] -= 1
    assert stored == {1: 0, 2: 0}


def test_an_enhanced_source(tmp_path: Path, dicom: Make, enhanced: Make) -> None:
    """A multi-frame source is referenced frame by frame, whatever the order of its frames."""
    source, masks = made(tmp_path, dicom)
    file = enhanced(source, tmp_path / "e" / "e.dcm")
    seg = hd.seg.segread(write(tmp_path / "out.dcm", masks, file))
    frames = open_series(file).frames
    uid = pydicom.dcmread(file).SOPInstanceUID
    read = seg.get_pixels_by_source_frame(
        uid, [frame.index + 1 for frame in frames], segment_numbers=[1], assert_missing_frames_are_empty=True
    )[..., 0]
    plain_seg = hd.seg.segread(write(tmp_path / "plain.dcm", masks, source))
    uids = [pydicom.dcmread(frame.path).SOPInstanceUID for frame in open_series(source).frames]
    expected = plain_seg.get_pixels_by_source_instance(uids, segment_numbers=[1], assert_missing_frames_are_empty=True)[
        ..., 0
    ]
    assert np.array_equal(read, expected)


def test_empty_masks_and_masks_that_do_not_fit(tmp_path: Path, dicom: Make) -> None:
    """Nothing found is an object all the same; another size or an incomplete source is refused."""
    source, masks = made(tmp_path, dicom)
    assert not pydicom.dcmread(write(tmp_path / "empty.dcm", np.zeros_like(masks), source)).pixel_array.any()
    with pytest.raises(UserError, match="do not fit"):
        write(tmp_path / "x.dcm", masks[:, :-1], source)
    file = next(source.iterdir())
    data = pydicom.dcmread(file)
    del data.FrameOfReferenceUID
    data.save_as(file)
    with pytest.raises(UserError, match="FrameOfReferenceUID is missing or differs"):
        write(tmp_path / "x.dcm", masks, source)
    assert not (tmp_path / "x.dcm").exists()


def test_a_single_slice(tmp_path: Path, dicom: Make) -> None:
    """One file of a series is a source too."""
    source, _ = made(tmp_path, dicom)
    (alone := tmp_path / "alone").mkdir()
    shutil.copy(open_series(source).frames[3].path, alone / "a.dcm")
    size = read_image([alone], 1).array.shape[1:]
    mask = np.zeros((3, *size), bool)
    mask[0].reshape(-1)[5] = True
    seg = hd.seg.segread(write(tmp_path / "out.dcm", mask, alone / "a.dcm"))
    assert seg.pixel_array.sum() == 1


def test_codes_in_dataset_yaml(tmp_path: Path) -> None:
    """One readable line a target; unknown targets and malformed codes are refused by name."""
    text = """\
name: made
modality: MR
channels: [T1]
labels: {background: 0, tumour: 1}
codes:
  tumour: {category: 49755003 |Morphologically Altered Structure|, type: 108369006 |Neoplasm|}
"""
    path = tmp_path / "dataset.yaml"
    path.write_text(text)
    config = read_config(path, DatasetConfig)
    assert config.codes == {"tumour": CODES["tumour"]}
    assert SegmentCodes.parts(config.codes["tumour"].type) == ("108369006", "Neoplasm")
    path.write_text(dump_yaml(config))
    assert read_config(path, DatasetConfig) == config
    data = plain(config)
    for wrong, words in (
        ({"liver": data["codes"]["tumour"]}, "liver"),
        ({"tumour": {"category": "x", "type": "108369006 |Neoplasm|"}}, "SNOMED"),
        ({"tumour": {"category": "108369006 |Neoplasm|"}}, "type"),
    ):
        with pytest.raises(UserError, match=words):
            parse_config(data | {"codes": wrong}, DatasetConfig, "d.yaml")
