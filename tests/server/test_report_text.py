"""The report's words: a headline that claims no more than the numbers, and numbers as a person writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_sample import sample_report

from client.personalisation import Kind
from server.report import write_report
from server.report_schema import Participation, parse_report
from server.report_text import (
    KEPT,
    SECOND_MODELS,
    bytes_text,
    difference,
    duration_text,
    headline,
    key_figures,
    participation_text,
    rounds_count,
    rounds_text,
)


def headline_of(report: dict[str, Any]) -> str:
    return headline(parse_report(report))


def with_scores(**scores: tuple[float, float]) -> dict[str, Any]:
    """A report whose arms have these (mean, worst) and whose sites were not reported."""
    report = sample_report()
    report["arms"] = {arm: {"mean": mean, "worst": worst} for arm, (mean, worst) in scores.items()}
    for site in report["sites"].values():
        site["dice"] = None
    return report


def test_headline_tells_gain_and_gap() -> None:
    """A win is told with both differences and the gap to pooled training, as a reader would compute them."""
    assert headline_of(with_scores(federated=(0.812, 0.761), local=(0.721, 0.612), pooled=(0.822, 0.781))) == (
        "After 12 rounds over 4 sites, the federated model beats local-only training: mean Dice 0.812 against 0.721 "
        "(+0.091), worst site 0.761 against 0.612 (+0.149); on the mean it is 0.010 under one model trained on all "
        "data pooled (0.822)."
    )


@pytest.mark.parametrize(
    ("federated", "local", "claim"),
    [
        ((0.70, 0.60), (0.72, 0.65), "is worse than local-only training:"),
        ((0.74, 0.60), (0.72, 0.65), "beats local-only training on the mean but is worse at the worst site"),
        ((0.70, 0.66), (0.72, 0.65), "is worse than local-only training on the mean but beats it at the worst site"),
        ((0.72, 0.65), (0.72, 0.65), "ties with local-only training:"),
        ((0.7203, 0.65), (0.7198, 0.65), "ties with local-only training:"),
        ((0.74, 0.65), (0.72, 0.65), "beats local-only training on the mean and ties at the worst site"),
        ((0.72, 0.60), (0.72, 0.65), "ties with local-only training on the mean but is worse at the worst site"),
    ],
)
def test_headline_claims_no_more_than_the_numbers(
    federated: tuple[float, float], local: tuple[float, float], claim: str
) -> None:
    """A loss or a tie, on the mean or at the worst site, is called one."""
    assert claim in headline_of(with_scores(federated=federated, local=local))


def test_headline_of_a_run_without_comparison() -> None:
    """Without local and pooled arms no gain is claimed; with pooled alone only the gap is told."""
    alone = headline_of(with_scores(federated=(0.8, 0.7)))
    assert "beats" not in alone
    assert "mean Dice of 0.800, and 0.700 at the worst site" in alone
    beside_pooled = headline_of(with_scores(federated=(0.8, 0.7), pooled=(0.79, 0.7)))
    assert beside_pooled.endswith("on the mean it is 0.010 over one model trained on all data pooled (0.790).")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Participation(5, 5, 0, 5), "all 5 asked; a round counts with 5 updates"),
        (Participation(5, 5, 0, 1), "all 5 asked; a round counts with 1 update"),
        (Participation(9, 3, 0, 3), "3 of 9 asked, drawn by the run's seed; a round counts with 3 updates"),
        (Participation(9, 3, 2, 2), "3 of 9 asked, drawn by the run's seed, and 2 more to spare; a round counts with"),
    ],
)
def test_who_is_asked_in_a_round(asked: Participation, said: str) -> None:
    """All sites or a draw of them, and the updates without which a round does not count."""
    assert participation_text(asked).startswith(said)


@given(st.sets(st.integers(0, 60)))
def test_joined_rounds_hold_the_same_rounds(rounds: set[int]) -> None:
    """Reading "3, 5–7" back gives the rounds that went in."""
    back: set[int] = set()
    for part in filter(None, rounds_text(tuple(rounds)).split(", ")):
        first, _, last = part.partition("–")
        back |= set(range(int(first), int(last or first) + 1))
    assert back == rounds


def test_a_comparison_counts_the_sites_that_its_means_are_over() -> None:
    """A site that an arm has no score of is in no mean: neither counted nor named as the worst. Second models are no
    such arm."""
    report = sample_report()
    report["sites"]["Aachen"]["dice"]["personalised"] = 0.9
    assert headline_of(report).startswith("After 12 rounds over 4 sites, the federated model beats")
    last = report["sites"]["St Mary's Hospital"]
    last["dice"] |= {"pooled": None, "federated": 0.1}
    assert headline_of(report).startswith("After 12 rounds, over 3 of 4 sites, the federated model beats")
    assert key_figures(parse_report(report))[1].label == "Worst site (Coimbra)"


@pytest.mark.parametrize(
    ("progress", "arms", "said"),
    [
        (None, ("federated", "local", "pooled"), "final models"),
        (("finished", 12, 12), ("federated", "local", "pooled"), "final models"),
        (("finished", 12, 7), ("federated",), "the model of round 7"),
        (("finished", 12, 7), ("federated", "personalised"), "the models of round 7"),
        (
            ("finished", 12, 7),
            ("federated", "local", "pooled"),
            "federated: the model of round 7; local only and pooled: final models",
        ),
        (("running", 8, 8), ("federated",), "the model of round 8"),
        (("running", 8, None), ("federated",), "final models"),
    ],
)
def test_bars_are_of_the_scored_rounds_model(
    tmp_path: Path, progress: tuple[str, int, int | None] | None, arms: tuple[str, ...], said: str
) -> None:
    """Where an earlier round's model is handed out, its scores are not called the final model's."""
    report = sample_report()
    if progress is not None:
        report["progress"] = dict(zip(("state", "committed", "scored"), progress, strict=True))
    report["arms"] = dict.fromkeys(arms, report["arms"]["federated"])
    for site in report["sites"].values():
        site["dice"] = dict.fromkeys(arms, 0.5)
    assert f"<figcaption>Held-out patients, {said}.</figcaption>" in write_report(tmp_path, report).read_text()


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        ("ditto", "trained beside the federated one and pulled towards it (Ditto)"),
        ("fine_tune", "trained on from the federated one (fine-tuning)"),
        (None, "kept by each site"),  # a report that does not tell
    ],
)
def test_second_models_are_told_by_how_they_are_made(tmp_path: Path, kind: str | None, made: str) -> None:
    """Ditto's are trained at the federated one's side, not on from it: in the headline and among the definitions."""
    report = with_scores(federated=(0.8, 0.7), personalised=(0.85, 0.75))
    report["strategy"] |= {"personalisation": kind} if kind else {}
    assert f" The sites' own second models, {made}, reach 0.850, 0.750 at the worst site." in headline_of(report)
    page = write_report(tmp_path, report).read_text()
    assert f"<i>Personalised</i>: each site's own second model, {made}; it never leaves the site." in page


@pytest.mark.parametrize(
    ("kind", "kept"), [("local_norms", "normalisation layers (FedBN)"), ("shared_encoder", "decoder (FedPer)")]
)
def test_a_part_that_stays_at_the_sites_is_told_with_the_federated_model(tmp_path: Path, kind: str, kept: str) -> None:
    """No single model has these scores: the common weights do, with each site's own."""
    report = with_scores(federated=(0.8, 0.7), local=(0.7, 0.6))
    report["strategy"]["personalisation"] = kind
    assert f"sites, the federated model with each site's own {kept} beats local-only" in headline_of(report)
    del report["arms"]["local"]
    assert f"sites, the federated model with each site's own {kept} reaches a mean" in headline_of(report)
    assert f"without moving images, with each site&#39;s own {kept}." in write_report(tmp_path, report).read_text()


