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

    What all layers do together (learning-rate schedules, convergence, a new curriculum) is subtracted as the median over the
    layers, where there are three or more.

    Attributes:
        slope: Nats per step, shape (l,); NaN until a window is full.
        error: Standard error of the slope from the residuals, shape (l,).
        early, late: Change over the first and the second half of the window, shape (l,), nats.
        common: Median slope of the layers, nats per step; 0 with fewer than three.
        fresh: Whether this step renewed them.
    """

    count = Kept(0)
    sum = PerLayer(0.0)
    blocks = PerLayer(math.nan, rows=BLOCKS)
    slope = PerLayer(math.nan)
    error = PerLayer(math.nan)
    early = PerLayer(math.nan)
    late = PerLayer(math.nan)
    common = Kept(0.0)
    fresh = Kept(False)

    def add(self, logs: FloatArray) -> None:
        """Take the log norms of a step."""
        self.sum += logs
        self.count += 1
        self.fresh = self.count % EVERY == 0
        if not self.fresh:
            return
        self.blocks[:-1] = self.blocks[1:]
        self.blocks[-1] = self.sum / EVERY
        self.sum[:] = 0.0
        if self.count >= WINDOW:
            self._fit()

    def _fit(self) -> None:
        blocks = self.blocks
        self.common = 0.0
        if blocks.shape[1] >= LEAST_LAYERS:
            known = ~np.isnan(blocks).any(axis=0)
            course = np.median(blocks if known.all() else blocks[:, known], axis=1) if known.any() else np.zeros(BLOCKS)
            self.common = float(_SLOPE @ course)
            blocks = blocks - course[:, None]
        self.slope = _SLOPE @ blocks
        centred = blocks - blocks.mean(axis=0)
        residual = np.einsum("ij,ij->j", centred, centred) - _SPREAD * self.slope**2
        self.error = np.sqrt(np.maximum(residual, 1e-12) / ((BLOCKS - 2) * _SPREAD))
        middle = blocks[BLOCKS // 2 - 1 : BLOCKS // 2 + 1].mean(axis=0)
        self.early = middle - blocks[:2].mean(axis=0)
        self.late = blocks[-2:].mean(axis=0) - middle
