"""The report of a real federation: what the plan, the journal and the model say, and no more."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_sites import on, run, say
from flwr.app import MessageType
from told_run import APPLICATION, BEGIN, FINAL_DICE, SOFTWARE, beginning, model_of_the_end, plan_of, story, write_run

from client.contract import PrivacyRequest, PrivacyTask
from medsegdiff.config import SamplingConfig, TrainingConfig
from medsegdiff.errors import UserError
from medsegdiff.network import parameter_count
from medsegdiff.weights import build, initial_weights, serialise
from server.journal import read_events
from server.outcome import describe_run, federation_report, write_federation_report
from server.report import write_report
from server.report_schema import parse_report
from server.report_text import headline

HOSTILE = '<b>x</b>" onload="y'


def page_and_report(folder: Path, events: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    report, html = write_federation_report(write_run(folder, events, plan_of(**changes)))
    assert html == folder / "report.html"
    assert json.loads((folder / "report.json").read_text()) == report
    return report


def told(kind: str, **fields: Any) -> dict[str, Any]:
    return {"event": kind, "time": BEGIN + 999, **fields}


def words(folder: Path) -> str:
    """The page's text without tags, as a person reads it."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def headline_of(report: dict[str, Any]) -> str:
    return headline(parse_report(report))


def test_a_finished_run(tmp_path) -> None:
    """Every figure is the journal's: scores of the last round, patients of the introductions, sums over the rounds."""
    events = story(3)
    rounds = [event for event in events if event["event"] == "round"]
    del rounds[2]["accepted"]["birch"]
    rounds[2]["absent"] = ["birch"]
    del rounds[3]["accepted"]["elm"]
    rounds[3]["rejected"] = {"elm": "it is not signed"}
    report = page_and_report(tmp_path, events)
    assert report["arms"] == {"federated": {"mean": pytest.approx(sum(FINAL_DICE.values()) / 3), "worst": 0.69}}
    assert {site: row["dice"] for site, row in report["sites"].items()} == {
        site: {"federated": pytest.approx(dice)} for site, dice in FINAL_DICE.items()
    }
    alder, birch, elm = report["sites"].values()
    assert alder["patients"] == {"train": 24, "test": 6}
    assert (alder["hd95_mm"]["federated"], alder["epsilon"], alder["faults"]) == (pytest.approx(2.28), None, 0)
    assert (birch["absent_rounds"], birch["rejected_rounds"]) == ([2], [])
    assert (elm["absent_rounds"], elm["rejected_rounds"]) == ([], [{"round": 3, "reason": "it is not signed"}])
    assert (elm["software"], elm["application"]) == (SOFTWARE, APPLICATION)
    assert report["software"] == SOFTWARE
    assert report["bytes"] == {"up": 9000, "down": 10_800}
    # 201 s from the session to the end; the slowest site trained 54, 54 and 47 s, and scored for 4 s three times.
    assert report["seconds"] == {"total": 201.0, "train": 162.0, "evaluate": 12.0, "overhead": 27.0}
    assert report["progress"] == {"state": "finished", "committed": 3, "scored": 3}
    assert report["model"]["hash"] == model_of_the_end()[1]
    assert (report["engine"], report["cross_site"], report["hardware"]) == ("network", None, None)
    assert len(report["history"]) == 9


def test_a_run_that_was_really_carried_out(make_run) -> None:
    """The journal as the strategy writes it, one site refused a round by screening: every figure finds its place."""
    folder = make_run(quorum=2)
    run(folder, {"birch": on(MessageType.TRAIN, say(round=7))})
    report, _ = write_federation_report(folder)
    rounds = [event for event in read_events(folder / "journal.jsonl") if event["event"] == "round"]
    assert report["arms"]["federated"] == {"mean": 0.5, "worst": 0.5}
    assert report["progress"]["committed"] == report["progress"]["scored"] == 2
    assert report["bytes"]["up"] == sum(event["bytes"]["up"] for event in rounds[1:]) > 0
    assert {entry["site"] for entry in report["history"] if entry["loss"] is not None} == {"alder", "elm"}
    assert [fault["round"] for fault in report["sites"]["birch"]["rejected_rounds"]] == [1, 2]
    assert report["sites"]["alder"]["patients"] == {"train": 3, "test": 1}
    assert report["model"]["hash"] == rounds[-1]["model_hash"]


