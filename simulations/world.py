"""A world on disk: virtual hospitals, each a folder as a real hospital has it.

    WORLD/SITE/site.yaml        name, data folder
    WORLD/SITE/data/cases.csv   the site's own patients, with their split
    WORLD/SITE/data/dataset.yaml

A site started on such a folder cannot tell that it is simulated, so what is tried here holds for a real one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from client.privacy.policy import SitePrivacy
from medsegdiff.data.cases import SPLITS
from medsegdiff.data.dataset import Case, Dataset
from medsegdiff.data.folder import SEPARATOR
from medsegdiff.data.guard import DataFileError
from medsegdiff.errors import UserError
from medsegdiff.files import FOLDER_NAME, write_atomic
from medsegdiff.progress import Progress, report
from medsegdiff.strict import dump_yaml
from simulations.shifts import SiteShift, check_shift, shift_case, shifted_config

SHIFTED = "shifted"  # folder of the files that a shift has written anew, in a site's data

COLUMNS = (
    "case_id", "patient_id", "site", "split", "image_path", "mask_path", "volume_id", "slice_index", "spacing_mm",
)  # fmt: skip


def write_world(
    dataset: Dataset,
    assignment: Mapping[str, Sequence[str]],
    splits: Mapping[str, str],
    folder: Path,
    copy: bool,
    privacy: Mapping[str, SitePrivacy] | None = None,
    shifts: Mapping[str, SiteShift] | None = None,
    seed: int = 0,
) -> tuple[Path, ...]:
    """Write one folder a site, in the order of `assignment`.

    Args:
        dataset: where the cases come from, in any form that is read; patients without a site are left out.
        assignment: site -> its patients.
        splits: patient -> "train", "val" or "test", for every assigned patient.
        folder: the world; it appears whole at the end, or not at all.
        copy: True copies the image files, so that each site's folder can be moved to another machine; False leaves
            them where they are and names them by relative paths.
        privacy: site -> the privacy section of its site.yaml; None: no site has one.
        shifts: site -> how it differs; its images and masks are written anew where that changes them.
        seed: of what is random in the shifts.

    Returns:
        The site.yaml of each site.

    Raises:
        UserError: `folder` is already there; a site is empty or its name is no folder name; a patient is unknown, in
            two sites or without a split; a file name cannot stand in cases.csv; the disk is full.
    """
    _check_names(list(assignment))
    _check_shifts(shifts or {}, list(assignment), dataset)
    cases = _cases_of_patients(dataset, assignment, splits)
    with whole_folder(folder) as partial:
        for done, (site, patients) in enumerate(assignment.items()):
            report(Progress("world", done, len(assignment), site=site))
            data = partial / site / "data"
            data.mkdir(parents=True)
            place = _copier(dataset.root, data) if copy else _linker(folder.resolve() / site / "data")
            shift = (shifts or {}).get(site)
            own = [case for patient in sorted(patients) for case in cases[patient]]
            if shift is not None:
                own = [
                    shift_case(shift, case, dataset.config, splits[case.patient_id], site, seed, data / SHIFTED)
                    for case in own
                ]
                place = _inside(data, place)
            write_atomic(data / "cases.csv", _table([_row(case, site, splits, place) for case in own]))
            config = shifted_config(shift, dataset.config) if shift is not None else dataset.config
            write_atomic(data / "dataset.yaml", dump_yaml(config).encode())
            missing = shift.missing_channels if shift is not None else ()
            write_atomic(partial / site / "site.yaml", _site_yaml(site, privacy[site] if privacy else None, missing))
    report(Progress("world", len(assignment), len(assignment)))
    return tuple(folder / site / "site.yaml" for site in assignment)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all: write into the one that is yielded, it is renamed at the end.

    A process that is killed leaves only `.NAME.PID.partial` beside it, which may be deleted.

    Raises:
        UserError: `folder` is already there, or the disk refuses.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        if os.path.lexists(folder):
            raise UserError(f"{folder}: is already there; nothing was written. Delete it or choose another folder.")
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had our number
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: could not be written ({error}); nothing is left of it. Free space or choose another folder, "
            "then repeat the command."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_names(sites: Sequence[str]) -> None:
    if not sites:
        raise UserError("a world of 0 sites was asked for; nothing was written. Assign patients to at least one site.")
    for site in sites:
        if not FOLDER_NAME.fullmatch(site):
            raise UserError(
                f"site name {site!r} cannot name a folder; nothing was written. Use at most 64 letters, digits, '-', "
                "'_' and '.', beginning with a letter or digit."
            )
    folded = Counter(site.casefold() for site in sites)  # some file systems do not tell CS from cs
    alike = [site for site in sites if folded[site.casefold()] > 1]
    if alike:
        raise UserError(f"site names {', '.join(alike)} differ in case only and could share a folder. Rename one.")


def _cases_of_patients(
    dataset: Dataset, assignment: Mapping[str, Sequence[str]], splits: Mapping[str, str]
) -> dict[str, list[Case]]:
    """The cases of each patient, after a check that the assignment is one."""
    cases: defaultdict[str, list[Case]] = defaultdict(list)
    for case in dataset.cases:
        cases[case.patient_id].append(case)
    owner: dict[str, str] = {}
    for site, patients in assignment.items():
        if not patients:
            raise UserError(f"site {site} has 0 patients; nothing was written. Choose fewer sites or more patients.")
        for patient in patients:
            if patient not in cases:
                raise UserError(
                    f"site {site}: patient {patient} is not among the {len(cases)} patients of {dataset.root}; "
                    "nothing was written. Partition the dataset anew."
                )
            if patient in owner:
                raise UserError(
                    f"patient {patient} is assigned to {owner[patient]} and {site}; a patient belongs to one site. "
                    "Remove one of the two."
                )
            if splits.get(patient) not in SPLITS:
                raise UserError(
                    f"patient {patient} of site {site} has the split {splits.get(patient)!r}, which is none of "
                    f"{', '.join(SPLITS)}; nothing was written. Give every assigned patient one."
                )
            owner[patient] = site
    return cases


def _check_shifts(shifts: Mapping[str, SiteShift], sites: Sequence[str], dataset: Dataset) -> None:
    unknown = [site for site in shifts if site not in sites]
    if unknown:
        raise UserError(
            f"world.shifts: {', '.join(unknown)}: no such site; the sites are {', '.join(sites)}. Nothing was written."
        )
    for site, shift in shifts.items():
        check_shift(shift, dataset.config, site)


def _inside(data: Path, place: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """As `place`, for files that were written into the data folder as well."""
    return lambda path: path.relative_to(data) if path.is_relative_to(data) else place(path)


def _linker(data: Path) -> Callable[[Path], Path]:
    """Names a file by its way from the data folder. Only the folders' symbolic links are followed: the file's own
    name carries its format, and the target of a link need not."""
    return lambda path: Path(os.path.relpath(path.parent.resolve() / path.name, data))


def _copier(root: Path, data: Path) -> Callable[[Path], Path]:
    """Copies a file to where it lies in the dataset, or under `elsewhere/` if it comes from outside; returns its name.

    A folder is copied with its DICOM files, a header with its file of voxels. A file that is missing is named all the
    same: the site's preparation reports and counts it, as it would have at its source.
    """
    top = root.resolve()

    def place(path: Path) -> Path:
        source = path.parent.resolve() / path.name
        if source.is_relative_to(top):
            target = source.relative_to(top)
        else:
            target = Path("elsewhere") / hashlib.sha256(os.fsencode(source.parent)).hexdigest()[:12] / source.name
        if not (data / target).exists():
            for file in _parts(source):
                copied = data / (target if source.is_dir() else target.parent) / file.name
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copied)  # contents only: a read-only original need not give a read-only copy
        return target

    return place


def _parts(source: Path) -> list[Path]:
    """The files that an image or a mask is read from."""
    with suppress(DataFileError):  # torn or empty: the site's preparation will say so
        if source.is_dir():
            from medsegdiff.data.dicom import files_of

            return files_of(source)
        if source.suffix.lower() == ".mhd":
            from medsegdiff.data.metaimage import metaimage_stored

            return [metaimage_stored(source)[0].data, source]
        if source.suffix.lower() == ".nhdr":
            from medsegdiff.data.nrrd import nrrd_stored

            return [nrrd_stored(source)[0].data, source]
    return [source] if source.is_file() else []


def _row(case: Case, site: str, splits: Mapping[str, str], place: Callable[[Path], Path]) -> tuple[str, ...]:
    """One line of cases.csv, in the order of COLUMNS."""
    return (
        case.case_id,
        case.patient_id,
        site,
        splits[case.patient_id],
        _join(case, [place(path) for path in case.image_paths]),
        _join(case, [place(path) for path in case.mask_paths]),
        case.volume_id or "",
        "" if case.slice_index is None else str(case.slice_index),
        "x".join(repr(size) for size in case.spacing_mm or ()),
    )


def _join(case: Case, paths: Sequence[Path]) -> str:
    names = [path.as_posix() for path in paths]
    for name in names:
        if SEPARATOR in name or name != name.strip():
            raise UserError(
                f"case {case.case_id}: the path {name!r} holds {SEPARATOR!r} or a blank at an end, so it cannot stand "
                "in cases.csv; nothing was written. Rename the file or its folder."
            )
    return SEPARATOR.join(names)


def _table(rows: Sequence[tuple[str, ...]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    return text.getvalue().encode()


def _site_yaml(site: str, privacy: SitePrivacy | None, missing: Sequence[str]) -> bytes:
    # A line a key: `medsegfed join` adds a real site's lines below.
    lines = f"{dump_yaml({'name': site}).strip()[1:-1]}\ndata: data\ncache: null\ndevice: auto\n"
    lines += dump_yaml({"missing_channels": list(missing)}) if missing else ""
    return (lines + (dump_yaml({"privacy": privacy}) if privacy is not None else "")).encode()
