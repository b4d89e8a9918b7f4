"""Sites that differ on purpose: each change against its closed form, and masks that mean what they meant."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from client.site import Site
from medsegdiff.data.dataset import open_dataset
from medsegdiff.data.images import read_image, read_mask
from medsegdiff.data.prepare import prepare
from medsegdiff.errors import UserError
from simulations.phantoms import PhantomConfig, write_phantoms
from simulations.shifts import (
    Attendance,
    SiteShift,
    add_noise,
    attendance_by_number,
    bias_field,
    change_contrast,
    lower_resolution,
    redraw,
)
from simulations.world import write_world


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patients of one scanner, stored in an orientation of their own."""
    folder = tmp_path_factory.mktemp("shifts") / "source"
    write_phantoms(PhantomConfig(sites=("cedar",), patients=2, slices=4), folder)
    return folder


def world_of(source: Path, folder: Path, shift: SiteShift | None) -> Path:
    """A world of one site, its first patient to train on and its second held out; returns the site's folder."""
    dataset = open_dataset(source)
    train, test = sorted({case.patient_id for case in dataset.cases})
    splits = {train: "train", test: "test"}
    shifts = {"cedar": shift} if shift is not None else None
    write_world(dataset, {"cedar": [train, test]}, splits, folder, copy=False, shifts=shifts)
    return folder / "cedar"


def test_a_bias_field_is_smooth_positive_and_of_its_strength() -> None:
    """Mean logarithm zero; strength zero is one everywhere; no finer than a cubic; larger for a larger strength."""
    rng = np.random.default_rng
    assert np.allclose(bias_field((8, 9, 3), 0.0, rng(0)), 1.0)
    field = bias_field((30, 30, 1), 0.5, rng(0))
    assert field.min() > 0
    assert abs(np.log(field).mean()) < 1e-12
    assert np.abs(np.diff(np.log(field)[:, 0, 0], n=4)).max() < 1e-9  # fourth differences of a cubic vanish
    spreads = [np.log(bias_field((30, 30, 1), s, rng(0))).std() for s in (0.25, 0.5)]
    assert spreads[1] == pytest.approx(2 * spreads[0])


