"""Epsilon over the rounds of a plan and over the reservations of a ledger, as PNG.

Equal input gives equal bytes: Matplotlib's object API without pyplot, its default settings, no date in any file.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from client.privacy.account import Account
from client.privacy.planning import Plan
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from server.plots import DOTTED, FAINT, INK, SETTINGS, SITE_COLOURS, shortened

MARKERS = "osDv^<>P"  # one a colour: told apart without it


def plot_plan(plan: Plan, file: Path) -> None:
    """Epsilon over rounds. Raises UserError where the file cannot be written."""
    curve = plan.curve()

    def draw(axes: Axes) -> None:
        axes.plot([0, *(n for n, _ in curve)], [0, *(e for _, e in curve)], color=SITE_COLOURS[1], lw=1.8)
        axes.plot([n for n, _ in curve], [e for _, e in curve], color=SITE_COLOURS[1], ls="", marker="o", ms=3.5)
        _limit_line(axes, plan.limit, "limit")
        axes.set_title(
            f"sigma {plan.sigma:.3g}, q {plan.q:g}, {plan.steps_per_round} steps a round, delta {plan.delta:g}",
            fontsize=10,
        )
        axes.set(xlabel="rounds", ylabel="epsilon spent", xlim=(0, None), ylim=(0, 1.12 * plan.limit))

    _write(file, draw)


def plot_ledger(account: Account, file: Path) -> None:
    """Epsilon after each reservation; a colour and a mark a run, of the last eight; where a write-off began anew.

    Raises:
        UserError: nothing was reserved yet, or the file cannot be written.
    """
    if not account.entries or account.ceiling is None:
        raise UserError("nothing was ever reserved here, so there is nothing to draw. Leave --plot out.")
    limit = account.ceiling.epsilon
    numbered = list(enumerate(account.entries, 1))
    runs = list(dict.fromkeys(entry.run for entry in account.entries))[-len(SITE_COLOURS) :]

    def draw(axes: Axes) -> None:
        values = [entry.epsilon for entry in account.entries]
        axes.plot([n for n, _ in numbered], values, color=FAINT, lw=1.0, drawstyle="steps-post")
        for run, colour, marker in zip(runs, SITE_COLOURS, MARKERS, strict=False):
            points = [(n, entry.epsilon) for n, entry in numbered if entry.run == run]
            axes.plot(*zip(*points, strict=True), ls="", ms=4, marker=marker, color=colour, label=shortened(run))
        _limit_line(axes, limit, "ceiling")
        if account.written_off is not None:
            _write_off_line(axes, len(account.entries) - len(account.counted) + 0.5, account.written_off.epsilon)
        axes.set(xlabel="reservation", ylabel="epsilon after it", xlim=(0, None), ylim=(0, 1.12 * max(limit, *values)))
        # Beside the axes: inside them a short ledger's points lie anywhere, and its marks look like some of them.
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, borderaxespad=0)

    _write(file, draw)


def _limit_line(axes: Axes, limit: float, name: str) -> None:
    axes.axhline(limit, color=INK, lw=1.2, ls=DOTTED)
    axes.annotate(
        f"{name} {limit:g}", (0.01, limit), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", fontsize=9, color=INK,
    )  # fmt: skip


def _write_off_line(axes: Axes, after: float, epsilon: float) -> None:
    axes.axvline(after, color=INK, lw=1.0, ls=DOTTED)
    axes.annotate(
        f"all before written off as {epsilon:g}", (after, 0), xycoords=("data", "axes fraction"), xytext=(-3, 4),
        textcoords="offset points", fontsize=9, color=INK, rotation=90, ha="right", va="bottom",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def _write(file: Path, draw: Callable[[Axes], None]) -> None:
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS | {"axes.titlecolor": INK})
        figure = Figure(figsize=(6.4, 3.8), dpi=130, layout="constrained")
        axes = figure.add_subplot()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        draw(axes)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})  # type: ignore[no-untyped-call]
    write_atomic(file, buffer.getvalue())
