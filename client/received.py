"""The model that a site scored last, kept so that it need not come a second time to be trained.

A round ends with a model that every site scores; the next round trains that very model. The server sends it once and
then names it by its hash. It lies on the disk, for a runner may be started anew in between, and is read by its hash:
what is damaged or gone is answered with "model-missing", and the server sends it again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from client.site import Site
from medsegdiff.errors import UserError
from medsegdiff.files import FOLDER_NAME, write_atomic
from medsegdiff.weights import hash_weights, read_tensors

log = logging.getLogger("medsegfed.site")

FOLDER = "received"  # beside site.yaml, or beside the folders of a world's virtual sites, which share it
MOST_RUNS = 3  # whose models are kept: one that ended early says no goodbye


class Received:
    """One model a run: `folder`/RUN/HASH.safetensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, site: Site) -> Received:
        """Of a site: its own; virtual sites of one world share one, for they share a disk."""
        folder = site.path.parent
        return cls((folder if site.config.keys is not None else folder.parent) / FOLDER)

    def keep(self, run: str, model_hash: str, weights: Mapping[str, Tensor]) -> None:
        """Keep a model in place of the run's last one. A disk that refuses is no fault: the model then comes again."""
        path = self._path(run, model_hash)
        if path is None or path.exists():
            return
        try:
            write_atomic(path, save({name: value.contiguous() for name, value in weights.items()}))
        except UserError as error:
            log.warning("the model is not kept, and has to be sent again: %s", error)
        for other in path.parent.glob("*.safetensors"):
            if other != path:
                other.unlink(missing_ok=True)
        self._let_go()

    def find(self, run: str, model_hash: str) -> dict[str, Tensor] | None:
        """The model of this hash, bit for bit; None where it is not there or was damaged."""
        path = self._path(run, model_hash)
        if path is None or not path.exists():
            return None
        try:
            weights, _ = read_tensors(path)
        except UserError as error:
            log.warning("the kept model cannot be read, and is asked for again: %s", error)
            weights = {}
        if hash_weights(weights) == model_hash:
            return weights
        path.unlink(missing_ok=True)
        return None

    def forget(self, run: str) -> None:
        """The run is over."""
        if FOLDER_NAME.fullmatch(run):
            shutil.rmtree(self.folder / run, ignore_errors=True)

    def _path(self, run: str, model_hash: str) -> Path | None:
        return self.folder / run / f"{model_hash}.safetensors" if FOLDER_NAME.fullmatch(run) else None

    def _let_go(self) -> None:
        """Of the models of all but the last runs."""
        runs = sorted((path for path in self.folder.glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
        for path in runs[:-MOST_RUNS]:
            shutil.rmtree(path, ignore_errors=True)
