from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from medsegdiff.data.dataset import open_dataset
from medsegdiff.data.images import read_image, read_mask
from medsegdiff.errors import UserError
from medsegdiff.progress import Progress, listening
from medsegdiff.strict import parse_config
from simulations.phantoms import (
    SCANNERS,
    PhantomConfig,
    Scanner,
    draw_anatomy,
    patient_generator,
    render,
    scanner_of,
    write_phantoms,
)

PATIENTS = 4  # a hospital, in the tests that look at all hospitals

Rendered = tuple[np.ndarray, np.ndarray]


def rendered(scanner: Scanner, patient: int, slices: int = 8, seed: int = 0) -> Rendered:
    """Brightness scaled to unit deviation over the head, and the mask."""
    generator = patient_generator(seed, scanner.name, patient)
    image, mask = render(draw_anatomy(generator), scanner, slices, generator)
    head = image > 0.15 * np.percentile(image, 99)
    return (image - image[head].mean()) / image[head].std(), mask > 0


@pytest.fixture(scope="module")
def hospitals() -> dict[str, list[Rendered]]:
    return {scanner.name: [rendered(scanner, patient) for patient in range(PATIENTS)] for scanner in SCANNERS}


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (found & truth).sum() / max(1, found.sum() + truth.sum()))


BANDS = tuple(combinations([-np.inf, *np.linspace(-3, 3, 21), np.inf], 2))
ONE_SIDED = np.array([low == -np.inf or high == np.inf for low, high in BANDS])  # plain thresholds


def mean_dice_by_band(patients: list[Rendered]) -> np.ndarray:
    return np.array(
        [np.mean([dice((image > low) & (image < high), lesion) for image, lesion in patients]) for low, high in BANDS]
    )


@pytest.mark.slow
def test_no_brightness_finds_the_lesion(hospitals) -> None:
    """Chosen in sight of the truth, the best threshold of each hospital stays below Dice 0.5, the best band between two
    thresholds below 0.55, and one band for all hospitals below 0.25."""
    scores = {name: mean_dice_by_band(patients) for name, patients in hospitals.items()}
    assert {name: score[ONE_SIDED].max() for name, score in scores.items() if score[ONE_SIDED].max() >= 0.5} == {}
    assert {name: score.max() for name, score in scores.items() if score.max() >= 0.55} == {}
    assert np.mean(list(scores.values()), axis=0).max() < 0.25


def test_without_look_alikes_a_band_would_find_it() -> None:
    """With everything but the lesion taken away the same score is high: the test above can fail."""
    image, lesion = rendered(SCANNERS[0], patient=1)
    plain = np.where(lesion, image, -1.0)
    assert mean_dice_by_band([(plain, lesion)]).max() > 0.9


def test_hospitals_disagree_on_what_a_lesion_looks_like(hospitals) -> None:
    """Against a ring of tissue around it the lesion is clearly brighter at some hospitals, clearly darker at others."""
    contrast = {}
    for name, patients in hospitals.items():
        differences = []
        for image, lesion in patients:
            near = ndimage.binary_dilation(lesion, iterations=2)
            ring = ndimage.binary_dilation(near, iterations=2) & ~near
            differences.append(np.median(image[lesion]) - np.median(image[ring]))
        contrast[name] = float(np.mean(differences))
    assert min(abs(value) for value in contrast.values()) > 0.3
    assert min(sum(value > 0 for value in contrast.values()), sum(value < 0 for value in contrast.values())) >= 4
    assert contrast["alder"] > 0 > contrast["elm"]


def test_lesions_fill_some_slices_and_leave_others(hospitals) -> None:
    """Every patient has a lesion of plausible size, and a fair share of all slices has none."""
    present = np.array([lesion.any(axis=(0, 1)) for patients in hospitals.values() for _, lesion in patients])
    shares = [lesion.mean() for patients in hospitals.values() for _, lesion in patients]
    assert present.any(axis=1).all()
    assert 0.3 < present.mean() < 0.8
    assert min(shares) > 0.0005
    assert max(shares) < 0.08


