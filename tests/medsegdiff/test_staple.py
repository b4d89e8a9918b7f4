"""STAPLE against ITK's filters, a loop over voxels, and raters whose error rates are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  # its own documentation calls it so
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medsegdiff.staple import BinaryStaple, staple, staple_labels


def rated(truth: Tensor, sensitivity: Tensor, specificity: Tensor, seed: int) -> Tensor:
    """Masks of raters who err independently at the given rates: (R, ...) bool."""
    draws = torch.rand(len(sensitivity), *truth.shape, generator=torch.Generator().manual_seed(seed))
    shape = (-1, *[1] * truth.ndim)
    return torch.where(truth, draws < sensitivity.view(shape), draws >= specificity.view(shape))


def disc(side: int, radius: float) -> Tensor:
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return (y - side / 2) ** 2 + (x - side / 3) ** 2 < radius**2


def itk(masks: Tensor) -> tuple[Tensor, list[float], list[float]]:
    """ITK's filter: probability, sensitivities, specificities."""
    chosen = sitk.STAPLEImageFilter()
    chosen.SetForegroundValue(1)
    chosen.SetMaximumIterations(1000)
    found = chosen.Execute([sitk.GetImageFromArray(mask.numpy().astype(np.uint8)) for mask in masks])
    return torch.from_numpy(sitk.GetArrayFromImage(found)), chosen.GetSensitivity(), chosen.GetSpecificity()


def assert_as_itk(found: BinaryStaple, masks: Tensor) -> None:
    probability, sensitivity, specificity = itk(masks)
    torch.testing.assert_close(found.probability, probability, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.sensitivity, torch.tensor(sensitivity).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.specificity, torch.tensor(specificity).double(), atol=1e-4, rtol=0)


@given(
    seed=st.integers(0, 2**31),
    raters=st.integers(1, 7),
    radius=st.floats(3, 9),
    worst=st.floats(0.55, 0.95),
)
@settings(max_examples=40, deadline=None)
def test_equals_itk(seed: int, raters: int, radius: float, worst: float) -> None:
    """Probabilities and error rates are those of ITK's STAPLEImageFilter, whatever the raters."""
    rates = worst + (1 - worst) * torch.rand(2, raters, generator=torch.Generator().manual_seed(seed))
    masks = rated(disc(20, radius), rates[0], rates[1], seed)
    if not masks.any() or masks.all():
        return  # ITK divides by zero; defined below
    assert_as_itk(staple(masks), masks)


def test_equals_itk_on_a_volume_and_with_a_given_prior_moves_as_it_should() -> None:
    """Three dimensions are pooled; a larger prior makes the structure likelier."""
    truth = disc(16, 5).expand(6, 16, 16)
    masks = rated(truth, torch.tensor([0.9, 0.7, 0.8]), torch.tensor([0.95, 0.9, 0.8]), 1)
    found = staple(masks)
    assert found.probability.shape == (6, 16, 16)
    assert found.probability.dtype == torch.float64
    assert_as_itk(found, masks)
    mean = float(masks.double().mean())
    torch.testing.assert_close(staple(masks, mean).probability, found.probability)
    low, high = (float(staple(masks, prior).probability.sum()) for prior in (mean / 4, min(0.9, mean * 2)))
    assert low < float(found.probability.sum()) < high


def slow_staple(labels: Tensor, classes: int, iterations: int) -> tuple[list[list[float]], Tensor]:
    """The method as the paper writes it, one voxel and rater at a time."""
    raters, voxels = labels.shape
    votes = [[int(labels[j, i]) for j in range(raters)] for i in range(voxels)]
    truth = [[sum(vote == s for vote in row) / raters for s in range(classes)] for row in votes]
    prior = [sum(row[s] for row in truth) / voxels for s in range(classes)]
    theta = torch.zeros(raters, classes, classes, dtype=torch.float64)
    for _ in range(iterations):
        for j in range(raters):
            for s in range(classes):
                mass = sum(row[s] for row in truth)
                for said in range(classes):
                    hit = sum(row[s] for row, vote in zip(truth, votes, strict=True) if vote[j] == said)
                    theta[j, said, s] = hit / mass if mass else float(said == s)
        for i in range(voxels):
            joint = [
                prior[s] * math.prod(float(theta[j, votes[i][j], s]) for j in range(raters)) for s in range(classes)
            ]
            truth[i] = [value / sum(joint) for value in joint]
    return truth, theta


