"""Patients are scored once, over everything there is of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist
from scipy.stats import binomtest
from torch import Tensor

from medsegdiff.data.cases import Case
from medsegdiff.data.geometry import Geometry
from medsegdiff.data.prepared import PreparedCase, load, store
from medsegdiff.labels import LabelScheme
from medsegdiff.metrics import (
    PatientScore,
    PatientScorer,
    VolumeError,
    VolumeRange,
    coverage,
    dice,
    hd95_mm,
    iou,
    majority,
    score_patients,
    wilson_95,
)
from medsegdiff.surface import score_surface

BINARY = LabelScheme(("background", "lesion"), ("lesion",), ((1,),))
REGIONS = LabelScheme(("background", "rim", "cup"), ("disc", "cup"), ((1, 2), (2,)))
DISJOINT = LabelScheme(("background", "a", "b"), ("a", "b"), ((1,), (2,)))


def make_case(
    folder: Path, labels: Tensor, case: Case, spacing: tuple[float, ...] | None = (1.0, 1.0, 1.0)
) -> PreparedCase:
    """A prepared case whose truth is `labels` (R, X, Y, Z); its images do not matter here."""
    path = folder / f"{case.case_id}.safetensors"
    raters, x, y, z = labels.shape
    small = torch.zeros(raters, z, 4, 4, dtype=torch.uint8)
    store(path, torch.zeros(z, 1, 4, 4), small, labels.to(torch.uint8), Geometry((x, y, z), 2, spacing))
    prepared = load(path, case)
    assert prepared is not None
    return prepared


def new_case(case_id: str, patient: str = "p", **more: object) -> Case:
    return Case(case_id, patient, (), (), **more)  # type: ignore[arg-type]


def blob(shape: tuple[int, ...], *ranges: tuple[int, int]) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[tuple(slice(*bounds) for bounds in ranges)] = True
    return mask


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_dice_equals_the_set_formula_over_all_images_of_a_patient(
    tmp_path_factory: object, seed: int, images: int
) -> None:
    """Voxels of all images are pooled: 2 |A and B| / (|A| + |B|), not the mean of the images' coefficients."""
    folder = tmp_path_factory.mktemp("cases")  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    first, second = set(), set()
    for number in range(images):
        truth = torch.randint(0, 2, (1, 4, 3, 2), generator=generator)
        predicted = torch.rand(1, 4, 3, 2, generator=generator) < 0.4
        pairs.append((make_case(folder, truth, new_case(f"c{number}")), predicted))
        first |= {(number, *voxel) for voxel in truth[0].nonzero().tolist()}
        second |= {(number, *voxel) for voxel in predicted[0].nonzero().tolist()}
    (score,) = score_patients(BINARY, pairs, distances=False)
    expected = 2 * len(first & second) / (len(first) + len(second)) if first or second else 1.0
    assert score.dice["lesion"] == pytest.approx(expected)
    assert score.mean_dice == pytest.approx(expected)
    assert (score.volumes, score.hd95_mm["lesion"]) == (images, None)


@given(trials=st.integers(1, 400), data=st.data())
@settings(max_examples=60, deadline=None)
def test_wilson_interval_equals_scipys(trials: int, data: st.DataObject) -> None:
    """Scipy's, for every count; it holds the share itself and stays within [0, 1]."""
    hits = data.draw(st.integers(0, trials))
    low, high = wilson_95(hits, trials)
    theirs = binomtest(hits, trials).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert 0 <= low <= hits / trials <= high <= 1


