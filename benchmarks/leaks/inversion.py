"""What did the scan look like? An image recovered from an update (Zhu et al. 2019; Geiping et al. 2020).

The attacker has the model before the update and the update of one patient's single slice, and is told all else that was
drawn: the mask, the timestep and the noise. Whoever has less fares no better. He looks for the image whose own gradient
is the one that he has: by squared distance (Zhu et al.), which is sharpest where nothing was changed, and by cosine,
which knows no scale and so bears clipping; each with a little total variation, by L-BFGS on the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from client.privacy.engines import PatientLoop, RowLoss, Rows, trained_parameters
from client.privacy.entropy import SystemEntropy
from client.privacy.noise import add_noise

Gradient = Sequence[Tensor]


@dataclass(frozen=True)
class Search:
    """How hard the attacker tries."""

    evaluations: int = 400  # of the network's second derivatives, a start and kind of distance
    smoothness: float = 1e-6  # weight of the total variation
    starts: int = 1  # the first from a blank image, the others from noise


def plain_gradient(network: nn.Module, loss: RowLoss, rows: Rows) -> list[Tensor]:
    """What an update of one unprotected step tells."""
    weights = list(trained_parameters(network).values())
    return list(torch.autograd.grad(loss(network, rows), weights, materialize_grads=True))


def private_gradient(network: nn.Module, loss: RowLoss, rows: Rows, clip: float, sigma: float) -> list[Tensor]:
    """What one private step of this patient alone tells, before it is divided by a constant: clipped and noised."""
    sums = PatientLoop().clipped_sum(network, loss, [rows], clip)
    add_noise(sums.values(), sigma * clip, SystemEntropy())
    return [total.float() for total in sums.values()]


def trained_change(network: nn.Module, loss: RowLoss, draws: Sequence[Rows], learning_rate: float) -> list[Tensor]:
    """Minus the change of the weights by an AdamW step on each of the draws in turn; the network is left as it was."""
    weights = list(trained_parameters(network).values())
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    for rows in draws:
        optimizer.zero_grad(set_to_none=True)
        loss(network, rows).backward()
        optimizer.step()
    change = [old - weight.detach() for old, weight in zip(before, weights, strict=True)]
    with torch.no_grad():
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
    optimizer.zero_grad(set_to_none=True)
    return change


def invert(
    network: nn.Module, loss: RowLoss, known: Sequence[Rows], target: Gradient, search: Search, seed: int
) -> list[Tensor]:
    """Images (1, C, H, W) whose gradient is most like `target`: the best match by each kind of distance.

    Args:
        known: rows of one slice without its image (what stands there gives the shape alone): of the step, or of each
            of several steps, whose gradients are added up.
        target: what is to be matched, a tensor for each trained parameter.
    """
    generator = torch.Generator().manual_seed(seed)
    like = known[0]["images"]
    starts = [torch.zeros_like(like)]
    starts += [torch.randn(like.shape, generator=generator).to(like) for _ in range(search.starts - 1)]
    found = []
    for distance in (_squares, _cosine):
        answers = [_descend(network, loss, known, target, search, distance, start) for start in starts]
        found.append(min(answers, key=lambda answer: answer[0])[1])
    return found


Distance = Callable[[Gradient, Gradient], Tensor]


def _squares(found: Gradient, target: Gradient) -> Tensor:
    """||a - b||^2 / ||b||^2."""
    return _norm([a - b for a, b in zip(found, target, strict=True)]).square() / _norm(target).square()


def _cosine(found: Gradient, target: Gradient) -> Tensor:
    """1 - <a, b> / (||a|| ||b||)."""
    product = torch.stack([(a * b).sum() for a, b in zip(found, target, strict=True)]).sum()
    return 1 - product / (_norm(found) * _norm(target) + 1e-20)


def _descend(
    network: nn.Module, loss: RowLoss, known: Sequence[Rows], target: Gradient, search: Search, distance: Distance,
    start: Tensor,
) -> tuple[float, Tensor]:  # fmt: skip
    """The best objective that was seen, and its image."""
    weights = list(trained_parameters(network).values())
    image = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [image], lr=1, max_iter=search.evaluations, max_eval=search.evaluations, history_size=50,
        line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-14,
    )  # fmt: skip
    best = (math.inf, start)

    def evaluate() -> Tensor:
        nonlocal best
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            losses = [loss(network, {**rows, "images": image}) for rows in known]
            found = torch.autograd.grad(torch.stack(losses).sum(), weights, create_graph=True, materialize_grads=True)
            objective = distance(found, target) + search.smoothness * total_variation(image)
            (image.grad,) = torch.autograd.grad(objective, image)
        value = float(objective.detach())
        if value < best[0]:
            best = (value, image.detach().clone())
        if not _EXACT < value < math.inf:
            raise _Over
        return objective.detach()

    try:
        optimizer.step(evaluate)
    except _Over:
        pass
    except RuntimeError as error:  # a line search on flat ground steps beyond float32
        if "overflow" not in str(error):
            raise
    return best


_EXACT = 1e-12  # of the objective: nothing is left to match


class _Over(Exception):
    """The search is at its end: an exact match, or no number any more."""


def total_variation(image: Tensor) -> Tensor:
    """Mean absolute difference of neighbours."""
    across, down = image.diff(dim=-1).abs().mean(), image.diff(dim=-2).abs().mean()
    return across + down


def fitted(guess: Tensor, truth: Tensor) -> Tensor:
    """The guess with the brightness and contrast that fit best: a cosine knows no scale, and the attacker gets it free.

    A negative contrast is allowed as well.
    """
    x, y = guess.flatten() - guess.mean(), truth.flatten() - truth.mean()
    slope = (x @ y) / (x @ x).clamp(min=1e-12)
    return (guess - guess.mean()) * slope + truth.mean()


def psnr(guess: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the peak being the truth's range; infinite for the truth itself."""
    error = float((guess - truth).square().mean())
    return math.inf if error == 0 else 10 * math.log10(float(truth.max() - truth.min()) ** 2 / error)


def ssim(guess: Tensor, truth: Tensor, window: int = 7) -> float:
    """Structural similarity (Wang et al. 2004), over square windows, in [-1, 1]; 1 for the truth itself."""
    peak = float(truth.max() - truth.min())
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1)

    a, b = mean(guess), mean(truth)
    scale = window**2 / (window**2 - 1)  # the sample's variance
    aa, bb, ab = (scale * (mean(x) - y) for x, y in ((guess**2, a * a), (truth**2, b * b), (guess * truth, a * b)))
    return float(((2 * a * b + c1) * (2 * ab + c2) / ((a * a + b * b + c1) * (aa + bb + c2))).mean())


def _norm(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.square().sum() for value in values]).sum().sqrt()
