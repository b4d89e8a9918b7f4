from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medsegdiff.data.dataset import open_dataset
from medsegdiff.errors import UserError
from medsegdiff.strict import parse_config
from simulations.partition import (
    MIN_PATIENTS,
    Partition,
    PartitionConfig,
    Patient,
    _share_out,
    partition_patients,
    patients_of,
)

ARTIFICIAL = ("iid", "dirichlet", "quantity")


def crowd(count: int) -> list[Patient]:
    """Patients of three hospitals, each with its own foreground size."""
    return [Patient(f"p{index:04d}", "ABC"[index % 3], float(index)) for index in range(count)]


def dealt(count: int, by: str, sites: int, alpha: float, seed: int) -> Partition:
    config = parse_config({"by": by, "sites": sites, "alpha": alpha}, PartitionConfig, "test")
    return partition_patients(crowd(count), config, seed)


def sizes(partition: Partition) -> list[int]:
    return [len(patients) for patients in partition.values()]


def mean_foregrounds(partition: Partition) -> list[float]:
    return [float(np.mean([int(name[1:]) for name in patients])) for patients in partition.values()]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Patient], PartitionConfig, int]:
    by = draw(st.sampled_from(ARTIFICIAL))
    sites = draw(st.integers(1, 12))
    names = draw(st.lists(st.text(min_size=1, max_size=4), unique=True, min_size=MIN_PATIENTS * sites, max_size=60))
    patients = [Patient(name, None, draw(st.floats(0, 1))) for name in names]
    alpha = draw(st.sampled_from([1e-3, 0.1, 0.5, 1.0, 10.0, 1e6]))
    config = parse_config({"by": by, "sites": sites, "alpha": alpha}, PartitionConfig, "test")
    return patients, config, draw(st.integers(0, 2**63))


