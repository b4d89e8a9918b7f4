"""Virtual patients: head-like scans with an irregular lesion, drawn from a seed, nothing to download.

A patient's anatomy is defined in millimetres and knows no scanner; a hospital's `Scanner` renders it with its own
contrast, matrix, voxel size, bias field, noise and artefacts. Two hospitals thus see the same disease in different
pictures: what one of them learns alone fails at another, and one network can still learn them all. Bright spots,
round cysts, ventricles and the skull share the lesion's brightness, so no plain threshold finds it.

These are pictures to develop and demonstrate on, not a model of any disease: no medical claim follows from them.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import expit

from medsegdiff.files import write_atomic
from medsegdiff.progress import Progress, report
from medsegdiff.strict import Strict, dump_yaml
from simulations.world import whole_folder

Array = NDArray[np.float64]

LATTICE = 12  # knots a side of the periodic lattices behind the smooth random fields
BRAIN = 0.81  # head radius at which the brain ends, as a fraction of the scalp's


@dataclass(frozen=True)
class Contrast(Strict):
    """Brightness of each tissue as a fraction of the scanner's full scale, in [0, 1]; air is 0."""

    fat: float
    bone: float
    csf: float  # cerebrospinal fluid: ventricles and the rim around the brain
    grey: float
    white: float
    vessel: float
    lesion: float


T1 = Contrast(fat=0.85, bone=0.10, csf=0.14, grey=0.50, white=0.68, vessel=0.30, lesion=0.30)
T1_ENHANCED = Contrast(fat=0.80, bone=0.10, csf=0.15, grey=0.42, white=0.55, vessel=0.90, lesion=0.80)
T2 = Contrast(fat=0.55, bone=0.08, csf=1.00, grey=0.46, white=0.34, vessel=0.74, lesion=0.74)
FLAIR = Contrast(fat=0.70, bone=0.10, csf=0.12, grey=0.50, white=0.40, vessel=0.70, lesion=0.72)
CT = Contrast(fat=0.10, bone=1.00, csf=0.26, grey=0.62, white=0.56, vessel=0.40, lesion=0.34)
CT_BLEEDING = Contrast(fat=0.08, bone=1.00, csf=0.26, grey=0.49, white=0.43, vessel=0.65, lesion=0.65)
ADC = Contrast(fat=0.15, bone=0.06, csf=0.90, grey=0.52, white=0.46, vessel=0.25, lesion=0.26)
PROTON_DENSITY = Contrast(fat=0.88, bone=0.06, csf=0.64, grey=0.56, white=0.46, vessel=0.78, lesion=0.77)
SUSCEPTIBILITY = Contrast(fat=0.55, bone=0.05, csf=0.72, grey=0.64, white=0.54, vessel=0.22, lesion=0.28)


@dataclass(frozen=True)
class Scanner(Strict):
    """How one hospital's pictures come about."""

    name: str
    contrast: Contrast
    bias: float  # peak of the multiplicative bias field, as a logarithm: 0.3 is up to 35 % brighter or 26 % darker
    matrix: tuple[int, int]  # voxels a slice along x and y
    spacing_mm: tuple[float, float, float]  # voxel size along x, y, z
    noise: float  # standard deviation as a fraction of full scale
    noise_kind: Literal["rician", "gaussian"] = "rician"  # magnitude MRI; CT
    artefact: Literal["none", "ghosting", "stripes", "motion"] = "none"
    artefact_level: float = 0.0  # ghosting: share of a line's signal; stripes: fraction of full scale; motion: mm
    full_scale: int = 1000  # stored integer of brightness 1
    orientation: str = "RAS"  # axes of the stored file, as nibabel.orientations names them


