"""Late updates: counted once, with the weight that their staleness leaves them, in every order of arrival."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_sites import FakeSites, delta_of, put, run, say
from flwr.app import Error, Message, MessageType, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_exchange import NODES, Clock, Members, Network

from client.contract import REFUSED, arrays_to_wire
from medsegdiff.errors import UserError
from medsegdiff.strict import dump_yaml, parse_config, read_config
from medsegdiff.weights import hash_weights, initial_weights
from server import exchange
from server.aggregation import FixedPointSum
from server.checkpoints import CheckpointStore
from server.config import RunPlan, RunRequest, ScreeningConfig, StragglerConfig, StrategyConfig
from server.exchange import RunStopped
from server.journal import Journal
from server.outcome import federation_report
from server.stragglers import LateUpdates
from server.strategy import FederatedAveraging

ROUNDS = 5
SITES = tuple(NODES.values())
CARRY = StragglerConfig("carry", exponent=0.5, max_staleness=2)
Delays = dict[tuple[str, int], float]  # site, round -> seconds of its training


class SlowNetwork(Network):
    """Every node answers as a fake site, a training so many seconds after it was asked."""

    def __init__(self, plan: RunPlan, clock: Clock, delays: Delays) -> None:
        super().__init__()
        self.clock, self.delays, self.sites = clock, delays, FakeSites(plan)
        self.began: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.delivered: list[tuple[str, int, float]] = []  # what the server has fetched: site, round, when
        self.spoil: Callable[[str, int, RecordDict], RecordDict | Error] = lambda site, round_, content: content
        for name in SITES:
            self[name].answer = lambda m, name=name: self.sites.content(name, m.metadata.message_type, m)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = super().push_messages(messages)
        self.began |= dict.fromkeys(ids, self.clock.now)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        (message_id,) = ids
        message = self.sent[message_id]
        site = self.nodes[message.metadata.dst_node_id].name
        if message.metadata.message_type != MessageType.TRAIN:
            return super().pull_messages([message_id])
        round_ = int(message.metadata.group_id)
        if self.clock.now < self.began[message_id] + self.delays.get((site, round_), 0.0):
            return []
        self.delivered.append((site, round_, self.clock.now))
        self.ended[message_id] = self.clock.now
        good = self.sites.content(site, MessageType.TRAIN, message)
        return [Message(self.spoil(site, round_, good), reply_to=message)]


@dataclass
class Scene:
    """One run over a slow network, which may be taken up again."""

    folder: Path
    plan: RunPlan
    clock: Clock
    network: SlowNetwork
    members: Members
    stop: list[bool]

    def start(self) -> None:
        journal = Journal(self.folder / "journal.jsonl")
        store = CheckpointStore(self.folder / "checkpoints")
        strategy = FederatedAveraging(self.plan, store, journal, self.members, lambda: self.stop[0])  # type: ignore[arg-type]
        begin = arrays_to_wire(initial_weights(self.plan.task.model, self.plan.task.seed))
        strategy.start(self.network, begin, self.plan.task.rounds)  # type: ignore[arg-type]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in Journal(self.folder / "journal.jsonl").events if e["event"] == kind]

    def rounds(self) -> list[dict[str, Any]]:
        return [e for e in self.events("round") if e["round"]]

    def model(self) -> dict[str, torch.Tensor]:
        found = CheckpointStore(self.folder / "checkpoints").latest(self.plan.run_id)
        assert found is not None
        return found.weights


@pytest.fixture
def slow(make_run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scene]:
    """Call with delays and changes of the plan, as often as wanted; time passes when somebody sleeps."""

    def make(delays: Delays, **changes: Any) -> Scene:
        settings_ = {
            "quorum": 1, "deadline_seconds": 10.0, "absence_seconds": 2.0, "stragglers": CARRY,
            "evaluate_every": ROUNDS, "screening": ScreeningConfig(norm_factor=None), "task": {"rounds": ROUNDS},
        }  # fmt: skip
        folder = make_run(Path(tempfile.mkdtemp()).name, **(settings_ | changes))
        plan, clock = read_config(folder / "run.yaml", RunPlan), Clock()
        monkeypatch.setattr(exchange, "time", clock)
        return Scene(folder, plan, clock, SlowNetwork(plan, clock, delays), Members(), [False])

    return make


def counted(rounds: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Site and round of every update that counted, in time or late."""
    own = [(site, event["round"]) for event in rounds for site in event["accepted"]]
    return own + [(row["site"], row["round"]) for event in rounds for row in event.get("late", [])]


