"""Three forms of folder, and a clear line for whatever is none of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsegdiff.data.cases import DatasetConfig
from medsegdiff.data.dataset import open_dataset
from medsegdiff.errors import UserError
from medsegdiff.labels import LabelScheme
from medsegdiff.strict import dump_yaml, parse_config

HEADER = "case_id,patient_id,image_path,mask_path"
GOOD: dict[str, Any] = {"name": "d", "modality": "MR", "channels": ["T1"], "labels": {"background": 0, "a": 1, "b": 2}}


def write_csv(root: Path, *lines: str) -> Path:
    root.mkdir(exist_ok=True)
    (root / "cases.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def test_every_column_of_cases_csv_is_read(tmp_path: Path, volume_config: DatasetConfig) -> None:
    """Optional columns, several files, blanks, a byte-order mark and unknown columns are all understood."""
    lines = (
        "\ufeff" + HEADER + ",site,split,volume_id,slice_index,spacing_mm,mood",
        "s1,p1,a.png; b.png,m.png;n.png,north,Train,v1,3,0.5x0.75x2,fine",
        "s2,p1,c.png,,north,,,,,",
        "",
    )
    first, second = open_dataset(write_csv(tmp_path / "d", *lines), volume_config).cases
    assert first.image_paths == (tmp_path / "d/a.png", tmp_path / "d/b.png")
    assert first.mask_paths == (tmp_path / "d/m.png", tmp_path / "d/n.png")
    assert (first.site, first.split, first.volume_id, first.slice_index) == ("north", "train", "v1", 3)
    assert first.spacing_mm == (0.5, 0.75, 2.0)
    assert (second.mask_paths, second.split, second.volume_id, second.slice_index) == ((), None, None, None)


@pytest.mark.parametrize(
    ("lines", "reasons"),
    [
        (("case_id,image_path,mask_path", "a,b,c"), ("patient_id", "missing")),
        (("",), ("no header",)),
        ((HEADER,), ("no case",)),
        ((HEADER, "a,p,i.png,m.png", "b,,scan.png,m.png"), ("line 3", "scan.png", "patient_id")),
        ((HEADER, "b"), ("line 2", "patient_id")),
        ((HEADER, ",p,scan.png,m.png"), ("line 2", "case_id", "scan.png")),
        ((HEADER, "a,p,i.png,m.png", "a,q,j.png,n.png"), ("case_id a", "twice")),
        ((HEADER + ",split", "a,p,i.png,m.png,training"), ("line 2", "'training'", "train, val, test")),
        ((HEADER + ",site", "a,p,i.png,m.png,N", "b,p,j.png,n.png,S"), ("patient p", "N", "S")),
        ((HEADER + ",site", "a,p,i.png,m.png,N", "b,p,j.png,n.png,"), ("patient p", "N", "(none)")),
        ((HEADER + ",spacing_mm", "a,p,i.png,m.png,1"), ("line 2", "spacing_mm '1'")),
        ((HEADER + ",spacing_mm", "a,p,i.png,m.png,1x-1"), ("spacing_mm '1x-1'",)),
        ((HEADER + ",spacing_mm", "a,p,i.png,m.png,1xnan"), ("spacing_mm '1xnan'",)),
        ((HEADER + ",volume_id,slice_index", "a,p,i.png,m.png,v,"), ("line 2", "slice_index ''", "volume v")),
        ((HEADER + ",volume_id,slice_index", "a,p,i,m,v,1", "b,p,i,m,v,1"), ("volume v", "slice_index 1 twice", "b")),
        ((HEADER + ",volume_id,slice_index", "a,p,i,m,v,1", "b,q,i,m,v,2"), ("volume v", "patients p and q")),
        ((HEADER, 'a,p,"i.png,m.png'), ("UTF-8 CSV",)),
    ],
)
def test_a_faulty_table_is_refused_in_one_line(
    tmp_path: Path, volume_config: DatasetConfig, lines: tuple[str, ...], reasons: tuple[str, ...]
) -> None:
    """The message names file, place and fault."""
    with pytest.raises(UserError) as caught:
        open_dataset(write_csv(tmp_path / "d", *lines), volume_config)
    message = str(caught.value)
    assert "cases.csv" in message
    assert "\n" not in message
    for reason in reasons:
        assert reason in message


def test_a_table_in_another_encoding_is_refused(tmp_path: Path, volume_config: DatasetConfig) -> None:
    """Latin-1 bytes are not guessed at."""
    root = write_csv(tmp_path / "d", HEADER)
    (root / "cases.csv").write_bytes(HEADER.encode() + b"\nM\xfcller,p,i,m\n")
    with pytest.raises(UserError, match="UTF-8"):
        open_dataset(root, volume_config)


def test_a_folder_that_is_not_there_or_nothing_known_is_refused(tmp_path: Path, volume_config: DatasetConfig) -> None:
    """One line each for: no folder, none of the three forms, cases.csv without a configuration."""
    with pytest.raises(UserError, match="no such folder"):
        open_dataset(tmp_path / "nowhere", volume_config)
    with pytest.raises(UserError, match=r"neither cases\.csv nor"):
        open_dataset(tmp_path, volume_config)
    (tmp_path / "dataset.json").write_text('{"something": "else"}')
    with pytest.raises(UserError, match=r"neither cases\.csv nor"):
        open_dataset(tmp_path, volume_config)
    with pytest.raises(UserError, match=r"no dataset\.yaml"):
        open_dataset(write_csv(tmp_path / "d", HEADER, "a,p,i,m"))


@pytest.mark.parametrize("content", ["{", "[1, 2]", "\xff"])
def test_a_dataset_json_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    """Torn JSON, another shape and other bytes end in one line."""
    (tmp_path / "dataset.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"dataset\.json"):
        open_dataset(tmp_path)


def test_the_folders_own_configuration_wins(tmp_path: Path, grey_config: DatasetConfig) -> None:
    """dataset.yaml beside cases.csv is read before what the caller offers, as a path or as an object."""
    root = write_csv(tmp_path / "d", HEADER, "a,p,i.png,m.png")
    offered = tmp_path / "offered.yaml"
    offered.write_text(dump_yaml(GOOD | {"name": "offered"}))
    assert open_dataset(root, offered).config.name == "offered"
    assert open_dataset(root, grey_config).config == grey_config
    (root / "dataset.yaml").write_text(dump_yaml(GOOD | {"name": "own"}))
    assert open_dataset(root, grey_config).config.name == "own"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": {"a": 0, "b": 1}}, "background"),
        ({"labels": {"background": 0}}, "2 to"),
        ({"labels": {"background": 0, "a": 0}}, "belongs to both"),
        ({"labels": {"background": 0, "a": []}}, "no value"),
        ({"labels": {"background": 0, "a": -1}}, "outside"),
        ({"labels": {"background": 0, "a": 70_000}}, "outside"),
        ({"labels": {"background": 0, "a": "red"}}, "'red'"),
        ({"labels": {"background": 0, "a": "#ff0000"}}, "all integers or all colours"),
        ({"labels": {"background": "#AA0000", "a": "#aa0000"}}, "belongs to both"),
        ({"labels": {"background": 0, "a": 0.5}}, "labels"),
        ({"channels": []}, "channel"),
        ({"channels": ["x", "x"]}, "repeat"),
        ({"slice_axis": 3}, "slice_axis"),
        ({"targets": {}}, "at least one target"),
        ({"targets": {"t": []}}, "joins no label"),
        ({"targets": {"t": ["c"]}}, r"\['c'\]"),
        ({"targets": {"t": ["background"]}}, "background"),
        ({"name": " "}, "name"),
        ({"chanels": ["x"]}, "did you mean 'channels'"),
    ],
)
def test_a_faulty_configuration_is_refused(changes: dict[str, Any], reason: str) -> None:
    """Each contradiction in dataset.yaml has its own line, naming the source."""
    with pytest.raises(UserError, match=reason) as caught:
        parse_config(GOOD | changes, DatasetConfig, "dataset.yaml")
    assert str(caught.value).startswith("dataset.yaml")


def make_nnunet(root: Path, nifti: Callable[..., Path], labels: dict[str, Any]) -> Path:
    """Two cases with two channels each, and the mask of only the first."""
    for case in ("B", "A"):
        for channel in range(2):
            nifti(root / "imagesTr" / f"{case}_{channel:04d}.nii.gz", np.zeros((3, 3, 3), np.float32))
    nifti(root / "labelsTr/A.nii.gz", np.zeros((3, 3, 3), np.uint8))
    description = {"channel_names": {"0": "FLAIR", "1": "T1c"}, "labels": labels, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def test_an_nnunet_folder_is_read_as_it_is(tmp_path: Path, nifti: Callable[..., Path]) -> None:
    """Channels in order, the case as the patient, a missing mask left for preparation to report."""
    root = make_nnunet(tmp_path / "Dataset001_Brain", nifti, {"background": 0, "tumour": 1})
    dataset = open_dataset(root)
    assert dataset.config.channels == ("FLAIR", "T1c")
    assert dataset.config.name == "Dataset001_Brain"
    assert [(case.case_id, case.patient_id) for case in dataset.cases] == [("A", "A"), ("B", "B")]
    assert [path.name for path in dataset.cases[0].image_paths] == ["A_0000.nii.gz", "A_0001.nii.gz"]
    assert [len(case.mask_paths) for case in dataset.cases] == [1, 0]


def test_nnunet_regions_become_overlapping_targets(tmp_path: Path, nifti: Callable[..., Path]) -> None:
    """Labels given as lists of values are targets over labels named after the values."""
    regions = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    scheme = LabelScheme.of(open_dataset(make_nnunet(tmp_path / "d", nifti, regions)).config)
    assert scheme.labels == ("background", "value 1", "value 2", "value 3")
    assert dict(zip(scheme.targets, scheme.members, strict=True)) == {
        "whole": (1, 2, 3),
        "core": (2, 3),
        "enhancing": (3,),
    }
    assert scheme.kind == "regions"


def test_a_missing_nnunet_channel_keeps_its_place(tmp_path: Path, nifti: Callable[..., Path]) -> None:
    """The absent file is named, instead of the next channel taking its place."""
    root = make_nnunet(tmp_path / "d", nifti, {"background": 0, "tumour": 1})
    (root / "imagesTr/A_0000.nii.gz").unlink()
    assert [path.name for path in open_dataset(root).cases[0].image_paths] == ["A_0000.nii.gz", "A_0001.nii.gz"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, "ignore"),
        ({"labels": [0, 1]}, "mappings"),
        ({"file_ending": None}, "file_ending"),
    ],
)
def test_an_odd_nnunet_description_is_refused(
    tmp_path: Path, nifti: Callable[..., Path], change: dict[str, Any], reason: str
) -> None:
    """What cannot be understood of dataset.json is named."""
    root = make_nnunet(tmp_path / "d", nifti, {"background": 0, "tumour": 1})
    description = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(description | change))
    with pytest.raises(UserError, match=reason):
        open_dataset(root)


def test_nnunet_names_and_folders_are_checked(tmp_path: Path, nifti: Callable[..., Path]) -> None:
    """A file without a channel number and a missing folder are refused."""
    root = make_nnunet(tmp_path / "d", nifti, {"background": 0, "tumour": 1})
    nifti(root / "imagesTr/C.nii.gz", np.zeros((3, 3, 3), np.float32))
    with pytest.raises(UserError, match=r"C\.nii\.gz"):
        open_dataset(root)
    (root / "imagesTr/C.nii.gz").unlink()
    (root / "labelsTr").rename(root / "labels")
    with pytest.raises(UserError, match="labelsTr"):
        open_dataset(root)


DECATHLON: dict[str, Any] = {
    "name": "Hippo",
    "modality": {"0": "MRI"},
    "labels": {"0": "Background", "1": "Anterior", "2": "Posterior"},
    "training": [{"image": "./imagesTr/h_001.nii.gz", "label": "./labelsTr/h_001.nii.gz"}],
}


def test_a_decathlon_folder_is_read_as_it_is(tmp_path: Path) -> None:
    """Labels by value, the image's stem as the patient, the background in any capitals."""
    (tmp_path / "dataset.json").write_text(json.dumps(DECATHLON))
    dataset = open_dataset(tmp_path)
    assert dataset.config.labels == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert dataset.config.channels == ("MRI",)
    (case,) = dataset.cases
    assert (case.case_id, case.patient_id) == ("h_001", "h_001")
    assert case.mask_paths == (tmp_path / "labelsTr/h_001.nii.gz",)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": {"x": "background"}}, "voxel value"),
        ({"labels": ["a"]}, "mappings"),
        ({"training": {}}, "list"),
        ({"training": ["a.nii.gz"]}, "entry 0"),
        ({"training": []}, "no case"),
    ],
)
def test_an_odd_decathlon_description_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    """What cannot be understood of dataset.json is named."""
    (tmp_path / "dataset.json").write_text(json.dumps(DECATHLON | change))
    with pytest.raises(UserError, match=reason):
        open_dataset(tmp_path)
