"""What `medsegfed evaluate -o` writes: scores.json, scores.csv, and pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medsegdiff.files import write_atomic

# A column of scores.csv, and where its figure stands in a patient's entry of scores.json: name, then target, then key.
COLUMNS: dict[str, tuple[str, str | None]] = {
    "dice": ("dice", None),
    "iou": ("iou", None),
    "hd95_mm": ("hd95_mm", None),
    "hd95_undefined": ("hd95_undefined", None),
    "assd_mm": ("assd_mm", None),
    "surface_dice": ("surface_dice", None),
    "volume_unit": ("volume", "unit"),
    "volume_true": ("volume", "true"),
    "volume_predicted": ("volume", "predicted"),
    "volume_error": ("volume", "error"),
    "volume_error_relative": ("volume", "relative"),
    "volume_low": ("sizes", "low"),
    "volume_high": ("sizes", "high"),
    "volume_covered": ("sizes", "covered"),
    "rated_cases": ("raters", "cases"),
    "ged_squared": ("raters", "ged_squared"),
    "hm_iou": ("raters", "hm_iou"),
}


def write_scores(folder: Path, result: Mapping[str, Any], pictures: Mapping[str, bytes]) -> None:
    """Write an evaluation's result, as `evaluate_folder` returns it, and its pictures into a folder."""
    text = json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomic(folder / "scores.json", text.encode())
    write_atomic(folder / "scores.csv", scores_csv(result).encode())
    for name, data in pictures.items():
        write_atomic(folder / name, data)


def scores_csv(result: Mapping[str, Any]) -> str:
    """One row a patient and target; an undefined figure is an empty cell."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["patient_id", "site", "target", "volumes", *COLUMNS])
    for patient in result["patients"]:
        for target in patient["dice"]:
            figures = [_figure(patient, target, *place) for place in COLUMNS.values()]
            writer.writerow([patient["patient_id"], patient["site"], target, patient["volumes"], *figures])
    return buffer.getvalue()


def _figure(patient: Mapping[str, Any], target: str, name: str, key: str | None) -> Any:
    """None, which csv writes as nothing, where a figure is undefined or does not apply."""
    found = (patient[name] or {}).get(target)
    return found if key is None or found is None else found[key]
