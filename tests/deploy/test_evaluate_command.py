"""`medsegfed evaluate -o`: what is written, what is refused, and that every place says the same."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from deploy import evaluation_pictures
from deploy.evaluation_pictures import SHOWN, Example, Gallery, draw_example, draw_reliability, upright
from deploy.evaluation_report import COLUMNS, scores_csv
from deploy.scoring import _mean_hd95
from medsegdiff.calibration import Calibrations
from medsegdiff.labels import LabelScheme
from medsegdiff.weights import initial_weights, save_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_task) -> Path:
    """An untrained model of the tiny network."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, tiny_task.card, initial_weights(tiny_task.model, 0))
    return path


def options(model: Path, folder: Path, *more: object) -> list[object]:
    return ["evaluate", model, folder, "--steps", 1, "--threads", 1, *more]


@pytest.mark.slow
def test_a_folder_of_scores_and_pictures(medsegfed, model, tiny_source, tmp_path) -> None:
    """JSON as printed, a row a patient and target, three best and three worst, reliability; nothing else."""
    out = tmp_path / "scores"
    code, printed, err = medsegfed(*options(model, tiny_source, "--members", 2, "-o", out, "--json"))
    assert code == 0, err
    result = json.loads((out / "scores.json").read_text())
    assert json.loads(printed) == result
    pictures = [f"{kind}_{rank}.png" for kind in ("best", "worst") for rank in (1, 2, 3)]
    assert {path.name for path in out.iterdir()} == {"scores.json", "scores.csv", "reliability.png", *pictures}
    for name in [*pictures, "reliability.png"]:
        with Image.open(out / name) as picture:
            assert picture.width > 500
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert len(rows) == len(result["patients"]) == 12
    for row, patient in zip(rows, result["patients"], strict=True):
        (target,) = patient["dice"]
        assert (row["patient_id"], row["target"]) == (patient["patient_id"], target)
        assert float(row["dice"]) == patient["dice"][target]
        assert float(row["volume_error"]) == patient["volume"][target]["error"]
        for name in ("hd95_mm", "assd_mm", "surface_dice"):
            value = patient[name][target]
            assert row[name] == ("" if value is None else str(value))
        assert row["ged_squared"] == ""
    (mean,) = result["summary"]["by_target"].values()
    assert mean["iou"] == pytest.approx(np.mean([float(row["iou"]) for row in rows]))
    assert mean["volume_error_absolute"] == pytest.approx(np.mean([abs(float(row["volume_error"])) for row in rows]))
    assert (result["members"], result["surface_tolerance_mm"], mean["raters"]) == (2, 1.0, None)


@pytest.mark.slow
def test_the_table_ends_in_the_folder(medsegfed, model, tiny_source, tmp_path) -> None:
    """The tolerance is named with the surface Dice; a larger one is met by more of the surface."""
    found = []
    for tolerance in ("0.5", "40"):
        out = tmp_path / tolerance
        more = ["--split", "test", "--surface-tolerance", tolerance, "-o", out]
        code, printed, _ = medsegfed(*options(model, tiny_source, *more))
        assert code == 0
        assert printed.strip().endswith(f"Scores and pictures: {out}")
        assert f"surface Dice at {tolerance} mm" in " ".join(printed.split())
        assert "the one of medsegfed train" in " ".join(printed.split())  # a simulation's model may know its patients
        (mean,) = json.loads((out / "scores.json").read_text())["summary"]["by_target"].values()
        found.append(mean["surface_dice"])
    assert found[0] < found[1]


@pytest.mark.slow
def test_same_figures_same_bytes() -> None:
    """No date, no counter, no setting of the reader's goes into a picture."""
    calibrations = Calibrations(("t",))
    calibrations.add(torch.full((1, 4, 4, 2), 0.5).half(), torch.ones(1, 4, 4, 2, dtype=torch.bool))
    with mpl.rc_context({"font.size": 25, "axes.grid": False}):
        first = draw_example(example(0.5), ("t",), "best"), draw_reliability(calibrations.results())
    assert (draw_example(example(0.5), ("t",), "best"), draw_reliability(calibrations.results())) == first


