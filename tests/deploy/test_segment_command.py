"""`medsegfed segment`: what a radiology department starts, with whatever files lie there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image

from deploy import cli
from deploy.segmenting import find_scans
from medsegdiff.errors import UserError
from medsegdiff.weights import initial_weights, save_model
from tests.medsegdiff.data.conftest import save_dicom
from tests.medsegdiff.data.test_hostile_files import nifti_header, png, zeros

hd: Any = pytest.importorskip("highdicom")
Run = Callable[..., tuple[int, str, str]]
QUICK = ["--steps", "1", "--members", "2", "--threads", "1", "--device", "cpu"]

# The command as it is started from a shell, which at its end writes down what it took.
TELLING = """
import atexit, json, os, sys
def tell():
    peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    seconds = sum(os.times()[:2])
    open(os.environ["TOLD"], "w").write(json.dumps({"torch": "torch" in sys.modules, "peak": peak, "seconds": seconds}))
atexit.register(tell)
from deploy.cli import main
main()
"""

# The command, killed at the n-th file that is moved to its place, or at the n-th preview.
KILLED = """
import os, signal, sys
from pathlib import Path
import medsegdiff.preview
what, left = sys.argv.pop(1), int(sys.argv.pop(1))
def counted(function):
    def call(*arguments, **keywords):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return call
if what == "move":
    moved, counts = Path.replace, counted(lambda: None)
    Path.replace = lambda path, to: (path.parent.name.endswith(".whole") and counts(), moved(path, to))[1]
else:
    medsegdiff.preview.preview = counted(medsegdiff.preview.preview)
from deploy.cli import main
main()
"""


def start(program: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
    )  # fmt: skip


@pytest.fixture
def segment(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call with scans and options to run the command in this process; exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medsegfed", "segment", str(model), *map(str, arguments), *QUICK])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_task: Any) -> Path:
    """An untrained model, made loud: its masks are noise, which serves."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    weights = initial_weights(tiny_task.model, 0)
    weights["out.weight"] *= 100
    save_model(path, tiny_task.card, weights)
    return path


def save_nifti(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).normal(size=(10, 12, 3)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.diag([-1.5, 1.0, 4.0, 1.0])), path)
    return path


def save_series(folder: Path, **changes: Any) -> Path:
    affine = np.array([[0.9, 0, 0.3, 5], [0, -1.1, 0, -20], [-0.27, 0, 3.0, 40], [0, 0, 0, 1.0]])
    affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1]) * -3
    array = np.random.default_rng(3).integers(0, 900, (14, 11, 4)).astype(np.int16)
    return save_dicom(folder, array, affine, **changes)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refused(result: tuple[int, str, str], *facts: str) -> None:
    code, out, err = result
    assert (code, out) == (2, ""), result
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for fact in facts:
        assert fact in err


# --- hostile files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Peak memory of the command that does nothing, in bytes."""
    told = tmp_path_factory.mktemp("idle") / "told"
    assert start(TELLING, "segment", "--help", TOLD=str(told)).returncode == 0
    return int(json.loads(told.read_text())["peak"])


def hostile(folder: Path) -> dict[str, str]:
    """Name -> words of its refusal."""
    save_nifti(folder / "cut.nii.gz")
    whole = (folder / "cut.nii.gz").read_bytes()
    (folder / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "declares.nii").write_bytes(bytes(nifti_header((2048,) * 3, np.float32) + bytes(32)))
    (folder / "bomb.nii.gz").write_bytes(zeros(2, nifti_header((1024,) * 3)))
    (folder / "wide.png").write_bytes(png(60_000, 60_000, 8, 0))
    (slice_,) = save_dicom(folder / "series", np.zeros((8, 8, 1), np.int16)).iterdir()
    data = pydicom.dcmread(slice_)
    data.Rows = data.Columns = 65_535
    data.save_as(slice_)
    return {
        "cut.nii.gz": "cut", "declares.nii": "8,589,934,592 voxels", "bomb.nii.gz": "compressed bytes are to become",
        "wide.png": "DecompressionBomb", "series": "voxels; the limit",
    }  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", ["bomb.nii.gz", "series"])
