"""One private step: what it adds, what it divides by, what one patient can move, and whom it refuses."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor, nn

from client.privacy.engines import Engine, HooksEngine, PatientLoop, RowLoss, Rows, VmapEngine
from client.privacy.entropy import SeededEntropy, SystemEntropy
from client.privacy.noise import standard_normal
from client.privacy.policy import PrivacyPolicy
from client.privacy.sampling import PoissonSampler
from client.privacy.step import PrivateStep, released, take_steps
from medsegdiff.ema import WeightAverage
from medsegdiff.training import weight_decay_groups
from tests.client.privacy.faulty import plain_net, some_patients, squared_error
from tests.client.privacy.rows import BASE, POLICY, distance, network, obvious_sum, row_loss

ENGINES: dict[str, Engine] = {"loop": PatientLoop(), "vmap": VmapEngine(2), "hooks": HooksEngine(2)}
engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Full backward hook is firing")


def repeatable_step(net: nn.Module, loss: RowLoss = squared_error, seed: int = 0, **settings: Any) -> PrivateStep:
    """A step whose noise repeats itself, with plain gradient descent of rate 1 unless told otherwise."""
    optimizer = settings.pop("optimizer", None) or torch.optim.SGD(
        [p for p in net.parameters() if p.requires_grad], 1.0
    )
    policy = settings.pop("policy", POLICY)
    return PrivateStep.for_testing(net, loss, policy, optimizer, entropy=SeededEntropy(seed), **settings)


def noise_source(seed: int) -> SeededEntropy:
    """The source of a step's noise, after the eight bytes that seed its dropout."""
    source = SeededEntropy(seed)
    source.take(8)
    return source


def gradients(step: PrivateStep) -> dict[str, Tensor]:
    """What the last step released, float64."""
    return {name: p.grad.to(torch.float64) for name, p in step.parameters.items() if p.grad is not None}


# --- the noise in the step ---


class Large(nn.Module):
    """Three parameters with draws enough to tell 1 %, one of them complex, one small beside the others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(300, 400))
        self.bias = nn.Parameter(torch.zeros(80_000))
        self.spectrum = nn.Parameter(torch.zeros(300, 300, dtype=torch.complex64))


def within(values: Tensor, std: float) -> bool:
    """Within 1 % of the standard deviation, and not refuted by the chi-squared test at p = 1e-4."""
    squares, count = float(values.double().square().sum()), values.numel()
    likely = chi2.ppf(5e-5, count) < squares / std**2 < chi2.ppf(1 - 5e-5, count)
    return bool(likely and abs(math.sqrt(squares / count) / std - 1) < 0.01)


def test_noise_of_every_parameter_and_real_coordinate() -> None:
    """sigma C / B each, real and imaginary, within 1 %; noise / sqrt(2) and 5 % more are rejected."""
    policy = dataclasses.replace(POLICY, sigma=3.0, clip=0.7, batch=10)
    net = Large()
    repeatable_step(net, policy=policy).take([])
    std = 3.0 * 0.7 / 10
    grads = [p.grad for p in net.parameters()]
    parts = [part for g in grads if g is not None for part in ((g.real, g.imag) if g.is_complex() else (g,))]
    assert len(parts) == 4
    for part in parts:
        assert within(part, std)
        assert not within(part / 2**0.5, std)
        assert not within(part * 1.05, std)


def test_noise_of_the_real_network() -> None:
    """Ten empty steps on MedSegDiff: each parameter by the chi-squared test, all together within 1 %."""
    net = network(BASE)
    step = repeatable_step(net, row_loss())
    found: dict[str, list[Tensor]] = {}
    for _ in range(10):
        step.take([])
        for name, value in gradients(step).items():
            found.setdefault(name, []).append(value.flatten() * POLICY.batch / (POLICY.sigma * POLICY.clip))
    assert set(found) == {name for name, _ in net.named_parameters()}
    for name, values in found.items():
        drawn = torch.cat(values)
        low, high = chi2.ppf(1e-6, drawn.numel()), chi2.ppf(1 - 1e-6, drawn.numel())
        assert low < float(drawn.square().sum()) < high, name
    assert within(torch.cat([v for values in found.values() for v in values]), 1.0)


def draws_of(step: PrivateStep, source: SeededEntropy) -> dict[str, Tensor]:
    """What a step draws from its source next, by parameter: all at once, as the network is small."""
    sizes = [parameter.numel() for parameter in step.parameters.values()]
    drawn = standard_normal(sum(sizes), source).split(sizes)
    return {n: values.view(p.shape) for (n, p), values in zip(step.parameters.items(), drawn, strict=True)}


def test_an_empty_batch_is_noise_over_b_to_the_bit() -> None:
    """The very draws of the source, times sigma C, over B, rounded once to float32."""
    net = plain_net()
    policy = dataclasses.replace(POLICY, sigma=1.7, clip=0.3, batch=7)
    step = repeatable_step(net, seed=9, policy=policy)
    step.take([])
    source = noise_source(9)
    for name, noise in draws_of(step, source).items():
        found = step.parameters[name].grad
        assert found is not None
        assert torch.equal(found, (noise * (1.7 * 0.3) / 7).float())


@engines
def test_a_step_is_the_sum_plus_noise_over_b(engine: Engine) -> None:
    """The obvious loop's clipped sum plus the source's noise, over B, whatever the batch: B is no batch size."""
    net, clip = plain_net(), 0.3
    policy = dataclasses.replace(POLICY, clip=clip, batch=5, sigma=0.5)
    for count in (0, 1, 2, 3):
        patients = some_patients((1, 3, 2))[:count]
        expected = obvious_sum(net, squared_error, patients, clip)
        own = copy.deepcopy(net)
        step = repeatable_step(own, seed=3, policy=policy, engine=engine)
        step.take(patients)
        noise = draws_of(step, noise_source(3))
        for name, parameter in step.parameters.items():
            total = (expected[name] if expected else 0) + noise[name] * 0.5 * clip
            torch.testing.assert_close(gradients(step)[name], total / 5, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(parameter.detach(), net.get_parameter(name) - parameter.grad)


def test_dividing_by_the_batch_size_would_be_seen() -> None:
    """A wrong step, with B = number drawn, is far from what the test above allows."""
    net = plain_net()
    sums = {}
    for batch in (5, 3):
        own = copy.deepcopy(net)
        step = repeatable_step(own, policy=dataclasses.replace(POLICY, batch=batch))
        step.take(some_patients((1, 3, 2)))
        sums[batch] = gradients(step)
    assert distance(sums[3], sums[5]) > 0.5


# --- what comes after the noise ---


def test_post_processing_follows_the_noise() -> None:
    """FedProx's pull is not clipped; Adam, weight decay and the average see noised gradients alone."""
    net, start = plain_net(), plain_net()
    average = WeightAverage(net, 0.9)
    optimizer = torch.optim.AdamW(weight_decay_groups(dict(net.named_parameters()), 0.1), lr=0.01)
    step = repeatable_step(net, optimizer=optimizer, proximal_mu=0.5, average=average)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(100.0)  # far from the anchor: a pull of 50, many times C
    step.take([])
    source = noise_source(0)
    mirror = copy.deepcopy(start)
    with torch.no_grad():
        for p in mirror.parameters():
            p.add_(100.0)
    for name, p in mirror.named_parameters():
        noise = standard_normal(p.numel(), source).view(p.shape) * POLICY.sigma * POLICY.clip / POLICY.batch
        p.grad = noise.float() + 0.5 * (p.detach() - start.get_parameter(name).detach())
    torch.optim.AdamW(weight_decay_groups(dict(mirror.named_parameters()), 0.1), lr=0.01).step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, mirror.get_parameter(name))
    assert average.updates == 1


