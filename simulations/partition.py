"""Who sees which patient: one dataset dealt out to virtual hospitals.

The patient is the unit: all cases of a patient go to one site. A partition is a pure function of the patients, the
configuration and the seed, and does not depend on the order in which patients are listed. Except by `site`, such
hospitals are artificial, and reports should say so.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medsegdiff.data.dataset import Case, Dataset, DatasetConfig
from medsegdiff.data.images import DataFileError, read_mask
from medsegdiff.errors import UserError
from medsegdiff.progress import Progress, report
from medsegdiff.strict import Strict

FOREGROUND_BINS = 5  # quintiles of foreground size: few enough that small datasets fill each
MIN_PATIENTS = 2  # one to train on, one to test on

Partition = dict[str, list[str]]


@dataclass(frozen=True)
class PartitionConfig(Strict):
    """How patients are dealt out."""

    by: Literal["site", "iid", "dirichlet", "quantity"] = "site"  # the site column; alike; lesion size skew; size skew
    sites: int | None = None  # how many; None for by: site, which takes those of the column
    alpha: float = 0.5  # Dirichlet concentration: small is skewed (0.1), large is even (100); iid and site ignore it

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and 1e-3 <= self.alpha <= 1e6):
            raise ValueError(f"alpha must lie in 0.001..1000000, found {self.alpha}")
        if self.by == "site" and self.sites is not None:
            raise ValueError(f"by: site takes its sites from the data; leave out sites: {self.sites}")
        if self.by != "site" and (self.sites is None or not 1 <= self.sites <= 9999):
            raise ValueError(f"by: {self.by} needs a number of sites in 1..9999, found {self.sites}")


@dataclass(frozen=True)
class Patient:
    """What a partition may look at."""

    patient_id: str
    site: str | None = None  # where the scan was made, if the dataset says so
    foreground: float = 0.0  # size of the targets, in any unit that ranks patients; only `dirichlet` asks


def patients_of(dataset: Dataset, config: PartitionConfig) -> tuple[Patient, ...]:
    """The patients of a dataset as a partition sees them, in the order of the dataset.

    The foreground is the share of all voxels of a patient that belong to a target, in [0, 1]: a share, because some
    patients come with a whole stack and others with a few slices. Masks are read only where the partition asks for it.
    A mask that cannot be read counts for nothing here; preparing the data names and counts it.
    """
    sites = {case.patient_id: case.site for case in dataset.cases}
    voxels: Counter[str] = Counter()
    inside: Counter[str] = Counter()
    for done, case in enumerate(dataset.cases if config.by == "dirichlet" else ()):
        report(Progress("foreground", done, len(dataset.cases)))
        with suppress(DataFileError):
            members, total = _count_foreground(case, dataset.config)
            inside[case.patient_id] += members
            voxels[case.patient_id] += total
    return tuple(Patient(name, site, inside[name] / max(1, voxels[name])) for name, site in sites.items())


def _count_foreground(case: Case, config: DatasetConfig) -> tuple[int, int]:
    """Voxels inside any target, and all voxels, summed over raters. Raises DataFileError for a mask that is no mask."""
    if not case.mask_paths:
        return 0, 0
    targets = config.targets or {label: (label,) for label in config.label_names[1:]}
    wanted = {label for labels in targets.values() for label in labels}
    is_foreground = np.array([label in wanted for label in config.label_names])
    masks = read_mask(case.mask_paths, config)
    return int(is_foreground[masks].sum()), masks.size


def partition_patients(patients: Sequence[Patient], config: PartitionConfig, seed: int) -> Partition:
    """Deal the patients out: site name -> sorted patient ids.

    Sources: label skew by Dirichlet proportions over the sites for each class, Yurochkin et al. 2019 (arXiv
    1905.12022), here over quantile bins of the foreground size; quantity skew, Li et al. 2021 (arXiv 2102.02079).

    Guarantees:
        Every patient is in exactly one site and no site is empty. Where the patients suffice, `dirichlet` and
        `quantity` leave each site at least MIN_PATIENTS; `iid` sites differ by one patient at most.

    Raises:
        UserError: fewer patients than the sites need, an unknown site, or a patient listed twice.
    """
    twice = [name for name, count in Counter(patient.patient_id for patient in patients).items() if count > 1]
    if twice:
        raise UserError(
            f"{len(twice)} of {len(patients)} listed patients stand there more than once (the first: {twice[0]}); one "
            "could come to two sites. List each once."
        )
    ordered = sorted(patients, key=lambda patient: patient.patient_id)
    if config.by == "site":
        return _by_site(ordered)
    assert config.sites is not None  # PartitionConfig holds this
    _require_enough(len(ordered), config)
    generator = _generator(seed, config)
    if config.by == "iid":
        groups = _deal_evenly(ordered, config.sites, generator)
    elif config.by == "quantity":
        groups = _deal_sizes(ordered, config.sites, config.alpha, generator)
    else:
        groups = _deal_by_foreground(ordered, config.sites, config.alpha, generator)
    width = len(str(config.sites))
    return {
        f"site-{number:0{width}d}": sorted(patient.patient_id for patient in group)
        for number, group in enumerate(groups, start=1)
    }


def _require_enough(patients: int, config: PartitionConfig) -> None:
    each = MIN_PATIENTS if config.by == "quantity" else 1
    needed = each * (config.sites or 0)
    if patients < needed:
        raise UserError(
            f"{patients} patients cannot be dealt out to {config.sites} sites by {config.by}, which needs at least "
            f"{each} each, {needed} in all. Set sites to {patients // each} or fewer, or take a larger dataset."
        )


def _generator(seed: int, config: PartitionConfig) -> np.random.Generator:
    """A stream of its own, so that a seed shared with training or phantoms is not the same randomness again."""
    digest = hashlib.sha256(f"partition|{seed}|{config.by}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _by_site(patients: Sequence[Patient]) -> Partition:
    unknown = [patient.patient_id for patient in patients if not patient.site]
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(patients)} patients have no site (the first: {unknown[0]}); a partition by site "
            "needs the column `site` for every case. Fill it, or choose by: iid, dirichlet or quantity."
        )
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for patient in patients:
        groups[str(patient.site)].append(patient.patient_id)
    if not groups:
        raise UserError("0 patients cannot be dealt out; check that the dataset lists cases.")
    return dict(sorted(groups.items()))


def _shuffled(patients: Sequence[Patient], generator: np.random.Generator) -> list[Patient]:
    return [patients[index] for index in generator.permutation(len(patients))]


def _deal_evenly(patients: Sequence[Patient], sites: int, generator: np.random.Generator) -> list[list[Patient]]:
    shuffled = _shuffled(patients, generator)
    return [shuffled[site::sites] for site in range(sites)]


def _deal_sizes(
    patients: Sequence[Patient], sites: int, alpha: float, generator: np.random.Generator
) -> list[list[Patient]]:
    """Sites of Dirichlet(alpha) sizes above the least size; who goes where is chance."""
    shuffled = _shuffled(patients, generator)
    proportions = generator.dirichlet(np.full(sites, alpha))
    sizes = MIN_PATIENTS + _share_out(len(patients) - MIN_PATIENTS * sites, proportions)
    ends = np.cumsum(sizes)
    return [shuffled[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _deal_by_foreground(
    patients: Sequence[Patient], sites: int, alpha: float, generator: np.random.Generator
) -> list[list[Patient]]:
    """Each quantile bin of foreground size is shared out in its own Dirichlet(alpha) proportions."""
    ranked = sorted(patients, key=lambda patient: (patient.foreground, patient.patient_id))
    groups: list[list[Patient]] = [[] for _ in range(sites)]
    for members in np.array_split(np.arange(len(ranked)), FOREGROUND_BINS):
        shuffled = _shuffled([ranked[index] for index in members], generator)
        shares = _share_out(len(shuffled), generator.dirichlet(np.full(sites, alpha)))
        for group, share in zip(groups, shares, strict=True):
            group.extend(shuffled[:share])
            del shuffled[:share]
    return _fill_up(groups, least=min(MIN_PATIENTS, len(patients) // sites))


def _share_out(count: int, proportions: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers that sum to `count` and lie within 1 of count * proportions (largest remainders)."""
    exact = count * proportions
    shares = np.floor(exact).astype(np.int64)
    largest = np.argsort(shares - exact, kind="stable")
    shares[largest[: count - int(shares.sum())]] += 1
    return shares


def _fill_up(groups: list[list[Patient]], least: int) -> list[list[Patient]]:
    """Move patients, one at a time, from the largest site to those below `least`."""
    for group in groups:
        while len(group) < least:
            # The drawing could be repeated until it fits, but at a small alpha that may take for ever.
            group.append(max(groups, key=len).pop())
    return groups
