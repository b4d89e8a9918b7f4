"""`medsegfed train` on a device and in a precision of choice, `model show`, and what site.yaml says of a GPU."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from client import training
from client.contract import Assignment, TrainTask
from client.site import Site
from deploy import cli
from medsegdiff.training import Trainer
from medsegdiff.weights import initial_weights


def medsegfed(*arguments: object) -> int:
    """Run the command in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["medsegfed", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("option", "fact"),
    [
        (["--precision", "tf32"], "--precision tf32: choose auto, fp32 or bf16"),
        (["--device", "no such GPU"], "device 'no such GPU'"),
    ],
)
def test_settings_that_do_not_exist_are_refused_first(
    option: list[str], fact: str, tiny_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, nothing written."""
    assert medsegfed("train", tiny_source, "-o", tmp_path / "model", *option) == 2
    assert fact in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_cases_that_are_left_out_are_told(
    tiny_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which, why, and that the training goes on without them."""
    folder = tmp_path / "source"
    shutil.copytree(tiny_source, folder)
    broken = sorted((folder / "images").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:100])
    options = ["--size", 16, "--steps", 1, "--batch", 2, "--threads", 1, "--device", "cpu"]
    assert medsegfed("train", folder, "-o", tmp_path / "model", *options) == 0
    told = capsys.readouterr().err
    assert broken.name in told
    assert re.search(r"1 of \d+ cases are left out; the training goes on", told)


def test_ctrl_c_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever Typer makes of it."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("simulations.simulate.simulate", interrupted)
    assert medsegfed("simulate", "quickstart") == 130
    assert "--resume goes on with it" in capsys.readouterr().err


def test_options_reach_the_training(tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--precision, --compile and --batch, as they are asked for."""
    seen: list[Trainer] = []
    real = Trainer.__init__

    def watched(self: Trainer, *arguments: object, compile: bool = False, **options: object) -> None:
        assert compile
        seen.append(self)
        real(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "__init__", watched)
    options = ["--size", 16, "--steps", 1, "--batch", 3, "--threads", 1, "--device", "cpu"]
    arguments = ["train", tiny_source, "-o", tmp_path / "model", *options]
    assert medsegfed(*arguments, "--precision", "bf16", "--compile") == 0
    assert (seen[0].config.precision, seen[0].config.batch_size) == ("bf16", 3)
    assert seen[0].device.type == "cpu"


@pytest.mark.slow
def test_a_preset_is_shown_with_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """GFLOP of both passes and a forecast in both precisions, as lines and as JSON."""
    medsegfed("model", "show", "tiny", "--size", 32, "--batch", 2)
    lines = capsys.readouterr().out
    medsegfed("model", "show", "tiny", "--size", 32, "--batch", 2, "--json")
    figures = json.loads(capsys.readouterr().out)
    for number in (
        f"{figures['gflop_forward']:.2f} GFLOP forward",
        f"{figures['gflop_training']:.2f} GFLOP training",
        f"{figures['mib_training']['fp32']:,.0f} MiB in fp32, {figures['mib_training']['bf16']:,.0f} MiB in bf16",
        f"{figures['mib_sampling']['fp32']:,.0f} MiB in fp32",
    ):
        assert number in lines


@pytest.mark.parametrize("compile_", [False, True])
def test_a_site_decides_on_its_device_and_compilation(
    compile_: bool, tiny_world: Path, tiny_task: TrainTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """site.yaml takes an index as a number, and its `compile` reaches the trainer."""
    folder = next(path.parent for path in sorted(tiny_world.rglob("site.yaml")))
    text = f"name: elm\ndata: {(folder / 'data').resolve()}\ndevice: 0\ncompile: {str(compile_).lower()}\n"
    (tmp_path / "site.yaml").write_text(text)
    site = Site(tmp_path / "site.yaml")
    assert site.config.device == 0
    monkeypatch.setattr(training, "choose_device", lambda name: torch.device("cpu"))
    asked: list[bool] = []
    real = Trainer.__init__

    def watched(self: Trainer, *arguments: object, compile: bool = False, **options: object) -> None:
        asked.append(compile)
        real(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "__init__", watched)
    training.train_round(site, tiny_task, Assignment("run", 1, "0" * 64), initial_weights(tiny_task.model, 0))
    assert asked == [compile_]
