"""The verbs of a real federation: the coordinator's and the hospital's.

As in cli.py, each imports what it needs when it runs.
"""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from medsegdiff.errors import UserError
from server.membership import FEDERATION

app = typer.Typer(no_args_is_help=True)
server_app = typer.Typer(no_args_is_help=True, help="The coordinator's end of a federation.")
site_app = typer.Typer(no_args_is_help=True, help="A hospital's end of a federation.")
audit_app = typer.Typer(no_args_is_help=True, help="The tamper-evident log of either end.")
app.add_typer(server_app, name="server")
app.add_typer(site_app, name="site")
app.add_typer(audit_app, name="audit")

FederationOption = Annotated[
    Path, typer.Option("--folder", envvar=FEDERATION, help="The federation's folder.", show_default=True)
]
SiteOption = Annotated[Path, typer.Option("--folder", help="The site's folder: site.yaml, keys, approvals.")]
EitherOption = Annotated[
    Path | None,
    typer.Option("--folder", help="A federation's or a site's folder; default: this one, else MEDSEGFED_FEDERATION."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
HERE = Path("federation")


# --- membership -------------------------------------------------------------------------------------------------------


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="Of the federation; stands in every certificate.")],
    host: Annotated[list[str], typer.Option(help="Name or address that sites reach the server by; may be repeated.")],
    folder: FederationOption = HERE,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The one public port.")] = 8443,
    contact: Annotated[str, typer.Option(help="Whom sites phone to compare fingerprints.")] = "",
) -> None:
    """Make a federation: its certificate authority, the server's certificate, a page for the sites.

    Example: medsegfed init brain-net --host fed.example.org --contact "Dr. Day, +49 30 1234"
    """
    from client.certificates import spoken
    from deploy.federation import init_federation

    made = init_federation(folder, name, host, port=port, contact=contact)
    typer.echo(f"Federation {name} in {folder}; sites reach it at {made.server}.")
    typer.echo(f"Authority (read it out on the phone): {spoken(made.authority().fingerprint)}")
    typer.echo(f"Send {made.guide} to the sites. Their requests are admitted by: medsegfed admit FILE.request")
    typer.echo("Next: medsegfed server start")


@app.command()
def join(
    name: Annotated[str | None, typer.Argument(help="The hospital's name in the federation.")] = None,
    patients: Annotated[
        int | None, typer.Option(min=1, help="Training patients: the largest weight the site's updates may claim.")
    ] = None,
    kit: Annotated[Path | None, typer.Option(help="The kit that came back from the coordinator.")] = None,
    folder: SiteOption = Path(),
    ca: Annotated[
        str | None, typer.Option("--ca", help="Fingerprint of the authority, as read out on the phone.")
    ] = None,
    replace: Annotated[bool, typer.Option(help="Leave the federation that the site belongs to for the kit's.")] = False,
) -> None:
    """At a hospital: make its keys and a request; later install the kit that came back. Keys never leave the machine.

    Example: medsegfed join st-mary --patients 120 ; medsegfed join --kit st-mary.kit
    """
    from deploy.joining import install_kit, make_request

    if kit is not None:
        if name is not None or patients is not None:
            raise UserError("--kit installs what the coordinator sent: leave the name and --patients out.")
        typer.echo("\n".join(install_kit(folder, kit, replace, ca).lines))
        return
    if name is None or patients is None:
        raise UserError("say who joins: medsegfed join NAME --patients N; or install a kit: medsegfed join --kit FILE.")
    typer.echo("\n".join(make_request(folder, name, patients).lines))


