"""Every reply is looked at before it counts; a bad one is left out by name, with its reason, and the round goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from client.contract import ContractError, Scores, Update, array_bytes, arrays_from_wire, from_wire


@dataclass(frozen=True)
class Expected:
    """What a good reply of one site must say."""

    site: str
    run: str
    round: int
    model_hash: str
    steps: int
    enrolled: int  # training patients on the roster: the largest weight the site may claim
    shapes: Mapping[str, tuple[int, ...]]
    targets: tuple[str, ...]  # what scores may be reported of


@dataclass(frozen=True)
class Accepted:
    """An update that may be folded."""

    update: Update
    delta: dict[str, Tensor]
    bytes: int


@dataclass(frozen=True)
class Rejection:
    """A reply that does not count."""

    site: str
    reason: str


def screen_update(message: Message, expected: Expected) -> Accepted | Rejection:
    """Check one training reply: contract, identity, size, shapes, finite values, claimed weight. Never raises."""
    try:
        content = _content(message, {"update", "delta"})
        update = from_wire(content, "update", Update)
        _check_identity(update.site, update.run, update.round, update.base_hash, expected)
        if not 1 <= update.patients <= expected.enrolled:
            raise ContractError(f"it claims {update.patients} training patients, {expected.enrolled} are enrolled")
        if update.steps != expected.steps:
            raise ContractError(f"it took {update.steps} steps, {expected.steps} were asked for")
        record = content["delta"]
        if not isinstance(record, ArrayRecord):
            raise ContractError("the record 'delta' is not a set of arrays")
        return Accepted(update, arrays_from_wire(record, expected.shapes), array_bytes(record))
    except Exception as error:  # whatever a site sends must not end the run of the others
        return Rejection(expected.site, short_reason(error))


def screen_scores(message: Message, expected: Expected) -> Scores | Rejection:
    """Check one evaluation reply. Never raises."""
    try:
        scores = from_wire(_content(message, {"scores"}), "scores", Scores)
        _check_identity(scores.site, scores.run, scores.round, scores.model_hash, expected)
        if set(scores.dice_by_target) != (set(expected.targets) if scores.patients else set()):
            raise ContractError(f"it scores {sorted(scores.dice_by_target)[:5]}, not {list(expected.targets)}")
        if (scores.dice is None) != (scores.patients == 0):
            raise ContractError(f"it reports the Dice {scores.dice} of {scores.patients} patients")
    except Exception as error:  # as above
        return Rejection(expected.site, short_reason(error))
    return scores


def _content(message: Message, names: set[str]) -> RecordDict:
    if message.has_error():
        raise ContractError(f"the site reported a fault (code {message.error.code}): {message.error.reason}")
    if set(message.content) != names:
        raise ContractError(f"it holds the records {sorted(message.content)[:5]}, not {sorted(names)}")
    return message.content


def _check_identity(site: str, run: str, round_: int, model_hash: str, expected: Expected) -> None:
    said = (site, run, round_, model_hash)
    due = (expected.site, expected.run, expected.round, expected.model_hash)
    for what, found, wanted in zip(("site", "run", "round", "base model"), said, due, strict=True):
        if found != wanted:
            raise ContractError(f"it is for {what} {str(found)[:40]!r}, not {str(wanted)[:40]!r}")


def short_reason(error: Exception) -> str:
    """One short line of printable signs: a hostile reply gets to write neither a page nor commands to a terminal."""
    kind = "" if isinstance(error, ContractError) else f"{type(error).__name__}: "
    line = f"{kind}{' '.join(str(error).split())}"[:300]
    return "".join(sign if sign.isprintable() else "?" for sign in line)
