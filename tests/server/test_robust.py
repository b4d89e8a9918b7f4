"""Robust rules against slow obvious versions; what malicious sites can and cannot do; order; memory; scratch."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medsegdiff.errors import UserError
from server import robust
from server.aggregation import AggregationOverflow, FixedPointSum
from server.config import StrategyConfig
from server.robust import BLOCK_VALUES, SpilledRule, StreamedMean, open_aggregate

SHAPES = {"w": (3, 5), "b": (7,), "empty": (0,)}
RULES = ("median", "trimmed_mean", "multi_krum", "norm_clip", "centred_clip")
Update = dict[str, Tensor]


def updates(count: int, seed: int = 0, scale: float = 1.0) -> dict[str, Update]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"site-{i:02d}": {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for i in range(count)
    }


def combine(
    config: StrategyConfig,
    given_: dict[str, Update],
    folder: Path,
    patients: dict[str, int] | None = None,
    centre: Update | None = None,
) -> Update:
    rule = open_aggregate(config, SHAPES, folder / "spilled")
    try:
        for site, delta in given_.items():
            rule.add(site, delta, (patients or {}).get(site, 1))
        return rule.result(centre or {})
    finally:
        rule.close()


def rows(given_: dict[str, Update]) -> np.ndarray:
    """(sites, weights), float64."""
    return np.stack([flat(update) for _, update in sorted(given_.items())])


def flat(update: Update) -> np.ndarray:
    return np.concatenate([update[name].numpy().reshape(-1) for name in SHAPES]).astype(np.float64)


def slow_median(x: np.ndarray) -> np.ndarray:
    out = []
    for column in x.T:
        ordered = sorted(column)
        half = len(ordered) // 2
        out.append(ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2)
    return np.array(out)


def slow_trimmed_mean(x: np.ndarray, f: int) -> np.ndarray:
    return np.array([sum(sorted(column)[f : len(column) - f]) / (len(column) - 2 * f) for column in x.T])


def slow_multi_krum(x: np.ndarray, f: int) -> np.ndarray:
    """Blanchard et al. 2017: score s(i), the sum over the n - f - 2 closest others; the m = n - f best are averaged."""
    n = len(x)
    scores = []
    for i in range(n):
        distances = sorted(sum((a - b) ** 2 for a, b in zip(x[i], x[j], strict=True)) for j in range(n) if j != i)
        scores.append(sum(distances[: n - f - 2]))
    best = sorted(range(n), key=lambda i: scores[i])[: n - f]
    return np.mean([x[i] for i in best], axis=0)


def slow_norm_clip(x: np.ndarray, n: list[int], limit: float | None) -> np.ndarray:
    norms = [np.sqrt((row**2).sum()) for row in x]
    most = np.median(norms) if limit is None else limit
    return sum(w * row * min(1.0, most / norm) for w, row, norm in zip(n, x, norms, strict=True)) / sum(n)


def slow_centred_clip(x: np.ndarray, v: np.ndarray, limit: float | None, iterations: int) -> np.ndarray:
    """Karimireddy et al. 2021, algorithm 2."""
    for _ in range(iterations):
        norms = [np.sqrt(((row - v) ** 2).sum()) for row in x]
        most = np.median(norms) if limit is None else limit
        v = v + sum((row - v) * min(1.0, most / norm) for row, norm in zip(x, norms, strict=True)) / len(x)
    return v


@pytest.mark.parametrize("count", [5, 6, 9])
@pytest.mark.parametrize("limit", [None, 2.0])
def test_each_rule_is_the_papers(tmp_path, count, limit) -> None:
    """Odd and even numbers of sites, with and without a norm of the user's."""
    given_ = updates(count)
    x, sites = rows(given_), sorted(given_)
    patients = {site: 2 + i for i, site in enumerate(sites)}
    centre = updates(1, seed=9)["site-00"]

    def found(rule: str, **more) -> np.ndarray:
        config = StrategyConfig(rule=rule, clip_norm=limit, **more)
        return flat(combine(config, given_, tmp_path, patients, centre if rule == "centred_clip" else None))

    f = 2 if count == 9 else 1
    close = {"rtol": 1e-6, "atol": 1e-7}
    np.testing.assert_allclose(found("median"), slow_median(x), **close)
    np.testing.assert_allclose(found("trimmed_mean", byzantine=f), slow_trimmed_mean(x, f), **close)
    np.testing.assert_allclose(found("multi_krum", byzantine=f), slow_multi_krum(x, f), **close)
    np.testing.assert_allclose(found("norm_clip"), slow_norm_clip(x, list(patients.values()), limit), **close)
    alike = slow_norm_clip(x, [1] * count, limit)
    np.testing.assert_allclose(found("norm_clip", weighting="equal"), alike, **close)
    wanted = slow_centred_clip(x, flat(centre), limit, 3)
    np.testing.assert_allclose(found("centred_clip"), wanted, **close)
    assert not np.allclose(slow_centred_clip(x, np.zeros(x.shape[1]), limit, 3), wanted, rtol=1e-4)  # centre counts