@settings(max_examples=150, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_every_patient_is_in_exactly_one_site(problem, random) -> None:
    """Any partition is exact, gives no site less than it may have, and knows neither order nor clock."""
    patients, config, seed = problem
    partition = partition_patients(patients, config, seed)
    assert sorted(name for site in partition.values() for name in site) == sorted(p.patient_id for p in patients)
    assert len(partition) == config.sites
    assert min(sizes(partition)) >= MIN_PATIENTS
    random.shuffle(patients)
    assert partition_patients(patients, config, seed) == partition
    if config.by == "iid":
        assert max(sizes(partition)) - min(sizes(partition)) <= 1


@given(st.integers(0, 500), st.lists(st.floats(0, 1), min_size=1, max_size=30).filter(lambda parts: sum(parts) > 0))
def test_shares_are_whole_and_within_one_of_their_proportion(count, parts) -> None:
    """The shares sum to the count, none is off by a patient or more, and the largest remainders are rounded up."""
    proportions = np.array(parts) / np.sum(parts)
    shares = _share_out(count, proportions)
    assert shares.sum() == count
    assert shares.min() >= 0
    excess = shares - count * proportions
    assert np.abs(excess).max() < 1 + 1e-9
    assert excess.max() - excess.min() < 1 + 1e-9


@pytest.mark.parametrize("by", ARTIFICIAL)
def test_another_seed_gives_another_partition(by) -> None:
    """The seed matters, and equal seeds agree."""
    first, again, other = (dealt(60, by, 4, 0.5, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_dirichlet_skews_lesion_size_more_at_a_small_alpha() -> None:
    """Sites differ in mean foreground at alpha 0.1 far more than at 100, where they differ no more than by chance."""
    spread = {
        (by, alpha): np.mean([np.std(mean_foregrounds(dealt(200, by, 4, alpha, seed))) for seed in range(40)])
        for by, alpha in (("dirichlet", 0.1), ("dirichlet", 100.0), ("iid", 0.1))
    }
    assert spread["dirichlet", 0.1] > 3 * spread["dirichlet", 100.0]
    assert spread["dirichlet", 100.0] < 1.5 * spread["iid", 0.1]
    assert np.mean([np.std(sizes(dealt(200, "iid", 4, 0.1, seed))) for seed in range(5)]) == 0


@pytest.mark.parametrize("alpha", [0.3, 2.0, 20.0])
def test_quantity_sizes_vary_as_a_dirichlet_does(alpha) -> None:
    """The variance of a site's share is (1/K)(1 - 1/K)/(K alpha + 1); 2/3 and 3/2 of alpha are told apart."""
    count, sites = 400, 4
    free = count - MIN_PATIENTS * sites
    shares = np.array([sizes(dealt(count, "quantity", sites, alpha, seed)) for seed in range(700)])
    found = float(np.mean(((shares - MIN_PATIENTS) / free - 1 / sites) ** 2))

    def expected(concentration: float) -> float:
        return (1 / sites) * (1 - 1 / sites) / (sites * concentration + 1)

    error = abs(found / expected(alpha) - 1)
    assert error < 0.12
    for wrong in (alpha * 2 / 3, alpha * 3 / 2):
        assert abs(found / expected(wrong) - 1) > error


def test_quantity_leaves_lesion_size_to_chance() -> None:
    """Big sites and small sites see lesions of the same size on average."""
    means = [mean_foregrounds(dealt(300, "quantity", 3, 0.5, seed)) for seed in range(60)]
    assert np.mean(means) == pytest.approx(149.5, rel=0.05)


def test_by_site_is_the_column() -> None:
    """Real sites come back as they are, in the order of their names."""
    partition = partition_patients(crowd(10)[::-1], PartitionConfig(by="site"), seed=5)
    assert list(partition) == ["A", "B", "C"]
    assert partition["B"] == ["p0001", "p0004", "p0007"]


def test_a_patient_without_site_stops_a_partition_by_site() -> None:
    """The count and the first patient are named, and the way out."""
    with pytest.raises(UserError, match=r"1 of 4 patients have no site \(the first: x\).*iid"):
        partition_patients([*crowd(3), Patient("x")], PartitionConfig(by="site"), seed=0)


@pytest.mark.parametrize(("by", "sites", "most"), [("iid", 6, 5), ("dirichlet", 6, 5), ("quantity", 3, 2)])
def test_too_few_patients_are_refused_with_the_numbers(by, sites, most) -> None:
    """Five patients do not fill so many sites; one site fewer than needed works."""
    with pytest.raises(UserError, match=rf"5 patients cannot be dealt out to {sites} sites.*Set sites to {most} or"):
        dealt(5, by, sites, 1.0, 0)
    assert min(sizes(dealt(5, by, most, 1.0, 0))) >= 1


def test_a_patient_listed_twice_is_refused() -> None:
    """One patient could otherwise come to two sites."""
    with pytest.raises(UserError, match=r"1 of 4 listed patients .*p0000"):
        partition_patients([*crowd(3), crowd(1)[0]], PartitionConfig(by="iid", sites=2), seed=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"by": "site", "sites": 3}, "leave out sites"),
        ({"by": "iid"}, "needs a number of sites"),
        ({"by": "iid", "sites": 0}, "needs a number of sites"),
        ({"by": "dirichlet", "sites": 2, "alpha": 0}, "alpha must lie in"),
        ({"by": "dirichlet", "sites": 2, "alpha": float("nan")}, "alpha must lie in"),
        ({"by": "random"}, "by"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(data, message) -> None:
    """The error names the file and the key."""
    with pytest.raises(UserError, match=message):
        parse_config(data, PartitionConfig, "run.yaml")


def test_foreground_is_the_share_of_target_voxels(tmp_path: Path) -> None:
    """Shares are summed over a patient's cases; labels outside the targets and unreadable masks count for nothing."""
    (tmp_path / "dataset.yaml").write_text(
        "name: t\nmodality: US\nchannels: [grey]\nlabels: {background: 0, nodule: 1, ruler: 2}\n"
        "targets: {nodule: [nodule]}\n"
    )
    masks = {"a1": 3, "a2": 5, "b1": 2, "c1": None}
    rows = ["case_id,patient_id,site,image_path,mask_path"]
    for name, count in masks.items():
        mask = np.zeros((4, 4), np.uint8)
        mask[3] = 2
        mask.flat[: count or 0] = 1
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
        if count is None:
            (tmp_path / f"{name}.png").write_bytes(b"torn")
        rows.append(f"{name},{name[0]},S,{name}.png,{name}.png")
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    dataset = open_dataset(tmp_path)

    assert patients_of(dataset, PartitionConfig(by="dirichlet", sites=2)) == (
        Patient("a", "S", 8 / 32),
        Patient("b", "S", 2 / 16),
        Patient("c", "S", 0.0),
    )
    assert {patient.foreground for patient in patients_of(dataset, PartitionConfig(by="iid", sites=2))} == {0.0}
