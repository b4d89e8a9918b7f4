"""`medsegfed privacy audit`: proof, as far as a test can give it, that the installed private step is private."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from client.privacy.audit import Verdict
    from client.privacy.policy import PrivacyPolicy

REFUTED = 1  # exit code of an audit that the installed program did not pass


def audit(
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, or part of a GPU's name; default: the site's, else cpu.")
    ] = None,
    site: Annotated[Path | None, typer.Option(help="A site's folder: audit under its policy, on its device.")] = None,
    canaries: Annotated[int, typer.Option(min=100, max=20_000, help="Patients made up for the audit.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train on canaries with the installed program and try to tell which took part; exit code 1 if that succeeds.

    No patient of the site is read, nothing of its budget is spent, and nothing is sent. Takes seconds on a CPU.

    Example: medsegfed privacy audit --site st-mary
    """
    from client.privacy import audit as auditing
    from medsegdiff.devices import choose_device
    from medsegdiff.strict import plain

    policy, own = _policy_of(site)
    verdict = auditing.audit(policy, canaries=canaries, device=choose_device(device if device is not None else own))
    if as_json:
        typer.echo(json.dumps(plain(verdict) | {"passed": verdict.passed}, indent=1, allow_nan=False))
    else:
        typer.echo("\n".join(_lines(verdict)))
    if not verdict.passed:
        raise typer.Exit(REFUTED)


def _policy_of(site: Path | None) -> tuple[PrivacyPolicy, str | int]:
    """C and B of a site, or any: what is audited does not depend on them, if it is right. And the device."""
    from client.privacy.policy import PrivacyPolicy
    from client.site import SiteConfig
    from medsegdiff.errors import UserError
    from medsegdiff.strict import read_config

    if site is not None:
        config = read_config(site / "site.yaml", SiteConfig)
        if config.privacy is None:
            raise UserError(
                f"{site / 'site.yaml'}: has no `privacy` section, so nothing is trained with privacy here. Leave "
                "--site out to audit the installed program alone."
            )
        return config.privacy.mechanism, config.device
    stand_in = PrivacyPolicy(epsilon=2.0, delta=1e-5, sigma=5.0, q=0.5, clip=1.0, batch=100, steps=20, rounds=1)
    return stand_in, "cpu"


def _lines(verdict: Verdict) -> list[str]:
    claim = verdict.claim
    lines = [
        f"Claim: {claim.steps} steps with sigma {claim.sigma:g} and q {claim.q:g} are ({claim.epsilon:g}, "
        f"{claim.delta:g})-private for a patient (add or remove one).",
        f"Told right: {verdict.right} of {verdict.guesses} guesses about {verdict.canaries} canaries.",
        f"Epsilon is at least {verdict.epsilon_at_least:.2f}, with {verdict.confidence:.0%} confidence.",
        f"Sampler: {verdict.inclusion:.4f} of patients drawn a step, {claim.q:g} claimed (p = "
        f"{verdict.inclusion_p:.2g}, of the batch sizes' spread p = {verdict.spread_p:.2g}).",
    ]
    if verdict.passed:
        return [*lines, "Passed: nothing refutes the claim. That is no proof; see the exact tests of client/privacy."]
    what = "more is known of the canaries than the claim allows"
    if verdict.epsilon_at_least <= claim.epsilon:
        what = "patients are not drawn as the accountant assumes"
    return [*lines, f"REFUTED: {what}. Take part in no private run with this program; install it anew and repeat."]
