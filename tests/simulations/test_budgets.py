"""Private virtual sites, a start from public patients, and Dice against epsilon."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from client.contract import PrivacyRequest, PrivacyTask
from client.privacy.account import Ceiling, frozen_delta, ledger_path
from client.privacy.accounting import Mechanism, epsilon
from client.privacy.ledger import Ledger
from client.site import SiteConfig
from medsegdiff.errors import UserError
from medsegdiff.strict import read_config
from medsegdiff.weights import hash_weights, load_model, read_tensors
from simulations.budgets import (
    _tick,
    budget_cells,
    compare_budgets,
    draw,
    markdown,
    rows_a_step,
    verdict,
    wants_budgets,
)
from simulations.private_world import Pretraining, WorldPrivacy
from simulations.recipe import read_recipe
from simulations.simulate import simulate

PRIVATE = (
    ("  test_fraction: 0.3\n", "  test_fraction: 0.3\n  privacy: {epsilon: 9, q: 0.5, delta: 1.0e-3, sigma: 1.5}\n"),
    ("  threads: 1\n", "  threads: 1\n  privacy: {}\n"),
)
PUBLIC = (("arms: [local, pooled]\n", "arms: [local]\npretrain: {public_fraction: 0.34, steps: 3}\n"),)


@pytest.mark.slow
def test_a_private_simulation_keeps_a_ledger_a_site_and_reports_epsilon(tiny_recipe, tmp_path) -> None:
    """Both sites' ledgers hold every round; the report's epsilon is the accountants' own for so many steps."""
    outcome = simulate(tiny_recipe(*PRIVATE), None, tmp_path / "run", "inline", False)
    due = epsilon([Mechanism(1.5, 0.5, 4)], frozen_delta(1e-3)).value
    for site in ("alder", "elm"):
        folder = tmp_path / "run" / "world" / site
        assert read_config(folder / "site.yaml", SiteConfig).privacy is not None
        assert len(Ledger(ledger_path(folder), Ceiling(9.0, 1e-3)).account().entries) == 2
        row = outcome.report["sites"][site]
        assert (row["epsilon"], row["privacy_delta"]) == (pytest.approx(due), 1e-3)
    assert outcome.report["history"][0]["loss"] is None
    assert "Largest privacy loss" in outcome.html.read_text()


@pytest.mark.slow
def test_public_patients_belong_to_no_site_and_their_model_starts_the_run(tiny_recipe, tmp_path) -> None:
    """No patient is public and at a site; every arm begins with the public model; a second run gives the same one."""
    recipe = tiny_recipe(*PUBLIC)
    for name in ("one", "two"):
        simulate(recipe, None, tmp_path / name, "inline", False)
    run = tmp_path / "one"

    def patients(folder: Path) -> set[str]:
        with open(folder / "data" / "cases.csv", newline="") as handle:
            return {row["patient_id"] for row in csv.DictReader(handle)}

    public = patients(run / "public" / "public")
    sites = [patients(run / "world" / site) for site in ("alder", "elm")]
    assert len(public) == 2
    assert not public & set.union(*sites)
    assert sum(map(len, sites)) == 4
    start = hash_weights(read_tensors(run / "initial.safetensors")[0])
    assert start == hash_weights(load_model(run / "arms" / "public.safetensors").network.state_dict())
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()


def test_who_is_public_depends_on_the_seed_and_not_on_the_order() -> None:
    """The asked share, the same for any order, another for another seed."""
    everyone = {f"p{n}": "a" for n in range(40)}
    rule = Pretraining(1, 0.25)
    assert len(rule.choose(everyone, 0)) == 10
    assert rule.choose(everyone, 0) == rule.choose(dict(reversed(everyone.items())), 0) != rule.choose(everyone, 1)


def test_public_sites_give_all_their_patients() -> None:
    """And nobody else's; a site that is not there is told by name; both ways of choosing at once are refused."""
    sites = {"p1": "a", "p2": "b", "p3": "a", "p4": None, "p5": "c"}
    assert Pretraining(1, public_sites=("a", "c")).choose(sites, 0) == {"p1", "p3", "p5"}
    with pytest.raises(UserError, match=r"public_sites: d: no patient"):
        Pretraining(1, public_sites=("a", "d")).choose(sites, 0)
    for fraction, names in ((0.5, ("a",)), (None, ())):
        with pytest.raises(ValueError, match="exactly one"):
            Pretraining(1, fraction, names)


@pytest.mark.slow
def test_noise_is_the_least_that_keeps_the_budget() -> None:
    """With it the run is within epsilon; with 1 % less it is not."""
    asked = WorldPrivacy(epsilon=3.0, q=0.2, delta=1e-4)
    sigma = asked.noise(10, 5)
    assert epsilon([Mechanism(sigma, 0.2, 50)], frozen_delta(1e-4)).value <= 3.0
    assert epsilon([Mechanism(0.99 * sigma, 0.2, 50)], frozen_delta(1e-4)).value > 3.0
    section = replace(asked, sigma=sigma).at_site(47, 10, 5)
    assert (section.weight, section.mechanism.batch, section.mechanism.steps) == (50, 10, 5)


