"""LIDC-IDRI: lung nodules on CT, each outlined by four radiologists who did not have to agree."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from medsegdiff.progress import Progress, report
from simulations.published.layout import Converted, Found, LayoutError, Published, Row
from simulations.published.lidc_readings import READERS, Nodule, Reading, choose, nodules_of, read_reading, series_of
from simulations.published.lidc_scan import Series, find_series, write_image, write_mask


def read_lidc(root: Path) -> Found:
    """One row a nodule, a small volume around it, with four masks; site: the maker of the patient's first scanner.

    Readers are not the same persons from scan to scan, and their order says nothing.

    Raises:
        LayoutError: there are no XML readings, or none of a scan that is there.
        UserError: an XML file or a DICOM header cannot be read.
    """
    readings = series_of(_readings(root))
    if not readings:
        raise LayoutError(f"no XML file with readings of CT scans (LidcReadMessage) lies below {root}")
    scans = {uid: series for uid, series in find_series(root).items() if uid in readings}
    if not scans:
        raise LayoutError(f"none of the {len(readings)} CT scans that the XML files describe lies below {root}")
    rows: list[Row] = []
    unclear, panels = [], []
    for patient, own in sorted(_by_patient(scans).items()):
        for number, series in enumerate(own, start=1):
            reading = choose(readings[series.uid])
            if reading is None:
                unclear.append(patient)
            elif len(reading.sessions) != READERS:
                panels.append(patient)
            else:
                name = patient if len(own) == 1 else f"{patient}_s{number}"
                rows += _rows(name, series, own[0].maker, nodules_of(reading.sessions))
    if not rows:
        raise LayoutError(f"no reader outlined a nodule on the {len(scans)} scans that lie below {root}")
    return Found(rows, _notes(len(readings) - len(scans), unclear, panels))


def _readings(root: Path) -> list[Reading]:
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() == ".xml" and path.name[0] != ".")
    found = []
    for done, path in enumerate(paths):
        report(Progress("readings", done, len(paths)))
        reading = read_reading(path)
        if reading is not None:
            found.append(reading)
    return found


def _by_patient(scans: dict[str, Series]) -> dict[str, list[Series]]:
    found: dict[str, list[Series]] = {}
    for _, series in sorted(scans.items()):
        found.setdefault(series.patient_id, []).append(series)
    return found


def _rows(name: str, series: Series, site: str, nodules: Sequence[Nodule]) -> list[Row]:
    return [
        Row(
            case_id=f"{name}_n{number:02d}",
            patient_id=series.patient_id,
            images=(Converted(f"{name}_n{number:02d}.nii.gz", partial(write_image, series, nodule)),),
            masks=tuple(
                Converted(f"{name}_n{number:02d}_r{reader + 1}.nii.gz", partial(write_mask, series, nodule, reader))
                for reader in range(READERS)
            ),
            site=site or None,
        )
        for number, nodule in enumerate(nodules, start=1)
    ]


def _notes(absent: int, unclear: Sequence[str], panels: Sequence[str]) -> tuple[str, ...]:
    notes = []
    if absent:
        notes.append(f"{absent} scans are described by XML files but not there, so they are left out.")
    if unclear:
        notes.append(f"scans with contradicting XML files are left out: {', '.join(unclear)}.")
    if panels:
        notes.append(f"scans read by another number of readers than {READERS} are left out: {', '.join(panels)}.")
    return tuple(notes)


LIDC = Published(
    name="lidc",
    title="LIDC-IDRI",
    source=(
        "The Cancer Imaging Archive, collection LIDC-IDRI: images (124 GB) and LIDC-XML-only.zip. Armato et al. 2015, "
        "doi:10.7937/K9/TCIA.2015.LO9QL9SX; Armato et al. 2011, doi:10.1118/1.3528204. CC BY 3.0."
    ),
    layout=(
        "LIDC-IDRI/LIDC-IDRI-0001/STUDY/SERIES/*.dcm",
        "tcia-lidc-xml/*/*.xml (or the XML file beside the images of its scan)",
    ),
    read=read_lidc,
)
