"""A site's privacy policy: the mechanism's public numbers, owned by the data officer.

A run may ask for more privacy than the policy gives, never for less (`tightened`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from client.contract import PrivacyRequest
from client.refusal import Refusal
from medsegdiff.strict import Strict

LEAST_SIGMA = 0.5  # below it accountants overflow or run out of memory, and no useful epsilon is left to account


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class PrivacyPolicy(Strict):
    """The subsampled Gaussian mechanism over patients (Abadi et al. 2016, algorithm 1), with its budget.

    One step releases (sum over drawn patients of clip(g_patient, C) + sigma C N(0, I)) / B. None of the numbers may be
    worked out from the patients: they are public, and the same with one patient more or less.
    """

    epsilon: float  # the ceiling that the site's ledger keeps to, over all runs
    delta: float  # probability with which epsilon may fail; well below 1 / patients
    sigma: float  # noise multiplier: standard deviation of the noise in units of C
    q: float  # probability with which a step takes each patient
    clip: float  # C: largest 2-norm of one patient's gradient over all trained parameters
    batch: int  # B: what sums are divided by; a constant, never int(q N), which would tell N
    steps: int  # noised steps a round
    rounds: int  # rounds planned; with `steps` the length that sigma was chosen for
    slices: int = 4  # m: slices of a drawn patient, with replacement
    draws: int = 4  # K: (timestep, noise) draws a slice
    unit: Literal["patient"] = "patient"  # what is protected: all slices of all scans of one patient together
    relation: Literal["add-remove"] = "add-remove"  # neighbours; replace-one would about double epsilon

    def __post_init__(self) -> None:
        _require(0 < self.epsilon <= 1e6, f"epsilon must lie in (0, 1e6], found {self.epsilon}")
        _require(
            0 < self.delta <= 0.01,
            f"delta must lie in (0, 0.01], found {self.delta}: with a larger one the whole record of one patient in a "
            "hundred could be published and the promise still be kept",
        )
        _require(
            LEAST_SIGMA <= self.sigma <= 1e6,
            f"sigma must lie in [{LEAST_SIGMA}, 1e6], found {self.sigma}: less noise gives no epsilon worth stating",
        )
        _require(0 < self.q <= 1, f"q must lie in (0, 1], found {self.q}")
        _require(0 < self.clip < math.inf, f"clip must be positive and finite, found {self.clip}")
        for name, high in (
            ("batch", 1_000_000), ("steps", 1_000_000), ("rounds", 100_000), ("slices", 4096), ("draws", 4096),
        ):  # fmt: skip
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(whole and 1 <= value <= high, f"{name} must be a whole number in 1..{high}, found {value}")
        _require(self.unit == "patient", f"unit must be 'patient', found {self.unit!r}")
        _require(self.relation == "add-remove", f"relation must be 'add-remove', found {self.relation!r}")


@dataclass(frozen=True)
class SitePrivacy(Strict):
    """The `privacy` section of site.yaml: the data officer's. With it, all training here is private, or refused."""

    mechanism: PrivacyPolicy
    # What the site counts for beside the others, in patients: a round number written down here once, from what is
    # public. The true number of training patients is a fact about each of them.
    weight: int
    # Held-out patients are patients: their scores leave only if the data officer declares them public.
    held_out: Literal["withheld", "public"] = "withheld"
    # An answer leaves at a multiple of so many seconds after its question: how long a training took tells how many
    # patients were drawn. 0: at once.
    answer_every: float = 60.0

    def __post_init__(self) -> None:
        whole = isinstance(self.weight, int) and not isinstance(self.weight, bool)
        _require(whole and 1 <= self.weight <= 1_000_000, f"weight must lie in 1..1000000, found {self.weight}")
        _require(0 <= self.answer_every <= 86_400, f"answer_every must lie in 0..86400, found {self.answer_every}")


# Which way a request may move a number.
#   epsilon, delta   the promise itself: smaller is stronger.
#   sigma            more noise. q: each patient in fewer steps. steps, rounds: fewer releases.
#   clip             epsilon does not depend on C, for the noise is sigma C. But a patient whose gradient has a norm
#                    r < C is hidden better than promised: what counts is min(r, C) / (sigma C), which falls as C grows.
#                    So a larger C never exposes anybody more, and a smaller one would.
#   slices, draws    no effect on the promise (they are averaged before the clipping); fewer read less of a patient.
#   batch            divides what is private already: neither way is tighter. unit, relation: what epsilon means.
_SMALLER = ("epsilon", "delta", "q", "steps", "rounds", "slices", "draws")
_LARGER = ("sigma", "clip")
_FIXED = ("batch", "unit", "relation")


def tightened(policy: PrivacyPolicy, asked: PrivacyRequest) -> PrivacyPolicy:
    """The policy that a run gets: the site's, with what the run asks for where that is tighter.

    Raises:
        Refusal: "privacy-floor", naming the first field that would be looser, or that only the site may set.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(policy):
        own, wanted = getattr(policy, field.name), getattr(asked, field.name)
        if wanted is None or wanted == own:
            continue
        if field.name in _FIXED:
            _refuse(f"{field.name} {wanted!r}; the site's policy fixes it at {own!r}")
        if field.name in _SMALLER and not wanted < own:  # "not <": NaN is refused too
            _refuse(f"{field.name} {wanted}; the site's policy allows at most {own}")
        if field.name in _LARGER and not wanted > own:
            _refuse(f"{field.name} {wanted}; the site's policy asks for at least {own}")
        changes[field.name] = wanted
    try:
        return dataclasses.replace(policy, **changes)
    except ValueError as error:
        _refuse(f"what no policy may hold: {error}")
        raise AssertionError("unreachable") from error


def _refuse(what: str) -> None:
    raise Refusal(
        "privacy-floor",
        f"privacy: the run asks for {what}. Nothing was trained. A run may only tighten the site's policy.",
    )
