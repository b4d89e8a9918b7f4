"""Prometheus metrics of a federation, served on loopback: what `medsegfed status` shows, as numbers over time.

Everything is read from the federation's files when it is asked for, so that counters stand where they stood after a
restart of the server. Those of requests and bytes begin anew with the gateway's log, as Prometheus expects of counters.

Labels have few values: sites of the register or the run, HTTP status codes, the contract's codes of refusal, names of
services. What a site says in words (a reason) is in the journal, never in a label. Of its patients, its average Dice
alone is here.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from deploy.run_status import ToldRun
from deploy.standing import Standing
from medsegdiff.errors import UserError
from server.rounds import RunState, round_seconds

log = logging.getLogger("medsegfed.metrics")

OTHER_SITE = "-"  # of requests without a certificate of the federation; no site can have this name
ROUND_BUCKETS = (10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400, 43_200)  # seconds: a drill to half a day
RUN_STATES = ("queued", *get_args(RunState))


class FederationCollector(Collector):
    """Collects a federation's metrics anew whenever it is asked.

    Guarantees:
        `collect` never raises: what cannot be read is left out and counted in medsegfed_problems, and
        medsegfed_up is 0 when nothing can be.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.clock = clock
        self._standing: Standing | None = None
        self._trouble = ""
        self._lock = threading.Lock()  # two Prometheus servers may ask at once

    def describe(self) -> Iterable[Metric]:
        """Nothing: else the registry would read all files to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics as they are now."""
        with self._lock:
            try:
                if self._standing is None:
                    self._standing = Standing(self.folder)
                status = self._standing.status(self.clock())
                metrics = list(_metrics(status, self._standing))
                up = 1
            except Exception as error:
                # Prometheus must see medsegfed_up 0, not an error page that looks like no server.
                if str(error) != self._trouble:  # once, not at every scrape
                    log.error("no metrics: %s", error, exc_info=not isinstance(error, UserError))
                metrics, up, self._trouble = [], 0, str(error)
        yield GaugeMetricFamily("medsegfed_up", "Whether the federation's files could be read.", value=up)
        yield from metrics


def serve_metrics(folder: Path, host: str, port: int) -> Callable[[], None]:
    """Serve a federation's metrics at http://host:port/metrics from threads of this process.

    Args:
        host: a loopback address: the metrics name hospitals, and whoever may read them reads them on this machine or
            through a proxy that asks who is there.

    Returns:
        A function that ends the serving and gives the port back.

    Raises:
        OSError: the port is taken.
        ValueError: not a loopback address.
    """
    if not ipaddress.ip_address(host).is_loopback:
        raise ValueError(f"metrics are served on loopback alone, not on {host}")
    registry = CollectorRegistry()
    registry.register(FederationCollector(folder))
    server, thread = start_http_server(port, host, registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


def _metrics(status: Mapping[str, Any], standing: Standing) -> Iterator[Metric]:
    sites = {site["site"]: site for site in status["sites"]}
    yield _gauge(
        "problems", "What `medsegfed status` names: damaged files, a server that is down.", len(status["problems"])
    )
    yield from _run_metrics(status["run"])
    yield from _round_metrics(standing.runs([]))
    yield from _site_metrics(sites)
    yield from _event_metrics(standing.runs([]), sites)
    yield from _gateway_metrics(standing, sites)
    yield _certificates(sites, status["certificates"])
    yield from _service_metrics(status["services"])


def _gauge(name: str, text: str, value: float | None) -> Metric:
    """A gauge without labels; without a sample where the value is not known."""
    family = GaugeMetricFamily(f"medsegfed_{name}", text)
    if value is not None:
        family.add_metric([], value)
    return family


def _by(kind: type[Any], name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float | None]) -> Metric:
    """One sample for each value that is known; a key is a label's value or a tuple of them."""
    family: Metric = kind(f"medsegfed_{name}", text, labels=labels)
    for key, value in values.items():
        if value is not None:
            family.add_metric([*map(str, key)] if isinstance(key, tuple) else [str(key)], value)  # type: ignore[attr-defined]
    return family


def _run_metrics(run: Mapping[str, Any] | None) -> Iterator[Metric]:
    run = run or {}
    yield _gauge("round", "The last committed round of the run at hand.", run.get("round"))
    yield _gauge("rounds_planned", "Rounds that the run at hand is to have.", run.get("rounds"))
    yield _gauge("quorum", "Sites without whose updates a round of the run at hand does not count.", run.get("quorum"))
    states = {state: float(state == run["state"]) for state in RUN_STATES} if run else {}
    yield _by(GaugeMetricFamily, "run_state", "1 for the state that the run at hand is in.", ("state",), states)
    yield _gauge("dice_mean", "Mean over sites of the Dice of the model scored last.", run.get("dice"))


