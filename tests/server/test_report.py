"""report.json, metrics.csv and report.html: what is refused, what is kept, what a reader is told."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from report_sample import SITES, federation_report, sample_examples, sample_report
from rich.console import Console

from medsegdiff.errors import UserError
from server.report import Example, check_report, summary_table, write_report

HOSTILE = '<b>x</b>" onload="y'


def page_of(folder: Path, report: dict[str, Any], examples: list[Example] | None = None) -> str:
    return write_report(folder, report, examples or ()).read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "place", ["arms.federated.mean", "sites.Bergen.hd95_mm.local", "seconds.train", "history.0.loss"]
)
def test_numbers_that_are_none_are_refused(tmp_path: Path, place: str, number: float) -> None:
    """NaN and infinity are refused with the key's name, and nothing is written."""
    report = sample_report()
    target: Any = report
    *path, last = place.split(".")
    for part in path:
        target = target[int(part) if isinstance(target, list) else part]
    target[last] = number
    with pytest.raises(ValueError, match=f"{last} is {number}"):
        write_report(tmp_path, report)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r.pop("arms"), "arms"),
        (lambda r: r.update(roundz=3), "roundz"),
        (lambda r: r["sites"]["Aachen"].pop("absent_rounds"), r"sites\.Aachen\.absent_rounds"),
        (lambda r: r["sites"]["Aachen"]["dice"].update(federated=81.0), r"sites\.Aachen\.dice\.federated"),
        (lambda r: r["sites"]["Aachen"]["dice"].update(federated="0.8"), r"sites\.Aachen\.dice\.federated"),
        (lambda r: r["sites"]["Aachen"]["dice"].update(centralised=0.8), "centralised"),
        (lambda r: r.update(sites={}), "sites"),
        (lambda r: r.update(rounds=2.5), "rounds"),
        (lambda r: r["seconds"].pop("total"), r"seconds\.total"),
        (lambda r: r["history"].append({"round": 1, "site": "Nowhere", "loss": 1.0, "dice": None}), "Nowhere"),
        (lambda r: r["history"].append({"round": 13, "site": "Aachen", "loss": 1.0, "dice": None}), "round 13"),
        (lambda r: r["cross_site"]["dice"].pop(), "cross_site"),
        (lambda r: r.update(seed=np.int64(3)), "plain JSON"),
    ],
)
def test_wrong_reports_are_refused(change: Any, named: str) -> None:
    """A missing, unknown, mistyped or impossible entry is refused in one line that names it."""
    report = sample_report()
    change(report)
    with pytest.raises(ValueError, match=named) as caught:
        check_report(report)
    assert "\n" not in str(caught.value)


def test_json_round_trips_in_the_order_given(tmp_path: Path) -> None:
    """report.json holds the very report, its keys in the order given."""
    report = sample_report()
    write_report(tmp_path, report)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == report
    assert list(json.loads(text)) == list(report)
    assert text.startswith('{\n "run"')


def test_metrics_parse_back_to_the_same_numbers(tmp_path: Path) -> None:
    """Every known number of the report stands in metrics.csv to the last digit, and no unknown one."""
    report = sample_report(targets=("whole", "core"))
    report["history"][0]["dice"] = None
    write_report(tmp_path, report)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "metrics.csv").read_text(encoding="utf-8"))))
    found = {(r["round"], r["arm"], r["site"], r["target"], r["metric"]): float(r["value"]) for r in rows}
    assert len(found) == len(rows)
    for entry in report["history"]:
        for metric in ("loss", "dice"):
            assert found.pop((str(entry["round"]), "federated", entry["site"], "", metric), None) == entry[metric]
    for name, site in report["sites"].items():
        for arm in ("federated", "local", "pooled"):
            assert found.pop(("", arm, name, "", "test_dice")) == site["dice"][arm]
            assert found.pop(("", arm, name, "", "test_hd95_mm")) == site["hd95_mm"][arm]
            for target, dice in site["dice_by_target"][arm].items():
                assert found.pop(("", arm, name, target, "test_dice")) == dice
    for arm, score in report["arms"].items():
        assert found.pop(("", arm, "", "", "test_dice_mean")) == score["mean"]
        assert found.pop(("", arm, "", "", "test_dice_worst")) == score["worst"]
    assert found == {}


def test_privacy_loss_is_in_the_metrics(tmp_path: Path) -> None:
    """With all per-site figures withheld, the CSV still holds each site's epsilon and the arm's two figures."""
    write_report(tmp_path, federation_report())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "metrics.csv").read_text(encoding="utf-8"))))
    assert [row["value"] for row in rows if row["metric"] == "epsilon"] == ["3.5", "4.5", "5.5", "6.5"]
    assert {row["metric"] for row in rows} == {"epsilon", "test_dice_mean", "test_dice_worst"}


