"""`medsegfed data import`: one dataset from its official layout to a folder that `data check` reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simulations.published.catalogue import PUBLISHED

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def isic(tmp_path: Path) -> Path:
    """Two images a part of ISIC 2018."""
    source = tmp_path / "isic"
    for start, part in ((0, "Training"), (10, "Validation"), (20, "Test")):
        images, masks = source / f"ISIC2018_Task1-2_{part}_Input", source / f"ISIC2018_Task1_{part}_GroundTruth"
        images.mkdir(parents=True)
        masks.mkdir()
        for number in range(start, start + 2):
            noise = np.random.default_rng(number).integers(0, 256, (12, 16, 3)).astype(np.uint8)
            Image.fromarray(noise).save(images / f"ISIC_{number:07d}.jpg")
            mask = np.zeros((12, 16), np.uint8)
            mask[3:9, 4:12] = 255
            Image.fromarray(mask).save(masks / f"ISIC_{number:07d}_segmentation.png")
    return source


def test_import_then_check(medsegfed: Run, isic: Path, tmp_path: Path) -> None:
    """The import says what it wrote and what comes next; the next command finds it so."""
    target = tmp_path / "target"
    code, out, err = medsegfed("data", "import", "isic2018", isic, target)
    assert (code, "Traceback" in err) == (0, False)
    assert "6 cases of 6 patients; patients by split: test 2, train 2, val 2" in out
    assert "files: 12 linked" in out
    assert f"Next: medsegfed data check {target}, then medsegfed simulate isic2018 --data {target}" in out
    code, out, _ = medsegfed("data", "check", target, "--size", "16", "--json")
    found = json.loads(out)
    assert (code, found["cases"], found["left_out"]) == (0, 6, [])


def test_json(medsegfed: Run, isic: Path, tmp_path: Path) -> None:
    """The same as data for a program."""
    code, out, _ = medsegfed("data", "import", "isic2018", isic, tmp_path / "target", "--json")
    found = json.loads(out)
    assert (code, found["cases"], found["linked"], found["folder"]) == (0, 6, 12, str(tmp_path / "target"))


def test_the_list_needs_no_arguments(medsegfed: Run) -> None:
    """Every name, with where to get it."""
    code, out, _ = medsegfed("data", "import", "--list")
    assert code == 0
    assert [line.partition(":")[0] for line in out.splitlines()] == list(PUBLISHED)


@pytest.mark.parametrize(
    ("name", "spoil", "facts"),
    [
        ("isic", "", ["'isic' is no published dataset", "isic2018, refuge, lidc"]),
        ("glas", "", ["this is not GlaS", "Expected: Warwick QU", "Found in", "ISIC2018_Task1-2_Test_Input/"]),
        ("isic2018", "ISIC2018_Task1_Test_GroundTruth/ISIC_0000021_segmentation.png", ["is not there", "Expected:"]),
    ],
)
def test_what_cannot_be_imported_is_one_line(
    medsegfed: Run, isic: Path, tmp_path: Path, name: str, spoil: str, facts: list[str]
) -> None:
    """Exit code 2, one line, nothing written."""
    if spoil:
        (isic / spoil).unlink()
    code, out, err = medsegfed("data", "import", name, isic, tmp_path / "target")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert all(fact in line for fact in facts)
    assert not (tmp_path / "target").exists()
