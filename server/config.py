"""What a run is: as a researcher writes it (`RunRequest`) and as it is carried out (`RunPlan`, run.yaml)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from client.contract import MOST_SITES, PrivacyTask, TrainTask
from client.encoding import Compression, largest_size
from client.personalisation import Personalisation, sent_shapes
from medsegdiff.config import PRESETS, DiffusionConfig, ModelConfig, SamplingConfig, TrainingConfig, preset
from medsegdiff.data.dataset import DatasetConfig
from medsegdiff.errors import UserError
from medsegdiff.labels import LabelScheme
from medsegdiff.strict import Strict, compact_json, plain
from server.compatibility import Features, refuse_unsound
from server.rounds import sample_size

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


def _check_sample(sample: int | float | None, over_select: int) -> None:
    if isinstance(sample, float) and not 0 < sample <= 1:
        raise ValueError(f"sample must be a whole number of sites, or a part of them in (0, 1], found {sample}")
    if sample is not None and sample < (0 if isinstance(sample, float) else 1):
        raise ValueError(f"sample must be at least 1 site, or null for all, found {sample}")
    if over_select < 0:
        raise ValueError(f"over_select must be at least 0, found {over_select}")
    if over_select and sample is None:
        raise ValueError(f"over_select is {over_select} without sample: all sites are asked already. Set sample")


@dataclass(frozen=True)
class StrategyConfig(Strict):
    """How updates become the next model: a rule makes one change of them, an optimizer takes the step.

    Which combinations are sound: server/compatibility.py.
    """

    name: Literal["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "scaffold"] = "fedavg"
    proximal_mu: float = 0.0  # FedProx only: pull of local weights towards the received ones
    weighting: Literal["examples", "equal"] | None = None  # null: by patients for mean and norm_clip, else alike
    server_learning_rate: float = 1.0  # eta: of the aggregated change
    beta_1: float = 0.9  # fedavgm, fedadam, fedyogi: memory of the change
    beta_2: float = 0.99  # fedadam, fedyogi: memory of its square
    tau: float = 1e-3  # fedadam, fedyogi: adaptivity; changes far below it move a weight little
    ema: float = 0.0  # the model that is scored and handed out averages over rounds with this decay; 0: the last one
    rule: Literal["mean", "norm_clip", "median", "trimmed_mean", "multi_krum", "centred_clip"] = "mean"
    byzantine: int = 1  # f: malicious sites that trimmed_mean, multi_krum, median and centred_clip are to bear
    clip_norm: float | None = None  # norm_clip, centred_clip; null: the median of the round's norms
    clip_iterations: int = 3  # centred_clip: L

    def __post_init__(self) -> None:
        if (self.name == "fedprox") != (self.proximal_mu > 0):
            raise ValueError(
                f"proximal_mu is {self.proximal_mu} with {self.name}: fedprox needs a value above 0, "
                f"{'fedavg needs' if self.name != 'fedprox' else 'the others need'} 0"
            )
        for field_, low, high in (("beta_1", 0.0, 1.0), ("beta_2", 0.0, 1.0), ("ema", 0.0, 1.0)):
            if not low <= getattr(self, field_) < high:
                raise ValueError(f"{field_} must lie in [0, 1), found {getattr(self, field_)}")
        for field_ in ("server_learning_rate", "tau", "clip_norm"):
            value = getattr(self, field_)
            if value is not None and not 0 < value < 1e6:
                raise ValueError(f"{field_} must lie in (0, 1000000), found {value}")
        if not 0 <= self.byzantine <= 1000:
            raise ValueError(f"byzantine must lie in 0..1000, found {self.byzantine}")
        if not 1 <= self.clip_iterations <= 100:
            raise ValueError(f"clip_iterations must lie in 1..100, found {self.clip_iterations}")

        refuse_unsound(Features.of(self))

    def least_updates(self, known: int = 0) -> int:
        """Updates below which the rule cannot bear its malicious sites: 2 f + 1, for Krum 2 f + 3.

        Args:
            known: how many of the `byzantine` were found out, and have no update among them.
        """
        f = self.left(known)
        return {"median": 2 * f + 1, "trimmed_mean": 2 * f + 1, "centred_clip": 2 * f + 1, "multi_krum": 2 * f + 3}.get(
            self.rule, 1
        )

    def left(self, known: int) -> int:
        """Malicious sites that may still be among the updates when so many were left out."""
        return max(0, self.byzantine - known)

    def stated(self) -> dict[str, Any]:
        """Name, proximal_mu and whatever differs from the defaults: what the run's identity and its report tell."""
        told = plain(self)
        return {key: told[key] for key in ("name", "proximal_mu")} | _differing(self)


