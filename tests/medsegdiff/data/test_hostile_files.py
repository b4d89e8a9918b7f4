"""Files made to exhaust memory, time or trust are refused early, in little memory and without torch."""

from __future__ import annotations

import functools
import gzip
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from medsegdiff.data import guard
from medsegdiff.data.cases import DatasetConfig
from medsegdiff.data.guard import DataFileError, check_image_file
from medsegdiff.data.images import read_image, read_mask

Make = Callable[..., Path]

PROGRAM = """
import json, sys, time
from pathlib import Path
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
idle = peak()
from medsegdiff.data.guard import DataFileError, check_image_file
from medsegdiff.data.images import read_image
for path in map(Path, sys.argv[1:]):
    for how, use in (("check", lambda: check_image_file([path])), ("read", lambda: read_image([path], 1))):
        start = time.perf_counter()
        try:
            use()
            said = None
        except DataFileError as fault:
            said = fault.reason
        found = {"file": path.name, "how": how, "said": said, "seconds": time.perf_counter() - start}
        print(json.dumps(found | {"bytes": peak() - idle, "torch": "torch" in sys.modules}))
"""


@functools.cache
def zero_block() -> bytes:
    """16 MiB of zeros, packed so that it can be repeated."""
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)


def zeros(gib: float, before: bytes = b"", wbits: int = 31) -> bytes:
    """`before` and so many GiB of zeros, packed a thousandfold; the check sum at the end is wrong."""
    packer = zlib.compressobj(wbits=-15)
    head = packer.compress(before) + packer.flush(zlib.Z_FULL_FLUSH)
    frame = {31: b"\x1f\x8b\x08" + bytes(6) + b"\xff", 15: b"\x78\xda", -15: b""}[wbits]
    return frame + head + zero_block() * int(gib * 64) + b"\x03\x00" + bytes(8)


def nifti_header(shape: tuple[int, ...], dtype: Any = np.int16, offset: int = 352) -> bytearray:
    header: Any = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header["magic"], header["vox_offset"] = b"n+1", offset
    header.set_sform(np.eye(4), 1)
    return bytearray(header.binaryblock + bytes(4))


def hostile_niftis(root: Path) -> Iterator[tuple[str, str, bytes]]:
    """(name, words of the refusal, bytes); "" where the file is harmless."""
    yield (
        "declares.nii",
        "2048x2048x2048 = 8,589,934,592 voxels",
        bytes(nifti_header((2048,) * 3, np.float32) + bytes(32)),
    )
    yield "little.nii", "declares 2,000,352 bytes, the file holds 384", bytes(nifti_header((100,) * 3)) + bytes(32)
    yield "bomb.nii.gz", "compressed bytes are to become 2,147,484,000", zeros(2, nifti_header((1024,) * 3))
    yield "tail.nii.gz", "", zeros(2, nifti_header((10,) * 3))  # no more is unpacked than is declared
    yield "offset.nii.gz", "begin at byte 2,000,000,", zeros(2, nifti_header((10,) * 3, offset=2_000_000_000))
    extended = nifti_header((10,) * 3, offset=384)
    extended[348] = 1
    yield "extension.nii.gz", "", zeros(2, extended + np.array([-16, 6], "<i4").tobytes())
    spoilt = np.zeros((128,) * 3, np.float32)
    spoilt[5, 5, 5:8] = np.nan, np.inf, -np.inf
    yield (
        "nan.nii.gz",
        "3 voxels are NaN or infinite",
        gzip.compress(bytes(nifti_header(spoilt.shape, np.float32)) + spoilt.tobytes(), 1),
    )


