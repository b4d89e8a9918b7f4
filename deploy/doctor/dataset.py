"""What a site's dataset holds and what is wrong with it, in counts: every image and mask is read once, one at a time.

Nothing is trained, resized or kept. A case that training would leave out is counted as such here, for it is read by the
same readers.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from deploy.doctor.checks import Check, Names, counted, gibibytes
from deploy.doctor.reading import UNDECLARED, Seen, look_at, why_not_open
from medsegdiff.data.cases import Dataset, DatasetConfig
from medsegdiff.data.dataset import open_dataset
from medsegdiff.errors import UserError
from medsegdiff.progress import Progress, report

DATA_SECONDS = 600.0  # of reading: 400 CT volumes from a local disk
MAX_FAULTY = 0.2  # of the cases, as medsegdiff.data.prepare has it: beyond it nothing is trained
FAR_SPACING = 3.0  # times the median: a scan so coarse, or a header so wrong, is looked at
ANISOTROPIC = 5.0  # largest over smallest voxel side from which slices stand far apart
MANY_EMPTY = 0.1  # of the patients without any foreground
NAMES = ("dataset", "files", "labels", "orientation", "spacing", "duplicates", "splits", "masks", "cache")


@dataclass(frozen=True)
class Expectations:
    """What the site's policy and its runs ask of the data."""

    min_patients: int = 1  # training patients, from the site's policy
    asked: tuple[DatasetConfig, ...] = ()  # of approved and pending runs
    # Pixels a side that cases are prepared at: the runs' largest, else that of the presets S to L.
    image_size: int = 256
    cache: Path | None = None  # where prepared cases go


def check_dataset(
    folder: Path,
    expected: Expectations,
    names: Names,
    seconds: float = DATA_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Check]:
    """Every check of a dataset folder.

    Args:
        seconds: after which no further case is read; what was read by then is reported as such.
    """
    dataset, unread = _open(folder, names)
    if dataset is None:
        yield unread
        yield from (Check(name, "skipped", "needs 'dataset' first") for name in NAMES[1:])
        return
    end = clock() + seconds
    seen: list[Seen] = []
    for case in dataset.cases:
        if seen and clock() > end:
            break
        report(Progress("doctor", len(seen), len(dataset.cases)))
        seen.append(look_at(case, dataset.config))
    report(Progress("doctor", len(dataset.cases), len(dataset.cases)))
    usable = [s for s in seen if s.fault is None]
    yield _dataset_check(dataset, seen, seconds, expected)
    yield _files_check(seen, names)
    yield _labels_check(dataset.config, seen, names)
    yield _orientation_check(usable, names)
    yield _spacing_check(usable, names)
    yield _duplicates_check(usable, names)
    yield _splits_check(dataset, usable, expected, names)
    yield _masks_check(dataset.config, usable, names)
    yield _cache_check(dataset, seen, expected)


def _open(folder: Path, names: Names) -> tuple[Dataset | None, Check]:
    """The dataset, or why it cannot be opened."""
    help_ = "" if names.shown else " medsegfed doctor --names says where."
    try:
        return open_dataset(folder), Check("dataset", "ok", "")
    except UserError as error:
        fault = str(error) if names.shown else why_not_open(folder)
        return None, Check("dataset", "fail", fault, f"Mend it, or mend `data` in site.yaml.{help_}")


def _dataset_check(dataset: Dataset, seen: Sequence[Seen], seconds: float, expected: Expectations) -> Check:
    total, usable = len(dataset.cases), sum(s.fault is None for s in seen)
    patients = len({case.patient_id for case in dataset.cases})
    figures: dict[str, Any] = {"cases": total, "patients": patients, "read": len(seen), "usable": usable}
    fact = f"{counted(total, 'case')} of {counted(patients, 'patient')}; {usable:,} usable"
    unlike = [what for asked in expected.asked for what in _unlike(dataset.config, asked)]
    if unlike:
        advice = "Make dataset.yaml and the run agree; the run's own words: medsegfed approve RUN."
        return Check("dataset", "fail", f"{fact}; a run asks for {unlike[0]}", advice, figures)
    if len(seen) < total:
        advice = f"Run medsegfed doctor with a larger --data-seconds (now {seconds:g}) to see the rest."
        return Check("dataset", "warn", f"{fact} of the first {len(seen):,} that were read in time", advice, figures)
    return Check("dataset", "ok", fact, figures=figures)


