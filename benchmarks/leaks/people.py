"""Hundreds of small made-up patients in memory, to be in a training or out of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from client.privacy.engines import Rows
from medsegdiff.diffusion import Diffusion
from simulations.phantoms import draw_anatomy, patient_generator, render, scanner_of

SLICES = 2  # a patient, those in which the lesion is largest
_RENDERED = 6  # slices of a stack, of which these are taken


@dataclass(frozen=True)
class People:
    """Patients of one hospital: images (P, n, 1, S, S), of mean 0 and deviation 1 each; masks likewise, -1 and +1."""

    images: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def take(self, first: int, count: int) -> People:
        """Patients first .. first + count - 1.

        Raises:
            ValueError: there are not so many.
        """
        if first + count > len(self):
            raise ValueError(f"{first + count} patients are needed, there are {len(self)}")
        return People(self.images[first : first + count], self.masks[first : first + count])

    def to(self, device: torch.device) -> People:
        """The same on a device."""
        return People(self.images.to(device), self.masks.to(device))


@lru_cache(maxsize=8)  # drawing takes a tenth of a second each
def draw_people(count: int, side: int, seed: int, scanner: str = "alder") -> People:
    """Patients 1 .. count of a seed, at `side` pixels."""
    machine = scanner_of(scanner)
    images, masks = [], []
    for number in range(1, count + 1):
        generator = patient_generator(seed, scanner, number)
        image, mask = render(draw_anatomy(generator), machine, _RENDERED, generator)
        largest = np.sort(np.argsort(-mask.sum(axis=(0, 1)), kind="stable")[:SLICES])
        planes = torch.from_numpy(image[:, :, largest].astype(np.float32)).permute(2, 0, 1)[:, None]
        planes = F.interpolate(planes, (side, side), mode="area")
        images.append((planes - planes.mean()) / planes.std())
        truth = torch.from_numpy(mask[:, :, largest].astype(np.float32)).permute(2, 0, 1)[:, None]
        masks.append((F.interpolate(truth, (side, side), mode="area") > 0.5).float() * 2 - 1)
    return People(torch.stack(images), torch.stack(masks))


def draw_rows(people: People, patient: int, draws: int, diffusion: Diffusion, generator: torch.Generator) -> Rows:
    """A patient's slices, each at `draws` random (timestep, noise) pairs, as `denoising_loss` takes them."""
    images = people.images[patient].repeat_interleave(draws, dim=0)
    masks = people.masks[patient].repeat_interleave(draws, dim=0)
    t_B = torch.randint(0, diffusion.config.timesteps, (len(masks),), generator=generator)
    noise = torch.randn(masks.shape, generator=generator)
    return {"images": images, "masks": masks, "t_B": t_B.to(masks.device), "noise": noise.to(masks.device)}
