"""What attackers get out of trained models and of updates, with privacy and without: make attack-privacy

    python -m benchmarks.privacy_attacks [--quick] [--device cuda] [--picture docs/privacy-inversion.png]

Membership: hundreds of made-up patients, some in a training and some not; who was in? A model trained by heart has to
be found out, or the attack shows nothing. Inversion: an image from the update of one step; from a plain gradient it has
to come back, or failing on a private one means nothing. `leaks/` holds the attacks. What was done is not repeated:
finished attacks are kept, and the same command goes on.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.leaks.inversion import (
    Search,
    fitted,
    invert,
    plain_gradient,
    private_gradient,
    psnr,
    ssim,
    trained_change,
)
from benchmarks.leaks.membership import (
    FALSE_POSITIVES,
    bound_of,
    calibrated_scores,
    loss_scores,
    patient_losses,
    success,
)
from benchmarks.leaks.models import CLIP, DELTA, Recipe, network_config, train
from benchmarks.leaks.people import People, draw_people, draw_rows
from benchmarks.turns import RESULTS, ROOT, Answer, hardware, table
from client.privacy.accounting import LEAST_SIGMA, Mechanism, epsilon, noise_multiplier
from client.privacy.patients import DiffusionRowLoss
from medsegdiff.config import DiffusionConfig
from medsegdiff.devices import choose_device
from medsegdiff.diffusion import Diffusion
from medsegdiff.ensemble import derive_seed
from medsegdiff.files import write_atomic
from medsegdiff.network import MedSegDiff

SIDE = 16
# Without attention and fusion, which only make the search longer: the control has to succeed.
INVERTED = replace(network_config(SIDE), channel_multipliers=(1, 2), attention_levels=(), fusion_levels=())
EPSILONS = (1.0, 8.0, 50.0)


@dataclass(frozen=True)
class Size:
    """How much is tried."""

    members: int
    others: int  # patients that were in no training
    models: int  # trainings of each kind, their members others each time; figures are over all of them
    shadows: int  # trainings on strangers, that scores are calibrated by
    memorised: int  # steps of the model that learns by heart
    regularised: int
    private: int
    victims: int  # patients whose image is sought
    search: Search


FULL = Size(24, 200, 4, 3, 2500, 200, 40, 3, Search(400))
QUICK = Size(24, 150, 1, 2, 1500, 150, 30, 2, Search(150))


def kinds(size: Size) -> dict[str, Recipe]:
    """The trainings that are attacked."""
    found = {
        "by heart, no privacy": Recipe(size.memorised),
        "augmented and stopped early, no privacy": Recipe(size.regularised, augmented=True),
        # The control of those below: where it is not found out either, it need not be the noise that hides them.
        "no longer than the private ones, no privacy": Recipe(size.private),
    }
    return found | {f"epsilon {e:g}": Recipe(size.private, epsilon=e) for e in EPSILONS}


def membership(recipe: Recipe, size: Size, number: int, device: torch.device) -> Answer:
    """Attack one training; none of its patients is in another's. Scores of members and others, by attack."""
    diffusion = Diffusion(DiffusionConfig())
    begun = time.monotonic()
    people = draw_people(size.members + size.others, SIDE, derive_seed(0, "people", number)).to(device)
    inside, outside = people.take(0, size.members), people.take(size.members, size.others)
    strangers = draw_people(size.members * size.shadows, SIDE, derive_seed(1, "people", number)).to(device)
    attacked = train(inside, recipe, number)
    seen, unseen = (patient_losses(attacked, diffusion, group) for group in (inside, outside))
    references = [train(strangers.take(size.members * k, size.members), recipe, 1000 + k) for k in range(size.shadows)]
    known, unknown = (
        np.stack([patient_losses(model, diffusion, group) for model in references]) for group in (inside, outside)
    )
    joined = calibrated_scores(np.concatenate([seen, unseen]), np.concatenate([known, unknown], axis=1))
    scores = {
        "loss": (loss_scores(seen), loss_scores(unseen)),
        "calibrated": (joined[: len(seen)], joined[len(seen) :]),
    }
    return {
        "scores": {name: [part.tolist() for part in pair] for name, pair in scores.items()},
        "loss_ratio": float(unseen.mean() / seen.mean()),
        "seconds": round(time.monotonic() - begun, 1),
    }