def hostile_texts(root: Path) -> Iterator[tuple[str, str, bytes]]:
    """MetaImage and NRRD."""
    mha = "NDims = 3\nDimSize = {}\nElementType = MET_SHORT\nCompressedData = {}\nElementDataFile = {}\n".format
    nrrd = "NRRD0004\ntype: short\ndimension: 3\nsizes: {}\nencoding: {}\nendian: little\n\n".format
    yield "declares.mha", "voxels; the limit", mha("9999999 9999999 9999999", "False", "LOCAL").encode()
    yield "little.mha", "the file holds 0", mha("100 100 100", "False", "LOCAL").encode()
    yield "bomb.mha", "are to become", mha("1024 1024 1024", "True", "LOCAL").encode() + zeros(2, wbits=15)
    yield "line.mha", "MetaImage", b"Comment = " + b"x" * 50_000_000
    yield "lines.mha", "ElementDataFile is missing", b"Comment = x\n" * 2_000_000
    yield "passwd.mhd", "only a file beside", mha("2 2 2", "False", "/etc/passwd").encode()
    yield "list.mhd", "several files", mha("2 2 2", "False", "LIST").encode()
    yield "declares.nrrd", "voxels; the limit", nrrd("9999999 9999999 9999999", "gzip").encode()
    yield "little.nrrd", "the file holds 0", nrrd("100 100 100", "raw").encode()
    yield "bomb.nrrd", "are to become", nrrd("1024 1024 1024", "gzip").encode() + zeros(2)
    yield "lines.nrrd", "header takes more", b"NRRD0004\n" + b"a: b\n" * 2_000_000
    nan = b"NRRD0004\ntype: float\ndimension: 3\nsizes: 1 1 2\nencoding: raw\nendian: little\n\n"
    yield "nan.nrrd", "1 voxels are NaN", nan + np.array([1, np.nan], "<f4").tobytes()


def png(width: int, height: int, bits: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    ihdr = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", ihdr), *chunks, (b"IDAT", zeros(0.1, wbits=15)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def hostile_pictures(root: Path) -> Iterator[tuple[str, str, bytes]]:
    """PNG, TIFF, JPEG, GIF, BMP."""
    yield "declares.png", "DecompressionBomb", png(60_000, 60_000, 8, 0)
    yield "ratio.png", "are to become 256,000,000", png(8_000, 8_000, 8, 6)
    yield "text.png", "Decompressed data too large", png(9, 9, 8, 0, (b"zTXt", b"a\0\0" + zeros(1, wbits=15)))
    yield "icc.png", "Decompressed data too large", png(9, 9, 8, 0, (b"iCCP", b"a\0\0" + zeros(1, wbits=15)))
    grey = Image.new("L", (64, 64))
    for ending, kind in (("jpg", "JPEG"), ("gif", "GIF"), ("bmp", "BMP"), ("tif", "TIFF")):
        grey.save(root / f"plain.{ending}", kind)
    jpeg = bytearray((root / "plain.jpg").read_bytes())
    at = jpeg.find(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 65_500, 65_500)
    yield "declares.jpg", "DecompressionBomb", bytes(jpeg)
    gif = bytearray((root / "plain.gif").read_bytes())
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    yield "declares.gif", "DecompressionBomb", bytes(gif)
    bmp = bytearray((root / "plain.bmp").read_bytes())
    bmp[18:26] = struct.pack("<ii", 100_000, 100_000)
    yield "declares.bmp", "DecompressionBomb", bytes(bmp)
    frames = [Image.new("L", (500, 500), value % 256) for value in range(30)]
    frames[0].save(root / "film.gif", save_all=True, append_images=frames[1:])
    yield "film.gif", "several frames", (root / "film.gif").read_bytes()
    frames[0].save(root / "film.tif", save_all=True, append_images=frames[1:3])
    yield "film.tif", "several frames", (root / "film.tif").read_bytes()
    yield "declares.tif", "DecompressionBomb", tiff({256: 60_000, 257: 60_000, 278: 60_000})
    yield "tile.tif", "are to become", tiff({322: 32_768, 323: 32_768})
    nan = np.zeros((8, 8), np.float32)
    nan[3, 3] = np.nan
    Image.fromarray(nan).save(root / "nan.tif")
    yield "nan.tif", "1 voxels are NaN", (root / "nan.tif").read_bytes()


def tiff(changes: dict[int, int]) -> bytes:
    """A small picture of deflated strips or tiles that declares otherwise."""
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1} | changes
    data = zeros(0.25, wbits=15)
    tags |= {324: 0, 325: len(data)} if 322 in tags else {273: 0, 279: len(data)}
    at = 8 + 2 + 12 * len(tags) + 4
    tags[324 if 322 in tags else 273] = at
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + data