def test_every_kind_of_personalisation_has_its_words() -> None:
    """A new kind is not passed over in silence."""
    assert {*SECOND_MODELS, *KEPT} == set(get_args(Kind)) - {"none"}


@given(st.floats(0, 1), st.floats(0, 1))
def test_difference_is_what_a_reader_subtracts(ours: float, theirs: float) -> None:
    """The printed difference is exactly the difference of the printed numbers."""
    found = difference(ours, theirs)
    assert found is not None
    assert round(1000 * found) == int(f"{ours:.3f}".replace(".", "")) - int(f"{theirs:.3f}".replace(".", ""))


@pytest.mark.parametrize(
    ("written", "due"),
    [
        (bytes_text(999), "999 bytes"),
        (bytes_text(1_500), "1.5 kB"),
        (bytes_text(999_900_000), "1,000 MB"),
        (bytes_text(2_340_000_000_000), "2,340 GB"),
        (bytes_text(None), "–"),
        (duration_text(59.94), "59.9 s"),
        (duration_text(59.97), "1 min 0 s"),
        (duration_text(212.0), "3 min 32 s"),
        (duration_text(7199.7), "2 h 0 min"),
    ],
)
def test_quantities_read_as_a_person_writes_them(written: str, due: str) -> None:
    """Bytes, and seconds at the borders between units."""
    assert written == due


@pytest.mark.parametrize(
    ("committed", "model_of", "when", "count"),
    [
        (10, 10, "After 10 rounds over", "10"),
        (10, 7, "After 10 rounds (scores of round 7's model) over", "10"),
        (3, 1, "After 3 of 10 rounds (scores of round 1's model) over", "3 of 10"),
        (3, None, "After 3 of 10 rounds over", "3 of 10"),
    ],
)
def test_a_run_that_ended_early_names_the_rounds_that_were_run(
    committed: int, model_of: int | None, when: str, count: str
) -> None:
    """Not the plan's; and the round whose model was scored, where that is another one."""
    report = with_scores(federated=(0.8, 0.7), local=(0.7, 0.6)) | {
        "rounds": 10, "history": [], "progress": {"state": "finished", "committed": committed, "scored": model_of},
    }  # fmt: skip
    assert headline_of(report).startswith(when)
    assert rounds_count(parse_report(report)) == count
