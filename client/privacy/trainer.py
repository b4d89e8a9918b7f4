"""A private training at a site: patients, sampler, step and schedule put together."""

from __future__ import annotations

from collections.abc import Callable

import torch

from client.privacy.engines import Engine, trained_parameters
from client.privacy.patients import DiffusionRowLoss, PatientRows
from client.privacy.policy import PrivacyPolicy
from client.privacy.sampling import PoissonSampler
from client.privacy.step import PrivateStep, take_steps
from medsegdiff.config import TrainingConfig
from medsegdiff.diffusion import Diffusion
from medsegdiff.ema import WeightAverage
from medsegdiff.network import MedSegDiff, channels_last
from medsegdiff.training import learning_rate, weight_decay_groups


class PrivateTrainer:
    """AdamW on noised gradients: the counterpart of `medsegdiff.training.Trainer` with patient-level privacy.

    Of the training's settings batch_size and gradient_clip have no meaning here: q and B, and the clip of each
    patient, stand in the policy. The rate's schedule depends on the step's number alone.

    Args:
        network: trained in place, on the device that it is on; its parameters that require a gradient are trained.
        patients: on the same device.
        total_steps: length of the whole training, for the rate's schedule.
        engine: how per-patient gradients are made; default: the patient loop.
        proximal_mu, average: see `PrivateStep`.
    """

    def __init__(
        self,
        network: MedSegDiff,
        diffusion: Diffusion,
        patients: PatientRows,
        training: TrainingConfig,
        policy: PrivacyPolicy,
        total_steps: int,
        engine: Engine | None = None,
        proximal_mu: float = 0.0,
        average: WeightAverage | None = None,
    ) -> None:
        self.network = channels_last(network)
        self.patients = patients
        self.training = training
        self.policy = policy
        self.total_steps = total_steps
        groups = weight_decay_groups(trained_parameters(network), training.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.99), fused=True)
        loss = DiffusionRowLoss(diffusion, training.auxiliary_weight, training.precision)
        self.private_step = PrivateStep(network, loss, policy, self.optimizer, engine, proximal_mu, average)
        self.sampler = PoissonSampler(len(patients), policy.q)

    def run(self, first: int, last: int, on_step: Callable[[int], None] | None = None) -> None:
        """Take steps first .. last - 1; `on_step` is told how many were taken.

        Returns nothing: every figure of a private step is a fact about patients.
        """
        self.network.train()

        def set_rate(number: int) -> None:
            if on_step is not None and number > 0:
                on_step(number)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.training, first + number, self.total_steps)

        take_steps(self.private_step, self.sampler, self.patients.rows, last - first, set_rate)
        if on_step is not None:
            on_step(last - first)