def overlapping(network: SlowNetwork, most: int) -> list[tuple[str, int, int]]:
    """Site and rounds of questions to train that were put while an earlier one, that would have counted, was open."""
    found = []
    for site in SITES:
        own = [
            (int(m.metadata.group_id), number)
            for number, m in network.sent.items()
            if network.nodes[m.metadata.dst_node_id].name == site and m.metadata.message_type == MessageType.TRAIN
        ]
        for (first, one), (second, other) in pairwise(own):
            if second - first <= most and network.ended.get(one, float("inf")) > network.began[other]:
                found.append((site, first, second))
    return found


def by_the_slow_way(plan: RunPlan, rounds: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Each round's mean from its record, the weights written out as products, in float64."""
    weights = initial_weights(plan.task.model, plan.task.seed)
    for event in rounds:
        terms = [(float(plan.roster[site]), site, event["round"]) for site in event["accepted"]]
        for row in event.get("late", []):
            lateness, weight = event["round"] - row["round"], float(plan.roster[row["site"]])
            terms.append((weight / (1.0 + lateness) ** plan.stragglers.exponent, row["site"], row["round"]))
        deltas = [delta_of(site, round_, plan.task) for _, site, round_ in terms]
        for name, value in weights.items():
            mean = sum(w * d[name].double() for (w, _, _), d in zip(terms, deltas, strict=True))
            weights[name] = (value.double() + mean / sum(w for w, _, _ in terms)).float()
    return weights


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=3e-6, atol=3e-8)


seconds = st.sampled_from([0.0, 0.0, 3.0, 9.0, 11.0, 14.0, 25.0, 45.0])
all_delays = st.fixed_dictionaries({(site, n): seconds for site in SITES for n in range(1, ROUNDS + 1)})
quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.slow
@quick
@given(delays=all_delays, exponent=st.sampled_from([0.0, 0.5, 2.0]), most=st.integers(1, 3))
def test_every_update_that_comes_in_time_to_count_counts_once(slow, delays, exponent, most) -> None:
    """Whatever came while its round or one of the next `most` was open is in exactly one record; nothing is in two; no
    site was asked a second question while it worked on one that would count; the model is the slow way's."""
    s = slow(delays, stragglers=StragglerConfig("carry", exponent, most))
    s.start()
    rounds = s.rounds()
    found = Counter(counted(rounds))
    assert set(found.values()) == {1}
    assert set(found) <= {(site, n) for site, n, _ in s.network.delivered}
    last_train = max(n for _, n in found)
    assert last_train == ROUNDS
    assert set(found) == {(site, n) for site, n, _ in s.network.delivered}, "what was fetched counts"
    assert all(1 <= e["round"] - row["round"] <= most for e in rounds for row in e.get("late", []))
    assert overlapping(s.network, most) == []
    assert_close(s.model(), by_the_slow_way(s.plan, rounds))


@pytest.mark.slow
@quick
@given(delays=all_delays, after=st.floats(1.0, 60.0), sessions=st.integers(1, 3))
def test_a_server_that_is_started_anew_counts_none_twice(slow, delays, after, sessions) -> None:
    """Stopped at any moment, up to three times: what it had counted stays, nothing counts again."""
    s = slow(delays)
    for _ in range(sessions):
        s.stop[0] = False
        s.clock.after(after, lambda: s.stop.__setitem__(0, True))
        try:
            s.start()
            break
        except RunStopped:
            pass
    s.stop[0] = False
    s.clock.plans.clear()
    s.start()
    rounds = s.rounds()
    assert [event["round"] for event in rounds] == list(range(1, ROUNDS + 1))
    assert set(Counter(counted(rounds)).values()) == {1}
    assert_close(s.model(), by_the_slow_way(s.plan, rounds))


