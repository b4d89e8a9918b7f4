"""What the server makes of a round's mean update: the next model and the optimizer's own memory.

With x the model, D the round's aggregated change and eta the server's learning rate:

    fedavg, fedprox   x + eta D                                    McMahan et al. 2017, algorithm 1 (eta = 1)
    scaffold          the same; c + |S| / N x mean change of c_i   Karimireddy et al. 2020, algorithm 1
    fedavgm           m = beta_1 m + D;  x + eta m                 Hsu et al. 2019, section 4.2
    fedadam, fedyogi  Reddi et al. 2021, algorithm 2               no bias correction, v starts at tau**2

All is elementwise, computed in float64 and rounded to float32 once a round. The memory is part of the checkpoint, so a
run that goes on computes with the very bits that an uninterrupted one has.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from medsegdiff.weights import held_to
from server.aggregation import apply_update
from server.checkpoints import AVERAGE
from server.config import StrategyConfig

MOMENTUM, SECOND = "momentum", "second"
COMMON = "control"  # scaffold's c
PLAIN = ("fedavg", "fedprox", "scaffold")  # no memory of the step
State = dict[str, dict[str, Tensor]]  # part of the memory -> weight's name -> float32 tensor of the weight's shape


def server_step(
    config: StrategyConfig, weights: Mapping[str, Tensor], mean: Mapping[str, Tensor], state: State, round_: int
) -> tuple[dict[str, Tensor], State]:
    """The next model and memory; the given ones stay as they are.

    Args:
        weights: the model the round began with, float32.
        mean: the round's aggregated change, float32.
        state: memory of the round before; empty before the first.
        round_: 1, 2, ...
    """
    if config.name in PLAIN and config.server_learning_rate == 1.0:
        moved, memory = apply_update(weights, mean), State()
    else:
        moved, memory = _optimise(config, weights, mean, state)
    if config.ema > 0:
        memory[AVERAGE] = _average(config.ema, state.get(AVERAGE, {}), moved, round_)
    return moved, memory


def next_control(
    weights: Mapping[str, Tensor], change: Mapping[str, Tensor], part: float, state: State, clip: float
) -> dict[str, Tensor]:
    """Scaffold's c after a round: c + part x mean change of the c_i, in float64, rounded once, at most `clip` long.

    A c_i is a mean of clipped gradients, and c the mean of the c_i: none of them is longer than the clip. The server
    sees changes alone, and a site that sends the largest that is taken in every round would make c as long as it likes.

    Args:
        weights: for their shapes.
        change: mean over the sites that answered, each alike.
        part: |S| / N, the part of all sites that answered.
        clip: the training's `gradient_clip`.
    """
    before = state.get(COMMON)
    moved = {
        name: ((before[name].double() if before else 0.0) + part * change[name].double()).float() for name in weights
    }
    return held_to(moved, clip)


def _optimise(
    config: StrategyConfig, weights: Mapping[str, Tensor], mean: Mapping[str, Tensor], state: State
) -> tuple[dict[str, Tensor], State]:
    eta, beta_1, beta_2, tau = config.server_learning_rate, config.beta_1, config.beta_2, config.tau
    moved: dict[str, Tensor] = {}
    memory: State = {}
    for name, value in weights.items():
        change = mean[name].double()
        if config.name in PLAIN:
            moved[name] = (value.double() + eta * change).float()
            continue
        m = _before(state, MOMENTUM, name, value, 0.0)
        m = beta_1 * m + (change if config.name == "fedavgm" else (1 - beta_1) * change)
        # Rounded before use: what is computed with is what the checkpoint holds.
        memory.setdefault(MOMENTUM, {})[name] = m.float()
        step = memory[MOMENTUM][name].double()
        if config.name in ("fedadam", "fedyogi"):
            v, square = _before(state, SECOND, name, value, tau**2), change**2
            adam = config.name == "fedadam"
            v = beta_2 * v + (1 - beta_2) * square if adam else v - (1 - beta_2) * square * torch.sign(v - square)
            memory.setdefault(SECOND, {})[name] = v.float()
            step = step / (memory[SECOND][name].double().sqrt() + tau)
        moved[name] = (value.double() + eta * step).float()
    return moved, memory


def _before(state: State, part: str, name: str, like: Tensor, initial: float) -> Tensor:
    known = state.get(part)
    return known[name].double() if known is not None else torch.full_like(like, initial, dtype=torch.float64)


def _average(
    decay: float, average: Mapping[str, Tensor], weights: Mapping[str, Tensor], round_: int
) -> dict[str, Tensor]:
    """Exponential average over rounds; the plain mean of all rounds until that has a longer memory than `decay`.

    Without this start the first model, which nobody trained, would weigh for 1 / (1 - decay) rounds.
    """
    keep = min(decay, (round_ - 1) / round_)
    return {
        name: (keep * average[name].double() + (1 - keep) * value.double()).float() if average else value.clone()
        for name, value in weights.items()
    }
