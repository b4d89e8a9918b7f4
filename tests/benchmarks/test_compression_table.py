"""The tables of compression: paired by seed, rendered from what a run wrote, and put where the page marks them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.compression import BEGIN, CODECS, END, PAGE, Cell, compression_of, markdown, recipe_of, render, summary
from benchmarks.turns import RESULTS
from client.encoding import Compression
from medsegdiff.errors import UserError


def cell(codec: str, seed: int, mean: float, up: int) -> dict[str, object]:
    return {
        "dataset": "lgg_tcga", "codec": codec, "seed": seed, "rounds": 10, "steps": 30, "sites": 4,
        "dice": {"CS": mean}, "mean": mean, "worst": mean - 0.1, "up": up, "down": 2 * up, "seconds": 1.0,
    }  # fmt: skip


CELLS = [
    cell("none", 0, 0.80, 4000), cell("none", 1, 0.70, 4000),
    cell("int8", 0, 0.81, 1000), cell("int8", 1, 0.69, 1000), cell("int8", 2, 0.10, 1000),
]  # fmt: skip
SPEED = {
    "preset": "tiny", "round": 1, "codec": "int8", "raw": 2_300_000, "bytes": 560_000, "ratio": 4.18, "lost": 0.0066,
    "encode_mb_s": 180, "decode_mb_s": 340,
}  # fmt: skip


def test_a_codec_is_compared_seed_by_seed() -> None:
    """+0.01 and -0.01 are 0 on average; the seed that `none` lacks is not compared, and still averaged."""
    plain, int8 = summary(CELLS)
    assert (plain["times_fewer"], plain["difference"], plain["up_per_answer"]) == (1.0, 0.0, 100)
    assert (int8["times_fewer"], int8["difference"], int8["seeds"]) == (4.0, 0.0, 3)
    assert int8["error"] == pytest.approx(0.01, abs=1e-6)
    assert int8["mean"] == pytest.approx((0.81 + 0.69 + 0.10) / 3, abs=1e-4)


def test_the_tables_are_markdown_of_equal_columns() -> None:
    """A row for each dataset and codec, and one for each timing."""
    text = markdown({"cells": CELLS, "speed": [SPEED]})
    assert "| lgg_tcga | int8 | 0.0 | 4.0 | 0.5333 | 0.4333 | +0.0000 ± 0.0100 | 3 |" in text
    assert "| tiny | 1 | int8 | 2.3 | 4.2 | 0.0066 | 180 | 340 |" in text
    for block in text.strip().split("\n\n"):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_page_takes_the_tables_between_its_marks(tmp_path: Path) -> None:
    """Twice the same; all else stays; without marks nothing is written."""
    page, found = tmp_path / "page.md", tmp_path / "found.json"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    found.write_text(json.dumps({"cells": CELLS, "speed": [SPEED]}))
    for _ in range(2):
        assert render(found, page) == 0
        text = page.read_text()
        assert text.startswith(f"before\n{BEGIN}\n| dataset |")
        assert text.endswith(f"{END}\nafter\n")
        assert "old" not in text
    page.write_text("nothing to find")
    with pytest.raises(UserError, match="lacks the marks"):
        render(found, page)
    assert page.read_text() == "nothing to find"


def test_the_page_is_current() -> None:
    """docs/aggregation.md holds the tables of the committed result; `--render` writes them."""
    text = PAGE.read_text(encoding="utf-8")
    assert BEGIN in text
    assert END in text
    result = RESULTS / "compression.json"
    if result.is_file():
        assert markdown(json.loads(result.read_text())) in text


@pytest.mark.parametrize("codec", CODECS)
def test_every_cell_is_a_recipe(codec) -> None:
    """The shipped recipe, with the cell's codec, seed and length, and no comparison arms."""
    recipe = recipe_of(Cell("lgg_tcga", codec, 3, 6, 5))
    assert (recipe.seed, recipe.run.rounds, recipe.run.local_steps, recipe.arms) == (3, 6, 5, ())
    assert recipe.run.compression == compression_of(codec)


def test_a_codec_that_is_none_is_refused() -> None:
    """By the option's own name."""
    assert compression_of("top_k:0.05") == Compression("top_k", 0.05)
    for codec in ("int9", "top_k", "int8:0.5"):
        with pytest.raises(UserError, match=f"--codecs {codec}"):
            compression_of(codec)