def test_the_median_is_flowers(tmp_path) -> None:
    """flwr.serverapp.strategy.FedMedian over the same updates; here of models, so the change is what differs."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    given_ = updates(6)
    replies = []
    for delta in given_.values():
        question = Message(RecordDict(), 1, "train")
        question.metadata.__dict__["_message_id"] = "m"
        arrays = ArrayRecord({name: Array(delta[name].numpy()) for name in ("w", "b")})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
        replies.append(Message(content, reply_to=question))
    theirs, _ = FedMedian().aggregate_train(1, replies)
    ours = combine(StrategyConfig(rule="median"), given_, tmp_path)
    for name in ("w", "b"):
        np.testing.assert_allclose(ours[name].numpy(), theirs[name].numpy(), rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_arrival_changes_no_bit(tmp_path, rule) -> None:
    """All orders of five sites, with ties and zeros of both signs among their values."""
    given_ = updates(5)
    given_["site-00"]["b"][:] = torch.tensor([0.0, -0.0, 1, 1, -1, 0, 2])
    given_["site-01"]["b"][:] = torch.tensor([-0.0, 0.0, 1, -1, 1, -0.0, 2])
    config = StrategyConfig(rule=rule)
    patients = {site: i + 1 for i, site in enumerate(sorted(given_))}
    found = set()
    for order in itertools.islice(itertools.permutations(given_.items()), 0, 120, 7):
        result = combine(config, dict(order), tmp_path, patients)
        found.add(b"".join(result[name].numpy().tobytes() for name in SHAPES))
    assert len(found) == 1


@pytest.mark.parametrize("rule", RULES)
def test_nor_where_large_values_cancel(tmp_path, rule) -> None:
    """Two sites' huge updates cancel and tiny ones are left: here a sum in another order is another float32."""
    given_ = updates(5, scale=1e-7)
    given_["site-01"] = {name: 1e5 * value for name, value in updates(1, seed=4)["site-00"].items()}
    given_["site-03"] = {name: -value for name, value in given_["site-01"].items()}
    config = StrategyConfig(rule=rule, byzantine=0, clip_norm=9e5)
    found = set()
    for order in itertools.islice(itertools.permutations(given_.items()), 0, 120, 7):
        result = combine(config, dict(order), tmp_path)
        found.add(b"".join(result[name].numpy().tobytes() for name in SHAPES))
    assert len(found) == 1


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rule=st.sampled_from(["median", "trimmed_mean"]), f=st.integers(1, 2))
def test_arbitrary_sites_leave_each_weight_inside_the_honest_range(tmp_path_factory, data, rule, f) -> None:
    """Yin et al. 2018: f of 2 f + 1 or more values, whatever they are, cannot push a weight outside the honest ones.
    The mean, the wrong rule, is pushed out."""
    honest = updates(data.draw(st.integers(f + 1, 6)), seed=data.draw(st.integers(0, 99)))
    bad = data.draw(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=f, max_size=f))
    given_ = {**honest, **{f"bad-{i}": {k: torch.full(s, v) for k, s in SHAPES.items()} for i, v in enumerate(bad)}}
    config = StrategyConfig(rule=rule, byzantine=f)
    found = flat(combine(config, given_, tmp_path_factory.mktemp("rule")))
    x = rows(honest)
    slack = 1e-6 * np.abs(x).max()
    assert (found >= x.min(axis=0) - slack).all()
    assert (found <= x.max(axis=0) + slack).all()
    if max(map(abs, bad)) > 1e3 and abs(sum(bad)) > 1e3:
        mean = rows(given_).mean(axis=0)
        assert ((mean < x.min(axis=0)) | (mean > x.max(axis=0))).any()


@pytest.mark.parametrize("rule", RULES)
def test_one_huge_update_moves_no_robust_rule_far(tmp_path, rule) -> None:
    """Of seven sites that nearly agree one sends -1000 times its update: the result stays near the honest mean."""
    base = updates(1, seed=3)["site-00"]
    given_ = updates(7, scale=0.1)
    for update in given_.values():
        for name in SHAPES:
            update[name] += base[name]
    honest = rows(dict(list(given_.items())[1:])).mean(axis=0)
    given_["site-00"] = {name: -1000 * value for name, value in given_["site-00"].items()}
    found = flat(combine(StrategyConfig(rule=rule), given_, tmp_path))
    assert np.linalg.norm(found - honest) < 0.5 * np.linalg.norm(honest)
    assert np.linalg.norm(rows(given_).mean(axis=0) - honest) > 100 * np.linalg.norm(honest)


