"""Runs held against each other: verdicts side by side, where the first two part, how their layers differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gradwatch.errors import ConfigurationError, UnknownNameError
from gradwatch.reporters.binning import Array
from gradwatch.reporters.digest import Digest
from gradwatch.reporters.summary import Summary, summarize

if TYPE_CHECKING:
    from gradwatch.reader import RunReader

ALIGNMENTS = ("step", "time")
#: Relative difference from which two norms are not the same number: float32 has about seven digits.
SAME = 1e-5
#: Factor from which two norms are called apart.
APART = 2.0
_WINDOW = 10_000
COLUMNS = 400


@dataclass(frozen=True, slots=True)
class Parting:
    """Where two runs part.

    Args:
        step: The first step at which a norm differs by more than the tolerance.
        layer: The layer in which it differs most at that step; empty when the layers are equal but the steps end.
        values: The two norms there.
    """

    step: int
    layer: str
    values: tuple[float, float]


class Alignment:
    """Two or more runs, aligned.

    Args:
        runs: The runs; the first is what the others are held against.
        by: `step` or `time` (seconds since each run's first step).

    Raises:
        UnknownNameError: Another `by`.
    """

    def __init__(self, runs: Sequence[RunReader], *, by: str = "step") -> None:
        if by not in ALIGNMENTS:
            raise UnknownNameError.among("alignment", by, ALIGNMENTS)
        self.runs = tuple(runs)
        self.by = by

    @cached_property
    def summaries(self) -> tuple[Summary, ...]:
        """The summary of each run."""
        return tuple(summarize(run) for run in self.runs)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """A short name for each run, all different."""
        paths = [run.path for run in self.runs]
        names = [path.name for path in paths]
        if len(set(names)) < len(names):
            names = [f"{path.parent.name}/{path.name}" for path in paths]
        return (
            tuple(f"{i + 1}: {name}" for i, name in enumerate(names)) if len(set(names)) < len(names) else tuple(names)
        )

    def metric(self, name: str) -> pd.DataFrame:
        """A metric of all runs side by side; NaN where a run has no such step.

        Args:
            name: Such as `loss` or `global_norm`.

        Returns:
            Index step, or seconds since the start; one column per run.
        """
        columns = {}
        for label, run in zip(self.names, self.runs, strict=True):
            metrics = run.metrics()
            column = metrics[name] if name in metrics else pd.Series(np.nan, index=metrics.index)
            if self.by == "time" and len(metrics):
                column = column.set_axis((metrics["time"] - metrics["time"].iloc[0]).to_numpy())
            columns[label] = column[~column.index.duplicated()]
        frame = pd.DataFrame(columns).sort_index()
        frame.index.name = self.by
        return frame

    def first_difference(self, tolerance: float = SAME, *, other: int = 1) -> Parting | None:
        """The first step, and the layer there, at which a run's norms differ from the first run's.

        Args:
            tolerance: Relative difference that still counts as equal, >= 0.
            other: Place of the run that is held against the first.

        Returns:
            None when all their common steps are equal.
        """
        if not tolerance >= 0:
            raise ConfigurationError.of("tolerance", ">= 0", tolerance)
        for ours, theirs in self._windows(self.runs[other]):
            a, b = ours.to_numpy(np.float64), theirs.to_numpy(np.float64)
            with np.errstate(invalid="ignore"):
                scale = np.fmax(np.abs(a), np.abs(b))
                gap = np.where(scale > 0, np.abs(a - b) / scale, 0.0)
            gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.where(np.isnan(gap), np.inf, gap))
            differs = (gap > tolerance).any(axis=1)
            if differs.any():
                row = int(differs.argmax())
                column = int(gap[row].argmax())
                return Parting(
                    int(ours.index[row]), str(ours.columns[column]), (float(a[row, column]), float(b[row, column]))
                )
        return None

    def layers(self) -> pd.DataFrame:
        """How the layers of each run compare with those of the first.

        Returns:
            Index layer (those of the first run); per run its median norm, and from the second on the ratio of the
            medians to the first's.
        """
        medians = {}
        for label, digest in zip(self.names, self.digests, strict=True):
            with np.errstate(all="ignore"):
                mid = pd.DataFrame(digest.norms.mid, columns=list(digest.layers))
                medians[label] = mid.median()
        frame = pd.DataFrame(medians).dropna(how="all")
        order = [name for name in self.digests[0].layers if name in frame.index]
        frame = frame.loc[order]
        for label in self.names[1:]:
            frame[f"{label} / {self.names[0]}"] = frame[label] / frame[self.names[0]]
        frame.index.name = "layer"
        return frame

    @cached_property
    def digests(self) -> tuple[Digest, ...]:
        """Each run at the resolution of a picture."""
        return tuple(Digest.of(run, COLUMNS) for run in self.runs)

    def seconds(self, place: int) -> Array:
        """Seconds since the first step, for each bin of the run at this place."""
        time = self.runs[place].metrics()["time"]
        middle: Array = time.reindex(self.digests[place].first).to_numpy(np.float64)
        seconds: Array = middle - middle[0]
        return seconds

    def _windows(self, second: RunReader) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
        """The layer norms of the first run and another at common steps and layers, in pieces that fit into memory."""
        first = self.runs[0]
        if not len(first.steps) or not len(second.steps):
            return
        start, stop = max(first.steps[0], second.steps[0]), min(first.steps[-1], second.steps[-1]) + 1
        common = sorted({p.layer for p in first.info.parameters} & {p.layer for p in second.info.parameters})
        if not common:
            return
        for low in range(int(start), int(stop), _WINDOW):
            window = slice(low, min(low + _WINDOW, int(stop)))
            frames = [run.grad_norms(by="layer", steps=window)[common] for run in (first, second)]
            steps = frames[0].index.intersection(frames[1].index)
            yield frames[0].loc[steps], frames[1].loc[steps]