SCANNERS: tuple[Scanner, ...] = (
    Scanner("alder", FLAIR, 0.15, (64, 64), (2.9, 2.9, 5.0), 0.030, full_scale=900),
    Scanner("birch", T2, 0.20, (60, 68), (3.0, 3.0, 6.0), 0.030, "rician", "stripes", 0.02, 255),
    Scanner("cedar", T1_ENHANCED, 0.35, (64, 72), (2.7, 2.7, 4.0), 0.025, "rician", "motion", 3.0, 4000, "PSR"),
    Scanner("dogwood", PROTON_DENSITY, 0.15, (56, 56), (3.3, 3.3, 5.0), 0.035, "rician", "ghosting", 0.15, 2000, "LAS"),
    Scanner("elm", T1, 0.30, (72, 72), (2.55, 2.55, 4.0), 0.025, full_scale=700, orientation="LPS"),
    Scanner("fir", CT, 0.02, (80, 80), (2.3, 2.3, 4.5), 0.025, "gaussian", "stripes", 0.02, 255),
    Scanner("ginkgo", ADC, 0.10, (60, 60), (3.1, 3.1, 5.0), 0.040, full_scale=3000),
    Scanner("hazel", SUSCEPTIBILITY, 0.25, (64, 64), (2.85, 2.85, 7.0), 0.035, "rician", "motion", 3.0, 1200, "LPS"),
    Scanner("ivy", CT_BLEEDING, 0.02, (76, 76), (2.45, 2.45, 5.5), 0.030, "gaussian", full_scale=1000),
)
"""The hospitals there are, in the order in which a number of sites takes them."""


@dataclass(frozen=True)
class PhantomConfig(Strict):
    """A dataset of virtual patients. A patient depends on seed, site name and number alone, never on the others."""

    sites: int | tuple[str, ...] = 4  # how many hospitals, or their names: those of SCANNERS, again with -2, -3, ...
    patients: int = 10  # per site
    slices: int = 8  # per patient; a stack is slices * the scanner's slice spacing high
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("patients", 1, 9999), ("slices", 4, 64)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie in {low}..{high}, found {getattr(self, name)}")
        if isinstance(self.sites, int) and not 1 <= self.sites <= 9999:
            raise ValueError(f"sites must lie in 1..9999, found {self.sites}")
        names = self.site_names
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sites must hold distinct names, at least one, found {list(names)}")
        for name in names:
            scanner_of(name)

    @property
    def site_names(self) -> tuple[str, ...]:
        """The sites by name; beyond the last scanner the list starts again with alder-2."""
        if not isinstance(self.sites, int):
            return self.sites
        rounds = [divmod(index, len(SCANNERS)) for index in range(self.sites)]
        return tuple(SCANNERS[which].name + (f"-{turn + 1}" if turn else "") for turn, which in rounds)


def scanner_of(site: str) -> Scanner:
    """The scanner that a site of this name has: `elm` and `elm-2` are two hospitals with the same machine.

    Raises:
        ValueError: no scanner has that name.
    """
    known = {scanner.name: scanner for scanner in SCANNERS}
    stem = re.sub(r"-[1-9][0-9]*$", "", site)
    if stem not in known:
        raise ValueError(f"site {site!r} has no scanner; choose among {', '.join(known)} (a second one: elm-2)")
    return known[stem]


@dataclass(frozen=True)
class Anatomy:
    """One patient, in millimetres about the isocentre (x to the right, y to the front, z upwards)."""

    centre_mm: Array  # (3,)
    tilt: float  # radians about z
    axes_mm: Array  # (3,) half-axes of the scalp
    ventricle_mm: Array  # (3,) half-axes of one lateral ventricle
    asymmetry: float  # right ventricle is this much wider than the left
    vessels: Array  # (V, 4): centre and radius
    cysts: Array  # (Y, 4): centre and radius
    lesion_centre_mm: Array  # (3,)
    lesion_radii_mm: Array  # (3,)
    lesion_roughness: float  # standard deviation of the radius over directions, as a fraction
    lesion_strength: float  # 1: as bright as the contrast says; less: closer to the tissue below
    lesion_core: float  # radius of the necrotic core as a fraction of the lesion's; 0: none
    lattices: Array  # (5, LATTICE, LATTICE, LATTICE): scalp, cortex, tissue, lesion outline, lesion texture


