"""What every importer of a published dataset shares: what it finds, and how that is written.

An importer (a module beside this one) only *reads*: it answers a folder in the official layout with rows, or with a
`LayoutError`. Writing is done here, once: all of it appears under the target, or nothing.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from medsegdiff.data.cases import Case, check_cases
from medsegdiff.data.folder import SEPARATOR
from medsegdiff.data.guard import ENDINGS
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic
from medsegdiff.progress import Progress, report

MAX_LISTED = 10  # entries of the source folder that an error names

# Of files that are whole by themselves: a header that names a file of voxels beside it cannot be moved alone.
WHOLE = (*ENDINGS["nifti"], ".mha", ".nrrd", *ENDINGS["picture"])


@dataclass(frozen=True)
class Converted:
    """A file that is made on import, for the published one has a form that is not read (DICOM, MHD, polygons)."""

    name: str  # of the file under images/ or masks/, ending included; unique there
    write: Callable[[Path], None]  # writes the file at the path it is given; raises UserError for a faulty source


Source = Path | Converted  # a Path is taken as it is: hard-linked where the disk allows, else copied


@dataclass(frozen=True)
class Row:
    """One case to be: a line of cases.csv. The fields are those of `medsegdiff.data.cases.Case`."""

    case_id: str
    patient_id: str
    images: tuple[Source, ...]  # one a channel, or one file with all channels
    masks: tuple[Source, ...]  # one a rater
    site: str | None = None
    split: str | None = None
    volume_id: str | None = None
    slice_index: int | None = None
    spacing_mm: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Found:
    """What lies in the source folder; nothing is written yet."""

    rows: Sequence[Row]
    notes: tuple[str, ...] = ()  # what was left out and why, one sentence each, shown when the import is done


@dataclass(frozen=True)
class Published:
    """A dataset as its authors distribute it."""

    name: str  # of simulations/datasets/NAME.yaml, which becomes the target's dataset.yaml
    title: str  # as its authors call it
    source: str  # where to get it, citation, licence
    layout: tuple[str, ...]  # the expected tree, a line each
    read: Callable[[Path], Found]  # raises LayoutError or another UserError


@dataclass(frozen=True)
class Summary:
    """What an import wrote."""

    folder: Path
    cases: int
    patients: int
    sites: tuple[str, ...]
    splits: dict[str, int]  # split -> patients in it; "none" for those without
    linked: int  # files that share their bytes with the source: edit neither in place
    copied: int
    converted: int
    notes: tuple[str, ...]


class LayoutError(UserError):
    """The source folder does not lie as it is published. Importers say what is missing; `import_published` adds what
    was expected and what was found."""


def import_published(dataset: Published, source: Path, target: Path) -> Summary:
    """Write `target` with cases.csv, dataset.yaml, images/ and masks/ from the dataset as it lies under `source`.

    Progress is reported as the stage "import".

    Guarantees:
        `target` appears whole at the end, or not at all; `source` is only read. A process that is killed leaves
        `.NAME.PID.partial` beside `target`, which may be deleted.

    Raises:
        LayoutError: `source` does not lie as published; names the first thing missing, the expected tree and what is
            there.
        UserError: `source` is no folder, `target` exists and is not empty, a file is faulty, or the disk refuses.
    """
    # Imported here: they bring the whole of the training with them, which a list of names does not need.
    from simulations.recipe import shipped_dataset
    from simulations.world import COLUMNS, whole_folder

    if not source.is_dir():
        raise UserError(f"{source}: there is no such folder, so nothing was imported. Check the path.")
    _require_vacant(target)
    description = shipped_dataset(dataset.name).read_bytes()
    try:
        found = dataset.read(source)
    except LayoutError as fault:
        raise LayoutError(
            f"{source}: this is not {dataset.title} as published: {fault}. Expected: {'; '.join(dataset.layout)}. "
            f"Found in {source}: {_listing(source)}. Nothing was written; see docs/datasets.md, {dataset.name}."
        ) from fault
    check_cases((_case(row) for row in found.rows), source)
    if target.is_dir():
        target.rmdir()  # empty, and the renamed folder takes its place
    with whole_folder(target) as partial:
        writer = _Writer(partial)
        table: list[tuple[str, ...]] = [COLUMNS]
        for done, row in enumerate(found.rows):
            report(Progress("import", done, len(found.rows)))
            table.append(writer.line(row))
        report(Progress("import", len(found.rows), len(found.rows)))
        write_atomic(partial / "dataset.yaml", description)
        write_atomic(partial / "cases.csv", _csv(table))
    return _summary(target, found, writer.count)


def summary_lines(summary: Summary) -> list[str]:
    """An import for a person."""
    splits = ", ".join(f"{name} {count}" for name, count in summary.splits.items())
    sites = f"; sites {', '.join(summary.sites)}" if summary.sites else ""
    files = [
        (summary.linked, "linked to the source, so edit them in neither place"),
        (summary.copied, "copied"),
        (summary.converted, "converted"),
    ]
    return [
        f"{summary.folder}: {summary.cases} cases of {summary.patients} patients; patients by split: {splits}{sites}",
        f"files: {'; '.join(f'{count} {how}' for count, how in files if count)}",
        *(f"note: {note}" for note in summary.notes),
    ]


def expect_folder(path: Path) -> Path:
    """`path`, if it is a folder. Raises LayoutError."""
    if not path.is_dir():
        raise LayoutError(f"the folder {path} is not there")
    return path


def find_folder(root: Path, *names: str) -> Path:
    """The folder of one of these names, in `root` or one folder deeper; of X/X the inner one.

    Archives are unpacked into `root` itself or each into a folder of its own, whose name need not be theirs.

    Raises:
        LayoutError: there is none; names the first of `names`.
    """
    for parent in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        for name in names:
            if (parent / name).is_dir():
                return parent / name / name if (parent / name / name).is_dir() else parent / name
    raise LayoutError(f"the folder {names[0]} is not there")


def expect_file(path: Path) -> Path:
    """`path`, if it is a file. Raises LayoutError."""
    if not path.is_file():
        raise LayoutError(f"the file {path} is not there")
    return path


def expect_files(folder: Path, pattern: str) -> list[Path]:
    """The files of `folder` that a pattern such as "ISIC_*.jpg" fits, sorted by name; at least one.

    Upper and lower case are not told apart; hidden files (".DS_Store", "._scan.jpg") are none of the dataset's.

    Raises:
        LayoutError: no such folder, or no such file in it.
    """
    found = [
        path
        for path in sorted(expect_folder(folder).iterdir())
        if not path.name.startswith(".") and fnmatchcase(path.name.lower(), pattern.lower()) and path.is_file()
    ]
    if not found:
        raise LayoutError(f"no file {pattern} lies in {folder}")
    return found


def _require_vacant(target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        return
    if os.path.lexists(target):
        raise UserError(f"{target}: is already there; nothing was written. Delete it or choose another folder.")


def _listing(folder: Path) -> str:
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    more = f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else ""
    return (", ".join(names[:MAX_LISTED]) or "nothing") + more


def _case(row: Row) -> Case:
    """The row as `check_cases` wants it; where its files come to lie does not matter there."""
    return Case(row.case_id, row.patient_id, (), (), row.site, row.split, row.volume_id, row.slice_index)


class _Writer:
    """Puts the files of one row after another in place and counts them."""

    def __init__(self, folder: Path) -> None:
        self.count: Counter[str] = Counter()
        self._folder = folder
        for name in ("images", "masks"):
            (folder / name).mkdir()

    def line(self, row: Row) -> tuple[str, ...]:
        """Write a row's files; its line of cases.csv, in the order of simulations.world.COLUMNS."""
        return (
            row.case_id,
            row.patient_id,
            row.site or "",
            row.split or "",
            self._files(row, "images", row.images),
            self._files(row, "masks", row.masks),
            row.volume_id or "",
            "" if row.slice_index is None else str(row.slice_index),
            "x".join(repr(size) for size in row.spacing_mm or ()),
        )

    def _files(self, row: Row, kind: str, sources: tuple[Source, ...]) -> str:
        names = []
        for number, source in enumerate(sources, start=1):
            stem = row.case_id if len(sources) == 1 else f"{row.case_id}_{number}"
            name = source.name if isinstance(source, Converted) else stem + _ending(source)
            _check_name(row, name)
            self._place(source, self._folder / kind / name)
            names.append(f"{kind}/{name}")
        return SEPARATOR.join(names)

    def _place(self, source: Source, path: Path) -> None:
        if os.path.lexists(path):
            raise UserError(
                f"two files of the dataset would both be named {path.parent.name}/{path.name}; nothing was written. "
                "Rename one of the two cases."
            )
        if isinstance(source, Converted):
            source.write(path)
            self.count["converted"] += 1
            return
        try:
            os.link(source.resolve(), path)  # resolved: a link to a symbolic link is not the same everywhere
            self.count["linked"] += 1
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(source, path)
            self.count["copied"] += 1


def _ending(path: Path) -> str:
    for ending in WHOLE:
        if path.name.lower().endswith(ending):
            return ending
    raise LayoutError(f"{path} has a form that is not taken as it is; expected one of {', '.join(WHOLE)}")


def _check_name(row: Row, name: str) -> None:
    if SEPARATOR in name or "/" in name or name != name.strip():
        raise UserError(
            f"case {row.case_id}: the file name {name!r} holds {SEPARATOR!r}, '/' or a blank at an end, so it cannot "
            "stand in cases.csv; nothing was written. Rename the file."
        )


def _csv(lines: Sequence[tuple[str, ...]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def _summary(target: Path, found: Found, count: Counter[str]) -> Summary:
    splits = {row.patient_id: row.split or "none" for row in found.rows}
    return Summary(
        folder=target,
        cases=len(found.rows),
        patients=len(splits),
        sites=tuple(sorted({row.site for row in found.rows if row.site})),
        splits=dict(sorted(Counter(splits.values()).items())),
        linked=count["linked"],
        copied=count["copied"],
        converted=count["converted"],
        notes=found.notes,
    )
