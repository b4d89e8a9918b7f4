"""What report.json holds, as types: the one place that names its keys.

Every figure that may not apply is None: per-site figures with privacy on, distances where the data has no spacing,
the local and pooled arms of a federation that cannot train them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from medsegdiff.strict import Strict
from server.rounds import RunState

Arm = Literal["federated", "personalised", "local", "pooled"]
ARMS: tuple[Arm, ...] = ("federated", "personalised", "local", "pooled")

Dice = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Scalar = str | int | float | bool | None
Setting = Scalar | tuple[Scalar, ...]

ROUNDING = 1e-4  # an entropy computed in single precision may pass 1 by this much; it is drawn as 1


@dataclass(frozen=True)
class ArmScore(Strict):
    """One arm over all sites: `mean` of the sites' Dice, and `worst`, the lowest site's."""

    mean: Dice | None
    worst: Dice | None


@dataclass(frozen=True)
class Patients(Strict):
    """Patients (never slices) a site trained and tested on."""

    train: Count | None
    test: Count | None


@dataclass(frozen=True)
class RejectedRound(Strict):
    """A round whose update from a site the server did not aggregate."""

    round: Count
    reason: str


@dataclass(frozen=True)
class Refusal(Strict):
    """What a site declined to do, in its own code and words, and how often it said so."""

    code: str
    reason: str
    times: Annotated[int, Field(ge=1)] = 1


@dataclass(frozen=True)
class LateRound(Strict):
    """A round whose update of a site counted in a later one."""

    round: Count
    counted: Count


@dataclass(frozen=True)
class SiteScores(Strict):
    """One site: whom it holds, how each arm does on its test patients, and when it was not part of a round."""

    patients: Patients | None
    dice: dict[Arm, Dice | None] | None
    hd95_mm: dict[Arm, Positive | None] | None
    epsilon: Positive | None  # spent by the site's patients over all its runs; None: no privacy
    absent_rounds: tuple[Count, ...]
    rejected_rounds: tuple[RejectedRound, ...] = ()
    suspended_rounds: tuple[Count, ...] = ()  # in which it was not asked, for rejections before
    late_rounds: tuple[LateRound, ...] = ()  # whose update came when the round was over, and counted in a later one
    chosen_rounds: tuple[Count, ...] | None = None  # in which it was drawn; None: every round asked all sites
    dice_by_target: dict[Arm, dict[str, Dice | None] | None] | None = None
    hd95_undefined: dict[Arm, Count | None] | None = None  # test patients with one of the two masks empty
    faults: Count | None = None  # cases skipped because they could not be read
    refusals: tuple[Refusal, ...] = ()
    software: dict[str, str] | None = None  # versions at the site; federations only, as are the two around it
    application: str | None = None  # hash of the program that ran at the site
    privacy_delta: Positive | None = None  # at which epsilon is stated

    def dice_of(self, arm: Arm) -> float | None:
        return (self.dice or {}).get(arm)

    def hd95_of(self, arm: Arm) -> float | None:
        return (self.hd95_mm or {}).get(arm)

    def undefined_of(self, arm: Arm) -> int:
        return (self.hd95_undefined or {}).get(arm) or 0

    def target_dice(self, arm: Arm, target: str) -> float | None:
        return ((self.dice_by_target or {}).get(arm) or {}).get(target)


@dataclass(frozen=True)
class HistoryEntry(Strict):
    """The federated model at one site after one round; None where it was not measured."""

    round: Count
    site: str
    loss: float | None
    dice: Dice | None


@dataclass(frozen=True)
class CrossSite(Strict):
    """Dice of each model (row) on each site's test patients (column)."""

    models: tuple[str, ...]
    sites: tuple[str, ...]
    dice: tuple[tuple[Dice | None, ...], ...]


@dataclass(frozen=True)
class DatasetFacts(Strict):
    """What was segmented in what."""

    name: str
    modality: str
    channels: tuple[str, ...]
    targets: tuple[str, ...]
    licence: str | None = None


@dataclass(frozen=True)
class Traffic(Strict):
    """Bytes of weights that travelled: `up` from the sites to the server, `down` to them."""

    up: Count | None
    down: Count | None


@dataclass(frozen=True)
class Progress(Strict):
    """How far a run has come. Simulations are reported at their end alone, which may come before the last round."""

    state: RunState
    committed: Count  # rounds whose model stands
    scored: Count | None  # the round whose model the sites' Dice are of; None: none was scored yet


@dataclass(frozen=True)
class Participation(Strict):
    """How many sites a round asks, and how many updates make it one; fewer asked than there are: drawn by the seed."""

    sites: Count
    asked: Count
    spare: Count  # asked beside them: the first `asked` usable updates make the round
    required: Count


@dataclass(frozen=True)
class Incident(Strict):
    """What failed during a run of a real federation, and what came of it."""

    time: float  # seconds since 1970
    what: str
    done: str
    seconds: Positive | None  # until it was done; None: not yet, or nobody knows


