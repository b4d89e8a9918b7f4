"""Training the denoiser: one step, and a trainer whose steps are pure functions of (seed, step).

Nothing random is carried from step to step - the batch, the timesteps and the noise of step k come from (seed, k) -
so a training that stops at any step and goes on from its saved weights and moments ends with the same bits.

A batch that does not fit into memory is taken in microbatches, whose gradients sum to the batch's.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save
from torch import Tensor

from medsegdiff.config import TrainingConfig
from medsegdiff.devices import autocast, is_out_of_memory
from medsegdiff.diffusion import Diffusion
from medsegdiff.ema import WeightAverage
from medsegdiff.ensemble import derive_seed
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from medsegdiff.loader import Loader
from medsegdiff.network import MedSegDiff, channels_last
from medsegdiff.objective import denoising_loss

log = logging.getLogger("medsegfed.training")


OnGradient = Callable[[Mapping[str, torch.nn.Parameter]], None]  # gradients lie in the parameters


class Batches(Protocol):
    """Where slices come from."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, C, S, S) and masks (B, K, S, S) in {-1, +1} of one step."""
        ...


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Rate of step 0 .. total_steps - 1: linear warm-up, then half a cosine down to final_rate * peak."""
    warmup = max(1, round(config.warmup_fraction * total_steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    low = config.final_rate
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def weight_decay_groups(parameters: Mapping[str, Tensor], weight_decay: float) -> list[dict[str, object]]:
    """Weight decay on kernels alone: it would pull FF-Parser maps from the identity and norms from 1."""
    kernels = [p for name, p in parameters.items() if name.endswith("weight") and p.dim() >= 2]
    chosen = {id(p) for p in kernels}
    rest = [p for p in parameters.values() if id(p) not in chosen]
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


class Trainer:
    """AdamW on the diffusion loss.

    Args:
        network: trained in place, on the device that it is on.
        batches: pure function from step to slices.
        total_steps: length of the whole training, for the rate's schedule; steps beyond keep the last rate.
        seed: fixes timesteps and noise.
        proximal_mu: FedProx's mu: adds mu / 2 ||w - w_0||^2, w_0 the weights at construction (Li et al. 2020, eq. 2).
        average: weight average to update after each step, if any.
        microbatch: slices that go through the network at once; None: the whole batch. Halved, for good, whenever
            memory runs out.
        towards: w_0 of the proximal term, where it is not the weights at construction.
        compile: have torch compile the loss; the network, its names and what is saved stay as they are.

    Guarantees:
        Microbatches change the order of sums, nothing else: their gradients, weighted by their sizes, sum to the whole
        batch's. A training that ran out of memory ends with the bits of one that took the smaller microbatch from that
        step on. With dropout these bits hold too, but each microbatch size draws masks of its own: such gradients
        agree with the whole batch's in expectation alone.
    """

    def __init__(
        self,
        network: MedSegDiff,
        diffusion: Diffusion,
        batches: Batches,
        config: TrainingConfig,
        total_steps: int,
        seed: int,
        proximal_mu: float = 0.0,
        average: WeightAverage | None = None,
        microbatch: int | None = None,
        compile: bool = False,
        towards: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.network = channels_last(network)
        self.diffusion = diffusion
        self.batches = batches
        self.config = config
        self.total_steps = total_steps
        self.seed = seed
        self.proximal_mu = proximal_mu
        self.average = average
        self.microbatch = microbatch
        self.parameters = dict(network.named_parameters())
        self.device = next(iter(self.parameters.values())).device
        self.loader = Loader(self._draw, self.device)
        origin = towards or {name: value.detach().clone() for name, value in self.parameters.items()}
        self.anchor = [origin[name].to(self.device) for name in self.parameters] if proximal_mu > 0 else []
        groups = weight_decay_groups(self.parameters, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
        self.on_gradient: OnGradient | None = None  # shown every step's gradient, before the proximal term and clipping
        # The function, not the module: a compiled module renames every tensor of its state_dict.
        self._loss = torch.compile(denoising_loss) if compile else denoising_loss

    @property
    def waited_seconds(self) -> float:
        """Time spent waiting for batches so far; on a GPU, where they are made ahead, close to none."""
        return self.loader.waited_seconds

    def run(self, first: int, last: int, on_step: Callable[[int, float], None] | None = None) -> float:
        """Take steps first .. last - 1; returns their mean loss. `on_step(done, loss)` is told of each.

        On a GPU each loss is read after the next step was queued: to wait for it at once would leave the GPU idle.

        Raises:
            UserError: the loss is no longer a finite number, or memory runs out with one slice at a time.
        """
        self.network.train()
        losses = []
        unread: deque[tuple[int, Callable[[], float]]] = deque()
        with closing(self.loader.load(range(first, last))) as inputs:  # type: ignore[type-var]
            for step, tensors in inputs:
                unread.append((step, _reader(self._take(step, tensors))))
                if len(unread) > (1 if self.device.type == "cuda" else 0):
                    losses.append(self._read(*unread.popleft(), on_step))
        losses += [self._read(step, read, on_step) for step, read in unread]
        return math.fsum(losses) / max(1, len(losses))

    def step(self, step: int) -> float:
        """One optimizer step; returns the diffusion loss before it."""
        return self._take(step, self.loader.place(self._draw(step))).item()

    def state(self) -> dict[str, Tensor]:
        """Adam's moments and step counts as plain tensors, named after their parameter."""
        saved = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                saved[f"{name}/{key}"] = value.detach().clone()
        return saved

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        for full_name, value in saved.items():
            name, key = full_name.rsplit("/", 1)
            parameter = self.parameters[name]
            if value.dim() == parameter.dim() and value.dim() > 0:
                # The fused kernel walks memory, not indices: moments must lie as their (channels-last) parameter does.
                self.optimizer.state[parameter][key] = torch.empty_like(parameter).copy_(value)
            else:
                self.optimizer.state[parameter][key] = value.clone().to(parameter.device)

    def save(self, path: Path, done: int, **notes: str) -> None:
        """Write weights, moments and weight average after `done` steps, atomically, with notes of the caller's."""
        tensors = {f"weights/{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"optimizer/{name}": value for name, value in self.state().items()}
        if self.average is not None:
            tensors |= {f"average/{name}": value for name, value in self.average.shadow.items()}
            notes["updates"] = str(self.average.updates)
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_atomic(path, save(tensors, metadata={**notes, "done": str(done)}))

    def restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
        """Go on from what `save` wrote; returns the steps done."""
        self.network.load_state_dict(_under("weights/", tensors))
        self.load_state(_under("optimizer/", tensors))
        if self.average is not None:
            for name, value in _under("average/", tensors).items():
                self.average.shadow[name].copy_(value)
            self.average.updates = int(metadata["updates"])
        return int(metadata["done"])

    def _draw(self, step: int) -> dict[str, Tensor]:
        """All that is random in a step but dropout, by the loss's argument names."""
        images, masks = self.batches.batch(step)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "noise", step))
        drawn = {"images": images, "masks": masks}
        drawn["t_B"] = torch.randint(0, self.diffusion.config.timesteps, (len(masks),), generator=generator)
        drawn["noise"] = torch.randn(masks.shape, generator=generator)
        if self.network.config.self_conditioning:
            drawn["condition_B"] = torch.rand(len(masks), generator=generator) < 0.5
        return drawn

    def _take(self, step: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """One optimizer step; returns the loss, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step, self.total_steps)
        loss = self._gradient(step, inputs)
        if self.on_gradient is not None:
            self.on_gradient(self.parameters)
        self._add_proximal_gradient()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.gradient_clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.network)
        return loss

    def _gradient(self, step: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Leave the batch's gradient in the parameters; smaller microbatches are tried until one fits."""
        self.optimizer.zero_grad(set_to_none=True)
        while True:
            try:
                with self._dropout_stream(step):
                    return self._accumulate(inputs)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # After the handler, not in it: the traceback of a handled exception holds the failed attempt's tensors.
            self._halve_microbatch(step, inputs["images"])

    def _accumulate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Sum the gradients of the batch's microbatches, each weighted by its share of the cases; returns the loss."""
        cases = len(inputs["masks"])
        losses = []
        for start in range(0, cases, self.microbatch or cases):
            part = {name: tensor[start : start + (self.microbatch or cases)] for name, tensor in inputs.items()}
            with autocast(self.device, self.config.precision):
                loss = self._loss(self.network, self.diffusion, **part, auxiliary_weight=self.config.auxiliary_weight)
            loss = loss * (len(part["masks"]) / cases)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _halve_microbatch(self, step: int, images: Tensor) -> None:
        """Free what the failed attempt left and go on with half.

        Raises:
            UserError: it was one slice already.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # cached blocks of the larger microbatch fit none of the smaller one's tensors
        failed = min(self.microbatch or len(images), len(images))
        if failed == 1:
            raise UserError(
                f"step {step} ran out of memory on {self.device} with a microbatch of 1 slice of {images.shape[-1]} "
                f"pixels a side; the step was not taken. Choose a smaller image_size or preset (`medsegfed model show` "
                "forecasts memory), or free memory that other programs hold."
            )
        self.microbatch = failed // 2
        log.warning(
            "step %d ran out of memory with %d slices at once; it goes on with microbatches of %d. The effective batch "
            "stays %d.", step, failed, self.microbatch, len(images),
        )  # fmt: skip

    def _read(self, step: int, read: Callable[[], float], on_step: Callable[[int, float], None] | None) -> float:
        loss = read()
        if not math.isfinite(loss):
            raise UserError(
                f"training diverged: the loss of step {step} is {loss}. What came since the last saved "
                f"state is lost. Lower the learning rate (now {self.config.learning_rate:g}) and start again."
            )
        if on_step is not None:
            on_step(step + 1, loss)
        return loss

    @contextmanager
    def _dropout_stream(self, step: int) -> Iterator[None]:
        """Dropout draws from torch's global generator: seeded by the step inside, left as it was outside."""
        if self.network.config.dropout == 0:
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.seed, "dropout", step))
            yield

    @torch.no_grad()
    def _add_proximal_gradient(self) -> None:
        """Gradient of mu / 2 ||w - w_0||^2 is mu (w - w_0)."""
        if self.proximal_mu <= 0:
            return
        for parameter, origin in zip(self.parameters.values(), self.anchor, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - origin, alpha=self.proximal_mu)


def _reader(loss: Tensor) -> Callable[[], float]:
    """A way to the loss's number that waits for its own step, not for what was queued after it."""
    if not loss.is_cuda:
        return lambda: float(loss)
    copy = loss.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(loss.device))

    def read() -> float:
        copied.synchronize()
        return float(copy)

    return read


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
