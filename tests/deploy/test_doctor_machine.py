"""What `doctor` says of the machine: disk, memory, versions, environment."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.doctor import machine
from deploy.doctor.machine import (
    Load,
    Room,
    check_disk,
    check_environment,
    check_memory,
    check_versions,
    check_writable,
    model_bytes,
)
from medsegdiff.config import ModelConfig, preset
from medsegdiff.errors import UserError
from medsegdiff.weights import weight_shapes

GIB = 2**30


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call to set what the disk has left."""

    def set_(free: int, inodes: int = 10**6, total_inodes: int = 10**7) -> None:
        class Usage:
            pass

        usage, place = Usage(), Usage()
        usage.free, place.f_favail, place.f_files = free, inodes, total_inodes  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        monkeypatch.setattr(os, "statvfs", lambda path: place)

    return set_


@pytest.mark.parametrize(
    ("free", "inodes", "known", "status"),
    [
        (30, 10**6, True, "ok"),
        (29, 10**6, True, "warn"),
        (9, 10**6, True, "fail"),
        (9, 10**6, False, "warn"),  # the largest preset is assumed, not asked for
        (30, 9_999, True, "warn"),
        (30, 99, True, "fail"),
    ],
)
def test_room_for_three_models_and_inodes(
    tmp_path: Path, disk: Callable[..., None], free: int, inodes: int, known: bool, status: str
) -> None:
    """Less than three copies is looked at, less than one stops a run."""
    disk(free, inodes)
    check = check_disk("outbox", tmp_path / "not" / "yet" / "there", 10, known)
    assert check.status == status, check
    assert check.figures["due_bytes"] == 30


def test_a_file_system_without_inodes_is_no_fault(tmp_path: Path, disk: Callable[..., None]) -> None:
    """btrfs counts none."""
    disk(100, inodes=0, total_inodes=0)
    assert check_disk("outbox", tmp_path, 10, True).status == "ok"


def test_the_size_of_a_model_is_that_of_its_weights(tiny_task: Any) -> None:
    """The largest of the runs' models counts; where there is none, the largest preset."""
    small = sum(4 * int(__import__("math").prod(s)) for s in weight_shapes(tiny_task.model).values())
    assert model_bytes([tiny_task.model]) == small
    assert model_bytes([tiny_task.model, preset("tiny")]) > small
    assert model_bytes([]) == model_bytes([preset("L")])


