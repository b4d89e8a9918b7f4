"""LIDC-IDRI: scans in DICOM and readings in XML become patches of nodules with four masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from scipy import ndimage

from medsegdiff.data.dataset import open_dataset
from medsegdiff.data.guard import DataFileError
from medsegdiff.data.prepare import prepare
from simulations.published.catalogue import published
from simulations.published.layout import LayoutError, import_published
from simulations.published.lidc_readings import Contour, fill, nodules_of

UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001"
SIDE, SLICES = 160, 7
SPACING, STEP = (0.7, 0.6), 2.5  # of rows and columns, of slices; real scans have square pixels
ORIGIN = (-50.0, -40.0, -200.0)

Point = tuple[int, int]


# --- scans and readings in the official form --------------------------------------------------------------------------


def uid_of(series: int, number: int) -> str:
    return f"{UID}.{series}.{number}"


def voxel(column: int, row: int, number: int) -> int:
    """A value in Hounsfield units that tells its place."""
    return (column * 7 + row * 3 + number * 50) % 1000 - 500


def scan(root: Path, patient: str = "LIDC-IDRI-0001", series: int = 1, **header: object) -> Path:
    """A CT series as the archive's own program writes it; files in an order that is not that of the slices."""
    folder = root / "LIDC-IDRI" / patient / f"01-01-2000-NA-NA-{series:05d}" / f"3000566.000000-NA-0{series:04d}"
    folder.mkdir(parents=True)
    columns, rows = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    for number in range(SLICES):
        data = FileDataset(None, {}, preamble=b"\0" * 128, file_meta=FileMetaDataset())
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = uid_of(series, number)
        data.SeriesInstanceUID, data.StudyInstanceUID = f"{UID}.{series}", f"{UID}.9{series}"
        data.PatientID, data.Modality, data.Manufacturer = patient, "CT", "GE MEDICAL SYSTEMS"
        data.ImagePositionPatient = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + STEP * number]
        data.ImageOrientationPatient, data.PixelSpacing = [1, 0, 0, 0, 1, 0], list(SPACING)
        data.SliceThickness, data.InstanceNumber = STEP, SLICES - number
        data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = SIDE, SIDE, 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        values = (columns * 7 + rows * 3 + number * 50) % 1000 - 500 + 1024
        values[0, 0] = -2000  # outside the scanner's circle
        data.PixelData = values.astype("<i2").tobytes()
        for name, value in header.items():
            setattr(data, name, value)
        data.save_as(folder / f"1-{SLICES - number:03d}.dcm", enforce_file_format=True)
    return folder


@dataclass
class Readers:
    """An XML file under construction: for each reader the nodules, each a list of contours."""

    series: int = 1
    sessions: list[list[str]] = field(default_factory=lambda: [[], [], [], []])

    def nodule(self, reader: int, *contours: tuple[int, list[Point], bool]) -> Readers:
        rois = "".join(
            f"<roi><imageZposition>{ORIGIN[2] + STEP * number} </imageZposition>"
            f"<imageSOP_UID> {uid_of(self.series, number)}</imageSOP_UID>"
            f"<inclusion>{str(inclusion).upper()}</inclusion>"
            + "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in points)
            + "</roi>"
            for number, points, inclusion in contours
        )
        name = f"<noduleID>Nodule {len(self.sessions[reader]):03d}</noduleID>"
        self.sessions[reader].append(f"<unblindedReadNodule>{name}{rois}</unblindedReadNodule>")
        return self

    def write(self, path: Path, root: str = "LidcReadMessage") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        other = "<nonNodule><nonNoduleID>1</nonNoduleID><locus><xCoord>5</xCoord><yCoord>5</yCoord></locus></nonNodule>"
        sessions = "".join(
            f"<readingSession><servicingRadiologistID>anon</servicingRadiologistID>{''.join(own)}{other}</readingSession>"
            for own in self.sessions
        )
        path.write_text(
            f'<?xml version="1.0" encoding="UTF-8"?><{root} uid="1.3" xmlns="http://www.nih.gov"><ResponseHeader>'
            f"<SeriesInstanceUid>{UID}.{self.series}</SeriesInstanceUid></ResponseHeader>{sessions}</{root}>"
        )
        return path


