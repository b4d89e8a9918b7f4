"""From a scan to a mask on the scan's own grid, and all that is written beside it."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from medsegdiff.config import SamplingConfig
from medsegdiff.data.folder import SEPARATOR
from medsegdiff.data.guard import ENDINGS, format_of
from medsegdiff.data.images import Placement, Volume, read_image, sha256_of_image
from medsegdiff.data.prepare import prepare_image
from medsegdiff.ensemble import derive_seed
from medsegdiff.errors import UserError
from medsegdiff.evaluation import Segmentation, segment_slices
from medsegdiff.files import write_atomic
from medsegdiff.labels import LabelScheme
from medsegdiff.metrics import voxel_ml
from medsegdiff.progress import Progress, report
from medsegdiff.weights import Segmenter, hash_weights

_ENDINGS = sorted((ending for endings in ENDINGS.values() for ending in endings), key=len, reverse=True)


@dataclass(frozen=True)
class ScanResult:
    """What was written for one scan, and how it came about; NAME.json. Nothing of it is taken from a scan's header."""

    scan: str
    masks: list[str]
    dicom_seg: str | None
    uncertainty: str | None  # entropy of the members' votes, in percent of one bit
    variance: str | None  # of the members' values, in percent of the largest there can be
    preview: str
    volumes_ml: dict[str, float | None]  # per target; None where the spacing is unknown
    voxels: dict[str, int]
    interval_ml: dict[str, tuple[float, float] | None]  # the smallest and the largest member; None for one member
    interval_voxels: dict[str, tuple[int, int] | None]
    members: int
    steps: int
    sampler: str
    fuse: str
    seed: int
    scan_sha256: list[str]  # of each file, or of a series: `sha256_of_image`
    model_sha256: str  # of the weights: `hash_weights`
    version: str  # of medsegfed
    warnings: list[str]


def segment_scan(
    segmenter: Segmenter,
    scan: str,
    out: Path,
    sampling: SamplingConfig,
    seed: int,
    with_uncertainty: bool,
    name: str | None = None,
    stage: str = "segment",
) -> ScanResult:
    """Segment one scan and write NAME_mask, NAME_preview.png and NAME.json into the folder `out`.

    With uncertainty NAME_uncertainty is written too, and NAME_variance where there are several members; for DICOM with
    a place in the patient NAME_seg.dcm, a DICOM Segmentation. Nothing stands in `out` before all is computed, and
    NAME.json comes last: where it stands, the scan is done. Files of the same name are replaced.

    Args:
        scan: path of the image, a folder for a DICOM series; several files of one scan (channels) joined by `;`.
        seed: with the scan's bytes, fixes the result.
        name: NAME; default: that of the (first) file or folder without its ending.
        stage: under which the slices that are done are reported.

    Raises:
        UserError: the scan cannot be read, or has other channels than the model was trained on.
    """
    paths = paths_of(scan)
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: there is no such file, so it was not segmented. Check the path.")
    config = segmenter.card.dataset
    volume = read_image(paths, len(config.channels))
    digests = [sha256_of_image(path) for path in paths]
    slices = prepare_image(volume, segmenter.card.model.image_size, config)
    with _counting(segmenter.network.out, len(slices), sampling, stage):
        scan_seed = derive_seed(seed, *digests)
        answer = segment_slices(segmenter, slices, volume.geometry(config), sampling, scan_seed)
    name = name or name_of(paths[0])
    with _staged(out, name) as staging:
        output = _Output(staging, out, name, volume, paths[0])
        result = ScanResult(
            scan=scan,
            **_written(segmenter, answer, output, with_uncertainty),
            members=sampling.members,
            steps=sampling.steps,
            sampler=sampling.sampler,
            fuse=sampling.fuse,
            seed=seed,
            scan_sha256=digests,
            model_sha256=hash_weights(segmenter.network.state_dict()),
            version=_version(),
            warnings=output.warnings,
        )
        write_atomic(staging / f"{name}.json", (json.dumps(vars(result), indent=1) + "\n").encode())
    publish(out, name)
    return result


def paths_of(scan: str) -> list[Path]:
    """The files of a scan."""
    return [Path(part) for part in scan.split(SEPARATOR)]


def name_of(path: Path) -> str:
    """A scan's name: that of its file without the format's ending, or of its folder."""
    if path.name in ("", ".."):
        path = path.resolve()
    for ending in _ENDINGS:
        if path.name.lower().endswith(ending) and len(path.name) > len(ending) and not path.is_dir():
            return path.name[: -len(ending)]
    return path.name


