"""Many steps into few bins: the smallest, middle and largest value of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from gradwatch.records import NOT_MEASURED, Layers, StepBatch

if TYPE_CHECKING:
    from gradwatch.reader import RunReader
    from gradwatch.storage.rollups import Rollup

Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

#: How far from the median (as a factor) a bin's extreme must lie to be shown in place of the median.
STRIKING = 8.0
_SHOWN_METRICS = ("loss", "lr", "lr_factor", "global_norm", "clip_coefficient", "skipped")
#: What is made of two metrics: the global norm after clipping, the learning rate with gradwatch's factor.
_PRODUCTS = {"post_clip_norm": ("global_norm", "clip_coefficient"), "own_lr": ("lr", "lr_factor")}
_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Bins:
    """Stretches of consecutive steps.

    Args:
        first: First step of each, shape (n,).
        last: Last step of each, shape (n,).
    """

    first: Index
    last: Index

    def __len__(self) -> int:
        return len(self.first)

    def of(self, steps: npt.NDArray[Any]) -> Index:
        """The bin of each step; -1 for steps before the first bin, between two, and after the last."""
        place = np.searchsorted(self.last, steps)
        inside = place < len(self)
        inside[inside] = self.first[place[inside]] <= steps[inside]
        return np.where(inside, place, -1)


@dataclass(frozen=True, slots=True)
class Band:
    """The smallest, middle and largest finite value in each bin; NaN where there is none.

    Args:
        low: Shape (n,) or (n, l).
        mid: Same shape; the lower one of two middle values, so that it was really measured.
        high: Same shape.
    """

    low: Array
    mid: Array
    high: Array

    @classmethod
    def blank(cls, *shape: int) -> Band:
        """NaN everywhere."""
        return cls(np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan))

    def fill(self, place: int, rows: Array) -> None:
        """Put in the values of one bin: `rows` along the first axis; what is not finite does not count."""
        ordered = np.sort(np.where(np.isfinite(rows), rows, np.nan), axis=0)
        count = np.isfinite(ordered).sum(axis=0)
        for part, rank in ((self.low, np.zeros_like(count)), (self.mid, (count - 1) // 2), (self.high, count - 1)):
            part[place] = np.take_along_axis(ordered, np.maximum(rank, 0)[None], axis=0)[0]

    def is_striking(self) -> Mask:
        """Where an extreme lies far from the median."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return (self.high / self.mid >= STRIKING) | (self.mid / self.low >= STRIKING)

    def striking(self) -> Array:
        """One value per bin: the median, or the extreme where it lies far from the median."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            up, down = self.high / self.mid, self.mid / self.low
            shown = np.where(up >= STRIKING, self.high, self.mid)
            return np.where((down >= STRIKING) & (down > up), self.low, shown)


def metric_bands(metrics: pd.DataFrame, starts: Index) -> dict[str, Band]:
    """Bands of the metrics that are shown; `starts` are the row numbers at which bins begin.

    `post_clip_norm` (global norm times clip coefficient) and `own_lr` (learning rate times gradwatch's factor) are
    added where they differ from what they are made of.
    """
    values = {name: metrics[name].to_numpy(np.float64, na_value=np.nan) for name in _SHOWN_METRICS if name in metrics}
    for name, (base, factor) in _PRODUCTS.items():
        if base in values and factor in values and bool((values[factor] < 1).any()):
            values[name] = values[base] * np.where(np.isfinite(values[factor]), values[factor], 1.0)
    bands = {}
    for name, column in values.items():
        bands[name] = Band.blank(len(starts))
        for place, rows in enumerate(np.split(column, starts[1:])):
            bands[name].fill(place, rows)
    return bands


def rolled_metrics(rollup: Rollup, starts: npt.NDArray[Any]) -> dict[str, Band]:
    """Bands of the metrics from their rollup, at the bins that begin at `starts`; means in place of medians."""
    place = np.searchsorted(rollup.start, starts)
    column = {name: i for i, name in enumerate(rollup.names)}
    bands = {
        name: Band(*(part[place, column[name]] for part in (rollup.minimum, rollup.mean, rollup.maximum)))
        for name in _SHOWN_METRICS
        if name in column
    }
    for name, (base, factor) in _PRODUCTS.items():
        if base in bands and factor in bands and bool((bands[factor].low < 1).any()):
            middle = bands[base].mid * np.where(np.isnan(bands[factor].mid), 1.0, bands[factor].mid)
            bands[name] = Band(middle, middle, middle)
    return bands


def layer_bands(run: RunReader, bins: Bins, layers: Layers, *, steps: slice | None = None) -> tuple[Band, Mask]:
    """Bands of the layers' gradient norms from the steps themselves, and where a norm was not finite."""
    norms, nonfinite = Band.blank(len(bins), len(layers)), np.zeros((len(bins), len(layers)), dtype=bool)
    for place, rows in _by_bin(run, bins, layers, steps):
        norms.fill(place, rows)
        nonfinite[place] = (np.isnan(rows) | (rows == np.inf)).any(axis=0)
    return norms, nonfinite


def rolled_bands(rollup: Rollup, layers: Layers) -> tuple[Band, Mask]:
    """The same from a rollup of the parameters; a layer of several tensors is bounded by their extremes."""
    low, mid, high = (
        layers.norms(np.where(np.isnan(part), NOT_MEASURED, part))
        for part in (rollup.minimum, rollup.mean, rollup.maximum)
    )
    nonfinite = np.zeros(low.shape, dtype=bool)
    for column, layer in enumerate(layers.of_parameter):
        nonfinite[:, layer] |= rollup.nonfinite[:, column] > 0
    low, mid, high = (np.where(part == NOT_MEASURED, np.nan, part) for part in (low, mid, high))
    return Band(low, mid, high), nonfinite


def coarse(n: int, columns: int) -> int:
    """Steps in a bin so that n steps fill at most about `columns`: a digit and zeros, so that rollups serve it.

    Examples:
        >>> coarse(1_000_000, 300), coarse(90, 300)
        (4000, 1)
    """
    least = max(1, -(-n // columns))
    unit: int = 10 ** (len(str(least)) - 1)
    return int(-(-least // unit) * unit)


def _by_bin(run: RunReader, bins: Bins, layers: Layers, steps: slice | None) -> Iterator[tuple[int, Array]]:
    """The layers' norms bin by bin; batches are cut and joined as needed."""
    held: list[Array] = []
    current = -1
    for batch in run.batches(_BATCH, (), steps=steps):
        rows, places = _layer_rows(batch, layers), bins.of(batch.step)
        borders = np.flatnonzero(np.diff(places, prepend=places[:1])).tolist()
        for start, stop in zip([0, *borders], [*borders, len(places)], strict=True):
            if start == stop:
                continue
            if places[start] != current:
                if held and current >= 0:
                    yield current, np.concatenate(held)
                held, current = [], int(places[start])
            held.append(rows[start:stop])
    if held and current >= 0:
        yield current, np.concatenate(held)


def _layer_rows(batch: StepBatch, layers: Layers) -> Array:
    """Norms per layer of the whole run; layers that a batch does not know yet are NaN that is not counted: -inf."""
    own = Layers(batch.parameters)
    norms = own.norms(batch.grad_norm)
    if own.names == layers.names:
        return norms
    place = {name: i for i, name in enumerate(layers.names)}
    known = [(i, place[name]) for i, name in enumerate(own.names) if name in place]
    wide = np.full((len(norms), len(layers)), -np.inf)
    wide[:, [p for _, p in known]] = norms[:, [i for i, _ in known]]
    return wide
