"""A hospital's own configuration (site.yaml) and its patients.

The site decides which folder is used and which patients are held out; the server learns counts and averages only.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from client.contract import Invitation, Presence, TrainTask
from client.policy import SitePolicy
from client.scrub import CaseName, Public
from medsegdiff.data.dataset import DatasetConfig, open_dataset
from medsegdiff.data.prepare import Prepared, prepare
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.data.splits import SPLIT_SEED, TEST_FRACTION, split_patients
from medsegdiff.errors import UserError
from medsegdiff.software import software
from medsegdiff.strict import Strict, read_config

log = logging.getLogger("medsegfed.site")


@dataclass(frozen=True)
class SiteConfig(Strict):
    """site.yaml: what the hospital's IT writes."""

    name: str
    data: str  # dataset folder, relative to site.yaml
    cache: str | None = None  # folder for preprocessed slices; default: MEDSEGFED_CACHE, else `cache` beside site.yaml
    device: str | int = "auto"  # "auto", "cpu", "cuda", a GPU's index (1) or part of its name ("H200")
    compile: bool = False  # have torch compile each round's training: a minute at its start, faster steps after it
    keys: str | None = None  # folder of the site's keys, relative to site.yaml; None: a virtual site
    policy: SitePolicy = SitePolicy()  # what the data officer lets run


@dataclass(frozen=True)
class SiteData:
    """Prepared patients of one site, by split."""

    train: tuple[PreparedCase, ...]
    test: tuple[PreparedCase, ...]
    faults: int

    @property
    def train_patients(self) -> int:
        return count_patients(self.train)

    @property
    def test_patients(self) -> int:
        return count_patients(self.test)


class Site:
    """One hospital: its configuration and, once asked for, its data."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path, SiteConfig)
        self._data: dict[int, SiteData] = {}
        self._schema: DatasetConfig

    @property
    def name(self) -> str:
        return self.config.name

    def data(self, task: TrainTask) -> SiteData:
        """The site's patients at the task's image size, prepared once and kept.

        Raises:
            UserError: the data's channels or labels are not the task's, too many cases are faulty, or no patient is
                left to train on.
        """
        size = task.model.image_size
        if size not in self._data:
            dataset = open_dataset(self.path.parent / self.config.data)
            self._check_schema(dataset.config, task.dataset)
            self._schema = dataset.config
            self._data[size] = self._split(prepare(dataset, size, self._cache()))
        self._check_schema(self._schema, task.dataset)  # kept data may have been opened for another run
        return self._data[size]

    def presence(self, task: TrainTask, invitation: Invitation) -> Presence:
        """Counts and versions that tell the server who takes part."""
        data = self.data(task)
        return Presence(
            site=self.name,
            run=invitation.run,
            nonce=invitation.nonce,
            train_patients=data.train_patients,
            test_patients=data.test_patients,
            faults=data.faults,
            software=software(),
        )

    def _cache(self) -> Path:
        """site.yaml's folder; else MEDSEGFED_CACHE, which virtual sites of one machine share; else beside site.yaml."""
        if self.config.cache:
            return self.path.parent / self.config.cache
        shared = os.environ.get("MEDSEGFED_CACHE")
        return Path(shared) if shared else self.path.parent / "cache"

    def _split(self, prepared: Prepared) -> SiteData:
        for fault in prepared.faults:
            log.warning(
                "%s: case %s is left out: %s (%s)", Public(self.name), CaseName(fault.case_id), fault.reason, fault.file
            )  # in a federation client.scrub hashes the case and withholds reason and file
        parts = split_patients([p.case for p in prepared.cases], TEST_FRACTION, 0.0, SPLIT_SEED)
        by_split = {
            name: tuple(p for p in prepared.cases if parts[p.case.patient_id] == name) for name in ("train", "test")
        }
        if not by_split["train"]:
            raise UserError(
                f"{self.name}: none of its {len(parts)} patients is in the training split, so it cannot take part. "
                f"Check the split column of {self.config.data}/cases.csv."
            )
        return SiteData(by_split["train"], by_split["test"], len(prepared.faults))

    def _check_schema(self, own: DatasetConfig, asked: DatasetConfig) -> None:
        for what, mine, theirs in (
            ("channels", list(own.channels), list(asked.channels)),
            ("labels", list(own.label_names), list(asked.label_names)),
        ):
            if mine != theirs:
                raise UserError(
                    f"{self.name}: its data has the {what} {mine}, the run asks for {theirs}; nothing was trained. "
                    "Make dataset.yaml and the run agree."
                )


def count_patients(cases: tuple[PreparedCase, ...]) -> int:
    """Number of different patients among the cases."""
    return len({prepared.case.patient_id for prepared in cases})


@lru_cache(maxsize=64)
def open_site(path: Path) -> Site:
    """The site of one site.yaml, opened once a process."""
    return Site(path)
