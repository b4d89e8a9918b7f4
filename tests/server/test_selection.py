"""Which round is best, against plain searches over all rounds."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.selection import best_round, rounds_since_best

DICE = st.none() | st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
SCORES = st.lists(st.dictionaries(st.sampled_from("abc"), DICE), max_size=8)


def events(scores: list[dict]) -> list[dict]:
    return [
        {"event": "scores", "round": number, "sites": {site: {"dice": value} for site, value in sites.items()}}
        for number, sites in enumerate(scores, start=1)
    ]


@given(
    scores=st.lists(st.fixed_dictionaries({site: st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]) for site in "abc"})),
    by=st.sampled_from(["mean", "worst"]),
    data=st.data(),
)
def test_of_rounds_that_all_sites_scored_the_first_with_the_highest_figure_is_best(scores, by, data) -> None:
    """Mean or lowest; rounds beyond the one asked about do not count."""
    through = data.draw(st.integers(0, len(scores)))
    best, figure = None, Fraction(-1)
    for number, sites in enumerate(scores[:through], start=1):
        values = [Fraction(value) for value in sites.values()]
        found = min(values) if by == "worst" else sum(values, Fraction(0))
        if found > figure:
            best, figure = number, found
    assert best_round(events(scores), by, through) == best
    assert rounds_since_best(events(scores), by, through) == (0 if best is None else through - best)


@given(scores=SCORES, by=st.sampled_from(["mean", "worst"]))
def test_a_better_round_is_better_at_the_sites_of_both(scores, by) -> None:
    """Against the definition, one round at a time; the order in which sites stand in an event changes nothing."""
    told, best = events(scores), None
    backwards = events([dict(reversed(sites.items())) for sites in scores])
    for number, sites in enumerate(scores, start=1):
        mine = {site: value for site, value in sites.items() if value is not None}
        other = scores[best - 1] if best is not None else {}
        both = [site for site in mine if other.get(site) is not None]
        figure = min if by == "worst" else sum
        if (best is None and mine) or (both and figure(mine[s] for s in both) > figure(other[s] for s in both)):
            best = number
        assert best_round(told, by, number) == best_round(backwards, by, number) == best


@pytest.mark.parametrize("by", ["mean", "worst"])
def test_a_site_that_leaves_or_misses_a_scoring_freezes_nothing(by) -> None:
    """d leaves after round 2, c misses round 4: every round is better at the sites that scored it, and so the best."""
    rising = [dict.fromkeys(sites, 0.1 * n) for n, sites in enumerate(("abcd", "abcd", "abc", "ab", "abc"), start=1)]
    assert [best_round(events(rising), by, n) for n in range(1, 6)] == [1, 2, 3, 4, 5]
    assert rounds_since_best(events(rising), by, 5) == 0


def test_without_its_hard_site_a_round_is_no_better() -> None:
    """The mean over those who scored would have risen."""
    scores = [{"a": 0.8, "hard": 0.2}, {"a": 0.8}, {"a": 0.79}]
    assert [best_round(events(scores), by, 3) for by in ("mean", "worst")] == [1, 1]
    assert best_round(events([{"a": 0.2}, {"b": 0.9}]), "mean", 2) == 1


@given(scores=SCORES, by=st.sampled_from(["mean", "worst"]))
def test_the_best_round_so_far_stays_or_is_the_newest(scores, by) -> None:
    """So it suffices to put a round's model aside when it is the best at its own time."""
    told, before = events(scores), None
    for number in range(1, len(scores) + 1):
        best = best_round(told, by, number)
        assert best in (before, number)
        before = best
