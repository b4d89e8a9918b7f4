"""Privacy at virtual sites, and a start from public data, as a recipe asks for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from client.privacy.account import frozen_delta
from client.privacy.accounting import noise_multiplier
from client.privacy.policy import PrivacyPolicy, SitePrivacy
from medsegdiff.ensemble import derive_seed
from medsegdiff.errors import UserError
from medsegdiff.strict import Strict


@dataclass(frozen=True)
class WorldPrivacy(Strict):
    """`world.privacy`: every virtual site gets this as the `privacy` section of its site.yaml."""

    epsilon: float  # the budget of each site for the whole run
    q: float  # probability with which a step takes each patient
    delta: float = 1e-4
    sigma: float | None = None  # null: the least noise with which the run keeps within epsilon
    clip: float = 1.0
    batch: int | None = None  # B; null: q times the weight, rounded
    weight: int | None = None  # of a site; null: its training patients to the nearest ten, as a hospital might declare
    slices: int = 4
    draws: int = 8
    # The researcher has all patients before her anyway; "withheld" shows what a real coordinator would see.
    held_out: Literal["withheld", "public"] = "public"

    def at_site(self, patients: int, rounds: int, steps: int) -> SitePrivacy:
        """A site's section.

        Args:
            patients: training patients of the site.
            rounds: of the run, of `steps` noised steps each.

        Raises:
            UserError: no noise keeps so many steps within the budget.
        """
        weight = self.weight or max(1, 10 * round(patients / 10))
        sigma = self.sigma or self.noise(rounds, steps)
        try:
            mechanism = PrivacyPolicy(
                epsilon=self.epsilon,
                delta=self.delta,
                sigma=sigma,
                q=self.q,
                clip=self.clip,
                batch=self.batch or max(1, round(self.q * weight)),
                steps=steps,
                rounds=rounds,
                slices=self.slices,
                draws=self.draws,
            )
            return SitePrivacy(mechanism, weight, self.held_out, answer_every=0.0)
        except ValueError as error:
            raise UserError(f"world.privacy: {error}.") from error

    def noise(self, rounds: int, steps: int) -> float:
        """The least sigma, rounded up to four digits, with which a run costs at most epsilon."""
        found = noise_multiplier(self.q, rounds * steps, frozen_delta(self.delta), self.epsilon)
        digits = 3 - math.floor(math.log10(found))
        return float(math.ceil(found * 10**digits) / 10**digits)


@dataclass(frozen=True)
class Pretraining(Strict):
    """`pretrain`: some patients are set apart as public, a model is trained on them, and the run starts from it."""

    steps: int
    public_fraction: float | None = None  # of all patients, at random; they belong to no site. Or
    public_sites: tuple[str, ...] = ()  # all patients of these sites of the dataset: public data from elsewhere

    def __post_init__(self) -> None:
        if (self.public_fraction is None) == (not self.public_sites):
            raise ValueError("exactly one of public_fraction and public_sites says who is public")
        if self.public_fraction is not None and not 0 < self.public_fraction < 1:
            raise ValueError(f"public_fraction must lie between 0 and 1, found {self.public_fraction}")
        if not 1 <= self.steps <= 1_000_000:
            raise ValueError(f"steps must lie in 1..1000000, found {self.steps}")

    def choose(self, sites: Mapping[str, str | None], seed: int) -> set[str]:
        """The public patients, of patient -> site.

        By fraction: whoever has the lowest keyed hashes, so that neither order nor names matter.

        Raises:
            UserError: a public site has no patient.
        """
        if self.public_fraction is None:
            if missing := set(self.public_sites) - set(sites.values()):
                raise UserError(f"pretrain.public_sites: {', '.join(sorted(missing))}: no patient is of such a site.")
            return {patient for patient, site in sites.items() if site in self.public_sites}
        ranked = sorted(sites, key=lambda patient: derive_seed(seed, "public", patient))
        return set(ranked[: max(1, round(self.public_fraction * len(ranked)))])


PUBLIC = "public"  # folder and arm of the patients that are set apart
