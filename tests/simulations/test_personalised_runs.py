"""Federations in which a part of the model, or a second model, is each site's own: against the slow way by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import MessageType, RecordDict
from torch import Tensor, nn

from client.contract import Assignment, TrainTask, arrays_to_wire
from client.personalisation import DECODER, ENCODER, Personalisation, sent_shapes
from client.site import Site, open_site
from client.training import make_trainer, train_round
from medsegdiff.config import preset
from medsegdiff.network import MedSegDiff
from medsegdiff.strict import read_config
from medsegdiff.weights import build, hash_weights, initial_weights, load_model, weight_shapes
from server.config import RunPlan
from server.journal import Journal
from server.outcome import federation_report
from simulations.simulate import simulate
from tests.conftest import SITES as PATIENTS
from tests.fake_sites import on, say
from tests.watched_sites import Sites

Weights = dict[str, Tensor]
SPLIT = [Personalisation("local_norms"), Personalisation("shared_encoder")]
DITTO, TUNED = Personalisation("ditto", pull=0.3, steps=3), Personalisation("fine_tune", steps=3)
ALL = [*SPLIT, DITTO, TUNED]
REJECTED = on(MessageType.TRAIN, say(patients=10**6))


def kind(value: object) -> str:
    return value.kind if isinstance(value, Personalisation) else str(value)


def plan_of(tmp_path: Path, name: str) -> RunPlan:
    return read_config(tmp_path / "runs" / name / "run.yaml", RunPlan)


def sites_of(tmp_path: Path, name: str) -> dict[str, Site]:
    return {path.parent.name: open_site(path) for path in sorted((tmp_path / f"world-{name}").glob("*/site.yaml"))}


def common(tmp_path: Path, name: str) -> Weights:
    found: Weights = load_model(tmp_path / "runs" / name / "model.safetensors").network.state_dict()
    return found


def own(tmp_path: Path, name: str, site: str) -> Weights:
    path = tmp_path / f"world-{name}" / site / "models" / f"{plan_of(tmp_path, name).run_id}.safetensors"
    assert path.stat().st_mode & 0o077 == 0
    found: Weights = load_model(path).network.state_dict()
    return found


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def by_hand(tmp_path: Path, name: str, out: set[tuple[int, str]]) -> tuple[Weights, dict[str, Weights]]:
    """FedAvg of the common weights over sites that train with their own; an update that is left out changes neither."""
    plan, sites = plan_of(tmp_path, name), sites_of(tmp_path, name)
    task, shared = plan.task, set(sent_shapes(plan.task))
    weights = initial_weights(task.model, task.seed)
    mine = {site: {n: value for n, value in weights.items() if n not in shared} for site in sites}
    for round_ in range(1, task.rounds + 1):
        total, trained = {n: torch.zeros_like(weights[n], dtype=torch.float64) for n in shared}, 0
        for site, opened in sites.items():
            begun = {n: mine[site].get(n, value) for n, value in weights.items()}
            asked = Assignment(plan.run_id, round_, hash_weights(weights))
            _, delta = train_round(opened, task, asked, begun)
            if (round_, site) in out:
                continue
            mine[site] = {n: begun[n] + delta[n] for n in mine[site]}
            trained += PATIENTS[site]
            for n in shared:
                total[n] += PATIENTS[site] * delta[n].double()
        weights = {n: (v + total[n] / trained).float() if n in shared else v for n, v in weights.items()}
    return weights, {site: weights | kept for site, kept in mine.items()}


@pytest.mark.slow
@pytest.mark.parametrize("personalisation", SPLIT, ids=kind)
def test_a_part_of_the_model_stays_at_the_sites(carry_out, tmp_path, personalisation) -> None:
    """Three rounds, birch's second update is rejected: common weights and each site's own are those made by hand."""
    sites = carry_out("one", {"personalisation": personalisation}, Sites({(2, "birch"): REJECTED}), quorum=2)
    weights, mine = by_hand(tmp_path, "one", {(2, "birch")})
    assert apart(common(tmp_path, "one"), weights) < 2e-5
    models = {site: own(tmp_path, "one", site) for site in PATIENTS}
    for site, found in models.items():
        assert apart(found, mine[site]) < 2e-5
    wrong, theirs = by_hand(tmp_path, "one", set())  # had the rejected update counted
    assert apart(common(tmp_path, "one"), wrong) > 1e-4
    assert apart(models["birch"], theirs["birch"]) > 1e-4
    task = plan_of(tmp_path, "one").task
    local = set(weight_shapes(task.model)) - set(sent_shapes(task))
    assert all(set(delta) == set(weights) - local for sent in sites.sent.values() for _, delta in sent)
    start = initial_weights(task.model, task.seed)
    assert all(torch.equal(common(tmp_path, "one")[name], start[name]) for name in local)
    assert any(not torch.equal(models["alder"][name], models["elm"][name]) for name in local)


def whole(task: TrainTask) -> Callable[[RecordDict], RecordDict]:
    """An update with the weights that should have stayed, under a hash of all of them."""
    delta = {name: torch.zeros(shape) for name, shape in weight_shapes(task.model).items()}

    def change(content: RecordDict) -> RecordDict:
        return RecordDict({**say(delta_hash=hash_weights(delta))(content), "delta": arrays_to_wire(delta)})

    return change


@pytest.mark.parametrize("personalisation", SPLIT, ids=kind)
def test_weights_that_are_to_stay_are_not_taken(carry_out, tmp_path, tiny_task, personalisation) -> None:
    """An update that holds them, correctly hashed, is rejected for its size."""
    spoil = on(MessageType.TRAIN, whole(tiny_task))
    carry_out("one", {"personalisation": personalisation, "rounds": 1}, Sites({(1, "elm"): spoil}), quorum=2)
    event = Journal(tmp_path / "runs" / "one" / "journal.jsonl").last("round", round=1)
    assert set(event["rejected"]) == {"elm"}
    assert "shape" in event["rejected"]["elm"]


def second(site: Site, task: TrainTask, begin: Weights, first: int, total: int, towards: Weights | None) -> Weights:
    """A site's second training by hand."""
    segmenter = build(task.card, begin)
    data, pull = site.data(task).train, task.personalisation.pull or 0.0
    trainer = make_trainer(segmenter, task, data, f"{site.name}/own", total, pull, towards=towards)
    trainer.run(first, first + 3)
    found: Weights = {name: value.clone() for name, value in segmenter.network.state_dict().items()}
    return found