ELM_IS_LATE: Delays = {("elm", 1): 14.0}  # round one ends at 10 s


def test_a_late_update_counts_in_the_round_that_is_open(slow) -> None:
    """Round one is without elm, round two has elm's update of round one at 1 / sqrt 2; journal, audit, report tell."""
    s = slow(ELM_IS_LATE | {("alder", 2): 8.0})
    s.start()
    first, second = s.rounds()[:2]
    assert (sorted(first["accepted"]), first["absent"]) == (["alder", "birch"], ["elm"])
    (row,) = second["late"]
    assert (row["site"], row["round"], row["staleness"]) == ("elm", 1, 1)
    assert row["share"] == pytest.approx(2**-0.5)
    assert row["delta"] == hash_weights(delta_of("elm", 1, s.plan.task))
    assert sorted(second["accepted"]) == list(SITES), "back again, elm is asked for the round's own update"
    notes = [n for n in s.members.notes if n["event"] == "update" and n["site"] == "elm" and n["round"] == 1]
    assert [n["decision"] for n in notes] == ["accepted late, in round 2"]
    report = federation_report(s.plan, Journal(s.folder / "journal.jsonl").events)
    assert report["sites"]["elm"]["late_rounds"] == [{"round": 1, "counted": 2}]
    assert report["sites"]["elm"]["absent_rounds"] == [1]


def test_a_site_that_works_is_neither_asked_nor_waited_for(slow) -> None:
    """elm needs 25 s for round one: rounds two and three go on in seconds without it, and say so."""
    s = slow({("elm", 1): 25.0})
    s.start()
    rounds = s.rounds()
    assert [event.get("working", []) for event in rounds[:2]] == [[], ["elm"]]
    assert rounds[1]["absent"] == []
    assert "elm" not in rounds[1]["accepted"]
    assert overlapping(s.network, CARRY.max_staleness) == []


def test_two_copies_of_one_update_count_once(slow) -> None:
    """elm's line breaks in round one and it is asked again: both questions are answered in round two, alike."""
    s = slow({("elm", 1): 14.0, ("alder", 2): 9.0, ("elm", 2): 60.0})
    s.clock.after(3.0, lambda: setattr(s.network["elm"], "activation", "t1"))
    s.start()
    assert [(site, n) for site, n, _ in s.network.delivered].count(("elm", 1)) == 2
    assert counted(s.rounds()).count(("elm", 1)) == 1
    assert_close(s.model(), by_the_slow_way(s.plan, s.rounds()))


def test_a_site_that_was_started_anew_works_on_nothing(slow) -> None:
    """elm's process dies in round two over round one's question, and comes back: it is asked round two's at once."""
    s = slow({("elm", 1): 60.0, ("alder", 2): 9.0})
    s.clock.after(13.0, lambda: setattr(s.network["elm"], "activation", "t1"))
    s.start()
    assert "elm" in s.rounds()[1]["accepted"]


def test_what_counted_in_its_own_round_or_was_rejected_there_is_not_wanted(slow) -> None:
    """Nor what is too late, of the round itself, of one to come, or of a round that never was."""
    s = slow({("elm", 1): 60.0})
    s.start()
    late = LateUpdates(CARRY, s.folder / "late", Journal(s.folder / "journal.jsonl"))
    late.begin(ROUNDS + 1, None)  # type: ignore[arg-type]
    accepted = {(site, e["round"]) for e in s.rounds() for site in e["accepted"]}
    for site in SITES:
        for n in range(ROUNDS + 3):
            assert late.is_wanted(site, n) == (n in (ROUNDS - 1, ROUNDS) and (site, n) not in accepted)
    assert not late.is_wanted("alder", ROUNDS)


