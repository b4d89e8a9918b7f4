"""Hospitals whose every name is a canary: patients, cases, files, folders, and the texts inside the files.

A canary is a word that stands nowhere else. Whatever it is found in after a run knows a name that it must not know.
"""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import nibabel as nib

from simulations.phantoms import PhantomConfig, write_phantoms

PATIENT, CASE, FILE, FOLDER, TEXT = "Quillfeather", "Brontosaurus", "Marmaduke", "Thistledown", "Periwinkle"
CANARIES = (PATIENT, CASE, FILE, FOLDER, TEXT)


def write_canaries(config: PhantomConfig, folder: Path) -> None:
    """A dataset of phantoms under canary names, with canary texts in every header that takes some."""
    write_phantoms(config, folder)
    table = folder / "cases.csv"
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    for number, row in enumerate(rows, 1):
        for kind in ("image", "mask"):
            old = folder / row[f"{kind}_path"]
            new = Path(FOLDER) / f"{PATIENT}-{number:03d}" / f"{FILE}-{kind}-{number:03d}.nii.gz"
            (folder / new).parent.mkdir(parents=True, exist_ok=True)
            (folder / new).write_bytes(_with_texts(old.read_bytes()))
            old.unlink()
            row[f"{kind}_path"] = new.as_posix()
        row["case_id"], row["patient_id"] = f"{CASE}-{number:03d}", f"{PATIENT}-{number:03d}"
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    table.write_text(text.getvalue())


def _with_texts(file: bytes) -> bytes:
    image = nib.Nifti1Image.from_bytes(gzip.decompress(file))
    header = image.header
    header["descrip"] = f"{TEXT} {PATIENT}".encode()
    header["intent_name"], header["db_name"], header["aux_file"] = TEXT.encode(), PATIENT.encode(), FILE.encode()
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", f"{TEXT}, born 1 April".encode()))
    return gzip.compress(image.to_bytes(), mtime=0)


def add_broken_cases(site: Path, count: int = 1) -> None:
    """More training patients of a site, whose images end in the middle."""
    table = site / "data" / "cases.csv"
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    sound = next(row for row in rows if row["split"] == "train")
    for number in range(1, count + 1):
        image = Path(FOLDER) / f"{FILE}-broken-{number}.nii.gz"
        (site / "data" / image).write_bytes((site / "data" / sound["image_path"]).read_bytes()[:2000])
        rows.append(
            sound
            | {
                "case_id": f"{CASE}-broken-{number}",
                "patient_id": f"{PATIENT}-broken-{number}",
                "image_path": str(image),
            }
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    table.write_text(text.getvalue())


def traces(*places: Path, leave_out: tuple[str, ...] = ()) -> list[str]:
    """Where a canary is found in the files of some folders: in a file's name or in its bytes, in capitals or not.

    Args:
        leave_out: names of folders directly below a place.
    """
    words = [word.lower().encode() for word in CANARIES]
    found = []
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            parts = path.relative_to(place).parts
            if parts and parts[0] in leave_out:
                continue
            name = "/".join(parts).lower().encode()
            if any(word in name for word in words):
                found.append(f"{path}: its name")
            if path.is_file() and any(word in path.read_bytes().lower() for word in words):
                found.append(f"{path}: its bytes")
    return found