def test_volume_ranges_are_sums_over_a_patients_images(tmp_path: Path) -> None:
    """In ml where every spacing is known, each image by its own; in voxels otherwise; ends count as covered."""
    shape, truth = (4, 3, 2), blob((1, 4, 3, 2), (0, 1), (0, 2))
    members = [torch.tensor([[12], [20]]), torch.tensor([[12], [13]])]
    spacings: list[tuple[float, ...] | None] = [(10.0, 10.0, 10.0), (10.0, 10.0, 20.0)]
    for known in (True, False):
        scorer = PatientScorer(BINARY, distances=False)
        for number, (spacing, sizes) in enumerate(zip(spacings, members, strict=True)):
            mm = spacing if known or number else None
            prepared = make_case(tmp_path, truth, new_case(f"c{number}"), mm)
            scorer.add(prepared, torch.zeros(1, *shape, dtype=torch.bool), sizes)
        (score,) = scorer.scores()
        size = score.sizes["lesion"]
        expected = ("ml", 36.0, 36.0, 46.0) if known else ("voxels", 24.0, 24.0, 33.0)
        assert (size.unit, size.true, size.low, size.high) == expected
        assert (size.predicted, size.covered) == (0.0, True)
    scorer = PatientScorer(BINARY, distances=False)
    scorer.add(make_case(tmp_path, truth, new_case("alone")), truth.bool(), torch.tensor([[12]]))
    assert scorer.scores()[0].sizes == {}
    assert coverage(scorer.scores(), 1) == {}
    assert coverage([], 5) == {}


def test_coverage_counts_patients_whose_truth_lies_in_the_range() -> None:
    """Two of three; five members would hold a sixth in 4 of 6 cases."""
    ranges = [(5.0, 4.0, 6.0), (7.0, 4.0, 6.0), (4.0, 4.0, 6.0)]
    patients = [
        PatientScore("p", None, {}, 1.0, {}, {}, 1, {"lesion": VolumeRange("ml", true, 5.0, low, high)})
        for true, low, high in ranges
    ]
    found = coverage(patients, 5)["lesion"]
    assert (found.covered, found.patients, found.share) == (2, 3, pytest.approx(2 / 3))
    assert found.wilson_95 == wilson_95(2, 3)
    assert found.expected == pytest.approx(4 / 6)


def test_the_expected_coverage_is_that_of_one_more_draw() -> None:
    """The smallest and largest of M draws hold another one with probability (M - 1) / (M + 1)."""
    draws = torch.rand(40_000, 6, generator=torch.Generator().manual_seed(0))
    held = (draws[:, 5] >= draws[:, :5].amin(dim=1)) & (draws[:, 5] <= draws[:, :5].amax(dim=1))
    patients = [PatientScore("p", None, {}, 1.0, {}, {}, 1, {"lesion": VolumeRange("ml", 1, 1, 1, 1)})]
    assert coverage(patients, 5)["lesion"].expected == pytest.approx(float(held.float().mean()), abs=0.01)


def test_dice_of_empty_masks() -> None:
    """Both empty agree; one empty does not."""
    assert (dice(0, 0, 0), dice(0, 5, 0), dice(0, 0, 5), dice(5, 5, 5), dice(1, 2, 2)) == (1.0, 0.0, 0.0, 1.0, 0.5)


def test_iou_is_dice_by_another_measure() -> None:
    """D / (2 - D) for every count, the empty ones among them: 1 where both masks are empty, 0 where one is."""
    for overlap, predicted, true in [(0, 0, 0), (0, 5, 0), (0, 0, 5), (5, 5, 5), (1, 2, 2), (3, 4, 9)]:
        found = dice(overlap, predicted, true)
        assert iou(overlap, predicted, true) == pytest.approx(found / (2 - found))
    assert iou(1, 2, 2) == pytest.approx(1 / 3)


def test_volume_errors_of_empty_masks() -> None:
    """Signed; as a share of the truth -1 where nothing was found, 0 of nothing, undefined where nothing was there."""
    known = {(0.0, 0.0): (0.0, 0.0), (2.0, 0.0): (-2.0, -1.0), (0.0, 2.0): (2.0, None), (2.0, 3.0): (1.0, 0.5)}
    for (true, predicted), expected in known.items():
        found = VolumeError("ml", true, predicted)
        assert (found.error, found.relative) == expected


