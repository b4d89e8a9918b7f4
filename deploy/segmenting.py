"""The work behind `segment`: one scan, several, or a folder of them as one job.

Torch is imported once the files have been looked at: a hostile file is refused in little time and memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsegdiff.data.folder import SEPARATOR
from medsegdiff.data.guard import ENDINGS, DataFileError, check_image_file
from medsegdiff.errors import UserError
from medsegdiff.files import no_model, write_atomic
from medsegdiff.progress import Progress, report

if TYPE_CHECKING:
    from medsegdiff.config import SamplingConfig
    from medsegdiff.weights import Segmenter

SUMMARY, SUMMARY_NAME = "segment.json", "segment"
EXTRAS = ("dicom_seg", "uncertainty", "variance", "preview")  # files beside the masks, each may be None


@dataclass
class Job:
    """What became of a job; `segment.json` of the output folder, written anew after every scan."""

    model: str
    scans: int  # that were asked for
    segmented: list[dict[str, Any]] = field(default_factory=list)  # as in each NAME.json
    skipped: list[str] = field(default_factory=list)  # finished by an earlier command, with --resume
    failed: list[dict[str, str]] = field(default_factory=list)  # scan and reason
    passed_over: list[str] = field(default_factory=list)  # of a folder of scans: what is none

    @property
    def left(self) -> int:
        """Scans not yet looked at; more than 0 after a kill."""
        return self.scans - len(self.segmented) - len(self.skipped) - len(self.failed)

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"left": self.left}

    def lines(self) -> list[str]:
        """What was written, for a person."""
        lines = []
        for result in self.segmented:
            written = [*result["masks"], *(path for kind in EXTRAS if (path := result[kind]))]
            volumes = ", ".join(_volume(result, name) for name, ml in result["volumes_ml"].items() if ml is not None)
            lines.append(f"{result['scan']} -> {', '.join(written)}" + (f" ({volumes})" if volumes else ""))
            lines += [f"  {warning}" for warning in result["warnings"]]
        if self.passed_over:
            lines.append(f"passed over, no scans: {', '.join(self.passed_over)}")
        if self.scans > 1:
            counts = {
                "segmented": len(self.segmented), "finished before": len(self.skipped), "failed": len(self.failed),
            }  # fmt: skip
            lines.append(f"{self.scans} scans: " + ", ".join(f"{n} {what}" for what, n in counts.items() if n))
        return lines

    def save(self, out: Path) -> None:
        """Write the summary."""
        write_atomic(out / SUMMARY, (json.dumps(self.plain(), indent=1) + "\n").encode())


def _volume(result: Mapping[str, Any], target: str) -> str:
    interval = result["interval_ml"][target]
    members = f" [{interval[0]}, {interval[1]}]" if interval else ""
    return f"{target} {result['volumes_ml'][target]} ml{members}"


def segment_scans(
    model: Path,
    given: Sequence[str],
    out: Path,
    changes: Mapping[str, Any],
    seed: int,
    threads: int,
    device: str,
    resume: bool = False,
) -> Job:
    """Segment scans one after the other; a bad one is named and the others go on.

    Args:
        given: scans and folders of scans, see `find_scans`.
        out: folder of the results; nothing in it is overwritten.
        changes: to the model's own sampling.
        resume: skip the scans that the same command has finished before.

    Raises:
        UserError: no model, no scan, two scans that would have one name, a result that is there already (without
            `resume`) or belongs to another scan or other settings (with it). Nothing has been written then.
    """
    if not model.is_file():
        raise UserError(no_model(model))
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; nothing was segmented. Name a folder for the results with -o.")
    scans, passed_over = find_scans(given, out)
    job = Job(str(model), len(scans), passed_over=passed_over)
    sound = _checked(scans, job)
    if not sound:
        job.save(out)
        return job
    segmenter, sampling = load_for_sampling(model, changes, threads, device)
    names = name_scans(scans)
    _check_apart(segmenter, names)
    waiting = {}
    for scan in sound:
        if _finished(segmenter, scan, names[scan], out, sampling, seed, resume):
            job.skipped.append(scan)
        else:
            waiting[scan] = names[scan]
    _segment(segmenter, waiting, out, sampling, seed, job)
    return job


def find_scans(given: Sequence[str], out: Path) -> tuple[list[str], list[str]]:
    """The scans that arguments name, and what was passed over in folders of scans.

    A folder that holds DICOM files is one scan, a series. Any other folder is a job: its image files and its
    sub-folders that are series are the scans, in the order of their names; hidden files and `out` do not count, and
    deeper folders are not looked into.

    Raises:
        UserError: a folder cannot be told to be either, holds no scan, or is `out`; a scan is named twice.
    """
    scans: list[str] = []
    passed_over: list[str] = []
    for one in given:
        if SEPARATOR in one or not Path(one).is_dir():
            scans.append(one)
            continue
        found, others = _look_into(Path(one), out)
        scans += found
        passed_over += others
    twice = [scan for scan, count in Counter(scans).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: is named twice; nothing was segmented. Name each scan once.")
    return scans, passed_over


def _look_into(folder: Path, out: Path) -> tuple[list[str], list[str]]:
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        files = [path for path in inside if path.is_file()]
        series = [path for path in inside if path.is_dir() and not _same(path, out) and _holds_dicom(path)]
        own = _holds_dicom(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error}); nothing was segmented. Check its permissions.") from error
    endings = tuple(ending for kind, endings in ENDINGS.items() if kind != "dicom" for ending in endings)
    scans = [path for path in files if path.name.lower().endswith(endings)]
    if own and (scans or series):
        raise UserError(
            f"{folder}: holds DICOM files and also {(scans or series)[0].name}, so it is neither one series nor a "
            "folder of scans; nothing was segmented. Give the series a folder of its own."
        )
    if own:
        return [str(folder)], []
    if not scans and not series:
        raise UserError(
            f"{folder}: holds no scan; nothing was segmented. A folder is a DICOM series, or it holds image files and "
            "sub-folders that are DICOM series."
        )
    if _same(folder, out):
        raise UserError(
            f"{folder}: holds the scans; results among them would be taken for scans. Choose another --out."
        )
    found = sorted([*scans, *series])
    others = [str(path) for path in inside if path not in found and not _same(path, out)]
    return [str(path) for path in found], others


def _same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve()


def _holds_dicom(folder: Path) -> bool:
    """Whether a file in it is DICOM by its first bytes (PS3.10, 7.1); the index of a medium is no image."""
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith(".") and path.name != "DICOMDIR":
            with open(path, "rb") as handle:
                if handle.read(132)[128:] == b"DICM":
                    return True
    return False


def name_scans(scans: Sequence[str]) -> dict[str, str]:
    """Scan -> name of its results. Scans of one name are told apart by their folders: PATIENT_image."""
    from medsegdiff.segment import name_of, paths_of

    names = {scan: name_of(paths_of(scan)[0]) for scan in scans}
    taken = Counter([name.casefold() for name in names.values()] + [SUMMARY_NAME])  # to some file systems A is a
    for scan, name in names.items():
        if taken[name.casefold()] > 1:
            names[scan] = f"{paths_of(scan)[0].resolve().parent.name}_{name}"
    return names


def _checked(scans: Sequence[str], job: Job) -> list[str]:
    """The scans that are not refused by their files alone."""
    sound = []
    for number, scan in enumerate(scans, start=1):
        try:
            check_image_file([Path(part) for part in scan.split(SEPARATOR)])
            sound.append(scan)
        except DataFileError as fault:
            job.failed.append({"scan": scan, "reason": str(fault)})
        report(Progress("check", number, len(scans)))
    return sound


def _check_apart(segmenter: Segmenter, names: Mapping[str, str]) -> None:
    """No file may be written for two scans: `a` with the target `b_c` and `a_b` with the target `c` share a name."""
    from medsegdiff.segment import output_names

    owner: dict[str, str] = {SUMMARY: "the summary"}
    for scan, name in names.items():
        for file in output_names(segmenter.scheme, name):
            other = owner.setdefault(file.casefold(), scan)
            if other != scan:
                raise UserError(
                    f"{scan} and {other} would both write {file}; nothing was segmented. Rename one, or give each an "
                    "--out of its own."
                )


def _finished(
    segmenter: Segmenter, scan: str, name: str, out: Path, sampling: SamplingConfig, seed: int, resume: bool
) -> bool:
    """Whether the scan's results stand in `out`. Raises UserError where others do, or where none may."""
    from medsegdiff.data.images import sha256_of_image
    from medsegdiff.segment import output_names, paths_of, publish
    from medsegdiff.weights import hash_weights

    if resume:
        publish(out, name)
    done = out / f"{name}.json"
    if not resume or not done.exists():
        there = [file for file in output_names(segmenter.scheme, name) if (out / file).exists()]
        if there:
            remedy = "choose another --out" if resume else "choose another --out, or go on with --resume"
            raise UserError(f"{out / there[0]}: is already there; nothing was segmented. Move it away or {remedy}.")
        return False
    expected = {
        "members": sampling.members, "steps": sampling.steps, "sampler": sampling.sampler, "fuse": sampling.fuse,
        "seed": seed, "model_sha256": hash_weights(segmenter.network.state_dict()),
        "scan_sha256": [sha256_of_image(path) for path in paths_of(scan)],
    }  # fmt: skip
    found = _read(done)
    for what, value in expected.items():
        if found.get(what) != value:
            raise UserError(
                f"{done}: is of {what} {found.get(what)}, now asked for is {value}; nothing was segmented. Choose "
                "another --out."
            )
    files = [*found["masks"], *(found[kind] for kind in EXTRAS)]
    return all((out / Path(file).name).exists() for file in files if file)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else {}


