"""What is kept of a run for the diagnosis: its first step, and the distribution of the global norm."""

from __future__ import annotations

import bisect
import math

import numpy as np

from gradwatch.detectors.memory import FloatArray, Kept, Remembers
from gradwatch.detectors.profile import DepthProfile

#: Upper ends of the bins of the global norm's logarithm: a tenth of a factor of ten each, from 1e-12 to 1e12.
EDGES = [math.log(10) * exponent / 10 for exponent in range(-120, 121)]
#: Steps from which shares of steps mean something.
ENOUGH = 20


class Opening(Remembers):
    """The first step with a gradient: what the initialisation made of one batch.

    Attributes:
        seen: Whether it came.
        total: Logarithm of its global norm.
        drop, fit: Of the line through its depth profile, as in `DepthProfile`.
        matrices: Global norm over parameters of two or more dimensions.
        input_ratio: Gradient norm of the first layer over that of the second; NaN without them.
    """

    seen = Kept(False)
    total = Kept(math.nan)
    drop = Kept(0.0)
    fit = Kept(0.0)
    input_ratio = Kept(math.nan)
    matrices = Kept(math.nan)

    def take(self, total: float, logs: FloatArray, profile: DepthProfile, matrices: float) -> None:
        """Look at the first step; one without any gradient does not count."""
        if math.isnan(total):
            return
        self.seen, self.total, self.matrices = True, total, matrices
        self.drop, self.fit = profile.drop, profile.fit
        known = logs[~np.isnan(logs)]
        if len(known) > 1:
            self.input_ratio = math.exp(min(float(known[0] - known[1]), 700.0))


class Sizes(Remembers):
    """Counts of global norms in bins: enough to say which share of the steps was below a norm."""

    counts = Kept([0] * (len(EDGES) + 1))
    steps = Kept(0)

    def add(self, total: float) -> None:
        """Count the logarithm of a global norm; NaN counts as none."""
        if not math.isnan(total):
            self.counts[bisect.bisect_left(EDGES, total)] += 1
            self.steps += 1

    def below(self, norm: float) -> float:
        """Share of the steps whose norm was at most `norm`; NaN while there are few."""
        if self.steps < ENOUGH:
            return math.nan
        return sum(self.counts[: bisect.bisect_left(EDGES, math.log(norm)) + 1]) / self.steps

    def quantile(self, share: float) -> float:
        """The norm that this share of the steps did not exceed; NaN while there are few."""
        if self.steps < ENOUGH:
            return math.nan
        total = 0
        for i, count in enumerate(self.counts[:-1]):
            total += count
            if total >= share * self.steps:
                return math.exp(EDGES[i])
        return math.nan