def _unlike(own: DatasetConfig, asked: DatasetConfig) -> list[str]:
    """Where the data is not what a run asks for: the site would refuse to train."""
    return [
        f"{len(theirs)} {what}, the data has {len(mine)}"
        if len(mine) != len(theirs)
        else f"other {what} than the data has"
        for what, mine, theirs in (
            ("channels", own.channels, asked.channels),
            ("labels", own.label_names, asked.label_names),
        )
        if tuple(mine) != tuple(theirs)
    ]


def _files_check(seen: Sequence[Seen], names: Names) -> Check:
    bad = [s for s in seen if s.fault is not None]
    kinds = Counter(str(s.fault) for s in bad)
    figures = {"bad": len(bad), "read": len(seen), "kinds": dict(sorted(kinds.items()))}
    if not bad:
        return Check("files", "ok", f"all {counted(len(seen), 'case')} can be read", figures=figures)
    reasons = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    fact = f"{len(bad):,} of {counted(len(seen), 'case')} cannot be used: {reasons}"
    cases = names.of((s.case.case_id for s in bad), (s.told for s in bad))
    if len(bad) > MAX_FAULTY * len(seen):
        advice = f"Mend or remove them: above {MAX_FAULTY:.0%} the site refuses to train. {_WHICH}"
        return Check("files", "fail", fact, advice, figures, cases)
    return Check("files", "warn", fact, f"They are left out of training; mend or remove them. {_WHICH}", figures, cases)


_WHICH = "medsegfed doctor --names names them on this terminal."


def _labels_check(config: DatasetConfig, seen: Sequence[Seen], names: Names) -> Check:
    undeclared = [s for s in seen if s.fault == UNDECLARED]
    read = [s for s in seen if s.fault is None]
    drawn = {index for s in read for index in s.labels}
    missing = [index for index in range(1, len(config.label_names)) if index not in drawn]
    per_label = {str(index): sum(index in s.labels for s in read) for index in range(len(config.label_names))}
    figures: dict[str, Any] = {
        "masks": len(read) + len(undeclared),
        "undeclared": len(undeclared),
        "never_drawn": len(missing),
        "masks_by_label_index": per_label,
    }
    declared = len(config.label_names) - 1
    if undeclared:
        fact = (
            f"{len(undeclared):,} of {counted(figures['masks'], 'mask')} hold values that dataset.yaml does not declare"
        )
        advice = f"Map the values in dataset.yaml (`labels`), or mend the masks. {_WHICH}"
        cases = names.of((s.case.case_id for s in undeclared), (s.told for s in undeclared))
        many = len(undeclared) > MAX_FAULTY * len(seen)
        return Check("labels", "fail" if many else "warn", fact, advice, figures, cases)
    if read and missing:
        fact = f"{len(missing)} of {counted(declared, 'label')} never drawn in {counted(len(read), 'mask')}"
        return Check(
            "labels", "warn", fact, "Is the value in dataset.yaml right? Then the site cannot teach it.", figures
        )
    return Check(
        "labels", "ok", f"{len(read):,} masks hold declared values only ({counted(declared, 'label')})", "", figures
    )


def _orientation_check(usable: Sequence[Seen], names: Names) -> Check:
    volumes = [s for s in usable if s.axes is not None]
    if not volumes:
        return Check(
            "orientation", "skipped", "the images are pictures: they have rows and columns, no anatomical axes"
        )
    kinds = Counter(s.axes for s in volumes)
    usual = kinds.most_common(1)[0][0]
    silent = [s for s in volumes if not s.directed]
    odd = [s for s in volumes if s.axes != usual and s.directed]
    figures = {
        "volumes": len(volumes),
        "axes": {str(axes): n for axes, n in sorted(kinds.items(), key=str)},
        "other_than_usual": len(odd),
        "unknown": len(silent),
    }
    facts = []
    if odd:
        facts.append(
            f"{len(odd):,} of {counted(len(volumes), 'volume')} stored along other axes than the usual {usual}"
        )
    if silent:
        facts.append(f"{len(silent):,} of {len(volumes):,} whose header does not say where the axes point")
    if not facts:
        return Check(
            "orientation", "ok", f"all {counted(len(volumes), 'volume')} stored along {usual} axes", "", figures
        )
    advice = f"All are turned to one orientation by their headers: look at one of them, is its header true? {_WHICH}"
    cases = names.of(s.case.case_id for s in (*odd, *silent))
    return Check("orientation", "warn", "; ".join(facts), advice, figures, cases)


