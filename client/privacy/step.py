"""One private step: clip, sum, noise, divide; then an ordinary optimizer.

    gradient = (sum over patients of clip(g_patient, C) + sigma C N(0, I)) / B         (Abadi et al. 2016, algorithm 1)

All that follows the noise is post-processing and costs no privacy: FedProx's pull, Adam's moments, weight decay,
learning-rate schedules that count steps, averages of weights. What precedes it is never shown: a step returns nothing,
for losses, norms, the fraction clipped and the number of patients drawn are all raw facts about patients. So is the
time that it takes, from which that number can be told: it stays at the site as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from client.privacy.engines import Engine, PatientLoop, RowLoss, Rows, Sums, trained_parameters
from client.privacy.entropy import Entropy, SeededEntropy, SystemEntropy
from client.privacy.noise import add_noise
from client.privacy.policy import PrivacyPolicy
from client.privacy.sampling import PoissonSampler
from medsegdiff.ema import WeightAverage

_EXACT = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class PrivateStep:
    """The subsampled Gaussian mechanism on a network. In production it takes no source of noise from anybody.

    Args:
        network: trained in place; its parameters that require a gradient are trained, and all of them.
        loss: of one patient's rows.
        policy: C, sigma and B.
        optimizer: of exactly the trained parameters.
        engine: how per-patient gradients are made.
        proximal_mu: FedProx's mu (Li et al. 2020, eq. 2): the pull to the weights at construction, after the noise.
        average: weight average to update after each step, if any.

    Guarantees:
        Every call of `take` adds noise of standard deviation sigma C to every real coordinate of the sum, with no
        patients as with many, and divides by the constant B.

    Raises:
        ValueError: parameters in half precision, or an optimizer that trains others than the network's.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: RowLoss,
        policy: PrivacyPolicy,
        optimizer: torch.optim.Optimizer,
        engine: Engine | None = None,
        proximal_mu: float = 0.0,
        average: WeightAverage | None = None,
    ) -> None:
        self.network = network
        self.loss = loss
        self.policy = policy
        self.optimizer = optimizer
        self.engine: Engine = PatientLoop() if engine is None else engine
        self.proximal_mu = proximal_mu
        self.average = average
        self.parameters = trained_parameters(network)
        self.anchor = {name: p.detach().clone() for name, p in self.parameters.items()} if proximal_mu > 0 else {}
        self._entropy: Entropy = SystemEntropy()
        self._may_be_foretold = False
        self._check()

    @classmethod
    def for_testing(
        cls,
        network: nn.Module,
        loss: RowLoss,
        policy: PrivacyPolicy,
        optimizer: torch.optim.Optimizer,
        *,
        entropy: SeededEntropy,
        engine: Engine | None = None,
        proximal_mu: float = 0.0,
        average: WeightAverage | None = None,
    ) -> PrivateStep:
        """A step whose noise repeats itself. Its `testing` is true for good, and what it trains must not leave."""
        step = cls(network, loss, policy, optimizer, engine, proximal_mu, average)
        step._entropy = entropy
        step._may_be_foretold = True
        return step

    @property
    def testing(self) -> bool:
        """Whether its noise can be foretold: nothing that such a step trained may be released."""
        return self._may_be_foretold or type(self._entropy) is not SystemEntropy

    def take(self, patients: Iterable[Rows]) -> None:
        """One step on the patients drawn, none included.

        Raises:
            RuntimeError: the source of noise is not the operating system's, outside of tests.
        """
        self._check_source()
        with self._dropout_stream():
            sums = self.engine.clipped_sum(self.network, self.loss, patients, self.policy.clip)
        self._noise(sums)
        self.optimizer.zero_grad(set_to_none=True)
        for name, parameter in self.parameters.items():
            parameter.grad = (sums[name] / self.policy.batch).to(parameter.dtype)
        self._pull()
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.network)

    def _check_source(self) -> None:
        if type(self._entropy) is not SystemEntropy and not self._may_be_foretold:
            raise RuntimeError("the noise of a private step must come from the operating system; no step was taken")

    @contextmanager
    def _dropout_stream(self) -> Iterator[None]:
        """Dropout draws from torch's global generator: seeded from our source inside, left as it was outside.

        With a seed that others know, one patient more would shift the masks of all that follow, by a known amount, and
        so move the sum by more than C.
        """
        devices = sorted({p.device.index or 0 for p in self.parameters.values() if p.is_cuda})
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int.from_bytes(self._entropy.take(8), "little") >> 1)
            yield

    def _noise(self, sums: Sums) -> None:
        add_noise(sums.values(), self.policy.sigma * self.policy.clip, self._entropy)

    @torch.no_grad()
    def _pull(self) -> None:
        """Gradient of mu / 2 ||w - w_0||^2, after the noise."""
        for name, origin in self.anchor.items():
            parameter = self.parameters[name]
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach() - origin, alpha=self.proximal_mu)

    def _check(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.dtype not in _EXACT:
                raise ValueError(f"'{name}' is {parameter.dtype}; noise would be rounded off: train in float32")
        optimized = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        trained = {id(p) for p in self.parameters.values()}
        if optimized != trained:
            raise ValueError(
                f"the optimizer holds {len(optimized)} parameters, the network trains {len(trained)}: not the same ones"
            )


def take_steps(
    step: PrivateStep,
    sampler: PoissonSampler,
    rows: Callable[[int], Rows],
    count: int,
    before: Callable[[int], None] | None = None,
) -> None:
    """Exactly `count` private steps, each on a Poisson sample.

    Args:
        rows: the rows of a patient, by number; drawn anew at each call.
        before: told each step's number (0, 1, ...) ahead of it, for a learning rate that depends on it alone.

    Raises:
        ValueError: sampler and step disagree about q, or one of them can be foretold and the other not.
    """
    if sampler.q != step.policy.q:
        raise ValueError(f"the sampler draws with q = {sampler.q}, the policy accounts {step.policy.q}")
    if sampler.testing != step.testing:
        raise ValueError("a sampler that can be foretold must not feed a step of production, nor the other way round")
    for number, chosen in enumerate(sampler.steps(count)):
        if before is not None:
            before(number)
        step.take(rows(patient) for patient in chosen)


def released(delta: dict[str, Tensor], step: PrivateStep) -> dict[str, Tensor]:
    """What a private step trained, on its way out of the site.

    Raises:
        RuntimeError: its noise could be foretold.
    """
    if step.testing:
        raise RuntimeError("the noise of this training could be foretold; nothing of it may leave the site")
    return delta
