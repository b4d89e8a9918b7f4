"""SCAFFOLD against algorithm 1 by hand, its published property, and what must not count."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor, nn

from client.contract import Assignment, Update, arrays_from_wire, arrays_to_wire, from_wire, to_wire
from client.control import DriftCorrection, begin
from client.personalisation import CONTROL, common_shapes, sent_shapes
from client.site import Site, open_site
from client.training import make_trainer
from medsegdiff.errors import UserError
from medsegdiff.strict import read_config
from medsegdiff.weights import build, hash_weights, initial_weights, load_model
from server.app import app as server_app
from server.checkpoints import CheckpointStore
from server.config import RunPlan, StrategyConfig
from server.journal import Journal
from server.optimizers import COMMON, next_control
from server.rounds import traffic
from simulations.inline import run_inline
from tests.fake_sites import FakeSites, delta_of, on, say
from tests.watched_sites import Sites

Weights = dict[str, Tensor]
# Enrolled for more than they train on, as sites may be: it must not matter to c.
SCAFFOLD: dict[str, object] = {
    "strategy": StrategyConfig("scaffold"), "quorum": 2, "roster": {"alder": 300, "birch": 200, "elm": 1000}
}  # fmt: skip
TASK: dict[str, object] = {"control_variates": True}
REJECTED = on(MessageType.TRAIN, say(steps=10**6))


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def state_of(tmp_path: Path, name: str) -> tuple[Weights, Weights]:
    """The last checkpoint's model and control variate."""
    folder = tmp_path / "runs" / name
    run = read_config(folder / "run.yaml", RunPlan).run_id
    last = CheckpointStore(folder / "checkpoints").latest(run)
    assert last is not None
    return last.weights, last.state[COMMON]


def local_round(
    site: Site, plan: RunPlan, round_: int, x: Weights, c: Weights, c_i: Weights
) -> tuple[Weights, Weights]:
    """Algorithm 1, lines 7 to 12, written out: y_i and the new c_i."""
    task = plan.task
    segmenter = build(task.card, x)
    steps = task.local_steps
    trainer = make_trainer(segmenter, task, site.data(task).train, site.name, task.rounds * steps)
    seen: list[Weights] = []

    def correct(parameters: Mapping[str, nn.Parameter]) -> None:
        gradients = {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}
        length = torch.cat([g.flatten() for g in gradients.values()]).norm()
        seen.append({name: g * min(1.0, float(task.training.gradient_clip / length)) for name, g in gradients.items()})
        for name, g in gradients.items():
            parameters[name].grad = g - c_i[name] + c[name]

    trainer.on_gradient = correct
    trainer.run((round_ - 1) * steps, round_ * steps)
    y = {name: value.clone() for name, value in segmenter.network.state_dict().items()}
    return y, {name: sum(g[name] for g in seen) / len(seen) for name in x}


def by_hand(plan: RunPlan, sites: Mapping[str, Site], out: set[tuple[int, str]]) -> tuple[Weights, Weights]:
    """The whole algorithm, sites alike; who is left out moves neither x nor c, and keeps its c_i."""
    x = initial_weights(plan.task.model, plan.task.seed)
    c = {name: torch.zeros_like(value) for name, value in x.items()}
    own = {site: {name: torch.zeros_like(value) for name, value in x.items()} for site in sites}
    for round_ in range(1, plan.task.rounds + 1):
        answers = {site: local_round(sites[site], plan, round_, x, c, own[site]) for site in sites}
        counted = [site for site in sites if (round_, site) not in out]
        moved = {n: x[n] + sum(answers[s][0][n] - x[n] for s in counted) / len(counted) for n in x}
        c = {n: c[n] + sum(answers[s][1][n] - own[s][n] for s in counted) / len(sites) for n in x}
        own |= {site: answers[site][1] for site in counted}
        x = moved
    return x, c


@pytest.mark.slow
def test_algorithm_1(carry_out, tmp_path) -> None:
    """Three rounds; birch's second update is rejected: model and control variate are those made by hand."""
    carry_out("one", TASK, Sites({(2, "birch"): REJECTED}), **SCAFFOLD)
    plan = read_config(tmp_path / "runs" / "one" / "run.yaml", RunPlan)
    sites = {path.parent.name: open_site(path) for path in sorted((tmp_path / "world-one").glob("*/site.yaml"))}
    model, control = state_of(tmp_path, "one")
    x, c = by_hand(plan, sites, {(2, "birch")})
    size = max(float(value.abs().max()) for value in c.values())
    assert apart(model, x) < 2e-5
    assert apart(control, c) < 1e-3 * size
    wrong_x, wrong_c = by_hand(plan, sites, set())
    assert apart(model, wrong_x) > 1e-4
    assert apart(control, wrong_c) > 5e-3 * size
    plain = carry_out("plain", {}, quorum=2)
    assert plain.bytes * 2 == carry_out("two", TASK, **SCAFFOLD).bytes
    down = {
        name: traffic(Journal(tmp_path / "runs" / name / "journal.jsonl").events)["down"] for name in ("plain", "two")
    }
    size = 4 * sum(value.numel() for value in model.values())
    assert down["two"] - down["plain"] == 2 * 3 * size  # c to three sites in rounds two and three
    assert not list((tmp_path / "world-one").glob("*/controls/*"))  # the run is over


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(carry_out, tmp_path) -> None:
    """Killed in the second round, when two of three sites have trained."""
    carry_out("one", TASK, **SCAFFOLD)
    killed = Sites()
    killed.dies_at = 5
    with pytest.raises(KeyboardInterrupt):
        carry_out("killed", TASK, killed, **SCAFFOLD)
    carry_out("killed", TASK, **SCAFFOLD)
    models = [
        load_model(tmp_path / "runs" / name / "model.safetensors").network.state_dict() for name in ("one", "killed")
    ]
    assert apart(*models) == 0
    assert apart(state_of(tmp_path, "one")[1], state_of(tmp_path, "killed")[1]) == 0


