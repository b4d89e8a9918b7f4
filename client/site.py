"""A hospital's own configuration (site.yaml) and its patients.

The site decides which folder is used and which patients are held out; the server learns counts and averages only.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from client.contract import Invitation, Presence, TrainTask
from client.policy import SitePolicy
from client.privacy.policy import SitePrivacy
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
    # Channels of a run that this site does not acquire: the network sees the mean there, and learns to do without.
    missing_channels: tuple[str, ...] = ()
    policy: SitePolicy = SitePolicy()  # what the data officer lets run
    privacy: SitePrivacy | None = None  # patient-level differential privacy; with it, nothing is trained without


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
            prepared = prepare(dataset, size, self._cache())
            self._data[size] = self._split(self._filled(prepared, dataset.config, task.dataset))
        self._check_schema(self._schema, task.dataset)  # kept data may have been opened for another run
        return self._data[size]

    def presence(self, task: TrainTask, invitation: Invitation, privacy: SitePrivacy | None = None) -> Presence:
        """Counts and versions that tell the server who takes part; under `privacy` none that depends on a patient."""
        data = self.data(task)  # also where nothing of it is told: data that cannot be read should show at once
        private = privacy is not None
        return Presence(
            site=self.name,
            run=invitation.run,
            nonce=invitation.nonce,
            train_patients=privacy.weight if privacy is not None else data.train_patients,
            test_patients=0 if private else data.test_patients,
            faults=0 if private else data.faults,
            software=software(),
            private=private,
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

    def _filled(self, prepared: Prepared, own: DatasetConfig, asked: DatasetConfig) -> Prepared:
        """The cases with all channels that are asked for; those that the site misses are the mean throughout."""
        if not self.config.missing_channels:
            return prepared
        log.warning(
            "%s: has no %s (missing_channels of site.yaml): the network sees the mean there",
            Public(self.name),
            Public(", ".join(self.config.missing_channels)),
        )
        places = tuple(own.channels.index(name) if name in own.channels else None for name in asked.channels)
        return replace(prepared, cases=tuple(replace(case, places=places) for case in prepared.cases))

    def _check_schema(self, own: DatasetConfig, asked: DatasetConfig) -> None:
        missing = self.config.missing_channels
        odd = [name for name in missing if name not in asked.channels or name in own.channels]
        if odd:
            raise UserError(
                f"{self.name}: missing_channels of site.yaml names {', '.join(odd)}, which the run does not ask for or "
                f"the data has; the run asks for {', '.join(asked.channels)}, the data has {', '.join(own.channels)}. "
                "Nothing was trained. Name exactly the channels that are missing."
            )
        for what, mine, theirs in (
            ("channels", list(own.channels), [name for name in asked.channels if name not in missing]),
            ("labels", list(own.label_names), list(asked.label_names)),
        ):
            if mine != theirs:
                raise UserError(
                    f"{self.name}: its data has the {what} {mine}, the run asks for {theirs}; nothing was trained. "
                    "Make dataset.yaml and the run agree"
                    + (
                        "; a channel that is not acquired here goes into missing_channels of site.yaml."
                        if what == "channels"
                        else "."
                    )
                )


def count_patients(cases: tuple[PreparedCase, ...]) -> int:
    """Number of different patients among the cases."""
    return len({prepared.case.patient_id for prepared in cases})


@lru_cache(maxsize=64)
def open_site(path: Path) -> Site:
    """The site of one site.yaml, opened once a process."""
    return Site(path)