def hostile_dicoms(root: Path, dicom: Make) -> Iterator[tuple[str, str, bytes]]:
    """DICOM files that declare more than they hold."""
    (plain,) = dicom(root / "plain", np.zeros((8, 8, 1), np.int16)).iterdir()

    def changed(**changes: Any) -> bytes:
        data = pydicom.dcmread(plain)
        for name, value in changes.items():
            setattr(data, name, value)
        data.save_as(root / "changed")
        return (root / "changed").read_bytes()

    yield "sides.dcm", "voxels; the limit", changed(Rows=65_535, Columns=65_535)
    yield "little.dcm", "the file holds", changed(Rows=20_000, Columns=20_000)
    yield "frames.dcm", "voxels; the limit", changed(NumberOfFrames=2_147_483_647)
    yield "single.dcm", "1,000,000 frames; the limit is 20,000", changed(NumberOfFrames=1_000_000, Rows=1, Columns=1)
    whole = plain.read_bytes()
    plain_syntax, deflated = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"
    start = 144 + struct.unpack("<I", whole[140:144])[0]  # after the file meta information
    meta = bytearray(whole[:start].replace(struct.pack("<H", 20) + plain_syntax, struct.pack("<H", 22) + deflated))
    meta[140:144] = struct.pack("<I", len(meta) - 144)
    yield "deflated.dcm", "deflated DICOM is not read", bytes(meta) + zeros(2, whole[start:], wbits=-15)
    lying = struct.pack("<HH2sHI", 0x0029, 0x1010, b"OB", 0, 4_000_000_000)
    at = whole.find(struct.pack("<HH", 0x0028, 0x0010))  # before the rows
    yield "element.dcm", "no DICOM image in it", whole[:start] + whole[start:at] + lying + whole[at:]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, dicom: Make) -> dict[Path, str]:
    """Hostile file -> words of its refusal."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "made").mkdir()
    made: dict[Path, str] = {}
    for name, words, data in (
        *hostile_niftis(root / "made"), *hostile_texts(root / "made"), *hostile_pictures(root / "made"),
        *hostile_dicoms(root / "made", dicom),
    ):  # fmt: skip
        (root / name).write_bytes(data)
        made[root / name] = words
    return made


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_hostile_files_are_refused_in_little_memory_and_without_torch(hostile: dict[Path, str]) -> None:
    """Each: the right words within seconds, 200 MB above the idle process at most, by the check and by the reader."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, hostile)], capture_output=True, text=True, check=True, timeout=300
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    words = {path.name: text for path, text in hostile.items()}
    assert len(found) == 2 * len(hostile)
    for one in found:
        said = one["said"]
        assert said is None if not words[one["file"]] else said is not None and words[one["file"]] in said, one
        assert one["bytes"] < 200e6, one
        assert one["seconds"] < 10, one  # a guard against hanging; a quiet machine takes a tenth of a second
        assert not one["torch"], one


def test_the_limits_leave_real_files_alone(
    tmp_path: Path, nifti: Make, volume_config: DatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty mask may shrink a thousandfold, its image may not; an image that shrinks tenfold may be of any size."""
    monkeypatch.setattr(guard, "UNPACKED", 10_000)
    rng = np.random.default_rng(0)
    image = nifti(tmp_path / "i.nii.gz", rng.integers(0, 5, (40, 40, 40)).astype(np.int16))
    mask = nifti(tmp_path / "m.nii.gz", np.zeros((40, 40, 40), np.int16))
    check_image_file([image])
    assert not read_mask([mask], volume_config, read_image([image], 1)).any()
    for read in (lambda: read_image([mask], 1), lambda: check_image_file([mask])):
        with pytest.raises(DataFileError, match="100-fold"):
            read()
    (tmp_path / "short.nii.gz").write_bytes(gzip.compress(bytes(nifti_header((9,) * 3, np.float32)) + bytes(999)))
    with pytest.raises(DataFileError, match="cut off: 1,9"):
        check_image_file([tmp_path / "short.nii.gz"])
    with pytest.raises(DataFileError, match="no such file"):
        check_image_file([tmp_path / "nowhere.nii"])


def test_a_mask_takes_no_more_memory_than_its_image_asks_for(
    tmp_path: Path, nifti: Make, volume_config: DatasetConfig
) -> None:
    """A mask that declares more voxels than its image has is refused by its header."""
    image = read_image([nifti(tmp_path / "i.nii", np.zeros((4, 4, 4), np.float32))], 1)
    (tmp_path / "m.nii.gz").write_bytes(zeros(2, nifti_header((1024,) * 3)))
    with pytest.raises(DataFileError, match="1,073,741,824 voxels; its image has 64"):
        read_mask([tmp_path / "m.nii.gz"], volume_config, image)