def test_contrast_is_a_power_of_the_rescaled_image() -> None:
    """Ends stay, the middle of the range goes to 2^-gamma; a constant channel stays."""
    image = np.array([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    assert change_contrast(image, 2.0).ravel() == pytest.approx([-1.0, -0.5, 1.0])
    assert (change_contrast(np.full((1, 2, 2, 1), 3.0), 2.0) == 3.0).all()


def test_a_lower_resolution_blurs_in_the_slice_alone() -> None:
    """A constant stays; fine stripes vanish; slices do not mix; the size stays, whatever the factor."""
    assert lower_resolution(np.full((13, 11, 2), 5.0), 2.5, 2) == pytest.approx(5.0)
    stripes = np.zeros((32, 32, 2))
    stripes[::2, :, 0] = 1.0
    coarse = lower_resolution(stripes, 4.0, 2)
    assert coarse.shape == stripes.shape
    assert np.abs(coarse[8:-8, 8:-8, 0] - 0.5).max() < 0.1
    assert (coarse[..., 1] == 0).all()


def test_noise_has_the_variance_and_the_bias_it_should() -> None:
    """Gaussian: level^2 of the channel's variance. Rician: the background's mean is sigma sqrt(pi / 2)."""
    rng = np.random.default_rng(0)
    image = np.zeros((1, 200, 200, 1))
    image[:, :100] = 10.0
    scale = 0.1 * image.std()
    gaussian = add_noise(image, 0.1, "gaussian", rng) - image
    assert gaussian.std() == pytest.approx(scale, rel=0.02)
    assert abs(gaussian.mean()) < 0.02 * scale
    background = add_noise(image, 0.1, "rician", rng)[:, 100:]
    assert background.mean() == pytest.approx(scale * math.sqrt(math.pi / 2), rel=0.02)


def test_narrower_and_wider_masks_are_those_of_scipy_slice_by_slice() -> None:
    """Erosion and dilation within slices; new voxels take the nearest label, and labels keep their borders."""
    labels = np.zeros((16, 16, 3), np.uint8)
    labels[4:8, 4:12, 1] = 1
    labels[8:12, 4:12, 1] = 2
    for number in range(3):
        plane = labels[..., number] > 0
        assert ((redraw(labels, -1, 2)[..., number] > 0) == ndimage.binary_erosion(plane)).all()
        assert ((redraw(labels, 2, 2)[..., number] > 0) == ndimage.binary_dilation(plane, iterations=2)).all()
    wide = redraw(labels, 2, 2)
    assert (wide[2, 4:12, 1] == 1).all()
    assert (wide[13, 4:12, 1] == 2).all()
    assert redraw(labels, 0, 2) is labels


def test_other_values_in_the_masks_change_nothing(source, tmp_path) -> None:
    """The site's dataset.yaml names them: prepared slices are those of the plain world, to the bit."""
    plain = world_of(source, tmp_path / "plain", None)
    odd = world_of(source, tmp_path / "odd", SiteShift(labels={"background": 7, "lesion": 200}))
    cases = [prepare(open_dataset(site / "data"), 16, tmp_path / "cache").cases for site in (plain, odd)]
    for one, other in zip(*cases, strict=True):
        assert torch.equal(one.tensor("labels"), other.tensor("labels"))
        assert torch.equal(one.tensor("image"), other.tensor("image"))
    assert set(np.unique(nifti_values(odd))) == {7, 200}


def nifti_values(site: Path) -> np.ndarray:
    """What stands in the first mask file of a site."""
    import nibabel

    path = sorted((site / "data" / "shifted").glob("*mask*"))[0]
    return np.asarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]


def test_held_out_masks_stay_honest_unless_they_are_asked_to_share_the_fault(source, tmp_path) -> None:
    """A site that draws too narrow: its training masks shrink; test masks only with test_masks: same."""

    def foreground(site: Path) -> dict[str, int]:
        dataset = open_dataset(site / "data")
        found = {}
        for case in dataset.cases:
            volume = read_image(case.image_paths, 1, case.spacing_mm)
            found[case.patient_id] = int((read_mask(case.mask_paths, dataset.config, volume) > 0).sum())
        return found

    plain = foreground(world_of(source, tmp_path / "plain", None))
    honest = foreground(world_of(source, tmp_path / "honest", SiteShift(margin=-1)))
    same = foreground(world_of(source, tmp_path / "same", SiteShift(margin=-1, test_masks="same")))
    train, test = sorted(plain)
    assert honest[train] < plain[train]
    assert honest[test] == plain[test]
    assert same[test] < plain[test]


def test_a_shifted_world_is_the_same_again(source, tmp_path) -> None:
    """Equal recipes give equal files; another grid or orientation is not among the changes."""
    shift = SiteShift(bias_field=0.5, gamma=1.5, resolution=2.0, noise=0.3, noise_kind="rician")
    sites = [world_of(source, tmp_path / name, shift) for name in ("one", "two")]
    files = [sorted((site / "data" / "shifted").iterdir()) for site in sites]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    before, after = open_dataset(source).cases[0], open_dataset(sites[0] / "data").cases[0]
    one, other = (read_image(case.image_paths, 1, case.spacing_mm) for case in (before, after))
    assert one.spacing_mm == pytest.approx(other.spacing_mm)
    assert not np.allclose(one.array, other.array)


def test_a_missing_channel_is_the_mean_and_has_to_be_declared(tmp_path, tiny_source, tiny_world, tiny_task) -> None:
    """Declared in site.yaml the case shows zeros there; a name that the run does not ask for is refused."""
    folder = tmp_path / "alder"
    folder.mkdir()
    (folder / "data").symlink_to((tiny_world / "alder" / "data").resolve())
    (folder / "site.yaml").write_text("name: alder\ndata: data\nmissing_channels: [contrast]\n")
    from dataclasses import replace

    asked = replace(tiny_task, dataset=replace(tiny_task.dataset, channels=("contrast", "scan")))
    case = Site(folder / "site.yaml").data(asked).train[0]
    stored = case.images()
    assert stored.shape[1] == 2
    assert (stored[:, 0] == 0).all()
    assert (stored[:, 1] != 0).any()
    assert torch.equal(case.image(0), stored[0])
    assert torch.equal(case.pair(0, 0)[0].float(), stored[0])
    with pytest.raises(UserError, match=r"missing_channels of site.yaml names contrast"):
        Site(folder / "site.yaml").data(tiny_task)
    (folder / "site.yaml").write_text("name: alder\ndata: data\n")
    with pytest.raises(UserError, match=r"goes into missing_channels of site.yaml"):
        Site(folder / "site.yaml").data(asked)


def test_attendance_counts_rounds_from_one() -> None:
    """Comes, leaves and misses; sites are told by their number in the order of names."""
    known = Attendance(joins=2, leaves=5, absent=(3,))
    assert [known.answers(r) for r in range(1, 7)] == [False, True, False, True, True, False]
    assert attendance_by_number({"b": known}, ["c", "b", "a"]) == {1: known}
    with pytest.raises(UserError, match="no such site; the sites are a, b"):
        attendance_by_number({"z": known}, ["a", "b"])


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"resolution": 0.5}, "resolution must lie in 1..16"),
        ({"gamma": 0.0}, "gamma must lie in"),
        ({"margin": 100}, "margin must lie in -64..64"),
    ],
)
def test_impossible_shifts_are_named(wrong, fault) -> None:
    """Each with its range."""
    with pytest.raises(ValueError, match=fault):
        SiteShift(**wrong)