@pytest.mark.slow
def test_nothing_is_overwritten_and_nothing_half_written(medsegfed, model, tiny_source, tmp_path, monkeypatch) -> None:
    """A folder in use, a file, a tolerance that is none: refused at once; a failure on the way leaves nothing."""
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("mine")
    for out in (used, used / "mine.txt"):
        code, _, err = medsegfed(*options(model, tiny_source, "-o", out))
        assert code == 2
        assert "not an empty folder; nothing was written" in err
    assert [path.name for path in used.iterdir()] == ["mine.txt"]
    for tolerance in ("nan", "inf", "-1"):
        assert medsegfed(*options(model, tiny_source, "--surface-tolerance", tolerance, "-o", tmp_path / "t"))[0] == 2

    def fail(_: object) -> bytes:
        raise RuntimeError("no ink")

    monkeypatch.setattr(evaluation_pictures, "draw_reliability", fail)
    with pytest.raises(RuntimeError, match="no ink"):
        medsegfed(*options(model, tiny_source, "--split", "test", "-o", tmp_path / "t"))
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


@pytest.mark.slow
def test_several_raters_are_scored(medsegfed, model, tiny_source, tmp_path) -> None:
    """A folder where two people drew: per patient, in the summary, in the table and in the CSV."""
    source = Path(shutil.copytree(tiny_source, tmp_path / "source"))
    rows = list(csv.DictReader((source / "cases.csv").open()))
    first: dict[str, str] = {}  # of a scanner: its images are of one size
    for row in rows[:-1]:
        own = row["mask_path"]
        row["mask_path"] += ";" + first.setdefault(row["patient_id"].split("-")[0], own)
    with (source / "cases.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    more = ["--members", 3, "-o", tmp_path / "scores"]
    code, printed, err = medsegfed(*options(model, source, *more))
    assert code == 0, err
    result = json.loads((tmp_path / "scores" / "scores.json").read_text())
    (mean,) = result["summary"]["by_target"].values()
    assert mean["raters"]["cases"] == 11
    assert 0 <= mean["raters"]["ged_squared"] <= 2
    assert [patient["raters"] is None for patient in result["patients"]] == [False] * 11 + [True]
    assert "GED squared" in printed
    table = list(csv.DictReader((tmp_path / "scores" / "scores.csv").open()))
    distances = [float(row["ged_squared"]) for row in table if row["ged_squared"]]
    assert np.mean(distances) == pytest.approx(mean["raters"]["ged_squared"])


def test_undefined_figures_are_empty_cells() -> None:
    """None in JSON, nothing in CSV; a patient's entry without ranges or raters has empty cells for them."""
    volume = {"unit": "ml", "true": 0.0, "predicted": 1.0, "error": 1.0, "relative": None}
    patient = {
        "patient_id": 'a,"b"', "site": None, "volumes": 1, "sizes": None, "raters": None, "volume": {"t": volume},
        "dice": {"t": 0.0}, "iou": {"t": 0.0}, "hd95_mm": {"t": None}, "hd95_undefined": {"t": 1},
        "assd_mm": {"t": None}, "surface_dice": {"t": 0.0},
    }  # fmt: skip
    (row,) = csv.DictReader(scores_csv({"patients": [patient]}).splitlines())
    assert row["patient_id"] == 'a,"b"'
    empty = {"site", "hd95_mm", "assd_mm", "volume_error_relative", "volume_low", "volume_high", "volume_covered"}
    empty |= {"rated_cases", "ged_squared", "hm_iou"}
    assert {name for name, cell in row.items() if cell == ""} == empty
    assert set(COLUMNS) < set(row)


def example(dice: float, size: int = 5) -> Example:
    """A bright disc on grey."""
    rows, columns = np.mgrid[:40, :60]
    disc = ((rows - 20) ** 2 + (columns - 30) ** 2 < size**2)[None]
    image = (80 + 90 * disc[0]).astype(np.uint8)
    return Example(f"p{dice}", "case c", dice, image, disc, disc, np.zeros((40, 60), np.uint8), 1.0, (1, 1))


@pytest.mark.parametrize("patients", [1, 2, 5, 6, 9])
def test_the_gallery_keeps_the_best_and_the_worst(monkeypatch: pytest.MonkeyPatch, patients: int) -> None:
    """No patient twice, best first and worst first, and never more kept than are shown."""
    drawn: list[tuple[str, float]] = []
    monkeypatch.setattr(evaluation_pictures, "_example", lambda prepared, answer, scheme: prepared)

    def note(found: Example, targets: object, rank: str) -> bytes:
        drawn.append((rank, found.dice))
        return b""

    monkeypatch.setattr(evaluation_pictures, "draw_example", note)
    gallery = Gallery(LabelScheme(("background", "t"), ("t",), ((1,),)))
    order = np.random.default_rng(0).permutation(patients)
    for dice in order.tolist():
        gallery.add(replace(example(0.0), size=(3, 0), place="small"), None, None)
        gallery.add(replace(example(0.0), size=(9, 0), place="large"), None, float(dice))
        assert len(gallery._kept) <= 2 * SHOWN
        assert {kept.place for kept in gallery._kept} == {"large"}
    best = list(range(patients))[::-1][: min(3, -(-patients // 2))]
    worst = list(range(patients))[: min(3, patients // 2)]
    names = list(gallery.pictures())
    assert names == [f"best_{n + 1}.png" for n in range(len(best))] + [f"worst_{n + 1}.png" for n in range(len(worst))]
    assert [dice for _, dice in drawn] == best + worst
    assert drawn[0][0] == f"best 1 of {patients}"


def test_volumes_are_shown_as_radiologists_see_them() -> None:
    """Anterior on top and the patient's right on the left of an axial slice; sagittal slices are not mirrored."""
    plane = np.arange(6).reshape(2, 3)  # [left 0, right 1] x [posterior 0, ..., anterior 2]
    assert upright(plane, mirrored=True).tolist() == [[5, 2], [4, 1], [3, 0]]
    assert upright(plane[None], mirrored=False)[0].tolist() == [[2, 5], [1, 4], [0, 3]]


@pytest.mark.slow
def test_a_small_structure_is_shown_in_detail_with_a_frame() -> None:
    """Pixels change where the structure is enlarged; a name with a dollar sign is drawn as it is."""
    small, large = (draw_example(replace(example(0.5, size), patient_id="$x$"), ("t",), "best") for size in (3, 18))
    with Image.open(BytesIO(small)) as one, Image.open(BytesIO(large)) as other:
        assert one.size != other.size
    empty = replace(example(0.5), truth=np.zeros((1, 40, 60), bool), prediction=np.zeros((1, 40, 60), bool))
    assert draw_example(empty, ("t",), "worst").startswith(b"\x89PNG")


@pytest.mark.slow
def test_reliability_is_drawn_for_any_number_of_targets() -> None:
    """One, seven, and one of which there is nothing."""
    for count in (1, 7):
        calibrations = Calibrations(tuple(f"t{n}" for n in range(count)))
        truth = torch.zeros(count, 8, 8, 2, dtype=torch.bool)
        truth[1:, 2:5] = True
        calibrations.add((truth * 0.7).half(), truth)
        assert draw_reliability(calibrations.results()).startswith(b"\x89PNG")


def test_a_mean_distance_says_of_how_many_patients_it_is() -> None:
    """A model that finds nothing in most patients must not shine by the distances of the few."""
    patients = [{"hd95_mm": {"t": value}} for value in (4.0, None, None)]
    assert _mean_hd95({"patients": patients}, "t") == "4.0 (1 of 3)"
    assert _mean_hd95({"patients": patients[:1]}, "t") == "4.0"
    assert _mean_hd95({"patients": patients[1:]}, "t") == "-"
