"""Every reply is looked at before it counts; a bad one is left out by name, with its reason, and the round goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from client.contract import (
    REFUSALS,
    REFUSED,
    SIGNATURE,
    ContractError,
    Presence,
    Scores,
    TrainTask,
    Update,
    array_bytes,
    arrays_from_wire,
    check_signature,
    from_wire,
)
from medsegdiff.weights import hash_weights
from server.config import ScreeningConfig

# AdamW's step is the rate times m / sqrt(v), with betas b1 and b2 at most (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) by
# Cauchy's inequality: 2.35 for the sites' 0.9 and 0.99. The rest is for weight decay.
STEP_BOUND = 2.6


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
    largest_norm: float | None = None  # most that the update's 2-norm may be; None: any
    key: str | None = None  # enrolled Ed25519 key (hex) that must have signed; None: a virtual site


@dataclass(frozen=True)
class Accepted:
    """An update that may be folded."""

    update: Update
    delta: dict[str, Tensor]
    bytes: int
    norm: float  # 2-norm over all weights


@dataclass(frozen=True)
class Rejection:
    """A reply that does not count."""

    site: str
    reason: str


def screen_update(message: Message, expected: Expected) -> Accepted | Rejection:
    """Check one training reply: signature, identity, claimed weight, sizes, shapes, finite values. Never raises."""
    try:
        content = _content(message, {"update", "delta"}, "update", expected.key)
        update = from_wire(content, "update", Update)
        _check_identity(update.site, update.run, update.round, update.base_hash, expected)
        if not 1 <= update.patients <= expected.enrolled:
            raise ContractError(f"it claims {update.patients} training patients, {expected.enrolled} are enrolled")
        if update.steps != expected.steps:
            raise ContractError(f"it took {update.steps} steps, {expected.steps} were asked for")
        record = content["delta"]
        if not isinstance(record, ArrayRecord):
            raise ContractError("the record 'delta' is not a set of arrays")
        delta = arrays_from_wire(record, expected.shapes)
        if hash_weights(delta) != update.delta_hash:
            raise ContractError("its arrays are not the ones that were signed (their hash differs)")
        norm = update_norm(delta)
        if expected.largest_norm is not None and not norm <= expected.largest_norm:
            raise ContractError(f"its norm is {norm:.3g}, at most {expected.largest_norm:.3g} is taken in this round")
        return Accepted(update, delta, array_bytes(record), norm)
    except Exception as error:  # whatever a site sends must not end the run of the others
        return Rejection(expected.site, short_reason(error))


def update_norm(delta: Mapping[str, Tensor]) -> float:
    """2-norm over all weights, summed in float64; inf beyond its range."""
    norms = (float(torch.linalg.vector_norm(value, dtype=torch.float64)) for value in delta.values())
    return math.sqrt(math.fsum(norm**2 for norm in norms))


def largest_norm(config: ScreeningConfig, before: Mapping[str, Any], task: TrainTask, weights: int) -> float | None:
    """The largest norm that an update of a round may have; None: any.

    Later rounds: `norm_factor` times the median norm of the updates that made the round before. The first:
    `first_norm`, by default what AdamW can move that many weights in a round's steps, which no honest site exceeds.

    Args:
        before: record of the last committed round.
        weights: how many numbers an update has.
    """
    if config.norm_factor is None:
        return None
    norms = [float(row["norm"]) for row in before.get("accepted", {}).values() if "norm" in row]
    if norms and (middle := median(norms)) > 0:
        return config.norm_factor * middle
    if config.first_norm is not None:
        return config.first_norm
    rate = task.training.learning_rate
    return STEP_BOUND * rate * task.local_steps * math.sqrt(weights)


def screen_scores(message: Message, expected: Expected) -> Scores | Rejection:
    """Check one evaluation reply. Never raises."""
    try:
        content = _content(message, {"scores"}, "scores", expected.key)
        scores = from_wire(content, "scores", Scores)
        _check_identity(scores.site, scores.run, scores.round, scores.model_hash, expected)
        if set(scores.dice_by_target) != (set(expected.targets) if scores.patients else set()):
            raise ContractError(f"it scores {sorted(scores.dice_by_target)[:5]}, not {list(expected.targets)}")
        if (scores.dice is None) != (scores.patients == 0):
            raise ContractError(f"it reports the Dice {scores.dice} of {scores.patients} patients")
    except Exception as error:  # as above
        return Rejection(expected.site, short_reason(error))
    return scores


def screen_presence(message: Message, run: str, nonce: str, keys: Mapping[str, str | None]) -> Presence:
    """Check one answer to "who is there?".

    Args:
        nonce: of the question; an answer to an older one does not count.
        keys: site -> its enrolled key, None for virtual sites; who is not in it is no member.

    Raises:
        ContractError: a refusal, a stranger, a wrong signature, an answer to another question.
    """
    said = None if message.has_error() else from_wire(message.content, "presence", Presence)
    if said is not None and said.site not in keys:
        raise ContractError(f"'{said.site[:40]}' is not on the roster ({', '.join(sorted(keys))})")
    content = _content(message, {"presence"}, "presence", keys[said.site] if said is not None else None)
    presence = from_wire(content, "presence", Presence)
    if (presence.run, presence.nonce) != (run, nonce):
        raise ContractError(f"'{presence.site}' answers another question than the one asked")
    return presence


def refusal_of(message: Message) -> str | None:
    """The code of a site's refusal (one of `REFUSALS`), None for any other answer."""
    if not message.has_error() or message.error.code != REFUSED:
        return None
    code = str(message.error.reason).partition(":")[0]
    return code if code in REFUSALS else "fault"


def _content(message: Message, names: set[str], signed: str, key: str | None) -> RecordDict:
    """The records of a reply, once its signature was checked: nothing unsigned is looked into further."""
    if (code := refusal_of(message)) is not None:
        raise ContractError(f"the site reported a fault (code {message.error.code}): {REFUSALS[code]}")
    if message.has_error():
        raise ContractError(f"the site reported a fault (code {message.error.code}): {message.error.reason}")
    due = names | ({SIGNATURE} if key is not None else set())
    if set(message.content) != due:
        raise ContractError(f"it holds the records {sorted(message.content)[:5]}, not {sorted(due)}")
    if key is not None:
        check_signature(message.content, signed, key)
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
