"""The private fine-tuning set: small, frozen elsewhere, and back to plain weights without a loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from client.privacy.engines import Engine, HooksEngine, PatientLoop, VmapEngine
from client.privacy.entropy import SeededEntropy
from client.privacy.gate import random_patients, require_exact
from client.privacy.step import PrivateStep
from client.privacy.trainable import BUDGET, LowRankConv, TrainableSet, attach, choose, merge, trained_count
from medsegdiff.config import PRESETS, ModelConfig, preset
from medsegdiff.ema import WeightAverage
from medsegdiff.errors import UserError
from medsegdiff.network import MedSegDiff
from medsegdiff.weights import weight_shapes
from tests.client.privacy.rows import BASE, OPTIONS, POLICY, network, patient, row_loss

ATTENTIVE = {name: config for name, config in OPTIONS.items() if config.attention_levels}
attentive = pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=[] if name in ("default", "all") else pytest.mark.slow)
        for name, config in ATTENTIVE.items()
    ],
)
EVERYTHING = TrainableSet(rank=3, norms=True, biases=True)

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Full backward hook is firing")


def answer(net: MedSegDiff, config: ModelConfig = BASE) -> Tensor:
    rows = patient(config, 2, 0)
    return net(rows["masks"] + rows["noise"], rows["t_B"], rows["images"]).detach()


def stirred(net: MedSegDiff, seed: int) -> MedSegDiff:
    """Every trained parameter moved at random, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny", TrainableSet(8, True, True)),
        ("S", TrainableSet(3, True, False)),
        ("B", TrainableSet(3, False, False)),
        ("L", TrainableSet(2, False, False)),
    ],
)
def test_every_preset_stays_within_the_budget(name: str, expected: TrainableSet) -> None:
    """At most 30,000 trained scalars, and what was chosen is what is trained."""
    config = preset(name)
    assert choose(config) == expected


def test_the_tiny_preset_trains_one_parameter_in_seventy() -> None:
    """2,240 of norms, 2,401 of biases, 4,096 of rank 8."""
    net = MedSegDiff(preset("tiny"))
    whole = trained_count(net)
    attach(net, 0)
    assert trained_count(net) == 2240 + 2401 + 8 * 512
    assert whole / trained_count(net) > 69


def test_presets_are_all_covered() -> None:
    """A new preset is looked at."""
    assert set(PRESETS) == {"tiny", "S", "B", "L"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["S", "B", "L"])
def test_large_presets_stay_within_the_budget(name: str) -> None:
    """Counted on the real thing."""
    net = MedSegDiff(preset(name))
    names = attach(net, 0)
    assert 20_000 < trained_count(net) <= BUDGET
    assert any(".up.weight" in key for key in names)


def test_what_does_not_fit_is_refused() -> None:
    """No attention, or attention beyond the budget, in one line."""
    with pytest.raises(UserError, match="no attention"):
        choose(OPTIONS["no attention"])
    with pytest.raises(UserError, match="one rank of the model's attention has 4,096 parameters; the budget is 4,000"):
        choose(preset("S"), 4000)
    assert choose(preset("S"), 4096) == TrainableSet(1, False, False)


@attentive
def test_attaching_changes_no_answer(config: ModelConfig) -> None:
    """B starts at zero. Trained are B, norms and biases; A, kernels and the FF-Parser's maps are not."""
    net = network(config)
    before = answer(net, config)
    names = attach(net, 7, EVERYTHING)
    torch.testing.assert_close(answer(net, config), before, rtol=0, atol=0)
    assert names == tuple(sorted(name for name, p in net.named_parameters() if p.requires_grad))
    assert not [name for name in names if name.endswith(("map", "down.weight", "base.weight"))]
    attentions = 2 * len(config.attention_levels)  # mask encoder and decoder
    assert sum(name.endswith("up.weight") for name in names) == 2 * attentions
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad and p.dim() == 1}
    assert frozen == set()  # every norm and bias is trained


@pytest.mark.parametrize(("norms", "biases"), [(True, False), (False, True), (False, False)])
def test_parts_can_be_left_out(norms: bool, biases: bool) -> None:
    """Norms have weight and bias; the biases of layers are another part."""
    net = network(BASE)
    names = attach(net, 0, TrainableSet(1, norms, biases))
    assert any(".norm" in name for name in names) == norms
    assert any(name.endswith("conv_1.bias") for name in names) == biases
    assert any(name.endswith("up.weight") for name in names)


def test_the_same_seed_gives_the_same_a() -> None:
    """At every site and in every round, without touching torch's global generator; another seed another A."""

    def fixed(seed: int) -> dict[str, Tensor]:
        net = MedSegDiff(BASE)
        state = torch.get_rng_state()
        attach(net, seed, EVERYTHING)
        assert torch.equal(state, torch.get_rng_state())
        return {name: value for name, value in net.state_dict().items() if name.endswith("down.weight")}

    first, again, other = fixed(3), fixed(3), fixed(4)
    assert len(first) == 4
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert len({value.flatten()[0].item() for value in first.values()}) == 4  # each kernel has its own