def test_what_is_too_late_is_dropped_and_the_site_asked_anew(slow) -> None:
    """elm needs a minute: after two rounds nobody waits for round one's update any more, and round four asks it."""
    s = slow({("elm", 1): 60.0}, task={"rounds": 6})
    s.start()
    rounds = s.rounds()
    assert not any(event.get("late") for event in rounds)
    assert "elm" in rounds[3]["accepted"]


def test_dropped_is_the_default_and_leaves_nothing_with_the_superlink(slow) -> None:
    """elm's answer to round one is fetched when it comes, and counts nowhere; records are as they were before."""
    s = slow(ELM_IS_LATE | {("alder", 2): 8.0}, stragglers=StragglerConfig())
    s.start()
    assert ("elm", 1) in {(site, n) for site, n, _ in s.network.delivered}
    assert ("elm", 1) not in counted(s.rounds())
    assert not any({"late", "working"} & set(event) for event in s.rounds())
    assert not (s.folder / "late").exists()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (say(round=2), "for round '2', not '1'"),
        (say(base_hash="0" * 64), "for base model '000"),
        (put(float("nan")), "not finite"),
        (say(patients=99), "claims 99 training patients"),
    ],
)
def test_a_late_update_is_screened_by_its_own_round(slow, spoil, reason) -> None:
    """Another round's name, another base, nonsense: left out with the reason, and a strike; the round goes on."""
    s = slow({("elm", 1): 14.0, ("elm", 2): 60.0, ("alder", 2): 8.0})
    s.network.spoil = lambda site, n, good: spoil(good) if (site, n) == ("elm", 1) else good
    s.start()
    second = s.rounds()[1]
    assert not second.get("late")
    assert "its late update of round 1" in second["rejected"]["elm"]
    assert reason in second["rejected"]["elm"]
    assert second["strikes"] == {"elm": 1}


def test_the_norm_limit_is_its_own_rounds(slow) -> None:
    """Round one's limit is far above round two's: elm's large first update counts late, as it would have in time."""

    def large(content: RecordDict) -> RecordDict:
        delta = {name: 3 * value for name, value in delta_of("elm", 1, s.plan.task).items()}
        return say(delta_hash=hash_weights(delta))(RecordDict(dict(content) | {"delta": arrays_to_wire(delta)}))

    s = slow(ELM_IS_LATE | {("alder", 2): 8.0}, screening=ScreeningConfig(norm_factor=2.0, first_norm=100.0))
    s.network.spoil = lambda site, n, good: large(good) if (site, n) == ("elm", 1) else good
    s.start()
    assert [row["site"] for row in s.rounds()[1]["late"]] == ["elm"]


def test_a_refusal_that_comes_late_is_nothing(slow) -> None:
    """No update, no rejection."""
    s = slow(ELM_IS_LATE | {("alder", 2): 8.0})
    s.network.spoil = lambda site, n, good: Error(REFUSED, "fault: ...") if (site, n) == ("elm", 1) else good
    s.start()
    assert not s.rounds()[1].get("late")
    assert s.rounds()[1]["rejected"] == {}


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_repeated_round_counts_what_it_counted(slow, damaged) -> None:
    """The newest checkpoints are damaged; elm's update of round one is not asked for again: it lies on the disk."""
    s = slow({("elm", 1): 14.0, ("alder", 2): 8.0}, task={"rounds": 3})
    s.start()
    before, whole = s.rounds(), hash_weights(s.model())
    for path in sorted((s.folder / "checkpoints").glob("round-*"))[-damaged:]:
        path.write_bytes(path.read_bytes()[:-1])
    s.start()
    assert hash_weights(s.model()) == whole
    for event in s.rounds()[len(before) :]:
        first = before[event["round"] - 1]
        assert event.get("late") == first.get("late")


def test_a_repeated_round_whose_late_update_is_gone_is_not_committed(slow) -> None:
    """One line names the file; the rounds that stand are kept."""
    s = slow({("elm", 1): 14.0, ("alder", 2): 8.0}, task={"rounds": 2})
    s.start()
    newest = max((s.folder / "checkpoints").glob("round-*"))
    newest.write_bytes(newest.read_bytes()[:-1])
    (kept,) = (s.folder / "late").glob("*/*")
    assert kept.parent.name == "round-000002"
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(UserError, match="counted this late update of elm"):
        s.start()
    assert len(s.rounds()) == 2