def _round_metrics(runs: list[ToldRun]) -> Iterator[Metric]:
    """How long committed rounds of all runs took."""
    seconds = [spent for run in runs for spent in round_seconds(run.events)]
    buckets = [(str(float(edge)), float(sum(spent <= edge for spent in seconds))) for edge in ROUND_BUCKETS]
    buckets.append(("+Inf", float(len(seconds))))
    total = math.fsum(
        seconds
    )  # the same whatever the order of runs: a sum that fell by a last digit reads as a restart
    text = "Seconds from the beginning of a committed round to its commit."
    yield HistogramMetricFamily("medsegfed_round_seconds", text, buckets, total)
    ended = [(run.events[-1]["time"], spent) for run in runs if (spent := round_seconds(run.events))]
    last = max(ended, key=lambda pair: pair[0])[1][-1] if ended else None
    yield _gauge("last_round_seconds", "Seconds that the last committed round took.", last)


def _site_metrics(sites: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
    admitted = [site for site in sites.values() if site["status"] == "admitted"]
    yield _gauge("sites_admitted", "Sites that may take part.", len(admitted))
    yield _gauge(
        "sites_online", "Admitted sites seen within the last minute.", sum(site["online"] for site in admitted)
    )
    seen = {name: site["last_seen_seconds"] for name, site in sites.items()}
    yield _by(
        GaugeMetricFamily, "site_last_seen_seconds", "Seconds since a site's last answered request.", ("site",), seen
    )
    out = {name: float(site["status"] == "suspended") for name, site in sites.items() if site["status"] is not None}
    yield _by(
        GaugeMetricFamily, "site_suspended", "1 for a site that is suspended: medsegfed lift.", ("site",), out
    )  # fmt: skip
    dice = {name: site["dice"] for name, site in sites.items()}
    yield _by(
        GaugeMetricFamily,
        "dice",
        "Dice, averaged over a site's held-out patients, when it last scored.",
        ("site",),
        dice,
    )


def _event_metrics(runs: list[ToldRun], sites: Mapping[str, Any]) -> Iterator[Metric]:
    """Counts over the journals of all runs, so that a new run does not begin them anew."""
    rejected: Counter[str] = Counter(dict.fromkeys(sites, 0))
    accepted: Counter[str] = Counter(dict.fromkeys(sites, 0))
    refused: Counter[tuple[str, str]] = Counter()
    for run in runs:
        for event in run.events:
            site = str(event.get("site"))
            if event["event"] == "rejected":
                rejected[site if site in sites else OTHER_SITE] += 1
            if event["event"] == "refused":
                refused[site if site in sites else OTHER_SITE, str(event.get("code"))] += 1
            if event["event"] == "round":  # one that was repeated after a crash counts again: counters never fall
                accepted.update(name if name in sites else OTHER_SITE for name in event.get("accepted", {}))
    yield _by(CounterMetricFamily, "updates_accepted", "Updates that went into a committed round.", ("site",), accepted)
    yield _by(CounterMetricFamily, "updates_rejected", "Answers that screening left out.", ("site",), rejected)
    yield _by(
        CounterMetricFamily, "refusals", "Times a site declined what it was asked, by its code.", ("site", "code"),
        _known_codes(refused),
    )  # fmt: skip


def _known_codes(refused: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """Codes of the contract; any other is one label."""
    from client.contract import REFUSALS  # takes seconds (torch); the server's process has it

    found: Counter[tuple[str, str]] = Counter()
    for (site, code), times in refused.items():
        found[site, code if code in REFUSALS else "other"] += times
    return found


def _gateway_metrics(standing: Standing, sites: Mapping[str, Any]) -> Iterator[Metric]:
    """What went through the public port; a site's name is a label only if the register or the run knows it."""
    moved: Counter[tuple[str, str]] = Counter()
    answers: Counter[tuple[str, str]] = Counter()

    def label(site: str | None) -> str:
        return site if site is not None and site in sites else OTHER_SITE

    for direction, counts in (("received", standing.tally.received), ("sent", standing.tally.sent)):
        for site, size in counts.items():
            moved[direction, label(site)] += size
    for (site, status), times in standing.tally.requests.items():
        answers[label(site), str(status) if 100 <= status <= 599 else "other"] += times
    yield _by(CounterMetricFamily, "bytes", "Bytes at the gateway, from and to sites.", ("direction", "site"), moved)
    yield _by(
        CounterMetricFamily, "requests", "Requests at the gateway, by the HTTP status of their answer.",
        ("site", "status"), answers,
    )  # fmt: skip


def _certificates(sites: Mapping[str, Mapping[str, Any]], own: Mapping[str, float | None]) -> Metric:
    """`holder` tells the server's own from the sites': a site may be called "server"."""
    days: dict[tuple[str, str], float | None] = {
        ("site", name): site["certificate_days"] for name, site in sites.items()
    }
    days |= {(holder, ""): left for holder, left in own.items()}
    return _by(
        GaugeMetricFamily, "certificate_days_left", "Days until a certificate expires; negative afterwards.",
        ("holder", "site"), days,
    )  # fmt: skip


def _service_metrics(services: list[dict[str, Any]]) -> Iterator[Metric]:
    up = {row["service"]: float(bool(row["healthy"])) for row in services}
    yield _by(GaugeMetricFamily, "service_up", "Whether a process of the server runs and answers.", ("service",), up)
    restarts = {row["service"]: row["restarts"] for row in services if isinstance(row["restarts"], int)}
    yield _by(
        CounterMetricFamily, "service_restarts", "Times a process was started again since the server's start.",
        ("service",), restarts,
    )  # fmt: skip
