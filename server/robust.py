"""Rules that bear some sites' arbitrary updates, where a mean bears none.

    norm_clip      weighted mean of updates cut to a norm                  Sun et al. 2019, section 4
    median         of each weight                                          Yin et al. 2018, definition 1
    trimmed_mean   of each weight, without the f lowest and f highest      Yin et al. 2018, definition 2
    multi_krum     mean of the n - f updates with the nearest neighbours   Blanchard et al. 2017, section 4
    centred_clip   iterated clipping around the last round's update        Karimireddy et al. 2021, algorithm 2

All need every update of a round at once. They are written to files of the run folder as they come, and read back in
blocks of weights; the files go when the round ends. All but norm_clip count each site alike: by patients, one large
site would be a majority of its own.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medsegdiff.errors import UserError
from server.aggregation import AggregationOverflow, FixedPointSum
from server.config import StrategyConfig

Floats = NDArray[np.float64]
BLOCK_VALUES = 2**20  # of all sites together, read at once: 8 MiB in float64
CENTRE = "centre"  # part of the server's memory: what centred_clip begins from
SPILL = "spilled"  # in the run folder, while a round is under way


class StreamedMean:
    """The mean of a round's updates, by patients or each alike; keeps none of them."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], weighting: str) -> None:
        self._sum = FixedPointSum(shapes)
        self._alike = weighting == "equal"

    def add(self, site: str, delta: Mapping[str, Tensor], n: int, share: float = 1.0) -> None:
        """Fold one update, or with `share` a part of its weight. Raises AggregationOverflow as `FixedPointSum.add`."""
        self._sum.add(delta, 1 if self._alike else n, share)

    def result(self, centre: Mapping[str, Tensor], known: int = 0) -> dict[str, Tensor]:
        """The mean update, float32."""
        return self._sum.take_mean()

    def close(self) -> None:
        """Nothing lies anywhere."""


