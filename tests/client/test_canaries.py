"""Names planted in every folder, file, header, tag and column of a site's data turn up nowhere else.

The word is planted wherever a hospital's data may hold a name. Whatever becomes of the data - read, left out, refused,
a defect of ours - it must not be found in the site's log, its audit log, what it keeps for sending, or the reply.
"""

from __future__ import annotations

import csv
import gzip
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from client import guard as guards
from client.app import app
from client.contract import Assignment, Invitation, TrainTask, arrays_to_wire, to_wire
from client.keys import Membership, SiteKeys
from client.scrub import CRASH, federation_logging
from medsegdiff.data import prepare
from medsegdiff.strict import dump_yaml
from medsegdiff.weights import hash_weights, initial_weights

WORD = "zxqvj"
ROOT = Path(__file__).parents[2]
PATIENTS = 6  # one faulty case of six is left out, two stop the site


def folder_of(site: Path) -> Path:
    return site / f"data-{WORD}"


def files(site: Path, number: int) -> tuple[Path, Path]:
    """Image and mask of a patient."""
    here = folder_of(site) / f"ward_{WORD}" / f"{WORD}^anna_{number}"
    return here / f"{WORD}_scan.nii.gz", here / f"{WORD}_mask.nii.gz"


def write_nifti(path: Path, array: np.ndarray) -> None:
    """A volume whose text fields hold the word."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0]))
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[field] = f"{WORD} {field}"[: image.header[field].dtype.itemsize].encode()
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", f"{WORD} extension".encode()))
    nib.save(image, path)


def build(site: Path, task: TrainTask) -> SiteKeys:
    """A site of the federation with six patients, enrolled, every run allowed."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(PATIENTS):
        image, mask = files(site, number)
        labels = np.zeros((12, 12, 4), np.uint8)
        labels[3:7, 3:7, 1:3] = 1
        write_nifti(image, (random.normal(100, 10, labels.shape) + 60 * labels).astype(np.float32))
        write_nifti(mask, labels)
        rows.append(
            {
                "case_id": f"{WORD}_case_{number}", "patient_id": f"{WORD}_patient_{number}",
                "image_path": image.relative_to(folder_of(site)), "mask_path": mask.relative_to(folder_of(site)),
                "split": "test" if number == 5 else "train", "site": f"{WORD}_hospital", "remark": f"{WORD}, born 1957",
            }
        )  # fmt: skip
    with open(folder_of(site) / "cases.csv", "w", newline="") as handle:
        table = csv.DictWriter(handle, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    (folder_of(site) / "dataset.yaml").write_text(dump_yaml(replace(task.dataset, name=f"{WORD} cohort")))
    policy = {"approval_required": False, "min_patients": 1}
    config = {"name": "alder", "data": folder_of(site).name, "cache": "cache", "keys": "keys", "policy": policy}
    (site / "site.yaml").write_text(dump_yaml(config))
    keys = SiteKeys.create(site / "keys")
    keys.install(Membership("federation", "alder", "fed.example.org:8443"), b"", b"")
    return keys


def stamp(kind: str) -> Message:
    """What the server asks, but for its content."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(RecordDict(), 1000, kind)
    message.metadata.__dict__["_message_id"] = "m-1"
    return message


def ask(kind: str, task: TrainTask) -> Message:
    message = stamp(kind)
    message.content["task"] = to_wire(task)
    if kind == MessageType.QUERY:
        message.content["invitation"] = to_wire(Invitation("run-1", "n"))
    else:
        weights = initial_weights(task.model, task.seed)
        message.content["assignment"] = to_wire(Assignment("run-1", 1, hash_weights(weights)))
        message.content["weights"] = arrays_to_wire(weights)
    return app(message, Context(1, 1000, {}, RecordDict(), {}))


def sent(reply: Message) -> bytes:
    """All bytes of a reply."""
    if reply.has_error():
        return f"{reply.error.code} {reply.error.reason}".encode()
    parts = [repr(reply.metadata).encode()]
    for name, record in reply.content.items():
        parts.append(name.encode())
        for key, value in record.items():
            parts += [key.encode(), value.data if hasattr(value, "data") else repr(value).encode()]
    return b"\n".join(parts)


def kept(site: Path) -> dict[str, bytes]:
    """Everything at the site but its data, its cache and its configuration."""
    own = (folder_of(site), site / "cache", site / "keys")
    return {
        str(path.relative_to(site)): path.read_bytes()
        for path in site.rglob("*")
        if path.is_file() and path.name != "site.yaml" and not any(path.is_relative_to(folder) for folder in own)
    }


def clean(site: Path, *replies: Message) -> str:
    """Nothing that is kept or sent holds the word. Returns the log."""
    for name, data in kept(site).items():
        assert WORD.encode() not in data.lower(), name
        assert WORD not in name.lower()
    for reply in replies:
        assert WORD.encode() not in sent(reply).lower()
    return (site / "state" / "logs" / "site.log").read_text()


@pytest.fixture
def site(tmp_path: Path, tiny_task: TrainTask, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An enrolled site whose runner logs as in a federation."""
    folder = tmp_path / "site"
    folder.mkdir()
    keys = build(folder, tiny_task)
    monkeypatch.setenv("MEDSEGFED_SITE", str(folder / "site.yaml"))
    log = federation_logging(folder, keys, keep_streams=True)
    yield folder
    log.close()
    guards._guard.cache_clear()


# --- what may be wrong with data --------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    write_nifti(path, change(np.asanyarray(nib.load(path).dataobj).copy()))


def holes(array: np.ndarray) -> np.ndarray:
    array[2, 2, 1] = np.nan
    return array


def dicom(path: Path) -> None:
    """A DICOM file in the place of the image, with the word in its tags, values that are none and too few pixels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    tags = pydicom.Dataset()
    tags.file_meta = meta
    tags.SOPClassUID, tags.SOPInstanceUID, tags.Modality = CTImageStorage, meta.MediaStorageSOPInstanceUID, "CT"
    tags.PatientName, tags.PatientID, tags.PatientBirthDate = f"{WORD}^Anna", f"{WORD}-1957", "19570304"
    tags.SeriesDescription, tags.InstitutionName = f"{WORD} head", f"{WORD} hospital"
    tags.Rows = tags.Columns = 12
    tags.BitsAllocated, tags.BitsStored, tags.HighBit, tags.PixelRepresentation = 16, 16, 15, 0
    tags.SamplesPerPixel, tags.PhotometricInterpretation = 1, "MONOCHROME2"
    tags.PixelData = b"\0" * 100
    path.unlink()
    path.mkdir()
    tags.save_as(path / f"{WORD}.dcm", enforce_file_format=True)
    raw = (path / f"{WORD}.dcm").read_bytes()
    (path / f"{WORD}.dcm").write_bytes(raw.replace(b"19570304", b"zxqvjdat"))


FAULTS: dict[str, Callable[[Path, Path], object]] = {
    "a missing image": lambda image, mask: image.unlink(),
    "a missing mask": lambda image, mask: mask.unlink(),
    "a truncated image": lambda image, mask: cut(image),
    "an image that is text": lambda image, mask: image.write_bytes(gzip.compress(f"{WORD} is text".encode() * 99)),
    "an image that is no gzip": lambda image, mask: image.write_bytes(f"{WORD}".encode() * 999),
    "a wrong label": lambda image, mask: rewrite(mask, lambda array: array * 7),
    "voxels that are NaN": lambda image, mask: rewrite(image, holes),
    "sizes that differ": lambda image, mask: rewrite(mask, lambda array: array[:-1]),
    "a broken DICOM series": lambda image, mask: dicom(image),
    "a folder of other things": lambda image, mask: (image.unlink(), image.mkdir(), (image / WORD).write_text(WORD)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_case_that_is_left_out_is_named_by_its_hash(site: Path, tiny_task, fault: str) -> None:
    """The site goes on with five patients; its log says which case, by the site's own hash of its name."""
    FAULTS[fault](*files(site, 2))
    reply = ask(MessageType.QUERY, tiny_task)
    log = clean(site, reply)
    assert not reply.has_error()
    assert "introduced" in (site / "audit.jsonl").read_text()
    assert f"alder: case #{SiteKeys.load(site / 'keys').case_hash(f'{WORD}_case_2')} is left out" in log


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_too_many_faults_stop_the_site_without_a_name(site: Path, tiny_task, fault: str) -> None:
    """The error would name three cases and files; the server hears a fixed sentence, the log class and line."""
    for number in range(3):
        FAULTS[fault](*files(site, number))
    replies = [ask(kind, tiny_task) for kind in (MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE)]
    log = clean(site, *replies)
    assert all(reply.error.reason.startswith("fault: ") for reply in replies)
    assert log.count("medsegdiff.errors.UserError at client/app.py:") == 3
    assert "medsegdiff/data/prepare.py:" in log
    assert "medsegfed doctor" in log


def edit_table(site: Path, old: str, new: str) -> None:
    path = folder_of(site) / "cases.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


TABLES: dict[str, Callable[[Path], object]] = {
    "a patient without id": lambda site: edit_table(site, f"{WORD}_patient_3", ""),
    "a case twice": lambda site: edit_table(site, f"{WORD}_case_3", f"{WORD}_case_2"),
    "a split that is none": lambda site: edit_table(site, ",test,", f",{WORD},"),
    "a patient in two splits": lambda site: edit_table(site, f"{WORD}_patient_5", f"{WORD}_patient_4"),
    "a missing column": lambda site: edit_table(site, "image_path", f"{WORD}_path"),
    "no table": lambda site: (folder_of(site) / "cases.csv").unlink(),
    "other letters": lambda site: (folder_of(site) / "cases.csv").write_bytes(f"{WORD}\xe4,".encode("latin-1")),
    "other labels": lambda site: (folder_of(site) / "dataset.yaml").write_text(
        f"{{name: x, modality: x, channels: [scan], labels: {{background: 0, {WORD}: 1}}}}"
    ),
    "a broken dataset.yaml": lambda site: (folder_of(site) / "dataset.yaml").write_text(f"{WORD}: [\n"),
    "no folder": lambda site: shutil.rmtree(folder_of(site)),
}


@pytest.mark.parametrize("fault", TABLES)
def test_a_table_that_cannot_be_used_is_not_quoted(site: Path, tiny_task, fault: str) -> None:
    """Errors that quote rows, names of columns and labels."""
    TABLES[fault](site)
    replies = [ask(kind, tiny_task) for kind in (MessageType.QUERY, MessageType.TRAIN)]
    log = clean(site, *replies)
    assert all(reply.has_error() for reply in replies)
    assert log.count("UserError") == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", [RuntimeError, OSError, KeyError, MemoryError])
def test_a_defect_of_ours_is_not_quoted(site: Path, tiny_task, monkeypatch, kind) -> None:
    """An exception that nobody foresaw, whose text holds the file: class and line, no traceback's text."""

    def broken(paths: tuple[Path, ...], *args: object) -> None:
        try:
            raise ValueError(str(paths[0]))
        except ValueError:
            raise kind(f"{paths[0]} {WORD}")  # noqa: B904  # as code that does not think of it does

    monkeypatch.setattr(prepare, "read_image", broken)
    replies = [ask(MessageType.QUERY, tiny_task), ask(MessageType.TRAIN, tiny_task)]
    log = clean(site, *replies)
    assert all(reply.error.reason.startswith("fault: ") for reply in replies)
    assert f"unexpected fault while answering the server: {kind.__name__} (from ValueError) at client/app.py" in log


@pytest.mark.slow
def test_a_sound_round_leaves_nothing_either(site: Path, tiny_task) -> None:
    """Introduced, trained, scored: reply, outbox and audit log hold counts and hashes alone."""
    replies = [ask(kind, tiny_task) for kind in (MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE)]
    assert not any(reply.has_error() for reply in replies)
    clean(site, *replies)
    audit = (site / "audit.jsonl").read_text()
    assert [event in audit for event in ("introduced", "update", "scores")] == [True, True, True]


def test_the_word_is_there_to_be_found(tmp_path: Path, tiny_task, monkeypatch, caplog) -> None:
    """Without the federation's log the same fault names case and file: the tests above could fail."""
    (tmp_path / "site").mkdir()
    build(tmp_path / "site", tiny_task)
    monkeypatch.setenv("MEDSEGFED_SITE", str(tmp_path / "site" / "site.yaml"))
    cut(files(tmp_path / "site", 2)[0])
    with caplog.at_level(logging.INFO):
        ask(MessageType.QUERY, tiny_task)
    guards._guard.cache_clear()
    assert f"alder: case {WORD}_case_2 is left out: " in caplog.text
    assert f"{WORD}_scan.nii.gz" in caplog.text


# --- a real process ---------------------------------------------------------------------------------------------------

PROCESS = """
import faulthandler, logging, os, resource, sys, threading, warnings
from pathlib import Path
from client.keys import SiteKeys
from client.scrub import federation_logging
site, word, end = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
print("started", flush=True)
federation_logging(site, SiteKeys.load(site / "keys"))
print(word)
os.write(2, f"libtiff: {word}.tif: warning\\n".encode())
warnings.warn(f"pydicom: {word}")
logging.getLogger("nibabel").error("%s", word)
logging.lastResort.handle(logging.makeLogRecord({"msg": word}))
import PIL.Image, nibabel, pydicom
for read in (lambda p: nibabel.load(p).get_fdata(), lambda p: PIL.Image.open(p), lambda p: pydicom.dcmread(p)):
    for path in sorted(site.glob("data*/*/*/*")):
        try:
            read(path)
        except Exception as error:
            logging.getLogger("medsegfed.site").exception("a file")
thread = threading.Thread(target=lambda: open(f"/{word}/x"), name=word)
thread.start()
thread.join()
assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
def deep(patient):
    if end == "raise":
        raise RuntimeError(f"could not read {patient}")
    if end == "exit":
        sys.exit(f"could not read {patient}")
    os.abort()
deep(word)
"""


@pytest.mark.e2e
@pytest.mark.parametrize(("end", "code"), [("raise", 1), ("exit", 1), ("abort", -6)])
def test_a_process_that_ends_badly_leaves_no_name(tmp_path: Path, tiny_task, end: str, code: int) -> None:
    """Prints, warnings of C libraries, threads, an uncaught exception, an exit with a text, a crash: lines of code."""
    site = tmp_path / "site"
    site.mkdir()
    build(site, tiny_task)
    cut(files(site, 1)[0])
    dicom(files(site, 2)[0])
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(site), WORD, end],
        cwd=work, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (code, b"started\n", b"")
    for name, data in kept(site).items():
        assert WORD.encode() not in data.lower(), name
    assert list(work.iterdir()) == [], "no core file"
    log = (site / "state" / "logs" / "site.log").read_text()
    assert "a UserWarning at" in log
    assert "a thread ends: FileNotFoundError at" in log
    assert ("the process ends: RuntimeError at" in log) == (end == "raise")
    crash = (site / CRASH).read_text()
    assert ("Fatal Python error: Aborted" in crash and " in deep" in crash) == (end == "abort")
