"""Small datasets on disk, made for the test that asks for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

from medsegdiff.data.cases import DatasetConfig

MakeFolder = Callable[..., Path]


@pytest.fixture
def grey_config() -> DatasetConfig:
    """One channel, one label besides the background, mask values 0 and 255."""
    return DatasetConfig(name="made", modality="US", channels=("grey",), labels={"background": 0, "lesion": 255})


@pytest.fixture
def volume_config() -> DatasetConfig:
    """One channel, two labels, mask values 0, 1, 2."""
    return DatasetConfig(name="made", modality="MR", channels=("T1",), labels={"background": 0, "a": 1, "b": 2})


@pytest.fixture
def picture_folder(tmp_path: Path) -> MakeFolder:
    """Call with a number of patients (one grey picture each, rows x columns) to get a folder with cases.csv."""

    def make(patients: int = 5, shape: tuple[int, int] = (20, 30), name: str = "pictures") -> Path:
        root = tmp_path / name
        root.mkdir()
        rows = ["case_id,patient_id,image_path,mask_path,site"]
        for number in range(patients):
            rng = np.random.default_rng(number)
            mask = np.zeros(shape, np.uint8)
            mask[4 : 8 + number % 5, 5:15] = 255
            image = (rng.integers(0, 100, shape) + mask // 2).astype(np.uint8)
            Image.fromarray(image).save(root / f"i{number}.png")
            Image.fromarray(mask).save(root / f"m{number}.png")
            rows.append(f"c{number},p{number},i{number}.png,m{number}.png,north")
        (root / "cases.csv").write_text("\n".join(rows) + "\n")
        return root

    return make


def save_nifti(path: Path, array: NDArray[np.generic], affine: NDArray[np.float64] | None = None) -> Path:
    """Write an array as NIfTI; the affine is 1 mm RAS unless given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine, dtype=array.dtype), path)
    return path


@pytest.fixture
def nifti() -> Callable[..., Path]:
    """`save_nifti`."""
    return save_nifti


def save_dicom(
    folder: Path, array: NDArray[np.integer[Any]], affine: NDArray[np.float64] | None = None, **changes: Any
) -> Path:
    """Write an array (columns, rows, slices) as a CT series, one file a slice, names in no order; else 1 mm RAS.

    Keywords replace attributes of every file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ (np.eye(4) if affine is None else affine)
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    study, series, frame_of_reference = generate_uid(), generate_uid(), generate_uid()
    for k in range(array.shape[2]):
        data = Dataset()
        data.PatientName, data.PatientID, data.PatientBirthDate, data.PatientSex = "Made^Up", "P1", "19700101", "O"
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, frame_of_reference
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, generate_uid()
        data.Modality, data.SeriesNumber, data.SeriesDescription, data.InstanceNumber = "CT", 3, "made", k + 1
        data.StudyDate, data.StudyTime, data.StudyID, data.AccessionNumber = "20200102", "101112", "S1", "A1"
        data.ReferringPhysicianName, data.Manufacturer, data.PositionReferenceIndicator = "", "made", ""
        data.ImageOrientationPatient = [f"{x:.10f}" for x in (lps[:3, :2] / spacing[:2]).T.ravel()]
        data.ImagePositionPatient = [f"{x:.8f}" for x in (lps @ [0, 0, k, 1])[:3]]
        data.PixelSpacing, data.SliceThickness = [f"{spacing[1]:.8f}", f"{spacing[0]:.8f}"], f"{spacing[2]:.8f}"
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.Columns, data.Rows = array.shape[:2]
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelRepresentation = int(array.dtype.kind == "i")
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        data.PixelData = np.ascontiguousarray(array[:, :, k].T).astype(f"<{array.dtype.kind}2").tobytes()
        for name, value in changes.items():
            setattr(data, name, value)
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.save_as(folder / f"{(37 * k) % 101:03d}.dcm", enforce_file_format=True)
    return folder


@pytest.fixture(scope="session")
def dicom() -> Callable[..., Path]:
    """`save_dicom`."""
    return save_dicom


def save_enhanced(folder: Path, target: Path) -> Path:
    """The series as one multi-frame file, frames in the order of file names."""
    files = [dcmread(file) for file in sorted(folder.iterdir())]
    data = dcmread(sorted(folder.iterdir())[0])
    data.SOPClassUID, data.SOPInstanceUID = EnhancedCTImageStorage, generate_uid()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    measures, directions, scale, shared = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = data.PixelSpacing, data.SliceThickness
    directions.ImageOrientationPatient = data.ImageOrientationPatient
    scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = "2", "-10", "HU"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([directions])
    shared.PixelValueTransformationSequence = Sequence([scale])
    frames = []
    for file in files:
        position, frame = Dataset(), Dataset()
        position.ImagePositionPatient = file.ImagePositionPatient
        frame.PlanePositionSequence = Sequence([position])
        frames.append(frame)
    for name in ("PixelSpacing", "SliceThickness", "ImageOrientationPatient", "ImagePositionPatient"):
        delattr(data, name)
    for name in ("RescaleSlope", "RescaleIntercept"):
        delattr(data, name)
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    data.NumberOfFrames = len(files)
    data.PixelData = b"".join(file.PixelData for file in files)
    target.parent.mkdir(exist_ok=True)
    data.save_as(target)
    return target


@pytest.fixture
def enhanced() -> Callable[..., Path]:
    """`save_enhanced`."""
    return save_enhanced