class SpilledRule:
    """One of the rules above over the updates of a round.

    Args:
        folder: where the updates lie until `close`, 4 bytes a weight and site; what an earlier, killed process left in
            it is removed.

    Guarantees:
        The order of `add` changes no bit of the result: sites are read in the order of their names.
        Memory: at most 6 * BLOCK_VALUES * 8 bytes (48 MiB), and the result (4 bytes a weight); centred_clip 12 more.
    """

    def __init__(self, config: StrategyConfig, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
        self.config, self.folder = config, folder
        self.shapes = dict(shapes)
        self.size = sum(math.prod(shape) for shape in shapes.values())
        self._weights: dict[str, float] = {}  # site -> its weight
        self._files: dict[str, Path] = {}
        shutil.rmtree(folder, ignore_errors=True)

    def add(self, site: str, delta: Mapping[str, Tensor], n: int, share: float = 1.0) -> None:
        """Write one update down.

        Args:
            share: in (0, 1]: how much of its weight counts; norm_clip alone takes parts.

        Raises:
            AggregationOverflow: a weight below 1, or a second update of the site.
            UserError: the disk refuses.
        """
        if n < 1 or site in self._files:
            raise AggregationOverflow(f"weight {n} is below 1" if n < 1 else "a second update in the round")
        path = self.folder / f"{len(self._files):06d}.f32"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as handle:  # scratch: worth nothing after a crash, so it is not flushed
                for name in self.shapes:
                    handle.write(delta[name].contiguous().reshape(-1).numpy().astype("<f4", copy=False).data)
        except OSError as error:
            raise UserError(
                f"{path}: an update could not be kept until the round ends ({error.strerror}); {4 * self.size:,} bytes "
                "were due. Free space, then go on."
            ) from error
        self._files[site] = path
        self._weights[site] = share * (1 if self.config.weighting == "equal" else n)

    def result(self, centre: Mapping[str, Tensor], known: int = 0) -> dict[str, Tensor]:
        """The rule's value, float32.

        Args:
            centre: the last round's result, where centred_clip begins; empty before the first.
            known: malicious sites that were found out and have no update here; so many less are to be borne.

        Raises:
            ValueError: fewer updates than the rule can work with (`StrategyConfig.least_updates`).
        """
        due, f = self.config.least_updates(known), self.config.left(known)
        if len(self._files) < due:
            raise ValueError(f"{self.config.rule}: {len(self._files)} updates, {due} are needed")
        rules: dict[str, Callable[[], NDArray[np.float32]]] = {
            "median": self._median,
            "trimmed_mean": lambda: self._trimmed_mean(f),
            "multi_krum": lambda: self._multi_krum(f),
            "norm_clip": self._norm_clip,
            "centred_clip": lambda: self._centred_clip(centre),
        }
        flat = rules[self.config.rule]()
        # -0.0 becomes 0.0: which of the two a sort puts in the middle is no property of the sites.
        flat += np.float32(0)
        found, begin = {}, 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            found[name] = torch.from_numpy(flat[begin : begin + size].reshape(shape))
            begin += size
        return found

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- rules --------------------------------------------------------------------------------------------------------

    def _median(self) -> NDArray[np.float32]:
        found = np.empty(self.size, np.float32)
        for part, rows in self._blocks():
            rows.sort(axis=0)
            middle, odd = divmod(len(rows), 2)
            found[part] = rows[middle] if odd else (rows[middle - 1] + rows[middle]) / 2
        return found

    def _trimmed_mean(self, f: int) -> NDArray[np.float32]:
        found = np.empty(self.size, np.float32)
        for part, rows in self._blocks():
            rows.sort(axis=0)
            found[part] = rows[f : len(rows) - f].mean(axis=0)
        return found

    def _multi_krum(self, f: int) -> NDArray[np.float32]:
        chosen = np.zeros(len(self._files))
        chosen[krum_choice(self._distances(), f)] = 1
        return self._combine(chosen / chosen.sum())

    def _norm_clip(self) -> NDArray[np.float32]:
        norms = self._norms(None)
        weights = np.array([self._weights[site] for site in self._sites()], np.float64)
        return self._combine(weights / weights.sum() * clip_factors(norms, self.config.clip_norm))

    def _centred_clip(self, centre: Mapping[str, Tensor]) -> NDArray[np.float32]:
        v = np.zeros(self.size)
        if centre:
            v[:] = np.concatenate([centre[name].reshape(-1).numpy() for name in self.shapes])
        for _ in range(self.config.clip_iterations):
            factors = clip_factors(self._norms(v), self.config.clip_norm)
            for part, rows in self._blocks():
                v[part] += (factors[:, None] * (rows - v[part])).mean(axis=0)
        return v.astype(np.float32)

    # --- passes over the files ----------------------------------------------------------------------------------------

    def _sites(self) -> list[str]:
        return sorted(self._files)

    def _blocks(self) -> Iterator[tuple[slice, Floats]]:
        """Parts of the weights: (sites, values) in float64, sites in the order of their names; may be written to."""
        files = [self._files[site] for site in self._sites()]
        width = max(1, BLOCK_VALUES // max(1, len(files)))
        for begin in range(0, self.size, width):
            part = slice(begin, min(begin + width, self.size))
            # Read, not mapped: pages of a mapping would count as the process's own, up to all updates together.
            read = [np.fromfile(file, "<f4", part.stop - begin, offset=4 * begin) for file in files]
            yield part, np.stack(read).astype(np.float64)

    def _norms(self, centre: Floats | None) -> Floats:
        """2-norm of every update, or of its distance to `centre`."""
        squares = np.zeros(len(self._files))
        for part, rows in self._blocks():
            squares += np.square(rows if centre is None else rows - centre[part]).sum(axis=1)
        return np.asarray(np.sqrt(squares))

    def _distances(self) -> Floats:
        """Squared distances between all updates, (sites, sites)."""
        count = len(self._files)
        squares = np.zeros((count, count))
        for _, rows in self._blocks():
            for i in range(count):  # differences, not the Gram matrix: that loses the digits of near updates
                squares[i] += np.square(rows - rows[i]).sum(axis=1)
        return squares

    def _combine(self, weights: Floats) -> NDArray[np.float32]:
        found = np.empty(self.size, np.float32)
        for part, rows in self._blocks():
            found[part] = (weights[:, None] * rows).sum(axis=0)
        return found


Aggregate = StreamedMean | SpilledRule


def open_aggregate(config: StrategyConfig, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> Aggregate:
    """What takes a round's updates; `folder` is used by the rules that keep them."""
    if config.rule == "mean":
        return StreamedMean(shapes, config.weighting or ("equal" if config.name == "scaffold" else "examples"))
    return SpilledRule(config, shapes, folder)


def clip_factors(norms: Floats, limit: float | None) -> Floats:
    """min(1, limit / norm) a site; without a limit, the median of the norms is one."""
    most = float(np.median(norms)) if limit is None else limit
    return np.where(norms > most, most / np.maximum(norms, np.finfo(np.float64).tiny), 1.0)


def krum_choice(squares: Floats, f: int) -> list[int]:
    """Indices of the n - f updates whose n - f - 2 nearest neighbours are nearest; the first of equals.

    Args:
        squares: squared distances, (n, n).
    """
    n = len(squares)
    others = [np.sort(np.delete(squares[i], i))[: n - f - 2].sum() for i in range(n)]
    return sorted(range(n), key=lambda i: (others[i], i))[: n - f]
