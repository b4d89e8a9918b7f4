"""The packed cache holds what was prepared, and no patient trains and is tested."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.real import pack as packing
from benchmarks.real.cache import (
    pack_labels,
    quantise,
    read_cache,
    restore_images,
    split_cases,
    unpack_labels,
)
from benchmarks.real.plan import PLANS, Plan, fingerprint
from medsegdiff.data.dataset import open_dataset
from medsegdiff.data.prepare import prepare
from medsegdiff.errors import UserError


@given(st.integers(1, 5), st.integers(2, 9), st.integers(2, 255), st.integers(0, 2**32))
def test_labels_survive_packing(count: int, size: int, labels: int, seed: int) -> None:
    """Label indices come back as they were, whatever their number and the slice's size."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randint(0, labels, (count, size, size), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack_labels(pack_labels(wanted, labels), size), wanted)


@given(st.integers(0, 2**32), st.floats(0, 5))
def test_images_come_back_within_half_a_step(seed: int, spread: float) -> None:
    """Each pixel is off by at most half of the 256th part of its slice's own range (and by float16)."""
    images = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) * spread
    codes, low, step = quantise(images)
    error = (restore_images(codes, low, step).float() - images).abs()
    assert bool((error <= step[..., None, None] / 2 + images.abs() * 2**-10 + 1e-6).all())


def test_cache_holds_the_prepared_slices(
    tiny_source: Path, small_plan: Plan, small_cache: Path, tmp_path: Path
) -> None:
    """Labels, patients and sites equal the package's own preparation; images do to two hundredths."""
    dataset = read_cache(small_cache)["source"]
    prepared = prepare(open_dataset(tiny_source), 16, tmp_path).cases
    assert [case.case.case_id for case in dataset.cases] == [case.case.case_id for case in prepared]
    for ours, theirs in zip(dataset.cases, prepared, strict=True):
        assert (ours.case.patient_id, ours.case.site) == (theirs.case.patient_id, theirs.case.site)
        assert torch.equal(ours.tensor("labels"), theirs.tensor("labels"))
        assert ours.foreground(dataset.scheme) == theirs.foreground(dataset.scheme)
        torch.testing.assert_close(ours.images(), theirs.images(), atol=0.02, rtol=0)
        assert torch.equal(ours.tensor("native")[0].movedim(-1, 0), ours.tensor("labels")[0])


def test_the_held_out_site_is_tested_whole_and_never_trained(small_cache: Path) -> None:
    """Leaving a site out tests all its patients; the split by patient is the package's own."""
    dataset = read_cache(small_cache)["source"]
    train, test = split_cases(dataset, "alder")
    assert {case.case.site for case in test} == {"alder"}
    assert "alder" not in {case.case.site for case in train}
    assert len(train) + len(test) == len(dataset.cases)
    train, test = split_cases(dataset, None)
    assert not {case.case.patient_id for case in train} & {case.case.patient_id for case in test}
    assert {dataset.split[case.case.patient_id] for case in test} == {"test"}


def test_few_test_slices_keep_whole_patients(small_cache: Path) -> None:
    """A limit on test slices drops patients, never a part of one, and always keeps one."""
    dataset = read_cache(small_cache)["source"]
    counts = {}
    for limit in (1, 9, 1000):
        _, test = split_cases(dataset, "alder", limit)
        counts[limit] = sum(case.slices for case in test)
        for patient in {case.case.patient_id for case in test}:
            whole = sum(case.slices for case in dataset.cases if case.case.patient_id == patient)
            assert sum(case.slices for case in test if case.case.patient_id == patient) == whole
    assert counts == {1: 4, 9: 8, 1000: 16}


def test_a_cache_too_large_to_travel_is_refused(
    tiny_source: Path, small_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the limit nothing is written, and the message says how large it would be."""
    monkeypatch.setattr(packing, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match="more than 0; nothing was written"):
        packing.pack(small_plan, tiny_source.parent, tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path: Path) -> None:
    """A file that is no cache is named, with the command that makes one."""
    path = tmp_path / "cache.safetensors"
    path.write_bytes(b"none")
    with pytest.raises(UserError, match=r"benchmarks\.real\.pack"):
        read_cache(path)


def test_any_change_of_plan_or_data_changes_the_fingerprint(small_plan: Plan) -> None:
    """Pieces of different runs cannot be taken for one another."""
    known = {fingerprint(small_plan, "a"), fingerprint(small_plan, "b"), fingerprint(replace(small_plan, seed=1), "a")}
    known |= {fingerprint(plan, "a") for plan in PLANS.values()}
    assert len(known) == 3 + len(PLANS)
