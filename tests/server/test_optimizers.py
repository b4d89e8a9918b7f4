"""The server's step against the papers' algorithms written out in numpy, and against Flower's own strategies."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedYogi
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from server.aggregation import apply_update
from server.checkpoints import AVERAGE
from server.config import StrategyConfig
from server.optimizers import COMMON, State, next_control, server_step

SHAPES = {"w": (3, 4), "b": (5,)}
Arrays = dict[str, np.ndarray]


def draw(seed: int, scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}


def carry_out(config: StrategyConfig, start: Arrays, changes: list[Arrays]) -> tuple[list[Arrays], State]:
    """The models after each round."""
    weights, state, models = tensors(start), State(), []
    for number, change in enumerate(changes, start=1):
        weights, state = server_step(config, weights, tensors(change), state, number)
        models.append({name: value.numpy().copy() for name, value in weights.items()})
    return models, state


def close(found: list[Arrays], wanted: list[Arrays], rtol: float = 2e-6) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol, atol=1e-6)


def momentum_by_the_paper(x: Arrays, changes: list[Arrays], beta: float, eta: float) -> list[Arrays]:
    """Hsu et al. 2019, section 4.2: v <- beta v + Dw, w <- w - v, where Dw is minus our change."""
    v, models = {name: np.zeros(shape) for name, shape in SHAPES.items()}, []
    x = {name: value.astype(np.float64) for name, value in x.items()}
    for change in changes:
        v = {name: beta * v[name] - change[name] for name in SHAPES}
        x = {name: x[name] - eta * v[name] for name in SHAPES}
        models.append(x)
    return models


def adaptive_by_the_paper(x: Arrays, changes: list[Arrays], c: StrategyConfig, kind: str) -> list[Arrays]:
    """Reddi et al. 2021, algorithm 2, one number at a time."""
    models = []
    x = {name: value.astype(np.float64) for name, value in x.items()}
    m = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    v = {name: np.full(shape, c.tau**2) for name, shape in SHAPES.items()}
    for change in changes:
        x, m, v = ({name: value.copy() for name, value in part.items()} for part in (x, m, v))
        for name, shape in SHAPES.items():
            for i in np.ndindex(shape):
                delta = float(change[name][i])
                m[name][i] = c.beta_1 * m[name][i] + (1 - c.beta_1) * delta
                if kind == "fedadam":
                    v[name][i] = c.beta_2 * v[name][i] + (1 - c.beta_2) * delta**2
                else:
                    v[name][i] -= (1 - c.beta_2) * delta**2 * np.sign(v[name][i] - delta**2)
                x[name][i] += c.server_learning_rate * m[name][i] / (np.sqrt(v[name][i]) + c.tau)
        models.append(x)
    return models


CHANGES = [draw(seed, scale) for seed, scale in zip(range(1, 9), (1, 0.5, 2, 0.1, 0.01, 1, 0.001, 0.3), strict=True)]


def test_fedavg_is_weights_plus_mean_bit_for_bit() -> None:
    """With the server's rate at one nothing but one float32 addition happens, and nothing is remembered."""
    start, change = tensors(draw(0)), tensors(draw(1))
    moved, state = server_step(StrategyConfig(), start, change, State(), 1)
    assert state == {}
    assert all(torch.equal(moved[name], value) for name, value in apply_update(start, change).items())


def test_a_server_rate_scales_the_change() -> None:
    """x + eta D."""
    models, state = carry_out(StrategyConfig(server_learning_rate=0.25), draw(0), CHANGES[:1])
    assert state == {}
    close(models, [{name: value + 0.25 * CHANGES[0][name] for name, value in draw(0).items()}])


@pytest.mark.parametrize("eta", [1.0, 0.1])
def test_fedavgm_is_the_papers(eta) -> None:
    """Eight rounds with changes of very different size."""
    config = StrategyConfig("fedavgm", beta_1=0.7, server_learning_rate=eta)
    close(carry_out(config, draw(0), CHANGES)[0], momentum_by_the_paper(draw(0), CHANGES, 0.7, eta))


@pytest.mark.parametrize("kind", ["fedadam", "fedyogi"])
@pytest.mark.parametrize("tau", [1e-3, 0.1])
def test_the_adaptive_ones_are_algorithm_2(kind, tau) -> None:
    """Both, and not each other."""
    config = StrategyConfig(kind, server_learning_rate=0.1, tau=tau)
    models, _ = carry_out(config, draw(0), CHANGES)
    close(models, adaptive_by_the_paper(draw(0), CHANGES, config, kind))
    other = adaptive_by_the_paper(draw(0), CHANGES, config, "fedyogi" if kind == "fedadam" else "fedadam")
    assert not np.allclose(models[-1]["w"], other[-1]["w"], rtol=1e-3)