def output_names(scheme: LabelScheme, name: str) -> list[str]:
    """Every file that may be written for a scan of this name, and the folder of one that is being moved into place."""
    masks = [f"{target}_mask" for target in scheme.targets] if scheme.kind == "regions" else ["mask"]
    maps = [f"{name}_{what}{end}" for what in (*masks, "uncertainty", "variance") for end in (".nii.gz", ".png")]
    return [*maps, f"{name}_preview.png", f"{name}_seg.dcm", f"{name}.json", f".{name}.whole"]


def publish(out: Path, name: str) -> None:
    """Move a scan's files to their place, NAME.json last; goes on where a killed process stopped, if one did."""
    whole = out / f".{name}.whole"
    if not whole.is_dir():
        return
    try:
        for file in whole.iterdir():
            if file.name != f"{name}.json":
                file.replace(out / file.name)
        write_atomic(out / f"{name}.json", (whole / f"{name}.json").read_bytes())  # flushes the folder to the disk
        shutil.rmtree(whole)
    except OSError as error:
        raise UserError(
            f"{out / name}: its files could not be moved into place ({error}). Mend it and repeat with --resume."
        ) from error


def label_values(segmenter: Segmenter) -> dict[str, int]:
    """The value of each target in a written mask: its own label's where that is one number of 1..255, else 1, 2, ..."""
    config, scheme = segmenter.card.dataset, segmenter.scheme
    own: dict[str, int] = {}
    for target, members in zip(scheme.targets, scheme.members, strict=True):
        values = [value for index in members for value in config.label_values[index]]
        if len(values) == 1 and isinstance(values[0], int) and 0 < values[0] < 256:
            own[target] = values[0]
    if len(own) == len(scheme.targets):
        return own
    return {target: number for number, target in enumerate(scheme.targets, start=1)}


