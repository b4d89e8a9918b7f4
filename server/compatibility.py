"""Which choices of a run go together: one table, from which unsound pairs are refused and docs/aggregation.md is made.

A pair is unsound when one choice takes away what the other rests on; a pair that merely works badly is not refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args, get_type_hints

from client.personalisation import Kind as Personal

if TYPE_CHECKING:
    from client.contract import TrainTask
    from server.config import StrategyConfig

Rule = Literal["mean", "norm_clip", "median", "trimmed_mean", "multi_krum", "centred_clip"]
Optimizer = Literal["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "scaffold"]


@dataclass(frozen=True)
class Features:
    """The choices of a run that may exclude each other."""

    optimizer: Optimizer = "fedavg"
    rule: Rule = "mean"
    weighting: Literal["natural", "examples", "equal"] = "natural"
    privacy: Literal["none", "patient_dp"] = "none"
    compression: Literal["none", "bf16", "int8", "top_k"] = "none"
    secure_aggregation: Literal["none", "masked_sum"] = "none"
    personalisation: Personal = "none"
    stragglers: Literal["none", "carry"] = "none"

    @classmethod
    def of(
        cls, strategy: StrategyConfig, task: TrainTask | None = None, late: Literal["drop", "carry"] = "drop"
    ) -> Features:
        """What a strategy, and the task that it is for, choose."""
        return cls(
            optimizer=strategy.name,
            rule=strategy.rule,
            weighting=strategy.weighting or "natural",
            privacy="patient_dp" if task is not None and task.privacy is not None else "none",
            compression=task.compression.kind if task is not None else "none",
            personalisation=task.personalisation.kind if task is not None else "none",
            stragglers="carry" if late == "carry" else "none",
        )


@dataclass(frozen=True)
class Conflict:
    """Values of two features that do not go together, and why."""

    one: tuple[str, tuple[str, ...]]  # feature, values
    other: tuple[str, tuple[str, ...]]
    reason: str


_ROBUST = ("median", "trimmed_mean", "multi_krum", "centred_clip")

CONFLICTS = (
    Conflict(
        ("rule", _ROBUST),
        ("weighting", ("examples",)),
        "the rule bears a number of malicious sites, so each site counts alike; weighted by patients, one large site "
        "could be a majority of its own",
    ),
    Conflict(
        ("weighting", ("examples",)),
        ("privacy", ("patient_dp",)),
        "a site's number of patients is a fact about each of them, and a private site does not tell it; leave "
        "weighting out, and sites count by the public weights that they planned",
    ),
    Conflict(
        ("rule", ("norm_clip", *_ROBUST)),
        ("secure_aggregation", ("masked_sum",)),
        "the rule looks at single updates, and secure aggregation shows the server their sum alone",
    ),
    Conflict(
        ("rule", ("median", "trimmed_mean", "multi_krum")),
        ("compression", ("top_k",)),
        "weights that a site does not send would count as votes for no change: the median of sparse updates is zero "
        "almost everywhere",
    ),
    Conflict(
        ("compression", ("bf16", "int8", "top_k")),
        ("secure_aggregation", ("masked_sum",)),
        "masks cancel in sums of 32-bit integers over all weights: scales and positions of each site's own do not add "
        "up, and fewer bits save no byte",
    ),
    Conflict(
        ("compression", ("int8", "top_k")),
        ("privacy", ("patient_dp",)),
        "error feedback makes an update hold parts of earlier rounds' changes: the site's ledger, which enters epsilon "
        "round by round, would no longer say what a round gives away, and what was held back of a patient's share "
        "could leave after the patient had left",
    ),
    Conflict(
        ("rule", _ROBUST),
        ("stragglers", ("carry",)),
        "the rule bears a number of malicious sites by counting each site once; with a late update a site would have a "
        "second vote in a round, for the change of another model",
    ),
    Conflict(
        ("compression", ("int8", "top_k")),
        ("stragglers", ("carry",)),
        "with error feedback a site adds what did not count to its next update: a late update that counts after all "
        "would count twice",
    ),
    Conflict(
        ("secure_aggregation", ("masked_sum",)),
        ("stragglers", ("carry",)),
        "a round's masks cancel among the updates of that round alone",
    ),
    Conflict(
        ("optimizer", ("scaffold",)),
        ("privacy", ("patient_dp",)),
        "control variates are mean gradients of a site's patients: they would leave without noise, or would have to be "
        "paid for by epsilon a second time",
    ),
    Conflict(
        ("weighting", ("examples",)),
        ("optimizer", ("scaffold",)),
        "c is the mean of all sites' c_i: weighted by patients, who may come and go between rounds, their changes "
        "would not add up to it; leave weighting out, and sites count alike",
    ),
    Conflict(
        ("personalisation", ("local_norms", "shared_encoder", "ditto")),
        ("stragglers", ("carry",)),
        "a late update counts for the common weights in a round that does not name it, so what belongs to it at its "
        "site would be thrown away",
    ),
    Conflict(
        ("rule", ("norm_clip", *_ROBUST)),
        ("optimizer", ("scaffold",)),
        "control variates are averaged as they are: a malicious site would move every site's gradients through them, "
        "whatever the rule makes of the changes of the weights",
    ),
    Conflict(
        ("compression", ("int8", "top_k")),
        ("optimizer", ("scaffold",)),
        "with error feedback a control variate's change could be larger than two clipped gradients, and that bound is "
        "how a false one is told",
    ),
    Conflict(
        ("optimizer", ("scaffold",)),
        ("stragglers", ("carry",)),
        "a late update's control variate was made against another c; counted with less weight, the c_i of the sites "
        "would no longer add up to c",
    ),
)


def conflicts(features: Features) -> list[Conflict]:
    """The unsound pairs among the choices."""
    return [
        conflict
        for conflict in CONFLICTS
        if all(getattr(features, feature) in values for feature, values in (conflict.one, conflict.other))
    ]


def refuse_unsound(features: Features) -> None:
    """Raises ValueError, with the reason, for the first unsound pair."""
    for conflict in conflicts(features):
        (one, _), (other, _) = conflict.one, conflict.other
        raise ValueError(
            f"{one} {getattr(features, one)} does not go with {other} {getattr(features, other)}: {conflict.reason}"
        )


def markdown_table() -> str:
    """The table of docs/aggregation.md: a row for each choice, a column for each that something excludes."""
    columns = [(feature, value) for feature, value in _choices() if any(_apply(feature, value))]
    head = ["", *(f"{feature}: {value}" for feature, value in columns)]
    reasons: list[str] = []
    rows = []
    for feature, value in _choices():
        cells = []
        for other, chosen in columns:
            found = [] if other == feature else conflicts(Features(**{feature: value, other: chosen}))  # type: ignore[arg-type]
            for conflict in found:
                if conflict.reason not in reasons:
                    reasons.append(conflict.reason)
            cells.append("no " + ", ".join(str(reasons.index(c.reason) + 1) for c in found) if found else "yes")
            if other == feature:
                cells[-1] = ""
        rows.append([f"{feature}: {value}", *cells])
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1))]) + "\n"


def _choices() -> Iterator[tuple[str, str]]:
    hints = get_type_hints(Features)
    for feature in fields(Features):
        for value in get_args(hints[feature.name]):
            if value not in ("none", "natural"):
                yield feature.name, value


def _apply(feature: str, value: str) -> list[Conflict]:
    """Conflicts whose second half has this value: they make the columns."""
    return [conflict for conflict in CONFLICTS if conflict.other[0] == feature and value in conflict.other[1]]


if __name__ == "__main__":
    print(markdown_table(), end="")
