"""Configuration files: every slip is answered with file, key and remedy, in one line."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from medsegdiff.config import AugmentConfig, ModelConfig, TrainingConfig
from medsegdiff.data.cases import DatasetConfig
from medsegdiff.errors import UserError
from medsegdiff.strict import (
    MAX_CONFIG_BYTES,
    Strict,
    canonical_json,
    dump_yaml,
    load_yaml,
    parse_config,
    plain,
    read_config,
)


@dataclass(frozen=True)
class Site(Strict):
    """A list's entry."""

    name: str
    steps: int = 5


@dataclass(frozen=True)
class Run(Strict):
    """Nested once and in a list."""

    seed: int
    training: TrainingConfig = TrainingConfig()
    sites: tuple[Site, ...] = ()
    by_name: dict[str, Site] = field(default_factory=dict)
    extra: Site | None = None


def refusal(path: Path, text: str | bytes, kind: type = Run) -> str:
    """What is said of a file with this content; checks that it is one line and names the file."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_config(path, kind)
    said = str(caught.value)
    assert said.startswith(str(path))
    assert "\n" not in said
    assert len(said) < 1000
    return said


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def test_a_proper_file_is_read(file: Path) -> None:
    """Nested keys arrive, the rest keeps its default, lists become tuples."""
    file.write_text(
        "seed: 3\ntraining: {batch_size: 4, augment: {flip: false}}\nsites: [{name: a}, {name: b, steps: 9}]\n"
    )
    run = read_config(file, Run)
    assert run == Run(3, TrainingConfig(batch_size=4, augment=AugmentConfig(flip=False)), (Site("a"), Site("b", 9)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\ntrainin: {}", ["trainin:", "unknown key", "did you mean 'training'?"]),
        ("seed: 1\ntraining: {batchsize: 4}", ["training.batchsize:", "did you mean 'batch_size'?"]),
        ("seed: 1\ntraining: {augment: {flipp: true}}", ["training.augment.flipp:", "did you mean 'flip'?"]),
        ("seed: 1\nsites: [{name: a}, {name: b, step: 1}]", ["sites.1.step:", "did you mean 'steps'?"]),
        ("seed: 1\nextra: {name: a, step: 1}", ["step:", "did you mean 'steps'?"]),
        ("seed: 1\nqqqq: 1", ["qqqq:", "known keys: seed, training, sites"]),
        ("training: {}", ["seed:", "required"]),
        ("seed: 1\nsites: [{steps: 3}]", ["sites.0.name:", "required"]),
        ("seed: many", ["seed:", "integer", "'many'"]),
        ("seed: 1.5", ["seed:", "integer", "1.5"]),
        ("seed: [1]", ["seed:"]),
        ("seed: 2020-01-01", ["seed:"]),
        ("seed: 1\ntraining: 7", ["training:"]),
        ("seed: 1\nsites: {a: 1}", ["sites"]),
        ("seed: 1\ntraining: {batch_size: 0}", ["training", "batch_size must lie in 1..4096, found 0"]),
        ("seed: 1\ntraining: {learning_rate: .nan}", ["learning_rate must lie in (0, 1), found nan"]),
        ("seed: 1\ntraining: {augment: {scale: 1.5}}", ["scale must lie in [0, 1), found 1.5"]),
        ("seed: 1\nseed: 2", ["'seed' stands twice", "line 2"]),
        ("seed: 1\ntraining:\n  batch_size: 1\n  batch_size: 2", ["'batch_size' stands twice", "line 4"]),
        ("seed: a\nqqqq: 1", ["1 more after this one"]),
        ("", ["found nothing"]),
        ("# nothing but a comment\n", ["found nothing"]),
        ("- 1\n- 2", ["expected a mapping", "found a list"]),
        ("hello", ["expected a mapping", "found a str"]),
        ("seed: 1\n1: 2", ["1: Keys should be strings"]),
        ("seed: {", ["not valid YAML", "line 1"]),
        ("seed: 1\n\tx: 2", ["not valid YAML", "line 2"]),
        ("[a, b]: 1", ["not valid YAML"]),
        ("seed: !!python/object/apply:os.getcwd []", ["not valid YAML"]),
        ("[" * 5000, ["not valid YAML"]),
        (b"\xff\xfe\x00\x01", ["cannot be read as a YAML text file"]),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), ["cannot be read as a YAML text file"]),
        (b"seed: \x00", ["not valid YAML"]),
        (b"#" * (MAX_CONFIG_BYTES + 1), ["1,000,001 bytes", "limit 1,000,000"]),
    ],
)  # fmt: skip
def test_each_slip_is_named(file: Path, text: str | bytes, words: list[str]) -> None:
    """File, key, what was found, and the near miss where there is one."""
    said = refusal(file, text)
    for word in words:
        assert word in said


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    """No file, and a folder in its place."""
    with pytest.raises(UserError, match="there is no such file"):
        read_config(tmp_path / "none.yaml", Run)
    with pytest.raises(UserError, match="cannot be read as a YAML text file"):
        read_config(tmp_path, Run)


def test_all_base_configurations_refuse_unknown_keys(file: Path) -> None:
    """Every configuration of the model derives from Strict."""
    dataset = "name: a\nmodality: MR\nchannels: [x]\nlabels: {background: 0, a: 1}\n"
    assert "did you mean 'image_size'" in refusal(file, "image_sice: 8", ModelConfig)
    assert "did you mean 'slice_axis'" in refusal(file, dataset + "slice_axes: 1", DatasetConfig)


def test_yaml_builds_plain_data_alone(file: Path) -> None:
    """No tag makes an object."""
    file.write_text("a: !!python/name:os.system\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_yaml(file)


def test_what_is_dumped_is_read_back(file: Path) -> None:
    """dump_yaml and read_config are inverse, umlauts included, keys in the order of declaration."""
    run = Run(1, TrainingConfig(learning_rate=1e-5), (Site("Köln"),), {"x": Site("y")}, Site("z"))
    text = dump_yaml(run)
    file.write_text(text, encoding="utf-8")
    assert read_config(file, Run) == run
    assert list(yaml.safe_load(text)) == ["seed", "training", "sites", "by_name", "extra"]
    assert parse_config(json.loads(canonical_json(run)), Run, "wire") == run


def test_canonical_json_is_one_text_for_equal_data() -> None:
    """Sorted, without spaces, and no NaN."""
    assert canonical_json({"b": (1, 2), "a": "ü"}) == canonical_json({"a": "ü", "b": [1, 2]}) == '{"a":"ü","b":[1,2]}'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": math.nan})


def test_plain_reaches_into_everything() -> None:
    """Dataclasses inside lists and dicts become dicts, tuples lists."""
    assert plain({"a": [Site("x")], "b": (Site("y", 1),)}) == {
        "a": [{"name": "x", "steps": 5}],
        "b": [{"name": "y", "steps": 1}],
    }


def test_errors_are_one_line_whatever_they_quote() -> None:
    """Line breaks of a third party's message are folded."""
    assert str(UserError("a\n  b\r\nc")) == "a b c"
