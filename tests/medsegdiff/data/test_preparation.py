"""Files become tensors once; faults are collected; a cache is never trusted blindly."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

import medsegdiff.data.prepare as preparation
from medsegdiff.data.cases import Case, Dataset, DatasetConfig
from medsegdiff.data.dataset import open_dataset
from medsegdiff.data.images import Volume, read_image
from medsegdiff.data.normalise import normalise
from medsegdiff.data.prepare import prepare, prepare_image
from medsegdiff.errors import UserError
from medsegdiff.labels import LabelScheme
from medsegdiff.progress import Progress, listening

Make = Callable[..., Path]


def test_a_prepared_case_offers_what_its_files_hold(
    picture_folder: Make, grey_config: DatasetConfig, tmp_path: Path
) -> None:
    """Images, labels, native labels and foreground agree with the files and with one another."""
    root = picture_folder(3)
    prepared = prepare(open_dataset(root, grey_config), 16, tmp_path / "cache")
    assert not prepared.faults
    assert [case.case.case_id for case in prepared.cases] == ["c0", "c1", "c2"]
    for number, case in enumerate(prepared.cases):
        assert case.images().shape == (1, 1, 16, 16)
        assert case.images().dtype == torch.float32
        assert torch.equal(case.image(0), case.images()[0])
        assert case.labels(0).shape == (16, 16)
        assert case.labels(0).dtype == torch.uint8
        stored = np.asarray(Image.open(root / f"m{number}.png")) == 255
        assert torch.equal(case.native_labels()[0, :, :, 0], torch.from_numpy(stored.astype(np.uint8)))
        assert case.foreground(LabelScheme.of(grey_config)) == (0,)
        assert (case.slices, case.raters, case.channels, case.image_size) == (1, 1, 1, 16)
        assert case.spacing_mm is None


def test_a_new_scan_is_prepared_as_training_was(
    picture_folder: Make, grey_config: DatasetConfig, tmp_path: Path
) -> None:
    """`prepare_image` on a file gives what the cache holds, up to float16."""
    root = picture_folder(1)
    case = prepare(open_dataset(root, grey_config), 16, tmp_path / "cache").cases[0]
    volume = read_image([root / "i0.png"], 1)
    assert torch.equal(prepare_image(volume, 16, grey_config).half().float(), case.images())


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a file was read although the cache holds the case")

    monkeypatch.setattr(preparation, "read_image", fail)


def test_a_second_run_reads_the_cache_alone(
    picture_folder: Make, grey_config: DatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither other targets nor other names need a case to be prepared again."""
    dataset = open_dataset(picture_folder(2), grey_config)
    first = prepare(dataset, 16, tmp_path / "cache")
    forbid_reading(monkeypatch)
    again = prepare(dataset, 16, tmp_path / "cache")
    assert again == first
    renamed = dataclasses.replace(grey_config, targets={"all": ("lesion",)}, name="other")
    assert prepare(dataclasses.replace(dataset, config=renamed), 16, tmp_path / "cache").cases == first.cases


