"""Rows of a patient: m K of them, from all its scans and from no one else's, whatever the number of its slices."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from client.privacy.engines import PatientLoop
from client.privacy.entropy import SeededEntropy
from client.privacy.gate import require_exact
from client.privacy.patients import DiffusionRowLoss, PatientRows
from client.privacy.policy import PrivacyPolicy
from medsegdiff.config import AugmentConfig, DiffusionConfig, ModelConfig, TrainingConfig
from medsegdiff.data.cases import Case, Dataset, DatasetConfig
from medsegdiff.data.prepare import prepare
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.diffusion import Diffusion
from medsegdiff.errors import UserError
from medsegdiff.labels import LabelScheme
from medsegdiff.network import MedSegDiff
from medsegdiff.objective import denoising_loss
from tests.client.privacy.rows import POLICY

STILL = TrainingConfig(
    augment=AugmentConfig(flip=False, rotate_degrees=0, scale=0, shift=0, intensity=0, gamma=0, noise=0)
)
Cases = tuple[tuple[PreparedCase, ...], LabelScheme]


@pytest.fixture
def scans(tmp_path: Path) -> Cases:
    """Three patients: one scan of 2 slices; two scans of 3 and 4; one of 12. Each slice has a grey level of its own."""
    import nibabel

    cases, level = [], 0
    for number, (patient, depth) in enumerate((("ann", 2), ("bob", 3), ("bob", 4), ("eve", 12))):
        image, mask = np.zeros((8, 8, depth), np.float32), np.zeros((8, 8, depth), np.uint8)
        for k in range(depth):
            image[:4, :, k] = level
            level += 1
        if patient != "ann":
            mask[2:5, 2:5, 0] = 1  # the first slice of each scan of bob and eve holds the target
        files = []
        for name, data in (("image", image), ("mask", mask)):
            files.append(tmp_path / f"{name}{number}.nii")
            nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), files[-1])
        cases.append(Case(f"c{number}", patient, (files[0],), (files[1],)))
    config = DatasetConfig(name="scans", modality="MR", channels=("MR",), labels={"background": 0, "target": 1})
    return prepare(Dataset(tmp_path, config, tuple(cases)), 8, tmp_path / "cache").cases, LabelScheme.of(config)


def rows_of(
    scans: Cases, training: TrainingConfig = STILL, policy: PrivacyPolicy = POLICY, **options: object
) -> PatientRows:
    settings = {"timesteps": 1000, "self_conditioning": False, "entropy": SeededEntropy(0)} | options
    return PatientRows(*scans, training, policy, **settings)  # type: ignore[arg-type]


def test_patients_not_scans(scans: Cases) -> None:
    """Two scans of one patient are one patient, in an order that depends on names alone."""
    data = rows_of(scans)
    assert len(data) == 3
    assert data.patients == ["ann", "bob", "eve"]
    assert rows_of((scans[0][::-1], scans[1])).patients == data.patients


@pytest.mark.parametrize("patient", [0, 1, 2])
def test_as_many_rows_whatever_the_patient_has(scans: Cases, patient: int) -> None:
    """m K rows of 2, 7 or 12 slices, in the shapes that the loss takes."""
    policy = dataclasses.replace(POLICY, slices=5, draws=3)
    rows = rows_of(scans, policy=policy, self_conditioning=True).rows(patient)
    assert {name: tuple(value.shape) for name, value in rows.items()} == {
        "images": (15, 1, 8, 8), "masks": (15, 1, 8, 8), "noise": (15, 1, 8, 8), "t_B": (15,), "condition_B": (15,),
    }  # fmt: skip
    assert set(rows["masks"].unique().tolist()) <= {-1.0, 1.0}


def test_k_draws_of_each_slice(scans: Cases) -> None:
    """K rows in a row show one slice, each with a timestep and noise of its own."""
    rows = rows_of(scans, policy=dataclasses.replace(POLICY, slices=3, draws=4)).rows(2)
    for start in range(0, 12, 4):
        block = slice(start, start + 4)
        assert torch.equal(rows["images"][block], rows["images"][start].expand(4, -1, -1, -1))
        assert len(rows["noise"][block].flatten(1).unique(dim=0)) == 4
        assert len(rows["t_B"][block].unique()) > 1


def drawn_slices(scans: Cases, patient: int, times: int, training: TrainingConfig = STILL) -> Counter[int]:
    """How often each slice (by its number over all cases) was drawn."""
    policy = dataclasses.replace(POLICY, slices=4, draws=1)
    data = rows_of(scans, training, policy)
    everything = [image.flatten() for case in scans[0] for image in case.images()]
    counts: Counter[int] = Counter()
    for _ in range(times):
        for image in data.rows(patient)["images"]:
            (number,) = [n for n, known in enumerate(everything) if torch.equal(known, image.flatten())]
            counts[number] += 1
    return counts


def test_a_patient_gives_its_own_slices_evenly(scans: Cases) -> None:
    """Bob's 7 slices of two scans, each as often as any other; nobody else's."""
    counts = drawn_slices(scans, 1, 400)
    assert sum(counts.values()) == 1600
    assert set(counts) == set(range(2, 9))
    assert chisquare([counts[number] for number in range(2, 9)]).pvalue > 1e-4


def test_foreground_is_the_patients_own(scans: Cases) -> None:
    """Half of eve's rows show her one slice with the target, beside chance; ann, who has none, gives what she has."""
    training = dataclasses.replace(STILL, foreground_fraction=0.5)
    policy = dataclasses.replace(POLICY, slices=4, draws=1)
    marked = [float((rows_of(scans, training, policy).rows(2)["masks"] > 0).flatten(1).any(dim=1).sum())]
    assert marked[0] >= 2
    data = rows_of(scans, training, policy)
    share = np.mean([(data.rows(2)["masks"] > 0).flatten(1).any(dim=1).float().mean().item() for _ in range(200)])
    assert share == pytest.approx(0.5 + 0.5 / 12, abs=0.05)
    assert not (data.rows(0)["masks"] > 0).any()


