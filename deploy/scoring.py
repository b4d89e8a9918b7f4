"""The work behind `evaluate` and `data check`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from client.evaluation import summarise
from deploy.segmenting import load_for_sampling
from medsegdiff.data.cases import SPLITS
from medsegdiff.data.dataset import open_dataset
from medsegdiff.data.prepare import prepare
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.data.splits import SPLIT_SEED, TEST_FRACTION, split_patients
from medsegdiff.errors import UserError
from medsegdiff.evaluation import Evaluation, Segmentation, evaluate_cases
from medsegdiff.files import new_folder
from medsegdiff.labels import LabelScheme
from medsegdiff.metrics import PatientScore, coverage
from medsegdiff.raters import RaterMean
from medsegdiff.weights import Segmenter
from simulations.simulate import cache_folder

# A voxel of most scans, and what the Decathlon asks of the hippocampus; it gives other organs up to 7 mm.
SURFACE_TOLERANCE_MM = 1.0


def evaluate_folder(
    model: Path, folder: Path, dataset_config: Path | None, split: str, changes: Mapping[str, Any], seed: int,
    threads: int, device: str, tolerance_mm: float = SURFACE_TOLERANCE_MM, out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score a model on a dataset's patients, every figure of docs/metrics.md; plain data, ready for JSON.

    With several members each patient's true volume stands beside the members' range, and the summary says how often
    the range held it (null with one member).

    Args:
        tolerance_mm: of the surface Dice.
        out: a folder for scores.json, scores.csv and pictures, whole or not at all.

    Raises:
        UserError: no model, no dataset, other channels or labels than the model's, no patient in the split, or `out`
            holds something.
    """
    if not math.isfinite(tolerance_mm) or tolerance_mm < 0:
        raise UserError(f"--surface-tolerance {tolerance_mm}: millimetres, at least 0; nothing was scored.")
    if out is None:
        result, _ = _evaluate(model, folder, dataset_config, split, changes, seed, threads, device, tolerance_mm, False)
        return result
    from deploy.evaluation_report import write_scores

    with new_folder(out) as partial:
        result, pictures = _evaluate(
            model, folder, dataset_config, split, changes, seed, threads, device, tolerance_mm, True
        )
        write_scores(partial, result, pictures)
    return result


def _evaluate(
    model: Path, folder: Path, dataset_config: Path | None, split: str, changes: Mapping[str, Any], seed: int,
    threads: int, device: str, tolerance_mm: float, with_pictures: bool,
) -> tuple[dict[str, Any], dict[str, bytes]]:  # fmt: skip
    segmenter, sampling = load_for_sampling(model, changes, threads, device)
    card = segmenter.card
    cases, faults = _cases(folder, dataset_config, split, segmenter)
    watch: Callable[[PreparedCase, Segmentation, float | None], None] | None = None
    if with_pictures:
        from deploy.evaluation_pictures import Gallery, draw_reliability

        gallery = Gallery(segmenter.scheme)
        watch = gallery.add
    found = evaluate_cases(segmenter, cases, sampling, seed, tolerance_mm, watch)
    result = {
        "model": str(model), "folder": str(folder), "dataset": card.dataset.name, "split": split,
        "split_note": None if split == "all" else SPLIT_NOTE,
        "members": sampling.members, "surface_tolerance_mm": tolerance_mm,
        "patients": [_plain(patient, found) for patient in found.patients],
        "summary": summarise(found.patients)
        | {"volume_coverage": _coverage(found.patients, sampling.members), "by_target": _by_target(found)},
        "calibration": {
            target: {where: asdict(c) for where, c in both.items()} for target, both in found.calibration.items()
        },
        "left_out": faults,
    }  # fmt: skip
    return result, gallery.pictures() | {"reliability.png": draw_reliability(found.calibration)} if watch else {}


SPLIT_NOTE = (
    "This split is the one of medsegfed train. A model of a simulation or a federation may have been trained on "
    "patients of it: score such a model on patients that it never saw."
)


