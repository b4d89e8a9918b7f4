"""The table of malicious sites is that of the committed figures; a cell is a real federation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.attacks import RULES, markdown, prepare_world, request
from benchmarks.attacks import carry_out as carry_out_cell
from benchmarks.turns import RESULTS, ROOT

PAGE = ROOT / "docs" / "aggregation.md"


def test_the_page_shows_the_last_results() -> None:
    """The tables in docs/aggregation.md are those of benchmarks/results/attacks.json; another figure changes them."""
    page, result = PAGE.read_text(), json.loads((RESULTS / "attacks.json").read_text())
    assert markdown(result) in page
    first = next(iter(next(iter(result["worlds"].values()))["dice"].values()))
    first["mean"]["dice"] = 0.123
    assert markdown(result) not in page


@pytest.mark.slow
def test_a_cell_is_a_federation_with_a_liar(tmp_path: Path, monkeypatch) -> None:
    """Two rounds of one step: the liar is the largest site, NaN never counts, its scores are left out of the figure."""
    monkeypatch.setenv("MEDSEGFED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MEDSEGFED_WORLD", "")
    plan, malicious = prepare_world("skewed", tmp_path, request(2, 1))
    assert plan.roster[malicious] == max(plan.roster.values())
    assert sum(plan.roster.values()) > 5 * min(plan.roster.values())
    rule = "median"
    cell = carry_out_cell(plan, malicious, "nan", rule, tmp_path / "cell", tmp_path / "skewed" / "honest")
    assert (cell["counted"], cell["rounds"], cell["failed"]) == (0, 2, None)
    assert 0 <= cell["dice"] <= 1
    kept = carry_out_cell(plan, malicious, "none", rule, tmp_path / "cell", tmp_path / "nowhere")
    assert kept == cell  # not carried out again
    shorter, _ = prepare_world("skewed", tmp_path, request(1, 1))
    again = carry_out_cell(shorter, malicious, "nan", rule, tmp_path / "cell", tmp_path / "skewed" / "honest")
    assert again["rounds"] == 1  # another plan's figures are not taken for this one's
    assert set(RULES) > {"mean", rule}