def test_drawn_anew_each_time(scans: Cases) -> None:
    """Two calls differ; the same source repeats them; production's source repeats nothing."""
    data, again = rows_of(scans), rows_of(scans)
    first, second = data.rows(2), data.rows(2)
    assert not torch.equal(first["noise"], second["noise"])
    assert all(torch.equal(first[name], value) for name, value in again.rows(2).items())
    fresh = [PatientRows(*scans, STILL, POLICY, 1000, False).rows(2)["noise"] for _ in range(2)]
    torch.manual_seed(0)
    assert not torch.equal(*fresh)


def test_timesteps_cover_the_range(scans: Cases) -> None:
    """Uniform over 0 .. T - 1."""
    data = rows_of(scans, timesteps=10)
    counts = torch.cat([data.rows(0)["t_B"] for _ in range(200)]).bincount(minlength=10)
    assert counts.shape == (10,)
    assert chisquare(counts.numpy()).pvalue > 1e-4


def test_the_loss_is_denoising_loss(scans: Cases) -> None:
    """Nothing is added to it or left out, and an engine treats it exactly."""
    config = ModelConfig(8, 1, 1, 8, (1, 2), 1, (1,), (1,), auxiliary_head=True)
    torch.manual_seed(0)
    net, diffusion = MedSegDiff(config), Diffusion(DiffusionConfig())
    rows = rows_of(scans).rows(1)
    expected = denoising_loss(net, diffusion, rows["images"], rows["masks"], rows["noise"], rows["t_B"], 0.3)
    assert torch.equal(DiffusionRowLoss(diffusion, 0.3)(net, rows), expected)
    few = {name: value[:3] for name, value in rows.items()}
    require_exact(net, DiffusionRowLoss(diffusion, 0.3), [few, rows], PatientLoop())


def test_bf16_gradients_arrive_in_float32() -> None:
    """Autocast lowers the matrix work alone; the sum that noise is added to is float64."""
    from tests.client.privacy.rows import BASE, distance, network, patient

    net, people = network(BASE), [patient(BASE, 2, 1)]
    sums = [
        PatientLoop().clipped_sum(net, DiffusionRowLoss(Diffusion(DiffusionConfig()), 0.0, precision), people, 1.0)
        for precision in ("fp32", "bf16")
    ]
    assert {value.dtype for value in sums[1].values()} == {torch.float64}
    assert 1e-5 < distance(sums[1], sums[0]) < 0.2


def test_no_case_is_refused(scans: Cases) -> None:
    """There is nobody to train on."""
    with pytest.raises(UserError, match="no case to train on"):
        rows_of(((), scans[1]))