def test_volumes_are_summed_over_a_patients_images(tmp_path: Path) -> None:
    """With one member or several; ml by each image's own spacing, voxels where one is unknown; targets overlap."""
    truth = blob((1, 4, 3, 2), (0, 1), (0, 2)).int() + blob((1, 4, 3, 2), (0, 1), (0, 1)).int()  # 6 rim, 6 cup
    for second, unit, expected in [((10.0, 10.0, 20.0), "ml", 12 + 24), (None, "voxels", 24)]:
        scorer = PatientScorer(REGIONS, distances=False)
        for number, mm in enumerate([(10.0, 10.0, 10.0), second]):
            members = torch.full((3, 2), 7) if number < 2 else None
            prepared = make_case(tmp_path, truth, new_case(f"c{number}"), mm)
            scorer.add(prepared, torch.ones(2, 4, 3, 2, dtype=torch.bool), members)
        (score,) = scorer.scores()
        assert score.volume["disc"] == VolumeError(unit, expected, 2 * expected)
        assert score.volume["cup"] == VolumeError(unit, expected / 2, 2 * expected)
        assert (score.volume["cup"].relative, score.sizes["cup"].true) == (3.0, expected / 2)
        assert score.iou == {"disc": 0.5, "cup": 0.25}
        assert scorer.mean_dice("p") == score.mean_dice == pytest.approx((2 / 3 + 0.4) / 2)


def test_surfaces_are_averaged_over_volumes_and_only_when_asked(tmp_path: Path) -> None:
    """An empty prediction has no distance and a surface Dice of 0; without a tolerance neither is there."""
    truth = blob((12, 12, 6), (2, 8), (2, 8), (1, 5)).int()
    predictions = [truth > 0, truth.roll(1, 0) > 0, torch.zeros(12, 12, 6, dtype=torch.bool)]
    pairs = [(make_case(tmp_path, truth[None], new_case(f"c{n}")), p[None]) for n, p in enumerate(predictions)]
    (plain,) = score_patients(BINARY, pairs)
    assert (plain.assd_mm, plain.surface_dice) == ({}, {})
    scorer = PatientScorer(BINARY, tolerance_mm=0.5)
    for prepared, predicted in pairs:
        scorer.add(prepared, predicted)
    (score,) = scorer.scores()
    shifted = score_surface(predictions[1], truth > 0, (1.0, 1.0, 1.0), 0.5)
    assert shifted.assd_mm is not None
    assert shifted.surface_dice is not None
    assert score.assd_mm["lesion"] == pytest.approx(shifted.assd_mm / 2)
    assert score.surface_dice["lesion"] == pytest.approx((1 + shifted.surface_dice + 0) / 3)
    assert (score.hd95_mm, score.hd95_undefined, score.volumes) == (plain.hd95_mm, plain.hd95_undefined, 3)


def naive_hd95(predicted: Tensor, truth: Tensor, spacing: tuple[float, ...]) -> float:
    """All distances between all surface voxels."""

    def surface(mask: Tensor) -> Tensor:
        array = mask.numpy()
        return torch.from_numpy(array & ~binary_erosion(array)).nonzero() * torch.tensor(spacing)

    distances = torch.from_numpy(cdist(surface(predicted), surface(truth)))
    one, two = distances.amin(dim=1), distances.amin(dim=0)
    return max(torch.quantile(one, 0.95).item(), torch.quantile(two, 0.95).item())


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 2.0, 3.0)])
@pytest.mark.parametrize("seed", range(3))
def test_hd95_equals_the_distances_between_all_surface_voxels(seed: int, spacing: tuple[float, float, float]) -> None:
    """MONAI with our arguments gives what the obvious table of distances gives, in millimetres."""
    generator = torch.Generator().manual_seed(seed)
    predicted = blob((12, 11, 10), (2, 7), (3, 8), (1, 6)) & (torch.rand(12, 11, 10, generator=generator) < 0.9)
    truth = blob((12, 11, 10), (4, 10), (2, 9), (3, 8))
    assert hd95_mm(predicted, truth, spacing) == pytest.approx(naive_hd95(predicted, truth, spacing), rel=1e-5)
    assert hd95_mm(truth, predicted, spacing) == pytest.approx(naive_hd95(truth, predicted, spacing), rel=1e-5)


