"""Which round is best, against a plain search over all rounds."""

from __future__ import annotations

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


@given(scores=SCORES, by=st.sampled_from(["mean", "worst"]), data=st.data())
def test_the_best_round_is_the_first_with_the_highest_figure_of_most_sites(scores, by, data) -> None:
    """Mean or lowest; rounds beyond the one asked about, and rounds with fewer sites, do not count."""
    through = data.draw(st.integers(0, len(scores)))
    known = {n: [v for v in sites.values() if v is not None] for n, sites in enumerate(scores[:through], start=1)}
    most = max((len(values) for values in known.values()), default=0)
    best, figure = None, -1.0
    for number, values in known.items():
        if values and len(values) == most:
            found = min(values) if by == "worst" else sum(values) / len(values)
            if found > figure + 1e-12:
                best, figure = number, found
    assert best_round(events(scores), by, through) == best
    assert rounds_since_best(events(scores), by, through) == (0 if best is None else through - best)


@given(scores=SCORES, by=st.sampled_from(["mean", "worst"]))
def test_the_best_round_so_far_stays_or_is_the_newest(scores, by) -> None:
    """So it suffices to put a round's model aside when it is the best at its own time."""
    told, before = events(scores), None
    for number in range(1, len(scores) + 1):
        best = best_round(told, by, number)
        assert best in (before, number)
        before = best
