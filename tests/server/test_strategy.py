"""Rounds over the in-process engine: the arithmetic, who is left out, what is kept, how a run goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from fake_sites import FakeSites, delta_of, on, put, run, say
from flwr.app import Error, Message, MessageType, RecordDict
from torch import Tensor

from client.contract import arrays_to_wire
from medsegdiff.errors import UserError
from medsegdiff.strict import read_config
from medsegdiff.weights import hash_weights, initial_weights, load_model
from server.checkpoints import CheckpointStore
from server.config import RunPlan, ScreeningConfig, SelectionConfig, StrategyConfig
from server.journal import Journal

ALL = {"alder": 3, "birch": 2, "elm": 1}


def final(folder: Path) -> dict[str, Tensor]:
    return dict(load_model(folder / "model.safetensors").network.state_dict())


def plan_of(folder: Path) -> RunPlan:
    return read_config(folder / "run.yaml", RunPlan)


def by_hand(plan: RunPlan, rounds: list[dict[str, int]]) -> dict[str, Tensor]:
    """FedAvg in float64, the weights rounded to float32 once a round."""
    weights = initial_weights(plan.task.model, plan.task.seed)
    for number, roster in enumerate(rounds, start=1):
        deltas = {site: delta_of(site, number, plan.task) for site in roster}
        for name, value in weights.items():
            mean = sum(n * deltas[site][name].double() for site, n in roster.items()) / sum(roster.values())
            weights[name] = (value.double() + mean).float()
    return weights


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=3e-7, atol=3e-8)


def events(folder: Path, kind: str) -> list[dict]:
    return [event for event in Journal(folder / "journal.jsonl").events if event["event"] == kind]


def test_rounds_equal_federated_averaging_by_hand(make_run) -> None:
    """Two rounds, three sites of 3, 2 and 1 patients; every round scored; checkpoints 0, 1 and 2."""
    folder = make_run()
    sites = run(folder)
    assert_close(final(folder), by_hand(plan_of(folder), [ALL, ALL]))
    assert [event["round"] for event in events(folder, "round")] == [0, 1, 2]
    assert [event["round"] for event in events(folder, "scores")] == [1, 2]
    assert len(list((folder / "checkpoints").iterdir())) == 3
    assert [kind for _, kind in sites.asked].count(MessageType.QUERY) == 3


def test_the_order_of_the_sites_changes_no_bit(make_run) -> None:
    """The same sites on other nodes give the same model file."""
    first, second = make_run("first"), make_run("second")
    run(first)
    run(second, names=["elm", "alder", "birch"])
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


BAD = {
    "an error": (lambda content: Error(100, "no"), "a fault (code 100): the site could not answer"),
    "another round": (say(round=7), "for round '7'"),
    "too many patients": (say(patients=3), "claims 3 training patients, 2 are enrolled"),
    "NaN": (put(math.nan), "not finite"),
    "an extra array": (put(0.0, "x"), "it holds 2 arrays"),
    "an overflow": (put(3e38), "is taken in this round"),
    "a change too large": (put(0.1), "is taken in this round"),
    "an endless loss": (say(loss=1e308), "loss must lie in"),
    "nothing": (lambda content: RecordDict(), "holds the records []"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_site_is_left_out_by_name_and_the_others_go_on(make_run, kind) -> None:
    """The model is FedAvg over the other two sites; journal and record name the site and the reason."""
    change, reason = BAD[kind]
    folder = make_run(quorum=2, task={"rounds": 1})
    run(folder, {"birch": on(MessageType.TRAIN, change)})
    assert_close(final(folder), by_hand(plan_of(folder), [{"alder": 3, "elm": 1}]))
    rejected = events(folder, "rejected")
    assert [(event["round"], event["site"]) for event in rejected] == [(1, "birch")]
    assert reason in rejected[0]["reason"]
    assert events(folder, "round")[-1]["rejected"] == {"birch": rejected[0]["reason"]}


def test_a_site_that_raises_is_left_out(make_run) -> None:
    """An exception inside a site is the site's alone."""

    def crash(question: Message, good: Message) -> Message:
        if question.metadata.message_type == MessageType.TRAIN:
            raise MemoryError("secret path")
        return good

    folder = make_run(quorum=2, task={"rounds": 1})
    run(folder, {"elm": crash})
    assert events(folder, "rejected")[0]["reason"] == "the site reported a fault (code 101): MemoryError"
    assert_close(final(folder), by_hand(plan_of(folder), [{"alder": 3, "birch": 2}]))


