"""Reports to test with: a full simulation, and a real federation, which knows far less."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.report import Example

SITES = ("Aachen", "Bergen", "Coimbra", "St Mary's Hospital")
SIDE = 64


def sample_report(
    rounds: int = 12, loses_at: str | None = None, targets: tuple[str, ...] = ("tumour",)
) -> dict[str, Any]:
    """A simulation's report of four sites; the federated model loses to the local one at `loses_at`."""
    local = dict(zip(SITES, (0.741, 0.702, 0.655, 0.612), strict=True))
    federated = {name: dice + 0.091 for name, dice in local.items()}
    pooled = {name: dice + 0.102 for name, dice in local.items()}
    if loses_at is not None:
        federated[loses_at] = local[loses_at] - 0.024
    arms = {"federated": federated, "local": local, "pooled": pooled}
    return {
        "run": "glioma-4-sites",
        "seed": 0,
        "rounds": rounds,
        "engine": "inline",
        "model": {"preset": "tiny", "parameters": 1_234_567, "channel_multipliers": [1, 2, 4]},
        "strategy": {"name": "fedavg", "proximal_mu": 0.0},
        "local_steps": 100,
        "dataset": {
            "name": "LGG segmentation (TCGA)",
            "modality": "MRI",
            "channels": ["pre-contrast", "FLAIR", "post-contrast"],
            "targets": list(targets),
            "licence": "CC BY-NC-SA 4.0",
        },
        "arms": {
            arm: {"mean": sum(scores.values()) / len(scores), "worst": min(scores.values())}
            for arm, scores in arms.items()
        },
        "sites": {
            name: _site(number, {arm: scores[name] for arm, scores in arms.items()}, targets)
            for number, name in enumerate(SITES)
        },
        "history": _history(rounds, federated),
        "cross_site": _cross_site(local, federated, pooled),
        "seconds": {"total": 212.0, "train": 190.0, "evaluate": 15.0, "overhead": 7.0},
        "bytes": {"up": 237_036_672, "down": 237_036_672},
        "software": {"medsegfed": "0.1.0", "torch": "2.11.0", "flwr": "1.41.0", "python": "3.11.7"},
        "hardware": {"cpu": "Example CPU", "threads": 2, "gpu": None},
        "notes": ["The split of a single-centre data set into hospitals is artificial."],
    }


def _site(number: int, dice: dict[str, float], targets: tuple[str, ...]) -> dict[str, Any]:
    return {
        "patients": {"train": 32 - 6 * number, "test": 11 - 2 * number},
        "dice": dice,
        "hd95_mm": {arm: 25.0 * (1 - score) for arm, score in dice.items()},
        "epsilon": None,
        "absent_rounds": [3, 5, 6, 7] if number == 2 else [],
        "dice_by_target": {
            arm: {target: score - 0.05 * place for place, target in enumerate(targets)} for arm, score in dice.items()
        },
        "hd95_undefined": {"federated": 0, "local": 1 if number == 3 else 0, "pooled": 0},
        "faults": 2 if number == 1 else 0,
        "rejected_rounds": [{"round": 4, "reason": "norm 38.2 is over 10.0 times the median"}] if number == 3 else [],
    }


def _history(rounds: int, final: dict[str, float]) -> list[dict[str, Any]]:
    noise = np.random.default_rng(7)
    history = []
    for number in range(1, rounds + 1):
        for place, (name, dice) in enumerate(final.items()):
            if place == 2 and number in (3, 5, 6, 7):
                continue
            reached = dice * (1 - np.exp(-number / 3)) + 0.02 * noise.standard_normal()
            loss = 0.05 + 0.02 * place + 0.6 * np.exp(-number / 2.5) + 0.01 * noise.random()
            history.append({"round": number, "site": name, "loss": float(loss), "dice": float(np.clip(reached, 0, 1))})
    return history


def _cross_site(local: dict[str, float], federated: dict[str, float], pooled: dict[str, float]) -> dict[str, Any]:
    away = 0.08 * np.abs(np.subtract.outer(range(len(SITES)), range(len(SITES))))
    own = [[local[site] - float(away[row, column]) for column, site in enumerate(SITES)] for row in range(len(SITES))]
    return {
        "models": [*SITES, "federated", "pooled"],
        "sites": list(SITES),
        "dice": [*own, list(federated.values()), list(pooled.values())],
    }


def federation_report() -> dict[str, Any]:
    """A real federation with privacy on: one arm, no per-site figures, no pictures, no cross-site matrix."""
    report = sample_report()
    report |= {"engine": "flower", "cross_site": None, "hardware": None, "history": [], "notes": []}
    report["arms"] = {"federated": report["arms"]["federated"], "local": None}
    report["seconds"] = {"total": 7212.4, "train": None, "evaluate": None, "overhead": None}
    for number, name in enumerate(SITES):
        report["sites"][name] = {
            "patients": None,
            "dice": None,
            "hd95_mm": None,
            "epsilon": 3.5 + number,
            "absent_rounds": [],
        }
    return report


def sample_examples(targets: tuple[str, ...] = ("tumour",), sites: tuple[str, ...] = SITES) -> list[Example]:
    """One synthetic slice a site: an ellipse of a head with discs as targets, the prediction a little off."""
    return [_example(number, site, targets) for number, site in enumerate(sites)]


def _example(number: int, site: str, targets: tuple[str, ...]) -> Example:
    noise = np.random.default_rng(number)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64)
    head = ((x - 32) / 24) ** 2 + ((y - 32) / 28) ** 2 < 1
    centre = 24 + 4 * number, 26 + 3 * number
    truth = np.stack([_disc(x, y, centre, 9 - 3 * place) for place in range(len(targets))])
    prediction = np.stack([_disc(x, y, (centre[0] + 2, centre[1] + 1), 8 - 3 * place) for place in range(len(targets))])
    image = 0.5 * head + 0.3 * truth.sum(0) + 0.05 * noise.standard_normal((SIDE, SIDE))
    edge = np.abs(np.hypot(x - centre[0] - 1, y - centre[1]) - 8.5)
    overlap = 2 * (truth & prediction).sum() / (truth.sum() + prediction.sum())
    return Example(
        site, f"case {number + 1}, slice 12", image, truth, prediction, np.exp(-(edge**2) / 3), targets, float(overlap)
    )


def _disc(
    x: NDArray[np.float64], y: NDArray[np.float64], centre: tuple[float, float], radius: float
) -> NDArray[np.bool_]:
    return np.hypot(x - centre[0], 1.2 * (y - centre[1])) < radius