def judge(recipe: Recipe, parts: list[Answer]) -> Answer:
    """The figures of all trainings of one kind, and whether they keep to what privacy allows."""
    found: Answer = {
        "trainings": len(parts),
        "loss_ratio": round(float(np.mean([part["loss_ratio"] for part in parts])), 3),  # others' loss over members'
    }
    for name in ("loss", "calibrated"):
        inside, outside = (np.concatenate([part["scores"][name][k] for part in parts]) for k in (0, 1))
        found[name] = asdict(success(inside, outside))
        found |= {"members": len(inside), "others": len(outside)}
    if recipe.epsilon is not None:
        sigma = recipe.sigma
        assert sigma is not None
        found |= {"sigma": round(sigma, 4), "q": recipe.q, "steps": recipe.steps, "delta": DELTA}
        plain = min(1.0, float(np.exp(min(recipe.epsilon, 50.0))) * FALSE_POSITIVES + DELTA)
        found["bound"] = {"by_epsilon_alone": plain, "by_the_whole_curve": bound_of(sigma, recipe.q, recipe.steps)}
        # What the interval leaves open is no contradiction; a lower end above the bound would be one.
        lowest = max(found[name]["tpr_low"] for name in ("loss", "calibrated"))
        found["keeps_the_bound"] = lowest <= found["bound"]["by_the_whole_curve"]
    return found


Ways = dict[str, Callable[[MedSegDiff, DiffusionRowLoss, list[dict[str, Tensor]]], list[Tensor]]]
STEPS = 5  # of the update of several steps
BLIND = "mean of other patients, no update at all"
PLAIN = "plain gradient, one step"


def ways() -> Ways:
    """What the attacker is given."""
    found: Ways = {
        PLAIN: lambda network, loss, draws: plain_gradient(network, loss, draws[0]),
        f"change after {STEPS} AdamW steps": lambda network, loss, draws: trained_change(network, loss, draws, 1e-3),
    }
    for sigma in (noise_multiplier(1.0, 1, DELTA, 1.0), LEAST_SIGMA):
        found[f"private step, sigma {sigma:.2f} (epsilon {epsilon([Mechanism(sigma, 1.0, 1)], DELTA).value:.1f})"] = (
            _noised(sigma)
        )
    # Not to be had from a site: how little noise the attack bears.
    return found | {f"noise of sigma {sigma:g} alone": _noised(sigma) for sigma in (0.01, 0.0001)}


def _noised(sigma: float) -> Callable[[MedSegDiff, DiffusionRowLoss, list[dict[str, Tensor]]], list[Tensor]]:
    return lambda network, loss, draws: private_gradient(network, loss, draws[0], CLIP, sigma)


def inversion(size: Size, victim: int, device: torch.device) -> Answer:
    """Seek one patient's image from each kind of update: figures and pictures, by what the attacker has."""
    people = draw_people(size.victims + 40, SIDE, derive_seed(2, "people")).to(device)
    loss = DiffusionRowLoss(Diffusion(DiffusionConfig()), precision="fp32")
    torch.manual_seed(victim)
    network = MedSegDiff(INVERTED).to(device).train()
    generator = torch.Generator().manual_seed(victim)
    one = People(people.images[:, :1], people.masks[:, :1])
    draws = [dict(draw_rows(one, victim, 1, loss.diffusion, generator)) for _ in range(STEPS)]
    truth = one.images[victim]
    answers = {BLIND: fitted(one.images[size.victims :].mean(dim=0), truth)}
    for name, given in ways().items():
        target = given(copy.deepcopy(network), loss, draws)
        known = draws if "AdamW" in name else draws[:1]
        hidden = [{**rows, "images": torch.zeros_like(rows["images"])} for rows in known]
        found = [fitted(image, truth) for image in invert(network, loss, hidden, target, size.search, victim)]
        answers[name] = max(found, key=lambda image: psnr(image, truth))  # the attacker is given the better one
    told = {name: [psnr(image, truth), ssim(image, truth)] for name, image in answers.items()}
    shown = {name: image[0, 0].tolist() for name, image in {"scan": truth, **answers}.items()}
    return {"likeness": told, "pictures": shown}