def test_how_a_run_trains_is_told(tmp_path) -> None:
    """The plan's own numbers, in report.json and on the page; a report of an earlier version is still read."""
    plan = plan_of()
    training = TrainingConfig(batch_size=3, learning_rate=0.002)
    task = replace(plan.task, training=training, sampling=SamplingConfig(steps=7, members=4))
    report = page_and_report(tmp_path, story(3), task=task)
    assert (report["training"]["learning_rate"], report["training"]["weight_decay"]) == (0.002, training.weight_decay)
    assert report["participation"] == {"sites": 3, "asked": 3, "spare": 0, "required": 2}
    said = words(tmp_path)
    assert "Local steps a round 20 Training batch size 3, learning rate 0.002, " in said
    assert "Sites a round all 3 asked; a round counts with 2 updates Masks sampler dpmpp_2m, steps 7, members 4" in said
    assert "privacy" not in said
    del report["training"], report["participation"], report["sampling"]
    assert "<dt>Masks</dt>" not in write_report(tmp_path, report).read_text()


def test_a_part_of_the_sites_and_private_steps_are_told(tmp_path) -> None:
    """Two of three drawn; the privacy that the run asks for, and that a private site knows no batch size."""
    privacy = PrivacyTask(asks=PrivacyRequest(sigma=2.5))
    page_and_report(tmp_path, story(3), sample=2, quorum=1, task=replace(plan_of().task, privacy=privacy))
    said = words(tmp_path)
    assert "2 of 3 asked, drawn by the run&#39;s seed; a round counts with 1 update " in said
    assert "privacy required True, privacy train low_rank, privacy sigma 2.5; private sites have a q" in said


def test_nothing_is_said_of_models_that_were_not_trained(tmp_path) -> None:
    """Neither page nor numbers name a local or a pooled model, an example or a matrix."""
    page_and_report(tmp_path, story(3))
    everything = words(tmp_path) + (tmp_path / "report.json").read_text() + (tmp_path / "metrics.csv").read_text()
    assert not re.search(r"local-only|local only|pooled|\bown model|overlay", everything, flags=re.IGNORECASE)
    assert "<img" not in (tmp_path / "report.html").read_text()
    assert (
        "After 3 rounds over 3 sites, the federated model reaches a mean Dice of 0.757, and 0.690 at the worst site "
        "(elm). No other model was trained beside it, so what federation gained is not measured here."
    ) in everything


