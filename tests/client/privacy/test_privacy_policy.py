"""A policy holds what can be accounted, and a run may only tighten it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.privacy.policy import PrivacyPolicy, PrivacyRequest, tightened
from client.refusal import Refusal
from medsegdiff.errors import UserError
from medsegdiff.strict import parse_config, plain
from tests.client.privacy.rows import POLICY

TIGHTER: dict[str, tuple[Any, Any]] = {  # field -> a tighter value, a looser one
    "epsilon": (4.0, 9.0),
    "delta": (1e-6, 1e-4),
    "sigma": (3.0, 1.0),
    "q": (0.1, 0.6),
    "clip": (2.0, 0.5),
    "steps": (2, 4),
    "rounds": (3, 6),
    "slices": (2, 5),
    "draws": (1, 5),
}
FIXED: dict[str, Any] = {"batch": 5, "unit": "slice", "relation": "replace-one"}


def test_round_trip() -> None:
    """A policy as YAML would hold it, read back."""
    assert parse_config(plain(POLICY), PrivacyPolicy, "site.yaml: privacy") == POLICY


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("epsilon", 0.0, "epsilon must lie in"),
        ("epsilon", math.nan, "epsilon must lie in"),
        ("epsilon", math.inf, "epsilon must lie in"),
        ("delta", 0.0, "delta must lie in"),
        ("delta", 0.5, "one patient in a hundred"),
        ("sigma", 0.0, "sigma must lie in"),
        ("sigma", 0.49, "sigma must lie in"),
        ("sigma", math.nan, "sigma must lie in"),
        ("q", 0.0, "q must lie in"),
        ("q", 1.01, "q must lie in"),
        ("clip", 0.0, "clip must be positive"),
        ("clip", math.inf, "clip must be positive"),
        ("batch", 0, "batch must be a whole number"),
        ("steps", 0, "steps must be a whole number"),
        ("rounds", 100_001, "rounds must be a whole number"),
        ("slices", 0, "slices must be a whole number"),
        ("draws", 5000, "draws must be a whole number"),
        ("unit", "slice", "unit"),
        ("relation", "replace-one", "relation"),
    ],
)
def test_what_no_policy_may_hold(field: str, value: object, told: str) -> None:
    """From a file: one line with the key. In Python: a ValueError."""
    with pytest.raises(UserError, match=field):
        parse_config(plain(POLICY) | {field: value}, PrivacyPolicy, "site.yaml: privacy")
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(POLICY, **{field: value})


@pytest.mark.parametrize("field", ["batch", "steps"])
@pytest.mark.parametrize("value", [True, 2.5])
def test_counts_are_whole_numbers(field: str, value: object) -> None:
    """int(q N) written as a fraction, or a yes, is no batch."""
    with pytest.raises(ValueError, match="whole number"):
        dataclasses.replace(POLICY, **{field: value})


def test_a_misspelt_key_is_named() -> None:
    """An epsilon under another name would leave the site without a ceiling."""
    wrong = {("epsylon" if key == "epsilon" else key): value for key, value in plain(POLICY).items()}
    with pytest.raises(UserError, match=r"epsylon: unknown key; did you mean 'epsilon'"):
        parse_config(wrong, PrivacyPolicy, "site.yaml: privacy")


def test_every_field_has_a_rule() -> None:
    """A new field is thought about: tighter one way, the other, or fixed."""
    fields = {field.name for field in dataclasses.fields(PrivacyPolicy)}
    assert fields == set(TIGHTER) | set(FIXED)
    assert fields == {field.name for field in dataclasses.fields(PrivacyRequest)}


@pytest.mark.parametrize("field", TIGHTER)
def test_a_run_may_tighten_and_nothing_else(field: str) -> None:
    """The tighter value is taken, the site's own leaves all as it is, the looser one is refused by name."""
    tighter, looser = TIGHTER[field]
    own = getattr(POLICY, field)
    assert tightened(POLICY, PrivacyRequest(**{field: tighter})) == dataclasses.replace(POLICY, **{field: tighter})
    assert tightened(POLICY, PrivacyRequest(**{field: own})) == POLICY
    with pytest.raises(Refusal, match=rf"asks for {field} {looser}; the site's policy .* {own}") as refusal:
        tightened(POLICY, PrivacyRequest(**{field: looser}))
    assert refusal.value.code == "privacy-floor"


@pytest.mark.parametrize("field", FIXED)
def test_what_the_site_fixes(field: str) -> None:
    """The divisor, the unit and the neighbours mean what the site says they mean."""
    with pytest.raises(Refusal, match=f"{field} .* fixes it at"):
        tightened(POLICY, PrivacyRequest(**{field: FIXED[field]}))
    assert tightened(POLICY, PrivacyRequest(**{field: getattr(POLICY, field)})) == POLICY


@pytest.mark.parametrize("field", ["epsilon", "sigma", "clip", "q", "delta"])
def test_nan_is_never_tighter(field: str) -> None:
    """NaN compares false with everything: it must not slip through."""
    with pytest.raises(Refusal, match=field):
        tightened(POLICY, PrivacyRequest(**{field: math.nan}))


@pytest.mark.parametrize(("field", "value"), [("q", 0.0), ("epsilon", -1.0), ("sigma", math.inf), ("steps", 0)])
def test_tighter_than_possible_is_refused(field: str, value: float) -> None:
    """A request in the right direction that is no policy is a refusal too, not a crash."""
    with pytest.raises(Refusal, match=field):
        tightened(POLICY, PrivacyRequest(**{field: value}))


@given(st.fixed_dictionaries({}, optional={name: st.sampled_from(pair) for name, pair in TIGHTER.items()}))
def test_a_request_is_refused_iff_any_part_is_looser(asked: dict[str, Any]) -> None:
    """Whatever the mixture; and what comes out is nowhere looser than the site's."""
    looser = [name for name, value in asked.items() if value == TIGHTER[name][1]]
    if looser:
        with pytest.raises(Refusal):
            tightened(POLICY, PrivacyRequest(**asked))
    else:
        assert tightened(POLICY, PrivacyRequest(**asked)) == dataclasses.replace(POLICY, **asked)
