"""The verbs of patient-level differential privacy: what a budget buys, and what is spent.

As in cli.py, each imports what it needs when it runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy import cli_privacy_audit
from medsegdiff.errors import UserError

app = typer.Typer(no_args_is_help=True)
privacy_app = typer.Typer(no_args_is_help=True, help="Patient-level differential privacy.")
ledger_app = typer.Typer(no_args_is_help=True, help="What a site's patients have spent of their privacy.")
app.add_typer(privacy_app, name="privacy")
app.add_typer(ledger_app, name="ledger")
privacy_app.command("audit")(cli_privacy_audit.audit)

SiteOption = Annotated[Path, typer.Option("--site", help="The site's folder, which holds site.yaml.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Draw epsilon into this PNG file.")]


@privacy_app.command("plan")
def privacy_plan(
    patients: Annotated[int, typer.Option(min=1, help="Training patients of the site.")],
    epsilon: Annotated[float, typer.Option(help="The budget: add or remove one patient.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the run.")],
    delta: Annotated[float, typer.Option(help="Far below 1 / patients.")] = 1e-5,
    steps_per_round: Annotated[int | None, typer.Option(min=1, help="Default: chosen.")] = None,
    q: Annotated[
        float | None, typer.Option("--q", help="Probability with which a step takes each patient; default: chosen.")
    ] = None,
    parameters: Annotated[
        int, typer.Option(min=1, help="Parameters that are trained; medsegfed model show counts a whole network's.")
    ] = 30_000,
    clip: Annotated[float, typer.Option(help="Longest gradient of a patient.")] = 1.0,
    draws: Annotated[int, typer.Option(min=1, help="Noise draws a patient and step; they cost time, no epsilon.")] = 8,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """What a budget buys: noise, batch, steps, and whether anything can be learned beside the noise.

    Example: medsegfed privacy plan --patients 200 --epsilon 3 --delta 1e-5 --rounds 50
    """
    from client.privacy.planning import make_plan
    from deploy.privacy_plots import plot_plan
    from deploy.privacy_report import plan_figures, plan_lines

    plan = make_plan(patients, epsilon, delta, rounds, steps_per_round, q, parameters, clip, draws)
    if plot is not None:
        plot_plan(plan, plot)
    if as_json:
        _print_json(plan_figures(plan))
        return
    typer.echo("\n".join(plan_lines(plan)))
    if plot is not None:
        typer.echo(f"Plot: {plot}")


@ledger_app.command("show")
def ledger_show(
    site: SiteOption = Path(),
    everything: Annotated[bool, typer.Option("--all", help="All reservations, not the last 40.")] = False,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Every reservation, what it was for, and what is spent and left. The ledger is verified first.

    Example: medsegfed ledger show --site st-mary
    """
    from deploy.privacy_plots import plot_ledger
    from deploy.privacy_report import ledger_figures, ledger_lines, ledger_table, open_account

    account, total = open_account(site)
    if plot is not None:
        plot_ledger(account, plot)
    if as_json:
        _print_json(ledger_figures(site, account, total))
        return
    if account.entries:
        from rich.console import Console

        Console().print(ledger_table(account, everything))
    typer.echo("\n".join(ledger_lines(account, total)))
    if plot is not None:
        typer.echo(f"Plot: {plot}")


@ledger_app.command("verify")
def ledger_verify(
    site: SiteOption = Path(),
    anchor: Annotated[
        str | None,
        typer.Option(help="A head noted elsewhere, such as on paper, in 64 digits: it must be in the chain."),
    ] = None,
) -> None:
    """Whether the ledger is whole and no older copy: every line, and every head that the audit log noted.

    Exit code 0: it is. 1: it is not, and nothing is trained with privacy at this site.

    Example: medsegfed ledger verify --site st-mary
    """
    from deploy.privacy_report import verify_lines

    whole, lines = verify_lines(site, anchor)
    typer.echo("\n".join(lines))
    if not whole:
        raise typer.Exit(1)


@ledger_app.command("recover")
def ledger_recover(site: SiteOption = Path()) -> None:
    """After a lost, damaged or restored ledger: write into it what the audit log knows and it lacks.

    Every reservation that the audit log noted counts again, in full. Of a damaged ledger a copy is kept, as evidence.

    Example: medsegfed ledger recover --site st-mary
    """
    from deploy.ledger_repair import recover_ledger

    typer.echo("\n".join(recover_ledger(site)))


@ledger_app.command("write-off")
def ledger_write_off(
    epsilon: Annotated[float, typer.Option(help="The highest ceiling that this site ever had.")],
    delta: Annotated[float, typer.Option(help="And its delta.")],
    site: SiteOption = Path(),
    anchor: Annotated[
        list[str] | None, typer.Option(help="What the server remembers of the lost ledger; the site's log names it.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Where the audit log is lost as well: take everything that was ever allowed for spent.

    Nothing more is trained then until the data officer raises epsilon and delta in site.yaml above it.

    Example: medsegfed ledger write-off --site st-mary --epsilon 8 --delta 1e-5
    """
    from deploy.ledger_repair import write_off_ledger

    if not yes:
        if not sys.stdin.isatty():
            raise UserError("nobody can be asked here: nothing was written off. Say --yes to go on without a question.")
        if not typer.confirm(
            f"Everything before now counts as epsilon {epsilon:g} at delta {delta:g}, for good. Go on?"
        ):
            raise typer.Exit(1)
    typer.echo("\n".join(write_off_ledger(site, epsilon, delta, anchor or [])))


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False))