def flower_rounds(strategy: FedAvg, start: Arrays, changes: list[Arrays]) -> list[Arrays]:
    """One site without any other: its model is the mean. Flower's grid is asked for no more than its nodes."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    grid = SimpleNamespace(get_node_ids=lambda: [1, 2])
    current, models = start, []
    for number, change in enumerate(changes, start=1):
        record = ArrayRecord({name: Array(value) for name, value in current.items()})
        strategy.configure_train(number, record, ConfigRecord(), grid)
        replies = []
        for _ in range(2):
            question = Message(RecordDict(), 1, "train")
            question.metadata.__dict__["_message_id"] = "m"
            arrays = ArrayRecord({name: Array(current[name] + change[name]) for name in SHAPES})
            content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
            replies.append(Message(content, reply_to=question))
        arrays, _ = strategy.aggregate_train(number, replies)
        current = {name: np.asarray(arrays[name].numpy(), np.float32) for name in SHAPES}
        models.append(current)
    return models


def test_fedavgm_is_flowers() -> None:
    """The same models as flwr.serverapp.strategy.FedAvgM."""
    theirs = flower_rounds(FedAvgM(server_momentum=0.7, server_learning_rate=0.5), draw(0), CHANGES)
    config = StrategyConfig("fedavgm", beta_1=0.7, server_learning_rate=0.5)
    close(carry_out(config, draw(0), CHANGES)[0], theirs, rtol=2e-5)


def test_fedyogi_is_flowers_from_the_papers_start() -> None:
    """Flower begins v at 0, the paper at tau**2 or more: from the paper's start, Flower's models are ours."""
    strategy = FedYogi(eta=0.1, beta_1=0.9, beta_2=0.99, tau=0.01)
    strategy.v_t = {name: np.full(shape, 0.01**2) for name, shape in SHAPES.items()}
    config = StrategyConfig("fedyogi", server_learning_rate=0.1, tau=0.01)
    close(carry_out(config, draw(0), CHANGES)[0], flower_rounds(strategy, draw(0), CHANGES), rtol=2e-5)


def test_fedadam_is_flowers_without_its_bias_correction() -> None:
    """Flower multiplies eta by Kingma and Ba's factor, which algorithm 2 does not have; taken out, the models agree."""

    class Uncorrected(FedAdam):
        def aggregate_train(self, server_round, replies):
            t = server_round + 1.0
            self.eta = 0.1 * (1 - self.beta_1**t) / np.sqrt(1 - self.beta_2**t)
            return super().aggregate_train(server_round, replies)

    strategy = Uncorrected(eta=0.1, beta_1=0.9, beta_2=0.99, tau=0.01)
    strategy.v_t = {name: np.full(shape, 0.01**2) for name, shape in SHAPES.items()}
    config = StrategyConfig("fedadam", server_learning_rate=0.1, tau=0.01)
    close(carry_out(config, draw(0), CHANGES)[0], flower_rounds(strategy, draw(0), CHANGES), rtol=2e-5)


def test_the_control_variate_is_held_to_the_clip() -> None:
    """c + part x change by hand, to the bit, while no longer than the clip; longer, cut to its length."""
    change, before, zero = tensors(draw(1)), {COMMON: tensors(draw(2))}, tensors(draw(0, 0.0))
    by_hand = {n: (before[COMMON][n].double() + 0.5 * v.double()).float() for n, v in change.items()}
    norm = float(torch.cat([value.double().flatten() for value in by_hand.values()]).norm())
    for clip in (1e9, norm):  # what rounding makes of the clip itself is no more than the clip
        found = next_control(zero, change, 0.5, before, clip)
        assert all(torch.equal(found[name], by_hand[name]) for name in SHAPES)
    found = next_control(zero, change, 0.5, before, norm / 2)
    for name in SHAPES:
        torch.testing.assert_close(found[name], by_hand[name] / 2)


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_average_over_rounds_begins_as_a_plain_mean(decay) -> None:
    """avg_t = k avg_{t-1} + (1 - k) x_t with k = min(decay, (t - 1) / t), in float64 by hand."""
    models, state = carry_out(StrategyConfig(ema=decay), draw(0), CHANGES)
    average = np.zeros(SHAPES["w"])
    for number, model in enumerate(models, start=1):
        keep = min(decay, (number - 1) / number)
        average = keep * average + (1 - keep) * model["w"]
    np.testing.assert_allclose(state[AVERAGE]["w"].numpy(), average, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["fedavg", "fedavgm", "fedadam", "fedyogi"])
def test_what_is_given_stays_as_it_was(kind) -> None:
    """A round that cannot be committed is repeated from the same weights and memory."""
    config = StrategyConfig(kind, ema=0.9, server_learning_rate=0.5)
    weights, state = server_step(config, tensors(draw(0)), tensors(draw(1)), State(), 1)
    before = {name: value.clone() for name, value in weights.items()}
    memory = {part: {name: value.clone() for name, value in found.items()} for part, found in state.items()}
    first, _ = server_step(config, weights, tensors(draw(2)), state, 2)
    again, _ = server_step(config, weights, tensors(draw(2)), state, 2)
    assert all(torch.equal(first[name], again[name]) for name in SHAPES)
    assert all(torch.equal(weights[name], before[name]) for name in SHAPES)
    assert all(torch.equal(state[part][name], memory[part][name]) for part in memory for name in SHAPES)
