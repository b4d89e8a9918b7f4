"""A folder with cases.csv: one row a case."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from medsegdiff.data.cases import SPLITS, Case
from medsegdiff.errors import UserError

REQUIRED = ("case_id", "patient_id", "image_path", "mask_path")
SEPARATOR = ";"  # between several files of one case


def read_cases_csv(path: Path) -> tuple[Case, ...]:
    """Read cases.csv. Columns beyond the known ones are ignored; paths are relative to the file's folder.

    Raises:
        UserError: not a UTF-8 CSV file, a column missing, or a row without case_id or patient_id or with a split,
            slice_index or spacing_mm that cannot be read; names the row's line.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, strict=True)
            _check_header(path, reader.fieldnames)
            return tuple(_case(path, reader.line_num, row) for row in reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a UTF-8 CSV file ({error}). Save it anew as such.") from error


def _check_header(path: Path, names: object) -> None:
    columns = list(names) if isinstance(names, (list, tuple)) else []
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        found = ", ".join(map(str, columns)) or "no header"
        raise UserError(
            f"{path}: the column(s) {', '.join(missing)} are missing, found {found}; no case can be read. The first "
            f"line must name {', '.join(REQUIRED)}."
        )


def _case(path: Path, line: int, row: dict[str, str]) -> Case:
    where = f"{path}, line {line}"
    image = _text(row, "image_path")
    case_id = _text(row, "case_id")
    if not case_id:
        raise UserError(
            f"{where}: case_id is empty (image {image or 'missing too'}); every case needs one. Fill it in."
        )
    patient_id = _text(row, "patient_id")
    if not patient_id:
        raise UserError(
            f"{where}: case {case_id} (image {image or 'missing'}) has no patient_id; without it one patient could be "
            "trained on and tested on. Fill it in."
        )
    volume_id = _text(row, "volume_id") or None
    return Case(
        case_id=case_id,
        patient_id=patient_id,
        image_paths=_paths(path.parent, image),
        mask_paths=_paths(path.parent, _text(row, "mask_path")),
        site=_text(row, "site") or None,
        split=_split(where, _text(row, "split")),
        volume_id=volume_id,
        slice_index=_slice_index(where, _text(row, "slice_index"), volume_id),
        spacing_mm=_spacing(where, _text(row, "spacing_mm")),
    )


def _text(row: dict[str, str], name: str) -> str:
    """A field without surrounding blanks; "" where the row is short or the column absent."""
    return (row.get(name) or "").strip()


def _paths(root: Path, text: str) -> tuple[Path, ...]:
    return tuple(root / part.strip() for part in text.split(SEPARATOR) if part.strip())


def _split(where: str, text: str) -> str | None:
    if not text:
        return None
    if text.lower() not in SPLITS:
        raise UserError(f"{where}: split {text!r} is none of {', '.join(SPLITS)}. Correct it or leave it empty.")
    return text.lower()


def _slice_index(where: str, text: str, volume_id: str | None) -> int | None:
    if volume_id is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"{where}: slice_index {text!r} of volume {volume_id} is no whole number; the volume could not be stacked. "
            "Give each slice its position."
        ) from None


def _spacing(where: str, text: str) -> tuple[float, ...] | None:
    """Millimetres as `0.5x0.5` (rows, columns) or `0.5x0.5x3`."""
    if not text:
        return None
    try:
        numbers = tuple(float(part) for part in text.lower().split("x"))
    except ValueError:
        numbers = ()
    if len(numbers) not in (2, 3) or not all(math.isfinite(number) and number > 0 for number in numbers):
        raise UserError(
            f"{where}: spacing_mm {text!r} is not of the form 0.5x0.5 or 1x1x3. Correct it or leave it empty."
        )
    return numbers