@pytest.mark.parametrize("rule", RULES)
def test_blocks_change_no_bit(tmp_path, monkeypatch, rule) -> None:
    """Read four weights at a time or all at once: medians and trimmed means are the same bits, the others, whose sums
    over weights are split otherwise, the same within float64's rounding."""
    given_, config = updates(5), StrategyConfig(rule=rule)
    whole = combine(config, given_, tmp_path)
    monkeypatch.setattr(robust, "BLOCK_VALUES", 20)
    split = combine(config, given_, tmp_path)
    for name in SHAPES:
        if rule in ("median", "trimmed_mean", "multi_krum"):
            assert torch.equal(whole[name], split[name])
        torch.testing.assert_close(whole[name], split[name], rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_memory_stays_below_the_stated_bound(tmp_path, rule) -> None:
    """20 sites x 400,000 weights (61 MiB in float64) are combined in the stated memory; files lie in the folder until
    the round ends, and are gone then."""
    size = 400_000
    taken = SpilledRule(StrategyConfig(rule=rule), {"w": (size,)}, tmp_path / "spilled")
    rng = np.random.default_rng(0)
    for i in range(20):
        taken.add(f"s{i}", {"w": torch.from_numpy(rng.standard_normal(size, dtype=np.float32))}, 1)
    assert sum(path.stat().st_size for path in (tmp_path / "spilled").iterdir()) == 20 * 4 * size
    tracemalloc.start()
    try:
        taken.result({})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 6 * BLOCK_VALUES * 8 + 4 * size + (12 * size if rule == "centred_clip" else 0)
    taken.close()
    assert not (tmp_path / "spilled").exists()


def test_what_a_killed_round_left_is_not_taken_up(tmp_path) -> None:
    """Files of an earlier process are no updates of this round."""
    first = SpilledRule(StrategyConfig(rule="median"), SHAPES, tmp_path / "spilled")
    for site, delta in updates(3, scale=100.0).items():
        first.add(site, delta, 1)
    SpilledRule(StrategyConfig(rule="median"), SHAPES, tmp_path / "spilled")
    assert not (tmp_path / "spilled").exists()  # its room on the disk is given back
    again = combine(StrategyConfig(rule="median"), updates(5, seed=1), tmp_path)
    np.testing.assert_allclose(flat(again), slow_median(rows(updates(5, seed=1))), rtol=1e-6)


def test_too_few_updates_and_wrong_weights_are_refused(tmp_path) -> None:
    """Below 2 f + 1 (Krum: 2 f + 3) there is no result; a site's second update or a weight below 1 does not count."""
    for rule, least in (("median", 3), ("trimmed_mean", 3), ("centred_clip", 3), ("multi_krum", 5)):
        with pytest.raises(ValueError, match=f"{least} are needed"):
            combine(StrategyConfig(rule=rule), updates(least - 1), tmp_path)
        combine(StrategyConfig(rule=rule), updates(least), tmp_path)
    taken = SpilledRule(StrategyConfig(rule="median"), SHAPES, tmp_path / "spilled")
    delta = updates(1)["site-00"]
    taken.add("a", delta, 1)
    with pytest.raises(AggregationOverflow, match="a second update"):
        taken.add("a", delta, 1)
    with pytest.raises(AggregationOverflow, match="below 1"):
        taken.add("b", delta, 0)


def test_who_was_found_out_is_borne_no_more(tmp_path) -> None:
    """Of f = 1 one was rejected: the rules work on what is left as with f = 0, and need no more than that."""
    given_ = updates(4)
    for rule, wanted in (
        ("trimmed_mean", slow_trimmed_mean(rows(given_), 0)),
        ("multi_krum", rows(given_).mean(axis=0)),
    ):
        taken = SpilledRule(StrategyConfig(rule=rule), SHAPES, tmp_path / "spilled")
        for site, delta in given_.items():
            taken.add(site, delta, 1)
        np.testing.assert_allclose(flat(taken.result({}, known=1)), wanted, rtol=1e-6, atol=1e-7)
    assert StrategyConfig(rule="multi_krum", byzantine=2).least_updates(1) == 5
    assert StrategyConfig(rule="multi_krum", byzantine=1).least_updates(7) == 3


def test_a_full_disk_is_told(tmp_path) -> None:
    """A file stands where the folder should: one line with the bytes that were due."""
    (tmp_path / "file").write_text("")
    taken = SpilledRule(StrategyConfig(rule="median"), SHAPES, tmp_path / "file" / "spilled")
    with pytest.raises(UserError, match="88 bytes were due"):
        taken.add("a", updates(1)["site-00"], 1)


def test_the_mean_is_streamed_by_patients_or_alike(tmp_path) -> None:
    """The mean keeps no update; weighted it is the fixed-point sum, alike every site counts one."""
    given_, patients = updates(3), {"site-00": 1, "site-01": 2, "site-02": 9}
    total = FixedPointSum(SHAPES)
    for site, delta in given_.items():
        total.add(delta, patients[site])
    found = combine(StrategyConfig(), given_, tmp_path, patients)
    assert all(torch.equal(found[name], value) for name, value in total.mean().items())
    assert isinstance(open_aggregate(StrategyConfig(), SHAPES, tmp_path), StreamedMean)
    alike = combine(StrategyConfig(weighting="equal"), given_, tmp_path, patients)
    np.testing.assert_allclose(flat(alike), rows(given_).mean(axis=0), rtol=1e-5, atol=1e-7)