@app.command()
def admit(
    request: Annotated[Path, typer.Argument(help="NAME.request, as the hospital sent it.")],
    patients: Annotated[int | None, typer.Option(min=1, help="In place of the number the site states.")] = None,
    fingerprint: Annotated[str | None, typer.Option(help="As the hospital read it out on the phone.")] = None,
    folder: FederationOption = HERE,
) -> None:
    """Admit a hospital: sign its request into a kit and enter it into the register.

    Example: medsegfed admit st-mary.request --fingerprint "3f2a 99c0 ..."
    """
    from deploy.admission import admit as admit_request
    from deploy.admission import read_request
    from deploy.federation import open_federation

    federation = open_federation(folder)
    typer.echo("\n".join(read_request(request).lines()))
    kit = admit_request(federation, request, patients, fingerprint)
    typer.echo(f"Admitted. Send {kit} back; it holds no secret. The hospital runs: medsegfed join --kit {kit.name}")
    if fingerprint is None:
        typer.echo(
            "Before you send it, compare the fingerprint above on the phone: whoever changed the request holds it. If "
            f"it differs: medsegfed revoke {kit.stem} --reason 'another fingerprint'"
        )


@app.command()
def renew(folder: EitherOption = None) -> None:
    """A new certificate, without a new kit: the site's over the network; in a federation's folder the server's.

    A running site renews its own in time; this does it now.
    """
    from deploy.federation import open_federation
    from deploy.renewal import renew_server, renew_site

    place, is_federation = _place(folder)
    if not is_federation:
        typer.echo(renew_site(place).line())
        return
    certificate = renew_server(open_federation(place))
    typer.echo(f"Renewed until {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; the running gateway takes it up.")


@app.command()
def revoke(
    site: Annotated[str, typer.Argument(help="Which site.")],
    reason: Annotated[str, typer.Option(help="Why; stands in the audit log.")],
    folder: FederationOption = HERE,
) -> None:
    """Shut a site out, for good: within seconds at the gateway, within the round at hand in a run.

    Example: medsegfed revoke st-mary --reason "laptop with its keys stolen"
    """
    from deploy.admission import revoke as revoke_site
    from deploy.federation import open_federation

    revoke_site(open_federation(folder), site, reason)
    typer.echo(
        f"{site} is revoked: its certificates and keys open nothing any more. To come back it joins with new keys."
    )


@app.command()
def lift(
    site: Annotated[str, typer.Argument(help="Which site.")],
    folder: FederationOption = HERE,
) -> None:
    """Let a site take part again that a run suspended, for too many rejected updates in a row.

    Example: medsegfed lift st-mary
    """
    from deploy.admission import lift as lift_site
    from deploy.federation import open_federation

    lift_site(open_federation(folder), site)
    typer.echo(f"{site} takes part again, within seconds in a run that is under way.")


# --- the long-running ends --------------------------------------------------------------------------------------------


@server_app.command("start")
def server_start(folder: FederationOption = HERE) -> None:
    """Run the server until Ctrl-C: gateway, SuperLink, SuperExec, runs; what dies is started again."""
    from deploy.server_start import start_server

    start_server(folder, _tell)


@site_app.command("start")
def site_start(folder: SiteOption = Path()) -> None:
    """Run a site until Ctrl-C. It only calls out, to the federation's one host and port."""
    from deploy.site_start import start_site

    start_site(folder, _tell)


