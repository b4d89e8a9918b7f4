"""The published datasets load with the configurations that ship with the program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import simulations
from medsegdiff.data.dataset import open_dataset
from medsegdiff.data.geometry import restack, restore
from medsegdiff.data.prepare import prepare
from medsegdiff.data.splits import split_patients
from medsegdiff.labels import LabelScheme
from medsegdiff.metrics import score_patients
from simulations.published.catalogue import PUBLISHED

CONFIGS = Path(simulations.__file__).parent / "datasets"

# name -> cases, patients, cases to prepare, kind of targets, image channels, diffused channels
EXPECTED = {
    "lgg_tcga": (392, 40, 6, "binary", 3, 1),
    "msd_hippocampus": (120, 120, 2, "multiclass", 1, 3),
    "ddti_thyroid": (199, 120, 4, "binary", 1, 1),
    "drishti_gs_cupdisc": (48, 48, 2, "regions", 3, 2),
    "cxr_multihospital": (28, 23, 2, "multiclass", 1, 3),
    "brats2015_3d": (2, 2, 1, "regions", 2, 3),
}


def test_every_shipped_configuration_is_tested() -> None:
    """No dataset.yaml is added without a line here, or an importer, which has tests of its own."""
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXPECTED) | set(PUBLISHED)


SLOW = {"brats2015_3d"}  # ten million voxels a file


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in EXPECTED])
def test_real_cases_are_prepared_at_64_pixels(real_data: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Counts are those of the source, a few cases prepare without a fault, and scoring the truth itself is perfect."""
    cases, patients, few, kind, channels, diffused = EXPECTED[name]
    dataset = open_dataset(real_data(name), CONFIGS / f"{name}.yaml")
    assert len(dataset.cases) == cases
    split = split_patients(dataset.cases, 0.25, 0.0, 0)
    assert len(split) == patients
    scheme = LabelScheme.of(dataset.config)
    assert (scheme.kind, scheme.channels) == (kind, diffused)

    prepared = prepare(dataclasses.replace(dataset, cases=dataset.cases[:few]), 64, tmp_path)
    assert not prepared.faults
    for case in prepared.cases:
        images = case.images()
        assert images.shape == (case.slices, channels, 64, 64)
        assert images.isfinite().all()
        assert images.abs().max() <= 5
        truth = scheme.truth(case.native_labels())[0]
        small = scheme.truth(torch.stack([case.labels(index) for index in range(case.slices)]))
        back = restack(restore(small.float(), case.geometry), case.geometry) > 0.5
        overlap = 2 * (back & truth).sum() / (back.sum() + truth.sum()).clamp_min(1)
        # Masks that went to 64 pixels and back still overlap: nothing is turned, mirrored or shifted.
        assert overlap > 0.8 or not truth.any()
    perfect = score_patients(scheme, ((case, scheme.truth(case.native_labels())[0]) for case in prepared.cases), False)
    assert all(score.mean_dice == 1.0 for score in perfect)


def test_the_real_sites_of_lgg_tcga_are_kept(real_data: Callable[[str], Path]) -> None:
    """Four institutions with ten patients each."""
    dataset = open_dataset(real_data("lgg_tcga"), CONFIGS / "lgg_tcga.yaml")
    by_site = {case.patient_id: case.site for case in dataset.cases}
    assert sorted(set(by_site.values()), key=str) == ["CS", "DU", "FG", "HT"]
    assert all(list(by_site.values()).count(site) == 10 for site in ("CS", "DU", "FG", "HT"))