@contextmanager
def _staged(out: Path, name: str) -> Iterator[Path]:
    """A folder to write to; it becomes `.NAME.whole` at the end, or is gone."""
    partial, whole = out / f".{name}.partial", out / f".{name}.whole"
    for folder in (partial, whole):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield partial
        partial.rename(whole)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _counting(last: nn.Module, slices: int, sampling: SamplingConfig, stage: str) -> Iterator[None]:
    """Report slices as done by counting what passes the network's last layer, once a step and member."""
    seen, each = 0, sampling.members * sampling.steps

    def count(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal seen
        seen += len(output)
        report(Progress(stage, min(slices, seen // each), slices))  # a batch that did not fit is counted again

    report(Progress(stage, 0, slices))
    handle = last.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True, eq=False)
class _Output:
    """Where the files of a scan go and what they look like."""

    staging: Path
    out: Path
    name: str
    volume: Volume
    source: Path
    warnings: list[str] = field(default_factory=list)

    def map(self, what: str, values: NDArray[np.uint8]) -> str:
        """Write values (X, Y, Z) on the scan's grid; its path at the end."""
        if self.volume.placement is None:
            from medsegdiff.data.pictures import write_picture_mask

            file = f"{self.name}_{what}.png"
            write_picture_mask(self.staging / file, values[..., 0])
        else:
            file = f"{self.name}_{what}.nii.gz"
            _write_volume(self.staging / file, values, self.volume.placement, self.source)
        return str(self.out / file)

    def percent(self, what: str, values: Tensor) -> str:
        """Write a map in [0, 1] as whole percents."""
        return self.map(what, (values.numpy() * 100).round().astype(np.uint8))


def _written(segmenter: Segmenter, answer: Segmentation, output: _Output, with_uncertainty: bool) -> dict[str, Any]:
    """Write all but the JSON; what the JSON says of it."""
    from medsegdiff.preview import preview

    scheme, masks = segmenter.scheme, answer.masks.numpy()
    several = len(answer.member_voxels) > 1
    sizes = _sizes(scheme, answer, output.volume)
    if not any(sizes["voxels"].values()):
        output.warnings.append("no voxel was marked; look at the scan")
    if voxel_ml(output.volume.spacing_mm) is None:
        output.warnings.append("the size of a pixel is unknown, so volumes are counted in pixels alone")
    legend = [_legend(target, sizes) for target in scheme.targets]
    shown = answer.uncertainty.numpy() if with_uncertainty else None
    file = f"{output.name}_preview.png"
    write_atomic(output.staging / file, preview(output.volume, masks, shown, legend))
    return sizes | {
        "masks": _write_masks(segmenter, masks, output),
        "dicom_seg": _write_seg(segmenter, masks, output),
        "uncertainty": output.percent("uncertainty", answer.uncertainty) if with_uncertainty else None,
        "variance": output.percent("variance", answer.variance) if with_uncertainty and several else None,
        "preview": str(output.out / file),
    }


def _sizes(scheme: LabelScheme, answer: Segmentation, volume: Volume) -> dict[str, dict[str, Any]]:
    """Volumes of the masks, and of the smallest and the largest member."""
    several = len(answer.member_voxels) > 1
    counts = dict(zip(scheme.targets, answer.masks.flatten(1).sum(dim=1).tolist(), strict=True))
    low, high = answer.member_voxels.amin(dim=0).tolist(), answer.member_voxels.amax(dim=0).tolist()
    ranges = dict(zip(scheme.targets, zip(low, high, strict=True), strict=True))
    unit = voxel_ml(volume.spacing_mm)
    return {
        "volumes_ml": {target: None if unit is None else round(n * unit, 4) for target, n in counts.items()},
        "voxels": counts,
        "interval_ml": {
            target: (round(a * unit, 4), round(b * unit, 4)) if several and unit is not None else None
            for target, (a, b) in ranges.items()
        },
        "interval_voxels": {target: pair if several else None for target, pair in ranges.items()},
    }


def _legend(target: str, sizes: Mapping[str, Mapping[str, Any]]) -> str:
    kind, unit, form = ("voxels", "pixels", "{}") if sizes["volumes_ml"][target] is None else ("ml", "ml", "{:.2f}")
    size, interval = sizes["voxels" if kind == "voxels" else "volumes_ml"][target], sizes[f"interval_{kind}"][target]
    members = f" (members: {form.format(interval[0])} to {form.format(interval[1])})" if interval else ""
    return f"{target}: {form.format(size)} {unit}{members}"


def _write_masks(segmenter: Segmenter, masks: NDArray[np.bool_], output: _Output) -> list[str]:
    scheme = segmenter.scheme
    if scheme.kind == "regions":  # overlapping targets do not fit one label map
        visible = 255 if output.volume.placement is None else 1  # pictures are looked at, volumes are computed with
        pairs = zip(scheme.targets, masks, strict=True)
        return [output.map(f"{target}_mask", mask.astype(np.uint8) * visible) for target, mask in pairs]
    values = label_values(segmenter)
    label_map = np.zeros(masks.shape[1:], dtype=np.uint8)
    for target, mask in zip(scheme.targets, masks, strict=True):
        label_map[mask] = values[target]
    return [output.map("mask", label_map)]


def _write_seg(segmenter: Segmenter, masks: NDArray[np.bool_], output: _Output) -> str | None:
    """The masks as a DICOM Segmentation; None for other formats, and with a warning where the source is unfit."""
    if format_of(output.source) != "dicom" or output.volume.placement is None:
        return None
    from medsegdiff.data.dicom_seg import write_dicom_seg
    from medsegdiff.data.guard import DataFileError

    file, weights = f"{output.name}_seg.dcm", hash_weights(segmenter.network.state_dict())
    targets, codes = segmenter.scheme.targets, segmenter.card.dataset.codes
    try:
        write_dicom_seg(output.staging / file, masks, output.source, targets, codes, weights, _version())
    except DataFileError as fault:  # the mask itself is good and stands as NIfTI
        output.warnings.append(f"no DICOM Segmentation: {fault.reason}")
        return None
    return str(output.out / file)


def _write_volume(path: Path, values: NDArray[np.uint8], placement: Placement, source: Path) -> None:
    """NIfTI on the scan's grid. A NIfTI scan's own header is kept but for extensions, which may name the patient."""
    from medsegdiff.data.nifti import write_nifti_mask

    if format_of(source) != "nifti":
        write_nifti_mask(path, values, placement)
        return
    import nibabel

    from medsegdiff.data.orientation import as_stored

    nib: Any = nibabel  # annotated in part only, which strict checking refuses
    with gzip.open(source) if source.name.lower().endswith(".gz") else open(source, "rb") as handle:
        raw = handle.read(nib.Nifti2Header.template_dtype.itemsize)
    second = nib.Nifti2Header.may_contain_header(raw)
    kind, image = (nib.Nifti2Header, nib.Nifti2Image) if second else (nib.Nifti1Header, nib.Nifti1Image)
    header = kind(raw[: kind.template_dtype.itemsize])
    shape = header.get_data_shape()[:3]  # a fourth axis holds channels
    header.set_data_dtype(np.uint8)
    header.set_data_shape(shape)
    header["cal_min"], header["cal_max"] = 0, 0  # grey values of the scan
    data = image(as_stored(values, placement).reshape(shape), None, header).to_bytes()  # takes the scaling out
    write_atomic(path, gzip.compress(data, mtime=0))  # equal masks give equal bytes


def _version() -> str:
    return importlib.metadata.version("medsegfed")
