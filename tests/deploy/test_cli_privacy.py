"""`privacy plan` and `ledger`: what is shown is what is so; exit codes; nothing with a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.privacy import account as accounts
from client.privacy import accounting
from client.privacy.account import Ceiling, frozen_delta, ledger_path
from client.privacy.accounting import Mechanism, epsilon
from client.privacy.ledger import Ledger
from client.privacy.renyi import renyi_epsilon
from medsegdiff.chained_log import AUDIT_LOG

Run = Callable[..., tuple[int, str, str]]
PLAN = ("privacy", "plan", "--patients", 40, "--epsilon", 1, "--delta", "1e-3", "--rounds", 2, "--steps-per-round", 6)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site's folder with a ledger of two runs, the last round of which is open; accounted by the Renyi bound."""

    def quick(history: Iterable[Mechanism], delta: float) -> accounting.Epsilon:
        return accounting.Epsilon(renyi_epsilon(history, delta), None, 0.0)

    monkeypatch.setattr(accounts, "epsilon", quick)
    folder = tmp_path / "st-mary"
    folder.mkdir()
    (folder / "site.yaml").write_text("name: st-mary\ndata: data\n")
    book = Ledger(ledger_path(folder), Ceiling(3.0, 1e-5), folder / AUDIT_LOG)
    for number in range(3):
        book.commit(book.reserve("first[bold]", number, 6.0, 0.1, 20), 20 - number)
    book.reserve("second", 0, 6.0, 0.1, 30)
    return folder


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(file.read_bytes())).convert("RGB"))


# --- plan -------------------------------------------------------------------------------------------------------------


def test_a_plan_is_shown_and_drawn(medsegfed: Run, tmp_path: Path) -> None:
    """The figures hold together; the plot is a picture with something in it."""
    file = tmp_path / "plan.png"
    code, out, err = medsegfed(*PLAN, "--q", 0.5, "--parameters", 1000, "--json", "--plot", file)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["steps"], found["expected_batch"], found["q"]) == (12, 20, 0.5)
    reached = epsilon([Mechanism(found["sigma"], 0.5, 12)], frozen_delta(1e-3))
    assert found["epsilon_reached"]["value"] == reached.value <= 1
    assert found["signal_over_noise"]["step"] == pytest.approx(20 / (found["sigma"] * 1000**0.5))
    assert pixels(file).std() > 5
    code, out, err = medsegfed(*PLAN, "--q", 0.5, "--parameters", 1_000_000)
    assert (code, err) == (0, "")
    assert "HOPELESS" in out
    assert f"{found['sigma']:.4g}" in out


def test_a_plan_that_cannot_be_is_one_line(medsegfed: Run, tmp_path: Path) -> None:
    """Exit code 2."""
    for changes in (("--delta", "0.5"), ("--epsilon", "0"), ("--q", "2"), ("--clip", "-1")):
        code, out, err = medsegfed(*PLAN, *changes)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
    assert medsegfed("privacy", "plan", "--patients", 0, "--epsilon", 1, "--rounds", 1)[0] == 2


# --- ledger -----------------------------------------------------------------------------------------------------------


