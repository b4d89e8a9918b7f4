"""What a run leaves behind: report.json for programs, metrics.csv for researchers, report.html for people.

metrics.csv is one number a row: round, arm, site, target, metric, value. A number that is not known has no row.
- `loss` and `dice` are the federated learning curves, with their round.
- `test_dice` and `test_hd95_mm` (no round) are the final models, the federated one that of report.json's
  `progress.scored`, on each site's held-out patients; rows with a target are for that target alone, rows without one
  for the mean over targets.
- `test_dice_mean` and `test_dice_worst` (no round, no site) are an arm's mean over sites and its lowest site.
- `epsilon` (no round) is the privacy loss a site has spent.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from medsegdiff.files import write_atomic
from server import plots
from server import report_text as text
from server.report_schema import Arm, Example, Report, Setting, SiteScores, parse_report

__all__ = ["Example", "check_report", "summary_table", "write_report"]

CSV_COLUMNS = ("round", "arm", "site", "target", "metric", "value")


def check_report(report: dict[str, Any]) -> None:
    """Check a report against the schema in report_schema.py.

    Raises:
        ValueError: names the key that holds NaN or infinity, is missing or unknown, or has a wrong type or range.
    """
    parse_report(report)


def write_report(folder: Path, report: dict[str, Any], examples: Sequence[Example] = ()) -> Path:
    """Write report.json (keys in the order given), metrics.csv and report.html into a run folder.

    Each file is replaced whole or not at all; nothing is written unless the report passes `check_report`. Equal
    arguments give equal bytes.

    Returns:
        The path of report.html: one file that needs no other and requests nothing from a network.

    Raises:
        ValueError: the report fails `check_report`.
        UserError: the folder cannot be written.
    """
    parsed = parse_report(report)
    page = _page(parsed, examples)
    write_atomic(folder / "report.json", (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    write_atomic(folder / "metrics.csv", _metrics_csv(parsed).encode())
    write_atomic(folder / "report.html", page.encode())
    return folder / "report.html"


def _metrics_csv(report: Report) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for *place, value in _measurements(report):
        if value is not None:
            writer.writerow([*place, value])
    return buffer.getvalue()


def _measurements(report: Report) -> Iterator[tuple[int | str, str, str, str, str, float | None]]:
    """Rows of metrics.csv, unknown values included."""
    for entry in report.history:
        yield entry.round, "federated", entry.site, "", "loss", entry.loss
        yield entry.round, "federated", entry.site, "", "dice", entry.dice
    for arm in report.arms:
        for name, site in report.sites.items():
            yield "", arm, name, "", "test_dice", site.dice_of(arm)
            for target in (site.dice_by_target or {}).get(arm) or {}:
                yield "", arm, name, target, "test_dice", site.target_dice(arm, target)
            yield "", arm, name, "", "test_hd95_mm", site.hd95_of(arm)
        yield "", arm, "", "", "test_dice_mean", report.mean_of(arm)
        yield "", arm, "", "", "test_dice_worst", report.worst_of(arm)
    for name, site in report.sites.items():
        yield "", "federated", name, "", "epsilon", site.epsilon


def summary_table(report: dict[str, Any]) -> Table:
    """The end of a run on a terminal: per site its patients, the Dice of each arm and HD95; then mean and worst site.

    Raises:
        ValueError: the report fails `check_report`.
    """
    parsed = parse_report(report)
    arms = parsed.present_arms
    compared = {"federated", "local"} <= set(arms)
    table = Table(title=Text(f"{parsed.run}: Dice on held-out patients"), title_justify="left")
    table.add_column("Site")
    table.add_column("Patients\ntrain / test", justify="right")
    for arm in arms:
        table.add_column(text.ARM_NAMES[arm].replace(" ", "\n"), justify="right")
    if compared:
        table.add_column("Gain over\nlocal", justify="right")
    table.add_column("HD95 mm\nfederated", justify="right")
    rows = [_summary_row(name, site, arms) for name, site in parsed.sites.items()] + _summary_ends(parsed, arms)
    for number, (name, patients, dice, hd95) in enumerate(rows):
        cells = [Text(name), Text(patients), *(Text(text.dice_text(value)) for value in dice.values())]
        if compared:
            gain = text.difference(dice["federated"], dice["local"])
            cells.append(Text(text.signed_text(gain), style="bold yellow" if gain is not None and gain < 0 else ""))
        table.add_row(*cells, hd95, end_section=number == len(parsed.sites) - 1)
    return table


SummaryRow = tuple[str, str, dict[Arm, float | None], str]


def _summary_row(name: str, site: SiteScores, arms: tuple[Arm, ...]) -> SummaryRow:
    return name, _patients(site), {arm: site.dice_of(arm) for arm in arms}, _hd95(site, "federated")


def _summary_ends(report: Report, arms: tuple[Arm, ...]) -> list[SummaryRow]:
    mean, worst = _hd95_over_sites(report, "federated")
    return [
        ("Mean", _total_pair(report), {arm: report.mean_of(arm) for arm in arms}, text.millimetres_text(mean)),
        ("Worst site", "", {arm: report.worst_of(arm) for arm in arms}, text.millimetres_text(worst)),
    ]


def _pair(train: int | None, test: int | None) -> str:
    return text.NONE if train is None and test is None else f"{text.count_text(train)} / {text.count_text(test)}"


def _total_pair(report: Report) -> str:
    train, test = text.total_patients(report)
    return "" if train is None and test is None else f"{_pair(train, test)} in all"


def _patients(site: SiteScores) -> str:
    return _pair(site.patients.train, site.patients.test) if site.patients else text.NONE


def _hd95(site: SiteScores, arm: Arm) -> str:
    """Millimetres, with the number of patients without a distance: leaving them out flatters the figure."""
    undefined = site.undefined_of(arm)
    return text.millimetres_text(site.hd95_of(arm)) + (f" ({undefined} undef.)" if undefined else "")


def _hd95_over_sites(report: Report, arm: Arm) -> tuple[float | None, float | None]:
    """Mean and largest HD95 over sites; None unless all sites have one, for arms are compared over the same sites."""
    values = [site.hd95_of(arm) for site in report.sites.values()]
    known = [value for value in values if value is not None]
    return (sum(known) / len(known), max(known)) if len(known) == len(values) else (None, None)


def _page(report: Report, examples: Sequence[Example]) -> str:
    environment = Environment(
        loader=PackageLoader("server"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"dice": text.dice_text, "count": text.count_text, "signed": text.signed_text}
    return environment.get_template("report.html.j2").render(
        report=report,
        headline=text.headline(report),
        figures=text.key_figures(report),
        caveats=text.caveats(report),
        arm_names=text.ARM_NAMES,
        arms=report.present_arms,
        kept=text.kept_part(report),
        second_models=text.second_models(report),
        rows=[_site_row(report, name) for name in report.sites],
        ends=_end_rows(report),
        models_shown=text.models_shown(report),
        bars=_svg(plots.dice_bars(report)),
        loss=_svg(plots.learning_curves(report, "loss")),
        curves=_svg(plots.learning_curves(report, "dice")),
        targets=_targets(report),
        matrix=_matrix(report),
        examples=[(example, plots.example_panels(example)) for example in examples],
        target_colours=plots.TARGET_COLOURS,
        uncertainty_scale=plots.gradient(plots.uncertainty_on_grey),
        participation=_participation(report),
        refused=any(site.refusals for site in report.sites.values()),
        begun=report.unfinished is None or report.unfinished.committed > 0,
        incidents=_incidents(report),
        settings=_settings(report),
        dash=text.NONE,
        epsilon=any(site.epsilon is not None for site in report.sites.values()),
    )


def _svg(figure: str | None) -> Markup | None:
    # Matplotlib has escaped every text in it; escaping again would show the page its source.
    return None if figure is None else Markup(figure)


def _site_row(report: Report, name: str) -> dict[str, Any]:
    site = report.sites[name]
    return {
        "name": name,
        "patients": _patients(site),
        "dice": [site.dice_of(arm) for arm in report.present_arms],
        "gain": text.difference(site.dice_of("federated"), site.dice_of("local")),
        "hd95": [_hd95(site, arm) for arm in report.present_arms],
        "epsilon": text.NONE if site.epsilon is None else f"{site.epsilon:.2f}",
    }


def _end_rows(report: Report) -> list[dict[str, Any]]:
    """The rows under the sites: mean and worst site; none where no arm has a score."""
    if not report.present_arms:
        return []
    distances = [_hd95_over_sites(report, arm) for arm in report.present_arms]
    rows = []
    for place, (name, score) in enumerate((("Mean", report.mean_of), ("Worst site", report.worst_of))):
        rows.append(
            {
                "name": name,
                "patients": _total_pair(report) if place == 0 else "",
                "dice": [score(arm) for arm in report.present_arms],
                "gain": text.difference(score("federated"), score("local")),
                "hd95": [text.millimetres_text(both[place]) for both in distances],
                "epsilon": "",
            }
        )
    return rows


def _targets(report: Report) -> dict[str, Any] | None:
    """Dice per target: for each target a score per arm, for each site; None when there is one target or no score."""
    scored: dict[str, None] = {}  # keeps the order in which targets are given
    for site in report.sites.values():
        for by_target in (site.dice_by_target or {}).values():
            scored |= dict.fromkeys(by_target or {})
    if len(scored) < 2:
        return None
    rows = {
        name: [[site.target_dice(arm, target) for arm in report.present_arms] for target in scored]
        for name, site in report.sites.items()
    }
    return {"names": list(scored), "rows": rows}


def _matrix(report: Report) -> dict[str, Any] | None:
    """The cross-site matrix with a colour per cell, its scale ends at the tenths around the numbers."""
    table = report.cross_site
    known = [value for row in table.dice for value in row if value is not None] if table else []
    if table is None or not known:
        return None
    low, high = int(min(known) * 10) / 10, -int(-max(known) * 10 // 1) / 10
    rows = []
    for model, scores in zip(table.models, table.dice, strict=True):
        cells = [
            {"dice": dice, "own": model == site, "colours": None if dice is None else plots.heat(dice, low, high)}
            for site, dice in zip(table.sites, scores, strict=True)
        ]
        complete = [dice for dice in scores if dice is not None]
        mean = sum(complete) / len(complete) if len(complete) == len(scores) else None
        rows.append({"model": model, "single": model in table.sites, "cells": cells, "mean": mean})
    scale = plots.gradient(lambda place: plots.heat(low + place * (high - low), low, high)[0])
    return {"sites": table.sites, "rows": rows, "low": low, "high": high, "scale": scale}


def _participation(report: Report) -> list[dict[str, str]]:
    """The sites that missed a round, had an update rejected, refused to take part, or skipped a case."""
    return [
        {
            "name": name,
            "absent": text.rounds_text(site.absent_rounds) or text.NONE,
            "rejected": "; ".join(
                [f"round {fault.round}: {fault.reason}" for fault in site.rejected_rounds]
                + [f"suspended in {text.rounds_text(site.suspended_rounds)}"] * bool(site.suspended_rounds)
            )
            or text.NONE,
            "refusals": "; ".join(
                said.reason + (f" ({said.times} times)" if said.times > 1 else "") for said in site.refusals
            )
            or text.NONE,
            "faults": text.count_text(site.faults),
        }
        for name, site in report.sites.items()
        if site.absent_rounds or site.rejected_rounds or site.suspended_rounds or site.refusals or site.faults
    ]


def _incidents(report: Report) -> list[dict[str, str]]:
    return [
        {
            "when": f"{datetime.fromtimestamp(found.time, UTC):%Y-%m-%d %H:%M:%S}",
            "what": found.what,
            "done": found.done if found.seconds is not None else "not yet",
            "after": f"{found.seconds:.0f} s" if found.seconds is not None else text.NONE,
        }
        for found in report.incidents
    ]


def _settings(report: Report) -> list[tuple[str, str]]:
    """What is needed to repeat the run, in words."""
    strategy = _listed({key: value for key, value in report.strategy.items() if key != "name"})
    model = _listed({key: value for key, value in report.model.items() if key not in ("preset", "hash")})
    parts = ", ".join(
        f"{part} {text.duration_text(spent)}"
        for part, spent in report.seconds.items()
        if part != "total" and spent is not None
    )
    pairs = [
        ("Strategy", f"{report.strategy['name']}" + (f" ({strategy})" if strategy else "")),
        ("Rounds", text.rounds_count(report)),
        ("Local steps a round", text.count_text(report.local_steps)),
        *_how_trained(report),
        ("Seed", str(report.seed)),
        ("Engine", report.engine),
        ("Model", f"MedSegDiff, {report.model['preset'] or 'own settings'} ({model})"),
        ("Time", text.duration_text(report.seconds["total"]) + (f" ({parts})" if parts else "")),
        ("Weights sent", f"{text.bytes_text(report.bytes.up)} up, {text.bytes_text(report.bytes.down)} down"),
    ]
    if report.dataset is not None:
        facts = report.dataset
        pairs[:0] = [
            ("Data set", f"{facts.name} ({facts.modality}; {facts.licence or 'licence not stated'})"),
            ("Channels", ", ".join(facts.channels)),
            ("Targets", ", ".join(facts.targets)),
        ]
    if report.model.get("hash"):
        pairs.append(("Model's SHA-256", str(report.model["hash"])))
    if report.hardware is not None:
        pairs.append(("Hardware", _listed(report.hardware)))
    applications = {site.application for site in report.sites.values()} - {None}
    if applications:
        pairs.append(("Program at the sites", ", ".join(sorted(str(name)[:16] for name in applications))))
    programs = ", ".join(f"{name} {version}" for name, version in report.software.items() if version)
    return [*pairs, ("Software", programs)] if programs else pairs


def _how_trained(report: Report) -> Iterator[tuple[str, str]]:
    """Training, sites a round and masks; a report of an earlier version tells none of them."""
    if report.training:
        private = "; private sites have a q and a clip of their own in place of batch size and gradient clip"
        yield "Training", _listed(report.training) + (private if "privacy_train" in report.training else "")
    if report.participation is not None:
        yield "Sites a round", text.participation_text(report.participation)
    if report.sampling:
        yield "Masks", _listed(report.sampling)


def _listed(settings: Mapping[str, Setting]) -> str:
    return ", ".join(_setting(key, value) for key, value in settings.items())


def _setting(key: str, value: Setting) -> str:
    if isinstance(value, tuple):
        shown = str(list(value))
    elif isinstance(value, int) and value >= 10_000:
        shown = f"{value:,}"
    else:
        shown = "none" if value is None else str(value)
    return f"{key.replace('_', ' ')} {shown}"
