"""`medsegfed privacy audit` as a command: what it prints, and its exit codes."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from client.privacy import audit as auditing
from client.privacy.policy import PrivacyPolicy
from client.privacy.step import PrivateStep
from deploy import cli_privacy_audit
from medsegdiff.errors import UserError


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    made.command("audit")(cli_privacy_audit.audit)
    return made


def test_it_passes_and_says_what_that_means(app: typer.Typer) -> None:
    """Exit code 0: the claim, the bound and what it is not."""
    result = CliRunner().invoke(app, ["--canaries", "100"])
    assert result.exit_code == 0
    assert "20 steps with sigma 4.67 and q 0.5 are (2, 1e-05)-private" in result.output
    assert "with 95% confidence" in result.output
    assert "Passed: nothing refutes the claim. That is no proof" in result.output


def test_json_on_a_device(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is the one that was named; one that is not there is told."""
    seen = []
    real = auditing.audit

    def noted(policy: PrivacyPolicy, **options: object) -> auditing.Verdict:
        seen.append(str(options["device"]))
        return real(policy, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(auditing, "audit", noted)
    result = CliRunner().invoke(app, ["--device", "cpu", "--canaries", "100", "--json"])
    found = json.loads(result.output)
    assert (result.exit_code, found["passed"], found["canaries"]) == (0, True, 100)
    assert found["claim"]["epsilon"] == 2.0
    assert seen == ["cpu"]
    result = CliRunner().invoke(app, ["--device", "Riva 128"])
    assert isinstance(result.exception, UserError)


def test_a_program_that_adds_no_noise_is_refuted(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1, and what to do."""
    monkeypatch.setattr(PrivateStep, "_noise", lambda self, sums: None)
    result = CliRunner().invoke(app, ["--canaries", "300"])
    assert result.exit_code == 1
    assert "REFUTED: more is known of the canaries than the claim allows" in result.output
