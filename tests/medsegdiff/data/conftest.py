"""Small datasets on disk, made for the test that asks for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from medsegdiff.data.cases import DatasetConfig

MakeFolder = Callable[..., Path]


@pytest.fixture
def grey_config() -> DatasetConfig:
    """One channel, one label besides the background, mask values 0 and 255."""
    return DatasetConfig(name="made", modality="US", channels=("grey",), labels={"background": 0, "lesion": 255})


@pytest.fixture
def volume_config() -> DatasetConfig:
    """One channel, two labels, mask values 0, 1, 2."""
    return DatasetConfig(name="made", modality="MR", channels=("T1",), labels={"background": 0, "a": 1, "b": 2})


@pytest.fixture
def picture_folder(tmp_path: Path) -> MakeFolder:
    """Call with a number of patients (one grey picture each, rows x columns) to get a folder with cases.csv."""

    def make(patients: int = 5, shape: tuple[int, int] = (20, 30), name: str = "pictures") -> Path:
        root = tmp_path / name
        root.mkdir()
        rows = ["case_id,patient_id,image_path,mask_path,site"]
        for number in range(patients):
            rng = np.random.default_rng(number)
            mask = np.zeros(shape, np.uint8)
            mask[4 : 8 + number % 5, 5:15] = 255
            image = (rng.integers(0, 100, shape) + mask // 2).astype(np.uint8)
            Image.fromarray(image).save(root / f"i{number}.png")
            Image.fromarray(mask).save(root / f"m{number}.png")
            rows.append(f"c{number},p{number},i{number}.png,m{number}.png,north")
        (root / "cases.csv").write_text("\n".join(rows) + "\n")
        return root

    return make


def save_nifti(path: Path, array: NDArray[np.generic], affine: NDArray[np.float64] | None = None) -> Path:
    """Write an array as NIfTI; the affine is 1 mm RAS unless given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine, dtype=array.dtype), path)
    return path


@pytest.fixture
def nifti() -> Callable[..., Path]:
    """`save_nifti`."""
    return save_nifti