def _spacing_check(usable: Sequence[Seen], names: Names) -> Check:
    known = [s for s in usable if s.spacing_mm is not None]
    unknown = len(usable) - len(known)
    if not known:
        fact = f"unknown for all {counted(len(usable), 'case')}: no distance in mm can be given"
        return Check("spacing", "ok", fact, "", {"known": 0, "unknown": unknown})
    axes = max(len(s.spacing_mm or ()) for s in known)
    columns = [[s.spacing_mm[axis] for s in known if s.spacing_mm and len(s.spacing_mm) > axis] for axis in range(axes)]
    middle = [median(column) for column in columns]
    far = [
        s
        for s in known
        if any(not 1 / FAR_SPACING <= mm / middle[a] <= FAR_SPACING for a, mm in enumerate(s.spacing_mm or ()))
    ]
    ratio = max(max(s.spacing_mm or (1,)) / min(s.spacing_mm or (1,)) for s in known)
    ranges = [(min(column), max(column)) for column in columns]
    figures = {
        "known": len(known),
        "unknown": unknown,
        "outliers": len(far),
        "largest_ratio": round(ratio, 2),
        "mm": [{"least": low, "median": mid, "most": high} for (low, high), mid in zip(ranges, middle, strict=True)],
    }
    fact = f"{' x '.join(_range(low, high) for low, high in ranges)} mm"
    if unknown:
        fact += f"; unknown for {unknown:,} of {counted(len(usable), 'case')}"
    if far:
        cases = names.of((s.case.case_id for s in far), (f"{s.case.case_id}: {s.spacing_mm}" for s in far))
        fact += f"; {counted(len(far), 'case')} more than {FAR_SPACING:g} times off the median"
        return Check("spacing", "warn", fact, f"Is the header of these scans true? {_WHICH}", figures, cases)
    if unknown and unknown < len(usable):
        return Check(
            "spacing", "warn", fact, "Fill in spacing_mm in cases.csv: mixed cases give mixed distances.", figures
        )
    if ratio > ANISOTROPIC:
        fact += f"; a voxel is up to {ratio:.1f} times longer than wide"
    return Check("spacing", "ok", fact, "", figures)


def _range(low: float, high: float) -> str:
    return f"{low:.3g}" if math.isclose(low, high, rel_tol=1e-3) else f"{low:.3g}-{high:.3g}"


def _duplicates_check(usable: Sequence[Seen], names: Names) -> Check:
    groups: defaultdict[str, list[Seen]] = defaultdict(list)
    for s in usable:
        if not s.blank:  # two empty slices are alike and nobody's
            groups[s.digest].append(s)
    alike = [group for group in groups.values() if len(group) > 1]
    shared = [group for group in alike if len({s.case.patient_id for s in group}) > 1]
    own = [group for group in alike if group not in shared]
    patients = {s.case.patient_id for group in shared for s in group}
    figures = {
        "images": len(groups),
        "under_two_patients": len(shared),
        "patients": len(patients),
        "under_one_patient": len(own),
    }
    if shared:
        fact = f"{counted(len(shared), 'image')} under more than one patient ({counted(len(patients), 'patient')})"
        if own:
            fact += f"; {len(own):,} twice under one"
        advice = f"One person under two ids may be trained on and tested on: give the cases one patient_id. {_WHICH}"
        return Check("duplicates", "fail", fact, advice, figures, _alike(shared, names))
    if own:
        fact = f"{counted(len(own), 'image')} under more than one case of the same patient"
        advice = f"They count double in training: keep one (several masks of one image are joined by ';'). {_WHICH}"
        return Check("duplicates", "warn", fact, advice, figures, _alike(own, names))
    return Check("duplicates", "ok", f"{counted(len(groups), 'image')}, no two alike", "", figures)


def _alike(groups: Sequence[Sequence[Seen]], names: Names) -> tuple[str, ...]:
    plain = (" = ".join(f"{s.case.case_id} (patient {s.case.patient_id})" for s in group) for group in groups)
    return names.of((s.case.case_id for group in groups for s in group), plain)


