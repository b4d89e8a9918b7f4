"""A part of the sites a round: who is drawn, how evenly, the same again after a restart, and what spares are for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_sites import FakeSites, on, put, run, say
from flwr.app import Error, MessageType
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from medsegdiff.errors import UserError
from medsegdiff.strict import read_config
from server.config import RunPlan, StrategyConfig
from server.journal import Journal
from server.outcome import federation_report
from server.rounds import sample_size
from server.sampling import asked_sites, draw_order

MANY = {f"site-{number:03d}": 1 + number % 5 for number in range(200)}
FEW = {name: 1 + number for number, name in enumerate(("alder", "birch", "elm", "fir", "oak", "pine"))}
NO = on(MessageType.TRAIN, lambda content: Error(100, "no"))


def rounds_of(folder: Path) -> list[dict]:
    found = {e["round"]: e for e in Journal(folder / "journal.jsonl").events if e["event"] == "round" and e["round"]}
    return [found[number] for number in sorted(found)]


def trained(sites: FakeSites) -> list[str]:
    return [site for site, kind in sites.asked if kind == MessageType.TRAIN]


@given(
    sites=st.sets(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=12).map(sorted),
    seed=st.integers(0, 2**63 - 1),
    round_=st.integers(1, 100_000),
    data=st.data(),
)
def test_the_draw_is_the_rounds_alone(sites, seed, round_, data) -> None:
    """The roster's order changes nothing, and a site that leaves moves no other past another."""
    order = draw_order(seed, round_, sites)
    assert sorted(order) == sites
    assert draw_order(seed, round_, data.draw(st.permutations(sites))) == order
    gone = data.draw(st.sampled_from(sites))
    assert draw_order(seed, round_, [s for s in sites if s != gone]) == [s for s in order if s != gone]


def unevenness(drawn: list[list[str]], sites: int) -> float:
    """Probability of counts as uneven as these if every site is as likely as any other.

    With k of n drawn without replacement, sum((count - mean)**2) / (rounds k/n (1 - k/n)) * (n - 1)/n is chi-square
    with n - 1 degrees of freedom: the covariance of the counts is that of n - 1 independent directions.
    """
    k = len(drawn[0])
    counts = Counter(site for names in drawn for site in names)
    mean = len(drawn) * k / sites
    found = sum((counts[site] - mean) ** 2 for site in MANY)
    variance = mean * (1 - k / sites) * sites / (sites - 1)
    return float(chi2.sf(found / variance, sites - 1))


def test_every_site_is_drawn_as_often_as_any_other_and_the_test_can_tell() -> None:
    """1,000 rounds of 20 from 200, three seeds; a draw that favours ten sites by half is rejected, as is one by
    turns, which is too even."""
    for seed in (0, 1, 2**40):
        assert 1e-3 < unevenness([draw_order(seed, r, MANY)[:20] for r in range(1, 1001)], 200) < 1 - 1e-3
    generator = np.random.default_rng(0)
    odds = np.array([1.5 if number < 10 else 1.0 for number in range(200)])
    biased = [list(generator.choice(list(MANY), 20, replace=False, p=odds / odds.sum())) for _ in range(1000)]
    assert unevenness(biased, 200) < 1e-6
    turns = [[list(MANY)[(20 * r + i) % 200] for i in range(20)] for r in range(1000)]
    assert unevenness(turns, 200) > 1 - 1e-6


def test_neighbouring_rounds_and_seeds_draw_independently() -> None:
    """Of 20 drawn from 200, the next round (or seed) has 2 in common on average: between 1.8 and 2.2 over 1,000."""
    for step in ((0, 1), (1, 0)):
        common = [
            len({*draw_order(5, r, MANY)[:20]} & {*draw_order(5 + step[0], r + step[1], MANY)[:20]})
            for r in range(1, 1001)
        ]
        assert 1.8 < sum(common) / 1000 < 2.2