@app.command()
def doctor(
    folder: EitherOption = None,
    names: Annotated[bool, typer.Option("--names", help="Name cases and files; for this terminal only.")] = False,
    data_seconds: Annotated[
        float | None, typer.Option(min=1, help="Stop reading the data after so many seconds; default: 600.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check everything a run needs, before it: network, certificates, clock, disk, GPU, data. Counts only.

    Exit code 0: nothing stands in the way. 1: something does; each line says what to do.
    """
    from deploy.doctor import report

    place, _ = _place(folder)
    raise typer.Exit(report(place, names=names, as_json=as_json, data_seconds=data_seconds))


@app.command()
def approve(
    run: Annotated[str | None, typer.Argument(help="A run that asks; default: list those that do.")] = None,
    folder: SiteOption = Path(),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask at the terminal.")] = False,
    take_back: Annotated[bool, typer.Option(help="Withdraw an approval: nothing is trained from then on.")] = False,
    by: Annotated[str | None, typer.Option(help="Who approves; default: the user's name.")] = None,
) -> None:
    """The data officer's word: what a run would do here, in plain words, and a signed approval.

    Example: medsegfed approve ; medsegfed approve hippocampus-3f2a99c01b7d
    """
    from deploy.approving import approve_run, pending_lines, withdraw

    if run is None:
        typer.echo("\n".join(pending_lines(folder)))
        return
    who = by or _me()
    if take_back:
        typer.echo(withdraw(folder, run, who))
        return

    def confirmed(lines: list[str]) -> bool:
        typer.echo("\n".join(lines))
        if yes:
            return True
        if not sys.stdin.isatty():
            raise UserError(
                "nobody is at the terminal to answer; nothing was approved. Add --yes once you have read it."
            )
        return typer.confirm("Approve?")

    typer.echo(approve_run(folder, run, who, confirmed))


# --- runs -------------------------------------------------------------------------------------------------------------


@app.command("run")
def run_(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="What to train (docs/federation.md).")],
    folder: FederationOption = HERE,
    detach: Annotated[bool, typer.Option(help="Do not watch it.")] = False,
    canary: Annotated[
        bool, typer.Option("--canary", help="Before a long run: one step at every site, a report.")
    ] = False,
    wait: Annotated[
        float | None,
        typer.Option(min=1, help="--canary: seconds that sites get to answer; default: the run's deadline."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="--canary: print the report as JSON.")] = False,
) -> None:
    """Start a run, or go on with one that was stopped or failed; it is watched until it ends.

    With --canary the run itself stays untouched; exit code 0: every site is ready, 1: one is not, with the reason.

    Example: medsegfed run hippocampus.yaml --canary ; medsegfed run hippocampus.yaml
    """
    if not canary and (wait is not None or as_json):
        raise UserError("--wait and --json belong to --canary; nothing was started. Add it, or leave them out.")
    from deploy.federation import open_federation
    from deploy.runs import initial_file, queue_run, resolve_run, warning_of
    from deploy.status import watch

    if not run_file.exists():
        raise UserError(
            f"{run_file}: there is no such file. A run is a file of its own, RUN.yaml (docs/configuration.md); the "
            "names of shipped recipes belong to medsegfed simulate."
        )
    federation = open_federation(folder)
    members = {site: m.patients for site, m in federation.members().items() if m.active}
    plan, initial = resolve_run(run_file, members), initial_file(run_file)
    if canary:
        from deploy.canary import canary_command

        raise typer.Exit(canary_command(federation, plan, _me(), wait, as_json, typer.echo, initial))
    queued = queue_run(federation.runs, plan, _me(), initial)
    federation.audit().append("run_queued", run=plan.run_id, by=_me(), sites=sorted(plan.roster))
    typer.echo(f"Run {plan.run_id}: {plan.task.rounds} rounds, sites {', '.join(plan.roster)}. Folder: {queued}")
    typer.echo(f"Each site approves it once: medsegfed approve {plan.run_id}")
    if (warning := warning_of(plan)) is not None:
        typer.echo(warning)
    if not detach:
        raise typer.Exit(watch(federation, plan.name))


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="Which run; default: the one at hand, else the last.")] = None,
    folder: FederationOption = HERE,
    follow: Annotated[bool, typer.Option("--watch", help="Refresh until the run ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Sites, services and the run: who is online, which round, what Dice, what was refused."""
    from deploy.federation import open_federation
    from deploy.status import show, watch

    federation = open_federation(folder)
    if follow:
        raise typer.Exit(watch(federation, name, as_json))
    show(federation, name, as_json)


@app.command()
def stop(
    name: Annotated[str | None, typer.Argument(help="Which run; default: the one at hand.")] = None,
    folder: FederationOption = HERE,
) -> None:
    """End a run within seconds; committed rounds stay, and `medsegfed run` with the same file goes on from there."""
    from deploy.federation import open_federation
    from deploy.runs import run_of, stop_run
    from deploy.supervisor import read_status

    federation = open_federation(folder)
    place = run_of(federation.runs, name)
    stop_run(place, _me())
    federation.audit().append("run_stopped", run=place.name, by=_me())
    ends = "ends within seconds"
    if read_status(federation.state) is None:
        ends = "is to end: the server is not running, and ends it as soon as it is started"
    typer.echo(f"{place.name} {ends}; its committed rounds stay. Go on with: medsegfed run RUN.yaml")


@app.command()
def report(
    name: Annotated[str | None, typer.Argument(help="Which run; default: the one at hand, else the last.")] = None,
    folder: FederationOption = HERE,
    as_json: JsonOption = False,
) -> None:
    """report.json and report.html of a run, finished or not: what sites may tell, and nothing else."""
    import json

    from rich.console import Console

    from deploy.federation import open_federation
    from deploy.incidents import incidents
    from deploy.runs import run_of
    from server.journal import read_events
    from server.outcome import write_federation_report
    from server.report import summary_table

    federation = open_federation(folder)
    run = run_of(federation.runs, name)
    try:
        journal = read_events(run / "journal.jsonl")
        failed = incidents(read_events(federation.state / "supervisor.jsonl"), {run.name: journal})
    except UserError as error:  # a run's report does not hang on the supervisor's journal
        typer.echo(f"what failed on this machine is left out: {error}", err=True)
        failed = []
    result, html = write_federation_report(run, failed)
    if as_json:
        typer.echo(json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False))
        return
    console = Console()
    console.print(summary_table(result))
    console.print(f"Report: {html}", soft_wrap=True, highlight=False, markup=False)


@audit_app.command("verify")
def audit_verify(
    folder: EitherOption = None,
    anchor: Annotated[
        str | None, typer.Option(help="A head noted elsewhere, for example at the other end: it must be in the chain.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Whether the audit log is whole: no line edited, deleted, inserted, moved or cut off.

    Exit code 0: it is. 1: it is not; --json then holds the fault.

    Example: medsegfed audit verify --anchor 9f31...
    """
    import json

    from medsegdiff.chained_log import AUDIT_LOG, LogDamaged, audit_report, verify_log

    place, _ = _place(folder)
    path = place / AUDIT_LOG
    if as_json:
        try:
            found = verify_log(path, anchor)
        except LogDamaged as error:
            typer.echo(json.dumps({"whole": False, "fault": str(error)}, ensure_ascii=False))
            raise typer.Exit(1) from error
        typer.echo(json.dumps({"whole": True, "lines": found.lines, "head": found.head}))
        return
    whole, lines = audit_report(path, anchor)
    typer.echo("\n".join(lines))
    if not whole:
        raise typer.Exit(1)


def _me() -> str:
    """Who types; containers may run under a user that has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _place(folder: Path | None) -> tuple[Path, bool]:
    """A folder, and whether it is a federation's (else a site's)."""
    candidates = [folder] if folder is not None else [Path(), Path(os.environ.get(FEDERATION) or HERE)]
    for place in candidates:
        for name, is_federation in (("site.yaml", False), ("federation.yaml", True)):
            if (place / name).is_file():
                return place, is_federation
    looked = " and ".join(str(place.resolve()) for place in candidates)
    raise UserError(f"neither site.yaml nor federation.yaml in {looked}. Name the folder with --folder.")


def _tell(event: str, facts: dict[str, Any]) -> None:
    """What a long-running end did, as a line on its terminal or in its service log."""
    said = ", ".join(f"{key} {value}" for key, value in facts.items())
    typer.echo(f"{event.replace('_', ' ')}: {said}" if said else event.replace("_", " "))