def test_cells_differ_in_budget_alone(tiny_recipe) -> None:
    """A cell a budget and repetition, the unprotected ones after them; seeds differ by repetition only."""
    recipe = read_recipe(tiny_recipe(*PRIVATE, *PUBLIC))
    recipe = replace(recipe, epsilons=(1.0, None), repeats=2)
    cells = dict(budget_cells(recipe))
    assert list(cells) == [f"{name}-{n}" for n in (0, 1) for name in ("epsilon-1", "none", "all-weights")]
    assert [cell.seed for cell in cells.values()] == [1, 1, 1, 2, 2, 2]
    assert cells["none-0"].run.privacy is not None
    assert not cells["none-0"].run.privacy.required
    assert cells["all-weights-0"].run.privacy is None
    assert cells["all-weights-0"].arms == ("local",)


def test_rows_of_a_step_are_the_recipes(tiny_recipe) -> None:
    """q, slices and draws of the site, or what the run asks in their place; without privacy the batch."""
    recipe = read_recipe(tiny_recipe(*PRIVATE))
    assert rows_a_step(recipe, 10) == 0.5 * 10 * 4 * 8
    assert rows_a_step(read_recipe(tiny_recipe()), 10) == 2
    asked = replace(recipe.run, privacy=PrivacyTask(asks=PrivacyRequest(q=0.25, draws=2)))
    assert rows_a_step(replace(recipe, run=asked), 10) == 0.25 * 10 * 4 * 2


@pytest.mark.slow
def test_a_comparison_ends_in_figures_table_and_plot(tiny_recipe, tmp_path) -> None:
    """Goes on where it was; the table has every budget, and says of each what it gained."""
    path = tiny_recipe(*PRIVATE, *PUBLIC, ("arms: [local]\n", "arms: [local]\nepsilons: [9, null]\n"))
    assert wants_budgets(path)
    found = compare_budgets(path, None, tmp_path / "out", "inline", False)
    again = compare_budgets(path, None, tmp_path / "out", "inline", True)
    assert found.figures == again.figures == json.loads((tmp_path / "out" / "epsilon.json").read_text())
    assert [row["name"] for row in found.figures["rows"]] == ["epsilon-9", "none", "all-weights"]
    assert found.figures["rows"][0]["spent"] == pytest.approx(
        epsilon([Mechanism(1.5, 0.5, 4)], frozen_delta(1e-3)).value
    )
    assert found.plot.read_bytes()[:4] == b"\x89PNG"
    assert "useless" in found.table or "gains" in found.table
    with pytest.raises(UserError, match="is not empty"):
        compare_budgets(path, None, tmp_path / "out", "inline", False)


def _figures_row(name: str, asked: float | None, mean: float, spread: float, worst: float) -> dict[str, object]:
    spent, sigma = (0.99 * asked, 9.0) if asked is not None else (None, None)
    told = {"name": name, "asked": asked, "spent": spent, "sigma": sigma, "trained": 10}
    return told | {"rows_a_step": 28.5 if asked else 8.0, "mean": mean, "spread": spread, "worst": worst}


FIGURES = {
    "recipe": "r", "repetitions": 3, "rounds": 2, "local_steps": 2, "patients": 30, "sites": 2, "delta": 1e-3,
    "start": 0.5, "local": 0.6,
    "rows": [
        _figures_row("epsilon-1", 1.0, 0.505, 0.02, 0.5),
        _figures_row("epsilon-50", 50.0, 0.7, 0.02, 0.6),
        _figures_row("none", None, 0.8, 0.01, 0.7),
    ],
}  # fmt: skip


def test_what_learned_nothing_is_called_useless() -> None:
    """A gain within the spread is none; one beyond it is told with its sign."""
    low, high = verdict(FIGURES)
    assert "At epsilon 1 private training is useless with 30 patients" in low
    assert "gains +0.200" in high
    text = markdown(FIGURES)
    assert "| epsilon 1 | 9 | 0.99 | 10 | 28.5 | 0.505 ± 0.020 | 0.500 |" in text
    assert "| no privacy, the same set |  |  | 10 | 8 | 0.800" in text
    assert "Where they differ, so does more than privacy." in text
    assert draw(FIGURES) == draw(FIGURES)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ((PRIVATE[1],), "world.privacy, which would give it, is missing"),
        ((PRIVATE[0],), "needs run.privacy"),
        ((("arms: [local, pooled]\n", "epsilons: [1]\n"),), "epsilons needs world.privacy"),
        ((("arms: [local, pooled]\n", "repeats: 2\n"),), "repeats must lie in 1..1000"),
        ((("arms: [local, pooled]\n", "pretrain: {public_fraction: 1.0, steps: 1}\n"),), "public_fraction must lie"),
    ],
)
def test_halves_of_a_private_recipe_are_refused(tiny_recipe, changes, fault) -> None:
    """Each names the key that is missing or out of range."""
    with pytest.raises(UserError, match=fault):
        read_recipe(tiny_recipe(*changes))


def test_the_plot_names_what_was_spent_where_no_less_noise_may_be_used() -> None:
    """A budget that cannot be used up is not what its training cost."""
    assert _tick({"asked": 1e6, "spent": 58.94}) == "58.9\n(least noise)"
    assert [_tick({"asked": 8.0, "spent": spent}) for spent in (7.98, None)] == ["8", "8"]
