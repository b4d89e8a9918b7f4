"""An nnU-Net v2 raw folder: dataset.json, imagesTr/CASE_0000.ext, labelsTr/CASE.ext."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from medsegdiff.data.cases import BACKGROUND, Case, DatasetConfig
from medsegdiff.errors import UserError
from medsegdiff.strict import parse_config

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


def nnunet_config(path: Path, description: dict[str, Any]) -> DatasetConfig:
    """Channels, labels and region targets as dataset.json declares them.

    Where a label is a list of values (a region), labels are named after their values and the regions become targets.

    Raises:
        UserError: a key is missing or of the wrong form, or labels hold "ignore" (partly annotated masks are not read).
    """
    names, labels = description.get("channel_names"), description.get("labels")
    if not isinstance(names, dict) or not isinstance(labels, dict):
        raise UserError(f"{path}: channel_names and labels must be mappings, as in nnU-Net v2. Mend the file.")
    if "ignore" in labels:
        raise UserError(
            f"{path}: labels hold 'ignore'; partly annotated masks are not supported, and unknown voxels would be "
            "taught as background. Complete the masks, or write a dataset.yaml that maps that value to a label."
        )
    data: dict[str, Any] = {
        "name": str(description.get("name") or path.parent.name),
        "modality": ", ".join(str(name) for name in names.values()),
        "channels": [
            f"{index}" if list(names.values()).count(name) > 1 else str(name) for index, name in names.items()
        ],
    }
    return parse_config(data | _labels(labels), DatasetConfig, source=str(path))


def _labels(labels: dict[str, Any]) -> dict[str, Any]:
    regions = {name: value for name, value in labels.items() if name != BACKGROUND}
    if not any(isinstance(value, list) for value in regions.values()):
        return {"labels": labels}
    members = {name: value if isinstance(value, list) else [value] for name, value in regions.items()}
    values = sorted({value for found in members.values() for value in found}, key=str)
    return {
        "labels": {BACKGROUND: labels.get(BACKGROUND, 0)} | {f"value {value}": value for value in values},
        "targets": {name: [f"value {value}" for value in found] for name, found in members.items()},
    }


def nnunet_cases(path: Path, description: dict[str, Any]) -> tuple[Case, ...]:
    """Every case of imagesTr and labelsTr; the identifier before _0000 is the patient."""
    ending = description.get("file_ending")
    if not isinstance(ending, str) or not ending.startswith("."):
        raise UserError(f"{path}: file_ending must be given, such as .nii.gz; found {ending!r}. Mend the file.")
    images: dict[str, dict[int, Path]] = {}
    for file in _files(path.parent / "imagesTr", ending):
        match = _CHANNEL.fullmatch(file.name.removesuffix(ending))
        if match is None:
            raise UserError(f"{file}: the name does not end in _0000{ending} as nnU-Net's images do. Rename it.")
        images.setdefault(match["case"], {})[int(match["channel"])] = file
    masks = {file.name.removesuffix(ending): file for file in _files(path.parent / "labelsTr", ending)}
    return tuple(
        Case(
            case_id=case_id,
            patient_id=case_id,
            image_paths=_in_order(path.parent, case_id, images.get(case_id, {}), ending),
            mask_paths=(masks[case_id],) if case_id in masks else (),
        )
        for case_id in sorted(images.keys() | masks.keys())
    )


def _in_order(root: Path, case_id: str, channels: dict[int, Path], ending: str) -> tuple[Path, ...]:
    """Files by channel number; a gap is named as the file that should be there, so that reading reports it."""
    last = max(channels, default=0)
    return tuple(channels.get(i, root / "imagesTr" / f"{case_id}_{i:04d}{ending}") for i in range(last + 1))


def _files(folder: Path, ending: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder, but dataset.json announces nnU-Net data. Check the copy.")
    return sorted(file for file in folder.iterdir() if file.name.endswith(ending) and not file.name.startswith("."))
