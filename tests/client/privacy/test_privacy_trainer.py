"""A private training of a site's own patients, from site.yaml's folder to trained weights."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from client.contract import TrainTask
from client.privacy.engines import PatientLoop, Rows
from client.privacy.patients import PatientRows
from client.privacy.policy import PrivacyPolicy
from client.privacy.step import PrivateStep
from client.privacy.trainable import TrainableSet, attach, merge
from client.privacy.trainer import PrivateTrainer
from client.site import open_site
from medsegdiff.training import learning_rate
from medsegdiff.weights import Segmenter, build, initial_weights, weight_shapes

POLICY = PrivacyPolicy(
    epsilon=1e6, delta=1e-3, sigma=0.5, q=0.6, clip=1e-3, batch=2, steps=4, rounds=1, slices=2, draws=2
)


@pytest.fixture
def prepared(tiny_world: Path, tiny_task: TrainTask) -> tuple[Segmenter, PatientRows]:
    """A fresh network of the tiny task and the three training patients of one virtual hospital."""
    segmenter = build(tiny_task.card, initial_weights(tiny_task.model, 1))
    data = open_site(tiny_world / "alder" / "site.yaml").data(tiny_task)
    return segmenter, rows_of(data.train, segmenter, tiny_task, POLICY)


def rows_of(cases: object, segmenter: Segmenter, task: TrainTask, policy: PrivacyPolicy) -> PatientRows:
    config = segmenter.card
    return PatientRows(
        cases, segmenter.scheme, task.training, policy, config.diffusion.timesteps, config.model.self_conditioning  # type: ignore[arg-type]
    )  # fmt: skip


def trainer(
    segmenter: Segmenter, rows: PatientRows, task: TrainTask, policy: PrivacyPolicy = POLICY, **options: object
) -> PrivateTrainer:
    return PrivateTrainer(segmenter.network, segmenter.diffusion, rows, task.training, policy, 8, **options)  # type: ignore[arg-type]


def test_a_round_trains(prepared: tuple[Segmenter, PatientRows], tiny_task: TrainTask) -> None:
    """Every weight moves and stays finite, and nothing is told."""
    segmenter, rows = prepared
    before = copy.deepcopy(segmenter.network.state_dict())
    private = trainer(segmenter, rows, tiny_task)
    assert private.run(0, 4) is None  # type: ignore[func-returns-value]
    after = segmenter.network.state_dict()
    assert all(bool(value.isfinite().all()) and not torch.equal(value, before[name]) for name, value in after.items())
    assert not private.private_step.testing


def test_a_fine_tuning_round_gives_a_plain_delta(prepared: tuple[Segmenter, PatientRows], tiny_task: TrainTask) -> None:
    """Corrections attached, trained and merged: a delta over the model's own names, zero where nothing is trained."""
    segmenter, rows = prepared
    received = copy.deepcopy(segmenter.network.state_dict())
    attach(segmenter.network, tiny_task.seed, TrainableSet(2, True, True))
    trainer(segmenter, rows, tiny_task).run(0, 4)
    delta = {name: value - received[name] for name, value in merge(segmenter.network).items()}
    assert {name: tuple(value.shape) for name, value in delta.items()} == weight_shapes(tiny_task.model)
    assert not delta["image_stem.weight"].any()
    assert not delta["fusions.1.parser.map"].any()
    assert delta["mask_stages.1.attention.out.weight"].any()
    assert delta["out_norm.weight"].any()


class Noted(PatientLoop):
    """Writes down how many rows of how many patients it was given, and the rate at which they are learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def clipped_sum(self, network, loss, patients, clip):  # type: ignore[no-untyped-def]
        drawn = list(patients)
        self.seen.append([len(rows["masks"]) for rows in drawn])
        assert network.training
        return super().clipped_sum(network, loss, drawn, clip)


def test_steps_rows_and_rates(
    prepared: tuple[Segmenter, PatientRows], tiny_task: TrainTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many steps as asked, m K rows a patient, and the rate of each step's own number in the whole training."""
    segmenter, rows = prepared
    engine, rates = Noted(), list[float]()
    private = trainer(segmenter, rows, tiny_task, engine=engine)
    take = PrivateStep.take

    def noted(self: PrivateStep, patients: list[Rows]) -> None:
        rates.extend({group["lr"] for group in private.optimizer.param_groups})
        take(self, patients)

    monkeypatch.setattr(PrivateStep, "take", noted)
    private.run(4, 8)
    assert len(engine.seen) == 4
    assert {count for step in engine.seen for count in step} <= {4}
    assert rates == [learning_rate(tiny_task.training, step, 8) for step in range(4, 8)]


@pytest.mark.slow
def test_private_training_learns_when_the_noise_is_small(tiny_world: Path, tiny_task: TrainTask) -> None:
    """Next to no noise (an epsilon beyond meaning): the loss on the site's patients falls as in any training."""
    policy = dataclasses.replace(POLICY, clip=0.5, q=1.0, batch=3, steps=120)
    segmenter = build(tiny_task.card, initial_weights(tiny_task.model, 1))
    data = open_site(tiny_world / "alder" / "site.yaml").data(tiny_task)
    rows = rows_of(data.train, segmenter, tiny_task, policy)
    # Not a policy that can be had: sigma below the least is put past the checks to see the machinery learn.
    object.__setattr__(policy, "sigma", 0.001)
    private = PrivateTrainer(segmenter.network, segmenter.diffusion, rows, tiny_task.training, policy, 120)
    probe = [rows.rows(patient) for patient in range(len(rows)) for _ in range(4)]

    def loss() -> float:
        with torch.no_grad():
            return float(torch.stack([private.private_step.loss(segmenter.network, one) for one in probe]).mean())

    before = loss()
    private.run(0, 120)
    assert loss() < 0.4 * before
