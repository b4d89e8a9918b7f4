"""Everything that `evaluate` scores, from the samples to the figures, beside the same computed one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from medsegdiff.config import DiffusionConfig, ModelConfig, SamplingConfig
from medsegdiff.data.cases import Case, DatasetConfig
from medsegdiff.data.geometry import Geometry, restack, restore
from medsegdiff.data.prepared import PreparedCase, load, store
from medsegdiff.ensemble import derive_seed
from medsegdiff.evaluation import Segmentation, Wanted, evaluate_cases, score_cases, segment_many, segment_prepared
from medsegdiff.labels import LabelScheme
from medsegdiff.network import MedSegDiff
from medsegdiff.raters import majority, pack, score_raters
from medsegdiff.sampling import sample_masks
from medsegdiff.weights import ModelCard, Segmenter, build

MODEL = ModelConfig(
    image_size=16, base_channels=8, channel_multipliers=(1, 2), fusion_levels=(1,), attention_levels=()
)  # fmt: skip
KINDS = {
    "binary": DatasetConfig("made", "US", ("grey",), {"background": 0, "lesion": 255}),
    "multiclass": DatasetConfig("made", "US", ("grey",), {"background": 0, "a": 1, "b": 2}),
    "regions": DatasetConfig(
        "made", "US", ("grey",), {"background": 0, "rim": 1, "cup": 2}, {"disc": ("rim", "cup"), "cup": ("cup",)}
    ),
}


class Noisy(MedSegDiff):
    """Every sample its own disc, larger on brighter images: stands in for an ensemble that disagrees."""

    def image_features(self, image_BCHW: Tensor) -> list[Tensor]:
        return [image_BCHW]

    def denoise(self, mask_BKHW: Tensor, t_B: Tensor, features: list[Tensor]) -> Tensor:
        side = torch.linspace(-1, 1, mask_BKHW.shape[-1])
        radius = (0.4 + mask_BKHW[:, :, :1, :1].sigmoid() / 3 + features[0][:, :1, :1, :1] / 3) ** 2
        return ((radius - side[:, None] ** 2 - side**2) * 4).clamp(-1, 1)


def noisy(dataset: DatasetConfig) -> Segmenter:
    """A segmenter with that network."""
    channels = LabelScheme.of(dataset).channels
    model, sampling = replace(MODEL, mask_channels=channels), SamplingConfig(steps=1)
    built = build(ModelCard(model, DiffusionConfig(timesteps=50), sampling, dataset))
    return Segmenter(built.card, Noisy(model), built.diffusion, built.scheme)


def make_cases(folder: Path, patients: str, raters: int, labels: int, slices: int = 2) -> list[PreparedCase]:
    """One case a letter, the patient's name, of (13, 16, slices) voxels; each rater draws its own."""
    found = []
    for number, patient in enumerate(patients):
        native = torch.zeros(raters, 13, 16, slices, dtype=torch.uint8)
        for rater in range(raters):
            native[rater, 3 + rater : 9, 3:11] = 1
            native[rater, 5 : 7 + rater, 5:8] = labels - 1
        geometry = Geometry((13, 16, slices), 2, (1.0, 1.0, 2.0))
        path = folder / f"{number}.safetensors"
        small = torch.zeros(raters, slices, 16, 16, dtype=torch.uint8)
        store(path, torch.zeros(slices, 1, 16, 16), small, native, geometry)
        prepared = load(path, Case(f"c{number}", patient, (Path("i.png"),), ()))
        assert prepared is not None
        found.append(prepared)
    return found