def _cases(
    folder: Path, dataset_config: Path | None, split: str, segmenter: Segmenter
) -> tuple[list[PreparedCase], list[dict[str, Any]]]:
    """The split's cases at the network's size, and the folder's faults."""
    card = segmenter.card
    dataset = open_dataset(folder, dataset_config or card.dataset)
    for what, own, asked in (
        ("channels", dataset.config.channels, card.dataset.channels),
        ("labels", dataset.config.label_names, card.dataset.label_names),
    ):
        if own != asked:
            raise UserError(
                f"{folder}: its {what} are {list(own)}, the model was trained on {list(asked)}; nothing was scored. "
                "Choose the dataset.yaml that fits with --dataset-config."
            )
    if split not in ("all", *SPLITS):
        raise UserError(f"--split {split}: choose all, {', '.join(SPLITS)}.")
    prepared = prepare(dataset, card.model.image_size, cache_folder())
    cases = list(prepared.cases)
    if split != "all":
        splits = split_patients([p.case for p in cases], TEST_FRACTION, 0.0, SPLIT_SEED)
        cases = [p for p in cases if splits[p.case.patient_id] == split]
    if not cases:
        raise UserError(f"{folder}: no patient is in split {split}, so there is nothing to score. Try --split all.")
    return cases, [vars(fault) for fault in prepared.faults]


def _plain(patient: PatientScore, found: Evaluation) -> dict[str, Any]:
    sizes = {target: asdict(size) | {"covered": size.covered} for target, size in patient.sizes.items()}
    volume = {target: asdict(v) | {"error": v.error, "relative": v.relative} for target, v in patient.volume.items()}
    raters = _rated(found.raters.of(patient.patient_id))
    return vars(patient) | {"sizes": sizes or None, "volume": volume, "raters": raters}


def _rated(means: Mapping[str, RaterMean] | None) -> dict[str, dict[str, float]] | None:
    if means is None:
        return None
    return {target: {"cases": mean.cases} | asdict(mean.mean) for target, mean in means.items()}


def _by_target(found: Evaluation) -> dict[str, dict[str, Any]]:
    """Means over the patients for whom a figure is defined; those of raters over cases; calibration over voxels."""
    raters = _rated(found.raters.overall()) or {}
    summary = {}
    for target in found.patients[0].dice:
        volumes = [patient.volume[target] for patient in found.patients]
        unit = volumes[0].unit if len({volume.unit for volume in volumes}) == 1 else None
        errors = [volume.error for volume in volumes]
        relative = [volume.relative for volume in volumes]
        summary[target] = {
            "dice": _mean([patient.dice[target] for patient in found.patients]),
            "iou": _mean([patient.iou[target] for patient in found.patients]),
            "hd95_mm": _mean([patient.hd95_mm[target] for patient in found.patients]),
            "assd_mm": _mean([patient.assd_mm[target] for patient in found.patients]),
            "surface_dice": _mean([patient.surface_dice[target] for patient in found.patients]),
            "volume_unit": unit,
            "volume_error": _mean(errors) if unit else None,
            "volume_error_absolute": _mean([abs(error) for error in errors]) if unit else None,
            "volume_error_relative": _mean(relative),
            "volume_error_relative_absolute": _mean([None if r is None else abs(r) for r in relative]),
            "ece_near": found.calibration[target]["near"].ece,
            "ece_all": found.calibration[target]["all"].ece,
            "raters": raters.get(target),
        }
    return summary


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return math.fsum(defined) / len(defined) if defined else None


def _coverage(patients: Sequence[PatientScore], members: int) -> dict[str, Any] | None:
    return {target: asdict(found) for target, found in coverage(patients, members).items()} or None


def scores_table(result: Mapping[str, Any]) -> Table:
    """One row a patient, and the mean."""
    table = Table(title=f"{result['folder']} read as {result['dataset']}, split {result['split']}")
    table.add_column("patient", overflow="fold")
    targets = list(result["patients"][0]["dice"])
    for target in targets:
        table.add_column(f"Dice {target}", justify="right")
        table.add_column(f"HD95 {target} (mm)", justify="right")
    for patient in result["patients"]:
        cells = [(_figure(patient["dice"][t]), _figure(patient["hd95_mm"][t], 1)) for t in targets]
        table.add_row(patient["patient_id"], *(text for pair in cells for text in pair))
    table.add_section()
    means = [(_figure(result["summary"]["dice_by_target"][t]), _mean_hd95(result, t)) for t in targets]
    table.add_row("mean", *(text for pair in means for text in pair))
    notes = [_target_line(result, target) for target in targets]
    if result["left_out"]:
        notes.append(f"{len(result['left_out'])} cases are left out: {result['left_out'][0]['reason']}")
    if result["split_note"]:
        notes.append(result["split_note"])
    table.caption = "\n".join(notes) or None
    return table


def volumes_table(result: Mapping[str, Any]) -> Table | None:
    """With several members: each patient's true volume, the mask's, and the members' range; how often it holds."""
    found = result["summary"]["volume_coverage"]
    if not found:
        return None
    table = Table(title="Volumes: true / of the mask (smallest-largest member); ! where the true one lies outside")
    table.add_column("patient", overflow="fold")
    for target in found:
        table.add_column(target, justify="right")
    for patient in result["patients"]:
        table.add_row(patient["patient_id"], *(_size(patient["sizes"][target]) for target in found))
    table.caption = _coverage_line(found)
    return table