@pytest.mark.slow
def test_ditto_is_algorithm_1(carry_out, tmp_path) -> None:
    """v goes on from the last counted round, pulled towards that round's w; the common model is as without it."""
    sites = Sites({(2, "birch"): REJECTED})
    carry_out("ditto", {"personalisation": DITTO}, sites, quorum=2, evaluate_every=1)
    carry_out("plain", {}, Sites({(2, "birch"): REJECTED}), quorum=2, evaluate_every=1)
    assert apart(common(tmp_path, "ditto"), common(tmp_path, "plain")) == 0
    plan, opened = plan_of(tmp_path, "ditto"), sites_of(tmp_path, "ditto")
    kept, w = dict.fromkeys(opened, None), initial_weights(plan.task.model, plan.task.seed)
    for round_ in (1, 2, 3):
        for site in opened:
            v = second(opened[site], plan.task, kept[site] or w, 3 * (round_ - 1), 9, w)
            if (round_, site) != (2, "birch"):
                kept[site] = v
        deltas = {site: dict(sent)[round_] for site, sent in sites.sent.items() if (round_, site) != (2, "birch")}
        patients = sum(PATIENTS[site] for site in deltas)
        w = {n: value + sum(PATIENTS[s] * d[n] for s, d in deltas.items()) / patients for n, value in w.items()}
    for site, v in kept.items():
        assert apart(own(tmp_path, "ditto", site), v) < 2e-5
    rows = Journal(tmp_path / "runs" / "ditto" / "journal.jsonl").last("scores", round=3)["sites"]
    assert all(0 <= row["personal_dice"] <= 1 for row in rows.values())


def test_the_pull_leads_from_local_training_to_the_common_model(tiny_world, tiny_task) -> None:
    """lambda near 0 is training alone; the larger, the nearer v stays to w (Li et al. 2021, section 3.1)."""
    site = open_site(tiny_world / "alder" / "site.yaml")
    w = initial_weights(tiny_task.model, 1)

    def distance(pull: float | None) -> tuple[Weights, float]:
        made = Personalisation("ditto", pull=pull) if pull else Personalisation()
        v = second(site, replace(tiny_task, personalisation=made), initial_weights(tiny_task.model, 2), 0, 3, w)
        return v, sum(float((v[name] - w[name]).square().sum()) for name in w)

    alone, far = distance(None)
    hardly, _ = distance(1e-9)
    assert apart(alone, hardly) < 1e-4  # AdamW makes steps of even the smallest gradients
    steps = [far, *(distance(pull)[1] for pull in (0.1, 10.0))]
    assert steps[0] > steps[1] > steps[2]


@pytest.mark.slow
def test_fine_tuning_is_of_the_scored_model_and_changes_nothing_else(carry_out, tmp_path) -> None:
    """The common model is the one without it; each site's own one is the last scored model, trained on."""
    carry_out("tuned", {"personalisation": TUNED}, evaluate_every=2)
    carry_out("plain", {}, evaluate_every=2)
    assert apart(common(tmp_path, "tuned"), common(tmp_path, "plain")) == 0
    for name, site in sites_of(tmp_path, "tuned").items():
        task = plan_of(tmp_path, "tuned").task
        assert apart(own(tmp_path, "tuned", name), second(site, task, common(tmp_path, "tuned"), 0, 3, None)) == 0
    assert not list((tmp_path / "world-tuned").glob("*/personal"))


