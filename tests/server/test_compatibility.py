"""What excludes what: refused with its reason, before anything is trained; the page is the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from server.compatibility import CONFLICTS, Features, conflicts, markdown_table, refuse_unsound
from server.config import StrategyConfig

PAGE = Path(__file__).parents[2] / "docs" / "aggregation.md"


@pytest.mark.parametrize("number", range(len(CONFLICTS)))
def test_every_pair_of_the_table_is_refused_with_its_reason(number) -> None:
    """Each value of one side with each of the other; the defaults go with everything."""
    conflict = CONFLICTS[number]
    (one, values), (other, chosen) = conflict.one, conflict.other
    for value in values:
        for choice in chosen:
            features = Features(**{one: value, other: choice})
            assert conflict in conflicts(features)
            with pytest.raises(ValueError, match=f"{one} {value} does not go with {other} {choice}") as caught:
                refuse_unsound(features)
            assert conflict.reason in str(caught.value)
            assert conflict not in conflicts(replace(features, **{one: getattr(Features(), one)}))


def test_a_strategy_is_refused_as_it_is_read() -> None:
    """By patients, a median has no majority of sites to rest on; alike, it has."""
    with pytest.raises(ValueError, match="rule median does not go with weighting examples"):
        StrategyConfig(rule="median", weighting="examples")
    assert StrategyConfig(rule="median", weighting="equal").rule == "median"
    assert StrategyConfig(rule="norm_clip", weighting="examples").rule == "norm_clip"


def test_the_page_is_current() -> None:
    """docs/aggregation.md holds the table as the code makes it; `python -m server.compatibility` prints it."""
    assert markdown_table() in PAGE.read_text()