def _segment(
    segmenter: Segmenter, waiting: Mapping[str, str], out: Path, sampling: SamplingConfig, seed: int, job: Job
) -> None:
    from medsegdiff.segment import segment_scan

    several = sampling.members > 1
    for number, (scan, name) in enumerate(waiting.items(), start=1):
        job.save(out)
        stage = f"segment scan {number} of {len(waiting)}" if len(waiting) > 1 else "segment"
        try:
            job.segmented.append(vars(segment_scan(segmenter, scan, out, sampling, seed, several, name, stage)))
        except UserError as error:
            job.failed.append({"scan": scan, "reason": str(error)})
        except MemoryError as error:
            job.failed.append({"scan": scan, "reason": f"{scan}: this machine's memory does not hold it ({error})."})
    job.save(out)


def load_for_sampling(
    model: Path, changes: Mapping[str, Any], threads: int, device: str
) -> tuple[Segmenter, SamplingConfig]:
    """A model on its device, and its own sampling settings with `changes` applied.

    Raises:
        UserError: no model, no such device, or a setting out of range.
    """
    import torch

    from medsegdiff.devices import choose_device
    from medsegdiff.network import channels_last
    from medsegdiff.weights import load_model

    segmenter = load_model(model)
    torch.set_num_threads(threads)
    channels_last(segmenter.network).to(choose_device(device))
    try:
        return segmenter, replace(segmenter.card.sampling, **changes)
    except ValueError as error:
        raise UserError(f"{error}.") from error