def test_a_ledger_is_shown(medsegfed: Run, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reservation, steps taken of those reserved, open ones, total, ceiling, left; names are no markup."""
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = medsegfed("ledger", "show", "--site", site)
    assert (code, err) == (0, "")
    spent = renyi_epsilon([Mechanism(6.0, 0.1, 20 + 19 + 18 + 30)], frozen_delta(1e-5))
    for part in (
        "first[bold]",
        "19 of 20",
        "each counts in full",
        f"{spent:.4f}",
        f"{3 - spent:.4f}",
        "ceiling",
        "frozen",
    ):
        assert part in out
    code, out, _ = medsegfed("ledger", "show", "--site", site, "--json")
    found = json.loads(out)
    assert found["spent"]["epsilon"] == pytest.approx(spent)
    assert found["left"] == pytest.approx(3 - spent)
    assert [e["state"] for e in found["entries"]] == ["committed"] * 3 + ["open"]
    assert found["head"] == Ledger(ledger_path(site), Ceiling(3.0, 1e-5)).head


def test_a_changed_schedule_is_said(medsegfed: Run, site: Path) -> None:
    """The filter and its order are named."""
    Ledger(ledger_path(site), Ceiling(3.0, 1e-5), site / AUDIT_LOG).reserve("third", 0, 8.0, 0.2, 5)
    code, out, _ = medsegfed("ledger", "show", "--site", site)
    assert code == 0
    assert "schedule was changed: Renyi filter of order" in out


def test_a_long_ledger_shows_its_end(medsegfed: Run, site: Path) -> None:
    """And says how many are left out; --all shows them."""
    book = Ledger(ledger_path(site), Ceiling(3.0, 1e-5), site / AUDIT_LOG)
    for number in range(45):
        book.reserve("third", number, 6.0, 0.1, 1)
    assert "the last 40; 9 before them" in medsegfed("ledger", "show", "--site", site)[1]
    assert "left out" not in medsegfed("ledger", "show", "--site", site, "--all")[1]


def test_a_ledger_is_drawn(medsegfed: Run, site: Path, tmp_path: Path) -> None:
    """The same ledger, the same bytes; an empty one is an error."""
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        assert medsegfed("ledger", "show", "--site", site, "--plot", file)[0] == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert pixels(files[0]).std() > 5


def test_a_site_without_a_ledger(medsegfed: Run, tmp_path: Path) -> None:
    """Nothing spent, which is sound; a folder that is no site's is an error of the user."""
    (tmp_path / "site.yaml").write_text("name: a\ndata: data\n")
    assert "Nothing was ever reserved" in medsegfed("ledger", "show", "--site", tmp_path)[1]
    assert medsegfed("ledger", "show", "--site", tmp_path, "--plot", tmp_path / "x.png")[0] == 2
    assert medsegfed("ledger", "verify", "--site", tmp_path)[0] == 0
    for verb in ("show", "verify"):
        code, _, err = medsegfed("ledger", verb, "--site", tmp_path / "elsewhere")
        assert code == 2
        assert "no site's folder" in err


def test_verify_tells_sound_from_edited_and_rolled_back(medsegfed: Run, site: Path) -> None:
    """Exit code 0 or 1; show refuses what verify faults."""
    path = ledger_path(site)
    head = path.with_name(f"{path.name}.head")
    code, out, _ = medsegfed("ledger", "verify", "--site", site)
    assert code == 0
    assert "OK" in out
    newest = Ledger(path, Ceiling(3.0, 1e-5)).head
    assert medsegfed("ledger", "verify", "--site", site, "--anchor", newest.upper())[0] == 0
    assert medsegfed("ledger", "verify", "--site", site, "--anchor", "f" * 64)[0] == 1
    code, _, err = medsegfed("ledger", "verify", "--site", site, "--anchor", "9f31...")
    assert (code, "64 hexadecimal digits" in err) == (2, True)  # a slip of the pen, not a fault
    kept = path.read_bytes(), head.read_bytes()
    path.write_bytes(kept[0].replace(b'"steps":30', b'"steps":03'))
    code, out, _ = medsegfed("ledger", "verify", "--site", site)
    assert code == 1
    assert "FAULT" in out
    assert medsegfed("ledger", "show", "--site", site)[0] == 2
    path.write_bytes(kept[0])
    Ledger(path, Ceiling(3.0, 1e-5), site / AUDIT_LOG).reserve("second", 1, 6.0, 0.1, 30)
    path.write_bytes(kept[0])
    head.write_bytes(kept[1])
    code, out, _ = medsegfed("ledger", "verify", "--site", site)
    assert code == 1
    assert "older copy" in out


# --- after a loss -----------------------------------------------------------------------------------------------------


PRIVATE = "privacy: {mechanism: {epsilon: 3, delta: 1.0e-5, sigma: 6, q: 0.1, clip: 1, batch: 4, steps: 20, rounds: 9}"


def lose(site: Path) -> None:
    for path in site.glob("privacy-ledger.jsonl*"):
        path.unlink()


def test_a_lost_ledger_is_recovered(medsegfed: Run, site: Path) -> None:
    """verify faults it and names the way; recover reads the audit log; what is spent is what was, or more."""
    (site / "site.yaml").write_text(f"name: st-mary\ndata: data\n{PRIVATE}, weight: 20}}\n")
    before = json.loads(medsegfed("ledger", "show", "--site", site, "--json")[1])["spent"]["epsilon"]
    assert "Nothing to recover" in medsegfed("ledger", "recover", "--site", site)[1]
    lose(site)
    code, out, _ = medsegfed("ledger", "verify", "--site", site)
    assert (code, "ledger recover" in out) == (1, True)
    code, out, err = medsegfed("ledger", "recover", "--site", site)
    assert (code, err) == (0, "")
    assert "4 reservations, each in full" in out
    assert medsegfed("ledger", "verify", "--site", site)[0] == 0
    found = json.loads(medsegfed("ledger", "show", "--site", site, "--json")[1])
    assert found["spent"]["epsilon"] >= before
    assert [entry["state"] for entry in found["entries"]] == ["recovered"] * 4
    ledger_path(site).write_text("x")
    assert "keep it as evidence" in medsegfed("ledger", "recover", "--site", site)[1]


def test_everything_is_written_off(medsegfed: Run, site: Path) -> None:
    """Asked first; not less than the ceiling; afterwards nothing is left, and both commands say so."""
    (site / "site.yaml").write_text(f"name: st-mary\ndata: data\n{PRIVATE}, weight: 20}}\n")
    for path in site.glob("*.jsonl*"):
        path.unlink()
    asked = ("ledger", "write-off", "--site", site, "--delta", "1e-5", "--epsilon")
    assert "nobody can be asked" in medsegfed(*asked, 3)[2]
    assert not ledger_path(site).exists()
    code, _, err = medsegfed(*asked, 2, "--yes")
    assert (code, "less than was allowed" in err) == (2, True)
    assert medsegfed("ledger", "recover", "--site", site)[0] == 2  # no audit log
    code, out, _ = medsegfed(*asked, 3, "--yes")
    assert (code, "Nothing is left" in out) == (0, True)
    shown = medsegfed("ledger", "show", "--site", site)[1]
    assert "written off" in shown
    assert "epsilon 0.0000" in shown


def test_figures_are_at_the_limit_of_site_yaml(medsegfed: Run, site: Path) -> None:
    """Also where the ledger has not seen the new one: an older copy, whose write-off leaves nothing of its delta."""
    (site / "site.yaml").write_text(f"name: st-mary\ndata: data\n{PRIVATE}, weight: 20}}\n")
    path = ledger_path(site)
    lose(site)
    assert medsegfed("ledger", "write-off", "--site", site, "--epsilon", 3, "--delta", "1e-5", "--yes")[0] == 0
    kept = {file: file.read_bytes() for file in site.glob("privacy-ledger.jsonl*")}
    wide = PRIVATE.replace("epsilon: 3, delta: 1.0e-5", "epsilon: 8, delta: 3.0e-5")
    (site / "site.yaml").write_text(f"name: st-mary\ndata: data\n{wide}, weight: 20}}\n")
    Ledger(path, Ceiling(8.0, 3e-5), site / AUDIT_LOG).reserve("third", 1, 6.0, 0.1, 30)
    before = json.loads(medsegfed("ledger", "show", "--site", site, "--json")[1])
    assert before["ceiling"] == {"epsilon": 8.0, "delta": 3e-5}
    assert 3.0 < before["spent"]["epsilon"] < 8.0
    for file, data in kept.items():
        file.write_bytes(data)
    code, out, err = medsegfed("ledger", "recover", "--site", site)
    assert (code, err) == (0, "")
    assert f"spent        epsilon {before['spent']['epsilon']:.4f} of 8 at delta 3e-05" in out
    assert medsegfed("ledger", "verify", "--site", site)[0] == 0


def test_a_write_off_shows_in_the_plot(medsegfed: Run, site: Path, tmp_path: Path) -> None:
    """A line that was not there before."""
    (site / "site.yaml").write_text(f"name: st-mary\ndata: data\n{PRIVATE}, weight: 20}}\n")
    files = [tmp_path / "before.png", tmp_path / "after.png"]
    assert medsegfed("ledger", "show", "--site", site, "--plot", files[0])[0] == 0
    assert medsegfed("ledger", "write-off", "--site", site, "--epsilon", 3, "--delta", "1e-5", "--yes")[0] == 0
    assert medsegfed("ledger", "show", "--site", site, "--plot", files[1])[0] == 0
    dark = [int((pixels(file).sum(axis=2) < 250).sum()) for file in files]
    assert dark[1] > dark[0] + 200


def test_a_site_without_privacy_has_nothing_to_recover(medsegfed: Run, site: Path, tmp_path: Path) -> None:
    """One line each: no privacy section, no site."""
    for folder, said in ((site, "no privacy section"), (tmp_path / "elsewhere", "no site's folder")):
        for verb in (("recover",), ("write-off", "--epsilon", 3, "--delta", "1e-5", "--yes")):
            code, _, err = medsegfed("ledger", *verb, "--site", folder)
            assert (code, said in err) == (2, True)
