"""A folder of images and masks, whichever of three forms it has.

Read are: a folder with cases.csv, an nnU-Net raw folder, a Medical Segmentation Decathlon folder. Which one it is
follows from what lies in it, never from its name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medsegdiff.data.cases import Case, Dataset, DatasetConfig, check_cases
from medsegdiff.data.decathlon import decathlon_cases, decathlon_config
from medsegdiff.data.folder import read_cases_csv
from medsegdiff.data.nnunet import nnunet_cases, nnunet_config
from medsegdiff.errors import UserError
from medsegdiff.strict import read_config

__all__ = ["Case", "Dataset", "DatasetConfig", "open_dataset"]

MAX_JSON_BYTES = 100_000_000  # a Decathlon dataset.json lists every case; ten thousand of them take about one megabyte


def open_dataset(folder: Path, config: Path | DatasetConfig | None = None) -> Dataset:
    """Read what a folder holds; no image is opened.

    The configuration is the folder's own dataset.yaml; else `config`; else, for nnU-Net and Decathlon folders, what
    their dataset.json says. In the last two forms a case is taken for a patient.

    Raises:
        UserError: no such folder, none of the three forms, no configuration, or cases that contradict one another.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder}: is a file; a dataset is a folder. Give the folder that it lies in.")
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder, so no dataset could be read. Check the path.")
    own = folder / "dataset.yaml"
    given = read_config(own, DatasetConfig) if own.is_file() else _given(config)
    table = folder / "cases.csv"
    if table.is_file():
        if given is None:
            raise UserError(
                f"{folder}: has cases.csv but no dataset.yaml, so its labels and channels are unknown. Add a "
                "dataset.yaml, or name one with --dataset-config."
            )
        source, cases = table, read_cases_csv(table)
    else:
        source, given, cases = _read_described(folder, given)
    check_cases(cases, source)
    return Dataset(folder, given, cases)


def _given(config: Path | DatasetConfig | None) -> DatasetConfig | None:
    return read_config(config, DatasetConfig) if isinstance(config, Path) else config


def _read_described(folder: Path, given: DatasetConfig | None) -> tuple[Path, DatasetConfig, tuple[Case, ...]]:
    """An nnU-Net or Decathlon folder: both carry a dataset.json, told apart by its keys."""
    path = folder / "dataset.json"
    description = _read_json(path) if path.is_file() else {}
    if "channel_names" in description:
        return path, given or nnunet_config(path, description), nnunet_cases(path, description)
    if "training" in description and "modality" in description:
        return path, given or decathlon_config(path, description), decathlon_cases(path, description)
    raise UserError(
        f"{folder}: holds neither cases.csv nor a dataset.json of nnU-Net (key channel_names) or of the Decathlon "
        "(keys training and modality), so it is no dataset that can be read. Check the path, or write a cases.csv."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes are no dataset.json (limit {MAX_JSON_BYTES:,}).")
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}). Mend it or write a cases.csv.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found a {type(data).__name__}.")
    return data
