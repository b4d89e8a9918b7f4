"""The words of a report: its headline, its key figures, its caveats, and how each number is written."""

from __future__ import annotations

from dataclasses import dataclass

from server.report_schema import Arm, Participation, Report
from server.rounds import RunState

ARM_NAMES: dict[Arm, str] = {
    "federated": "Federated",
    "personalised": "Personalised",
    "local": "Local only",
    "pooled": "Pooled",
}
NONE = "–"  # an en dash: the figure does not apply or was not reported
# By kind of personalisation: how a site's second model is made, or what of the common one it keeps to itself.
SECOND_MODELS = {
    "ditto": "trained beside the federated one and pulled towards it (Ditto)",
    "fine_tune": "trained on from the federated one (fine-tuning)",
}
KEPT = {"local_norms": "normalisation layers (FedBN)", "shared_encoder": "decoder (FedPer)"}
FEW_PATIENTS = 10  # below this a single patient moves a site's mean Dice by up to 0.1 or more


@dataclass(frozen=True)
class KeyFigure:
    """One figure in large type with what it is and what to hold it against."""

    label: str
    value: str
    detail: str = ""


def dice_text(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def millimetres_text(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def signed_text(value: float | None) -> str:
    """A difference with its sign; the true minus sign lines up with the plus sign."""
    return NONE if value is None else f"{value:+.3f}".replace("-", "−")


def count_text(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def bytes_text(value: int | None) -> str:
    """Decimal units, as network equipment counts."""
    if value is None:
        return NONE
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:,.0f} {unit}"
    return f"{value} bytes"


def duration_text(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def rounds_text(rounds: tuple[int, ...]) -> str:
    """Round numbers with runs joined: (3, 5, 6, 7) becomes "3, 5–7"."""
    runs: list[list[int]] = []
    for number in sorted(set(rounds)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def participation_text(asked: Participation) -> str:
    """ "all 5 asked; a round counts with 4 updates"."""
    if asked.asked == asked.sites:
        who = f"all {asked.sites} asked"
    else:
        spare = f", and {asked.spare} more to spare" if asked.spare else ""
        who = f"{asked.asked} of {asked.sites} asked, drawn by the run's seed{spare}"
    return f"{who}; a round counts with {plural(asked.required, 'update')}"


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def difference(ours: float | None, theirs: float | None) -> float | None:
    """ours - theirs of the numbers as printed, so that a reader's own subtraction agrees; below 0.001 is a tie."""
    return None if ours is None or theirs is None else round(round(ours, 3) - round(theirs, 3), 3)


def lost_sites(report: Report) -> list[str]:
    """The sites whose own local model is better on their test patients than the federated one."""
    return [
        name
        for name, site in report.sites.items()
        if (difference(site.dice_of("federated"), site.dice_of("local")) or 0) < 0
    ]


def compared_sites(report: Report) -> list[str]:
    """The sites that means and worst sites are over: scored in federated, local and pooled training, where these were
    carried out. All, where no site's own scores are told."""
    arms = [arm for arm in report.present_arms if arm != "personalised"]
    scored = [name for name, site in report.sites.items() if all(site.dice_of(arm) is not None for arm in arms)]
    return scored or list(report.sites)


def worst_site(report: Report, arm: Arm) -> str | None:
    """Name of the site, of those compared, where `arm` has its lowest Dice."""
    scored = {name: dice for name in compared_sites(report) if (dice := report.sites[name].dice_of(arm)) is not None}
    return min(scored, key=lambda name: scored[name]) if scored else None


STATES: dict[RunState, str] = {
    "not started": "The run has not begun.",
    "running": "The run goes on.",
    "paused": "The run waits for its sites.",
    "stopped": "The run was stopped before its end.",
    "failed": "The run broke off before its end.",
    "finished": "",
}


def headline(report: Report) -> str:
    """What came of the run, in one paragraph: every loss stands beside the gains, at the same size."""
    progress = report.unfinished
    if progress is None:
        return _result(report, f"After {rounds_run(report)}")
    if not progress.committed:
        return f"{STATES[progress.state]} Of {plural(report.rounds, 'round')}, none is committed yet."
    if progress.scored is None:
        sites = plural(len(report.sites), "site")
        return f"{STATES[progress.state]} {progress.committed} of {report.rounds} rounds over {sites}, not scored yet."
    scored = progress.scored
    text = f"{STATES[progress.state]} " + _result(report, f"After {scored} of {plural(report.rounds, 'round')}")
    later = tuple(range(scored + 1, progress.committed + 1))
    if later:
        text += f" Round {rounds_text(later)} stands as well and is not scored yet."
    return text


def rounds_count(report: Report) -> str:
    """ "10", or "3 of 10" of a run that has not come to its end, or ended early."""
    told = report.progress
    early = told is not None and (told.state != "finished" or told.committed < report.rounds)
    return f"{told.committed} of {report.rounds}" if told is not None and early else str(report.rounds)


def rounds_run(report: Report) -> str:
    """Rounds of a run that is over: "10 rounds"; where it ended early, "3 of 10 rounds (scores of round 1's model)"."""
    told = report.progress
    if told is None:
        return plural(report.rounds, "round")
    early = f"{told.committed} of " if told.committed < report.rounds else ""
    another = f" (scores of round {told.scored}'s model)" if told.scored not in (None, told.committed) else ""
    return f"{early}{plural(report.rounds, 'round')}{another}"


def models_shown(report: Report) -> str:
    """Of which models the last scores are: "final models", or the scored round's, beside the other arms' final ones."""
    told = report.progress
    if told is None or told.scored is None or (report.unfinished is None and told.scored == told.committed):
        return "final models"
    shown = [arm for arm in report.present_arms if arm in ("federated", "personalised")]
    model = f"the {'model' if len(shown) == 1 else 'models'} of round {told.scored}"
    beside = " and ".join(ARM_NAMES[arm].lower() for arm in report.present_arms if arm not in shown)
    return f"{' and '.join(shown)}: {model}; {beside}: final models" if beside else model


def _result(report: Report, when: str) -> str:
    mean, worst = report.mean_of("federated"), report.worst_of("federated")
    over = len(compared_sites(report))
    all_sites = plural(len(report.sites), "site")
    after = f"{when} over {all_sites}" if over == len(report.sites) else f"{when}, over {over} of {all_sites}"
    if mean is None:
        return f"{after}, no Dice of the federated model was reported."
    gain = difference(mean, report.mean_of("local"))
    if gain is None:
        site = worst_site(report, "federated")
        lowest = f", and {dice_text(worst)} at the worst site" if worst is not None else ""
        named = f" ({site})" if site and lowest else ""
        text = f"{after}, {federated_model(report)} reaches a mean Dice of {dice_text(mean)}{lowest}{named}"
        rest = "" if "pooled" in report.present_arms else _no_comparison()
        return f"{text}{_against_pooled(report)}.{_personalised(report)}{rest}"
    low_gain = difference(worst, report.worst_of("local"))
    text = (
        f"{after}, {_verdict(federated_model(report), gain, low_gain)}: mean Dice {dice_text(mean)} against "
        f"{dice_text(report.mean_of('local'))} ({signed_text(gain)})"
    )
    if low_gain is not None:
        text += (
            f", worst site {dice_text(worst)} against {dice_text(report.worst_of('local'))} ({signed_text(low_gain)})"
        )
    return f"{text}{_against_pooled(report)}.{_losses(report)}{_personalised(report)}"


def kept_part(report: Report) -> str | None:
    """The part of the common model that each site keeps to itself."""
    return KEPT.get(str(report.strategy.get("personalisation")))


def federated_model(report: Report) -> str:
    """What the federated arm is, with the part that is each site's own."""
    kept = kept_part(report)
    return "the federated model" + (f" with each site's own {kept}" if kept else "")


def second_models(report: Report) -> str:
    """How the sites' own second models are made."""
    return SECOND_MODELS.get(str(report.strategy.get("personalisation")), "kept by each site")


def _personalised(report: Report) -> str:
    mean, worst = report.mean_of("personalised"), report.worst_of("personalised")
    if mean is None:
        return ""
    at_worst = f", {dice_text(worst)} at the worst site" if worst is not None else ""
    return f" The sites' own second models, {second_models(report)}, reach {dice_text(mean)}{at_worst}."


def _no_comparison() -> str:
    return " No other model was trained beside it, so what federation gained is not measured here."


def _verdict(subject: str, gain: float, low_gain: float | None) -> str:
    """The claim that the two differences bear out, and no more."""
    if low_gain is None or ((gain > 0) == (low_gain > 0) and (gain < 0) == (low_gain < 0)):
        if gain == 0:
            return f"{subject} ties with local-only training"
        return f"{subject} {'beats' if gain > 0 else 'is worse than'} local-only training"
    on_mean = "beats" if gain > 0 else "is worse than" if gain < 0 else "ties with"
    at_worst = "beats it" if low_gain > 0 else "is worse" if low_gain < 0 else "ties"
    link = "and" if gain >= 0 and low_gain >= 0 else "but"
    return f"{subject} {on_mean} local-only training on the mean {link} {at_worst} at the worst site"


def _against_pooled(report: Report) -> str:
    gap = difference(report.mean_of("federated"), report.mean_of("pooled"))
    if gap is None:
        return ""
    pooled = f"one model trained on all data pooled ({dice_text(report.mean_of('pooled'))})"
    if gap == 0:
        return f"; on the mean it ties with {pooled}"
    return f"; on the mean it is {abs(gap):.3f} {'under' if gap < 0 else 'over'} {pooled}"


def _losses(report: Report) -> str:
    lost = lost_sites(report)
    if not lost:
        return ""
    compared = [
        s for s in report.sites.values() if s.dice_of("federated") is not None and s.dice_of("local") is not None
    ]
    each = ", ".join(
        f"{name} ({dice_text(report.sites[name].dice_of('federated'))} against "
        f"{dice_text(report.sites[name].dice_of('local'))})"
        for name in lost
    )
    return f" It loses to the site's own model at {len(lost)} of {plural(len(compared), 'site')}: {each}."


def key_figures(report: Report) -> list[KeyFigure]:
    """The few numbers that a reader looks for first."""
    lowest = worst_site(report, "federated")
    figures = [
        KeyFigure("Mean Dice, federated", dice_text(report.mean_of("federated")), _others(report, "mean")),
        KeyFigure(
            f"Worst site ({lowest})" if lowest else "Worst site",
            dice_text(report.worst_of("federated")),
            _others(report, "worst"),
        ),
        _patients_figure(report),
        KeyFigure(
            "Rounds",
            rounds_count(report),
            f"of {plural(report.local_steps, 'local step')}" if report.local_steps is not None else "",
        ),
        KeyFigure("Weights sent up", bytes_text(report.bytes.up), f"down: {bytes_text(report.bytes.down)}"),
        KeyFigure("Time", duration_text(report.seconds["total"]), f"engine: {report.engine}"),
    ]
    spent = [site.epsilon for site in report.sites.values() if site.epsilon is not None]
    if spent:
        covered = f"{len(spent)} of {plural(len(report.sites), 'site')} with patient-level privacy"
        figures.insert(2, KeyFigure("Largest privacy loss ε", f"{max(spent):.2f}", covered))
    return figures


def _others(report: Report, which: str) -> str:
    """The same figure of the arms beside the federated one."""
    others: tuple[Arm, ...] = ("personalised", "local", "pooled")
    values = {arm: report.mean_of(arm) if which == "mean" else report.worst_of(arm) for arm in others}
    return ", ".join(
        f"{ARM_NAMES[arm].lower()} {dice_text(value)}" for arm, value in values.items() if value is not None
    )


def _patients_figure(report: Report) -> KeyFigure:
    train, test = total_patients(report)
    if train is None and test is None:
        return KeyFigure("Patients", NONE, "not reported")
    sites = plural(len(report.sites), "site")
    return KeyFigure("Patients", f"{count_text(train)} + {count_text(test)}", f"train + test, at {sites}")


def total_patients(report: Report) -> tuple[int | None, int | None]:
    """Patients over all sites (train, test); None unless every site gave its number."""
    train = [site.patients.train if site.patients else None for site in report.sites.values()]
    test = [site.patients.test if site.patients else None for site in report.sites.values()]
    return _total(train), _total(test)


def _total(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def caveats(report: Report) -> list[str]:
    """The run's own notes, then what the numbers themselves call for."""
    found = list(report.notes)
    if "federated" in report.present_arms:
        found.append(
            f"One run with one seed ({report.seed}): the spread between seeds is not known, "
            "and small differences may be chance."
        )
    small = {
        name: site.patients.test
        for name, site in report.sites.items()
        if site.patients and site.patients.test is not None and site.patients.test < FEW_PATIENTS
    }
    if small:
        each = ", ".join(f"{name} {count}" for name, count in small.items())
        effect = "decide the order of the arms" if len(report.present_arms) > 1 else "move the mean Dice by 0.1 or more"
        found.append(
            f"Fewer than {FEW_PATIENTS} test patients at {plural(len(small), 'site')} ({each}): "
            f"a single patient can {effect} there."
        )
    for arm in report.present_arms:
        undefined = sum(site.undefined_of(arm) for site in report.sites.values())
        if undefined:
            found.append(
                f"{ARM_NAMES[arm]}: HD95 is undefined {plural(undefined, 'time')} (exactly one of the two masks is "
                "empty) and leaves those cases out, which flatters it; Dice counts them."
            )
    return found