def patient_generator(seed: int, site: str, patient: int) -> np.random.Generator:
    """The random stream of one patient; no other site or patient can shift it."""
    digest = hashlib.sha256(f"{seed}|{site}|{patient}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def draw_anatomy(generator: np.random.Generator) -> Anatomy:
    """Draw a patient. The lesion meets every stack of at least 4 slices of 4 mm about the isocentre."""
    axes = generator.normal((68.0, 84.0, 88.0), (3.0, 4.0, 4.0))
    side = generator.choice((-1.0, 1.0))
    angle = generator.uniform(-1.1, 1.1)  # from the lateral axis: the midline holds the ventricles
    reach = generator.uniform(0.35, 0.58)
    lesion_centre = np.array(
        [side * reach * axes[0] * np.cos(angle), reach * axes[1] * np.sin(angle), generator.uniform(-8.0, 8.0)]
    )
    radius = generator.uniform(15.0, 27.0)
    return Anatomy(
        centre_mm=np.append(generator.uniform(-6.0, 6.0, 2), 0.0),
        tilt=generator.uniform(-0.2, 0.2),
        axes_mm=axes,
        ventricle_mm=generator.uniform((5.0, 22.0, 16.0), (9.5, 32.0, 26.0)),
        asymmetry=generator.uniform(-0.25, 0.25),
        vessels=_draw_balls(generator, 16, axes, (2.0, 4.0)),
        cysts=_draw_balls(generator, int(generator.integers(1, 4)), axes, (4.5, 7.5)),
        lesion_centre_mm=lesion_centre,
        lesion_radii_mm=radius * generator.uniform((0.8, 0.8, 0.4), (1.2, 1.2, 0.55)),
        lesion_roughness=generator.uniform(0.18, 0.32),
        lesion_strength=generator.uniform(0.8, 1.05),
        lesion_core=generator.uniform(0.35, 0.6) * (generator.random() < 0.4),
        lattices=generator.standard_normal((5, LATTICE, LATTICE, LATTICE)),
    )


def _draw_balls(generator: np.random.Generator, count: int, axes: Array, radii: tuple[float, float]) -> Array:
    """(count, 4) centres and radii, spread over the brain within 25 mm of the isocentre's height."""
    angle = generator.uniform(0.0, 2 * np.pi, count)
    reach = BRAIN * np.sqrt(generator.uniform(0.05, 0.85, count))
    height = generator.uniform(-25.0, 25.0, count)
    return np.column_stack(
        [reach * axes[0] * np.cos(angle), reach * axes[1] * np.sin(angle), height, generator.uniform(*radii, count)]
    )


def render(
    anatomy: Anatomy, scanner: Scanner, slices: int, generator: np.random.Generator
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """One patient as one scanner sees it.

    Returns:
        image (X, Y, Z) as stored integers of about 0..full_scale, and mask (X, Y, Z) of 0 and 1, both in RAS axes.
    """
    points = _head_points(anatomy, scanner, slices)
    brightness, lesion = _paint(anatomy, scanner.contrast, points, scanner.spacing_mm[0])
    brightness *= np.exp(scanner.bias * _bias(brightness.shape, generator))
    brightness = _spoil(brightness, scanner, generator)
    noise = scanner.noise * generator.standard_normal((2, *brightness.shape))
    signal = brightness + noise[0]
    if scanner.noise_kind == "rician":
        signal = np.hypot(signal, noise[1])  # the magnitude of a complex signal with noise in both channels
    stored = np.clip(np.rint(signal * scanner.full_scale), -32768, 32767).astype(np.int16)
    return stored, lesion.astype(np.uint8)


def _head_points(anatomy: Anatomy, scanner: Scanner, slices: int) -> Array:
    """(3, X, Y, Z) voxel centres in mm in the head's own frame."""
    counts = (*scanner.matrix, slices)
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(counts, scanner.spacing_mm, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    x, y, z = (value - centre for value, centre in zip((x, y, z), anatomy.centre_mm, strict=True))
    cos, sin = np.cos(anatomy.tilt), np.sin(anatomy.tilt)
    return np.stack([cos * x + sin * y, cos * y - sin * x, z])


def _field(lattice: Array, points: Array, scale: float) -> Array:
    """A smooth random field of about zero mean and unit size; `scale` is the distance between knots."""
    return np.asarray(ndimage.map_coordinates(lattice, points / scale, order=3, mode="grid-wrap"), dtype=np.float64)


def _paint(anatomy: Anatomy, contrast: Contrast, points: Array, voxel_mm: float) -> tuple[Array, NDArray[np.bool_]]:
    """Brightness before the scanner's faults, and where the lesion is, both (X, Y, Z)."""

    def soft(inside_mm: Array) -> Array:
        """Membership in [0, 1] from the signed depth in mm: an edge about one voxel wide (partial volume)."""
        return np.asarray(expit(4.0 * inside_mm / voxel_mm))

    scalp, cortex, tissue, _, _ = anatomy.lattices
    head_mm = float(anatomy.axes_mm[:2].mean())
    radius = np.linalg.norm(points / anatomy.axes_mm[:, None, None, None], axis=0)
    radius *= 1 + 0.025 * _field(scalp, points, 40.0)
    image = np.zeros_like(radius)
    for edge, value in ((1.0, contrast.fat), (0.93, contrast.bone), (0.85, contrast.csf), (BRAIN, contrast.grey)):
        image += soft((edge - radius) * head_mm) * (value - image)
    folds = 0.68 + 0.09 * _field(cortex, points, 9.0)  # the grey ribbon's inner edge runs in gyri
    image += soft((folds - radius) * head_mm) * (contrast.white - image)
    image += soft(_nuclei_depth(points)) * (contrast.grey - image)
    image += soft(_ventricle_depth(anatomy, points)) * (contrast.csf - image)
    image *= 1 + 0.05 * _field(tissue, points, 8.0)
    for balls, value in ((anatomy.vessels, contrast.vessel), (anatomy.cysts, contrast.lesion)):
        for x, y, z, ball_mm in balls:
            depth = ball_mm - np.linalg.norm(points - np.array([x, y, z])[:, None, None, None], axis=0)
            image += soft(depth) * (value - image)
    return _add_lesion(anatomy, contrast, points, image, soft((BRAIN - radius) * head_mm))


def _nuclei_depth(points: Array) -> Array:
    """Signed depth in mm inside the paired deep grey nuclei."""
    x, y, z = points
    distance = np.sqrt(((np.abs(x) - 22.0) / 8.0) ** 2 + ((y + 4.0) / 15.0) ** 2 + (z / 18.0) ** 2)
    return np.asarray((1 - distance) * 8.0)


def _ventricle_depth(anatomy: Anatomy, points: Array) -> Array:
    """Signed depth in mm inside the lateral ventricles, a pair of crescents beside the midline."""
    x, y, z = points
    width, length, height = anatomy.ventricle_mm
    width = width * (1 + anatomy.asymmetry * np.sign(x))
    bow = 9.0 + 0.012 * (y + 4.0) ** 2
    distance = np.sqrt(((np.abs(x) - bow) / width) ** 2 + (y / length) ** 2 + (z / height) ** 2)
    return np.asarray((1 - distance) * width)


def _add_lesion(
    anatomy: Anatomy, contrast: Contrast, points: Array, image: Array, brain: Array
) -> tuple[Array, NDArray[np.bool_]]:
    """Paint the lesion over `image`: a star-shaped blob with a rough outline, a soft halo and perhaps a core."""
    _, _, _, outline, texture = anatomy.lattices
    offset = (points - anatomy.lesion_centre_mm[:, None, None, None]) / anatomy.lesion_radii_mm[:, None, None, None]
    distance = np.linalg.norm(offset, axis=0)
    direction = offset / np.maximum(distance, 1e-9)
    lobes = _field(outline, direction, 0.75) + 0.5 * _field(outline, direction + LATTICE / 2, 0.35)
    edge = np.clip(1 + anatomy.lesion_roughness * lobes, 0.65, 1.6)
    depth_mm = (edge - distance) * float(anatomy.lesion_radii_mm[:2].mean())

    grain = 1 + 0.22 * _field(texture, points, 5.0)
    halo = 0.35 * np.exp(np.minimum(depth_mm, 0.0) / 5.0)  # swelling, outside the outline that experts draw
    weight = anatomy.lesion_strength * brain * np.where(depth_mm > 0, np.clip(grain, 0.4, 1.3), halo)
    image = image + ndimage.gaussian_filter(weight, (0.5, 0.5, 0.0)) * (contrast.lesion - image)
    if anatomy.lesion_core > 0:  # dead tissue is about as bright as living tissue here: the outline must be learnt
        core = brain * expit(8.0 * (anatomy.lesion_core * edge - distance))
        image = image + core * (0.75 * contrast.grey + 0.25 * contrast.lesion - image)
    return image, (depth_mm > 0) & (brain > 0.5)


def _bias(shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    """A smooth field over the volume, a random quadratic scaled to a peak of 1 in absolute value."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    terms = (x, y, 0.5 * z, x * x - 0.5, y * y - 0.5, x * y)
    field = np.sum([weight * term for weight, term in zip(generator.standard_normal(6), terms, strict=True)], axis=0)
    return np.asarray(field / np.abs(field).max())


def _spoil(image: Array, scanner: Scanner, generator: np.random.Generator) -> Array:
    """Add the scanner's artefact, slice by slice, at a strength between a half and the whole of its level."""
    level = scanner.artefact_level * generator.uniform(0.5, 1.0)
    lines = np.arange(image.shape[1])
    if scanner.artefact == "stripes":  # spikes in k-space: a faint plane wave over each slice
        turns = generator.uniform(5.0, 12.0, 2) / image.shape[:2]
        phase = generator.uniform(0.0, 2 * np.pi, image.shape[2])
        x, y = np.meshgrid(np.arange(image.shape[0]), lines, indexing="ij")
        wave = 2 * np.pi * (turns[0] * x + turns[1] * y)
        return np.asarray(image + level * np.sin(wave[:, :, None] + phase))
    spectrum = np.fft.fft(image, axis=1)
    if scanner.artefact == "ghosting":  # every other phase-encoding line is weaker: a copy half a field away
        spectrum[:, lines % 2 == 1] *= 1 - level
    elif scanner.artefact == "motion":  # the head moved before the outer half of the lines was recorded
        frequency = np.fft.fftfreq(image.shape[1])
        shift = np.where(np.abs(frequency) > 0.12, level / scanner.spacing_mm[1], 0.0)
        spectrum *= np.exp(-2j * np.pi * frequency * shift)[None, :, None]
    else:
        return image
    return np.abs(np.fft.ifft(spectrum, axis=1))


DATASET: dict[str, Any] = {
    "name": "phantoms",
    "modality": "synthetic",
    "channels": ["scan"],
    "labels": {"background": 0, "lesion": 1},
}


def write_phantoms(config: PhantomConfig, folder: Path) -> None:
    """Write the dataset folder: cases.csv, dataset.yaml, images/ID.nii.gz, masks/ID.nii.gz.

    Guarantees:
        Equal configurations give equal bytes; a further site or patient leaves the files of the others unchanged.

    Raises:
        UserError: `folder` is already there, or cannot be written; nothing is left behind.
    """
    total = len(config.site_names) * config.patients
    rows: list[tuple[str, ...]] = []
    with whole_folder(folder) as partial:
        for site in config.site_names:
            for number in range(1, config.patients + 1):
                case = f"{site}-{number:03d}"
                image, mask = f"images/{case}.nii.gz", f"masks/{case}.nii.gz"
                _write_patient(config, site, number, partial / image, partial / mask)
                rows.append((case, case, site, image, mask))
                report(Progress("phantoms", len(rows), total, site=site))
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows(
            [("case_id", "patient_id", "site", "image_path", "mask_path"), *rows]
        )
        write_atomic(partial / "cases.csv", table.getvalue().encode())
        write_atomic(partial / "dataset.yaml", dump_yaml(DATASET).encode())


def _write_patient(config: PhantomConfig, site: str, number: int, image_path: Path, mask_path: Path) -> None:
    generator = patient_generator(config.seed, site, number)
    scanner = scanner_of(site)
    image, mask = render(draw_anatomy(generator), scanner, config.slices, generator)
    write_atomic(image_path, _nifti_gz(image, scanner))
    write_atomic(mask_path, _nifti_gz(mask, scanner))


def _nifti_gz(array: NDArray[Any], scanner: Scanner) -> bytes:
    """A RAS array as a compressed NIfTI file in the scanner's own axes, the same bytes at any time of day."""
    spacing = np.array(scanner.spacing_mm)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * (np.array(array.shape) - 1) / 2  # the isocentre is the middle of the stack
    header = nib.Nifti1Header()
    header.set_xyzt_units("mm")
    target = nib.orientations.axcodes2ornt(scanner.orientation)
    stored = nib.Nifti1Image(array, affine, header).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.io_orientation(affine), target)
    )
    return gzip.compress(stored.to_bytes(), compresslevel=6, mtime=0)
