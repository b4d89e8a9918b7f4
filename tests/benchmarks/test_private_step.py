"""The private step's figures are ratios to the plain step measured beside them, and earlier cases are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import private_step
from benchmarks.private_step import ENGINES, PLAIN, measure, rows_of
from medsegdiff.config import preset

CONFIG = preset("tiny", image_size=16, base_channels=8)


@pytest.mark.slow
def test_every_side_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """All engines beside the plain step, none failed, each with time, ratio and peak."""
    monkeypatch.setitem(private_step.MODELS, "small", (CONFIG, True))
    case = measure("small", 1, 2, 2, torch.device("cpu"), "fp32", 2)
    assert case["failed"] == {}
    assert list(case["sides"]) == [PLAIN, *ENGINES]
    assert 0 < case["trained"] < case["parameters"] / 5
    plain = case["sides"][PLAIN]["seconds"]["median"]
    for side in case["sides"].values():
        assert side["over_plain"] == pytest.approx(side["seconds"]["median"] / plain, abs=2e-3)
        assert side["peak_mib"] > 0
    assert len(rows_of({"cases": [case]})) == 4


def test_earlier_cases_are_kept_on_the_same_machine(tmp_path: Path) -> None:
    """Networks are measured in several calls; a case measured again is replaced, another machine's are dropped."""

    def case(model: str, value: int) -> dict[str, object]:
        return {"model": model, "slices": 1, "draws": 1, "patients": 8, "precision": "fp32", "value": value}

    def result(cpu: str, *cases: dict[str, object]) -> dict[str, object]:
        return {"what": "w", "hardware": {"cpu": cpu}, "clock": "wall", "cases": list(cases)}

    path = tmp_path / "private_step.json"
    path.write_text(json.dumps(result("a", case("x", 1), case("y", 1))))
    merged = private_step._with_earlier(result("a", case("y", 2)), path)
    assert merged["cases"] == [case("x", 1), case("y", 2)]
    assert private_step._with_earlier(result("b", case("y", 2)), path)["cases"] == [case("y", 2)]
    assert private_step._with_earlier(result("a", case("y", 2)), tmp_path / "missing.json")["cases"] == [case("y", 2)]
