"""A run at the resolution of a picture: as many columns as a screen shows, and no extreme lost between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from gradwatch.errors import UnknownNameError
from gradwatch.records import STAGES, Layers
from gradwatch.reporters.binning import (
    Array,
    Band,
    Bins,
    Index,
    coarse,
    layer_bands,
    metric_bands,
    rolled_bands,
    rolled_metrics,
)

if TYPE_CHECKING:
    import pandas as pd

    from gradwatch.reader import RunReader

#: Up to how many recorded norms a digest is made from the steps themselves; beyond it, from the rollups.
EXACT_VALUES = 30_000_000


@dataclass(frozen=True, slots=True)
class Digest:
    """The layers' norms and the metrics of a run in n bins of consecutive steps.

    Args:
        first: First step of each bin, int64 of shape (n,).
        last: Last step of each bin, int64 of shape (n,).
        layers: The l layer names in order of depth.
        norms: Gradient norm per layer, arrays of shape (n, l).
        nonfinite: Where a norm was NaN or infinite, bool of shape (n, l).
        metrics: Name to band, arrays of shape (n,).
        stages: The stages that occur, names of `records.STAGES`.
        exact: False when layer norms were put together from rollups of parameters: the extremes are then bounds.
    """

    first: Index
    last: Index
    layers: tuple[str, ...]
    norms: Band
    nonfinite: npt.NDArray[np.bool_]
    metrics: dict[str, Band]
    stages: tuple[str, ...] = ("pre_clip",)
    exact: bool = True

    def __len__(self) -> int:
        return len(self.first)

    @property
    def edges(self) -> Array:
        """Borders of the bins on the step axis, shape (n + 1,): halfway between neighbours."""
        if not len(self):
            return np.empty(0)
        inner = (self.last[:-1] + self.first[1:]) / 2
        return np.concatenate([[self.first[0] - 0.5], inner, [self.last[-1] + 0.5]])

    def metric(self, name: str) -> Band | None:
        """The band of a metric; None when it was never measured."""
        band = self.metrics.get(name)
        return None if band is None or np.isnan(band.mid).all() else band

    @classmethod
    def of(cls, run: RunReader, columns: int, *, steps: slice | None = None) -> Self:
        """Gather a run, or the `steps` of it, in at most `columns` bins of equally many recorded steps.

        Args:
            run: A run.
            columns: Upper limit of n.
            steps: From (included) and to (excluded) which step; the whole run by default.
        """
        layers = Layers(run.info.parameters)
        metrics = run.metrics(steps=steps)
        if metrics.empty:
            return cls._empty(layers)
        stages = tuple(s for s in STAGES if "stage" in metrics and (metrics["stage"] == s).any()) or STAGES[:1]
        thinned = steps is None and is_thinned(run, len(metrics))
        if thinned or len(metrics) * len(run.info.parameters) > EXACT_VALUES:
            return cls._rolled(run, layers, columns, steps=steps, stages=stages, metrics=None if thinned else metrics)
        taken = metrics.index.to_numpy(dtype=np.int64)
        starts = np.linspace(0, len(taken), min(columns, len(taken)), endpoint=False).astype(np.int64)
        bins = Bins(taken[starts], taken[np.append(starts[1:], len(taken)) - 1])
        norms, nonfinite = layer_bands(run, bins, layers, steps=steps)
        return cls(bins.first, bins.last, layers.names, norms, nonfinite, metric_bands(metrics, starts), stages)

    @classmethod
    def _rolled(
        cls, run: RunReader, layers: Layers, columns: int, *, steps: slice | None, stages: tuple[str, ...],
        metrics: pd.DataFrame | None,
    ) -> Self:  # fmt: skip
        """From the rollups; the metrics too where not every step is kept and `metrics` is therefore None."""
        begin, end = run.span or (0, 0)
        if steps is not None:
            begin, end = max(begin, steps.start or 0), end if steps.stop is None else min(end, steps.stop - 1)
        width = coarse(end - begin + 1, columns)
        rollup = run.rollup(width, steps=steps)
        first = np.maximum(rollup.start, begin).astype(np.int64)
        last = np.minimum(rollup.start + width - 1, end).astype(np.int64)
        norms, nonfinite = rolled_bands(rollup, layers)
        if metrics is None:
            bands = rolled_metrics(run.rollup(width, "metric", steps=steps), rollup.start)
        else:
            bands = metric_bands(metrics, np.searchsorted(metrics.index.to_numpy(), first).astype(np.int64))
        exact = len(rollup.names) == len(layers)
        return cls(first, last, layers.names, norms, nonfinite, bands, stages, exact)

    @classmethod
    def _empty(cls, layers: Layers) -> Self:
        nothing = np.empty((0, len(layers)))
        none = np.empty(0, np.int64)
        return cls(none, none, layers.names, Band(nothing, nothing, nothing), nothing.astype(bool), {})

    def only(self, layers: str | Sequence[str] | None) -> Digest:
        """The digest of these layers.

        Args:
            layers: A name, a pattern such as `encoder.*`, or a list of them; None for all.

        Raises:
            UnknownNameError: None of the layers is meant.
        """
        if layers is None:
            return self
        wanted = [layers] if isinstance(layers, str) else list(layers)
        kept = [i for i, name in enumerate(self.layers) if name in wanted or any(fnmatchcase(name, w) for w in wanted)]
        if not kept:
            raise UnknownNameError.among("layer", layers, self.layers)
        norms = Band(*(part[:, kept] for part in (self.norms.low, self.norms.mid, self.norms.high)))
        names = tuple(self.layers[i] for i in kept)
        return dataclasses.replace(self, layers=names, norms=norms, nonfinite=self.nonfinite[:, kept])


def is_thinned(run: RunReader, kept: int) -> bool:
    """Whether a run was compacted so that of some steps only the rollups remain; `kept` steps are there in full."""
    first, last = run.span or (0, 0)
    if last - first + 1 <= kept:
        return False
    counts = run.rollup(coarse(last - first + 1, 100), "metric").count
    return bool(counts.max(axis=1, initial=0).sum() > kept)
