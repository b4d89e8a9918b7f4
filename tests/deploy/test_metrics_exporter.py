"""The exporter: every figure is the files', in a form that Prometheus reads, whatever sites are called or say."""

from __future__ import annotations

import json
import math
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.openmetrics import exposition
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from told_run import BEGIN, ROUND, one_round, story
from watched_federation import make_federation, requests, supervise, tell_run

from deploy import metrics
from deploy.federation import Federation
from deploy.metrics import FederationCollector, serve_metrics
from server.members import edit_members

NOW = BEGIN + 15 + 2 * ROUND + 25
HOSTILE = 'x"} 1\nmedsegfed_up{a="\\'

Samples = dict[str, dict[frozenset[tuple[str, str]], float]]


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Three members and a run of which two of ten rounds are committed."""
    made = make_federation(tmp_path / "federation")
    tell_run(made, story(2, finished=False), rounds=10)
    return made


def text_of(collector: FederationCollector) -> str:
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


def scrape(federation: Federation, now: float = NOW) -> Samples:
    """What Prometheus reads: name -> labels -> value."""
    return read(text_of(FederationCollector(federation.folder, lambda: now)))


def read(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values = found.setdefault(sample.name, {})
            labels = frozenset(sample.labels.items())
            assert labels not in values, f"{sample.name} {labels} stands twice"
            values[labels] = sample.value
    return found


def one(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"medsegfed_{name}"][frozenset(labels.items())]


def told(kind: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"event": kind, "time": time, **fields}


def test_every_figure_of_the_status(federation) -> None:
    """Rounds, sites, Dice, seconds, bytes, certificates and services, as the files have them."""
    requests(federation, (NOW - 3, "alder", 200), (NOW - 2, "birch", 200), (NOW - 600, "elm", 200), (NOW, "elm", 403))
    requests(federation, (NOW - 1, "", 400), (NOW - 1, "", 400))
    supervise(federation, gateway={}, superlink={"restarts": 3, "healthy": False})
    found = scrape(federation)
    assert [one(found, name) for name in ("up", "round", "rounds_planned", "quorum")] == [1, 2, 10, 2]
    assert [one(found, name) for name in ("sites_admitted", "sites_online", "problems")] == [3, 2, 0]
    assert one(found, "run_state", state="running") == 1
    assert sum(found["medsegfed_run_state"].values()) == 1
    assert one(found, "site_last_seen_seconds", site="elm") == 600
    assert one(found, "dice", site="elm") == pytest.approx(0.59)
    assert one(found, "dice_mean") == pytest.approx((0.71 + 0.67 + 0.59) / 3)
    assert one(found, "last_round_seconds") == 60
    assert one(found, "round_seconds_count") == 2
    assert one(found, "round_seconds_sum") == 120
    assert one(found, "round_seconds_bucket", le="30.0") == 0
    assert one(found, "round_seconds_bucket", le="60.0") == one(found, "round_seconds_bucket", le="+Inf") == 2
    assert one(found, "bytes_total", direction="received", site="elm") == 2000
    assert one(found, "bytes_total", direction="sent", site="-") == 1000
    assert one(found, "requests_total", site="elm", status="403") == 1
    assert one(found, "requests_total", site="-", status="400") == 2
    assert one(found, "certificate_days_left", holder="site", site="birch") == pytest.approx(89, abs=0.01)
    assert one(found, "certificate_days_left", holder="ca", site="") > 1000
    assert one(found, "certificate_days_left", holder="server", site="") > 100
    assert one(found, "service_up", service="gateway") == 1
    assert one(found, "service_up", service="superlink") == 0
    assert one(found, "service_restarts_total", service="superlink") == 3
    assert one(found, "updates_accepted_total", site="alder") == 2
    assert one(found, "updates_rejected_total", site="alder") == 0


def test_before_anything_happened(tmp_path) -> None:
    """Members alone: what is not known has no sample, rather than a zero that would be taken for one."""
    bare = make_federation(tmp_path / "federation", ("alder",))
    found = scrape(bare)
    assert one(found, "sites_admitted") == 1
    assert one(found, "sites_online") == 0
    assert one(found, "round_seconds_count") == 0
    for name in ("round", "rounds_planned", "dice", "dice_mean", "site_last_seen_seconds", "run_state", "service_up"):
        assert f"medsegfed_{name}" not in found


def test_counts_are_over_all_runs_and_survive_a_restart(federation) -> None:
    """Rejections and refusals of every journal: a fresh exporter counts the same, and a new run takes nothing away."""
    events = [
        *story(1, finished=False),
        told("rejected", BEGIN + 90, round=2, site="birch", reason="it is not signed"),
        told("refused", BEGIN + 91, site="elm", code="not-approved"),
        told("refused", BEGIN + 92, site="elm", code="not-approved"),
    ]
    tell_run(federation, events, name="earlier")
    before = scrape(federation)
    assert one(before, "updates_rejected_total", site="birch") == 1
    assert one(before, "refusals_total", site="elm", code="not-approved") == 2
    assert one(before, "updates_accepted_total", site="elm") == 3
    tell_run(federation, [told("rejected", BEGIN, round=1, site="birch", reason="x")], name="later")
    after = scrape(federation)
    assert one(after, "updates_rejected_total", site="birch") == 2
    for name, values in before.items():
        if name.endswith(("_total", "_count", "_sum", "_bucket")):
            assert all(after[name][labels] >= value for labels, value in values.items()), name


def test_a_round_that_is_repeated_lowers_no_counter(federation) -> None:
    """A lost checkpoint: round 2 is committed again, with one site less."""
    folder = tell_run(federation, story(2, finished=False), rounds=10)
    collector = FederationCollector(federation.folder, lambda: NOW)
    before = read(text_of(collector))
    again = one_round(2, BEGIN + 500)[0]
    del again["accepted"]["elm"]
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps(again) + "\n")
    after = read(text_of(collector))
    assert one(before, "updates_accepted_total", site="elm") == one(after, "updates_accepted_total", site="elm") == 2
    assert one(after, "updates_accepted_total", site="alder") == 3
    (folder / "journal.jsonl").write_text("x\n{}\n")  # and one that becomes unreadable neither
    spoilt = read(text_of(collector))
    assert one(spoilt, "updates_accepted_total", site="alder") == 3
    assert one(spoilt, "problems") >= 1


def test_no_words_of_a_site_become_labels(federation) -> None:
    """Names that nobody enrolled, odd codes, any number of them, and reasons: a bounded number of samples."""
    events = story(1, finished=False)
    for number in range(300):
        events.append(told("refused", BEGIN + 90, site=f"made-up-{number}", code="not-approved"))
        events.append(told("refused", BEGIN + 90, site="elm", code=f"code-{number}"))
        events.append(told("rejected", BEGIN + 90, round=2, site=f"{HOSTILE}{number}", reason=f"{HOSTILE}{number}"))
    events.append(told("refused", BEGIN + 90, site="elm", code=HOSTILE))
    tell_run(federation, events, rounds=10)
    requests(federation, *((NOW, f"made-up-{number}", 200 + number % 3) for number in range(300)))
    requests(federation, (NOW, "alder", 999_999), (NOW, "alder", -1))
    found = scrape(federation)
    assert one(found, "refusals_total", site="-", code="not-approved") == 300
    assert one(found, "refusals_total", site="elm", code="other") == 301
    assert one(found, "updates_rejected_total", site="-") == 300
    assert one(found, "requests_total", site="alder", status="other") == 2
    assert {dict(labels)["site"] for labels in found["medsegfed_requests_total"]} == {"alder", "-"}
    assert sum(len(values) for values in found.values()) < 150
    assert "made-up" not in text_of(FederationCollector(federation.folder))


def test_hostile_names_stay_inside_their_quotes(federation) -> None:
    """A roster names a site with quotes, braces and line breaks: it is read back as one label, nothing is injected."""
    folder = federation.runs / "glioma-1"
    plan = (folder / "run.yaml").read_text().replace("alder:", json.dumps(HOSTILE) + ":")
    (folder / "run.yaml").write_text(plan)
    text = text_of(FederationCollector(federation.folder, lambda: NOW))
    found = read(text)
    assert found["medsegfed_up"] == {frozenset(): 1.0}
    sites = {dict(labels)["site"] for labels in found["medsegfed_updates_rejected_total"]}
    assert len(sites) == 4
    assert any("medsegfed_up{a=" in site for site in sites)


def test_a_site_called_server_is_not_the_server(tmp_path) -> None:
    """Nor is one called ca the authority: who holds a certificate is a label of its own."""
    made = make_federation(tmp_path / "federation", ("server", "ca"))
    found = scrape(made)
    assert len(found["medsegfed_certificate_days_left"]) == 4
    assert one(found, "certificate_days_left", holder="site", site="server") == pytest.approx(90, abs=0.01)


def test_revoked_sites_are_not_admitted(federation) -> None:
    """Nor online, though they knock."""
    requests(federation, (NOW - 3, "elm", 200))
    with edit_members(federation.members_file) as members:
        members["elm"] = members["elm"].__class__(**{**vars(members["elm"]), "status": "revoked"})
    found = scrape(federation)
    assert (one(found, "sites_admitted"), one(found, "sites_online")) == (2, 0)


def test_a_suspended_site_is_told(federation) -> None:
    """1 for it, 0 for the others, until it is lifted."""
    with edit_members(federation.members_file) as members:
        members["elm"] = members["elm"].__class__(**{**vars(members["elm"]), "status": "suspended"})
    found = scrape(federation)
    assert [one(found, "site_suspended", site=site) for site in ("alder", "birch", "elm")] == [0, 0, 1]
    assert one(found, "sites_admitted") == 2


def test_names_and_texts_keep_the_conventions(federation) -> None:
    """Prefix, lower case, a unit or none, `_total` on counters alone, a sentence of help for each, no name twice."""
    supervise(federation, gateway={})
    families = list(FederationCollector(federation.folder, lambda: NOW).collect())
    names = [family.name for family in families]
    assert len(set(names)) == len(names)
    for family in families:
        assert family.name.startswith("medsegfed_")
        assert family.name == family.name.lower()
        assert family.documentation.endswith(".")
        assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))  # what is added to names by kind
        if isinstance(family, GaugeMetricFamily | CounterMetricFamily):
            assert all(math.isfinite(sample.value) for sample in family.samples)
    text = text_of(FederationCollector(federation.folder, lambda: NOW))
    for family in families:
        assert f"# HELP {family.name}" in text
    openmetrics = exposition.generate_latest(SimpleNamespace(collect=lambda: families)).decode()
    assert {family.name for family in parse_openmetrics(openmetrics)} == set(names)


def test_a_federation_that_cannot_be_read_is_down_and_comes_back(federation) -> None:
    """federation.yaml is being mended: up is 0, nothing is raised; then everything is there."""
    config = federation.config_file.read_text()
    federation.config_file.write_text("name: [")
    collector = FederationCollector(federation.folder, lambda: NOW)
    assert read(text_of(collector)) == {"medsegfed_up": {frozenset(): 0.0}}
    federation.config_file.write_text(config)
    assert one(read(text_of(collector)), "round") == 2


def test_a_defect_of_ours_is_no_error_page(federation, monkeypatch, caplog) -> None:
    """Whatever goes wrong inside, Prometheus is told that nothing is known, and the log has the cause, once."""
    collector = FederationCollector(federation.folder, lambda: NOW)
    monkeypatch.setattr(metrics, "_metrics", lambda status, standing: {}["of ours"])
    for _ in range(3):
        assert read(text_of(collector)) == {"medsegfed_up": {frozenset(): 0.0}}
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    monkeypatch.undo()
    assert one(read(text_of(collector)), "up") == 1


def test_many_ask_at_once(federation) -> None:
    """Two Prometheus servers and a person: everybody gets whole figures, and requests are counted once."""
    collector = FederationCollector(federation.folder, lambda: NOW)
    requests(federation, *((NOW, "alder", 200) for _ in range(500)))
    answers: list[Samples] = []
    threads = [threading.Thread(target=lambda: answers.append(read(text_of(collector)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one(answer, "requests_total", site="alder", status="200") for answer in answers] == [500] * 6


@pytest.fixture
def served(federation) -> Iterator[int]:
    """The port of an exporter."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    stop = serve_metrics(federation.folder, "127.0.0.1", port)
    yield port
    stop()


def fetch(port: int) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return str(answer.read().decode())


def test_it_is_served_on_loopback_until_it_is_stopped(federation) -> None:
    """Prometheus can read it; afterwards the port is free; another address than loopback is refused."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    stop = serve_metrics(federation.folder, "127.0.0.1", port)
    assert one(read(fetch(port)), "round") == 2
    with pytest.raises(OSError):  # noqa: PT011 - the system's words differ
        serve_metrics(federation.folder, "127.0.0.1", port)
    stop()
    with pytest.raises(urllib.error.URLError):
        fetch(port)
    serve_metrics(federation.folder, "127.0.0.1", port)()
    for host in ("0.0.0.0", "192.0.2.1", "::"):
        with pytest.raises(ValueError, match="loopback"):
            serve_metrics(federation.folder, host, port)


def test_nothing_of_a_patient_is_exported(served, federation) -> None:
    """Counts, means over patients, times and states; no number of faults, no single case, no word of a site."""
    text = fetch(served)
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line and not line.startswith("#")}
    assert not any(word in name for name in names for word in ("patient", "case", "loss", "reason"))
    assert metrics.OTHER_SITE not in federation.members()
