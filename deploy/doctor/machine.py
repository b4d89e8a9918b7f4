"""The machine: room on the disk and in memory, programs' versions, and the surroundings a process is started in."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from deploy.doctor.checks import Check, counted, gibibytes, plain_text
from deploy.doctor.connection import bypassed
from medsegdiff.config import PRESETS, ModelConfig, Precision, preset

COPIES = 3  # of a model that must find room: what is there, what is being written, what is sent or kept beside them
FEW_INODES, NO_INODES = 10_000, 100  # a run keeps some hundred files; prepared cases one each
BATCH = 8  # slices, by which presets are compared where no run is known yet
SPARE = 1.1  # of the forecast: workspaces of convolutions and what the allocator rounds up (docs/configuration.md)


@dataclass(frozen=True)
class Load:
    """What a run asks of the memory."""

    run: str
    model: ModelConfig
    batch: int
    precision: Precision = "auto"


@dataclass(frozen=True)
class Room:
    """The memory that training would use."""

    name: str  # "cpu", or the GPU's
    free: int  # bytes
    total: int
    gpu: bool = False
    bf16: bool = False


Forecast = Callable[[ModelConfig, int, bool, bool], int]  # model, batch, bf16, gpu -> bytes


def model_bytes(models: Iterable[ModelConfig]) -> int:
    """Of the largest of the models' weights; where none is known, of the largest preset's."""
    import math

    from medsegdiff.weights import weight_shapes

    known = list(models) or [preset("L")]
    return max(4 * sum(math.prod(shape) for shape in weight_shapes(model).values()) for model in known)


def check_disk(name: str, folder: Path, model: int, known: bool, copies: int = COPIES) -> Check:
    """Room for `copies` of a model in a folder (that need not be there yet), and inodes.

    Args:
        model: its bytes. known: whether it is that of a run, or assumed.
    """
    usage, place = shutil.disk_usage(_standing(folder)), os.statvfs(_standing(folder))
    figures = {"free_bytes": usage.free, "due_bytes": copies * model, "free_inodes": place.f_favail}
    whose = "" if known else ", taking the largest preset for want of a run"
    fact = f"{gibibytes(usage.free)} free; {copies} copies of the model need {gibibytes(copies * model)}{whose}"
    if usage.free < copies * model:
        status = "fail" if known and usage.free < model else "warn"
        return Check(name, status, fact, "Free space, or move the folder to a larger disk.", figures)  # type: ignore[arg-type]
    if place.f_files and place.f_favail < FEW_INODES:
        fact += f"; only {counted(place.f_favail, 'inode')} left"
        status = "fail" if place.f_favail < NO_INODES else "warn"
        return Check(name, status, fact, "Delete small files, or use a disk with more inodes.", figures)  # type: ignore[arg-type]
    return Check(name, "ok", fact, figures=figures)


def check_writable(folders: Mapping[str, Path]) -> Check:
    """Whether a file can be written, flushed and removed in each folder, or in the nearest above that is there."""
    refused = {}
    for label, folder in folders.items():
        if (why := _cannot_write(_standing(folder))) is not None:
            refused[label] = why
    figures = {"folders": len(folders), "refused": len(refused)}
    if refused:
        fact = f"{len(refused)} of {counted(len(folders), 'folder')} cannot be written: "
        fact += ", ".join(f"{label} ({why})" for label, why in refused.items())
        advice = "Give them to the account that runs medsegfed (chown); is the disk full or mounted read-only?"
        return Check("folders", "fail", fact, advice, figures)
    return Check(
        "folders", "ok", f"a file can be written in each of {counted(len(folders), 'folder')}", figures=figures
    )


def _cannot_write(folder: Path) -> str | None:
    """Why not; None where it works."""
    trial = folder / f".doctor.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        descriptor = os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, b"\0" * 4096)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        return plain_text(error.strerror or type(error).__name__)
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()
    return None


def _standing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.is_dir())


def check_memory(
    device: str | int,
    loads: Sequence[Load],
    channels: int = 1,
    classes: int = 1,
    room: Callable[[str | int], Room] | None = None,
    forecast: Forecast | None = None,
) -> Check:
    """Whether the runs' networks, or else which presets, can be trained here.

    Args:
        device: as site.yaml names it.
        channels, classes: of image and mask, for presets.
        room, forecast: where the figures come from; tests bring their own.

    Raises:
        UserError: there is no such device.
    """
    here, ahead = (room or room_on)(device), forecast or _forecast
    label = f"GPU {here.name}" if here.gpu else "CPU, no GPU is used"
    figures: dict[str, object] = {"gpu": here.gpu, "free_bytes": here.free, "total_bytes": here.total}
    fact = f"{label}: {gibibytes(here.free)} of {gibibytes(here.total)} free"
    if loads:
        return _runs_fit(loads, here, fact, figures, ahead)
    for name in reversed(PRESETS):
        due = int(
            SPARE * ahead(preset(name, image_channels=channels, mask_channels=classes), BATCH, here.bf16, here.gpu)
        )
        if due <= here.free:
            fact += f"; fits up to preset {name} at batch {BATCH} (forecast {gibibytes(due)})"
            fact += "" if here.gpu or name == "tiny" else ", but without a GPU all above tiny is slow"
            return Check("memory", "ok", fact, figures=figures | {"preset": name, "batch": BATCH, "due_bytes": due})
    fact += f"; not even preset tiny at batch {BATCH} fits"
    return Check("memory", "fail", fact, "Free memory, or choose another `device` in site.yaml.", figures)


def _runs_fit(loads: Sequence[Load], room: Room, fact: str, figures: dict[str, object], ahead: Forecast) -> Check:
    """The most demanding of the runs decides. A batch that does not fit is taken in parts, to the same effect."""
    due, load = 0, loads[0]
    for one in loads:
        bf16 = one.precision == "bf16" or (one.precision == "auto" and room.bf16)
        need = int(SPARE * ahead(one.model, one.batch, bf16, room.gpu))
        if need >= due:
            due, load = need, one
    figures = figures | {"due_bytes": due, "batch": load.batch}
    fact += f"; run {load.run} needs {gibibytes(due)} at batch {load.batch}"
    if due <= room.free:
        return Check("memory", "ok", fact, figures=figures)
    bf16 = load.precision == "bf16" or (load.precision == "auto" and room.bf16)
    single = int(SPARE * ahead(load.model, 1, bf16, room.gpu))
    if single <= room.free:
        fact += f", {gibibytes(single)} a slice: batches will be taken in parts, to the same effect but slower"
        return Check(
            "memory", "warn", fact, "Free memory that other programs hold; nothing else need be done.", figures
        )
    advice = "Ask the coordinator for a smaller preset or image_size; or free memory, or choose another `device`."
    return Check("memory", "fail", f"{fact}, and {gibibytes(single)} for a single slice", advice, figures)


def room_on(device: str | int) -> Room:
    """The memory of a device as site.yaml names it. Raises UserError where there is none such."""
    import torch

    from medsegdiff.devices import choose_device
    from medsegdiff.memory import machine_memory

    chosen = choose_device(device)
    if chosen.type == "cuda":
        free, total = torch.cuda.mem_get_info(chosen)
        return Room(torch.cuda.get_device_name(chosen), free, total, True, torch.cuda.is_bf16_supported())
    total, free = machine_memory() or (0, 0)
    return Room("cpu", free, total)


def _forecast(model: ModelConfig, batch: int, bf16: bool, gpu: bool) -> int:
    from deploy.model_card import training_bytes

    return training_bytes(model, batch, "bf16" if bf16 else "fp32", average=False, gpu=gpu)


def check_versions(server: Mapping[str, str] | None = None) -> Check:
    """The installed programs against what this medsegfed requires, and against the server's where it told them."""
    from packaging.requirements import Requirement

    from medsegdiff.software import software

    own = software()
    wanted = [Requirement(text) for text in metadata.requires("medsegfed") or ()]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    off = []
    for requirement in wanted:
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = "missing"
        if found == "missing" or not requirement.specifier.contains(found, prereleases=True):
            off.append(f"{requirement.name} {found} (wanted {requirement.specifier})")
    fact = ", ".join(f"{name} {version}" for name, version in own.items())
    fact += f", cryptography {metadata.version('cryptography')}"
    figures = {"own": own, "required": len(wanted), "off": len(off)}
    if off:
        advice = "Install the release's own versions: pip install --constraint constraints.txt medsegfed."
        return Check("versions", "fail", f"{fact}; not as required: {', '.join(off)}", advice, figures)
    if server is None:
        fact += f"; all {len(wanted)} requirements hold; the server's versions are compared at a run's first contact"
        return Check("versions", "ok", fact, figures=figures)
    unlike = [
        f"{name} {own[name]} here, {server[name]} there" for name in own if server.get(name, own[name]) != own[name]
    ]
    if unlike:
        advice = "Bring the older side up to date when it suits; a contract that differs is refused before training."
        return Check("versions", "warn", f"{fact}; other than the server's: {', '.join(unlike)}", advice, figures)
    return Check("versions", "ok", f"{fact}, as the server has them", figures=figures)