def ring(left: int, top: int, right: int, bottom: int) -> list[Point]:
    """A closed chain of pixels around the box between them, each a step from the last, the first again at the end."""
    upper = [(x, top) for x in range(left, right)]
    lower = [(x, bottom) for x in range(right, left, -1)]
    return [
        *upper,
        *((right, y) for y in range(top, bottom)),
        *lower,
        *((left, y) for y in range(bottom, top, -1)),
        (left, top),
    ]


def standard(series: int = 1) -> Readers:
    """Nodule 1: readers 1 and 2, reader 2 in two parts and with a hole; nodule 2: reader 4; reader 3: a small one."""
    outer = ring(40, 50, 60, 70)
    return (
        Readers(series)
        .nodule(0, (2, outer, True), (3, outer, True))
        .nodule(1, (3, ring(38, 48, 50, 60), True), (3, ring(42, 52, 46, 56), False))
        .nodule(1, (4, ring(52, 62, 62, 72), True), (3, ring(52, 62, 62, 72), True))
        .nodule(2, (5, [(100, 100)], True))
        .nodule(3, (5, ring(140, 10, 150, 20), True))
    )


def source_of(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    scan(source)
    standard().write(source / "tcia-lidc-xml" / "157" / "158.xml")
    return source


def run(tmp_path: Path):
    summary = import_published(published("lidc"), tmp_path / "source", tmp_path / "target")
    return summary, {case.case_id: case for case in open_dataset(tmp_path / "target").cases}


def load(path: Path) -> Any:
    return np.asanyarray(nib.load(path).dataobj)


def box(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """What `ring` surrounds, on the whole slice: (columns, rows)."""
    inside = np.zeros((SIDE, SIDE), bool)
    inside[left + 1 : right, top + 1 : bottom] = True
    return inside


# --- what is imported -------------------------------------------------------------------------------------------------


def test_nodules_with_four_masks(tmp_path: Path) -> None:
    """Overlapping outlines are one nodule; the line itself is outside; a reader who drew none has an empty mask."""
    source_of(tmp_path)
    summary, cases = run(tmp_path)
    assert list(cases) == ["LIDC-IDRI-0001_n01", "LIDC-IDRI-0001_n02"]
    assert (summary.patients, summary.sites, summary.converted, summary.notes) == (1, ("ge",), 10, ())
    first = cases["LIDC-IDRI-0001_n01"]
    left, top = 0, 0  # the outlines span columns 38 to 62, rows 48 to 72; the patch cannot begin before the image does
    masks = [load(path) for path in first.mask_paths]
    assert {mask.shape for mask in masks} == {(128, 128, 3)}  # slices 2, 3 and 4
    assert load(first.image_paths[0]).shape == (128, 128, 3)

    def crop(*slices: np.ndarray) -> np.ndarray:
        return np.stack(slices, axis=2)[left : left + 128, top : top + 128]

    none = np.zeros((SIDE, SIDE), bool)
    square, part, hole, other = (
        box(40, 50, 60, 70), box(38, 48, 50, 60), box(41, 51, 47, 57), box(52, 62, 62, 72),
    )  # fmt: skip
    assert np.array_equal(masks[0], crop(square, square, none))
    assert np.array_equal(masks[1], crop(none, (part & ~hole) | other, other))
    assert not masks[2].any()
    assert not masks[3].any()
    second = cases["LIDC-IDRI-0001_n02"]  # columns 140 to 150: the patch ends with the image, at column 160
    masks = [load(path) for path in second.mask_paths]
    assert np.array_equal(masks[3], box(140, 10, 150, 20)[32:160, 0:128, None])
    assert not any(mask.any() for mask in masks[:3])


def test_patches_lie_where_the_scan_lies(tmp_path: Path) -> None:
    """Values in Hounsfield units; their places in the patient are those that SimpleITK gives to the DICOM series."""
    folder = scan(tmp_path / "source")
    standard().write(tmp_path / "source" / "158.xml")
    _, cases = run(tmp_path)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    whole = reader.Execute()
    for name, corner in (("LIDC-IDRI-0001_n01", (0, 0, 2)), ("LIDC-IDRI-0001_n02", (32, 0, 5))):
        image = nib.load(cases[name].image_paths[0])
        patch = load(cases[name].image_paths[0])
        assert (patch.dtype, load(cases[name].mask_paths[0]).dtype) == (np.int16, np.uint8)
        assert np.allclose(image.header.get_zooms(), (SPACING[1], SPACING[0], STEP))
        for index in ((5, 9, 0), (127, 0, 0), (64, 100, patch.shape[2] - 1)):
            place = tuple(int(a + b) for a, b in zip(index, corner, strict=True))
            assert patch[index] == voxel(*place)
            left_posterior = np.diag([-1, -1, 1]) @ (image.affine @ [*index, 1])[:3]
            assert np.allclose(left_posterior, whole.TransformIndexToPhysicalPoint(place), atol=1e-4)
    assert load(cases["LIDC-IDRI-0001_n01"].image_paths[0])[0, 0, 0] == -1024  # padding is clipped to air


def test_patches_can_be_prepared(tmp_path: Path) -> None:
    """Slices are axial; four raters reach the network."""
    source_of(tmp_path)
    run(tmp_path)
    prepared = prepare(open_dataset(tmp_path / "target"), 32, tmp_path / "cache")
    assert not prepared.faults
    assert [(case.raters, case.slices) for case in prepared.cases] == [(4, 3), (4, 1)]
    assert prepared.cases[0].native_labels()[0].sum() == 2 * 19 * 19


def test_equal_scans_give_equal_bytes(tmp_path: Path) -> None:
    """Import twice: every file is the same."""
    source_of(tmp_path)
    for name in ("one", "two"):
        import_published(published("lidc"), tmp_path / "source", tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 12
    assert all((tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes() for path in files)


# --- which readings count ---------------------------------------------------------------------------------------------


def test_scans_of_a_patient_and_readings_that_do_not_count(tmp_path: Path) -> None:
    """Two scans of one patient; radiographs; a scan that is absent; a panel of eight; files in conflict."""
    source = source_of(tmp_path)
    scan(source, series=2, Manufacturer="SIEMENS")
    standard(2).write(source / "xml" / "2.xml")
    standard(2).write(source / "xml" / "2-again.xml")  # submitted twice: equal in content
    scan(source, "LIDC-IDRI-0566", 3)
    eight = standard(3)
    eight.sessions *= 2
    eight.write(source / "xml" / "3.xml")
    scan(source, "LIDC-IDRI-0007", 4)
    standard(4).write(source / "xml" / "4.xml")
    standard(4).nodule(2, (1, ring(20, 100, 30, 110), True)).write(source / "xml" / "4-other.xml")
    standard(8).write(source / "xml" / "8.xml")  # its scan was not downloaded
    Readers(9).write(source / "xml" / "9.xml", "IdriReadMessage")
    scan(source, "LIDC-IDRI-0008", 10, Modality="DX")
    summary, cases = run(tmp_path)
    assert list(cases) == [f"LIDC-IDRI-0001_s{number}_n0{nodule}" for number in (1, 2) for nodule in (1, 2)]
    assert {(case.patient_id, case.site) for case in cases.values()} == {("LIDC-IDRI-0001", "ge")}
    absent, conflict, panel = summary.notes
    assert absent.startswith("1 scans")
    assert "LIDC-IDRI-0007" in conflict
    assert "LIDC-IDRI-0566" in panel


def test_a_corrected_file_replaces_the_old_one(tmp_path: Path) -> None:
    """As the collection did for LIDC-IDRI-0101: the name says which is the correction."""
    source = source_of(tmp_path)
    corrected = standard().nodule(2, (1, ring(20, 100, 30, 110), True))
    corrected.write(source / "tcia-lidc-xml" / "157" / "158-resubmitted-correction.xml")
    summary, cases = run(tmp_path)
    assert len(cases) == 3
    assert summary.notes == ()


# --- outlines ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
def test_filling_undoes_outlining(seed: int) -> None:
    """The chain of pixels just outside an ellipse gives the ellipse back; filling holes of the chain is the oracle."""
    generator = np.random.default_rng(seed)
    centre, radii = generator.uniform(18, 22, 2), generator.uniform(1.5, 14, 2)
    columns, rows = np.meshgrid(np.arange(40), np.arange(40))
    ellipse = ((columns - centre[0]) / radii[0]) ** 2 + ((rows - centre[1]) / radii[1]) ** 2 <= 1
    chain = chain_around(ellipse)
    drawn = np.zeros_like(ellipse)
    drawn[[y for _, y in chain], [x for x, _ in chain]] = True
    assert np.array_equal(ndimage.binary_fill_holes(drawn) & ~drawn, ellipse)
    outline = (Contour("a", np.array(chain), True),)
    assert np.array_equal(fill(outline, "a", np.array([0, 0]), (40, 40)), ellipse)
    assert not fill(outline, "b", np.array([0, 0]), (40, 40)).any()
    shifted = fill(outline, "a", np.array([10, 5]), (20, 30))
    assert np.array_equal(shifted, ellipse[5:35, 10:30])


def chain_around(mask: np.ndarray) -> list[Point]:
    """Pixels that touch the mask by a side, walked around: each next one is a neighbour not yet visited."""
    border = ndimage.binary_dilation(mask) & ~mask
    left = {(int(x), int(y)) for y, x in zip(*np.nonzero(border), strict=True)}
    chain = [min(left)]
    left.discard(chain[0])
    while left:
        x, y = chain[-1]
        steps = [(1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
        chain.append(next((x + a, y + b) for a, b in steps if (x + a, y + b) in left))
        left.discard(chain[-1])
    return chain


def outline(*boxes: tuple[int, int, int, int, int]) -> tuple[Contour, ...]:
    return tuple(Contour(str(number), np.array(ring(*corners)), True) for number, *corners in boxes)


def test_outlines_that_share_a_voxel_are_one_nodule() -> None:
    """Through a third one as well; sharing a line, or the same place on another slice, is not enough."""
    one, bridge, other = outline((1, 0, 0, 10, 10)), outline((1, 8, 0, 20, 10)), outline((1, 18, 0, 30, 10))
    touching, above, empty = outline((1, 0, 10, 10, 20)), outline((2, 0, 0, 10, 10)), outline((1, 0, 0, 1, 1))
    nodules = nodules_of([[one, touching], [bridge], [other, above], [empty]])
    assert [tuple(len(reader) for reader in nodule) for nodule in nodules] == [(1, 1, 1, 0), (1, 0, 0, 0), (0, 0, 1, 0)]
    assert nodules[0][0] == one
    assert nodules[1][0] == touching
    assert nodules[2][2] == above
    assert nodules_of([[], [], [], []]) == []


# --- wrong layouts and faulty files -----------------------------------------------------------------------------------


def test_a_wrong_layout_is_answered(tmp_path: Path) -> None:
    """No readings, no scans, none that fit, nothing outlined; nothing is written."""
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(LayoutError, match=r"no XML file.*Expected: LIDC-IDRI/LIDC-IDRI-0001/.*Found in .*: nothing"):
        run(tmp_path)
    standard(5).write(source / "5.xml")
    with pytest.raises(LayoutError, match="none of the 1 CT scans"):
        run(tmp_path)
    scan(source, series=1)
    with pytest.raises(LayoutError, match="none of the 1 CT scans"):
        run(tmp_path)
    Readers(1).write(source / "1.xml")
    with pytest.raises(LayoutError, match="no reader outlined a nodule on the 1 scans"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_faulty_files_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    """A torn XML file, a coordinate that is none, an image that is missing, a header without pixel spacing."""
    source = source_of(tmp_path)
    xml = source / "tcia-lidc-xml" / "157" / "158.xml"
    good = xml.read_text()
    for text, message in ((good[:-20], "158.xml: cannot be decoded"), (good.replace(">40<", ">4x<"), "158.xml")):
        xml.write_text(text)
        with pytest.raises(DataFileError, match=message):
            run(tmp_path)
    xml.write_text(good)
    (folder,) = {path.parent for path in source.rglob("*.dcm")}
    image = next(path for path in folder.iterdir() if pydicom.dcmread(path).SOPInstanceUID == uid_of(1, 3))
    kept = image.read_bytes()
    image.unlink()
    with pytest.raises(DataFileError, match=r"1 outlined images are not there \(the first: .*\.1\.3\)"):
        run(tmp_path)
    data = pydicom.dcmread(next(iter(folder.iterdir())))
    del data.PixelSpacing
    data.SOPInstanceUID = uid_of(1, 3)
    data.save_as(image)
    with pytest.raises(DataFileError, match="PixelSpacing"):
        run(tmp_path)
    image.write_bytes(kept[:-100])
    with pytest.raises(DataFileError, match=image.name):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
