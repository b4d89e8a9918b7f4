"""The work behind `evaluate`, `segment` and `data check`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from client.evaluation import summarise
from medsegdiff.config import SamplingConfig
from medsegdiff.data.cases import SPLITS
from medsegdiff.data.dataset import open_dataset
from medsegdiff.data.prepare import prepare
from medsegdiff.data.splits import SPLIT_SEED, TEST_FRACTION, split_patients
from medsegdiff.devices import choose_device
from medsegdiff.errors import UserError
from medsegdiff.evaluation import score_cases
from medsegdiff.labels import LabelScheme
from medsegdiff.metrics import PatientScore, coverage
from medsegdiff.network import channels_last
from medsegdiff.progress import Progress, report
from medsegdiff.segment import segment_scan
from medsegdiff.weights import Segmenter, load_model
from simulations.simulate import cache_folder


def evaluate_folder(
    model: Path, folder: Path, dataset_config: Path | None, split: str, changes: Mapping[str, Any], seed: int,
    threads: int, device: str,
) -> dict[str, Any]:  # fmt: skip
    """Score a model on a dataset's patients; plain data, ready for JSON.

    With several members each patient's true volume stands beside the members' range, and the summary says how often
    the range held it (null with one member).

    Raises:
        UserError: no model, no dataset, other channels or labels than the model's, or no patient in the split.
    """
    segmenter, sampling = _ready(model, changes, threads, device)
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
    patients = score_cases(segmenter, cases, sampling, seed)
    return {
        "model": str(model), "folder": str(folder), "dataset": card.dataset.name, "split": split,
        "patients": [_plain(patient) for patient in patients],
        "summary": summarise(patients) | {"volume_coverage": _coverage(patients, sampling.members)},
        "left_out": [vars(fault) for fault in prepared.faults],
    }  # fmt: skip


def _plain(patient: PatientScore) -> dict[str, Any]:
    sizes = {target: asdict(size) | {"covered": size.covered} for target, size in patient.sizes.items()}
    return vars(patient) | {"sizes": sizes or None}


def _coverage(patients: Sequence[PatientScore], members: int) -> dict[str, Any] | None:
    return {target: asdict(found) for target, found in coverage(patients, members).items()} or None


def scores_table(result: Mapping[str, Any]) -> Table:
    """One row a patient, and the mean; with several members also volumes: true, predicted, and the members' range."""
    table = Table(title=f"{result['folder']} read as {result['dataset']}, split {result['split']}")
    table.add_column("patient")
    targets = list(result["patients"][0]["dice"])
    found = result["summary"]["volume_coverage"]
    for target in targets:
        table.add_column(f"Dice {target}", justify="right")
        table.add_column(f"HD95 {target} (mm)", justify="right")
        if found:
            table.add_column(f"volume {target}", justify="right")
    for patient in result["patients"]:
        cells: list[str] = []
        for t in targets:
            cells += [_figure(patient["dice"][t]), _figure(patient["hd95_mm"][t], 1)]
            cells += [_size(patient["sizes"][t])] if found else []
        table.add_row(patient["patient_id"], *cells)
    table.add_section()
    cells = []
    for t in targets:
        cells += [_figure(result["summary"]["dice_by_target"][t]), _mean_hd95(result, t)]
        cells += [""] if found else []
    table.add_row("mean", *cells)
    notes = [_coverage_line(found)] if found else []
    if result["left_out"]:
        notes.append(f"{len(result['left_out'])} cases are left out: {result['left_out'][0]['reason']}")
    table.caption = "\n".join(notes) or None
    return table


def segment_scans(
    model: Path, scans: Sequence[str], out: Path, changes: Mapping[str, Any], seed: int, threads: int, device: str
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Segment scans one after the other; a bad one is named and the others go on.

    Returns:
        What was written, and the scans that could not be segmented with the reason.
    """
    segmenter, sampling = _ready(model, changes, threads, device)
    done, failed = [], []
    for number, scan in enumerate(scans, start=1):
        try:
            done.append(vars(segment_scan(segmenter, scan, out, sampling, seed, sampling.members > 1)))
        except UserError as error:
            failed.append({"scan": scan, "reason": str(error)})
        report(Progress("segment", number, len(scans)))
    return done, failed


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


def _ready(model: Path, changes: Mapping[str, Any], threads: int, device: str) -> tuple[Segmenter, SamplingConfig]:
    segmenter = load_model(model)
    torch.set_num_threads(threads)
    channels_last(segmenter.network).to(choose_device(device))
    try:
        return segmenter, replace(segmenter.card.sampling, **changes)
    except ValueError as error:
        raise UserError(f"{error}.") from error


def _size(size: Mapping[str, Any]) -> str:
    digits = 2 if size["unit"] == "ml" else 0
    true, predicted, low, high = (_figure(size[name], digits) for name in ("true", "predicted", "low", "high"))
    return f"{true} / {predicted} ({low}-{high}) {size['unit']}{'' if size['covered'] else ' !'}"


def _coverage_line(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What the columns of volumes mean, and how often the members' range held the truth."""
    shares = [
        f"{target} {c['covered']} of {c['patients']} ({100 * c['wilson_95'][0]:.0f}-{100 * c['wilson_95'][1]:.0f} %)"
        for target, c in found.items()
    ]
    expected = next(iter(found.values()))["expected"]
    return (
        "Volumes: true / of the mask (smallest-largest member); ! where the true one lies outside. Inside: "
        f"{', '.join(shares)}; {100 * expected:.0f} % if the truth were one more member."
    )


def _mean_hd95(result: Mapping[str, Any], target: str) -> str:
    known = [p["hd95_mm"][target] for p in result["patients"] if p["hd95_mm"][target] is not None]
    return _figure(sum(known) / len(known) if known else None, 1)


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
