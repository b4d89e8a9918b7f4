"""Small datasets in exactly the layouts that BTCV, KiTS, BraTS, PROMISE12 and ProstateX are published in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels import pack_bits
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, SegmentationStorage, generate_uid

SHAPE = (12, 10, 4)
BTCV_TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
TILT = 0.07  # radians: the tilt of the DICOM slices, so that no axis of the scanner is one of the image


def noise(shape: Sequence[int], seed: int) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(-200, 800, shape).astype(np.int16)


def blocks(values: Sequence[int], shape: Sequence[int] = SHAPE) -> NDArray[np.uint8]:
    """A mask in which each value fills one row of the first axis, background elsewhere."""
    mask = np.zeros(shape, np.uint8)
    for row, value in enumerate(values):
        mask[row % shape[0], row // shape[0] + 1] = value
    return mask


def write_nifti(path: Path, array: NDArray[np.generic], affine: NDArray[np.float64] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    given = np.diag([0.8, 0.8, 3.0, 1.0]) if affine is None else affine
    nib.save(nib.Nifti1Image(array, given), path)
    return path


def btcv(root: Path, numbers: Sequence[int] = (*BTCV_TEST, 5, 40)) -> Path:
    training = root / "RawData" / "Training"
    for number in numbers:
        write_nifti(training / "img" / f"img{number:04d}.nii.gz", noise(SHAPE, number))
        write_nifti(training / "label" / f"label{number:04d}.nii.gz", blocks(range(1, 14)))
    return root


def kits(root: Path, mask_name: str, values: Sequence[int], unlabelled: Sequence[int] = ()) -> Path:
    """Slices first, from head to feet, as the challenge stores them."""
    affine = np.array([[0, 0, -0.8, 0], [0, -0.8, 0, 0], [-3.0, 0, 0, 0], [0, 0, 0, 1.0]])
    for number in (0, 1, 2):
        case = root / f"case_{number:05d}"
        write_nifti(case / "imaging.nii.gz", noise((4, 12, 10), number).astype(np.float64), affine)
        if number not in unlabelled:
            write_nifti(case / mask_name, np.moveaxis(blocks(values), 2, 0).copy(), affine)
    (root / "kits.json").write_text("[]")
    return root


def brats(root: Path, cases: Sequence[str], ending: str = ".nii.gz") -> Path:
    for seed, case in enumerate(cases):
        for channel, name in enumerate(("flair", "t1", "t1ce", "t2")):
            write_nifti(root / case / f"{case}_{name}{ending}", noise(SHAPE, 10 * seed + channel))
        write_nifti(root / case / f"{case}_seg{ending}", blocks((1, 2, 4)))
    return root


def brats2020(root: Path, ending: str = ".nii") -> Path:
    """Two contributors, one scan added that year, and the case whose mask bears a name of its own."""
    brats(root, [f"BraTS20_Training_{number:03d}" for number in (1, 2, 336, 355)], ending)
    folder = root / "BraTS20_Training_355"
    (folder / f"BraTS20_Training_355_seg{ending}").rename(folder / f"W39_1998.09.19_Segm{ending}")
    (root / "name_mapping.csv").write_text(
        "Grade,BraTS_2017_subject_ID,BraTS_2018_subject_ID,TCGA_TCIA_subject_ID,BraTS_2019_subject_ID,"
        "BraTS_2020_subject_ID\n"
        "HGG,Brats17_CBICA_AAB_1,Brats18_CBICA_AAB_1,NA,BraTS19_CBICA_AAB_1,BraTS20_Training_001\n"
        "HGG,Brats17_TCIA_205_1,Brats18_TCIA08_205_1,TCGA-00-0000,BraTS19_TCIA08_205_1,BraTS20_Training_002\n"
        "HGG,NA,NA,NA,NA,BraTS20_Training_336\n"
        "LGG,Brats17_2013_0_1,Brats18_2013_0_1,NA,BraTS19_2013_0_1,BraTS20_Training_355\n"
    )
    (root / "survival_info.csv").write_text("Brats20ID,Age,Survival_days,Extent_of_Resection\n")
    return root


def promise12(root: Path, numbers: Sequence[int] = (0, 1, 13, 49)) -> Path:
    folder = root / "training_data"
    folder.mkdir(parents=True)
    for number in numbers:
        for name, array in (("", noise(SHAPE, number)), ("_segmentation", blocks((1,)).astype(np.int8))):
            image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))
            image.SetSpacing((0.625, 0.625, 3.6))
            image.SetOrigin((-72.5, 31.0, -8.25))
            image.SetDirection((1.0, 0.0, 0.0, 0.0, 0.8, -0.6, 0.0, 0.6, 0.8))
            compressed = number == 49  # .zraw beside .raw
            SimpleITK.WriteImage(image, str(folder / f"Case{number:02d}{name}.mhd"), compressed)
    return root


class Patient:
    """A T2 series as a scanner makes it, and the segmentation drawn on it."""

    spacing = (0.5, 0.7)  # between rows, between columns
    thickness = 3.0

    def __init__(self, folder: Path, name: str, seed: int = 0) -> None:
        self.folder, self.name = folder / name / "10-18-2011-NA-MR prostaat-1", name
        self.study, self.series, self.place = generate_uid(), generate_uid(), generate_uid()
        self.voxels = noise((4, 12, 10), seed).clip(0).astype(np.uint16)  # slices, rows, columns
        angle = TILT
        self.row = np.array([1.0, 0.0, 0.0])
        self.column = np.array([0.0, np.cos(angle), np.sin(angle)])
        self.normal = np.cross(self.row, self.column)
        self.first = np.array([-20.5, -31.25, 12.125])

    def affine(self) -> NDArray[np.float64]:
        """(4, 4): column, row, slice -> RAS mm, by DICOM PS3.3, C.7.6.2.1.1."""
        lps = np.eye(4)
        lps[:3, 0] = self.row * self.spacing[1]
        lps[:3, 1] = self.column * self.spacing[0]
        lps[:3, 2] = self.normal * self.thickness
        lps[:3, 3] = self.first
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps

    def position(self, index: int) -> list[float]:
        return [round(float(value), 6) for value in self.first + index * self.thickness * self.normal]

    def orientation(self) -> list[float]:
        return [round(float(value), 6) for value in (*self.row, *self.column)]

    def write_series(self, leave_out: Sequence[int] = ()) -> Path:
        """File names run against the place of the slices: only the headers order them."""
        folder = self.folder / "4.000000-t2tsetra-00702"
        folder.mkdir(parents=True)
        for index, plane in enumerate(self.voxels):
            if index in leave_out:
                continue
            data = self._file(MRImageStorage, "MR", self.series)
            data.InstanceNumber = index + 1
            data.ImagePositionPatient = self.position(index)
            data.ImageOrientationPatient = self.orientation()
            data.PixelSpacing = list(self.spacing)
            data.SliceThickness = self.thickness
            self._pixels(data, plane.shape, 16)
            data.PixelData = plane.astype("<u2").tobytes()
            data.save_as(folder / f"1-{len(self.voxels) - index:02d}.dcm", enforce_file_format=True)
        return folder

    def zones(self) -> dict[str, NDArray[np.bool_]]:
        """Label -> (slices, rows, columns); no zone is in every slice."""
        empty = np.zeros(self.voxels.shape, bool)
        peripheral, transition, stroma, urethra = empty.copy(), empty.copy(), empty.copy(), empty.copy()
        peripheral[:3, 8:10, 2:7], transition[1:3, 5:8, 2:7] = True, True
        stroma[1, 3:5, 3:6], urethra[3, 8, 4] = True, True
        return {
            "Peripheral zone of prostate": peripheral,
            "Transition zone of prostate": transition,
            "Distal prostatic urethra": urethra,
            "Anterior fibromuscular stroma of prostate": stroma,
        }

    def write_zones(
        self,
        zones: dict[str, NDArray[np.bool_]] | None = None,
        series: str = "300.000000-Segmentation-99234",
        offset: float = 0.0,
    ) -> Path:
        """A binary DICOM SEG; planes without a voxel are left out and the others come in no order of place.

        Args:
            offset: mm by which every frame lies beside its slice, along the rows.
        """
        given = self.zones() if zones is None else zones
        data = self._file(SegmentationStorage, "SEG", generate_uid())
        data.SegmentationType = "BINARY"
        data.ReferencedSeriesSequence = [_item(SeriesInstanceUID=self.series)]
        data.SegmentSequence = [
            _item(SegmentNumber=number, SegmentLabel=label, SegmentAlgorithmType="MANUAL")
            for number, label in enumerate(given, start=1)
        ]
        measures = _item(PixelSpacing=list(self.spacing), SliceThickness=self.thickness)
        orientation = _item(ImageOrientationPatient=self.orientation())
        data.SharedFunctionalGroupsSequence = [
            _item(PixelMeasuresSequence=[measures], PlaneOrientationSequence=[orientation])
        ]
        frames, groups = [], []
        for number, volume in enumerate(given.values(), start=1):
            for index in reversed(range(len(volume))):
                if volume[index].any():
                    moved = np.array(self.position(index)) + offset * self.row
                    plane = _item(ImagePositionPatient=[round(float(value), 6) for value in moved])
                    segment = _item(ReferencedSegmentNumber=number)
                    groups.append(_item(PlanePositionSequence=[plane], SegmentIdentificationSequence=[segment]))
                    frames.append(volume[index])
        data.PerFrameFunctionalGroupsSequence = groups
        data.NumberOfFrames = len(frames)
        self._pixels(data, frames[0].shape, 1)
        data.PixelData = pack_bits(np.stack(frames).astype(np.uint8).ravel())
        folder = self.folder / series
        folder.mkdir(parents=True)
        data.save_as(folder / "1-1.dcm", enforce_file_format=True)
        return folder / "1-1.dcm"

    def _file(self, kind: str, modality: str, series: str) -> FileDataset:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = kind
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
        data.Modality, data.PatientID, data.PatientName = modality, self.name, self.name
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = self.study, series, self.place
        return data

    def _pixels(self, data: FileDataset, shape: Sequence[int], bits: int) -> None:
        data.Rows, data.Columns = shape
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
        data.BitsAllocated = data.BitsStored = bits
        data.HighBit = bits - 1


def _item(**elements: object) -> Dataset:
    item = Dataset()
    for name, value in elements.items():
        setattr(item, name, value)
    return item


def prostatex(root: Path, names: Sequence[str] = ("ProstateX-0004", "ProstateX-0007")) -> list[Patient]:
    """Patients with zones, one with the whole gland beside them, and one whose zones nobody drew."""
    collection = root / "manifest-1600709154662" / "PROSTATEx"
    patients = [Patient(collection, name, seed) for seed, name in enumerate(names)]
    for patient in patients:
        patient.write_series()
        patient.write_zones()
    gland = np.any(list(patients[0].zones().values()), axis=0)
    patients[0].write_zones({"Prostate": gland}, "301.000000-Segmentation-1")
    Patient(collection, "ProstateX-0199", 99).write_series()
    return patients
