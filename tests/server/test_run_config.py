"""Run requests and plans: out of range is refused before anything is read, and the run id names the run."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace

import pytest

from client.encoding import Compression, largest_size
from client.personalisation import Personalisation
from medsegdiff.config import preset
from medsegdiff.errors import UserError
from medsegdiff.strict import dump_yaml, parse_config, plain, read_config
from medsegdiff.weights import weight_shapes
from server.config import (
    ModelChoice,
    RunPlan,
    RunRequest,
    ScreeningConfig,
    SelectionConfig,
    StrategyConfig,
    make_plan,
)

REQUEST = {"rounds": 2, "local_steps": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds must lie in 1..100000, found 0"),
        ({"local_steps": 0}, "local_steps must lie in"),
        ({"threads": 0}, "threads must lie in"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, found 0"),
        ({"quorum": 0}, "quorum must be at least 1, found 0"),
        ({"deadline_seconds": 0}, "deadline_seconds must be positive"),
        ({"deadline_seconds": float("nan")}, "deadline_seconds must be positive"),
        ({"model": {"preset": "huge"}}, "model: preset 'huge' is unknown; choose one of tiny, S, B, L"),
        ({"model": {"image_size": 30}}, "model: preset tiny: image_size 30 is not divisible by 4"),
        ({"model": {"base_chanels": 8}}, "model.base_chanels: unknown key; did you mean 'base_channels'"),
        ({"strategy": {"name": "fedprox"}}, "strategy: proximal_mu is 0.0 with fedprox"),
        ({"strategy": {"name": "fedavg", "proximal_mu": 0.1}}, "fedavg needs 0"),
        ({"strategy": {"name": "fedsgd"}}, "strategy.name"),
        ({"strategy": {"name": "fedadam", "beta_1": 1.0}}, "beta_1 must lie in [0, 1), found 1.0"),
        ({"strategy": {"tau": 0.0}}, "tau must lie in (0, 1000000), found 0.0"),
        ({"strategy": {"rule": "median", "weighting": "examples"}}, "one large site could be a majority of its own"),
        ({"screening": {"norm_factor": 0.5}}, "norm_factor must be at least 1, found 0.5"),
        ({"screening": {"strikes": 0}}, "strikes must lie in 1..1000, found 0"),
        ({"sample": 0}, "sample must be at least 1 site, or null for all, found 0"),
        ({"sample": 1.5}, "sample must be a whole number of sites, or a part of them in (0, 1], found 1.5"),
        ({"sample": float("nan")}, "or a part of them in (0, 1], found nan"),
        ({"over_select": 2}, "over_select is 2 without sample: all sites are asked already"),
        ({"sample": 2, "over_select": -1}, "over_select must be at least 0, found -1"),
        ({"selection": {"patience": 3}}, "patience needs `by: mean` or `by: worst`"),
        ({"rounds": "many"}, "rounds"),
        ({"compression": {"kind": "int9"}}, "compression.kind"),
        ({"compression": {"kind": "top_k"}}, "compression: fraction is None with kind top_k: top_k needs one"),
        ({"compression": {"kind": "int8", "fraction": 0.1}}, "the others none"),
        (
            {"compression": {"kind": "top_k", "fraction": 0.1}, "strategy": {"rule": "median"}},
            "the median of sparse updates is zero almost everywhere",
        ),
        ({"training": {"learning_rate": -1}}, "training: learning_rate must lie in"),
    ],
)
def test_a_bad_request_names_source_and_key(changes, message) -> None:
    """Each fault is one UserError that begins with the file."""
    with pytest.raises(UserError) as caught:
        parse_config(REQUEST | changes, RunRequest, "recipe.yaml")
    assert str(caught.value).startswith("recipe.yaml: ")
    assert message in str(caught.value)


def test_a_model_takes_channels_from_the_data(tiny_task) -> None:
    """A preset with changes, one image channel and one mask channel for the phantoms."""
    model = ModelChoice(image_size=16, base_channels=8, channel_multipliers=(1, 2), attention_levels=(1,))
    assert model.resolve(tiny_task.dataset) == tiny_task.model


def plan_of(task, **changes) -> RunPlan:
    return replace(RunPlan("tiny", "tiny", StrategyConfig(), {"a": 3, "b": 2}, task), **changes)


def test_a_plan_survives_its_file(tmp_path, tiny_task) -> None:
    """run.yaml gives back the same plan and the same run id."""
    plan = plan_of(tiny_task, quorum=1)
    (tmp_path / "run.yaml").write_text(dump_yaml(plan))
    read = read_config(tmp_path / "run.yaml", RunPlan)
    assert read == plan
    assert read.run_id == plan.run_id


def test_the_run_id_is_the_runs_alone(tiny_task) -> None:
    """The engine does not change it, nor how many are waited for and how long; seed, roster or data do."""
    plan = plan_of(tiny_task)
    assert plan.run_id == plan_of(tiny_task, engine="ray").run_id
    assert plan.run_id == plan_of(tiny_task, quorum=1, deadline_seconds=60.0, absence_seconds=5.0).run_id
    others = [
        plan_of(replace(tiny_task, seed=6)),
        plan_of(tiny_task, roster={"a": 3, "b": 3}),
        plan_of(replace(tiny_task, local_steps=3)),
        plan_of(tiny_task, name="other"),
    ]
    assert len({plan.run_id, *(other.run_id for other in others)}) == 5


@pytest.mark.parametrize(
    ("roster", "quorum", "message"), [({}, None, "at least one site"), ({"a": 1}, 2, "quorum must lie in 1..1")]
)
def test_a_plan_that_cannot_be_met_is_refused(tiny_task, roster, quorum, message) -> None:
    """make_plan names where the request came from."""
    request = parse_config(REQUEST | {"quorum": quorum}, RunRequest, "r")
    with pytest.raises(UserError, match=f"^recipe.yaml: run: .*{message}"):
        make_plan(request, "tiny", 0, tiny_task.dataset, roster, "inline", "recipe.yaml")


def test_the_quorum_is_all_unless_said(tiny_task) -> None:
    """None means every site of the roster."""
    assert plan_of(tiny_task).required == 2
    assert plan_of(tiny_task, quorum=1).required == 1


def test_answers_of_a_large_model_come_in_waves(tiny_task) -> None:
    """4 GiB of answers at a time: all sites of a small model, eight or nine of one with half a gigabyte."""
    plan = RunPlan("run", "tiny", StrategyConfig(), {"alder": 1}, tiny_task)
    assert plan.sites_at_once > 10_000
    large = replace(plan, task=replace(tiny_task, model=preset("B", image_channels=1, mask_channels=1)))
    parameters = sum(math.prod(shape) for shape in weight_shapes(large.task.model).values())
    assert large.sites_at_once == 2**32 // (4 * parameters) == 9
    assert replace(large, wave=3).sites_at_once == 3
    assert replace(large, wave=3).run_id == large.run_id
    with pytest.raises(ValueError, match="wave must be at least 1"):
        replace(plan, wave=0)


def test_a_run_from_before_a_setting_existed_keeps_its_identity(tiny_task) -> None:
    """Its run.yaml knows name and proximal_mu alone; read today it has the id it had, and its checkpoints are its."""
    plan = plan_of(tiny_task)
    old = plain(replace(plan, engine="any", quorum=None, deadline_seconds=3600.0, absence_seconds=120.0))
    old["strategy"] = {"name": "fedavg", "proximal_mu": 0.0}
    for later in ("screening", "selection", "wave", "initial", "sample", "over_select", "stragglers", "canary"):
        del old[later]
    for later in ("compression", "privacy", "personalisation", "control_variates"):
        del old["task"][later]
    due = hashlib.sha256(json.dumps(old, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()[:12]
    read = parse_config(old | {"engine": "network"}, RunPlan, "run.yaml")
    assert read.run_id == plan.run_id == f"{plan.name}-{due}"


def test_what_changes_the_model_changes_the_run_id(tiny_task) -> None:
    """Each new setting that is not at its default."""
    changed = [
        {"strategy": StrategyConfig("fedadam")},
        {"strategy": StrategyConfig("fedadam", tau=0.1)},
        {"strategy": StrategyConfig(ema=0.5)},
        {"strategy": StrategyConfig(weighting="equal")},
        {"strategy": StrategyConfig(rule="median")},
        {"strategy": StrategyConfig(rule="norm_clip", clip_norm=2.0)},
        {"screening": ScreeningConfig(norm_factor=None)},
        {"screening": ScreeningConfig(strikes=1)},
        {"selection": SelectionConfig("mean")},
        {"selection": SelectionConfig("mean", patience=2)},
    ]
    asked = [
        ("fedavg", replace(tiny_task, personalisation=Personalisation("local_norms"))),
        ("scaffold", replace(tiny_task, control_variates=True)),
    ]
    three = {"alder": 3, "birch": 2, "elm": 1}
    ids = {plan_of(tiny_task, roster=three, **change).run_id for change in [{}, *changed]}
    ids |= {RunPlan("tiny", "tiny", StrategyConfig(name), three, task).run_id for name, task in asked}
    assert len(ids) == len(changed) + len(asked) + 1


def test_a_rule_needs_its_sites(tiny_task) -> None:
    """Three sites suffice for a median that bears one, not for two, nor for Krum; no quorum is below the need."""
    three = {"alder": 3, "birch": 2, "elm": 1}
    assert plan_of(tiny_task, roster=three, strategy=StrategyConfig(rule="median"), quorum=1).required == 3
    with pytest.raises(ValueError, match="rule median with byzantine 2 needs at least 5 sites, the run has 3"):
        plan_of(tiny_task, roster=three, strategy=StrategyConfig(rule="median", byzantine=2))
    with pytest.raises(ValueError, match="multi_krum with byzantine 1 needs at least 5"):
        plan_of(tiny_task, roster=three, strategy=StrategyConfig(rule="multi_krum"))


def test_a_compression_is_part_of_the_run_and_told_where_there_is_one(tiny_task) -> None:
    """It reaches the task, names another run, stands in the report, and lets more sites be asked at once."""
    request = parse_config(REQUEST | {"compression": {"kind": "top_k", "fraction": 0.1}}, RunRequest, "r")
    assert request.task(tiny_task.dataset, 0).compression == Compression("top_k", 0.1)
    plan, small = plan_of(tiny_task), plan_of(replace(tiny_task, compression=Compression("top_k", 0.1)))
    assert plan.run_id != small.run_id
    assert plan.stated() == {"name": "fedavg", "proximal_mu": 0.0}
    assert small.stated() == plan.stated() | {"compression": "top_k", "compression_fraction": 0.1}
    assert plan_of(replace(tiny_task, compression=Compression("int8"))).stated()["compression"] == "int8"
    large = replace(tiny_task, model=preset("B"), compression=Compression("int8"))
    assert plan_of(large).sites_at_once == 2**32 // largest_size(large.compression, weight_shapes(large.model)) == 37


def test_a_plan_with_an_unsound_compression_is_refused(tiny_task) -> None:
    """Also where it is read from run.yaml, or made of parts."""
    with pytest.raises(ValueError, match="rule multi_krum does not go with compression top_k"):
        RunPlan(
            "tiny",
            "tiny",
            StrategyConfig(rule="multi_krum", byzantine=0),
            {"a": 3, "b": 2, "c": 2},
            replace(tiny_task, compression=Compression("top_k", 0.1)),
        )


def test_more_sites_than_a_question_can_name_are_refused(tiny_task) -> None:
    """With error feedback, where each is named; without it there is no such limit."""
    many = {f"s{number}": 1 for number in range(10_001)}
    with pytest.raises(ValueError, match="at most 10,000 sites, the run has 10,001"):
        plan_of(replace(tiny_task, compression=Compression("int8")), roster=many)
    assert plan_of(replace(tiny_task, compression=Compression("bf16")), roster=many).required == 10_001
