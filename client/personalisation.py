"""Which weights of a model are common to all sites, and which a site keeps to itself.

    none             one model for all
    local_norms      normalisation stays local (FedBN, Li et al. 2021, arXiv 2102.07623; our norms are group norms)
    shared_encoder   all but the decoder is common, the decoder is each site's own (Arivazhagan et al. 2019, FedPer,
                     arXiv 1912.00818; Collins et al. 2021, FedRep, arXiv 2102.07078)
    ditto            beside the common model each site trains one of its own, pulled towards the common one (Li et al.
                     2021, arXiv 2012.04221, algorithm 1)
    fine_tune        a copy of the common model is trained on at the site (Yu et al. 2020, arXiv 2002.04758, section 3)

With the first two, weights that stay local begin as the run's first model has them. With the last two, all weights are
common, and the site's own model is a second one. What is local never leaves the site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from medsegdiff.network import MedSegDiff
from medsegdiff.strict import Strict

if TYPE_CHECKING:
    from client.contract import TrainTask

Kind = Literal["none", "local_norms", "shared_encoder", "ditto", "fine_tune"]

# The network's parts from the middle outwards: they turn features into a mask. All others are its encoder.
DECODER = ("up", "decoder_stages", "out_norm", "out", "auxiliary_head")
ENCODER = (
    "time_embedding",
    "image_stem",
    "mask_stem",
    "image_stages",
    "mask_stages",
    "image_down",
    "mask_down",
    "fusions",
    "middle",
)


CONTROL = "control/"


@dataclass(frozen=True)
class Personalisation(Strict):
    """What of a model is a site's own."""

    kind: Kind = "none"
    pull: float | None = None  # ditto: lambda, the weight of lambda / 2 ||v - w||^2; needed there, > 0
    steps: int | None = None  # of the second model: ditto, a round; fine_tune, each scoring. null: as a round has

    def __post_init__(self) -> None:
        if (self.kind == "ditto") != (self.pull is not None):
            raise ValueError(f"pull is {self.pull} with kind {self.kind}: ditto needs one above 0, the others none")
        if self.pull is not None and not 0 < self.pull < 1000:
            raise ValueError(f"pull must lie in (0, 1000), found {self.pull}")
        if self.steps is not None and self.kind not in ("ditto", "fine_tune"):
            raise ValueError(
                f"steps is {self.steps} with kind {self.kind}: ditto and fine_tune alone have a second model"
            )
        if self.steps is not None and not 1 <= self.steps <= 1_000_000:
            raise ValueError(f"steps must lie in 1..1000000, found {self.steps}")

    @property
    def splits(self) -> bool:
        """Whether some weights stay at the sites."""
        return self.kind in ("local_norms", "shared_encoder")

    @property
    def trains_a_second(self) -> bool:
        """Whether a site has a whole model of its own beside the common one."""
        return self.kind in ("ditto", "fine_tune")

    @property
    def keeps_state(self) -> bool:
        """Whether a site's own weights go on from round to round."""
        return self.splits or self.kind == "ditto"


def sent_shapes(task: TrainTask) -> dict[str, tuple[int, ...]]:
    """Name and shape of all that leaves a site after training, without allocating it: the changes of the common
    weights and, with control variates (client/control.py), of those, under the weights' names behind CONTROL."""
    shapes = common_shapes(task)
    return shapes | ({f"{CONTROL}{name}": shape for name, shape in shapes.items()} if task.control_variates else {})


def common_shapes(task: TrainTask) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that all sites share."""
    with torch.device("meta"):
        network = MedSegDiff(task.model)
    local = _local_names(network, task.personalisation.kind)
    return {name: tuple(value.shape) for name, value in network.state_dict().items() if name not in local}


def _local_names(network: MedSegDiff, kind: Kind) -> set[str]:
    if kind == "local_norms":
        norms = (nn.GroupNorm, nn.LayerNorm)
        modules = [(path, module) for path, module in network.named_modules() if isinstance(module, norms)]
        return {f"{path}.{name}" for path, module in modules for name, _ in module.named_parameters()}
    if kind == "shared_encoder":
        return {name for name in network.state_dict() if name.partition(".")[0] in DECODER}
    return set()