def test_a_step_tells_nothing() -> None:
    """No loss, no norm, no count: what it returns is None, and no gradient before the noise stays anywhere."""
    net = plain_net()
    step = repeatable_step(net)
    assert step.take(some_patients()) is None  # type: ignore[func-returns-value]
    raw = obvious_sum(plain_net(), squared_error, some_patients(), POLICY.clip)
    kept = [value for value in vars(step).values() if isinstance(value, Tensor)]
    assert kept == []
    assert distance({n: g * POLICY.batch for n, g in gradients(step).items()}, raw) > 1


# --- where the noise comes from ---


def test_same_seed_same_bits_and_production_never_repeats() -> None:
    """Two testing steps agree to the bit, whatever torch's seed; two of production never do, whatever torch's seed."""
    weights: dict[str, list[Tensor]] = {"testing": [], "production": []}
    for seed in (1, 2):
        net = plain_net()
        torch.manual_seed(seed)
        repeatable_step(net, seed=5).take(some_patients())
        weights["testing"].append(net.first.weight.detach())
        net = plain_net()
        torch.manual_seed(0)
        PrivateStep(net, squared_error, POLICY, torch.optim.SGD(net.parameters(), 1.0)).take(some_patients())
        weights["production"].append(net.first.weight.detach())
    assert torch.equal(*weights["testing"])
    assert not torch.equal(*weights["production"])


def test_production_takes_no_source() -> None:
    """No parameter of the constructor names a seed or a source, and one put in by force is refused at the step."""
    assert not {"seed", "entropy", "generator", "noise"} & set(inspect.signature(PrivateStep).parameters)
    net = plain_net()
    step = PrivateStep(net, squared_error, POLICY, torch.optim.SGD(net.parameters(), 1.0))
    assert not step.testing
    before = copy.deepcopy(net.state_dict())

    class Disguised(SystemEntropy):
        def take(self, count: int) -> bytes:
            return bytes(count)

    for source in (SeededEntropy(1), Disguised()):
        step._entropy = source
        assert step.testing
        with pytest.raises(RuntimeError, match="must come from the operating system"):
            step.take(some_patients())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_what_testing_trained_is_not_released() -> None:
    """The mark stays, and the way out looks at it."""
    net = plain_net()
    delta = {"weight": torch.ones(2)}
    with pytest.raises(RuntimeError, match="nothing of it may leave"):
        released(delta, repeatable_step(net))
    assert released(delta, PrivateStep(net, squared_error, POLICY, torch.optim.SGD(net.parameters(), 1.0))) is delta


