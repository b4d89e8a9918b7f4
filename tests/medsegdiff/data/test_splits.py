"""No patient on both sides, and the same patients every time."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsegdiff.data.cases import SPLITS, Case
from medsegdiff.data.splits import split_patients
from medsegdiff.errors import UserError


def case(patient: str, split: str | None = None, number: int = 0) -> Case:
    return Case(f"{patient}-{number}", patient, (), (), split=split)


PATIENTS = st.sets(st.text(min_size=1, max_size=8), max_size=40)
FRACTION = st.floats(0, 0.49)


@given(PATIENTS, FRACTION, FRACTION, st.integers(0, 1000), st.randoms())
def test_every_patient_gets_one_split_of_the_promised_size(
    patients: set[str], test: float, val: float, seed: int, order: random.Random
) -> None:
    """Sizes are the rounded fractions, somebody trains, and neither order nor number of cases matters."""
    cases = [case(patient, number=number) for patient in sorted(patients) for number in range(2)]
    split = split_patients(cases, test, val, seed)
    assert set(split) == patients
    assert set(split.values()) <= set(SPLITS)
    shuffled = cases.copy()
    order.shuffle(shuffled)
    assert split_patients(shuffled, test, val, seed) == split
    names = list(split.values())
    if patients:
        assert names.count("train") >= 1
    if len(patients) >= 2:
        wanted = max(int(test * len(patients) + 0.5), int(test > 0))
        assert names.count("test") == min(wanted, len(patients) - 1)
        assert names.count("val") == min(int(val * len(patients) + 0.5), len(patients) - 1 - names.count("test"))


def test_a_single_patient_trains() -> None:
    """Nobody can be held out of one."""
    assert split_patients([case("p")], 0.4, 0.4, 0) == {"p": "train"}


def test_seeds_give_other_splits() -> None:
    """A hundred patients are hardly ever split alike by two seeds."""
    cases = [case(f"p{number}") for number in range(100)]
    assert split_patients(cases, 0.2, 0.1, 0) != split_patients(cases, 0.2, 0.1, 1)


def test_the_split_does_not_change_with_the_program() -> None:
    """A golden split: a change here would move patients between train and test of runs that resume."""
    split = split_patients([case(f"p{number}") for number in range(8)], 0.25, 0.125, 7)
    assert {name: [p for p, s in split.items() if s == name] for name in SPLITS} == {
        "train": ["p0", "p2", "p3", "p5", "p6"],
        "val": ["p1"],
        "test": ["p4", "p7"],
    }


def test_a_prescribed_split_is_honoured() -> None:
    """Patients with a split keep it; the others fill up what is missing."""
    cases = [case("a", "test"), case("b", "train"), case("b", None, 1), *[case(f"p{n}") for n in range(8)]]
    split = split_patients(cases, 0.2, 0.1, 0)
    assert (split["a"], split["b"]) == ("test", "train")
    assert list(split.values()).count("test") == 2
    assert list(split.values()).count("val") == 1
    everything = [case(f"p{n}", "test") for n in range(4)]
    assert set(split_patients(everything, 0.1, 0.1, 0).values()) == {"test"}


def test_a_patient_in_two_splits_is_refused() -> None:
    """The line names the patient and both splits."""
    with pytest.raises(UserError, match="patient a stands in the splits train and test"):
        split_patients([case("a", "train"), case("a", None, 1), case("a", "test", 2)], 0.2, 0, 0)


@pytest.mark.parametrize(("test", "val"), [(1.0, 0), (0.5, 0.5), (-0.1, 0), (0, 1), (float("nan"), 0)])
def test_fractions_that_leave_nobody_are_refused(test: float, val: float) -> None:
    """Both lie in [0, 1) and leave something to train on."""
    with pytest.raises(UserError, match="train on"):
        split_patients([case("a")], test, val, 0)