def test_sites_that_were_not_drawn_did_not_take_part_in_every_round(tmp_path: Path) -> None:
    """Where rounds ask a part of the sites, nobody missed a round and yet not all were in it."""
    report = sample_report()
    for site in report["sites"].values():
        site |= {"absent_rounds": [], "rejected_rounds": [], "faults": 0}
    assert "<p>Every site took part in every round; no update" in page_of(tmp_path, report)
    report["participation"] = {"sites": 4, "asked": 4, "spare": 0, "required": 4}
    assert "<p>Every site took part in every round; no update" in page_of(tmp_path, report)
    report["participation"]["asked"] = 2
    assert "<p>Every site took part in every round that asked it; no update" in page_of(tmp_path, report)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    """Two runs of the writer agree byte for byte, whatever the user's Matplotlib settings are in between."""
    write_report(tmp_path / "a", sample_report(), sample_examples(sites=SITES[:1]))
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": "other", "savefig.dpi": 17}):
        write_report(tmp_path / "b", sample_report(), sample_examples(sites=SITES[:1]))
    for name in ("report.json", "metrics.csv", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_page_requests_nothing(tmp_path: Path) -> None:
    """No address of any network, no script, no event handler, and a policy that forbids every fetch."""
    page = page_of(tmp_path, sample_report(targets=("a", "b")), sample_examples(("a", "b"), SITES[:1]))
    without_data = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "DATA", page)
    assert "http" not in without_data.replace("http-equiv", "")
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert set(re.findall(r'src="([^"]*)"', without_data)) == {"DATA"}
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', page))
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", page))


