"""Masks as a DICOM Segmentation object (PS3.3 A.51) that points back to the series it was made from."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.sr.codedict import codes as codes_of_dicom
from pydicom.sr.coding import Code

from medsegdiff.data.cases import SegmentCodes
from medsegdiff.data.dicom import open_series, quiet
from medsegdiff.data.guard import DataFileError, decoding, times
from medsegdiff.data.orientation import as_stored
from medsegdiff.errors import UserError
from medsegdiff.files import write_atomic

TISSUE = SegmentCodes("85756007 |Tissue|", "85756007 |Tissue|")  # for a target without a code: true of all, says little
MAKER = "MedSegFed"


def write_dicom_seg(
    path: Path,
    masks: NDArray[np.bool_],
    source: Path,
    targets: Sequence[str],
    codes: Mapping[str, SegmentCodes] | None,
    model: str,
    version: str,
) -> None:
    """Write one binary segment a target, in the frame of reference of the source; segments may overlap.

    Patient, study and frame of reference are the source's; every frame names the source image it was made from.
    Frames without any segment are left out, as the standard allows; with all masks empty every frame stands.

    Args:
        path: the file to write.
        masks: (T, X, Y, Z), turned to RAS axes as `read_image(source)` is.
        source: folder or file of the series.
        targets: T names, the segments 1..T in this order.
        codes: from dataset.yaml; a target without one is coded as 85756007 |Tissue| and keeps its name as its label.
        model: identifies the weights, at most 64 characters, such as a hash.
        version: of the program.

    Raises:
        UserError: the source cannot be read again, has no place in the patient or lacks what the standard demands; the
            disk refuses.
    """
    with decoding(source), quiet():
        series = open_series(source)
    if series.placement is None:
        raise DataFileError(source, "it has no position in the patient, without which there is no DICOM segmentation")
    frames, files = series.frames, list(dict.fromkeys(frame.path for frame in series.frames))
    stored = as_stored(np.moveaxis(masks, 0, 3), series.placement)  # columns, rows, frames, segments
    if stored.shape != (expected := (series.columns, series.rows, len(frames), len(targets))):
        raise UserError(f"{source}: masks of {times(stored.shape)} do not fit its {times(expected)}; nothing written.")
    pixels = np.ascontiguousarray(stored.transpose(2, 1, 0, 3), dtype=bool)
    if len(files) == 1:  # the writer takes the frames of a multi-frame source in the order of its file
        pixels = pixels[np.argsort([frame.index for frame in frames])]
    with decoding(source), quiet():
        headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
        _check_source(source, headers)
        written = _segmentation(headers, pixels, targets, codes or {}, model, version)
        buffer = io.BytesIO()
        written.save_as(buffer)
    write_atomic(path, buffer.getvalue())


def _check_source(source: Path, headers: Sequence[Any]) -> None:
    for name in ("FrameOfReferenceUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        values = {str(header.get(name, "")) for header in headers}
        if "" in values or (name != "SOPInstanceUID" and len(values) > 1):
            raise DataFileError(
                source, f"{name} is missing or differs between its files; no DICOM segmentation fits it"
            )


def _segmentation(
    headers: Sequence[Any], pixels: NDArray[np.bool_], targets: Sequence[str], codes: Mapping[str, SegmentCodes],
    model: str, version: str,
) -> Any:  # fmt: skip
    import highdicom as hd

    algorithm = hd.AlgorithmIdentificationSequence(
        name="MedSegDiff", family=codes_of_dicom.DCM.ArtificialIntelligence, version=version
    )
    return hd.seg.Segmentation(
        source_images=headers,
        pixel_array=pixels,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=target[:64],
                segmented_property_category=_code(codes.get(target, TISSUE).category),
                segmented_property_type=_code(codes.get(target, TISSUE).type),
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
            )
            for number, target in enumerate(targets, start=1)
        ],
        series_instance_uid=hd.UID(),
        series_number=1000 + int(headers[0].get("SeriesNumber") or 0),
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer=MAKER,
        manufacturer_model_name="MedSegDiff",
        software_versions=version,
        device_serial_number=model[:64],
        content_label="SEGMENTATION",
        content_description=f"Automatic segmentation: {', '.join(targets)}"[:64],
        series_description="MedSegDiff segmentation",
    )


def _code(text: str) -> Any:
    concept, meaning = SegmentCodes.parts(text)
    return Code(concept, "SCT", meaning)