def test_below_the_quorum_the_last_round_is_kept_and_the_run_goes_on_later(make_run) -> None:
    """Round 2 fails with a line that names site, reason and remedy; mended, the run ends as if nothing had been."""
    folder, whole = make_run(), make_run("whole")
    run(whole)
    broken = on(MessageType.TRAIN, lambda content: Error(100, "no"))

    def only_in_round_two(question: Message, good: Message) -> Message:
        return broken(question, good) if question.metadata.group_id == "2" else good

    with pytest.raises(UserError) as caught:
        run(folder, {"birch": only_in_round_two})
    assert "round 2: 2 of 3 sites gave a usable update, the quorum is 3: birch was rejected" in str(caught.value)
    assert "Rounds up to 1 are kept" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert not (folder / "model.safetensors").exists()
    assert CheckpointStore(folder / "checkpoints").latest(plan_of(folder).run_id).round == 1
    sites = run(folder)
    assert [kind for _, kind in sites.asked].count(MessageType.TRAIN) == 3
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_site_that_does_not_introduce_itself_is_absent(make_run) -> None:
    """Refused at the door: the others go on, the round's record names it; with a quorum of all it is an error."""
    refuse = {"elm": on(MessageType.QUERY, lambda content: Error(100, "no"))}
    folder = make_run(quorum=2, task={"rounds": 1})
    run(folder, refuse)
    assert events(folder, "round")[-1]["absent"] == ["elm"]
    assert "code 100" in events(folder, "stranger")[0]["reason"]
    with pytest.raises(UserError, match="elm did not introduce itself"):
        run(make_run("strict"), refuse)


def test_strangers_and_doubles_have_no_say(make_run) -> None:
    """A name off the roster, and a name that is here already, are told and left out."""
    folder = make_run(task={"rounds": 1})
    plan = plan_of(folder)
    names = [*plan.roster, "mallory", "alder"]
    plan.roster["mallory"] = 1  # known to the fake sites, not to the plan on disk
    sites = FakeSites(plan)
    sites.names = names
    from server.app import app
    from simulations.inline import run_inline

    run_inline(app, sites, len(names), folder)
    reasons = {event["reason"] for event in events(folder, "stranger")}
    assert any("'mallory' is not on the roster" in reason for reason in reasons)
    assert any("'alder' is here twice" in reason for reason in reasons)
    assert_close(final(folder), by_hand(plan_of(folder), [ALL]))


def test_hostile_scores_do_not_end_the_run(make_run) -> None:
    """Scores of a target that does not exist are left out by name; the others' are kept."""

    def change(content: RecordDict) -> RecordDict:
        record = content.config_records["scores"]
        record["json"] = str(record["json"]).replace("lesion", "<script>")
        return content

    folder = make_run(task={"rounds": 1})
    run(folder, {"alder": on(MessageType.EVALUATE, change)})
    assert set(events(folder, "scores")[-1]["sites"]) == {"birch", "elm"}
    assert "<script>" in events(folder, "rejected")[0]["reason"]


@pytest.mark.parametrize(("every", "scored"), [(1, [1, 2, 3]), (2, [2, 3]), (9, [3])])
def test_how_often_the_model_is_scored(make_run, every, scored) -> None:
    """Every so many rounds, and always after the last."""
    folder = make_run(evaluate_every=every, task={"rounds": 3})
    run(folder)
    assert [event["round"] for event in events(folder, "scores")] == scored