@given(seed=st.integers(0, 2**31), classes=st.integers(2, 4), raters=st.integers(1, 4), iterations=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_equals_the_loop_over_voxels(seed: int, classes: int, raters: int, iterations: int) -> None:
    """Patterns and matrices change nothing: after any number of iterations the papers' sums come out."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (1, 30), generator=generator).repeat(raters, 1)
    noise = torch.rand(labels.shape, generator=generator) < 0.3
    labels[noise] = torch.randint(0, classes, labels.shape, generator=generator)[noise]
    found = staple_labels(labels, classes, iterations=iterations)
    if found.iterations < iterations:
        return  # settled earlier than the loop below was told to stop
    truth, theta = slow_staple(labels, classes, iterations)
    torch.testing.assert_close(found.probability.T, torch.tensor(truth, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.confusion, theta, atol=1e-9, rtol=0)


def test_known_error_rates_are_found() -> None:
    """40,000 voxels, seven raters: sensitivity and specificity within 0.02, and half the errors of the majority."""
    truth = torch.rand(40_000, generator=torch.Generator().manual_seed(0)) < 0.3
    sensitivity = torch.tensor([0.95, 0.9, 0.9, 0.6, 0.6, 0.65, 0.55])
    specificity = torch.tensor([0.97, 0.95, 0.9, 0.7, 0.65, 0.6, 0.7])
    masks = rated(truth, sensitivity, specificity, 5)
    found = staple(masks)
    torch.testing.assert_close(found.sensitivity.float(), sensitivity, atol=0.02, rtol=0)
    torch.testing.assert_close(found.specificity.float(), specificity, atol=0.02, rtol=0)
    errors = int(((found.probability > 0.5) != truth).sum())
    votes = int(((masks.float().mean(0) > 0.5) != truth).sum())
    assert errors < 0.5 * votes


def test_the_squared_mean_is_not_staple() -> None:
    """The mean of the masks squared, which has been published as STAPLE, must not pass for it."""
    truth = disc(24, 7)
    masks = rated(truth, torch.tensor([0.95, 0.9, 0.6]), torch.tensor([0.99, 0.9, 0.8]), 3)
    squared = masks.double().mean(0) ** 2
    assert float((staple(masks).probability - squared).abs().max()) > 0.3
    with pytest.raises(AssertionError):
        assert_as_itk(BinaryStaple(squared, staple(masks).sensitivity, staple(masks).specificity, 1), masks)


@pytest.mark.parametrize("raters", [1, 2, 5])
@pytest.mark.parametrize("which", ["empty", "full", "disc"])
def test_raters_who_agree_get_their_mask_back(raters: int, which: str) -> None:
    """One rater, several alike, all empty, all full: the mask itself, and rates of 1."""
    mask = {"empty": torch.zeros(9, 9), "full": torch.ones(9, 9), "disc": disc(9, 3)}[which].bool()
    found = staple(mask.expand(raters, 9, 9))
    assert torch.equal(found.probability, mask.double())
    assert torch.equal(found.sensitivity, torch.ones(raters).double())
    assert torch.equal(found.specificity, torch.ones(raters).double())
    settled = staple(mask.expand(raters, 9, 9), prior=0.5)
    assert torch.equal(settled.probability > 0.5, mask)


@given(seed=st.integers(0, 2**31), raters=st.integers(2, 6))
@settings(max_examples=25, deadline=None)
def test_names_of_raters_and_labels_do_not_matter(seed: int, raters: int) -> None:
    """Raters in another order: the same truth. Inside and outside exchanged: the truth and the rates exchanged."""
    generator = torch.Generator().manual_seed(seed)
    rates = 0.6 + 0.4 * torch.rand(2, raters, generator=generator)
    masks = rated(disc(14, 4), rates[0], rates[1], seed)
    order = torch.randperm(raters, generator=generator)
    found, turned, flipped = staple(masks), staple(masks[order]), staple(~masks)
    torch.testing.assert_close(turned.probability, found.probability, atol=1e-6, rtol=0)
    torch.testing.assert_close(turned.sensitivity, found.sensitivity[order], atol=1e-6, rtol=0)
    torch.testing.assert_close(flipped.probability, 1 - found.probability, atol=1e-6, rtol=0)
    torch.testing.assert_close(flipped.sensitivity, found.specificity, atol=1e-6, rtol=0)


def confused(truth: Tensor, rates: list[Tensor], seed: int) -> Tensor:
    """Label maps of raters who say a label with the probabilities in the column of the true one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.multinomial(rate.T[truth], 1, generator=generator)[:, 0] for rate in rates])


