"""The profile of gradient norms over depth, from input to output."""

from __future__ import annotations

import math

import numpy as np

from gradwatch.detectors.base import RunContext
from gradwatch.detectors.memory import FloatArray, Kept, PerLayer, Remembers

#: The profile is looked at every step at first, when it shows the initialisation, then at every fifth.
OPENING = 20
EVERY = 5


class DepthProfile(Remembers):
    """A straight line through the log norms over the layers' places in depth, and how far each is below a deeper one.

    Attributes:
        height: Running mean of the log norms over about five steps, shape (l,).
        gap: How far a layer is below the largest of the layers after it, nats, shape (l,); `deepest` is its maximum.
        slope: Of the line, nats per layer: positive where gradients shrink towards the input, negative where they grow.
        fit: Its share of the variance over depth (R squared).
        fresh: Whether this step renewed them.
    """

    height = PerLayer(math.nan)
    seen = Kept(0)
    gap = PerLayer(0.0)
    deepest = Kept(0.0)
    slope = Kept(0.0)
    fit = Kept(0.0)
    fresh = Kept(False)

    def prepare(self, context: RunContext) -> None:
        """See `Remembers.prepare`."""
        self._place = _centred(len(context.layers))

    @property
    def drop(self) -> float:
        """How far the line falls from the output to the input, nats."""
        return self.slope * (len(self._place) - 1)

    def add(self, logs: FloatArray, clean: bool) -> None:
        """Take the log norms of a step."""
        self.seen += 1
        weight = max(0.2, 1 / self.seen)
        if clean and self.seen > 1:
            self.height += weight * (logs - self.height)
        else:
            height = np.where(np.isnan(self.height), logs, self.height + weight * (logs - self.height))
            self.height = np.where(np.isnan(logs), self.height, height)
        self.fresh = self.seen <= OPENING or self.seen % EVERY == 0
        if self.fresh and len(logs) > 1:
            self._measure()

    def _measure(self) -> None:
        height, place = self.height, self._place
        self.gap = np.fmax.accumulate(height[::-1])[::-1] - height
        self.deepest = float(np.fmax.reduce(self.gap, initial=0.0))
        known = ~np.isnan(height)
        if not known.all():
            height, place = height[known], place[known]
            place = place - place.mean() if len(place) else place
        centred = height - np.add.reduce(height) / len(height) if len(height) else height
        width, power = float(place @ place), float(centred @ centred)
        self.slope = float(place @ centred) / width if width > 0 else 0.0
        self.fit = self.slope**2 * width / power if power > 0 else 0.0


def _centred(n: int) -> FloatArray:
    return np.arange(n, dtype=np.float64) - (n - 1) / 2
