"""A prepared case on disk: one safetensors file, mapped into memory slice by slice.

Its content is hashed, so a torn or edited file is told from a good one and made anew.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from medsegdiff.data.cases import Case
from medsegdiff.data.geometry import Geometry
from medsegdiff.files import write_atomic
from medsegdiff.labels import LabelScheme
from medsegdiff.strict import canonical_json, plain

_TENSORS = ("image", "labels", "native")


@dataclass(frozen=True)
class PreparedCase:
    """One case at network size. Reading maps the file: memory does not grow with the dataset."""

    case: Case
    path: Path  # image (N, C, S, S) float16; labels (R, N, S, S) uint8; native (R, X, Y, Z) uint8
    geometry: Geometry
    image_size: int  # S
    channels: int  # C
    raters: int  # R
    present: tuple[tuple[int, ...], ...]  # per slice: the label indices that any rater drew there, at network size
    # Per channel that is shown, the stored one; None: it was not acquired, and is zeros, a normalised image's mean.
    places: tuple[int | None, ...] | None = field(default=None, kw_only=True)

    @property
    def slices(self) -> int:
        """N."""
        return self.geometry.slices

    @property
    def spacing_mm(self) -> tuple[float, ...] | None:
        """Per native axis; None where unknown."""
        return self.geometry.spacing_mm

    def foreground(self, scheme: LabelScheme) -> tuple[int, ...]:
        """The slices that hold any of the scheme's targets."""
        wanted = {index for joined in scheme.members for index in joined}
        return tuple(i for i, labels in enumerate(self.present) if not wanted.isdisjoint(labels))

    def image(self, index: int) -> Tensor:
        """Slice `index`: (C, S, S) float32."""
        with safe_open(self.path, framework="pt") as file:
            return self._placed(self._checked(file.get_slice("image")[index]), 0).float()

    def labels(self, index: int, rater: int = 0) -> Tensor:
        """Label indices of slice `index`: (S, S) uint8."""
        with safe_open(self.path, framework="pt") as file:
            return self._checked(file.get_slice("labels")[rater, index])

    def pair(self, index: int, rater: int) -> tuple[Tensor, Tensor]:
        """Slice `index` as stored with one rater's labels, (C, S, S) float16 and (S, S) uint8, by opening once."""
        with safe_open(self.path, framework="pt") as file:
            image, labels = file.get_slice("image")[index], file.get_slice("labels")[rater, index]
        return self._placed(self._checked(image), 0), self._checked(labels)

    def images(self) -> Tensor:
        """All slices: (N, C, S, S) float32."""
        return self.tensor("image").float()

    def native_labels(self) -> Tensor:
        """Label indices at native size, every rater: (R, X, Y, Z) uint8."""
        return self.tensor("native")

    def tensor(self, name: str) -> Tensor:
        """A whole tensor: "image" (as stored, but for `places`), "labels" or "native"."""
        with safe_open(self.path, framework="pt") as file:
            found = self._checked(file.get_tensor(name))
        return self._placed(found, 1) if name == "image" else found

    def _placed(self, image: Tensor, axis: int) -> Tensor:
        """The channels that are shown, along `axis`."""
        if self.places is None:
            return image
        blank = torch.zeros_like(image.select(axis, 0))
        return torch.stack([blank if i is None else image.select(axis, i) for i in self.places], dim=axis)

    @staticmethod
    def _checked(tensor: Any) -> Tensor:
        assert isinstance(tensor, Tensor)
        return tensor


def store(path: Path, image: Tensor, labels: Tensor, native: Tensor, geometry: Geometry) -> None:
    """Write a prepared case atomically.

    Args:
        image: (N, C, S, S). labels: (R, N, S, S) uint8. native: (R, X, Y, Z) uint8.
    """
    tensors = {"image": image.half(), "labels": labels, "native": native.contiguous()}
    about = {"geometry": plain(geometry), "present": _present(labels)}
    sealed = canonical_json(about | {"sha256": _digest(tensors, about)})
    write_atomic(path, save(tensors, {"case": sealed}))  # one key: safetensors writes several in random order


def _present(labels: Tensor) -> list[list[int]]:
    return [[int(index) for index in np.unique(labels[:, i].numpy()) if index] for i in range(labels.shape[1])]


def _digest(tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    total = hashlib.sha256(canonical_json(about).encode())
    for name in _TENSORS:
        total.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        total.update(tensors[name].numpy().data)
    return total.hexdigest()


def load(path: Path, case: Case, verify: bool = True) -> PreparedCase | None:
    """A prepared case, or None where the file is absent, torn or altered and has to be made anew."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["case"])
            digest = about.pop("sha256")
            if verify and _digest({name: file.get_tensor(name) for name in _TENSORS}, about) != digest:
                return None
            _, channels, size, _ = file.get_slice("image").get_shape()
            raters = file.get_slice("labels").get_shape()[0]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError):
        return None
    native = about["geometry"]
    spacing = None if native["spacing_mm"] is None else tuple(native["spacing_mm"])
    geometry = Geometry(tuple(native["shape"]), native["slice_axis"], spacing)
    return PreparedCase(case, path, geometry, size, channels, raters, tuple(map(tuple, about["present"])))
