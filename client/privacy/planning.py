"""What a privacy budget buys: noise, batch, steps, and whether the signal can stand against the noise.

**Signal and noise of a step.** The mean gradient is (sum of clipped gradients + sigma C N(0, 1)) / B with the expected
batch B = q x patients. Clipped to norm C, the patients' mean is at most C long, and that only if all point the same
way. The noise on it is sigma C sqrt(P) / B long (P trained parameters). So at best

    signal / noise = B / (sigma sqrt(P))         of a step; C cancels
    signal / noise = sqrt(T) B / (sigma sqrt(P)) of a training of T steps: the signals add up, the noise as sqrt(T)

Below 1 the sum of all noise is longer than the sum of all signal, whatever the data: hopeless. Above 1 nothing is
promised, since patients do not all agree.

**Choice of q and steps.** For a given budget sigma grows about as q sqrt(T), so a training's signal over noise hardly
depends on q and T once sigma is large, while its cost does. Of a grid of q and steps a round with 200 steps or more in
all (an optimizer needs some, however clean the gradients), those within 10 % of the best signal over noise are kept,
and the one with the fewest patient gradients (q x patients x T) is taken; of equals the one with the larger q. Noise on
the grid is by the Renyi bound, the chosen plan's by the accountants of the ledger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from client.privacy.account import frozen_delta
from client.privacy.accounting import (
    Epsilon,
    Mechanism,
    check_delta,
    epsilon,
    noise_multiplier,
    rough_noise_multiplier,
)
from medsegdiff.errors import UserError

SAMPLING = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # q of the grid
STEPS = (1, 2, 5, 10, 20)  # a round, of the grid
LEAST_STEPS = 200  # of a training, where the grid has them
NEAR_BEST = 0.9
SMALLEST_BATCH = 4.0  # expected patients a step, of the grid
HOPELESS, DOUBTFUL = 1.0, 3.0  # signal over noise of the training
CURVE_POINTS = 15


@dataclass(frozen=True)
class Plan:
    """A frozen schedule that a site's ledger will let run to its end, if it begins empty."""

    patients: int  # of the site, in training
    limit: float  # epsilon
    delta: float
    rounds: int
    steps_per_round: int
    q: float  # probability with which a step takes each patient
    sigma: float  # noise multiplier
    parameters: int  # that are trained
    clip: float  # C, the longest gradient of a patient
    draws: int  # (t, noise) draws a patient and step
    reached: Epsilon  # after the last round, as the ledger accounts it

    @property
    def steps(self) -> int:
        """T, of the whole training."""
        return self.rounds * self.steps_per_round

    @property
    def expected_batch(self) -> float:
        """B: patients a step, on average; also the public constant that the sum is divided by."""
        return self.q * self.patients

    @property
    def noise_per_parameter(self) -> float:
        """Standard deviation of the noise on each entry of the mean gradient: sigma C / B."""
        return self.sigma * self.clip / self.expected_batch

    @property
    def noise_norm(self) -> float:
        """Length of the noise on the mean gradient, sigma C sqrt(P) / B; the signal is at most C."""
        return self.noise_per_parameter * math.sqrt(self.parameters)

    @property
    def step_ratio(self) -> float:
        """Largest signal over noise of a step."""
        return self.clip / self.noise_norm

    @property
    def training_ratio(self) -> float:
        """Largest signal over noise of the whole training."""
        return math.sqrt(self.steps) * self.step_ratio

    @property
    def most_parameters(self) -> int:
        """So many trained parameters bring the training's ratio to 1: T (B / sigma)^2."""
        return int(self.steps * (self.expected_batch / self.sigma) ** 2)

    @property
    def passes(self) -> float:
        """Forward and backward passes of the whole training, a patient and draw each."""
        return self.steps * self.expected_batch * self.draws

    def curve(self) -> list[tuple[int, float]]:
        """Epsilon after some of the rounds, the first and the last among them."""
        rounds = sorted({1 + round(k * (self.rounds - 1) / (CURVE_POINTS - 1)) for k in range(CURVE_POINTS)})
        delta = frozen_delta(self.delta)
        steps = self.steps_per_round
        return [(n, epsilon([Mechanism(self.sigma, self.q, n * steps)], delta).value) for n in rounds]

    def verdict(self) -> str:
        """hopeless, doubtful or possible."""
        if self.training_ratio < HOPELESS:
            return "hopeless"
        return "doubtful" if self.training_ratio < DOUBTFUL else "possible"

    def warnings(self) -> list[str]:
        """What a person should know before agreeing, in words and with the figure that says so."""
        ratio, steps, times = self.training_ratio, f"all {self.steps:,} steps", 1 / self.step_ratio
        a_step = f"in a step the noise is {_figure(times)} times as long as the longest signal there can be"
        room = f"within this budget at most {self.most_parameters:,} parameters"
        said = {
            "hopeless": f"HOPELESS: {a_step}, and over {steps} still {_figure(1 / ratio)} times, even if all patients "
            f"agreed in each. To come to 1 train {room}, or have {math.ceil(self.patients / ratio):,} patients.",
            "doubtful": f"DOUBTFUL: {a_step}; over {steps} the signal is at best {_figure(ratio)} times the noise, and "
            "patients do not all agree. Train fewer parameters, or spend more epsilon.",
            "possible": f"POSSIBLE: over {steps} the signal is at best {_figure(ratio)} times the noise. That is a "
            "bound, not a forecast: patients do not all agree.",
        }
        lines = [said[self.verdict()]]
        if self.delta * self.patients >= 0.1:
            lines.append(
                f"DELTA: {self.delta:g} is no small part of 1 / {self.patients} patients: publishing each patient with "
                f"that probability would keep to it. Take {0.01 / self.patients:.0e}."
            )
        if self.limit > 10:
            lines.append(
                f"EPSILON: {self.limit:g} rules out next to nothing on paper. Reconstruction of images fails in "
                "practice far beyond it (Ziller et al. 2024); whether a patient took part may still be told."
            )
        return lines


