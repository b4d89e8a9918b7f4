"""The MONAI bundle: MONAI's own machinery loads it, runs it, and writes what `medsegfed segment` writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, verify_net_in_out
from monai.bundle import run as run_bundle
from monai.bundle.properties import InferProperties, MetaProperties

from deploy import cli
from deploy.bundle import export_bundle
from medsegdiff.config import DiffusionConfig, ModelConfig, SamplingConfig
from medsegdiff.data.cases import DatasetConfig
from medsegdiff.monai_bundle import BundleNetwork
from medsegdiff.weights import ModelCard, initial_weights, save_model


@pytest.fixture(autouse=True)
def _same_threads():
    """The bundle sets torch's threads for the whole process; other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of two targets that draws something."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    config = ModelConfig(16, 1, 3, 8, (1, 2), 1, (1,), (1,))
    labels = {"background": 0, "core": 4, "rim": 2}
    card = ModelCard(config, DiffusionConfig(), SamplingConfig(steps=2), DatasetConfig("toy", "MR", ("T1",), labels))
    weights = initial_weights(config, 1)
    weights["out.weight"] = weights["out.weight"] * 30
    save_model(path, card, weights)
    return path


@pytest.fixture(scope="module")
def bundle(model: Path) -> Path:
    """The bundle of that model."""
    out = model.parent / "bundle"
    assert export_bundle(model, out).relative_error is None
    return out


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A small volume with a turned, anisotropic grid."""
    path = tmp_path / "scan.nii.gz"
    values = np.random.default_rng(0).normal(size=(14, 18, 3)).astype(np.float32)
    affine = np.diag([-1.5, 1.0, 4.0, 1.0])
    affine[:3, 3] = (3, -7, 11)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


@pytest.fixture
def medsegfed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call with arguments to run the command in this process; returns what it prints."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["medsegfed", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        return capsys.readouterr().out

    return run


def assert_same_files(found: Path, expected: Path, scan: Path) -> None:
    """Mask, both maps, grid and volumes are equal."""
    names = {"scan_mask.nii.gz", "scan_uncertainty.nii.gz", "scan_variance.nii.gz"}
    assert names == {path.name for path in expected.glob("*.nii.gz")} == {path.name for path in found.glob("*.nii.gz")}
    for name in sorted(names):
        ours, theirs = nib.load(expected / name), nib.load(found / name)
        assert np.array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj)), name
        assert np.array_equal(theirs.affine, nib.load(scan).affine)
    assert set(np.unique(np.asarray(nib.load(found / "scan_mask.nii.gz").dataobj))) == {0, 2, 4}
    volumes = [json.loads((folder / "scan.json").read_text())["voxels"] for folder in (expected, found)]
    assert volumes[0] == volumes[1]


@pytest.mark.slow
def test_python_api(bundle, model, scan, tmp_path, medsegfed):
    """`monai.bundle.run` gives the command's files, voxel for voxel; another seed gives others."""
    medsegfed("segment", model, scan, "-o", tmp_path / "ours", "--device", "cpu")
    settings = {
        "config_file": str(bundle / "configs" / "inference.json"),
        "bundle_root": str(bundle),
        "scans": [str(scan)],
        "device": "cpu",
    }
    run_bundle(**settings, output_dir=str(tmp_path / "theirs"))
    assert_same_files(tmp_path / "theirs", tmp_path / "ours", scan)

    run_bundle(**settings, output_dir=str(tmp_path / "other"), seed=7)
    masks = [np.asarray(nib.load(tmp_path / name / "scan_mask.nii.gz").dataobj) for name in ("theirs", "other")]
    assert not np.array_equal(*masks)


@pytest.mark.slow
def test_command_line(bundle, model, scan, tmp_path, medsegfed):
    """So does the line that the bundle's README gives, run in the bundle's folder."""
    pytest.importorskip("fire")
    medsegfed("segment", model, scan, "-o", tmp_path / "ours", "--device", "cpu", "--members", 3)
    line = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    more = ["--scans", f"['{scan}']", "--output_dir", str(tmp_path / "theirs"), "--members", "3", "--device", "cpu"]
    done = subprocess.run([*line, *more], cwd=bundle, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_files(tmp_path / "theirs", tmp_path / "ours", scan)


def test_network(bundle):
    """`network_def` is a torch module whose shapes MONAI finds as the metadata states them."""
    files = {"meta_file": str(bundle / "configs/metadata.json"), "config_file": str(bundle / "configs/inference.json")}
    verify_net_in_out("network_def", **files, device="cpu", bundle_root=str(bundle), members=2)
    parser = ConfigParser()
    parser.read_config(files["config_file"])
    parser["bundle_root"] = str(bundle)
    network = parser.get_parsed_content("network_def")
    assert isinstance(network, BundleNetwork)
    masks = network(torch.randn(3, 1, 16, 16))
    assert masks.shape == (3, 3, 16, 16)
    assert masks.abs().max() <= 1


def test_metadata(bundle):
    """Every field that MONAI's specification makes mandatory is there, of its kind; MONAI reads the versions."""
    meta = json.loads((bundle / "configs" / "metadata.json").read_text())
    texts = ("version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors",
             "copyright", "schema")  # fmt: skip
    assert all(isinstance(meta[name], str) and meta[name] for name in texts)
    assert all(isinstance(value, str) for value in meta["required_packages_version"].values())
    assert meta["version"] in meta["changelog"]
    sides = meta["network_data_format"]
    assert set(sides) == {"inputs", "outputs"}
    for tensor in (sides["inputs"]["image"], sides["outputs"]["pred"]):
        assert set(tensor) == {
            "type", "format", "modality", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data",
            "channel_def",
        }  # fmt: skip
        assert tensor["type"] == "image"
        assert tensor["spatial_shape"] == [16, 16]
        assert tensor["dtype"] == "float32"
        assert tensor["value_range"][0] < tensor["value_range"][1]
        assert list(tensor["channel_def"]) == [str(index) for index in range(tensor["num_channels"])]
    assert (sides["outputs"]["pred"]["format"], sides["inputs"]["image"]["format"]) == ("labels", "magnitude")
    assert sides["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "core", "2": "rim"}

    config = json.loads((bundle / "configs" / "inference.json").read_text())
    parser = ConfigParser({**config, "_meta_": meta})
    assert all(found["id"] in parser for found in MetaProperties.values())
    # A scan is one call: the parts that MONAI's own evaluator is made of are not there, and nothing else is missing.
    missing = {name for name, found in InferProperties.items() if found["required"] and found["id"] not in parser}
    assert missing == {"dataset_dir", "dataset", "evaluator", "inferer"}


def test_folder(bundle, model):
    """The weights are the model file as it is; nothing is pickled; no path of this machine in any text."""
    files = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert files == {
        "LICENSE", "configs/inference.json", "configs/metadata.json", "docs/README.md", "models/model.safetensors",
    }  # fmt: skip
    assert (bundle / "models" / "model.safetensors").read_bytes() == model.read_bytes()
    for name in sorted(files - {"models/model.safetensors"}):
        assert str(model.parent) not in (bundle / name).read_text()


def test_command_writes_a_bundle(bundle, model, tmp_path, medsegfed):
    """`model export --to monai-bundle` writes those files and says where to go on."""
    out = tmp_path / "new" / "bundle"
    printed = medsegfed("model", "export", model, "--to", "monai-bundle", "-o", out)
    assert f"Next: see {out / 'docs' / 'README.md'}" in printed
    for path in bundle.rglob("*"):
        if path.is_file():
            assert (out / path.relative_to(bundle)).read_bytes() == path.read_bytes()