def test_hd95_of_a_picture_is_measured_in_its_plane() -> None:
    """Rows and columns have their own spacing, and the third axis, one pixel thick, plays no part."""
    predicted, truth = blob((20, 20, 1), (5, 10), (5, 10), (0, 1)), blob((20, 20, 1), (5, 10), (8, 13), (0, 1))
    assert hd95_mm(predicted, truth, (0.5, 2.0)) == pytest.approx(6.0)
    assert hd95_mm(predicted, truth, (0.5, 2.0, 99.0)) == pytest.approx(6.0)
    assert hd95_mm(predicted.movedim(0, 1), truth.movedim(0, 1), (0.5, 2.0)) == pytest.approx(1.5)
    line = blob((5, 1, 1), (1, 2), (0, 1), (0, 1))
    assert hd95_mm(line, line.roll(2, 0), (2.0, 1.0)) == pytest.approx(4.0)


def test_hd95_of_empty_masks() -> None:
    """Both empty are at distance 0; one empty has no distance; nothing is ever NaN."""
    full, empty = blob((4, 4, 4), (1, 3), (1, 3), (1, 3)), torch.zeros(4, 4, 4, dtype=torch.bool)
    assert hd95_mm(empty, empty, (1, 1, 1)) == 0.0
    assert hd95_mm(full, empty, (1, 1, 1)) is None
    assert hd95_mm(empty, full, (1, 1, 1)) is None


def test_a_patients_distance_is_the_mean_over_volumes(tmp_path: Path) -> None:
    """Undefined volumes are counted, not averaged; unknown spacing gives no distance at all."""
    truth = blob((12, 12, 4), (2, 6), (2, 6), (1, 3)).int()
    predictions = [truth.roll(2, 0) > 0, truth.roll(4, 0) > 0, torch.zeros(12, 12, 4, dtype=torch.bool)]
    pairs = [
        (make_case(tmp_path, truth[None], new_case(f"c{n}"), (1.0, 1.0, 5.0)), predicted[None])
        for n, predicted in enumerate(predictions)
    ]
    (score,) = score_patients(BINARY, pairs)
    assert score.hd95_mm["lesion"] == pytest.approx(3.0)
    assert score.hd95_undefined == {"lesion": 1}
    assert score.volumes == 3
    nowhere = [(make_case(tmp_path, truth[None], new_case("d"), None), predictions[0][None])]
    (score,) = score_patients(BINARY, nowhere)
    assert (score.hd95_mm["lesion"], score.hd95_undefined["lesion"], score.volumes) == (None, 0, 1)


def stack(folder: Path, truth: Tensor, indices: list[int], spacing: tuple[float, ...] | None) -> list[PreparedCase]:
    """The slices of (X, Y, Z) labels as cases of one volume, with the given slice numbers."""
    return [
        make_case(
            folder,
            truth[None, :, :, n : n + 1],
            new_case(f"s{index}", volume_id="v", slice_index=index, site="north"),
            spacing,
        )
        for n, index in enumerate(indices)
    ]


def test_slices_are_stacked_and_freed_when_the_last_has_come(tmp_path: Path) -> None:
    """In whatever order slices come, the score is that of the volume; the scorer keeps no finished stack."""
    truth = blob((10, 10, 5), (2, 6), (2, 6), (1, 4)).int() + blob((10, 10, 5), (3, 5), (3, 5), (2, 4)).int()
    predicted = REGIONS.truth(truth.roll(1, 2)[None])[0]
    spacing = (1.0, 1.0, 4.0)
    (tmp_path / "whole").mkdir()
    whole = make_case(tmp_path / "whole", truth[None], new_case("whole", site="north"), spacing)
    (expected,) = score_patients(REGIONS, [(whole, predicted)])
    assert expected.hd95_mm["disc"] == pytest.approx(4.0)
    slices = stack(tmp_path, truth, [7, 8, 9, 10, 11], spacing)
    scorer = PatientScorer(REGIONS, slices)
    for number in (3, 0, 4, 2, 1):
        assert len(scorer._stacks) == int(number != 3)
        scorer.add(slices[number], predicted[..., number : number + 1])
    assert not scorer._stacks
    assert scorer.scores() == [expected]


