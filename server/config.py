"""What a run is: as a researcher writes it (`RunRequest`) and as it is carried out (`RunPlan`, run.yaml)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from client.contract import TrainTask
from medsegdiff.config import PRESETS, DiffusionConfig, ModelConfig, SamplingConfig, TrainingConfig, preset
from medsegdiff.data.dataset import DatasetConfig
from medsegdiff.errors import UserError
from medsegdiff.labels import LabelScheme
from medsegdiff.strict import Strict, compact_json, plain

ANSWERS_BYTES = 4 * 2**30  # of answers that may wait in the SuperLink's memory, where a plan says nothing else
_ANY_DATASET = DatasetConfig("any", "any", ("image",), {"background": 0, "target": 1})


def _check_pace(evaluate_every: int, deadline_seconds: float, absence_seconds: float) -> None:
    if evaluate_every < 1:
        raise ValueError(f"evaluate_every must be at least 1, found {evaluate_every}")
    if not deadline_seconds > 0:
        raise ValueError(f"deadline_seconds must be positive, found {deadline_seconds}")
    if not 0 <= absence_seconds <= deadline_seconds:
        raise ValueError(f"absence_seconds must lie in 0..deadline_seconds, found {absence_seconds}")


def _check_wave(wave: int | None) -> None:
    if wave is not None and wave < 1:
        raise ValueError(f"wave must be at least 1, or null, found {wave}")


@dataclass(frozen=True)
class StrategyConfig(Strict):
    """How updates become the next model."""

    name: Literal["fedavg", "fedprox"] = "fedavg"
    proximal_mu: float = 0.0  # FedProx only: pull of local weights towards the received ones

    def __post_init__(self) -> None:
        if (self.name == "fedprox") != (self.proximal_mu > 0):
            raise ValueError(
                f"proximal_mu is {self.proximal_mu} with {self.name}: fedprox needs a value above 0, fedavg needs 0"
            )


@dataclass(frozen=True)
class ModelChoice(Strict):
    """A preset and what is changed of it; None keeps the preset's value."""

    preset: str = "tiny"
    image_size: int | None = None
    base_channels: int | None = None
    channel_multipliers: tuple[int, ...] | None = None
    blocks_per_level: int | None = None
    fusion_levels: tuple[int, ...] | None = None
    attention_levels: tuple[int, ...] | None = None
    dropout: float | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
        try:
            preset(self.preset, **self._changes())
        except UserError as error:  # pydantic turns a ValueError into a line with file and key
            raise ValueError(str(error).rstrip(".")) from error

    def resolve(self, dataset: DatasetConfig) -> ModelConfig:
        """The network for a dataset's channels and targets."""
        channels = LabelScheme.of(dataset).channels
        return preset(self.preset, image_channels=len(dataset.channels), mask_channels=channels, **self._changes())

    def _changes(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "preset" and value is not None}


@dataclass(frozen=True)
class RunRequest(Strict):
    """The `run` section of a recipe."""

    rounds: int
    local_steps: int
    model: ModelChoice = ModelChoice()
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig(steps=5)
    strategy: StrategyConfig = StrategyConfig()
    threads: int = 2
    evaluate_every: int = 1  # rounds between scorings of the federated model; the last round is always scored
    quorum: int | None = None  # least number of sites whose updates make a round; default: all
    deadline_seconds: float = 3600.0  # a round waits no longer for its sites
    absence_seconds: float = 120.0  # with the quorum met, how long a round waits for sites that are offline
    wave: int | None = None  # sites that train at the same time; default: whose answers take 4 GiB in all

    def __post_init__(self) -> None:
        _check_wave(self.wave)
        _check_pace(self.evaluate_every, self.deadline_seconds, min(self.absence_seconds, self.deadline_seconds))
        if self.quorum is not None and self.quorum < 1:
            raise ValueError(f"quorum must be at least 1, found {self.quorum}")
        self.task(_ANY_DATASET, seed=0)  # the contract's own limits, before any patient is read

    def task(self, dataset: DatasetConfig, seed: int) -> TrainTask:
        """What the sites are asked."""
        return TrainTask(
            dataset=dataset,
            model=self.model.resolve(dataset),
            rounds=self.rounds,
            local_steps=self.local_steps,
            seed=seed,
            diffusion=self.diffusion,
            training=self.training,
            sampling=self.sampling,
            proximal_mu=self.strategy.proximal_mu,
            threads=self.threads,
        )


@dataclass(frozen=True)
class RunPlan(Strict):
    """run.yaml: one run, resolved to the last value."""

    name: str
    preset: str
    strategy: StrategyConfig
    roster: dict[str, int]  # site name -> enrolled training patients: the most a site may claim as its weight
    task: TrainTask
    evaluate_every: int = 1
    quorum: int | None = None
    deadline_seconds: float = 3600.0
    absence_seconds: float = 120.0
    wave: int | None = None
    engine: str = field(default="inline")  # inline, ray (simulations) or network (a real federation)

    def __post_init__(self) -> None:
        if not self.roster:
            raise ValueError("roster: a run needs at least one site")
        if self.quorum is not None and not 1 <= self.quorum <= len(self.roster):
            raise ValueError(f"quorum must lie in 1..{len(self.roster)} (the number of sites), found {self.quorum}")
        _check_pace(self.evaluate_every, self.deadline_seconds, self.absence_seconds)
        _check_wave(self.wave)

    @property
    def run_id(self) -> str:
        """Our own identity of the run: its name and a hash of all that defines the model and what sites are asked.

        The engine does not, nor how long a round waits, for how many, how many at once: that may change while a run
        goes on.
        """
        defining = {key: value for key, value in plain(self).items() if key not in _PATIENCE}
        return f"{self.name}-{hashlib.sha256(compact_json(defining).encode()).hexdigest()[:12]}"

    @property
    def sites_at_once(self) -> int:
        """Most sites that are asked for an update at the same time (`wave`).

        An answer is as large as the model, float32, and lies in the SuperLink's memory until the ServerApp fetches it.
        """
        if self.wave is not None:
            return self.wave
        from medsegdiff.weights import weight_shapes  # brings torch

        size = 4 * sum(math.prod(shape) for shape in weight_shapes(self.task.model).values())
        return max(1, ANSWERS_BYTES // size)

    @property
    def required(self) -> int:
        """Updates without which a round does not count."""
        return self.quorum if self.quorum is not None else len(self.roster)


_PATIENCE = ("engine", "quorum", "deadline_seconds", "absence_seconds", "wave")


def make_plan(
    request: RunRequest, name: str, seed: int, dataset: DatasetConfig, roster: dict[str, int], engine: str, source: str
) -> RunPlan:
    """Resolve a request for a dataset and the sites that take part. Raises UserError naming `source`."""
    try:
        return RunPlan(
            name=name,
            preset=request.model.preset,
            strategy=request.strategy,
            roster=roster,
            task=request.task(dataset, seed),
            evaluate_every=request.evaluate_every,
            quorum=request.quorum,
            deadline_seconds=request.deadline_seconds,
            absence_seconds=min(request.absence_seconds, request.deadline_seconds),
            wave=request.wave,
            engine=engine,
        )
    except ValueError as error:
        raise UserError(f"{source}: run: {error}.") from error