def test_a_hostile_file_is_one_line_in_little_memory_and_without_torch(
    tmp_path: Path, model: Path, idle: int, name: str
) -> None:
    """The whole command: exit code 2, 2 s of work, 200 MB above the idle process, torch not imported."""
    words = hostile(tmp_path / "in")
    told = tmp_path / "told"
    done = start(TELLING, "segment", model, tmp_path / "in" / name, "-o", tmp_path / "out", TOLD=str(told))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("not segmented: ")
    assert done.stderr.count("\n") == 1
    assert words[name] in done.stderr
    found = json.loads(told.read_text())
    assert not found["torch"]
    assert found["peak"] < idle + 200e6
    assert found["seconds"] < 2  # of the processor: others may be at work on this machine
    assert json.loads((tmp_path / "out" / "segment.json").read_text())["failed"][0]["reason"] in done.stderr


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_folder_of_hostile_files(tmp_path: Path, model: Path, idle: int) -> None:
    """One line each, the same limits."""
    words = hostile(tmp_path / "in")
    told = tmp_path / "told"
    done = start(TELLING, "segment", model, tmp_path / "in", "-o", tmp_path / "out", TOLD=str(told))
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == len(words)
    for line, name in zip(lines, sorted(words), strict=True):
        assert line.startswith(f"not segmented: {tmp_path / 'in' / name}")
        assert words[name] in line
    found = json.loads(told.read_text())
    assert not found["torch"]
    assert found["peak"] < idle + 200e6


# --- one scan ---------------------------------------------------------------------------------------------------------


def test_a_dicom_series_becomes_a_dicom_segmentation(segment: Run, tmp_path: Path) -> None:
    """highdicom finds in each source image the voxels that the NIfTI mask holds; pydicom the patient; JSON no name."""
    source = save_series(tmp_path / "series", PatientName="Doe^Jane")
    code, out, _ = segment(source, "-o", tmp_path / "out", "--seed", 5)
    assert code == 0
    assert files(tmp_path / "out") == {
        "segment.json", "series.json", "series_mask.nii.gz", "series_seg.dcm", "series_preview.png",
        "series_uncertainty.nii.gz", "series_variance.nii.gz",
    }  # fmt: skip
    assert str(tmp_path / "out" / "series_seg.dcm") in out
    image = nib.load(tmp_path / "out" / "series_mask.nii.gz")
    mask = np.asarray(image.dataobj)
    assert 0 < mask.sum() < mask.size

    def slice_of(header: pydicom.Dataset) -> int:  # the third index of the first pixel's place, LPS to RAS
        place = np.array([*header.ImagePositionPatient, 1.0]) * (-1, -1, 1, 1)
        index = np.linalg.inv(image.affine) @ place
        assert np.allclose(index[:2], 0, atol=1e-4)
        return round(index[2])

    headers = sorted((pydicom.dcmread(file) for file in source.iterdir()), key=slice_of)
    assert [slice_of(header) for header in headers] == [0, 1, 2, 3]
    seg = hd.seg.segread(tmp_path / "out" / "series_seg.dcm")
    pixels = seg.get_pixels_by_source_instance(
        [header.SOPInstanceUID for header in headers], segment_numbers=[1], assert_missing_frames_are_empty=True
    )[..., 0]
    assert np.array_equal(pixels > 0, mask.transpose(2, 1, 0) > 0)
    data = pydicom.dcmread(tmp_path / "out" / "series_seg.dcm")
    described = json.loads((tmp_path / "out" / "series.json").read_text())
    assert (data.PatientName, data.FrameOfReferenceUID) == ("Doe^Jane", headers[0].FrameOfReferenceUID)
    assert data.DeviceSerialNumber == described["model_sha256"]
    assert (described["seed"], described["members"], described["warnings"]) == (5, 2, [])
    for name in ("series.json", "segment.json"):
        assert "Doe" not in (tmp_path / "out" / name).read_text()


