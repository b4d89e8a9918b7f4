"""`medsegfed privacy audit` as a command: what it prints, its exit codes, and what it reads of a site."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from client.privacy import audit as auditing
from client.privacy.policy import PrivacyPolicy
from client.privacy.step import PrivateStep
from deploy import cli_privacy_audit
from medsegdiff.errors import UserError
from medsegdiff.strict import dump_yaml, plain

POLICY = PrivacyPolicy(epsilon=8.0, delta=1e-5, sigma=2.0, q=0.1, clip=0.25, batch=16, steps=10, rounds=20)
SITE = {"name": "st-mary", "data": "data", "device": "cpu", "privacy": plain(POLICY)}


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    made.command("audit")(cli_privacy_audit.audit)
    return made


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "site.yaml").write_text(dump_yaml(SITE))
    return tmp_path


def test_it_passes_and_says_what_that_means(app: typer.Typer) -> None:
    """Exit code 0: the claim, the bound and what it is not."""
    result = CliRunner().invoke(app, ["--canaries", "100"])
    assert result.exit_code == 0
    assert "20 steps with sigma 4.67 and q 0.5 are (2, 1e-05)-private" in result.output
    assert "with 95% confidence" in result.output
    assert "Passed: nothing refutes the claim. That is no proof" in result.output


def test_json_of_a_site(app: typer.Typer, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The site's clip, batch and device are what is audited."""
    seen = []
    real = auditing.audit

    def noted(policy: PrivacyPolicy, **options: object) -> auditing.Verdict:
        seen.append((policy, str(options["device"])))
        return real(policy, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(auditing, "audit", noted)
    result = CliRunner().invoke(app, ["--site", str(site), "--canaries", "100", "--json"])
    found = json.loads(result.output)
    assert (result.exit_code, found["passed"], found["canaries"]) == (0, True, 100)
    assert found["claim"]["epsilon"] == 2.0
    assert seen == [(POLICY, "cpu")]


def test_a_program_that_adds_no_noise_is_refuted(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1, and what to do."""
    monkeypatch.setattr(PrivateStep, "_noise", lambda self, sums: None)
    result = CliRunner().invoke(app, ["--canaries", "300"])
    assert result.exit_code == 1
    assert "REFUTED: more is known of the canaries than the claim allows" in result.output


@pytest.mark.parametrize(
    ("section", "told"),
    [
        (None, "has no privacy section"),
        (plain(POLICY) | {"sigma": 0.0}, "sigma must lie in"),
        (plain(POLICY) | {"sigmas": 1}, "unknown key"),
    ],
)
def test_a_site_without_a_policy(app: typer.Typer, tmp_path: Path, section: object, told: str) -> None:
    """One line that names the file; nothing is audited in its place."""
    (tmp_path / "site.yaml").write_text(dump_yaml(SITE | {"privacy": section}))
    result = CliRunner().invoke(app, ["--site", str(tmp_path)])
    assert isinstance(result.exception, UserError)
    assert told in str(result.exception)
    assert "site.yaml" in str(result.exception)
