"""Nothing of a patient is left anywhere: names planted in all that a site reads turn up nowhere else."""

from __future__ import annotations

import json
from typing import Any

from tests.e2e.federation.canaries import CANARIES, traces
from tests.e2e.federation.conftest import SITES, FirstRun, Scene

OWN = ("data", "cache")  # what a site keeps of its patients for itself


def test_no_name_of_a_patient_leaves_the_data(scene: Scene, first_run: FirstRun, report: Any) -> None:
    """Not in logs, journal, audit, checkpoints, messages kept, reports, register or terminal of anybody."""
    stage = scene.stage
    assert (stage.server / "runs" / "first" / "report.html").exists()
    places = [
        stage.server,
        *(path for path in stage.folder.glob("*.log")),
        scene.folder / "tinyproxy.log",
        first_run.kept,
    ]
    assert list(first_run.kept.rglob("*.safetensors")), "a kept update is among what is looked through"
    assert traces(*places) == []
    assert traces(*stage.sites.values(), leave_out=OWN) == []
    for site in SITES:
        assert traces(stage.sites[site] / "data"), "the control: the names are there"
        log = (stage.sites[site] / "state" / "logs" / "site.log").read_text()
        assert f"{site}: case #" in log, "the broken case is told by its hash"


def test_doctor_counts_and_does_not_name(first_run: FirstRun) -> None:
    """What it says may be mailed: the broken case is a number in it."""
    said = json.dumps(first_run.doctor).lower()
    assert not [word for word in CANARIES if word.lower() in said]
