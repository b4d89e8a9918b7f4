"""From a scan on disk to a mask on the same grid."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from medsegdiff.config import DiffusionConfig, ModelConfig, SamplingConfig
from medsegdiff.data.cases import DatasetConfig
from medsegdiff.errors import UserError
from medsegdiff.labels import LabelScheme
from medsegdiff.network import MedSegDiff
from medsegdiff.segment import label_values, segment_scan
from medsegdiff.weights import ModelCard, Segmenter, build

SAMPLING = SamplingConfig(steps=1, members=1)
SPACING = (1.5, 0.8, 3.0)  # of X, Y, Z in mm


class Threshold(MedSegDiff):
    """Stands in for a trained network: channel k is positive above `cuts[k]`, or below its negative."""

    def __init__(self, config: ModelConfig, cuts: tuple[float, ...]) -> None:
        super().__init__(config)
        self.cuts = cuts

    def image_features(self, image_BCHW: Tensor) -> list[Tensor]:
        return [image_BCHW]

    def denoise(self, mask_BKHW: Tensor, t_B: Tensor, features: list[Tensor]) -> Tensor:
        return torch.cat(
            [(features[0] > cut if cut > 0 else features[0] <= -cut).float() * 2 - 1 for cut in self.cuts], dim=1
        )


def segmenter(dataset: DatasetConfig, cuts: tuple[float, ...] | None = (0.5,), size: int = 48) -> Segmenter:
    """A segmenter for the dataset; without cuts it is a fresh network."""
    scheme = LabelScheme.of(dataset)
    model = ModelConfig(
        image_size=size, mask_channels=scheme.channels, base_channels=8, channel_multipliers=(1,), fusion_levels=(0,),
        attention_levels=(),
    )  # fmt: skip
    torch.manual_seed(0)
    built = build(ModelCard(model, DiffusionConfig(), SAMPLING, dataset))
    if cuts is None:
        return built
    return Segmenter(built.card, Threshold(model, cuts), built.diffusion, built.scheme)


BINARY = DatasetConfig("made", "MR", ("T1",), {"background": 0, "lesion": 7})
REGIONS = DatasetConfig(
    "made", "MR", ("T1",), {"background": 0, "rim": 1, "core": 2}, {"whole": ("rim", "core"), "core": ("core",)}
)
CLASSES = DatasetConfig("made", "MR", ("T1",), {"background": 0, "a": 3, "b": 200})


def block(shape: tuple[int, int, int]) -> np.ndarray:
    """A bright block off the centre on a dark ground, different along every axis."""
    array = np.zeros(shape, np.int16)
    x, y, z = shape
    array[x // 6 : x // 2, y // 2 : y - y // 6, : z // 2] = 1000
    return array


def save_scan(path: Path, axes: str, tilt: float = 0.0) -> np.ndarray:
    """The block as NIfTI whose stored axes run along `axes`, tilted about the first by radians; the stored array."""
    ras = nibabel.Nifti1Image(block((24, 18, 6)), np.diag([*SPACING, 1.0]))
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    turned = ras.as_reoriented(turn)
    rotation = np.eye(4)
    rotation[1:3, 1:3] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
    rotation[:3, 3] = (11, -70, 5)
    stored = np.asarray(turned.dataobj)
    nibabel.save(nibabel.Nifti1Image(stored, rotation @ turned.affine), path)
    return stored


def agreement(mask: np.ndarray, truth: np.ndarray) -> float:
    """Dice."""
    return 2 * float((mask & truth).sum()) / float(mask.sum() + truth.sum())


@pytest.mark.parametrize(("axes", "tilt"), [("RAS", 0.0), ("LPS", 0.0), ("PIR", 0.0), ("SLA", 0.3), ("ILP", -0.2)])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_a_mask_lies_on_the_scans_own_grid(tmp_path: Path, axes: str, tilt: float, ending: str) -> None:
    """Whatever the stored orientation and tilt: same shape, same affine, and the mask covers the bright block."""
    scan = tmp_path / f"scan.a{ending}"
    stored = save_scan(scan, axes, tilt)
    result = segment_scan(segmenter(BINARY), str(scan), tmp_path / "out", SAMPLING, 0, with_uncertainty=True)
    assert result.masks == [str(tmp_path / "out" / "scan.a_mask.nii.gz")]
    mask = nibabel.load(result.masks[0])
    assert mask.shape == stored.shape
    np.testing.assert_allclose(mask.affine, nibabel.load(scan).affine, atol=1e-4)
    values = np.asarray(mask.dataobj)
    assert set(np.unique(values)) == {0, 7}
    assert agreement(values == 7, stored > 0) > 0.93
    assert agreement(np.flip(values, 0) == 7, stored > 0) < 0.8, "a mirrored mask must not pass"
    assert result.voxels == {"lesion": int((values == 7).sum())}
    assert result.volumes_ml["lesion"] == pytest.approx(result.voxels["lesion"] * np.prod(SPACING) / 1000, rel=1e-3)
    assert result.uncertainty is not None
    uncertainty = nibabel.load(result.uncertainty)
    assert uncertainty.shape == stored.shape
    assert int(np.asarray(uncertainty.dataobj).max()) <= 100
    assert json.loads((tmp_path / "out" / "scan.a.json").read_text()) == json.loads(json.dumps(vars(result)))


def test_overlapping_targets_are_one_file_each(tmp_path: Path) -> None:
    """Regions do not fit one label map: NAME_TARGET_mask holds 0 and 1."""
    scan = tmp_path / "scan.nii.gz"
    stored = save_scan(scan, "LPS")
    result = segment_scan(segmenter(REGIONS, (0.5, 0.5)), str(scan), tmp_path, SAMPLING, 0, with_uncertainty=False)
    assert [Path(path).name for path in result.masks] == ["scan_whole_mask.nii.gz", "scan_core_mask.nii.gz"]
    for path in result.masks:
        values = np.asarray(nibabel.load(path).dataobj)
        assert set(np.unique(values)) == {0, 1}
        assert agreement(values == 1, stored > 0) > 0.93
    assert result.uncertainty is None
    assert not list(tmp_path.glob("*uncertainty*"))


def test_disjoint_targets_share_a_map_with_their_own_values(tmp_path: Path) -> None:
    """Multiclass: the label map holds the values that the dataset's masks hold."""
    scan = tmp_path / "scan.nii.gz"
    stored = save_scan(scan, "RAS")
    # Channels: background, a, b; only b speaks up where the image is bright.
    chosen = segmenter(CLASSES, (-0.5, 99.0, 0.5))
    result = segment_scan(chosen, str(scan), tmp_path, SAMPLING, 0, with_uncertainty=False)
    values = np.asarray(nibabel.load(result.masks[0]).dataobj)
    assert set(np.unique(values)) == {0, 200}
    assert agreement(values == 200, stored > 0) > 0.93
    assert result.voxels["a"] == 0


