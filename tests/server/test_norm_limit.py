"""The limit of an update's norm: no site moves it alone, down or up, and no honest majority is struck by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.encoding import Compression
from medsegdiff.errors import UserError
from medsegdiff.weights import weight_shapes
from server.config import ScreeningConfig, StrategyConfig
from server.screening import NORM_ROUNDS, carried_norms, largest_norm, recent_norms
from tests.fake_federation import Federation
from tests.fake_sites import SMALLEST, put

Make = Callable[..., Federation]
SIZE = math.sqrt(sum(math.prod(shape) for shape in weight_shapes(SMALLEST).values()))


@pytest.fixture
def federate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_task) -> Make:
    """Call with names, a number of rounds and changes of the plan."""

    def make(names: str, rounds: int, name: str = "run", **changes: Any) -> Federation:
        folder = tmp_path / name
        folder.mkdir()
        patience = {"deadline_seconds": 5.0, "absence_seconds": 1.0, "evaluate_every": rounds}
        return Federation(folder, monkeypatch, replace(tiny_task, rounds=rounds), names, **(patience | changes))

    return make


def record(round_: int, norms: dict[str, float], **more: Any) -> dict[str, Any]:
    return {"round": round_, "accepted": {site: {"norm": norm} for site, norm in norms.items()}, **more}


def test_the_limit_is_the_factor_times_the_sites_median(tiny_task) -> None:
    """Of an even number the upper of the middle two; one site of several, none, or zeros: the absolute limit alone."""
    config = ScreeningConfig(norm_factor=4.0, first_norm=100.0)
    assert largest_norm(config, record(1, {"a": 1.0, "b": 3.0, "c": 900.0}), tiny_task, 9, 3) == 12.0
    assert largest_norm(config, record(1, {"a": 1.0, "b": 3.0}), tiny_task, 9, 3) == 12.0
    assert largest_norm(config, record(1, {"a": 3.0}), tiny_task, 9, 1) == 12.0
    for alone in ({}, record(1, {"a": 3.0}), record(1, {"a": 0.0, "b": 0.0}), {"accepted": {"a": {"patients": 3}}}):
        assert largest_norm(config, alone, tiny_task, 9, 3) == 100.0
    assert largest_norm(replace(config, norm_factor=None), record(1, {"a": 1.0}), tiny_task, 9, 3) is None


def test_the_absolute_limit_holds_in_every_round(tiny_task) -> None:
    """Stated or derived; top_k may send what it held back as well, from round two on."""
    large = record(1, {"a": 900.0, "b": 900.0})
    assert largest_norm(ScreeningConfig(first_norm=7.0), large, tiny_task, 100, 2) == 7.0
    first = largest_norm(ScreeningConfig(), {}, tiny_task, 100, 2)
    assert first is not None
    assert largest_norm(ScreeningConfig(), large, tiny_task, 100, 2) == first
    task = replace(tiny_task, compression=Compression("top_k", 0.1))
    assert largest_norm(ScreeningConfig(), {}, task, 100, 2) == first
    assert largest_norm(ScreeningConfig(), large, task, 100, 2) == pytest.approx(first * 19.97, rel=1e-3)


@given(
    rounds=st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 9.0)),
            st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 2), st.floats(0.1, 9.0)), max_size=2),
        ),
        max_size=12,
    )
)
def test_a_record_holds_each_sites_last_norm_of_the_last_rounds(rounds) -> None:
    """Against a search through the whole history, late updates by the round that they were made in."""
    before: dict[str, Any] = {"round": 0}
    seen: dict[str, tuple[int, float]] = {}
    for number, (norms, late) in enumerate(rounds, start=1):
        rows = [
            {"site": site, "round": number - staleness, "norm": norm}
            for site, staleness, norm in late
            if number > staleness and site not in norms
        ]
        before = record(number, norms, late=rows) | carried_norms(before, number, norms)
        for row in rows:
            if row["round"] >= seen.get(row["site"], (0, 0.0))[0]:
                seen[row["site"]] = (row["round"], row["norm"])
        seen |= {site: (number, norm) for site, norm in norms.items()}
        due = {site: row for site, row in seen.items() if row[0] > number - NORM_ROUNDS}
        assert recent_norms(before) == due


def test_a_round_that_one_site_made_alone_shuts_out_nobody(federate) -> None:
    """birch sends next to nothing; alder and elm miss round 2, and are counted from round 3 on."""
    f = federate(("alder", "birch", "elm"), 6, quorum=1)
    f.spoil("birch", put(1e-12), lambda round_: round_ > 1)
    for site in ("alder", "elm"):
        f.silence(site, lambda round_: round_ == 2)
    f.start()
    assert [len(e["accepted"]) for e in f.rounds()] == [3, 1, 3, 3, 3, 3]
    assert [sorted(e.get("norms", {})) for e in f.rounds()] == [[], ["alder", "elm"], [], [], [], []]
    assert not f.told("suspended")


def test_a_first_round_of_one_site_shuts_out_nobody(federate) -> None:
    """There is no median of one site of three."""
    f = federate(("alder", "birch", "elm"), 3, quorum=1)
    f.spoil("birch", put(1e-12))
    for site in ("alder", "elm"):
        f.silence(site, lambda round_: round_ == 1)
    f.start()
    assert [len(e["accepted"]) for e in f.rounds()] == [1, 3, 3]


def test_the_limit_does_not_grow_with_who_exhausts_it(federate) -> None:
    """birch sends what is just taken, round after round: it never gets beyond what AdamW could do in round one."""
    f = federate(("alder", "birch"), 8, quorum=1)
    most = largest_norm(f.plan.screening, {}, f.plan.task, round(SIZE**2), 2)
    assert most is not None

    def exhausting(content: Any) -> Any:
        before = f.told("round")[-1]
        limit = largest_norm(f.plan.screening, before, f.plan.task, round(SIZE**2), 2)
        return put(0.999 * limit / SIZE)(content)

    f.spoil("birch", exhausting)
    f.start()
    norms = [e["accepted"]["birch"]["norm"] for e in f.rounds()]
    assert len(norms) == 8
    assert max(norms) <= most


def grown(site: str) -> Callable[[Any], Any]:
    return put(4e-3 if site == "alder" else 4.1e-3)


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_most_of_a_round_is_not_struck(federate, rule) -> None:
    """Two of three sites are above the limit from round 2 on: the limit is in doubt, not they. Nobody is suspended, nor
    found out: a rule that bears one attacker does not make a round of the third alone."""
    f = federate(
        ("alder", "birch", "elm"), 6, quorum=1, screening=ScreeningConfig(2.0), strategy=StrategyConfig(rule=rule)
    )
    for site in ("alder", "elm"):
        f.spoil(site, grown(site), lambda round_: round_ > 1)
    if rule == "median":
        with pytest.raises(UserError, match=r"round 2: 1 of 3 sites .* the rule median needs 3"):
            f.start()
        return
    f.start()
    assert [sorted(e["rejected"]) for e in f.rounds()][1:5] == [["alder", "elm"]] * 4
    assert [e.get("excused") for e in f.rounds()][1:5] == [["alder", "elm"]] * 4
    assert not f.told("suspended")
    assert not [e for e in f.rounds() if "strikes" in e]


def test_one_of_three_is_struck(federate) -> None:
    """The same sizes at one site alone."""
    f = federate(("alder", "birch", "elm"), 5, quorum=1, screening=ScreeningConfig(2.0))
    f.spoil("elm", grown("elm"), lambda round_: round_ > 1)
    f.start()
    assert [(e["round"], e["site"]) for e in f.told("suspended")] == [(4, "elm")]


def test_repeated_rounds_have_the_same_limit_and_say_the_same(federate) -> None:
    """With absences that norms are carried over, and a rejection: twice torn, twice the same records and models."""
    f = federate(
        ("alder", "birch", "elm"),
        4,
        quorum=1,
        screening=ScreeningConfig(2.0),
        strategy=StrategyConfig(rule="norm_clip"),
    )
    f.silence("elm", lambda round_: round_ in (2, 3))
    f.spoil("birch", grown("birch"), lambda round_: round_ == 3)
    f.start()
    first = f.rounds()
    assert [sorted(e.get("norms", {})) for e in first] == [[], ["elm"], ["birch", "elm"], []]
    assert sorted(first[2]["rejected"]) == ["birch"]
    for _ in range(2):
        for path in sorted((f.folder / "checkpoints").glob("round-*"))[-2:]:
            path.write_bytes(b"torn")
        f.start()
        for again, one in zip(f.rounds()[-2:], first[-2:], strict=True):
            for key in ("round", "model_hash", "accepted", "rejected", "absent", "norms", "strikes"):
                assert again.get(key) == one.get(key)


def test_who_was_found_out_is_known_at_every_repetition(federate) -> None:
    """A trimmed mean of the two that were left: a round that is repeated twice still knows that the third was found."""
    f = federate(("alder", "birch", "elm"), 2, strategy=StrategyConfig(rule="trimmed_mean"))
    f.spoil("birch", put(math.nan))
    f.start()
    first = f.rounds()[-1]
    for _ in range(3):
        (f.folder / "checkpoints" / "round-000002.safetensors").write_bytes(b"torn")
        f.start()
        assert f.rounds()[-1]["model_hash"] == first["model_hash"]
        assert f.rounds()[-1]["rejected"] == first["rejected"]
