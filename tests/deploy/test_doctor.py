"""How `doctor` runs its checks and shows them: nothing stops or hangs the others, nothing is told that is a name."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator

import pytest
from rich.console import Console

from deploy.doctor.checks import (
    Check,
    Names,
    Probe,
    as_plain,
    checks_table,
    exit_code,
    plain_text,
    reason_of,
    run_probes,
    summary_line,
    within,
    without_names,
)
from medsegdiff.errors import UserError

CANARY = "Zwetschgenknoedel"
WELL = Check("well", "ok", "all is well")


def text_of(checks: list[Check], width: int = 80) -> str:
    """The report as a terminal of that width shows it."""
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(checks_table(checks))
    return console.export_text()


def fails(error: Exception) -> Iterator[Check]:
    """A probe that breaks off after its first check."""
    yield WELL
    raise error


def test_a_check_that_crashes_is_one_failed_line_and_the_others_go_on() -> None:
    """What it had found before stays."""
    probes = [Probe("first", lambda: fails(ValueError(CANARY))), Probe("second", lambda: [WELL])]
    checks = run_probes(probes, Names())
    assert [(c.name, c.status) for c in checks] == [("well", "ok"), ("first", "fail"), ("well", "ok")]
    assert checks[1].detail == "this check broke off: ValueError"


def test_a_check_that_hangs_is_left_behind() -> None:
    """A network folder that never answers costs its time limit and no more."""
    stuck = threading.Event()

    def hang() -> Iterator[Check]:
        yield WELL
        stuck.wait(20)

    started = time.monotonic()
    checks = run_probes([Probe("hung", hang, 0.2), Probe("next", lambda: [WELL])], Names())
    assert time.monotonic() - started < 2
    assert [c.status for c in checks] == ["ok", "fail", "ok"]
    assert "no answer within 0.2 s" in checks[1].detail
    stuck.set()


def test_work_within_a_time_limit_gives_its_result_or_its_own_error() -> None:
    """None is a result, and an error is that of the work."""
    assert within(5, lambda: None) is None
    with pytest.raises(KeyError):
        within(5, lambda: {}["a"])
    with pytest.raises(TimeoutError):
        within(0.05, lambda: time.sleep(2))


@pytest.mark.parametrize(
    "error",
    [
        ValueError(f"cannot read {CANARY}"),
        FileNotFoundError(2, "No such file or directory", f"/data/{CANARY}.nii.gz"),
        UserError(f"/data/Dr {CANARY}/cases.csv, line 3: case '{CANARY}' has no patient_id. Fill it in."),
        UserError(f"data/{CANARY}/x: column is missing, found {CANARY}, {CANARY}; no case can be read."),
        UserError(f'site.yaml: device: expected a number; found "{CANARY}".'),
        UserError(f"site.yaml: device: expected a number; found ['{CANARY}', 3]."),
        UserError(
            f'site.yaml: is not valid YAML: mapping in "x", line 3, column 9: data: {CANARY}: 3 ^. Mend that line.'
        ),
        KeyError(CANARY),
    ],
)
def test_the_reason_of_a_crash_names_nobody(error: Exception) -> None:
    """Kinds and fixed words stay; paths, quoted and found texts go. On the site's own terminal all is told."""
    hidden = [f"/data/Dr {CANARY}"]
    assert CANARY not in reason_of(error, Names(), hidden)
    assert reason_of(error, Names(), hidden)
    assert CANARY in reason_of(error, Names(shown=True), hidden)


def test_what_is_of_use_survives_the_scrubbing() -> None:
    """File and key, the nearest known key, and the operating system's words."""
    text = without_names("site.yaml: polcy: unknown key; did you mean 'policy'?")
    assert text == "site.yaml: polcy: unknown key; did you mean 'policy'?"
    form = 'site.yaml: policy: allowed_hours must be of the form "18:00-07:00", or null for any time, found "Dr Day"'
    assert without_names(form).endswith('of the form "18:00-07:00", or null for any time, found ...')
    assert reason_of(PermissionError(13, "Permission denied", "/x"), Names()) == "PermissionError (Permission denied)"


@pytest.mark.parametrize("text", ["\x1b[2Jred", "a\nb", "a\u202eb", "x" * 5000, "\x00"])
def test_foreign_text_is_one_line_of_printable_signs(text: str) -> None:
    """A server's or a file's text must not move the cursor, turn letters round or fill the screen."""
    shown = plain_text(text)
    assert shown.isprintable()
    assert len(shown) <= 303


def test_the_exit_code_tells_whether_anything_fails() -> None:
    """Warnings and skipped checks do not stop a run."""
    assert exit_code([WELL, Check("w", "warn", "look"), Check("s", "skipped", "not here")]) == 0
    assert exit_code([WELL, Check("f", "fail", "no")]) == 1


def test_the_report_as_data_holds_everything() -> None:
    """Programs read status, detail, advice, figures and cases; the counts add up."""
    checks = [Check("a", "fail", "3 of 9 files", "Mend them.", {"bad": 3}, ("f3a9",)), WELL]
    data = json.loads(json.dumps(as_plain(checks)))
    assert data["healthy"] is False
    assert data["counts"] == {"ok": 1, "warn": 0, "fail": 1, "skipped": 0}
    assert data["checks"][0] == {
        "name": "a", "status": "fail", "detail": "3 of 9 files", "advice": "Mend them.", "figures": {"bad": 3},
        "cases": ["f3a9"],
    }  # fmt: skip


def test_the_table_is_readable_at_80_columns() -> None:
    """No word is cut, no line is longer than the terminal, markup in a text stays text."""
    checks = [
        Check("client certificate", "fail", "it is turned down: [bold]no[/bold] " + "reason " * 20, "Ask. " * 20),
        Check("duplicates", "warn", "3 images", cases=tuple(f"{n:012x}" for n in range(9))),
    ]  # fmt: skip
    text = text_of(checks)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "[bold]no[/bold]" in text
    assert "client certificate" in text
    assert "and 4 more (--json" in " ".join(text.split())


def test_checks_skipped_in_a_row_for_one_reason_share_a_row() -> None:
    """A screen full of the same sentence hides the one line that matters."""
    skipped = [Check(name, "skipped", "needs 'dataset' first") for name in ("files", "labels", "masks")]
    text = text_of([WELL, *skipped, WELL])
    assert text.count("needs 'dataset' first") == 1
    assert "also labels, masks" in text
    assert summary_line(skipped) == "3 checks: 3 skipped"


def test_names_are_hashed_or_shown_never_half() -> None:
    """Without keys nobody is named; with them by hash; on the own terminal in full."""
    assert Names().of(["b", "a", "a"]) == ()
    assert Names(hashed=str.upper).of(["b", "a", "a"], ["file b"]) == ("A", "B")
    assert Names(shown=True, hashed=str.upper).of(["b"], ["file b"]) == ("file b",)
