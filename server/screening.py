"""Every reply is looked at before it counts; a bad one is left out by name, with its reason, and the round goes on."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import median_high
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
    PrivacyTask,
    Scores,
    TrainTask,
    Update,
    array_bytes,
    arrays_from_wire,
    check_signature,
    from_wire,
)
from client.encoding import Compression
from client.personalisation import CONTROL
from medsegdiff.weights import hash_weights
from server.config import ScreeningConfig

# AdamW's step is the rate times m / sqrt(v), with betas b1 and b2 at most (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) by
# Cauchy's inequality: 2.35 for the sites' 0.9 and 0.99. The rest is for weight decay.
STEP_BOUND = 2.6
NORM_ROUNDS = 5  # committed rounds whose updates say how large the next may be: a thin round does not speak alone


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
    # Most that the 2-norm of a control variate's change may be; None: there is none.
    largest_control: float | None = None
    second_model: bool = False  # whether sites score one of their own as well
    compression: Compression = Compression()  # of the update
    key: str | None = None  # enrolled Ed25519 key (hex) that must have signed; None: a virtual site
    privacy: PrivacyTask | None = None  # the run's


@dataclass(frozen=True)
class Accepted:
    """An update that may be folded."""

    update: Update
    delta: dict[str, Tensor]
    bytes: int  # as it came
    norm: float  # 2-norm over all weights


@dataclass(frozen=True)
class Rejection:
    """A reply that does not count."""

    site: str
    reason: str
    too_large: bool = False  # a sound update that is longer than the round's limit


class TooLarge(ContractError):
    """The norm of an update is above the round's limit."""


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
        _check_privacy(update, expected.privacy)
        record = content["delta"]
        if not isinstance(record, ArrayRecord):
            raise ContractError("the record 'delta' is not a set of arrays")
        delta = arrays_from_wire(record, expected.shapes, expected.compression)
        if hash_weights(delta) != update.delta_hash:
            raise ContractError("its arrays are not the ones that were signed (their hash differs)")
        weights = {name: value for name, value in delta.items() if not name.startswith(CONTROL)}
        _check_control(delta, expected.largest_control)
        norm = update_norm(weights)
        if expected.largest_norm is not None and not norm <= expected.largest_norm:
            raise TooLarge(f"its norm is {norm:.3g}, at most {expected.largest_norm:.3g} is taken in this round")
        return Accepted(update, delta, array_bytes(record), norm)
    except Exception as error:  # whatever a site sends must not end the run of the others
        return Rejection(expected.site, short_reason(error), isinstance(error, TooLarge))


def _check_privacy(update: Update, asked: PrivacyTask | None) -> None:
    """A site that should be private and is not, or the other way round, does not count: it runs another program."""
    if update.epsilon is None and asked is not None and asked.required:
        raise ContractError("it states no epsilon, and the run asks every site for privacy")
    if update.epsilon is not None and asked is None:
        raise ContractError("it states an epsilon, and the run trains without privacy")


def _check_control(delta: Mapping[str, Tensor], largest: float | None) -> None:
    """c_i is a mean of clipped gradients before and after, so its change is at most twice the clip, and rounding."""
    if largest is not None:
        found = update_norm({name: value for name, value in delta.items() if name.startswith(CONTROL)})
        if not found <= 1.01 * largest:
            raise ContractError(f"its control variate changes by {found:.3g}, {largest:.3g} is the most there can be")


def update_norm(delta: Mapping[str, Tensor]) -> float:
    """2-norm over all weights, summed in float64; inf beyond its range."""
    norms = (float(torch.linalg.vector_norm(value, dtype=torch.float64)) for value in delta.values())
    return math.sqrt(math.fsum(norm**2 for norm in norms))


def recent_norms(record: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
    """Round and norm of each site's last counted update, of the last rounds up to the record's own."""
    found = {site: (int(row[0]), float(row[1])) for site, row in record.get("norms", {}).items()}
    for row in record.get("late", []):
        if row["round"] >= found.get(row["site"], (0, 0.0))[0]:
            found[row["site"]] = (row["round"], float(row["norm"]))
    own = record.get("accepted", {}).items()
    return found | {site: (record.get("round", 0), float(row["norm"])) for site, row in own if "norm" in row}


def carried_norms(before: Mapping[str, Any], round_: int, accepted: Collection[str]) -> dict[str, Any]:
    """What a round's record says of the norms of sites without an update in it (`norms`); nothing, where all have one.

    Args:
        before: record of the round before.
    """
    kept = {
        site: [number, norm]
        for site, (number, norm) in sorted(recent_norms(before).items())
        if site not in accepted and number > round_ - NORM_ROUNDS
    }
    return {"norms": kept} if kept else {}


def largest_norm(
    config: ScreeningConfig, before: Mapping[str, Any], task: TrainTask, weights: int, sites: int
) -> float | None:
    """The largest norm that an update of a round may have; None: any.

    `norm_factor` times the median over sites of their last counted updates' norms, each of the last `NORM_ROUNDS`
    committed rounds: a round that one site made alone is one voice among them. Never more than `first_norm`, by default
    what AdamW can move that many weights in a round's steps, which no honest site exceeds; and that alone where fewer
    than two sites are known. Of an even number the upper of the two in the middle counts: of two sites, that whose
    updates are next to nothing does not decide.

    Args:
        before: record of the last committed round.
        weights: how many numbers an update has.
        sites: of the run.
    """
    if config.norm_factor is None:
        return None
    most = config.first_norm
    if most is None:
        most = STEP_BOUND * task.training.learning_rate * task.local_steps * math.sqrt(weights)
        most *= _held_back(task.compression) if before.get("round") else 1.0
    norms = [norm for _, norm in recent_norms(before).values()]
    if len(norms) >= min(2, sites) and (middle := median_high(norms)) > 0:
        return min(most, config.norm_factor * middle)
    return most


def _held_back(compression: Compression) -> float:
    """How many times a round's change top_k can send at most, with what it held back in earlier rounds.

    Karimireddy et al. 2019, lemma 3: what is held back is at most 2 sqrt(1 - d) / d changes long, d being the fraction.
    """
    d = compression.fraction
    return 1.0 + 2.0 * math.sqrt(1.0 - d) / d if d is not None else 1.0


def screen_scores(message: Message, expected: Expected) -> Scores | Rejection:
    """Check one evaluation reply. Never raises."""
    try:
        content = _content(message, {"scores"}, "scores", expected.key)
        scores = from_wire(content, "scores", Scores)
        _check_identity(scores.site, scores.run, scores.round, scores.model_hash, expected)
        if set(scores.dice_by_target) != (set(expected.targets) if scores.patients else set()):
            raise ContractError(f"it scores {sorted(scores.dice_by_target)[:5]}, not {list(expected.targets)}")
        if not expected.second_model and (scores.personal_dice, scores.personal_hd95_mm) != (None, None):
            raise ContractError("it scores a second model, and the run has none")
        if scores.personal_dice is not None and scores.patients == 0:
            raise ContractError("it scores a second model on no patient")
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