def test_attaching_twice_is_refused() -> None:
    """A correction of a correction would not merge."""
    net = network(BASE)
    attach(net, 0, EVERYTHING)
    with pytest.raises(ValueError, match="already"):
        attach(net, 0, EVERYTHING)


@attentive
def test_merged_weights_answer_as_the_network_does(config: ModelConfig) -> None:
    """Names and shapes of the plain network, and its answers, after any training."""
    net = network(config)
    attach(net, 7, EVERYTHING)
    stirred(net, 1)
    merged = merge(net)
    assert {name: tuple(value.shape) for name, value in merged.items()} == weight_shapes(config)
    plain = network(config, seed=5)
    plain.load_state_dict(merged)
    torch.testing.assert_close(answer(plain, config), answer(net, config), rtol=1e-4, atol=1e-4)


def test_a_merge_that_forgets_the_corrections_would_be_seen() -> None:
    """The answers above do depend on B A."""
    net = network(BASE)
    attach(net, 7, EVERYTHING)
    before = merge(net)
    stirred(net, 1)
    assert float((answer(net) - answer(network(BASE))).abs().max()) > 0.01
    kernels = [name for name in before if "attention" in name and name.endswith(("value.weight", "out.weight"))]
    assert len(kernels) == 4
    assert all(not torch.equal(before[name], merge(net)[name]) for name in kernels)


def test_the_delta_is_zero_where_nothing_is_trained() -> None:
    """Exactly: rounding of frozen weights would be patients' data in disguise, or noise in the aggregate."""
    net = network(BASE)
    received = copy.deepcopy(net.state_dict())
    names = {name.replace(".base.", ".") for name in attach(net, 7, EVERYTHING)}
    stirred(net, 2)
    delta = {name: value - received[name] for name, value in merge(net).items()}
    moved = {name for name, value in delta.items() if bool(value.any())}
    kernels = {name.replace(".up.weight", ".weight") for name in names}
    assert moved == kernels


def test_averaging_merged_weights_is_averaging_b() -> None:
    """Two sites with the same A: the mean of their deltas is the delta of the mean B, norms and biases."""
    sites = []
    for seed in (1, 2):
        net = network(BASE)
        attach(net, 7, EVERYTHING)
        sites.append(stirred(net, seed))
    together = copy.deepcopy(sites[0])
    with torch.no_grad():
        for p, a, b in zip(together.parameters(), *(site.parameters() for site in sites), strict=True):
            p.copy_((a + b) / 2)
    expected = merge(together)
    for name, value in merge(sites[0]).items():
        torch.testing.assert_close((value + merge(sites[1])[name]) / 2, expected[name], rtol=1e-5, atol=1e-6)


def test_an_average_of_weights_merges_too() -> None:
    """What an EMA of the attached network holds becomes plain weights as well."""
    net = network(BASE)
    attach(net, 7, EVERYTHING)
    average = WeightAverage(net, 0.0)
    stirred(net, 1)
    average.update(net)
    now = merge(net)
    assert all(torch.equal(value, now[name]) for name, value in merge(net, average.shadow).items())
    stirred(net, 2)
    assert all(torch.equal(value, now[name]) for name, value in merge(net, average.shadow).items())


@pytest.mark.parametrize("engine", [PatientLoop(), VmapEngine(2), HooksEngine(2)], ids=["loop", "vmap", "hooks"])
def test_every_engine_is_exact_on_it(engine: Engine) -> None:
    """The gate passes the network with its corrections."""
    net = network(BASE)
    attach(net, 7, EVERYTHING)
    require_exact(net, row_loss(), random_patients(BASE, 1000), engine)


def test_a_private_step_moves_the_set_alone() -> None:
    """A noised step with weight decay leaves every frozen weight where it was, to the bit."""
    net = network(BASE)
    names = attach(net, 7, EVERYTHING)
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    step = PrivateStep.for_testing(net, row_loss(), POLICY, optimizer, entropy=SeededEntropy(0))
    step.take([patient(BASE, 2, 0)])
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(names)


def test_the_next_round_goes_on_from_merged_weights() -> None:
    """A network built from merged weights takes new corrections and answers as before."""
    net = network(BASE)
    attach(net, 7, EVERYTHING)
    stirred(net, 1)
    nxt = MedSegDiff(BASE)
    nxt.load_state_dict(merge(net))
    expected = answer(nxt)
    attach(nxt, 7, EVERYTHING)
    assert torch.equal(answer(nxt), expected)
    downs = [(m, n) for m, n in zip(net.modules(), nxt.modules(), strict=True) if isinstance(m, LowRankConv)]
    assert all(torch.equal(m.down.weight, n.down.weight) for m, n in downs)
