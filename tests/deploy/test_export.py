"""ONNX: the graphs say what torch says, and their description alone is enough to draw the same masks."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy import cli, export
from deploy.onnx_graphs import MatrixFilter
from medsegdiff.config import DiffusionConfig, ModelConfig, SamplingConfig
from medsegdiff.data.cases import DatasetConfig
from medsegdiff.diffusion import alpha_bars
from medsegdiff.ensemble import derive_seed, segment_images
from medsegdiff.errors import UserError
from medsegdiff.ff_parser import FFParser
from medsegdiff.samplers import sample
from medsegdiff.weights import ModelCard, initial_weights, load_model, save_model

for _package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package)
DOCS = Path(__file__).parents[2] / "docs" / "export.md"
SMALLEST = ModelConfig(16, 1, 1, 8, (1, 2), 1, (1,), (1,))

Refuse = Callable[..., str]


def write_model(
    path: Path, model: ModelConfig, diffusion: DiffusionConfig, sampling: SamplingConfig, labels: tuple[str, ...]
) -> Path:
    """An untrained model whose weights are larger than at the start, so that every part of it counts."""
    dataset = DatasetConfig(
        "toy",
        "MR",
        tuple(f"channel {number}" for number in range(model.image_channels)),
        {name: index for index, name in enumerate(("background", *labels))},
    )
    weights = initial_weights(model, 3)
    generator = torch.Generator().manual_seed(4)
    weights = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    save_model(path, ModelCard(model, diffusion, sampling, dataset), weights)
    return path


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One target, DPM-Solver++, masks in +-0.7."""
    return write_model(
        tmp_path_factory.mktemp("plain") / "model.safetensors",
        SMALLEST,
        DiffusionConfig(mask_scale=0.7),
        SamplingConfig(steps=5),
        ("lesion",),
    )


@pytest.fixture(scope="module")
def plain_folder(plain_model: Path) -> Path:
    """The plain model, exported by the command."""
    out = plain_model.parent / "exported"
    export.export_onnx(plain_model, out)
    return out


@pytest.fixture(scope="module")
def rich_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two channels, two targets, self-conditioning, auxiliary head, fusion at level 0, v, DDPM."""
    return write_model(
        tmp_path_factory.mktemp("rich") / "model.safetensors",
        replace(
            SMALLEST, image_channels=2, mask_channels=3, fusion_levels=(0, 1), auxiliary_head=True,
            self_conditioning=True,
        ),
        DiffusionConfig(prediction="v", schedule="cosine", timesteps=50, zero_terminal_snr=True),
        SamplingConfig(sampler="ddpm", steps=4),
        ("core", "rim"),
    )  # fmt: skip


@pytest.fixture
def docs() -> dict[str, Any]:
    """The names that the example of docs/export.md defines."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(DOCS), "exec"), names)
    return names


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Call with arguments of `model export` that must fail; returns the one line that says why."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["medsegfed", "model", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
        return err

    return run


