"""PROMISE12 (MHD) and ProstateX (DICOM): converted on import, place and values kept."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import volume_layouts as official
from pydicom import dcmread

from medsegdiff.data.dataset import open_dataset
from medsegdiff.data.prepare import prepare
from medsegdiff.errors import UserError
from simulations.published.catalogue import published
from simulations.published.layout import Converted, LayoutError, import_published
from simulations.recipe import open_source, read_recipe

RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from LPS, which MHD and DICOM use


def affine_of(path: Path) -> np.ndarray:
    """(4, 4) of an image that SimpleITK reads, in RAS, by the formula of its manual."""
    image = SimpleITK.ReadImage(str(path))
    lps = np.eye(4)
    lps[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    lps[:3, 3] = image.GetOrigin()
    return RAS @ lps


# PROMISE12


def test_promise12_keeps_values_and_place(tmp_path: Path) -> None:
    """An MHD volume and its mask become NIfTI files of the same voxels, type and place, .raw and .zraw alike."""
    official.promise12(tmp_path / "source")
    summary = import_published(published("promise12"), tmp_path / "source", tmp_path / "done")
    assert (summary.converted, summary.linked) == (8, 0)
    for case in open_dataset(tmp_path / "done").cases:
        for path, ending in ((case.image_paths[0], ""), (case.mask_paths[0], "_segmentation")):
            header = tmp_path / "source/training_data" / f"{case.case_id}{ending}.mhd"
            voxels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(header)))  # slices, rows, columns
            written = nib.load(path)
            assert np.array_equal(np.asarray(written.dataobj), voxels.T)
            assert written.get_data_dtype() == voxels.dtype
            assert np.allclose(written.affine, affine_of(header), atol=1e-4)
            assert np.allclose(written.header.get_zooms(), (0.625, 0.625, 3.6), atol=1e-5)


def test_promise12_is_prepared(tmp_path: Path) -> None:
    """Every case is prepared; a case is a patient, with the centre that its number stands for."""
    official.promise12(tmp_path / "source")
    import_published(published("promise12"), tmp_path / "source", tmp_path / "done")
    dataset = open_source(read_recipe(Path("promise12")), tmp_path / "done")
    done = prepare(dataset, 16, tmp_path / "cache")
    assert not done.faults
    assert all(sorted(np.unique(case.native_labels())) == [0, 1] for case in done.cases)
    assert {case.patient_id: case.site for case in dataset.cases} == {
        "Case00": "BIDMC", "Case01": "UCL", "Case13": "RUNMC", "Case49": "HK",
    }  # fmt: skip


def test_promise12_centres_cover_all_cases_once() -> None:
    """Fifty cases, each at one centre: 12, 13, 13 and 12 of them."""
    from simulations.published.promise12 import _CENTRES, _SITES

    assert sorted(_SITES) == list(range(50))
    assert {centre: len(numbers) for centre, numbers in _CENTRES.items()} == {
        "BIDMC": 12, "RUNMC": 13, "UCL": 13, "HK": 12,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("missing", "named"),
    [("Case13.raw", r"Case13\.raw"), ("Case13_segmentation.mhd", r"Case13_segmentation\.mhd")],
)
def test_promise12_names_a_missing_file(missing: str, named: str, tmp_path: Path) -> None:
    """A header without voxels or without its mask is told before anything is written."""
    official.promise12(tmp_path / "source")
    (tmp_path / "source/training_data" / missing).unlink()
    with pytest.raises(LayoutError, match=named) as caught:
        import_published(published("promise12"), tmp_path / "source", tmp_path / "done")
    assert "Expected: training_data/Case00.mhd" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("elsewhere", ["/etc/hostname", "../secret.raw", "LIST", ""])
def test_promise12_reads_no_file_elsewhere(elsewhere: str, tmp_path: Path) -> None:
    """A header that names voxels outside its folder, or a list of files, is refused: it comes from a stranger."""
    official.promise12(tmp_path / "source", (0,))
    header = tmp_path / "source/training_data/Case00.mhd"
    (tmp_path / "source/secret.raw").write_bytes(b"\0" * 10_000)
    header.write_text(header.read_text().replace("Case00.raw", elsewhere))
    with pytest.raises(LayoutError, match=r"ElementDataFile|LIST"):
        import_published(published("promise12"), tmp_path / "source", tmp_path / "done")


def test_promise12_torn_voxels_leave_nothing(tmp_path: Path) -> None:
    """A truncated .raw is a fault of the file it belongs to, and no half dataset stays behind."""
    official.promise12(tmp_path / "source")
    raw = tmp_path / "source/training_data/Case13.raw"
    raw.write_bytes(raw.read_bytes()[:100])
    with pytest.raises(UserError, match=r"Case13\.mhd"):
        import_published(published("promise12"), tmp_path / "source", tmp_path / "done")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_kill_during_a_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while a file is converted, the import leaves neither the dataset nor a part of it."""
    official.promise12(tmp_path / "source")
    write = SimpleITK.WriteImage
    written = []

    def interrupted(image: object, name: str) -> None:
        written.append(name)
        write(image, name)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(SimpleITK, "WriteImage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_published(published("promise12"), tmp_path / "source", tmp_path / "done")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# ProstateX


def test_prostatex_keeps_values_and_place(tmp_path: Path) -> None:
    """A tilted series whose files lie in no order becomes a volume with the place that DICOM's formula gives it."""
    patients = official.prostatex(tmp_path / "source")
    import_published(published("prostatex"), tmp_path / "source", tmp_path / "done")
    for patient, case in zip(patients, open_dataset(tmp_path / "done").cases, strict=True):
        assert case.case_id == case.patient_id == patient.name
        image, mask = nib.load(case.image_paths[0]), nib.load(case.mask_paths[0])
        assert np.array_equal(np.asarray(image.dataobj), patient.voxels.T)
        assert np.allclose(image.affine, patient.affine(), atol=1e-4)
        assert np.allclose(mask.affine, image.affine, atol=1e-6)


def test_prostatex_zones_are_those_drawn(tmp_path: Path) -> None:
    """Each zone has its value in the mask, on the slices it was drawn on, whatever the order of frames and segments."""
    patients = official.prostatex(tmp_path / "source")
    import_published(published("prostatex"), tmp_path / "source", tmp_path / "done")
    values = {"Peripheral": 1, "Transition": 2, "Anterior": 3, "Distal": 4}
    for patient, case in zip(patients, open_dataset(tmp_path / "done").cases, strict=True):
        expected = sum(values[label.split()[0]] * zone.astype(int) for label, zone in patient.zones().items())
        assert np.array_equal(np.asarray(nib.load(case.mask_paths[0]).dataobj), np.asarray(expected).T)


def test_prostatex_is_prepared(tmp_path: Path) -> None:
    """Zones are prepared under the names of the description; patients without zones are no cases."""
    official.prostatex(tmp_path / "source")
    summary = import_published(published("prostatex"), tmp_path / "source", tmp_path / "done")
    assert (summary.cases, summary.patients, summary.converted) == (2, 2, 4)
    dataset = open_source(read_recipe(Path("prostatex")), tmp_path / "done")
    done = prepare(dataset, 16, tmp_path / "cache")
    assert not done.faults
    assert all(sorted(np.unique(case.native_labels())) == [0, 1, 2, 3, 4] for case in done.cases)


def test_prostatex_needs_the_series_as_well(tmp_path: Path) -> None:
    """Zones without the images they were drawn on are an incomplete download; the patient is named."""
    patient = official.Patient(tmp_path / "source", "ProstateX-0004")
    patient.write_zones()
    with pytest.raises(LayoutError, match=r"T2 series.*ProstateX-0004.*Expected: .*Found in"):
        import_published(published("prostatex"), tmp_path / "source", tmp_path / "done")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_prostatex_without_zones_is_no_dataset(tmp_path: Path) -> None:
    """Images alone, or a segmentation of the whole gland, are answered with what was expected."""
    patient = official.Patient(tmp_path / "source", "ProstateX-0004")
    patient.write_series()
    patient.write_zones({"Prostate": patient.zones()["Peripheral zone of prostate"]})
    with pytest.raises(LayoutError, match="no DICOM segmentation of the prostate's zones"):
        import_published(published("prostatex"), tmp_path / "source", tmp_path / "done")


def refusal(patient: official.Patient, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        import_published(published("prostatex"), tmp_path / "source", tmp_path / "done")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    return str(caught.value)


def test_prostatex_zones_must_lie_on_the_series(tmp_path: Path) -> None:
    """A segmentation that lies a voxel beside its series is refused; a twentieth of a voxel is rounding."""
    patient = official.Patient(tmp_path / "source", "ProstateX-0004")
    patient.write_series()
    zones = patient.write_zones(offset=0.7)
    assert "1.0 voxels off the grid" in refusal(patient, tmp_path)
    zones.unlink()
    patient.write_zones(series="301.000000-Segmentation-2", offset=0.03)
    assert import_published(published("prostatex"), tmp_path / "source", tmp_path / "done").cases == 1


@pytest.mark.parametrize("change", ["turned", "coarser", "mirrored"])
def test_prostatex_zones_must_lie_as_the_series(change: str, tmp_path: Path) -> None:
    """Frames whose first pixel is right but whose axes, pixel size or direction are not are refused."""
    patient = official.Patient(tmp_path / "source", "ProstateX-0004")
    patient.write_series()
    path = patient.write_zones()
    data = dcmread(path)
    shared = data.SharedFunctionalGroupsSequence[0]
    axes = list(shared.PlaneOrientationSequence[0].ImageOrientationPatient)
    if change == "coarser":
        shared.PixelMeasuresSequence[0].PixelSpacing = [0.6, 0.7]
    else:
        turned = [*axes[3:], *axes[:3]] if change == "turned" else [-axis for axis in axes]
        shared.PlaneOrientationSequence[0].ImageOrientationPatient = turned
    data.save_as(path)
    assert "off the grid" in refusal(patient, tmp_path)


def test_prostatex_a_voxel_has_one_zone(tmp_path: Path) -> None:
    """Zones that overlap would make the mask depend on the order of segments: refused with the count."""
    patient = official.Patient(tmp_path / "source", "ProstateX-0004")
    patient.write_series()
    zones = patient.zones()
    zones["Distal prostatic urethra"][1, 8, 2:5] = True
    patient.write_zones(zones)
    assert "3 voxels of one slice belong to two zones" in refusal(patient, tmp_path)


def test_prostatex_segments_of_something_else_are_left_out(tmp_path: Path) -> None:
    """A segment that is no zone, such as the whole gland, neither fills the mask nor counts as an overlap."""
    patient = official.Patient(tmp_path / "source", "ProstateX-0004")
    patient.write_series()
    zones = patient.zones()
    patient.write_zones({"Prostate": np.any(list(zones.values()), axis=0), **zones})
    import_published(published("prostatex"), tmp_path / "source", tmp_path / "done")
    mask = np.asarray(nib.load(tmp_path / "done/masks/ProstateX-0004.nii.gz").dataobj)
    assert [np.count_nonzero(mask == value) for value in (1, 2, 3, 4)] == [
        zones[label].sum() for label in (
            "Peripheral zone of prostate", "Transition zone of prostate",
            "Anterior fibromuscular stroma of prostate", "Distal prostatic urethra",
        )
    ]  # fmt: skip


def test_prostatex_misses_no_slice(tmp_path: Path) -> None:
    """A series with a gap has no uniform grid: refused, not squeezed together."""
    patient = official.Patient(tmp_path / "source", "ProstateX-0004")
    patient.write_series(leave_out=(1,))
    patient.write_zones()
    assert "its slices lie 3.00 to 6.00 mm apart" in refusal(patient, tmp_path)


def test_prostatex_torn_file_is_named(tmp_path: Path) -> None:
    """A file that is no DICOM is a fault of its own, not of the layout."""
    official.prostatex(tmp_path / "source")
    torn = next((tmp_path / "source").rglob("4.000000*")) / "0-00.dcm"
    torn.write_bytes(b"not a scan")
    with pytest.raises(UserError, match=r"0-00\.dcm"):
        import_published(published("prostatex"), tmp_path / "source", tmp_path / "done")


def test_conversions_are_repeatable(tmp_path: Path) -> None:
    """Two imports of one source give the same bytes: caches and runs recognise them."""
    official.prostatex(tmp_path / "source")
    for name in ("one", "two"):
        import_published(published("prostatex"), tmp_path / "source", tmp_path / name)
    for path in sorted((tmp_path / "one").rglob("*.nii.gz")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    rows = published("prostatex").read(tmp_path / "source").rows
    assert all(isinstance(source, Converted) for row in rows for source in (*row.images, *row.masks))
