"""Attacks are carried out once, kept, joined over trainings, held against their bound, and drawn."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import privacy_attacks
from benchmarks.leaks.inversion import Search
from benchmarks.leaks.models import Recipe
from benchmarks.privacy_attacks import Size, attack, compare, draw, judge

TINY = Size(4, 100, 1, 2, 2, 1, 1, 2, Search(3))


def part(shift: float, seed: int) -> dict[str, Any]:
    """Scores of 50 members, shifted, and 200 others."""
    generator = np.random.default_rng(seed)
    pair = [(generator.standard_normal(50) + shift).tolist(), generator.standard_normal(200).tolist()]
    return {"scores": {"loss": pair, "calibrated": pair}, "loss_ratio": 1.5, "seconds": 1.0}


@pytest.mark.slow
def test_trainings_are_joined_and_held_against_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trainings make one figure; members who stand out further than privacy allows are a contradiction."""
    monkeypatch.setattr(privacy_attacks, "bound_of", lambda sigma, q, steps: 0.2)
    recipe = Recipe(10, epsilon=8.0)
    honest = judge(recipe, [part(0.0, 1), part(0.0, 2)])
    assert (honest["members"], honest["others"], honest["trainings"]) == (100, 400, 2)
    assert honest["keeps_the_bound"]
    broken = judge(recipe, [part(5.0, 1), part(5.0, 2)])
    assert broken["calibrated"]["tpr"] > 0.9
    assert not broken["keeps_the_bound"]
    assert "bound" not in judge(Recipe(10), [part(5.0, 1)])


def test_likeness_is_told_by_what_the_attacker_has() -> None:
    """Every victim's figures stand under each way; the picture is a PNG."""
    parts = [
        {"likeness": {"blind": [15.0 + k, 0.5], "plain": [30.0, 0.99]}, "pictures": {"scan": [[0.0, 1.0], [1.0, 0.0]]}}
        for k in range(2)
    ]
    assert compare(TINY, parts)["ways"]["blind"] == {"psnr_db": [15.0, 16.0], "ssim": [0.5, 0.5]}
    assert draw([part["pictures"] for part in parts]).startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every training and victim; a second call repeats none of it and prints the tables of the page."""
    monkeypatch.setattr(privacy_attacks, "QUICK", TINY)
    monkeypatch.setattr(privacy_attacks, "bound_of", lambda sigma, q, steps: 0.5)
    out, picture = tmp_path / "found.json", tmp_path / "seen.png"
    command = ["x", "--quick", "--device", "cpu", "--out", str(out), "--parts", str(tmp_path / "parts")]
    monkeypatch.setattr(sys, "argv", [*command, "--picture", str(picture)])
    threads = torch.get_num_threads()
    privacy_attacks.main()
    result = json.loads(out.read_text())
    assert len(result["membership"]) == 6
    assert len(result["inversion"]["ways"]) == 7
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "TPR at 1 % FPR" in capsys.readouterr().out
    monkeypatch.setattr(privacy_attacks, "attack", lambda *_: pytest.fail("was done before"))
    monkeypatch.setattr(sys, "argv", [*command, "--markdown"])
    privacy_attacks.main()
    assert "| training | sigma |" in capsys.readouterr().out
    torch.set_num_threads(threads)


def test_a_part_of_another_size_is_not_taken_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one of another recipe, nor a damaged one; what does not depend on the change is kept."""
    found = {"seconds": 1.0}
    monkeypatch.setattr(privacy_attacks, "membership", lambda *_: found)
    monkeypatch.setattr(privacy_attacks, "inversion", lambda *_: found)
    names = [*privacy_attacks.kinds(TINY), privacy_attacks.INVERSION]
    for name in names:
        attack((name, 0), TINY, tmp_path, torch.device("cpu"), torch.get_num_threads())

    def kept(size: Size) -> list[bool]:
        return [privacy_attacks._kept(tmp_path, (name, 0), size) is not None for name in names]

    assert kept(TINY) == [True] * 7
    assert kept(replace(TINY, others=101)) == [False] * 6 + [True]
    assert kept(replace(TINY, regularised=2)) == [True, False, True, True, True, True, True]
    assert kept(replace(TINY, victims=3)) == [True] * 6 + [False]
    for path in tmp_path.iterdir():
        path.write_text(path.read_text()[:-9])
    assert kept(TINY) == [False] * 7