class Quadratic(nn.Module):
    """f(x) = curvature / 2 (x - minimum)^2."""

    def __init__(self, x: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([x]))


CURVATURES, MINIMA, RATE, STEPS = (1.0, 4.0), (0.0, 1.0), 0.05, 10
OPTIMUM = sum(a * b for a, b in zip(CURVATURES, MINIMA, strict=True)) / sum(CURVATURES)


def quadratic_rounds(correcting: bool, present: Callable[[int], tuple[int, ...]] = lambda _: (0, 1)) -> float:
    """Two sites, ten gradient steps a round, by our correction and our step of c; where x ends."""
    x, c, own = 0.5, {"x": torch.zeros(1)}, [{"x": torch.zeros(1)}, {"x": torch.zeros(1)}]
    for round_ in range(300):
        ends, changes = [], []
        for site in present(round_):
            model = Quadratic(x)
            correction = DriftCorrection(c if correcting else own[site], own[site], {"x": (1,)}, 1e9)
            optimizer = torch.optim.SGD(model.parameters(), RATE)
            for _ in range(STEPS):
                optimizer.zero_grad()
                (CURVATURES[site] / 2 * (model.x - MINIMA[site]) ** 2).sum().backward()
                correction(dict(model.named_parameters()))
                optimizer.step()
            found = correction.control()
            option_2 = own[site]["x"] - (c if correcting else own[site])["x"] + (x - model.x.detach()) / (STEPS * RATE)
            assert torch.allclose(found["x"], option_2, atol=1e-4)
            ends.append(float(model.x.detach()))
            changes.append(found["x"] - own[site]["x"])
            own[site] = found
        x = sum(ends) / len(ends)
        change = {"x": torch.stack(changes).mean(dim=0)}
        c = next_control({"x": torch.zeros(1)}, change, len(ends) / 2, {COMMON: c}, 1e9)
    return x


@pytest.mark.slow
def test_drift_is_gone_where_sites_differ() -> None:
    """Section 3: with many local steps FedAvg ends beside the optimum of two quadratics, SCAFFOLD at it."""
    assert abs(quadratic_rounds(False) - OPTIMUM) > 0.05
    assert abs(quadratic_rounds(True) - OPTIMUM) < 1e-4


def test_also_where_a_site_is_often_away() -> None:
    """Each site answers two of three rounds."""
    present = ((0, 1), (0,), (1,))
    assert abs(quadratic_rounds(False, lambda round_: present[round_ % 3]) - OPTIMUM) > 0.05
    assert abs(quadratic_rounds(True, lambda round_: present[round_ % 3]) - OPTIMUM) < 1e-4


def spoiled(change: Callable[[Weights], Weights]) -> Callable[[Message, Message], Message]:
    """An update whose arrays were changed, under their right hash."""

    def spoil(question: Message, answer: Message) -> Message:
        task = PLAN[0].task
        delta = change(arrays_from_wire(answer.content.array_records["delta"], sent_shapes(task)))
        content = say(delta_hash=hash_weights(delta))(answer.content)
        return Message(RecordDict({**content, "delta": arrays_to_wire(delta)}), reply_to=question)

    return spoil


PLAN: list[RunPlan] = []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: {n: 100 * v if n.startswith(CONTROL) else v for n, v in d.items()}, "control variate changes by"),
        (lambda d: {n: v for n, v in d.items() if not n.startswith(CONTROL)}, "shape"),
    ],
    ids=["too large", "missing"],
)
def test_a_false_control_variate_is_left_out(carry_out, make_run, tmp_path, change, words) -> None:
    """Whatever c was, a change is at most two clipped gradients long; and it has to be there."""
    folder = make_run("plan", task={"rounds": 1, **TASK}, **SCAFFOLD)
    PLAN[:] = [read_config(folder / "run.yaml", RunPlan)]
    carry_out("one", {"rounds": 1, **TASK}, Sites({(1, "elm"): spoiled(change)}), **SCAFFOLD)
    event = Journal(tmp_path / "runs" / "one" / "journal.jsonl").last("round", round=1)
    assert list(event["rejected"]) == ["elm"]
    assert words in event["rejected"]["elm"]