@pytest.mark.parametrize("change", ["size", "image", "mask", "labels", "spacing"])
def test_whatever_changes_the_result_makes_a_new_entry(
    picture_folder: Make, grey_config: DatasetConfig, tmp_path: Path, change: str
) -> None:
    """Image size, either file's bytes, label values and spacing all enter the key."""
    root = picture_folder(1)
    dataset = open_dataset(root, grey_config)
    before = prepare(dataset, 16, tmp_path / "cache").cases[0].path
    size = 16
    if change == "size":
        size = 24
    elif change in ("image", "mask"):
        path = root / f"{change[0]}0.png"
        pixels = np.asarray(Image.open(path)).copy()
        pixels[0, 0] = 255
        Image.fromarray(pixels).save(path)
    elif change == "labels":
        config = dataclasses.replace(grey_config, labels={"background": (0, 9), "lesion": 255})
        dataset = dataclasses.replace(dataset, config=config)
    else:
        case = dataclasses.replace(dataset.cases[0], spacing_mm=(1.0, 2.0))
        dataset = dataclasses.replace(dataset, cases=(case,))
    assert prepare(dataset, size, tmp_path / "cache").cases[0].path != before


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "renamed", "garbage"])
def test_a_damaged_cache_file_is_made_anew(
    picture_folder: Make, grey_config: DatasetConfig, tmp_path: Path, damage: str
) -> None:
    """A torn, edited or swapped file is noticed by its hash and replaced by what the images give."""
    dataset = open_dataset(picture_folder(2), grey_config)
    first = prepare(dataset, 16, tmp_path / "cache").cases[0]
    good = first.path.read_bytes()
    if damage == "renamed":
        damaged = good.replace(b"sha256", b"sha257")
    elif damage == "flipped":
        damaged = good[:-1] + bytes([good[-1] ^ 1])
    else:
        damaged = {"torn": good[: len(good) // 2], "empty": b"", "garbage": b"\xff" * 500}[damage]
    first.path.write_bytes(damaged)
    again = prepare(dataset, 16, tmp_path / "cache").cases[0]
    assert again == first
    assert first.path.read_bytes() == good


def test_faulty_cases_are_collected_and_the_others_go_on(
    picture_folder: Make, grey_config: DatasetConfig, tmp_path: Path
) -> None:
    """Up to 20 % of the cases may be faulty; each fault names case, file and reason."""
    root = picture_folder(10)
    (root / "i3.png").unlink()
    Image.fromarray(np.full((20, 30), 7, np.uint8)).save(root / "m6.png")
    prepared = prepare(open_dataset(root, grey_config), 16, tmp_path / "cache")
    assert [case.case.case_id for case in prepared.cases] == ["c0", "c1", "c2", "c4", "c5", "c7", "c8", "c9"]
    missing, unknown = prepared.faults
    assert (missing.case_id, missing.file) == ("c3", str(root / "i3.png"))
    assert "no such file" in missing.reason
    assert (unknown.case_id, unknown.file) == ("c6", str(root / "m6.png"))
    assert "600 voxels hold 7" in unknown.reason


def test_too_many_faults_end_it(picture_folder: Make, grey_config: DatasetConfig, tmp_path: Path) -> None:
    """More than a fifth: one line with the numbers and the first few faults."""
    root = picture_folder(10)
    for number in (1, 4, 7):
        (root / f"m{number}.png").unlink()
    with pytest.raises(UserError, match=r"3 of 10 cases.*20%.*c1.*m1\.png.*c4.*c7"):
        prepare(open_dataset(root, grey_config), 16, tmp_path / "cache")


def test_images_without_masks_and_masks_without_images(
    picture_folder: Make, grey_config: DatasetConfig, tmp_path: Path
) -> None:
    """An empty field in cases.csv is a fault of that case."""
    root = picture_folder(8)
    table = (root / "cases.csv").read_text() + "x,px,i0.png,,north\ny,py,,m0.png,north\n"
    (root / "cases.csv").write_text(table)
    faults = prepare(open_dataset(root, grey_config), 16, tmp_path / "cache").faults
    assert [(fault.case_id, fault.reason) for fault in faults] == [
        ("x", "the image has no mask"),
        ("y", "the mask has no image"),
    ]


def test_a_volume_cannot_be_a_slice_of_a_volume(
    nifti: Callable[..., Path], volume_config: DatasetConfig, tmp_path: Path
) -> None:
    """A file with several slices that carries a volume_id is a fault."""
    image = nifti(tmp_path / "i.nii", np.ones((4, 4, 4), np.float32))
    mask = nifti(tmp_path / "m.nii", np.ones((4, 4, 4), np.uint8))
    case = Case("c", "p", (image,), (mask,), volume_id="v", slice_index=0)
    with pytest.raises(UserError, match="volume_id"):
        prepare(Dataset(tmp_path, volume_config, (case,)), 16, tmp_path / "cache")


def test_volumes_and_raters(nifti: Callable[..., Path], volume_config: DatasetConfig, tmp_path: Path) -> None:
    """Slices follow the configured axis, raters keep their own labels, and foreground counts any rater's."""
    one, two = np.zeros((6, 5, 4), np.uint8), np.zeros((6, 5, 4), np.uint8)
    one[1:5, 2, 1:4], two[1:5, 3, 1:4] = 1, 2
    image = nifti(tmp_path / "i.nii", np.random.default_rng(0).random((6, 5, 4)).astype(np.float32))
    masks = (nifti(tmp_path / "a.nii", one), nifti(tmp_path / "b.nii", two))
    config = dataclasses.replace(volume_config, slice_axis=1)
    dataset = Dataset(tmp_path, config, (Case("c", "p", (image,), masks),))
    (case,) = prepare(dataset, 12, tmp_path / "cache").cases
    assert case.images().shape == (5, 1, 12, 12)
    assert case.native_labels().tolist() == [one.tolist(), two.tolist()]
    assert case.present == ((), (), (1,), (2,), ())
    assert case.foreground(LabelScheme.of(config)) == (2, 3)
    assert case.foreground(LabelScheme.of(dataclasses.replace(config, targets={"b": ("b",)}))) == (3,)
    assert set(case.labels(3, rater=0).unique().tolist()) == {0}
    assert set(case.labels(3, rater=1).unique().tolist()) == {0, 2}
    image_again, labels_again = case.pair(3, 1)
    assert torch.equal(image_again.float(), case.image(3))
    assert torch.equal(labels_again, case.labels(3, 1))


def test_progress_is_reported(picture_folder: Make, grey_config: DatasetConfig, tmp_path: Path) -> None:
    """The listener hears every case and the end."""
    heard: list[Progress] = []
    with listening(heard.append):
        prepare(open_dataset(picture_folder(2), grey_config), 16, tmp_path / "cache")
    assert heard == [Progress("prepare", done, 2) for done in range(3)]


FLOATS = hnp.arrays(np.float32, (2, 4, 5, 3), elements=st.floats(-(2.0**100), 2.0**100, width=32))


@given(FLOATS)
def test_normalised_values_are_finite_and_bounded(array: NDArray[np.float32]) -> None:
    """Whatever finite voxels come in, what goes out lies in [-5, 5] and the input is untouched."""
    before = array.copy()
    out = normalise(array)
    assert out.dtype == np.float32
    assert np.isfinite(out).all()
    assert np.abs(out).max() <= 5
    assert np.array_equal(array, before)


@given(st.floats(1e-3, 1e4), st.floats(-1e3, 1e3), st.integers(0, 99))
def test_gain_and_offset_of_a_scanner_vanish(gain: float, offset: float, seed: int) -> None:
    """An image in other units is normalised to the same values."""
    array = np.random.default_rng(seed).gamma(2, 1, (1, 8, 8, 8)).astype(np.float32)
    other = (array.astype(np.float64) * gain + offset).astype(np.float32)
    tolerance = 2e-3 + 1e-6 * abs(offset) / gain
    assert np.allclose(normalise(array), normalise(other), atol=tolerance)


def test_air_is_left_out_of_the_statistics() -> None:
    """Tissue has mean 0 and deviation 1 whatever the amount of air around it; hot voxels do not set the scale."""
    rng = np.random.default_rng(0)
    tissue = rng.normal(100, 10, (20, 20, 20)).astype(np.float32)
    padded = np.zeros((1, 40, 40, 40), np.float32)
    padded[0, 10:30, 10:30, 10:30] = tissue
    padded[0, 20, 20, 20] = 1e6
    inside = normalise(padded)[0, 10:30, 10:30, 10:30]
    assert abs(inside.mean()) < 0.01
    assert abs(inside.std() - 1) < 0.02
    assert normalise(padded)[0, 0, 0, 0] == pytest.approx(inside.min())


def test_constant_and_two_valued_channels() -> None:
    """A constant channel becomes zero; one of two values keeps them apart; channels do not influence one another."""
    array = np.zeros((2, 4, 4, 1), np.float32)
    array[0] = 7
    array[1, :2] = 255
    out = normalise(array)
    assert not out[0].any()
    assert out[1, :2].min() > 0 > out[1, 2:].max()


def test_outside_the_slice_lies_the_channels_minimum(grey_config: DatasetConfig) -> None:
    """The letterbox is filled with what is darkest in the image, not with its mean."""
    array = np.random.default_rng(0).random((1, 10, 20, 1)).astype(np.float32)
    square = prepare_image(Volume(array, None, None), 20, grey_config)[0, 0]
    assert torch.equal(square[:5], torch.full((5, 20), float(normalise(array).min())))
    assert square[5:15].std() > 0.5


def test_training_from_a_cache_needs_no_image_library(
    picture_folder: Make, grey_config: DatasetConfig, tmp_path: Path
) -> None:
    """Once prepared, batches come without nibabel, Pillow, pydantic, MONAI and scipy being imported."""
    root = picture_folder(2)
    prepare(open_dataset(root, grey_config), 16, tmp_path / "cache")
    program = f"""
import sys
for name in ("nibabel", "PIL", "pydantic", "monai", "scipy"):
    sys.modules[name] = None
from pathlib import Path
from medsegdiff.config import TrainingConfig
from medsegdiff.data.batches import SliceBatches
from medsegdiff.data.cases import Dataset, DatasetConfig
from medsegdiff.data.folder import read_cases_csv
from medsegdiff.data.prepare import prepare
from medsegdiff.labels import LabelScheme
import medsegdiff.metrics
config = DatasetConfig(name="made", modality="US", channels=("grey",), labels={{"background": 0, "lesion": 255}})
root = Path({str(root)!r})
dataset = Dataset(root, config, read_cases_csv(root / "cases.csv"))
cases = prepare(dataset, 16, Path({str(tmp_path / "cache")!r})).cases
images, masks = SliceBatches(cases, LabelScheme.of(config), TrainingConfig(), 0).batch(0)
print(tuple(images.shape), tuple(masks.shape))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(16, 1, 16, 16) (16, 1, 16, 16)"