def test_what_no_repetition_needs_is_deleted(slow) -> None:
    """Three checkpoints are kept, and the late updates of as many rounds."""
    s = slow(ELM_IS_LATE | {("alder", 2): 8.0})
    s.start()
    assert s.rounds()[1]["late"]
    assert not list((s.folder / "late").glob("*/*"))


updates = st.lists(
    st.tuples(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), st.integers(1, 1000), st.integers(0, 3)),
    min_size=1,
    max_size=4,
)


@given(updates, st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_parts_of_weights_add_up_in_any_order(found, exponent) -> None:
    """Bit for bit in every order, and to 2**-20 of a weight the exact mean in fractions."""
    shares = [(1 + s) ** -exponent for _, _, s in found]
    means = set()
    for order in permutations(range(len(found))):
        total = FixedPointSum({"w": (3,)})
        for index in order:
            total.add({"w": torch.tensor(found[index][0])}, found[index][1], shares[index])
        means.add(total.mean()["w"].numpy().tobytes())
    assert len(means) == 1
    weights = [Fraction(n) * Fraction(share) for (_, n, _), share in zip(found, shares, strict=True)]
    for place in range(3):
        values = [Fraction(float(torch.tensor(v)[place])) for v, _, _ in found]
        exact = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        assert abs(float(total.mean()["w"][place]) - float(exact)) < 1e-4


def test_a_whole_weight_gives_the_bits_it_gave(make_run) -> None:
    """Runs without late updates are as they were: a share of 1 and none are one."""
    one, other = FixedPointSum({"w": (3,)}), FixedPointSum({"w": (3,)})
    one.add({"w": torch.tensor([0.1, -0.2, 0.3])}, 7)
    other.add({"w": torch.tensor([0.1, -0.2, 0.3])}, 7, 1.0)
    assert torch.equal(one.mean()["w"], other.mean()["w"])
    folder, carried = make_run("plain"), make_run("carried", stragglers=CARRY)
    run(folder)
    run(carried)
    assert (folder / "model.safetensors").read_bytes() == (carried / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stragglers": {"policy": "wait"}}, "stragglers.policy"),
        ({"stragglers": {"policy": "carry", "exponent": -1}}, "exponent must lie in 0..10, found -1"),
        ({"stragglers": {"policy": "carry", "max_staleness": 0}}, "max_staleness must lie in 1..100 rounds, found 0"),
        ({"stragglers": {"policy": "carry"}, "strategy": {"rule": "median"}}, "second vote in a round"),
        ({"stragglers": {"policy": "carry"}, "compression": {"kind": "int8"}}, "would count twice"),
    ],
)
def test_what_does_not_go_with_late_updates_is_refused(changes, message) -> None:
    """With the reason, as the file is read."""
    with pytest.raises(UserError) as caught:
        parse_config({"rounds": 2, "local_steps": 3} | changes, RunRequest, "RUN.yaml")
    assert message in str(caught.value)


def test_the_policy_is_part_of_the_run(tiny_task) -> None:
    """Where it is not the default; the report's settings tell it."""
    plan = RunPlan("tiny", "tiny", StrategyConfig(), dict.fromkeys(SITES, 1), tiny_task)
    ids = {replace(plan, stragglers=s).run_id for s in (StragglerConfig(), CARRY, replace(CARRY, exponent=1.0))}
    assert len(ids) == 3
    assert replace(plan, stragglers=StragglerConfig()).run_id == plan.run_id
    assert replace(plan, stragglers=CARRY).stated()["stragglers_policy"] == "carry"
    parsed = parse_config(dump_yaml_back(replace(plan, stragglers=CARRY)), RunPlan, "run.yaml")
    assert parsed.stragglers == CARRY


def dump_yaml_back(plan: RunPlan) -> Any:
    import yaml

    return yaml.safe_load(dump_yaml(plan))