@pytest.mark.parametrize("scanner", SCANNERS, ids=lambda scanner: scanner.name)
def test_even_the_thinnest_stack_meets_the_lesion(scanner) -> None:
    """Four slices suffice at every hospital's slice spacing: no patient is without foreground."""
    assert all(rendered(scanner, patient, slices=4, seed=3)[1].any() for patient in range(6))


def test_lesions_are_irregular(hospitals) -> None:
    """The largest section of a lesion fills clearly less of its circumscribed circle than a disc would."""
    fills = []
    for patients in hospitals.values():
        for _, lesion in patients:
            section = lesion[:, :, lesion.sum(axis=(0, 1)).argmax()]
            points = np.argwhere(section)
            radius = max(np.linalg.norm(a - b) for a, b in combinations(points[:: max(1, len(points) // 80)], 2)) / 2
            fills.append(section.sum() / (np.pi * (radius + 0.5) ** 2))
    assert np.mean(fills) < 0.75


def test_one_anatomy_is_the_same_in_every_scanner() -> None:
    """Scanners with the same grid but all else different outline the same lesion; on a finer grid it is as large."""
    base, other = SCANNERS[0], SCANNERS[1]

    def scan(scanner: Scanner) -> tuple[np.ndarray, np.ndarray]:
        generator = patient_generator(0, "anyone", 1)
        return render(draw_anatomy(generator), scanner, 12, generator)

    image, mask = scan(base)
    image_again, mask_again = scan(replace(other, matrix=base.matrix, spacing_mm=base.spacing_mm))
    assert np.array_equal(mask, mask_again)
    assert abs(np.corrcoef(image.ravel(), image_again.ravel())[0, 1]) < 0.95
    finer = replace(base, matrix=(128, 128), spacing_mm=(1.45, 1.45, 5.0))
    assert scan(finer)[1].sum() / 4 == pytest.approx(mask.sum(), rel=0.05)


def test_air_is_dark_with_the_noise_its_scanner_declares() -> None:
    """In the corners Gaussian noise has the declared deviation, and Rician noise the mean sqrt(pi/2) times it."""
    ivy, alder = scanner_of("ivy"), scanner_of("alder")
    for scanner in (ivy, alder):
        generator = patient_generator(0, scanner.name, 1)
        image, _ = render(draw_anatomy(generator), replace(scanner, full_scale=10_000), 8, generator)
        corner = image[:6, :6].astype(float) / 10_000
        if scanner is ivy:
            assert corner.std() == pytest.approx(scanner.noise, rel=0.15)
            assert abs(corner.mean()) < 0.2 * scanner.noise
        else:
            assert corner.mean() == pytest.approx(np.sqrt(np.pi / 2) * scanner.noise, rel=0.15)


@pytest.mark.parametrize("artefact", ["ghosting", "stripes", "motion"])
def test_an_artefact_changes_the_picture_and_not_the_truth(artefact) -> None:
    """Against the same scan without it the image differs by more than its noise alone, the mask not at all."""
    clean = replace(SCANNERS[0], noise=0.0, bias=0.0)
    level = {"ghosting": 0.2, "stripes": 0.03, "motion": 3.0}[artefact]

    def scan(scanner: Scanner) -> tuple[np.ndarray, np.ndarray]:
        generator = patient_generator(0, "anyone", 1)
        return render(draw_anatomy(generator), scanner, 6, generator)

    image, mask = scan(clean)
    spoilt, mask_again = scan(replace(clean, artefact=artefact, artefact_level=level))
    assert np.array_equal(mask, mask_again)
    assert np.abs(spoilt.astype(int) - image).mean() > 0.005 * clean.full_scale
    untouched, _ = scan(replace(clean, artefact=artefact, artefact_level=0.0))
    assert np.abs(untouched.astype(int) - image).max() <= 1


def test_there_are_distinct_scanners() -> None:
    """At least six hospitals, no two alike in name, contrast or grid."""
    assert len(SCANNERS) >= 6
    for scanners in (
        [scanner.name for scanner in SCANNERS],
        [scanner.contrast for scanner in SCANNERS],
        [(scanner.matrix, scanner.spacing_mm) for scanner in SCANNERS],
    ):
        assert len(set(map(str, scanners))) == len(SCANNERS)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_equal_configurations_give_equal_bytes_and_additions_change_nothing(tmp_path, monkeypatch) -> None:
    """At another time of day every file is the same; a further site, patient or seed leaves or changes all others."""
    small = PhantomConfig(sites=("alder", "elm"), patients=2, slices=4, seed=7)
    write_phantoms(small, tmp_path / "first")
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    write_phantoms(small, tmp_path / "again")
    assert digests(tmp_path / "first") == digests(tmp_path / "again")

    write_phantoms(replace(small, sites=("birch", "elm", "alder"), patients=3), tmp_path / "more")
    first, more = digests(tmp_path / "first"), digests(tmp_path / "more")
    assert {name: digest for name, digest in first.items() if name.endswith(".gz")}.items() <= more.items()

    write_phantoms(replace(small, seed=8), tmp_path / "other")
    other = digests(tmp_path / "other")
    assert all(first[name] != other[name] for name in first if name.startswith("images/"))


def test_twin_sites_share_a_scanner_and_no_patient() -> None:
    """elm-2 is a hospital with elm's machine and its own patients."""
    assert scanner_of("elm-2") == scanner_of("elm")
    ours, theirs = (draw_anatomy(patient_generator(0, name, 1)) for name in ("elm", "elm-2"))
    assert not np.allclose(ours.axes_mm, theirs.axes_mm)
    names = PhantomConfig(sites=len(SCANNERS) + 1).site_names
    assert (names[0], names[-1]) == ("alder", "alder-2")


def test_the_reader_sees_what_was_rendered(tmp_path) -> None:
    """Whatever axes a hospital stores, the reader returns the RAS image and mask, and the spacing, that were drawn."""
    config = PhantomConfig(sites=("cedar", "dogwood", "elm"), patients=1, slices=5)
    reports: list[Progress] = []
    with listening(reports.append):
        write_phantoms(config, tmp_path / "data")
    assert [(progress.done, progress.total, progress.site) for progress in reports][-1] == (3, 3, "elm")
    dataset = open_dataset(tmp_path / "data")
    assert dataset.config.label_names == ("background", "lesion")
    assert [case.site for case in dataset.cases] == ["cedar", "dogwood", "elm"]
    for case in dataset.cases:
        scanner = scanner_of(str(case.site))
        generator = patient_generator(config.seed, scanner.name, 1)
        image, mask = render(draw_anatomy(generator), scanner, config.slices, generator)
        volume = read_image(case.image_paths, 1)
        assert np.array_equal(volume.array[0], image)
        assert np.array_equal(read_mask(case.mask_paths, dataset.config, volume)[0], mask)
        assert volume.spacing_mm == pytest.approx(scanner.spacing_mm)
        stored = nib.load(case.image_paths[0])
        assert "".join(nib.aff2axcodes(stored.affine)) == scanner.orientation


def test_a_folder_that_exists_is_left_alone(tmp_path) -> None:
    """Nothing is written over it, and nothing is left beside it."""
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=r"data: is already there; nothing was written"):
        write_phantoms(PhantomConfig(sites=1, patients=1, slices=4), tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sites": 0}, "sites must lie in 1..9999, found 0"),
        ({"sites": ["alder", "alder"]}, "distinct names"),
        ({"sites": []}, "at least one"),
        ({"sites": ["oak"]}, "site 'oak' has no scanner; choose among alder"),
        ({"patients": 0}, "patients must lie in 1..9999"),
        ({"slices": 3}, "slices must lie in 4..64"),
        ({"patiens": 3}, "did you mean 'patients'"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(data, message) -> None:
    """The error names the file, the key and what to do."""
    with pytest.raises(UserError, match=message):
        parse_config(data, PhantomConfig, "recipe.yaml")
    assert parse_config({"sites": ["elm", "fir-2"], "patients": 3}, PhantomConfig, "r").site_names == ("elm", "fir-2")