@pytest.mark.slow
def test_the_report_tells_both_models(carry_out, tmp_path) -> None:
    """An arm of its own, beside the federated one, and a note on what it means; none where nothing is a site's own."""
    carry_out("tuned", {"personalisation": TUNED})
    plan = plan_of(tmp_path, "tuned")
    report = federation_report(plan, Journal(tmp_path / "runs" / "tuned" / "journal.jsonl").events)
    rows = Journal(tmp_path / "runs" / "tuned" / "journal.jsonl").last("scores", round=3)["sites"]
    for site, row in rows.items():
        assert report["sites"][site]["dice"] == {"federated": row["dice"], "personalised": row["personal_dice"]}
    assert report["arms"]["personalised"]["worst"] == min(row["personal_dice"] for row in rows.values())
    assert any("fine_tune" in note for note in report["notes"])
    carry_out("plain", {})
    plain = federation_report(plan_of(tmp_path, "plain"), Journal(tmp_path / "runs" / "plain" / "journal.jsonl").events)
    assert set(plain["arms"]) == {"federated"}


@pytest.mark.slow
@pytest.mark.parametrize("personalisation", ALL, ids=kind)
def test_a_killed_run_ends_with_the_same_bytes(carry_out, tmp_path, personalisation) -> None:
    """Killed in the second round, when two of three sites have trained."""
    carry_out("one", {"personalisation": personalisation})
    killed = Sites()
    killed.dies_at = 5
    with pytest.raises(KeyboardInterrupt):
        carry_out("killed", {"personalisation": personalisation}, killed)
    carry_out("killed", {"personalisation": personalisation})
    assert apart(common(tmp_path, "one"), common(tmp_path, "killed")) == 0
    for site in PATIENTS:
        assert apart(own(tmp_path, "one", site), own(tmp_path, "killed", site)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("personalisation", [Personalisation("shared_encoder"), TUNED], ids=kind)
def test_a_simulation_is_reported_with_it(tiny_recipe, tmp_path, personalisation) -> None:
    """From the recipe to the page; examples are segmented with each site's own weights."""
    said = ", ".join(f"{key}: {value}" for key, value in vars(personalisation).items() if value is not None)
    recipe = tiny_recipe(("  rounds: 2\n", f"  rounds: 2\n  personalisation: {{{said}}}\n"))
    outcome = simulate(recipe, None, tmp_path / "run", "inline", False)
    assert ("personalised" in outcome.report["arms"]) == (personalisation.kind == "fine_tune")
    assert ("Personalised" in outcome.html.read_text()) == (personalisation.kind == "fine_tune")
    assert ("own second models" in outcome.html.read_text()) == (personalisation.kind == "fine_tune")
    assert ("(FedPer)" in outcome.html.read_text()) == (personalisation.kind == "shared_encoder")
    assert ("(fine-tuning)" in outcome.html.read_text()) == (personalisation.kind == "fine_tune")
    assert any(personalisation.kind in note for note in outcome.report["notes"])


@pytest.mark.parametrize("name", ["tiny", "S"])
def test_every_weight_is_encoders_or_decoders(name: str) -> None:
    """A part that the network gets one day has to be put on one side."""
    network = MedSegDiff(preset(name, image_channels=1, mask_channels=1, image_size=32, auxiliary_head=True))
    parts = {path.partition(".")[0] for path in network.state_dict()}
    assert parts == set(ENCODER) | set(DECODER)
    assert not set(ENCODER) & set(DECODER)


def test_local_norms_are_all_norms_and_nothing_else(tiny_task) -> None:
    """Counted by their type, not by their names."""
    task = replace(tiny_task, personalisation=Personalisation("local_norms"))
    with torch.device("meta"):
        modules = [m for m in MedSegDiff(task.model).modules() if isinstance(m, nn.GroupNorm)]
    assert len(weight_shapes(task.model)) - len(sent_shapes(task)) == 2 * len(modules) > 0


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"kind": "ditto"}, "needs one above 0"),
        ({"kind": "local_norms", "pull": 0.1}, "the others none"),
        ({"kind": "ditto", "pull": 0.0}, "must lie in"),
        ({"kind": "shared_encoder", "steps": 3}, "have a second model"),
        ({"kind": "fine_tune", "steps": 0}, "must lie in"),
    ],
)
def test_what_makes_no_sense_is_refused(said: dict[str, object], words: str) -> None:
    """With the reason."""
    with pytest.raises(ValueError, match=words):
        Personalisation(**said)  # type: ignore[arg-type]