def check_folder(folder: Path, dataset_config: Path | None, size: int) -> dict[str, Any]:
    """What a dataset holds, every file read once. Raises UserError when it is no dataset or mostly unreadable."""
    dataset = open_dataset(folder, dataset_config)
    prepared = prepare(dataset, size, cache_folder())
    scheme = LabelScheme.of(dataset.config)
    cases = [p.case for p in prepared.cases]
    sites: dict[str, set[str]] = {}
    for case in cases:
        sites.setdefault(case.site or "-", set()).add(case.patient_id)
    return {
        "dataset": dataset.config.name, "modality": dataset.config.modality, "channels": list(dataset.config.channels),
        "labels": list(dataset.config.label_names), "targets": list(scheme.targets), "kind": scheme.kind,
        "cases": len(cases), "patients": len({case.patient_id for case in cases}),
        "sites": {site: len(patients) for site, patients in sorted(sites.items())},
        "slices": sum(p.slices for p in prepared.cases),
        "slices_with_foreground": sum(len(p.foreground(scheme)) for p in prepared.cases),
        "with_spacing": sum(p.spacing_mm is not None for p in prepared.cases),
        "left_out": [vars(fault) for fault in prepared.faults],
    }  # fmt: skip


def check_lines(found: Mapping[str, Any]) -> list[str]:
    """A dataset's description for a person."""
    sites = ", ".join(f"{site}: {count}" for site, count in found["sites"].items())
    lines = [
        f"{found['dataset']} ({found['modality']}): {found['cases']} cases of {found['patients']} patients",
        f"channels {', '.join(found['channels'])}; labels {', '.join(found['labels'])}",
        f"segments {', '.join(found['targets'])} ({found['kind']})",
        f"patients by site: {sites}",
        f"{found['slices']} slices, {found['slices_with_foreground']} with foreground; spacing known for "
        f"{found['with_spacing']} of {found['cases']} cases",
    ]
    lines += [f"left out: case {f['case_id']}: {f['reason']} ({f['file']})" for f in found["left_out"]]
    return lines


def _size(size: Mapping[str, Any]) -> str:
    digits = 2 if size["unit"] == "ml" else 0
    true, predicted, low, high = (_figure(size[name], digits) for name in ("true", "predicted", "low", "high"))
    return f"{true} / {predicted} ({low}-{high}) {size['unit']}{'' if size['covered'] else ' !'}"


def _coverage_line(found: Mapping[str, Mapping[str, Any]]) -> str:
    """How often the members' range held the truth."""
    shares = [
        f"{target} {c['covered']} of {c['patients']} ({100 * c['wilson_95'][0]:.0f}-{100 * c['wilson_95'][1]:.0f} %)"
        for target, c in found.items()
    ]
    expected = next(iter(found.values()))["expected"]
    return f"Inside: {', '.join(shares)}; {100 * expected:.0f} % if the truth were one more member."


def _target_line(result: Mapping[str, Any], target: str) -> str:
    """The other figures of a target, averaged."""
    mean = result["summary"]["by_target"][target]
    parts = [
        f"IoU {_figure(mean['iou'])}",
        f"ASSD {_figure(mean['assd_mm'], 2)} mm",
        f"surface Dice at {result['surface_tolerance_mm']:g} mm {_figure(mean['surface_dice'])}",
    ]
    if mean["volume_unit"]:
        error, size = mean["volume_error"], mean["volume_error_absolute"]
        parts.append(f"volume error {error:+.3g} {mean['volume_unit']} (absolute {size:.3g})")
    parts.append(f"ECE near {_figure(mean['ece_near'])}, all {_figure(mean['ece_all'], 4)}")
    if mean["raters"]:
        rated = mean["raters"]
        parts.append(
            f"GED squared {_figure(rated['ged_squared'])}, HM-IoU {_figure(rated['hm_iou'])} ({rated['cases']} cases)"
        )
    return f"{target}: {'; '.join(parts)}."


def _mean_hd95(result: Mapping[str, Any], target: str) -> str:
    known = [p["hd95_mm"][target] for p in result["patients"] if p["hd95_mm"][target] is not None]
    of = "" if len(known) == len(result["patients"]) else f" ({len(known)} of {len(result['patients'])})"
    return _figure(sum(known) / len(known) if known else None, 1) + (of if known else "")


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