@pytest.mark.parametrize(
    ("labels", "targets", "values"),
    [
        ({"background": 0, "a": 3, "b": 200}, None, {"a": 3, "b": 200}),
        ({"background": 0, "a": 300, "b": 2}, None, {"a": 1, "b": 2}),
        ({"background": 9, "a": 0, "b": 2}, None, {"a": 1, "b": 2}),
        ({"background": 0, "a": (1, 2), "b": 5}, None, {"a": 1, "b": 2}),
        ({"background": 0, "a": 4, "b": 5}, {"both": ("a", "b")}, {"both": 1}),
        ({"background": "#000000", "a": "#ff0000"}, None, {"a": 1}),
    ],
)
def test_label_values(labels: dict[str, object], targets: dict[str, tuple[str, ...]] | None, values: object) -> None:
    """A target's own value where it has exactly one that fits a byte, for all targets or for none."""
    assert label_values(segmenter(DatasetConfig("made", "MR", ("T1",), labels, targets))) == values  # type: ignore[arg-type]


def test_a_picture_gives_a_picture(tmp_path: Path) -> None:
    """A grey PNG gives a PNG of its size; the spacing is unknown, so there is no volume in ml."""
    pixels = np.zeros((30, 20), np.uint8)
    pixels[4:16, 8:18] = 220
    Image.fromarray(pixels).save(tmp_path / "eye.png")
    result = segment_scan(segmenter(BINARY), str(tmp_path / "eye.png"), tmp_path / "o", SAMPLING, 0, True)
    assert [Path(path).name for path in result.masks] == ["eye_mask.png"]
    mask = np.asarray(Image.open(result.masks[0]))
    assert mask.shape == (30, 20)
    assert set(np.unique(mask)) == {0, 7}
    assert agreement(mask == 7, pixels > 0) > 0.9
    assert result.volumes_ml == {"lesion": None}
    assert np.asarray(Image.open(str(result.uncertainty))).shape == (30, 20)