@pytest.mark.parametrize(
    ("indices", "spacing"), [([1, 2, 4], (1.0, 1.0, 1.0)), ([1, 2, 3], (1.0, 1.0)), ([1, 2, 3], None)]
)
def test_a_stack_with_gaps_or_unknown_distances_has_dice_alone(
    tmp_path: Path, indices: list[int], spacing: tuple[float, ...] | None
) -> None:
    """Where slices are missing or their distance is unknown a distance in mm would be an invention."""
    truth = blob((6, 6, 3), (1, 4), (1, 4), (0, 3)).int()
    slices = stack(tmp_path, truth, indices, spacing)
    (score,) = score_patients(BINARY, [(case, case.native_labels()[0][None] > 0) for case in slices])
    assert (score.dice, score.hd95_mm, score.volumes) == ({"lesion": 1.0}, {"lesion": None}, 1)


def test_patients_keep_their_order_and_site(tmp_path: Path) -> None:
    """One score a patient, in the order of arrival."""
    truth = blob((4, 4, 1), (1, 3), (1, 3), (0, 1)).int()[None]
    pairs = [
        (make_case(tmp_path, truth, new_case(f"{patient}{n}", patient, site=site)), truth > 0)
        for n, (patient, site) in enumerate([("b", "S"), ("a", "N"), ("b", "S")])
    ]
    scores = score_patients(BINARY, pairs, distances=False)
    assert [(score.patient_id, score.site, score.volumes) for score in scores] == [("b", "S", 2), ("a", "N", 1)]


def test_the_majority_of_raters_is_the_truth() -> None:
    """More than half: two of three and two of two, but not one of two; so disjoint targets stay disjoint."""
    votes = torch.tensor([[1, 1, 1, 0], [1, 1, 2, 0], [1, 2, 2, 1]], dtype=torch.uint8)
    assert majority(votes, DISJOINT).tolist() == [[True, True, False, False], [False, False, True, False]]
    assert majority(votes, REGIONS).tolist() == [[True, True, True, False], [False, False, True, False]]
    tie = torch.tensor([[1, 1], [2, 1]], dtype=torch.uint8)
    assert majority(tie, DISJOINT).tolist() == [[False, True], [False, False]]


def test_wrong_shapes_and_double_counting_are_defects(tmp_path: Path) -> None:
    """A prediction of another size, or a case scored twice, is refused."""
    case = make_case(tmp_path, torch.ones(1, 4, 4, 1), new_case("c"))
    scorer = PatientScorer(BINARY)
    with pytest.raises(ValueError, match="shape"):
        scorer.add(case, torch.zeros(4, 4, 1, dtype=torch.bool))
    scorer.add(case, torch.zeros(1, 4, 4, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="before"):
        scorer.add(case, torch.zeros(1, 4, 4, 1, dtype=torch.bool))


def test_no_score_is_ever_nan(tmp_path: Path) -> None:
    """All combinations of empty and full masks give numbers or None."""
    for number, (t, p) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        case = make_case(tmp_path, torch.full((1, 4, 4, 2), t), new_case(f"c{number}"))
        (score,) = score_patients(BINARY, [(case, torch.full((1, 4, 4, 2), bool(p)))])
        numbers = [score.mean_dice, *score.dice.values(), *(v for v in score.hd95_mm.values() if v is not None)]
        assert all(math.isfinite(value) for value in numbers)
        assert dataclasses.asdict(score)["dice"]["lesion"] == float(t == p)