def assert_same_masks(docs: dict[str, Any], model: Path, folder: Path, batch: int, size: int = 16) -> None:
    """The documented loop, on the exported files alone, draws what `segment_images` draws from the same noise."""
    segmenter = load_model(model)
    config = segmenter.card.model
    images = torch.randn(batch, config.image_channels, size, size, generator=torch.Generator().manual_seed(batch))
    ours = segment_images(
        segmenter.network, segmenter.diffusion, images, segmenter.card.sampling, list(range(batch))
    ).mean.numpy()
    generators = [torch.Generator().manual_seed(derive_seed(seed, 0)) for seed in range(batch)]

    def draw_noise(shape: tuple[int, ...]) -> Any:
        return torch.stack([torch.randn(shape[1:], generator=generator) for generator in generators]).numpy()

    about, graphs = docs["load"](folder)
    theirs = docs["draw_masks"](about, graphs, images.numpy(), draw_noise)
    assert theirs.dtype == np.float32
    assert ours.std() > 0.05  # not the mask of nothing
    np.testing.assert_allclose(theirs, ours, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_documented_loop(docs, plain_model, plain_folder, batch):
    """The example of the documentation draws our masks, at any batch size."""
    assert_same_masks(docs, plain_model, plain_folder, batch)


@pytest.mark.slow
def test_rich_model(docs, rich_model, tmp_path):
    """So it does with self-conditioning, several channels, noise between the ends and zero terminal SNR."""
    written = export.export_onnx(rich_model, tmp_path / "out")
    assert written.relative_error < export.TOLERANCE
    assert_same_masks(docs, rich_model, tmp_path / "out", 3)
    about, graphs = docs["load"](tmp_path / "out")
    assert about["mask"]["channels"] == ["background", "core", "rim"]
    assert about["mask"]["values"] == {"core": 1, "rim": 2}
    image = torch.randn(3, 2, 16, 16)
    (auxiliary,) = graphs["features"].run(["auxiliary"], {"image": image.numpy()})
    with torch.inference_mode():
        expected = load_model(rich_model).network.eval().auxiliary(image).numpy()
    np.testing.assert_allclose(auxiliary, expected, atol=1e-5)


@pytest.mark.slow
def test_another_size(docs, plain_model, tmp_path):
    """A graph for another size has the Fourier map read at that size."""
    export.export_onnx(plain_model, tmp_path / "out", size=22)
    assert (tmp_path / "out" / "model_22px_denoise.onnx").is_file()
    assert_same_masks(docs, plain_model, tmp_path / "out", 2, size=22)


@pytest.mark.slow
def test_equal_weights_equal_bytes(plain_model, plain_folder, tmp_path):
    """A second export gives the same files."""
    export.export_onnx(plain_model, tmp_path / "out")
    for path in plain_folder.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.slow
def test_folder(plain_folder, plain_model):
    """Three files, known to their description by hash; opset 18 or later; no path of this machine in them."""
    import onnx

    names = {"model_16px_features.onnx", "model_16px_denoise.onnx", "model_16px.json"}
    assert {path.name for path in plain_folder.iterdir()} == names
    about = json.loads((plain_folder / "model_16px.json").read_text())
    for graph in about["graphs"].values():
        data = (plain_folder / graph["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == graph["sha256"]
        assert all(tensor["shape"][0] == "batch" for tensor in (*graph["inputs"], *graph["outputs"]))
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model, full_check=True)
        assert [opset.version >= 18 for opset in model.opset_import if opset.domain == ""] == [True]
        assert "DFT" not in {node.op_type for node in model.graph.node}
        assert b".py" not in data
        assert str(Path(export.__file__).parent).encode() not in data
    assert about["model"]["file_sha256"] == hashlib.sha256(plain_model.read_bytes()).hexdigest()
    assert about["sampling"]["clip"] == [-0.7, 0.7]
    assert max(about["check"]["relative_error"].values()) <= about["check"]["tolerance"] == 1e-4
    assert set(about["check"]["relative_error"]) == {"features_0", "features_1", "clean"}


@pytest.mark.slow
def test_compare_sees_other_weights(plain_model, plain_folder):
    """The check is one: graphs of other weights are far from the network."""
    segmenter = load_model(plain_model)
    graphs = {name: (plain_folder / f"model_16px_{name}.onnx").read_bytes() for name in ("features", "denoise")}
    with torch.no_grad():
        segmenter.network.image_stem.bias += 0.01
        segmenter.network.fusions["1"].parser.map[..., 1] += 0.3  # the imaginary part of the filter
    errors = export.compare(segmenter, 16, graphs)
    assert errors["features_0"] > export.TOLERANCE
    assert errors["clean"] > export.TOLERANCE


@pytest.mark.slow
def test_graphs_that_differ_are_deleted(plain_model, plain_folder, tmp_path, monkeypatch):
    """Beyond the tolerance nothing is left, not even the folder."""
    graphs = {name: (plain_folder / f"model_16px_{name}.onnx").read_bytes() for name in ("features", "denoise")}
    monkeypatch.setattr(export, "make_graphs", lambda *_: graphs)
    monkeypatch.setattr(export, "TOLERANCE", 1e-12)
    with pytest.raises(UserError, match=r"differs from torch by \d.*nothing was exported"):
        export.export_onnx(plain_model, tmp_path / "out")
    monkeypatch.setattr(export, "compare", lambda *_: {"clean": float("nan")})
    with pytest.raises(UserError, match="by nan in 'clean'"):
        export.export_onnx(plain_model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_refusals(refuse, plain_model, tmp_path, monkeypatch):
    """What a user can get wrong is one line; a folder that holds something stays as it is."""
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    for kind in ("onnx", "monai-bundle"):
        assert "not an empty folder" in refuse(plain_model, "--to", kind, "-o", taken)
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "notes.txt"]
    out = tmp_path / "out"
    assert "choose onnx or monai-bundle" in refuse(plain_model, "--to", "tflite", "-o", out)
    assert "--size 15" in refuse(plain_model, "--to", "onnx", "-o", out, "--size", 15)
    assert "--size is for --to onnx" in refuse(plain_model, "--to", "monai-bundle", "-o", out, "--size", 16)
    assert "no such file" in refuse(tmp_path / "none.safetensors", "--to", "onnx", "-o", out)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "onnxscript is not installed" in refuse(plain_model, "--to", "onnx", "-o", out)
    assert not out.exists()


@pytest.mark.slow
@settings(deadline=None)  # a busy machine is no fault
@given(size=st.integers(2, 17), seed=st.integers(0, 1000), made_for=st.sampled_from([None, 8]))
def test_matrix_filter(size, seed, made_for):
    """The matrices do what the Fourier transforms do, for even and odd sizes and maps that mirror nothing."""
    generator = torch.Generator().manual_seed(seed)
    parser = FFParser(3, made_for or size)
    with torch.no_grad():
        parser.map.copy_(torch.randn(parser.map.shape, generator=generator))
    maps = torch.randn(2, 3, size, size, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(MatrixFilter(parser, size)(maps), parser(maps), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig("dpmpp_2m", 20), SamplingConfig("dpmpp_2m", 1), SamplingConfig("ddim", 7),
        SamplingConfig("ddim", 6, eta=0.4), SamplingConfig("ddpm", 7), SamplingConfig("ddpm", 1000),
    ],
    ids=lambda config: f"{config.sampler}-{config.steps}-{config.eta}",
)  # fmt: skip
def test_sampling_steps(config, zero_terminal_snr):
    """The numbers walk where the sampler walks, for a clean mask that depends on x and t in no linear way."""
    alpha_bar = alpha_bars("linear", 100, zero_terminal_snr)
    noises = torch.randn(2000, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def predict_clean(x: torch.Tensor, t: int) -> torch.Tensor:
        return (x * 3 + t / 50 - 1).sin()

    stream = iter(noises[1:])
    expected = sample(predict_clean, noises[0], alpha_bar, config, lambda: next(stream))

    stream = iter(noises[1:])
    x, clean = noises[0], torch.zeros(5, dtype=torch.float64)
    steps = export.sampling_steps(alpha_bar, config)
    for step in steps:
        previous, clean = clean, predict_clean(x, int(step["t"]))
        x = step["x"] * x + step["clean"] * clean + step["previous"] * previous
        if step["noise"]:
            x = x + step["noise"] * next(stream)
    torch.testing.assert_close(x, expected, atol=1e-9, rtol=1e-9)
    assert [step["alpha_bar"] for step in steps] == [float(alpha_bar[int(step["t"])]) for step in steps]
    json.dumps(steps, allow_nan=False)
