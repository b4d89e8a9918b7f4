"""From a scan on disk to a mask on the same grid."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
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
from medsegdiff.progress import listening
from medsegdiff.segment import label_values, name_of, publish, segment_scan
from medsegdiff.weights import ModelCard, Segmenter, build, hash_weights

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


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("axes", [3, 4])
def test_a_nifti_scans_header_is_kept(tmp_path: Path, kind: type, ending: str, axes: int) -> None:
    """Affines, their codes, voxel sizes, units and description stay to the last bit; scaling, display range and
    extensions, which may name the patient, do not."""
    array = block((12, 18, 6)) // 100 + 5
    affine = np.array([[0, -0.8, 0.1, 11], [1.5, 0, 0, -70], [0, 0.1, -3, 5], [0, 0, 0, 1]])
    stored = array if axes == 3 else array[..., None]
    scan = kind(stored, affine)
    scan.set_qform(affine @ np.diag([1, 1, 1, 1]), 3)
    scan.set_sform(affine + np.pad([[0.25]], ((0, 3), (3, 0))), 4)  # the two need not agree; the sform counts
    scan.header.set_xyzt_units("mm", "sec")
    scan.header["descrip"] = b"of the scanner"
    scan.header["cal_max"] = 900
    scan.header.set_slope_inter(2.0, -10.0)
    scan.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Doe^Jane"))
    path = tmp_path / f"scan{ending}"
    nibabel.save(scan, path)
    result = segment_scan(segmenter(BINARY), str(path), tmp_path / "out", SAMPLING, 0, with_uncertainty=True)
    before = nibabel.load(path).header
    assert (nibabel.load(path).dataobj.slope, nibabel.load(path).dataobj.inter) == (2, -10)
    for file in (result.masks[0], str(result.uncertainty)):
        mask = nibabel.load(file)
        assert type(mask) is kind
        assert np.array_equal(mask.affine, nibabel.load(path).affine)
        for name in (
            "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
            "srow_x", "srow_y", "srow_z", "xyzt_units", "descrip",
        ):  # fmt: skip
            assert np.array_equal(mask.header[name], before[name]), name
        assert np.array_equal(mask.header["pixdim"][:4], before["pixdim"][:4])
        assert mask.shape == (12, 18, 6)
        assert (mask.get_data_dtype(), float(mask.header["cal_max"])) == (np.uint8, 0)
        assert not mask.header.extensions
        assert b"Doe" not in gzip.decompress(Path(file).read_bytes())
    values = np.asarray(nibabel.load(result.masks[0]).dataobj)
    assert set(np.unique(values)) == {0, 7}, "the scan's scaling must not touch the mask"
    assert agreement(values == 7, array > 10) > 0.9


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


def test_the_json_says_how_a_mask_came_about(tmp_path: Path) -> None:
    """Settings, seed, hashes of model and scan, version; a blank scan is remarked upon."""
    nibabel.save(nibabel.Nifti1Image(np.zeros((9, 9, 2), np.int16), np.eye(4)), tmp_path / "a.nii")
    chosen = segmenter(BINARY)
    sampling = SamplingConfig(steps=3, members=2, fuse="majority")
    result = segment_scan(chosen, str(tmp_path / "a.nii"), tmp_path / "o", sampling, 4, True)
    assert (result.members, result.steps, result.fuse, result.seed) == (2, 3, "majority", 4)
    assert result.model_sha256 == hash_weights(chosen.network.state_dict())
    assert result.scan_sha256 == [hashlib.sha256((tmp_path / "a.nii").read_bytes()).hexdigest()]
    assert result.version == importlib.metadata.version("medsegfed")
    assert result.warnings == ["no voxel was marked; look at the scan"]
    with Image.open(result.preview) as picture:
        assert picture.format == "PNG"


def test_slices_are_reported_while_they_are_done(tmp_path: Path) -> None:
    """A slice counts when its members have taken their steps; the network is left without hooks."""
    save_scan(tmp_path / "a.nii", "RAS")
    chosen, seen = segmenter(BINARY, None), []
    with listening(seen.append):
        segment_scan(
            chosen, str(tmp_path / "a.nii"), tmp_path, SamplingConfig(steps=3, members=2), 0, True, stage="one of 2"
        )
    assert {(one.stage, one.total) for one in seen} == {("one of 2", 6)}
    done = [one.done for one in seen]
    assert done == [0, 2, 4, 6]  # 6 slices x 2 members in one batch, after each of 3 steps
    assert not chosen.network.out._forward_hooks


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/b.nii.gz", "b"), ("b.c.MHA", "b.c"), (".nii.gz", ".nii.gz"), ("slice.dcm", "slice"), ("noending", "noending")],
)
def test_names(tmp_path: Path, path: str, name: str) -> None:
    """The file's name without the format's ending; a folder's name whole, also by way of `.`."""
    assert name_of(Path(path)) == name
    (tmp_path / "x.dcm" / "y").mkdir(parents=True)
    assert name_of(tmp_path / "x.dcm") == "x.dcm"
    assert name_of(tmp_path / "x.dcm" / "y" / "..") == "x.dcm"


@pytest.mark.parametrize("moment", ["preview", "json", "publish"])
def test_a_scan_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Stopped while it writes, a scan leaves nothing; while files are moved, `publish` moves the rest."""
    save_scan(tmp_path / "a.nii", "RAS")
    out, arguments = tmp_path / "out", (segmenter(BINARY), str(tmp_path / "a.nii"))
    segment_scan(*arguments, tmp_path / "whole", SAMPLING, 0, True)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "preview":
            patch.setattr("medsegdiff.preview.preview", stop)
        elif moment == "json":
            patch.setattr(json, "dumps", stop)
        else:
            patch.setattr(Path, "replace", lambda path, to: stop() if to == out / "a_mask.nii.gz" else path.rename(to))
        with pytest.raises(KeyboardInterrupt):
            segment_scan(*arguments, out, SAMPLING, 0, True)
    assert not (out / "a.json").exists()
    if moment != "publish":
        assert not out.exists() or not list(out.iterdir())
        return
    publish(out, "a")
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {name: data for name, data in found.items() if name != "a.json"} == {
        name: data for name, data in whole.items() if name != "a.json"
    }
    assert json.loads(found["a.json"])["voxels"] == json.loads(whole["a.json"])["voxels"]


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