def test_equal_files_give_equal_bytes(tmp_path) -> None:
    """Neither time nor machine of the report's making stands in it; the CSV holds curves and last scores."""
    for name in ("a", "b"):
        page_and_report(tmp_path / name, story(3))
    for name in ("report.json", "report.html", "metrics.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    rows = list(csv.DictReader(io.StringIO((tmp_path / "a" / "metrics.csv").read_text())))
    assert {row["arm"] for row in rows} == {"federated"}
    curve = [float(row["value"]) for row in rows if row["metric"] == "dice" and row["site"] == "elm"]
    assert curve == pytest.approx([0.49, 0.59, 0.69])
    assert [float(row["value"]) for row in rows if row["metric"] == "test_dice_worst"] == [pytest.approx(0.69)]


def test_a_run_that_goes_on_says_so(tmp_path) -> None:
    """Two of ten rounds, the second not scored: the Dice is the first round's, and called that."""
    report = page_and_report(tmp_path, story(2, finished=False)[:-1], rounds=10)
    assert report["progress"] == {"state": "running", "committed": 2, "scored": 1}
    assert report["arms"]["federated"]["worst"] == pytest.approx(0.49)
    said = headline_of(report)
    assert said.startswith("The run goes on. After 1 of 10 rounds over 3 sites, the federated model reaches a mean")
    assert said.endswith("Round 2 stands as well and is not scored yet.")
    assert "2 of 10" in words(tmp_path)
    assert "the model of round 1" in words(tmp_path)


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([], "The run has not begun. Of 10 rounds, none is committed yet."),
        (beginning(), "The run goes on. Of 10 rounds, none is committed yet."),
        (story(2, finished=False)[:6], "The run goes on. 1 of 10 rounds over 3 sites, not scored yet."),
        ([*story(1, finished=False), told("stopped", by="x")], "The run was stopped before its end. After 1 of"),
        ([*story(1, finished=False), told("below_quorum", round=2)], "The run broke off before its end. After 1 of"),
        ([*story(1, finished=False), told("paused", round=2)], "The run waits for its sites. After 1 of 10"),
    ],
)
def test_the_headline_says_how_the_run_stands(events, said) -> None:
    """Before the first round, while sites are awaited, after a stop: in its first words."""
    assert headline_of(federation_report(plan_of(rounds=10), events)).startswith(said)


@pytest.mark.parametrize("events", [[], beginning()])
def test_a_report_before_the_first_round(tmp_path, events) -> None:
    """A whole page, with no figure made up."""
    report = write_federation_report(write_run(tmp_path, events, model=False))[0]
    assert report["arms"]["federated"] == {"mean": None, "worst": None}
    assert all(row["dice"] is None for row in report["sites"].values())
    text = words(tmp_path)
    assert "No round is committed yet." in text
    assert "took part in every round" not in text
    assert "missed no round" not in text
    assert "None" not in text


def test_scores_of_a_round_that_was_not_committed_do_not_count() -> None:
    """A checkpoint was lost and its round is run again: the scores it had are not the model's that stands."""
    events = [event for event in story(2, finished=False) if not (event["event"] == "round" and event["round"] == 2)]
    report = federation_report(plan_of(), events)
    assert report["progress"]["scored"] == 1
    assert report["arms"]["federated"]["worst"] == pytest.approx(0.49)


def test_who_refused_who_never_came_and_what_differs(tmp_path) -> None:
    """A refusal is told with its count, a site that never came by name, other versions and builds by site."""
    events = story(3)
    events = [event for event in events if not (event["event"] == "site" and event["site"] == "birch")]
    for event in events:
        if event["event"] == "scores":
            del event["sites"]["birch"]
        if event["event"] == "round":
            event.get("accepted", {}).pop("birch", None)
            event["absent"] = ["birch"]
        if event["event"] == "site" and event["site"] == "elm":
            event["software"]["torch"], event["application"] = "2.12.1", "ab" * 32
    refused = {"event": "refused", "time": BEGIN + 2, "site": "birch", "code": "not-approved", "reason": HOSTILE}
    away = {"event": "refused", "time": BEGIN + 2, "site": "elm", "code": "outside-hours"}
    events[2:2] = [refused, refused, away, {"event": "stranger", "time": BEGIN + 2, "reason": "nobody"}]
    report = page_and_report(tmp_path, events)
    birch = report["sites"]["birch"]
    assert birch["refusals"] == [{"code": "not-approved", "reason": HOSTILE, "times": 2}]
    assert report["sites"]["elm"]["refusals"][0]["reason"] == "the site takes part at other hours"
    assert (birch["patients"], birch["dice"], birch["absent_rounds"]) == (None, None, [1, 2, 3])
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;x&lt;/b&gt;&#34; onload=&#34;y (2 times)" in page
    assert "<b>x" not in page
    text = words(tmp_path)
    assert "On the roster, but never there: birch." in text
    assert "The sites ran different versions: torch 2.11.0 (alder), 2.12.1 (elm)." in text
    assert "The sites ran 2 different builds" in text
    assert "second answer: 1 message." in text
    assert report["software"]["torch"] == "2.11.0 / 2.12.1"


