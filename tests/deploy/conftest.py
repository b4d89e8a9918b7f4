"""What tests of the command share: the command itself, in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from deploy import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def medsegfed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call with arguments to run the command in this process; returns exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medsegfed", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run
