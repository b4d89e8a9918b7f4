"""A Medical Segmentation Decathlon folder: dataset.json lists image and label of each training case."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from medsegdiff.data.cases import Case, DatasetConfig
from medsegdiff.errors import UserError
from medsegdiff.strict import parse_config


def decathlon_config(path: Path, description: dict[str, Any]) -> DatasetConfig:
    """Channels and labels as dataset.json declares them: both are mappings from a number written as a string.

    Raises:
        UserError: a key is missing or of the wrong form.
    """
    modality, labels = description.get("modality"), description.get("labels")
    if not isinstance(modality, dict) or not isinstance(labels, dict):
        raise UserError(f"{path}: modality and labels must be mappings, as in the Decathlon. Mend the file.")
    values: dict[str, int] = {}
    for value, name in labels.items():
        if not str(value).isdecimal():
            raise UserError(f"{path}: labels: {value!r} is no voxel value. Labels map a value to a name, as 1: liver.")
        # The first value is the background whatever its capitals ("Background" in some tasks).
        values["background" if str(name).lower() == "background" else str(name)] = int(value)
    data = {
        "name": str(description.get("name") or path.parent.name),
        "modality": ", ".join(str(name) for name in modality.values()),
        "channels": [str(name) for name in modality.values()],
        "labels": values,
    }
    return parse_config(data, DatasetConfig, source=str(path))


def decathlon_cases(path: Path, description: dict[str, Any]) -> tuple[Case, ...]:
    """The cases of the training list; the image's name without its ending is the patient."""
    listed = description["training"]
    if not isinstance(listed, list):
        raise UserError(f"{path}: training must be a list of image and label, found a {type(listed).__name__}.")
    return tuple(_case(path, number, entry) for number, entry in enumerate(listed))


def _case(path: Path, number: int, entry: Any) -> Case:
    image, label = (entry.get("image"), entry.get("label")) if isinstance(entry, dict) else (None, None)
    if not isinstance(image, str) or not (label is None or isinstance(label, str)):
        raise UserError(f"{path}: training entry {number} is not of the form image: FILE, label: FILE. Mend it.")
    identifier = PurePosixPath(image).name.removesuffix(".gz").removesuffix(".nii")
    masks = (path.parent / label,) if label else ()
    return Case(case_id=identifier, patient_id=identifier, image_paths=(path.parent / image,), mask_paths=masks)