def test_every_folder_is_tried_with_a_file(tmp_path: Path) -> None:
    """Where it works nothing is left behind; a missing folder is tried above."""
    check = check_writable({"state": tmp_path, "outbox": tmp_path / "outbox" / "x"})
    assert check.status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_refuses_is_named_by_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-only, full or of another account: the system's own words, not the path."""
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    original = os.open

    def refuse(path: Path, *arguments: Any, **keywords: Any) -> int:
        if "bad" in str(path):
            raise OSError(30, "Read-only file system", str(path))
        return original(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    check = check_writable({"state": tmp_path / "good", "outbox": tmp_path / "bad"})
    assert check.status == "fail"
    assert "outbox (Read-only file system)" in check.detail
    assert str(tmp_path) not in check.detail


def test_a_disk_that_is_full_is_found_by_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free space and a quota that is used up look alike to statvfs; and the trial file goes all the same."""

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(os, "write", full)
    check = check_writable({"state": tmp_path})
    assert "state (Disk quota exceeded)" in check.detail
    assert list(tmp_path.iterdir()) == []


# Memory


def forecast(model: ModelConfig, batch: int, bf16: bool, gpu: bool) -> int:
    """A GiB a slice at 256 pixels and 128 channels, half of it in bf16."""
    share = model.image_size / 256 * model.base_channels / 128
    return int(GIB * batch * share * (0.5 if bf16 else 1.0))


def gpu(free: float) -> Callable[[str | int], Room]:
    return lambda device: Room("H100", int(free * GIB), 80 * GIB, gpu=True, bf16=True)


@pytest.mark.parametrize(("free", "name"), [(60, "L"), (4.4, "L"), (4.0, "S"), (1.0, "tiny")])
def test_without_a_run_the_largest_preset_that_fits_is_told(free: float, name: str) -> None:
    """At batch 8, with a tenth to spare."""
    check = check_memory("auto", [], room=gpu(free), forecast=forecast)
    assert check.status == "ok"
    assert f"fits up to preset {name} at batch 8" in check.detail
    assert check.figures["preset"] == name


def test_no_preset_fits_at_all() -> None:
    """A GPU that others use up."""
    assert check_memory("auto", [], room=gpu(0.01), forecast=forecast).status == "fail"


@pytest.mark.parametrize(
    ("free", "status", "words"),
    [(9, "ok", "needs 8.8 GiB at batch 16"), (2, "warn", "in parts"), (0.3, "fail", "for a single slice")],
)
def test_the_most_demanding_run_decides(free: float, status: str, words: str) -> None:
    """A batch that does not fit is taken in parts; a slice that does not fit is refused."""
    loads = [Load("small", preset("tiny"), 16), Load("large", preset("B"), 16)]
    check = check_memory("auto", loads, room=gpu(free), forecast=forecast)
    assert check.status == status
    assert "run large" in check.detail
    assert words in check.detail


def test_the_precision_of_a_run_counts() -> None:
    """fp32 asked for takes twice what bf16 takes."""
    due = [
        check_memory("auto", [Load("r", preset("B"), 8, kind)], room=gpu(60), forecast=forecast).figures["due_bytes"]
        for kind in ("fp32", "auto")  # type: ignore[misc]
    ]
    assert due[0] == pytest.approx(2 * due[1])


def test_a_machine_without_gpu_is_told_as_such() -> None:
    """Its own memory is what counts, and nobody is surprised by the hours."""
    check = check_memory("cpu", [], room=lambda d: Room("cpu", 30 * GIB, 32 * GIB), forecast=forecast)
    assert check.detail.startswith("CPU, no GPU is used: 30.0 GiB of 32.0 GiB free")
    assert "slow" in check.detail


def test_a_device_that_is_not_there_is_the_users_fault() -> None:
    """The message lists the GPUs that there are."""
    with pytest.raises(UserError, match="device 'H999'"):
        check_memory("H999", [], forecast=forecast)


@pytest.mark.slow
def test_the_real_forecast_of_the_smallest_network(tiny_task: Any) -> None:
    """The figure behind `medsegfed model show`, without the weight average that sites do not keep."""
    from deploy.model_card import training_bytes

    load = Load("tiny", tiny_task.model, 2, "fp32")
    check = check_memory("cpu", [load])
    due = training_bytes(tiny_task.model, 2, "fp32", average=False, gpu=False)
    assert check.figures["due_bytes"] == int(machine.SPARE * due)
    assert check.status == "ok"


# Versions and environment


def test_installed_versions_are_those_required() -> None:
    """This very environment; the server's come later."""
    check = check_versions()
    assert check.status == "ok"
    assert "flwr 1.41.0" in check.detail
    assert "first contact" in check.detail


def test_another_flower_than_the_pinned_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The set-up leans on Flower's private parts: exactly 1.41.0."""
    original = machine.metadata.version
    monkeypatch.setattr(machine.metadata, "version", lambda name: "1.42.0" if name == "flwr" else original(name))
    check = check_versions()
    assert check.status == "fail"
    assert "flwr 1.42.0 (wanted ==1.41.0)" in check.detail


def test_a_missing_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be missed in the middle of the first round."""
    original = machine.metadata.version

    def look_up(name: str) -> str:
        if name == "highdicom":
            raise machine.metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(machine.metadata, "version", look_up)
    assert "highdicom missing" in check_versions().detail


def test_versions_are_compared_with_the_servers() -> None:
    """Another torch is told; the contract refuses what really does not fit."""
    own = machine.check_versions().figures["own"]
    assert check_versions(own).status == "ok"
    check = check_versions({**own, "torch": "1.0"})
    assert check.status == "warn"
    assert "1.0 there" in check.detail


@pytest.mark.parametrize(
    ("environment", "words", "advised"),
    [
        ({}, "no proxy set", ""),
        ({"HTTPS_PROXY": "http://u:s3cret@p:1", "NO_PROXY": "127.0.0.1"}, "NO_PROXY holds 127.0.0.1", ""),
        ({"https_proxy": "http://p:1"}, "NO_PROXY without 127.0.0.1", ""),
        ({"FLWR_TELEMETRY_ENABLED": "1"}, "Flower would call its vendor", "Unset FLWR_TELEMETRY_ENABLED"),
        ({"FLWR_DISABLE_UPDATE_CHECK": "0"}, "Flower would call its vendor", "Unset FLWR_DISABLE_UPDATE_CHECK"),
    ],
)
def test_the_environment_is_told(environment: dict[str, str], words: str, advised: str) -> None:
    """Account, umask, time zone, telemetry, proxy; a proxy's password is not."""
    check = check_environment(environment)
    assert words in check.detail
    assert advised in check.advice
    assert "umask" in check.detail
    assert "time zone" in check.detail
    assert "s3cret" not in repr(check)


def test_root_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in it needs root."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert check_environment({}).status == "warn"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert check_environment({}).detail.startswith("not root")