@dataclass(frozen=True)
class Report(Strict):
    """The whole of report.json. `model`, `strategy`, `software` and `hardware` may hold further settings."""

    run: str
    seed: int
    rounds: Count
    engine: str
    model: dict[str, Setting]  # preset, parameters
    strategy: dict[str, Setting]  # name, and its settings
    local_steps: Count | None
    dataset: DatasetFacts | None
    arms: dict[Arm, ArmScore | None]
    sites: Annotated[dict[str, SiteScores], Field(min_length=1)]
    seconds: dict[str, Positive | None]  # total, and its parts
    bytes: Traffic
    history: tuple[HistoryEntry, ...]
    software: dict[str, str | None]
    hardware: dict[str, str | int | None] | None
    notes: tuple[str, ...]
    cross_site: CrossSite | None = None
    training: dict[str, Setting] | None = None  # of local steps; None in reports of earlier versions, as the next two
    participation: Participation | None = None
    sampling: dict[str, Setting] | None = None  # of masks
    progress: Progress | None = None
    incidents: tuple[Incident, ...] = ()

    def __post_init__(self) -> None:
        for key, wanted in (("model", ("preset", "parameters")), ("strategy", ("name",)), ("seconds", ("total",))):
            for name in wanted:
                _require(name in getattr(self, key), f"{key}.{name} is required and is not there")
        for entry in self.history:
            _require(entry.site in self.sites, f"history names site {entry.site!r}, which is not among `sites`")
            _require(entry.round <= self.rounds, f"history holds round {entry.round} of {self.rounds}")
        if self.cross_site is not None:
            shape = [len(row) for row in self.cross_site.dice]
            due = [len(self.cross_site.sites)] * len(self.cross_site.models)
            _require(shape == due, f"cross_site.dice has rows of {shape} numbers where its names call for {due}")

        if self.progress is not None:
            most = max(self.progress.committed, self.progress.scored or 0)
            _require(most <= self.rounds, f"progress holds round {most} of {self.rounds}")

    @property
    def unfinished(self) -> Progress | None:
        """How far a run has come that is not at its end."""
        return self.progress if self.progress is not None and self.progress.state != "finished" else None

    def mean_of(self, arm: Arm) -> float | None:
        score = self.arms.get(arm)
        return score.mean if score else None

    def worst_of(self, arm: Arm) -> float | None:
        score = self.arms.get(arm)
        return score.worst if score else None

    @property
    def present_arms(self) -> tuple[Arm, ...]:
        """The arms of which any Dice is known."""
        return tuple(
            arm
            for arm in ARMS
            if self.mean_of(arm) is not None or any(site.dice_of(arm) is not None for site in self.sites.values())
        )


@dataclass(frozen=True)
class Example:
    """One slice to show beside the numbers; simulations only, for it is a patient's picture."""

    site: str
    title: str
    image: NDArray[np.floating[Any]]  # (H, W), any range; shown between its 0.5th and 99.5th percentile
    truth: NDArray[np.bool_]  # (T, H, W)
    prediction: NDArray[np.bool_]  # (T, H, W)
    uncertainty: NDArray[np.floating[Any]]  # (H, W), in [0, 1]
    targets: tuple[str, ...]  # T names
    dice: float | None = field(default=None)

    def __post_init__(self) -> None:
        height, width = self.image.shape
        masks = (len(self.targets), height, width)
        for name, due in (("truth", masks), ("prediction", masks), ("uncertainty", (height, width))):
            found = getattr(self, name).shape
            _require(found == due, f"example {self.title!r}: {name} has shape {found}, the image calls for {due}")
        inside = bool(
            np.all((self.uncertainty >= -ROUNDING) & (self.uncertainty <= 1 + ROUNDING))
        )  # NaN is not inside either
        _require(inside, f"example {self.title!r}: uncertainty leaves [0, 1]")
        _require(bool(np.isfinite(self.image).all()), f"example {self.title!r}: the image holds NaN or infinity")


def parse_report(report: dict[str, Any]) -> Report:
    """The typed view of a report.

    Raises:
        ValueError: one line that names the key: NaN or infinity, data that JSON cannot hold, an unknown or missing
            key, a wrong type, a Dice outside [0, 1].
    """
    for path, number in _floats(report, "report"):
        _require(math.isfinite(number), f"{path} is {number}; a figure that is not known must be null")
    try:
        text = json.dumps(report, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"report is not plain JSON data: {error}") from error
    try:
        # Through JSON, and strictly: what is checked is what a reader of report.json will find, with no conversions.
        return _ADAPTER.validate_json(text, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"]) or "report"
        raise ValueError(f"{where}: {fault['msg'].removeprefix('Value error, ')}") from None


def _floats(data: Any, path: str) -> list[tuple[str, float]]:
    """Every float in nested plain data with the dotted path to it."""
    if isinstance(data, float):
        return [(path, data)]
    if isinstance(data, dict):
        return [found for key, value in data.items() for found in _floats(value, f"{path}.{key}")]
    if isinstance(data, (list, tuple)):
        return [found for index, value in enumerate(data) for found in _floats(value, f"{path}[{index}]")]
    return []


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


_ADAPTER: TypeAdapter[Report] = TypeAdapter(Report)