@pytest.mark.parametrize("members", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_bits_and_probabilities_are_those_of_the_samples(
    monkeypatch: pytest.MonkeyPatch, kind: str, members: int
) -> None:
    """In batches over cases of several sizes, along another axis too: as if each sample were restored alone."""
    segmenter, sampling = noisy(KINDS[kind]), SamplingConfig(steps=1, members=members)
    monkeypatch.setattr("medsegdiff.memory.room_on_cpu", lambda: 1)  # one sample at a time: slices come in pieces
    shapes = [((16, 16, 2), 2), ((20, 12, 3), 2), ((4, 9, 30), 0), ((9, 37, 11), 1)]
    inputs = [
        (
            torch.linspace(0, 1, shape[axis]).view(-1, 1, 1, 1).expand(-1, 1, 16, 16),
            Geometry(shape, axis, None),
            derive_seed(n),
        )
        for n, (shape, axis) in enumerate(shapes)
    ]
    plain = list(segment_many(segmenter, inputs, sampling))
    full = list(segment_many(segmenter, inputs, sampling, Wanted(probability=True, members=True)))
    targets = len(segmenter.scheme.targets)
    for before, answer, (images, geometry, seed) in zip(plain, full, inputs, strict=True):
        assert (before.probability, before.members) == (None, None)
        assert torch.equal(before.masks, answer.masks)
        assert torch.equal(before.member_voxels, answer.member_voxels)
        assert answer.members is not None
        assert answer.probability is not None
        height, width = geometry.plane
        bits = np.unpackbits(answer.members, axis=-1, count=height * width)
        assert bits.shape == (members, len(images), targets, height * width)
        for member in range(members):
            seeds = [derive_seed(seed, member)] * len(images)
            order = list(range(len(images)))
            own = sample_masks(segmenter.network, segmenter.diffusion, images, order, sampling, seeds).detach()
            decoded = segmenter.scheme.decode(restore(own, geometry)).flatten(2)
            assert np.array_equal(bits[member], decoded.numpy())
        assert bits.sum(axis=(1, 3)).tolist() == answer.member_voxels.tolist()
        assert answer.probability.dtype == torch.float16
        if kind != "multiclass":  # by themselves half probabilities are the edge of the mask
            clear = (answer.probability - 0.5).abs() > 1e-3
            assert torch.equal((answer.probability > 0.5)[clear], answer.masks[clear])
        if members == 1:
            assert np.array_equal(answer.members[0], pack(answer.masks.movedim(geometry.slice_axis + 1, 0)))


def test_probability_is_the_mean_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every target its own channel, brought from [-1, 1] to [0, 1] at native size, however members are fused."""
    segmenter = noisy(KINDS["multiclass"])
    values = torch.tensor([0.2, -0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    monkeypatch.setattr(Noisy, "denoise", lambda self, mask, t, features: values.expand(len(mask), 3, 16, 16))
    inputs = [(torch.zeros(2, 1, 16, 16), Geometry((20, 12, 2), 2, None), 0)]
    (answer,) = segment_many(segmenter, inputs, SamplingConfig(steps=1, members=2, fuse="staple"), Wanted(True))
    assert answer.probability is not None
    flat = answer.probability.flatten(1).float()
    torch.testing.assert_close(flat, torch.tensor([[0.25], [1.0]]).expand_as(flat))
    assert torch.equal(restack(restore(values, inputs[0][1]), inputs[0][1])[:, 0, 0, 0], values[0, :, 0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_raters_are_scored_case_by_case(tmp_path: Path, kind: str) -> None:
    """Every target of every case that several raters drew, against samples drawn again and scored directly."""
    segmenter, sampling = noisy(KINDS[kind]), SamplingConfig(steps=1, members=4)
    (tmp_path / "one").mkdir()
    labels = len(segmenter.scheme.labels)
    cases = make_cases(tmp_path, "ab", 3, labels) + make_cases(tmp_path / "one", "c", 1, labels)
    cases[2] = replace(cases[2], case=replace(cases[2].case, case_id="alone"))
    found = evaluate_cases(segmenter, cases, sampling, 0, 1.0)
    again = segment_prepared(segmenter, cases, sampling, 0, Wanted(members=True))
    for prepared, answer in list(zip(cases, again, strict=True))[:2]:
        truth = torch.stack([segmenter.scheme.truth(rater[None])[0] for rater in prepared.native_labels()])
        assert answer.members is not None
        expected = score_raters(answer.members, pack(truth.movedim(4, 1)))
        means = found.raters.of(prepared.case.patient_id)
        assert means is not None
        assert [mean.mean for mean in means.values()] == expected
        assert 0 < expected[0].ged_squared < 2
    overall = found.raters.overall()
    assert overall is not None
    assert {mean.cases for mean in overall.values()} == {2}
    assert found.raters.of("c") is None
    assert list(overall) == list(found.calibration) == list(segmenter.scheme.targets)


def test_scores_are_those_of_a_federation_and_more(tmp_path: Path) -> None:
    """Dice, HD95 and ranges as `score_cases` gives them; surfaces and volumes beside them; every voxel is counted."""
    segmenter, sampling = noisy(KINDS["regions"]), SamplingConfig(steps=1, members=3)
    cases = make_cases(tmp_path, "abb", 1, 3)
    found = evaluate_cases(segmenter, cases, sampling, 0, 1.0)
    plain = score_cases(segmenter, cases, sampling, 0)
    assert [replace(patient, assd_mm={}, surface_dice={}) for patient in found.patients] == plain
    assert all(set(patient.surface_dice) == set(patient.assd_mm) == {"disc", "cup"} for patient in found.patients)
    assert found.raters.overall() is None
    for both in found.calibration.values():
        assert both["all"].voxels == 3 * 13 * 16 * 2
        assert 0 < both["near"].voxels < both["all"].voxels
    truth = majority(cases[0].native_labels(), segmenter.scheme)
    foreground = sum(round((b.foreground or 0) * b.voxels) for b in found.calibration["disc"]["all"].bins)
    assert foreground == 3 * int(truth[0].sum())


def test_a_patients_cases_come_together_and_its_dice_with_the_last(tmp_path: Path) -> None:
    """Whatever the folder's order: nothing of a patient has to be kept once the next one starts."""
    segmenter, sampling = noisy(KINDS["binary"]), SamplingConfig(steps=1)
    seen: list[tuple[str, float | None]] = []

    def watch(prepared: PreparedCase, answer: Segmentation, dice: float | None) -> None:
        assert answer.masks.shape[1:] == prepared.geometry.shape
        seen.append((prepared.case.case_id, dice))

    cases = make_cases(tmp_path, "abab", 1, 2)
    found = evaluate_cases(segmenter, cases, sampling, 0, 1.0, watch)
    assert [case_id for case_id, _ in seen] == ["c0", "c2", "c1", "c3"]
    assert [dice is None for _, dice in seen] == [True, False, True, False]
    assert [dice for _, dice in seen if dice is not None] == [patient.mean_dice for patient in found.patients]
    assert [patient.patient_id for patient in found.patients] == ["a", "b"]