def test_dropout_is_drawn_from_the_source_too() -> None:
    """Known masks would shift with one patient more. Torch's generator neither decides them nor is moved."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 4, 1))
    policy = dataclasses.replace(POLICY, clip=1e6)  # no clipping: gradients tell the masks; and next to no noise
    object.__setattr__(policy, "sigma", 1e-12)
    found = []
    for seed, make in ((5, True), (5, True), (6, True), (0, False), (0, False)):
        own = copy.deepcopy(net)
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(own.parameters(), 1.0)
        step = (
            repeatable_step(own, seed=seed, policy=policy, optimizer=optimizer)
            if make
            else PrivateStep(own, squared_error, policy, optimizer)
        )
        step.take(some_patients())
        found.append(gradients(step)["2.weight"])
        state = torch.get_rng_state()
        torch.manual_seed(0)
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], rtol=1e-3)
    assert not torch.allclose(found[3], found[4], rtol=1e-3)


def test_patients_are_let_go_as_they_are_summed() -> None:
    """A step never holds more of them than share a pass: a large batch fits whatever its size."""
    import weakref

    for engine, most in ((PatientLoop(), 2), (VmapEngine(2), 4), (HooksEngine(2), 4)):
        alive: set[int] = set()
        highest = 0

        def people(alive: set[int] = alive) -> Iterator[Rows]:
            nonlocal highest
            for number in range(12):
                rows = some_patients((2,), seed=number)[0]
                alive.add(number)
                weakref.finalize(rows["x"], alive.discard, number)
                highest = max(highest, len(alive))
                yield rows
                del rows

        repeatable_step(plain_net(), engine=engine).take(people())
        assert highest <= most, engine


# --- refusals at the start ---


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    """One that also holds frozen weights would decay them; one that lacks some would leave their noise unused."""
    net = plain_net()
    net.first.requires_grad_(False)
    with pytest.raises(ValueError, match="the optimizer holds 6 parameters, the network trains 4"):
        PrivateStep(net, squared_error, POLICY, torch.optim.SGD(net.parameters(), 1.0))
    with pytest.raises(ValueError, match="the optimizer holds 1 parameters, the network trains 4"):
        PrivateStep(net, squared_error, POLICY, torch.optim.SGD([net.last.bias], 1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    """Weights in bf16 would round the noise off."""
    net = plain_net().to(dtype)
    with pytest.raises(ValueError, match="train in float32"):
        PrivateStep(net, squared_error, POLICY, torch.optim.SGD(net.parameters(), 1.0))


# --- several steps ---


class Counted(PrivateStep):
    """Writes down how many patients each step got."""

    seen: list[int]

    def take(self, patients: Iterable[Rows]) -> None:
        drawn = list(patients)
        self.seen.append(len(drawn))
        super().take(drawn)


def counted(policy: PrivacyPolicy) -> Counted:
    net = plain_net()
    step = Counted(net, squared_error, policy, torch.optim.SGD(net.parameters(), 1.0))
    step.seen = []
    return step


def test_exactly_so_many_steps_empty_ones_noised() -> None:
    """At q = 0.001 nearly all batches are empty: each step is taken, and moves the weights."""
    policy = dataclasses.replace(POLICY, q=0.001)
    step, patients, moved = counted(policy), some_patients(), []

    def note(number: int) -> None:
        moved.append((number, step.network.get_parameter("last.bias").detach().clone()))

    take_steps(step, PoissonSampler(3, 0.001), lambda i: patients[i], 25, note)
    assert len(step.seen) == 25
    assert step.seen.count(0) > 20
    assert [number for number, _ in moved] == list(range(25))
    assert all(not torch.equal(a, b) for (_, a), (_, b) in itertools.pairwise(moved))


def test_rows_are_drawn_anew_for_those_chosen() -> None:
    """The function is asked once for each patient that a step draws, and for no other."""
    policy = dataclasses.replace(POLICY, q=0.5)
    step, asked = counted(policy), list[int]()

    def rows(i: int) -> Rows:
        asked.append(i)
        return some_patients((1, 3, 2))[i]

    take_steps(step, PoissonSampler(3, 0.5), rows, 20)
    assert len(asked) == sum(step.seen)
    assert set(asked) == {0, 1, 2}


def test_sampler_and_step_must_agree() -> None:
    """Another q than the accounted one, or a sampler of the other kind, is refused before any step."""
    step, patients = counted(POLICY), some_patients()
    with pytest.raises(ValueError, match=r"draws with q = 0.25, the policy accounts 0.5"):
        take_steps(step, PoissonSampler(3, 0.25), lambda i: patients[i], 1)
    with pytest.raises(ValueError, match="foretold"):
        take_steps(step, PoissonSampler.for_testing(3, 0.5, SeededEntropy(1)), lambda i: patients[i], 1)
    with pytest.raises(ValueError, match="foretold"):
        take_steps(repeatable_step(plain_net()), PoissonSampler(3, 0.5), lambda i: patients[i], 1)
    assert step.seen == []