def check_environment(environment: Mapping[str, str] = os.environ) -> Check:
    """Account, umask, time zone, telemetry and proxy of the process that would start the site or the server."""
    found = list(_surroundings(environment))
    bad = [advice for _, advice in found if advice]
    return Check("environment", "warn" if bad else "ok", "; ".join(fact for fact, _ in found), " ".join(bad))


def _surroundings(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(fact, advice or "")."""
    if os.geteuid() == 0:
        yield "runs as root", "Run medsegfed under an account of its own: nothing in it needs root."
    else:
        yield "not root", ""
    umask = _umask()
    if umask is not None:
        loose = umask & 0o022 != 0o022
        yield f"umask {umask:03o}", "Set umask 077: new files may be changed by other accounts." if loose else ""
    yield f"time zone {time.strftime('%Z (UTC%z)')}", ""
    talks = [name for name in ("FLWR_TELEMETRY_ENABLED",) if environment.get(name, "0") != "0"]
    talks += [name for name in ("FLWR_DISABLE_UPDATE_CHECK",) if environment.get(name, "1") != "1"]
    if talks:
        yield "Flower would call its vendor", f"Unset {', '.join(talks)}."
    else:
        yield "Flower's telemetry off", ""
    proxy = next(
        (name for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY") if environment.get(name)), None
    )
    if proxy is None:
        yield "no proxy set", ""
    elif bypassed("127.0.0.1", environment.get("no_proxy") or environment.get("NO_PROXY") or ""):
        yield f"{proxy.upper()} set, NO_PROXY holds 127.0.0.1", ""
    else:  # deploy.processes adds it for what medsegfed starts
        yield f"{proxy.upper()} set, NO_PROXY without 127.0.0.1 (added for medsegfed's own processes)", ""


def _umask() -> int | None:
    """Without changing it, which would hold for all threads meanwhile; None where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return None
