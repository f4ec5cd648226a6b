"""Rollups: what happened in each 10, 100, 1,000, ... steps, so that a long run opens at once and no extreme is lost.

One file per sealed segment, a table with one row per resolution, statistic, name and bin; bins begin at multiples of
the resolution, so those that two segments share are put together when read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradwatch.records import NOT_MEASURED, Ints

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

#: The pseudo statistic under which the metrics are rolled up.
METRIC = "metric"
#: Statistics that span orders of magnitude: their mean is the geometric one.
GEOMETRIC = frozenset({"grad_norm", "weight_norm", "update_ratio", "grad_max", "activation_std", "output_grad_norm"})
#: A resolution is written when its bins hold so many samples on average; a finer one would outweigh the record.
LEAST_SAMPLES = 5


@dataclass(frozen=True, slots=True)
class Rollup:
    """A statistic in n bins of consecutive steps, for c parameters, modules or metrics.

    Args:
        statistic: Its name; `metric` for the metrics.
        resolution: Steps in a bin.
        names: The c columns.
        start: First step of each bin, a multiple of the resolution; int64 of shape (n,), ascending. Bins without any
            recorded step are absent.
        count: How many values were measured; int64 of shape (n, c).
        nonfinite: How many of them were NaN or infinite; int64 of shape (n, c).
        minimum: Smallest finite value, NaN where there is none; float64 of shape (n, c).
        maximum: Largest finite value.
        mean: Of the finite values; for norms and ratios the geometric mean of the positive ones, to 1e-3 or better.
    """

    statistic: str
    resolution: int
    names: tuple[str, ...]
    start: Ints
    count: Counts
    nonfinite: Counts
    minimum: Array
    maximum: Array
    mean: Array

    def __len__(self) -> int:
        return len(self.start)

    def bins(self, low: int, high: int) -> Rollup:
        """The bins from place `low` to before `high`."""
        fields = ("start", "count", "nonfinite", "minimum", "maximum", "mean")
        return dataclasses.replace(self, **{field: getattr(self, field)[low:high] for field in fields})


def roll_up(values: npt.NDArray[Any], steps: Ints, resolution: int, *, statistic: str, names: Sequence[str]) -> Rollup:
    """Roll up samples.

    Args:
        values: Shape (k, c); `NOT_MEASURED` where absent.
        steps: The steps of the samples, shape (k,), ascending.
        resolution: Steps in a bin.
        statistic: Decides which mean is taken.
        names: The c columns.
    """
    bins = steps // resolution
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    if not len(starts):
        return empty(statistic, resolution, names)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        wide = np.asarray(values, np.float64)
        measured = wide != NOT_MEASURED
        finite = np.isfinite(wide)
        count = np.add.reduceat(measured, starts, axis=0, dtype=np.int64)
        nonfinite = count - np.add.reduceat(finite, starts, axis=0, dtype=np.int64)
        known = np.where(finite, wide, np.nan)
        return Rollup(
            statistic,
            resolution,
            tuple(names),
            bins[starts] * resolution,
            count,
            nonfinite,
            np.fmin.reduceat(known, starts, axis=0),
            np.fmax.reduceat(known, starts, axis=0),
            _mean(known, starts, geometric=statistic in GEOMETRIC),
        )


def _mean(known: Array, starts: Ints, *, geometric: bool) -> Array:
    """The mean of what is not NaN."""
    counted = known > 0 if geometric else ~np.isnan(known)
    terms = np.where(counted, np.log(known) if geometric else known, 0.0)
    total = np.add.reduceat(terms, starts, axis=0)
    n = np.add.reduceat(counted, starts, axis=0, dtype=np.int64)
    if not geometric:
        return np.where(n > 0, total / n, np.nan)
    only_zeros = (n == 0) & (np.fmax.reduceat(known, starts, axis=0) == 0)
    return np.where(n > 0, np.exp(total / n), np.where(only_zeros, 0.0, np.nan))


def empty(statistic: str, resolution: int, names: Sequence[str]) -> Rollup:
    """A rollup without bins."""
    floats, counts = np.empty((0, len(names))), np.empty((0, len(names)), np.int64)
    return Rollup(statistic, resolution, tuple(names), np.empty(0, np.int64), counts, counts, floats, floats, floats)


def coarser(rollup: Rollup, resolution: int) -> Rollup:
    """The same at a resolution that is a multiple of the present one; also puts bins of the same start together.

    Exact but for the geometric mean of bins that hold zeros, which weighs them as if they did not.
    """
    bins = rollup.start // resolution
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    if not len(starts) or (len(starts) == len(bins) and resolution == rollup.resolution):
        return rollup
    geometric = rollup.statistic in GEOMETRIC
    with np.errstate(invalid="ignore", divide="ignore"):
        weight = np.where(np.isnan(rollup.mean), 0, rollup.count - rollup.nonfinite).astype(np.float64)
        if geometric:
            weight[rollup.mean == 0] = 0
        terms = np.where(weight > 0, np.log(rollup.mean) if geometric else rollup.mean, 0.0) * weight
        total, n = np.add.reduceat(terms, starts, axis=0), np.add.reduceat(weight, starts, axis=0)
        maximum = np.fmax.reduceat(rollup.maximum, starts, axis=0)
        mean = np.where(n > 0, np.exp(total / n) if geometric else total / n, np.where(maximum == 0, 0.0, np.nan))
    return Rollup(
        rollup.statistic,
        resolution,
        rollup.names,
        bins[starts] * resolution,
        np.add.reduceat(rollup.count, starts, axis=0),
        np.add.reduceat(rollup.nonfinite, starts, axis=0),
        np.fmin.reduceat(rollup.minimum, starts, axis=0),
        maximum,
        mean,
    )


def combine(parts: Iterable[Rollup], names: Sequence[str], *, statistic: str, resolution: int) -> Rollup:
    """Rollups of the segments of a run, in the order of their steps, as one with the columns `names`."""
    parts = [_with_columns(part, names) for part in parts if len(part)]
    if not parts:
        return empty(statistic, resolution, names)
    fields = ("start", "count", "nonfinite", "minimum", "maximum", "mean")
    joined = {field: np.concatenate([getattr(part, field) for part in parts]) for field in fields}
    if (np.diff(joined["start"]) < 0).any():
        order = np.argsort(joined["start"], kind="stable")
        joined = {field: values[order] for field, values in joined.items()}
    return coarser(Rollup(statistic, resolution, tuple(names), **joined), resolution)


def _with_columns(part: Rollup, names: Sequence[str]) -> Rollup:
    if part.names == tuple(names):
        return part
    place = {name: i for i, name in enumerate(part.names)}
    there = [i for i, name in enumerate(names) if name in place]
    source = [place[names[i]] for i in there]
    fields: dict[str, Any] = {}
    for field, blank in (("count", 0), ("nonfinite", 0), ("minimum", np.nan), ("maximum", np.nan), ("mean", np.nan)):
        values = getattr(part, field)
        fields[field] = np.full((len(part), len(names)), blank, values.dtype)
        fields[field][:, there] = values[:, source]
    return Rollup(part.statistic, part.resolution, tuple(names), part.start, **fields)