def test_no_site_makes_the_common_control_variate_longer_than_the_clip(make_run) -> None:
    """elm adds the largest change that is taken in every round; ||c|| ends within the clip, the honest ones' zeros are
    exact, and a restart has the same bits."""
    names = []
    for name, rounds in (("one", (9,)), ("restarted", (4, 9))):
        folder = make_run(name, task={"rounds": 9, **TASK}, evaluate_every=9, **SCAFFOLD)
        plan = read_config(folder / "run.yaml", RunPlan)
        size = sum(math.prod(s) for n, s in sent_shapes(plan.task).items() if n.startswith(CONTROL))
        largest = 2 * plan.task.training.gradient_clip / math.sqrt(size)
        for last in rounds:
            sites = AddingSites(plan, largest, last)
            with contextlib.suppress(UserError):
                run_inline(server_app, sites, 3, folder)  # type: ignore[arg-type]
        names.append(folder)
    last = [CheckpointStore(f / "checkpoints").latest(plan.run_id) for f in names]
    found = [checkpoint.state[COMMON] for checkpoint in last if checkpoint is not None and checkpoint.round == 9]
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in found[0].values()))
    assert 0.99 < norm / plan.task.training.gradient_clip <= 1.01
    assert apart(*found) == 0
    assert not [e for e in Journal(names[0] / "journal.jsonl").events if e["event"] == "rejected"]


class AddingSites(FakeSites):
    """Sites without drift, but for elm, which sends the largest change of c_i; elm is away after round `last`."""

    def __init__(self, plan: RunPlan, largest: float, last: int) -> None:
        super().__init__(plan)
        self.largest, self.last = largest, last

    def content(self, site: str, kind: str, message: Message) -> RecordDict:
        if kind != MessageType.TRAIN:
            return super().content(site, kind, message)
        asked = from_wire(message.content, "assignment", Assignment)
        if asked.round > self.last:
            raise RuntimeError("killed")
        change = delta_of(site, asked.round, self.plan.task)
        delta = {
            name: torch.full(shape, self.largest if site == "elm" else 0.0)
            if name.startswith(CONTROL)
            else change[name]
            for name, shape in sent_shapes(self.plan.task).items()
        }
        steps = self.plan.task.local_steps
        update = Update(site, asked.run, asked.round, asked.model_hash, 1, steps, 0.5, 0.0, hash_weights(delta))
        return RecordDict({"update": to_wire(update), "delta": arrays_to_wire(delta)})


def test_a_longer_control_variate_is_shortened_at_the_site(untouched_world, make_run, caplog) -> None:
    """A server that was not, or an older checkpoint, still moves no gradient further; one within is taken as it is."""
    plan = read_config(make_run("one", task=TASK, **SCAFFOLD) / "run.yaml", RunPlan)
    site = open_site(untouched_world / "alder" / "site.yaml")
    clip, shapes = plan.task.training.gradient_clip, common_shapes(plan.task)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    one = clip / math.sqrt(sum(math.prod(shape) for shape in shapes.values()))
    for factor, longest in ((40.0, clip), (1.0, clip), (0.5, 0.5 * clip)):
        control = {name: torch.full(shape, factor * one) for name, shape in shapes.items()}
        question = Message(RecordDict({"control": arrays_to_wire(control)}), 1, MessageType.TRAIN)
        assignment = Assignment(plan.run_id, 2, "a" * 64, (), hash_weights(control))
        correction = begin(site, plan.task, question, assignment)
        assert correction is not None
        shift = torch.cat([value.double().flatten() for value in correction.shift.values()])
        assert float(shift.norm()) == pytest.approx(longest, rel=1e-5)
        assert (apart(correction.shift, control) == 0) == (factor <= 1)
        assert ("it is shortened" in caplog.text) == (factor > 1)
        caplog.clear()


class Swapped(Sites):
    """On the way to elm the control variate of round two is replaced."""

    def __call__(self, message: Message, context: Context) -> Message:
        record = message.content.array_records.get("control")
        if record is not None and int(context.node_config["partition-id"]) == 2:
            zeros = {
                name: torch.zeros(shape) for name, shape in sent_shapes(PLAN[0].task).items() if CONTROL not in name
            }
            message.content["control"] = arrays_to_wire(zeros)
        return super().__call__(message, context)


def test_another_control_variate_than_the_named_one_trains_nothing(carry_out, make_run, tmp_path) -> None:
    """Its hash stands in the assignment."""
    folder = make_run("plan", task={"rounds": 2, **TASK}, **SCAFFOLD)
    PLAN[:] = [read_config(folder / "run.yaml", RunPlan)]
    sites = carry_out("one", {"rounds": 2, **TASK}, Swapped(), **SCAFFOLD)
    assert [round_ for round_, _ in sites.sent["elm"]] == [1]
    assert [round_ for round_, _ in sites.sent["alder"]] == [1, 2]


def test_the_plan_says_it_twice_alike(make_run) -> None:
    """Strategy and task must agree: a site is asked for control variates by scaffold alone."""
    for strategy, task in (("fedavg", True), ("scaffold", False)):
        with pytest.raises(ValueError, match="scaffold has them"):
            make_run(strategy, task={"control_variates": task}, strategy=StrategyConfig(strategy))
