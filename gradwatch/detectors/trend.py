"""Sustained growth and decay of every layer: slopes of the log norm over a window, and how straight they are."""

from __future__ import annotations

import math

import numpy as np

from gradwatch.detectors.memory import FloatArray, Kept, PerLayer, Remembers

#: Steps in the window; it is summarised by means of `EVERY` steps and looked at as often.
WINDOW = 48
EVERY = 4
BLOCKS = WINDOW // EVERY
#: With fewer layers there is no common course that one layer could leave.
LEAST_LAYERS = 3


def _regression() -> tuple[FloatArray, float]:
    place = (np.arange(BLOCKS) - (BLOCKS - 1) / 2) * EVERY
    return place / (place**2).sum(), float((place**2).sum())


_SLOPE, _SPREAD = _regression()


class Trend(Remembers):
    """Slopes of the layers' log norms over the last 48 steps, from means of four steps, renewed every fourth.

    What all layers do together (learning-rate schedules, convergence, a new curriculum) is subtracted as the median
    over the layers, where there are three or more.

    Attributes:
        slope: Nats per step, shape (l,); NaN until a window is full.
        highest, lowest: The steepest slopes up and down; 0 where there is none.
        error: Standard error of the slope from the residuals, shape (l,).
        early, late: Change over the first and the second half of the window, shape (l,), nats.
        course: The last medians over the layers.
        common: Median slope of the layers, nats per step; 0 with fewer than three.
        fresh: Whether this step renewed them.
    """

    count = Kept(0)
    sum = PerLayer(0.0)
    blocks = PerLayer(math.nan, rows=BLOCKS)
    course = Kept[list[float]]([])
    slope = PerLayer(math.nan)
    error = PerLayer(math.nan)
    early = PerLayer(math.nan)
    late = PerLayer(math.nan)
    highest = Kept(0.0)
    lowest = Kept(0.0)
    common = Kept(0.0)
    fresh = Kept(False)

    def add(self, logs: FloatArray) -> None:
        """Take the log norms of a step."""
        self.sum += logs
        self.count += 1
        self.fresh = self.count % EVERY == 0
        if not self.fresh:
            return
        block = self.sum / EVERY
        middle = median(block) if len(block) >= LEAST_LAYERS else 0.0
        self.course = [*self.course[1 - BLOCKS :], middle]
        self.blocks[:-1] = self.blocks[1:]
        self.blocks[-1] = block - middle
        self.sum[:] = 0.0
        if self.count >= WINDOW:
            self._fit()

    def _fit(self) -> None:
        blocks = self.blocks
        self.common = float(_SLOPE @ np.array(self.course))
        self.slope = _SLOPE @ blocks
        self.highest = float(np.fmax.reduce(self.slope, initial=0.0))
        self.lowest = float(np.fmin.reduce(self.slope, initial=0.0))
        centred = blocks - np.add.reduce(blocks, axis=0) / BLOCKS
        residual = np.einsum("ij,ij->j", centred, centred) - _SPREAD * self.slope**2
        self.error = np.sqrt(np.maximum(residual, 1e-12) / ((BLOCKS - 2) * _SPREAD))
        middle = (blocks[BLOCKS // 2 - 1] + blocks[BLOCKS // 2]) / 2
        self.early = middle - (blocks[0] + blocks[1]) / 2
        self.late = (blocks[-2] + blocks[-1]) / 2 - middle


def median(block: FloatArray) -> float:
    """The median of what is known; 0 where nothing is."""
    # numpy's own function takes ten times as long over few numbers.
    ordered = np.sort(block)  # NaN last
    count = len(ordered)
    if math.isnan(ordered[-1]):
        count -= int(np.isnan(ordered).sum())
    if not count:
        return 0.0
    return float(ordered[(count - 1) // 2] + ordered[count // 2]) / 2