def make_plan(
    patients: int,
    epsilon_limit: float,
    delta: float,
    rounds: int,
    steps_per_round: int | None = None,
    q: float | None = None,
    parameters: int = 30_000,
    clip: float = 1.0,
    draws: int = 8,
) -> Plan:
    """The schedule that makes most of a budget; `q` and `steps_per_round` are chosen where they are None.

    Raises:
        UserError: a value is out of range, or no noise keeps within the budget.
    """
    for name, value in (("patients", patients), ("rounds", rounds), ("parameters", parameters), ("draws", draws)):
        _require(value >= 1, f"{name} {value}: at least 1 is needed")
    _require(steps_per_round is None or steps_per_round >= 1, f"steps a round {steps_per_round}: at least 1 is needed")
    _require(0 < clip < math.inf, f"clip {clip}: a length above 0 is needed")
    _require(0 < epsilon_limit < math.inf, f"epsilon {epsilon_limit}: a budget above 0 is needed")
    check_delta(delta)
    share = frozen_delta(delta)
    q, steps_per_round = _choose(patients, epsilon_limit, share, rounds, steps_per_round, q)
    sigma = noise_multiplier(q, rounds * steps_per_round, share, epsilon_limit)
    reached = epsilon([Mechanism(sigma, q, rounds * steps_per_round)], share)
    return Plan(
        patients, epsilon_limit, delta, rounds, steps_per_round, q, sigma, parameters, clip, draws, reached
    )  # fmt: skip


def _choose(
    patients: int, limit: float, delta: float, rounds: int, steps_per_round: int | None, q: float | None
) -> tuple[float, int]:
    """q and steps a round by the criterion of this module; given ones stay."""
    probabilities = [q] if q is not None else [p for p in SAMPLING if p == 1.0 or p * patients >= SMALLEST_BATCH]
    enough = [n for n in STEPS if n * rounds >= LEAST_STEPS] or [STEPS[-1]]
    steps = [steps_per_round] if steps_per_round is not None else enough
    if len(probabilities) == len(steps) == 1:
        return probabilities[0], steps[0]
    ratio = {
        (p, n): math.sqrt(rounds * n) * p / rough_noise_multiplier(p, rounds * n, delta, limit)
        for p, n in product(probabilities, steps)
    }
    best = max(ratio.values())
    return min(
        (pair for pair in ratio if ratio[pair] >= NEAR_BEST * best), key=lambda pair: (pair[0] * pair[1], -pair[0])
    )


def _figure(value: float) -> str:
    """Two digits, no exponent."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1.05 else f"{value:.2f}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"{message}.")