class Shape(HTMLParser):
    """Collects tags and attributes, and whether every tag is closed in order."""

    VOID = frozenset({"meta", "br", "img", "path", "use", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: set[str] = set()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("report", [sample_report(targets=("a", "b")), federation_report()], ids=["full", "federation"])
def test_the_page_is_well_formed(tmp_path: Path, report: dict[str, Any]) -> None:
    """Every element of both variants is closed where it was opened, and each figure is XML of its own."""
    page = page_of(tmp_path, report)
    shape = Shape()
    shape.feed(page)
    assert shape.open == []
    for figure in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ET.fromstring(figure.replace("xlink:href", "href"))


def test_names_from_elsewhere_cannot_become_markup(tmp_path: Path) -> None:
    """A hostile site name, run name, reason or title shows as text in tables and in figures."""
    text = json.dumps(sample_report()).replace("Coimbra", json.dumps(HOSTILE)[1:-1])
    report = json.loads(text.replace("glioma-4-sites", json.dumps(HOSTILE)[1:-1]))
    report["notes"] = [HOSTILE]
    report["sites"]["Aachen"]["rejected_rounds"] = [{"round": 1, "reason": HOSTILE}]
    example = sample_examples()[0]
    hostile = Example(
        HOSTILE, HOSTILE, example.image, example.truth, example.prediction, example.uncertainty, (HOSTILE,)
    )
    page = page_of(tmp_path, report, [hostile])
    shape = Shape()
    shape.feed(page)
    assert "onload" not in shape.attributes
    assert "<b>x" not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page


def test_a_name_is_no_formula(tmp_path: Path) -> None:
    """Dollar signs in a site's name stay dollar signs in the figures, and rich markup stays text in the table."""
    text = json.dumps(sample_report()).replace("Coimbra", r"a$\\frac{b}$ [red]")
    page = page_of(tmp_path, json.loads(text))
    assert all(r"a$\frac{b}$ [red]" in figure for figure in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert r"a$\frac{b}$ [red]" in printed(json.loads(text))


def test_every_number_of_the_sites_is_on_the_page(tmp_path: Path) -> None:
    """The page shows each site's Dice of each arm and HD95, the matrix, the faults and the notes."""
    report = sample_report()
    page = page_of(tmp_path, report, sample_examples())
    for site in report["sites"].values():
        for arm in ("federated", "local", "pooled"):
            assert f"<td>{site['dice'][arm]:.3f}</td>" in page
            assert f"{site['hd95_mm'][arm]:.1f}" in page
    assert page.count('class="own"') == len(SITES)
    for model in report["cross_site"]["dice"]:
        for dice in model:
            assert f">{dice:.3f}</td>" in page
    assert "3, 5–7" in page
    assert "norm 38.2 is over 10.0 times the median" in page
    assert "(1 undef.)" in page
    assert report["notes"][0] in page
    assert page.count("<img") == 4 * len(SITES)
    assert page.count("<svg") == 3


def test_a_real_federation_renders(tmp_path: Path) -> None:
    """With privacy on and one arm, the page has no figures and no columns of other arms, and says what is missing."""
    page = page_of(tmp_path, federation_report())
    assert "<svg" not in page
    assert "<img" not in page
    assert "Local only" not in re.sub(r"<i>Local only</i>", "", page)
    assert "6.50" in page
    assert "what federation gained is not measured here" in page
    assert "None" not in page


def test_a_report_of_nulls_renders(tmp_path: Path) -> None:
    """Every nullable entry null at once: all three files are written and the headline says that nothing is known."""
    report = federation_report()
    report |= {"dataset": None, "local_steps": None, "bytes": {"up": None, "down": None}, "seconds": {"total": None}}
    report["arms"] = {"federated": None}
    report["model"]["preset"] = None
    page = page_of(tmp_path, report)
    assert "no Dice of the federated model was reported" in page
    assert "None" not in page


@pytest.mark.parametrize("sites", [1, 9, 30])
def test_any_number_of_sites_renders(tmp_path: Path, sites: int) -> None:
    """One site, more sites than colours, and many sites with long names all give a page."""
    report = sample_report(rounds=2)
    report["sites"] = {
        f"University Hospital {number:03d}": copy.deepcopy(report["sites"]["Aachen"]) for number in range(sites)
    }
    report["history"] = [{"round": r, "site": s, "loss": 0.1 * r, "dice": 0.5} for r in (1, 2) for s in report["sites"]]
    report["cross_site"] = None
    page = page_of(tmp_path, report)
    assert page.count("<svg") == 3
    assert f"over {sites} site{'s' if sites > 1 else ''}," in page


def test_headline_names_each_lost_site(tmp_path: Path) -> None:
    """A site that its own model serves better is named in the headline's own paragraph, and marked in the table."""
    page = page_of(tmp_path, sample_report(loses_at="Coimbra"))
    paragraph = re.search(r'<p class="headline">(.*?)</p>', page)
    assert paragraph is not None
    lost = "It loses to the site&#39;s own model at 1 of 4 sites: Coimbra (0.631 against 0.655)."
    assert lost in paragraph.group(1)
    assert page.count('class="lost"') == 1
    assert "It loses" not in page_of(tmp_path, sample_report())


def test_caveats_count_what_weakens_the_numbers(tmp_path: Path) -> None:
    """Few test patients, undefined distances and the single seed are named without being asked for."""
    page = page_of(tmp_path, sample_report())
    assert "Bergen 9, Coimbra 7, St Mary&#39;s Hospital 5" in page
    assert "Local only: HD95 is undefined 1 time" in page
    assert "One run with one seed (0)" in page


def printed(report: dict[str, Any]) -> str:
    console = Console(width=100, record=True, file=io.StringIO(), color_system=None)
    console.print(summary_table(report))
    return console.export_text()


def test_summary_table_holds_sites_mean_and_worst() -> None:
    """The terminal's table has a row per site with its patients, then mean and worst, all arms beside each other."""
    lines = [line.split() for line in printed(sample_report(loses_at="Coimbra")).splitlines()]
    cells = {line[1]: [cell for cell in line if cell != "│"] for line in lines if len(line) > 2}
    assert cells["Coimbra"] == ["Coimbra", "20", "/", "7", "0.631", "0.655", "0.757", "−0.024", "9.2"]
    assert cells["Mean"][-6:] == ["all", "0.740", "0.677", "0.779", "+0.063", "6.5"]
    assert cells["Worst"] == ["Worst", "site", "0.631", "0.612", "0.714", "+0.019", "9.2"]


def test_summary_table_leaves_out_absent_arms() -> None:
    """A real federation's table has neither a local, a pooled nor a gain column."""
    text = printed(federation_report())
    assert "Federated" in text
    assert not re.search("Local|Pooled|Gain", text)


def test_a_partial_mean_of_distances_is_not_shown() -> None:
    """HD95 over sites is left out when a site has none: arms would be compared over different sites."""
    report = sample_report()
    report["sites"]["Aachen"]["hd95_mm"]["federated"] = None
    mean = next(line for line in printed(report).splitlines() if "Mean" in line)
    assert mean.rstrip(" │").endswith("–")


def test_a_file_that_cannot_be_replaced_is_a_user_error(tmp_path: Path) -> None:
    """A folder in report.html's place is answered with the one error a person may see, and no part of a file stays."""
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match="could not be written"):
        write_report(tmp_path, sample_report())
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "metrics.csv", "report.html"}