def test_two_files_of_one_scan_are_its_channels(tmp_path: Path) -> None:
    """Joined by `;`, in the order of the dataset's channels; the first gives the name."""
    two = DatasetConfig("made", "MR", ("T1", "T2"), {"background": 0, "lesion": 1})
    save_scan(tmp_path / "a.nii.gz", "RAS")
    save_scan(tmp_path / "b.nii.gz", "RAS")
    model = ModelConfig(24, 2, base_channels=8, channel_multipliers=(1,), fusion_levels=(), attention_levels=())
    chosen = build(ModelCard(model, DiffusionConfig(), SAMPLING, two))
    result = segment_scan(chosen, f"{tmp_path}/a.nii.gz;{tmp_path}/b.nii.gz", tmp_path / "o", SAMPLING, 0, False)
    assert Path(result.masks[0]).name == "a_mask.nii.gz"
    with pytest.raises(UserError, match="channel"):
        segment_scan(chosen, f"{tmp_path}/a.nii.gz", tmp_path / "o", SAMPLING, 0, False)


def test_the_same_scan_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    """The file's name does not matter, its bytes and the seed do."""
    save_scan(tmp_path / "a.nii", "RAS")
    (tmp_path / "b.nii").write_bytes((tmp_path / "a.nii").read_bytes())
    chosen = segmenter(BINARY, None)
    found = []
    for name, seed in (("a", 0), ("b", 0), ("a", 1)):
        out = tmp_path / f"{name}{seed}"
        result = segment_scan(
            chosen, str(tmp_path / f"{name}.nii"), out, SamplingConfig(steps=2, members=2), seed, True
        )
        found.append(Path(result.masks[0]).read_bytes() + Path(str(result.uncertainty)).read_bytes())
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_several_members_give_a_range_of_volumes_and_two_maps(tmp_path: Path) -> None:
    """Entropy and variance on the scan's grid in percent; the smallest and largest member in voxels and ml."""
    stored = save_scan(tmp_path / "a.nii", "LPS")
    loud = segmenter(BINARY, None)
    with torch.no_grad():
        loud.network.out.weight.mul_(30)
    sampling = SamplingConfig(steps=2, members=4)
    result = segment_scan(loud, str(tmp_path / "a.nii"), tmp_path, sampling, 0, True)
    low, high = result.interval_voxels["lesion"] or (0, 0)
    assert 0 < low < high
    ml = np.prod(SPACING) / 1000
    assert result.interval_ml["lesion"] == pytest.approx((low * ml, high * ml), abs=1e-3)
    for path in (result.uncertainty, result.variance):
        values = np.asarray(nibabel.load(str(path)).dataobj)
        assert values.shape == stored.shape
        assert 0 < values.max() <= 100
        np.testing.assert_allclose(nibabel.load(str(path)).affine, nibabel.load(tmp_path / "a.nii").affine, atol=1e-4)
    assert Path(str(result.variance)).name == "a_variance.nii.gz"
    described = json.loads((tmp_path / "a.json").read_text())
    assert described["interval_voxels"] == {"lesion": [low, high]}


def test_one_member_has_neither_range_nor_variance(tmp_path: Path) -> None:
    """Null in the JSON, no file."""
    save_scan(tmp_path / "a.nii", "RAS")
    result = segment_scan(segmenter(BINARY), str(tmp_path / "a.nii"), tmp_path, SAMPLING, 0, True)
    assert (result.variance, result.interval_ml, result.interval_voxels) == (None, {"lesion": None}, {"lesion": None})
    assert not list(tmp_path.glob("*variance*"))


def torn(path: Path) -> None:
    save_scan(path, "RAS")
    path.write_bytes(path.read_bytes()[:400])


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("none.nii.gz", lambda path: None),
        ("folder.nii.gz", Path.mkdir),
        ("empty.nii.gz", Path.touch),
        ("text.nii.gz", lambda path: path.write_text("hello")),
        ("torn.nii", torn),
        ("text.png", lambda path: path.write_text("hello")),
        ("scan.xyz", lambda path: path.write_text("hello")),
    ],
)
def test_a_bad_file_is_named_and_nothing_is_written(tmp_path: Path, name: str, make: Callable[[Path], object]) -> None:
    """Missing, a folder, empty, text, torn or of another format: one line with the file's name."""
    make(tmp_path / name)
    with pytest.raises(UserError) as caught:
        segment_scan(segmenter(BINARY), str(tmp_path / name), tmp_path / "out", SAMPLING, 0, False)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
