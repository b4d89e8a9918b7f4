"""Which patients train and which are held out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from medsegdiff.data.cases import Case
from medsegdiff.errors import UserError

# Who is held out where a dataset has no split column of its own: the same patients whatever is trained, with whatever
# seed, so that a model is never scored on patients it was trained on, and a patient held out once stays held out.
TEST_FRACTION = 0.2
SPLIT_SEED = 0


def split_patients(cases: Sequence[Case], test_fraction: float, val_fraction: float, seed: int) -> dict[str, str]:
    """Assign every patient to "train", "val" or "test".

    A patient whose cases carry a split keeps it. The others are taken in the order of sha256(seed, patient id), which
    depends on nothing else: first into the test set, then into the validation set, until these hold their fraction of
    all patients (rounded; at least one test patient where there are two patients and test_fraction > 0); the rest
    train. At least one patient trains.

    Raises:
        UserError: a patient carries two splits, or the fractions leave nothing to train on.
    """
    if not (0 <= test_fraction < 1 and 0 <= val_fraction < 1 and test_fraction + val_fraction < 1):
        raise UserError(
            f"test_fraction {test_fraction} and val_fraction {val_fraction} must lie in [0, 1) and sum to less than 1; "
            "otherwise nothing is left to train on. Lower them."
        )
    given = _given(cases)
    free = sorted((patient for patient, split in given.items() if split is None), key=lambda p: _rank(seed, p))
    taken = list(given.values())
    wanted_test = max(_rounded(test_fraction * len(given)), int(test_fraction > 0))
    wanted_val = _rounded(val_fraction * len(given))
    spare = len(free) - int("train" not in taken)  # one patient at least has to train
    test = min(max(0, wanted_test - taken.count("test")), max(0, spare))
    val = min(max(0, wanted_val - taken.count("val")), max(0, spare - test))
    drawn = dict(zip(free, ["test"] * test + ["val"] * val + ["train"] * len(free), strict=False))
    return {patient: split or drawn[patient] for patient, split in given.items()}


def _given(cases: Sequence[Case]) -> dict[str, str | None]:
    """Each patient's prescribed split, None where no case carries one."""
    splits: dict[str, str | None] = {}
    for case in cases:
        before = splits.get(case.patient_id)
        if before and case.split and before != case.split:
            raise UserError(
                f"patient {case.patient_id} stands in the splits {before} and {case.split} (case {case.case_id}); a "
                "patient who is trained on must not be tested on. Give all the patient's cases one split."
            )
        splits[case.patient_id] = before or case.split
    return splits


def _rank(seed: int, patient_id: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{patient_id}".encode()).digest()


def _rounded(number: float) -> int:
    return math.floor(number + 0.5)