def test_a_site_missing_from_the_last_scores_is_named() -> None:
    """A mean over the sites that happened to answer is not passed off as one over all."""
    events = story(3)
    del events[-2]["sites"]["elm"]
    report = federation_report(plan_of(), events)
    assert report["arms"]["federated"]["worst"] == pytest.approx(0.77)
    assert any("in neither mean nor worst: elm." in note for note in report["notes"])


def test_another_model_in_the_folder_is_refused(tmp_path) -> None:
    """A model that is not the journal's: nothing is written, both hashes are named. None at all is told on the page."""
    folder = write_run(tmp_path, story(3))
    task = plan_of().task
    (folder / "model.safetensors").write_bytes(serialise(task.card, initial_weights(task.model, 4)))
    with pytest.raises(UserError, match=rf"the journal's last round ended with {model_of_the_end()[1][:12]}"):
        write_federation_report(folder)
    assert not (folder / "report.json").exists()
    (folder / "model.safetensors").unlink()
    write_federation_report(folder)
    assert "model.safetensors is missing" in words(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "run.yaml").unlink(), "run.yaml: there is no such file"),
        (lambda folder: (folder / "run.yaml").write_text("name: x"), "run.yaml: "),
        (lambda folder: (folder / "journal.jsonl").write_text('x\n{"event": "session"}\n'), "line 1 of 2 is not"),
        (lambda folder: (folder / "journal.jsonl").write_text('{"event": "round"}\n'), "has not the fields"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "not a readable safetensors file"),
    ],
)
def test_a_spoilt_folder_is_one_line(tmp_path, spoil, message) -> None:
    """A missing plan, a damaged journal, a torn model: one error a person can read, and no report."""
    folder = write_run(tmp_path, story(3))
    spoil(folder)
    with pytest.raises(UserError, match=message):
        write_federation_report(folder)
    assert not (folder / "report.json").exists()


def test_the_journal_is_not_touched(tmp_path) -> None:
    """Half a line, as a run in its midst leaves it, is still there after the report."""
    folder = write_run(tmp_path, story(2, finished=False))
    with (folder / "journal.jsonl").open("a") as handle:
        handle.write('{"event": "rou')
    before = (folder / "journal.jsonl").read_bytes()
    write_federation_report(folder)
    assert (folder / "journal.jsonl").read_bytes() == before


def test_the_head_counts_what_a_built_network_has() -> None:
    """The number of parameters, counted without allocating, is that of the network that is trained."""
    plan = plan_of()
    assert describe_run(plan)["model"]["parameters"] == parameter_count(build(plan.task.card).network)


def test_what_failed_during_the_run_stands_in_its_report(tmp_path) -> None:
    """Of the server's processes what fell into the run's time; on the page, escaped, in the order of time."""
    events = story(3)
    first, last = events[0]["time"], events[-1]["time"]
    others = [
        {"time": first - 1, "what": "before", "done": "started again", "seconds": 1.0},
        {"time": first + 2.5, "what": "superlink: <signal 9>", "done": "started again", "seconds": 4.0},
        {"time": last + 1, "what": "after", "done": "started again", "seconds": None},
    ]
    report, html = write_federation_report(write_run(tmp_path, events), others)
    times = [row["time"] for row in report["incidents"]]
    assert times == sorted(times)
    assert others[1] in report["incidents"]
    assert not {"before", "after"} & {row["what"] for row in report["incidents"]}
    assert "superlink: &lt;signal 9&gt;" in html.read_text()
    assert "What failed, and what came of it" in html.read_text()
    unfinished, _ = write_federation_report(write_run(tmp_path / "more", events[:-1], model=False), others)
    assert "after" in {row["what"] for row in unfinished["incidents"]}
