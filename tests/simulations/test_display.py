"""What is shown while a simulation works: plain lines without a terminal, a live line with one."""

from __future__ import annotations

import io

from rich.console import Console

from medsegdiff.progress import Progress, report
from simulations.display import Display, single_bar


def shown(terminal: bool, *reports: Progress) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, color_system=None)
    display = Display(console, rounds=4, units=10, case_units=0.5, round_units=2)
    with display.live():
        for one in reports:
            report(one)
    report(Progress("round", 9, 9, round=9))  # nobody listens any more
    return out.getvalue()


ROUND = Progress("round", 2, 4, round=2, loss=0.125)


def test_plain_lines_tell_round_loss_share_and_rest() -> None:
    """A round is always told; single steps are not."""
    text = shown(False, Progress("train", 1, 2, "alder", 1, 0.5), ROUND, Progress("round", 2, 4, round=2, dice=0.75))
    assert len(text.strip().splitlines()) == 2
    assert "federated · round 2/4 · loss 0.125 | 40 % | about" in text
    assert "Dice 0.750" in text
    assert "\x1b" not in text


def test_a_terminal_gets_one_live_line() -> None:
    """The bar shows the same facts, and never more than the whole."""
    text = shown(True, *[Progress("train", n, 20, "alder", 1, 0.5) for n in range(20)], ROUND)
    assert "federated · round 2/4" in text
    assert "100 %" in text
    assert "200 %" not in text


def test_a_single_bar_is_silent_without_a_terminal(capsys) -> None:
    """Short work leaves nothing in a log."""
    with single_bar("segment"):
        report(Progress("segment", 1, 2))
    assert capsys.readouterr() == ("", "")


def test_another_arm_does_not_show_the_figures_of_the_one_before() -> None:
    """The federation's Dice beside a local training would be taken for the local model's."""
    out = io.StringIO()
    display = Display(
        Console(file=out, width=200, color_system=None), rounds=4, units=10, case_units=0.5, round_units=2
    )
    with display.live():
        report(Progress("round", 4, 4, round=4, loss=0.125, dice=0.75))
        display.arm = "local-alder"
        report(Progress("round", 4, 4, "local-alder"))
    last = out.getvalue().splitlines()[-1]
    assert last.startswith("local-alder")
    assert "Dice" not in last
    assert "loss" not in last
