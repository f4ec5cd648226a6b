"""The course of the loss, for the rules about it and as a witness for the rules about gradients."""

from __future__ import annotations

import math

from gradwatch.detectors.memory import Kept, Part, Remembers
from gradwatch.detectors.recent import Recent

#: The median of so many first losses is where the loss began.
OPENING = 5
#: By then a loss has left behind what only its first weights made of it.
SETTLED = 50


class LossCourse(Remembers):
    """Where the loss began, where it is and how noisy it is; all of it relative, so that any scale and sign will do.

    Attributes:
        seen: Finite losses so far.
        start: Lower median of the first five.
        fast, slow: Means over about 10 and 50 steps.
        best: The least `fast` so far, reached at `best_step`.
        worst: The greatest `fast` since then.
        settled: `fast` after 50 losses; NaN before.
        noise: Running mean of the change from step to step.
        lag1, lag2, power: Running products of the deviation from `fast` with itself one step, two steps and none
            before.
    """

    seen = Kept(0)
    start = Kept(math.nan)
    opening = Kept[list[float]]([])
    fast = Kept(math.nan)
    slow = Kept(math.nan)
    best = Kept(math.inf)
    best_step = Kept(0)
    worst = Kept(-math.inf)
    settled = Kept(math.nan)
    noise = Kept(0.0)
    last = Kept(math.nan)
    before = Kept([0.0, 0.0])
    lag1 = Kept(0.0)
    lag2 = Kept(0.0)
    power = Kept(0.0)
    recent = Part(Recent)

    @property
    def known(self) -> bool:
        """Whether any finite loss was logged."""
        return self.seen > 0

    @property
    def scale(self) -> float:
        """What a change of the loss is held against."""
        return max(abs(self.start), self.noise, 1e-30)

    @property
    def fallen(self) -> float:
        """The share of its first value that the loss lost at its best, beyond its noise; 0 while unknown."""
        return (self.start - self.best - 0.6 * self.noise) / self.scale if self.seen else 0.0

    @property
    def fallen_late(self) -> float:
        """The same of what it lost since its first 50 steps; NaN before."""
        return (self.settled - self.best - 0.6 * self.noise) / self.scale

    @property
    def above_best(self) -> float:
        """How far the loss is above its best now, in shares of its first value; 0 while unknown."""
        return (self.fast - self.best) / self.scale if self.seen >= OPENING else 0.0

    @property
    def falling(self) -> bool:
        """Whether the loss is lower now than it was a while ago, beyond its noise."""
        return self.seen > 1 and self.slow - self.fast > 0.3 * self.noise + 1e-3 * self.scale

    @property
    def alternation(self) -> float:
        """How much the loss jumps up and down with period two: from -1 (not at all) to 1 (nothing else)."""
        return min(-self.lag1, self.lag2) / self.power if self.power > 0 else 0.0

    def add(self, loss: float, step: int) -> None:
        """Take the finite loss of `step`."""
        self.seen += 1
        if self.seen == 1:
            self.fast = self.slow = self.last = loss
        if self.seen <= OPENING:
            self.opening = sorted([*self.opening, loss])
            self.start = self.opening[(self.seen - 1) // 2]
        self._correlate(loss - self.fast)
        change = abs(loss - self.last)
        limit = 5 * self.noise + (abs(self.start) if self.seen <= OPENING else 0.0) + 1e-12 * abs(loss)
        self.noise += max(0.05, 1 / self.seen) * (min(change, limit) - self.noise)
        self.fast += max(0.1, 1 / self.seen) * (loss - self.fast)
        self.slow += max(0.02, 1 / self.seen) * (loss - self.slow)
        self.last = loss
        self.recent.add(loss)
        if self.seen == SETTLED:
            self.settled = self.fast
        if self.seen >= OPENING:
            self.worst = max(self.worst, self.fast)
        if self.seen >= OPENING and self.fast < self.best:
            self.best = self.worst = self.fast
            self.best_step = step

    def _correlate(self, deviation: float) -> None:
        one, two = self.before
        self.lag1 += 0.1 * (deviation * one - self.lag1)
        self.lag2 += 0.1 * (deviation * two - self.lag2)
        self.power += 0.1 * (deviation * deviation - self.power)
        self.before = [deviation, one]
