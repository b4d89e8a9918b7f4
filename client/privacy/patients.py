"""A site's training patients, as the rows that a private step takes.

A drawn patient gives m slices of all its scans, with replacement, each augmented on its own and shown at K (timestep,
noise) draws: m K rows whatever the number of its slices. Which slices, timesteps and noise these are need not be
secret, for the bound on a patient's influence holds for any; they come from the system's entropy all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from client.privacy.engines import Rows
from client.privacy.entropy import Entropy, SystemEntropy
from client.privacy.policy import PrivacyPolicy
from client.privacy.sampling import draw_slices
from medsegdiff.config import Precision, TrainingConfig
from medsegdiff.data.augment import augment
from medsegdiff.data.batches import SliceTable
from medsegdiff.data.prepared import PreparedCase
from medsegdiff.devices import autocast
from medsegdiff.diffusion import Diffusion
from medsegdiff.labels import LabelScheme
from medsegdiff.network import MedSegDiff
from medsegdiff.objective import denoising_loss


class DiffusionRowLoss:
    """The diffusion loss of some rows: the mean of what depends on one row alone.

    Args:
        auxiliary_weight: of the auxiliary head's loss, where the network has one.
        precision: of matrix work; gradients come out in the parameters' own.
    """

    def __init__(self, diffusion: Diffusion, auxiliary_weight: float = 0.0, precision: Precision = "fp32") -> None:
        self.diffusion = diffusion
        self.auxiliary_weight = auxiliary_weight
        self.precision: Precision = precision

    def __call__(self, network: nn.Module, rows: Rows) -> Tensor:
        """Rows hold `denoising_loss`'s tensors by its names."""
        assert isinstance(network, MedSegDiff)
        with autocast(rows["masks"].device, self.precision):
            return denoising_loss(network, self.diffusion, **rows, auxiliary_weight=self.auxiliary_weight)


class PatientRows:
    """Rows of each patient, drawn anew at each call.

    Args:
        cases: the training cases; a patient may have several.
        timesteps: T of the diffusion.
        self_conditioning: whether the network sees an estimate; half of the rows do, at random.
        device: where the rows go.
        entropy: what slices, augmentation, timesteps and noise are drawn from.

    Raises:
        UserError: there is no case.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        scheme: LabelScheme,
        training: TrainingConfig,
        policy: PrivacyPolicy,
        timesteps: int,
        self_conditioning: bool,
        device: torch.device | str = "cpu",
        entropy: Entropy | None = None,
    ) -> None:
        self.table = SliceTable(cases)
        self.scheme = scheme
        self.training = training
        self.policy = policy
        self.timesteps = timesteps
        self.self_conditioning = self_conditioning
        self.device = torch.device(device)
        self._entropy: Entropy = SystemEntropy() if entropy is None else entropy
        self._slices = self._by_patient(range(len(self.table)))
        self._marked = self._by_patient(self.table.foreground(scheme))
        self.patients = sorted(self._slices)

    def __len__(self) -> int:
        return len(self.patients)

    def rows(self, patient: int) -> Rows:
        """Patient number 0 .. len - 1: m K rows, by the names of `denoising_loss`'s arguments.

        images (R, C, S, S) float32; masks and noise (R, K, S, S) float32; t_B (R,) int64; with self-conditioning
        condition_B (R,) bool.
        """
        numbers = self._draw(self.patients[patient])
        generator = torch.Generator().manual_seed(int.from_bytes(self._entropy.take(8), "little") >> 1)
        raters = torch.rand(len(numbers), generator=generator).tolist()
        images, labels = augment(*self.table.read(numbers, raters), self.training.augment, generator)
        draws = self.policy.draws
        masks = self.scheme.encode(labels).repeat_interleave(draws, dim=0)
        rows = {"images": images.repeat_interleave(draws, dim=0), "masks": masks}
        rows["t_B"] = torch.randint(0, self.timesteps, (len(masks),), generator=generator)
        rows["noise"] = torch.randn(masks.shape, generator=generator)
        if self.self_conditioning:
            rows["condition_B"] = torch.rand(len(masks), generator=generator) < 0.5
        return {name: value.to(self.device) for name, value in rows.items()}

    def _draw(self, patient: str) -> list[int]:
        """m numbers of slices; `foreground_fraction` of them among the patient's own that hold a target, if any."""
        m, marked = self.policy.slices, self._marked.get(patient, [])
        from_marked = round(m * self.training.foreground_fraction) if marked else 0
        drawn = []
        for pool, count in ((self._slices[patient], m - from_marked), (marked, from_marked)):
            if count:
                drawn += [pool[i] for i in draw_slices(len(pool), count, self._entropy)]
        return drawn

    def _by_patient(self, numbers: Sequence[int]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number in numbers:
            case = self.table.cases[self.table.where[number][0]]
            found.setdefault(case.case.patient_id, []).append(number)
        return found
