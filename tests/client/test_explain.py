"""The page a data officer reads: every field that leaves, true numbers, tame text."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import pytest
import torch

from client import explain
from client.application import Application
from client.approvals import task_hash
from client.contract import Presence, PrivacyRequest, PrivacyTask, Scores, Update
from client.encoding import Compression, encode, likely_size
from client.explain import PATIENTS, WIDTH, WORDS, SiteFacts, explain_task
from client.personalisation import Personalisation, sent_shapes
from client.policy import SitePolicy
from client.privacy.policy import PrivacyPolicy, SitePrivacy
from medsegdiff.config import preset
from medsegdiff.strict import plain
from medsegdiff.weights import initial_weights, weight_shapes

PROGRAM = Application("a" * 64, "0.1.0", "2.13.0", "1.41.0", "CPython 3.11.7", 70, 89)
FACTS = SiteFacts(SitePolicy(), "alder", PROGRAM, "prostate-eu", "fed.example.org:8443", 8, 6, 120)


def page(task, run="trial-1", **facts) -> str:
    return " ".join(" ".join(explain_task(task, run, replace(FACTS, **facts))).split())


@pytest.mark.parametrize("kind", [Presence, Update, Scores])
def test_every_field_that_leaves_is_on_the_page(tiny_task, kind) -> None:
    """Named and described: a new field of the contract needs words here before it can be merged."""
    text = page(tiny_task)
    for field in fields(kind):
        words = PATIENTS[kind] if field.name == "patients" else WORDS[field.name]
        assert f"{field.name}: {words}" in text
    assert "NOT DESCRIBED" not in text


def test_a_field_without_words_is_shown_as_such(tiny_task, monkeypatch) -> None:
    """The page cannot hide what the contract says."""

    @dataclass(frozen=True)
    class Wider(Update):
        birthday: str = ""

    monkeypatch.setattr(explain, "Update", Wider)
    monkeypatch.setitem(explain.PATIENTS, Wider, "how many")
    assert "birthday: NOT DESCRIBED HERE; ask what it is" in page(tiny_task)


def test_the_numbers_are_true(tiny_task) -> None:
    """Weights counted on a real network; steps, slices and passes by hand: 50 x 30 steps of 4 slices over 120."""
    task = replace(tiny_task, rounds=50, local_steps=30, training=replace(tiny_task.training, batch_size=4))
    values = sum(math.prod(value.shape) for value in initial_weights(task.model, 0).values())
    text = page(task)
    assert f"has {values:,} weights" in text
    assert f"{values:,} numbers, {4 * values / 1e6:,.1f} MB; {4 * values * 50 / 1e6:,.1f} MB over the run" in text
    assert "50 rounds of 30 optimizer steps: 1,500 steps of 4 slices, 6,000 slices in all" in text
    assert "120 slices of 8 training patients: the run goes about 50 times over the data" in text
    assert f"hash {task_hash(task)[:12]}" in text
    assert "fed.example.org:8443" in text


def test_what_the_data_must_be_is_told(tiny_task) -> None:
    """Channels, labels, and targets with the labels they join."""
    dataset = replace(
        tiny_task.dataset,
        channels=("FLAIR",),
        labels={"background": 0, "edema": 1, "core": 2},
        targets={"whole": ("edema", "core"), "core": ("core",)},
    )
    text = page(replace(tiny_task, dataset=dataset))
    assert "channels that are read: FLAIR." in text
    assert "Labels that the masks hold: background, edema, core." in text
    assert "whole (labels edema, core); core (label core)" in text


@pytest.mark.parametrize(
    ("held_out", "warning"),
    [
        (1, "ONE patient, so these averages ARE that patient's own"),
        (3, "holds out 3 patients only"),
        (0, None),
        (9, None),
    ],
)
def test_few_held_out_patients_are_warned_of(tiny_task, held_out, warning) -> None:
    """One patient's average is that patient's score."""
    text = page(tiny_task, test_patients=held_out)
    assert ("!!" in text.split("When the server asks")[0]) == (warning is not None)
    if warning:
        assert warning in text


@pytest.mark.parametrize(
    ("policy", "facts", "lines"),
    [
        (SitePolicy(), {}, ["[ok] rounds: 2 asked, at most 200", "[ok] training patients: 8 here, at least 5"]),
        (SitePolicy(max_rounds=1), {}, ["[NO] rounds: 2 asked, at most 1; the run will be refused"]),
        (SitePolicy(min_patients=9), {}, ["[NO] training patients: 8 here, at least 9 wanted; the run will"]),
        (SitePolicy(), {"train_patients": None}, ["[?] training patients: (not counted yet) here"]),
        (SitePolicy(application="b" * 64), {}, ["[NO] program: only bbbbbbbbbbbb... may run"]),
        (SitePolicy(application="a" * 64), {}, ["[ok] program: only aaaaaaaaaaaa... may run"]),
        (SitePolicy(allowed_hours="18:00-07:00"), {}, ["work begins at 18:00-07:00 only"]),
        (SitePolicy(approval_required=False), {}, ["!! approval_required is false"]),
    ],
)  # fmt: skip
def test_each_limit_says_whether_it_is_met(tiny_task, policy, facts, lines) -> None:
    """With the numbers of both sides."""
    text = page(tiny_task, policy=policy, **facts)
    for line in lines:
        assert line in text


def test_protection_is_not_made_larger_than_it_is(tiny_task) -> None:
    """No protection beyond distance, no secure aggregation, and that weights can leak: in plain words."""
    text = page(tiny_task)
    assert "There is no protection beyond this" in text
    assert "there is no secure aggregation" in text
    assert "can give away something of the data" in text
    assert "medsegfed approve trial-1 --take-back" in text


def test_a_hostile_server_cannot_paint_the_terminal(tiny_task) -> None:
    """Escape sequences, line breaks and endless names in every text that the task holds; lines stay narrow."""
    evil = "\x1b[2J\n[ok] all is well\u202e" + "y" * 5000
    dataset = replace(
        tiny_task.dataset, name=evil, modality=evil, channels=(evil,), labels={"background": 0, evil: 1}, targets=None
    )
    lines = explain_task(replace(tiny_task, dataset=dataset), evil, FACTS)
    assert all(line.isprintable() and len(line) <= WIDTH for line in lines)
    assert len(lines) < 120
    assert not any(line.startswith("[ok] all is well") for line in lines)
    assert any(line.startswith("[NO] the run's name is a plain name") for line in lines)


def test_unknown_facts_are_not_invented(tiny_task) -> None:
    """Before the data was read and a kit installed."""
    text = page(tiny_task, federation=None, server=None, train_patients=None, test_patients=None, train_slices=None)
    assert "(not counted yet)" in text
    assert "told once the data was read" in text
    assert "None" not in text


def test_the_page_fits_a_terminal(tiny_task) -> None:
    """No line wider than 100 signs; plain text."""
    lines = explain_task(tiny_task, "trial-1", FACTS)
    assert max(map(len, lines)) <= WIDTH
    assert plain(lines) == lines


PRIVATE = SitePrivacy(
    PrivacyPolicy(epsilon=3.0, delta=1e-5, sigma=2.4, q=0.1, clip=1.0, batch=20, steps=5, rounds=50), weight=200
)


def test_a_private_site_is_told_its_budget_and_what_is_withheld(tiny_task) -> None:
    """Limit, spent and planned epsilon; the fields that stay empty are marked so; what privacy does not hide."""
    task = replace(tiny_task, privacy=PrivacyTask())
    text = page(task, privacy=PRIVATE, spent=0.5, planned=1.25)
    for line in (
        "this site's limit is 3 (delta 1e-05), over all runs ever",
        "Spent so far: epsilon 0.50 of 3.",
        "After this run, as planned: epsilon 1.25 of 3.",
        "loss: nothing: withheld",
        "seconds: nothing: withheld",
        "train_patients: the planned weight of site.yaml",
        "averages over the held-out patients: withheld",
        "dice: nothing: withheld",
        "!! Not hidden:",
        "[ok] differential privacy: the run keeps to this site's policy",
    ):
        assert line in text
    assert "There is no protection beyond this" not in text


@pytest.mark.parametrize(
    ("privacy", "asked", "line"),
    [
        (PRIVATE, None, "[NO] privacy: the run trains without privacy, and this site's site.yaml asks for it"),
        (None, PrivacyTask(), "[NO] privacy: the run asks every site for patient-level privacy"),
        (PRIVATE, PrivacyTask(asks=PrivacyRequest(sigma=1.0)), "[NO] privacy: the run asks for sigma 1.0"),
        (None, PrivacyTask(required=False), "it would train WITHOUT it"),
        (None, None, "Differential privacy: none is asked for here"),
    ],
)
def test_a_run_that_does_not_fit_the_sites_privacy_says_so(tiny_task, privacy, asked, line) -> None:
    """The officer reads the refusal before any approval."""
    assert line in page(replace(tiny_task, privacy=asked), privacy=privacy)


def test_a_budget_that_does_not_cover_the_run_is_told(tiny_task) -> None:
    """Spent is known and no plan fits."""
    assert "[NO] The budget does not cover this run" in page(
        replace(tiny_task, privacy=PrivacyTask()), privacy=PRIVATE, spent=2.9
    )


@pytest.mark.parametrize("compression", [Compression("bf16"), Compression("int8"), Compression("top_k", 0.05)], ids=str)
def test_a_compressed_run_is_told_with_its_own_size(tiny_task, compression) -> None:
    """What leaves by what was measured, what comes in whole, and that nothing is kept back for good."""
    task = replace(tiny_task, compression=compression, rounds=20, model=preset("tiny"))
    shapes = weight_shapes(task.model)
    values = sum(math.prod(shape) for shape in shapes.values())
    size = likely_size(compression, shapes)
    text = page(task)
    assert f"({compression.kind}), about {size / 1e6:,.1f} MB; {size * 20 / 1e6:,.1f} MB over the run" in text
    assert f"({4 * values / 1e6:,.1f} MB come in each round" in text
    assert ("over the rounds, all of it leaves" in text) == (compression.kind != "bf16")
    if compression.kind == "top_k":
        assert f"of which the {math.ceil(0.05 * values):,} largest are sent" in text
    generator = torch.Generator().manual_seed(0)
    sent = encode({name: 1e-2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}, compression)
    assert size == pytest.approx(len(sent), rel=0.2)


@pytest.mark.parametrize(
    ("personalisation", "words"),
    [
        (Personalisation("local_norms"), "normalisation layers' weights are trained here and stay here"),
        (Personalisation("shared_encoder"), "decoder's weights are trained here and stay here"),
        (Personalisation("ditto", pull=0.1), "A second model is trained here in each round"),
        (Personalisation("fine_tune"), "a copy of it is trained on here, and stays here"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_what_is_the_sites_own_is_told_with_its_size(tiny_task, personalisation, words) -> None:
    """What leaves is the common part alone; what stays is not made safer than it is."""
    task = replace(tiny_task, personalisation=personalisation)
    text = page(task)
    assert words in text
    assert "No privacy mechanism protects them" in text
    sent = sum(math.prod(shape) for shape in sent_shapes(task).values())
    whole = sum(math.prod(shape) for shape in weight_shapes(task.model).values())
    assert f"changes of the model's weights, {sent:,} numbers" in text
    assert f"stay{'s' * (not personalisation.splits)} here: {whole - sent or whole:,} numbers" in text
    assert words not in page(tiny_task)


def test_control_variates_are_told(tiny_task) -> None:
    """Twice the numbers, and what the second half is."""
    text = page(replace(tiny_task, control_variates=True))
    whole = sum(math.prod(shape) for shape in weight_shapes(tiny_task.model).values())
    assert f"{2 * whole:,} numbers" in text
    assert "SCAFFOLD's control variate" in text