def test_a_series_unfit_for_a_segmentation_still_gives_its_mask(segment: Run, tmp_path: Path) -> None:
    """Without a frame of reference there is no SEG: said in the JSON and on the terminal."""
    source = save_series(tmp_path / "series", FrameOfReferenceUID="")
    code, out, _ = segment(source, "-o", tmp_path / "out")
    assert code == 0
    assert not (tmp_path / "out" / "series_seg.dcm").exists()
    described = json.loads((tmp_path / "out" / "series.json").read_text())
    assert described["dicom_seg"] is None
    assert "no DICOM Segmentation: FrameOfReferenceUID is missing" in described["warnings"][0]
    assert described["warnings"][0] in out


def test_pictures_give_pictures(segment: Run, tmp_path: Path) -> None:
    """TIFF in, PNG out, the size of a pixel unknown."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30)).astype(np.uint8)).save(tmp_path / "eye.tif")
    assert segment(tmp_path / "eye.tif", "-o", tmp_path / "out")[0] == 0
    with Image.open(tmp_path / "out" / "eye_mask.png") as mask:
        assert mask.size == (30, 20)
    described = json.loads((tmp_path / "out" / "eye.json").read_text())
    assert set(described["volumes_ml"].values()) == {None}
    assert "pixel" in described["warnings"][0]


# --- a folder as one job ----------------------------------------------------------------------------------------------


def make_job(folder: Path) -> Path:
    for number in range(3):
        save_nifti(folder / f"scan{number}.nii.gz", number)
    return folder


@pytest.mark.slow
def test_a_job_goes_on_after_a_bad_file(segment: Run, tmp_path: Path) -> None:
    """The bad ones are named at the end with their reason, exit code 2; what is no scan is listed; the rest is done."""
    job = make_job(tmp_path / "job")
    (job / "bad.nii.gz").write_bytes(b"no scan")
    save_series(job / "series")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 2, 2), np.float32), np.eye(4)), job / "two_channels.nii.gz")
    (job / "notes.txt").write_text("x")
    (job / ".scan9.nii.gz").write_text("x")
    (job / "deeper" / "still").mkdir(parents=True)
    code, out, err = segment(job, "-o", job / "out")
    assert code == 2
    assert [line.split(":")[0] for line in err.splitlines()] == ["not segmented"] * 2
    summary = json.loads((job / "out" / "segment.json").read_text())
    done = [Path(result["scan"]).name for result in summary["segmented"]]
    assert done == ["scan0.nii.gz", "scan1.nii.gz", "scan2.nii.gz", "series"]
    assert {Path(one["scan"]).name for one in summary["failed"]} == {"bad.nii.gz", "two_channels.nii.gz"}
    assert all(one["reason"] in err for one in summary["failed"])
    assert [Path(one).name for one in summary["passed_over"]] == ["deeper", "notes.txt"]
    assert (summary["scans"], summary["left"]) == (6, 0)
    assert "6 scans: 4 segmented, 2 failed" in out
    assert "two_channels.json" not in files(job / "out")


def test_what_a_folder_is(tmp_path: Path) -> None:
    """A series, or a job; neither is refused; an index of a medium, hidden files and the output do not count."""
    job, series = make_job(tmp_path / "job"), save_series(tmp_path / "series")
    (series / "report.txt").write_text("x")
    assert find_scans([str(series)], tmp_path / "out") == ([str(series)], [])
    (job / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    save_series(job / "results")
    scans = [str(job / f"scan{number}.nii.gz") for number in range(3)]
    assert find_scans([str(job)], job / "results") == (scans, [str(job / "DICOMDIR")])
    assert find_scans(["a;b", "c.nii"], tmp_path) == (["a;b", "c.nii"], [])
    with pytest.raises(UserError, match="would be taken for scans"):
        find_scans([str(job)], job)
    with pytest.raises(UserError, match="named twice"):
        find_scans([str(job), scans[0]], tmp_path / "out")
    save_nifti(series / "scan.nii.gz")
    with pytest.raises(UserError, match=r"also scan.nii.gz, so it is neither"):
        find_scans([str(series)], tmp_path / "out")
    (tmp_path / "empty" / "x").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no scan"):
        find_scans([str(tmp_path / "empty")], tmp_path / "out")


def test_scans_of_one_name_are_told_apart_by_their_folders(segment: Run, tmp_path: Path) -> None:
    """p1/image and p2/image; a scan called segment leaves the summary alone; what cannot be told apart is refused."""
    scans = [save_nifti(tmp_path / name / "image.nii.gz", seed) for seed, name in enumerate(("p1", "p2"))]
    scans += [save_nifti(tmp_path / "p1" / "segment.nii.gz", 2), save_nifti(tmp_path / "p1" / "other.nii.gz", 3)]
    assert segment(*scans, "-o", tmp_path / "out")[0] == 0
    masks = {name for name in files(tmp_path / "out") if name.endswith("_mask.nii.gz")}
    assert masks == {f"{name}_mask.nii.gz" for name in ("p1_image", "p2_image", "p1_segment", "other")}
    assert json.loads((tmp_path / "out" / "segment.json").read_text())["scans"] == 4
    save_nifti(tmp_path / "p1" / "image.nii")
    result = segment(scans[0], tmp_path / "p1" / "image.nii", "-o", tmp_path / "new")
    refused(result, "would both write p1_image_mask.nii.gz", "nothing was segmented")
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(segment: Run, tmp_path: Path) -> None:
    """Neither a result nor a mask that a person drew; other scans may follow into the same folder."""
    first, second = save_nifti(tmp_path / "a.nii.gz"), save_nifti(tmp_path / "b.nii.gz", 1)
    assert segment(first, "-o", tmp_path)[0] == 0
    assert segment(second, "-o", tmp_path)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    refused(segment(first, "-o", tmp_path), "a_mask.nii.gz: is already there", "--resume")
    refused(segment(first, "-o", first), "a.nii.gz: is a file", "-o")
    drawn, third = tmp_path / "c_mask.nii.gz", save_nifti(tmp_path / "c.nii.gz", 2)
    drawn.write_bytes(b"by hand")
    for resume in ([], ["--resume"]):
        refused(segment(third, "-o", tmp_path, *resume), "c_mask.nii.gz: is already there")
    assert drawn.read_bytes() == b"by hand"
    assert {path: path.read_bytes() for path in before} == before


def test_resume_goes_on_with_the_same_work_alone(segment: Run, tmp_path: Path) -> None:
    """Other settings, or another scan of the same name, are refused; a result that was deleted is made again."""
    scan = save_nifti(tmp_path / "p1" / "a.nii.gz")
    assert segment(scan, "-o", tmp_path / "out")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "segment.json"}
    refused(segment(scan, "-o", tmp_path / "out", "--resume", "--seed", 1), "a.json: is of seed 0, now asked for is 1")
    other = save_nifti(tmp_path / "p2" / "a.nii.gz", 1)
    refused(segment(other, "-o", tmp_path / "out", "--resume"), "a.json: is of scan_sha256")
    (tmp_path / "out" / "a_mask.nii.gz").unlink()
    assert segment(scan, "-o", tmp_path / "out", "--resume")[0] == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    code, out, _ = segment(scan, "-o", tmp_path / "out", "--resume", "--json")
    assert (code, json.loads(out)["skipped"]) == (0, [str(scan)])


@pytest.mark.slow
@pytest.mark.parametrize(("what", "count", "left"), [("preview", 2, 2), ("move", 7, 1)])
def test_a_killed_job_goes_on(model: Path, segment: Run, tmp_path: Path, what: str, count: int, left: int) -> None:
    """Killed in the second scan, at its preview or while its files are moved: what stands is whole, and --resume ends
    with what an unbroken job gives."""
    job, out = make_job(tmp_path / "job"), tmp_path / "out"
    done = start(KILLED, what, count, "segment", model, job, "-o", out, *QUICK)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {path.name for path in out.glob("*.json")} == {"scan0.json", "segment.json"}
    assert json.loads((out / "segment.json").read_text())["left"] == 2
    for path in out.glob("*.nii.gz"):
        assert nib.load(path).get_fdata().shape == (10, 12, 3)
    refused(segment(job, "-o", out), "is already there")
    code, text, _ = segment(job, "-o", out, "--resume")
    assert code == 0
    assert f"3 scans: {left} segmented, {3 - left} finished before" in text
    assert segment(job, "-o", tmp_path / "unbroken")[0] == 0
    assert files(out) == files(tmp_path / "unbroken")
    for path in (tmp_path / "unbroken").iterdir():
        if path.suffix != ".json":
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name
