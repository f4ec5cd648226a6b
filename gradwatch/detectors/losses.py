"""The course of the loss, for the rules about it and as a witness for the rules about gradients."""

from __future__ import annotations

import math

from gradwatch.detectors.memory import Kept, Remembers


class LossCourse(Remembers):
    """Where the loss began, where it is and how noisy it is; all of it relative, so that any scale and sign will do."""

    seen = Kept(0)
    first = Kept(math.nan)
    start = Kept(math.nan)
    fast = Kept(math.nan)
    slow = Kept(math.nan)
    best = Kept(math.inf)
    best_step = Kept(0)
    noise = Kept(0.0)
    last = Kept(math.nan)
    least = Kept(math.inf)
    flips = Kept(0.0)
    rise = Kept(0.0)

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
        """The share of its first value that the loss has lost so far, at its best; 0 while unknown."""
        return (self.start - self.best) / self.scale if self.seen else 0.0

    @property
    def falling(self) -> bool:
        """Whether the loss is lower now than it was a while ago, beyond its noise."""
        return self.seen > 1 and self.slow - self.fast > 0.1 * self.noise + 1e-4 * self.scale

    def add(self, loss: float, step: int) -> None:
        """Take the finite loss of `step`."""
        self.seen += 1
        if self.seen == 1:
            self.first = self.start = self.fast = self.slow = self.last = loss
        elif self.seen <= 5:
            self.start += (loss - self.start) / self.seen
        change = loss - self.last
        self.noise += max(0.05, 1 / self.seen) * (min(abs(change), 5 * self.noise + abs(self.start)) - self.noise)
        self.flips += 0.05 * ((1.0 if change * self.rise < 0 else 0.0) - self.flips)
        self.rise = change
        self.fast += max(0.1, 1 / self.seen) * (loss - self.fast)
        self.slow += max(0.02, 1 / self.seen) * (loss - self.slow)
        self.last = loss
        self.least = min(self.least, loss)
        if self.fast < self.best:
            self.best, self.best_step = self.fast, step