@pytest.mark.parametrize("damage", ["journal", "checkpoint", "model"])
def test_a_run_goes_on_after_damage(make_run, damage) -> None:
    """A torn journal line, a torn newest checkpoint, a lost model: the run ends with the same bytes."""
    folder = make_run()
    run(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    if damage == "journal":
        journal = folder / "journal.jsonl"
        lines = journal.read_bytes().split(b"\n")
        last = next(n for n, line in enumerate(lines) if b'"event": "round"' in line and b'"round": 2' in line)
        journal.write_bytes(b"\n".join(lines[:last]) + b"\n" + lines[last][:20])  # the last round was never told
    if damage == "checkpoint":
        newest = max((folder / "checkpoints").iterdir())
        newest.write_bytes(newest.read_bytes()[:-1])
    sites = run(folder)
    assert (folder / "model.safetensors").read_bytes() == whole
    assert [kind for _, kind in sites.asked].count(MessageType.TRAIN) == (3 if damage == "checkpoint" else 0)
    assert [kind for _, kind in sites.asked].count(MessageType.EVALUATE) == (3 if damage == "journal" else 0)
    assert {event["round"] for event in events(folder, "round")} == {0, 1, 2}
    assert events(folder, "round")[-1]["model_hash"] == hash_weights(final(folder))


def damage_newest(folder: Path, number: int) -> None:
    for path in sorted((folder / "checkpoints").iterdir())[-number:]:
        path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("number", [1, 2])
def test_a_repeated_round_is_made_by_the_same_sites(make_run, number) -> None:
    """elm, left out when the rounds were committed, has no say when damage has them repeated: the same bytes."""
    folder = make_run(task={"rounds": 3}, quorum=2)
    run(folder, {"elm": on(MessageType.TRAIN, say(round=99))})
    whole = (folder / "model.safetensors").read_bytes()
    damage_newest(folder, number)
    run(folder)
    assert (folder / "model.safetensors").read_bytes() == whole
    told = [(event["round"], event["model_hash"]) for event in events(folder, "round")]
    assert len(set(told)) == 4
    assert len(told) == 4 + number


def test_a_repeated_round_that_comes_out_otherwise_is_not_committed(make_run) -> None:
    """A committed round's model never changes: what sites have trained since stands on it."""
    folder = make_run()
    run(folder)
    damage_newest(folder, 1)
    with pytest.raises(UserError, match="it comes out as"):
        run(folder, {"birch": on(MessageType.TRAIN, put(1e-3))})
    assert len(events(folder, "round")) == 3
    assert CheckpointStore(folder / "checkpoints").latest(plan_of(folder).run_id).round == 1


TOO_LARGE = {"birch": on(MessageType.TRAIN, put(0.1))}  # its norm is twenty times what round one takes


def test_a_site_rejected_three_times_in_a_row_is_suspended(make_run) -> None:
    """birch is asked in rounds 1 to 3, then no more; a restart forgets nothing; journal and record name it once."""
    folder = make_run(quorum=2, task={"rounds": 5})
    sites = run(folder, TOO_LARGE)
    assert [site for site, kind in sites.asked if kind == MessageType.TRAIN].count("birch") == 3
    assert [(e["round"], e["site"], e["strikes"]) for e in events(folder, "suspended")] == [(3, "birch", 3)]
    rounds = events(folder, "round")
    assert [e.get("strikes", {}) for e in rounds] == [{}, {"birch": 1}, {"birch": 2}, {}, {}, {}]
    assert [e.get("suspended", []) for e in rounds] == [[], [], [], ["birch"], ["birch"], ["birch"]]
    assert [e["absent"] for e in rounds[1:]] == [[]] * 5
    whole = (folder / "model.safetensors").read_bytes()
    damage_newest(folder, 1)
    again = run(folder, TOO_LARGE)
    assert "birch" not in {site for site, kind in again.asked if kind != MessageType.QUERY}
    assert (folder / "model.safetensors").read_bytes() == whole
    assert len(events(folder, "suspended")) == 1


def test_an_accepted_update_wipes_the_strikes_out(make_run) -> None:
    """Two bad rounds, a good one, two bad ones: never three in a row."""
    bad = on(MessageType.TRAIN, put(0.1))

    def but_in_round_three(question: Message, good: Message) -> Message:
        return good if question.metadata.group_id == "3" else bad(question, good)

    folder = make_run(quorum=2, task={"rounds": 5})
    run(folder, {"birch": but_in_round_three})
    assert [e.get("strikes", {}) for e in events(folder, "round")][1:] == [
        {"birch": 1}, {"birch": 2}, {}, {"birch": 1}, {"birch": 2}
    ]  # fmt: skip
    assert not events(folder, "suspended")


@pytest.mark.parametrize("number", [1, 2])
def test_a_repeated_round_strikes_as_it_did(make_run, number) -> None:
    """The rounds after which birch is suspended are repeated: counts and suspension come out the same, told once."""
    folder = make_run(quorum=2, task={"rounds": 3})
    run(folder, TOO_LARGE)
    before = events(folder, "round")
    damage_newest(folder, number)
    run(folder, TOO_LARGE)
    for event in events(folder, "round")[len(before) :]:
        first = next(e for e in before if e["round"] == event["round"])
        for key in ("model_hash", "strikes", "suspends", "suspended"):
            assert event.get(key) == first.get(key)
    assert len(events(folder, "suspended")) == 1


def test_the_norm_limit_comes_from_the_last_committed_round(make_run) -> None:
    """Twice the median of the round before: a fourfold update passes in round one and is out in round two, the same
    after a restart between the two."""

    def fourfold(content: RecordDict) -> RecordDict:
        delta = {name: 4 * value for name, value in delta_of("birch", 2, TASK[0]).items()}
        changed = RecordDict(dict(content) | {"delta": arrays_to_wire(delta)})
        return say(delta_hash=hash_weights(delta))(changed)

    def in_round_two(question: Message, good: Message) -> Message:
        return on(MessageType.TRAIN, fourfold)(question, good) if question.metadata.group_id == "2" else good

    TASK = []
    for name, damaged in (("whole", False), ("restarted", True)):
        folder = make_run(name, quorum=2, screening=ScreeningConfig(norm_factor=2.0))
        TASK[:] = [plan_of(folder).task]
        run(folder, {"birch": in_round_two})
        if damaged:
            damage_newest(folder, 1)
            run(folder, {"birch": in_round_two})
        norms = sorted(row["norm"] for row in events(folder, "round")[1]["accepted"].values())
        reason = events(folder, "rejected")[0]["reason"]
        assert [(e["round"], e["site"]) for e in events(folder, "rejected")][:1] == [(2, "birch")]
        assert f"at most {2 * norms[1]:.3g}" in reason


SERVERS = {
    "fedavgm": StrategyConfig("fedavgm", beta_1=0.5),
    "fedadam": StrategyConfig("fedadam", server_learning_rate=0.01),
    "fedyogi": StrategyConfig("fedyogi", server_learning_rate=0.01, ema=0.5),
    "fedavg of equals": StrategyConfig(weighting="equal", server_learning_rate=0.5),
    "median": StrategyConfig(rule="median"),
    "centred clipping": StrategyConfig(rule="centred_clip"),
    "average": StrategyConfig(ema=0.9),
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "fedyogi" else pytest.param(kind, marks=pytest.mark.slow) for kind in SERVERS]
)
def test_a_run_that_goes_on_ends_with_the_same_bytes_whatever_the_server_remembers(make_run, kind) -> None:
    """Stopped after round 2 with its newest checkpoint damaged, on other nodes: the uninterrupted run's model file."""
    whole, broken = make_run("whole", strategy=SERVERS[kind], task={"rounds": 4}), None
    run(whole)
    broken = make_run("broken", strategy=SERVERS[kind], task={"rounds": 4})
    fail = on(MessageType.TRAIN, lambda content: Error(100, "no"))

    def in_round_three(question: Message, good: Message) -> Message:
        return fail(question, good) if question.metadata.group_id == "3" else good

    with pytest.raises(UserError):
        run(broken, {"elm": in_round_three})
    damage_newest(broken, 1)
    run(broken, names=["elm", "alder", "birch"])
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (broken / "spilled").exists()
    plain_run = make_run("plain", task={"rounds": 4})
    run(plain_run)
    assert (plain_run / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()


def test_the_average_is_what_is_scored_and_handed_out(make_run) -> None:
    """Sites train on the last model and score the average over rounds, whose hash the record names."""
    folder = make_run(strategy=StrategyConfig(ema=0.9), task={"rounds": 3})
    run(folder)
    told = events(folder, "round")[-1]
    assert told["released"] == hash_weights(final(folder)) == events(folder, "scores")[-1]["model_hash"]
    assert told["released"] != told["model_hash"]
    models = [by_hand(plan_of(folder), [ALL] * n) for n in (1, 2, 3)]
    mean = {name: sum(m[name].double() for m in models).float() / 3 for name in models[0]}  # the average's start
    assert_close(final(folder), mean)


def scoring(dice: dict[int, float]) -> dict:
    """alder scores so in each round; the others 0.5."""

    def change(question: Message, good: Message) -> Message:
        if question.metadata.message_type != MessageType.EVALUATE:
            return good
        record = good.content.config_records["scores"]
        value = dice[int(question.metadata.group_id)]
        said = json.loads(str(record["json"])) | {"dice": value, "dice_by_target": {"lesion": value}}
        record["json"] = json.dumps(said)
        return good

    return {"alder": change}


@pytest.mark.parametrize("restart", [False, True])
def test_the_best_round_is_handed_out_and_a_run_without_progress_ends(make_run, restart) -> None:
    """The worst site's Dice is best after round 2; two scored rounds later the run ends, of 9; so also if restarted."""
    selection = SelectionConfig("worst", patience=2)
    folder = make_run(selection=selection, task={"rounds": 9})
    spoil = scoring({1: 0.1, 2: 0.4, 3: 0.3, 4: 0.4, 5: 0.49} | dict.fromkeys(range(6, 10), 0.45))
    run(folder, spoil)
    if restart:
        (folder / "model.safetensors").unlink()
        run(folder, spoil)
    assert [e["round"] for e in events(folder, "round")] == [0, 1, 2, 3, 4]
    assert_close(final(folder), by_hand(plan_of(folder), [ALL, ALL]))
    told = events(folder, "selected")[-1]
    assert (told["round"], told["by"], told["rounds"]) == (2, "worst", 4)
    assert told["model_hash"] == hash_weights(final(folder))
    assert len(events(folder, "selected")) == 1
    assert not list(folder.glob("spilled"))
