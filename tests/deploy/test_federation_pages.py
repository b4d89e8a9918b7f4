"""The pages of a federation say what is so: commands, options, metrics, codes, tests and links that they name exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from client.contract import REFUSALS
from client.privacy.accounting import Mechanism, epsilon
from client.site import SiteConfig
from deploy import cli
from deploy.federation import FederationConfig, _config_text, init_federation
from deploy.metrics import FederationCollector
from deploy.site_guide import new_site_yaml, site_guide
from medsegdiff.strict import read_config

ROOT = Path(__file__).parents[2]
PROGRAM: click.Command = typer.main.get_command(cli.app)
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("federation", "operations", "security")}
TEXTS = PAGES | {
    "the guide for sites": site_guide("net", "fed.example.org:8443", "0000", ""),
    "site.yaml": new_site_yaml("st-mary"),
    "federation.yaml": _config_text(FederationConfig("net", ("fed.example.org",))),
    **{
        str(path.relative_to(ROOT)): path.read_text()
        for path in sorted((ROOT / "deploy" / "files").rglob("*"))
        if path.is_file()
    },
}


def commands(text: str) -> Iterator[str]:
    """What follows `medsegfed` in code spans, in lines that begin with it or a prompt, and in units and comments."""
    for line in text.splitlines():
        spans = re.findall(r"`([^`]+)`", line) or [line]
        for span in spans:
            for found in re.findall(
                r"(?:^|[\s;:]|bin/)medsegfed ([a-z].*)|run --rm (?!--entrypoint).*\b(?:site|server) ([a-z].*)", span
            ):
                yield re.split(r" {2,}|;|: | # | ## |, |\)", "".join(found))[0].rstrip(".:")


def check(words: list[str]) -> None:
    """Walk the verbs and look up the options. Raises AssertionError with what is not there."""
    command: click.Command = PROGRAM
    while isinstance(command, click.Group) and words:
        assert words[0] in command.commands, f"there is no verb {words[0]}"
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("-"):
            assert word.split("=")[0] in known, f"{command.name} has no option {word}"


def test_the_example_of_a_privacy_section_is_one_that_learns(tmp_path: Path) -> None:
    """Without its comment signs it is taken, and its run keeps to the limit; numbers as in docs/privacy.md."""
    head, _, example = new_site_yaml("st-mary").partition("# privacy:\n")
    section = "privacy:\n" + "".join(line[1:] + "\n" for line in example.splitlines() if line.startswith("#"))
    path = tmp_path / "site.yaml"
    path.write_text(head + section)
    privacy = read_config(path, SiteConfig).privacy
    assert privacy is not None
    policy = privacy.mechanism
    spent = epsilon([Mechanism(policy.sigma, policy.q, policy.steps * policy.rounds)], policy.delta).value
    assert policy.epsilon / 4 < spent < policy.epsilon
    shown = (ROOT / "docs" / "privacy.md").read_text()
    for name in ("epsilon", "sigma", "q", "clip", "batch", "steps", "rounds", "slices", "draws"):
        assert re.search(rf"^    {name}: {getattr(policy, name):g} ", shown, re.MULTILINE), name


@pytest.mark.parametrize("name", TEXTS)
def test_commands_that_are_named_exist(name: str) -> None:
    """With their options; prose that merely mentions the program is told by its verb."""
    verbs = set(PROGRAM.commands)  # type: ignore[attr-defined]
    for command in commands(TEXTS[name]):
        words = command.split()
        in_prose = name not in PAGES and words[0] not in verbs and not any(word.startswith("-") for word in words)
        if not in_prose:
            check(words)


def test_a_command_that_is_not_there_is_found() -> None:
    """The search sees spans, prompts and units; the look-up refuses verbs and options."""
    text = "see `medsegfed renew --folder x`: no\n$ medsegfed site start\nExecStart=/x/bin/medsegfed run R.yaml\n"
    text += "`/opt/medsegfed` leads there"
    assert list(commands(text)) == ["renew --folder x", "site start", "run R.yaml"]
    check(["renew", "--folder", "x"])
    for wrong in (["renewal"], ["site", "stop"], ["renew", "--server"]):
        with pytest.raises(AssertionError):
            check(wrong)


def test_metrics_on_the_page_are_those_that_are_served(tmp_path: Path) -> None:
    """No more and no fewer; the names as Prometheus shows them."""
    init_federation(tmp_path / "federation", "net", ["fed.example.org"])
    served = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in FederationCollector(tmp_path / "federation").collect()
    }
    table = PAGES["operations"].split("## Metrics")[1].split("Worth an alarm")[0]
    assert set(re.findall(r"`(medsegfed_\w+)`", table)) == served


def test_every_refusal_is_on_the_page() -> None:
    """A coordinator who reads a code finds it; one that no honest side gives needs no row."""
    named = set(re.findall(r"`(?:refused: )?([a-z]+(?:-[a-z]+)*)`", PAGES["operations"]))
    assert set(REFUSALS) - named == {"round-out-of-range"}


def test_tests_that_are_named_exist() -> None:
    """The table of threats points at what tries them."""
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", PAGES["security"])
    assert len(named) > 20
    for path, function in named:
        assert (ROOT / path).exists(), path
        if function:
            tree = ast.parse((ROOT / path).read_text())
            assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, function


def anchor(heading: str) -> str:
    """A heading's anchor, as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    """Files and headings."""
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        file, _, heading = target.partition("#")
        path = ROOT / "docs" / (file or f"{name}.md")
        assert path.is_file(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert heading in {anchor(text) for text in headings}, target


def test_files_that_are_named_are_in_the_folder() -> None:
    """`files/...` on the pages is deploy/files."""
    for text in PAGES.values():
        for path in re.findall(r"(?<![\w/])(?:OUT/)?files/([\w./-]*\w)", text):
            assert (ROOT / "deploy" / "files" / path).exists(), path