@dataclass(frozen=True)
class ScreeningConfig(Strict):
    """How large an update may be before it is left out; the norm is the 2-norm over all weights."""

    norm_factor: float | None = 10.0  # times the median of the sites' last norms (server/screening.py); null: any
    first_norm: float | None = None  # most in every round; null: what AdamW can move the weights in a round's steps
    strikes: int = 3  # rejections in a row after which a site is suspended

    def __post_init__(self) -> None:
        for name in ("norm_factor", "first_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e12:
                raise ValueError(f"{name} must lie in (0, 1e12), found {value}")
        if self.norm_factor is not None and self.norm_factor < 1:
            raise ValueError(f"norm_factor must be at least 1, found {self.norm_factor}: half of the sites are above 1")
        if not 1 <= self.strikes <= 1000:
            raise ValueError(f"strikes must lie in 1..1000, found {self.strikes}")


@dataclass(frozen=True)
class SelectionConfig(Strict):
    """Which round's model is handed out, and when a run ends early. Chosen on held-out patients: the report says so."""

    # The last round, or the scored one with the best mean, or worst site's, Dice.
    by: Literal["last", "mean", "worst"] = "last"
    patience: int | None = None  # scored rounds without a better one after which the run ends; null: it never does

    def __post_init__(self) -> None:
        if self.patience is not None and not 1 <= self.patience <= 100_000:
            raise ValueError(f"patience must lie in 1..100000, found {self.patience}")
        if self.patience is not None and self.by == "last":
            raise ValueError("patience needs `by: mean` or `by: worst`: what is to become better")


@dataclass(frozen=True)
class StragglerConfig(Strict):
    """What becomes of an update that comes when its round is over (server/stragglers.py)."""

    policy: Literal["drop", "carry"] = "drop"  # carry: it counts in the round that is open then
    exponent: float = 0.5  # a: an update that is s rounds late counts (1 + s)^-a of its weight; 0: all of it
    max_staleness: int = 2  # rounds; a later one is dropped, and its site is asked anew

    def __post_init__(self) -> None:
        if not 0 <= self.exponent <= 10:
            raise ValueError(f"exponent must lie in 0..10, found {self.exponent}")
        if not 1 <= self.max_staleness <= 100:
            raise ValueError(f"max_staleness must lie in 1..100 rounds, found {self.max_staleness}")


def _differing(config: Any) -> dict[str, Any]:
    """Fields that do not have their default value, as plain data."""
    told = plain(config)
    return {f.name: told[f.name] for f in fields(config) if getattr(config, f.name) != f.default}


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
    sample: int | float | None = None  # sites that a round asks: so many, or 0.1: a tenth of them; default: all
    over_select: int = 0  # sites that are asked beside the sample; the first `sample` usable answers make the round
    stragglers: StragglerConfig = StragglerConfig()
    screening: ScreeningConfig = ScreeningConfig()
    selection: SelectionConfig = SelectionConfig()
    privacy: PrivacyTask | None = None  # patient-level differential privacy at the sites that have set it up
    initial: str | None = None  # a model.safetensors to start from, beside this file; null: fresh weights from the seed
    compression: Compression = Compression()  # of the updates that sites send
    personalisation: Personalisation = Personalisation()  # which weights, or which second model, stay at a site

    def __post_init__(self) -> None:
        _check_wave(self.wave)
        _check_sample(self.sample, self.over_select)
        _check_pace(self.evaluate_every, self.deadline_seconds, min(self.absence_seconds, self.deadline_seconds))
        if self.quorum is not None and self.quorum < 1:
            raise ValueError(f"quorum must be at least 1, found {self.quorum}")
        task = self.task(_ANY_DATASET, seed=0)  # the contract's own limits, before any patient is read
        refuse_unsound(Features.of(self.strategy, task, self.stragglers.policy))

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
            control_variates=self.strategy.name == "scaffold",
            threads=self.threads,
            privacy=self.privacy,
            compression=self.compression,
            personalisation=self.personalisation,
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
    sample: int | float | None = None
    over_select: int = 0
    stragglers: StragglerConfig = StragglerConfig()
    screening: ScreeningConfig = ScreeningConfig()
    selection: SelectionConfig = SelectionConfig()
    initial: str | None = None  # hex SHA-256 of the weights that round one starts from; null: fresh from the seed
    canary: bool = False  # one step at every site, and nothing is made of it (server/canary.py)
    engine: str = field(default="inline")  # inline, ray (simulations) or network (a real federation)

    def __post_init__(self) -> None:
        if not self.roster:
            raise ValueError("roster: a run needs at least one site")
        if self.quorum is not None and not 1 <= self.quorum <= len(self.roster):
            raise ValueError(f"quorum must lie in 1..{len(self.roster)} (the number of sites), found {self.quorum}")
        _check_pace(self.evaluate_every, self.deadline_seconds, self.absence_seconds)
        _check_wave(self.wave)
        self._check_sampled()
        if self.task.keeps_state and len(self.roster) > MOST_SITES:
            raise ValueError(
                f"sites keep state from round to round (compression {self.task.compression.kind}, personalisation "
                f"{self.task.personalisation.kind}), and each question names every site: at most {MOST_SITES:,} "
                f"sites, the run has {len(self.roster):,}. Use bf16 or fine_tune"
            )
        if len(self.roster) < self.strategy.least_updates():
            raise ValueError(
                f"strategy.rule {self.strategy.rule} with byzantine {self.strategy.byzantine} needs at least "
                f"{self.strategy.least_updates()} sites, the run has {len(self.roster)}"
            )
        refuse_unsound(Features.of(self.strategy, self.task, self.stragglers.policy))
        if self.task.control_variates != (self.strategy.name == "scaffold"):
            raise ValueError(
                f"task.control_variates is {self.task.control_variates} with strategy {self.strategy.name}: scaffold "
                "has them, the others do not"
            )

    def _check_sampled(self) -> None:
        """A sample that could never meet the quorum, or bear the rule's malicious sites, is refused before training."""
        _check_sample(self.sample, self.over_select)
        if self.sample is None:
            return
        asked, least = self.sample_size, self.strategy.least_updates()
        if asked + self.over_select > len(self.roster):
            raise ValueError(
                f"sample {self.sample} and over_select {self.over_select} ask {asked + self.over_select} sites, the "
                f"run has {len(self.roster)}. Ask fewer, or leave both out to ask all"
            )
        if self.quorum is not None and self.quorum > asked:
            raise ValueError(
                f"quorum is {self.quorum}, and a round ends with {asked} updates (sample {self.sample}): it would "
                "never be met. Raise sample, or lower quorum"
            )
        if asked < least:
            raise ValueError(
                f"strategy.rule {self.strategy.rule} with byzantine {self.strategy.byzantine} needs at least {least} "
                f"updates a round, sample {self.sample} gives {asked}: all malicious sites may be drawn together"
            )

    @property
    def sample_size(self) -> int:
        """Updates that a round is to be made of: the sample, or one of every site."""
        return sample_size(self.sample, len(self.roster))

    @property
    def run_id(self) -> str:
        """Our own identity of the run: its name and a hash of all that defines the model and what sites are asked.

        The engine does not, nor how long a round waits, for how many, how many at once or to spare: that may change
        while a run goes on.
        """
        defining = plain(replace(self, engine="any", **_PATIENCE))
        del defining["wave"], defining["over_select"]
        if self.sample is None:
            del defining["sample"]
        for name in ("initial", "canary"):
            if not getattr(self, name):
                del defining[name]
        # What has its default is left out: a run that began before a setting existed keeps its identity.
        defining["strategy"] = self.strategy.stated()
        for name in ("screening", "selection", "stragglers"):
            defining[name] = _differing(getattr(self, name))
            if not defining[name]:
                del defining[name]
        for name in ("compression", "personalisation"):
            if not _differing(getattr(self.task, name)):
                del defining["task"][name]
        if self.task.privacy is None:
            del defining["task"]["privacy"]
        if not self.task.control_variates:
            del defining["task"]["control_variates"]
        return f"{self.name}-{hashlib.sha256(compact_json(defining).encode()).hexdigest()[:12]}"

    @property
    def sites_at_once(self) -> int:
        """Most sites that are asked for an update at the same time (`wave`).

        An answer is as large as the model, float32, or what its compression makes of that at most, and lies in the
        SuperLink's memory until the ServerApp fetches it.
        """
        if self.wave is not None:
            return self.wave
        return max(1, ANSWERS_BYTES // largest_size(self.task.compression, sent_shapes(self.task)))

    def stated(self) -> dict[str, Any]:
        """How updates are made and become a model, as a report tells it: what differs from the defaults."""
        compression = _differing(self.task.compression)
        kind = {"compression": compression.pop("kind")} if compression else {}
        late = {f"stragglers_{key}": value for key, value in _differing(self.stragglers).items()}
        drawn = {"sample": self.sample, "over_select": self.over_select} if self.sample is not None else {}
        own = {f"personalisation_{key}": value for key, value in _differing(self.task.personalisation).items()}
        if own:
            own = {"personalisation": own.pop("personalisation_kind"), **own}
        return (
            self.strategy.stated()
            | own
            | kind
            | drawn
            | late
            | {f"compression_{key}": value for key, value in compression.items()}
        )

    @property
    def required(self) -> int:
        """Updates without which a round does not count."""
        return max(self.quorum if self.quorum is not None else self.sample_size, self.strategy.least_updates())


_PATIENCE: dict[str, Any] = {"quorum": None, "deadline_seconds": 3600.0, "absence_seconds": 120.0}


def make_plan(
    request: RunRequest,
    name: str,
    seed: int,
    dataset: DatasetConfig,
    roster: dict[str, int],
    engine: str,
    source: str,
    initial: str | None = None,
) -> RunPlan:
    """Resolve a request for a dataset and the sites that take part.

    Args:
        initial: hash of the model that the run starts from, where it names one (server/initial.py).

    Raises:
        UserError: names `source`.
    """
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
            sample=request.sample,
            over_select=request.over_select,
            stragglers=request.stragglers,
            screening=request.screening,
            selection=request.selection,
            initial=initial,
            engine=engine,
        )
    except ValueError as error:
        raise UserError(f"{source}: run: {error}.") from error