def _splits_check(dataset: Dataset, usable: Sequence[Seen], expected: Expectations, names: Names) -> Check:
    from medsegdiff.data.splits import SPLIT_SEED, TEST_FRACTION, split_patients

    given: defaultdict[str, set[str]] = defaultdict(set)
    for case in dataset.cases:
        if case.split:
            given[case.patient_id].add(case.split)
    torn = sorted(patient for patient, splits in given.items() if len(splits) > 1)
    if torn:
        everybody = len({case.patient_id for case in dataset.cases})
        fact = f"{len(torn):,} of {counted(everybody, 'patient')} in two splits"
        advice = f"The site refuses to train: give every case of a patient the same split in cases.csv. {_WHICH}"
        return Check("splits", "fail", fact, advice, {"in_two_splits": len(torn)}, names.of(torn))
    if not usable:
        return Check("splits", "fail", "no patient is left: no case is usable", "See the check 'files'.")
    parts = Counter(split_patients([s.case for s in usable], TEST_FRACTION, 0.0, SPLIT_SEED).values())
    train, test = parts["train"], parts["test"]
    figures = {
        "in_two_splits": 0,
        "train_patients": train,
        "test_patients": test,
        "val_patients": parts["val"],
        "min_patients": expected.min_patients,
    }
    fact = f"{counted(train, 'patient')} to train on, {test:,} held out"
    if train < max(1, expected.min_patients):
        advice = "Add patients; or the data officer lowers min_patients in site.yaml, which lays fewer patients bare."
        return Check("splits", "fail", f"{fact}; the site's policy asks for {expected.min_patients:,}", advice, figures)
    if test == 0:
        advice = "Mark some patients as test in the split column of cases.csv, or add patients."
        return Check("splits", "warn", f"{fact}: the site cannot score a model", advice, figures)
    if test == 1:
        advice = "Hold out more, or none: with one, the average that is sent is that patient's own Dice."
        return Check("splits", "warn", fact, advice, figures)
    return Check("splits", "ok", f"{fact}; no patient in two splits", "", figures)


def _masks_check(config: DatasetConfig, usable: Sequence[Seen], names: Names) -> Check:
    from medsegdiff.labels import LabelScheme

    wanted = {index for joined in LabelScheme.of(config).members for index in joined}
    drawn = {s.case.patient_id for s in usable if not wanted.isdisjoint(s.labels)}
    empty = sum(wanted.isdisjoint(s.labels) for s in usable)
    patients = {s.case.patient_id for s in usable}
    bare, blank = patients - drawn, [s for s in usable if s.blank]
    figures = {
        "masks": len(usable),
        "empty": empty,
        "patients_without_foreground": len(bare),
        "blank_images": len(blank),
    }
    share = f" ({empty / len(usable):.0%})" if usable else ""
    fact = f"{empty:,} of {counted(len(usable), 'mask')} empty{share}; "
    fact += f"{counted(len(bare), 'patient')} without any foreground"
    if blank:
        fact += f"; {counted(len(blank), 'image')} blank"
    advice = f"Are they healthy, or is a mask missing? {_WHICH}"
    if patients and len(bare) == len(patients):
        return Check("masks", "fail", fact, "There is nothing to learn from: mend the masks or dataset.yaml.", figures)
    if len(bare) > MANY_EMPTY * len(patients) or any(s.axes is not None for s in blank):
        cases = names.of([*bare, *(s.case.case_id for s in blank)])
        return Check("masks", "warn", fact, advice, figures, cases)
    return Check("masks", "ok", fact, "", figures)


def _cache_check(dataset: Dataset, seen: Sequence[Seen], expected: Expectations) -> Check:
    """Room for the prepared cases: image as float16, labels at the network's size and at their own, a byte each."""
    if expected.cache is None:
        return Check("cache", "skipped", "no cache folder is named")
    read = [s for s in seen if s.slices]
    side, channels = expected.image_size, len(dataset.config.channels)
    bytes_ = sum(s.slices * side**2 * (2 * channels + s.raters) + s.raters * s.voxels for s in read)
    due = bytes_ * len(dataset.cases) / len(seen)
    free = shutil.disk_usage(next(path for path in (expected.cache, *expected.cache.parents) if path.exists())).free
    figures = {"image_size": side, "due_bytes": int(due), "free_bytes": free}
    fact = f"preparing the cases at {side} px takes {gibibytes(due)} at most; {gibibytes(free)} free"
    if due > free:
        return Check(
            "cache", "warn", fact, "Unless they are prepared already: free space, or set cache in site.yaml.", figures
        )
    return Check("cache", "ok", fact, figures=figures)