@pytest.mark.slow
def test_two_hundred_sites_are_asked_twenty_at_a_time(make_run) -> None:
    """Three rounds: 200 introductions, 60 questions to train, the drawn sites' and nobody else's updates."""
    folder = make_run(roster=MANY, sample=0.1, evaluate_every=3, task={"rounds": 3})
    sites = run(folder)
    plan = read_config(folder / "run.yaml", RunPlan)
    kinds = Counter(kind for _, kind in sites.asked)
    assert kinds == {MessageType.QUERY: 200, MessageType.TRAIN: 60, MessageType.EVALUATE: 200}
    for event in rounds_of(folder):
        due = sorted(draw_order(plan.task.seed, event["round"], MANY)[:20])
        assert event["chosen"] == sorted(event["accepted"]) == due
        assert event["absent"] == event["spare"] == []
    assert len({tuple(event["chosen"]) for event in rounds_of(folder)}) == 3


def test_a_resumed_run_and_other_nodes_ask_the_same_sites(make_run) -> None:
    """Stopped in round 2, its checkpoint of round 1 damaged, the roster turned round: the uninterrupted run's bytes."""
    settings = {"roster": FEW, "sample": 3, "task": {"rounds": 3}}
    whole, broken = make_run("whole", **settings), make_run("broken", **settings)
    run(whole)
    second = draw_order(read_config(whole / "run.yaml", RunPlan).task.seed, 2, FEW)[0]

    def in_round_two(question, good):
        return NO(question, good) if question.metadata.group_id == "2" else good

    with pytest.raises(UserError, match="round 2: 2 of 3 sites gave a usable update, the quorum is 3"):
        run(broken, {second: in_round_two})
    newest = max((broken / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    run(broken, names=list(reversed(FEW)))
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [e["chosen"] for e in rounds_of(broken)] == [e["chosen"] for e in rounds_of(whole)]


def test_a_spare_takes_the_place_of_a_site_that_fails_and_of_no_other(make_run) -> None:
    """Nobody is slow in one process: spares are asked where one of the sample has failed, in the order of the draw."""
    settings = {"roster": FEW, "sample": 3, "over_select": 2, "evaluate_every": 9, "task": {"rounds": 1}}
    order = draw_order(5, 1, FEW)
    good, plain_run, bad = make_run("good", **settings), make_run("plain", **settings | {"over_select": 0}), None
    assert sorted(trained(run(good))) == sorted(order[:3])
    run(plain_run)
    assert rounds_of(good)[0]["model_hash"] == rounds_of(plain_run)[0]["model_hash"]
    bad = make_run("bad", **settings)
    assert trained(run(bad, {order[1]: on(MessageType.TRAIN, say(round=99))})) == [*sorted(order[:3]), order[3]]
    event = rounds_of(bad)[0]
    assert (sorted(event["accepted"]), list(event["rejected"])) == (sorted([order[0], *order[2:4]]), [order[1]])
    assert (event["chosen"], event["absent"]) == (sorted(order[:4]), [])


def test_a_site_that_never_came_is_absent_only_where_it_was_drawn(make_run) -> None:
    """The quorum lets the rounds count; the site's absences are the rounds that drew it."""
    folder = make_run(roster=FEW, sample=3, quorum=2, task={"rounds": 6})
    run(folder, {"oak": on(MessageType.QUERY, lambda content: Error(100, "no"))})
    events = Journal(folder / "journal.jsonl").events
    report = federation_report(read_config(folder / "run.yaml", RunPlan), events)
    row = report["sites"]["oak"]
    due = [n for n in range(1, 7) if "oak" in draw_order(5, n, FEW)[:3]]
    assert 0 < len(due) < 6
    assert row["absent_rounds"] == row["chosen_rounds"] == due
    assert any("Each round asked 3 of 6 sites" in note for note in report["notes"])
    assert [e["sites"] for e in events if e["event"] == "chosen"] == [e["chosen"] for e in rounds_of(folder)]


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_repeated_round_is_made_by_the_sites_that_made_it(make_run, damaged) -> None:
    """A spare stood in; when damage has the round repeated the failed site is well again, and yet has no say."""
    folder = make_run(roster=FEW, sample=3, over_select=2, task={"rounds": 2})
    order = draw_order(5, 2, FEW)
    run(folder, {order[0]: on(MessageType.TRAIN, put(0.1))})
    whole, before = (folder / "model.safetensors").read_bytes(), rounds_of(folder)
    for path in sorted((folder / "checkpoints").iterdir())[-damaged:]:
        path.write_bytes(path.read_bytes()[:-1])
    again = run(folder)
    assert (folder / "model.safetensors").read_bytes() == whole
    assert sorted(trained(again)) == sorted(site for e in before[-damaged:] for site in e["accepted"])
    for first, second in zip(before, rounds_of(folder), strict=True):
        assert all(first[key] == second[key] for key in ("chosen", "spare", "absent", "model_hash"))


@pytest.mark.parametrize(("sample", "due"), [(None, 200), (7, 7), (0.1, 20), (1.0, 200), (0.0001, 1), (0.0125, 3)])
def test_how_many_a_round_asks(sample, due) -> None:
    """All, a number, or a part of 200 sites: rounded half up, never none."""
    assert sample_size(sample, 200) == due


def test_a_sample_that_cannot_meet_its_needs_is_refused_before_training(tiny_task) -> None:
    """Too many sites, a quorum above the sample, a rule whose malicious sites could be drawn together."""
    plan = RunPlan("tiny", "tiny", StrategyConfig(), FEW, tiny_task)
    for changes, message in (
        ({"sample": 7}, "ask 7 sites, the run has 6"),
        ({"sample": 4, "over_select": 3}, "ask 7 sites, the run has 6"),
        ({"sample": 3, "quorum": 4}, "quorum is 4, and a round ends with 3 updates"),
        (
            {"sample": 2, "strategy": StrategyConfig(rule="median")},
            "needs at least 3 updates a round, sample 2 gives 2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            replace(plan, **changes)
    assert replace(plan, sample=3, strategy=StrategyConfig(rule="median"), quorum=1).required == 3
    assert replace(plan, sample=0.5).required == 3


def test_the_sample_is_part_of_the_run_and_how_many_are_to_spare_is_not(tiny_task) -> None:
    """The first changes who trains; the second how long a round waits, and may change while a run goes on."""
    plan = RunPlan("tiny", "tiny", StrategyConfig(), FEW, tiny_task)
    ids = {replace(plan, sample=s).run_id for s in (None, 3, 0.5)}
    assert len(ids) == 3
    assert replace(plan, sample=3, over_select=2).run_id == replace(plan, sample=3).run_id
    assert replace(plan, sample=3).stated()["sample"] == 3


@given(
    failed=st.sets(st.sampled_from(sorted(FEW))),
    out=st.sets(st.sampled_from(sorted(FEW)), max_size=3),
    sample=st.integers(1, 4),
    spare=st.integers(0, 2),
)
def test_whom_a_simulation_asks_by_the_slow_way(failed, out, sample, spare) -> None:
    """Go down the draw until enough are good or the spares are used up; a federation asks all of them at once."""
    plan = _plan(sample, spare)
    order = [site for site in draw_order(0, 4, FEW) if site not in out][: sample + spare]
    due, good = [], 0
    for site in order:
        if good < sample:
            due.append(site)
            good += site not in failed
    assert asked_sites(plan, 4, out, failed) == due
    assert asked_sites(plan, 4, out) == order
    assert len(order) == min(sample + spare, len(FEW) - len(out))


def _plan(sample: int, spare: int):
    """What the draw reads of a plan."""
    from types import SimpleNamespace

    return SimpleNamespace(
        sample=sample, sample_size=sample, over_select=spare, roster=FEW, task=SimpleNamespace(seed=0)
    )