def compare(size: Size, parts: list[Answer]) -> Answer:
    """PSNR and SSIM of every victim, by what the attacker had."""
    told = {
        name: {
            "psnr_db": [round(part["likeness"][name][0], 2) for part in parts],
            "ssim": [round(part["likeness"][name][1], 3) for part in parts],
        }
        for name in parts[0]["likeness"]
    }
    return {"side": SIDE, "clip": CLIP, "search": asdict(size.search), "ways": told}


def draw(pictures: list[dict[str, Any]]) -> bytes:
    """A row a patient: the scan, and what each update gives away; PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(pictures[0])
    figure = Figure(figsize=(1.5 * len(names), 1.55 * len(pictures) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(pictures), len(names), squeeze=False)
    for row, shown in zip(grid, pictures, strict=True):
        low, high = np.min(shown["scan"]), np.max(shown["scan"])
        for axes, name in zip(row, names, strict=True):
            axes.imshow(np.array(shown[name]).T[::-1], cmap="gray", vmin=low, vmax=high)
            axes.set_axis_off()
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(_wrapped(name), fontsize=7)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    return data.getvalue()


def _wrapped(text: str, width: int = 19) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def describe(result: Answer) -> str:
    """The tables for the terminal."""
    rows = []
    for name, found in result["membership"].items():
        for attack in ("loss", "calibrated"):
            s = found[attack]
            rows.append([
                name, attack, f"{s['auc']:.3f} ({s['auc_low']:.3f} to {s['auc_high']:.3f})",
                f"{s['tpr']:.3f} ({s['tpr_low']:.3f} to {s['tpr_high']:.3f})",
                f"{found['bound']['by_the_whole_curve']:.3f}" if "bound" in found else "none",
            ])  # fmt: skip
    header = ["training", "attack", "AUC (95 %)", "TPR at 1 % FPR (95 %)", "bound"]
    text = table(header, rows)
    if "inversion" in result:
        seen = [
            [name, f"{np.median(w['psnr_db']):.1f}", f"{np.median(w['ssim']):.2f}"]
            for name, w in result["inversion"]["ways"].items()
        ]
        text += "\n\n" + table(["what the attacker has", "PSNR, dB (median)", "SSIM"], seen)
    return text


def markdown(result: Answer) -> str:
    """The tables of docs/privacy.md."""
    lines = ["| training | sigma | AUC, loss | AUC, calibrated | TPR at 1 % FPR, calibrated | no attack can exceed |"]
    lines.append("|---|---|---|---|---|---|")
    for name, found in result["membership"].items():
        loss, best = found["loss"], found["calibrated"]
        areas = [f"{s['auc']:.2f} ({s['auc_low']:.2f} to {s['auc_high']:.2f})" for s in (loss, best)]
        rate = f"{best['tpr']:.1%} ({best['tpr_low']:.1%} to {best['tpr_high']:.1%})"
        bound = f"{found['bound']['by_the_whole_curve']:.1%}" if "bound" in found else "no limit"
        kept = str(found["sigma"]) if "sigma" in found else "none"
        lines.append(f"| {name} | {kept} | {areas[0]} | {areas[1]} | {rate} | {bound} |")
    if "inversion" in result:
        lines += ["", "| what the attacker has | PSNR, dB | SSIM |", "|---|---|---|"]
        for name, w in result["inversion"]["ways"].items():
            lines.append(f"| {name} | {np.median(w['psnr_db']):.1f} | {np.median(w['ssim']):.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Attack, write benchmarks/results/privacy_attacks.json (or _quick), print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="smaller: ten minutes on a processor")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/privacy_attacks.json (or _quick)")
    parser.add_argument("--picture", type=Path, help="where the reconstructions are drawn")
    parser.add_argument("--markdown", action="store_true", help="print the tables as docs/privacy.md has them")
    parser.add_argument("--jobs", type=int, default=1, help="attacks at a time, each in a process of its own")
    parser.add_argument("--parts", type=Path, help="where finished attacks are kept (default: .cache/)")
    parser.add_argument("--only", choices=("membership", "inversion"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device, size = choose_device(given.device), QUICK if given.quick else FULL
    suffix = "_quick" if given.quick else ""
    out = given.out or RESULTS / f"privacy_attacks{suffix}.json"
    parts = given.parts or ROOT / ".cache" / f"privacy_attacks{suffix}"
    about = hardware(given.threads)
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    names = kinds(size)
    tasks = [] if given.only == "inversion" else [(name, k) for k in range(size.models) for name in names]
    tasks += [] if given.only == "membership" else [(INVERSION, victim) for victim in range(size.victims)]
    waiting = [task for task in tasks if _kept(parts, task, size) is None]
    if given.jobs == 1:
        for task in waiting:
            attack(task, size, parts, device, given.threads)
    else:
        with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
            for future in [pool.submit(attack, task, size, parts, device, given.threads) for task in waiting]:
                future.result()
    done = {task: found for task in tasks if (found := _kept(parts, task, size)) is not None}
    result: Answer = {"hardware": about, "size": asdict(size), "delta": DELTA, "membership": {}}
    if given.only != "inversion":
        for name, recipe in names.items():
            result["membership"][name] = judge(recipe, [done[name, k] for k in range(size.models)])
    if given.only != "membership":
        found = [done[INVERSION, victim] for victim in range(size.victims)]
        result["inversion"] = compare(size, found)
        if given.picture is not None:
            write_atomic(given.picture, draw([part["pictures"] for part in found]))
    write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())
    print(markdown(result) if given.markdown else describe(result))


INVERSION = "inversion"
Task = tuple[str, int]  # a kind of training and its number, or INVERSION and the number of a victim


def attack(task: Task, size: Size, parts: Path, device: torch.device, threads: int) -> None:
    """Carry out one attack and keep what came out."""
    torch.set_num_threads(threads)
    name, number = task
    begun = time.monotonic()
    if name == INVERSION:
        found = inversion(size, number, device)
    else:
        found = membership(kinds(size)[name], size, number, device)
    write_atomic(_part(parts, task), json.dumps({"what": _what(task, size), "found": found}).encode())
    print(f"{name}, {number}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def _kept(parts: Path, task: Task, size: Size) -> Answer | None:
    """What came out of an attack that was carried out before, and exactly as it would be now."""
    try:
        kept = json.loads(_part(parts, task).read_text())
        found: Answer | None = kept["found"] if kept["what"] == _what(task, size) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _what(task: Task, size: Size) -> dict[str, Any]:
    """All that an attack's outcome depends on, but for the program."""
    name, _ = task
    if name == INVERSION:
        return {"victims": size.victims, "search": asdict(size.search)}
    return {"members": size.members, "others": size.others, "shadows": size.shadows, **asdict(kinds(size)[name])}


def _part(parts: Path, task: Task) -> Path:
    return parts / f"{re.sub('[^a-z0-9]+', '-', task[0])}-{task[1]}.json"


if __name__ == "__main__":
    main()