RATES = [
    torch.tensor([[0.95, 0.05, 0.05], [0.03, 0.90, 0.10], [0.02, 0.05, 0.85]]),
    torch.tensor([[0.90, 0.10, 0.05], [0.05, 0.80, 0.25], [0.05, 0.10, 0.70]]),
    torch.tensor([[0.85, 0.10, 0.15], [0.10, 0.85, 0.15], [0.05, 0.05, 0.70]]),
    torch.tensor([[0.90, 0.15, 0.10], [0.05, 0.75, 0.10], [0.05, 0.10, 0.80]]),
]


def test_three_labels_with_known_confusion_as_in_itk() -> None:
    """Confusion matrices are found within 0.03; the labels are those of ITK's MultiLabelSTAPLEImageFilter."""
    generator = torch.Generator().manual_seed(2)
    truth = torch.multinomial(torch.tensor([0.6, 0.25, 0.15]), 40_000, replacement=True, generator=generator)
    labels = confused(truth, RATES, 4)
    found = staple_labels(labels, 3)
    torch.testing.assert_close(found.confusion.float(), torch.stack(RATES), atol=0.03, rtol=0)
    torch.testing.assert_close(found.probability.sum(dim=0), torch.ones(40_000).double())
    chosen = sitk.MultiLabelSTAPLEImageFilter()
    chosen.SetTerminationUpdateThreshold(1e-7)
    images = [sitk.GetImageFromArray(rater.reshape(200, 200).numpy().astype(np.uint8)) for rater in labels]
    theirs = torch.from_numpy(sitk.GetArrayFromImage(chosen.Execute(images))).flatten()
    ours = found.probability.argmax(dim=0)
    assert float((ours != theirs).float().mean()) < 0.002
    assert float((ours != truth).float().mean()) < float((labels.mode(dim=0)[0] != truth).float().mean())


def test_a_label_that_nobody_named_stays_away() -> None:
    """Probability 0, no NaN, and a third label unused changes nothing for the other two."""
    masks = rated(disc(12, 4), torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.9, 0.8, 0.9]), 7)
    two, three = staple(masks), staple_labels(masks.long(), 3)
    torch.testing.assert_close(three.probability[1], two.probability)
    torch.testing.assert_close(three.probability[0], 1 - two.probability)
    assert torch.equal(three.probability[2], torch.zeros(12, 12).double())
    assert bool(torch.isfinite(three.confusion).all())


def test_a_hundred_raters() -> None:
    """More raters than bits in an integer: voxels told apart by the first ten alone stay apart."""
    truth = disc(12, 4)
    first = rated(truth, torch.full((10,), 0.7), torch.full((10,), 0.8), 8)
    masks = torch.cat([first, truth.expand(90, 12, 12)])
    assert torch.equal(staple(masks).probability > 0.5, truth)
    assert_as_itk(staple(masks), masks)


def test_what_makes_no_sense_is_refused() -> None:
    """No rater, a label out of range, a prior that leaves no choice."""
    with pytest.raises(ValueError, match="at least one rater"):
        staple(torch.zeros(0, 4, 4).bool())
    with pytest.raises(ValueError, match=r"0\.\.1, found 0\.\.2"):
        staple_labels(torch.tensor([[0, 2]]), 2)
    with pytest.raises(ValueError, match="prior"):
        staple(torch.ones(2, 4).bool(), prior=1.0)


def test_what_is_no_vote_is_refused() -> None:
    """Probabilities in place of votes, a prior that does not fit, and no iteration are errors, not silent answers."""
    votes = torch.tensor([[0, 1], [1, 1]])
    with pytest.raises(ValueError, match="threshold them first"):
        staple(torch.full((2, 4), 0.7))
    with pytest.raises(ValueError, match="whole numbers"):
        staple_labels(votes + 0.5, 2)
    for prior in ([0.5], [0.9, 0.9], [0.0, 1.0]):
        with pytest.raises(ValueError, match="prior must give"):
            staple_labels(votes, 2, prior)
    with pytest.raises(ValueError, match="at least 1"):
        staple_labels(votes, 2, iterations=0)
