"""Two engines, one result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulations.simulate import simulate


@pytest.mark.slow
@pytest.mark.e2e
def test_ray_and_inline_give_the_same_bits(tiny_recipe, tmp_path) -> None:
    """Same recipe, same seed: equal model files and arms; the reports differ in engine and seconds alone."""
    pytest.importorskip("ray")
    reports = {}
    for engine in ("inline", "ray"):
        outcome = simulate(tiny_recipe(), None, tmp_path / engine, engine, resume=False)
        report = json.loads((outcome.folder / "report.json").read_text())
        assert report.pop("engine") == engine
        for key in ("seconds", "bytes"):
            report.pop(key)
        reports[engine] = report
    assert reports["inline"] == reports["ray"]
    names = [
        "model.safetensors",
        "arms/local-alder.safetensors",
        "arms/local-elm.safetensors",
        "arms/pooled.safetensors",
    ]
    for name in names:
        assert read(tmp_path / "inline" / name) == read(tmp_path / "ray" / name), name


def read(path: Path) -> bytes:
    return path.read_bytes()
