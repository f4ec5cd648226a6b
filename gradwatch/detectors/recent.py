"""A straight line through the last few values of one number."""

from __future__ import annotations

import math

import numpy as np

from gradwatch.detectors.memory import FloatArray, Kept, Remembers

#: Values in the window: few, so that a blow-up within twenty steps is seen before it is over.
SPAN = 16
_PLACE = np.arange(SPAN) - (SPAN - 1) / 2
_SPREAD = float((_PLACE**2).sum())


class Recent(Remembers):
    """Slope of the last sixteen values, renewed every second step.

    Attributes:
        slope: Change per step; NaN until the window is full or while it holds a gap.
        certainty: The slope over its standard error.
    """

    values = Kept[list[float]]([])
    count = Kept(0)
    slope = Kept(math.nan)
    certainty = Kept(0.0)

    def add(self, value: float) -> None:
        """Take the next value; NaN is a gap."""
        values = self.values
        values.append(value)
        if len(values) > SPAN:
            del values[0]
        self.count += 1
        if self.count % 2 == 0 and len(values) == SPAN:
            self._fit(np.array(values))

    def _fit(self, values: FloatArray) -> None:
        centred = values - np.add.reduce(values) / SPAN
        self.slope = float(_PLACE @ centred) / _SPREAD
        residual = float(centred @ centred) - self.slope**2 * _SPREAD
        error = math.sqrt(max(residual, 1e-24) / ((SPAN - 2) * _SPREAD))
        self.certainty = self.slope / error if error > 0 else 0.0
